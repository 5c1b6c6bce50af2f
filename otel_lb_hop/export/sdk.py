"""Exporters of the SDK and of plugins as sinks, for the names in `OTEL_{METRICS,LOGS,TRACES}_EXPORTER` but `otlp`.

Names are entry points of the groups that the OpenTelemetry SDK defines; `otlp_proto_grpc` and `otlp_proto_http` are
the SDK's own OTLP. Their settings are read by the exporters themselves.
"""

from __future__ import annotations

import os
import threading
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any

from otel_lb_hop.errors import ConfigError, Problem
from otel_lb_hop.export.backlog import FAILED
from otel_lb_hop.export.delivery import Reply
from otel_lb_hop.export.points import Kind

if TYPE_CHECKING:
    from otel_lb_hop.export.delivery import Chunk, Sink

POINTS_PER_MESSAGE = 500
"""A point takes some 400 bytes, a Collector's gRPC server 4 MiB a message: 5,000 Services are more than that. And the
encoder needs many times the memory of what it encodes."""

_SDK_OTLP = frozenset({"otlp_proto_grpc", "otlp_proto_http"})


_STDOUT_FILENO = 1


class _Stdout:
    """Standard output for the threads of all signals, one at a time.

    What two threads write at once comes out garbled before Python 3.11.10 and 3.12.4 (python/cpython#119506).
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()

    def write(self, text: str) -> int:
        rest = text.encode(errors="replace")
        # Past the buffer of sys.stdout: a write that hangs would hold its lock, which the interpreter needs to end.
        with self._lock:
            while rest:
                rest = rest[os.write(_STDOUT_FILENO, rest) :]
        return len(text)

    def flush(self) -> None:
        """Nothing is buffered."""


_STDOUT = _Stdout()


class _SdkSink:
    """One exporter. The payload of a chunk is what it takes: log records or spans in a list, or one MetricsData.

    Exporters retry by themselves, within their own time-out; what they give up is lost.
    """

    def __init__(self, signal: str, name: str, exporter: Any) -> None:  # noqa: ANN401 - any exporter of any plugin
        self.name = name
        self.place = ""
        self._signal = signal
        self._exporter = exporter

    def send(self, chunks: list[Chunk], timeout_seconds: float | None = None) -> Reply:
        """Export once, and raise what a plugin raises; only exporters of metrics can be given a time-out.

        They also take one snapshot at a time, and so one chunk.
        """
        if self._signal == "metrics":
            (snapshot,) = chunks
            options = {} if timeout_seconds is None else {"timeout_millis": timeout_seconds * 1e3}
            result = self._exporter.export(snapshot.payload, **options)
        else:
            result = self._exporter.export([item for chunk in chunks for item in chunk.payload])
        if result.name == "SUCCESS":
            return Reply(taken=True)
        what = f"{type(self._exporter).__name__} answered {result.name}: is its Collector there?"
        return Reply(taken=False, detail=what, reason=FAILED)

    def close(self) -> None:
        """End the exporter; it takes as long as it likes, so the shipper calls this in a thread that may be left."""
        self._exporter.shutdown()


def make_sdk_sink(signal: str, name: str) -> Sink:
    """Make the sink of one exporter of a signal: `metrics`, `logs` or `traces`.

    Raises ConfigError for a name that is not installed or an exporter that refuses its settings.
    """
    variable = f"OTEL_{signal.upper()}_EXPORTER"
    available = {entry.name: entry for entry in entry_points(group=f"opentelemetry_{signal}_exporter")}
    if name not in available:
        known = ", ".join(sorted({"none", "otlp", *available}))
        raise ConfigError([Problem(variable, name, f"one or more of {known}")])
    try:
        exporter = available[name].load()(**_sink_options(signal, name))
    except Exception as error:
        # Whatever a plugin's constructor raises is about its settings, and the operator has to read it.
        problem = Problem(variable, name, f"an exporter that starts with its own settings: {error}")
        raise ConfigError([problem]) from error
    return _SdkSink(signal, name, exporter)


def delta_kinds(sink: Sink) -> frozenset[Kind]:
    """Tell of which kinds of metrics an exporter of the SDK wants deltas, as the SDK's readers ask it.

    Counters here are observable ones: they are read when they are exported.
    """
    from opentelemetry.sdk.metrics import Histogram, ObservableCounter  # noqa: PLC0415 - most exporters send records
    from opentelemetry.sdk.metrics.export import AggregationTemporality  # noqa: PLC0415

    exporter = sink._exporter if isinstance(sink, _SdkSink) else None  # noqa: SLF001 - of this module
    wanted = getattr(exporter, "_preferred_temporality", None) or {}
    kinds = {Kind.COUNTER: ObservableCounter, Kind.HISTOGRAM: Histogram}
    return frozenset(kind for kind, made in kinds.items() if wanted.get(made) is AggregationTemporality.DELTA)


def _sink_options(signal: str, name: str) -> dict[str, Any]:
    if name == "console":
        return {"out": _STDOUT}
    if signal == "metrics" and name in _SDK_OTLP:
        return {"max_export_batch_size": POINTS_PER_MESSAGE}
    return {}
