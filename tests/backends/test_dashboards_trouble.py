"""The panels that show nothing while all is well, in a cluster where something is wrong.

Two nodes, one of them without an agent; the other's agent sends metrics to Prometheus, but nobody takes its log
records, and it may make one record a second.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest

from tests.backends import grafana, prometheus
from tests.backends.grafana import All
from tests.backends.prometheus import Prometheus
from tests.lab import Lab
from tests.lab.agent import Agent
from tests.lab.requirements import needs_lab
from tests.lab.waiting import wait_for

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [pytest.mark.root, pytest.mark.prometheus, pytest.mark.timeout(200), needs_lab]

VIP, PORT, SERVED = "10.0.10.0", 80, 8080
CONNECTIONS = 46
TARGETS = {target.key: target for dashboard in grafana.dashboards().values() for target in grafana.targets(dashboard)}


class Trouble(NamedTuple):
    """The one agent, and what Prometheus has of it from `at - window` to `at`."""

    agent: Agent
    prometheus: Prometheus
    at: float
    window: float

    def ask(self, key: str) -> dict[tuple[str, ...], float]:
        """Ask a panel's query; answers values by the values of their labels, in the order of the labels' names."""
        span = f"{round(self.window * 1000)}ms"
        text = grafana.fill(
            TARGETS[key].text, {"cluster": All(".*"), "node": All(".*"), "__rate_interval": span, "__range": span}
        )
        samples = self.prometheus.query(text, self.at)
        return {tuple(value for _, value in sorted(labels.items())): number for labels, number in samples}

    def ledger(self) -> dict[str, Any]:
        """Ask the agent itself for its ledger."""
        stages: dict[str, Any] = self.agent.part("ledger")["detail"]
        return stages


@pytest.fixture(scope="module")
def trouble() -> Iterator[Trouble]:
    """Make connections of which few may have a record."""
    with Lab(2, 1) as lab, Prometheus(lab) as server:
        watched, _ = lab.nodes
        (pod,) = watched.pods
        pod.serve(SERVED)
        lab.apply([lab.vip_port(VIP, PORT, backends=[pod], target_port=SERVED)], announce={VIP: [watched]})
        here = lab.mgmt.address4
        settings = {
            "OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf",
            "OTEL_EXPORTER_OTLP_METRICS_ENDPOINT": f"http://{here}:{server.port}{prometheus.OTLP}/v1/metrics",
            "OTEL_EXPORTER_OTLP_LOGS_ENDPOINT": f"http://{here}:4318/v1/logs",
            "OTEL_TRACES_EXPORTER": "none",
            "OTEL_METRIC_EXPORT_INTERVAL": "250",
            "OTEL_LB_HOP_RECORD_RATE": "1",
        }
        with Agent(watched, lab.vips_path, settings) as agent:
            zeros = 'count_over_time(lb_hop_records_dropped_total{reason="rate"}[1m]) > 6'
            wait_for("exports", lambda: server.query(zeros), 30)
            before = time.time() - 1  # with some of the zeros
            made = lab.connect(VIP, PORT, CONNECTIONS)
            assert all(connection.ok for connection in made)
            unwell = 'lb_hop_part_healthy{lb_hop_part="logs"} == 0 and on () lb_hop_records_seen_total'
            seen = f'lb_hop_records_seen_total{{lb_hop_stage="kernel"}} == {CONNECTIONS}'
            settled = f"{unwell} and on () {seen} and on () lb_hop_records_in_flight > 0"
            # Long enough that half an interval at each end, which rate() adds, does not matter.
            wait_for("what is wrong", lambda: server.query(f"count_over_time(({settled})[1m:250ms]) > 30"), 60)
            at = time.time()
            yield Trouble(agent, server, at, at - before)


@pytest.mark.parametrize("dashboard", ["overview", "agents"])
def test_a_node_without_an_agent_is_counted(trouble: Trouble, dashboard: str) -> None:
    """One of two reports."""
    assert trouble.ask(f"{dashboard}/Nodes without an agent/A") == {(): 1}


def test_a_gap_between_agents_and_nodes(trouble: Trouble) -> None:
    """See it as two lines."""
    assert trouble.ask("agents/Agents and nodes/A") == {(): 1}
    assert trouble.ask("agents/Agents and nodes/B") == {(): 2}


def test_a_part_that_does_not_work(trouble: Trouble) -> None:
    """Find those that the agent itself calls so, and only those; those that work have no line."""
    parts = trouble.agent.readyz().content["parts"]
    unwell = {name for name, part in parts.items() if not part["healthy"]}
    assert "logs" in unwell
    assert trouble.ask("agents/Parts that do not work/A") == {(): len(unwell)}
    assert trouble.ask("agents/Which parts, and when/A") == {("node1", name): 0 for name in unwell}


def test_records_that_are_lost(trouble: Trouble) -> None:
    """Compare with the agent's own ledger: what the rate left out, and what waits for somebody to take it."""
    kernel = trouble.ledger()["kernel"]
    lost = kernel["dropped"]["rate"]
    assert 0 < lost < CONNECTIONS
    assert lost + kernel["exported"] == CONNECTIONS
    assert trouble.ask("agents/Records lost/A") == {(): pytest.approx(lost, rel=0.2)}
    dropped = trouble.ask("agents/Records dropped, by stage and reason/A")
    assert dropped == {("kernel", "rate"): pytest.approx(lost / trouble.window, rel=0.2)}
    in_ledger = trouble.ask("agents/The ledger of records/C")
    assert {key: value for key, value in in_ledger.items() if value} == {("kernel",): pytest.approx(lost, rel=0.2)}


def test_records_that_nobody_takes(trouble: Trouble) -> None:
    """See them wait."""
    waiting = trouble.ask("agents/Waiting to be delivered/A")
    assert waiting.keys() == {("node1",)}
    assert waiting["node1",] >= trouble.ledger()["kernel"]["exported"]
    in_flight = trouble.ask("agents/The ledger of records/D")
    assert sum(in_flight.values()) == waiting["node1",]
