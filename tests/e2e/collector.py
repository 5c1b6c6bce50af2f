"""A real Collector on the lab's mgmt host, and what it has received, each signal in a file of JSON lines."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
from typing import TYPE_CHECKING, Any, Self

from tests.e2e.otlp import LogRecord, Series, Span, log_records, metric_series, spans
from tests.lab.waiting import wait_for
from tests.peers import build

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.lab import Lab

GRPC, HTTP = "grpc", "http/protobuf"
PORT_OF = {GRPC: 4317, HTTP: 4318}
SIGNALS = ("metrics", "logs", "traces")


class Collector:
    """Receives OTLP over gRPC and HTTP by both families on all addresses of mgmt. Use it as a context."""

    def __init__(self, lab: Lab, name: str = "collector") -> None:
        self._host = lab.mgmt
        self.folder = lab.directory / name
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir()
        config = self.folder / "config.json"
        config.write_text(json.dumps(_config(self.folder)), encoding="utf-8")
        with (self.folder / "stderr").open("w") as stderr:
            self.process = self._host.popen(
                [str(build.build("otelcol")), "--config", str(config)], stdout=subprocess.DEVNULL, stderr=stderr
            )

    def __enter__(self) -> Self:
        try:
            wait_for("a Collector that listens", self._listens, 20)
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def settings(self, protocol: str = GRPC, family: int = 4) -> dict[str, str]:
        """Name the standard variables that make an agent send here."""
        address = self._host.address4 if family == 4 else f"[{self._host.address6}]"
        return endpoint(address, protocol)

    def stop(self) -> None:
        """End it, with everything it has received on disk."""
        if self.process.poll() is None:
            self.process.terminate()
        try:
            self.process.wait(10)
        finally:
            if self.process.poll() is None:
                self.process.kill()
                self.process.wait()

    def logs(self) -> list[LogRecord]:
        """Every log record so far."""
        return log_records(self._lines("logs"))

    def spans(self) -> list[Span]:
        """Every span so far."""
        return spans(self._lines("traces"))

    def series(self, metric: str | None = None) -> list[Series]:
        """Every series so far of one metric or of all, each with its points in the order they came."""
        return [each for each in metric_series(self._lines("metrics")) if metric in {None, each.metric}]

    def wait_for_series(self, metric: str, good: Callable[[list[Series]], bool], seconds: float = 10) -> list[Series]:
        """Wait until the series of a metric are as they should be."""

        def look() -> list[Series]:
            found = self.series(metric)
            return found if found and good(found) else []

        return wait_for(metric, look, seconds)

    def _lines(self, signal: str) -> list[dict[str, Any]]:
        path = self.folder / f"{signal}.json"
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        # The last line may be half written.
        return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]

    def _listens(self) -> bool:
        said = (self.folder / "stderr").read_text(encoding="utf-8")
        assert self.process.poll() is None, f"the Collector ended with {self.process.returncode}:\n{said}"

        def connect() -> bool:
            try:
                for port in PORT_OF.values():
                    socket.create_connection((self._host.address6, port), timeout=1).close()
            except OSError:
                return False
            return True

        return self._host.in_netns(connect)


def endpoint(address: str, protocol: str = GRPC) -> dict[str, str]:
    """Name the standard variables that make an agent send to an address, whether or not anybody is there."""
    return {
        "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://{address}:{PORT_OF[protocol]}",
        "OTEL_EXPORTER_OTLP_PROTOCOL": protocol,
    }


def _config(folder: Path) -> dict[str, Any]:
    exporters = {
        f"file/{signal}": {"path": str(folder / f"{signal}.json"), "flush_interval": "50ms"} for signal in SIGNALS
    }
    protocols = {"grpc": {"endpoint": "[::]:4317"}, "http": {"endpoint": "[::]:4318"}}
    pipelines = {signal: {"receivers": ["otlp"], "exporters": [f"file/{signal}"]} for signal in SIGNALS}
    return {
        "receivers": {"otlp": {"protocols": protocols}},
        "exporters": exporters,
        "service": {
            "pipelines": pipelines,
            # Its own telemetry would only open another port.
            "telemetry": {"metrics": {"level": "none"}, "logs": {"level": "warn"}},
        },
    }
