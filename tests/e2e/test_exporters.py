"""Where telemetry goes when it does not all go to a Collector: the console, nowhere, or a share of it."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import pytest

from tests.e2e import truth
from tests.e2e.collector import Collector
from tests.e2e.conftest import TARGET_PORT
from tests.lab.agent import Agent, agents_on
from tests.lab.requirements import needs_lab
from tests.lab.waiting import wait_for

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.lab import Lab

pytestmark = [pytest.mark.root, needs_lab]

SENT = 23
VIP = "10.0.60.0"


@pytest.fixture(autouse=True)
def service(lab: Lab) -> None:
    """Let node1 take in all the traffic of one VIP."""
    backends = lab.vip_port(VIP, 80, backends=lab.pods, target_port=TARGET_PORT)
    lab.apply([backends], announce={VIP: lab.nodes[:1]})


def dropped_is(reason: str, good: Callable[[float], bool], collector: Collector) -> bool:
    """Whether the latest count of records dropped for a reason is good."""
    series = collector.series("lb_hop.records.dropped")
    return any(good(each.value) for each in series if each.attributes["reason"] == reason)


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


@pytest.mark.collector
def test_disabled(lab: Lab) -> None:
    """OTEL_SDK_DISABLED sends nothing to anybody; the agent is ready and hooked all the same."""
    with Collector(lab) as collector:
        settings = collector.settings() | {"OTEL_SDK_DISABLED": "true"}
        with agents_on(lab.nodes[:1], lab.vips_path, settings) as (agent,):
            lab.connect(VIP, 80, SENT)
            state = agent.readyz()
            assert (state.status, state.content["degraded"]) == (200, [])
            assert state.content["parts"].keys() == {"conntrack", "interfaces", "ledger", "topology", "vips_file"}
    assert (collector.logs(), collector.spans(), collector.series()) == ([], [], [])


@pytest.mark.collector
def test_ratio(lab: Lab) -> None:
    """Half the connections are sampled: whole ones, by their trace id, and the others are counted; metrics have all."""
    sent = 10 * SENT
    with Collector(lab) as collector:
        settings = collector.settings() | {"OTEL_LB_HOP_RECORD_RATIO": "0.5"}
        with agents_on(lab.nodes[:1], lab.vips_path, settings):
            lab.connect(VIP, 80, sent)
            collector.wait_for_series("lb_hop.connections", lambda found: sum(s.value for s in found) == sent)
            wait_for(
                "every connection sent or counted as not sampled",
                lambda: dropped_is("ratio", lambda lost: lost + len(collector.logs()) == sent, collector),
            )
    logs, spans = collector.logs(), collector.spans()
    assert 0.3 * sent < len(logs) < 0.7 * sent
    assert {record.trace_id for record in logs} == {span.trace_id for span in spans}
    assert {span.trace_state for span in spans} == {"ot=th:8"}
    # W3C trace context level 2: kept if the low 56 bits reach the threshold 0x80000000000000.
    assert min(int(span.trace_id[-14:], 16) for span in spans) >= 0x80000000000000


@pytest.mark.collector
@pytest.mark.parametrize(("setting", "reason"), [("RECORD_RATIO", "ratio"), ("RECORD_RATE", "off")])
def test_no_records(lab: Lab, setting: str, reason: str) -> None:
    """With ratio or rate 0 there are metrics only; each record not made is counted; `none` turns a signal off."""
    with Collector(lab) as collector:
        settings = collector.settings() | {f"OTEL_LB_HOP_{setting}": "0", "OTEL_TRACES_EXPORTER": "none"}
        with agents_on(lab.nodes[:1], lab.vips_path, settings) as (agent,):
            lab.connect(VIP, 80, SENT)
            collector.wait_for_series("lb_hop.connections", lambda found: sum(s.value for s in found) == SENT)
            wait_for("the loss", lambda: dropped_is(reason, lambda lost: lost == SENT, collector))
            assert "traces" not in agent.readyz().content["parts"]
    assert (collector.logs(), collector.spans()) == ([], [])


@pytest.mark.collector
def test_two_agents_after_each_other(lab: Lab) -> None:
    """A restart begins a new series with a new start time, from the same service instance."""
    with Collector(lab) as collector:
        for expected in (SENT, 2 * SENT):
            with agents_on(lab.nodes[:1], lab.vips_path, collector.settings()):
                clients = [(r.client_address, r.client_port) for r in lab.connect(VIP, 80, SENT)]
                wait_for("log records", partial(received, collector, expected))
            assert sorted(truth.clients_of(collector.logs()[-SENT:])) == sorted(clients)
    series = collector.series("lb_hop.connections")
    starts = sorted({point.start_ns for each in series for point in each.points})
    assert len(starts) == 2
    for start in starts:
        lives = [[point for point in each.points if point.start_ns == start] for each in series]
        assert sum(life[-1].value for life in lives if life) == SENT
