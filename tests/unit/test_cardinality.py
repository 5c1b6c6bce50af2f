"""How many series there are: the formula of docs/cardinality.md, held exactly, and the figures that stand there."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import pytest

from otel_lb_hop.config import MetricAttributes
from otel_lb_hop.core.layout import BOUNDS_NS, Event, HopStats, VipStats
from otel_lb_hop.core.topology import Topology
from otel_lb_hop.export.metrics import MetricsBuilder, SelfReport, Usage
from otel_lb_hop.export.points import Kind, Metric
from otel_lb_hop.model import Hop, Policy, Transport
from tests.unit.samples import NO_HISTOGRAM, NODE, backend, cluster, histogram, hop_stats, vip_port, vip_stats

PAGE = Path(__file__).parents[2] / "docs" / "cardinality.md"
REPORT = SelfReport((0,) * len(Event), (), 0, 0.0, {}, {}, Usage(0.0, 0.0, 0))
OF_A_HISTOGRAM = len(BOUNDS_NS) + 1 + 2
"""Series in Prometheus: the buckets with `+Inf`, the sum and the count."""
WITHOUT_NODES = MetricAttributes(destination_node=False)
ZONES = ("zone-a", "zone-b", "zone-c")


class Size(NamedTuple):
    """A cluster, seen from one node: VIP ports, those that took connections here, nodes that have endpoints of each."""

    vip_ports: int
    busy: int
    nodes: int
    local: bool = True
    """Whether one of these nodes is this one."""
    policy: Policy = Policy.CLUSTER
    transport: Transport = Transport.TCP


def formula(size: Size, attributes: MetricAttributes = MetricAttributes()) -> dict[str, int]:  # noqa: B008 - frozen
    """Tell how many points each metric has, as the page does."""
    tcp = size.transport is Transport.TCP
    remote = size.nodes - size.local
    classes = size.local + (remote > 0)
    ways = size.nodes
    if not attributes.destination_node:
        # This node's zone is the first; remote nodes take turns in all three.
        zones = min(remote, len(ZONES))
        crossed = zones if attributes.destination_zone else min(zones, 2)
        ways = size.local + crossed
    per_busy = {
        "lb_hop.connections": ways + (3 if size.policy is Policy.LOCAL else 2),
        "lb_hop.connections.pending": 1,
        "lb_hop.syn.retransmits": int(tcp),
        "lb_hop.handshake.failures": 2 * classes * tcp,
        "lb_hop.forward.duration": classes * tcp,
        "lb_hop.handshake.duration": classes * tcp,
    }
    points = {name: size.busy * number for name, number in per_busy.items()} | {"lb_hop.endpoints": 3 * size.vip_ports}
    return {name: number for name, number in points.items() if number}


def in_prometheus(points: dict[str, int]) -> int:
    """Tell how many series they are there."""
    return sum(number * (OF_A_HISTOGRAM if name.endswith(".duration") else 1) for name, number in points.items())


def topology_of(size: Size, *, tells_zones: bool = False) -> Topology:
    """Make VIP ports with one endpoint on each of so many nodes; nodes elsewhere are in three zones in turn."""
    made = Topology(NODE, 1, tells_zones=tells_zones)
    first = [backend("10.100.0.1", NODE, ZONES[0])] if size.local else []
    others = [
        backend(f"10.101.{number // 250}.{number % 250}", f"other{number}", ZONES[number % 3])
        for number in range(size.nodes - size.local)
    ]
    ports = (
        vip_port(
            *first,
            *others,
            address=f"10.0.{number // 250}.{number % 250}",
            name=f"default/service-{number}",
            policy=size.policy,
            transport=size.transport,
        )
        for number in range(size.vip_ports)
    )
    made.replace(cluster(*ports, node1=ZONES[0]), 1)
    return made


def counted(topology: Topology, busy: int) -> tuple[dict[int, VipStats], dict[int, HopStats]]:
    """Let so many VIP ports have taken connections that went every way, and have measured them."""
    rows = topology.vips.by_id
    chosen = set(list(rows)[:busy])
    vips = {vip_id: vip_stats() for vip_id in rows}
    vips |= {vip_id: VipStats((0, 9), vips[vip_id].unforwarded, 0) for vip_id in chosen}
    tcp = {vip_id for vip_id in chosen if rows[vip_id].transport is Transport.TCP}
    hops = {}
    for hop_id, row in topology.hops.by_id.items():
        taken = row.vip_id in chosen and row.hop is not Hop.UNKNOWN
        measured = histogram(1, b1=1) if taken and row.vip_id in tcp else NO_HISTOGRAM
        hops[hop_id] = hop_stats(0, int(taken), forward=measured, handshake=measured)
    return vips, hops


def points_of(topology: Topology, busy: int, attributes: MetricAttributes, series: int = 1_000_000) -> Counter[str]:
    """Count the points about VIP ports by metric; no two of a metric are one series."""
    builder = MetricsBuilder(topology, NODE, 1, 1, attributes=attributes, series=series)
    vips, hops = counted(topology, busy)
    found: Counter[str] = Counter()
    for metric in builder.build(vips, hops, REPORT):
        points = list(metric.points)
        labels = {tuple(sorted((own.pairs | beyond.pairs).items())) for own, beyond, _, _ in points}
        assert len(labels) == len(points)
        if any("server.address" in dict(each) or "otel.metric.overflow" in dict(each) for each in labels):
            found[metric.instrument.name] = len(points)
    return found


SIZES = [
    Size(1, 1, 1),
    Size(10, 10, 3),
    Size(10, 4, 3, local=False),
    Size(100, 30, 30),
    Size(100, 100, 3),
    Size(40, 40, 300),
    Size(1_000, 0, 3),
    Size(1_000, 1_000, 3, local=False),
    Size(10, 10, 3, policy=Policy.LOCAL),
    Size(10, 10, 30, transport=Transport.UDP),
]


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize(
    "attributes",
    [
        MetricAttributes(),
        MetricAttributes(zone=True, destination_zone=True),
        WITHOUT_NODES,
        MetricAttributes(zone=True, destination_zone=True, destination_node=False),
    ],
    ids=["usual", "zones", "without nodes", "zones without nodes"],
)
def test_formula(size: Size, attributes: MetricAttributes) -> None:
    """The number of points of each metric is what the formula says; zones of nodes that are told cost nothing."""
    topology = topology_of(size, tells_zones=attributes.destination_zone)
    assert points_of(topology, size.busy, attributes) == formula(size, attributes)


def test_bound() -> None:
    """With a bound there are never more, each metric with one point for the rest."""
    size = Size(100, 30, 30)
    points = points_of(topology_of(size), size.busy, MetricAttributes(), series=500)
    assert points == {
        "lb_hop.connections": 247,
        "lb_hop.syn.retransmits": 30,
        "lb_hop.handshake.failures": 120,
        "lb_hop.forward.duration": 60,
        "lb_hop.handshake.duration": 37,
        "lb_hop.connections.pending": 1,
        "lb_hop.endpoints": 1,
    }


def test_histograms_are_what_is_multiplied() -> None:
    """The metrics of VIP ports that are histograms are those whose names end so; each has 21 bounds."""
    builder = MetricsBuilder(topology_of(SIZES[1]), NODE, 1, 1)

    def is_histogram(metric: Metric) -> bool:
        return metric.instrument.kind is Kind.HISTOGRAM

    for metric in builder.build({}, {}, REPORT):
        assert is_histogram(metric) is metric.instrument.name.endswith(".duration")
    assert OF_A_HISTOGRAM == 24


ROW = re.compile(
    r"^\| ([\d,]+) \| ([\d,]+) \| ([\d,]+) \| ([\d,]+) \| ([\d,]+) \| ([\d,]+) \| ([\d,]+) \|$", re.MULTILINE
)


def test_figures_of_the_page() -> None:
    """The worked figures are those of the formula: 3 nodes with endpoints, then all nodes, then without their names."""
    rows = [tuple(int(cell.replace(",", "")) for cell in row) for row in ROW.findall(PAGE.read_text(encoding="utf-8"))]
    assert [row[:2] for row in rows] == [(services, nodes) for services in (10, 100, 1_000) for nodes in (3, 30, 300)]
    for services, nodes, *told in rows:
        few = [formula(Size(services, services, 3, local=local)) for local in (True, False)]
        many = formula(Size(services, services, nodes))
        fewer = formula(Size(services, services, nodes), WITHOUT_NODES)
        assert told == [
            sum(few[0].values()),
            3 * in_prometheus(few[0]) + (nodes - 3) * in_prometheus(few[1]),
            sum(many.values()),
            nodes * in_prometheus(many),
            nodes * in_prometheus(fewer),
        ]
