"""Forged packets in numbers: floods, scans, storms and guesses, put on a wire of the lab, each counted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from tests.lab.generator import compiled

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tests.lab import Lab, Node
    from tests.lab.host import Host

SOURCE = Path(__file__).with_name("hostile.c")
ANY, EVERY = "*", "+"
"""Another number in each packet, by chance; 1, 2, 3 and so on."""
SYN, RST, ACK = 0x02, 0x04, 0x10
SPOOFED = {4: "198.18.0.0/15", 6: "2001:db8:5::/64"}
"""Where forged sources are from, by family: RFC 2544 and RFC 3849, nobody's. 131,072 and more."""


class Wire(NamedTuple):
    """Where packets are put: an interface of a host, and the address of the interface at its other end."""

    host: Host
    interface: str
    mac: str


class Packets(NamedTuple):
    """What every packet has; a source with a prefix length is another one in each packet."""

    source: str
    destination: str
    port: int | str
    source_port: int | str = ANY
    isn: int | str = ANY
    ack: int | str = 0
    flags: int = SYN
    transport: str = "tcp"


def flood(vip: str, port: int, transport: str = "tcp") -> Packets:
    """Make SYNs (or datagrams) from sources that do not exist."""
    return Packets(_spoofed(vip), vip, port, transport=transport)


def equal_isns(vip: str, port: int, isn: int) -> Packets:
    """Make SYNs of many clients with one ISN."""
    return flood(vip, port)._replace(isn=isn)


def guesses(vip: str, port: int, client: tuple[str, int], ack: int | str, flags: int = SYN | ACK) -> Packets:
    """Forge the answer of a VIP port to a client's SYN; `ack` may be a guess."""
    return Packets(vip, client[0], client[1], port, ack=ack, flags=flags)


def scan(vip: str) -> Packets:
    """Knock at each port of a VIP, if 65,535 SYNs are sent."""
    return flood(vip, 0)._replace(port=EVERY)


def storm(vip: str, port: int, client: tuple[str, int], isn: int) -> Packets:
    """Repeat one SYN again and again."""
    return Packets(client[0], vip, port, client[1], isn)


def vip_as_source(vip: str, port: int) -> Packets:
    """Make SYNs to a VIP port that claim to come from the VIP."""
    return Packets(vip, vip, port)


class Sent(NamedTuple):
    """What was sent."""

    packets: int
    seconds: float


class Hostile:
    """The compiled program; `prefix` (taskset) is put before every run of it."""

    def __init__(self, folder: Path, prefix: Sequence[str] = ()) -> None:
        self._words = [*prefix, str(compiled(SOURCE, folder))]

    def command(self, wire: Wire, packets: Packets, count: int, rate: int, seed: int = 1) -> list[str]:
        """Write a command line."""
        ends = packets.source, packets.source_port, packets.destination, packets.port
        fields = packets.transport, *ends, packets.isn, packets.ack, packets.flags, count, rate, seed
        return [*self._words, wire.interface, wire.mac, *map(str, fields)]

    def send(self, wire: Wire, packets: Packets, count: int, rate: int, seed: int = 1) -> Sent:
        """Send so many packets, so many a second; all must be taken by the kernel. The same seed sends the same."""
        done = wire.host.run(self.command(wire, packets, count, rate, seed), timeout=count / rate + 60)
        sent, took_ns = map(int, done.stdout.split())
        return Sent(sent, took_ns / 1e9)


def from_outside(lab: Lab) -> Wire:
    """Put packets where the client's own begin."""
    return Wire(lab.client, "net0", _mac(lab.router, "client"))


def at_the_uplink(lab: Lab, node: Node) -> Wire:
    """Put packets in front of a node's uplink."""
    return Wire(lab.router, f"net{lab.nodes.index(node) + 1}", _mac(node, "net0"))


def from_node(sender: Node, node: Node) -> Wire:
    """Put packets where a node sends to another one."""
    return Wire(sender, "eth0", _mac(node, "eth0"))


def _mac(host: Host, interface: str) -> str:
    address: str = json.loads(host.run(["ip", "-json", "link", "show", interface]).stdout)[0]["address"]
    return address


def _spoofed(vip: str) -> str:
    return SPOOFED[6 if ":" in vip else 4]


def swallow_answers(lab: Lab) -> None:
    """Let what goes to forged sources vanish at the router, without a word."""
    for family, prefix in SPOOFED.items():
        lab.router.run(["ip", f"-{family}", "route", "replace", "blackhole", prefix])
