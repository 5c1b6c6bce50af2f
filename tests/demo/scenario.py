"""The story of the demo: its Services, the traffic, and what clients and pods themselves saw of it."""

from __future__ import annotations

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

from otel_lb_hop.model import Origin, Policy, Transport
from tests.cluster import objects

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from otel_lb_hop.model import VipPort
    from tests.cluster.api import Object
    from tests.lab import Connection, Host, Lab, Pod

NODES = 3
SERVED, NOT_SERVED, FIREWALLED, RESOLVER = 8080, 8081, 8082, 8053

_DROP = f"""table inet wall {{
  chain input {{
    type filter hook input priority 0
    tcp dport {FIREWALLED} drop
  }}
}}
"""


class Service(NamedTuple):
    """One Service with one port, whatever serves it; its pods are those of the first nodes."""

    name: str
    vips: tuple[str, ...]
    target: int = SERVED
    nodes: tuple[int, ...] = (0, 1)
    ready: bool = True
    policy: Policy = Policy.CLUSTER
    port: int = 80
    transport: Transport = Transport.TCP

    def pods(self, lab: Lab) -> list[Pod]:
        """Name the pods behind it."""
        return [lab.nodes[number].pods[0] for number in self.nodes]


# Three that work, and three that each fail in a way of their own.
WEB = Service("web", ("10.0.10.0", "fd00:10::1"))
LOCAL = Service("web-local", ("10.0.10.1", "fd00:10::2"), policy=Policy.LOCAL)
DNS = Service("dns", ("10.0.10.5",), RESOLVER, port=53, transport=Transport.UDP)
WRONG_PORT = Service("wrong-port", ("10.0.10.2",), NOT_SERVED)
FIREWALL = Service("firewalled", ("10.0.10.3",), FIREWALLED, nodes=(1,))
EMPTY = Service("empty", ("10.0.10.4",), ready=False)
SERVICES = (WEB, LOCAL, DNS, WRONG_PORT, FIREWALL, EMPTY)


class Batch(NamedTuple):
    """Connections of one kind: who calls which Service at which VIP."""

    service: Service
    vip: str
    connections: int
    concurrency: int = 16
    timeout: float = 3.0
    from_pod: bool = False


# A client that hears nothing sends its SYN again after 1 s: wait for that, all at once.
_PATIENCE = {"concurrency": 400, "timeout": 1.4}

ANSWERED = (
    Batch(WEB, WEB.vips[0], 1500),
    Batch(WEB, WEB.vips[1], 1500),
    Batch(WEB, WEB.vips[0], 200, from_pod=True),
    Batch(DNS, DNS.vips[0], 300),
)
SOME_LOST = (
    Batch(LOCAL, LOCAL.vips[0], 300, **_PATIENCE),  # type: ignore[arg-type]
    Batch(LOCAL, LOCAL.vips[1], 300, **_PATIENCE),  # type: ignore[arg-type]
    Batch(FIREWALL, FIREWALL.vips[0], 60, **_PATIENCE),  # type: ignore[arg-type]
    Batch(WRONG_PORT, WRONG_PORT.vips[0], 60),
    Batch(EMPTY, EMPTY.vips[0], 60),
)
TOTAL = sum(batch.connections for batch in (*ANSWERED, *SOME_LOST))


class Truth(NamedTuple):
    """What the clients and the pods know, without any agent; keys (namespace/service, origin), and pods' nodes.

    A UDP flow is one question from a port of its own, and its answer.
    """

    made: Counter[tuple[str, str]]
    unanswered: Counter[str]
    accepted: Counter[str]
    peers: frozenset[tuple[str, str, int, str]]
    """(transport, peer address, peer port, pod): every connection that a pod accepted."""
    clients: frozenset[tuple[str, str, int]]
    """(VIP, client address, client port): every connection that a client found answered."""


def prepare(lab: Lab) -> None:
    """Let pods of node1 and node2 serve; node3's is only a client."""
    for pod in WEB.pods(lab):
        pod.serve(SERVED)
        pod.serve_udp(RESOLVER)
    for pod in FIREWALL.pods(lab):
        pod.run(["nft", "-f", "-"], text=_DROP)


def vip_ports(lab: Lab) -> Iterator[VipPort]:
    """Describe the Services for the lab's own NAT."""
    for service in SERVICES:
        for vip in service.vips:
            backends = [replace(pod.backend(vip, service.target), ready=service.ready) for pod in service.pods(lab)]
            yield lab.vip_port(
                vip,
                service.port,
                service=service.name,
                policy=service.policy,
                transport=service.transport,
                backends=backends,
            )


def cluster_objects(lab: Lab) -> Iterator[Object]:
    """Describe the nodes and the Services for an API server."""
    yield from map(objects.node, lab.nodes)
    for service in SERVICES:
        port = objects.port(service.port, target=service.target, protocol=service.transport.name)
        written, *slices = objects.web(
            service.name, service.vips, service.pods(lab), [port], policy=service.policy.value
        )
        for endpoint_slice in slices:
            for endpoint in endpoint_slice["endpoints"]:
                endpoint["conditions"] |= {"ready": service.ready, "serving": service.ready}
        yield from (written, *slices)


def drive(lab: Lab, made: Callable[[int], None]) -> Truth:
    """Make every connection, telling how many are made after each batch, and ask all sides what they saw."""
    done: list[tuple[Batch, list[Connection]]] = []

    def finish(batch: Batch) -> None:
        host: Host = lab.nodes[-1].pods[0] if batch.from_pod else lab.client
        call = host.connect if batch.service.transport is Transport.TCP else host.send_udp
        words = batch.vip, batch.service.port, batch.connections
        done.append((batch, call(*words, concurrency=batch.concurrency, timeout=batch.timeout)))
        made(batch.connections)

    # One after the other where times matter; where they wait for nothing, all together.
    for batch in ANSWERED:
        finish(batch)
    with ThreadPoolExecutor(len(SOME_LOST)) as pool:
        list(pool.map(finish, SOME_LOST))
    return _truth(lab, done)


def _truth(lab: Lab, done: Sequence[tuple[Batch, list[Connection]]]) -> Truth:
    made: Counter[tuple[str, str]] = Counter()
    unanswered: Counter[str] = Counter()
    clients = set()
    for batch, results in done:
        origin = Origin.INTERNAL if batch.from_pod else Origin.EXTERNAL
        service = f"default/{batch.service.name}"
        made[service, origin.value] += len(results)
        unanswered[service] += sum(not result.ok for result in results)
        clients |= {(batch.vip, result.client_address, result.client_port) for result in results if result.ok}
    seen = [
        (transport, entry, pod) for pod in lab.pods for transport in ("tcp", "udp") for entry in pod.accepted(transport)
    ]
    return Truth(
        made,
        unanswered,
        Counter(pod.node for _, _, pod in seen),
        frozenset((transport, entry.peer_address, entry.peer_port, pod.name) for transport, entry, pod in seen),
        frozenset(clients),
    )
