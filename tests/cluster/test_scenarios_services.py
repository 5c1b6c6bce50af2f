"""Services of every shape, and VIPs that move between them: each connection counts where it belongs, and nowhere else.

The books are balanced over all Services at once, so that what one got cannot turn up with another.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from otel_lb_hop.model import Policy
from tests.cluster import objects
from tests.cluster.conftest import TARGET_PORT
from tests.cluster.kube_proxy import Mode
from tests.cluster.requirements import needs_control_plane
from tests.cluster.scene import SENT, staged, wait_for_skipped
from tests.e2e.firewall import deafen

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.cluster.control_plane import ControlPlane
    from tests.cluster.scene import Scene
    from tests.lab import Lab

pytestmark = [pytest.mark.root, pytest.mark.kubernetes, pytest.mark.collector, needs_control_plane]

WEB = [objects.port(80, target=TARGET_PORT)]
SECOND_PORT, CLOSED_PORT, SILENT_PORT = 8081, 9999, 7777


@pytest.fixture(scope="module")
def scene(lab: Lab, plane: ControlPlane) -> Iterator[Scene]:
    """Run kube-proxy and an agent on both nodes; pods serve a second port."""
    for pod in lab.pods:
        pod.serve(SECOND_PORT)
    with staged(lab, plane) as made, plane.kube_proxies(lab.nodes, Mode.NFTABLES):
        yield made


def test_vip_moves_to_another_service(scene: Scene) -> None:
    """A VIP that its load balancer gives to another Service counts for that one, and back again for the first."""
    vip, (pod1, pod2) = "10.0.20.1", scene.lab.pods
    first, second = scene.describe("first", vip, [pod1]), scene.describe("second", vip, [pod2])
    scene.web("first", vip, [pod1])
    scene.deliver(first)
    for takes, gives, pod in (second, first, pod2), (first, second, pod1):
        scene.apply(objects.service(gives.service, WEB), *objects.web(takes.service, [vip], [pod], WEB))
        assert {each.pod.name for each in scene.deliver(takes)} == {pod.name}
    scene.check()


def test_two_services_share_a_vip(scene: Scene) -> None:
    """On different ports of one VIP, one goes to a Service and the other to another."""
    vip, nodes = "10.0.20.2", scene.lab.nodes
    plain, secure = objects.port(80, target=TARGET_PORT), objects.port(443, target=SECOND_PORT)
    pods = scene.lab.pods
    scene.apply(
        *objects.web("plain", [vip], pods, [plain]),
        *objects.web("secure", [vip], pods[1:], [secure]),
        vips={vip: nodes},
    )
    scene.deliver(scene.describe("plain", vip, pods))
    scene.deliver(scene.describe("secure", vip, pods[1:], 443, target_port=SECOND_PORT))
    scene.check()


def test_two_services_claim_one_vip_port(scene: Scene) -> None:
    """One has it, the other is shown as skipped, with who has it; when the one goes, the other takes its place."""
    vip, pods = "10.0.20.3", scene.lab.pods
    beta = objects.web("claim-b", [vip], pods, WEB)
    scene.apply(*beta, vips={vip: scene.lab.nodes})
    scene.deliver(scene.describe("claim-b", vip, pods))
    alpha = objects.web("claim-a", [vip], pods, WEB)
    scene.apply(*alpha)
    scene.wait_for_skipped(f"default/claim-b {vip} port 80 TCP: default/claim-a has this VIP port")
    scene.deliver(scene.describe("claim-a", vip, pods))
    scene.plane.delete(*alpha)
    scene.settle()
    scene.wait_for_skipped()
    scene.deliver(scene.describe("claim-b", vip, pods))
    scene.check()


def test_service_is_deleted_and_made_again(scene: Scene) -> None:
    """Under the same name it is the same series: its counts go on, from the same start."""
    vip, pods = "10.0.20.4", scene.lab.pods
    contents = objects.web("again", [vip], pods, WEB)
    again = scene.describe("again", vip, pods)
    other = scene.web("other", "10.0.20.5", pods)
    scene.apply(*contents, vips={vip: scene.lab.nodes})
    scene.deliver(again)
    scene.check()
    before = starts(scene, "again")
    scene.plane.delete(*contents)
    scene.settle()
    assert scene.placements(again) == {"node1": {}, "node2": {}}
    scene.deliver(other)
    scene.check()
    scene.apply(*contents)
    scene.deliver(again)
    scene.check()
    assert starts(scene, "again") == before


def starts(scene: Scene, service: str) -> set[tuple[frozenset[tuple[str, object]], int]]:
    """Return when each series of a Service's connections began."""
    return {
        (frozenset(each.attributes.items()), each.last.start_ns)
        for each in scene.latest("lb_hop.connections")
        if each.attributes["k8s.service.name"] == service
    }


def test_vip_is_taken_away(scene: Scene) -> None:
    """An address that is no VIP any more is not counted; what it counted stays."""
    vip, pods = "10.0.20.6", scene.lab.pods
    kept = scene.web("kept", vip, pods)
    scene.deliver(kept)
    scene.apply(objects.service("kept", WEB))
    assert scene.placements(kept) == {"node1": {}, "node2": {}}
    # Nobody has the address: packets go in circles until they are too old.
    assert not any(result.ok for result in scene.lab.connect(vip, 80, SENT, timeout=0.3))
    scene.check()


def test_external_ips(scene: Scene) -> None:
    """An external IP is a VIP, whatever the type of its Service."""
    vip, pods = "10.0.20.7", scene.lab.pods
    scene.apply(
        objects.service("external", WEB, kind="ClusterIP", external_ips=[vip]),
        objects.endpoint_slice("external", WEB, [*map(objects.endpoint, pods)]),
        vips={vip: scene.lab.nodes},
    )
    scene.deliver(scene.describe("external", vip, pods))
    scene.check()


def test_settings_leave_services_out(scene: Scene) -> None:
    """An agent that is told to watch one policy, and no external IPs, shows the others as skipped, each with why."""
    scene.plane.apply(
        objects.service("every", WEB, ["10.0.20.13"]),
        objects.service("near", WEB, ["10.0.20.14"], policy="Local"),
        objects.service("outer", WEB, kind="ClusterIP", external_ips=["10.0.20.15"], policy="Local"),
    )
    services = scene.plane.objects_of("v1", "Service")
    vips_of: dict[str, list[tuple[str, str]]] = {"Cluster": [], "Local": []}
    for service in services:
        for ingress in service["status"]["loadBalancer"].get("ingress", ()):
            vips_of[service["spec"]["externalTrafficPolicy"]].append((service["metadata"]["name"], ingress["ip"]))
    left_out = [f"default/{name} {vip}: OTEL_LB_HOP_POLICY leaves Cluster out" for name, vip in vips_of["Cluster"]]
    left_out += [
        f"default/{service['metadata']['name']} {vip}: OTEL_LB_HOP_EXTERNAL_IPS is false"
        for service in services
        for vip in service["spec"].get("externalIPs", ())
    ]
    assert ("near", "10.0.20.14") in vips_of["Local"]
    assert "default/every 10.0.20.13: OTEL_LB_HOP_POLICY leaves Cluster out" in left_out
    assert "default/outer 10.0.20.15: OTEL_LB_HOP_EXTERNAL_IPS is false" in left_out
    settings = {"OTEL_LB_HOP_POLICY": "local", "OTEL_LB_HOP_EXTERNAL_IPS": "false"}
    with scene.another_agent(settings) as agent:
        wait_for_skipped(agent, *left_out)
        assert agent.part("topology")["detail"]["vip_ports"] == len(vips_of["Local"])


def test_what_is_no_vip_is_skipped(scene: Scene) -> None:
    """A load balancer in front that speaks to the nodes itself, or that is known by name only: shown, not counted."""
    vip, proxied, pods = "10.0.20.8", "10.0.20.9", scene.lab.pods
    service, slices = objects.web("mixed", [vip], pods, WEB)
    service["status"]["loadBalancer"]["ingress"] += [{"ip": proxied, "ipMode": "Proxy"}, {"hostname": "lb.example.com"}]
    scene.apply(service, slices, vips=dict.fromkeys([vip, proxied], scene.lab.nodes))
    scene.wait_for_skipped(
        f"default/mixed {proxied}: ipMode Proxy: packets reach the nodes with another destination",
        "default/mixed lb.example.com: a host name, not an address",
    )
    scene.deliver(scene.describe("mixed", vip, pods))
    assert not any(result.ok for result in scene.lab.connect(proxied, 80, SENT, timeout=0.3))
    scene.plane.delete(service, slices)
    scene.settle()
    scene.wait_for_skipped()
    scene.check()


def test_ports_by_name_and_number(scene: Scene) -> None:
    """Several ports of a Service, one of which pods have under different numbers: slices tell, one for each number."""
    vip, (pod1, pod2) = "10.0.20.10", scene.lab.pods
    named, numbered = objects.port(80, target="http", name="web"), objects.port(81, target=SECOND_PORT, name="admin")
    at_pod1, at_pod2 = named | {"targetPort": TARGET_PORT}, named | {"targetPort": SECOND_PORT}
    scene.apply(
        objects.service("named", [named, numbered], [vip]),
        objects.endpoint_slice("named", [at_pod1, numbered], [objects.endpoint(pod1)], number=1),
        objects.endpoint_slice("named", [at_pod2, numbered], [objects.endpoint(pod2)], number=2),
        vips={vip: scene.lab.nodes},
    )
    backends = [pod1.backend(vip, TARGET_PORT), pod2.backend(vip, SECOND_PORT)]
    ways = {(each.pod.name, each.destination[1]) for each in scene.deliver(scene.describe("named", vip, backends))}
    assert ways == {(pod1.name, TARGET_PORT), (pod2.name, SECOND_PORT)}
    admin = scene.describe("named", vip, [pod1, pod2], 81, target_port=SECOND_PORT)
    assert {each.destination[1] for each in scene.deliver(admin)} == {SECOND_PORT}
    scene.check()


def test_endpoints_without_node(scene: Scene) -> None:
    """An endpoint that names no node has a hop that nobody knows; pod and addresses are told all the same."""
    vip, (pod1, pod2) = "10.0.20.11", scene.lab.pods
    homeless = objects.endpoint(pod1)
    del homeless["nodeName"]
    scene.apply(
        objects.service("homeless", WEB, [vip]),
        objects.endpoint_slice("homeless", WEB, [homeless, objects.endpoint(pod2)]),
        vips={vip: scene.lab.nodes},
    )
    backends = [replace(pod1.backend(vip, TARGET_PORT), node=None), pod2.backend(vip, TARGET_PORT)]
    scene.deliver(scene.describe("homeless", vip, backends))
    hops = {
        (dict(key)["k8s.node.name"], dict(key)["lb_hop.hop"])
        for key in scene.expected
        if ("k8s.service.name", "homeless") in key
    }
    assert hops == {("node1", "unknown"), ("node2", "unknown"), ("node1", "required"), ("node2", "none")}
    scene.check()


def test_policy_and_type_change(scene: Scene) -> None:
    """What comes after counts under the new policy, and not at all while the Service has no load balancer."""
    vip, pods = "10.0.20.16", scene.lab.pods
    cluster = scene.web("changing", vip, pods)
    scene.deliver(cluster)
    local = scene.web("changing", vip, pods, policy=Policy.LOCAL)
    assert {*scene.placements(cluster)["node1"]} == set()
    assert all(told.node.name == told.pod.node for told in scene.deliver(local))
    scene.apply(objects.service("changing", WEB, kind="ClusterIP"))
    assert scene.placements(local) == {"node1": {}, "node2": {}}
    assert not any(result.ok for result in scene.lab.connect(vip, 80, SENT, timeout=0.3))
    scene.deliver(scene.web("changing", vip, pods))
    scene.check()


def test_failed_handshakes(scene: Scene) -> None:
    """A pod that nobody listens in refuses, one that hears nothing lets time run out: forwarded, then failed."""
    vip, (node1, node2), (pod1, pod2) = "10.0.20.12", scene.lab.nodes, scene.lab.pods
    deafen(pod2, f"tcp dport {SILENT_PORT}")
    closed, silent = objects.port(80, target=CLOSED_PORT), objects.port(81, target=SILENT_PORT)
    scene.apply(
        objects.service("failing", [closed, silent], [vip]),
        objects.endpoint_slice("failing", [closed], [objects.endpoint(pod1)], number=1),
        objects.endpoint_slice("failing", [silent], [objects.endpoint(pod2)], number=2),
    )
    refuses = scene.describe("failing", vip, [pod1], target_port=CLOSED_PORT)
    is_silent = scene.describe("failing", vip, [pod2], 81, target_port=SILENT_PORT)
    for node in (node1, node2):
        scene.fail(refuses, node, pod1, "refused", "ECONNREFUSED")
        scene.fail(is_silent, node, pod2, "timeout", "timeout")
    assert {(dict(k)["lb_hop.hop"], dict(k)["error.type"]) for k in scene.failures} == {
        ("none", "refused"), ("required", "refused"), ("none", "timeout"), ("required", "timeout"),
    }  # fmt: skip
    scene.check()
