"""The VIP file changes, breaks and is repaired under a running agent; connections are counted all the while."""

from __future__ import annotations

import contextlib
from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from tests.e2e import truth
from tests.e2e.collector import Collector
from tests.e2e.conftest import TARGET_PORT
from tests.lab.agent import Agent, agents_on
from tests.lab.requirements import needs_lab
from tests.lab.waiting import wait_for

if TYPE_CHECKING:
    from collections.abc import Iterator

    from otel_lb_hop.model import VipPort
    from tests.e2e.otlp import LogRecord
    from tests.lab import Lab

pytestmark = [pytest.mark.root, pytest.mark.collector, needs_lab]

SENT = 23
VIP = "10.0.30.0"
BROKEN = """\
services:
  - name: default/web
    vips: [10.0.30.0]
    ports: [{port: 80}]
    backends: [{adress: 10.1.1.1}]
"""
BROKEN_LINE = 5


class Scene:
    """One agent on node1, which takes all the traffic, and the file that it reads."""

    def __init__(self, lab: Lab, collector: Collector, agent: Agent, service: VipPort) -> None:
        self.lab = lab
        self.collector = collector
        self.agent = agent
        self.service = service

    def write(self, text: str) -> None:
        """Replace the file at once, as editors and ConfigMaps do."""
        draft = self.lab.vips_path.with_suffix(".draft")
        draft.write_text(text, encoding="utf-8")
        draft.rename(self.lab.vips_path)

    def write_service(self, service: VipPort) -> None:
        """Let the file hold this Service alone."""
        self.write(self.lab.vips_file([service]))

    def send(self) -> tuple[list[truth.Told], list[LogRecord]]:
        """Send 23 connections; answers what the lab saw and the agent's records of them."""
        told_before = len(self.collector.logs())
        truth.forget_connections(self.lab)
        counts = truth.accepted_counts(self.lab)
        results = self.lab.connect(VIP, 80, SENT)
        told = truth.follow(self.lab, self.service, results, truth.accepted_since(self.lab, counts))
        wait_for("log records", lambda: len(self.collector.logs()) >= told_before + SENT)
        records = self.collector.logs()[told_before:]
        assert sorted(truth.clients_of(records)) == sorted(each.client for each in told)
        return told, records

    def wait_for_metric(self, metric: str, value: float, **attributes: str) -> None:
        """Wait until the series with these attributes (dots written as __) has this value."""
        wanted = {name.replace("__", "."): text for name, text in attributes.items()}.items()
        self.collector.wait_for_series(
            metric, lambda found: [s.value for s in found if wanted <= s.attributes.items()] == [value]
        )

    def counted(self) -> float:
        """Return how many connections the metrics have so far."""
        return sum(series.value for series in self.collector.series("lb_hop.connections"))

    def hops(self) -> Counter[str]:
        """Return the connections by hop class so far."""
        found: Counter[str] = Counter()
        for series in self.collector.series("lb_hop.connections"):
            found[series.attributes.get("lb_hop.hop", "")] += int(series.value)
        return +found


@contextlib.contextmanager
def staged(lab: Lab, *, left_out: int = 0) -> Iterator[Scene]:
    """Announce a VIP of two backends by node1 only, with an agent there that exports twice a second.

    The file that the agent begins with leaves the first backends out.
    """
    service = lab.vip_port(VIP, 80, backends=lab.pods, target_port=TARGET_PORT)
    lab.apply([service], announce={VIP: lab.nodes[:1]})
    known = replace(service, backends=service.backends[left_out:])
    lab.vips_path.write_text(lab.vips_file([known]), encoding="utf-8")
    with Collector(lab) as collector, agents_on(lab.nodes[:1], lab.vips_path, collector.settings()) as (agent,):
        yield Scene(lab, collector, agent, service)


@pytest.fixture
def scene(lab: Lab) -> Iterator[Scene]:
    """Stage it with a file that names everything."""
    with staged(lab) as scene:
        yield scene


@pytest.fixture
def scene_without_local(lab: Lab) -> Iterator[Scene]:
    """Stage it with a file that does not name the backend on node1."""
    with staged(lab, left_out=1) as scene:
        yield scene


def test_backend_added(scene_without_local: Scene) -> None:
    """A backend that the file does not name yet has hop unknown; once it does, its class, and the old count stays."""
    scene = scene_without_local
    scene.wait_for_metric("lb_hop.endpoints", 0, lb_hop__placement="local")
    told, records = scene.send()
    unknown = [each for each in told if each.pod.node == "node1"]
    expected = {each.client: each for each in told}
    assert 0 < len(unknown) < SENT
    for record in records:
        attributes, each = record.attributes, expected[truth.clients_of([record])[0]]
        # What can be seen on the wire is told all the same.
        assert (attributes["source.address"], attributes["source.port"]) == each.source
        assert (attributes["destination.address"], attributes["destination.port"]) == each.destination
        assert record.event_name == "lb_hop.connection.forwarded"
        named = {name for name in attributes if name.startswith(("destination.k8s.", "destination.cloud."))}
        if each in unknown:
            assert attributes["lb_hop.hop"] == "unknown"
            assert not named
            assert "lb_hop.zone.crossed" not in attributes
        else:
            assert (attributes["lb_hop.hop"], len(named)) == ("required", 4)
    wait_for("metrics", lambda: scene.counted() == SENT)
    assert scene.hops() == {"unknown": len(unknown), "required": SENT - len(unknown)}

    scene.write_service(scene.service)
    scene.wait_for_metric("lb_hop.endpoints", 1, lb_hop__placement="local")
    told, records = scene.send()
    local = sum(each.pod.node == "node1" for each in told)
    assert Counter(record.attributes["lb_hop.hop"] for record in records) == {"none": local, "avoidable": SENT - local}
    wait_for("metrics", lambda: scene.counted() == 2 * SENT)
    before = {"unknown": len(unknown), "required": SENT - len(unknown)}
    assert scene.hops() == before | {"none": local, "avoidable": SENT - local}


def test_backend_removed(scene: Scene) -> None:
    """A backend that the file no longer names keeps its class and name for a while: traffic to it has not ended yet."""
    scene.write_service(replace(scene.service, backends=scene.service.backends[1:]))
    scene.wait_for_metric("lb_hop.endpoints", 0, lb_hop__placement="local")
    told, records = scene.send()
    local = sum(each.pod.node == "node1" for each in told)
    # There is no ready one here any more, so the others became required.
    assert Counter(record.attributes["lb_hop.hop"] for record in records) == {"none": local, "required": SENT - local}
    assert {record.attributes["destination.k8s.pod.name"] for record in records} == {"node1-pod1", "node2-pod1"}


def test_backend_changed(scene: Scene) -> None:
    """A new name of a pod and its readiness show on what comes after; without a zone of its own, its node's counts."""
    first, second = (replace(backend, zone=None) for backend in scene.service.backends)
    service = replace(scene.service, backends=(replace(first, pod="web-7d9f", ready=False), second))
    text = scene.lab.vips_file([service])
    scene.write("".join(line for line in text.splitlines(keepends=True) if "zone: null" not in line))
    scene.wait_for_metric("lb_hop.endpoints", 0, lb_hop__placement="local")
    _, records = scene.send()
    names = {record.attributes["destination.k8s.pod.name"] for record in records}
    assert names == {"web-7d9f", "node2-pod1"}
    # A backend that is not ready no longer makes the hop to the other one avoidable.
    assert {record.attributes["lb_hop.hop"] for record in records} == {"none", "required"}
    assert {record.attributes["lb_hop.zone.crossed"] for record in records} == {False, True}
    assert {record.attributes.get("destination.cloud.availability_zone") for record in records} == {"zone-a", "zone-b"}


def assert_in_trouble(scene: Scene, words: list[str]) -> None:
    """Hold that the file's problem is told on /readyz and as a metric, while connections are counted as before."""
    wait_for("a degraded source", lambda: scene.agent.readyz().content["degraded"] == ["vips_file"])
    part = scene.agent.part("vips_file")
    assert scene.agent.readyz().status == 200
    assert not part["healthy"]
    for word in [*words, str(scene.lab.vips_path)]:
        assert word in part["detail"]
    told, records = scene.send()
    local = sum(each.pod.node == "node1" for each in told)
    assert Counter(record.attributes["lb_hop.hop"] for record in records) == {"none": local, "avoidable": SENT - local}
    scene.wait_for_metric("lb_hop.part.healthy", 0, lb_hop__part="vips_file")


def assert_repaired(scene: Scene) -> None:
    """Hold that nothing is degraded any more."""
    wait_for("a healthy source", lambda: scene.agent.readyz().content["degraded"] == [])
    scene.wait_for_metric("lb_hop.part.healthy", 1, lb_hop__part="vips_file")


def test_file_in_trouble(scene: Scene) -> None:
    """Broken or gone, the table before it stays: counting goes on, /readyz names the problem and its line."""
    good = scene.lab.vips_path.read_text(encoding="utf-8")
    scene.write(BROKEN)
    assert_in_trouble(scene, [f"line {BROKEN_LINE}", "adress"])
    assert scene.agent.stderr.count("vips_file: what was known before stays") == 1
    assert f"{scene.lab.vips_path} line {BROKEN_LINE}" in scene.agent.stderr
    scene.write(good)
    assert_repaired(scene)
    scene.lab.vips_path.unlink()
    assert_in_trouble(scene, ["No such file"])
    scene.write(good)
    assert_repaired(scene)
    scene.send()
    wait_for("metrics", lambda: scene.counted() == 3 * SENT)
