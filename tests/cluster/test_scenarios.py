"""What a cluster goes through, with a real API server and kube-proxy: every connection is told as it went.

Each test ends with all books in balance: what clients, pods and conntrack saw is what the agents counted and recorded,
by Service, outcome, hop class, origin, node and zone.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from threading import Event
from typing import TYPE_CHECKING

import pytest

from otel_lb_hop.model import Policy
from tests.cluster import objects
from tests.cluster.conftest import TARGET_PORT
from tests.cluster.kube_proxy import ALWAYS
from tests.cluster.requirements import needs_control_plane
from tests.cluster.scene import staged
from tests.e2e import truth
from tests.lab.waiting import wait_for

if TYPE_CHECKING:
    from collections.abc import Iterator

    from otel_lb_hop.model import VipPort
    from tests.cluster.api import Object
    from tests.cluster.control_plane import ControlPlane
    from tests.cluster.scene import Scene
    from tests.lab import Connection, Lab, Pod

pytestmark = [
    pytest.mark.root,
    pytest.mark.kubernetes,
    pytest.mark.collector,
    needs_control_plane,
    pytest.mark.parametrize("lab", [(2, 2)], indirect=True, scope="module", ids=["2x2"]),
]

ROLLS = 2
MOST_UNKNOWN = 0.01
"""Measured on two busy cores: none of 11,000."""
WEB = [objects.port(80, target=TARGET_PORT)]


@pytest.fixture(scope="module")
def agents(lab: Lab, plane: ControlPlane) -> Iterator[Scene]:
    """Run an agent on both nodes."""
    with staged(lab, plane) as scene:
        yield scene


@pytest.fixture(scope="module", params=ALWAYS, ids=[mode.value for mode in ALWAYS])
def scene(request: pytest.FixtureRequest, agents: Scene) -> Iterator[Scene]:
    """Run kube-proxy on both nodes too, in each of its modes in turn."""
    with agents.plane.kube_proxies(agents.lab.nodes, request.param):
        yield agents


def test_cluster_and_local_side_by_side(scene: Scene) -> None:
    """Two policies over the same pods: the one takes hops, avoidable and required, the other none."""
    pod1, _, pod2, _ = scene.lab.pods
    both = scene.web("both", "10.0.10.1", [pod1, pod2])
    far = scene.web("far", "10.0.10.2", [pod2])
    local = scene.web("local", "10.0.10.3", [pod1, pod2], policy=Policy.LOCAL)
    assert scene.placements(both) == {
        "node1": {"local": 1, "same_zone": 0, "other_zone": 1},
        "node2": {"local": 1, "same_zone": 0, "other_zone": 1},
    }
    assert scene.placements(far) == {
        "node1": {"local": 0, "same_zone": 0, "other_zone": 1},
        "node2": {"local": 1, "same_zone": 0, "other_zone": 0},
    }
    assert hops(scene, both) == {("node1", "node1"), ("node1", "node2"), ("node2", "node1"), ("node2", "node2")}
    assert hops(scene, far) == {("node1", "node2"), ("node2", "node2")}
    assert hops(scene, local) == {("node1", "node1"), ("node2", "node2")}
    scene.check()


def hops(scene: Scene, vip_port: VipPort) -> set[tuple[str, str]]:
    """Send 46 connections: that one of four ways stays without any happens once in 100,000 times."""
    return {hop(each) for _ in range(2) for each in scene.deliver(vip_port)}


def hop(told: truth.Told) -> tuple[str, str]:
    """Say where a connection came in, and where it went."""
    return told.node.name, told.pod.node


def test_dual_stack(scene: Scene) -> None:
    """One Service, two VIPs: each is told for itself, with network.type, SNAT sources and backends of its family."""
    vips, pods = ["10.0.10.4", "fd00:10::4"], scene.lab.pods[:3]
    scene.apply(*objects.web("dual", vips, pods, WEB), vips=dict.fromkeys(vips, scene.lab.nodes))
    for vip in vips:
        for each in scene.deliver(scene.describe("dual", vip, pods)):
            assert each.destination[0] in {each.pod.address4, each.pod.address6}
    types = Counter(
        dict(key)["network.type"] for key in scene.expected.elements() if ("k8s.service.name", "dual") in key
    )
    assert types["ipv4"] == types["ipv6"] > 0
    scene.check()


def test_scale_up_and_down(scene: Scene) -> None:
    """Endpoints come and go: the hop class is that of the moment, and so is the number of endpoints."""
    vip, pods = "10.0.10.8", scene.lab.pods
    for used, local, other in ([pods[3]], 0, 1), (pods, 2, 2), ([pods[0], pods[2]], 1, 1), ([pods[0]], 1, 0):
        vip_port = scene.web("scaled", vip, used)
        assert scene.placements(vip_port)["node1"] == {"local": local, "same_zone": 0, "other_zone": other}
        assert {each.pod.name for each in scene.deliver(vip_port)} == {pod.name for pod in used}
    scene.check()


def test_calls_from_pods(scene: Scene) -> None:
    """A pod that calls a VIP is served on its own node: origin internal, hop classes as for any other."""
    both = scene.web("called", "10.0.10.9", [scene.lab.pods[0], scene.lab.pods[2]])
    both6 = scene.web("called6", "fd00:10::9", [scene.lab.pods[2]])
    for pod in (scene.lab.pods[0], scene.lab.pods[3]):
        assert {told.node.name for told in scene.deliver(both, pod)} == {pod.node}
    assert {*map(hop, scene.deliver(both6, scene.lab.pods[1]))} == {("node1", "node2")}
    scene.check()


def slice_of(name: str, *endpoints: Object) -> Object:
    """Write the IPv4 slice of a Service."""
    return objects.endpoint_slice(name, WEB, endpoints)


def leaving(pod: Pod) -> Object:
    """Write an endpoint that is being shut down and still serves."""
    return objects.endpoint(pod, ready=False, serving=True, terminating=True)


def test_rolling_change_under_traffic(scene: Scene) -> None:
    """Every pod is replaced while a client connects: not one connection is lost or miscounted, hardly a hop unknown."""
    first, second, third, fourth = (objects.endpoint(pod) for pod in scene.lab.pods)
    leaving_first, leaving_third = leaving(scene.lab.pods[0]), leaving(scene.lab.pods[2])
    change = [
        [first, third, second],
        [leaving_first, third, second],
        [third, second],
        [third, second, fourth],
        [leaving_third, second, fourth],
        [second, fourth],
        [fourth],
        [first, fourth],
        [first, third],
    ]
    vip = "10.0.10.10"
    scene.web("rolling", vip, [scene.lab.pods[0], scene.lab.pods[2]])
    accepted_before, counted_before = truth.accepted_counts(scene.lab), scene.counted()
    with traffic(scene, vip) as results:
        for endpoints in change * ROLLS:
            scene.plane.apply(slice_of("rolling", *endpoints))
            scene.plane.settle()
    accepted = truth.accepted_since(scene.lab, accepted_before)
    assert [result.error for result in results] == [""] * len(results)
    assert len(accepted) == len(results)

    wait_for("the counts", lambda: (scene.counted() - counted_before).total() == len(results))
    counted = scene.counted() - counted_before
    node_of = {pod.address4: pod.node for pod in scene.lab.pods}
    went_to = Counter(node_of[each.local_address] for each in accepted)
    by_node: Counter[str] = Counter()
    for key, count in counted.items():
        attributes = dict(key)
        assert attributes["k8s.service.name"] == "rolling"
        if attributes["lb_hop.hop"] != "unknown":
            elsewhere = attributes["k8s.node.name"] != attributes["destination.k8s.node.name"]
            assert (attributes["lb_hop.hop"] != "none") == attributes["lb_hop.zone.crossed"] == elsewhere
            by_node[attributes["destination.k8s.node.name"]] += count
    # Only where kube-proxy has heard of an endpoint before the agent.
    unknown = len(results) - by_node.total()
    assert (went_to - by_node).total() == unknown <= MOST_UNKNOWN * len(results)

    wait_for("the records", lambda: len(scene.new_records()) >= len(results))
    records = [record.attributes for record in scene.new_records()]
    assert Counter((r["source.address"], r["source.port"], r["destination.address"]) for r in records) == Counter(
        (each.peer_address, each.peer_port, each.local_address) for each in accepted
    )
    assert Counter(r["client.port"] for r in records) == Counter(result.client_port for result in results)
    assert {(r["destination.address"], r["destination.k8s.pod.name"]) for r in records} == {
        (pod.address4, pod.name) for pod in scene.lab.pods
    }
    scene.expected += counted
    scene.forget_records()
    scene.check()


@contextlib.contextmanager
def traffic(scene: Scene, vip: str) -> Iterator[list[Connection]]:
    """Connect all the while; the results are complete afterwards."""
    results: list[Connection] = []
    done = Event()

    def connect() -> None:
        while not done.is_set():
            results.extend(scene.lab.connect(vip, 80, 10, concurrency=2))

    with ThreadPoolExecutor(1) as pool:
        client = pool.submit(connect)
        try:
            yield results
        finally:
            done.set()
        client.result()


def test_last_local_endpoint_goes_away_and_comes_back(scene: Scene) -> None:
    """Policy Local: what comes to a node without endpoint is lost for that reason, not dropped for none.

    States follow each other at once: a connection's reason is the one that held when it began.
    """
    node1, node2 = scene.lab.nodes
    pod1, _, pod2, _ = scene.lab.pods
    vip = "10.0.10.5"
    serves = scene.web("fading", vip, [pod1, pod2], policy=Policy.LOCAL, nodes=[node2])
    scene.deliver(serves)

    scene.web("fading", vip, [pod1], policy=Policy.LOCAL)
    scene.lose(serves, node2, "no_local_endpoints", "timeout")
    scene.announce({vip: [node1]})
    scene.deliver(serves)
    # The policy is about clients outside: a pod is served from anywhere.
    assert {*map(hop, scene.deliver(scene.describe("fading", vip, [pod1], policy=Policy.LOCAL), pod2))} == {
        ("node2", "node1")
    }

    scene.web("fading", vip, [pod1, pod2], policy=Policy.LOCAL, nodes=[node2])
    scene.deliver(serves)

    scene.web("fading", vip, [], policy=Policy.LOCAL)
    scene.lose(serves, node2, "no_endpoints", "ECONNREFUSED")
    scene.lose(serves, node2, "no_endpoints", "ECONNREFUSED", pod2)
    # Verdicts take seconds: the books are balanced at the end of the next test, or of the scene.


def test_terminating_endpoints_serve_when_none_is_ready(scene: Scene) -> None:
    """What terminates and still serves is used where nothing is ready: in the cluster, or with Local on the node."""
    node1, node2 = scene.lab.nodes
    pod1, _, pod2, _ = scene.lab.pods
    vip, local_vip = "10.0.10.6", "10.0.10.7"
    scene.apply(
        objects.service("waning", WEB, [vip]),
        slice_of("waning", objects.endpoint(pod1), leaving(pod2)),
        objects.service("waning-local", WEB, [local_vip], policy="Local"),
        slice_of("waning-local", objects.endpoint(pod1), leaving(pod2)),
        vips={vip: [node1, node2], local_vip: [node1, node2]},
    )
    ready, serving = scene.describe("waning", vip, [pod1]), scene.describe("waning", vip, [pod1, pod2])
    local = scene.describe("waning-local", local_vip, [pod1, pod2], policy=Policy.LOCAL)
    assert scene.placements(ready)["node2"] == {"local": 0, "same_zone": 0, "other_zone": 1}
    assert {*map(hop, scene.deliver(ready))} == {("node1", "node1"), ("node2", "node1")}
    assert {*map(hop, scene.deliver(local))} == {("node1", "node1"), ("node2", "node2")}

    scene.apply(slice_of("waning", leaving(pod1), leaving(pod2)))
    assert len({*map(hop, scene.deliver(serving))}) == 4

    dead = objects.endpoint(pod2, ready=False, serving=False, terminating=True)
    scene.apply(slice_of("waning", dead), slice_of("waning-local", objects.endpoint(pod1), dead))
    scene.lose(serving, node1, "no_endpoints", "ECONNREFUSED")
    scene.lose(local, node2, "no_local_endpoints", "timeout")
    scene.check()
