"""Least rights: what the agent's processes hold, what it says when something is missing, and that no more is needed."""

from __future__ import annotations

import contextlib
import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pytest

from otel_lb_hop.model import Transport
from tests.e2e.collector import Collector
from tests.e2e.conftest import TARGET_PORT
from tests.lab import confined
from tests.lab.agent import Agent, agents_on, run_to_end
from tests.lab.requirements import needs_lab
from tests.lab.waiting import wait_for

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tests.lab import Lab

pytestmark = [
    pytest.mark.root,
    needs_lab,
    pytest.mark.skipif(confined.lacking() is not None, reason=confined.lacking() or ""),
]

SENT = 23
VIP = "10.0.80.0"
NET_ADMIN, SYS_ADMIN, PERFMON, BPF = 1 << 12, 1 << 21, 1 << 38, 1 << 39
LEAST = ["BPF", "NET_ADMIN"]
FASTER = [*LEAST, "PERFMON"]
QUIET = {f"OTEL_{name}_EXPORTER": "none" for name in ("METRICS", "LOGS", "TRACES")}
SENTENCE_OF = {
    "BPF": "CAP_BPF is missing, it is needed to load BPF programs and to read their maps",
    "NET_ADMIN": (
        "CAP_NET_ADMIN is missing, it is needed to attach the programs to interfaces and to hear of UDP and SCTP from"
        " conntrack"
    ),
}
NOT_AMBIENT = " (allowed here, but user 65534 does not hold it: run as root, or let it be ambient)"


class Rights(NamedTuple):
    """What one thread of a process holds, by proc(5)."""

    inheritable: int
    permitted: int
    effective: int
    bounding: int
    ambient: int
    no_new_privileges: int
    seccomp: int


def rights_of(status: Path) -> Rights:
    """Read them from /proc."""
    text = status.read_text(encoding="utf-8")
    words = dict(re.findall(r"^(\w+):\s+(\w+)$", text, re.MULTILINE))
    inheritable, permitted, effective, bounding, ambient = (
        int(words[f"Cap{name}"], 16) for name in ("Inh", "Prm", "Eff", "Bnd", "Amb")
    )
    switches = int(words["NoNewPrivs"]), int(words["Seccomp"])
    return Rights(inheritable, permitted, effective, bounding, ambient, *switches)


def rights_of_threads(pid: int) -> set[Rights]:
    """Read those of all threads of a process."""
    found = set()
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # a thread may end meanwhile
            found.add(rights_of(task / "status"))
    return found


def rights_of_child(agent: Agent) -> Rights:
    """Wait for the compile child to be at its work, which is when it has bcc, and read them."""

    def look() -> list[Rights]:
        for children in Path(f"/proc/{agent.process.pid}/task").glob("*/children"):
            for child in children.read_text(encoding="ascii").split():
                with contextlib.suppress(OSError):
                    if "libbcc" in Path(f"/proc/{child}/maps").read_text(encoding="utf-8"):
                        return [rights_of(Path(f"/proc/{child}/status"))]
        return []

    return wait_for("the compile child with bcc", look, 30)[0]


def confine(
    *capabilities: str,
    user: int = 0,
    ambient: bool = False,
    writable: Sequence[str] = ("/var/tmp",),  # noqa: S108 - not /tmp, where this checkout may be
    profile: str | None = None,
) -> tuple[str, ...]:
    """Write the words before a program that is to run with exactly these rights, and under the seccomp filter."""
    words = [sys.executable, "-I", "-S", confined.__file__, f"--capabilities={','.join(capabilities)}"]
    words += [f"--user={user}", *(["--ambient"] if ambient else [])]
    words += [f"--writable={folder}" for folder in writable]
    words += [f"--profile={profile}"] if profile is not None else []
    return (*words, "--")


@pytest.fixture(autouse=True)
def service(lab: Lab) -> None:
    """Write a VIP file that everybody may read, with a UDP port so that conntrack is to be heard."""
    web = lab.vip_port(VIP, 80, backends=lab.pods, target_port=TARGET_PORT)
    dns = lab.vip_port(VIP, 53, service="dns", backends=lab.pods, transport=Transport.UDP)
    lab.apply([web, dns])
    lab.directory.chmod(0o755)


@pytest.fixture
def settings(lab: Lab) -> dict[str, str]:
    """Return settings that are good."""
    return QUIET | {"OTEL_LB_HOP_VIPS_FILE": str(lab.vips_path), "OTEL_LB_HOP_NODE_NAME": "node1"}


@pytest.mark.collector
@pytest.mark.parametrize(
    "prefix",
    [confine(*LEAST), confine(*LEAST, user=65534, ambient=True)],
    ids=["root", "another user with ambient capabilities"],
)
def test_no_more_is_needed(lab: Lab, prefix: tuple[str, ...]) -> None:
    """With exactly these rights 23 connections are 23, and conntrack is heard."""
    with Collector(lab) as collector:
        with agents_on(lab.nodes, lab.vips_path, collector.settings(), prefix=prefix) as agents:
            for agent in agents:
                two = BPF | NET_ADMIN
                held = Rights(0, two, two, two, 0, 1, 2)
                assert rights_of_threads(agent.process.pid) == {held}
                assert agent.part("conntrack") == {"healthy": True, "vital": False, "detail": "heard"}
                assert agent.part("interfaces")["detail"]["problems"] == {}
            assert sum(connection.ok for connection in lab.connect(VIP, 80, SENT)) == SENT
            wait_for("all log records", lambda: len(collector.logs()) >= SENT)
        series = [each for each in collector.series() if each.metric == "lb_hop.connections" and each.value]
        assert sum(each.value for each in series) == SENT
        assert {each.attributes["lb_hop.outcome"] for each in series} == {"forwarded"}
        assert len(collector.logs()) == SENT


@pytest.mark.parametrize(
    ("prefix", "held", "seccomp"),
    [
        ((), BPF | NET_ADMIN | PERFMON, 0),
        (confine(*LEAST), BPF | NET_ADMIN, 2),
        (confine(*FASTER), BPF | NET_ADMIN | PERFMON, 2),
        (confine(*FASTER, user=65534, ambient=True), BPF | NET_ADMIN | PERFMON, 2),
    ],
    ids=["all of root's", "exactly what is needed", "what makes it faster", "another user"],
)
def test_compile_child(lab: Lab, prefix: tuple[str, ...], held: int, seccomp: int) -> None:
    """The child that compiles holds what loading needs, CAP_PERFMON where it is there, and hands nothing on."""
    agent = Agent(lab.nodes[0], lab.vips_path, QUIET, prefix=prefix)
    try:
        assert rights_of_child(agent) == Rights(0, held, held, held, 0, 1, seccomp)
        agent.wait_ready()
        two = BPF | NET_ADMIN
        # Nobody confined may narrow the bounding set: that takes CAP_SETPCAP.
        assert rights_of_threads(agent.process.pid) == {Rights(0, two, two, held if prefix else two, 0, 1, seccomp)}
        assert ("without CAP_PERFMON" in agent.stderr) is not bool(held & PERFMON)
    finally:
        agent.kill()


def test_what_is_not_needed_is_given_up(lab: Lab) -> None:
    """Started with all of root's capabilities, no thread has more than two, nor can one ever get more."""
    assert rights_of(Path("/proc/self/status")).effective & (1 << 21 | 1 << 1), "this test begins with all of them"
    with agents_on(lab.nodes[:1], lab.vips_path, QUIET) as (agent,):
        two = BPF | NET_ADMIN
        assert rights_of_threads(agent.process.pid) == {Rights(0, two, two, two, 0, 1, 0)}


def test_sys_admin_does_as_well(lab: Lab) -> None:
    """CAP_SYS_ADMIN stands for CAP_BPF, and then it is kept."""
    with agents_on(lab.nodes[:1], lab.vips_path, QUIET, prefix=confine("SYS_ADMIN", "NET_ADMIN", profile="BPF")) as (
        agent,
    ):
        two = SYS_ADMIN | NET_ADMIN
        assert rights_of_threads(agent.process.pid) == {Rights(0, two, two, two, 0, 1, 2)}


@pytest.mark.parametrize("missing", LEAST)
def test_one_is_missing(lab: Lab, settings: dict[str, str], missing: str) -> None:
    """Exit 1 and one sentence: which, and what for."""
    held = [name for name in LEAST if name != missing]
    assert run_to_end(lab.nodes[0], settings, confine(*held)) == (1, f"otel-lb-hop: {SENTENCE_OF[missing]}\n")


def test_all_are_missing(lab: Lab, settings: dict[str, str]) -> None:
    """Each is named, and that a user who is not root does not get what a container is given."""
    every = "; ".join(SENTENCE_OF.values())
    assert run_to_end(lab.nodes[0], settings, confine()) == (1, f"otel-lb-hop: {every}\n")
    user = confine(*LEAST, user=65534)
    assert run_to_end(lab.nodes[0], settings, user) == (1, f"otel-lb-hop: {every}{NOT_AMBIENT}\n")


def test_seccomp_denies_bpf(lab: Lab, settings: dict[str, str]) -> None:
    """The profile of an old container runtime does not know CAP_BPF: the sentence blames it, not a capability."""
    code, said = run_to_end(lab.nodes[0], settings, confine(*LEAST, profile=""))
    assert code == 1
    assert said.startswith("otel-lb-hop: bpf(2) is denied though the capabilities are there: the container's seccomp")
    assert said.count("\n") == 1


def test_only_shared_memory_is_writable(lab: Lab) -> None:
    """A container with a read-only root and no volume has /dev/shm: that is enough, and nothing is left there."""
    before = set(os.listdir("/dev/shm"))  # noqa: S108, PTH208
    with agents_on(lab.nodes[:1], lab.vips_path, QUIET, prefix=confine(*LEAST, writable=["/dev/shm"])) as (agent,):  # noqa: S108
        inside = Path(f"/proc/{agent.process.pid}/root/dev/shm")
        assert list(inside.iterdir()) == []
    assert set(os.listdir("/dev/shm")) == before  # noqa: S108, PTH208


def test_nothing_is_writable(lab: Lab, settings: dict[str, str]) -> None:
    """Exit 1 and one sentence: what to mount."""
    code, said = run_to_end(lab.nodes[0], settings, confine(*FASTER, writable=[]))
    assert code == 1
    assert "no folder can be written" in said
    assert "emptyDir" in said
    assert said.count("\n") == 1


def test_file_of_somebody_else(lab: Lab, settings: dict[str, str]) -> None:
    """Root without CAP_DAC_OVERRIDE reads its own files; one that only another user may read is told, with exit 2."""
    theirs = lab.directory / "theirs.yaml"
    theirs.write_bytes(lab.vips_path.read_bytes())
    theirs.chmod(0o600)
    os.chown(theirs, 65534, 65534)
    code, said = run_to_end(lab.nodes[0], settings | {"OTEL_LB_HOP_VIPS_FILE": str(theirs)})
    assert code == 2
    assert f"{theirs}: read 'Permission denied'" in said


PROBE = """
import ctypes, errno, os, sys
libc = ctypes.CDLL(None, use_errno=True)
def answer(*words):
    return "done" if libc.syscall(*words) >= 0 else errno.errorcode[ctypes.get_errno()]
try:
    open("/probe", "w")
except OSError as error:
    print("write", errno.errorcode[error.errno])
print("bpf", answer(321, 0x7fffffff, 0, 0))
print("perf_event_open", answer(298, 0, 0, 0, 0, 0))
print("unshare", answer(272, 0))
print("keyctl", answer(250, 0, -3, 0))
print("ptrace", answer(101, 0x4200, 0, 0, 0))
print("clone3", answer(435, 0, 0))
print("vsock", answer(41, 40, 1, 0))
print("netlink", answer(41, 16, 3, 0))
"""


@pytest.mark.parametrize(
    ("capabilities", "bpf", "perf"), [(FASTER, "EINVAL", "EFAULT"), (["NET_ADMIN"], "EPERM", "EPERM")]
)
def test_the_confinement_is_real(lab: Lab, capabilities: list[str], bpf: str, perf: str) -> None:
    """The launcher denies what RuntimeDefault denies: even what needs no right, and bpf(2) to who has not CAP_BPF."""
    output = lab.nodes[0].run([*confine(*capabilities), sys.executable, "-I", "-S", "-c", PROBE]).stdout
    assert dict(line.split() for line in output.splitlines()) == {
        "write": "EROFS",
        "bpf": bpf,
        "perf_event_open": perf,
        "unshare": "EPERM",
        "keyctl": "EPERM",
        "ptrace": "ESRCH",
        "clone3": "ENOSYS",
        "vsock": "EPERM",
        "netlink": "done",
    }
