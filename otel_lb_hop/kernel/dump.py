"""Questions of plain netlink: one request, all messages of the answer, and what attributes a message has.

For lists of thousands, where pyroute2 spends fifty times as long on attributes that nobody asks for.
"""

from __future__ import annotations

import os
import socket
import struct
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

REQUEST = 1
"""NLM_F_REQUEST."""
DUMP = 0x300
"""NLM_F_DUMP."""
INTERRUPTED = 0x10
"""NLM_F_DUMP_INTR, in an answer: what was dumped changed meanwhile."""
HEADER = struct.Struct("=IHHII")
"""struct nlmsghdr: length, type, flags, sequence number, port."""
ATTRIBUTE = struct.Struct("=HH")
"""struct nlattr: length, type."""

_ERROR, _DONE = 2, 3
_TYPE_MASK = 0x3FFF
_ANSWER_SECONDS = 5
_LONGEST_ANSWER = 1 << 16


def ask(family: int, kind: int, body: bytes, *, flags: int = REQUEST) -> Iterator[tuple[int, int, bytes]]:
    """Send a request of this type to a netlink family; yields type, flags and bytes of each message, header included.

    Of a dump all messages up to the one that only ends it, and that one, because it has flags; of any other request
    those of the first answer. Raises OSError: what the kernel answered, or that it did not within seconds.
    """
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, family) as asking:
        asking.settimeout(_ANSWER_SECONDS)
        asking.sendto(HEADER.pack(HEADER.size + len(body), kind, flags, 1, 0) + body, (0, 0))
        while True:
            answer = asking.recv(_LONGEST_ANSWER)
            place = 0
            while place < len(answer):
                size, kind, told, *_ = HEADER.unpack_from(answer, place)
                if kind == _ERROR:
                    (code,) = struct.unpack_from("=i", answer, place + HEADER.size)
                    raise OSError(-code, os.strerror(-code))
                yield kind, told, answer[place : place + size]
                if kind == _DONE:
                    return
                place += _aligned(size)
            if not flags & DUMP:
                return


def attributes(message: bytes, place: int = 0, *, whole: bool = False) -> dict[int, bytes]:
    """Read the attributes that begin at `place`: type → value, or the `whole` attribute; one cut short ends it."""
    skipped = 0 if whole else ATTRIBUTE.size
    found = {}
    while place + ATTRIBUTE.size <= len(message):
        size, kind = ATTRIBUTE.unpack_from(message, place)
        if size < ATTRIBUTE.size:
            break
        found[kind & _TYPE_MASK] = message[place + skipped : place + size]
        place += size + 3 & ~3
    return found


def padded(attribute: bytes) -> bytes:
    """Fill an attribute up, so that another may follow it."""
    return attribute.ljust(_aligned(len(attribute)), b"\0")


def _aligned(size: int) -> int:
    return size + 3 & ~3
