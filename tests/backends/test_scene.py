"""The scene itself: what its truth holds, and that the backends hold the same."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.backends.scene import SERVICES, needs_scene

if TYPE_CHECKING:
    from tests.backends.scene import Scene

pytestmark = needs_scene

LEAST = 23


def test_every_class_of_fate_has_enough_connections(scene: Scene) -> None:
    """23 of each outcome, failure, hop class, node, family, transport, origin and Service, so that a miss shows."""
    by = "outcome", "failure", "hop", "node", "network", "transport", "origin", "service", "zone_crossed"
    classes = {(name, *key): count for name in by for key, count in scene.truth.count(name).items()}
    expected = {
        "outcome": {"forwarded", "no_endpoints", "no_local_endpoints", "dropped"},
        "failure": {None, "refused", "timeout"},
        "hop": {None, "none", "avoidable", "required"},
        "node": {"node1", "node2", "node3"},
        "service": {f"default/{service.name}" for service in SERVICES},
        "zone_crossed": {None, False, True},
    }
    for name, values in expected.items():
        assert {key[1] for key in classes if key[0] == name} == values
    assert min(classes.values()) >= LEAST
    assert scene.truth.total(answered=False, failure=None, outcome="forwarded") == LEAST


def test_a_counter_grows_by_the_measured_traffic(scene: Scene) -> None:
    """Between both ends of the window by exactly that; increase() tells a few per cent more."""
    everything = len(scene.truth.fates)
    (now,) = scene.prometheus.query("sum(lb_hop_connections_total)", scene.at)
    (before,) = scene.prometheus.query("sum(lb_hop_connections_total)", scene.started)
    (grown,) = scene.prometheus.query(f"sum(increase(lb_hop_connections_total[{scene.range}]))", scene.at)
    assert now.value - before.value == everything
    assert grown.value == pytest.approx(everything, rel=0.08)


def test_a_record_and_a_trace_for_each_connection(scene: Scene) -> None:
    """Clients by log records, and as many traces."""
    lines = scene.loki.lines('{service_name="otel-lb-hop"} | client_address != ""', scene.started, scene.ended)
    clients = {(line.metadata["client_address"], int(line.metadata["client_port"])) for line in lines}
    assert clients == {fate.client for fate in scene.truth.fates}
    assert len(scene.tempo.search("{}", scene.started, scene.ended)) == len(scene.truth.fates)
