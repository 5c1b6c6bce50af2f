"""From a kernel record to a told connection: names in place of ids, wall time in place of the monotonic clock."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from otel_lb_hop.core.layout import FAILURE_OF, OUTCOME_OF, OriginCode, Unforwarded, Verdict, unpack_port
from otel_lb_hop.model import Failure, Hop, Origin, Outcome

if TYPE_CHECKING:
    from collections.abc import Callable

    from otel_lb_hop.core.layout import Record
    from otel_lb_hop.core.topology import HopRow, Topology, VipRow
    from otel_lb_hop.model import Backend

ORIGIN_OF: dict[int, Origin] = {OriginCode.INTERNAL: Origin.INTERNAL, OriginCode.EXTERNAL: Origin.EXTERNAL}
_VERDICTS = frozenset(Verdict)
_UNKNOWN_HOP = (Hop.UNKNOWN, None, None)


class Connection(NamedTuple):
    """One connection as the records tell it. Times are Unix nanoseconds, durations nanoseconds.

    `snat` and `backend` are None if the translation was not seen; `forward_ns` and `handshake_ns` if they were
    not measured; `answered` if nobody can know, as of UDP.
    """

    trace_high: int
    trace_low: int
    start_ns: int
    forwarded_at_ns: int | None
    end_ns: int
    vip_id: int
    vip: VipRow
    client: tuple[bytes, int]
    snat: tuple[bytes, int] | None
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
    interface_in: str | None
    interface_out: str | None
    retransmits: int

    @property
    def forward_ns(self) -> int | None:
        """First packet in → translated packet out."""
        return None if self.forwarded_at_ns is None else self.forwarded_at_ns - self.start_ns

    @property
    def handshake_ns(self) -> int | None:
        """SYN in → SYN-ACK out, on this node."""
        return self.end_ns - self.start_ns if self.answered else None


def resolve(
    record: Record, topology: Topology, offset_ns: int, interface_name: Callable[[int], str | None]
) -> Connection | None:
    """Name everything in a record; None if its VIP port, verdict or origin is not known (the caller counts it).

    `offset_ns` is wall time minus monotonic time.
    """
    vip = topology.vips.by_id.get(record.vip_id)
    if vip is None or record.verdict not in _VERDICTS or record.origin not in ORIGIN_OF:
        return None
    verdict = Verdict(record.verdict)
    forwarded = verdict < Verdict.DROPPED
    translated = bool(record.forward_ns) or verdict is Verdict.TRANSLATED
    row: HopRow | None = topology.hops.by_id.get(record.hop_id) if forwarded else None
    hop, node, zone_crossed = row[1:] if row else _UNKNOWN_HOP
    backend = (record.backend, unpack_port(record.backend_port)) if translated else None
    endpoint = topology.backend(record.vip_id, *backend) if backend else None
    return Connection(
        trace_high=record.trace_high,
        trace_low=record.trace_low,
        start_ns=record.syn_ns + offset_ns,
        forwarded_at_ns=record.forward_ns + offset_ns if record.forward_ns else None,
        end_ns=record.end_ns + offset_ns,
        vip_id=record.vip_id,
        vip=vip,
        client=(record.client, unpack_port(record.client_port)),
        snat=(record.snat, unpack_port(record.snat_port)) if translated else None,
        backend=backend,
        endpoint=endpoint,
        outcome=Outcome.FORWARDED if forwarded else OUTCOME_OF[Unforwarded(verdict - Verdict.DROPPED)],
        hop=hop,
        node=node,
        zone=topology.zone_of(endpoint) if endpoint else None,
        zone_crossed=zone_crossed,
        origin=ORIGIN_OF[record.origin],
        failure=FAILURE_OF.get(verdict),
        answered=None if verdict is Verdict.TRANSLATED else verdict is Verdict.ANSWERED,
        interface_in=interface_name(record.in_ifindex) if record.in_ifindex else None,
        interface_out=interface_name(record.out_ifindex) if record.out_ifindex else None,
        retransmits=record.retransmits,
    )
