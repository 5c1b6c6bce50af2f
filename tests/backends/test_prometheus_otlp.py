"""Agents that write to Prometheus by OTLP, with no Collector between them: the names are the same."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tests.backends import prometheus
from tests.backends.prometheus import Prometheus
from tests.backends.scene import needs_scene
from tests.lab import Lab
from tests.lab.agent import agents_on
from tests.lab.waiting import wait_for

if TYPE_CHECKING:
    from tests.backends.prometheus import Labels
    from tests.backends.scene import Scene

pytestmark = needs_scene

SENT = 23
TARGET_PORT = 8080
VIPS = "10.0.10.0", "fd00:10::1"
PROMOTED = {"promote_resource_attributes": ["k8s.cluster.name"]}


def names(found: list[Labels]) -> dict[str, set[str]]:
    """Give the label names of each metric."""
    of_metric: dict[str, set[str]] = {}
    for labels in found:
        of_metric.setdefault(labels["__name__"], set()).update(labels)
    return of_metric


def test_the_same_names_without_a_collector(scene: Scene) -> None:
    """23 connections to each VIP; every metric that comes has the name and the labels that remote write gives it."""
    with Lab(1) as lab, Prometheus(lab, otlp=PROMOTED) as direct:
        for pod in lab.pods:
            pod.serve(TARGET_PORT)
        lab.apply([lab.vip_port(vip, 80, backends=lab.pods, target_port=TARGET_PORT) for vip in VIPS])
        settings = {
            "OTEL_EXPORTER_OTLP_METRICS_ENDPOINT": f"http://{direct.address}{prometheus.OTLP}/v1/metrics",
            "OTEL_EXPORTER_OTLP_METRICS_PROTOCOL": "http/protobuf",
            "OTEL_LOGS_EXPORTER": "none",
            "OTEL_TRACES_EXPORTER": "none",
            "OTEL_RESOURCE_ATTRIBUTES": "k8s.cluster.name=lab",
        }
        with agents_on(lab.nodes, lab.vips_path, settings):
            for vip in VIPS:
                assert all(result.ok for result in lab.connect(vip, 80, SENT))
            query = "sum by (server_address, lb_hop_hop) (lb_hop_handshake_duration_seconds_count) == 23"
            wait_for("the counts", lambda: len(direct.query(query)) == len(VIPS), 30)
            counted = direct.query("sum by (server_address, network_type) (lb_hop_connections_total)")
            found = names(direct.series('{job="otel-lb-hop"}'))
    by_collector = names(scene.prometheus.series('{job="otel-lb-hop"}', scene.started, scene.at))
    assert {(sample.labels["server_address"], sample.labels["network_type"], sample.value) for sample in counted} == {
        ("10.0.10.0", "ipv4", 23),
        ("fd00:10::1", "ipv6", 23),
    }
    # Only what did not happen here is missing: an answer unseen, a record exported.
    assert by_collector.keys() - found.keys() == {"lb_hop_replies_unseen_total", "lb_hop_records_exported_total"}
    assert found.keys() <= by_collector.keys()
    # Of these the labels that stand on some series only have not come.
    assert all(labels <= by_collector[name] for name, labels in found.items() if name != "target_info")
    assert {"k8s_service_name", "k8s_node_name", "server_address", "lb_hop_hop", "le"} <= found[
        "lb_hop_handshake_duration_seconds_bucket"
    ]
