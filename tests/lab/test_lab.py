"""The laboratory itself: it must behave as a cluster with kube-proxy does, count exactly, and leave nothing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import yaml

from otel_lb_hop.model import Policy, Transport
from tests.lab import Lab, LabError, reaper
from tests.lab.requirements import needs_lab

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.lab import Accepted

pytestmark = [pytest.mark.root, needs_lab]

VIP4, VIP6 = "10.0.10.0", "fd00:10::1"
BOTH = pytest.mark.parametrize("vip", [VIP4, VIP6])


@pytest.fixture(scope="module")
def built() -> Iterator[Lab]:
    """Build one lab for all tests that only change its Services."""
    with Lab() as lab:
        for pod in lab.pods:
            pod.serve(8080)
        yield lab


@pytest.fixture
def lab(built: Lab) -> Lab:
    """Take away what the test before has left: its Services, and conntrack entries of ports a client may use again."""
    built.apply([])
    for node in built.nodes:
        node.run(["conntrack", "-F"])
    return built


def accepted_during(lab: Lab, before: list[int]) -> list[Accepted]:
    """Return what the pods took since `before`, a `counts`."""
    return [entry for pod, count in zip(lab.pods, before, strict=True) for entry in pod.accepted()[count:]]


def counts(lab: Lab) -> list[int]:
    """Return how many connections each pod has taken."""
    return [len(pod.accepted()) for pod in lab.pods]


@BOTH
def test_cluster_delivers_every_connection_once_and_hides_the_client(lab: Lab, vip: str) -> None:
    """23 connections are 23 accepted, over both pods, each from an address of a node."""
    lab.apply([lab.vip_port(vip, 80, backends=lab.pods, target_port=8080)])
    before = counts(lab)
    results = lab.connect(vip, 80, 23)
    accepted = accepted_during(lab, before)
    assert [result.error for result in results] == [""] * 23
    assert len({(result.client_address, result.client_port) for result in results}) == 23
    assert len(accepted) == 23
    assert {entry.peer_address for entry in accepted} <= lab.nodes[0].addresses | lab.nodes[1].addresses


@BOTH
def test_router_spreads_connections_over_the_nodes(lab: Lab, vip: str) -> None:
    """ECMP with the 5-tuple: of 200 connections each node takes in some, each is in one conntrack table of entry."""
    lab.apply([lab.vip_port(vip, 80, backends=lab.pods, target_port=8080)])
    clients = {(r.client_address, r.client_port) for r in lab.connect(vip, 80, 200)}
    entered = Counter(node.name for node in lab.nodes for e in node.conntrack() if (e.source, e.source_port) in clients)
    assert sum(entered.values()) == 200
    assert min(entered["node1"], entered["node2"]) > 50


@BOTH
def test_announcing_node_takes_all(lab: Lab, vip: str) -> None:
    """A VIP announced by one node enters there, and moves with the announcement."""
    service = [lab.vip_port(vip, 80, backends=lab.pods, target_port=8080)]
    for node in [*lab.nodes, lab.nodes[0]]:
        lab.apply(service, announce={vip: [node]})
        clients = {(r.client_address, r.client_port) for r in lab.connect(vip, 80, 23) if r.ok}
        assert len(clients & {(e.source, e.source_port) for e in node.conntrack()}) == 23


@BOTH
def test_local_keeps_the_client(lab: Lab, vip: str) -> None:
    """Policy Local: the pod sees the client's own address and port."""
    lab.apply([lab.vip_port(vip, 80, policy=Policy.LOCAL, backends=lab.pods, target_port=8080)])
    before = counts(lab)
    clients = {(result.client_address, result.client_port) for result in lab.connect(vip, 80, 23)}
    accepted = accepted_during(lab, before)
    assert len(accepted) == 23
    assert {(entry.peer_address, entry.peer_port) for entry in accepted} == clients


@BOTH
def test_local_without_local_endpoint_is_silent(lab: Lab, vip: str) -> None:
    """A node without a backend drops what comes in under policy Local; the client hears nothing."""
    service = lab.vip_port(vip, 80, policy=Policy.LOCAL, backends=lab.pods[:1], target_port=8080)
    lab.apply([service], announce={vip: [lab.nodes[1]]})
    assert [result.error for result in lab.connect(vip, 80, 3, timeout=0.3)] == ["timeout"] * 3


@BOTH
def test_syn_sent_again_takes_the_same_way(lab: Lab, vip: str) -> None:
    """The router keeps a flow on its node: a SYN dropped there is dropped again, none finds the other node."""
    lab.apply([lab.vip_port(vip, 80, policy=Policy.LOCAL, backends=lab.pods[:1], target_port=8080)])
    results = lab.connect(vip, 80, 40, timeout=1.5, concurrency=40)
    assert {result.error for result in results} == {"", "timeout"}
    assert max(result.connect_seconds for result in results if result.ok) < 0.9


@BOTH
@pytest.mark.parametrize("policy", list(Policy))
def test_no_endpoints_is_refused_at_once(lab: Lab, vip: str, policy: Policy) -> None:
    """A VIP port without a ready backend is rejected, all 23 times and quickly."""
    sleeping = [replace(pod.backend(vip, 8080), ready=False) for pod in lab.pods]
    lab.apply([lab.vip_port(vip, 80, policy=policy, backends=sleeping)])
    results = lab.connect(vip, 80, 23)
    assert [result.error for result in results] == ["ECONNREFUSED"] * 23
    assert max(result.connect_seconds for result in results) < 0.5


@BOTH
def test_conntrack_tells_what_the_pod_saw(lab: Lab, vip: str) -> None:
    """The entry nodes' conntrack holds, for each client, exactly the peer that a pod accepted."""
    lab.apply([lab.vip_port(vip, 80, backends=lab.pods, target_port=8080)])
    before = counts(lab)
    clients = {(result.client_address, result.client_port) for result in lab.connect(vip, 80, 23)}
    entries = [e for node in lab.nodes for e in node.conntrack() if (e.source, e.source_port) in clients]
    translated = {(e.reply_destination, e.reply_destination_port, e.reply_source, e.reply_source_port) for e in entries}
    assert {(e.destination, e.destination_port) for e in entries} == {(vip, 80)}
    assert translated == set(map(tuple, accepted_during(lab, before)))
    assert len(translated) == 23


@BOTH
@pytest.mark.parametrize("policy", list(Policy))
@pytest.mark.parametrize("caller", ["pod", "node", "the backend itself"])
def test_calls_from_inside_reach_a_backend_elsewhere(lab: Lab, vip: str, policy: Policy, caller: str) -> None:
    """A pod or a node that calls the VIP is translated in place, whatever the policy and wherever the backend."""
    lab.apply([lab.vip_port(vip, 80, policy=policy, backends=lab.pods[1:], target_port=8080)])
    host = {"pod": lab.pods[0], "node": lab.nodes[0], "the backend itself": lab.pods[1]}[caller]
    before = counts(lab)
    assert all(result.ok for result in host.connect(vip, 80, 5))
    peers = {entry.peer_address for entry in accepted_during(lab, before)}
    if caller == "pod" and policy is Policy.LOCAL:
        assert peers == {host.address4 if vip == VIP4 else host.address6}
    else:
        assert peers <= lab.nodes[0].addresses | lab.nodes[1].addresses


def test_closing_without_reset_is_counted_as_well(lab: Lab) -> None:
    """Connections that end with FIN are accepted as exactly as those that end with RST."""
    lab.apply([lab.vip_port(VIP4, 80, backends=lab.pods, target_port=8080)])
    before = counts(lab)
    assert all(result.ok for result in lab.connect(VIP4, 80, 500, reset=False, concurrency=64))
    assert len(accepted_during(lab, before)) == 500


@BOTH
def test_udp_flows_have_ports_of_their_own(lab: Lab, vip: str) -> None:
    """23 UDP flows are 23 answers and 23 datagrams at the pods; without a backend each is refused."""
    port = {VIP4: 5304, VIP6: 5306}[vip]
    for pod in lab.pods:
        pod.serve_udp(port)
    lab.apply([lab.vip_port(vip, 53, transport=Transport.UDP, backends=lab.pods, target_port=port)])
    results = lab.client.send_udp(vip, 53, 23)
    assert [result.error for result in results] == [""] * 23
    assert len({result.client_port for result in results}) == 23
    datagrams = [entry for pod in lab.pods for entry in pod.accepted("udp") if entry.local_port == port]
    assert len(datagrams) == 23
    assert {entry.peer_address for entry in datagrams} <= lab.nodes[0].addresses | lab.nodes[1].addresses
    lab.apply([lab.vip_port(vip, 53, transport=Transport.UDP)])
    assert [result.error for result in lab.client.send_udp(vip, 53, 23)] == ["ECONNREFUSED"] * 23


def test_applying_again_replaces_all(lab: Lab) -> None:
    """A Service that is gone leaves no rule and no route."""
    lab.apply([lab.vip_port(VIP4, 80, backends=lab.pods, target_port=8080)])
    lab.apply([lab.vip_port("10.0.10.9", 80, backends=lab.pods, target_port=8080)])
    assert [result.error for result in lab.connect(VIP4, 80)] == ["ENETUNREACH"]
    assert [result.error for result in lab.connect("10.0.10.9", 80)] == [""]


def test_vips_file_tells_services_once(lab: Lab) -> None:
    """Both families of a Service are one entry, with the port of a backend only where it differs."""
    odd = replace(lab.pods[1].backend(VIP4, 9090), ready=False)
    services = [
        lab.vip_port(VIP4, 80, backends=[lab.pods[0], odd], target_port=8080),
        lab.vip_port(VIP6, 80, backends=lab.pods[:1], target_port=8080),
    ]
    document = yaml.safe_load(lab.vips_file(services))
    assert document["nodes"][1] == {"name": "node2", "zone": "zone-b", "region": "lab"}
    here = {"node": "node1", "zone": "zone-a", "pod": "default/node1-pod1", "ready": True}
    there = {"node": "node2", "zone": "zone-b", "pod": "default/node2-pod1", "ready": False, "port": 9090}
    assert document["services"] == [
        {
            "name": "default/web",
            "externalTrafficPolicy": "Cluster",
            "vips": [VIP4, VIP6],
            "ports": [{"port": 80, "protocol": "TCP", "targetPort": 8080}],
            "backends": [
                {"address": "10.100.1.2"} | here,
                {"address": "10.100.2.2"} | there,
                {"address": "fd00:100:1::2"} | here,
            ],
        }
    ]


def test_mgmt_is_reached_from_every_node_and_routes_nothing(lab: Lab) -> None:
    """A server of the mgmt host answers every node on both families, and the nodes have no gateway there."""
    script = (
        "import socket\nserver = socket.create_server(('::', 4317), family=socket.AF_INET6, dualstack_ipv6=True)\n"
        "print('listening', flush=True)\nwhile True: server.accept()"
    )
    with lab.mgmt.popen([sys.executable, "-c", script], stdout=subprocess.PIPE) as server:
        assert server.stdout is not None
        server.stdout.readline()
        for node in lab.nodes:
            for address in (lab.mgmt.address4, lab.mgmt.address6):
                assert [result.error for result in node.connect(address, 4317)] == [""]
            assert "via" not in node.run(["ip", "route", "show", "dev", "mgmt"]).stdout
        server.kill()


def test_two_labs_side_by_side(lab: Lab) -> None:
    """Another lab with the same addresses and more nodes sees its own connections only."""
    with Lab(nodes=3, pods_per_node=2) as other:
        assert other.nodes[0].bpffs().is_mount()
        for pod in other.pods:
            pod.serve(8080)
        services = [lab.vip_port(VIP4, 80, backends=lab.pods, target_port=8080)]
        lab.apply(services)
        other.apply([other.vip_port(VIP4, 80, backends=other.pods, target_port=8080)])
        before = counts(lab)
        assert all(result.ok for result in other.connect(VIP4, 80, 230))
        assert sum(counts(other)) == 230
        assert min(counts(other)) > 0
        assert counts(lab) == before
        assert [node.zone for node in other.nodes] == ["zone-a", "zone-b", "zone-c"]
    assert reaper.lab_namespaces(other.name) == []


def test_nodes_that_share_a_zone() -> None:
    """Zones are the nodes' and their pods', in the file that agents read as well; one for each node, or none at all."""
    lab = Lab(nodes=3, zones=("zone-a", "zone-a", "zone-b"))
    assert [node.zone for node in lab.nodes] == [pod.zone for pod in lab.pods] == ["zone-a", "zone-a", "zone-b"]
    assert [node["zone"] for node in yaml.safe_load(lab.vips_file([]))["nodes"]] == ["zone-a", "zone-a", "zone-b"]
    with pytest.raises(ValueError, match="shorter"):
        Lab(nodes=3, zones=("zone-a", "zone-b"))


def test_name_in_use_is_refused_and_left_alone(lab: Lab) -> None:
    """A second lab of the same name does not touch the first."""
    with pytest.raises(LabError, match="is up already"):
        Lab(name=lab.name).up()
    assert reaper.lab_namespaces(lab.name)


def test_killed_owner_leaves_nothing() -> None:
    """SIGKILL of the owner: namespaces, processes and state are gone within two seconds."""
    script = (
        "import time\nfrom tests.lab import Lab\nlab = Lab()\nlab.up()\nlab.pods[0].serve(8080)\n"
        "lab.nodes[0].popen(['sleep', '1000'])\nprint(lab.name, flush=True)\ntime.sleep(1000)"
    )
    root = Path(__file__).parents[2]
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, cwd=root) as owner:
        assert owner.stdout is not None
        name = owner.stdout.readline().strip()
        processes = reaper.lab_processes(reaper.lab_namespaces(name))
        assert len(processes) == 2
        owner.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 2
    while reaper.state_file(name).exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not reaper.state_file(name).exists()
    assert not reaper.work_directory(name).exists()
    assert reaper.lab_namespaces(name) == []
    assert [process for process in processes if reaper.start_time(process) is not None] == []


def test_stale_lab_is_removed_by_the_next() -> None:
    """What even the janitor could not remove (both killed) goes when the next lab starts."""
    lab = Lab()
    lab.up(outlive=True)
    dead = f'{{"owner_pid": {os.getpid()}, "owner_start": 1, "nodes": 2, "pods_per_node": 1}}'
    reaper.state_file(lab.name).write_text(dead, encoding="utf-8")
    assert lab.name in reaper.remove_stale_labs()
    assert reaper.lab_namespaces(lab.name) == []
