"""Random inputs: packets made by the grammar of their protocols, most of them then spoilt.

A packet with random bytes in every field is thrown out by the first header. These are handshakes and datagrams that
the programs are waiting for, dressed as any network might dress them (tags, options, extension headers, fragments,
content, padding); then lengths are made to lie, bits flip, bytes go missing, come twice or from another packet.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, TypeVar

from otel_lb_hop.model import is_ipv4
from tests.kernel.crossing import sctp_init
from tests.kernel.oracle import (
    ACK,
    AUTHENTICATION,
    CTAG,
    CWR,
    DESTINATION,
    ECE,
    FRAGMENT,
    HOP_BY_HOP,
    IPV4,
    IPV6,
    PSH,
    ROUTING,
    RST,
    SCTP,
    STAG,
    SYN,
    TCP,
    UDP,
    URG,
)  # fmt: skip
from tests.kernel.packets import End, Extension, Flow, ethernet, ipv4, ipv6, tcp

if TYPE_CHECKING:
    import random
    from collections.abc import Sequence

    from tests.kernel.rig import Rig

T = TypeVar("T")

XDP = "lbh_xdp"
SHORTEST, LARGEST = 14, 3400
"""What BPF_PROG_TEST_RUN takes: an Ethernet header at least, a page at most with what the kernel keeps around it."""

BACKENDS = {
    4: (End.of("8.0.3.7", 8080), End.of("8.0.4.7", 8080), End.of("8.0.5.7", 8080)),
    6: tuple(End.of(f"2001:db8:86dd:{number}::7", 8080) for number in (3, 4, 5)),
}
"""Of each IP version: one on this node, one elsewhere, and one that no Service has."""
VIPS = {4: End.of("8.0.10.1", 80), 6: End.of("2001:db8:86dd:10::1", 80)}
LOCAL_PORT = 81
"""Another port of the VIPs: of policy Local, with a backend elsewhere only."""
DATAGRAM_PORT, LOCAL_DATAGRAM_PORT = 53, 54
CLIENTS = {4: End.of("8.0.1.0", 0), 6: End.of("2001:db8:86dd:1::", 0)}
SNATS = {4: End.of("8.0.2.1", 0), 6: End.of("2001:db8:86dd:2::1", 0)}

TCP_OPTIONS = (
    b"\2\4\5\xb4", b"\3\3\7", b"\4\2", b"\x08\x0a" + b"time" * 2, b"\5\x0a" + b"SACK" * 2, b"\1", b"\0",
    b"\x22\2", b"\x22\x0a" + b"cookie42", b"\x22\x12" + b"cookie42" * 2, b"\xfe\4\xf9\x89", b"\xfe\x0c\xf9\x89cookie42",
    b"\x13\x12" + b"MD5-" * 4, b"\x1d\x10\1\1" + b"auth" * 3, b"\x1e\x0c\0\x81" + b"mptcpkey", b"\x1c\4\0\x10",
    b"\xfd\6what", b"\2\0", b"\2\1", b"\3\xff\7", b"\x45",
)  # fmt: skip
"""IANA's TCP option kinds, Fast Open's request and cookies (RFC 7413) among them, and some with impossible lengths."""
IP_OPTIONS = (
    b"\1", b"\0", b"\x94\4\0\0", b"\7\7\4\0\0\0\0", b"\x44\x0c\5\0" + b"time" * 2, b"\x83\7\4\x08\0\1\7",
    b"\x89\7\4\x08\0\1\7", b"\x82\x0bsecret...", b"\x86\6\0\0\0\1", b"\x83\0", b"\x07\xff", b"\xff",
)  # fmt: skip
"""IANA's IPv4 option numbers, and some with impossible lengths."""
PAYLOADS = (b"", b"", b"", b"GET / HTTP/1.0\r\n\r\n", bytes(200), bytes(1460), bytes(2900))
OTHER_PROTOCOLS = (1, 2, 4, 41, 47, 50, 51, 58, 59, 89, 135, 139, 140, 255)
USUAL = (HOP_BY_HOP, ROUTING, DESTINATION, DESTINATION, FRAGMENT, AUTHENTICATION)
TYPES = (IPV4, IPV6, CTAG, STAG, 0x0806, 0x8847, 0x8864, 0x9100, 0x05DC)
BYTES = (0, 1, 4, 6, 17, 43, 44, 51, 60, 127, 128, 132, 255)


class Step(NamedTuple):
    """One run of a program."""

    program: str
    packet: bytes
    interface: int
    gso_size: int = 0


class Input(NamedTuple):
    """A packet whose fate is in question, and the plain ones that have to come before it."""

    before: tuple[Step, ...]
    last: Step


class Grammar:
    """Makes inputs from a random source."""

    def __init__(self, draw: random.Random, rig: Rig) -> None:
        self.draw = draw
        self._random = draw.random
        self._uplink, self._peer, self._pod = rig.uplink, rig.peer, rig.pod
        self._isn = draw.getrandbits(32)
        self._donor = b""

    def input(self) -> Input:
        """Make one."""
        while True:
            made = self._tcp_input() if self._random() < 0.75 else self._datagram_input()
            if is_taken(made.last):
                self._donor = made.last.packet
                return made

    def _pick(self, choices: Sequence[T]) -> T:
        return choices[int(self._random() * len(choices))]

    def _next_isn(self) -> int:
        self._isn = self._isn + 0x9E3779B1 & 0xFFFFFFFF
        return self._isn

    def _interface(self) -> int:
        return self._pick((self._uplink, self._uplink, self._peer, self._pod))

    def _flow(self) -> Flow:
        version = self._pick((4, 6))
        address = CLIENTS[version].address
        client = End(address[:-1] + self._pick(b"\5\6\7").to_bytes(1, "big"), self.draw.getrandbits(16))
        vip = VIPS[version]
        if self._random() < 0.2:
            vip = End(vip.address, self._pick((LOCAL_PORT, LOCAL_PORT, 82)))
        snat = SNATS[version]._replace(port=self.draw.getrandbits(16))
        return Flow(client, vip, snat, self._pick(BACKENDS[version]), self._next_isn())

    def _flags(self, usual: int) -> int:
        if self._random() < 0.6:
            return self.draw.getrandbits(8)
        return usual | self._pick((0, 0, ECE | CWR, ECE, PSH, URG, PSH | URG | CWR))

    def _tcp_input(self) -> Input:
        flow = self._flow()
        is_ethernet = self._random() < 0.7
        suffix = "" if is_ethernet else "_l3"
        early = self._pick(PAYLOADS) if self._random() < 0.2 else b""  # Fast Open
        syn = Step("lbh_ingress", flow.syn(data=early), self._interface())
        translated = Step("lbh_egress", flow.translated(), self._pod)
        before: tuple[Step, ...] = ()
        acknowledgment = flow.isn + 1 + (len(early) if self._random() < 0.8 else 0) & 0xFFFFFFFF
        kind = self._random()
        if kind < 0.5:
            name = "lbh_ingress"
            if kind < 0.08:  # sent again, or met again on another interface
                before = (syn,)
            if is_ethernet and self._random() < 0.4:
                name = XDP
            ends, numbers, usual = (flow.client, flow.vip), (flow.isn, 0), SYN
        elif kind < 0.72:
            name, before = "lbh_egress", (syn,)
            ends, numbers, usual = (flow.snat, flow.backend), (flow.isn, 0), SYN
        else:
            name, before = "lbh_egress", (syn, translated) if kind < 0.9 else (syn,)
            ends, numbers = (flow.vip, flow.client), (77, acknowledgment)
            usual = SYN | ACK if kind < 0.85 else RST | ACK
        header = tcp(ends[0].port, ends[1].port, *numbers, self._flags(usual), options=self._options(TCP_OPTIONS))
        if self._random() < 0.1:  # a data offset that lies
            header = header[:12] + bytes([self.draw.getrandbits(8)]) + header[13:]
        packet = self._dressed(ends, header + self._pick(PAYLOADS), TCP, is_ethernet=is_ethernet)
        gso_size = 1448 if self._random() < 0.05 else 0
        return Input(before, Step(name + suffix, packet, self._interface(), gso_size))

    def _datagram_input(self) -> Input:
        flow = self._flow()
        is_ethernet = self._random() < 0.7
        port = self._pick((DATAGRAM_PORT, DATAGRAM_PORT, LOCAL_DATAGRAM_PORT, 55))
        if self._random() < 0.5:
            protocol = UDP
            content = self._pick(PAYLOADS)
            size = 8 + len(content)
            if self._random() < 0.2:
                size = max(0, size + self._pick((-9, -8, -1, 1, 30)))
            ports = flow.client.port << 16 | port
            payload = ports.to_bytes(4, "big") + (size & 0xFFFF).to_bytes(2, "big") + b"\0\0" + content
        else:
            protocol = SCTP
            payload = sctp_init(flow.client.port, port, self._pick((1, 1, 1, 0, 2, 10)))
        ends = flow.client, flow.vip._replace(port=port)
        packet = self._dressed(ends, payload, protocol, is_ethernet=is_ethernet)
        return Input((), Step("lbh_datagram" if is_ethernet else "lbh_datagram_l3", packet, self._interface()))

    def _options(self, kinds: Sequence[bytes]) -> bytes:
        options = b""
        while self._random() < 0.6:
            option = self._pick(kinds)
            if len(options) + len(option) > 40:
                break
            options += option
        return options + bytes(-len(options) % 4)

    def _dressed(self, ends: tuple[End, End], payload: bytes, protocol: int, *, is_ethernet: bool) -> bytes:
        if self._random() < 0.05:
            protocol = self._pick((TCP, UDP, SCTP, *OTHER_PROTOCOLS))
        if is_ipv4(ends[0].address):
            packet, sized = self._ipv4(ends, payload, protocol), 2
        else:
            packet, sized = self._ipv6(ends, payload, protocol), 4
        if self._random() < 0.3:
            packet = self._lying(packet, sized)
        if self._random() < 0.1:
            packet += bytes(self._pick((1, 6, 18, 40)))  # padding
        if is_ethernet:
            chance = self._random()
            tags: tuple[int, ...] = ()
            if chance > 0.35:
                tags = (self._pick((CTAG, STAG)),) if chance < 0.65 else (STAG, CTAG)
            if chance > 0.95:
                tags = (STAG, CTAG, self._pick((CTAG, STAG)))
            packet = ethernet(packet, tags=tags)
            if self._random() < 0.02:
                packet = packet[:12] + self._pick(TYPES).to_bytes(2, "big") + packet[14:]
        return self._spoilt(packet[:LARGEST])

    def _ipv4(self, ends: tuple[End, End], payload: bytes, protocol: int) -> bytes:
        chance = self._random()
        fragment = 0 if chance < 0.5 else 0x4000 if chance < 0.7 else 0x2000 if chance < 0.85 else 0x2000 | 185
        if chance > 0.9:
            fragment = self.draw.getrandbits(16)
        options = self._options(IP_OPTIONS) if self._random() < 0.4 else b""
        return ipv4(ends[0].address, ends[1].address, payload, options=options, fragment=fragment, protocol=protocol)

    def _ipv6(self, ends: tuple[End, End], payload: bytes, protocol: int) -> bytes:
        chain: tuple[Extension, ...] = ()
        while self._random() < (0.65 if chain else 0.5):
            chain += (self._extension(),)
        return ipv6(ends[0].address, ends[1].address, payload, chain=chain, last=protocol)

    def _extension(self) -> Extension:
        number = self._pick(USUAL) if self._random() < 0.97 else self._pick(OTHER_PROTOCOLS)
        length = self._pick((0, 0, 1, 2, 4)) if self._random() < 0.95 else self.draw.getrandbits(8)
        offset_flags = self._pick((0, 0, 1, 6, 8, 0xFFF9)) if self._random() < 0.9 else self.draw.getrandbits(16)
        return Extension(number, length, offset_flags)

    def _lying(self, packet: bytes, at: int) -> bytes:
        claimed = int.from_bytes(packet[at : at + 2], "big") + self._pick((-40, -21, -20, -19, -8, -1, 1, 2, 8, 20))
        if self._random() < 0.2:
            claimed = self._pick((0, 19, 20, 39, 40, 0xFFFF))
        return packet[:at] + (claimed & 0xFFFF).to_bytes(2, "big") + packet[at + 2 :]

    def _spoilt(self, packet: bytes) -> bytes:
        chance = self._random()
        if chance < 0.5:
            return packet
        near = min(len(packet), 110)  # where all headers are, but for long chains
        if chance < 0.65:
            return packet[: int(self._random() * (len(packet) if chance < 0.52 else near))]
        at = 12 + int(self._random() * (near - 12)) if near > 12 else 0
        spoilt = bytearray(packet)
        if chance < 0.8:
            for _ in range(self._pick((1, 1, 1, 2, 3, 8))):
                spoilt[at] ^= 1 << int(self._random() * 8)
                at = min(12 + int(self._random() * near), len(spoilt) - 1)
        elif chance < 0.88:
            spoilt[at] = self._pick(BYTES) if self._random() < 0.7 else self.draw.getrandbits(8)
        else:
            self._displace(spoilt, at)
        return bytes(spoilt[:LARGEST])

    def _displace(self, spoilt: bytearray, at: int) -> None:
        chance = self._random()
        if chance < 0.4:
            spoilt[at:] = self._donor[int(self._random() * len(self._donor)) :]  # spliced with another
        elif chance < 0.6:
            del spoilt[at : at + self._pick((1, 2, 4, 8, 20))]
        elif chance < 0.8:
            spoilt[at:at] = spoilt[at : at + self._pick((4, 8, 20, 40))]
        elif chance < 0.9:
            spoilt[at:] = self.draw.randbytes(len(spoilt) - at)
        else:
            spoilt[12:12] = self._pick((CTAG, STAG)).to_bytes(2, "big") + b"\0\7"


def is_taken(step: Step) -> bool:
    """Whether BPF_PROG_TEST_RUN takes it: no short packet, and no EtherType of IP without a whole IP header."""
    header = {IPV4: 20, IPV6: 40}.get(int.from_bytes(step.packet[12:14], "big"), 0)
    return SHORTEST + header <= len(step.packet) <= LARGEST


def protocol_of(packet: bytes) -> int:
    """Name the skb->protocol that BPF_PROG_TEST_RUN makes of a packet (eth_type_trans): no length is one."""
    protocol = int.from_bytes(packet[12:14], "big")
    return protocol if protocol >= 0x0600 else 0x0004
