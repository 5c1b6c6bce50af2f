"""The agent as an operator runs it: a process inside a node's namespace, configured by its environment."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import signal as signals
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Self

from tests.lab import programs
from tests.lab.waiting import PATIENCE, wait_for

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from tests.lab import Node

ROOT = Path(__file__).parents[2]
STOP_SECONDS = 5.0 * PATIENCE
RUN = (sys.executable, "-m", "otel_lb_hop", "run")


_ACCOUNT = re.compile(r"INFO otel_lb_hop\.agent: (\w[\w ]*?): ([\d,]+ seen, .* in flight)$", re.MULTILINE)


class Account(NamedTuple):
    """One stage of the ledger."""

    seen: int
    exported: int
    dropped: dict[str, int]
    in_flight: int
    earlier: int = 0
    """What agents before it did."""

    @classmethod
    def read(cls, words: str) -> Account:
        """Read it from a log: `23 seen, 8 by earlier agents, 12 exported, 3 dropped (rate 3), 0 in flight`."""
        plain = words.replace(",", "")
        seen, exported, in_flight = (int(number) for number in re.findall(r"(\d+) (?:seen|exported|in flight)", plain))
        reasons = re.findall(r"(\w+) (\d+)", plain[plain.find("(") : plain.find(")")] if "(" in plain else "")
        dropped = {reason: int(count) for reason, count in reasons}
        assert f"{sum(dropped.values())} dropped" in plain
        earlier = re.search(r"(\d+) by earlier agents", plain)
        return cls(seen, exported, dropped, in_flight, int(earlier[1]) if earlier else 0)

    @property
    def missing(self) -> int:
        """What came and is nowhere."""
        return self.seen - self.earlier - self.exported - sum(self.dropped.values()) - self.in_flight


class Readiness(NamedTuple):
    """One answer of /readyz; status 0 when nobody listens."""

    status: int
    content: dict[str, Any]


def environment(settings: Mapping[str, str]) -> dict[str, str]:
    """Make the whole environment of an agent: what this process has by chance of OTEL_* or KUBE* stays out."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("OTEL_", "PYTHON", "KUBE"))}
    return kept | {"OTEL_METRIC_EXPORT_INTERVAL": "500"} | dict(settings)


class Agent:
    """One agent on one node, named after it. Use it as a context: on exit it is stopped, and must stop well.

    What it knows comes from the file `vips`, from the API server that `settings` name, or from both. It pins if they
    say where, unless it is not to be able to.
    """

    def __init__(
        self,
        node: Node,
        vips: Path | None,
        settings: Mapping[str, str],
        *,
        name: str = "agent",
        port: int = 9465,
        prefix: Sequence[str] = (),
        pinned: bool = True,
    ) -> None:
        self.node = node
        self.spawned = time.monotonic()
        self._port = port
        self._pinned = pinned and settings.get("OTEL_LB_HOP_PIN_PATH", "off") != "off"
        self.programs: set[int] = set()
        self._terminated: float | None = None
        self._files = {kind: node.directory / f"{node.name}-{name}.{kind}" for kind in ("stdout", "stderr")}
        own = {
            "OTEL_LB_HOP_NODE_NAME": node.name,
            "OTEL_LB_HOP_PIN_PATH": "off",
            "OTEL_LB_HOP_LISTEN": f"127.0.0.1:{port}",
        }
        if vips:
            own["OTEL_LB_HOP_VIPS_FILE"] = str(vips)
        with self._files["stdout"].open("w") as stdout, self._files["stderr"].open("w") as stderr:
            self.process = node.popen(
                [*prefix, *RUN], stdout=stdout, stderr=stderr, env=environment(own | dict(settings)), cwd=ROOT
            )

    def __enter__(self) -> Self:
        try:
            return self.wait_ready()
        except BaseException:
            self.kill()
            raise

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.stop()
        self.kill()

    @property
    def stdout(self) -> str:
        """What it has printed so far."""
        return self._files["stdout"].read_text(encoding="utf-8")

    @property
    def stderr(self) -> str:
        """What it has logged so far."""
        return self._files["stderr"].read_text(encoding="utf-8")

    def wait_ready(self, seconds: float = 60.0) -> Self:
        """Wait until /readyz says 200, and note which BPF programs it holds."""

        def ready() -> bool:
            assert self.process.poll() is None, f"the agent ended with {self.process.returncode}:\n{self.stderr}"
            return self.readyz().status == http.HTTPStatus.OK

        wait_for(f"/readyz of {self.node.name}", ready, seconds)
        self.programs = programs.held_by(self.process.pid)
        return self

    def readyz(self) -> Readiness:
        """Ask /readyz from inside the namespace."""
        return self.node.in_netns(lambda: _ask_readyz(self._port))

    def part(self, name: str) -> dict[str, Any]:
        """Return the state of one part on /readyz; empty before it has one."""
        part: dict[str, Any] = self.readyz().content.get("parts", {}).get(name, {})
        return part

    def shipped(self, signal: str) -> dict[str, Any]:
        """Tell how it goes with a signal's first exporter, by /readyz; its books balance. Empty while there is none."""
        states = self.part(signal).get("detail")
        if not isinstance(states, list):
            return {}
        state: dict[str, Any] = states[0]
        lost = sum(state["dropped"].values())
        assert state["offered"] == state["exported"] + lost + state["queued"] + state["sending"]
        return state

    def accounts(self) -> dict[str, Account]:
        """Give the ledger that it has logged at its end, by stage: `kernel`, `queue of logs to otlp`..."""
        return {name: Account.read(words) for name, words in _ACCOUNT.findall(self.stderr)}

    def terminate(self) -> float:
        """Send SIGTERM unless that was done before; answers when it was done."""
        if self._terminated is None:
            self._terminated = time.monotonic()
            if self.process.poll() is None:
                self.process.send_signal(signals.SIGTERM)
        return self._terminated

    def stop(self) -> float:
        """End it by SIGTERM; it must answer with exit 0 in time. Answers the seconds it took.

        It leaves no program and nothing in flight; one that pins leaves both to the next, and its books balance too.
        """
        started = self.terminate()
        try:
            code = self.process.wait(max(0.0, started + STOP_SECONDS - time.monotonic()))
        except subprocess.TimeoutExpired:
            raise AssertionError(f"the agent did not end within {STOP_SECONDS} s:\n{self.stderr}") from None
        seconds = time.monotonic() - started
        assert code == 0, f"the agent ended with {code}:\n{self.stderr}"
        if self._pinned:
            assert programs.still_loaded(self.programs) == self.programs
        else:
            # The kernel frees a program a moment after its last user has gone.
            wait_for("the end of its BPF programs", lambda: not programs.still_loaded(self.programs), 5)
        assert "Traceback" not in self.stderr, self.stderr
        # For each VIP port: connections = forwarded + not forwarded, once every verdict is given; and for each stage
        # that records pass: seen = exported + dropped, nothing is in flight, and what one exported the next has seen.
        assert "not add up" not in self.stderr, self.stderr
        for name, account in self.accounts().items():
            assert account.missing == 0 or (self._pinned and name in {"kernel", "ring"}), name
            assert account.in_flight == 0 or (self._pinned and name in {"kernel", "ring"}), name
        assert not self.programs or "kernel" in self.accounts(), self.stderr
        return seconds

    def kill(self) -> None:
        """End it by SIGKILL, if it is there."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()


@contextlib.contextmanager
def agents_on(
    nodes: Sequence[Node],
    vips: Path | None,
    settings: Mapping[str, str] | Callable[[Node], Mapping[str, str]],
    name: str = "agent",
    port: int = 9465,
    *,
    prefix: Sequence[str] = (),
) -> Iterator[list[Agent]]:
    """Run an agent on each of these nodes; on exit all are stopped, and must stop well."""
    started = [
        Agent(node, vips, settings(node) if callable(settings) else settings, name=name, port=port, prefix=prefix)
        for node in nodes
    ]
    try:
        for agent in started:
            agent.wait_ready()
        yield started
        for agent in started:
            agent.terminate()
        for agent in started:
            agent.stop()
    finally:
        for agent in started:
            agent.kill()


def run_to_end(node: Node, settings: Mapping[str, str], prefix: tuple[str, ...] = ()) -> tuple[int, str]:
    """Start an agent that must refuse to start; answers its exit code and what it said on stderr."""
    done = node.run(["env", "-C", str(ROOT), *prefix, *RUN], check=False, env=environment(settings))
    assert not done.stdout
    return done.returncode, done.stderr


def _ask_readyz(port: int) -> Readiness:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", "/readyz")
        answer = connection.getresponse()
        return Readiness(answer.status, json.loads(answer.read()))
    except (OSError, http.client.HTTPException):  # nobody listens yet, or no longer
        return Readiness(0, {})
    finally:
        connection.close()
