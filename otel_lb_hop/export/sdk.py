"""Exporters of the SDK and of plugins, chosen by the standard `OTEL_*` variables.

Names are entry points of the groups that the OpenTelemetry SDK defines; `otlp` is the OTLP exporter of the
protocol that was configured. Endpoint, headers, TLS, compression and time-outs are read by the exporters themselves.
"""

from __future__ import annotations

import sys
import threading
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any

from otel_lb_hop.errors import ConfigError, Problem

if TYPE_CHECKING:
    from otel_lb_hop.config import SignalConfig

POINTS_PER_MESSAGE = 500
"""A point takes some 400 bytes, a Collector's gRPC server 4 MiB a message: 5,000 Services are more than that. And the
encoder needs many times the memory of what it encodes."""

_OTLP_ENTRY_POINT = {"grpc": "otlp_proto_grpc", "http/protobuf": "otlp_proto_http"}


class _Stdout:
    """Standard output for the threads of all signals, one at a time.

    What two threads write at once comes out garbled before Python 3.11.10 and 3.12.4 (python/cpython#119506).
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()

    def write(self, text: str) -> int:
        with self._lock:
            return sys.stdout.write(text)

    def flush(self) -> None:
        with self._lock:
            sys.stdout.flush()


_STDOUT = _Stdout()


def make_exporters(signal: str, config: SignalConfig) -> list[Any]:
    """Make the exporters of one signal: `metrics`, `logs` or `traces`.

    Raises ConfigError for a name that is not installed or an exporter that refuses its settings.
    """
    group = f"opentelemetry_{signal}_exporter"
    variable = f"OTEL_{signal.upper()}_EXPORTER"
    available = {entry.name: entry for entry in entry_points(group=group)}
    exporters = []
    for name in config.exporters:
        wanted = _OTLP_ENTRY_POINT[config.protocol] if name == "otlp" else name
        if wanted not in available:
            raise ConfigError([Problem(variable, name, f"otlp, none, or one of {', '.join(sorted(available))}")])
        try:
            exporters.append(available[wanted].load()(**_options(signal, name)))
        except Exception as error:
            # Whatever a plugin's constructor raises is about its settings, and the operator has to read it.
            problem = Problem(variable, name, f"an exporter that starts with its OTEL_EXPORTER_* settings: {error}")
            raise ConfigError([problem]) from error
    return exporters


def _options(signal: str, name: str) -> dict[str, Any]:
    if name == "console":
        return {"out": _STDOUT}
    return {"max_export_batch_size": POINTS_PER_MESSAGE} if (signal, name) == ("metrics", "otlp") else {}
