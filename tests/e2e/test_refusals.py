"""What stops the agent from starting: an exit code, and words that say what to do."""

from __future__ import annotations

import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.e2e.conftest import TARGET_PORT
from tests.lab import programs
from tests.lab.agent import STOP_SECONDS, Agent, agents_on, run_to_end
from tests.lab.requirements import needs_lab
from tests.lab.waiting import wait_for

if TYPE_CHECKING:
    from tests.lab import Lab

pytestmark = [pytest.mark.root, needs_lab]

QUIET = {f"OTEL_{signal_name}_EXPORTER": "none" for signal_name in ("METRICS", "LOGS", "TRACES")}
PROGRAMS = 8
NOBODY = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--inh-caps=-all")


@pytest.fixture(autouse=True)
def service(lab: Lab) -> None:
    """Write a VIP file that is good."""
    lab.apply([lab.vip_port("10.0.70.0", 80, backends=lab.pods, target_port=TARGET_PORT)])


@pytest.fixture
def settings(lab: Lab) -> dict[str, str]:
    """Return settings that are good."""
    return QUIET | {"OTEL_LB_HOP_VIPS_FILE": str(lab.vips_path), "OTEL_LB_HOP_NODE_NAME": "node1"}


def test_bad_settings(lab: Lab) -> None:
    """Exit 2, with every bad setting, what was read and what is accepted, and the bad lines of the file as well."""
    file = lab.directory / "bad.yaml"
    file.write_text(
        "services:\n  - name: Default/web\n    vips: [10.0.0.256]\n    ports: [{port: 0}]\n", encoding="utf-8"
    )
    bad = {
        "OTEL_LB_HOP_RECORD_RATIO": "1.5",
        "OTEL_LB_HOP_RECORD_RATE": "many",
        "OTEL_LB_HOP_LISTEN": "localhost",
        "OTEL_LB_HOP_LOG_LEVEL": "loud",
        "OTEL_LB_HOP_INTERFACES": "/(/",
        "OTEL_EXPORTER_OTLP_PROTOCOL": "http/json",
        "OTEL_METRIC_EXPORT_INTERVAL": "-1",
    }
    code, said = run_to_end(lab.nodes[0], bad | {"OTEL_LB_HOP_VIPS_FILE": str(file)})
    assert code == 2
    for name, value in bad.items():
        (line,) = (line for line in said.splitlines() if line.startswith(name))
        assert repr(value) in line
        assert "accepted" in line
    for line_number, word in ((2, "Default/web"), (3, "10.0.0.256"), (4, "0")):
        assert any(f"bad.yaml line {line_number}" in line and word in line for line in said.splitlines())
    assert "Traceback" not in said


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"OTEL_LB_HOP_VIPS_FILE": ""}, ["OTEL_LB_HOP_VIPS_FILE"]),
        ({"OTEL_LB_HOP_VIPS_FILE": "/nowhere/vips.yaml"}, ["/nowhere/vips.yaml", "No such file"]),
        ({"OTEL_LOGS_EXPORTER": "pigeon"}, ["OTEL_LOGS_EXPORTER", "pigeon", "console"]),
        ({"OTEL_LB_HOP_LISTEN": "192.0.2.1:9465"}, ["OTEL_LB_HOP_LISTEN", "192.0.2.1:9465"]),
    ],
    ids=["no file", "missing file", "unknown exporter", "foreign address"],
)
def test_one_bad_setting(lab: Lab, settings: dict[str, str], change: dict[str, str], words: list[str]) -> None:
    """Exit 2, naming the setting and what was wrong with it."""
    code, said = run_to_end(lab.nodes[0], settings | change)
    assert code == 2
    assert "Traceback" not in said
    for word in words:
        assert word in said


def test_port_in_use(lab: Lab, settings: dict[str, str]) -> None:
    """A second agent on the same node says that its address is taken, and leaves the first alone."""
    with agents_on(lab.nodes[:1], lab.vips_path, QUIET) as (agent,):
        code, said = run_to_end(lab.nodes[0], settings)
        assert code == 2
        assert "OTEL_LB_HOP_LISTEN" in said
        assert "in use" in said
        assert agent.readyz().status == 200


def test_not_root(lab: Lab, settings: dict[str, str]) -> None:
    """Exit 1 with one sentence: which capabilities are needed."""
    readable = lab.directory / "for-nobody.yaml"
    readable.write_bytes(lab.vips_path.read_bytes())
    code, said = run_to_end(lab.nodes[0], settings | {"OTEL_LB_HOP_VIPS_FILE": str(readable)}, NOBODY)
    assert code == 1
    assert said.startswith("otel-lb-hop: CAP_BPF is missing")
    assert "CAP_NET_ADMIN is missing" in said
    assert said.count("\n") == 1
    assert "Traceback" not in said


def test_bcc_missing(lab: Lab, settings: dict[str, str], tmp_path: Path) -> None:
    """Exit 1 with one sentence: which package to install; a setting that means nothing is named before."""
    (tmp_path / "bcc.py").write_text("raise ImportError('not here')\n", encoding="utf-8")
    code, said = run_to_end(lab.nodes[0], settings | {"PYTHONPATH": str(tmp_path), "OTEL_LB_HOP_RECORDS_RATIO": "1"})
    assert code == 1
    assert "OTEL_LB_HOP_RECORDS_RATIO is no setting; is OTEL_LB_HOP_RECORD_RATIO meant?" in said
    assert "python3-bpfcc" in said
    assert "Traceback" not in said


def test_killed(lab: Lab) -> None:
    """SIGKILL leaves no program on any interface."""
    agent = Agent(lab.nodes[0], lab.vips_path, QUIET)
    agent.wait_ready()
    agent.process.send_signal(signal.SIGKILL)
    agent.process.wait()
    assert len(agent.programs) == PROGRAMS
    wait_for("the end of its BPF programs", lambda: not programs.still_loaded(agent.programs))


def test_told_to_stop_while_starting(lab: Lab) -> None:
    """SIGTERM during the compile is heard at once: exit 0, nothing was attached, no compile child stays behind."""
    agent = Agent(lab.nodes[0], lab.vips_path, QUIET | {"OTEL_LB_HOP_LISTEN": "off"})
    try:
        wait_for("the compile child", lambda: _children(agent.process.pid))
        time.sleep(0.1)
        agent.process.terminate()
        assert agent.process.wait(STOP_SECONDS) == 0, agent.stderr
        assert not agent.stderr.count("Traceback")
        assert "counting on" not in agent.stderr
    finally:
        agent.kill()


def _children(pid: int) -> list[int]:
    """List the children that any thread of a process has."""
    tasks = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(child) for task in tasks for child in task.read_text(encoding="ascii").split()]
