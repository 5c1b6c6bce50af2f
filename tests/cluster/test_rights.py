"""What agents ask of the API server, and who they say they are, with the optional right and without.

That an agent asks nothing else is held at the end of every scene, of other files as well (`scene.assert_least_rights`).
"""

from __future__ import annotations

import socket
from datetime import UTC, datetime
from http import HTTPStatus
from typing import TYPE_CHECKING

import pytest

from otel_lb_hop import __version__
from tests.cluster.audit import Request
from tests.cluster.control_plane import AGENT
from tests.cluster.kube_proxy import Mode
from tests.cluster.requirements import needs_control_plane
from tests.cluster.scene import SENT, assert_least_rights, staged
from tests.lab.layout import REGION
from tests.lab.waiting import wait_for

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.cluster.control_plane import ControlPlane
    from tests.cluster.scene import Scene
    from tests.e2e.otlp import LogRecord, Series
    from tests.lab import Lab

pytestmark = [pytest.mark.root, pytest.mark.kubernetes, pytest.mark.collector, needs_control_plane]

POD = {
    "OTEL_LB_HOP_POD_NAME": "otel-lb-hop-x7k2p",
    "OTEL_LB_HOP_POD_NAMESPACE": "otel-lb-hop",
    "OTEL_LB_HOP_POD_UID": "0d9f3b64-3b4c-4b0e-9f0e-6a1d6a6f6f11",
}
POD_ATTRIBUTES = {
    "k8s.pod.name": "otel-lb-hop-x7k2p",
    "k8s.namespace.name": "otel-lb-hop",
    "k8s.pod.uid": "0d9f3b64-3b4c-4b0e-9f0e-6a1d6a6f6f11",
}


@pytest.fixture(scope="module")
def proxied(lab: Lab, plane: ControlPlane) -> Iterator[ControlPlane]:
    """Run kube-proxy on both nodes."""
    with plane.kube_proxies(lab.nodes, Mode.NFTABLES):
        yield plane


def uid_of(plane: ControlPlane, kind: str, name: str) -> str:
    """Ask for the uid of an object."""
    uids = {each["metadata"]["name"]: each["metadata"]["uid"] for each in plane.objects_of("v1", kind)}
    return str(uids[name])


def assert_resources(scene: Scene, common: dict[str, str]) -> None:
    """Hold that metrics and records of each agent bear its node's attributes, and these."""
    vip_port = scene.web("web", "10.0.50.1", scene.lab.pods)
    expected = {
        node.name: {
            "k8s.node.name": node.name,
            "k8s.node.uid": uid_of(scene.plane, "Node", node.name),
            "host.name": socket.gethostname(),
            "cloud.availability_zone": node.zone,
            "cloud.region": REGION,
            "service.name": "otel-lb-hop",
            "service.version": __version__,
            **common,
        }
        for node in scene.lab.nodes
    }
    # The cluster's uid is known a moment after the first list.
    wait_for("resources", lambda: {name: resource(told[0]) for name, told in scene.exports().items()} == expected)
    scene.deliver(vip_port)
    wait_for("records", lambda: len(scene.new_records()) >= SENT)
    for record in scene.new_records():
        assert resource(record) == expected[record.attributes["k8s.node.name"]]
    scene.check()


def resource(item: LogRecord | Series) -> dict[str, str]:
    """Return the resource of an item, without the instance's id."""
    return {name: value for name, value in item.resource.items() if name != "service.instance.id"}


def test_without_the_optional_right(lab: Lab, proxied: ControlPlane) -> None:
    """An agent with three resources to read names its node and pod; the cluster has no uid, and nothing else lacks."""
    with staged(lab, proxied, settings=POD) as scene:
        assert_resources(scene, POD_ATTRIBUTES)
        for agent in scene.agents:
            assert agent.readyz().content["degraded"] == []


def test_as_a_pod_with_the_optional_right(lab: Lab, proxied: ControlPlane) -> None:
    """Found by the ServiceAccount's files, the API server tells the same, and the cluster's uid; the standard wins."""
    proxied.allow_cluster_uid()
    settings = POD | {"OTEL_RESOURCE_ATTRIBUTES": "cloud.region=earth,k8s.pod.name=mine", "OTEL_SERVICE_NAME": "hops"}
    with staged(lab, proxied, settings=settings, as_pods=True, uid_code=200) as scene:
        uid = uid_of(proxied, "Namespace", "kube-system")
        standard = {"cloud.region": "earth", "k8s.pod.name": "mine", "service.name": "hops"}
        assert_resources(scene, POD_ATTRIBUTES | standard | {"k8s.cluster.uid": uid})


GOOD = [(verb, resource) for verb in ("list", "watch") for resource in ("services", "endpointslices", "nodes")]


def request(verb: str, resource: str, code: int = 200, path: str = "") -> Request:
    """Write a line of the audit log."""
    decision = "allow" if code < HTTPStatus.BAD_REQUEST else "forbid"
    return Request(AGENT, "", verb, resource, "", "", path, {}, datetime.now(UTC), code, decision)


@pytest.mark.parametrize(
    "other",
    [
        request("list", "pods"),
        request("list", "namespaces"),
        request("get", "namespaces", path="/api/v1/namespaces/default"),
        request("get", "", path="/version"),
        request("patch", "services/status"),
        request("list", "secrets", 403),
        request("list", "services", 410),
        request("get", "namespaces", path="/api/v1/namespaces/kube-system"),
    ],
)
def test_the_proof_sees_what_else_is_asked(other: Request) -> None:
    """One request more than an agent may make, and the proof fails; one missing, too."""
    uid = request("get", "namespaces", path="/api/v1/namespaces/kube-system")
    good = [*(request(*each) for each in GOOD), request("get", "nodes"), uid]
    assert_least_rights(good, 1, uid_code=200)
    for bad in ([*good, other], good[1:], good[:-1]):
        with pytest.raises(AssertionError):
            assert_least_rights(bad, 1, uid_code=200)
