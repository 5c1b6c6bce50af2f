"""An agent with more series than it may tell: what is beyond the bound is not shown as lost, and has no line."""

from __future__ import annotations

import re
import time
from typing import TYPE_CHECKING, NamedTuple

import pytest

from tests.backends import grafana, prometheus
from tests.backends.grafana import All
from tests.backends.prometheus import Prometheus
from tests.lab import Lab
from tests.lab.agent import agents_on
from tests.lab.requirements import needs_lab
from tests.lab.waiting import wait_for

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.backends.prometheus import Sample

pytestmark = [pytest.mark.root, pytest.mark.prometheus, pytest.mark.timeout(200), needs_lab]

PORT, SERVED = 80, 8080
VIPS = [f"10.0.10.{number}" for number in range(24)]
EACH = 3
TARGETS = {target.key: target for dashboard in grafana.dashboards().values() for target in grafana.targets(dashboard)}
GROUPED = {
    key: next(label for label in match[1].split(", ") if label != "le")
    for key, target in TARGETS.items()
    if key.startswith(("overview/", "node/")) and (match := re.search(r"sum by \((.*?)\)", target.text))
}
"""Queries of all Services, and the first label by which each groups."""


class Bound(NamedTuple):
    """What Prometheus has of the agent from `at - window` to `at`, in which every connection was answered."""

    prometheus: Prometheus
    at: float
    window: float

    def ask(self, text: str) -> list[Sample]:
        """Ask with everything chosen."""
        span = f"{round(self.window * 1000)}ms"
        chosen = dict.fromkeys(("cluster", "namespace", "service"), All(".*"))
        filled = grafana.fill(text, {**chosen, "node": "node1", "__rate_interval": span, "__range": span})
        return self.prometheus.query(filled, self.at)


@pytest.fixture(scope="module")
def bound() -> Iterator[Bound]:
    """Take each way once, then measure."""
    with Lab(1, 1) as lab, Prometheus(lab) as server:
        (pod,) = lab.pods
        pod.serve(SERVED)
        lab.apply([lab.vip_port(vip, PORT, backends=[pod], target_port=SERVED) for vip in VIPS])
        settings = {
            "OTEL_EXPORTER_OTLP_METRICS_ENDPOINT": f"http://{server.address}{prometheus.OTLP}/v1/metrics",
            "OTEL_EXPORTER_OTLP_METRICS_PROTOCOL": "http/protobuf",
            "OTEL_LOGS_EXPORTER": "none",
            "OTEL_TRACES_EXPORTER": "none",
            "OTEL_METRIC_EXPORT_INTERVAL": "250",
            "OTEL_LB_HOP_METRIC_SERIES": "100",
        }
        with agents_on(lab.nodes, lab.vips_path, settings):
            _connect(lab, server, 1)
            begun = time.time()
            _connect(lab, server, EACH)
            assert server.query('lb_hop_connections_total{otel_metric_overflow="true"} > 0')
            at = time.time()
            yield Bound(server, at, at - begun)


def _connect(lab: Lab, server: Prometheus, each: int) -> None:
    """Connect to each VIP so often, and wait until that is told."""
    before = sum(sample.value for sample in server.query("sum(lb_hop_connections_total)"))
    for vip in VIPS:
        assert all(made.ok for made in lab.connect(vip, PORT, each))
    told = f"sum(lb_hop_connections_total) == {before + len(VIPS) * each}"
    wait_for("the counts", lambda: server.query(told), 60)


@pytest.mark.parametrize("dashboard", ["overview", "node"])
def test_nothing_is_lost(bound: Bound, dashboard: str) -> None:
    """Of the outcomes that are told, none is another than forwarded."""
    assert bound.ask(TARGETS[f"{dashboard}/Lost/A"].text) == [({}, 0)]
    assert bound.ask(TARGETS[f"{dashboard}/Connections per second/A"].text)[0][1] > 0


@pytest.mark.parametrize(
    "key", ["overview/Where connections are lost/A", "node/Lost, by VIP and reason/A"], ids=["overview", "node"]
)
def test_no_row_of_what_is_lost(bound: Bound, key: str) -> None:
    """Have no row without a Service or a reason."""
    assert bound.ask(TARGETS[key].text) == []


@pytest.mark.parametrize("key", GROUPED)
def test_no_line_without_a_name(bound: Bound, key: str) -> None:
    """Each series has a value of the label that it is called by."""
    assert all(labels.get(GROUPED[key]) for labels, _ in bound.ask(TARGETS[key].text))
