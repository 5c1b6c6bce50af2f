"""Interfaces come and go under a running agent."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import pytest

from otel_lb_hop.model import pack_address
from tests.e2e.collector import Collector
from tests.e2e.conftest import TARGET_PORT
from tests.lab.agent import Agent, agents_on
from tests.lab.requirements import needs_lab
from tests.lab.waiting import wait_for

if TYPE_CHECKING:
    from tests.lab import Lab

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
