"""Which connections get a log record and a span, and what the agent tells of itself beside them."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import pytest

from tests.e2e import truth
from tests.e2e.collector import Collector
from tests.e2e.conftest import TARGET_PORT
from tests.e2e.otlp import OWN_LOG, STATUS_ERROR
from tests.lab.agent import Account, agents_on
from tests.lab.requirements import needs_lab
from tests.lab.waiting import wait_for

if TYPE_CHECKING:
    from tests.lab import Lab

pytestmark = [pytest.mark.root, pytest.mark.collector, needs_lab]

SENT = 23
MANY = 230
GOOD_VIP, BAD_VIP = "10.0.50.0", "10.0.50.1"
NOBODY_PORT = 9
EVENT_OF = {"": "lb_hop.connection.forwarded", "ECONNREFUSED": "lb_hop.connection.failed"}


@pytest.fixture(autouse=True)
def service(lab: Lab) -> None:
    """Let node1 take in all the traffic of a VIP that answers, and of one whose backends refuse."""
    good = lab.vip_port(GOOD_VIP, 80, backends=lab.pods, target_port=TARGET_PORT)
    bad = lab.vip_port(BAD_VIP, 80, service="bad", backends=lab.pods, target_port=NOBODY_PORT)
    lab.apply([good, bad], announce=dict.fromkeys((GOOD_VIP, BAD_VIP), lab.nodes[:1]))


def send(lab: Lab, vip: str, count: int, error: str = "") -> list[truth.Endpoint]:
    """Make connections that all end alike; answers their clients."""
    made = lab.connect(vip, 80, count)
    assert [connection.error for connection in made] == [error] * count
    return [(connection.client_address, connection.client_port) for connection in made]


def has_logs(collector: Collector, count: int) -> bool:
    """Whether so many log records have arrived."""
    return len(collector.logs()) == count


def randomness(trace_id: str) -> int:
    """Read what a trace is sampled by: the low 56 bits of its id (W3C trace context level 2)."""
    return int(trace_id[-14:], 16)


def test_one_of_each(lab: Lab) -> None:
    """Every connection, good or refused, has exactly one log record and one span, which share their ids."""
    with Collector(lab) as collector, agents_on(lab.nodes[:1], lab.vips_path, collector.settings()) as (agent,):
        clients = {"": send(lab, GOOD_VIP, SENT), "ECONNREFUSED": send(lab, BAD_VIP, SENT, "ECONNREFUSED")}
        agent.stop()
    logs, spans = collector.logs(), collector.spans()
    for error, event in EVENT_OF.items():
        told = [record for record in logs if record.event_name == event]
        assert sorted(truth.clients_of(told)) == sorted(clients[error])
        assert {record.severity for record in told} == {"WARN" if error else "INFO"}
        assert not any("sampling.threshold" in record.attributes for record in told)
    assert len(logs) == 2 * SENT
    assert sorted((s.trace_id, s.span_id) for s in spans) == sorted((r.trace_id, r.span_id) for r in logs)
    assert agent.accounts()["kernel"] == Account(2 * SENT, 2 * SENT, {}, 0)


def test_failures_go_before(lab: Lab) -> None:
    """Where good connections are over the rate, those that failed are told of all the same; who is not, is counted."""
    with Collector(lab) as collector:
        settings = collector.settings() | {"OTEL_LB_HOP_RECORD_RATE": str(SENT)}
        with agents_on(lab.nodes[:1], lab.vips_path, settings) as (agent,):
            send(lab, GOOD_VIP, MANY)
            refused = send(lab, BAD_VIP, SENT - 3, "ECONNREFUSED")
            send(lab, GOOD_VIP, MANY)
            agent.stop()
    failed = [record for record in collector.logs() if record.event_name == "lb_hop.connection.failed"]
    assert sorted(truth.clients_of(failed)) == sorted(refused)
    assert {record.attributes["error.type"] for record in failed} == {"refused"}
    assert sum(span.status == STATUS_ERROR for span in collector.spans()) == len(refused)
    seen, told, dropped, in_flight, _ = agent.accounts()["kernel"]
    assert (seen, in_flight) == (2 * MANY + len(refused), 0)
    assert told == len(collector.logs()) == len(collector.spans())
    assert dropped.keys() == {"rate"}
    assert dropped["rate"] > SENT


def test_fewer_spans_than_logs(lab: Lab) -> None:
    """The standard sampler thins out spans only, by the trace id; failures keep theirs, who has none is counted."""
    with Collector(lab) as collector:
        settings = collector.settings() | {"OTEL_TRACES_SAMPLER": "traceidratio", "OTEL_TRACES_SAMPLER_ARG": "0.25"}
        with agents_on(lab.nodes[:1], lab.vips_path, settings) as (agent,):
            send(lab, GOOD_VIP, MANY)
            refused = send(lab, BAD_VIP, SENT, "ECONNREFUSED")
            agent.stop()
    logs, spans = collector.logs(), collector.spans()
    assert len(logs) == MANY + SENT
    assert not any("sampling.threshold" in record.attributes for record in logs)
    good = {record.trace_id for record in logs if record.event_name == "lb_hop.connection.forwarded"}
    sampled = {trace_id for trace_id in good if randomness(trace_id) >= 0xC0000000000000}
    assert 0.1 * MANY < len(sampled) < 0.4 * MANY
    assert {span.trace_id for span in spans if span.trace_state == "ot=th:c"} == sampled
    failed = [span for span in spans if span.trace_state == "ot=th:0"]
    assert sorted(truth.clients_of(failed)) == sorted(refused)
    assert len(spans) == len(sampled) + SENT
    encoded = agent.accounts()["encode of traces to otlp"]
    assert encoded == Account(MANY + SENT, len(spans), {"not_sampled": MANY - len(sampled)}, 0)


def test_ratio_of_both(lab: Lab) -> None:
    """RECORD_RATIO samples logs and spans alike; each says by which threshold, failures are all there."""
    with Collector(lab) as collector:
        settings = collector.settings() | {"OTEL_LB_HOP_RECORD_RATIO": "0.5"}
        with agents_on(lab.nodes[:1], lab.vips_path, settings) as (agent,):
            send(lab, GOOD_VIP, MANY)
            refused = send(lab, BAD_VIP, SENT, "ECONNREFUSED")
            agent.stop()
    logs, spans = collector.logs(), collector.spans()
    failed = [record for record in logs if record.event_name == "lb_hop.connection.failed"]
    assert sorted(truth.clients_of(failed)) == sorted(refused)
    assert not any("sampling.threshold" in record.attributes for record in failed)
    good = [record for record in logs if record.event_name == "lb_hop.connection.forwarded"]
    assert {record.attributes["sampling.threshold"] for record in good} == {"8"}
    assert min(randomness(record.trace_id) for record in good) >= 0x80000000000000
    assert 0.3 * MANY < len(good) < 0.7 * MANY
    assert {span.trace_id: span.trace_state for span in spans} == {
        **{record.trace_id: "ot=th:8" for record in good},
        **{record.trace_id: "ot=th:0" for record in failed},
    }
    assert agent.accounts()["kernel"] == Account(MANY + SENT, len(logs), {"ratio": MANY - len(good)}, 0)


def test_spans_always_off(lab: Lab) -> None:
    """The standard sampler `always_off` is the same as no exporter of spans: there is no such part."""
    with Collector(lab) as collector:
        settings = collector.settings() | {"OTEL_TRACES_SAMPLER": "always_off"}
        with agents_on(lab.nodes[:1], lab.vips_path, settings) as (agent,):
            send(lab, GOOD_VIP, SENT)
            send(lab, BAD_VIP, SENT, "ECONNREFUSED")
            wait_for("log records", partial(has_logs, collector, 2 * SENT))
            assert wait_for("logs on /readyz", lambda: agent.readyz().content["parts"].keys() & {"logs", "traces"}) == {
                "logs"
            }
            agent.stop()
    assert collector.spans() == []
    assert not any("traces" in title for title in agent.accounts())


def test_own_log(lab: Lab) -> None:
    """What the agent logs comes as log records too, each line once and in a scope of its own, but for its last account.

    That one tells of these records as well: it is written when they have gone.
    With the interval between exports of metrics that it has by itself, which is longer than it runs here.
    """
    good_file = lab.vips_path.read_text(encoding="utf-8")
    with Collector(lab) as collector:
        settings = collector.settings() | {"OTEL_METRIC_EXPORT_INTERVAL": ""}
        with agents_on(lab.nodes[:1], lab.vips_path, settings) as (agent,):
            wait_for("the first line", lambda: any("counting on" in line.body for line in collector.own_logs()))
            send(lab, GOOD_VIP, SENT)
            # The same trouble three times, between which all is well.
            for _ in range(3):
                lab.vips_path.write_text("services: [", encoding="utf-8")
                wait_for("trouble", lambda: agent.readyz().content["degraded"] == ["vips_file"])
                lab.vips_path.write_text(good_file, encoding="utf-8")
                wait_for("a healthy agent", lambda: agent.readyz().content["degraded"] == [])
            agent.stop()
    own = collector.own_logs()
    written = [line.partition(": ")[2] for line in agent.stderr.splitlines() if " otel_lb_hop." in line]
    last = len(agent.accounts())
    assert all(line.endswith(" in flight") for line in written[-last:])
    assert sorted(record.body for record in own) == sorted(written[:-last])
    troubles = [record for record in own if record.severity != "INFO"]
    assert [record.severity for record in troubles] == ["WARN"]
    assert "vips_file" in troubles[0].body
    for record in own:
        assert record.scope["name"] == OWN_LOG
        assert record.attributes["code.function.name"].startswith("otel_lb_hop.")
        assert record.resource == collector.logs()[0].resource
    assert len(collector.logs()) == SENT
    assert agent.accounts()["transport of agent_logs to otlp"] == Account(len(own), len(own), {}, 0)
