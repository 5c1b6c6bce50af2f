"""What happened to connections, told by the lab alone: its clients, its pods and the kernel's conntrack tables.

And what the agent therefore has to say, in the words of the contract (design, section 6), written out by hand.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any, NamedTuple

from otel_lb_hop.model import format_address, is_ipv4

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from otel_lb_hop.model import Backend, VipPort
    from tests.lab import Accepted, Connection, Conntrack, Lab, Node, Pod

Endpoint = tuple[str, int]
Attributes = dict[str, Any]


class Told(NamedTuple):
    """One forwarded connection: by which node it went, what the backend saw, which pod that was."""

    client: Endpoint
    node: Node
    source: Endpoint
    destination: Endpoint
    pod: Pod
    connect_seconds: float


def forget_connections(lab: Lab) -> None:
    """Empty the conntrack tables, so that what is in them later is of the traffic to come."""
    for node in lab.nodes:
        node.run(["conntrack", "-F"])


def accepted_counts(lab: Lab, transport: str = "tcp") -> Counter[Accepted]:
    """Count what the pods have accepted so far, for `accepted_since`."""
    return Counter(entry for pod in lab.pods for entry in pod.accepted(transport))


def accepted_since(lab: Lab, counts: Counter[Accepted], transport: str = "tcp") -> list[Accepted]:
    """Return what the pods have accepted since."""
    return list((accepted_counts(lab, transport) - counts).elements())


def ways(
    lab: Lab, vip_port: VipPort, results: Sequence[Connection], entries: Iterable[tuple[Node, Conntrack]]
) -> list[Told]:
    """Find the way of each connection among conntrack's entries, answered or not; what was never forwarded has none."""
    vip, clients = format_address(vip_port.address), {(r.client_address, r.client_port): r for r in results}
    return [
        Told(
            (entry.source, entry.source_port),
            node,
            (entry.reply_destination, entry.reply_destination_port),
            (entry.reply_source, entry.reply_source_port),
            _pod_at(lab, entry.reply_source),
            clients[entry.source, entry.source_port].connect_seconds,
        )
        for node, entry in entries
        if (entry.destination, entry.destination_port) == (vip, vip_port.port)
        and (entry.source, entry.source_port) in clients
    ]


def follow(lab: Lab, vip_port: VipPort, results: Sequence[Connection], accepted: Sequence[Accepted]) -> list[Told]:
    """Find the way of each connection that was answered in conntrack; what the pods saw has to agree."""
    answered = [result for result in results if result.ok]
    transport = vip_port.transport.name.lower()
    entries = ((node, entry) for node in lab.nodes for entry in node.conntrack(transport))
    told = ways(lab, vip_port, answered, entries)
    clients = {(result.client_address, result.client_port) for result in answered}
    assert {each.client for each in told} == clients, "conntrack does not know every connection"
    assert len(told) == len(clients), "a connection is in two conntrack tables"
    seen_by_conntrack = sorted((*each.source, *each.destination) for each in told)
    assert seen_by_conntrack == sorted(map(tuple, accepted)), "conntrack and the pods do not agree"
    return told


def vip_port_attributes(vip_port: VipPort, node: Node) -> Attributes:
    """Say what stands on every point and record of a VIP port."""
    return {
        "k8s.namespace.name": vip_port.namespace,
        "k8s.service.name": vip_port.service,
        "server.address": format_address(vip_port.address),
        "server.port": vip_port.port,
        "network.transport": vip_port.transport.name.lower(),
        "network.type": "ipv4" if is_ipv4(vip_port.address) else "ipv6",
        "lb_hop.external_traffic_policy": vip_port.policy.value,
        "k8s.node.name": node.name,
    }


def hop_class(vip_port: VipPort, node: Node, pod: Pod) -> str:
    """Judge a hop by where node and pod are, and where the other ready backends are; by names, where they are told."""
    if any(_is(backend, pod) and backend.node is None for backend in vip_port.backends):
        return "unknown"
    if pod.node == node.name:
        return "none"
    local = any(backend.ready and backend.node == node.name for backend in vip_port.backends)
    return "avoidable" if local else "required"


def verdict_attributes(vip_port: VipPort, told: Told, origin: str = "external") -> Attributes:
    """Say what `lb_hop.connections` tells of a forwarded connection beyond the VIP port's."""
    hop = hop_class(vip_port, told.node, told.pod)
    attributes: Attributes = {"lb_hop.outcome": "forwarded", "lb_hop.hop": hop, "lb_hop.origin": origin}
    if hop == "unknown":
        return attributes
    attributes["destination.k8s.node.name"] = told.pod.node
    if told.node.zone and told.pod.zone:
        attributes["lb_hop.zone.crossed"] = told.node.zone != told.pod.zone
    return attributes


def record_attributes(vip_port: VipPort, told: Told, interface: str = "net0", origin: str = "external") -> Attributes:
    """Say what a record of a forwarded connection tells, all but the measured times."""
    return {
        **vip_port_attributes(vip_port, told.node),
        **verdict_attributes(vip_port, told, origin),
        "client.address": told.client[0],
        "client.port": told.client[1],
        "source.address": told.source[0],
        "source.port": told.source[1],
        "destination.address": told.destination[0],
        "destination.port": told.destination[1],
        "destination.k8s.pod.name": told.pod.name,
        "destination.k8s.namespace.name": "default",
        **({"destination.cloud.availability_zone": told.pod.zone} if told.pod.zone else {}),
        "network.interface.name": interface,
        "lb_hop.syn.retransmits": 0,
    }


def clients_of(records: Iterable[Any]) -> list[Endpoint]:
    """Name the client of each log record or span."""
    return [(record.attributes["client.address"], record.attributes["client.port"]) for record in records]


def _is(backend: Backend, pod: Pod) -> bool:
    return format_address(backend.address) in {pod.address4, pod.address6}


def _pod_at(lab: Lab, address: str) -> Pod:
    return next(pod for pod in lab.pods if address in {pod.address4, pod.address6})
