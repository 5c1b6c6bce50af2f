"""Deltas at a real Collector: they add up to the connections made, through its outages and the agent's restarts."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.e2e.collector import GRPC, HTTP, Collector, endpoint
from tests.e2e.conftest import TARGET_PORT
from tests.e2e.otlp import CUMULATIVE
from tests.lab.agent import Agent
from tests.lab.bpffs import bpffs
from tests.lab.requirements import needs_lab
from tests.lab.waiting import wait_for

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.e2e.otlp import Point, Series
    from tests.lab import Lab

pytestmark = [pytest.mark.root, pytest.mark.collector, needs_lab]

SENT = 23
VIP = "10.0.42.0"
DELTA = 1
"""AGGREGATION_TEMPORALITY_DELTA."""
HISTOGRAMS = ("lb_hop.forward.duration", "lb_hop.handshake.duration")


@pytest.fixture
def pins(lab: Lab) -> Iterator[Path]:
    """Say where the agent pins."""
    with bpffs(lab.directory / "bpf") as mounted:
        yield mounted / "otel-lb-hop"


def number(point: Point) -> float:
    """Tell how many connections a point stands for."""
    return point.histogram.observations if point.histogram else point.value


def total(collectors: list[Collector], metric: str) -> float:
    """Add up all points of a metric that the Collectors have."""
    return sum(number(point) for each in collectors for series in each.series(metric) for point in series.points)


def send(lab: Lab) -> None:
    """Make 23 connections, all of which succeed."""
    assert [result.error for result in lab.connect(VIP, 80, SENT)] == [""] * SENT


def failing(agent: Agent) -> bool:
    """Whether metrics do not get through."""
    return bool(agent.shipped("metrics").get("failures_in_a_row"))


@pytest.mark.parametrize("protocol", [GRPC, HTTP])
def test_deltas_add_up(lab: Lab, pins: Path, protocol: str) -> None:
    """Two outages; in them one agent ends by SIGTERM, one by SIGKILL, and for a while there is none."""
    service = lab.vip_port(VIP, 80, backends=lab.pods, target_port=TARGET_PORT)
    lab.apply([service], announce={VIP: lab.nodes[:1]})
    settings = endpoint(lab.mgmt.address4, protocol) | {
        "OTEL_LB_HOP_PIN_PATH": str(pins),
        "OTEL_EXPORTER_OTLP_METRICS_TEMPORALITY_PREFERENCE": "Delta",
    }

    def begin() -> Agent:
        return Agent(lab.nodes[0], lab.vips_path, settings).wait_ready()

    agent = begin()
    try:
        with Collector(lab, "first") as first:
            send(lab)
            wait_for("the first deltas", lambda: total([first], "lb_hop.connections") == SENT)
            wait_for("the times", lambda: total([first], "lb_hop.handshake.duration") == SENT)
        send(lab)
        wait_for("an outage", lambda: failing(agent))
        agent.stop()
        send(lab)
        agent = begin()
        send(lab)
        wait_for("an outage", lambda: failing(agent))
        agent.kill()
        send(lab)
        agent = begin()
        with Collector(lab, "second") as second:
            wait_for("the rest", lambda: total([first, second], "lb_hop.connections") == 5 * SENT)
            send(lab)
            wait_for("what came then", lambda: total([first, second], "lb_hop.connections") == 6 * SENT)
            agent.stop()
    finally:
        agent.kill()
    both = [first, second]
    assert {metric: total(both, metric) for metric in ("lb_hop.connections", *HISTOGRAMS)} == dict.fromkeys(
        ("lb_hop.connections", *HISTOGRAMS), 6 * SENT
    )
    lives: dict[frozenset[tuple[str, object]], list[Series]] = {}
    for series in [each for collector in both for each in collector.series("lb_hop.connections")]:
        assert (series.kind, series.temporality, series.monotonic) == ("sum", DELTA, True)
        lives.setdefault(frozenset(series.attributes.items()), []).append(series)
    for life in lives.values():
        points = [point for series in life for point in series.points]
        assert points[0].start_ns < points[0].time_ns
        assert [point.start_ns for point in points[1:]] == [point.time_ns for point in points[:-1]]
    for metric in HISTOGRAMS:
        assert {series.temporality for collector in both for series in collector.series(metric)} == {DELTA}
    assert {each.temporality for each in second.series("process.memory.usage")} == {CUMULATIVE}
