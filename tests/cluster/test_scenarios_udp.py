"""What conntrack tells of: UDP Services, which have no handshake, and calls that a node makes itself."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import pytest

from otel_lb_hop.model import Policy, Transport
from tests.cluster import objects
from tests.cluster.conftest import TARGET_PORT
from tests.cluster.kube_proxy import Mode
from tests.cluster.requirements import needs_control_plane
from tests.cluster.scene import SENT, staged
from tests.lab.waiting import wait_for

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.cluster.control_plane import ControlPlane
    from tests.cluster.scene import Scene
    from tests.lab import Lab, Node

pytestmark = [pytest.mark.root, pytest.mark.kubernetes, pytest.mark.collector, needs_control_plane]

DNS = [objects.port(53, target=TARGET_PORT, protocol=protocol) for protocol in ("UDP", "TCP")]
NETLINK_NETFILTER, NEW_CONNECTIONS = 12, 1
"""linux/netlink.h; the bit of NFNLGRP_CONNTRACK_NEW in a socket's groups."""


@pytest.fixture(scope="module")
def proxied(lab: Lab, plane: ControlPlane) -> Iterator[ControlPlane]:
    """Run kube-proxy on both nodes."""
    with plane.kube_proxies(lab.nodes, Mode.NFTABLES):
        yield plane


def listeners(node: Node) -> int:
    """Count the sockets of a node that hear of new connections."""
    lines = node.run(["cat", "/proc/net/netlink"]).stdout.splitlines()[1:]
    sockets = [(int(fields[1]), int(fields[3], 16)) for fields in map(str.split, lines)]
    return sum(protocol == NETLINK_NETFILTER and bool(groups & NEW_CONNECTIONS) for protocol, groups in sockets)


def wait_for_conntrack(scene: Scene, state: str, sockets: int) -> None:
    """Wait until every agent says so of its part conntrack, and holds so many sockets."""

    def is_so() -> bool:
        return all(
            agent.part("conntrack")["detail"] == state and listeners(agent.node) == sockets for agent in scene.agents
        )

    wait_for(f"conntrack: {state}", is_so)


def test_udp(lab: Lab, proxied: ControlPlane) -> None:
    """23 flows are 23 connections with client, SNAT source and backend; what nobody serves has its reason.

    Conntrack is asked while there is a UDP Service, and neither before nor afterwards.
    """
    vips, local_vip, (pod1, pod2), (node1, node2) = ["10.0.30.1", "fd00:10::1"], "10.0.30.2", lab.pods, lab.nodes
    udp = partial(lab.vip_port, transport=Transport.UDP, target_port=TARGET_PORT)
    with staged(lab, proxied) as scene:
        wait_for_conntrack(scene, "not needed", 0)

        dns = objects.web("dns", vips, lab.pods, DNS)
        local = objects.web("dns-local", [local_vip], [pod1], DNS, policy="Local")
        scene.apply(*dns, *local, vips=dict.fromkeys([*vips, local_vip], lab.nodes))
        wait_for_conntrack(scene, "heard", 1)
        for vip in vips:
            scene.deliver(udp(vip, 53, service="dns", backends=lab.pods))
            scene.deliver(udp(vip, 53, service="dns", backends=lab.pods), pod1)
            scene.deliver(lab.vip_port(vip, 53, service="dns", backends=lab.pods, target_port=TARGET_PORT))

        lonely = udp(local_vip, 53, service="dns-local", policy=Policy.LOCAL, backends=[pod1])
        scene.lose(lonely, node2, "no_local_endpoints", "timeout")
        scene.deliver(lonely, pod2)
        scene.announce({local_vip: [node1]})
        scene.deliver(lonely)

        scene.apply(objects.endpoint_slice("dns", DNS, []))
        nobody = udp(vips[0], 53, service="dns")
        for node, pod in ((node1, pod1), (node2, pod2)):
            scene.lose(nobody, node, "no_endpoints", "ECONNREFUSED")
            scene.lose(nobody, node, "no_endpoints", "ECONNREFUSED", pod)
        scene.apply(*dns)
        scene.announce(dict.fromkeys(vips, lab.nodes))
        scene.deliver(udp(vips[0], 53, service="dns", backends=lab.pods))

        scene.check()
        told = {
            each.metric
            for series in scene.exports().values()
            for each in series
            if each.attributes.get("network.transport") == "udp"
        }
        # No figures of handshakes, not even a zero.
        assert told == {"lb_hop.connections", "lb_hop.connections.pending", "lb_hop.endpoints"}

        scene.plane.delete(*dns, *local)
        scene.settle()
        wait_for_conntrack(scene, "not needed", 0)


def test_calls_of_the_node_itself(lab: Lab, proxied: ControlPlane) -> None:
    """With OTEL_LB_HOP_CONNTRACK=on a node's own calls count too, and what comes in by a hook still counts once."""
    pods, nodes = lab.pods, lab.nodes
    with staged(lab, proxied, settings={"OTEL_LB_HOP_CONNTRACK": "on"}) as scene:
        wait_for_conntrack(scene, "heard", 1)
        both, far = scene.web("both", "10.0.30.3", pods), scene.web("far", "fd00:10::3", pods[1:])
        for vip_port in (both, far):
            for sender in (nodes[0], pods[0], None):
                assert len(scene.deliver(vip_port, sender)) == SENT
        scene.check()
