"""Where telemetry goes when it does not all go to a Collector: the console, or nowhere."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import pytest

from tests.e2e import truth
from tests.e2e.collector import Collector
from tests.e2e.conftest import TARGET_PORT
from tests.lab.agent import Account, Agent, agents_on
from tests.lab.requirements import needs_lab
from tests.lab.waiting import wait_for

if TYPE_CHECKING:
    from tests.lab import Lab

pytestmark = [pytest.mark.root, needs_lab]

SENT = 23
VIP = "10.0.60.0"


@pytest.fixture(autouse=True)
def service(lab: Lab) -> None:
    """Let node1 take in all the traffic of one VIP."""
    backends = lab.vip_port(VIP, 80, backends=lab.pods, target_port=TARGET_PORT)
    lab.apply([backends], announce={VIP: lab.nodes[:1]})


def dropped(collector: Collector) -> dict[str, float]:
    """Tell the latest counts of records that were dropped, by reason."""
    return {each.attributes["reason"]: each.value for each in collector.series("lb_hop.records.dropped") if each.value}


def received(collector: Collector, count: int) -> bool:
    """Whether the Collector has exactly so many log records."""
    return len(collector.logs()) == count


def all_exported(agent: Agent, name: str) -> bool:
    """Whether the agent says that 23 records of a signal are out."""
    return agent.shipped(name).get("exported") == SENT


def test_console(lab: Lab) -> None:
    """The console exporters print every record and the metrics on standard output."""
    settings = {f"OTEL_{signal}_EXPORTER": "console" for signal in ("METRICS", "LOGS", "TRACES")}
    with agents_on(lab.nodes[:1], lab.vips_path, settings) as (agent,):
        clients = [result.client_port for result in lab.connect(VIP, 80, SENT)]
        wait_for("metrics", lambda: '"name": "lb_hop.connections"' in agent.stdout)
        for name in ("logs", "traces"):
            wait_for(name, partial(all_exported, agent, name))
    printed = agent.stdout
    assert printed.count('"event_name": "lb_hop.connection.forwarded"') == SENT
    assert printed.count('"name": "lb_hop default/web"') == SENT
    for client in clients:
        assert printed.count(f'"client.port": {client},') == 2
    for name in ("logs", "traces"):
        assert agent.accounts()[f"transport of {name} to console"] == Account(SENT, SENT, {}, 0)


@pytest.mark.collector
def test_disabled(lab: Lab) -> None:
    """OTEL_SDK_DISABLED sends nothing to anybody; the agent is ready and hooked all the same."""
    with Collector(lab) as collector:
        settings = collector.settings() | {"OTEL_SDK_DISABLED": "true"}
        with agents_on(lab.nodes[:1], lab.vips_path, settings) as (agent,):
            lab.connect(VIP, 80, SENT)
            wait_for("the first report", lambda: agent.part("ledger"))
            state = agent.readyz()
            assert (state.status, state.content["degraded"]) == (200, [])
            parts = {"conntrack", "interfaces", "ledger", "pins", "topology", "vips_file"}
            assert state.content["parts"].keys() == parts
            agent.stop()
            assert agent.accounts() == {
                "kernel": Account(SENT, 0, {"off": SENT}, 0),
                "ring": Account(0, 0, {}, 0),
                "decode": Account(0, 0, {}, 0),
            }
    assert (collector.logs(), collector.spans(), collector.series()) == ([], [], [])


@pytest.mark.collector
@pytest.mark.parametrize(("setting", "reason"), [("RECORD_RATIO", "ratio"), ("RECORD_RATE", "off")])
def test_no_records(lab: Lab, setting: str, reason: str) -> None:
    """With ratio or rate 0 there are metrics only; each record not made is counted; `none` turns a signal off."""
    with Collector(lab) as collector:
        settings = collector.settings() | {f"OTEL_LB_HOP_{setting}": "0", "OTEL_TRACES_EXPORTER": "none"}
        with agents_on(lab.nodes[:1], lab.vips_path, settings) as (agent,):
            lab.connect(VIP, 80, SENT)
            collector.wait_for_series("lb_hop.connections", lambda found: sum(s.value for s in found) == SENT)
            wait_for("the loss", lambda: dropped(collector) == {reason: SENT})
            wait_for("the first report", lambda: agent.shipped("logs"))
            assert "traces" not in agent.readyz().content["parts"]
    assert (collector.logs(), collector.spans()) == ([], [])
    assert agent.accounts()["kernel"] == Account(SENT, 0, {reason: SENT}, 0)


@pytest.mark.collector
def test_two_agents_after_each_other(lab: Lab) -> None:
    """A restart begins a new series with a new start time, from the same service instance."""
    with Collector(lab) as collector:
        for expected in (SENT, 2 * SENT):
            with agents_on(lab.nodes[:1], lab.vips_path, collector.settings()) as (agent,):
                clients = [(r.client_address, r.client_port) for r in lab.connect(VIP, 80, SENT)]
                wait_for("log records", partial(received, collector, expected))
            assert sorted(truth.clients_of(collector.logs()[-SENT:])) == sorted(clients)
            assert agent.accounts()["kernel"] == Account(SENT, SENT, {}, 0)
    series = collector.series("lb_hop.connections")
    starts = sorted({point.start_ns for each in series for point in each.points})
    assert len(starts) == 2
    for start in starts:
        lives = [[point for point in each.points if point.start_ns == start] for each in series]
        assert sum(life[-1].value for life in lives if life) == SENT
