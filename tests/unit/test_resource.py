"""Who the agent says it is."""

from __future__ import annotations

from typing import Any

import pytest

from otel_lb_hop import __version__
from otel_lb_hop.export.resource import make_resource


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OTEL_RESOURCE_ATTRIBUTES", "OTEL_SERVICE_NAME"):
        monkeypatch.delenv(name, raising=False)


def attributes(zone: str | None = None, region: str | None = None, node: str = "node1") -> dict[str, Any]:
    """Make the resource's attributes."""
    return dict(make_resource(node, "host1", zone, region).attributes)


def test_attributes() -> None:
    """Service, version, node and host are told; zone and region only if they are known."""
    made = attributes()
    instance = made.pop("service.instance.id")
    assert made == {
        "service.name": "otel-lb-hop",
        "service.version": __version__,
        "k8s.node.name": "node1",
        "host.name": "host1",
    }
    more = {"service.instance.id": instance, "cloud.availability_zone": "zone-a", "cloud.region": "lab"}
    assert attributes("zone-a", "lab") == made | more
    assert make_resource("node1", "host1", None, None).schema_url == "https://opentelemetry.io/schemas/1.44.0"


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
