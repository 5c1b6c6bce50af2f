"""Two tiers of Collectors: traces stay whole over any number of gateways; and what a Collector keeps over a restart."""

from __future__ import annotations

from collections import defaultdict
from contextlib import ExitStack
from typing import TYPE_CHECKING, NamedTuple, Self

import pytest

from tests.backends.collectors import DISK_QUEUE, Configured
from tests.backends.prometheus import REMOTE_WRITE, Prometheus
from tests.e2e.collector import endpoint
from tests.lab import Lab, reaper
from tests.lab.agent import Agent, agents_on
from tests.lab.requirements import needs_lab
from tests.lab.waiting import wait_for
from tests.unit.otlp_sink import HttpServer

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.lab import Node

pytestmark = [
    pytest.mark.root,
    pytest.mark.collector,
    pytest.mark.timeout(300),
    needs_lab,
]

SENT = 23
TARGET_PORT = 8080
VIP = "10.0.10.0"
NODE = "k8s.node.name"
GATEWAYS = "lb-hop-gateway"
"""The DNS name that balancer.yaml asks for by default."""


class Taken(NamedTuple):
    """What has come to the backend of one gateway: trace id → the nodes that told of it."""

    spans: dict[bytes, list[str]]
    logs: dict[bytes, list[str]]


class Backend:
    """In the place of Loki and Tempo behind one gateway, or of a vendor, on mgmt: keeps what comes. A context."""

    def __init__(self, lab: Lab) -> None:
        self._lab = lab
        self.server = HttpServer()
        self.server.address = lab.mgmt.address4
        self.start()
        self.url = f"http://{lab.mgmt.address4}:{self.server.port}"

    def start(self) -> None:
        """Listen, on the same port as before."""
        self._lab.mgmt.in_netns(self.server.start)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.server.stop()

    def taken(self) -> Taken:
        """Tell what has come so far of connections."""
        taken = Taken(defaultdict(list), defaultdict(list))
        for received in [*self.server.received]:
            if received.path == "/v1/traces":
                for group in received.message().resource_spans:
                    node = next(each.value.string_value for each in group.resource.attributes if each.key == NODE)
                    for span in (span for scoped in group.scope_spans for span in scoped.spans):
                        taken.spans[span.trace_id].append(node)
            if received.path == "/v1/logs":
                for group in received.message().resource_logs:
                    node = next(each.value.string_value for each in group.resource.attributes if each.key == NODE)
                    for record in (record for scoped in group.scope_logs for record in scoped.log_records):
                        if record.trace_id:  # none in the agents' own logs
                            taken.logs[record.trace_id].append(node)
        return taken


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    """Build three nodes, of which node1 takes in all; two pods serve `web`, one has no ear for `refused`."""
    with Lab(3) as built:
        for pod in built.pods:
            pod.serve(TARGET_PORT)
        built.apply(
            [
                built.vip_port(VIP, 80, backends=built.pods[1:], target_port=TARGET_PORT),
                built.vip_port(VIP, 81, service="refused", backends=built.pods[2:], target_port=TARGET_PORT + 1),
            ],
            announce={VIP: built.nodes[:1]},
        )
        yield built
    assert reaper.lab_namespaces(built.name) == []


def sent(agent: Agent, signal: str, count: int) -> bool:
    """Whether an agent has passed on so many records of a signal."""
    return bool(agent.shipped(signal).get("exported", 0) >= count)


class Tiers:
    """Two agents, a balancer for each, and gateways on as many nodes as there are."""

    def __init__(self, lab: Lab, stack: ExitStack, prometheus: Prometheus) -> None:
        self._lab = lab
        self._stack = stack
        self._hosts = lab.directory / "hosts"
        self._hosts.write_text("", encoding="ascii")
        self.backends: list[Backend] = []
        self.gateways: list[Configured] = []
        self._sent = 0
        # All start at once, and are waited for afterwards.
        gateways = [self._gateway(node) for node in lab.nodes[:2]]
        self._tell(gateways)
        settings = {"LB_HOP_PROMETHEUS_ENDPOINT": f"http://{prometheus.address}{REMOTE_WRITE}"}
        self.balancers = [
            Configured(node, ["balancer.yaml"], settings, listen=node.mgmt4, hosts=self._hosts)
            for node in lab.nodes[:2]
        ]
        # The second sees the same packets and says that it is node2, as the agent of the backend's node will do.
        self.agents = [
            Agent(
                lab.nodes[0],
                lab.vips_path,
                endpoint(balancer.listen) | {"OTEL_LB_HOP_NODE_NAME": f"node{number}"},
                name=f"agent{number}",
                port=9464 + number,
            )
            for number, balancer in enumerate(self.balancers, 1)
        ]
        self.gateways += [stack.enter_context(gateway) for gateway in gateways]
        for balancer in self.balancers:
            stack.enter_context(balancer)
        for agent in self.agents:
            stack.enter_context(agent)

    def add_gateway(self) -> None:
        """Start another gateway, on the next node; nobody is told."""
        gateway = self._gateway(self._lab.nodes[len(self.gateways)])
        self.gateways.append(self._stack.enter_context(gateway))

    def _gateway(self, node: Node) -> Configured:
        backend = self._stack.enter_context(Backend(self._lab))
        self.backends.append(backend)
        settings = {
            "LB_HOP_LOKI_ENDPOINT": backend.url,
            "LB_HOP_TEMPO_ENDPOINT": backend.url,
            "LB_HOP_DECISION_WAIT": "1s",
        }
        return Configured(node, ["gateway.yaml"], settings, listen=node.address4)

    def resolve(self, gateways: list[Configured]) -> None:
        """Let the DNS name stand for these gateways, and wait until both balancers know."""
        self._tell(gateways)
        for balancer in self.balancers:
            wait_for(
                f"{len(gateways)} gateways",
                lambda of=balancer: of.own_metric("otelcol_loadbalancer_num_backends") == len(gateways),  # type: ignore[misc]
                30,
            )

    def connect(self, count: int) -> None:
        """Make connections; both agents have passed on their records when it returns."""
        self._lab.connect(VIP, 80, count)
        self._sent += count
        for agent in self.agents:
            for signal in ("logs", "traces"):
                wait_for(f"{signal} of {agent.node.name}", lambda a=agent, s=signal: sent(a, s, self._sent), 30)  # type: ignore[misc]

    def whole(self, count: int, known: set[bytes]) -> list[set[bytes]]:
        """Wait for so many traces beyond those known, each whole in one place; tell which are where."""

        def told(taken: list[dict[bytes, list[str]]]) -> int:
            return sum(len({*nodes}) for each in taken for trace, nodes in each.items() if trace not in known)

        def look() -> list[Taken]:
            taken = [backend.taken() for backend in self.backends]
            come = told([each.spans for each in taken]), told([each.logs for each in taken])
            return taken if come == (2 * count, 2 * count) else []

        taken = wait_for(f"{count} traces with their log records", look, 60)
        for each in taken:
            assert all({*nodes} == {"node1", "node2"} for nodes in each.spans.values())
        places = [each.spans.keys() - known for each in taken]
        assert sum(map(len, places)) == len(set().union(*places)) == count
        return places

    def times(self) -> set[int]:
        """Tell how often spans have come to the backends."""
        traces = [nodes for backend in self.backends for nodes in backend.taken().spans.values()]
        return {nodes.count(node) for nodes in traces for node in nodes}

    def _tell(self, gateways: list[Configured]) -> None:
        lines = [f"{gateway.listen} {GATEWAYS}\n" for gateway in gateways]
        self._hosts.write_text("".join(lines), encoding="ascii")


@pytest.mark.prometheus
def test_two_tiers(lab: Lab) -> None:
    """Whatever agent a span comes from, its trace is whole on one gateway: with two, with a third, with one that died.

    Metrics have one way and one writer.
    """
    with ExitStack() as stack:
        prometheus = Prometheus(lab)
        tiers = Tiers(lab, stack, stack.enter_context(prometheus))
        tiers.connect(40)
        two = tiers.whole(40, set())
        assert all(two)

        tiers.add_gateway()
        tiers.resolve(tiers.gateways)
        tiers.connect(60)
        three = tiers.whole(60, set().union(*two))
        assert all(three)
        assert tiers.times() == {1}

        tiers.gateways[0].kill()
        known = set().union(*two, *three)
        tiers.connect(40)
        tiers.resolve(tiers.gateways[1:])
        left = tiers.whole(40, known)
        assert (bool(left[0]), bool(left[1]), bool(left[2])) == (False, True, True)
        # What the others had taken of a batch came again with the rest of it, a few times and not without a pause.
        assert max(tiers.times()) <= 10

        query = f'sum by (k8s_node_name) (lb_hop_connections_total{{server_address="{VIP}"}})'

        def sums() -> dict[str, float]:
            return {sample.labels["k8s_node_name"]: sample.value for sample in prometheus.query(query)}

        wait_for("all connections of both agents", lambda: sums() == {"node1": 140.0, "node2": 140.0}, 30)
        for balancer in tiers.balancers:
            assert balancer.own_metric("otelcol_exporter_send_failed_metric_points") == 0


def test_gateway_keeps_failures(lab: Lab) -> None:
    """A gateway that is to keep no share of the traces keeps those with an error, and every log record."""
    with Backend(lab) as backend:
        settings = {
            "LB_HOP_LOKI_ENDPOINT": backend.url,
            "LB_HOP_TEMPO_ENDPOINT": backend.url,
            "LB_HOP_DECISION_WAIT": "1s",
            "LB_HOP_KEEP_PERCENT": "0",
        }
        with Configured(lab.mgmt, ["gateway.yaml"], settings, listen=lab.mgmt.address4):
            to_gateway = endpoint(lab.mgmt.address4) | {"OTEL_METRICS_EXPORTER": "none"}
            with agents_on(lab.nodes[:1], lab.vips_path, to_gateway):
                lab.connect(VIP, 80, SENT)
                lab.connect(VIP, 81, 3)
            wait_for("log records", lambda: len(backend.taken().logs) == SENT + 3, 30)
            wait_for("traces", lambda: len(backend.taken().spans) >= 3, 30)
        # It has ended, and sent what it had to send.
        assert len(backend.taken().spans) == 3


def test_disk_queue(lab: Lab, tmp_path: Path) -> None:
    """With disk-queue.yaml a Collector that is killed while nobody takes its data sends it when it runs again."""
    with Backend(lab) as backend:
        settings = {
            "LB_HOP_VENDOR_ENDPOINT": backend.url,
            "LB_HOP_QUEUE_STORAGE": "file_storage",
            "LB_HOP_QUEUE_FOLDER": str(tmp_path / "queue"),
        }
        backend.server.stop()
        with Configured(lab.mgmt, ["vendor.yaml", DISK_QUEUE], settings, listen=lab.mgmt.address4) as collector:
            with agents_on(lab.nodes[:1], lab.vips_path, endpoint(lab.mgmt.address4)):
                lab.connect(VIP, 80, SENT)
            collector.kill()
            backend.start()
            collector.again()
            wait_for("log records", lambda: len(backend.taken().logs) >= SENT, 60)
            wait_for("spans", lambda: len(backend.taken().spans) >= SENT, 60)
        taken = backend.taken()
        assert [len(nodes) for nodes in taken.logs.values()] == [1] * SENT
        assert [len(nodes) for nodes in taken.spans.values()] == [1] * SENT
