"""Routes as the kernel tells them."""

from __future__ import annotations

import socket
import subprocess
from typing import TYPE_CHECKING

import pytest

from otel_lb_hop.core.interfaces import Prefix, Route, Way
from otel_lb_hop.kernel.netlink import Monitor, Netlink
from otel_lb_hop.model import pack_address
from tests.kernel.requirements import needs_kernel

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.kernel.rig import Rig

pytestmark = [pytest.mark.root, needs_kernel]

SETUP = """
link add routed type veth peer name far_routed
link set routed up
link set far_routed up
addr add 10.31.0.1/24 dev routed
addr add fd31::1/64 dev routed nodad
route add default via 10.31.0.2
route add 10.32.0.0/16 dev routed
route add 10.33.0.0/16 nexthop via 10.31.0.2 nexthop dev far_routed
route add 10.34.0.0/16 via 10.31.0.2 table 777
route add blackhole 10.35.0.0/16
route add 10.36.0.0/16 via inet6 fe80::9 dev routed
route add fd32::/48 via fd31::2
"""


@pytest.fixture
def routed(rig: Rig) -> Iterator[tuple[int, int]]:  # noqa: ARG001 - whose namespace the thread is in
    """Give a test a pair of interfaces with routes of every shape; answers their indexes."""
    subprocess.run(["ip", "-batch", "-"], input=SETUP, text=True, check=True)
    yield socket.if_nametoindex("routed"), socket.if_nametoindex("far_routed")
    subprocess.run(["ip", "link", "del", "routed"], check=True)
    subprocess.run(["ip", "route", "del", "blackhole", "10.35.0.0/16"], check=True)


def prefix(text: str, bits: int) -> Prefix:
    """Make a prefix."""
    return Prefix(bits + (0 if ":" in text else 96), pack_address(text))


def test_routes(routed: tuple[int, int]) -> None:
    """Unicast routes of all tables and the node's own addresses, with every way; no others."""
    here, far = routed
    netlink = Netlink()
    try:
        routes = netlink.routes()
    finally:
        netlink.close()
    direct, over = Way(here, gateway=False), Way(here, gateway=True)
    expected = [
        Route(None, own=False, main=True, ways=(over,)),
        Route(prefix("10.31.0.0", 24), own=False, main=True, ways=(direct,)),
        Route(prefix("10.31.0.1", 32), own=True, main=False, ways=(direct,)),
        Route(prefix("10.32.0.0", 16), own=False, main=True, ways=(direct,)),
        Route(prefix("10.33.0.0", 16), own=False, main=True, ways=(over, Way(far, gateway=False))),
        Route(prefix("10.34.0.0", 16), own=False, main=False, ways=(over,)),
        Route(prefix("10.36.0.0", 16), own=False, main=True, ways=(over,)),
        Route(prefix("fd31::", 64), own=False, main=True, ways=(direct,)),
        Route(prefix("fd31::1", 128), own=True, main=False, ways=(direct,)),
        Route(prefix("fd32::", 48), own=False, main=True, ways=(over,)),
    ]
    assert [each for each in expected if each not in routes] == []
    about = {each.prefix for each in expected}
    assert sorted(map(repr, expected)) == sorted(repr(each) for each in routes if each.prefix in about)
    assert prefix("10.35.0.0", 16) not in {each.prefix for each in routes}
    assert prefix("10.31.0.255", 32) not in {each.prefix for each in routes}


@pytest.mark.parametrize("change", ["addr add 10.37.0.1/32 dev routed", "route add 10.38.0.0/16 dev routed"])
@pytest.mark.usefixtures("routed")
def test_monitor_hears_of_addresses_and_routes(change: str) -> None:
    """An address or a route that appears is told of at once: places follow."""
    monitor = Monitor()
    try:
        while monitor.changed.wait(0.3):  # what the new interfaces still bring with them
            monitor.changed.clear()
        subprocess.run(["ip", *change.split()], check=True)
        assert monitor.changed.wait(2)
    finally:
        monitor.close()
