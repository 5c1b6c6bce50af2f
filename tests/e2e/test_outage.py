"""A Collector that is not there: counting goes on, records wait, every one lost is counted, and the end is quick."""

from __future__ import annotations

import time
from collections import Counter
from functools import partial
from typing import TYPE_CHECKING

import pytest

from tests.bench.measure import peak_rss_mib
from tests.e2e.collector import FULL, GRPC, HTTP, Collector, endpoint
from tests.e2e.conftest import TARGET_PORT
from tests.e2e.firewall import deafen, hear
from tests.lab.agent import Account, Agent, agents_on
from tests.lab.generator import Generator, Traffic, forget_closed_quickly
from tests.lab.requirements import needs_lab
from tests.lab.waiting import wait_for

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.lab import Lab

pytestmark = [pytest.mark.root, pytest.mark.collector, needs_lab]

SENT = 23
VIP, FAST_VIP = "10.0.40.0", "10.0.40.1"
RATE = 10_000
FAST_PORT = 8081
BACK_SECONDS = 5
"""A Collector that is back gets telemetry again within this time."""
QUEUE_MIB = 32
"""OTEL_LB_HOP_QUEUE_BYTES by default."""
OVERHEAD_MIB = 8
"""On top of the queue's own bytes, over the peak of an agent that sends at this rate: 3.4 MiB by gRPC were measured."""
SIGNALS = ("logs", "traces")


@pytest.fixture(autouse=True)
def service(lab: Lab) -> None:
    """Let node1 take in all the traffic of two VIPs."""
    backends = lab.vip_port(VIP, 80, backends=lab.pods, target_port=TARGET_PORT)
    fast = lab.vip_port(FAST_VIP, 80, service="fast", backends=lab.pods[1:], target_port=FAST_PORT)
    lab.apply([backends, fast], announce={VIP: lab.nodes[:1], FAST_VIP: lab.nodes[:1]})


@pytest.fixture
def silence(lab: Lab) -> Iterator[None]:
    """Let the mgmt host hear again when the test is over."""
    yield
    hear(lab.mgmt)


def send(lab: Lab) -> None:
    """Make 23 connections, all of which succeed."""
    assert [result.error for result in lab.connect(VIP, 80, SENT)] == [""] * SENT


def waiting(agent: Agent, signal: str, count: int) -> bool:
    """Whether so many items of a signal wait and none was lost, though an attempt to send them has failed."""
    state = agent.shipped(signal)
    if not state or not state["failures_in_a_row"]:
        return False
    assert state["dropped"] == {}
    held: int = state["queued"] + state["sending"]
    return held == count


def exported(agent: Agent, signal: str, count: int) -> bool:
    """Whether at least so many items of a signal were taken."""
    return bool(agent.shipped(signal).get("exported", 0) >= count)


def degraded(agent: Agent) -> list[str]:
    """Name the parts that do not do well."""
    parts: list[str] = agent.readyz().content["degraded"]
    return parts


def received_once(collector: Collector, count: int) -> bool:
    """Whether so many log records and as many spans have arrived, of as many connections."""
    logs, spans = collector.logs(), collector.spans()
    assert len({record.trace_id for record in logs}) == len(logs)
    assert len({span.trace_id for span in spans}) == len(spans)
    return len(logs) == len(spans) == count


def fate(agent: Agent, signal: str) -> tuple[int, dict[str, int]]:
    """Tell by the last ledger how many connections were exported as items of a signal, and why the others were not."""
    accounts = agent.accounts()
    own = [f"{stage} of {signal} to otlp" for stage in ("encode", "queue", "transport")]
    stages = [accounts[title] for title in ("kernel", "ring", "decode", *own)]
    lost = sum((Counter(stage.dropped) for stage in stages), Counter[str]())
    return stages[-1].exported, dict(lost)


@pytest.mark.parametrize("protocol", [GRPC, HTTP])
def test_collector_comes_late(lab: Lab, protocol: str) -> None:
    """Without a Collector the agent is ready and counts; one that comes gets all of it, each record once."""
    settings = endpoint(lab.mgmt.address4, protocol)
    with agents_on(lab.nodes[:1], lab.vips_path, settings) as (agent,):
        send(lab)
        for signal in SIGNALS:
            wait_for(f"{signal} that wait", partial(waiting, agent, signal, SENT))
        wait_for("degraded parts", lambda: {"metrics", *SIGNALS} <= {*degraded(agent)})
        assert agent.readyz().status == 200
        assert agent.shipped("logs")["error"]
        with Collector(lab) as collector:
            wait_for("a healthy agent", lambda: degraded(agent) == [], BACK_SECONDS)
            send(lab)
            wait_for("all records", partial(received_once, collector, 2 * SENT))
            agent.stop()
        assert sum(series.value for series in collector.series("lb_hop.connections")) == 2 * SENT
        histograms = [series.last.histogram for series in collector.series("lb_hop.handshake.duration")]
        assert sum(each.observations for each in histograms if each) == 2 * SENT
    assert agent.accounts()["kernel"] == Account(2 * SENT, 2 * SENT, {}, 0)
    for signal in SIGNALS:
        assert fate(agent, signal) == (2 * SENT, {})


@pytest.mark.parametrize("protocol", [GRPC, HTTP])
def test_collector_that_refuses(lab: Lab, protocol: str) -> None:
    """A Collector out of memory refuses everything for a while: that is told, and the next one gets all, once."""
    settings = endpoint(lab.mgmt.address4, protocol)
    with Collector(lab, "full", processors=FULL) as full, agents_on(lab.nodes[:1], lab.vips_path, settings) as (agent,):
        send(lab)
        for signal in SIGNALS:
            wait_for(f"{signal} that wait", partial(waiting, agent, signal, SENT))
        assert "memory" in agent.shipped("logs")["error"]
        full.stop()
        with Collector(lab) as collector:
            wait_for("a healthy agent", lambda: degraded(agent) == [], BACK_SECONDS)
            wait_for("all records", partial(received_once, collector, SENT))
            agent.stop()
    assert (full.logs(), full.spans(), full.series()) == ([], [], [])
    for signal in SIGNALS:
        assert fate(agent, signal) == (SENT, {})


@pytest.mark.usefixtures("silence")
def test_end_with_a_collector_in_a_black_hole(lab: Lab) -> None:
    """SIGTERM while every packet to the Collector vanishes: exit 0 within 5 s, and what was lost is written down."""
    # Two agents on one node see the same connections, and send them by one protocol each.
    with Collector(lab) as collector:
        nodes, vips = lab.nodes[:1], lab.vips_path
        first = agents_on(nodes, vips, collector.settings(GRPC), "grpc")
        second = agents_on(nodes, vips, collector.settings(HTTP), "http", 9466)
        with first as (by_grpc,), second as (by_http,):
            agents = by_grpc, by_http
            send(lab)
            for agent in agents:
                for signal in SIGNALS:
                    wait_for(f"exported {signal}", partial(exported, agent, signal, SENT))
            deafen(lab.mgmt)
            send(lab)
            for agent in agents:
                agent.terminate()
            for agent in agents:
                agent.stop()
        collector.process.kill()  # or it would get last words that the kernel still sends
    for agent in agents:
        assert agent.accounts()["kernel"] == Account(2 * SENT, 2 * SENT, {}, 0)
        for signal in SIGNALS:
            assert fate(agent, signal) == (SENT, {"shutdown": SENT})
    assert len(collector.logs()) == len(collector.spans()) == 2 * SENT


@pytest.mark.usefixtures("silence")
@pytest.mark.parametrize("protocol", [GRPC, HTTP])
@pytest.mark.parametrize("deaf", [True, False], ids=["black hole", "nobody listens"])
def test_end_before_the_collector_ever_answered(lab: Lab, protocol: str, *, deaf: bool) -> None:
    """SIGTERM of an agent that never reached its Collector: exit 0 within 5 s, all records lost are written down."""
    if deaf:
        deafen(lab.mgmt)
    with agents_on(lab.nodes[:1], lab.vips_path, endpoint(lab.mgmt.address4, protocol)) as (agent,):
        send(lab)
        for signal in SIGNALS:
            wait_for(f"{signal} that wait", partial(waiting, agent, signal, SENT))
        agent.stop()
    assert agent.accounts()["kernel"] == Account(SENT, SENT, {}, 0)
    for signal in SIGNALS:
        assert fate(agent, signal) == (0, {"shutdown": SENT})


def lost_logs(agent: Agent) -> int:
    """Tell how many logs have given way to newer ones so far."""
    lost: int = agent.shipped("logs")["dropped"].get("queue_full", 0)
    return lost


def held_mib(agent: Agent) -> float:
    """Tell how much of the logs waits."""
    held: int = agent.shipped("logs")["held_bytes"]
    return held / 2**20


def wait_for_exports(agent: Agent) -> None:
    """Wait, no longer than is promised, until exports go on, and then until what has waited is out."""
    before: int = agent.shipped("logs")["exported"]
    wait_for("exports", lambda: degraded(agent) == [] and exported(agent, "logs", before + 1), BACK_SECONDS)
    wait_for("a queue that empties", lambda: held_mib(agent) < QUEUE_MIB / 2, 30)


@pytest.mark.timeout(300)
@pytest.mark.parametrize(("protocol", "seconds"), [(GRPC, 60), (HTTP, 10)])
def test_outage_under_load(lab: Lab, tmp_path: Path, protocol: str, seconds: float) -> None:
    """Two outages at 10,000 connections a second: all are counted, the newest records wait, in bounded memory.

    What the three Collectors got and what the ledger says is lost are all connections, each once. Each Collector ends
    by SIGTERM, with what it took on disk: one that is killed may lose what it has acknowledged, and nobody can know.
    """
    forget_closed_quickly(lab)
    generator = Generator(tmp_path)
    settings = endpoint(lab.mgmt.address4, protocol) | {
        "OTEL_LB_HOP_RECORD_RATE": "1000000",
        "OTEL_TRACES_EXPORTER": "none",  # logs have all of the queue
    }
    with (
        generator.serving(lab.pods[1], FAST_PORT),
        agents_on(lab.nodes[:1], lab.vips_path, settings) as (agent,),
        Traffic(lab, generator, FAST_VIP, RATE) as traffic,
    ):
        with Collector(lab, "first", compact=True) as first:
            wait_for("records", lambda: exported(agent, "logs", 2 * RATE), 30)
            running_mib = peak_rss_mib(agent.process.pid)
        time.sleep(seconds)  # this long an outage is what the test is about
        with Collector(lab, "second", compact=True) as second:
            wait_for_exports(agent)
            lost_first = lost_logs(agent)
            first_mib = peak_rss_mib(agent.process.pid)
        wait_for("a queue that is full again", lambda: lost_logs(agent) > lost_first, 60)
        with Collector(lab, "third", compact=True) as third:
            wait_for_exports(agent)
            made = traffic.end()
            wait_for("the last record", lambda: held_mib(agent) == 0, 30)
            second_mib = peak_rss_mib(agent.process.pid)
            agent.stop()

    assert sum(series.value for series in third.series("lb_hop.connections")) == made
    kernel = agent.accounts()["kernel"]
    assert (kernel.seen, kernel.in_flight) == (made, 0)
    sent, lost = fate(agent, "logs")
    received = [collector.arrivals() for collector in (first, second, third)]
    trace_ids = [arrival.trace_id for arrivals in received for arrival in arrivals]
    assert len({*trace_ids}) == len(trace_ids) == sent
    assert sent + sum(lost.values()) == made
    assert {"queue_full"} <= lost.keys() <= {"queue_full", "ring_full"}

    # The oldest are missing: between what the first and the second Collector got, there is time for all that was lost.
    missing_ns = min(arrival.time_ns for arrival in received[1]) - max(arrival.time_ns for arrival in received[0])
    assert lost_first > RATE
    assert missing_ns / 1e9 > lost_first / RATE - 2

    assert first_mib <= running_mib + QUEUE_MIB + OVERHEAD_MIB
    assert second_mib <= first_mib + OVERHEAD_MIB
