"""Which interfaces lead out of the cluster, told from links and routes alone. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence


@dataclass(frozen=True, slots=True)
class Link:
    """One network interface. `lower` is what it stands on (VLAN, macvlan), `master` what it is a port of."""

    index: int
    name: str
    kind: str | None
    ethernet: bool
    lower: int | None = None
    master: int | None = None


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
