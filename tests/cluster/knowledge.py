"""What an agent knows of the cluster, by the metrics that it writes to its standard output, and what it should know."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, TypeAlias

from otel_lb_hop.model import is_ipv4, pack_address

if TYPE_CHECKING:
    from tests.cluster.control_plane import ControlPlane
    from tests.lab import Node
    from tests.lab.agent import Agent

CONSOLE = {"OTEL_METRICS_EXPORTER": "console", "OTEL_LOGS_EXPORTER": "none", "OTEL_TRACES_EXPORTER": "none"}
TAIL_BYTES = 2**20
"""More than two exports."""

Known: TypeAlias = "dict[tuple[str, str, int, str], int]"
"""(Service, VIP, port, placement) → ready endpoints."""


class Export:
    """The latest export of an agent that was started with the settings `CONSOLE`."""

    def __init__(self, agent: Agent) -> None:
        with agent._files["stdout"].open("rb") as file:
            file.seek(max(0, file.seek(0, 2) - TAIL_BYTES))
            text = file.read().decode()
        # Each export is a document of its own, of which only the outermost brackets are not indented.
        whole = text[: text.rfind("\n}\n") + 2]
        content = json.loads(whole[whole.rfind("\n{\n") + 1 :]) if whole.strip() else {"resource_metrics": []}
        self._points: dict[str, list[dict[str, Any]]] = {
            metric["name"]: metric["data"]["data_points"]
            for resource in content["resource_metrics"]
            for scope in resource["scope_metrics"]
            for metric in scope["metrics"]
        }

    @property
    def connections(self) -> int:
        """How many connections it has counted, whatever became of them."""
        return sum(point["value"] for point in self._points.get("lb_hop.connections", ()))

    @property
    def topology_age(self) -> float:
        """Seconds since what it knows was last known to be current."""
        return float(self._points["lb_hop.topology.age"][0]["value"]) if self._points else 0.0

    @property
    def known(self) -> Known:
        """The endpoints of each VIP port."""
        return {
            (
                point["attributes"]["k8s.service.name"],
                point["attributes"]["server.address"],
                point["attributes"]["server.port"],
                point["attributes"]["lb_hop.placement"],
            ): point["value"]
            for point in self._points.get("lb_hop.endpoints", ())
        }


def truth(plane: ControlPlane, node: Node) -> Known:
    """List from the API server what an agent on this node should know of Services of type LoadBalancer."""
    services = {each["metadata"]["name"]: each for each in plane.objects_of("v1", "Service")}
    expected: Known = {
        (name, ingress["ip"], port["port"], placement): 0
        for name, service in services.items()
        for ingress in service["status"]["loadBalancer"].get("ingress", ())
        for port in service["spec"]["ports"]
        for placement in ("local", "same_zone", "other_zone")
    }
    for each in plane.objects_of("discovery.k8s.io/v1", "EndpointSlice"):
        name = each["metadata"]["labels"]["kubernetes.io/service-name"]
        for key in expected:
            if key[0] == name and is_ipv4(pack_address(key[1])) == (each["addressType"] == "IPv4"):
                ready = [endpoint for endpoint in each["endpoints"] if endpoint["conditions"]["ready"]]
                expected[key] += sum(_placement(endpoint, node) == key[3] for endpoint in ready)
    return expected


def _placement(endpoint: dict[str, Any], node: Node) -> str:
    if endpoint["nodeName"] == node.name:
        return "local"
    return "same_zone" if endpoint["zone"] == node.zone else "other_zone"
