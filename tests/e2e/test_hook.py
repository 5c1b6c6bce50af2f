"""OTEL_LB_HOP_HOOK end to end: uplinks watched by XDP, refused by it, becoming and ceasing to be uplinks."""

from __future__ import annotations

import os
import signal
import socket
from collections import Counter
from typing import TYPE_CHECKING

import pytest

from otel_lb_hop.kernel import bpf
from tests.e2e import truth
from tests.e2e.collector import Collector
from tests.e2e.conftest import TARGET_PORT
from tests.lab.agent import Agent, agents_on
from tests.lab.programs import foreign_xdp
from tests.lab.requirements import needs_lab
from tests.lab.waiting import wait_for

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from otel_lb_hop.model import VipPort
    from tests.lab import Lab, Node

pytestmark = [pytest.mark.root, pytest.mark.collector, needs_lab]

SENT = 23
VIPS = ("10.0.60.0", "fd00:10::60")
SHOWN = {"tc": "", "xdp": " xdp ", "xdp-generic": " xdpgeneric "}
INTERNAL = ["mgmt", "vpod1"]
UPLINKS = ["eth0", "net0"]


@pytest.fixture(autouse=True)
def _nothing_left(lab: Lab) -> Iterator[None]:
    """After each test no interface of a node has an XDP program."""
    yield
    wait_for("the end of XDP", lambda: not any(xdp_on(node) for node in lab.nodes))


@pytest.fixture(autouse=True)
def services(lab: Lab) -> list[VipPort]:
    """Serve a VIP of each family from both nodes' pods."""
    made = [lab.vip_port(vip, 80, backends=lab.pods, target_port=TARGET_PORT) for vip in VIPS]
    lab.apply(made)
    return made


def xdp_on(node: Node) -> dict[str, str]:
    """Return which interfaces of a node have an XDP program, and in which mode."""
    found = {}
    for line in node.run(["ip", "-d", "-o", "link", "show"]).stdout.splitlines():
        for hook, words in SHOWN.items():
            if words and words in line:
                found[line.split()[1].split("@")[0]] = hook
    return found


def ingress(agent: Agent) -> dict[str, str]:
    """Return what /readyz says of the uplinks' ingress."""
    told: dict[str, str] = agent.part("interfaces")["detail"]["ingress"]
    return told


def check(lab: Lab, services: list[VipPort], settings: Mapping[str, str], hook: str) -> None:
    """Run agents on both nodes and send 23 connections to each VIP: all is told as it was."""
    with Collector(lab) as collector:
        with agents_on(lab.nodes, lab.vips_path, collector.settings() | dict(settings)) as agents:
            for agent in agents:
                detail = agent.part("interfaces")["detail"]
                assert (detail["hooked"], detail["uplinks"]) == (sorted(INTERNAL + UPLINKS), UPLINKS)
                assert detail["ingress"] == ({} if hook == "tc" else dict.fromkeys(UPLINKS, hook))
                assert xdp_on(agent.node) == detail["ingress"]
            told = {}
            for service, vip in zip(services, VIPS, strict=True):
                truth.forget_connections(lab)
                accepted = truth.accepted_counts(lab)
                results = lab.connect(vip, 80, SENT)
                assert all(result.ok for result in results)
                told[vip] = truth.follow(lab, service, results, truth.accepted_since(lab, accepted))
            wait_for("log records", lambda: len(collector.logs()) >= SENT * len(VIPS))
        assert "Traceback" not in "".join(agent.stderr for agent in agents)
    for service, vip in zip(services, VIPS, strict=True):
        counted = Counter(
            {
                frozenset(series.attributes.items()): series.value
                for series in collector.series("lb_hop.connections")
                if series.attributes["server.address"] == vip and series.value
            }
        )
        assert counted == Counter(
            frozenset((truth.vip_port_attributes(service, each.node) | truth.verdict_attributes(service, each)).items())
            for each in told[vip]
        )
        assert sum(counted.values()) == SENT
        records = [record for record in collector.logs() if record.attributes["server.address"] == vip]
        expected = {each.client: each for each in told[vip]}
        assert sorted(truth.clients_of(records)) == sorted(expected)
        for record, client in zip(records, truth.clients_of(records), strict=True):
            attributes = dict(record.attributes)
            forward, handshake = (attributes.pop(f"lb_hop.{name}.duration") for name in ("forward", "handshake"))
            assert attributes == truth.record_attributes(service, expected[client])
            assert 0 < forward < handshake < expected[client].connect_seconds
    assert sum(series.value for series in collector.series("lb_hop.syn.retransmits")) == 0


@pytest.mark.parametrize("hook", ["xdp", "xdp-generic", "tc"])
def test_each_hook(lab: Lab, services: list[VipPort], hook: str) -> None:
    """Each connection is told the same whichever hook sees it, and whichever was used by the run before."""
    check(lab, services, {"OTEL_LB_HOP_HOOK": hook}, hook)


def test_foreign_program(lab: Lab) -> None:
    """With another XDP program on an uplink tc watches that one; it is said, and not one connection is lost."""
    node = lab.nodes[0]
    lab.announce({vip: [node] for vip in VIPS})
    program = foreign_xdp()
    link = node.in_netns(lambda: bpf.attach_xdp(program, socket.if_nametoindex("net0"), bpf.XDP_FLAGS_DRV_MODE))
    why = "another XDP program is on it, and what that redirects or drops is not seen"
    try:
        with Collector(lab) as collector:
            settings = collector.settings() | {"OTEL_LB_HOP_HOOK": "xdp"}
            with agents_on([node], lab.vips_path, settings) as (agent,):
                method = agent.part("interfaces")["detail"]["method"]
                assert ingress(agent) == {"eth0": "xdp", "net0": f"{method} in place of xdp: {why}"}
                assert agent.readyz().content["degraded"] == []
                for vip in VIPS:
                    assert all(result.ok for result in lab.connect(vip, 80, SENT))
                wait_for("log records", lambda: len(collector.logs()) >= SENT * len(VIPS))
            assert agent.stderr.count(f"net0 is watched by tc in place of xdp: {why}") == 1
        assert xdp_on(node) == {"net0": "xdp"}
        assert _by_origin(collector) == {"external": SENT * len(VIPS)}
    finally:
        os.close(link)
        os.close(program)


def test_becomes_an_uplink_and_ceases_to_be_one(lab: Lab) -> None:
    """A route over a gateway makes an interface an uplink: it goes over to XDP, and back when the route goes."""
    node = lab.nodes[0]
    lab.announce({vip: [node] for vip in VIPS})
    with Collector(lab) as collector:
        settings = collector.settings() | {"OTEL_LB_HOP_HOOK": "xdp"}
        with agents_on([node], lab.vips_path, settings) as (agent,):
            for _ in range(3):
                node.run(["ip", "route", "add", "203.0.113.0/24", "via", "172.30.0.1", "dev", "mgmt"])
                wait_for("XDP", lambda: ingress(agent) == dict.fromkeys(["eth0", "mgmt", "net0"], "xdp"))
                assert {*xdp_on(node)} == {"eth0", "mgmt", "net0"}
                node.run(["ip", "route", "del", "203.0.113.0/24"])
                wait_for("tc", lambda: ingress(agent) == dict.fromkeys(UPLINKS, "xdp"))
                assert {*xdp_on(node)} == {*UPLINKS}
                for vip in VIPS:
                    assert all(result.ok for result in lab.connect(vip, 80, SENT))
            wait_for("log records", lambda: len(collector.logs()) >= 3 * SENT * len(VIPS))
            assert agent.readyz().content["degraded"] == []
    assert _by_origin(collector) == {"external": 3 * SENT * len(VIPS)}


def test_killed(lab: Lab) -> None:
    """SIGKILL leaves no XDP program on any interface."""
    quiet = {f"OTEL_{name}_EXPORTER": "none" for name in ("METRICS", "LOGS", "TRACES")}
    agent = Agent(lab.nodes[0], lab.vips_path, quiet | {"OTEL_LB_HOP_HOOK": "xdp"})
    try:
        agent.wait_ready()
        assert xdp_on(agent.node) == dict.fromkeys(UPLINKS, "xdp")
        agent.process.send_signal(signal.SIGKILL)
        agent.process.wait()
        wait_for("the end of XDP", lambda: not xdp_on(agent.node))
    finally:
        agent.kill()


def _by_origin(collector: Collector) -> dict[str, float]:
    found: dict[str, float] = {}
    for series in collector.series("lb_hop.connections"):
        if series.value:
            origin = series.attributes["lb_hop.origin"]
            found[origin] = found.get(origin, 0) + series.value
    return found
