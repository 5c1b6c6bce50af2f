"""Who the agent says it is."""

from __future__ import annotations

from typing import Any

import pytest

from otel_lb_hop import __version__
from otel_lb_hop.export.resource import Identity, make_resource


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OTEL_RESOURCE_ATTRIBUTES", "OTEL_SERVICE_NAME"):
        monkeypatch.delenv(name, raising=False)


def attributes(node: str = "node1", **known: str) -> dict[str, Any]:
    """Make the resource's attributes."""
    return dict(make_resource(Identity(node, "host1", **known)).attributes)


def test_attributes() -> None:
    """Service, version, node and host are told; all else only if it is known."""
    made = attributes()
    instance = made.pop("service.instance.id")
    assert made == {
        "service.name": "otel-lb-hop",
        "service.version": __version__,
        "k8s.node.name": "node1",
        "host.name": "host1",
    }
    assert attributes(
        node_uid="n-1",
        zone="zone-a",
        region="lab",
        cluster_uid="c-1",
        pod_namespace="monitoring",
        pod_name="otel-lb-hop-x7k2p",
        pod_uid="p-1",
    ) == made | {
        "service.instance.id": instance,
        "k8s.node.uid": "n-1",
        "cloud.availability_zone": "zone-a",
        "cloud.region": "lab",
        "k8s.cluster.uid": "c-1",
        "k8s.namespace.name": "monitoring",
        "k8s.pod.name": "otel-lb-hop-x7k2p",
        "k8s.pod.uid": "p-1",
    }
    assert make_resource(Identity("node1", "host1")).schema_url == "https://opentelemetry.io/schemas/1.44.0"


def test_instance_id() -> None:
    """The instance is the same after a restart on the same node, and another on another node."""
    assert attributes()["service.instance.id"] == attributes()["service.instance.id"]
    assert attributes()["service.instance.id"] != attributes(node="node2")["service.instance.id"]


def test_environment_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the operator says by the standard variables comes before what was found."""
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "k8s.cluster.name=lab,host.name=other,service.name=ignored")
    monkeypatch.setenv("OTEL_SERVICE_NAME", "mine")
    made = attributes()
    assert (made["k8s.cluster.name"], made["host.name"], made["service.name"]) == ("lab", "other", "mine")
    assert made["k8s.node.name"] == "node1"
