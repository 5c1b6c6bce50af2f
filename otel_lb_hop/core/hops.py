"""From a kernel record to a told connection: names in place of ids, wall time in place of the monotonic clock."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from otel_lb_hop.core.layout import FAILURE_OF, KIND, OUTCOME_OF, Kind, OriginCode, Unforwarded, Verdict, unpack_port
from otel_lb_hop.model import Failure, Hop, Origin, Outcome, Transport

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping

    from otel_lb_hop.core.layout import RawRecord
    from otel_lb_hop.core.topology import HopRow, Topology, VipRow
    from otel_lb_hop.model import Backend

COURSES = 4_096
"""Most courses that are remembered, of some 3.5 KiB each with what encoders of both signals keep with them."""
INTERFACES = 4_096
"""Most interfaces whose names are remembered, also after they have gone: records of them are still under way."""

ORIGIN_OF: dict[int, Origin] = {OriginCode.INTERNAL: Origin.INTERNAL, OriginCode.EXTERNAL: Origin.EXTERNAL}
_VERDICTS = frozenset(Verdict)
_UNKNOWN_HOP = (Hop.UNKNOWN, None, None)


@dataclass(frozen=True, slots=True, eq=False)
class Course:
    """What became of all connections of one kind: everything but who, when and how long.

    `backend` is None if the translation was not seen; `answered` if nobody can know, as of UDP.
    """

    vip_id: int
    vip: VipRow
    backend: tuple[bytes, int] | None
    endpoint: Backend | None
    outcome: Outcome
    hop: Hop
    node: str | None
    zone: str | None
    zone_crossed: bool | None
    origin: Origin
    failure: Failure | None
    answered: bool | None
    timed: bool
    """Whether the time of the translation was measured."""
    interface_in: str | None
    templates: dict[str, Any] = field(default_factory=dict)
    """What encoders have made of it once; it goes when the course is forgotten."""

    @property
    def tcp(self) -> bool:
        """Whether it had a SYN that could be sent again."""
        return self.vip.transport is Transport.TCP

    @property
    def bad(self) -> bool:
        """Whether its connections were lost on the way: never forwarded, or the handshake failed."""
        return self.failure is not None or self.outcome is not Outcome.FORWARDED


def resolve(kind: bytes, topology: Topology, interface_name: Callable[[int], str | None]) -> Course | None:
    """Name everything in a record's kind; None if its VIP port, verdict or origin is not known."""
    what = Kind._make(KIND.unpack(kind))
    vip = topology.vips.by_id.get(what.vip_id)
    if vip is None or what.verdict not in _VERDICTS or what.origin not in ORIGIN_OF:
        return None
    verdict = Verdict(what.verdict)
    forwarded = verdict < Verdict.DROPPED
    row: HopRow | None = topology.hops.by_id.get(what.hop_id) if forwarded else None
    hop, node, zone_crossed = row[1:4] if row else _UNKNOWN_HOP
    backend = (what.backend, unpack_port(what.backend_port)) if what.translated else None
    endpoint = topology.backend(what.vip_id, *backend) if backend else None
    return Course(
        vip_id=what.vip_id,
        vip=vip,
        backend=backend,
        endpoint=endpoint,
        outcome=Outcome.FORWARDED if forwarded else OUTCOME_OF[Unforwarded(verdict - Verdict.DROPPED)],
        hop=hop,
        node=node,
        zone=topology.zone_of(endpoint) if endpoint else None,
        zone_crossed=zone_crossed,
        origin=ORIGIN_OF[what.origin],
        failure=FAILURE_OF.get(verdict),
        answered=None if verdict is Verdict.TRANSLATED else verdict is Verdict.ANSWERED,
        timed=backend is not None and verdict is not Verdict.TRANSLATED,
        interface_in=interface_name(what.in_ifindex) if what.in_ifindex else None,
    )


class Courses:
    """The courses of the kinds seen lately, each resolved once until something changes that it says."""

    def __init__(self, topology: Topology, limit: int = COURSES) -> None:
        self._topology = topology
        self._limit = limit
        self._interfaces: dict[int, str] = {}
        self._by_kind: dict[bytes, Course] = {}

    def of(self, records: Collection[RawRecord]) -> list[Course | None]:
        """Find the course of each record; None where `resolve` knows none, which the caller counts."""
        known = self._by_kind
        found = [known.get(record[-1]) for record in records]
        if None in found:
            found = [course or self._learn(record[-1]) for course, record in zip(found, records, strict=True)]
        return found

    def forget(self, vip_ids: Collection[int]) -> None:
        """Resolve the courses of these VIP ports anew when they come again."""
        self._by_kind = {kind: each for kind, each in self._by_kind.items() if each.vip_id not in vip_ids}

    def name_interfaces(self, names: Mapping[int, str]) -> None:
        """Take over the names of the interfaces that there are, by index; if one has another name now, all is anew."""
        if any(self._interfaces.get(index, name) != name for index, name in names.items()):
            self._by_kind.clear()
        if len(self._interfaces) > INTERFACES:
            self._interfaces.clear()
        self._interfaces |= names

    def _learn(self, kind: bytes) -> Course | None:
        course = self._by_kind.get(kind)
        if course is None:
            course = resolve(kind, self._topology, self._interfaces.get)
            if course:
                if len(self._by_kind) >= self._limit:
                    del self._by_kind[next(iter(self._by_kind))]
                self._by_kind[kind] = course
        return course


class Connection(NamedTuple):
    """One connection as the records tell it. Times are Unix nanoseconds, durations nanoseconds.

    `snat` is None if the translation was not seen; `forward_ns` and `handshake_ns` if they were not measured.
    """

    course: Course
    trace_id: bytes
    start_ns: int
    forwarded_at_ns: int | None
    end_ns: int
    client: tuple[bytes, int]
    snat: tuple[bytes, int] | None
    retransmits: int

    @property
    def forward_ns(self) -> int | None:
        """First packet in → translated packet out."""
        return None if self.forwarded_at_ns is None else self.forwarded_at_ns - self.start_ns

    @property
    def handshake_ns(self) -> int | None:
        """SYN in → SYN-ACK out, on this node."""
        return self.end_ns - self.start_ns if self.course.answered else None


def tell(record: RawRecord, course: Course, offset_ns: int) -> Connection:
    """Put a record and its course together. `offset_ns` is wall time minus monotonic time."""
    syn_ns, forward_ns, end_ns, trace_id, client, snat, client_port, snat_port, retransmits, _ = record
    return Connection(
        course=course,
        trace_id=trace_id,
        start_ns=syn_ns + offset_ns,
        forwarded_at_ns=forward_ns + offset_ns if course.timed else None,
        end_ns=end_ns + offset_ns,
        client=(client, client_port),
        snat=(snat, snat_port) if course.backend else None,
        retransmits=retransmits,
    )
