"""A real Collector on the lab's mgmt host, and what it has received, each signal in a file."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
from typing import TYPE_CHECKING, Any, NamedTuple, Self

from opentelemetry.proto.logs.v1.logs_pb2 import LogsData  # noqa: TID251 - what the Collector writes

from tests.e2e.otlp import OWN_LOG, LogRecord, Series, Span, log_records, metric_series, spans
from tests.lab.waiting import wait_for
from tests.peers import build

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

    from tests.lab import Lab

GRPC, HTTP = "grpc", "http/protobuf"
PORT_OF = {GRPC: 4317, HTTP: 4318}
SIGNALS = ("metrics", "logs", "traces")
DELTAS = "cumulativetodelta"
FULL = {"memory_limiter": {"check_interval": "100ms", "limit_mib": 1}}
"""A processor that refuses everything: the Collector itself is larger than that."""


class Arrival(NamedTuple):
    """What identifies a log record, and its time."""

    trace_id: bytes
    time_ns: int


class Collector:
    """Receives OTLP over gRPC and HTTP by both families on all addresses of mgmt. Use it as a context.

    With `compact`, logs are written in protobuf, to be counted by `arrivals`: JSON takes many times the CPU and room.
    With `deltas`, metrics are also written as what its cumulativetodelta processor makes of them.
    """

    def __init__(
        self,
        lab: Lab,
        name: str = "collector",
        *,
        compact: bool = False,
        processors: Mapping[str, Mapping[str, Any]] | None = None,
        deltas: bool = False,
    ) -> None:
        self._host = lab.mgmt
        self.folder = lab.directory / name
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir()
        config = self.folder / "config.json"
        config.write_text(json.dumps(_config(self.folder, processors or {}, compact=compact, deltas=deltas)))
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
        """Every log record of a connection so far."""
        return log_records(self._lines("logs"))

    def own_logs(self) -> list[LogRecord]:
        """Every record of the agents' own logs so far."""
        return log_records(self._lines("logs"), own=True)

    def arrivals(self) -> list[Arrival]:
        """Every log record of a connection, of a compact Collector that has ended."""
        return [
            Arrival(record.trace_id, record.time_unix_nano)
            for message in self._messages("logs")
            for group in LogsData.FromString(message).resource_logs
            for scoped in group.scope_logs
            if scoped.scope.name != OWN_LOG
            for record in scoped.log_records
        ]

    def spans(self) -> list[Span]:
        """Every span so far."""
        return spans(self._lines("traces"))

    def series(self, metric: str | None = None) -> list[Series]:
        """Every series so far of one metric or of all, each with its points in the order they came."""
        return [each for each in metric_series(self._lines("metrics")) if metric in {None, each.metric}]

    def delta_series(self, metric: str) -> list[Series]:
        """Every series so far of one metric as deltas."""
        return [each for each in metric_series(self._lines("deltas")) if each.metric == metric]

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

    def _messages(self, signal: str) -> Iterator[bytes]:
        """Split what the file exporter wrote: each message stands behind its size."""
        content = (self.folder / f"{signal}.json").read_bytes()
        place = 0
        while place < len(content):
            start = place + 4
            place = start + int.from_bytes(content[place:start], "big")
            yield content[start:place]

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


def _config(
    folder: Path, processors: Mapping[str, Mapping[str, Any]], *, compact: bool, deltas: bool
) -> dict[str, Any]:
    exporters = {
        f"file/{signal}": {
            "path": str(folder / f"{signal}.json"),
            "flush_interval": "50ms",
            "format": "proto" if compact and signal == "logs" else "json",
        }
        for signal in (*SIGNALS, "deltas")
    }
    protocols = {"grpc": {"endpoint": "[::]:4317"}, "http": {"endpoint": "[::]:4318"}}
    pipelines = {
        signal: {"receivers": ["otlp"], "processors": [*processors], "exporters": [f"file/{signal}"]}
        for signal in SIGNALS
    }
    if deltas:
        exporter = "file/deltas"
        pipelines["metrics/deltas"] = {"receivers": ["otlp"], "processors": [DELTAS], "exporters": [exporter]}
    return {
        "receivers": {"otlp": {"protocols": protocols}},
        "processors": {**processors, DELTAS: {}},
        "exporters": exporters,
        "service": {
            "pipelines": pipelines,
            # Its own telemetry would only open another port.
            "telemetry": {"metrics": {"level": "none"}, "logs": {"level": "warn"}},
        },
    }
