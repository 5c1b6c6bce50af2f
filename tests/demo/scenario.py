"""The story of the demo: its Services, the traffic, and what clients and pods themselves saw of it."""

from __future__ import annotations

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

from otel_lb_hop.model import Origin, Policy

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from otel_lb_hop.model import VipPort
    from tests.lab import Connection, Host, Lab

NODES = 3
WEB_VIPS = ("10.0.10.0", "fd00:10::1")
LOCAL_VIPS = ("10.0.10.1", "fd00:10::2")
WRONG_PORT_VIP, FIREWALLED_VIP, EMPTY_VIP = "10.0.10.2", "10.0.10.3", "10.0.10.4"
PORT, SERVED, NOT_SERVED, FIREWALLED = 80, 8080, 8081, 8082

WEB, LOCAL, WRONG_PORT, FIREWALL, EMPTY = "web", "web-local", "wrong-port", "firewalled", "empty"

_DROP = f"""table inet wall {{
  chain input {{
    type filter hook input priority 0
    tcp dport {FIREWALLED} drop
  }}
}}
"""


class Batch(NamedTuple):
    """Connections of one kind: who calls which Service at which VIP."""

    service: str
    vip: str
    connections: int
    concurrency: int = 16
    timeout: float = 3.0
    from_pod: bool = False


# A client that hears nothing sends its SYN again after 1 s: wait for that, all at once.
_PATIENCE = {"concurrency": 400, "timeout": 1.4}

ANSWERED = (
    Batch(WEB, WEB_VIPS[0], 1500),
    Batch(WEB, WEB_VIPS[1], 1500),
    Batch(WEB, WEB_VIPS[0], 200, from_pod=True),
)
SOME_LOST = (
    Batch(LOCAL, LOCAL_VIPS[0], 300, **_PATIENCE),  # type: ignore[arg-type]
    Batch(LOCAL, LOCAL_VIPS[1], 300, **_PATIENCE),  # type: ignore[arg-type]
    Batch(FIREWALL, FIREWALLED_VIP, 60, **_PATIENCE),  # type: ignore[arg-type]
    Batch(WRONG_PORT, WRONG_PORT_VIP, 60),
    Batch(EMPTY, EMPTY_VIP, 60),
)
TOTAL = sum(batch.connections for batch in (*ANSWERED, *SOME_LOST))


class Truth(NamedTuple):
    """What the clients and the pods know, without any agent; keys (namespace/service, origin), and pods' nodes."""

    made: Counter[tuple[str, str]]
    unanswered: Counter[str]
    accepted: Counter[str]
    peers: frozenset[tuple[str, int, str]]
    """(peer address, peer port, pod): every connection that a pod accepted."""
    clients: frozenset[tuple[str, str, int]]
    """(VIP, client address, client port): every connection that a client found answered."""


def prepare(lab: Lab) -> None:
    """Pods of node1 and node2 serve, node3's is only a client; then the Services."""
    backends = [node.pods[0] for node in lab.nodes[:2]]
    for pod in backends:
        pod.serve(SERVED)
    backends[1].run(["nft", "-f", "-"], text=_DROP)
    lab.apply(services(lab))


def services(lab: Lab) -> list[VipPort]:
    """Two Services that work, and three that each fail in a way of their own."""
    backends = [node.pods[0] for node in lab.nodes[:2]]
    sleeping = [replace(pod.backend(EMPTY_VIP, SERVED), ready=False) for pod in backends]
    return [
        *(lab.vip_port(vip, PORT, service=WEB, backends=backends, target_port=SERVED) for vip in WEB_VIPS),
        *(
            lab.vip_port(vip, PORT, service=LOCAL, policy=Policy.LOCAL, backends=backends, target_port=SERVED)
            for vip in LOCAL_VIPS
        ),
        lab.vip_port(WRONG_PORT_VIP, PORT, service=WRONG_PORT, backends=backends, target_port=NOT_SERVED),
        lab.vip_port(FIREWALLED_VIP, PORT, service=FIREWALL, backends=backends[1:], target_port=FIREWALLED),
        lab.vip_port(EMPTY_VIP, PORT, service=EMPTY, backends=sleeping),
    ]


def drive(lab: Lab, made: Callable[[int], None]) -> Truth:
    """Make every connection, telling how many are made after each batch, and ask all sides what they saw."""
    done: list[tuple[Batch, list[Connection]]] = []

    def finish(batch: Batch) -> None:
        host: Host = lab.nodes[-1].pods[0] if batch.from_pod else lab.client
        results = host.connect(batch.vip, PORT, batch.connections, concurrency=batch.concurrency, timeout=batch.timeout)
        done.append((batch, results))
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
        service = f"default/{batch.service}"
        made[service, origin.value] += len(results)
        unanswered[service] += sum(not result.ok for result in results)
        clients |= {(batch.vip, result.client_address, result.client_port) for result in results if result.ok}
    seen = [(entry, pod) for pod in lab.pods for entry in pod.accepted()]
    return Truth(
        made,
        unanswered,
        Counter(pod.node for _, pod in seen),
        frozenset((entry.peer_address, entry.peer_port, pod.name) for entry, pod in seen),
        frozenset(clients),
    )
