"""Which interfaces lead out of the cluster, and which addresses are inside, told from links and routes alone. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from otel_lb_hop.core.layout import Place

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Sequence


@dataclass(frozen=True, slots=True)
class Link:
    """One network interface. `lower` is what it stands on (VLAN, macvlan), `master` what it is a port of."""

    index: int
    name: str
    kind: str | None
    ethernet: bool
    lower: int | None = None
    master: int | None = None


class Prefix(NamedTuple):
    """A range of addresses: how many of the 128 bits are given, and they, the rest zero."""

    bits: int
    address: bytes

    def wider(self, bits: int) -> Prefix:
        """Cut it to fewer bits."""
        hidden = 128 - bits
        return Prefix(bits, (int.from_bytes(self.address, "big") >> hidden << hidden).to_bytes(16, "big"))


class Way(NamedTuple):
    """Where a route leads: out by an interface, over a gateway or to what is directly there."""

    ifindex: int
    gateway: bool


class Route(NamedTuple):
    """One unicast route, by one or several ways, or (`own`) one to this node itself.

    `prefix` is None for a default route; `main` is whether it stands in the main table.
    """

    prefix: Prefix | None
    own: bool
    main: bool
    ways: tuple[Way, ...]


OVERLAY_KINDS = frozenset({"vxlan", "geneve", "ipip", "ip6tnl", "sit", "gre", "gretap"})


def find_uplinks(
    links: Sequence[Link], gateway_links: Iterable[int], default_links: Iterable[int] = ()
) -> frozenset[int]:
    """Name the interfaces through which routes lead over a gateway, and all that they stand on.

    An overlay has gateways too, but leads to other nodes' pods: it counts only if a default route goes through it.

    A pod's interface has a route of its own, but none over a gateway. Below an uplink everything is an uplink, so
    that a packet is external whichever device of a stack sees it first: the parent of a VLAN, the ports of a bond;
    of a bridge only the ports that are no veth, since pods may hang on the same bridge as the wire.
    """
    by_index = {link.index: link for link in links}
    found: set[int] = set()
    todo = [index for index in gateway_links if index in by_index and by_index[index].kind not in OVERLAY_KINDS]
    todo += [index for index in default_links if index in by_index]
    while todo:
        index = todo.pop()
        if index in found:
            continue
        found.add(index)
        link = by_index[index]
        if link.lower in by_index and link.kind != "veth":
            todo.append(link.lower)
        todo += [port.index for port in links if port.master == index and port.kind not in {"veth", "tun"}]
    return frozenset(found)


def gateway_links(routes: Iterable[Route]) -> tuple[set[int], set[int]]:
    """Name the interfaces that routes over a gateway leave by, in any table: of all routes, and of default ones."""
    found: set[int] = set()
    default: set[int] = set()
    for route in routes:
        ways = {way.ifindex for way in route.ways if way.gateway}
        found |= ways
        if route.prefix is None:
            default |= ways
    return found, default


def find_places(routes: Sequence[Route], uplinks: Collection[int], limit: int) -> tuple[dict[Prefix, Place], int]:
    """Tell where addresses are by their longest prefix: on this node, inside, or (without a prefix) outside.

    Inside is what the main table reaches by an interface that is no uplink: pods here, and pods elsewhere behind an
    overlay. What it reaches by an uplink is outside: it needs a prefix only as a hole in a wider one that is inside.
    Answers also how many prefixes were left out because of the limit; the widest are kept.
    """
    own = {route.prefix for route in routes if route.own and route.prefix}
    inside: set[Prefix] = set()
    outside: set[Prefix] = set()
    for route in routes:
        if route.main and route.prefix and route.ways:
            leads_out = any(way.ifindex in uplinks for way in route.ways)
            (outside if leads_out else inside).add(route.prefix)
    inside -= outside
    lengths = {prefix.bits for prefix in inside}
    holes = {
        prefix for prefix in outside if any(prefix.wider(bits) in inside for bits in lengths if bits < prefix.bits)
    }
    places = dict.fromkeys(holes, Place.OUTSIDE) | dict.fromkeys(inside, Place.INSIDE)
    places |= dict.fromkeys(own, Place.THIS_NODE)
    kept = sorted(places, key=lambda prefix: (places[prefix] is not Place.THIS_NODE, prefix))[:limit]
    return {prefix: places[prefix] for prefix in kept}, len(places) - len(kept)
