"""Attributes that an operator adds or leaves out, and the bound on series, as they arrive at a real Collector."""

from __future__ import annotations

from collections import Counter
from functools import partial
from typing import TYPE_CHECKING

import pytest

from tests.e2e import truth
from tests.e2e.collector import Collector
from tests.e2e.conftest import TARGET_PORT
from tests.lab.agent import Agent, agents_on
from tests.lab.bpffs import bpffs
from tests.lab.requirements import needs_lab
from tests.lab.waiting import wait_for

if TYPE_CHECKING:
    from tests.e2e.otlp import Series
    from tests.lab import Lab

pytestmark = [pytest.mark.root, pytest.mark.collector, needs_lab]

SENT = 23
BUSY, SENT_TO_EACH = 12, 5
"""VIP ports with traffic, with four points each of one metric: more than half of the bound."""
VIP = "10.0.43.0"
BOUND = 100
IDLE = 40
"""VIP ports without traffic, with three points each: more than the bound."""


def test_zones_in_place_of_nodes_and_a_bound(lab: Lab) -> None:
    """Where 23 connections went, by zones alone, as conntrack says; what has no room is one sum, and that is told."""
    service = lab.vip_port(VIP, 80, backends=lab.pods, target_port=TARGET_PORT)
    idle = [lab.vip_port(f"10.0.44.{number}", 80, service=f"idle{number}", backends=lab.pods) for number in range(IDLE)]
    lab.apply([service])
    lab.vips_path.write_text(lab.vips_file([service, *idle]), encoding="utf-8")
    with Collector(lab) as collector:
        settings = collector.settings() | {
            "OTEL_LB_HOP_METRIC_ATTRIBUTES": (
                "cloud.availability_zone,destination.cloud.availability_zone,-destination.k8s.node.name"
            ),
            "OTEL_LB_HOP_METRIC_SERIES": str(BOUND),
        }
        with agents_on(lab.nodes, lab.vips_path, settings) as agents:
            truth.forget_connections(lab)
            counts = truth.accepted_counts(lab)
            results = lab.connect(VIP, 80, SENT)
            told = truth.follow(lab, service, results, truth.accepted_since(lab, counts))
            collector.wait_for_series("lb_hop.connections", lambda found: sum(s.value for s in found) == SENT)
            ours = [each for each in collector.series("lb_hop.connections") if each.value]
            wait_for("the log", lambda: all("there is room for 100 series" in agent.stderr for agent in agents))
    assert {each.attributes.get("destination.k8s.node.name") for each in ours} == {None}
    names = ("cloud.availability_zone", "destination.cloud.availability_zone")
    matrix: Counter[tuple[object, ...]] = Counter()
    for each in ours:
        matrix[tuple(each.attributes[name] for name in names)] += int(each.value)
    assert matrix == Counter((each.node.zone, each.pod.zone) for each in told)
    for node in lab.nodes:
        own = [s for s in collector.series() if s.attributes["k8s.node.name"] == node.name]
        endpoints = [s for s in own if s.metric == "lb_hop.endpoints"]
        (rest,) = (s for s in endpoints if s.attributes.get("otel.metric.overflow"))
        assert rest.attributes == {"k8s.node.name": node.name, "otel.metric.overflow": True}
        usage = {s.metric: s.value for s in own if s.metric.startswith("lb_hop.metric.series")}
        assert usage["lb_hop.metric.series.limit"] == BOUND
        assert usage["lb_hop.metric.series"] <= BOUND
        assert usage["lb_hop.metric.series.summed"] > 3 * IDLE - BOUND


def send(lab: Lab, vips: list[str]) -> None:
    """Make some connections to each VIP, all of which succeed."""
    for vip in vips:
        assert [result.error for result in lab.connect(vip, 80, SENT_TO_EACH)] == [""] * SENT_TO_EACH


def adds_up(made: int, found: list[Series]) -> bool:
    """Whether the latest points of all series are so many connections."""
    return sum(series.value for series in found) == made


def test_a_bound_through_restarts(lab: Lab) -> None:
    """Who is summed and who is not stays so, so that no series falls and all connections are there, each once."""
    vips = [f"10.0.45.{number}" for number in range(BUSY)]
    services = [
        lab.vip_port(vip, 80, service=f"busy{number}", backends=lab.pods, target_port=TARGET_PORT)
        for number, vip in enumerate(vips)
    ]
    lab.apply(services, announce=dict.fromkeys(vips, lab.nodes[:1]))

    with bpffs(lab.directory / "bpf") as mounted, Collector(lab) as collector:
        settings = collector.settings() | {
            "OTEL_LB_HOP_METRIC_SERIES": str(BOUND),
            "OTEL_LB_HOP_PIN_PATH": str(mounted / "otel-lb-hop"),
        }
        made = 0
        for turn in range(2):
            if turn:
                send(lab, vips)  # while no agent runs
                made += BUSY * SENT_TO_EACH
            with Agent(lab.nodes[0], lab.vips_path, settings):
                # The last come into use first: that is not the order in which they are looked at.
                for some in (vips[BUSY // 2 :], vips[: BUSY // 2]):
                    send(lab, some)
                    made += len(some) * SENT_TO_EACH
                    collector.wait_for_series("lb_hop.connections", partial(adds_up, made))
        series = collector.series("lb_hop.connections")
    (rest,) = (each for each in series if each.attributes.get("otel.metric.overflow"))
    assert 0 < rest.value < made
    assert len(series) <= BOUND // 2
    for each in series:
        assert len({point.start_ns for point in each.points}) == 1
        values = [point.value for point in each.points]
        assert values == sorted(values)
        assert each.last.time_ns == rest.last.time_ns
