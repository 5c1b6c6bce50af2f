"""SCTP Services with real associations: conntrack tells of them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.kernels.scene import ANSWER_SECONDS, SCTP_PORT, SENT
from tests.lab.requirements import needs_lab
from tests.lab.waiting import wait_for

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.kernels.scene import Scene
    from tests.lab import Pod

pytestmark = [pytest.mark.root, pytest.mark.kernels, needs_lab]

ASSOCIATIONS = str(Path(__file__).with_name("associations.py"))
PYTHON = [sys.executable, "-I", "-S", ASSOCIATIONS]


@pytest.fixture(scope="module")
def _servers(scene: Scene) -> Iterator[None]:
    def start(pod: Pod) -> subprocess.Popen[str]:
        return pod.popen([*PYTHON, "serve", pod.address4, str(SCTP_PORT)], stdout=subprocess.PIPE)

    running = [start(pod) for pod in scene.lab.pods]
    for server in running:
        assert server.stdout is not None
        assert server.stdout.readline() == "ready\n"
    yield
    for server in running:
        server.kill()
        server.communicate()


@pytest.mark.usefixtures("_servers")
def test_associations(scene: Scene) -> None:
    """23 associations are 23 connections, each with its client, SNAT source and backend as the pod saw them."""
    scene.route("sctp", scene.node.uplink4)
    wait_for("conntrack that is heard", lambda: scene.agent.part("conntrack")["detail"] == "heard")
    words = ["call", scene.lab.client.address4, scene.vip("sctp"), "80", str(SENT), str(ANSWER_SECONDS)]
    made = json.loads(scene.lab.client.run([*PYTHON, *words], timeout=120).stdout)
    assert len(made) == SENT
    wait_for("the records", lambda: len(scene.records("sctp")) >= SENT)
    names = ("client.address", "client.port", "source.address", "source.port", "destination.address")
    told = [tuple(record.attributes[name] for name in names) for record in scene.records("sctp")]
    assert sorted(told) == sorted(map(tuple, made))
    scene.wait_for_counts("sctp", SENT)


def test_nobody_serves(scene: Scene) -> None:
    """An association that no endpoint answers is one connection, with its reason, however often its INIT is sent."""
    scene.route("sctp-none", scene.node.uplink4)
    words = ["call", scene.lab.client.address4, scene.vip("sctp-none"), "80", "3", "1"]
    assert json.loads(scene.lab.client.run([*PYTHON, *words]).stdout) == []
    scene.wait_for_counts("sctp-none", 3, "no_endpoints")
