"""Builds messages of ctnetlink byte by byte, and reads them: what lbh_conntrack is compared with.

The numbers are those of include/uapi/linux/netlink.h, netfilter/nfnetlink.h and netfilter/nfnetlink_conntrack.h.
"""

from __future__ import annotations

import socket
import struct
from typing import TYPE_CHECKING, NamedTuple

from otel_lb_hop.model import MAPPED_PREFIX, is_ipv4
from tests.kernel.packets import End

if TYPE_CHECKING:
    from collections.abc import Callable

NEW = 1 << 8 | 0
"""NFNL_SUBSYS_CTNETLINK and IPCTNL_MSG_CT_NEW."""
CREATE_EXCLUSIVELY = 0x600
MULTI = 2
ORIGINAL, REPLY, STATUS, ID, ZONE = 1, 2, 3, 12, 18
"""CTA_TUPLE_ORIG and so on."""
IP, PROTO, TUPLE_ZONE = 1, 2, 3
"""CTA_TUPLE_IP and so on."""
NUMBER, SOURCE_PORT, DESTINATION_PORT, ICMP_ID, ICMP_TYPE, ICMP_CODE = 1, 2, 3, 4, 5, 6
"""CTA_PROTO_NUM and so on."""
NESTED = 0x8000
HEAD = struct.Struct("=IHHIIBBH")
UDP, SCTP, TCP = 17, 132, 6
PORTS = {UDP, SCTP, TCP}


class Tuple(NamedTuple):
    """One direction of a connection as conntrack has it."""

    source: End
    destination: End


def attribute(kind: int, content: bytes) -> bytes:
    """Write one attribute, filled up to four bytes."""
    size = 4 + len(content)
    return struct.pack("=HH", size, kind) + content + bytes(-size % 4)


def packed_tuple(kind: int, ends: Tuple, transport: int, *, zone: bytes = b"") -> bytes:
    """Write a tuple as ctnetlink_dump_tuples does."""
    first, cut = (1, 12) if is_ipv4(ends.source.address) else (3, 0)
    addresses = attribute(first, ends.source.address[cut:]) + attribute(first + 1, ends.destination.address[cut:])
    proto = attribute(NUMBER, bytes([transport]))
    if transport in PORTS:
        proto += attribute(SOURCE_PORT, ends.source.port.to_bytes(2, "big"))
        proto += attribute(DESTINATION_PORT, ends.destination.port.to_bytes(2, "big"))
    else:
        proto += attribute(ICMP_ID, b"\0\1") + attribute(ICMP_TYPE, b"\x08") + attribute(ICMP_CODE, b"\0")
    return attribute(kind | NESTED, attribute(IP | NESTED, addresses) + attribute(PROTO | NESTED, proto) + zone)


def message(
    original: Tuple,
    reply: Tuple,
    transport: int = UDP,
    *,
    kind: int = NEW,
    flags: int = CREATE_EXCLUSIVELY,
    port_id: int = 0,
    family: int | None = None,
    between: bytes = b"",
    zone: bytes = b"",
    listed: bool = False,
    entry: int | None = 7,
) -> bytes:
    """Write the message about a new connection; `between` stands between its tuples, `zone` in the original one.

    `listed`: as a part of a list that was asked for. `entry`: the entry's id, if it says one.
    """
    flags |= MULTI * listed
    if family is None:
        family = socket.AF_INET if is_ipv4(original.source.address) else socket.AF_INET6
    content = packed_tuple(ORIGINAL, original, transport, zone=zone) + between + packed_tuple(REPLY, reply, transport)
    content += b"" if entry is None else attribute(ID, entry.to_bytes(4, "big"))
    content += attribute(STATUS, b"\0\0\1\x88")
    return HEAD.pack(HEAD.size + len(content), kind, flags, 0, port_id, family, 0, 0) + content


class Unread(Exception):  # noqa: N818 - not an error: an answer
    """The message is not as the kernel writes it."""


class Told(NamedTuple):
    """What a message says."""

    transport: int
    original: Tuple
    reply: Tuple


def read(data: bytes, wanted: Callable[[Tuple, int], bool]) -> Told | None:
    """Read a message; None if it is about something else, or its original tuple not wanted; raises Unread."""
    if len(data) < HEAD.size:
        raise Unread
    size, kind, flags, _, port_id, family, _, _ = HEAD.unpack_from(data)
    if kind != NEW or flags & CREATE_EXCLUSIVELY != CREATE_EXCLUSIVELY or port_id:
        return None
    if size != len(data):
        raise Unread
    if family not in {socket.AF_INET, socket.AF_INET6}:
        return None
    original, behind = _find(data, HEAD.size, ORIGINAL, family)
    if original is None or not wanted(*original):
        return None
    reply, _ = _find(data, behind, REPLY, family)
    if reply is None:
        raise Unread
    return Told(original[1], original[0], reply[0])


def _find(data: bytes, at: int, wanted: int, family: int) -> tuple[tuple[Tuple, int] | None, int]:
    for _ in range(8):
        if at + 4 > len(data):
            raise Unread
        size, kind = struct.unpack_from("=HH", data, at)
        if size < 4 or at + size > len(data):
            raise Unread
        behind = at + (size + 3 & ~3)
        if kind & 0x3FFF == wanted:
            return _tuple(data, at + 4, at + size, family), behind
        at = behind
    raise Unread


def _tuple(data: bytes, at: int, end: int, family: int) -> tuple[Tuple, int] | None:
    first, length = (1, 4) if family == socket.AF_INET else (3, 16)
    _expect(data, at, IP, 4 + 2 * (4 + length))
    source, at = _leaf(data, at + 4, first, length)
    destination, at = _leaf(data, at, first + 1, length)
    if len(data) < at + 28:
        raise Unread
    nest, kind = struct.unpack_from("=HH", data, at)
    if kind & 0x3FFF != PROTO:
        raise Unread
    number, ports_at = _leaf(data, at + 4, NUMBER, 1)
    if number[0] not in PORTS:
        return None
    source_port, ports_at = _leaf(data, ports_at, SOURCE_PORT, 2)
    destination_port, _ = _leaf(data, ports_at, DESTINATION_PORT, 2)
    if nest < 28 or at + nest > end:
        raise Unread
    mapped = MAPPED_PREFIX if length == 4 else b""
    ends = [
        End(mapped + address, int.from_bytes(port, "big"))
        for address, port in ((source, source_port), (destination, destination_port))
    ]
    return Tuple(*ends), number[0]


def _leaf(data: bytes, at: int, kind: int, length: int) -> tuple[bytes, int]:
    _expect(data, at, kind, 4 + length)
    return data[at + 4 : at + 4 + length], at + 4 + (length + 3 & ~3)


def _expect(data: bytes, at: int, kind: int, size: int) -> None:
    if at + size > len(data) or struct.unpack_from("=HH", data, at) not in {
        (size, kind | flags) for flags in (0, 0x4000, 0x8000, 0xC000)
    }:
        raise Unread
