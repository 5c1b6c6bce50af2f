"""A cluster at work: an agent on every node, a Collector, and the books of what was sent.

What the agents have to tell is written down from the other side (clients' results, pods, conntrack) by `Scene` as it
sends. `check` holds everything that was ever counted or recorded against that, so that what one Service got cannot
turn up with another.
"""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from otel_lb_hop.model import Policy, Transport, format_address
from tests.cluster import objects
from tests.cluster.conftest import TARGET_PORT
from tests.cluster.control_plane import AGENT
from tests.e2e import truth
from tests.e2e.collector import Collector
from tests.e2e.otlp import log_records, metric_series
from tests.lab import Node
from tests.lab.agent import Agent, agents_on
from tests.lab.waiting import TookTooLongError, wait_for

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from otel_lb_hop.model import Backend, VipPort
    from tests.cluster.api import Object
    from tests.cluster.audit import Request
    from tests.cluster.control_plane import ControlPlane
    from tests.e2e.otlp import LogRecord, Series
    from tests.e2e.truth import Attributes
    from tests.lab import Connection, Host, Lab, Pod

SENT = 23
SETTINGS = {"OTEL_METRIC_EXPORT_INTERVAL": "200", "OTEL_TRACES_EXPORTER": "none"}
ANSWER_SECONDS = 10.0
NO_ANSWER_SECONDS, ONE_RETRY_SECONDS = 0.3, 1.5
"""A client sends its SYN again after one second, then after two or three more."""
VERDICT_SECONDS = 20
"""What is not forwarded is told 5 to 7 s after its first packet."""
TAIL_BYTES = 2**21
"""Of the Collector's file: the latest export of every agent is in it."""
TIMES = {"lb_hop.forward.duration", "lb_hop.handshake.duration"}
SOURCE = {"source.address", "source.port"}
MARK, MARK_VIP = "mark", "198.19.0.1"
READS = {(verb, kind) for verb in ("list", "watch", "get") for kind in ("services", "endpointslices", "nodes")}


class Scene:
    """The agents of a cluster, what they told, and what they have to tell."""

    def __init__(
        self, lab: Lab, plane: ControlPlane, collector: Collector, run: Callable[[Sequence[Node]], list[Agent]]
    ) -> None:
        self.lab = lab
        self.plane = plane
        self.agents: list[Agent] = []
        self.agents_started = 0
        self.zones = {node.name: node.zone for node in lab.nodes}
        """Where the nodes are, as a test has told the API server; empty for one that it has not told."""
        self.expected: Counter[frozenset[Any]] = Counter()
        """Attributes of lb_hop.connections → connections, of all that was sent."""
        self.failures: Counter[frozenset[Any]] = Counter()
        """The same of lb_hop.handshake.failures."""
        self._run = run
        self._files = {signal: collector.folder / f"{signal}.json" for signal in ("metrics", "logs")}
        self._records: list[Attributes] = []
        self._seen_bytes = self._done_bytes = 0
        self._announced: dict[str, Sequence[Node]] = {}
        self._marks = 0

    # what the cluster is

    def join(self, nodes: Sequence[Node]) -> None:
        """Run an agent on these nodes too, to the end of the scene."""
        self.agents += self._run(nodes)
        self.agents_started += len(nodes)

    def apply(self, *contents: Object, vips: Mapping[str, Sequence[Node]] | None = None) -> None:
        """Make objects be as told, with VIPs announced by these nodes; everybody knows it on return."""
        self.plane.apply(*contents)
        self.announce(vips or {})
        self.settle()

    def announce(self, vips: Mapping[str, Sequence[Node]]) -> None:
        """Let these nodes announce these VIPs; other VIPs stay as they are."""
        self._announced |= vips
        self.lab.announce(self._announced)

    def web(
        self,
        name: str,
        vip: str,
        pods: Sequence[Pod],
        *,
        policy: Policy = Policy.CLUSTER,
        nodes: Sequence[Node] | None = None,
    ) -> VipPort:
        """Make a Service with a VIP on port 80 that all nodes, or these, announce."""
        ports = [objects.port(80, target=TARGET_PORT)]
        self.apply(*objects.web(name, [vip], pods, ports, policy=policy.value), vips={vip: nodes or self.lab.nodes})
        return self.describe(name, vip, pods, policy=policy)

    def describe(
        self,
        name: str,
        vip: str,
        backends: Iterable[Pod | Backend],
        port: int = 80,
        *,
        policy: Policy = Policy.CLUSTER,
        target_port: int = TARGET_PORT,
    ) -> VipPort:
        """Describe a VIP port and the endpoints that kube-proxy picks from, for what it has to be told as."""
        return self.lab.vip_port(vip, port, service=name, policy=policy, backends=backends, target_port=target_port)

    def settle(self) -> None:
        """Wait until every kube-proxy and every agent has taken over all that was applied so far.

        Each kind of object reaches an agent in order: the last Service and the last slice are known when all are.
        """
        self._marks += 1
        policy, endpoints = (Policy.CLUSTER, Policy.LOCAL)[self._marks % 2], 1 + self._marks % 7
        ports = [objects.port(9)]
        places = [{"addresses": [f"198.19.1.{number}"]} for number in range(endpoints)]
        self.plane.apply(
            objects.service(MARK, ports, [MARK_VIP], policy=policy.value), objects.endpoint_slice(MARK, ports, places)
        )
        self.plane.settle()
        mark = self.describe(MARK, MARK_VIP, [], 9, policy=policy)

        def known() -> bool:
            return all(sum(placed.values()) == endpoints for placed in self.placements(mark).values())

        wait_for("agents that know what was applied", known, 20)

    @contextlib.contextmanager
    def another_agent(self, settings: Mapping[str, str]) -> Iterator[Agent]:
        """Run one more agent on the first node, which reads the API server as the others do, and exports nothing."""
        silent = {f"OTEL_{signal}_EXPORTER": "none" for signal in ("METRICS", "LOGS", "TRACES")}
        self.agents_started += 1
        wanted = self.plane.agent_settings() | silent | dict(settings)
        with Agent(self.lab.nodes[0], None, wanted, name="another", port=9466) as agent:
            yield agent

    # what is sent

    def deliver(self, vip_port: VipPort, sender: Host | None = None) -> list[truth.Told]:
        """Make connections that must succeed, and write down where they went."""
        transport = vip_port.transport.name.lower()
        truth.forget_connections(self.lab)
        counts = truth.accepted_counts(self.lab, transport)
        results = self._send(vip_port, "", sender, ANSWER_SECONDS)
        told = [
            each._replace(
                node=replace(each.node, zone=self.zones[each.node.name]),
                pod=replace(each.pod, zone=self.zones[each.pod.node]),
            )
            for each in truth.follow(self.lab, vip_port, results, truth.accepted_since(self.lab, counts, transport))
        ]
        assert len(told) == SENT
        for each in told:
            self._expect(vip_port, each, sender)
        return told

    def lose(self, vip_port: VipPort, node: Node, outcome: str, error: str, sender: Host | None = None) -> None:
        """Make connections by one node, none of which it may forward."""
        if sender is None:
            self.announce({format_address(vip_port.address): [node]})
        base = truth.vip_port_attributes(vip_port, node)
        verdict = {"lb_hop.outcome": outcome, "lb_hop.origin": "internal" if sender else "external"}
        for result in self._send(vip_port, error, sender, NO_ANSWER_SECONDS):
            self.expected[frozenset((base | verdict).items())] += 1
            record = {
                **base,
                **verdict,
                "client.address": result.client_address,
                "client.port": result.client_port,
                "error.type": outcome,
                "lb_hop.syn.retransmits": 0,
            }
            self._records.append(_complete(vip_port, record, sender))

    def fail(self, vip_port: VipPort, node: Node, pod: Pod, failure: str, error: str) -> None:
        """Make connections by one node to one pod, where each handshake fails; before a timeout a SYN is sent twice.

        Conntrack does not keep what was refused: the SNAT source is not held against anything.
        """
        self.announce({format_address(vip_port.address): [node]})
        hop = {"lb_hop.hop": truth.hop_class(vip_port, node, pod), "error.type": failure}
        key = frozenset((truth.vip_port_attributes(vip_port, node) | hop).items())
        for result in self._send(vip_port, error, None, ONE_RETRY_SECONDS):
            self.failures[key] += 1
            (destination,) = {(format_address(backend.address), backend.port) for backend in vip_port.backends}
            client = result.client_address, result.client_port
            told = truth.Told(client, node, ("", 0), destination, pod, result.connect_seconds)
            again = int(failure == "timeout")
            self._expect(vip_port, told, None, {"error.type": failure, "lb_hop.syn.retransmits": again})

    def _send(self, vip_port: VipPort, error: str, sender: Host | None, seconds: float) -> list[Connection]:
        host = sender or self.lab.client
        send = host.connect if vip_port.transport is Transport.TCP else host.send_udp
        vip = format_address(vip_port.address)
        results = send(vip, vip_port.port, SENT, concurrency=SENT, timeout=seconds)
        assert [result.error for result in results] == [error] * SENT
        return results

    def _expect(self, vip_port: VipPort, told: truth.Told, sender: Host | None, more: Attributes | None = None) -> None:
        origin = "internal" if sender else "external"
        base = truth.vip_port_attributes(vip_port, told.node)
        self.expected[frozenset((base | truth.verdict_attributes(vip_port, told, origin)).items())] += 1
        record = truth.record_attributes(vip_port, told, origin=origin) | (more or {})
        self._records.append(_complete(vip_port, record, sender))

    # what is told

    def check(self) -> None:
        """Hold that all that was sent so far is counted, and nothing else, and that each connection has its record."""
        books: dict[str, Counter[frozenset[Any]]] = {
            "lb_hop.connections": self.expected,
            "lb_hop.handshake.failures": self.failures,
            "lb_hop.replies.unseen": Counter(),
        }
        for metric, expected in books.items():
            with contextlib.suppress(TookTooLongError):
                wait_for(metric, partial(self._is_told, metric, expected), VERDICT_SECONDS)
            _hold(metric, self.counted(metric), expected)
        with contextlib.suppress(TookTooLongError):
            wait_for("the records", lambda: len(self.new_records()) >= len(self._records))
        _hold("records", _as_bag(record.attributes for record in self.new_records()), _as_bag(self._records))
        self.forget_records()

    def _is_told(self, metric: str, expected: Counter[frozenset[Any]]) -> bool:
        return self.counted(metric) == expected

    def exports(self) -> dict[str, list[Series]]:
        """Return the latest export of each agent, by the name of its node."""
        path = self._files["metrics"]
        if not path.exists():
            return {}
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - TAIL_BYTES))
            # Both ends may be cut.
            lines = file.read().split(b"\n")[:-1]
        found: dict[str, list[Series]] = {}
        for line in reversed(lines):
            if not line.startswith(b'{"resourceMetrics"'):
                break
            series = metric_series([json.loads(line)])
            found.setdefault(series[0].resource["k8s.node.name"], series)
            if len(found) == len(self.agents):
                break
        return found

    def latest(self, metric: str) -> list[Series]:
        """Return one metric's series of the latest export of each agent."""
        return [each for series in self.exports().values() for each in series if each.metric == metric]

    def counted(self, metric: str = "lb_hop.connections") -> Counter[frozenset[Any]]:
        """Return what a metric has counted so far, by all attributes."""
        return Counter({frozenset(s.attributes.items()): int(s.value) for s in self.latest(metric) if s.value})

    def placements(self, vip_port: VipPort) -> dict[str, dict[str, int]]:
        """Return lb_hop.endpoints of a VIP port as it is now: by node, then by placement."""
        found: dict[str, dict[str, int]] = {agent.node.name: {} for agent in self.agents}
        for each in self.latest("lb_hop.endpoints"):
            node = next(node for node in self.lab.nodes if node.name == each.attributes["k8s.node.name"])
            if truth.vip_port_attributes(vip_port, node).items() <= each.attributes.items():
                found[node.name][each.attributes["lb_hop.placement"]] = int(each.value)
        return found

    def new_records(self) -> list[LogRecord]:
        """Return the log records that have come since they were forgotten."""
        path = self._files["logs"]
        if not path.exists():
            return []
        with path.open("rb") as file:
            file.seek(self._done_bytes)
            whole = file.read()
        # The last line may be half written. (Line by line, its other half could come as a line of its own.)
        end = whole.rfind(b"\n") + 1
        self._seen_bytes = self._done_bytes + end
        return log_records(map(json.loads, whole[:end].splitlines()))

    def forget_records(self) -> None:
        """Be done with the records that were looked at, and with the expected ones."""
        self._done_bytes = self._seen_bytes
        self._records = []

    def wait_for_skipped(self, *texts: str) -> None:
        """Wait until /readyz of every agent shows exactly these as skipped, and why."""
        for agent in self.agents:
            wait_for_skipped(agent, *texts)


def wait_for_skipped(agent: Agent, *texts: str) -> None:
    """Wait until /readyz of an agent shows exactly these as skipped, and why."""

    def skipped() -> list[str]:
        return sorted(agent.part("topology")["detail"]["skipped"])

    with contextlib.suppress(TookTooLongError):
        wait_for("what is skipped", lambda: skipped() == sorted(texts))
    assert skipped() == sorted(texts)


@contextlib.contextmanager
def staged(
    lab: Lab,
    plane: ControlPlane,
    *,
    nodes: Sequence[Node] | None = None,
    settings: Mapping[str, str] | None = None,
    as_pods: bool = False,
    uid_code: int = 403,
) -> Iterator[Scene]:
    """Run a Collector, and an agent on these nodes, or on all, which finds the API server by a kubeconfig or as a pod.

    At the end, when they have told all, everything must be as it was sent, and nothing was asked of the API server but
    what they may.
    """
    before = len(plane.audit(AGENT))
    pod = plane.agent_as_pod() if as_pods else None
    with Collector(lab) as collector:
        wanted = (pod.settings if pod else plane.agent_settings()) | collector.settings() | SETTINGS
        run = partial(agents_on, vips=None, settings=wanted | dict(settings or {}), prefix=pod.prefix if pod else ())
        with contextlib.ExitStack() as agents:
            scene = Scene(lab, plane, collector, lambda joining: agents.enter_context(run(joining)))
            scene.join(nodes or lab.nodes)
            yield scene
            scene.check()
    _hold("the last export", scene.counted(), scene.expected)
    assert scene.new_records() == []
    assert {each.value for each in scene.latest("lb_hop.connections.pending")} <= {0}
    assert_least_rights(plane.audit(AGENT)[before:], scene.agents_started, uid_code=uid_code)


def assert_least_rights(requests: Sequence[Request], agents: int, *, uid_code: int) -> None:
    """Hold that so many agents have read the three resources, the cluster's uid once, and have asked nothing else."""
    uid = [request for request in requests if request.resource == "namespaces"]
    others = [request for request in requests if request.resource != "namespaces"]
    asked = {(request.verb, request.resource) for request in others}
    assert {pair for pair in READS if pair[0] != "get"} <= asked <= READS
    assert {(request.code, request.decision) for request in others} == {(200, "allow")}
    assert [(r.verb, r.path, r.code) for r in uid] == [("get", "/api/v1/namespaces/kube-system", uid_code)] * agents


def _complete(vip_port: VipPort, record: Attributes, sender: Host | None) -> Attributes:
    """Name the interface by which a connection came in, but for what conntrack alone tells of, and no SYNs of UDP."""
    unheard = {"network.interface.name"} if isinstance(sender, Node) else set()
    if vip_port.transport is not Transport.TCP:
        unheard |= {"lb_hop.syn.retransmits"}
        if record["lb_hop.outcome"] == "forwarded":
            unheard |= {"network.interface.name"}
    record["network.interface.name"] = f"vpod{sender.name[-1]}" if sender else "net0"
    return {name: value for name, value in record.items() if name not in unheard}


def _hold(what: str, told: Counter[frozenset[Any]], expected: Counter[frozenset[Any]]) -> None:
    surplus, missing = told - expected, expected - told
    shown = [[dict(sorted(each)) for each in list(bag)[:3]] for bag in (surplus, missing)]
    assert told == expected, f"{what}: {surplus.total()} too much: {shown[0]}, {missing.total()} missing: {shown[1]}"


def _as_bag(records: Iterable[Attributes]) -> Counter[frozenset[Any]]:
    """Count records by what the lab knows as well."""
    return Counter(
        frozenset(
            (name, value)
            for name, value in record.items()
            if name not in (TIMES | SOURCE if "error.type" in record else TIMES)
        )
        for record in records
    )
