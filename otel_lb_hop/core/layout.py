"""The mirror of bpf/lb_hop.h: the one place in Python that knows the bytes the programs read and write.

tests/unit/test_layout.py compiles the header with the host's C compiler and holds this file to it. Integers are
in the byte order of the host, ports and addresses in network order.
"""

from __future__ import annotations

import struct
import sys
from enum import IntEnum
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

from otel_lb_hop.errors import WireError
from otel_lb_hop.model import Failure, Outcome

if TYPE_CHECKING:
    from collections.abc import Iterable

LAYOUT_VERSION = 4

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
    RECORD_OFF = 5
    TRUNCATED = 6
    FRAGMENT = 7
    EXTENSION = 8
    ISN_SHARED = 9
    NO_SLOT = 10
    LATE = 11
    NO_ROW = 12
    CONNTRACK_UNREAD = 13


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
KIND = struct.Struct("=16s2sBBIIIB3x")
"""`struct lbh_kind`, see `Kind`."""
_RECORD = f"QQQ16s16s16sHHH2x{KIND.size}s4x"
RECORD = struct.Struct("=" + _RECORD)
"""`struct lbh_record`, see `Record`."""
FLOW_BYTES = 40
"""Of a `struct lbh_flow`."""
TOLD_BYTES = 16
"""Of a `struct lbh_told`."""
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


class Kind(NamedTuple):
    """`struct lbh_kind`, in its order: what a connection has in common with all others of its kind."""

    backend: bytes
    backend_port: bytes
    verdict: int
    origin: int
    vip_id: int
    hop_id: int
    in_ifindex: int
    translated: int


class Record(NamedTuple):
    """`struct lbh_record`, in its order: one connection at its verdict. Times are monotonic nanoseconds.

    `kind` is a `Kind` as bytes, which serve as a key. The client's and the SNAT source's ports are numbers.
    """

    syn_ns: int
    forward_ns: int
    end_ns: int
    trace_id: bytes
    client: bytes
    snat: bytes
    client_port: int
    snat_port: int
    retransmits: int
    kind: bytes


RawRecord: TypeAlias = tuple[int, int, int, bytes, bytes, bytes, int, int, int, bytes]
"""A `Record` without its names, as the ring gives it: they cost more than the decoding."""


class Histogram(NamedTuple):
    """`struct lbh_histogram` summed over the CPUs."""

    sum_ns: int
    words: bytes
    """The buckets' counters as bytes: thousands of histograms wait for an export, and most buckets are read once."""

    @classmethod
    def of(cls, sum_ns: int, buckets: Iterable[int]) -> Histogram:
        """Make one of numbers."""
        return cls(sum_ns, _words(BUCKETS).pack(*buckets))

    @property
    def buckets(self) -> tuple[int, ...]:
        """The buckets' counters."""
        return _words(BUCKETS).unpack(self.words)

    def plus(self, other: Histogram) -> Histogram:
        """Add up two of them."""
        return Histogram(self.sum_ns + other.sum_ns, _sum_rows(self.words + other.words, len(self.words)))

    def minus(self, earlier: Histogram) -> Histogram:
        """Take away what was in it before; no bucket of a later one has less."""
        words = int.from_bytes(self.words, sys.byteorder) - int.from_bytes(earlier.words, sys.byteorder)
        return Histogram(self.sum_ns - earlier.sum_ns, words.to_bytes(len(self.words), sys.byteorder))

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
    """Add up the copies of a per-CPU value: `raw` holds a row of `words` 64-bit counters for each CPU."""
    return _words(words).unpack(_sum_rows(raw, words * 8))


def add_cpus(raw: bytes, other: bytes, words: int) -> bytes:
    """Add up all copies of two per-CPU values: a row of `words` counters as bytes, one copy's."""
    return _sum_rows(raw + other, words * 8)


def _sum_rows(raw: bytes, row: int) -> bytes:
    """Add rows as one long integer each, which is exact while no counter of the sum passes 2^64."""
    if len(raw) % row or not raw:
        raise WireError(f"a per-CPU value has {len(raw)} bytes, which is no multiple of {row}")
    total = 0
    for start in range(0, len(raw), row):
        total += int.from_bytes(raw[start : start + row], sys.byteorder)
    return total.to_bytes(row, sys.byteorder)


@lru_cache(8)
def _words(number: int) -> struct.Struct:
    """Make it once: finding a format by its text takes as long as the rest."""
    return struct.Struct(f"={number}Q")


def unpack_vip_stats(raw: bytes) -> VipStats:
    """Sum a row of vip_stats over the CPUs."""
    words = sum_cpus(raw, VIP_STATS_WORDS)
    reasons = len(Unforwarded)
    return VipStats((words[0], words[1]), (words[2 : 2 + reasons], words[2 + reasons : 2 + 2 * reasons]), words[-1])


_HOP_STATS = struct.Struct(f"=7QQ{8 * BUCKETS}sQ{8 * BUCKETS}sQ")


def unpack_hop_stats(raw: bytes) -> HopStats:
    """Sum a row of hop_stats over the CPUs."""
    (
        internal, external, answered, refused, timeout, reply_unseen, evicted,
        forward_ns, forward, handshake_ns, handshake, translated,
    ) = _HOP_STATS.unpack(_sum_rows(raw, _HOP_STATS.size))  # fmt: skip
    # By position: naming the fields would take as long as adding them up.
    return HopStats(
        (internal, external),
        answered,
        refused,
        timeout,
        reply_unseen,
        evicted,
        Histogram(forward_ns, forward),
        Histogram(handshake_ns, handshake),
        translated,
    )


RING_BUSY = 1 << 31
RING_DISCARD = 1 << 30
RING_HEADER = 8
RING_STRIDE = RING_HEADER + RECORD.size
"""Of one record in the ring; with its header it is a multiple of the ring's 8 bytes."""
_IN_RING = struct.Struct(f"={RING_HEADER}x" + _RECORD)


class RingSlice(NamedTuple):
    """What one pass over the ring found: the records, where to go on, how many had a wrong size."""

    records: list[RawRecord]
    position: int
    wrong_size: int


def walk_ring(data: memoryview, position: int, produced: int, limit: int) -> RingSlice:
    """Decode the committed records between two positions of a BPF ring buffer, at most `limit` of them.

    `data` is the data area, mapped twice in a row as the kernel offers it, so that a record never wraps
    (kernel/bpf/ringbuf.c). Stops at the first record that is still being written. Headers are read before what they
    are the headers of.
    """
    records: list[RawRecord] = []
    wrong_size = 0
    while position < produced and len(records) < limit:
        start = position & len(data) // 2 - 1
        steps = min((produced - position) // RING_STRIDE, limit - len(records), (len(data) - start) // RING_STRIDE)
        headers = data[start : start + steps * RING_STRIDE].cast("I")[:: RING_STRIDE // 4].tolist()
        good = steps
        if headers.count(RECORD.size) < steps:
            good = next(index for index, header in enumerate(headers) if header != RECORD.size)
        if good:
            records += _IN_RING.iter_unpack(bytes(data[start : start + good * RING_STRIDE]))
            position += good * RING_STRIDE
            continue
        (header,) = data[start : start + 4].cast("I")
        if header & RING_BUSY:
            break
        wrong_size += not header & RING_DISCARD
        position += ((header & ~RING_DISCARD) + RING_HEADER + 7) & ~7
    return RingSlice(records, position, wrong_size)
