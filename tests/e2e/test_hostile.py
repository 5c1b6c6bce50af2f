"""Forged traffic through a node with an agent: everything the kernel takes is counted, real connections go on.

What the node was sent is told by counters in its own firewall, before anything is translated, and not by the sender.
"""

from __future__ import annotations

import re
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING

import pytest

from otel_lb_hop.config import RECORD_RATE
from otel_lb_hop.model import Policy, Transport
from tests.e2e import truth
from tests.e2e.collector import Collector
from tests.e2e.conftest import TARGET_PORT
from tests.e2e.firewall import deafen, hear
from tests.lab.agent import agents_on
from tests.lab.hostile import (
    ACK,
    ANY,
    RST,
    SPOOFED,
    SYN,
    Hostile,
    at_the_uplink,
    equal_isns,
    flood,
    from_node,
    from_outside,
    guesses,
    scan,
    storm,
    swallow_answers,
    vip_as_source,
)
from tests.lab.requirements import needs_lab
from tests.lab.waiting import wait_for

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from otel_lb_hop.model import VipPort
    from tests.lab import Connection, Lab

pytestmark = [pytest.mark.root, pytest.mark.collector, needs_lab]

SENT = 23
FLOOD, RATE = 100_000, 25_000
FEW = 5_000
GUESSES = 1_000
PORTS = 65_535
VIP = {4: "10.0.60.{}", 6: "fd00:60::{}"}
IP = {4: "ip", 6: "ip6"}
NOBODY = {4: "198.18.0.9", 6: "2001:db8:5::9"}
"""One of the forged sources."""
UDP_PORT = 5353
IS_SYN = "tcp flags & (fin | syn | rst | ack) == syn"
EVERY_FAMILY = pytest.mark.parametrize("family", [4, 6])


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Hostile:
    """Compile the generator."""
    return Hostile(tmp_path_factory.mktemp("hostile"))


@pytest.fixture(autouse=True)
def quiet(lab: Lab) -> Iterator[None]:
    """Let no answer to a forged source trouble anybody, and leave neither entries nor rules behind."""
    swallow_answers(lab)
    truth.forget_connections(lab)
    for pod in lab.pods:
        pod.sysctl("net.ipv4.tcp_synack_retries", 0)  # what waits for forged clients is gone after a second
    yield
    for pod in lab.pods:
        hear(pod)
    lab.nodes[0].run(["nft", "-f", "-"], text="table inet hostile\ndelete table inet hostile\n")
    truth.forget_connections(lab)


def ignore_forged(lab: Lab, family: int) -> None:
    """Let the pods give no answer to forged sources."""
    for pod in lab.pods:
        deafen(pod, f"{IP[family]} saddr {SPOOFED[family]}")


def service(lab: Lab, family: int, number: int, transport: Transport = Transport.TCP, *, ends: bool = True) -> VipPort:
    """Describe a Service of policy Local with a pod on node1: a flood must not use up the ports for masquerading."""
    target = TARGET_PORT if transport is Transport.TCP else UDP_PORT
    return lab.vip_port(
        VIP[family].format(number), 80, service=f"web-{number}", policy=Policy.LOCAL, transport=transport,
        backends=lab.pods[:1] if ends else [], target_port=target,
    )  # fmt: skip


def apply(lab: Lab, family: int, *services: VipPort) -> None:
    """Let node1 take in all the traffic of these Services."""
    lab.apply(services, announce={VIP[family].format(number): lab.nodes[:1] for number in range(1, 10)})


def watch(lab: Lab, rules: Mapping[str, str], *, early: bool = True, ending: str = "") -> None:
    """Count on node1, before translation or (not early) at the very end of a packet's way, what matches each rule."""
    hook = "prerouting priority -400" if early else "postrouting priority 300"
    counters = "".join(f"counter {name} {{ }}\n" for name in rules)
    lines = "".join(f"{rule} counter name {name}\n" for name, rule in rules.items())
    chains = f"chain counted {{\ntype filter hook {hook}\n{lines}}}\n"
    chains += f"chain ended {{\ntype filter hook forward priority 0\n{ending}\n}}\n"
    text = f"table inet hostile\ndelete table inet hostile\ntable inet hostile {{\n{counters}{chains}}}\n"
    lab.nodes[0].run(["nft", "-f", "-"], text=text)


def watched(lab: Lab) -> dict[str, int]:
    """Read the counters."""
    listed = lab.nodes[0].run(["nft", "list", "counters", "table", "inet", "hostile"]).stdout
    return {name: int(count) for name, count in re.findall(r"counter (\w+) \{\s+packets (\d+)", listed)}


def not_routed_on(family: int) -> str:
    """Drop what is for a VIP and was not translated: router and node would send it to each other for long."""
    vips = VIP[family].format(0) + ("/24" if family == 4 else "/64")
    return f"{IP[family]} daddr {vips} {IS_SYN} drop"


def outcomes(collector: Collector, vip: str) -> Counter[tuple[str, str]]:
    """Add up the connections of a VIP by outcome and origin."""
    found: Counter[tuple[str, str]] = Counter()
    for each in collector.series("lb_hop.connections"):
        if each.attributes["server.address"] == vip and each.value:
            found[each.attributes["lb_hop.outcome"], each.attributes["lb_hop.origin"]] += int(each.value)
    return found


def total(collector: Collector, vip: str, metric: str) -> int:
    """Add up a counter of a VIP."""
    return int(sum(each.value for each in collector.series(metric) if each.attributes["server.address"] == vip))


def handshakes(collector: Collector, vip: str) -> tuple[int, float]:
    """Tell how many handshakes of a VIP were measured, and the seconds they took together."""
    found = [each.last.histogram for each in collector.series("lb_hop.handshake.duration")
             if each.attributes["server.address"] == vip]  # fmt: skip
    return sum(each.observations for each in found if each), sum(each.total for each in found if each)


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("family", "answered"), [(4, True), (4, False), (6, False)], ids=["v4-answered", "v4-ignored", "v6-ignored"]
)
def test_real_connections_through_a_flood(lab: Lab, hostile: Hostile, family: int, *, answered: bool) -> None:
    """100,000 forged SYNs to a VIP port, 25,000 a second: each is counted, and no real connection through it suffers.

    Ignored by the backend, they keep the handshake table full of open handshakes the whole time.
    """
    web, vip = service(lab, family, 1), VIP[family].format(1)
    apply(lab, family, web)
    if not answered:
        ignore_forged(lab, family)
    to = f"iifname net0 {IP[family]} daddr {vip} tcp dport 80 {IS_SYN}"
    saddr = f"{IP[family]} saddr"
    watch(lab, {"forged": f"{to} {saddr} {SPOOFED[family]}", "real": f"{to} {saddr} != {SPOOFED[family]}"})
    counts = truth.accepted_counts(lab)
    real: list[Connection] = []
    started = time.monotonic()
    with Collector(lab) as collector, agents_on(lab.nodes[:1], lab.vips_path, collector.settings()) as (agent,):
        with ThreadPoolExecutor(1) as pool:
            sending = pool.submit(hostile.send, from_outside(lab), flood(vip, 80), FLOOD, RATE)
            wait_for("the flood", lambda: watched(lab)["forged"])
            while not sending.done():
                real += lab.connect(vip, 80, SENT)
            sent = sending.result()
        agent.stop()
        seconds = time.monotonic() - started
    came = watched(lab)
    assert sent.packets == FLOOD
    assert len(real) >= 5 * SENT
    assert [each.error for each in real] == [""] * len(real)
    clients = [(each.client_address, each.client_port) for each in real]
    accepted = truth.accepted_since(lab, counts)
    assert sorted((each.peer_address, each.peer_port) for each in accepted) == sorted(clients)

    again = total(collector, vip, "lb_hop.syn.retransmits")
    assert came["real"] == len(real) + again
    connections = came["forged"] + len(real)
    assert outcomes(collector, vip) == {("forwarded", "external"): connections}
    measured, measured_seconds = handshakes(collector, vip)
    assert measured == (connections if answered else len(real))
    assert total(collector, vip, "lb_hop.handshake.failures") == 0
    kernel = agent.accounts()["kernel"]
    if answered:
        assert "no_verdict" not in kernel.dropped
    else:
        # From the SYN in to the SYN-ACK out on the node is within what each client waited.
        assert 0 < measured_seconds < sum(each.connect_seconds for each in real)

    assert kernel.seen == connections
    assert kernel.exported <= int(RECORD_RATE.default) * (seconds + 2)
    assert len(collector.logs()) == kernel.exported


@pytest.mark.timeout(300)
@EVERY_FAMILY
def test_other_ways_to_hurt(lab: Lab, hostile: Hostile, family: int) -> None:
    """One ISN for all, the VIP as source, a scan and a storm, one after the other: what is a connection is counted."""
    one_isn, as_source, scanned, stormed = (VIP[family].format(number) for number in range(1, 5))
    apply(lab, family, *(service(lab, family, number) for number in range(1, 5)))
    ignore_forged(lab, family)
    names = {"one_isn": one_isn, "as_source": as_source, "scanned": scanned, "stormed": stormed}
    to = f"{IS_SYN} {IP[family]} daddr"
    rules = {name: f"iifname net0 {to} {vip}" for name, vip in names.items()}
    watch(lab, rules | {"inside": f"iifname eth0 {to} {stormed}"}, ending=not_routed_on(family))
    outside, uplink = from_outside(lab), at_the_uplink(lab, lab.nodes[0])
    the_same = storm(stormed, 80, (NOBODY[family], 4_000), 77)
    with Collector(lab) as collector, agents_on(lab.nodes[:1], lab.vips_path, collector.settings()) as (agent,):
        with ThreadPoolExecutor(1) as pool:
            sending = pool.submit(hostile.send, outside, equal_isns(one_isn, 80, 4_711), FEW, FEW)
            real = lab.connect(one_isn, 80, 10 * SENT)
            sending.result()
        hostile.send(uplink, vip_as_source(as_source, 80), FEW, RATE)
        hostile.send(outside, scan(scanned), PORTS, RATE)
        hostile.send(uplink, the_same, FEW, RATE)
        hostile.send(from_node(lab.nodes[1], lab.nodes[0]), the_same, FEW, RATE)
        agent.stop()
    came = watched(lab)
    again = {name: total(collector, vip, "lb_hop.syn.retransmits") for name, vip in names.items()}
    assert [each.error for each in real] == [""] * len(real)
    assert outcomes(collector, one_isn) == {("forwarded", "external"): came["one_isn"] - again["one_isn"]}
    assert came["one_isn"] - again["one_isn"] == FEW + len(real)
    assert handshakes(collector, one_isn)[0] == len(real)
    assert outcomes(collector, as_source) == {("forwarded", "external"): came["as_source"] - again["as_source"]}
    assert came["as_source"] >= FEW
    assert outcomes(collector, scanned) == {("forwarded", "external"): 1}
    assert came["scanned"] == PORTS
    assert outcomes(collector, stormed) == {("forwarded", "external"): 1}
    # By the second interface within 200 ms it is the same packet; a pause between the two storms makes it one more.
    assert came["stormed"] - 1 <= again["stormed"] < came["stormed"] + came["inside"]
    assert came["inside"] == FEW
    assert agent.accounts()["kernel"].seen == sum(sum(outcomes(collector, vip).values()) for vip in names.values())


@EVERY_FAMILY
@pytest.mark.parametrize("invalid", ["dropped", "routed"])
def test_forged_answers(lab: Lab, hostile: Hostile, family: int, invalid: str) -> None:
    """A SYN-ACK or RST from outside in the name of the VIP ends no handshake on a node that drops what is invalid.

    kube-proxy's iptables mode has that rule. A node that routes such a packet on sends it as it would an answer of its
    own: whoever knows ISN and ports, and reaches the node's uplink, is believed. A guess is not.
    """
    vip, client = VIP[family].format(1), (NOBODY[family], 4_000)
    apply(lab, family, service(lab, family, 1))
    ignore_forged(lab, family)
    watch(lab, {"answers": f"iifname net0 {IP[family]} saddr {vip}"},
          ending="ct state invalid drop" if invalid == "dropped" else "")  # fmt: skip
    uplink = at_the_uplink(lab, lab.nodes[0])
    with Collector(lab) as collector, agents_on(lab.nodes[:1], lab.vips_path, collector.settings()) as (agent,):
        for number in range(2):
            hostile.send(uplink, storm(vip, 80, (client[0], 4_000 + number), 1_000), 1, 1)
        for flags in (SYN | ACK, RST | ACK):
            hostile.send(uplink, guesses(vip, 80, client, ANY, flags), GUESSES, RATE)
            hostile.send(uplink, guesses(vip, 80, client, 1_000, flags), 1, 1)
        hostile.send(uplink, guesses(vip, 80, client, 1_001), 1, 1)
        hostile.send(uplink, guesses(vip, 80, (client[0], 4_001), 1_001, RST | ACK), 1, 1)
        agent.stop()
    believed = int(invalid == "routed")
    assert watched(lab)["answers"] == 2 * GUESSES + 4
    assert outcomes(collector, vip) == {("forwarded", "external"): 2}
    assert handshakes(collector, vip)[0] == believed
    assert total(collector, vip, "lb_hop.handshake.failures") == believed


@EVERY_FAMILY
def test_flood_of_datagrams(lab: Lab, hostile: Hostile, family: int) -> None:
    """Forged datagrams to a VIP port with endpoints and to one without: each flow that the kernel takes is counted."""
    served, unserved = VIP[family].format(1), VIP[family].format(2)
    lab.pods[0].serve_udp(UDP_PORT + family)
    backends = lab.vip_port(served, 80, service="served", transport=Transport.UDP, policy=Policy.LOCAL,
                            backends=lab.pods[:1], target_port=UDP_PORT + family)  # fmt: skip
    apply(lab, family, backends, service(lab, family, 2, Transport.UDP, ends=False))
    ignore_forged(lab, family)
    pod = lab.pods[0].address4 if family == 4 else lab.pods[0].address6
    watch(lab, {"new": f"ct state new ct direction original {IP[family]} daddr {pod} udp dport {UDP_PORT + family}"},
          early=False)  # fmt: skip
    send = partial(hostile.send, from_outside(lab), count=4 * FEW, rate=RATE)
    with Collector(lab) as collector, agents_on(lab.nodes[:1], lab.vips_path, collector.settings()) as (agent,):
        with ThreadPoolExecutor(1) as pool:
            sending = pool.submit(send, flood(served, 80, "udp"))
            real = lab.client.send_udp(served, 80, SENT)
            sending.result()
        assert send(flood(unserved, 80, "udp")).packets == 4 * FEW
        agent.stop()
    assert [each.error for each in real] == [""] * SENT
    assert outcomes(collector, served) == {("forwarded", "external"): watched(lab)["new"]}
    assert watched(lab)["new"] > 3 * FEW + SENT
    assert outcomes(collector, unserved) == {("no_endpoints", "external"): 4 * FEW}
    kernel = agent.accounts()["kernel"]
    assert kernel.seen == watched(lab)["new"] + 4 * FEW
    assert len(collector.logs()) == kernel.exported < kernel.seen
