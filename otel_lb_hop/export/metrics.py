"""From a snapshot of the kernel's counters to the points of metrics: which there are, and what they say.

No format is known here: `otlp_metrics` makes OTLP bytes of the points and `sdk_metrics` the SDK's classes. Nothing is
counted here either. Every point has the start time of its row, so a row that is new is a new series and never looks
like a counter that fell.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from otel_lb_hop import semconv
from otel_lb_hop.config import METRIC_SERIES, MetricAttributes
from otel_lb_hop.core.hops import ORIGIN_OF
from otel_lb_hop.core.layout import (
    BUCKETS,
    OUTCOME_OF,
    Event,
    Histogram,
    HopStats,
    OriginCode,
    Unforwarded,
    VipStats,
)
from otel_lb_hop.core.ledger import KERNEL, METRICS, RING
from otel_lb_hop.core.topology import HopRow, Placement
from otel_lb_hop.export.attributes import Attributes, Labels, hop_attributes, vip_attributes
from otel_lb_hop.export.limit import Limit, SeriesUsage
from otel_lb_hop.export.points import Instrument, Kind, Metric, Point
from otel_lb_hop.model import Failure, Hop, Origin, Outcome, Policy, Transport

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from otel_lb_hop.core.ledger import Stage
    from otel_lb_hop.core.topology import Topology
    from otel_lb_hop.export.delta import Memory

NO_HISTOGRAM = Histogram.of(0, (0,) * BUCKETS)
NO_CONNECTION = VipStats((0, 0), ((0,) * len(Unforwarded),) * 2, 0)
NO_HOP = HopStats((0, 0), 0, 0, 0, 0, 0, NO_HISTOGRAM, NO_HISTOGRAM)

EVENT_DROPS = {event: event.name.lower() for event in Event if event >= Event.TRUNCATED}
HOP_ROWS_REMEMBERED = 8_192
_METRICS_OF_VIP_PORTS = 8
USUAL = MetricAttributes()
_SERIES = int(METRIC_SERIES.default)


Told: TypeAlias = tuple[Attributes, float]
"""Of what the agent says of itself: attributes beyond the node's name, and the value."""


CONNECTIONS = Instrument(
    Kind.COUNTER, semconv.METRIC_CONNECTIONS, "{connection}", "Connections that entered this node by a VIP port"
)
PENDING = Instrument(
    Kind.GAUGE,
    semconv.METRIC_CONNECTIONS_PENDING,
    "{connection}",
    "Connections that are neither forwarded nor given up yet",
)
FAILURES = Instrument(
    Kind.COUNTER, semconv.METRIC_HANDSHAKE_FAILURES, "{connection}", "Forwarded connections whose handshake failed"
)
UNSEEN = Instrument(
    Kind.COUNTER,
    semconv.METRIC_REPLIES_UNSEEN,
    "{connection}",
    "Forwarded connections whose answer took another way (direct server return, asymmetric routing)",
)
RETRANSMITS = Instrument(Kind.COUNTER, semconv.METRIC_SYN_RETRANSMITS, "{packet}", "SYNs that clients sent again")
FORWARD = Instrument(
    Kind.HISTOGRAM,
    semconv.METRIC_FORWARD_DURATION,
    "s",
    "From the first packet in to the translated packet out, on this node",
)
HANDSHAKE = Instrument(
    Kind.HISTOGRAM, semconv.METRIC_HANDSHAKE_DURATION, "s", "From the SYN in to the SYN-ACK out, on this node"
)
ENDPOINTS = Instrument(
    Kind.GAUGE,
    semconv.METRIC_ENDPOINTS,
    "{endpoint}",
    "Endpoints that kube-proxy picks from, by where they are, seen from this node",
)
VIP_PORTS = Instrument(Kind.GAUGE, semconv.METRIC_VIP_PORTS, "{vip_port}", "VIP ports that are watched")
CLUSTER_NODES = Instrument(
    Kind.GAUGE,
    semconv.METRIC_CLUSTER_NODES,
    "{node}",
    "Nodes of the cluster by the API server, or without it those that the VIP file names",
)
EVENTS_DROPPED = Instrument(
    Kind.COUNTER, semconv.METRIC_EVENTS_DROPPED, "{event}", "Packets and events that could not be told"
)
TOPOLOGY_AGE = Instrument(
    Kind.GAUGE, semconv.METRIC_TOPOLOGY_AGE, "s", "Since the topology was last known to be current"
)
MAP_USAGE = Instrument(Kind.GAUGE, semconv.METRIC_MAP_USAGE, "{entry}", "Entries in a kernel table")
MAP_LIMIT = Instrument(Kind.GAUGE, semconv.METRIC_MAP_LIMIT, "{entry}", "Entries that a kernel table can hold")
SERIES = Instrument(
    Kind.GAUGE, semconv.METRIC_SERIES, "{series}", "Series of VIP ports that have a data point of their own"
)
SERIES_LIMIT = Instrument(
    Kind.GAUGE, semconv.METRIC_SERIES_LIMIT, "{series}", "Most data points about VIP ports in an export"
)
SERIES_SUMMED = Instrument(
    Kind.GAUGE,
    semconv.METRIC_SERIES_SUMMED,
    "{series}",
    "Series of VIP ports beyond the limit, summed into one data point of each metric",
)
PART_HEALTHY = Instrument(
    Kind.GAUGE, semconv.METRIC_PART_HEALTHY, "{part}", "1 if a part of the agent works as it should, else 0"
)
RECORDS_SEEN = Instrument(Kind.COUNTER, semconv.METRIC_RECORDS_SEEN, "{record}", "Records that came to a stage")
RECORDS_EXPORTED = Instrument(
    Kind.COUNTER, semconv.METRIC_RECORDS_EXPORTED, "{record}", "Records that an exporter delivered"
)
RECORDS_DROPPED = Instrument(
    Kind.COUNTER, semconv.METRIC_RECORDS_DROPPED, "{record}", "Records that ended at a stage, by reason"
)
RECORDS_IN_FLIGHT = Instrument(Kind.GAUGE, semconv.METRIC_RECORDS_IN_FLIGHT, "{record}", "Records that are in a stage")
POINTS_SEEN = Instrument(
    Kind.COUNTER, semconv.METRIC_POINTS_SEEN, "{data_point}", "Data points of metrics that came to a stage"
)
POINTS_EXPORTED = Instrument(
    Kind.COUNTER, semconv.METRIC_POINTS_EXPORTED, "{data_point}", "Data points of metrics that an exporter delivered"
)
POINTS_DROPPED = Instrument(
    Kind.COUNTER, semconv.METRIC_POINTS_DROPPED, "{data_point}", "Data points that ended at a stage, by reason"
)
POINTS_IN_FLIGHT = Instrument(
    Kind.GAUGE, semconv.METRIC_POINTS_IN_FLIGHT, "{data_point}", "Data points that are in a stage"
)
CPU_TIME = Instrument(Kind.COUNTER, semconv.METRIC_PROCESS_CPU_TIME, "s", "CPU time that the agent's process has used")
MEMORY_USAGE = Instrument(
    Kind.UP_DOWN, semconv.METRIC_PROCESS_MEMORY_USAGE, "By", "Physical memory that the agent's process has"
)


class Usage(NamedTuple):
    """What the agent's process has used of the machine."""

    cpu_user_s: float
    cpu_system_s: float
    memory_bytes: int
    """Resident."""


class SelfReport(NamedTuple):
    """What the agent says of itself in one export."""

    events: tuple[int, ...]
    """The kernel's counters by `Event`."""
    stages: Sequence[Stage]
    """The ledger, each record's way from its first stage to its last."""
    vip_ports: int
    topology_age_s: float
    map_usage: Mapping[str, tuple[int, int]]
    """Map → (entries, limit)."""
    parts_healthy: Mapping[str, bool]
    process: Usage
    cluster_nodes: int | None = None
    """None where no source names nodes."""


class MetricsBuilder:
    """Makes points out of snapshots. Keeps labels made once per row.

    What the kernel counts goes on through restarts of the agent, and has the start time `counting_since_ns`; what the
    agent counts of itself begins with it, at `started_ns`.
    """

    def __init__(
        self,
        topology: Topology,
        node_name: str,
        started_ns: int,
        counting_since_ns: int,
        *,
        attributes: MetricAttributes = USUAL,
        series: int = _SERIES,
        open_memory: Callable[[bool], Memory | None] = lambda _: None,
    ) -> None:
        """Tell no more than so many `series` of VIP ports each for itself (export/limit.py)."""
        common = {semconv.K8S_NODE_NAME: node_name}
        self._limit = Limit(
            series,
            common,
            metrics=_METRICS_OF_VIP_PORTS,
            attributes=attributes,
            since_ns=counting_since_ns,
            now_ns=started_ns,
            open_memory=open_memory,
        )
        self._attributes = attributes
        self._topology = topology
        self._node_name = node_name
        self._started_ns = started_ns
        self._counting_since_ns = counting_since_ns
        self._self_labels = _labels({semconv.K8S_NODE_NAME: node_name})
        self._vip_labels: dict[int, Labels] = {}
        self._used: set[int] = set()

    def build(self, vips: Mapping[int, VipStats], hops: Mapping[int, HopStats], report: SelfReport) -> Iterator[Metric]:
        """Make one export. A metric's points are to be taken before the next metric, and may be none."""
        self._forget_gone()
        # A cluster has thousands of VIP ports that never take a connection on this node: of them only the endpoints.
        rows = self._topology.hops.by_id
        self._used.update(_busy(vips, NO_CONNECTION))
        self._used.update(rows[hop_id].vip_id for hop_id in _busy(hops, NO_HOP))
        used_vips = {vip_id: stats for vip_id, stats in vips.items() if vip_id in self._used}
        used_hops = {hop_id: stats for hop_id, stats in hops.items() if rows[hop_id].vip_id in self._used}
        yield from self._limit.hold(self._of_vip_ports(used_vips, used_hops))
        for instrument, points in self._self_points(report).items():
            yield Metric(
                instrument,
                [
                    (self._self_labels, _labels(labels), self._since_ns(instrument, labels), value)
                    for labels, value in points
                ],
            )

    @property
    def usage(self) -> SeriesUsage:
        """How far the bound on series is used, as of the latest export."""
        return self._limit.usage

    def _since_ns(self, instrument: Instrument, labels: Attributes) -> int:
        stage = labels.get(semconv.STAGE)
        by_kernel = instrument is EVENTS_DROPPED or stage == KERNEL or (stage == RING and instrument is RECORDS_SEEN)
        return self._counting_since_ns if by_kernel else self._started_ns

    def pending(self, vips: Mapping[int, VipStats], hops: Mapping[int, HopStats]) -> dict[int, int]:
        """Count, by VIP port's id, the connections that came in less those that were forwarded or given up.

        Each is a handshake that waits for its verdict. Once all verdicts are given, anything but 0 is a defect.
        """
        return _pending(vips, self._sums(hops))

    def _forget_gone(self) -> None:
        known = self._topology.vips.by_id
        self._used &= known.keys()
        for vip_id in self._vip_labels.keys() - known.keys():
            del self._vip_labels[vip_id]
        for vip_id in known.keys() - self._vip_labels.keys():
            self._vip_labels[vip_id] = Labels(vip_attributes, known[vip_id], self._node_name)

    def _of_vip_ports(self, vips: Mapping[int, VipStats], hops: Mapping[int, HopStats]) -> Iterator[Metric]:
        sums = self._sums(hops)
        yield Metric(CONNECTIONS, chain(self._unforwarded(vips), self._forwarded(hops)))
        yield Metric(RETRANSMITS, self._retransmits(vips))
        yield Metric(FAILURES, self._failures(sums))
        yield Metric(UNSEEN, self._by_hop_class((key, total.reply_unseen) for key, total in sums.items()))
        yield Metric(FORWARD, self._by_hop_class((key, _measured(total.forward)) for key, total in sums.items()))
        yield Metric(HANDSHAKE, self._by_hop_class((key, _measured(total.handshake)) for key, total in sums.items()))
        pending = _pending(vips, sums).items()
        yield Metric(
            PENDING,
            ((self._vip_labels[vip_id], _NO_LABELS, self._started_ns, count) for vip_id, count in pending),
        )
        yield Metric(ENDPOINTS, self._endpoints())

    def _unforwarded(self, vips: Mapping[int, VipStats]) -> Iterator[Point]:
        rows, created_ns = self._topology.vips.by_id, self._topology.vips.created_ns
        zone = self._own_zone
        for vip_id, stats in vips.items():
            may_be = _MAY_BE[rows[vip_id].policy]
            for origin, counts in enumerate(stats.unforwarded):
                for reason, count in enumerate(counts):
                    # Zeros before the first loss: whoever looks at differences does not see what a series begins with.
                    if count or (origin == OriginCode.EXTERNAL and reason in may_be):
                        yield self._vip_labels[vip_id], _unforwarded(origin, reason, zone), created_ns[vip_id], count

    @property
    def _own_zone(self) -> str | None:
        return self._topology.zone if self._attributes.zone else None

    def _forwarded(self, hops: Mapping[int, HopStats]) -> Iterator[Point]:
        if not self._attributes.destination_node:
            yield from self._forwarded_by_class(hops)
            return
        rows, created_ns = self._topology.hops.by_id, self._topology.hops.created_ns
        for hop_id, stats in hops.items():
            row = rows[hop_id]
            if not row.is_remainder:  # told long ago, by node
                yield from self._ways(row, created_ns[hop_id], stats.forwarded)

    def _forwarded_by_class(self, hops: Mapping[int, HopStats]) -> Iterator[Point]:
        """Add up over the nodes of backends, with those that are gone: the sum is as old as its VIP port's row."""
        rows, created_ns = self._topology.hops.by_id, self._topology.vips.created_ns
        sums: dict[HopRow, tuple[int, int]] = {}
        for hop_id, stats in hops.items():
            row = rows[hop_id]
            row = row if row.node is None else row._replace(node=None)
            internal, external = sums.get(row, (0, 0))
            sums[row] = internal + stats.forwarded[0], external + stats.forwarded[1]
        for row, forwarded in sums.items():
            yield from self._ways(row, created_ns[row.vip_id], forwarded)

    def _ways(self, row: HopRow, since_ns: int, forwarded: tuple[int, int]) -> Iterator[Point]:
        way, (internal, external) = row[1:], forwarded
        labels, zone = self._vip_labels[row.vip_id], self._own_zone
        if internal:
            yield labels, _forwarded(way, Origin.INTERNAL, zone), since_ns, internal
        # A zero says that the way exists and nobody took it; that is worth a series for the usual ways only.
        if external or row.hop is not Hop.UNKNOWN:
            yield labels, _forwarded(way, Origin.EXTERNAL, zone), since_ns, external

    def _retransmits(self, vips: Mapping[int, VipStats]) -> Iterator[Point]:
        rows, created_ns = self._topology.vips.by_id, self._topology.vips.created_ns
        for vip_id, stats in vips.items():
            if rows[vip_id].transport is Transport.TCP:
                yield self._vip_labels[vip_id], _NO_LABELS, created_ns[vip_id], stats.retransmits

    def _failures(self, sums: Mapping[tuple[int, Hop], HopStats]) -> Iterator[Point]:
        rows, created_ns = self._topology.vips.by_id, self._topology.vips.created_ns
        for (vip_id, hop), total in sums.items():
            usual = rows[vip_id].transport is Transport.TCP and hop is not Hop.UNKNOWN
            for failure, count in ((Failure.REFUSED, total.refused), (Failure.TIMEOUT, total.timeout)):
                if count or usual:
                    yield self._vip_labels[vip_id], _FAILED[hop, failure], created_ns[vip_id], count

    def _by_hop_class(self, values: Iterable[tuple[tuple[int, Hop], int | Histogram | None]]) -> Iterator[Point]:
        """Tell what is not 0. The VIP port's row, whose start time it has, is as old as the oldest of its hops."""
        labels, created_ns = self._vip_labels, self._topology.vips.created_ns
        for (vip_id, hop), value in values:
            if value:
                yield labels[vip_id], _BY_HOP[hop], created_ns[vip_id], value

    def _sums(self, hops: Mapping[int, HopStats]) -> dict[tuple[int, Hop], HopStats]:
        """Add up over the nodes of backends."""
        sums: dict[tuple[int, Hop], HopStats] = {}
        rows = self._topology.hops.by_id
        for hop_id, stats in hops.items():
            row = rows[hop_id]
            key = row.vip_id, row.hop
            before = sums.get(key)
            sums[key] = _added(before, stats) if before else stats
        return sums

    def _endpoints(self) -> Iterator[Point]:
        for vip_id, placement in self._topology.placements.items():
            own = self._vip_labels[vip_id]
            for beyond, count in zip(_PLACEMENTS, placement, strict=True):
                yield own, beyond, self._started_ns, count

    def _self_points(self, report: SelfReport) -> dict[Instrument, list[Told]]:
        """Tell the values of what the agent says of itself, by attributes beyond the node's name."""
        usage, process = report.map_usage.items(), report.process
        records = [stage for stage in report.stages if stage.signal != METRICS]
        points = [stage for stage in report.stages if stage.signal == METRICS]
        return {
            **_ledger_points(records, RECORDS_SEEN, RECORDS_EXPORTED, RECORDS_DROPPED, RECORDS_IN_FLIGHT),
            **_ledger_points(points, POINTS_SEEN, POINTS_EXPORTED, POINTS_DROPPED, POINTS_IN_FLIGHT),
            EVENTS_DROPPED: [({semconv.REASON: reason}, report.events[event]) for event, reason in EVENT_DROPS.items()],
            VIP_PORTS: [({}, report.vip_ports)],
            SERIES: [({}, self.usage.own)],
            SERIES_LIMIT: [({}, self.usage.limit)],
            SERIES_SUMMED: [({}, self.usage.summed)],
            CLUSTER_NODES: [] if report.cluster_nodes is None else [({}, report.cluster_nodes)],
            TOPOLOGY_AGE: [({}, report.topology_age_s)],
            MAP_USAGE: [({semconv.MAP: name}, used) for name, (used, _) in usage],
            MAP_LIMIT: [({semconv.MAP: name}, limit) for name, (_, limit) in usage],
            PART_HEALTHY: [({semconv.PART: part}, int(healthy)) for part, healthy in report.parts_healthy.items()],
            CPU_TIME: [
                ({semconv.CPU_MODE: "user"}, process.cpu_user_s),
                ({semconv.CPU_MODE: "system"}, process.cpu_system_s),
            ],
            MEMORY_USAGE: [({}, process.memory_bytes)],
        }


def _ledger_points(
    stages: Iterable[Stage], seen: Instrument, exported: Instrument, dropped: Instrument, in_flight: Instrument
) -> dict[Instrument, list[Told]]:
    """Tell of each stage what came, what ended and what is there; and of the last of each way what was delivered.

    What a stage before the last passed on is what the next has seen: told too, it would be counted twice in a sum over
    stages. As it is, dropped over all stages is everything that was lost, each loss once, and exported what arrived.
    """
    told: dict[Instrument, list[Told]] = {seen: [], exported: [], dropped: [], in_flight: []}
    delivered = {}
    for stage in stages:
        known = {semconv.STAGE: stage.name, semconv.SIGNAL: stage.signal, semconv.EXPORTER: stage.exporter}
        where: Attributes = {name: value for name, value in known.items() if value}
        told[seen].append((where, stage.seen))
        told[in_flight].append((where, stage.in_flight))
        told[dropped] += [(where | {semconv.REASON: reason}, count) for reason, count in stage.dropped.items()]
        if stage.signal:
            delivered[stage.signal, stage.exporter] = where, stage.exported
    told[exported] += delivered.values()
    return told


def _busy(rows: Mapping[int, VipStats] | Mapping[int, HopStats], idle: VipStats | HopStats) -> Iterator[int]:
    """Tell the ids of the rows that have counted something. Those that have not are in a snapshot one value."""
    for row_id, stats in rows.items():
        if stats is idle:
            continue
        if stats == idle:
            idle = stats
        else:
            yield row_id


def _pending(vips: Mapping[int, VipStats], sums: Mapping[tuple[int, Hop], HopStats]) -> dict[int, int]:
    pending = {vip_id: sum(stats.connections) - sum(map(sum, stats.unforwarded)) for vip_id, stats in vips.items()}
    for (vip_id, _), total in sums.items():
        if vip_id in pending:
            pending[vip_id] -= sum(total.forwarded)
    return pending


def _measured(histogram: Histogram) -> Histogram | None:
    return histogram if histogram.words != NO_HISTOGRAM.words else None


def _added(first: HopStats, second: HopStats) -> HopStats:
    return HopStats(
        (first.forwarded[0] + second.forwarded[0], first.forwarded[1] + second.forwarded[1]),
        first.answered + second.answered,
        first.refused + second.refused,
        first.timeout + second.timeout,
        first.reply_unseen + second.reply_unseen,
        first.evicted + second.evicted,
        first.forward.plus(second.forward),
        first.handshake.plus(second.handshake),
        first.translated + second.translated,
    )


def _labels(pairs: Attributes) -> Labels:
    return Labels(dict, pairs)


_NO_LABELS = _labels({})
_PLACEMENTS = [_labels({semconv.PLACEMENT: place}) for place in Placement._fields]
_BY_HOP = {hop: _labels({semconv.HOP: hop.value}) for hop in Hop}
_FAILED = {
    (hop, failure): _labels({semconv.HOP: hop.value, semconv.ERROR_TYPE: failure.value})
    for hop in Hop
    for failure in Failure
}
_MAY_BE = {
    Policy.CLUSTER: frozenset({Unforwarded.DROPPED, Unforwarded.NO_ENDPOINTS}),
    Policy.LOCAL: frozenset(Unforwarded),
}
"""Reasons that a VIP port with this policy can have for not forwarding."""


def _in_zone(attributes: Attributes, zone: str | None) -> Labels:
    """Make labels with this node's zone, which may be known only later: they are the same series then."""
    labels = _labels(attributes)
    if zone is not None:
        identity = labels.identity
        labels = _labels({**attributes, semconv.RESOURCE_ZONE: zone})
        labels.identity = identity
    return labels


@lru_cache(64)
def _unforwarded(origin: int, reason: int, zone: str | None) -> Labels:
    outcome = OUTCOME_OF[Unforwarded(reason)]
    return _in_zone({semconv.OUTCOME: outcome.value, semconv.ORIGIN: ORIGIN_OF[origin].value}, zone)


@lru_cache(HOP_ROWS_REMEMBERED)
def _forwarded(way: Any, origin: Origin, zone: str | None) -> Labels:  # noqa: ANN401 - a HopRow's fields but the first
    """Make labels that the rows of many VIP ports share."""
    row = hop_attributes(HopRow(0, *way))
    return _in_zone({**row, semconv.OUTCOME: Outcome.FORWARDED.value, semconv.ORIGIN: origin.value}, zone)
