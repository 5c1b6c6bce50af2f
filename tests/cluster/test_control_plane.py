"""The cluster itself: a real kube-proxy must spread and hide as the tests of the agent take for granted."""

from __future__ import annotations

from collections import Counter
from http import HTTPStatus
from typing import TYPE_CHECKING

import pytest

from tests.cluster import objects
from tests.cluster.conftest import TARGET_PORT
from tests.cluster.control_plane import ADMIN_TOKEN, AGENT
from tests.cluster.kube_proxy import ALWAYS
from tests.cluster.requirements import needs_control_plane

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from tests.cluster.api import Object
    from tests.cluster.control_plane import ControlPlane
    from tests.lab import Accepted, Connection, Lab

pytestmark = [pytest.mark.root, pytest.mark.kubernetes, needs_control_plane]

SENT = 23
WEB = [objects.port(80, target=TARGET_PORT)]
VIP4, VIP6 = "10.0.10.0", "fd00:10::1"
BOTH = pytest.mark.parametrize("vip", [VIP4, VIP6])


class Cluster:
    """A lab with its control plane and a kube-proxy on each node."""

    def __init__(self, lab: Lab, plane: ControlPlane) -> None:
        self.lab = lab
        self.plane = plane
        self._applied: list[Object] = []
        self._before: dict[tuple[str, str], int] = {}

    def serve(self, vip: str, *contents: Object) -> None:
        """Make these the only Services, with a VIP that every node announces."""
        self.clear()
        self._applied = list(contents)
        self.plane.apply(*contents)
        self.lab.announce({vip: self.lab.nodes})
        self.plane.settle()
        self.forget()

    def clear(self) -> None:
        """Delete what the last `serve` applied."""
        self.plane.delete(*self._applied)
        self._applied = []

    def forget(self) -> None:
        """Let `accepted` begin here."""
        for pod in self.lab.pods:
            for transport in ("tcp", "udp"):
                self._before[pod.name, transport] = len(pod.accepted(transport))

    def accepted(self, transport: str = "tcp") -> dict[str, list[Accepted]]:
        """Return what each pod has taken since the last `serve` or `forget`."""
        return {pod.name: pod.accepted(transport)[self._before[pod.name, transport] :] for pod in self.lab.pods}

    def entered(self, results: Sequence[Connection], transport: str = "tcp") -> Counter[str]:
        """Count on which nodes these connections came in, by conntrack."""
        clients = {(result.client_address, result.client_port) for result in results}
        return Counter(
            node.name
            for node in self.lab.nodes
            for entry in node.conntrack(transport)
            if (entry.source, entry.source_port) in clients
        )


@pytest.fixture(scope="module", params=ALWAYS, ids=[mode.value for mode in ALWAYS])
def cluster(request: pytest.FixtureRequest, lab: Lab, plane: ControlPlane) -> Iterator[Cluster]:
    """Run kube-proxy on both nodes, in each of its modes in turn."""
    with plane.kube_proxies(lab.nodes, request.param):
        made = Cluster(lab, plane)
        yield made
        made.clear()


@BOTH
def test_cluster_policy_spreads_and_hides_the_client(cluster: Cluster, vip: str) -> None:
    """23 connections come in on both nodes and are answered by the pods of both, from an address of a node."""
    cluster.serve(vip, *objects.web("web", [vip], cluster.lab.pods, WEB))
    results = cluster.lab.connect(vip, 80, SENT)
    accepted = cluster.accepted()
    assert [result.error for result in results] == [""] * SENT
    assert sorted(cluster.entered(results)) == ["node1", "node2"]
    assert sum(cluster.entered(results).values()) == SENT
    assert sum(map(len, accepted.values())) == SENT
    assert min(map(len, accepted.values())) > 0
    peers = {entry.peer_address for entries in accepted.values() for entry in entries}
    assert peers <= cluster.lab.nodes[0].addresses | cluster.lab.nodes[1].addresses


@BOTH
def test_local_policy_keeps_the_client(cluster: Cluster, vip: str) -> None:
    """Policy Local: each connection is answered on the node it entered, and the pod sees the client itself."""
    cluster.serve(vip, *objects.web("local", [vip], cluster.lab.pods, WEB, policy="Local"))
    results = cluster.lab.connect(vip, 80, SENT)
    accepted = cluster.accepted()
    clients = {(result.client_address, result.client_port) for result in results if result.ok}
    assert len(clients) == SENT
    assert {(e.peer_address, e.peer_port) for entries in accepted.values() for e in entries} == clients
    entered = cluster.entered(results)
    assert {f"{node}-pod1": count for node, count in entered.items()} == {
        name: len(entries) for name, entries in accepted.items()
    }


def test_local_policy_without_local_endpoint_is_silent(cluster: Cluster) -> None:
    """A node without a backend drops what comes in under policy Local; the client hears nothing."""
    cluster.serve(VIP4, *objects.web("local", [VIP4], cluster.lab.pods[:1], WEB, policy="Local"))
    cluster.lab.announce({VIP4: cluster.lab.nodes[1:]})
    assert [result.error for result in cluster.lab.connect(VIP4, 80, 3, timeout=0.3)] == ["timeout"] * 3


@BOTH
def test_external_ip(cluster: Cluster, vip: str) -> None:
    """An address in spec.externalIPs is a VIP, whatever the type of the Service."""
    pods = cluster.lab.pods
    cluster.serve(vip, *objects.web("external", [], pods, WEB, kind="ClusterIP", external_ips=[vip]))
    assert [result.error for result in cluster.lab.connect(vip, 80, SENT)] == [""] * SENT
    assert sum(map(len, cluster.accepted().values())) == SENT


@BOTH
def test_udp(cluster: Cluster, vip: str) -> None:
    """23 UDP flows are 23 answers, and each is one datagram at a pod."""
    ports = [objects.port(53, target=TARGET_PORT, protocol="UDP")]
    cluster.serve(vip, *objects.web("dns", [vip], cluster.lab.pods, ports))
    results = cluster.lab.client.send_udp(vip, 53, SENT)
    assert [result.error for result in results] == [""] * SENT
    assert len({result.client_port for result in results}) == SENT
    assert sum(cluster.entered(results, "udp").values()) == SENT
    accepted = cluster.accepted("udp")
    assert sum(map(len, accepted.values())) == SENT
    assert {e.local_address for entries in accepted.values() for e in entries} <= {
        address for pod in cluster.lab.pods for address in (pod.address4, pod.address6)
    }


@BOTH
@pytest.mark.parametrize("transport", ["tcp", "udp"])
def test_no_endpoints_is_refused(cluster: Cluster, vip: str, transport: str) -> None:
    """A VIP port whose only endpoint is not ready is refused at once."""
    ports = [objects.port(80, protocol=transport.upper())]
    family = 4 if vip == VIP4 else 6
    sleeping = [objects.endpoint(cluster.lab.pods[0], family=family, ready=False)]
    service = objects.service("empty", ports, [vip], families=[family])
    cluster.serve(vip, service, objects.endpoint_slice("empty", ports, sleeping, family=family))
    send = cluster.lab.connect if transport == "tcp" else cluster.lab.client.send_udp
    assert [result.error for result in send(vip, 80, SENT)] == ["ECONNREFUSED"] * SENT


def test_change_and_removal_reach_the_rules(cluster: Cluster) -> None:
    """After `settle` connections go where the slices say now, and a Service that is gone has no rules."""
    pods = cluster.lab.pods
    cluster.serve(VIP4, *objects.web("web", [VIP4], pods, WEB))
    for pod in (pods[0], pods[1], pods[0]):
        cluster.plane.apply(*objects.web("web", [VIP4], [pod], WEB))
        cluster.plane.settle()
        cluster.forget()
        cluster.lab.connect(VIP4, 80, SENT)
        assert {name: len(entries) for name, entries in cluster.accepted().items() if entries} == {pod.name: SENT}
    cluster.serve(VIP4)
    assert not any(proxy.has([VIP4]) for proxy in cluster.plane.proxies)


def test_agent_may_read_three_resources_and_nothing_else(plane: ControlPlane) -> None:
    """The ServiceAccount's token gets Services, Nodes and EndpointSlices, not Secrets, and writes nothing."""
    token = plane.agent_token()
    slices = "/apis/discovery.k8s.io/v1/endpointslices"
    before = len(plane.audit(AGENT))
    for path in ("/api/v1/services", "/api/v1/nodes", slices):
        assert plane.ask("GET", f"{path}?limit=1", token).status == HTTPStatus.OK
    for path in ("/api/v1/secrets", "/api/v1/pods", "/api/v1/namespaces", "/api/v1/namespaces/kube-system"):
        assert plane.ask("GET", path, token).status == HTTPStatus.FORBIDDEN
    assert plane.ask("DELETE", "/api/v1/nodes/node1", token).status == HTTPStatus.FORBIDDEN
    assert plane.ask("GET", "/api/v1/services", "no-token-of-mine").status == HTTPStatus.UNAUTHORIZED

    seen = plane.audit(AGENT)[before:]
    assert [(each.verb, each.resource, each.code, each.decision) for each in seen] == [
        ("list", "services", 200, "allow"),
        ("list", "nodes", 200, "allow"),
        ("list", "endpointslices", 200, "allow"),
        ("list", "secrets", 403, "forbid"),
        ("list", "pods", 403, "forbid"),
        ("list", "namespaces", 403, "forbid"),
        ("get", "namespaces", 403, "forbid"),
        ("delete", "nodes", 403, "forbid"),
    ]
    assert seen[0].query == {"limit": "1"}
    assert seen[-1].name == "node1"

    plane.allow_cluster_uid()
    uid = plane.ask("GET", "/api/v1/namespaces/kube-system", token).content["metadata"]["uid"]
    assert uid == plane.ask("GET", "/api/v1/namespaces/kube-system", ADMIN_TOKEN).content["metadata"]["uid"]
    assert plane.ask("GET", "/api/v1/namespaces/default", token).status == HTTPStatus.FORBIDDEN


def test_as_a_pod_the_files_are_at_their_place(lab: Lab, plane: ControlPlane) -> None:
    """What is started as a pod sees a token that may be renewed, the lab's directory, and no other /run."""
    pod = plane.agent_as_pod()
    account = "/var/run/secrets/kubernetes.io/serviceaccount"
    script = (
        f"ls {account}; test -d {plane.folder}; test ! -e /run/netns; echo renewed > {pod.token}; cat {account}/token"
    )
    assert plane.ask("GET", "/api/v1/services", pod.token.read_text(encoding="ascii")).status == HTTPStatus.OK
    said = lab.nodes[0].run([*pod.prefix, "sh", "-ec", script]).stdout
    assert said.split() == ["ca.crt", "namespace", "token", "renewed"]


def test_restart_keeps_objects_and_tokens(plane: ControlPlane) -> None:
    """While the API server is stopped nobody answers; afterwards all is as before."""
    token = plane.agent_token()
    before = plane.objects_of("v1", "Node")
    plane.stop()
    with pytest.raises(ConnectionRefusedError):
        plane.objects_of("v1", "Node")
    plane.start()
    assert plane.objects_of("v1", "Node") == before
    assert [node["metadata"]["name"] for node in before] == ["node1", "node2"]
    assert plane.ask("GET", "/api/v1/nodes", token).status == HTTPStatus.OK
