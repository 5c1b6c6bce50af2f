"""Attributes that an operator adds or leaves out, and the bound on series, as they arrive at a real Collector."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import pytest

from tests.e2e import truth
from tests.e2e.collector import Collector
from tests.e2e.conftest import TARGET_PORT
from tests.lab.agent import agents_on
from tests.lab.requirements import needs_lab
from tests.lab.waiting import wait_for

if TYPE_CHECKING:
    from tests.lab import Lab

pytestmark = [pytest.mark.root, pytest.mark.collector, needs_lab]

SENT = 23
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
