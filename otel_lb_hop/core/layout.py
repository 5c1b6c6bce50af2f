"""The mirror of bpf/lb_hop.h: the one place in Python that knows the bytes the programs read and write.

tests/unit/test_layout.py compiles the header with the host's C compiler and holds this file to it. Integers are
in the byte order of the host, ports and addresses in network order.
"""

from __future__ import annotations

import struct
import sys
from enum import IntEnum
from typing import TYPE_CHECKING, NamedTuple

from otel_lb_hop.errors import WireError
from otel_lb_hop.model import Failure, Outcome

if TYPE_CHECKING:
    from collections.abc import Iterator

LAYOUT_VERSION = 2

BOUNDS_NS = (
    1_000, 2_500, 5_000,
    10_000, 25_000, 50_000,
    100_000, 250_000, 500_000,
    1_000_000, 2_500_000, 5_000_000,
    10_000_000, 25_000_000, 50_000_000,
    100_000_000, 250_000_000, 500_000_000,
    1_000_000_000, 2_500_000_000, 5_000_000_000,
)  # fmt: skip
BUCKETS = len(BOUNDS_NS) + 1


class Unforwarded(IntEnum):
    """`enum lbh_unforwarded`: why a connection of this VIP port would not be translated."""

    DROPPED = 0
    NO_ENDPOINTS = 1
    NO_LOCAL_ENDPOINTS = 2


OUTCOME_OF = {
    Unforwarded.DROPPED: Outcome.DROPPED,
    Unforwarded.NO_ENDPOINTS: Outcome.NO_ENDPOINTS,
    Unforwarded.NO_LOCAL_ENDPOINTS: Outcome.NO_LOCAL_ENDPOINTS,
}


class OriginCode(IntEnum):
    """`enum lbh_origin`."""

    INTERNAL = 0
    EXTERNAL = 1


class Place(IntEnum):
    """`enum lbh_place`: where an address is, seen from this node."""

    OUTSIDE = 0
    INSIDE = 1
    THIS_NODE = 2


class Verdict(IntEnum):
    """`enum lbh_verdict`; from UNFORWARDED on, the rest is `Unforwarded`.

    TRANSLATED is a connection that conntrack told of: forwarded, and whether it was answered is not known.
    """

    ANSWERED = 0
    REFUSED = 1
    TIMEOUT = 2
    REPLY_UNSEEN = 3
    TRANSLATED = 4
    DROPPED = 5 + Unforwarded.DROPPED
    NO_ENDPOINTS = 5 + Unforwarded.NO_ENDPOINTS
    NO_LOCAL_ENDPOINTS = 5 + Unforwarded.NO_LOCAL_ENDPOINTS


FAILURE_OF = {Verdict.REFUSED: Failure.REFUSED, Verdict.TIMEOUT: Failure.TIMEOUT}


class Event(IntEnum):
    """`enum lbh_event`: index into the events map."""

    RECORD_SENT = 0
    RECORD_RATIO = 1
    RECORD_RATE = 2
    RECORD_RING_FULL = 3
    RECORD_NO_VERDICT = 4
    TRUNCATED = 5
    FRAGMENT = 6
    EXTENSION = 7
    ISN_SHARED = 8
    NO_SLOT = 9
    LATE = 10
    NO_ROW = 11
    CONNTRACK_UNREAD = 12


VIP_KEY = struct.Struct("=16s2sBx")
"""`struct lbh_vip_key`: address, port, transport."""
VIP_VALUE = struct.Struct("=IB3x")
"""`struct lbh_vip`: vip_id, unforwarded."""
BACKEND_KEY = struct.Struct("=I16s2s2x")
"""`struct lbh_backend_key`: vip_id, address, port."""
PREFIX = struct.Struct("=I16s")
"""`struct lbh_prefix`: bits (of 128), address."""
PLACE = struct.Struct("=I")
"""A value of places: `Place`."""
SETTINGS = struct.Struct("=QQQQQ")
"""`struct lbh_settings`, see `Settings`."""
RECORD = struct.Struct("=QQQQQ16s16s16s2s2s2sBBIIIIH6x")
"""`struct lbh_record`, see `Record`."""
MAX_UPLINKS = 64
UPLINKS = struct.Struct(f"={MAX_UPLINKS}I")
"""`struct lbh_uplinks`: interface indexes, ended by a zero."""
VIP_STATS_WORDS = 2 + 2 * len(Unforwarded) + 1
HISTOGRAM_WORDS = 1 + BUCKETS
HOP_STATS_WORDS = 7 + 2 * HISTOGRAM_WORDS + 1


class Settings(NamedTuple):
    """`struct lbh_settings`, in its order."""

    verdict_after_ns: int
    reject_below: int
    record_interval_ns: int
    record_burst_ns: int
    own_calls: int = 0

    def pack(self) -> bytes:
        """Make the bytes of the settings map's only value."""
        return SETTINGS.pack(*self)


class Record(NamedTuple):
    """`struct lbh_record`, in its order: one connection at its verdict. Times are monotonic nanoseconds.

    `snat` and `backend` hold something only if `forward_ns` is set or the verdict is TRANSLATED.
    """

    trace_high: int
    trace_low: int
    syn_ns: int
    forward_ns: int
    end_ns: int
    client: bytes
    snat: bytes
    backend: bytes
    client_port: bytes
    snat_port: bytes
    backend_port: bytes
    verdict: int
    origin: int
    vip_id: int
    hop_id: int
    in_ifindex: int
    out_ifindex: int
    retransmits: int


class Histogram(NamedTuple):
    """`struct lbh_histogram` summed over the CPUs."""

    sum_ns: int
    buckets: tuple[int, ...]

    @property
    def observations(self) -> int:
        """How many times were measured."""
        return sum(self.buckets)


class VipStats(NamedTuple):
    """`struct lbh_vip_stats` summed over the CPUs. The pairs are (internal, external)."""

    connections: tuple[int, int]
    unforwarded: tuple[tuple[int, ...], tuple[int, ...]]
    retransmits: int


class HopStats(NamedTuple):
    """`struct lbh_hop_stats` summed over the CPUs."""

    forwarded: tuple[int, int]
    answered: int
    refused: int
    timeout: int
    reply_unseen: int
    evicted: int
    forward: Histogram
    handshake: Histogram
    translated: int = 0


def pack_port(port: int) -> bytes:
    """Write a port in network order."""
    return port.to_bytes(2, "big")


def unpack_port(port: bytes) -> int:
    """Read a port in network order."""
    return int.from_bytes(port, "big")


def sum_cpus(raw: bytes, words: int) -> tuple[int, ...]:
    """Add up the copies of a per-CPU value: `raw` holds a row of `words` 64-bit counters for each CPU.

    Rows are added as one long integer each, which is exact while no counter of the sum passes 2^64.
    """
    row = words * 8
    if len(raw) % row or not raw:
        raise WireError(f"a per-CPU value has {len(raw)} bytes, which is no multiple of {row}")
    total = 0
    for start in range(0, len(raw), row):
        total += int.from_bytes(raw[start : start + row], sys.byteorder)
    return struct.unpack(f"={words}Q", total.to_bytes(row, sys.byteorder))


def unpack_vip_stats(raw: bytes) -> VipStats:
    """Sum a row of vip_stats over the CPUs."""
    words = sum_cpus(raw, VIP_STATS_WORDS)
    reasons = len(Unforwarded)
    return VipStats((words[0], words[1]), (words[2 : 2 + reasons], words[2 + reasons : 2 + 2 * reasons]), words[-1])


def unpack_hop_stats(raw: bytes) -> HopStats:
    """Sum a row of hop_stats over the CPUs."""
    words = sum_cpus(raw, HOP_STATS_WORDS)
    forward, handshake = words[7 : 7 + HISTOGRAM_WORDS], words[7 + HISTOGRAM_WORDS : -1]
    return HopStats(
        forwarded=(words[0], words[1]),
        answered=words[2],
        refused=words[3],
        timeout=words[4],
        reply_unseen=words[5],
        evicted=words[6],
        forward=Histogram(forward[0], forward[1:]),
        handshake=Histogram(handshake[0], handshake[1:]),
        translated=words[-1],
    )


RING_BUSY = 1 << 31
RING_DISCARD = 1 << 30
RING_HEADER = 8


class RingSlice(NamedTuple):
    """What one pass over the ring found: the payloads, where to go on, how many had a wrong size."""

    payloads: list[bytes]
    position: int
    wrong_size: int


def walk_ring(data: memoryview, position: int, produced: int, limit: int) -> RingSlice:
    """Collect the committed records between two positions of a BPF ring buffer.

    `data` is the data area, mapped twice in a row as the kernel offers it, so that a record never wraps
    (kernel/bpf/ringbuf.c). Stops at the first record that is still being written, or after `limit` payloads.
    """
    mask = len(data) // 2 - 1
    payloads: list[bytes] = []
    wrong_size = 0
    while position < produced and len(payloads) < limit:
        start = position & mask
        header = int.from_bytes(data[start : start + 4], sys.byteorder)
        if header & RING_BUSY:
            break
        size = header & ~(RING_BUSY | RING_DISCARD)
        if not header & RING_DISCARD:
            if size == RECORD.size:
                start += RING_HEADER
                payloads.append(bytes(data[start : start + size]))
            else:
                wrong_size += 1
        position += (size + RING_HEADER + 7) & ~7
    return RingSlice(payloads, position, wrong_size)


def decode_records(payloads: list[bytes]) -> Iterator[Record]:
    """Turn ring payloads, each of the size of a record, into records."""
    return map(Record._make, RECORD.iter_unpack(b"".join(payloads)))
