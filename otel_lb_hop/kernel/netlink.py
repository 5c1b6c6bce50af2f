"""Links and routes of this network namespace through pyroute2: read, watched, and clsact filters set."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import socket
import sys
import threading
from typing import TYPE_CHECKING, Any

from otel_lb_hop.core.interfaces import Link, Prefix, Route, Way
from otel_lb_hop.kernel import bpf
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
_PRIORITIES = range(1, 9)
"""Those that are tried; 1 is the first that there is."""
_OURS = "lbh_"
"""How the names of our programs begin."""
_UNICAST, _LOCAL = 1, 2
_TCA_BPF_ID = 11
_MAIN_TABLE, _LOCAL_TABLE = 254, 255
_IPV4_BITS = 96
"""How many bits more an IPv4 prefix has as one of mapped addresses."""
_ENOUGH_OF_A_NOTICE = 64


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

    @_os_errors()
    def links(self) -> list[Link]:
        """List all interfaces but the loopback ones."""
        return [_link(message) for message in self._socket.get_links() if not message["flags"] & 0x8]

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
        this program.
        """
        try:
            self._socket.tc("add", "clsact", ifindex)
            self._foreign_clsact.discard(ifindex)
        except NetlinkError as error:
            if error.code != errno.EEXIST:
                raise
            if not self._has_only_ours(ifindex):
                self._foreign_clsact.add(ifindex)
        ours = [message for message in self._filters(ifindex, parent) if _filter_name(message) == name]
        if not ours:
            self._add_first(ifindex, parent=parent, fd=fd, name=name)
        elif filter_program(ours[0]) != bpf.program_id(fd):
            place = {"handle": ours[0]["handle"], "prio": ours[0]["info"] >> 16}
            self._socket.tc(
                "replace-filter", "bpf", ifindex, fd=fd, name=name, parent=parent, direct_action=True, **place
            )

    @_os_errors()
    def delete_filter(self, ifindex: int, parent: str, name: str) -> None:
        """Remove our filter; the qdisc goes with the last filter on it."""
        for message in self._filters(ifindex, parent):
            if _filter_name(message) == name:
                self._socket.tc(
                    "del-filter", "bpf", ifindex, handle=message["handle"], parent=parent, prio=message["info"] >> 16
                )

    @_os_errors()
    def has_filter(self, ifindex: int, parent: str, name: str) -> bool:
        """Whether our filter is there."""
        return any(_filter_name(message) == name for message in self._filters(ifindex, parent))

    @_os_errors()
    def delete_empty_clsact(self, ifindex: int) -> None:
        """Remove the clsact qdisc of an interface if no filter is left on it and it is not somebody else's."""
        if ifindex not in self._foreign_clsact and not self._all_filters(ifindex):
            self._socket.tc("del", "clsact", ifindex)

    def _add_first(self, ifindex: int, **program: object) -> None:
        """Put a program before all others: of the same priority, the kernel runs the newest first.

        A priority takes filters of one kind and protocol only (EINVAL): another's at the first one, say of flower, is
        before ours then.
        """
        for priority in _PRIORITIES:
            try:
                self._socket.tc("add-filter", "bpf", ifindex, prio=priority, direct_action=True, **program)
            except NetlinkError as error:
                if error.code != errno.EINVAL or priority == _PRIORITIES[-1]:
                    raise
            else:
                if priority > _PRIORITIES[0]:
                    log.warning("interface %d: filters of another kind run before %s", ifindex, program["name"])
                return

    def _has_only_ours(self, ifindex: int) -> bool:
        """Whether a clsact qdisc has filters of an agent that was killed, and no others: it is that agent's."""
        filters = self._all_filters(ifindex)
        return bool(filters) and all((_filter_name(message) or "").startswith(_OURS) for message in filters)

    def _all_filters(self, ifindex: int) -> list[Any]:
        return [*self._filters(ifindex, INGRESS_PARENT), *self._filters(ifindex, EGRESS_PARENT)]

    def _filters(self, ifindex: int, parent: str) -> list[Any]:
        major, minor = parent.split(":")
        handle = int(major, 16) << 16 | int(minor, 16)
        return [message for message in self._socket.get_filters(index=ifindex, parent=handle) if message["handle"] != 0]


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


def _link(message: Any) -> Link:  # noqa: ANN401 - a pyroute2 message
    info = message.get("linkinfo")
    # A lower link in another namespace (a veth's peer) has an index of that namespace.
    foreign = message.get("link_netnsid") is not None
    return Link(
        index=message["index"],
        name=message.get("ifname"),
        kind=info.get("kind") if info else None,
        ethernet=message["ifi_type"] == ARPHRD_ETHER,
        lower=None if foreign else message.get("link"),
        master=message.get("master"),
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
