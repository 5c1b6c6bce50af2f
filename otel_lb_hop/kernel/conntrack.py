"""The socket that hears of new connections from conntrack, and the table by which their origin is told.

What is heard is counted by a program in the kernel, which lets nothing through to the socket: there is nothing to
read from it, and it wakes nobody.
"""

from __future__ import annotations

import errno
import socket
import struct
from pathlib import Path
from typing import TYPE_CHECKING

from otel_lb_hop.core.interfaces import Prefix
from otel_lb_hop.core.layout import PLACE, PREFIX, VIP_KEY, Place
from otel_lb_hop.errors import KernelError
from otel_lb_hop.kernel import dump
from otel_lb_hop.model import MAPPED_PREFIX

if TYPE_CHECKING:
    from collections.abc import Iterator
    from collections.abc import Set as AbstractSet

    from otel_lb_hop.kernel.bpf import Map

EVENTS_SYSCTL = Path("/proc/sys/net/netfilter/nf_conntrack_events")
"""Of the network namespace of whoever reads it."""

_NETLINK_NETFILTER = 12
_SOL_NETLINK = 270
_NETLINK_ADD_MEMBERSHIP = 1
_SO_ATTACH_BPF = 50
_GROUP_NEW = 1
"""NFNLGRP_CONNTRACK_NEW."""
_GET_STATS = 1 << 8 | 5
"""NFNL_SUBSYS_CTNETLINK and IPCTNL_MSG_CT_GET_STATS."""
_GET = 1 << 8 | 1
"""NFNL_SUBSYS_CTNETLINK and IPCTNL_MSG_CT_GET."""
_NEW = 1 << 8
"""NFNL_SUBSYS_CTNETLINK and IPCTNL_MSG_CT_NEW."""
_AS_NEWS = 0x400 | 0x200 | 2
"""NLM_F_CREATE, NLM_F_EXCL, and NLM_F_MULTI."""
_ANY_FAMILY = struct.pack("=BBH", socket.AF_UNSPEC, 0, 0)
"""struct nfgenmsg."""
_HEAD = dump.HEADER.size + len(_ANY_FAMILY)
_NEWS = (1, 2, 12)
"""CTA_TUPLE_ORIG, CTA_TUPLE_REPLY, CTA_ID: the program wants them in this order and nothing between."""
_ETHERNET_HEADER = 14
"""A test run takes it off first (net/bpf/test_run.c)."""


class ConntrackSocket:
    """Lets a socket filter see every new connection of this network namespace for as long as it is open.

    The kernel builds the messages only while somebody listens: this costs the whole node some time for each
    connection, of any kind. Raises KernelError with what to do about it.
    """

    def __init__(self, program_fd: int) -> None:
        try:
            _require_ctnetlink()
            self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_NETFILTER)
        except OSError as error:
            raise KernelError(_explain(error)) from error
        try:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 0)  # the kernel's smallest
            # A socket without a name of its own hears nothing: the kernel's is the same, zero.
            self._socket.bind((0, 0))
            # First the filter, then the messages: nothing gets past it.
            self._socket.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_BPF, program_fd)
            self._socket.setsockopt(_SOL_NETLINK, _NETLINK_ADD_MEMBERSHIP, _GROUP_NEW)
        except OSError as error:
            self._socket.close()
            raise KernelError(_explain(error)) from error

    def close(self) -> None:
        """Stop hearing."""
        self._socket.close()


def _require_ctnetlink() -> None:
    """Ask ctnetlink for a number: the kernel lets a socket join its groups whether it is there or not."""
    for _ in dump.ask(_NETLINK_NETFILTER, _GET_STATS, _ANY_FAMILY):
        pass


def _explain(error: OSError) -> str:
    if error.errno in {errno.EPERM, errno.EACCES}:
        hint = "CAP_NET_ADMIN is needed"
    elif error.errno in {errno.EINVAL, errno.EPROTONOSUPPORT, errno.EOPNOTSUPP}:
        hint = "the kernel module nf_conntrack_netlink is needed: modprobe nf_conntrack_netlink"
    else:
        hint = "the next try follows"
    return f"UDP and SCTP cannot be heard of from conntrack: {hint} ({error})"


def events_problem(sysctl: Path = EVENTS_SYSCTL) -> str | None:
    """Tell why conntrack would send no events though somebody listens; None if it sends them.

    The sysctl is read, and never written.
    """
    try:
        value = sysctl.read_text(encoding="ascii").strip()
    except FileNotFoundError:
        return "conntrack is not there, or without events: is the kernel module nf_conntrack loaded?"
    except OSError as error:
        return f"{sysctl} cannot be read: {error}"
    return None if value != "0" else "net.netfilter.nf_conntrack_events is 0: conntrack sends no events; set it to 2"


def list_entries(vip_ports: AbstractSet[bytes]) -> Iterator[bytes]:
    """Ask for all entries of conntrack; yields those to these VIP ports, each as lbh_conntrack takes it in a test run.

    Where an entry is not as expected it is left out. Raises OSError.
    """
    for kind, _, message in dump.ask(_NETLINK_NETFILTER, _GET, _ANY_FAMILY, flags=dump.REQUEST | dump.DUMP):
        if kind == _NEW and _vip_key(message) in vip_ports:
            yield bytes(_ETHERNET_HEADER) + _as_news(message)


def _as_news(message: bytes) -> bytes:
    """Write what an answer tells of an entry as its news would have told it, marked as one of many."""
    found = dump.attributes(message, _HEAD, whole=True)
    attributes = b"".join(dump.padded(found[kind]) for kind in _NEWS if kind in found)
    head = dump.HEADER.pack(_HEAD + len(attributes), _NEW, _AS_NEWS, 0, 0) + message[dump.HEADER.size : _HEAD]
    return head + attributes


def _vip_key(message: bytes) -> bytes | None:
    """Name the VIP port to which an entry's original tuple goes (ctnetlink_dump_tuples)."""
    ipv4 = message[16] == socket.AF_INET
    # Headers of the message, the tuple, its addresses and the source's; source; header of the destination.
    at = 32 + (4 if ipv4 else 16) + 4
    end = at + (4 if ipv4 else 16)
    if len(message) < end + 28:
        return None
    address = (MAPPED_PREFIX if ipv4 else b"") + message[at:end]
    return VIP_KEY.pack(address, message[end + 24 : end + 26], message[end + 8])


class Places:
    """The writer of the table of places; knows what it holds, so it writes only changes."""

    def __init__(self, table: Map) -> None:
        self._table = table
        self._written: dict[Prefix, Place] = {}
        for key in table.keys():  # noqa: SIM118 - no dict; what an agent before this one wrote
            if (value := table.get(key)) is not None:
                self._written[Prefix(*PREFIX.unpack(key))] = Place(*PLACE.unpack(value))

    def __len__(self) -> int:
        return len(self._written)

    def set(self, wanted: dict[Prefix, Place]) -> None:
        """Make the kernel hold exactly these; raises OSError if it refuses, and the next call goes on from there."""
        for prefix in self._written.keys() - wanted.keys():
            self._table.delete(PREFIX.pack(*prefix))
            del self._written[prefix]
        for prefix, place in wanted.items():
            if self._written.get(prefix) is not place:
                self._table.put(PREFIX.pack(*prefix), PLACE.pack(place))
                self._written[prefix] = place
