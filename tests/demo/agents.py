"""An agent in every node's network namespace, told by its environment, as a DaemonSet's would be."""

from __future__ import annotations

import subprocess
import time
from http import HTTPStatus
from typing import TYPE_CHECKING, Self

from tests.demo.sink import PORT
from tests.lab.agent import Agent

if TYPE_CHECKING:
    from types import TracebackType

    from tests.demo.dataplane import Known
    from tests.lab import Lab

STOP_SECONDS = 6.0


class AgentError(Exception):
    """An agent ended by itself; says which and its last words."""


class Agents:
    """Started on entry; on exit told to stop, so that each sends its last counts. They know the VIPs by `known`."""

    def __init__(self, lab: Lab, known: Known) -> None:
        self._lab = lab
        self._known = known
        self._running: list[Agent] = []

    def __enter__(self) -> Self:
        settings = {
            "OTEL_LB_HOP_RECORD_RATE": "100000",
            "OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf",
            "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://{self._lab.mgmt.address4}:{PORT}",
        }
        for node in self._lab.nodes:
            self._running.append(Agent(node, self._known.vips, self._known.settings | settings))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def ready(self) -> int:
        """Count those that are ready: they know every VIP port, and count."""
        return sum(agent.readyz().status == HTTPStatus.OK for agent in self._running)

    def check(self) -> None:
        """Raise AgentError if one has ended."""
        for agent in self._running:
            if (code := agent.process.poll()) is not None:
                words = agent.stderr.strip()[-2000:]
                raise AgentError(f"the agent of {agent.node.name} ended with code {code}:\n{words}")

    def stop(self) -> None:
        """SIGTERM to all, then wait for all; one that hangs is killed, and the figures will tell."""
        running, self._running = self._running, []
        for agent in running:
            agent.terminate()
        deadline = time.monotonic() + STOP_SECONDS
        for agent in running:
            try:
                agent.process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                agent.kill()
