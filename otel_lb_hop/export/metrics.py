"""From a snapshot of the kernel's counters to OTLP metrics: exact cumulative sums and the kernel's own buckets.

Nothing is counted here. Every point has the start time of its row, so a row that is new is a new series and never
looks like a counter that fell.
"""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, NamedTuple

from opentelemetry.sdk.metrics.export import (
    AggregationTemporality,
    Gauge,
    HistogramDataPoint,
    Metric,
    MetricsData,
    NumberDataPoint,
    ResourceMetrics,
    ScopeMetrics,
    Sum,
)
from opentelemetry.sdk.metrics.export import Histogram as HistogramData
from opentelemetry.sdk.util.instrumentation import InstrumentationScope

from otel_lb_hop import __version__, semconv
from otel_lb_hop.core.hops import ORIGIN_OF
from otel_lb_hop.core.layout import (
    BOUNDS_NS,
    OUTCOME_OF,
    Event,
    Histogram,
    HopStats,
    OriginCode,
    Unforwarded,
    VipStats,
)
from otel_lb_hop.export.attributes import Attributes, hop_attributes, vip_attributes
from otel_lb_hop.model import Failure, Hop, Outcome, Transport

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from opentelemetry.sdk.resources import Resource

    from otel_lb_hop.core.topology import Topology

BOUNDS_S = tuple(bound / 1e9 for bound in BOUNDS_NS)
_CUMULATIVE = AggregationTemporality.CUMULATIVE
NO_HISTOGRAM = Histogram(0, (0,) * (len(BOUNDS_NS) + 1))
NO_CONNECTION = VipStats((0, 0), ((0,) * len(Unforwarded),) * 2, 0)
NO_HOP = HopStats((0, 0), 0, 0, 0, 0, 0, NO_HISTOGRAM, NO_HISTOGRAM)

RECORD_DROPS = {
    Event.RECORD_RATIO: "ratio",
    Event.RECORD_RATE: "rate",
    Event.RECORD_RING_FULL: "ring_full",
    Event.RECORD_NO_VERDICT: "no_verdict",
}
EVENT_DROPS = {event: event.name.lower() for event in Event if event >= Event.TRUNCATED}


class Instrument(NamedTuple):
    """Name, unit and description of one metric."""

    name: str
    unit: str
    description: str


CONNECTIONS = Instrument(semconv.METRIC_CONNECTIONS, "{connection}", "Connections that entered this node by a VIP port")
PENDING = Instrument(
    semconv.METRIC_CONNECTIONS_PENDING, "{connection}", "Connections that are neither forwarded nor given up yet"
)
FAILURES = Instrument(semconv.METRIC_HANDSHAKE_FAILURES, "{connection}", "Forwarded connections whose handshake failed")
UNSEEN = Instrument(
    semconv.METRIC_REPLIES_UNSEEN,
    "{connection}",
    "Forwarded connections whose answer took another way (direct server return, asymmetric routing)",
)
RETRANSMITS = Instrument(semconv.METRIC_SYN_RETRANSMITS, "{packet}", "SYNs that clients sent again")
FORWARD = Instrument(
    semconv.METRIC_FORWARD_DURATION, "s", "From the first packet in to the translated packet out, on this node"
)
HANDSHAKE = Instrument(semconv.METRIC_HANDSHAKE_DURATION, "s", "From the SYN in to the SYN-ACK out, on this node")
ENDPOINTS = Instrument(
    semconv.METRIC_ENDPOINTS,
    "{endpoint}",
    "Endpoints that kube-proxy picks from, by where they are, seen from this node",
)
VIP_PORTS = Instrument(semconv.METRIC_VIP_PORTS, "{vip_port}", "VIP ports that are watched")
EVENTS_DROPPED = Instrument(semconv.METRIC_EVENTS_DROPPED, "{event}", "Packets and events that could not be told")
RECORDS_EXPORTED = Instrument(semconv.METRIC_RECORDS_EXPORTED, "{record}", "Records that an exporter took")
RECORDS_DROPPED = Instrument(semconv.METRIC_RECORDS_DROPPED, "{record}", "Records that were not sent, by reason")
TOPOLOGY_AGE = Instrument(semconv.METRIC_TOPOLOGY_AGE, "s", "Since the topology was last known to be current")
MAP_USAGE = Instrument(semconv.METRIC_MAP_USAGE, "{entry}", "Entries in a kernel table")
MAP_LIMIT = Instrument(semconv.METRIC_MAP_LIMIT, "{entry}", "Entries that a kernel table can hold")
PART_HEALTHY = Instrument(semconv.METRIC_PART_HEALTHY, "1", "1 if a part of the agent works as it should, else 0")


class SelfReport(NamedTuple):
    """What the agent says of itself in one export."""

    events: tuple[int, ...]
    record_drops: Mapping[tuple[str, str], int]
    """(signal, reason) → records given up in user space; signal "" before they are split by signal."""
    records_exported: Mapping[str, int]
    vip_ports: int
    topology_age_s: float
    map_usage: Mapping[str, tuple[int, int]]
    """Map → (entries, limit)."""
    parts_healthy: Mapping[str, bool]


def _add_histograms(first: Histogram, second: Histogram) -> Histogram:
    return Histogram(
        first.sum_ns + second.sum_ns, tuple(a + b for a, b in zip(first.buckets, second.buckets, strict=True))
    )


class _Sum(NamedTuple):
    """What one (VIP port, hop class) has in common over all nodes of backends."""

    forwarded: int = 0
    refused: int = 0
    timeout: int = 0
    reply_unseen: int = 0
    forward: Histogram = NO_HISTOGRAM
    handshake: Histogram = NO_HISTOGRAM

    def plus(self, stats: HopStats) -> _Sum:
        return _Sum(
            self.forwarded + sum(stats.forwarded),
            self.refused + stats.refused,
            self.timeout + stats.timeout,
            self.reply_unseen + stats.reply_unseen,
            _add_histograms(self.forward, stats.forward),
            _add_histograms(self.handshake, stats.handshake),
        )


class MetricsBuilder:
    """Makes MetricsData out of snapshots. Keeps attributes made once per row, and what forgotten rows had counted.

    Metrics by (VIP port, hop class) sum over rows by backend node; when a node has long gone and its row with it,
    the sum must not fall, so its last state stays in a carry.
    """

    def __init__(self, resource: Resource, topology: Topology, node_name: str, started_ns: int) -> None:
        self.resource = resource
        self._topology = topology
        self._node_name = node_name
        self._started_ns = started_ns
        self._scope = InstrumentationScope(semconv.SCOPE_NAME, __version__, semconv.SCHEMA_URL)
        self._vip_attributes: dict[int, Attributes] = {}
        self._carry: dict[tuple[int, Hop], _Sum] = {}
        self._used: set[int] = set()

    def carry_over(self, vip_id: int, hop: Hop, last: HopStats) -> None:
        """Keep what a row had counted that is about to be forgotten."""
        self._carry[vip_id, hop] = self._carry.get((vip_id, hop), _Sum()).plus(last)

    def build(
        self, vips: Mapping[int, VipStats], hops: Mapping[int, HopStats], report: SelfReport, now_ns: int
    ) -> MetricsData:
        """Make one export."""
        self._forget_gone()
        # A cluster has thousands of VIP ports that never take a connection on this node: of them only the endpoints.
        rows = self._topology.hops.by_id
        self._used |= {vip_id for vip_id, stats in vips.items() if stats != NO_CONNECTION}
        self._used |= {rows[hop_id].vip_id for hop_id, stats in hops.items() if stats != NO_HOP}
        used_vips = {vip_id: stats for vip_id, stats in vips.items() if vip_id in self._used}
        used_hops = {hop_id: stats for hop_id, stats in hops.items() if rows[hop_id].vip_id in self._used}
        metrics = [
            *self._traffic(used_vips, used_hops, now_ns),
            *self._topology_gauges(now_ns),
            *self._self_metrics(report, now_ns),
        ]
        metrics = [metric for metric in metrics if metric.data.data_points]
        scope = ScopeMetrics(self._scope, metrics, semconv.SCHEMA_URL)
        return MetricsData([ResourceMetrics(self.resource, [scope], self.resource.schema_url)])

    def pending(self, vips: Mapping[int, VipStats], hops: Mapping[int, HopStats]) -> dict[int, int]:
        """Count, by VIP port's id, the connections that came in less those that were forwarded or given up.

        Each is a handshake that waits for its verdict. Once all verdicts are given, anything but 0 is a defect.
        """
        return _pending(vips, self._sums(hops))

    def _forget_gone(self) -> None:
        known = self._topology.vips.by_id
        self._carry = {key: value for key, value in self._carry.items() if key[0] in known}
        self._used &= known.keys()
        self._vip_attributes = {
            vip_id: self._vip_attributes.get(vip_id) or vip_attributes(row, self._node_name)
            for vip_id, row in known.items()
        }

    def _traffic(self, vips: Mapping[int, VipStats], hops: Mapping[int, HopStats], now_ns: int) -> Iterable[Metric]:
        connections: list[NumberDataPoint] = []
        retransmits: list[NumberDataPoint] = []
        for vip_id, stats in vips.items():
            base, start_ns = self._vip_attributes[vip_id], self._topology.vips.created_ns[vip_id]
            if self._topology.vips.by_id[vip_id].transport is Transport.TCP:
                retransmits.append(NumberDataPoint(base, start_ns, now_ns, stats.retransmits))
            for origin in OriginCode:
                for reason in Unforwarded:
                    if count := stats.unforwarded[origin][reason]:
                        attributes = base | {
                            semconv.OUTCOME: OUTCOME_OF[reason].value,
                            semconv.ORIGIN: ORIGIN_OF[origin].value,
                        }
                        connections.append(NumberDataPoint(attributes, start_ns, now_ns, count))
        for hop_id, hop_stats in hops.items():
            row, start_ns = self._topology.hops.by_id[hop_id], self._topology.hops.created_ns[hop_id]
            for origin in OriginCode:
                count = hop_stats.forwarded[origin]
                # A zero says that the way exists and nobody took it; that is worth a series for the usual ways only.
                if count or (origin is OriginCode.EXTERNAL and row.hop is not Hop.UNKNOWN):
                    attributes = self._vip_attributes[row.vip_id] | hop_attributes(row)
                    attributes[semconv.OUTCOME] = Outcome.FORWARDED.value
                    attributes[semconv.ORIGIN] = ORIGIN_OF[origin].value
                    connections.append(NumberDataPoint(attributes, start_ns, now_ns, count))
        yield _counter(CONNECTIONS, connections)
        yield _counter(RETRANSMITS, retransmits)
        sums = self._sums(hops)
        yield from self._by_hop_class(sums, now_ns)
        yield _gauge(
            PENDING,
            [
                NumberDataPoint(self._vip_attributes[vip_id], self._started_ns, now_ns, count)
                for vip_id, count in _pending(vips, sums).items()
            ],
        )

    def _sums(self, hops: Mapping[int, HopStats]) -> dict[tuple[int, Hop], _Sum]:
        sums = dict(self._carry)
        for hop_id, stats in hops.items():
            row = self._topology.hops.by_id[hop_id]
            key = row.vip_id, row.hop
            sums[key] = sums.get(key, _Sum()).plus(stats)
        return sums

    def _by_hop_class(self, sums: Mapping[tuple[int, Hop], _Sum], now_ns: int) -> Iterable[Metric]:
        failures: list[NumberDataPoint] = []
        unseen: list[NumberDataPoint] = []
        forward: list[HistogramDataPoint] = []
        handshake: list[HistogramDataPoint] = []
        for (vip_id, hop), total in sums.items():
            # The VIP port's row is as old as the oldest of its hops.
            start_ns = self._topology.vips.created_ns[vip_id]
            attributes = self._vip_attributes[vip_id] | {semconv.HOP: hop.value}
            for failure, count in ((Failure.REFUSED, total.refused), (Failure.TIMEOUT, total.timeout)):
                if count:
                    labels = attributes | {semconv.ERROR_TYPE: failure.value}
                    failures.append(NumberDataPoint(labels, start_ns, now_ns, count))
            if total.reply_unseen:
                unseen.append(NumberDataPoint(attributes, start_ns, now_ns, total.reply_unseen))
            for points, histogram in ((forward, total.forward), (handshake, total.handshake)):
                if histogram.observations:
                    points.append(_histogram_point(attributes, start_ns, now_ns, histogram))
        yield _counter(FAILURES, failures)
        yield _counter(UNSEEN, unseen)
        yield _histogram(FORWARD, forward)
        yield _histogram(HANDSHAKE, handshake)

    def _topology_gauges(self, now_ns: int) -> Iterable[Metric]:
        points = [
            NumberDataPoint(self._vip_attributes[vip_id] | {semconv.PLACEMENT: place}, self._started_ns, now_ns, count)
            for vip_id, placement in self._topology.placements.items()
            for place, count in placement._asdict().items()
        ]
        yield _gauge(ENDPOINTS, points)

    def _self_metrics(self, report: SelfReport, now_ns: int) -> Iterable[Metric]:
        def point(value: float, **labels: str) -> NumberDataPoint:
            attributes = {semconv.K8S_NODE_NAME: self._node_name} | labels
            return NumberDataPoint(attributes, self._started_ns, now_ns, value)

        drops: dict[tuple[str, str], int] = defaultdict(int, report.record_drops)
        for event, reason in RECORD_DROPS.items():
            drops["", reason] += report.events[event]
        yield _counter(
            RECORDS_DROPPED,
            [
                point(count, **{semconv.REASON: reason} | ({semconv.SIGNAL: signal} if signal else {}))
                for (signal, reason), count in drops.items()
            ],
        )
        yield _counter(
            RECORDS_EXPORTED,
            [point(count, **{semconv.SIGNAL: signal}) for signal, count in report.records_exported.items()],
        )
        yield _counter(
            EVENTS_DROPPED,
            [point(report.events[event], **{semconv.REASON: reason}) for event, reason in EVENT_DROPS.items()],
        )
        yield _gauge(VIP_PORTS, [point(report.vip_ports)])
        yield _gauge(TOPOLOGY_AGE, [point(report.topology_age_s)])
        usage = report.map_usage.items()
        yield _gauge(MAP_USAGE, [point(used, **{semconv.MAP: name}) for name, (used, _) in usage])
        yield _gauge(MAP_LIMIT, [point(limit, **{semconv.MAP: name}) for name, (_, limit) in usage])
        yield _gauge(
            PART_HEALTHY,
            [point(int(healthy), **{semconv.PART: part}) for part, healthy in report.parts_healthy.items()],
        )


def _pending(vips: Mapping[int, VipStats], sums: Mapping[tuple[int, Hop], _Sum]) -> dict[int, int]:
    pending = {
        vip_id: sum(stats.connections) - sum(sum(reasons) for reasons in stats.unforwarded)
        for vip_id, stats in vips.items()
    }
    for (vip_id, _), total in sums.items():
        if vip_id in pending:
            pending[vip_id] -= total.forwarded
    return pending


def _histogram_point(attributes: Attributes, start_ns: int, now_ns: int, histogram: Histogram) -> HistogramDataPoint:
    return HistogramDataPoint(
        attributes=attributes,
        start_time_unix_nano=start_ns,
        time_unix_nano=now_ns,
        count=histogram.observations,
        sum=histogram.sum_ns / 1e9,
        bucket_counts=histogram.buckets,
        explicit_bounds=BOUNDS_S,
        # OTLP makes both optional, and the kernel keeps neither; None leaves them out.
        min=None,  # type: ignore[arg-type]
        max=None,  # type: ignore[arg-type]
    )


def _counter(instrument: Instrument, points: list[NumberDataPoint]) -> Metric:
    return Metric(instrument.name, instrument.description, instrument.unit, Sum(points, _CUMULATIVE, True))  # noqa: FBT003


def _gauge(instrument: Instrument, points: list[NumberDataPoint]) -> Metric:
    return Metric(instrument.name, instrument.description, instrument.unit, Gauge(points))


def _histogram(instrument: Instrument, points: list[HistogramDataPoint]) -> Metric:
    return Metric(instrument.name, instrument.description, instrument.unit, HistogramData(points, _CUMULATIVE))
