"""Which interfaces lead out of the cluster, and which addresses are inside."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from otel_lb_hop.core.interfaces import Link, Prefix, Route, Way, find_places, find_uplinks, gateway_links
from otel_lb_hop.core.layout import Place
from otel_lb_hop.model import pack_address


def link(index: int, name: str, kind: str | None = None, lower: int | None = None, master: int | None = None) -> Link:
    """Make an interface."""
    return Link(index, name, kind, ethernet=True, lower=lower, master=master)


ETH0, ETH1 = link(2, "eth0"), link(3, "eth1")
POD1, POD2 = link(20, "veth1", "veth"), link(21, "cali2", "veth")

CASES = {
    "the default route's interface": ([ETH0, ETH1, POD1], {2}, {"eth0"}),
    "every interface with a gateway": ([ETH0, ETH1, POD1], {2, 3}, {"eth0", "eth1"}),
    "no gateway at all": ([ETH0, POD1], set(), set()),
    "VLAN on a bond": (
        [
            link(2, "eth0", master=4),
            link(3, "eth1", master=4),
            link(4, "bond0", "bond"),
            link(5, "bond0.100", "vlan", lower=4),
            link(6, "bond0.200", "vlan", lower=4),
            POD1,
        ],
        {5},
        {"bond0.100", "bond0", "eth0", "eth1"},
    ),
    "bridge with the wire and pods": (
        [link(2, "eth0", master=4), link(4, "br0", "bridge"), link(20, "veth1", "veth", master=4), POD2],
        {4},
        {"br0", "eth0"},
    ),
    "bridge over a bond's VLAN": (
        [
            link(2, "eth0", master=4),
            link(4, "bond0", "bond"),
            link(5, "bond0.7", "vlan", lower=4, master=6),
            link(6, "br0", "bridge"),
            link(20, "tap0", "tun", master=6),
        ],
        {6},
        {"br0", "bond0.7", "bond0", "eth0"},
    ),
    "pods' own bridge has routes but no gateway": (
        [ETH0, link(9, "cni0", "bridge"), link(20, "veth1", "veth", master=9)],
        {2},
        {"eth0"},
    ),
    "macvlan": ([ETH0, link(8, "macvlan0", "macvlan", lower=2)], {8}, {"macvlan0", "eth0"}),
    "what stands on an uplink is none": ([ETH0, link(5, "eth0.5", "vlan", lower=2)], {2}, {"eth0"}),
    "an uplink's master is none": ([link(2, "eth0", master=7), link(7, "vrf-blue", "vrf")], {2}, {"eth0"}),
    "veth as uplink, as in a lab": ([link(2, "eth0", "veth", lower=3), ETH1], {2}, {"eth0"}),
    "an interface that is gone": ([ETH0], {2, 99}, {"eth0"}),
    "only an interface that is gone": ([ETH0], {99}, set()),
    "index 0 of a route without an interface": ([ETH0], {0, 2}, {"eth0"}),
    "a lower interface that is not here": ([link(5, "eth0.5", "vlan", lower=99)], {5}, {"eth0.5"}),
    "a ring of lower interfaces ends": (
        [link(2, "a", "vlan", lower=3), link(3, "b", "vlan", lower=2)],
        {2},
        {"a", "b"},
    ),
    "no interfaces": ([], {1}, set()),
}


@pytest.mark.parametrize("case", CASES)
def test_find_uplinks(case: str) -> None:
    """Interfaces with a gateway and what they stand on are uplinks; pods' interfaces are not."""
    links, gateways, expected = CASES[case]
    found = find_uplinks(links, gateways)
    assert {each.name for each in links if each.index in found} == expected
    assert len(found) == len(expected)


_INDEXES = st.integers(1, 6)
_LINKS = st.lists(
    st.builds(
        link,
        _INDEXES,
        st.just("any"),
        st.sampled_from([None, "veth", "bridge", "bond", "vlan"]),
        st.none() | _INDEXES,
        st.none() | _INDEXES,
    ),
    unique_by=lambda each: each.index,
)


@settings(deadline=None)
@given(_LINKS, st.sets(_INDEXES))
def test_any_set_of_links(links: list[Link], gateways: set[int]) -> None:
    """However links refer to each other it ends, with the gateways' links and nothing that is not there."""
    present = {each.index for each in links}
    found = find_uplinks(links, gateways)
    assert gateways & present <= found <= present
    assert bool(found) == bool(gateways & present)
    # A pod's interface is an uplink only if a gateway is behind it.
    lower = {each.lower for each in links}
    assert not {each.index for each in links if each.kind == "veth"} & found - gateways - lower


def test_an_overlay_is_an_uplink_only_by_a_default_route() -> None:
    """Gateways on an overlay lead to other nodes' pods; a default route through it leads out."""
    overlay = [Link(7, "flannel.1", "vxlan", ethernet=True)]
    assert find_uplinks(overlay, [7]) == frozenset()
    assert find_uplinks(overlay, [7], [7]) == {7}


def prefix(text: str) -> Prefix:
    """Read a prefix."""
    address, bits = text.split("/")
    return Prefix(int(bits) + (0 if ":" in address else 96), pack_address(address))


def route(text: str, *ways: tuple[int, bool], own: bool = False, main: bool = True) -> Route:
    """Make a route; a way is an interface, and whether it leads over a gateway."""
    ends = tuple(Way(index, gateway) for index, gateway in ways)
    return Route(None if text == "default" else prefix(text), own, main and not own, ends)


UPLINK, BRIDGE, TUNNEL, POD = 2, 9, 10, 20
ROUTES = [
    route("default", (UPLINK, True)),
    route("192.168.0.0/24", (UPLINK, False)),  # the other nodes
    route("192.168.0.7/32", (UPLINK, False), own=True),
    route("127.0.0.0/8", (1, False), own=True),
    route("10.244.1.0/24", (BRIDGE, False)),  # pods here
    route("10.244.1.1/32", (BRIDGE, False), own=True),
    route("10.244.2.0/24", (TUNNEL, True)),  # pods elsewhere behind an overlay
    route("10.245.0.7/32", (POD, False)),
    route("172.16.0.0/12", (BRIDGE, False)),
    route("172.18.0.0/16", (UPLINK, True)),  # a hole in it
    route("172.18.5.0/24", (BRIDGE, False)),  # and an island in the hole
    route("10.9.0.0/16", (BRIDGE, False), main=False),  # only by some rule
    route("10.8.0.0/16"),  # by no way at all
    route("fe80::/64", (UPLINK, False)),
    route("fe80::/64", (BRIDGE, False)),
    route("fd00:1::/64", (BRIDGE, False)),
    route("fd00:1::1/128", (BRIDGE, False), own=True),
    route("10.7.0.0/16", (BRIDGE, True), (UPLINK, True)),
]


def test_find_places() -> None:
    """Inside is what no uplink leads to; outside needs a prefix only as a hole in it; the node's own are its own."""
    places, left_out = find_places(ROUTES, {UPLINK}, 100)
    assert left_out == 0
    assert places == {
        prefix("192.168.0.7/32"): Place.THIS_NODE,
        prefix("127.0.0.0/8"): Place.THIS_NODE,
        prefix("10.244.1.1/32"): Place.THIS_NODE,
        prefix("fd00:1::1/128"): Place.THIS_NODE,
        prefix("10.244.1.0/24"): Place.INSIDE,
        prefix("10.244.2.0/24"): Place.INSIDE,
        prefix("10.245.0.7/32"): Place.INSIDE,
        prefix("172.16.0.0/12"): Place.INSIDE,
        prefix("172.18.0.0/16"): Place.OUTSIDE,
        prefix("172.18.5.0/24"): Place.INSIDE,
        prefix("fd00:1::/64"): Place.INSIDE,
    }


def test_pods_behind_the_uplink_are_outside() -> None:
    """Where pods elsewhere are reached through the uplink itself, nothing tells their addresses from others."""
    places, _ = find_places([route("10.244.2.0/24", (UPLINK, True))], {UPLINK}, 100)
    assert places == {}


def test_an_own_address_in_a_pod_route() -> None:
    """An address of this node stays its own, whatever routes lead to it."""
    places, _ = find_places([route("10.1.0.1/32", (POD, False)), route("10.1.0.1/32", own=True)], {UPLINK}, 100)
    assert places == {prefix("10.1.0.1/32"): Place.THIS_NODE}


def test_places_have_a_limit() -> None:
    """Beyond the limit the node's own addresses come first, then the widest prefixes; the rest is counted."""
    places, left_out = find_places(ROUTES, {UPLINK}, 5)
    assert left_out == 6
    assert set(places) == {each.prefix for each in ROUTES if each.own} | {prefix("fd00:1::/64")}


_PREFIXES = st.builds(
    lambda bits, number: Prefix(128, number.to_bytes(16, "big")).wider(bits),
    st.integers(1, 6),
    st.integers(0, 2**128 - 1),
)
_ROUTES = st.lists(
    st.builds(
        lambda found, index: Route(found, own=False, main=True, ways=(Way(index, gateway=False),)),
        _PREFIXES,
        st.integers(1, 2),
    )
)


@settings(deadline=None)
@given(_ROUTES, st.integers(0, 63))
def test_places_follow_the_longest_route(routes: list[Route], first_bits: int) -> None:
    """Whatever routes there are, an address is where its longest route leads, outside where two of a kind disagree."""
    places, _ = find_places(routes, {2}, 1_000)
    address = (first_bits << 122).to_bytes(16, "big")
    holding = [each for each in routes if each.prefix and Prefix(128, address).wider(each.prefix.bits) == each.prefix]
    longest = max((each.prefix.bits for each in holding if each.prefix), default=0)
    ways = {each.ways[0].ifindex for each in holding if each.prefix and each.prefix.bits == longest}
    known = [found for found in places if Prefix(128, address).wider(found.bits) == found]
    place = places[max(known)] if known else Place.OUTSIDE
    assert place is (Place.INSIDE if ways == {1} else Place.OUTSIDE)


def test_gateway_links() -> None:
    """Interfaces with a gateway, of any table, and those of default routes among them."""
    routes = [
        route("default", (2, True), (3, True)),
        route("10.0.0.0/8", (4, True), (5, False), main=False),
        route("10.244.1.0/24", (9, False)),
        route("default", (6, False)),
    ]
    assert gateway_links(routes) == ({2, 3, 4}, {2, 3})
