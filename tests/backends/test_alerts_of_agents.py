"""The alerts about what an agent itself says, from causes that need an API server or forged packets, on real backends.

The rules are in quick motion (judge.py). Two thresholds are set as an operator would set them: a table is nearly full
much earlier, and a topology is stale after a minute, since its age is no duration of a rule.
"""

from __future__ import annotations

import contextlib
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial, reduce
from typing import TYPE_CHECKING

import pytest
from scapy.layers.inet import TCP
from scapy.layers.inet6 import IPv6, IPv6ExtHdrDestOpt

from tests.backends.judge import EXPORT_MS, NOBODY_THERE, Alert, Course, Judge, judging_server
from tests.backends.scene import run_collector
from tests.cluster import objects
from tests.cluster.control_plane import ControlPlane
from tests.e2e.collector import endpoint
from tests.e2e.conftest import strangers
from tests.lab import Lab, hostile, reaper
from tests.lab.agent import Agent
from tests.lab.requirements import needs_lab
from tests.lab.waiting import wait_for

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.cluster.api import Object

pytestmark = [
    pytest.mark.root,
    pytest.mark.collector,
    pytest.mark.kubernetes,
    pytest.mark.prometheus,
    pytest.mark.timeout(1_200),
    needs_lab,
]

THRESHOLDS = {
    "cluster:lb_hop_map_usage_share:threshold": 0.018,
    "cluster:lb_hop_topology_age_seconds:threshold": 60,
}
ETH_P_IPV6 = 0x86DD
SERVICES = 40
"""Three series each about their endpoints."""
WIDE, ENDPOINTS = 5, 1_000
"""Together 0.019 of the table of backends; the uplink is 0.016 of its table, all the time."""
SERIES = 100
VIP = "10.0.10.0"
SYNS, SYNS_PER_SECOND = 4_000, 200
UNREAD = bytes(
    IPv6(src=hostile.SPOOFED[6].split("/")[0], dst="fd00:10::1")
    / reduce(lambda headers, _: headers / IPv6ExtHdrDestOpt(), range(8), IPv6ExtHdrDestOpt())
    / TCP(dport=80, flags="S")
)
"""A SYN behind more extension headers than are followed."""

TOO_MANY: set[Alert] = {
    ("LbHopSeriesOverflow", "warning", "node1"),
    ("LbHopTableNearlyFull", "warning", "node1"),
}
AT_FAULT: set[Alert] = {
    ("LbHopCountsNotExact", "warning", "node1", "extension"),
    ("LbHopTopologyStale", "warning", "node1"),
    ("LbHopPartUnhealthy", "warning", "node1", "kubernetes"),
}
BY_THE_FLOOD: set[Alert] = {
    ("LbHopVipBlackholed", severity, "web", "node1", "dropped") for severity in ("critical", "warning")
}
"""Nobody translates here."""


def _many(lab: Lab) -> list[Object]:
    """Describe Services in such a number that their series are too many."""
    ports = [objects.port(80, target=8080)]
    return [
        content
        for number in range(SERVICES)
        for content in objects.web(f"many{number}", [f"10.0.20.{number + 1}"], lab.pods, ports)
    ]


def _wide(lab: Lab, endpoints: int) -> list[Object]:
    """Describe Services with so many endpoints each."""
    contents = []
    for number in range(WIDE):
        service, endpoint_slice = objects.web(f"wide{number}", [f"10.0.30.{number + 1}"], lab.pods, [objects.port(80)])
        (one,) = endpoint_slice["endpoints"]
        endpoint_slice["endpoints"] = [
            {**one, "addresses": [f"10.200.{each // 250}.{each % 250 + 1}"]} for each in range(endpoints)
        ]
        contents += [service, endpoint_slice]
    return contents


def _send_unread(wire: hostile.Wire) -> None:
    frame = bytes.fromhex(wire.mac.replace(":", "")) + bytes(6) + ETH_P_IPV6.to_bytes(2, "big") + UNREAD
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as sending:
        sending.bind((wire.interface, 0))
        for _ in range(10):
            sending.send(frame)
    time.sleep(0.2)


@pytest.fixture(scope="module")
def course(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Course]:
    """Let all go well, go wrong, and go well again."""
    folder = tmp_path_factory.mktemp("alerts")
    with Lab(1) as lab:
        with contextlib.ExitStack() as stack:
            plane = stack.enter_context(ControlPlane(lab))
            plane.apply(*map(objects.node, lab.nodes), *objects.web("web", [VIP], lab.pods, [objects.port(80)]))
            server = stack.enter_context(judging_server(lab, folder, THRESHOLDS))
            stack.enter_context(run_collector(lab))
            settings = {
                **endpoint(lab.mgmt.address4),
                **plane.agent_settings(),
                "OTEL_METRIC_EXPORT_INTERVAL": str(EXPORT_MS),
                "OTEL_LB_HOP_METRIC_SERIES": str(SERIES),
            }
            judge = Judge(server)
            judge.wait_for(NOBODY_THERE)
            stack.enter_context(Agent(lab.nodes[0], None, settings))
            judge.wait_for_answer("a quarter of an hour in quick motion", "lb_hop_vip_ports offset 8s")
            yield _play(lab, plane, judge, folder)
        wait_for("no process that is left behind", lambda: strangers(lab) == set())
    assert reaper.lab_namespaces(lab.name) == []


def _play(lab: Lab, plane: ControlPlane, judge: Judge, folder: Path) -> Course:
    before = judge.firing()
    hostile.swallow_answers(lab)
    wire = hostile.at_the_uplink(lab, lab.nodes[0])
    many = _many(lab)
    plane.apply(*many, *_wide(lab, ENDPOINTS))
    judge.wait_for(TOO_MANY)
    plane.delete(*many)
    plane.apply(*_wide(lab, 1))
    plane.stop()
    with ThreadPoolExecutor(1) as pool:
        flooding = pool.submit(hostile.Hostile(folder).send, wire, hostile.flood(VIP, 80), SYNS, rate=SYNS_PER_SECOND)
        while not flooding.done():
            lab.router.in_netns(partial(_send_unread, wire))
        flooding.result()
        judge.wait_for(AT_FAULT | BY_THE_FLOOD)
    plane.start()
    judge.wait_for_none()
    return Course(before, judge.texts, judge.ever_fired(), judge.problems())


def test_alerts_fire_from_faults_and_from_nothing_else(course: Course) -> None:
    """That all have resolved is what the course has waited for."""
    assert course.before == set()
    assert course.ever == NOBODY_THERE | TOO_MANY | AT_FAULT | BY_THE_FLOOD
    assert course.problems == []


def test_texts_name_what_is_at_fault(course: Course) -> None:
    """Texts have the agent's node and figures in them; 1.923 % is an endpoint more of each of 41 Services."""
    table, stale = ("\n".join(course.texts[name]) for name in ("LbHopTableNearlyFull", "LbHopTopologyStale"))
    assert "The kernel table backends on node1 is 1.923% full" in table
    assert "The agent on node1 has heard nothing of the cluster for 1m" in stale
