"""An agent in every node's network namespace, told by its environment alone, as a DaemonSet's would be."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Self

from tests.demo.sink import PORT

if TYPE_CHECKING:
    from pathlib import Path
    from types import TracebackType

    from tests.lab import Lab, Node

STOP_SECONDS = 6.0
EXPORT_INTERVAL_MS = 500


class AgentError(Exception):
    """An agent ended by itself; says which and its last words."""


class Agents:
    """Started on entry; on exit told to stop, so that each sends its last counts."""

    def __init__(self, lab: Lab) -> None:
        self._lab = lab
        self._running: list[tuple[str, subprocess.Popen[str]]] = []

    def __enter__(self) -> Self:
        for node in self._lab.nodes:
            self._running.append((node.name, self._start(node)))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def check(self) -> None:
        """Raise AgentError if one has ended."""
        for name, process in self._running:
            if process.poll() is not None:
                words = self._log(name).read_text(encoding="utf-8").strip()
                raise AgentError(f"the agent of {name} ended with code {process.returncode}:\n{words[-2000:]}")

    def stop(self) -> None:
        """SIGTERM to all, then wait for all."""
        running, self._running = self._running, []
        for _, process in running:
            process.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + STOP_SECONDS
        for _, process in running:
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def _log(self, name: str) -> Path:
        return self._lab.directory / f"{name}-agent.log"

    def _start(self, node: Node) -> subprocess.Popen[str]:
        # Nothing is taken over from the caller's OTEL_* variables: the demo is the same everywhere.
        environment = {name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ} | {
            "OTEL_LB_HOP_NODE_NAME": node.name,
            "OTEL_LB_HOP_VIPS_FILE": str(self._lab.vips_path),
            "OTEL_LB_HOP_RECORD_RATE": "100000",
            "OTEL_METRIC_EXPORT_INTERVAL": str(EXPORT_INTERVAL_MS),
            "OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf",
            "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://{self._lab.mgmt.address4}:{PORT}",
        }
        argv = [sys.executable, "-m", "otel_lb_hop", "run"]
        with self._log(node.name).open("w", encoding="utf-8") as log:
            return node.popen(argv, stdout=log, stderr=log, env=environment)
