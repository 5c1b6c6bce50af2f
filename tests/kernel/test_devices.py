"""What a test run cannot do: packets on real devices, cut inside the IP header, with page fragments, without Ethernet.

The programs are attached as the agent attaches them: by tcx, or by clsact before Linux 6.6.
"""

from __future__ import annotations

import fcntl
import os
import socket
import struct
import subprocess
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from otel_lb_hop.core.layout import OriginCode
from otel_lb_hop.kernel import bpf
from otel_lb_hop.kernel.hooks import ClsactAttachment, Program, TcxAttachment
from otel_lb_hop.kernel.netlink import Netlink
from tests.kernel.oracle import CTAG, EVENT_OF, STAG, Kind, Segment
from tests.kernel.packets import ethernet
from tests.kernel.requirements import HAS_TCX, needs_kernel
from tests.kernel.test_parser import CHAINS, PACKETS, Watched, syn4, syn6

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.kernel.rig import Rig

pytestmark = [pytest.mark.root, needs_kernel]

TUNSETIFF, IFF_TUN, IFF_NO_PI = 0x400454CA, 1, 0x1000
SOL_PACKET, PACKET_VNET_HDR = 263, 15
SMALLEST_WITH_FRAGMENTS = 4096
"""packet_snd makes page fragments only of packets of a page and more."""


@contextmanager
def attached(rig: Rig, program: str, interface: int) -> Iterator[None]:
    """Attach a program to an interface for the length of a block."""
    netlink = Netlink()
    ours = Program(program, rig.loaded.programs[program], ingress="ingress" in program)
    try:
        attachment = TcxAttachment(interface, ours, None) if HAS_TCX else ClsactAttachment(netlink, interface, ours)
        yield
        attachment.detach()
    finally:
        netlink.close()


@contextmanager
def arriving(rig: Rig, hook: str) -> Iterator[None]:
    """Watch what comes in by the uplink for the length of a block: by tc, or by XDP in the stack or in the driver.

    In the driver of a veth a packet must fit into a page.
    """
    if hook == "tc":
        with attached(rig, "lbh_ingress", rig.uplink):
            yield
        return
    native = hook == "xdp"
    if native:
        set_mtu(1500)
    try:
        mode = bpf.XDP_FLAGS_DRV_MODE if native else bpf.XDP_FLAGS_SKB_MODE
        link = bpf.attach_xdp(rig.loaded.programs["lbh_xdp"], rig.uplink, mode)
        try:
            yield
        finally:
            os.close(link)
    finally:
        set_mtu(9000)


def set_mtu(mtu: int) -> None:
    """Set the MTU of both ends of the uplink."""
    for name in ("uplink", "far_uplink"):
        subprocess.run(["ip", "link", "set", name, "mtu", str(mtu)], check=True)


@contextmanager
def sender(interface: str, *, linear: int = 0) -> Iterator[Callable[[bytes], None]]:
    """Open a way to put frames on an interface; with `linear`, only so many bytes of each are in its linear part."""
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0) as channel:
        channel.bind((interface, 0))
        header = b""
        if linear:
            channel.setsockopt(SOL_PACKET, PACKET_VNET_HDR, 1)
            header = struct.pack("=BBHHHH", 0, 0, linear, 0, 0, 0)

        def send(frame: bytes) -> None:
            channel.send(header + frame)

        yield send


class Tun:
    """A device without Ethernet header; what is written to it comes in by it."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.fd = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC)
        fcntl.ioctl(self.fd, TUNSETIFF, struct.pack("16sH22x", name.encode(), IFF_TUN | IFF_NO_PI))
        subprocess.run(["ip", "link", "set", name, "mtu", "9000", "up"], check=True)
        self.index = socket.if_nametoindex(name)

    def write(self, packet: bytes) -> None:
        """Let a packet come in."""
        os.write(self.fd, packet)

    def close(self) -> None:
        """Take the device away."""
        os.close(self.fd)


@pytest.fixture
def watched(rig: Rig) -> Watched:
    """Give a test two VIP ports without backends."""
    return Watched(rig)


@pytest.fixture
def tun(rig: Rig) -> Iterator[Tun]:
    """Give a test a tunnel device that is an uplink."""
    if not Path("/dev/net/tun").exists():
        pytest.skip("this machine has no /dev/net/tun")
    made = Tun("tunnel")
    rig.tables.set_uplinks(frozenset({rig.uplink, made.index}))
    yield made
    made.close()


def settle(watched: Watched) -> None:
    """Wait until the packets that were sent have come in, and compare."""
    until = time.monotonic() + 2
    expected = sum(watched.connections.values()) + sum(watched.events.values())
    while time.monotonic() < until:
        snapshot = watched.rig.snapshot()
        seen = sum(row.connections[OriginCode.EXTERNAL] for row in snapshot.vips.values())
        if seen + sum(snapshot.events[event] for event in watched.events) >= expected:
            break
        time.sleep(0.001)
    watched.compare()


HOOKS = pytest.mark.parametrize("hook", ["tc", "xdp", "xdp-generic"])
JUMBO_HOOKS = pytest.mark.parametrize("hook", ["tc", "xdp-generic"])
NAMES = ["v4", "v4-most-options", "v4-udp", "v6-plain", "v6-hop", "v6-all", "v6-udp"]


@HOOKS
@pytest.mark.parametrize("name", NAMES)
def test_cut_at_every_byte(watched: Watched, name: str, hook: str) -> None:
    """Untagged frames cut at any byte, inside the IP header too, come in on a veth as the oracle says."""
    size = len(ethernet(PACKETS[name]()))
    with arriving(watched.rig, hook), sender("far_uplink") as send:
        for end in range(15, size + 1):
            frame = ethernet(PACKETS[name]())[:end]
            watched.note(frame)
            send(frame)
        settle(watched)


@pytest.mark.parametrize("name", NAMES)
def test_cut_on_a_tunnel(watched: Watched, tun: Tun, name: str) -> None:
    """Packets without Ethernet header, cut at any byte, come in on a tunnel as the oracle says."""
    protocol = 0x0800 if name.startswith("v4") else 0x86DD
    with attached(watched.rig, "lbh_ingress_l3", tun.index):
        for end in range(1, len(PACKETS[name]()) + 1):
            packet = PACKETS[name]()[:end]
            watched.note(packet, ethernet=False, protocol=protocol)
            tun.write(packet)
        settle(watched)


def test_leaves_by_a_tunnel(watched: Watched, tun: Tun) -> None:
    """Packets without Ethernet header leave as the oracle says, whatever their addresses are."""
    with (
        attached(watched.rig, "lbh_egress_l3", tun.index),
        socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, 0) as channel,
    ):
        for name, make in PACKETS.items():
            protocol = 0x0800 if name.startswith("v4") else 0x86DD
            packet = make()
            watched.note_leaving(packet, ethernet=False, protocol=protocol)
            channel.sendto(packet, (tun.name, protocol))
        settle(watched)
    assert all(watched.events[event] for event in EVENT_OF.values() if event is not EVENT_OF[Kind.TRUNCATED])


@JUMBO_HOOKS
@pytest.mark.parametrize("linear", [14, 20, 34, 41, 54, 60])
def test_page_fragments(watched: Watched, linear: int, hook: str) -> None:
    """Headers that lie in page fragments, wholly or from anywhere on, are read as if they did not."""
    with arriving(watched.rig, hook), sender("far_uplink", linear=linear) as send:
        for make in PACKETS.values():
            frame = ethernet(make())
            frame = frame.ljust(max(len(frame), SMALLEST_WITH_FRAGMENTS), b"\0")
            watched.note(frame)
            send(frame)
            settle(watched)


@JUMBO_HOOKS
@pytest.mark.parametrize("linear", [0, 14])
def test_far_into_a_packet(watched: Watched, linear: int, hook: str) -> None:
    """A TCP header is read if it begins up to 4,096 bytes into the packet, and not followed behind."""
    kinds = {}
    with arriving(watched.rig, hook), sender("far_uplink", linear=linear) as send:
        for length in range(244, 256):
            frame = ethernet(syn6(CHAINS["long"][0], CHAINS["dest"][0]._replace(length=length)) + bytes(100))
            kinds[length] = watched.note(frame)
            send(frame)
        settle(watched)
    assert [length for length, kind in kinds.items() if kind is Kind.EXTENSION] == list(range(249, 256))
    assert all(isinstance(kinds[length], Segment) for length in range(244, 249))


@pytest.mark.parametrize("tags", [(CTAG,), (STAG,), (STAG, CTAG), (CTAG, STAG, CTAG)])
@HOOKS
def test_tags(watched: Watched, tags: tuple[int, ...], hook: str) -> None:
    """The stack takes the outermost tag out of the frame before tc, but not before XDP; what is left is followed."""
    left = tags[1:] if hook == "tc" else tags
    with arriving(watched.rig, hook), sender("far_uplink") as send:
        for packet in (syn4(), syn6(), syn4(protocol=17)):
            watched.note(ethernet(packet, tags=left))
            send(ethernet(packet, tags=tags))
        settle(watched)
    followed = len(left) <= 2
    assert sorted(watched.connections.values()) == [followed, followed]


def test_leaves_by_an_ethernet_device(watched: Watched) -> None:
    """Frames leave as the oracle says, tags still in them."""
    with attached(watched.rig, "lbh_egress", watched.rig.peer), sender("far_uplink") as send:
        for make in PACKETS.values():
            for tags in ((), (CTAG,), (STAG, CTAG), (STAG, CTAG, CTAG)):
                frame = ethernet(make(), tags=tags)
                watched.note_leaving(frame)
                send(frame)
        settle(watched)
