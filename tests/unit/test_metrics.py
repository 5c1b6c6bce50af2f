# ruff: noqa: TID251 - the official classes read what is made, the SDK's encoder is the oracle
"""From counters to OTLP metrics, with every name and value spelt out: dashboards depend on them."""

from __future__ import annotations

from collections import Counter
from itertools import chain
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from opentelemetry.exporter.otlp.proto.common.metrics_encoder import encode_metrics
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.sdk.resources import Resource

from otel_lb_hop import __version__, semconv
from otel_lb_hop.config import MetricAttributes
from otel_lb_hop.core.layout import Event, HopStats, VipStats
from otel_lb_hop.core.ledger import Stage
from otel_lb_hop.core.topology import KEEP_RETIRED_NS, Source
from otel_lb_hop.export import otlp_metrics, sdk_metrics
from otel_lb_hop.export.metrics import USUAL, MetricsBuilder, SelfReport, Usage
from otel_lb_hop.export.wire import Envelope
from otel_lb_hop.model import Node, Policy, Transport
from tests.unit.fake_kernel import Kernel, unpack_words
from tests.unit.samples import (
    CLUSTERS,
    LOCAL,
    NODE,
    REMOTE,
    SECOND,
    backend,
    cluster,
    histogram,
    hop_stats,
    vip_port,
    vip_stats,
)  # fmt: skip

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from random import Random

    from opentelemetry.proto.metrics.v1.metrics_pb2 import Metric

    from otel_lb_hop.export.delivery import Chunk
    from otel_lb_hop.export.delta import Memory
    from otel_lb_hop.model import Cluster

START = 1_700_000_000 * SECOND
NOW = START + 60 * SECOND
AGENT_START = START - 5 * SECOND
COUNTING_START = START - 3_600 * SECOND
VIP_ATTRIBUTES = {
    "k8s.namespace.name": "default",
    "k8s.service.name": "web",
    "server.address": "10.0.10.0",
    "server.port": 80,
    "network.transport": "tcp",
    "network.type": "ipv4",
    "lb_hop.external_traffic_policy": "Cluster",
    "k8s.node.name": "node1",
}
RECORDS_ONLY = {
    "client.address",
    "client.port",
    "source.address",
    "source.port",
    "destination.address",
    "destination.port",
    "destination.k8s.pod.name",
    "destination.k8s.namespace.name",
    "network.interface.name",
}
SEMCONV = {value for name, value in vars(semconv).items() if name.isupper()}
NO_USAGE = Usage(0.0, 0.0, 0)
EMPTY_REPORT = SelfReport((0,) * len(Event), (), 0, 0.0, {}, {}, NO_USAGE)
SECOND_REMOTE = backend("10.100.3.2", "node3", "zone-a")
RESOURCE = {"service.name": "x", "k8s.node.name": NODE}
ENVELOPE = Envelope(RESOURCE, semconv.SCOPE_NAME, __version__, semconv.SCHEMA_URL)
SDK_RESOURCE = Resource(RESOURCE, semconv.SCHEMA_URL)
CUMULATIVE = 2
"""AGGREGATION_TEMPORALITY_CUMULATIVE."""

Point = tuple[dict[str, Any], int, Any]


def kernel_for(attributes: MetricAttributes) -> Kernel:
    """Make a kernel whose topology tells what the attributes need."""
    kernel = Kernel()
    kernel.tells_zones = attributes.destination_zone
    kernel.begin_anew()
    return kernel


class Exporter:
    """A topology and its builder."""

    def __init__(
        self,
        state: Cluster,
        kernel: Kernel | None = None,
        *,
        attributes: MetricAttributes = USUAL,
        series: int = 20_000,
        memory: Memory | None = None,
    ) -> None:
        """With a kernel, its topology is used, and counters come from its rows."""
        self.kernel = kernel or kernel_for(attributes)
        self.topology = self.kernel.topology
        self.topology.replace(state, START)
        if kernel:
            kernel.write()
        self.builder = MetricsBuilder(
            self.topology,
            NODE,
            AGENT_START,
            COUNTING_START,
            attributes=attributes,
            series=series,
            open_memory=lambda _: memory,
        )

    def chunks(
        self,
        vips: Mapping[int, VipStats] | None = None,
        hops: Mapping[int, HopStats] | None = None,
        report: SelfReport = EMPTY_REPORT,
        now_ns: int = NOW,
    ) -> list[Chunk]:
        """Build one export."""
        return otlp_metrics.encode(self.builder.build(vips or {}, hops or {}, report), ENVELOPE, now_ns)

    def build(
        self,
        vips: Mapping[int, VipStats] | None = None,
        hops: Mapping[int, HopStats] | None = None,
        report: SelfReport = EMPTY_REPORT,
        now_ns: int = NOW,
    ) -> dict[str, Metric]:
        """Build one export; gives its metrics by name."""
        return metrics_of(self.chunks(vips, hops, report, now_ns))

    def export(self) -> dict[str, Metric]:
        """Build one export of what the kernel has counted."""
        vips, hops, _ = self.kernel.tables.snapshot()
        return self.build(vips, hops)

    def go_over_to(self, state: Cluster, now_ns: int) -> None:
        """Take over another state, and forget the rows that are not of it, as if they had long been out of use."""
        self.kernel.take(state, now_ns)
        self.kernel.forget(now_ns, now_ns)
        self.kernel.write()


def decoded(chunks: Iterable[Chunk]) -> ExportMetricsServiceRequest:
    """Let the official classes read chunks of one export as one request."""
    return ExportMetricsServiceRequest.FromString(ENVELOPE.wrap([chunk.payload for chunk in chunks]))


def metrics_of(chunks: Iterable[Chunk]) -> dict[str, Metric]:
    """Take the metrics out of an export by name, of which each may stand there once."""
    (resource,) = decoded(chunks).resource_metrics
    (scope,) = resource.scope_metrics
    assert len({metric.name for metric in scope.metrics}) == len(scope.metrics)
    return {metric.name: metric for metric in scope.metrics}


def kind(metric: Metric) -> str:
    """Tell what a metric is: `sum`, `gauge` or `histogram`."""
    name = metric.WhichOneof("data")
    assert name is not None
    return name


def data_points(metric: Metric) -> list[Any]:
    """Give the points as they are."""
    return list(getattr(metric, kind(metric)).data_points)


def points(metric: Metric) -> list[Point]:
    """Give (attributes, start, value) of each point."""
    made = []
    for point in data_points(metric):
        attributes = {each.key: getattr(each.value, each.value.WhichOneof("value")) for each in point.attributes}
        assert len(attributes) == len(point.attributes)
        if kind(metric) == "histogram":
            value = point.sum, tuple(point.bucket_counts)
        else:
            value = getattr(point, point.WhichOneof("value"))
        made.append((attributes, point.start_time_unix_nano, value))
    return made


def beyond(metric: Metric) -> list[tuple[dict[str, Any], Any]]:
    """Give the points' values with what their attributes have beyond the VIP port's."""
    made = []
    for attributes, _, value in points(metric):
        assert attributes.items() >= VIP_ATTRIBUTES.items()
        made.append(({name: attributes[name] for name in attributes.keys() - VIP_ATTRIBUTES.keys()}, value))
    return made


def happened(metric: Metric) -> list[tuple[dict[str, Any], Any]]:
    """Leave out the zeros."""
    return [(attributes, value) for attributes, value in beyond(metric) if value]


@pytest.fixture
def web() -> Exporter:
    """Default/web with a backend here (row 2), on node2 in another zone (3) and on node3 in this one (4)."""
    return Exporter(cluster(vip_port(LOCAL, REMOTE, SECOND_REMOTE), node1="zone-a"))


def test_connections(web: Exporter) -> None:
    """Each row is a point with its outcome, hop, origin, the backend's node and whether a zone was crossed."""
    vips = {1: vip_stats(internal=(0, 1), external=(2, 0, 3))}
    hops = {
        1: hop_stats(external=4),
        2: hop_stats(internal=5, external=6),
        3: hop_stats(external=7),
        4: hop_stats(internal=8, external=9),
    }
    none = {"lb_hop.outcome": "forwarded", "lb_hop.hop": "none", "destination.k8s.node.name": "node1"}
    far = {"lb_hop.outcome": "forwarded", "lb_hop.hop": "avoidable", "destination.k8s.node.name": "node2"}
    near = {"lb_hop.outcome": "forwarded", "lb_hop.hop": "avoidable", "destination.k8s.node.name": "node3"}
    external, internal = {"lb_hop.origin": "external"}, {"lb_hop.origin": "internal"}
    same, crossed = {"lb_hop.zone.crossed": False}, {"lb_hop.zone.crossed": True}
    assert beyond(web.build(vips, hops)["lb_hop.connections"]) == [
        ({"lb_hop.outcome": "no_endpoints"} | internal, 1),
        ({"lb_hop.outcome": "dropped"} | external, 2),
        ({"lb_hop.outcome": "no_endpoints"} | external, 0),
        ({"lb_hop.outcome": "no_local_endpoints"} | external, 3),
        ({"lb_hop.outcome": "forwarded", "lb_hop.hop": "unknown"} | external, 4),
        (none | internal | same, 5),
        (none | external | same, 6),
        (far | external | crossed, 7),
        (near | internal | same, 8),
        (near | external | same, 9),
    ]


def test_zeros(web: Exporter) -> None:
    """A zero stands where the first one counts: external ways to known backends, retransmissions, and what may fail.

    Of a VIP port that never took a connection on this node only the endpoints are told; of one that did, all for ever.
    """
    nothing = {number: hop_stats() for number in (1, 2, 3, 4)}
    traffic = {"lb_hop.connections", "lb_hop.connections.pending", "lb_hop.syn.retransmits"}
    metrics = web.build({1: vip_stats()}, nothing)
    assert not metrics.keys() & traffic
    assert len(points(metrics["lb_hop.endpoints"])) == 3
    web.build({1: vip_stats(external=(1,))}, nothing)
    metrics = web.build({1: vip_stats()}, nothing)
    assert [
        (each["lb_hop.origin"], each["lb_hop.outcome"], each.get("destination.k8s.node.name"), value)
        for each, value in beyond(metrics["lb_hop.connections"])
    ] == [
        ("external", "dropped", None, 0),
        ("external", "no_endpoints", None, 0),
        ("external", "forwarded", "node1", 0),
        ("external", "forwarded", "node2", 0),
        ("external", "forwarded", "node3", 0),
    ]
    assert beyond(metrics["lb_hop.handshake.failures"]) == [
        ({"lb_hop.hop": hop, "error.type": failure}, 0)
        for hop in ("none", "avoidable")
        for failure in ("refused", "timeout")
    ]
    assert beyond(metrics["lb_hop.syn.retransmits"]) == [({}, 0)]
    silent = {"lb_hop.replies.unseen", "lb_hop.forward.duration"}
    assert not metrics.keys() & (silent | {"lb_hop.handshake.duration"})


def test_zones() -> None:
    """This node's zone is on all connections, the backend's where it is known; one that comes late is no new series."""
    zones = MetricAttributes(zone=True, destination_zone=True)
    made = Exporter(cluster(vip_port(LOCAL, REMOTE, backend("10.100.4.2", "node4"))), attributes=zones)
    vips, hops = {1: vip_stats(external=(1,))}, {2: hop_stats(external=2), 3: hop_stats(external=3)}
    unknown = {semconv.ORIGIN: "external"}
    assert beyond(made.build(vips, hops)["lb_hop.connections"])[0] == ({"lb_hop.outcome": "dropped"} | unknown, 1)
    before = [point[1].identity for point in next(iter(made.builder.build(vips, hops, EMPTY_REPORT))).points]
    made.topology.update_nodes(Source.API, {NODE: Node(NODE, "zone-a")}, NOW)
    hops = {hop_id: hop_stats(external=hop_id) for hop_id in made.topology.hops.by_id if hop_id > 1}
    told = beyond(made.build(vips, hops)["lb_hop.connections"])
    assert {each["cloud.availability_zone"] for each, _ in told} == {"zone-a"}
    assert [
        (each["destination.k8s.node.name"], each.get("destination.cloud.availability_zone"), value)
        for each, value in told
        if each["lb_hop.outcome"] == "forwarded"
    ] == [
        ("node1", None, 2),
        ("node2", "zone-b", 3),
        ("node4", None, 4),
        ("node1", "zone-a", 5),
        ("node2", "zone-b", 6),
    ]
    after = [point[1].identity for point in next(iter(made.builder.build(vips, hops, EMPTY_REPORT))).points]
    assert before[:4] == after[:4]


def test_without_the_nodes_of_backends() -> None:
    """What is alike but for the node is one series, as old as the VIP port's; one node's end does not let it fall."""
    kernel = Kernel()
    attributes = MetricAttributes(destination_node=False)
    fourth = backend("10.100.4.2", "node4", "zone-b")
    full = cluster(vip_port(LOCAL, REMOTE, SECOND_REMOTE, fourth), node1="zone-a")
    made = Exporter(full, kernel, attributes=attributes)
    for row, (internal, external) in {2: (0, 1), 3: (0, 10), 4: (5, 20), 5: (0, 40)}.items():
        kernel.count_in_hop(row, internal, external)
    far, near = {"lb_hop.zone.crossed": True}, {"lb_hop.zone.crossed": False}
    expected = [
        ({"lb_hop.hop": "none", "lb_hop.origin": "external"} | near, 1),
        ({"lb_hop.hop": "avoidable", "lb_hop.origin": "external"} | far, 50),
        ({"lb_hop.hop": "avoidable", "lb_hop.origin": "internal"} | near, 5),
        ({"lb_hop.hop": "avoidable", "lb_hop.origin": "external"} | near, 20),
    ]
    bag = {frozenset((each | {"lb_hop.outcome": "forwarded"}).items()): value for each, value in expected}

    def told(metric: Metric) -> dict[frozenset[tuple[str, Any]], Any]:
        return {frozenset(each.items()): value for each, value in happened(metric)}

    assert told(made.export()["lb_hop.connections"]) == bag
    made.go_over_to(cluster(vip_port(LOCAL, SECOND_REMOTE), node1="zone-a"), NOW)
    metric = made.export()["lb_hop.connections"]
    assert told(metric) == bag
    assert {start for _, start, _ in points(metric)} == {START}
    kernel.begin_anew()
    kernel.adopt(NOW)
    made = Exporter(full, kernel, attributes=attributes)
    assert told(made.export()["lb_hop.connections"]) == bag


def test_zeros_of_policy_local_and_of_datagrams() -> None:
    """Without a local endpoint only policy Local does not forward; what has no handshake has none that fails."""
    made = Exporter(cluster(vip_port(REMOTE, policy=Policy.LOCAL), vip_port(LOCAL, port=53, transport=Transport.UDP)))
    metrics = made.build({1: vip_stats(internal=(1,)), 3: vip_stats()}, {2: hop_stats(), 4: hop_stats(external=1)})
    told = [
        (attributes["server.port"], attributes["lb_hop.origin"], attributes["lb_hop.outcome"], value)
        for attributes, _, value in points(metrics["lb_hop.connections"])
    ]
    assert told == [
        (80, "internal", "dropped", 1),
        (80, "external", "dropped", 0),
        (80, "external", "no_endpoints", 0),
        (80, "external", "no_local_endpoints", 0),
        (53, "external", "dropped", 0),
        (53, "external", "no_endpoints", 0),
        (80, "external", "forwarded", 0),
        (53, "external", "forwarded", 1),
    ]
    assert [
        (attributes["server.port"], attributes["lb_hop.hop"], attributes["error.type"], value)
        for attributes, _, value in points(metrics["lb_hop.handshake.failures"])
    ] == [(80, "required", "refused", 0), (80, "required", "timeout", 0)]


@pytest.mark.parametrize("transport", ["tcp", "udp", "sctp"])
def test_other_vip_attributes(transport: str) -> None:
    """Address family, transport, policy, port and names are those of the VIP port."""
    other: dict[str, Any] = {"name": "shop/api", "policy": Policy.LOCAL, "transport": Transport[transport.upper()]}
    made = Exporter(cluster(vip_port(LOCAL, address="fd00:10::1", port=443, **other)))
    metrics = made.build({1: vip_stats(external=(9,), retransmits=8)})
    told = {
        attributes["lb_hop.outcome"]: (value, attributes)
        for attributes, _, value in points(metrics["lb_hop.connections"])
    }
    assert {outcome: value for outcome, (value, _) in told.items()} == {
        "dropped": 9,
        "no_endpoints": 0,
        "no_local_endpoints": 0,
    }
    _, attributes = told["dropped"]
    assert attributes == {
        "lb_hop.outcome": "dropped",
        "lb_hop.origin": "external",
        "k8s.namespace.name": "shop",
        "k8s.service.name": "api",
        "server.address": "fd00:10::1",
        "server.port": 443,
        "network.transport": transport,
        "network.type": "ipv6",
        "lb_hop.external_traffic_policy": "Local",
        "k8s.node.name": "node1",
    }
    assert ("lb_hop.syn.retransmits" in metrics) is (transport == "tcp")


def test_failures_are_summed_over_the_backends_nodes(web: Exporter) -> None:
    """Failures and unseen replies stand once per hop class, whatever number of nodes its backends are on."""
    hops = {
        2: hop_stats(refused=1),
        3: hop_stats(refused=2, timeout=3, reply_unseen=4),
        4: hop_stats(refused=20, timeout=0, reply_unseen=40),
    }
    metrics = web.build({}, hops)
    assert beyond(metrics["lb_hop.handshake.failures"]) == [
        ({"lb_hop.hop": "none", "error.type": "refused"}, 1),
        ({"lb_hop.hop": "none", "error.type": "timeout"}, 0),
        ({"lb_hop.hop": "avoidable", "error.type": "refused"}, 22),
        ({"lb_hop.hop": "avoidable", "error.type": "timeout"}, 3),
    ]
    assert beyond(metrics["lb_hop.replies.unseen"]) == [({"lb_hop.hop": "avoidable"}, 44)]


def test_histograms(web: Exporter) -> None:
    """Buckets go through as they are and add up over nodes, bounds and sums are in seconds."""
    hops = {
        2: hop_stats(forward=histogram(1_500_000_000, b0=1, b21=2)),
        3: hop_stats(forward=histogram(3_000, b1=3), handshake=histogram(2_000_000, b10=1)),
        4: hop_stats(forward=histogram(4_000, b1=4, b2=1)),
    }
    metrics = web.build({}, hops)
    forward = metrics["lb_hop.forward.duration"]
    one, two = data_points(forward)
    assert tuple(one.explicit_bounds) == tuple(two.explicit_bounds)
    assert tuple(one.explicit_bounds) == (
        1e-6, 2.5e-6, 5e-6, 1e-5, 2.5e-5, 5e-5, 1e-4, 2.5e-4, 5e-4, 1e-3, 2.5e-3, 5e-3,
        0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0,
    )  # fmt: skip
    assert (one.count, one.sum, tuple(one.bucket_counts)) == (3, 1.5, (1, *(0,) * 20, 2))
    assert (two.count, two.sum, tuple(two.bucket_counts)) == (8, 7e-6, (0, 7, 1, *(0,) * 19))
    assert [each for each, _ in beyond(forward)] == [{"lb_hop.hop": "none"}, {"lb_hop.hop": "avoidable"}]
    ((attributes, value),) = beyond(metrics["lb_hop.handshake.duration"])
    assert (attributes, value) == ({"lb_hop.hop": "avoidable"}, (0.002, (*(0,) * 10, 1, *(0,) * 11)))


def test_kinds_units_and_temporality(web: Exporter) -> None:
    """Counters are cumulative and monotonic, histograms cumulative, the rest gauges; units are UCUM."""
    full = hop_stats(1, 1, refused=1, reply_unseen=1, forward=histogram(1, b0=1), handshake=histogram(1, b0=1))
    stages = [Stage(name, signal, "", 2, 1, {"x": 1}, 0) for name, signal in (("queue", "logs"), ("queue", "metrics"))]
    report = SelfReport((1,) * len(Event), stages, 1, 1.0, {"backends": (1, 2)}, {"ring": True}, NO_USAGE, 3)
    metrics = web.build({1: vip_stats()}, {2: full}, report)
    kinds = {name: (kind(metric), metric.unit) for name, metric in metrics.items()}
    assert kinds == {
        "lb_hop.connections": ("sum", "{connection}"),
        "lb_hop.connections.pending": ("gauge", "{connection}"),
        "lb_hop.syn.retransmits": ("sum", "{packet}"),
        "lb_hop.handshake.failures": ("sum", "{connection}"),
        "lb_hop.replies.unseen": ("sum", "{connection}"),
        "lb_hop.forward.duration": ("histogram", "s"),
        "lb_hop.handshake.duration": ("histogram", "s"),
        "lb_hop.endpoints": ("gauge", "{endpoint}"),
        "lb_hop.records.seen": ("sum", "{record}"),
        "lb_hop.records.exported": ("sum", "{record}"),
        "lb_hop.records.dropped": ("sum", "{record}"),
        "lb_hop.records.in_flight": ("gauge", "{record}"),
        "lb_hop.data_points.seen": ("sum", "{data_point}"),
        "lb_hop.data_points.exported": ("sum", "{data_point}"),
        "lb_hop.data_points.dropped": ("sum", "{data_point}"),
        "lb_hop.data_points.in_flight": ("gauge", "{data_point}"),
        "lb_hop.events.dropped": ("sum", "{event}"),
        "lb_hop.vip.ports": ("gauge", "{vip_port}"),
        "lb_hop.topology.age": ("gauge", "s"),
        "lb_hop.map.usage": ("gauge", "{entry}"),
        "lb_hop.map.limit": ("gauge", "{entry}"),
        "lb_hop.cluster.nodes": ("gauge", "{node}"),
        "lb_hop.metric.series": ("gauge", "{series}"),
        "lb_hop.metric.series.limit": ("gauge", "{series}"),
        "lb_hop.metric.series.summed": ("gauge", "{series}"),
        "lb_hop.part.healthy": ("gauge", "{part}"),
        "process.cpu.time": ("sum", "s"),
        "process.memory.usage": ("sum", "By"),
    }
    for metric in metrics.values():
        assert metric.description
        assert not metric.name.endswith("_total")
        if kind(metric) != "gauge":
            assert getattr(metric, kind(metric)).aggregation_temporality == CUMULATIVE
        if kind(metric) == "sum":
            # What a process has of memory may fall.
            assert metric.sum.is_monotonic == (metric.name != "process.memory.usage")
        assert all(point.time_unix_nano == NOW for point in data_points(metric))


def test_start_times() -> None:
    """A point starts with its row, a sum over rows with the VIP port, the rest with the counting or with the agent."""
    made = Exporter(cluster(vip_port(REMOTE)))
    later = START + 7 * SECOND
    made.topology.replace(cluster(vip_port(REMOTE, LOCAL)), later)
    vips = {1: vip_stats(external=(1,), retransmits=1)}
    hops = {2: hop_stats(external=1), 3: hop_stats(external=1, refused=1, forward=histogram(1, b0=1))}
    metrics = made.build(vips, hops)
    starts = {}
    for attributes, start, _ in points(metrics["lb_hop.connections"]):
        starts[attributes.get("lb_hop.hop", attributes["lb_hop.outcome"])] = start
    assert starts == {"dropped": START, "no_endpoints": START, "required": START, "avoidable": later}
    for name in ("lb_hop.syn.retransmits", "lb_hop.handshake.failures", "lb_hop.forward.duration"):
        assert {start for _, start, _ in points(metrics[name])} == {START}
    for name, start in (("lb_hop.events.dropped", COUNTING_START), ("process.cpu.time", AGENT_START)):
        assert {each for _, each, _ in points(metrics[name])} == {start}
    for name in ("lb_hop.vip.ports", "lb_hop.endpoints", "lb_hop.connections.pending"):
        assert {start for _, start, _ in points(metrics[name])} == {0}


def test_endpoints() -> None:
    """Ready endpoints are told by where they are, zeros too; a deleted Service has none to tell of."""
    made = Exporter(cluster(vip_port(LOCAL, REMOTE, SECOND_REMOTE, backend("10.100.3.3", "node3")), node1="zone-a"))
    assert beyond(made.build()["lb_hop.endpoints"]) == [
        ({"lb_hop.placement": "local"}, 1),
        ({"lb_hop.placement": "same_zone"}, 2),
        ({"lb_hop.placement": "other_zone"}, 1),
    ]
    made.topology.replace(cluster(), NOW)
    assert "lb_hop.endpoints" not in made.build()


def test_retired_rows_are_still_told() -> None:
    """A Service that was deleted keeps its series until its rows are forgotten."""
    made = Exporter(cluster(vip_port(LOCAL)))
    made.topology.replace(cluster(), NOW)
    metrics = made.build({1: vip_stats(retransmits=1)}, {2: hop_stats(external=3, refused=1)})
    assert [value for _, value in happened(metrics["lb_hop.connections"])] == [3]
    assert [value for _, value in happened(metrics["lb_hop.handshake.failures"])] == [1]


_SUMS = ("lb_hop.handshake.failures", "lb_hop.replies.unseen", "lb_hop.forward.duration", "lb_hop.handshake.duration")


def told_by_node(made: Exporter) -> list[str]:
    """Name the backends' nodes of the forwarded connections that are told."""
    connections = beyond(made.export()["lb_hop.connections"])
    return [each["destination.k8s.node.name"] for each, _ in connections if each["lb_hop.outcome"] == "forwarded"]


def test_a_forgotten_row_keeps_a_sum_from_falling() -> None:
    """What a gone node's row had counted stays in the sum of its hop class, also for the next agent."""
    kernel = Kernel()
    made = Exporter(cluster(vip_port(LOCAL, REMOTE, SECOND_REMOTE)), kernel)
    # refused, timeout, reply_unseen; sum and buckets of the forward time, and of the handshake's
    kernel.count_in_hop(3, 0, 8, 0, 5, 1, 2, 0, 7_000, 0, 2, *[0] * 20, 9, 9, *[0] * 21)
    kernel.count_in_hop(4, 0, 1, 0, 1, 0, 0, 0, 1_000, 0, 1, 0, 1, *[0] * 18, 0, 1, *[0] * 21)
    avoidable = {"lb_hop.hop": "avoidable"}
    sums = {
        "lb_hop.handshake.failures": [
            (avoidable | {"error.type": "refused"}, 6),
            (avoidable | {"error.type": "timeout"}, 1),
        ],
        "lb_hop.replies.unseen": [(avoidable, 2)],
        "lb_hop.forward.duration": [(avoidable, (8e-6, (0, 3, 0, 1, *[0] * 18)))],
        "lb_hop.handshake.duration": [(avoidable, (9e-9, (10, *[0] * 21)))],
    }
    assert told_by_node(made) == ["node1", "node2", "node3"]
    for state, left in ((vip_port(LOCAL, SECOND_REMOTE), ["node1", "node3"]), (vip_port(LOCAL), ["node1"])):
        made.go_over_to(cluster(state), NOW)
        assert {name: happened(made.export()[name]) for name in _SUMS} == sums
        # By node it is told no more: that series ended with its row.
        assert told_by_node(made) == left
    for now in (NOW, NOW + SECOND):
        kernel.begin_anew()
        kernel.adopt(now)
        made = Exporter(cluster(vip_port(LOCAL)), kernel)
        assert {name: happened(made.export()[name]) for name in _SUMS} == sums
        assert {start for name in _SUMS for _, start, _ in points(made.export()[name])} == {START}


def test_what_forgotten_rows_counted_goes_with_its_vip_port() -> None:
    """A VIP port that is forgotten takes all its sums along; one that comes back starts at zero with a new start."""
    kernel = Kernel()
    made = Exporter(cluster(vip_port(LOCAL, REMOTE)), kernel)
    kernel.count_in_hop(3, 0, 5, 0, 5)
    made.go_over_to(cluster(vip_port(LOCAL)), NOW)
    assert [value for _, value in happened(made.export()["lb_hop.handshake.failures"])] == [5]
    made.go_over_to(cluster(), NOW)
    later = NOW + KEEP_RETIRED_NS + SECOND
    made.go_over_to(cluster(vip_port(LOCAL, REMOTE)), later)
    assert "lb_hop.handshake.failures" not in made.export()
    kernel.count_in_hop(max(kernel.rows[1]), 0, 1, 0, 1)
    failures = points(made.export()["lb_hop.handshake.failures"])
    assert [(start, value) for _, start, value in failures] == [(later, 0), (later, 0), (later, 1), (later, 0)]


IN_RING = ("ring", "lb_hop.records.seen")


def self_told(metrics: Mapping[str, Metric]) -> dict[str, dict[str, Any]]:
    """Give the values of each metric by the attributes beyond the node's name, in the order of their names."""
    told: dict[str, dict[str, Any]] = {}
    for name, metric in metrics.items():
        told[name] = {}
        for attributes, start_ns, value in points(metric):
            assert attributes.pop("k8s.node.name") == "node1"
            # What the kernel counts of itself goes on through restarts, and so does what came into the ring.
            stage = attributes.get("lb_hop.stage")
            by_kernel = name == "lb_hop.events.dropped" or stage == "kernel" or (stage, name) == IN_RING
            assert start_ns == (0 if kind(metric) == "gauge" else COUNTING_START if by_kernel else AGENT_START)
            told[name]["/".join(str(attributes[key]) for key in sorted(attributes))] = value
    return told


def test_self_metrics() -> None:
    """What the agent says of itself: events that could not be told, tables, parts, age, process; all with its node."""
    dropped = {
        "truncated": 105,
        "fragment": 106,
        "extension": 107,
        "isn_shared": 108,
        "no_slot": 109,
        "late": 110,
        "no_row": 111,
        "conntrack_unread": 112,
    }
    report = SelfReport(
        events=tuple(dropped.get(event.name.lower(), 1_000) for event in Event),
        stages=(),
        vip_ports=2,
        topology_age_s=1.5,
        map_usage={"vip_ports": (2, 16_384), "backends": (5, 262_144)},
        parts_healthy={"topology": True, "logs": False},
        process=Usage(cpu_user_s=1.25, cpu_system_s=0.5, memory_bytes=50 << 20),
    )
    told = self_told(Exporter(cluster()).build(report=report))
    assert told == {
        "lb_hop.events.dropped": dropped,
        "lb_hop.vip.ports": {"": 2},
        "lb_hop.metric.series": {"": 0},
        "lb_hop.metric.series.limit": {"": 20_000},
        "lb_hop.metric.series.summed": {"": 0},
        "lb_hop.topology.age": {"": 1.5},
        "lb_hop.map.usage": {"vip_ports": 2, "backends": 5},
        "lb_hop.map.limit": {"vip_ports": 16_384, "backends": 262_144},
        "lb_hop.part.healthy": {"topology": 1, "logs": 0},
        "process.cpu.time": {"user": 1.25, "system": 0.5},
        "process.memory.usage": {"": 52_428_800},
    }
    whole = told.keys() - {"lb_hop.topology.age", "process.cpu.time"}
    assert all(type(value) is int for name in whole for value in told[name].values())


LEDGER = (
    Stage("kernel", "", "", 1_000, 700, {"ratio": 200, "rate": 90, "ring_full": 0}, 10),
    Stage("ring", "", "", 700, 690, {"wrong_size": 0}, 10),
    Stage("queue", "logs", "otlp", 690, 600, {"queue_full": 50}, 40),
    Stage("transport", "logs", "otlp", 600, 580, {"refused": 5, "queue_full": 15}, 0),
    Stage("queue", "traces", "otlp", 690, 690, {}, 0),
    Stage("transport", "traces", "otlp", 690, 690, {}, 0),
    Stage("queue", "logs", "console", 690, 690, {}, 0),
    Stage("transport", "logs", "console", 690, 680, {"failed": 10}, 0),
    Stage("queue", "metrics", "otlp", 80, 40, {"superseded": 40}, 0),
    Stage("transport", "metrics", "otlp", 40, 40, {"refused": 0}, 0),
)


def test_ledger() -> None:
    """Every stage tells what came, ended and is there; exported is what the last of each way delivered, and no more."""
    told = self_told(Exporter(cluster()).build(report=EMPTY_REPORT._replace(stages=LEDGER)))
    names = {name: told[name] for name in told if name.startswith(("lb_hop.records.", "lb_hop.data_points."))}
    assert names == {
        "lb_hop.records.seen": {
            "kernel": 1_000,
            "ring": 700,
            "otlp/logs/queue": 690,
            "otlp/logs/transport": 600,
            "otlp/traces/queue": 690,
            "otlp/traces/transport": 690,
            "console/logs/queue": 690,
            "console/logs/transport": 690,
        },
        "lb_hop.records.exported": {
            "otlp/logs/transport": 580,
            "otlp/traces/transport": 690,
            "console/logs/transport": 680,
        },
        "lb_hop.records.dropped": {
            "kernel/ratio": 200,
            "kernel/rate": 90,
            "kernel/ring_full": 0,
            "ring/wrong_size": 0,
            "otlp/logs/queue/queue_full": 50,
            "otlp/logs/transport/refused": 5,
            "otlp/logs/transport/queue_full": 15,
            "console/logs/transport/failed": 10,
        },
        "lb_hop.records.in_flight": {
            "kernel": 10,
            "ring": 10,
            "otlp/logs/queue": 40,
            "otlp/logs/transport": 0,
            "otlp/traces/queue": 0,
            "otlp/traces/transport": 0,
            "console/logs/queue": 0,
            "console/logs/transport": 0,
        },
        "lb_hop.data_points.seen": {"otlp/metrics/queue": 80, "otlp/metrics/transport": 40},
        "lb_hop.data_points.exported": {"otlp/metrics/transport": 40},
        "lb_hop.data_points.dropped": {"otlp/metrics/queue/superseded": 40, "otlp/metrics/transport/refused": 0},
        "lb_hop.data_points.in_flight": {"otlp/metrics/queue": 0, "otlp/metrics/transport": 0},
    }


def test_labels_of_the_ledger() -> None:
    """Stage, signal, exporter and reason stand there by name, where they exist."""
    metrics = Exporter(cluster()).build(report=EMPTY_REPORT._replace(stages=LEDGER[:3]))
    assert [attributes for attributes, _, _ in points(metrics["lb_hop.records.seen"])] == [
        {"k8s.node.name": "node1", "lb_hop.stage": "kernel"},
        {"k8s.node.name": "node1", "lb_hop.stage": "ring"},
        {"k8s.node.name": "node1", "lb_hop.stage": "queue", "lb_hop.signal": "logs", "lb_hop.exporter": "otlp"},
    ]
    reasons = [attributes["reason"] for attributes, _, _ in points(metrics["lb_hop.records.dropped"])]
    assert reasons == ["ratio", "rate", "ring_full", "wrong_size", "queue_full"]


def test_a_ledger_adds_up_over_its_stages() -> None:
    """What one way's first stage has seen = exported + dropped over all its stages + in flight over all of them."""
    metrics = Exporter(cluster()).build(report=EMPTY_REPORT._replace(stages=LEDGER))
    total: Counter[str] = Counter()
    for name in ("exported", "dropped", "in_flight"):
        for attributes, _, value in points(metrics[f"lb_hop.records.{name}"]):
            if (
                attributes.get("lb_hop.signal", "logs") == "logs"
                and attributes.get("lb_hop.exporter", "otlp") == "otlp"
            ):
                total[name] += value
    assert total == {"exported": 580, "dropped": 360, "in_flight": 60}
    assert total.total() == 1_000


def test_every_event_is_told() -> None:
    """No event of the kernel is counted and then kept quiet, but for those of records, which are the ledger's."""
    metrics = Exporter(cluster()).build(report=EMPTY_REPORT._replace(events=tuple(1 for _ in Event)))
    reasons = {attributes["reason"] for attributes, _, _ in points(metrics["lb_hop.events.dropped"])}
    assert reasons == {event.name.lower() for event in Event if not event.name.startswith("RECORD_")}


def test_nodes_of_the_cluster() -> None:
    """Told where a source names nodes, and nothing rather than a zero where none does."""
    made = Exporter(cluster())
    assert "lb_hop.cluster.nodes" not in made.build()
    metric = made.build(report=EMPTY_REPORT._replace(cluster_nodes=3))["lb_hop.cluster.nodes"]
    assert [(attributes, value) for attributes, _, value in points(metric)] == [({"k8s.node.name": "node1"}, 3)]


def test_resource_and_scope(web: Exporter) -> None:
    """An export names its resource and scope, with the schema of the semantic conventions."""
    (resource,) = decoded(web.chunks()).resource_metrics
    (scope,) = resource.scope_metrics
    assert {each.key: each.value.string_value for each in resource.resource.attributes} == RESOURCE
    assert (scope.scope.name, scope.scope.version) == ("otel_lb_hop", __version__)
    assert scope.schema_url == resource.schema_url == "https://opentelemetry.io/schemas/1.44.0"


def test_points(web: Exporter) -> None:
    """Integers are integers up to the largest, bools stay bools, histograms have no min and max."""
    hops = {3: hop_stats(external=2**63 - 1, forward=histogram(3_000_000, b1=3, b21=1))}
    metrics = web.build({1: vip_stats(retransmits=2)}, hops)
    (point,) = (point for point in metrics["lb_hop.connections"].sum.data_points if point.as_int)
    assert (point.as_int, point.start_time_unix_nano, point.time_unix_nano) == (2**63 - 1, START, NOW)
    values = {each.key: each.value for each in point.attributes}
    assert values["lb_hop.zone.crossed"].bool_value is True
    assert (values["server.port"].int_value, values["server.address"].string_value) == (80, "10.0.10.0")
    (times,) = metrics["lb_hop.forward.duration"].histogram.data_points
    assert not times.HasField("min")
    assert not times.HasField("max")
    assert (times.count, times.sum, list(times.bucket_counts)) == (4, 0.003, [0, 3, *[0] * 19, 1])
    assert len(times.explicit_bounds) == len(times.bucket_counts) - 1


def test_chunks_of_a_large_cluster() -> None:
    """No chunk is over 512 KiB, each is whole, knows its points and its bytes; together they tell every point once."""
    vips = (vip_port(LOCAL, REMOTE, address=f"10.1.{number // 250}.{number % 250}") for number in range(2_000))
    large = Exporter(cluster(*vips), series=100_000)
    used = {number: vip_stats(external=(number,)) for number in large.topology.vips.by_id}
    hops = {number: hop_stats(forward=histogram(1, b0=number)) for number in large.topology.hops.by_id}
    chunks = large.chunks(used, hops)
    assert len(chunks) > 3
    told: dict[str, list[int]] = {}
    for chunk in chunks:
        assert chunk.group is ENVELOPE
        assert chunk.size_bytes == len(chunk.payload) <= 1 << 19
        pieces = decoded([chunk]).resource_metrics[0].scope_metrics[0].metrics
        assert chunk.items == sum(len(data_points(piece)) for piece in pieces) > 0
        for piece in pieces:
            assert piece.unit
            told.setdefault(piece.name, []).append(len(points(piece)))
    assert {name: sum(counts) for name, counts in told.items() if len(counts) > 1} == {
        "lb_hop.connections": 8_000,
        "lb_hop.handshake.failures": 8_000,
        "lb_hop.forward.duration": 6_000,
        "lb_hop.syn.retransmits": 2_000,
        "lb_hop.connections.pending": 2_000,
        "lb_hop.endpoints": 6_000,
    }
    series = [
        (piece.name, frozenset(attributes.items()))
        for piece in chain.from_iterable(
            decoded([each]).resource_metrics[0].scope_metrics[0].metrics for each in chunks
        )
        for attributes, _, _ in points(piece)
    ]
    assert len(series) == len(set(series)) == sum(chunk.items for chunk in chunks)


def test_nothing_to_tell_is_no_chunk() -> None:
    """Metrics without points leave nothing behind, and no metrics no chunk."""
    assert otlp_metrics.encode([], ENVELOPE, NOW) == []
    assert "lb_hop.connections" not in Exporter(cluster()).build()


def _go_on(kernel: Kernel, random: Random, now_ns: int) -> None:
    """Write and forget what there is, as the agent does, and count something in each row that can count."""
    kernel.write()
    kernel.forget(now_ns - KEEP_RETIRED_NS, now_ns)
    kernel.write()
    for number in kernel.rows[0]:
        old = unpack_words(kernel.vip_stats, number)
        kernel.count_in_vip(number, 0, 0, *(word + random.randrange(3) for word in old[2:]))
    for number in kernel.rows[1]:
        if not kernel.topology.hops.by_id[number].is_remainder:
            old = unpack_words(kernel.hop_stats, number)
            kernel.count_in_hop(number, *(word + random.randrange(3) for word in old))


REPORT = SelfReport(
    tuple(range(len(Event))), LEDGER, 2, 1.5, {"x": (1, 2)}, {"a": True, "b": False}, Usage(1.5, 0.0, 9)
)


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.tuples(st.sampled_from([1, 299, 301]), CLUSTERS), min_size=1, max_size=5),
    st.builds(MetricAttributes, st.booleans(), st.booleans(), st.booleans()),
    st.randoms(),
)
def test_any_history(steps: list[tuple[int, Cluster]], told_attributes: MetricAttributes, random: Random) -> None:
    """In any history of topologies and counters names are ours, no two points are one series, none ever falls.

    And the bytes say what the SDK's encoder makes of the same points in the SDK's classes.
    """
    kernel, now = kernel_for(told_attributes), START
    for each in (*kernel.maps.values(), kernel.names):
        each.limit = 1_000
    exporter = Exporter(cluster(), kernel, attributes=told_attributes)
    last: dict[tuple[str, frozenset[tuple[str, Any]]], tuple[int, list[float]]] = {}
    for seconds, state in steps:
        now += seconds * SECOND
        exporter.topology.replace(state, now)
        _go_on(kernel, random, now)
        vips, hops, _ = kernel.tables.snapshot()
        chunks = exporter.chunks(vips, hops, REPORT, now)
        metrics = metrics_of(chunks)
        assert metrics.keys() <= SEMCONV
        data = sdk_metrics.make_data(exporter.builder.build(vips, hops, REPORT), SDK_RESOURCE, now)
        assert decoded(chunks) == encode_metrics(data)
        told = {
            (name, frozenset(attributes.items())): (start, [value] if isinstance(value, (int, float)) else value[1])
            for name, metric in metrics.items()
            for attributes, start, value in points(metric)
        }
        assert len(told) == sum(len(data_points(metric)) for metric in metrics.values())
        for (name, attributes), (start, values) in told.items():
            assert dict(attributes).keys() <= SEMCONV - RECORDS_ONLY
            assert "" not in dict(attributes).values()
            assert start <= now
            if kind(metrics[name]) == "gauge" or (name, attributes) not in last:
                continue
            before_start, before = last[name, attributes]
            # A later start is a new series; with the same start nothing may fall.
            assert start >= before_start
            assert start > before_start or all(a >= b for a, b in zip(values, before, strict=True))
        last = told
        rows = exporter.topology.hops.by_id
        # Whatever is told by node ends with the node.
        by_node = told_attributes.destination_node
        told_rows = (stats for number, stats in hops.items() if not (by_node and rows[number].is_remainder))
        forwarded = sum(sum(stats.forwarded) for stats in told_rows)
        lost = sum(sum(map(sum, stats.unforwarded)) for stats in vips.values())
        connections = points(metrics["lb_hop.connections"]) if "lb_hop.connections" in metrics else []
        assert sum(value for _, _, value in connections) == forwarded + lost
