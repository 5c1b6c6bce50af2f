"""The scene that the backends' tests share: real traffic of known truth, told by agents, kept by real backends.

Three nodes in two zones with an agent each, one Collector with the configuration for all three backends, Prometheus,
Loki and Tempo. First every kind of connection is made until each way has been taken once, so that all series exist;
then the measured traffic. What became of each measured connection is known from clients, pods and conntrack; of one
that was never translated, the node is known because only that node could lose it.
"""

from __future__ import annotations

import contextlib
import subprocess
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, NamedTuple

import pytest

from otel_lb_hop.model import Policy, Transport
from tests.backends import collectors, loki, prometheus, tempo
from tests.backends.loki import Loki
from tests.backends.prometheus import Prometheus
from tests.backends.server import Server
from tests.backends.tempo import Tempo
from tests.e2e import truth
from tests.e2e.collector import endpoint
from tests.e2e.conftest import strangers
from tests.e2e.firewall import deafen
from tests.lab import Lab, reaper
from tests.lab.agent import Agent, agents_on
from tests.lab.host import parse_conntrack
from tests.lab.requirements import needs_lab
from tests.lab.waiting import wait_for
from tests.peers import build

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from otel_lb_hop.model import VipPort
    from tests.lab import Connection, Conntrack, Host, Node

needs_scene = [
    pytest.mark.root,
    pytest.mark.collector,
    pytest.mark.prometheus,
    pytest.mark.loki,
    pytest.mark.tempo,
    # Whichever test comes first waits for the scene.
    pytest.mark.timeout(400),
    needs_lab,
]
"""Marks of every test that uses the scene."""

ZONES = ("zone-a", "zone-a", "zone-b")
ALL = ("node1", "node2", "node3")
CLUSTER_NAME = "lab"
AGENT_NAMESPACE = "observability"
EXPORT_MS = 250
STORED_SECONDS = 90.0
"""A verdict comes 5 to 7 s after the first SYN; the rest is for a slow machine."""

SERVED, NOT_SERVED, FIREWALLED, SLOW, RESOLVER = 8080, 8081, 8082, 8083, 8053
ONE_RETRY_SECONDS, NO_RETRY_SECONDS = 1.5, 0.3
"""A client sends its SYN again after 1 s, then after 2 s or 3 s."""
_DROP_FIRST_SYN = f"""table inet slow {{
  set seen {{ type ipv4_addr . inet_service; flags dynamic, timeout; timeout 1m; size 65535; }}
  chain input {{
    type filter hook input priority 0
    tcp dport != {SLOW} return
    tcp flags & (syn | ack) == syn ip saddr . tcp sport != @seen add @seen {{ ip saddr . tcp sport }} drop
  }}
}}
"""


class Service(NamedTuple):
    """One Service with one port, and what becomes of a connection to it that no node translates."""

    name: str
    vips: dict[str, tuple[str, ...]]
    """VIP → the nodes that announce it."""
    pods: tuple[str, ...]
    target: int = SERVED
    port: int = 80
    transport: Transport = Transport.TCP
    policy: Policy = Policy.CLUSTER
    ready: bool = True
    lost: str | None = None
    """The outcome of what is not translated, and the only node where that happens."""
    lost_on: str | None = None


WEB_PODS = ("node1-pod1", "node1-pod2", "node2-pod1")
WEB = Service("web", {"10.0.10.0": ALL, "fd00:10::1": ALL[:2]}, WEB_PODS)
LOCAL = Service(
    "web-local",
    {"10.0.10.1": ALL, "fd00:10::2": ALL},
    ("node1-pod1", "node2-pod1"),
    policy=Policy.LOCAL,
    lost="no_local_endpoints",
    lost_on="node3",
)
DNS = Service("dns", {"10.0.10.5": ALL}, ("node1-pod1", "node2-pod1"), RESOLVER, 53, Transport.UDP)
L2 = Service("l2", {"10.0.10.6": ("node2",), "fd00:10::6": ("node2",)}, ("node1-pod1", "node3-pod1"))
WRONG_PORT = Service("wrong-port", {"10.0.10.2": ALL}, ("node1-pod1", "node2-pod1"), NOT_SERVED)
FIREWALL = Service("firewalled", {"10.0.10.3": ALL}, ("node2-pod1",), FIREWALLED)
IMPATIENT = Service("impatient", {"10.0.10.7": ("node1",)}, ("node2-pod1",), FIREWALLED)
"""Its clients give up before they would send their SYN again: nobody can tell that from an answer on another way."""
LAGGARD = Service("slow", {"10.0.10.8": ALL}, ("node1-pod1",), SLOW)
"""Its pod hears only the second SYN of each connection."""
EMPTY = Service("empty", {"10.0.10.4": ("node1",)}, ("node1-pod1",), ready=False, lost="no_endpoints", lost_on="node1")
BLACKHOLE = Service("blackhole", {"10.0.10.9": ("node2",)}, ("node1-pod1",), lost="dropped", lost_on="node2")
SERVICES = (WEB, LOCAL, DNS, L2, WRONG_PORT, FIREWALL, IMPATIENT, LAGGARD, EMPTY, BLACKHOLE)


class Batch(NamedTuple):
    """Connections of one kind."""

    service: Service
    vip: str
    connections: int
    timeout: float = 10.0
    concurrency: int = 4
    from_pod: bool = False
    """Called by node3's second pod; else by the client."""


ANSWERED = (
    Batch(WEB, "10.0.10.0", 240),
    Batch(WEB, "fd00:10::1", 120),
    Batch(WEB, "10.0.10.0", 46, from_pod=True),
    Batch(DNS, "10.0.10.5", 90),
    Batch(L2, "10.0.10.6", 60),
    Batch(L2, "fd00:10::6", 40),
    # From a node that no router sends these to: it must not look like one that owns the VIP.
    Batch(L2, "10.0.10.6", 46, from_pod=True),
)
"""One after the other, so that times are those of a machine at ease."""
SOME_LOST = (
    Batch(LOCAL, "10.0.10.1", 150, ONE_RETRY_SECONDS, 150),
    Batch(LOCAL, "fd00:10::2", 90, ONE_RETRY_SECONDS, 90),
    Batch(WRONG_PORT, "10.0.10.2", 69),
    Batch(FIREWALL, "10.0.10.3", 90, ONE_RETRY_SECONDS, 90),
    Batch(IMPATIENT, "10.0.10.7", 23, NO_RETRY_SECONDS, 23),
    Batch(LAGGARD, "10.0.10.8", 46, concurrency=46),
    Batch(EMPTY, "10.0.10.4", 30),
    Batch(BLACKHOLE, "10.0.10.9", 23, ONE_RETRY_SECONDS, 23),
)
"""All together: they wait for nothing."""


class Fate(NamedTuple):
    """What became of one connection, in the words of the contract, known without any agent."""

    service: str
    vip: str
    port: int
    transport: str
    policy: str
    node: str
    """The intermediate node."""
    origin: str
    outcome: str
    hop: str | None
    destination_node: str | None
    zone_crossed: bool | None
    failure: str | None
    """Of a handshake that failed although forwarded: `refused` or `timeout`."""
    client: tuple[str, int]
    source: tuple[str, int] | None
    destination: tuple[str, int] | None
    pod: str | None
    answered: bool
    """Forwarded, neither answered nor failed: the reply was unseen."""
    network: str
    """`ipv4` or `ipv6`."""
    connect_seconds: float
    """As the client measured it, to its answer, error or end of patience."""


@dataclass
class Truth:
    """What became of connections, and how often their clients' kernel sent a SYN again, by Service."""

    fates: list[Fate] = field(default_factory=list)
    retransmits: Counter[str] = field(default_factory=Counter)

    def count(self, *by: str, **where: object) -> Counter[tuple[object, ...]]:
        """Count the connections whose fields are as in `where`, grouped by the fields `by`."""
        return Counter(tuple(getattr(fate, name) for name in by) for fate in self.select(**where))

    def select(self, **where: object) -> list[Fate]:
        """Pick the connections whose fields are as in `where`."""
        return [fate for fate in self.fates if all(getattr(fate, name) == value for name, value in where.items())]

    def total(self, **where: object) -> int:
        """Count the connections whose fields are as in `where`."""
        return len(self.select(**where))


@dataclass
class Scene:
    """The backends with everything stored in them, and the truth of the measured traffic.

    A counter grows between `at - window` and `at` by exactly the measured traffic. increase() and rate() are not quite
    that: Prometheus extends what it saw between the first and the last sample to the ends of the window, which makes it
    up to two export intervals in the window more (a few per cent), the same for all series but for their phase.
    """

    lab: Lab
    agents: list[Agent]
    prometheus: Prometheus
    loki: Loki
    tempo: Tempo
    truth: Truth
    warm_up: Truth
    started: float
    """Unix seconds just before the measured traffic."""
    ended: float
    """Just after it."""
    at: float
    """When all of it was told and stored: the time to ask for."""
    window: float
    """Seconds before `at` that cover the measured traffic and nothing before it."""

    @property
    def range(self) -> str:
        """The window as PromQL and LogQL write it between `[` and `]`."""
        return f"{round(self.window * 1000)}ms"


@pytest.fixture(scope="session")
def scene() -> Iterator[Scene]:
    """Build the scene, once for each process; nothing of it is left afterwards."""
    with play() as played:
        yield played


@contextlib.contextmanager
def play() -> Iterator[Scene]:
    """Build everything, make the traffic, and wait until all of it is stored."""
    with Lab(3, 2, zones=ZONES) as lab:
        with contextlib.ExitStack() as stack:
            yield _play(lab, stack)
        # A compile child whose agent was killed ends by itself, once it finds out.
        wait_for("no process that the scene has left behind", lambda: strangers(lab) == set())
    assert reaper.lab_namespaces(lab.name) == []


def _play(lab: Lab, stack: contextlib.ExitStack) -> Scene:
    servers = Prometheus(lab), Loki(lab), Tempo(lab)
    for server in servers:
        stack.callback(server.stop)
    vip_ports = _prepare(lab)
    stack.enter_context(run_collector(lab))
    for server in servers:
        stack.enter_context(server)
    agents = stack.enter_context(agents_on(lab.nodes, lab.vips_path, lambda node: _settings(lab, node)))
    director = _Director(lab, vip_ports, *servers)
    stack.callback(director.stop)
    warm_up = director.warm_up()
    before = director.settle()
    started = time.time()
    measured = director.measure()
    ended = time.time()
    director.wait_stored(warm_up, measured)
    director.settle()
    at = time.time()
    return Scene(lab, agents, *servers, measured, warm_up, started, ended, at, at - before)


class _Director:
    """Makes traffic and knows what became of it; knows when the backends have all of it."""

    def __init__(
        self, lab: Lab, vip_ports: Mapping[str, VipPort], prometheus: Prometheus, loki: Loki, tempo: Tempo
    ) -> None:
        self.lab = lab
        self.vip_ports = vip_ports
        self.prometheus, self.loki, self.tempo = prometheus, loki, tempo
        self.began = time.time()
        self.watches = {node.name: _Watch(node) for node in lab.nodes}

    def stop(self) -> None:
        """End what watches."""
        for watch in self.watches.values():
            watch.stop()

    def warm_up(self) -> Truth:
        """Take every way once, on one node after the other, and wait until that is stored."""
        made = Truth()
        for node in self.lab.nodes:
            open_ways = {vip: node for service in SERVICES for vip, on in service.vips.items() if node.name in on}
            self.lab.announce({vip: [node] for vip in open_ways})
            first = [
                Batch(
                    batch.service,
                    batch.vip,
                    1 if batch.service.lost else 8,
                    batch.timeout,
                    8,
                    from_pod=batch.from_pod,
                )
                for batch in (*ANSWERED, *SOME_LOST)
                if (node is self.lab.nodes[-1] if batch.from_pod else batch.vip in open_ways)
            ]
            self._gather(made, first)
            for batch in first:
                while _ways_of(batch, self.vip_ports[batch.vip], node) - _taken(made, batch, node):
                    self._gather(made, [batch])
        self.lab.announce(
            {
                vip: [node for node in self.lab.nodes if node.name in on]
                for service in SERVICES
                for vip, on in service.vips.items()
            }
        )
        self.wait_stored(made)
        return made

    def measure(self) -> Truth:
        """Make the traffic that counts."""
        made = Truth()
        for batch in ANSWERED:
            self._gather(made, [batch])
        self._gather(made, SOME_LOST)
        return made

    def settle(self) -> float:
        """Wait until every agent has exported what is counted now; all samples after the answer have it."""
        now = time.time()
        # A sample has the time of the snapshot that it was made of.
        oldest = "min(timestamp(lb_hop_vip_ports)) and count(lb_hop_vip_ports) == 3"
        wait_for("an export of every agent", lambda: _first(self.prometheus, oldest) > now, STORED_SECONDS)
        return now

    def wait_stored(self, *made: Truth) -> None:
        """Wait until all backends have everything that was made so far."""
        fates = [fate for each in made for fate in each.fates]
        forwarded = [fate for fate in fates if fate.outcome == "forwarded"]
        wanted = {
            "sum(lb_hop_connections_total)": len(fates),
            "sum(lb_hop_handshake_failures_total)": sum(fate.failure is not None for fate in forwarded),
            "sum(lb_hop_replies_unseen_total)": sum(fate.failure is None and not fate.answered for fate in forwarded),
            "sum(lb_hop_handshake_duration_seconds_count)": sum(
                fate.answered and fate.transport == "tcp" for fate in forwarded
            ),
        }

        def stored() -> dict[str, float]:
            return {promql: _first(self.prometheus, promql) for promql in wanted}

        wait_for(f"metrics {wanted}", lambda: _if_equal(stored(), wanted), STORED_SECONDS)
        everything = '{service_name="otel-lb-hop"} | client_address != ""'
        wait_for(
            f"{len(fates)} log records",
            lambda: len(self.loki.lines(everything, self.began, time.time())) == len(fates),
            STORED_SECONDS,
        )
        wait_for(
            f"{len(fates)} traces",
            lambda: len(self.tempo.search("{}", self.began, time.time())) == len(fates),
            STORED_SECONDS,
        )

    def _gather(self, made: Truth, batches: Sequence[Batch]) -> None:
        """Make these connections at once, and write down what became of each."""
        for watch in self.watches.values():
            watch.forget()
        before = {transport: truth.accepted_counts(self.lab, transport) for transport in ("tcp", "udp")}
        again = _syns(self.lab)
        with ThreadPoolExecutor(len(batches)) as pool:
            results = list(pool.map(self._send, batches))
        fates: list[Fate] = []
        for batch, connections in zip(batches, results, strict=True):
            fates += self._fates(batch, connections)
        for transport, counts in before.items():
            seen = sorted(map(tuple, truth.accepted_since(self.lab, counts, transport)))
            known = sorted(
                (*fate.source, *fate.destination)
                for fate in fates
                if fate.transport == transport and fate.answered and fate.source and fate.destination
            )
            assert known == seen, "conntrack and the pods do not agree"
        made.fates += fates
        tcp = Counter(fate.service for fate in fates if fate.transport == "tcp" and fate.origin == "external")
        made.retransmits += Counter(_syns(self.lab)) - Counter(again) - tcp

    def _send(self, batch: Batch) -> list[Connection]:
        host: Host = self.lab.nodes[-1].pods[1] if batch.from_pod else self.lab.client
        call = host.connect if batch.service.transport is Transport.TCP else host.send_udp
        return call(
            batch.vip, batch.service.port, batch.connections, concurrency=batch.concurrency, timeout=batch.timeout
        )

    def _fates(self, batch: Batch, results: Sequence[Connection]) -> Iterator[Fate]:
        service, vip_port = batch.service, self.vip_ports[batch.vip]
        translated = {(r.client_address, r.client_port) for r in results if r.ok or service.lost is None}

        def look() -> dict[tuple[str, int], truth.Told]:
            entries = ((node, entry) for node in self.lab.nodes for entry in self.watches[node.name].entries())
            found = {told.client: told for told in truth.ways(self.lab, vip_port, results, entries)}
            return found if translated <= found.keys() else {}

        ways = wait_for(f"news of connections to {service.name}", look) if translated else {}
        for result in results:
            client = result.client_address, result.client_port
            fate = Fate(
                service=f"default/{service.name}",
                vip=batch.vip,
                port=service.port,
                transport=service.transport.name.lower(),
                policy=service.policy.value,
                node=service.lost_on or "",
                origin="internal" if batch.from_pod else "external",
                outcome=service.lost or "",
                hop=None,
                destination_node=None,
                zone_crossed=None,
                failure=None,
                client=client,
                source=None,
                destination=None,
                pod=None,
                answered=result.ok,
                network="ipv6" if ":" in batch.vip else "ipv4",
                connect_seconds=result.connect_seconds,
            )
            if client in ways:
                fate = _forwarded(fate, vip_port, ways[client])
                if not result.ok and batch.timeout > NO_RETRY_SECONDS:
                    fate = fate._replace(failure="refused" if result.error == "ECONNREFUSED" else "timeout")
            yield fate


def _forwarded(fate: Fate, vip_port: VipPort, told: truth.Told) -> Fate:
    verdict = truth.verdict_attributes(vip_port, told, fate.origin)
    return fate._replace(
        node=told.node.name,
        outcome="forwarded",
        hop=verdict["lb_hop.hop"],
        destination_node=told.pod.node,
        zone_crossed=verdict["lb_hop.zone.crossed"],
        source=told.source,
        destination=told.destination,
        pod=told.pod.name,
    )


class _Watch:
    """Conntrack's news of one node, of which the table forgets the refused ones at once."""

    def __init__(self, node: Node) -> None:
        self._path = node.directory / f"{node.name}-conntrack.log"
        self._seen = 0
        with self._path.open("w") as output:
            self._process = node.popen(
                ["conntrack", "-E", "-e", "NEW", "-b", str(2**22)], stdout=output, stderr=subprocess.DEVNULL
            )

    def forget(self) -> None:
        """Leave out of `entries` what came before now."""
        self._seen = self._path.stat().st_size

    def entries(self) -> list[Conntrack]:
        """Return what came since."""
        with self._path.open(encoding="ascii") as file:
            file.seek(self._seen)
            lines = [line for line in file if line.endswith("\n") and " dport=" in line]
        return [parse_conntrack(line) for line in lines]

    def stop(self) -> None:
        """End it."""
        self._process.kill()
        self._process.wait()


def _prepare(lab: Lab) -> dict[str, VipPort]:
    """Let pods serve, each in its way, and nodes translate; answers the VIP ports by VIP."""
    pods = {pod.name: pod for pod in lab.pods}
    for pod in lab.pods:
        pod.serve(SERVED)
    for name in ("node1-pod1", "node2-pod1"):
        pods[name].serve_udp(RESOLVER)
    deafen(pods["node2-pod1"], f"tcp dport {FIREWALLED}")
    pods["node1-pod1"].serve(SLOW)
    pods["node1-pod1"].run(["nft", "-f", "-"], text=_DROP_FIRST_SYN)
    vip_ports = {
        vip: lab.vip_port(
            vip,
            service.port,
            service=service.name,
            policy=service.policy,
            transport=service.transport,
            backends=[replace(pods[name].backend(vip, service.target), ready=service.ready) for name in service.pods],
        )
        for service in SERVICES
        for vip in service.vips
    }
    lab.apply(list(vip_ports.values()))
    (black_vip,) = BLACKHOLE.vips
    for node in lab.nodes:
        if node.name == BLACKHOLE.lost_on:
            node.run(["nft", "-f", "-"], text=_drop(black_vip))
    lab.client.run(["nft", "-f", "-"], text=_count_syns())
    return vip_ports


def _drop(vip: str) -> str:
    return f"table inet hole {{\nchain in {{\ntype filter hook prerouting priority raw\nip daddr {vip} drop\n}}\n}}\n"


def _count_syns() -> str:
    rules = "\n".join(
        f'{"ip6" if ":" in vip else "ip"} daddr {vip} tcp flags & (syn | ack) == syn counter comment "{service.name}"'
        for service in SERVICES
        for vip in service.vips
    )
    return f"table inet syns {{\nchain out {{\ntype filter hook output priority 0\n{rules}\n}}\n}}\n"


def _syns(lab: Lab) -> Counter[str]:
    """Count the SYNs that the client has sent, by Service."""
    found: Counter[str] = Counter()
    for line in lab.client.run(["nft", "list", "table", "inet", "syns"]).stdout.splitlines():
        if " counter packets " in line:
            words = line.split()
            found[f"default/{words[-1].strip(chr(34))}"] += int(words[words.index("packets") + 1])
    return found


def _settings(lab: Lab, node: Node) -> dict[str, str]:
    resource = {
        "k8s.cluster.name": CLUSTER_NAME,
        "k8s.namespace.name": AGENT_NAMESPACE,
        "k8s.pod.name": f"otel-lb-hop-{node.name}",
    }
    return {
        **endpoint(lab.mgmt.address4),
        "OTEL_METRIC_EXPORT_INTERVAL": str(EXPORT_MS),
        "OTEL_LB_HOP_RECORD_RATE": "100000",
        "OTEL_RESOURCE_ATTRIBUTES": ",".join(f"{name}={value}" for name, value in resource.items()),
    }


def run_collector(lab: Lab) -> Server:
    """Run the Collector with the configuration for all three, whether they are there or not."""
    here = lab.mgmt.address4
    return Server(
        lab,
        "collector",
        collectors.HEALTH_PORT,
        {},
        [str(build.build("otelcol")), "--config", str(collectors.FOLDER / "all.yaml")],
        ready="/health",
        env={
            "LB_HOP_LISTEN": "[::]",
            "LB_HOP_PROMETHEUS_ENDPOINT": f"http://{here}:{prometheus.PORT}{prometheus.REMOTE_WRITE}",
            "LB_HOP_LOKI_ENDPOINT": f"http://{here}:{loki.PORT}{loki.OTLP}",
            "LB_HOP_TEMPO_ENDPOINT": f"http://{here}:{tempo.OTLP_HTTP_PORT}",
        },
    )


def _ways_of(batch: Batch, vip_port: VipPort, node: Node) -> set[str | None]:
    """Name the nodes to which connections of a batch can go when they come in on a node; None: lost there."""
    if batch.service.lost_on == node.name:
        return {None}
    names = {backend.node for backend in vip_port.backends if backend.ready}
    return {node.name} if vip_port.policy is Policy.LOCAL and not batch.from_pod else names


def _taken(made: Truth, batch: Batch, node: Node) -> set[object]:
    origin = "internal" if batch.from_pod else "external"
    return {
        destination for (destination,) in made.count("destination_node", vip=batch.vip, node=node.name, origin=origin)
    }


def _first(prometheus: Prometheus, promql: str) -> float:
    found = prometheus.query(promql)
    return found[0].value if found else 0.0


def _if_equal(found: dict[str, float], wanted: Mapping[str, float]) -> dict[str, float]:
    if found == wanted:
        return found
    return {}
