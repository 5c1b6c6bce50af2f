"""A real kube-proxy in IPVS mode: the VIP is an address of a node, and the packet is translated on its way in."""

from __future__ import annotations

import pytest

from otel_lb_hop.model import Policy
from tests.cluster import objects
from tests.cluster.control_plane import ControlPlane
from tests.cluster.kube_proxy import Mode
from tests.cluster.requirements import needs_control_plane
from tests.cluster.scene import staged
from tests.kernels.scene import TARGET_PORT
from tests.lab import Lab

pytestmark = [pytest.mark.root, pytest.mark.kernels, pytest.mark.kubernetes, pytest.mark.collector, needs_control_plane]


def test_hops() -> None:
    """All books are in balance, for either policy and both families, as with the other modes."""
    with Lab() as lab:
        for pod in lab.pods:
            pod.serve(TARGET_PORT)
        with ControlPlane(lab) as plane:
            plane.apply(*map(objects.node, lab.nodes))
            with plane.kube_proxies(lab.nodes, Mode.IPVS), staged(lab, plane) as scene:
                (pod1, pod2), (node1, _) = lab.pods, lab.nodes
                both = scene.web("both", "10.0.10.1", [pod1, pod2])
                both6 = scene.web("both6", "fd00:10::1", [pod1, pod2])
                far = scene.web("far", "10.0.10.2", [pod2], nodes=[node1])
                local = scene.web("local", "10.0.10.3", [pod1], policy=Policy.LOCAL, nodes=[node1])
                for vip_port in (both, both6):
                    hops = {(told.node.name, told.pod.name) for _ in range(2) for told in scene.deliver(vip_port)}
                    assert hops == {(node.name, pod.name) for node in lab.nodes for pod in lab.pods}
                assert {told.source[0] for told in scene.deliver(far)} == {node1.address4}
                assert {told.source[0] for told in scene.deliver(local)} == {lab.client.address4}
                scene.check()
