"""A Collector that is not there: counting goes on, every record lost is counted, and the end is still quick."""

from __future__ import annotations

import ast
import re
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest

from tests.e2e.collector import GRPC, HTTP, Collector, endpoint
from tests.e2e.conftest import TARGET_PORT
from tests.e2e.firewall import deafen, hear
from tests.lab.agent import Agent, agents_on
from tests.lab.requirements import needs_lab
from tests.lab.waiting import wait_for

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.lab import Lab

pytestmark = [pytest.mark.root, pytest.mark.collector, needs_lab]

SENT = 23
VIP = "10.0.40.0"
QUICK = {"OTEL_EXPORTER_OTLP_TIMEOUT": "1"}
"""Give up a batch after one second, so that losses happen within the time of a test."""


@pytest.fixture(autouse=True)
def service(lab: Lab) -> None:
    """Let node1 take in all the traffic of one VIP."""
    backends = lab.vip_port(VIP, 80, backends=lab.pods, target_port=TARGET_PORT)
    lab.apply([backends], announce={VIP: lab.nodes[:1]})


@pytest.fixture
def silence(lab: Lab) -> Iterator[None]:
    """Let the mgmt host hear again when the test is over."""
    yield
    hear(lab.mgmt)


def send(lab: Lab) -> None:
    """Make 23 connections, all of which succeed."""
    assert [result.error for result in lab.connect(VIP, 80, SENT)] == [""] * SENT


def last_ledgers(agent: Agent) -> dict[str, dict[str, Any]]:
    """Return the ledgers of logs and traces that the agent wrote down as it ended; each adds up."""
    found = {}
    pattern = r"(logs|traces): Ledger\(offered=(\d+), exported=(\d+), dropped=(\{.*\}), in_flight=(\d+)\)"
    for signal, offered, exported, dropped, in_flight in re.findall(pattern, agent.stderr):
        reasons = {reason: count for reason, count in ast.literal_eval(dropped).items() if count}
        assert int(offered) == int(exported) + sum(reasons.values()) + int(in_flight)
        found[signal] = {"offered": int(offered), "exported": int(exported), "dropped": reasons}
    return found


@pytest.mark.parametrize("protocol", [GRPC, HTTP])
def test_collector_comes_late(lab: Lab, protocol: str) -> None:
    """Without a Collector the agent is ready and counts; when one comes the metrics are exact and losses are told."""
    settings = endpoint(lab.mgmt.address4, protocol) | QUICK
    with agents_on(lab.nodes[:1], lab.vips_path, settings) as (agent,):
        send(lab)
        wait_for("records given up", lambda: {"metrics", "logs", "traces"} <= {*agent.readyz().content["degraded"]})
        assert agent.readyz().status == 200
        assert agent.part("logs")["detail"]["error"]
        with Collector(lab) as collector:
            send(lab)
            # gRPC waits longer after each refusal before it connects again.
            wait_for("a healthy agent", lambda: agent.readyz().content["degraded"] == [], 60)
            told = {signal: wait_for(signal, partial(agent.ledger, signal)) for signal in ("logs", "traces")}
            for signal, received in (("logs", len(collector.logs())), ("traces", len(collector.spans()))):
                assert told[signal]["offered"] == 2 * SENT
                assert told[signal]["exported"] == received >= SENT
                assert {r: n for r, n in told[signal]["dropped"].items() if n} == {"export_failed": 2 * SENT - received}
            lost = {(s, "export_failed"): told[s]["dropped"]["export_failed"] for s in told}
            collector.wait_for_series(
                "lb_hop.records.dropped",
                lambda found: (
                    lost.items()
                    <= {(s.attributes.get("lb_hop.signal"), s.attributes["reason"]): s.value for s in found}.items()
                ),
            )
            assert sum(series.value for series in collector.series("lb_hop.connections")) == 2 * SENT
            histograms = [series.last.histogram for series in collector.series("lb_hop.handshake.duration")]
            assert sum(each.observations for each in histograms if each) == 2 * SENT


@pytest.mark.usefixtures("silence")
def test_end_with_a_collector_in_a_black_hole(lab: Lab) -> None:
    """SIGTERM while every packet to the Collector vanishes: exit 0 within 5 s, and what was lost is written down."""
    # Two agents on one node see the same connections, and send them by one protocol each.
    with Collector(lab) as collector:
        nodes, vips = lab.nodes[:1], lab.vips_path
        first = agents_on(nodes, vips, collector.settings(GRPC), "grpc")
        second = agents_on(nodes, vips, collector.settings(HTTP), "http", 9466)
        with first as (by_grpc,), second as (by_http,):
            send(lab)
            wait_for("records of both agents", lambda: len(collector.logs()) == len(collector.spans()) == 2 * SENT)
            deafen(lab.mgmt)
            send(lab)
            for agent in (by_grpc, by_http):
                agent.terminate()
            for agent in (by_grpc, by_http):
                agent.stop()
        hear(lab.mgmt)  # or the Collector would wait for its clients' last words
    for agent in (by_grpc, by_http):
        ledgers = last_ledgers(agent)
        assert ledgers.keys() == {"logs", "traces"}
        for told in ledgers.values():
            assert told["offered"] == 2 * SENT
            assert told["exported"] == SENT
            assert sum(told["dropped"].values()) == SENT
    assert len(collector.logs()) == len(collector.spans()) == 2 * SENT


@pytest.mark.usefixtures("silence")
def test_end_before_the_collector_ever_answered(lab: Lab) -> None:
    """SIGTERM of an agent that never reached its Collector: exit 0 within 5 s, all records lost are written down."""
    deafen(lab.mgmt)
    with agents_on(lab.nodes[:1], lab.vips_path, endpoint(lab.mgmt.address4)) as (agent,):
        send(lab)
        agent.stop()
    for told in last_ledgers(agent).values():
        assert told == {"offered": SENT, "exported": 0, "dropped": {"shutdown": SENT}}
