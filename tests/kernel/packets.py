"""Builds packets byte by byte. Every field can be set to what no sane sender would write.

All sources are in 8.0.0.0/16 or have 86dd as their third group: BPF_PROG_TEST_RUN takes bytes 12 and 13 of what it
is given for the EtherType (eth_type_trans), so an IP packet without Ethernet header gets the right skb->protocol
from its own source address, and the programs for such devices run on it as they do on a tunnel.
"""

from __future__ import annotations

import itertools
import random
from typing import NamedTuple

from otel_lb_hop.model import is_ipv4, pack_address
from tests.kernel.oracle import ACK, CTAG, FRAGMENT, IPV4, IPV6, RST, SYN, TCP

MACS = bytes.fromhex("02000000000102000000000a")

_isns = itertools.count(random.SystemRandom().getrandbits(32))


def next_isn() -> int:
    """Name an initial sequence number that no other test of this session uses."""
    return next(_isns) & 0xFFFFFFFF


def tcp(
    source_port: int,
    destination_port: int,
    sequence: int,
    acknowledgment: int = 0,
    flags: int = SYN,
    *,
    options: bytes = b"",
) -> bytes:
    """Build a TCP header (RFC 9293); options are whole words."""
    ports = source_port << 16 | destination_port
    return (
        ports.to_bytes(4, "big")
        + sequence.to_bytes(4, "big")
        + acknowledgment.to_bytes(4, "big")
        + bytes([0x50 + 4 * len(options), flags])
        + b"\xfa\xf0\0\0\0\0"
        + options
    )


def ipv4(
    source: bytes, destination: bytes, payload: bytes, *, options: bytes = b"", fragment: int = 0, protocol: int = TCP
) -> bytes:
    """Build an IPv4 header around a payload; `fragment` is the field with flags and offset."""
    words = 5 + len(options) // 4
    return (
        bytes([0x40 | words, 0])
        + (words * 4 + len(payload)).to_bytes(2, "big")
        + b"\0\1"
        + fragment.to_bytes(2, "big")
        + bytes([64, protocol, 0, 0])
        + source[12:]
        + destination[12:]
        + options
        + payload
    )


def checksum(data: bytes) -> bytes:
    """Compute the checksum of the Internet (RFC 1071) over data whose checksum field is zero."""
    total = sum(int.from_bytes(data[at : at + 2].ljust(2, b"\0"), "big") for at in range(0, len(data), 2))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return (total ^ 0xFFFF).to_bytes(2, "big")


def with_checksums(packet: bytes, header: int, end: int) -> bytes:
    """Fill in the checksums of an IP packet whose TCP segment lies from `header` to `end`."""
    made = bytearray(packet)
    is_four = packet[0] >> 4 == 4
    if is_four:
        size = (packet[0] & 15) * 4
        made[10:12] = b"\0\0"
        made[10:12] = checksum(bytes(made[:size]))
    made[header + 16 : header + 18] = b"\0\0"
    addresses = bytes(made[12:20] if is_four else made[8:40])
    pseudo = addresses + TCP.to_bytes(2, "big") + (end - header).to_bytes(2, "big")
    made[header + 16 : header + 18] = checksum(pseudo + bytes(made[header:end]))
    return bytes(made)


class Extension(NamedTuple):
    """An IPv6 extension header: its protocol number, its length field, for a fragment header offset and flags."""

    number: int
    length: int = 0
    offset_flags: int = 0

    def pack(self, following: int) -> bytes:
        """Write it as long as its length field says."""
        if self.number == FRAGMENT:
            return bytes([following, self.length]) + self.offset_flags.to_bytes(2, "big") + b"\0\0\0\1"
        size = (self.length + 2) * 4 if self.number == 51 else (self.length + 1) * 8
        return (bytes([following, self.length]) + bytes(6)).ljust(size, b"\1")


def ipv6(
    source: bytes, destination: bytes, payload: bytes, *, chain: tuple[Extension, ...] = (), last: int = TCP
) -> bytes:
    """Build an IPv6 header and its extension headers around a payload of protocol `last`."""
    numbers = [*(each.number for each in chain), last]
    headers = b"".join(each.pack(following) for each, following in zip(chain, numbers[1:], strict=True))
    size = len(headers) + len(payload)
    return b"\x60\0\0\0" + size.to_bytes(2, "big") + bytes([numbers[0], 64]) + source + destination + headers + payload


def ethernet(payload: bytes, *, tags: tuple[int, ...] = (), ethertype: int | None = None) -> bytes:
    """Put a packet into a frame; `tags` are the EtherTypes of VLAN tags, the outermost first."""
    if ethertype is None:
        ethertype = IPV6 if payload[:1] and payload[0] >> 4 == 6 else IPV4
    types = [*tags, ethertype]
    frame = MACS + types[0].to_bytes(2, "big")
    for number, following in enumerate(types[1:], start=100):
        frame += number.to_bytes(2, "big") + following.to_bytes(2, "big")
    return frame + payload


def tagged(frame: bytes, tag: int = CTAG) -> bytes:
    """Put one more VLAN tag outermost."""
    return frame[:12] + tag.to_bytes(2, "big") + b"\0\7" + frame[12:]


class End(NamedTuple):
    """An address and a port."""

    address: bytes
    port: int

    @classmethod
    def of(cls, address: str, port: int) -> End:
        """Read it from text."""
        return cls(pack_address(address), port)


class Wire(NamedTuple):
    """How packets stand on the wire of a device: with an Ethernet header or without."""

    is_ethernet: bool = True

    def segment(
        self,
        source: End,
        destination: End,
        sequence: int,
        acknowledgment: int = 0,
        flags: int = SYN,
        *,
        data: bytes = b"",
    ) -> bytes:
        """Build a packet with a TCP header without options."""
        header = tcp(source.port, destination.port, sequence, acknowledgment, flags)
        build = ipv4 if is_ipv4(source.address) else ipv6
        packet = build(source.address, destination.address, header + data)
        return ethernet(packet) if self.is_ethernet else packet


class Flow(NamedTuple):
    """One connection as the node sees it: before and after translation."""

    client: End
    vip: End
    snat: End
    backend: End
    isn: int
    wire: Wire = Wire()

    def syn(self, flags: int = SYN, *, data: bytes = b"") -> bytes:
        """Client to VIP."""
        return self.wire.segment(self.client, self.vip, self.isn, flags=flags, data=data)

    def translated(self, flags: int = SYN) -> bytes:
        """SNAT source to backend."""
        return self.wire.segment(self.snat, self.backend, self.isn, flags=flags)

    def answer(self, flags: int = SYN | ACK) -> bytes:
        """VIP to client."""
        return self.wire.segment(self.vip, self.client, 77, self.isn + 1 & 0xFFFFFFFF, flags)

    def refusal(self) -> bytes:
        """VIP to client, the connection refused."""
        return self.answer(RST | ACK)
