"""Nodes that come and change: everybody learns where they are, and tells it of what comes after."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.cluster import objects
from tests.cluster.conftest import TARGET_PORT
from tests.cluster.control_plane import ControlPlane
from tests.cluster.kube_proxy import Mode
from tests.cluster.requirements import needs_control_plane
from tests.cluster.scene import staged
from tests.lab.waiting import wait_for

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.cluster.api import Object
    from tests.cluster.scene import Scene
    from tests.lab import Lab, Node, Pod

pytestmark = [
    pytest.mark.root,
    pytest.mark.kubernetes,
    pytest.mark.collector,
    needs_control_plane,
    pytest.mark.parametrize("lab", [(3, 1)], indirect=True, scope="module", ids=["3x1"]),
]

WEB = [objects.port(80, target=TARGET_PORT)]


@pytest.fixture(scope="module")
def plane(lab: Lab) -> Iterator[ControlPlane]:
    """Run an API server that knows the first two nodes."""
    with ControlPlane(lab) as running:
        running.apply(*map(objects.node, lab.nodes[:2]))
        yield running


def test_node_is_added_and_zones_change(lab: Lab, plane: ControlPlane) -> None:
    """A node that nobody knows has no zone; once it comes, or its label changes, its zone holds from then on."""
    node1, node2, node3 = lab.nodes
    vip, pods = "10.0.40.1", [lab.pods[0], lab.pods[2]]
    with staged(lab, plane, nodes=[node1, node2]) as scene, plane.kube_proxies([node1, node2], Mode.NFTABLES):
        spread = lab.vip_port(vip, 80, service="spread", backends=pods, target_port=TARGET_PORT)
        service, _ = objects.web("spread", [vip], pods, WEB)
        endpoints = [without_zone(pod) for pod in pods]
        scene.zones["node3"] = ""
        scene.apply(service, objects.endpoint_slice("spread", WEB, endpoints), vips={vip: [node1, node2]})
        assert scene.placements(spread)["node2"] == {"local": 0, "same_zone": 1, "other_zone": 1}
        scene.deliver(spread)

        move(scene, node3, "zone-a", crossed={"node1": False, "node2": True})
        assert scene.placements(spread)["node2"] == {"local": 0, "same_zone": 0, "other_zone": 2}
        scene.deliver(spread)
        move(scene, node3, "zone-c", crossed={"node1": True, "node2": True})
        assert scene.placements(spread)["node1"] == {"local": 1, "same_zone": 0, "other_zone": 1}
        scene.deliver(spread)

        with plane.kube_proxies([node3], Mode.NFTABLES):
            scene.join([node3])
            scene.announce({vip: lab.nodes})
            scene.settle()
            assert {told.node.name for told in scene.deliver(spread)} == {"node1", "node2", "node3"}

            # One that knows itself in another zone has other ways across, and a resource of its own that says so.
            move(scene, node1, "zone-c", crossed={"node2": True, "node3": False})
            wait_for(
                "the zone in the resource",
                lambda: scene.exports()["node1"][0].resource["cloud.availability_zone"] == "zone-c",
            )
            scene.deliver(spread)
            scene.check()


def without_zone(pod: Pod) -> Object:
    """Write an endpoint whose zone only its node tells."""
    endpoint = objects.endpoint(pod)
    del endpoint["zone"]
    return endpoint


def move(scene: Scene, node: Node, zone: str, crossed: dict[str, bool]) -> None:
    """Label a node with a zone, and wait until other nodes know whether the way there goes across."""
    scene.zones[node.name] = zone
    content = objects.node(node)
    content["metadata"]["labels"]["topology.kubernetes.io/zone"] = zone
    scene.plane.apply(content)

    def known() -> bool:
        told = {
            (each.attributes["k8s.node.name"], each.attributes.get("lb_hop.zone.crossed"))
            for each in scene.latest("lb_hop.connections")
            if each.attributes.get("destination.k8s.node.name") == node.name
        }
        return {*crossed.items()} <= told

    wait_for(f"{node.name} in {zone}", known)
