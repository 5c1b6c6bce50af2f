"""From a kernel record to a told connection: names in place of ids, wall time in place of the monotonic clock."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from otel_lb_hop.core.layout import FAILURE_OF, KIND, OUTCOME_OF, Kind, OriginCode, Unforwarded, Verdict, unpack_port
from otel_lb_hop.model import Failure, Hop, Origin, Outcome

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from otel_lb_hop.core.layout import RawRecord
    from otel_lb_hop.core.topology import HopRow, Topology, VipRow
    from otel_lb_hop.model import Backend

COURSES = 8_192
"""Most courses that are remembered, of some 2 KiB each with what encoders keep with them."""

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
    interface_out: str | None
    retransmits: int
    templates: dict[str, Any] = field(default_factory=dict)
    """What encoders have made of it once; it goes when the course is forgotten."""

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
    hop, node, zone_crossed = row[1:] if row else _UNKNOWN_HOP
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
        interface_out=interface_name(what.out_ifindex) if what.out_ifindex else None,
        retransmits=what.retransmits,
    )


class Courses:
    """The courses of the kinds seen lately, each resolved once until its VIP port changes in the topology."""

    def __init__(self, topology: Topology, interface_name: Callable[[int], str | None], limit: int = COURSES) -> None:
        self._topology = topology
        self._interface_name = interface_name
        self._limit = limit
        self._by_kind: dict[bytes, Course | None] = {}

    def of(self, records: Collection[RawRecord]) -> list[Course | None]:
        """Find the course of each record; None where `resolve` knows none, which the caller counts."""
        known = self._by_kind
        # Eight of nine fields are not looked at: the key is the last.
        found = [known.get(record[8]) for record in records]
        if None in found:
            found = [course or self._learn(record[8]) for course, record in zip(found, records, strict=True)]
        return found

    def forget(self, vip_ids: Collection[int]) -> None:
        """Resolve the courses of these VIP ports anew when they come again."""
        self._by_kind = {kind: each for kind, each in self._by_kind.items() if each and each.vip_id not in vip_ids}

    def forget_all(self) -> None:
        """Resolve all anew, as when interfaces have other names."""
        self._by_kind.clear()

    def _learn(self, kind: bytes) -> Course | None:
        course = self._by_kind.get(kind)
        if course is None:
            course = resolve(kind, self._topology, self._interface_name)
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
    syn_ns, forward_ns, end_ns, trace_id, client, snat, client_port, snat_port, _ = record
    return Connection(
        course=course,
        trace_id=trace_id,
        start_ns=syn_ns + offset_ns,
        forwarded_at_ns=forward_ns + offset_ns if course.timed else None,
        end_ns=end_ns + offset_ns,
        client=(client, client_port),
        snat=(snat, snat_port) if course.backend else None,
    )
