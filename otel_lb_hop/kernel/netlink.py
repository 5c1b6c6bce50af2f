"""Links and routes of this network namespace through pyroute2: read, watched, and clsact filters set."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import socket
import struct
import sys
import threading
from typing import TYPE_CHECKING, Any

from otel_lb_hop.core.interfaces import Link, Prefix, Route, Way
from otel_lb_hop.kernel import bpf, dump
from otel_lb_hop.model import pack_address
from otel_lb_hop.slim_import import without_package_init

with without_package_init("pyroute2"):
    from pyroute2.iproute.linux import IPRoute
    from pyroute2.netlink.exceptions import NetlinkError
    from pyroute2.netlink.rtnl import RTMGRP_IPV4_ROUTE, RTMGRP_IPV6_ROUTE, RTMGRP_LINK

if TYPE_CHECKING:
    from collections.abc import Iterator

log = logging.getLogger(__name__)

ARPHRD_ETHER = 1
INGRESS_PARENT = "ffff:fff2"
EGRESS_PARENT = "ffff:fff3"
_OURS = "lbh_"
"""How the names of our programs begin."""
_UNICAST, _LOCAL = 1, 2
_TCA_BPF_ID = 11
_MAIN_TABLE, _LOCAL_TABLE = 254, 255
_IPV4_BITS = 96
"""How many bits more an IPv4 prefix has as one of mapped addresses."""
_ENOUGH_OF_A_NOTICE = 64

_ALL_PROTOCOLS = socket.htons(3)
"""ETH_P_ALL as a filter's protocol."""
_CLSACT_HANDLE = 0xFFFF0000
"""Of the qdisc clsact, and of the qdisc ingress as well: an interface has one of them."""
_GET_LINK, _NEW_LINK = 18, 16
_DUMP_TRIES = 5
_SKIP_STATS = 1 << 3
"""RTEXT_FILTER_SKIP_STATS."""
_LINK_HEAD = struct.Struct("=BxHiII")
"""struct ifinfomsg."""
_NAME, _LOWER, _MASTER, _INFO, _EXT_MASK, _NETNS = 3, 5, 10, 18, 29, 37
"""IFLA_IFNAME, IFLA_LINK, IFLA_MASTER, IFLA_LINKINFO, IFLA_EXT_MASK, IFLA_LINK_NETNSID."""
_INFO_KIND = 1
_LOOPBACK = 1 << 3
"""IFF_LOOPBACK."""


@contextlib.contextmanager
def _os_errors() -> Iterator[None]:
    """Let a refusal of the kernel be the OSError that it is."""
    try:
        yield
    except NetlinkError as error:
        raise OSError(error.code, os.strerror(error.code)) from error


class Netlink:
    """One rtnetlink socket for questions and changes. Not for use by two threads at once.

    What the kernel refuses is raised as OSError.
    """

    def __init__(self) -> None:
        self._socket = IPRoute()
        self._foreign_clsact: set[int] = set()
        """Interfaces whose clsact qdisc is somebody else's."""

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()

    def links(self) -> list[Link]:
        """List all interfaces but the loopback ones.

        Read by hand: where there are hundreds of pods, pyroute2 takes fifty times as long over all their attributes.
        """
        for _ in range(_DUMP_TRIES):
            links, whole = _dump_links()
            if whole:
                break
        # Else they change faster than they can be read; the news of the last change is still to come.
        return links

    @_os_errors()
    def routes(self) -> list[Route]:
        """List the unicast routes of all tables, and the addresses of this node (the local table)."""
        return [
            _route(message)
            for message in self._socket.get_routes()
            if message["family"] in {socket.AF_INET, socket.AF_INET6}
            and (message["type"] == _UNICAST or (message["type"] == _LOCAL and message.get("table") == _LOCAL_TABLE))
        ]

    @_os_errors()
    def add_filter(self, ifindex: int, parent: str, fd: int, name: str) -> None:
        """Attach a tc program in direct-action mode on the clsact qdisc, which is added if need be.

        A filter of ours that an agent before this one left is replaced, with no packet in between, or kept if it has
        this program. A new one goes as far to the front as other filters let it.
        """
        try:
            self._socket.tc("add", "clsact", ifindex)
            self._foreign_clsact.discard(ifindex)
        except NetlinkError as error:
            if error.code != errno.EEXIST:
                raise
            self._require_clsact(ifindex)
            if not self._has_only_ours(ifindex):
                self._foreign_clsact.add(ifindex)
        ours = [message for message in self._filters(ifindex, parent) if _filter_name(message) == name]
        if ours and filter_program(ours[0]) == bpf.program_id(fd):
            return
        if ours:
            place = {"handle": ours[0]["handle"], "prio": ours[0]["info"] >> 16}
        else:
            place = {"prio": self._first_priority(ifindex, parent)}
        command = "replace-filter" if ours else "add-filter"
        self._socket.tc(command, "bpf", ifindex, fd=fd, name=name, parent=parent, direct_action=True, **place)

    @_os_errors()
    def delete_filter(self, ifindex: int, parent: str, name: str) -> None:
        """Remove our filter; the qdisc goes with the last filter on it."""
        for message in self._filters(ifindex, parent):
            if _filter_name(message) == name:
                self._socket.tc(
                    "del-filter", "bpf", ifindex, handle=message["handle"], parent=parent, prio=message["info"] >> 16
                )

    @_os_errors()
    def filters(self, ifindex: int, parent: str) -> list[str]:
        """Name the filters of one side in the order they run: BPF programs by their names, others by their kinds."""
        return [_filter_name(each) or each.get_attr("TCA_KIND") for each in self._filters(ifindex, parent)]

    @_os_errors()
    def delete_empty_clsact(self, ifindex: int) -> None:
        """Remove the clsact qdisc of an interface if no filter is left on it and it is not somebody else's."""
        if ifindex not in self._foreign_clsact and not self._both_sides(ifindex):
            self._socket.tc("del", "clsact", ifindex)

    def _has_only_ours(self, ifindex: int) -> bool:
        """Whether a clsact qdisc has filters of an agent that was killed, and no others: it is that agent's."""
        filters = self._both_sides(ifindex)
        return bool(filters) and all((_filter_name(message) or "").startswith(_OURS) for message in filters)

    def _both_sides(self, ifindex: int) -> list[Any]:
        return [*self._filters(ifindex, INGRESS_PARENT), *self._filters(ifindex, EGRESS_PARENT)]

    def _require_clsact(self, ifindex: int) -> None:
        """Refuse the qdisc ingress in the place of clsact: it would run the filters for egress on ingress."""
        for message in self._socket.get_qdiscs(index=ifindex):
            if message["handle"] == _CLSACT_HANDLE and message.get_attr("TCA_KIND") != "clsact":
                raise OSError(
                    errno.EBUSY, "it has the qdisc ingress, which leaves no room for clsact and so none to watch egress"
                )

    def _first_priority(self, ifindex: int, parent: str) -> int:
        """Find the first priority that is free, or of BPF filters: all filters of one have one kind and protocol."""
        taken = {
            message["info"] >> 16
            for message in self._all_filters(ifindex, parent)
            if message.get_attr("TCA_KIND") != "bpf" or message["info"] & 0xFFFF != _ALL_PROTOCOLS
        }
        return next(priority for priority in range(1, 1 << 16) if priority not in taken)

    def _filters(self, ifindex: int, parent: str) -> list[Any]:
        # One without a handle stands for all of its priority.
        return [message for message in self._all_filters(ifindex, parent) if message["handle"] != 0]

    def _all_filters(self, ifindex: int, parent: str) -> list[Any]:
        major, minor = parent.split(":")
        handle = int(major, 16) << 16 | int(minor, 16)
        return list(self._socket.get_filters(index=ifindex, parent=handle))


def _filter_name(message: Any) -> str | None:  # noqa: ANN401 - a pyroute2 message
    options = message.get_attr("TCA_OPTIONS")
    return options.get_attr("TCA_BPF_NAME") if options else None


def filter_program(message: Any) -> int | None:  # noqa: ANN401 - a pyroute2 message
    """Tell the id of the program of a filter; pyroute2 0.9.7 does not know the attribute."""
    for name, value in message.get_attr("TCA_OPTIONS")["attrs"]:
        if name == "TCA_BPF_ID":
            return int(value)
        if name == "UNKNOWN" and value["header"]["type"] == _TCA_BPF_ID:
            return int.from_bytes(value.data[value.offset + 4 : value.offset + 8], sys.byteorder)
    return None


def _has_gateway(route: Any) -> bool:  # noqa: ANN401 - a pyroute2 message
    return bool(route.get("gateway") or route.get("via"))


def _route(message: Any) -> Route:  # noqa: ANN401 - a pyroute2 message
    bits = message["dst_len"]
    ipv4 = message["family"] == socket.AF_INET
    prefix = Prefix(bits + _IPV4_BITS * ipv4, pack_address(message.get("dst"))) if bits else None
    ways = [Way(hop["oif"], gateway=_has_gateway(hop)) for hop in message.get("multipath") or ()]
    if message.get("oif"):
        ways.append(Way(message.get("oif"), gateway=_has_gateway(message)))
    return Route(
        prefix=prefix,
        own=message["type"] == _LOCAL,
        main=message["type"] == _UNICAST and message.get("table") == _MAIN_TABLE,
        ways=tuple(ways),
    )


def _dump_links() -> tuple[list[Link], bool]:
    """Ask for all links; answers also whether none came, went or changed meanwhile. Raises OSError."""
    links: list[Link] = []
    whole = True
    wish = dump.ATTRIBUTE.pack(8, _EXT_MASK) + struct.pack("=I", _SKIP_STATS)
    body = _LINK_HEAD.pack(socket.AF_UNSPEC, 0, 0, 0, 0) + wish
    for kind, flags, message in dump.ask(socket.NETLINK_ROUTE, _GET_LINK, body, flags=dump.REQUEST | dump.DUMP):
        whole = whole and not flags & dump.INTERRUPTED
        if kind == _NEW_LINK and (link := _link(message)):
            links.append(link)
    return links, whole


def _link(message: bytes) -> Link | None:
    """Read a message about a link; None if it is a loopback."""
    _, kind, index, flags, _ = _LINK_HEAD.unpack_from(message, dump.HEADER.size)
    if flags & _LOOPBACK:
        return None
    found = dump.attributes(message, dump.HEADER.size + _LINK_HEAD.size)
    numbers = {each: int.from_bytes(found[each], sys.byteorder) for each in (_LOWER, _MASTER) if each in found}
    info = dump.attributes(found[_INFO]) if _INFO in found else {}
    return Link(
        index=index,
        name=os.fsdecode(found[_NAME].rstrip(b"\0")),
        kind=info[_INFO_KIND].rstrip(b"\0").decode() if _INFO_KIND in info else None,
        ethernet=kind == ARPHRD_ETHER,
        # A lower link in another namespace (a veth's peer) has an index of that namespace.
        lower=None if _NETNS in found else numbers.get(_LOWER),
        master=numbers.get(_MASTER),
    )


class Monitor:
    """Tells that a link or a route changed: `changed` is set by a thread that sleeps on a netlink socket.

    A plain socket, because one of pyroute2 hears nothing in another thread than the one that bound it.
    """

    def __init__(self) -> None:
        self.changed = threading.Event()
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE)
        self._socket.bind((0, RTMGRP_LINK | RTMGRP_IPV4_ROUTE | RTMGRP_IPV6_ROUTE))
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="netlink", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._closed.is_set():
            try:
                self._socket.recv(_ENOUGH_OF_A_NOTICE)
            except OSError as error:
                if self._closed.is_set():
                    return
                # Lost notices (ENOBUFS) are made good by reading everything anew.
                log.debug("netlink monitor: %s", error)
            self.changed.set()

    def close(self) -> None:
        """Stop watching."""
        self._closed.set()
        self._socket.close()
