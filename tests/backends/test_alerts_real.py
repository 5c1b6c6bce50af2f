"""Alerts fire from real faults, name what is at fault and nothing else, and resolve after the repair.

The rules are those that operators load, in quick motion (judge.py). All faults but those that need an hour of history
are there at once, each on a VIP of its own.
"""

from __future__ import annotations

import contextlib
import json
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import pytest

from otel_lb_hop.model import Policy
from tests.backends import rule_files
from tests.backends.callers import Callers, Calls
from tests.backends.judge import (
    EXPORT_MS,
    FACTOR,
    NOBODY_THERE,
    Alert,
    Course,
    Judge,
    judging_server,
)
from tests.backends.scene import run_collector
from tests.backends.server import Server
from tests.e2e.collector import endpoint
from tests.e2e.conftest import strangers
from tests.lab import Lab, reaper
from tests.lab.agent import Agent, agents_on
from tests.lab.generator import forget_closed_quickly
from tests.lab.requirements import needs_lab
from tests.lab.waiting import wait_for
from tests.peers import build

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.lab import Host, Pod

pytestmark = [
    pytest.mark.root,
    pytest.mark.collector,
    pytest.mark.prometheus,
    pytest.mark.timeout(1_200),
    needs_lab,
]

LOGS_PORT = 14317

SERVED, REFUSED, SILENT, SLOW = 8080, 8081, 8082, 8083


class Service(NamedTuple):
    """One Service with one VIP, called all the time; each stands for one fault."""

    name: str
    vip: str
    pods: tuple[str, ...]
    announced: tuple[str, ...]
    wrongly: tuple[str, ...]
    """The nodes that announce it while there is the fault."""
    rate: float
    target: int = SERVED
    policy: Policy = Policy.CLUSTER
    patience_seconds: float = 0.5


WEB = Service("web", "10.0.10.0", ("node1-pod1", "node1-pod2", "node2-pod1"), ("node1", "node2", "node3"), (), 60)
"""Its router prefers one node to another."""
WEIGHTS = {"node1": 8, "node2": 1}
FAR = Service("far", "10.0.10.1", ("node1-pod1", "node3-pod1", "node3-pod2"), ("node3",), ("node1",), 20)
"""Comes in where few of its endpoints are."""
LOCAL = Service("local", "10.0.10.2", ("node1-pod1",), ("node1",), ("node1", "node2"), 30, policy=Policy.LOCAL)
"""Announced where no endpoint is."""
EMPTY = Service("empty", "10.0.10.3", ("node1-pod1",), ("node1",), ("node1",), 10)
"""Its endpoint is not ready."""
DROPPED = Service("dropped", "10.0.10.4", ("node2-pod1",), ("node2",), ("node2",), 10)
"""A firewall on the node is before kube-proxy."""
WRONG = Service("wrong", "10.0.10.5", ("node2-pod1",), ("node2",), ("node2",), 10, REFUSED)
"""Nobody listens."""
MUTE = Service("mute", "10.0.10.6", ("node1-pod2",), ("node1",), ("node1",), 10, SILENT, patience_seconds=2.5)
"""Nobody answers."""
LOSSY = Service("lossy", "10.0.10.7", ("node1-pod2",), ("node1",), ("node1",), 12, SLOW, patience_seconds=2.5)
"""Only the second SYN arrives."""
SPLIT = Service("split", "10.0.10.8", ("node1-pod1",), ("node1",), ("node1", "node2"), 20)
"""An L2 VIP that two nodes answer for."""
MOVED = Service("moved", "10.0.10.9", ("node1-pod1",), ("node1",), ("node2",), 20)
"""An L2 VIP that fails over, which is no fault."""
QUIET = Service("quiet", "10.0.10.10", ("node2-pod1",), ("node2",), (), 80)
"""Nobody announces it any more."""
CALM = Service("calm", "10.0.10.11", ("node3-pod1",), ("node3",), ("node3",), 10)
"""Has no fault."""
SERVICES = (WEB, FAR, LOCAL, EMPTY, DROPPED, WRONG, MUTE, LOSSY, SPLIT, MOVED, QUIET, CALM)
SOON = {WEB.name, FAR.name, LOCAL.name, EMPTY.name}
"""Those whose fault lies in an announcement or an endpoint, and needs no history."""
LATE = {SPLIT.name, MOVED.name, QUIET.name}
"""Those whose fault shows only against the hour before."""

_RULES = {
    DROPPED: f"type filter hook prerouting priority raw\nip daddr {DROPPED.vip} drop",
    WRONG: f"type filter hook input priority 0\ntcp dport {REFUSED} reject with tcp reset",
    MUTE: f"type filter hook input priority 0\ntcp dport {SILENT} drop",
    LOSSY: f"type filter hook input priority 0\ntcp dport != {SLOW} return\n"
    "tcp flags & (syn | ack) == syn ip saddr . tcp sport != @seen add @seen { ip saddr . tcp sport } drop",
}
"""What drops or refuses, in the place named there."""

AT_FAULT_SOON: set[Alert] = {
    *(
        ("LbHopVipBlackholed", severity, service, node, outcome)
        for severity in ("critical", "warning")
        for service, node, outcome in (
            ("local", "node2", "no_local_endpoints"),
            ("empty", "node1", "no_endpoints"),
            ("dropped", "node2", "dropped"),
        )
    ),
    *(
        ("LbHopHandshakesFail", severity, service, failure)
        for severity in ("critical", "warning")
        for service, failure in (("wrong", "refused"), ("mute", "timeout"))
    ),
    ("LbHopSynRetransmits", "warning", "lossy", "node1"),
    ("LbHopEcmpImbalance", "warning", "web", "node1"),
    ("LbHopEcmpImbalance", "warning", "web", "node2"),
    ("LbHopAvoidableHops", "info", "far"),
    ("LbHopZoneCrossing", "info", "far"),
    *(("LbHopRecordsDropped", "warning", f"node{number}", "refused") for number in (1, 2, 3)),
    *(
        ("LbHopPartUnhealthy", "warning", f"node{number}", part)
        for part in ("logs", "agent_logs")
        for number in (1, 2, 3)
    ),
}
AT_FAULT_LATE: set[Alert] = {
    ("LbHopL2VipOnTwoNodes", "warning", "split"),
    ("LbHopVipWithoutNode", "warning", "quiet"),
    ("LbHopAgentGone", "warning", "node3"),
    ("LbHopAgentsMissing", "warning"),
}


class Stage:
    """The lab with its Services, and a hand on every fault."""

    def __init__(self, lab: Lab) -> None:
        self.lab = lab
        self.nodes = {node.name: node for node in lab.nodes}
        self.pods = {pod.name: pod for pod in lab.pods}
        for pod in lab.pods:
            for port in (SERVED, REFUSED, SILENT, SLOW):
                pod.serve(port)
        self.apply(faults=set())

    def apply(self, faults: set[str]) -> None:
        """Give the lab its Services, those named with their fault, as far as announcements and endpoints make it."""
        vip_ports = []
        for service in SERVICES:
            pods: list[Pod] = [self.pods[name] for name in service.pods]
            ready = not (service is EMPTY and service.name in faults)
            backends = [replace(pod.backend(service.vip, service.target), ready=ready) for pod in pods]
            vip_ports.append(
                self.lab.vip_port(service.vip, 80, service=service.name, policy=service.policy, backends=backends)
            )
        on = {service: service.wrongly if service.name in faults else service.announced for service in SERVICES}
        announced = {service.vip: [self.nodes[name] for name in names] for service, names in on.items()}
        self.lab.apply(vip_ports, announce=announced)
        if WEB.name in faults:
            hops = [f"nexthop via {self.nodes[name].uplink4} weight {weight}" for name, weight in WEIGHTS.items()]
            self.lab.router.run(["ip", "route", "replace", WEB.vip, "proto", "77", *" ".join(hops).split()])

    def drop(self) -> None:
        """Let firewalls drop and refuse."""
        for service, rules in _RULES.items():
            seen = "set seen { type ipv4_addr . inet_service; flags dynamic, timeout; timeout 10s; size 65535; }"
            self._where(service).run(
                ["nft", "-f", "-"], text=f"table inet fault-{service.name} {{\n{seen}\nchain in {{\n{rules}\n}}\n}}\n"
            )

    def let_through(self) -> None:
        """Take these firewalls away."""
        for service in _RULES:
            self._where(service).run(["nft", "delete", "table", "inet", f"fault-{service.name}"])

    def _where(self, service: Service) -> Host:
        return self.nodes[service.announced[0]] if service is DROPPED else self.pods[service.pods[0]]


@pytest.fixture(scope="module")
def course(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Course]:
    """Let all go well, go wrong, and go well again."""
    with Lab(3, 2, zones=("zone-a", "zone-a", "zone-b")) as lab:
        with contextlib.ExitStack() as stack:
            server = stack.enter_context(judging_server(lab, tmp_path_factory.mktemp("rules")))
            stack.enter_context(run_collector(lab))
            yield _play(lab, Judge(server), stack)
        wait_for("no process that is left behind", lambda: strangers(lab) == set())
    assert reaper.lab_namespaces(lab.name) == []


def _play(lab: Lab, judge: Judge, stack: contextlib.ExitStack) -> Course:
    stage = Stage(lab)
    forget_closed_quickly(lab)
    settings = {
        **endpoint(lab.mgmt.address4),
        "OTEL_EXPORTER_OTLP_LOGS_ENDPOINT": f"http://{lab.mgmt.address4}:{LOGS_PORT}",
        "OTEL_TRACES_EXPORTER": "none",
        "OTEL_METRIC_EXPORT_INTERVAL": str(EXPORT_MS),
    }
    logs = stack.enter_context(_logs_collector(lab, "logs", takes_logs=True))
    judge.wait_for(NOBODY_THERE)
    stack.enter_context(agents_on(lab.nodes[:2], lab.vips_path, settings))
    third = Agent(lab.nodes[2], lab.vips_path, settings)
    stack.callback(third.kill)
    third.wait_ready()
    stack.enter_context(Callers(lab.client, [Calls(s.vip, s.rate, s.patience_seconds) for s in SERVICES]))
    judge.wait_for_answer("traffic of all", f"count(address:lb_hop_connections:increase10m > 0) == {len(SERVICES)}")
    before = judge.firing()

    # Much goes wrong at once.
    logs.stop()
    stack.enter_context(deaf := _logs_collector(lab, "deaf", takes_logs=False))
    stage.drop()
    stage.apply(SOON)
    judge.wait_for(AT_FAULT_SOON)
    # The rest is told by comparison with the hour before.
    l2 = f'server_address=~"{SPLIT.vip}|{MOVED.vip}"'
    judge.wait_for_answer("L2 VIPs that are known", f"count(address:lb_hop_l2:learned{{{l2}}}) == 2")
    hour, gap, ago = (rule_files.milliseconds(duration) // FACTOR for duration in ("1h", "12m", "70m"))
    quiet = f'address:lb_hop_connections:increase10m{{server_address="{QUIET.vip}"}}'
    judge.wait_for_answer(
        "a VIP that was busy for an hour",
        f"min_over_time({quiet}[{hour}ms] offset {gap}ms) >= 100 and {quiet} offset {ago}ms >= 100",
    )
    third.kill()
    stage.apply(SOON | LATE)
    judge.wait_for({("LbHopL2VipOnTwoNodes", "warning", "split")})
    stage.apply(SOON | LATE - {SPLIT.name})
    judge.wait_for(AT_FAULT_LATE - {("LbHopL2VipOnTwoNodes", "warning", "split")})

    # All is repaired.
    stage.let_through()
    stage.apply(faults=set())
    deaf.stop()
    stack.enter_context(_logs_collector(lab, "logs", takes_logs=True))
    stack.enter_context(Agent(lab.nodes[2], lab.vips_path, settings, name="again"))
    judge.wait_for_none()
    return Course(before, judge.texts, judge.ever_fired(), judge.problems())


def _logs_collector(lab: Lab, name: str, *, takes_logs: bool) -> Server:
    """Run a Collector that takes log records, or one that has no place for them and refuses them for good."""
    pipeline = {"receivers": ["otlp"], "exporters": ["debug"]}
    config = {
        "receivers": {"otlp": {"protocols": {"grpc": {"endpoint": f"[::]:{LOGS_PORT}"}}}},
        "exporters": {"debug": {}},
        "extensions": {"health_check": {"endpoint": "[::]:14133"}},
        "service": {
            "extensions": ["health_check"],
            "pipelines": {"logs" if takes_logs else "traces": pipeline},
            "telemetry": {"metrics": {"level": "none"}, "logs": {"level": "warn"}},
        },
    }
    argv = [str(build.build("otelcol")), "--config", "config.json"]
    return Server(lab, name, 14133, {"config.json": json.dumps(config)}, argv, ready="/")


def test_nothing_fires_while_all_is_well(course: Course) -> None:
    """Twelve Services in use and no alert."""
    assert course.before == set()


def test_alerts_fire_from_faults_and_from_nothing_else(course: Course) -> None:
    """Of an L2 VIP's failover (moved) nothing is told. That all have resolved is what the course has waited for."""
    assert course.ever == NOBODY_THERE | AT_FAULT_SOON | AT_FAULT_LATE


def test_every_rule_could_be_judged(course: Course) -> None:
    """No rule has joined what cannot be joined."""
    assert course.problems == []


def test_texts_name_what_is_at_fault(course: Course) -> None:
    """Texts have real names in them, and what their own queries answer."""
    black, two, gone, silent = (
        "\n".join(sorted(course.texts[name]))
        for name in ("LbHopVipBlackholed", "LbHopL2VipOnTwoNodes", "LbHopAgentGone", "LbHopVipWithoutNode")
    )
    assert "node2 loses" in black
    assert "default/local: Connections (external) to 10.0.10.2 port 80/tcp come in on node2" in black
    assert "the announcement is wrong" in black
    assert "2 nodes take in 10.0.10.8 of default/split at once" in two
    assert "node1 " in two
    assert "node2 " in two
    assert "The agent on node3 is gone" in gone
    assert "on node2, at most in ten minutes" in silent
