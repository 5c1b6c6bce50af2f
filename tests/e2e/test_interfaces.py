"""Interfaces come and go under a running agent."""

from __future__ import annotations

import http
import socket
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from otel_lb_hop.kernel.bpf import BPF_TCX_EGRESS, BPF_TCX_INGRESS
from otel_lb_hop.model import pack_address
from tests.bench.measure import QUIET
from tests.e2e.collector import Collector
from tests.e2e.conftest import TARGET_PORT
from tests.lab import programs
from tests.lab.agent import Agent, agents_on
from tests.lab.bpffs import bpffs
from tests.lab.requirements import needs_lab
from tests.lab.waiting import wait_for

if TYPE_CHECKING:
    from tests.lab import Lab
    from tests.lab.host import Host

pytestmark = [pytest.mark.root, pytest.mark.collector, needs_lab]

SENT = 23
VIP = "10.0.50.0"
ALWAYS = ["eth0", "mgmt", "net0", "vpod1"]
NEW_ADDRESS = "10.100.1.99"


def hooked(agent: Agent) -> list[str]:
    """Return the hooked interfaces as /readyz lists them."""
    names: list[str] = agent.part("interfaces")["detail"]["hooked"]
    return names


def all_hooked(agent: Agent, names: list[str]) -> bool:
    """Whether these interfaces are hooked."""
    return {*names} <= {*hooked(agent)}


def add_interface(lab: Lab) -> None:
    """Plug a second cable between node1 and its pod, with an address of its own."""
    node, pod = lab.nodes[0], lab.pods[0]
    peer = ["peer", "name", "eth9", "netns", pod.netns]
    node.run(["ip", "link", "add", "vpod9", "type", "veth", *peer])
    pod.run(["ip", "addr", "add", f"{NEW_ADDRESS}/32", "dev", "eth9"])
    pod.run(["ip", "link", "set", "eth9", "up"])
    node.run(["ip", "addr", "add", "10.100.1.1/32", "dev", "vpod9"])
    node.run(["ip", "link", "set", "vpod9", "up"])
    node.run(["ip", "route", "add", NEW_ADDRESS, "dev", "vpod9"])


def test_backend_behind_a_new_interface(lab: Lab) -> None:
    """A pod's interface that comes is hooked, a backend behind it is seen, and when it goes the list follows."""
    service = lab.vip_port(VIP, 80, backends=lab.pods[:1], target_port=TARGET_PORT)
    moved = replace(service, backends=(replace(service.backends[0], address=pack_address(NEW_ADDRESS)),))
    lab.apply([service], announce={VIP: lab.nodes[:1]})
    with Collector(lab) as collector, agents_on(lab.nodes[:1], lab.vips_path, collector.settings()) as (agent,):
        assert hooked(agent) == ALWAYS
        assert agent.part("interfaces")["detail"]["uplinks"] == ["eth0", "net0"]
        add_interface(lab)
        wait_for("the new interface", lambda: hooked(agent) == [*ALWAYS, "vpod9"])
        lab.apply([moved], announce={VIP: lab.nodes[:1]})
        wait_for("the new backend", lambda: agent.stderr.count("the VIP file holds") == 2)
        assert all(result.ok for result in lab.connect(VIP, 80, SENT))
        lab.nodes[0].run(["ip", "link", "del", "vpod9"])
        wait_for("the end of the interface", lambda: hooked(agent) == ALWAYS)
        wait_for("log records", lambda: len(collector.logs()) >= SENT)
        assert agent.readyz().content["degraded"] == []
    records = collector.logs()
    assert len(records) == SENT
    assert {record.attributes["destination.address"] for record in records} == {NEW_ADDRESS}
    assert {record.attributes["lb_hop.hop"] for record in records} == {"none"}


def test_interfaces_that_flicker_under_traffic(lab: Lab) -> None:
    """Twenty interfaces come and go while connections are made: nothing crashes and every connection is counted."""
    service = lab.vip_port(VIP, 80, backends=lab.pods, target_port=TARGET_PORT)
    lab.apply([service], announce={VIP: lab.nodes[:1]})
    rounds = 10
    with Collector(lab) as collector, agents_on(lab.nodes[:1], lab.vips_path, collector.settings()) as (agent,):
        with ThreadPoolExecutor(1) as pool:
            traffic = pool.map(lambda _: lab.connect(VIP, 80, SENT), range(rounds))
            for number in range(rounds):
                names = [f"flick{number}a", f"flick{number}b"]
                lab.nodes[0].run(["ip", "link", "add", names[0], "type", "veth", "peer", "name", names[1]])
                if number % 2:  # every other pair stays long enough to be hooked
                    wait_for("the pair", partial(all_hooked, agent, names))
                lab.nodes[0].run(["ip", "link", "del", names[0]])
            assert all(result.ok for results in traffic for result in results)
        wait_for("the end of all pairs", lambda: hooked(agent) == ALWAYS)
        wait_for("log records", lambda: len(collector.logs()) >= rounds * SENT)
        assert agent.readyz().content["degraded"] == []
    assert sum(series.value for series in collector.series("lb_hop.connections")) == rounds * SENT
    assert len(collector.logs()) == rounds * SENT


def attached(host: Host, name: str) -> int:
    """Count the tcx programs on an interface."""
    hooks = (BPF_TCX_INGRESS, BPF_TCX_EGRESS)
    return host.in_netns(lambda: sum(len(programs.attached(socket.if_nametoindex(name), hook)) for hook in hooks))


def descriptors(agent: Agent) -> int:
    """Count the descriptors of an agent."""
    return len([*Path(f"/proc/{agent.process.pid}/fd").iterdir()])


def test_renamed_and_moved(lab: Lab) -> None:
    """Under its new name an uplink is matched and told of; what moves into a pod takes nothing of ours along."""
    lab.apply([lab.vip_port(VIP, 80, backends=lab.pods[:1], target_port=TARGET_PORT)], announce={VIP: lab.nodes[:1]})
    node, pod = lab.nodes[0], lab.pods[0]
    own = {"OTEL_LB_HOP_INTERFACES": "eth0,mgmt,net0,up*,vpod*"}
    with bpffs(lab.directory / "bpf") as mounted, Collector(lab) as collector:
        own["OTEL_LB_HOP_PIN_PATH"] = str(mounted / "otel-lb-hop")
        with Agent(node, lab.vips_path, collector.settings() | own) as agent:
            for old, new in (("net0", "up0"), ("up0", "other0"), ("other0", "net0")):
                node.run(["ip", "link", "set", old, "name", new])
                expected = sorted({*ALWAYS, new} - {"net0", "other0"} | {*ALWAYS} & {new})
                wait_for(new, lambda: hooked(agent) == expected)  # noqa: B023
                assert new in agent.part("interfaces")["detail"]["uplinks"]
                assert attached(node, new) == (0 if new == "other0" else 2)
                assert all(result.ok for result in lab.connect(VIP, 80, SENT))
            wait_for("log records", lambda: len(collector.logs()) >= 2 * SENT)
            before = descriptors(agent)
            for _ in range(3):
                node.run(["ip", "link", "add", "vpod9", "index", "777", "type", "veth", "peer", "name", "vpod10"])
                wait_for("the pair", lambda: all_hooked(agent, ["vpod9", "vpod10"]))
                node.run(["ip", "link", "set", "vpod9", "netns", f"/run/netns/{pod.netns}"])
                wait_for("its end here", lambda: hooked(agent) == sorted([*ALWAYS, "vpod10"]))
                assert attached(pod, "vpod9") == 0
                assert not [*mounted.rglob("link_777_*")]
                pod.run(["ip", "link", "del", "vpod9"])
                wait_for("the end of both", lambda: hooked(agent) == ALWAYS)
            wait_for("as many descriptors as before", lambda: descriptors(agent) <= before)
            assert agent.readyz().content["degraded"] == []
        assert " ERROR " not in agent.stderr
        assert " WARNING " not in agent.stderr
    names = [record.attributes["network.interface.name"] for record in collector.logs()]
    assert sorted(names) == ["net0"] * SENT + ["up0"] * SENT


def test_begun_before_the_network(lab: Lab) -> None:
    """An agent that finds no interface at all says that it is not ready, and counts once there is one."""
    lab.apply([])
    netns = f"{lab.nodes[0].netns}-late"
    lab.nodes[0].run(["ip", "netns", "add", netns])
    try:
        node = replace(lab.nodes[0], netns=netns)
        node.run(["ip", "link", "set", "lo", "up"])
        agent = Agent(node, lab.vips_path, QUIET, name="late")
        try:
            wait_for("/readyz", lambda: agent.readyz().status, 60)
            wait_for("the part", lambda: agent.part("interfaces"), 60)
            state = agent.readyz()
            assert state.status == http.HTTPStatus.SERVICE_UNAVAILABLE
            assert state.content["parts"]["interfaces"]["detail"]["hooked"] == []
            node.run(["ip", "link", "add", "first", "type", "veth", "peer", "name", "second"])
            agent.wait_ready()
            wait_for("both", lambda: hooked(agent) == ["first", "second"])
            assert attached(node, "first") == 2
            assert "counting on no interface yet" in agent.stderr
            node.run(["ip", "link", "del", "first"])
            wait_for("its end", lambda: agent.readyz().status == http.HTTPStatus.SERVICE_UNAVAILABLE)
            agent.stop()
            assert " ERROR " not in agent.stderr
        finally:
            agent.kill()
    finally:
        lab.nodes[0].run(["ip", "netns", "del", netns])


def test_routes_that_take_long_to_read(lab: Lab) -> None:
    """Where there are many routes they are not read each time; what changes in between is not left to chance."""
    lab.apply([])
    node = lab.nodes[0]
    many = "".join(f"route {{}} 10.77.{number // 250}.{number % 250}/32 dev vpod1\n" for number in range(200))
    gateway = ["default", "via", "172.30.0.1", "dev", "mgmt", "table", "777"]
    with Agent(node, lab.vips_path, QUIET) as agent:
        node.run(["ip", "-batch", "-"], text=many.replace("{}", "add"))
        try:
            for _ in range(2):
                for what, expected in (("add", ["eth0", "mgmt", "net0"]), ("del", ["eth0", "net0"])):
                    node.run(["ip", "route", what, *gateway])
                    wait_for(what, lambda: agent.part("interfaces")["detail"]["uplinks"] == expected, 20)  # noqa: B023
        finally:
            node.run(["ip", "-batch", "-"], text=many.replace("{}", "del"))
