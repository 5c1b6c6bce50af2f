"""What an agent leaves to the next one in pinned maps, besides the counters: bytes in, values out, and back.

- names: whose counters a row holds, and since when.
- notes: the state (what was loaded, and when), the journal (what counters of forgotten rows became), and the mark (how
  many records were settled).
- delivered: what exporters that get deltas have of each series; only where there are such.

Every change is one write of one entry, so an agent may be killed between any two of them.
"""

from __future__ import annotations

import json
import struct
import sys
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from otel_lb_hop.core.layout import BUCKETS, HOP_STATS_WORDS
from otel_lb_hop.core.topology import HopRow, Name, VipRow
from otel_lb_hop.errors import WireError
from otel_lb_hop.model import Hop, Policy, Transport

if TYPE_CHECKING:
    from collections.abc import Callable

NAME_BYTES = 440
"""With what the kernel adds it makes 512; the longest names that Kubernetes lets take less."""
NOTE_BYTES = 1_024

STATE, JOURNAL, MARK = (number.to_bytes(4, sys.byteorder) for number in range(3))
"""Keys of notes."""


class State(NamedTuple):
    """What was loaded into the kernel."""

    layout: str
    """Of the maps: another agent can go on with them only if its own is the same."""
    build: str
    """Of the programs: another agent loads its own if this is not the same. Empty while they are exchanged."""
    hash_secrets: tuple[int, int]
    """By which the handshake table is hashed: multiplier and addend."""
    created_ns: int
    """The wall clock's time from which on the kernel counts."""
    netns: int
    """The network namespace (inode) that is watched."""
    node_name: str
    """As which the agent told what is counted: under another name it would tell it a second time."""
    ring: str
    """The pin of the ring."""
    previous_ring: str
    """The pin of the ring before it, until that is read to its end; or empty."""
    earlier_records: int
    """Records that went through the rings before the previous one, or before the ring if there is none."""


class Journal(NamedTuple):
    """What the latest forgetting of a row does; done twice it does no more than once.

    The row `removed` goes, after its counters went into the row `into`, whose value is then `merged`. The totals are
    those of all rows that went and into no other.
    """

    connections: int
    verdicts: int
    last_id: int = 0
    """The highest id of all rows that went: it is not used again."""
    removed: int = 0
    """Id of a row of vip_stats if `is_vip`, else of hop_stats; 0: there is nothing to do."""
    is_vip: bool = False
    into: int = 0
    """Id of a row of hop_stats, or 0."""
    merged: bytes = bytes(HOP_STATS_WORDS * 8)


DELIVERED_KEY_BYTES = 16


class Delivered(NamedTuple):
    """What was delivered of a series."""

    time_ns: int
    """The wall clock's, up to which it was counted."""
    number: int | float
    """The counter; of a histogram the sum in ns. Whole, or it is not kept."""
    words: bytes
    """Of a histogram the buckets."""


class Mark(NamedTuple):
    """How far an agent has come; written again and again."""

    settled: int
    """Of all records ever: exported, or dropped and counted."""
    hears_conntrack: bool


_Made = TypeVar("_Made")

_JOURNAL = struct.Struct(f"=QQIII?xxx{HOP_STATS_WORDS * 8}s")
_MARK = struct.Struct("=Q?")
_DELIVERED = struct.Struct(f"=Qq{8 * BUCKETS}s")
DELIVERED_BYTES = _DELIVERED.size


def pack_name(name: Name) -> bytes:
    """Write a row's name; raises WireError if it is too long to be kept."""
    row = name.identity
    if isinstance(row, VipRow):
        fields = [row.namespace, row.service, row.address.hex(), row.port, row.transport.value, row.policy.value]
    else:
        fields = [row.vip_id, row.hop.value, row.node, row.zone_crossed]
        if row.zone is not None:
            fields.append(row.zone)
    raw = json.dumps([name.created_ns, *fields], ensure_ascii=False, separators=(",", ":")).encode(
        "utf-8", "surrogatepass"
    )
    if len(raw) > NAME_BYTES:
        raise WireError(f"the name of a row has {len(raw)} bytes, {NAME_BYTES} can be kept: {row}")
    return raw


def unpack_name(raw: bytes) -> Name:
    """Read a row's name; raises WireError."""
    return _read(raw, _name)


def _name(fields: Any) -> Name:  # noqa: ANN401 - what JSON held
    created_ns, *rest = fields
    if isinstance(rest[0], str):
        namespace, service, address, port, transport, policy = rest
        vip = VipRow(namespace, service, bytes.fromhex(address), int(port), Transport(transport), Policy(policy))
        return Name(vip, int(created_ns))
    vip_id, hop, node, zone_crossed, *zone = rest
    if not all(isinstance(each, str) for each in zone):
        raise ValueError(zone)
    return Name(HopRow(int(vip_id), Hop(hop), node, zone_crossed, *zone), int(created_ns))


def pack_state(state: State) -> bytes:
    """Write the state."""
    return json.dumps(state._asdict()).encode()


def unpack_state(raw: bytes) -> State:
    """Read the state; raises WireError."""
    return _read(raw, _state)


def _state(fields: Any) -> State:  # noqa: ANN401 - what JSON held
    multiplier, addend = fields["hash_secrets"]
    return State(
        str(fields["layout"]),
        str(fields["build"]),
        (int(multiplier), int(addend)),
        int(fields["created_ns"]),
        int(fields["netns"]),
        str(fields["node_name"]),
        str(fields["ring"]),
        str(fields["previous_ring"]),
        int(fields["earlier_records"]),
    )


def pack_journal(journal: Journal) -> bytes:
    """Write the journal."""
    return _JOURNAL.pack(*journal[:4], journal.into, journal.is_vip, journal.merged)


def unpack_journal(raw: bytes) -> Journal:
    """Read the journal."""
    connections, verdicts, last_id, removed, into, is_vip, merged = _JOURNAL.unpack_from(raw)
    return Journal(connections, verdicts, last_id, removed, is_vip, into, merged)


def pack_mark(mark: Mark) -> bytes:
    """Write the mark."""
    return _MARK.pack(*mark)


def unpack_mark(raw: bytes) -> Mark:
    """Read the mark."""
    return Mark(*_MARK.unpack_from(raw))


def pack_delivered(delivered: Delivered) -> bytes:
    """Write what was delivered."""
    return _DELIVERED.pack(*delivered)


def unpack_delivered(raw: bytes) -> Delivered:
    """Read what was delivered; a counter has no words, here they are zeros."""
    return Delivered(*_DELIVERED.unpack_from(raw))


def _read(raw: bytes, make: Callable[[Any], _Made]) -> _Made:
    try:
        return make(json.loads(raw.rstrip(b"\0")))
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise WireError(f"a note that an agent left cannot be read: {error!r}") from error
