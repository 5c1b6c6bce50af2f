"""An agent that ends, by SIGTERM or SIGKILL, and begins again: nothing is lost, nothing counted twice."""

from __future__ import annotations

import contextlib
import os
import random
import socket
import subprocess
import sys
import time
from functools import partial
from typing import TYPE_CHECKING

import pytest

from otel_lb_hop.agent import TICK_SECONDS
from otel_lb_hop.core.pinned import NOTE_BYTES, STATE, pack_state, unpack_state
from otel_lb_hop.kernel.bpf import BPF_TCX_EGRESS, BPF_TCX_INGRESS, Map, open_pinned
from otel_lb_hop.model import Transport
from tests.e2e.collector import Collector, endpoint
from tests.e2e.conftest import TARGET_PORT
from tests.lab import programs
from tests.lab.agent import ROOT, Account, Agent, environment, run_to_end
from tests.lab.bpffs import bpffs
from tests.lab.generator import Generator, Traffic, forget_closed_quickly
from tests.lab.requirements import needs_lab
from tests.lab.waiting import wait_for

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from tests.e2e.otlp import Series
    from tests.lab import Lab, Node

pytestmark = [pytest.mark.root, pytest.mark.collector, needs_lab]

SENT = 23
VIP, FAST_VIP = "10.0.41.0", "10.0.41.1"
RATE = 5_000
FAST_PORT = 8081
UDP_PORT = 8053
KILLS = 20


@pytest.fixture(autouse=True)
def service(lab: Lab) -> None:
    """Let node1 take in all the traffic of two VIPs."""
    backends = lab.vip_port(VIP, 80, backends=lab.pods, target_port=TARGET_PORT)
    fast = lab.vip_port(FAST_VIP, 80, service="fast", backends=lab.pods[1:], target_port=FAST_PORT)
    lab.apply([backends, fast], announce={VIP: lab.nodes[:1], FAST_VIP: lab.nodes[:1]})


@pytest.fixture
def pins(lab: Lab) -> Iterator[Path]:
    """Say where the agent pins."""
    with bpffs(lab.directory / "bpf") as mounted:
        yield mounted / "otel-lb-hop"


def counted(collector: Collector) -> float:
    """Return how many connections the metrics have so far."""
    return sum(series.value for series in collector.series("lb_hop.connections"))


def observed(series: Series) -> list[float]:
    """Tell how many connections each point stands for."""
    return [point.histogram.observations if point.histogram else point.value for point in series.points]


def test_twenty_kills_under_load(lab: Lab, tmp_path: Path, pins: Path) -> None:
    """SIGKILL at any moment, also while it begins: counters are exact, never fall, and keep their start times."""
    forget_closed_quickly(lab)
    generator = Generator(tmp_path)
    moments = random.Random(6)
    with Collector(lab, compact=True, deltas=True) as collector:
        settings = collector.settings() | {"OTEL_LB_HOP_PIN_PATH": str(pins)}
        begin = partial(Agent, lab.nodes[0], lab.vips_path, settings)
        agent = begin().wait_ready()
        with generator.serving(lab.pods[1], FAST_PORT), Traffic(lab, generator, FAST_VIP, RATE) as traffic:
            for _ in range(KILLS):
                time.sleep(moments.uniform(0.1, 2.0))
                agent.kill()
                agent = begin()
            agent.wait_ready()
            made = traffic.end()
        wait_for("all connections", lambda: counted(collector) == made, 10)
        agent.stop()
        assert made > KILLS * RATE / 4
        for metric in ("lb_hop.connections", "lb_hop.handshake.duration", "lb_hop.forward.duration"):
            for series in collector.series(metric):
                assert len({point.start_ns for point in series.points}) == 1
                values = observed(series)
                assert values == sorted(values)
        for metric in ("lb_hop.handshake.duration", "lb_hop.forward.duration"):
            assert sum(observed(each)[-1] for each in collector.series(metric)) == made
        assert (
            sum(point.value for each in collector.delta_series("lb_hop.connections") for point in each.points) == made
        )


class Agents:
    """Agents on node1 that pin in one place, one after another."""

    def __init__(self, lab: Lab, collector: Collector, pins: Path) -> None:
        self._lab = lab
        self.collector = collector
        self._settings = collector.settings() | {"OTEL_LB_HOP_PIN_PATH": str(pins)}
        self.sent = 0

    def begin(self, **settings: str) -> Agent:
        """Run one."""
        return Agent(self._lab.nodes[0], self._lab.vips_path, self._settings | settings).wait_ready()

    @contextlib.contextmanager
    def one(self, **settings: str) -> Iterator[Agent]:
        """Run one; on exit it is ended by SIGTERM."""
        with self.begin(**settings) as agent:
            yield agent

    def send(self) -> None:
        """Make 23 connections, all of which succeed."""
        assert [result.error for result in self._lab.connect(VIP, 80, SENT)] == [""] * SENT
        self.sent += SENT

    def wait_for_all(self) -> list[Series]:
        """Wait until all connections that were sent are counted."""
        self.collector.wait_for_series(
            "lb_hop.connections", lambda found: sum(each.value for each in latest(found)) == self.sent
        )
        return latest(self.collector.series("lb_hop.connections"))

    def uninstall(self) -> str:
        """Run the command; answers what it says."""
        return uninstall(self._lab.nodes[0], self._settings)


def latest(found: list[Series]) -> list[Series]:
    """Leave the series that are of the latest export."""
    newest = max(each.last.time_ns for each in found)
    return [each for each in found if each.last.time_ns == newest]


def uninstall(node: Node, settings: Mapping[str, str]) -> str:
    """Run the command on a node; answers what it says."""
    command = [sys.executable, "-m", "otel_lb_hop", "uninstall"]
    done = node.run(["env", "-C", str(ROOT), *command], check=False, env=environment(settings))
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


@pytest.fixture
def agents(lab: Lab, pins: Path) -> Iterator[Agents]:
    """Give a Collector, a place to pin, and clean both up."""
    with Collector(lab) as collector:
        yield Agents(lab, collector, pins)
        assert pins.parent.is_mount()
        uninstall(lab.nodes[0], {"OTEL_LB_HOP_PIN_PATH": str(pins)})
        assert pinned_in(pins.parent) == []


def pinned_in(mounted: Path) -> list[Path]:
    """List what stands in a bpffs besides the two files that the kernel puts into each."""
    return [path for path in mounted.iterdir() if path.name not in {"maps.debug", "progs.debug"}]


def starts(found: list[Series]) -> set[int]:
    """Tell the start times of all points."""
    return {point.start_ns for each in found for point in each.points}


def test_counting_goes_on_without_an_agent(agents: Agents) -> None:
    """After SIGTERM the programs go on; the next agent needs no compiler, and has what came meanwhile, records too."""
    with agents.one():
        agents.send()
    agents.send()
    with agents.one() as second:
        assert "nothing to compile; counters since 20" in second.stderr
        agents.send()
        found = agents.wait_for_all()
        wait_for("log records", lambda: len(agents.collector.logs()) == 3 * SENT)
        wait_for("spans", lambda: len(agents.collector.spans()) == 3 * SENT)
        assert second.part("pins") == {"healthy": True, "vital": False, "detail": "pinned"}
    assert len(starts(found)) == 1
    assert len({record.trace_id for record in agents.collector.logs()}) == 3 * SENT
    assert {record.attributes["k8s.service.name"] for record in agents.collector.logs()} == {"web"}
    kernel, ring = second.accounts()["kernel"], second.accounts()["ring"]
    assert kernel == Account(3 * SENT, 3 * SENT, {}, 0)
    assert ring == Account(3 * SENT, 2 * SENT, {}, 0, earlier=SENT)


def test_flows_that_began_without_an_agent(lab: Lab, agents: Agents) -> None:
    """What nobody heard of from conntrack is counted by the next agent, and what one had heard of is not again."""
    dns = lab.vip_port(VIP, 53, service="dns", transport=Transport.UDP, backends=lab.pods, target_port=UDP_PORT)
    lab.apply([dns], announce={VIP: lab.nodes[:1]})
    for pod in lab.pods:
        pod.serve_udp(UDP_PORT)

    def ask() -> None:
        assert all(answer.ok for answer in lab.client.send_udp(VIP, 53, SENT))
        agents.sent += SENT

    first = agents.begin()
    assert first.part("conntrack")["detail"] == "heard"
    ask()
    agents.wait_for_all()
    wait_for("log records", lambda: len(agents.collector.logs()) == SENT)
    first.kill()
    ask()
    with agents.one() as second:
        assert f"conntrack has {2 * SENT} connections of UDP or SCTP" in second.stderr
        agents.wait_for_all()
        ask()
        agents.wait_for_all()
    with agents.one():
        ask()
        found = agents.wait_for_all()
    assert len(starts(found)) == 1
    wait_for("log records", lambda: len(agents.collector.logs()) == 4 * SENT)


def test_records_that_a_killed_agent_had(lab: Lab, pins: Path) -> None:
    """What an agent took from the ring and could not send is counted as lost by the next one, and all the rest told."""
    nowhere = endpoint(lab.mgmt.address4) | {"OTEL_LB_HOP_PIN_PATH": str(pins)}
    agent = Agent(lab.nodes[0], lab.vips_path, nowhere).wait_ready()
    assert all(result.ok for result in lab.connect(VIP, 80, SENT))
    wait_for(
        "records that wait",
        lambda: agent.shipped("logs").get("queued", 0) + agent.shipped("logs").get("sending", 0) == SENT,
    )
    time.sleep(2 * TICK_SECONDS)  # it notes how far it has come once in each
    agent.kill()
    assert all(result.ok for result in lab.connect(VIP, 80, SENT))
    with Collector(lab) as collector:
        with Agent(lab.nodes[0], lab.vips_path, nowhere) as agent:
            wait_for("log records", lambda: len(collector.logs()) == SENT)
        assert agent.accounts()["kernel"] == Account(2 * SENT, 2 * SENT, {}, 0)
        assert agent.accounts()["ring"] == Account(2 * SENT, SENT, {"unsettled": SENT}, 0)
    uninstall(lab.nodes[0], nowhere)


def test_uninstall_leaves_nothing(lab: Lab, agents: Agents, pins: Path) -> None:
    """Programs, links, pins: none of it is left; a second time there is nothing to do."""
    with agents.one() as agent:
        node = lab.nodes[0]
        indexes = [index for index, name in node.in_netns(socket.if_nameindex) if name != "lo"]
        refused = node.run(
            ["env", "-C", str(ROOT), sys.executable, "-m", "otel_lb_hop", "uninstall"],
            check=False,
            env=environment({"OTEL_LB_HOP_PIN_PATH": str(pins)}),
        )
        assert refused.returncode == 1
        assert "another agent counts here" in refused.stderr
        agents.send()
        agents.wait_for_all()
    hooked = node.in_netns(lambda: [programs.attached(index, BPF_TCX_INGRESS) for index in indexes])
    assert [len(each) for each in hooked] == [1] * len(indexes)
    assert agents.uninstall() == f"{pins}: programs, links and counters removed\n"
    assert pinned_in(pins.parent) == []
    # The kernel frees a link a moment after its name.
    wait_for("the end of its BPF programs", lambda: not programs.still_loaded(agent.programs))
    for hook in (BPF_TCX_INGRESS, BPF_TCX_EGRESS):
        assert [node.in_netns(partial(programs.attached, index, hook)) for index in indexes] == [[]] * len(indexes)
    assert agents.uninstall() == "nothing was left on this node\n"


def test_a_second_agent_refuses(lab: Lab, agents: Agents, pins: Path) -> None:
    """Two agents would count everything twice."""
    with agents.one():
        code, said = run_to_end(
            lab.nodes[0], environment({"OTEL_LB_HOP_PIN_PATH": str(pins), "OTEL_LB_HOP_VIPS_FILE": str(lab.vips_path)})
        )
        assert code == 1
        assert said == (
            f"otel-lb-hop: another agent counts here, it holds {pins}: stop that one first. "
            "Two would count every connection twice\n"
        )
        agents.send()
        agents.wait_for_all()


@pytest.mark.parametrize("change", ["build", "ring", "layout"])
def test_upgrade(agents: Agents, pins: Path, change: str) -> None:
    """Other programs, or a ring of another size, go on with the counters; another layout begins new series."""
    with agents.one() as first:
        agents.send()
        agents.wait_for_all()
        maps = programs.descriptors(first.process.pid)["anon_inode:bpf-map"]
    settings = {"OTEL_LB_HOP_RECORD_RATE": "10000"} if change == "ring" else {}
    if change != "ring":
        rewrite_state(pins, change)
    agents.send()
    with agents.one(**settings) as second:
        agents.send()
        if change == "layout":
            assert "all series begin anew, with a new start time" in second.stderr
            agents.collector.wait_for_series(
                "lb_hop.connections",
                lambda found: len(starts(found)) == 2 and sum(each.value for each in latest(found)) == SENT,
            )
            assert not programs.still_loaded(first.programs)
        else:
            assert "the programs have changed: new ones go on with the same counters" in second.stderr
            assert len(starts(agents.wait_for_all())) == 1
        assert programs.descriptors(second.process.pid)["anon_inode:bpf-map"] == maps
        records = {"build": 3, "ring": 3, "layout": 2}[change] * SENT
        wait_for("log records", lambda: len(agents.collector.logs()) == records)
    assert second.accounts()["ring"].dropped == {}
    assert len(list(pins.iterdir())) == 1


def rewrite_state(pins: Path, change: str) -> None:
    """Let the pinned state be that of an agent with another build, or another layout."""
    (notes,) = pins.glob("*/notes")
    table = Map(open_pinned(notes), 4, NOTE_BYTES)
    state = unpack_state(table.get(STATE) or b"")
    changed = state._replace(build="another") if change == "build" else state._replace(layout="another")
    table.put(STATE, pack_state(changed))
    os.close(table.fd)


@pytest.mark.parametrize("obstacle", ["no bpffs", "read-only"])
def test_without_pins(lab: Lab, tmp_path: Path, obstacle: str) -> None:
    """Where nothing can be pinned the agent counts all the same, says so, and leaves nothing."""
    with contextlib.ExitStack() as stack:
        path = tmp_path / "otel-lb-hop"
        if obstacle == "read-only":
            path = stack.enter_context(bpffs(lab.directory / "bpf")) / "otel-lb-hop"
            subprocess.run(["mount", "-o", "remount,ro", str(path.parent)], check=True)
        collector = stack.enter_context(Collector(lab))
        settings = collector.settings() | {"OTEL_LB_HOP_PIN_PATH": str(path)}
        with Agent(lab.nodes[0], lab.vips_path, settings, pinned=False) as agent:
            assert all(result.ok for result in lab.connect(VIP, 80, SENT))
            wait_for("all connections", lambda: counted(collector) == SENT)
            assert agent.readyz().content["degraded"] == ["pins"]
            reason = "and not on a bpffs" if obstacle == "no bpffs" else "Read-only file system"
            assert reason in agent.part("pins")["detail"]
            assert agent.stderr.count("nothing is pinned, so counters begin anew with each start") == 1
        assert not path.exists()


def test_interfaces_that_are_no_longer_watched(lab: Lab, agents: Agents) -> None:
    """An agent takes off what one before it watched and it does not; what both watch stays on without a gap."""
    with agents.one() as first:
        hooked = first.part("interfaces")["detail"]["hooked"]
    uplink = [name for name in hooked if name.startswith(("eth", "up"))][:1]
    with agents.one(OTEL_LB_HOP_INTERFACES=",".join(f"!{name}" for name in uplink)) as second:
        assert second.part("interfaces")["detail"]["hooked"] == sorted({*hooked} - {*uplink})
        node = lab.nodes[0]
        index = node.in_netns(lambda: socket.if_nametoindex(uplink[0]))
        assert node.in_netns(lambda: programs.attached(index, BPF_TCX_INGRESS)) == []
    with agents.one() as third:
        assert third.part("interfaces")["detail"]["hooked"] == hooked
        agents.send()
        agents.wait_for_all()


def test_another_node_name(agents: Agents) -> None:
    """What was counted for a node of another name is not told again under the new one."""
    with agents.one():
        agents.send()
        agents.wait_for_all()
    with agents.one(OTEL_LB_HOP_NODE_NAME="renamed") as second:
        assert "the node was called node1 before, now renamed: all series begin anew" in second.stderr
        agents.send()
        wait_for("the renamed node's", lambda: sum_of(agents.collector, "renamed") == SENT)
    assert sum_of(agents.collector, "node1") == SENT


def sum_of(collector: Collector, node: str) -> float:
    """Return how many connections were told of a node."""
    found = collector.series("lb_hop.connections")
    return sum(series.value for series in found if series.attributes["k8s.node.name"] == node)
