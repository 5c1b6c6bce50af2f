"""The generator of forged packets: sends what it says, as many as it says, and never outside a lab."""

from __future__ import annotations

import socket
import struct
import subprocess
from contextlib import closing
from ipaddress import ip_address, ip_network
from typing import TYPE_CHECKING

import pytest

from otel_lb_hop.model import MAPPED_PREFIX, format_address, pack_address
from tests.kernel.oracle import Segment, parse
from tests.lab import Lab
from tests.lab.hostile import (
    ACK,
    SPOOFED,
    SYN,
    Hostile,
    Packets,
    Wire,
    at_the_uplink,
    equal_isns,
    flood,
    from_node,
    from_outside,
    guesses,
    scan,
    storm,
    vip_as_source,
)
from tests.lab.requirements import needs_lab

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.lab import Node

pytestmark = [pytest.mark.root, needs_lab]

VIPS = {4: "10.0.10.0", 6: "fd00:10::1"}
CLIENTS = {4: "192.168.0.77", 6: "fd00:192::77"}
COUNT, RATE = 997, 20_000
ETH_P_ALL = 3
FAMILY = pytest.mark.parametrize("family", VIPS)


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    """Build a lab whose router knows the VIPs."""
    with Lab() as built:
        built.announce(dict.fromkeys(VIPS.values(), built.nodes[:1]))
        yield built


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Hostile:
    """Compile it."""
    return Hostile(tmp_path_factory.mktemp("hostile"))


def arrived(node: Node, wire: Wire, hostile: Hostile, packets: Packets, *, seed: int = 1) -> list[Segment]:
    """Send, and read what came to the node from there for the destination, in order; every checksum must be right."""
    interface = "eth0" if wire.interface == "eth0" else "net0"
    header, number = ("ip6", 6) if ":" in packets.destination else ("ip", 4)
    # Conntrack takes what has a wrong checksum for invalid; it takes a SYN-ACK without a SYN for that too.
    valid = "ct state invalid" if packets.flags == SYN | ACK else "ct state new,established"
    counter = f"{valid} {header} daddr {packets.destination} counter"
    rules = f"chain late {{\ntype filter hook prerouting priority 0\n{counter}\n}}\n"
    # Router and node would send it to each other until its time is over.
    rules += f"chain end {{\ntype filter hook forward priority 0\n{header} daddr {packets.destination} drop\n}}"
    node.run(["nft", "-f", "-"], text=f"table inet seen {{\n{rules}\n}}\n")
    try:
        with closing(node.in_netns(lambda: _listener(interface))) as listener:
            assert hostile.send(wire, packets, COUNT, RATE, seed).packets == COUNT
            found: list[Segment] = []
            while len(found) < COUNT:
                frame = listener.recv(2_048)
                read = _read(frame, packets.transport)
                if read and read.destination == pack_address(packets.destination):
                    assert frame[14] >> 4 == number
                    found.append(read)
        listed = node.run(["nft", "list", "table", "inet", "seen"]).stdout
    finally:
        node.run(["nft", "delete", "table", "inet", "seen"])
    assert f"packets {COUNT} " in listed
    return found


def _listener(interface: str) -> socket.socket:
    listener = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 24)
    listener.bind((interface, ETH_P_ALL))
    listener.settimeout(20)
    return listener


def _read(frame: bytes, transport: str) -> Segment | None:
    """Read a frame; a UDP header stands for a segment with nothing but ports."""
    if transport == "tcp":
        segment = parse(frame, ethernet=True)
        return segment if isinstance(segment, Segment) else None
    is_ipv4 = frame[12:14] == b"\x08\x00"
    protocol, behind = (frame[23], 34) if is_ipv4 else (frame[20], 54)
    if protocol != socket.IPPROTO_UDP:
        return None
    mapped, size = (MAPPED_PREFIX, 4) if is_ipv4 else (b"", 16)
    ends = [mapped + frame[start : start + size] for start in (behind - 2 * size, behind - size)]
    ports = struct.unpack_from("!HH", frame, behind)
    return Segment(ends[0], ports[0], ends[1], ports[1], 0, 0, 0)


@FAMILY
@pytest.mark.parametrize("transport", ["tcp", "udp"])
def test_flood(lab: Lab, hostile: Hostile, family: int, transport: str) -> None:
    """Every packet arrives whole, each from a source of its own, and the same seed sends the same again."""
    found = arrived(lab.nodes[0], from_outside(lab), hostile, flood(VIPS[family], 80, transport))
    network = ip_network(SPOOFED[family])
    assert len({each.source for each in found}) == COUNT
    assert all(ip_address(format_address(each.source)) in network for each in found)
    assert {(each.destination_port, each.flags) for each in found} == {(80, SYN if transport == "tcp" else 0)}
    assert len({each.source_port for each in found}) > COUNT * 0.9
    if transport == "tcp":
        assert len({each.sequence for each in found}) > COUNT * 0.9


def test_the_same_seed_sends_the_same(lab: Lab, hostile: Hostile) -> None:
    """What is by chance is so by the seed alone."""
    first, again, other = (
        arrived(lab.nodes[0], from_outside(lab), hostile, flood(VIPS[4], 80), seed=seed) for seed in (5, 5, 6)
    )
    assert first == again
    assert not {*first} & {*other}


@FAMILY
def test_scan(lab: Lab, hostile: Hostile, family: int) -> None:
    """A SYN to each port from 1 on."""
    found = arrived(lab.nodes[0], from_outside(lab), hostile, scan(VIPS[family]))
    assert [each.destination_port for each in found] == [*range(1, COUNT + 1)]


@FAMILY
def test_one_of_a_kind(lab: Lab, hostile: Hostile, family: int) -> None:
    """One ISN for many clients, one SYN again and again, answers that nobody gave, and the VIP as a client."""
    node, vip, client = lab.nodes[0], VIPS[family], (CLIENTS[family], 4_000)
    uplink = at_the_uplink(lab, node)
    equal = arrived(node, uplink, hostile, equal_isns(vip, 80, 7))
    assert {each.sequence for each in equal} == {7}
    assert len({each.source for each in equal}) == COUNT
    for wire in (uplink, from_node(lab.nodes[1], node)):
        (same,) = {*arrived(node, wire, hostile, storm(vip, 80, client, 9))}
        assert same == Segment(pack_address(client[0]), 4_000, pack_address(vip), 80, 9, 0, SYN)
    guessed = arrived(node, uplink, hostile, guesses(vip, 80, client, 5))
    assert {each[:4] for each in guessed} == {(pack_address(vip), 80, pack_address(client[0]), 4_000)}
    assert {(each.acknowledgment, each.flags, each.whole) for each in guessed} == {(5, SYN | ACK, True)}
    claimed = arrived(node, uplink, hostile, vip_as_source(vip, 80))
    assert {(each.source, *each[2:4]) for each in claimed} == {(pack_address(vip), pack_address(vip), 80)}


def test_bounds(lab: Lab, hostile: Hostile) -> None:
    """It sends no more and no faster than it may, and nothing outside a lab."""
    wire = from_outside(lab)
    for count, rate in ((1_000_001, 1_000), (1, 200_001), (1, 0)):
        done = lab.client.run(hostile.command(wire, flood(VIPS[4], 80), count, rate), check=False)
        assert (done.returncode, done.stdout) == (2, "")
    words = hostile.command(wire._replace(interface="lo"), Packets("127.0.0.1", "127.0.0.1", 9, flags=SYN | ACK), 1, 1)
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert "in a laboratory only" in done.stderr
