"""Devices on devices: bridges and macvlans. What passes several hooks on its way is one connection, timed at the first.

Bonds, VLANs and ipvlans the kernel here has not; to the hooks they are stacks as these are.
"""

from __future__ import annotations

import contextlib
import socket
import subprocess
from contextlib import ExitStack
from typing import TYPE_CHECKING, NamedTuple

import pytest

from otel_lb_hop.core.interfaces import find_uplinks, gateway_links
from otel_lb_hop.core.layout import Event, OriginCode, Verdict
from otel_lb_hop.kernel.hooks import Hooks
from otel_lb_hop.kernel.netlink import Netlink
from tests.kernel.crossing import CLIENT4, CLIENT6, NODE4, NODE6, POD4, POD6, TARGET, TRANSLATED, VIP4, VIP6, Crossing
from tests.kernel.packets import End
from tests.kernel.requirements import needs_kernel
from tests.kernel.rig import NODE, vip_port
from tests.lab.netns import in_netns
from tests.lab.waiting import wait_for

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.kernel.rig import Rig

pytestmark = [pytest.mark.root, needs_kernel]

SENT = 23
UPLINK_MAC, POD_MAC = "02:00:00:00:21:01", "02:00:00:00:22:01"


class Stack(NamedTuple):
    """How devices are made of the cable to the client (`uplink`) or to the pod (`to_pod`)."""

    commands: tuple[str, ...]
    top: str
    devices: frozenset[str]


def stack(*commands: str, top: str, devices: str) -> Stack:
    """Describe a stack."""
    return Stack(commands, top, frozenset(devices.split()))


UPLINKS = {
    "cable": stack(top="uplink", devices="uplink"),
    "macvlan": stack(
        "link set uplink address 02:00:00:00:99:01",
        f"link add mac0 link uplink address {UPLINK_MAC} type macvlan mode private",
        "link set mac0 up",
        top="mac0",
        devices="mac0 uplink",
    ),
    "bridge over macvlan": stack(
        "link add mac0 link uplink type macvlan mode passthru",
        f"link add br0 address {UPLINK_MAC} type bridge",
        "link set mac0 master br0 up",
        "link set br0 up",
        top="br0",
        devices="br0 mac0 uplink",
    ),
}
PODS = {
    "cable": stack(top="to_pod", devices="to_pod"),
    "bridge": stack(
        "link set to_pod address 02:00:00:00:99:02",
        f"link add cni0 address {POD_MAC} type bridge",
        "link set to_pod master cni0",
        "link set cni0 up",
        top="cni0",
        devices="cni0 to_pod",
    ),
}


def ip(netns: str, *commands: str) -> None:
    """Run commands of ip."""
    for family in ("-4", "-6"):
        chosen = [each for each in commands if (" fd2" in each) == (family == "-6")]
        words = ["ip", family, "-netns", netns, "-batch", "-"]
        subprocess.run(words, input="\n".join(chosen) + "\n", text=True, check=True)


def build(crossing: Crossing, uplink: Stack, pod: Stack) -> None:
    """Put the node's addresses and routes from its cables on stacks above them."""
    ip(crossing.node, *uplink.commands, *pod.commands)
    addresses = {
        ("uplink", uplink.top): (f"{NODE4}/24", f"{NODE6}/64"),
        ("to_pod", pod.top): ("10.22.0.1/24", "fd22::1/64"),
    }
    for (old, new), both in addresses.items():
        if old != new:
            ip(crossing.node, *(f"addr del {each} dev {old}" for each in both))
            ip(crossing.node, *(f"addr add {each} dev {new}" for each in both))
    if uplink.top != "uplink":
        ip(
            crossing.node,
            f"route replace default via {CLIENT4} dev {uplink.top}",
            f"route replace default via {CLIENT6} dev {uplink.top}",
        )


@contextlib.contextmanager
def listening(crossing: Crossing) -> Iterator[None]:
    """Let the pod take connections of both families."""

    def listen(family: socket.AddressFamily, address: str) -> socket.socket:
        taker = socket.socket(family, socket.SOCK_STREAM)
        taker.bind((address, TARGET))
        taker.listen(4 * SENT)
        return taker

    with (
        in_netns(crossing.pod, lambda: listen(socket.AF_INET, POD4)),
        in_netns(crossing.pod, lambda: listen(socket.AF_INET6, POD6)),
    ):
        yield


def connect(crossing: Crossing) -> None:
    """Make 23 connections of each family from the client to the VIPs."""

    def make() -> None:
        for _ in range(SENT):
            for vip in (VIP4, VIP6):
                socket.create_connection((vip, TRANSLATED), timeout=10).close()

    in_netns(crossing.client, make)


@pytest.mark.parametrize("hook", ["tc", "xdp-generic"])
@pytest.mark.parametrize("pod", PODS)
@pytest.mark.parametrize("uplink", UPLINKS)
def test_counted_once(rig: Rig, uplink: str, pod: str, hook: str) -> None:
    """Whatever a connection passes it is one, external, by the lowest device, answered, and its times are in order."""
    crossing = Crossing()
    with ExitStack() as ending:
        ending.callback(crossing.close)
        build(crossing, UPLINKS[uplink], PODS[pod])
        marked = rig.serve(
            vip_port(End.of(VIP4, TRANSLATED), (End.of(POD4, TARGET), NODE)),
            vip_port(End.of(VIP6, TRANSLATED), (End.of(POD6, TARGET), NODE)),
        )
        ending.enter_context(crossing.entered())
        netlink = Netlink()
        ending.callback(netlink.close)
        links = netlink.links()
        names = {link.index: link.name for link in links}
        uplinks = find_uplinks(links, *gateway_links(netlink.routes()))
        assert {names[index] for index in uplinks} == UPLINKS[uplink].devices
        assert set(names.values()) == UPLINKS[uplink].devices | PODS[pod].devices
        rig.tables.set_uplinks(uplinks)
        hooks = Hooks(rig.loaded.programs, netlink, uplink_hook=hook)
        ending.callback(hooks.close)
        hooks.reconcile(links, uplinks=uplinks)
        while hooks.waiting:
            hooks.reconcile(links, uplinks=uplinks)
        assert hooks.problems == {}
        ending.enter_context(listening(crossing))
        connect(crossing)
        wait_for("all answers", lambda: sum(row.answered for row in rig.snapshot().hops.values()) == 2 * SENT)
        snapshot = rig.snapshot()
        for each in marked:
            assert snapshot.vips[each.vip_id].connections[OriginCode.EXTERNAL] == SENT
            assert sum(snapshot.vips[each.vip_id].connections) == SENT
            assert snapshot.vips[each.vip_id].retransmits == 0
            hop = snapshot.hops[each.hops["none", NODE]]
            assert (hop.forwarded[OriginCode.EXTERNAL], hop.answered) == (SENT, SENT)
            assert (hop.forward.observations, hop.handshake.observations) == (SENT, SENT)
        assert snapshot.events[Event.NO_ROW] == 0
        records = rig.records()
        assert len(records) == 2 * SENT
        assert {names[record.in_ifindex] for record in records} == {"uplink"}
        assert {record.verdict for record in records} == {Verdict.ANSWERED}
        assert all(record.syn_ns < record.forward_ns < record.end_ns for record in records)
