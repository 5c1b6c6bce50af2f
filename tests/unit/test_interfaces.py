"""Which interfaces lead out of the cluster."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from otel_lb_hop.core.interfaces import Link, find_uplinks


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
