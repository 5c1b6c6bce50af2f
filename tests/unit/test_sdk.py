# ruff: noqa: TID251 - real exporters are what is made
"""Exporters by name: those of OTLP, of the SDK, and of plugins."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any

import pytest
from opentelemetry.exporter.otlp.proto.grpc import _log_exporter as grpc_logs  # noqa: PLC2701 - logs are not stable yet
from opentelemetry.exporter.otlp.proto.grpc import metric_exporter as grpc_metrics
from opentelemetry.exporter.otlp.proto.grpc import trace_exporter as grpc_traces
from opentelemetry.exporter.otlp.proto.http import _log_exporter as http_logs  # noqa: PLC2701 - as above
from opentelemetry.exporter.otlp.proto.http import metric_exporter as http_metrics
from opentelemetry.exporter.otlp.proto.http import trace_exporter as http_traces
from opentelemetry.sdk._logs.export import ConsoleLogRecordExporter  # noqa: PLC2701 - as above
from opentelemetry.sdk.metrics.export import ConsoleMetricExporter
from opentelemetry.sdk.trace.export import ConsoleSpanExporter

from otel_lb_hop.config import SignalConfig
from otel_lb_hop.errors import ConfigError, Problem
from otel_lb_hop.export.sdk import make_exporters

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

SIGNALS = ("metrics", "logs", "traces")
OTLP = {
    ("metrics", "grpc"): grpc_metrics.OTLPMetricExporter,
    ("logs", "grpc"): grpc_logs.OTLPLogExporter,
    ("traces", "grpc"): grpc_traces.OTLPSpanExporter,
    ("metrics", "http/protobuf"): http_metrics.OTLPMetricExporter,
    ("logs", "http/protobuf"): http_logs.OTLPLogExporter,
    ("traces", "http/protobuf"): http_traces.OTLPSpanExporter,
}
CONSOLE = {"metrics": ConsoleMetricExporter, "logs": ConsoleLogRecordExporter, "traces": ConsoleSpanExporter}


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("OTEL_")]:
        monkeypatch.delenv(name)
    # The HTTP exporters' sessions look for a proxy.
    monkeypatch.setenv("NO_PROXY", "*")


class Maker:
    """Makes exporters, and shuts them down in the end."""

    def __init__(self) -> None:
        self.made: list[Any] = []

    def __call__(self, signal: str, *names: str, protocol: str = "grpc") -> list[Any]:
        """Make the exporters of one signal."""
        made = make_exporters(signal, SignalConfig(names, protocol))
        self.made += made
        return made


@pytest.fixture
def make() -> Iterator[Maker]:
    """Give the maker of exporters that end with the test."""
    maker = Maker()
    yield maker
    for exporter in maker.made:
        exporter.shutdown()


def problem_of(signal: str, *names: str, protocol: str = "grpc") -> Problem:
    """Give the only problem with which making exporters ends."""
    with pytest.raises(ConfigError) as caught:
        make_exporters(signal, SignalConfig(names, protocol))
    (problem,) = caught.value.problems
    return problem


@pytest.mark.parametrize(("signal", "protocol"), OTLP)
def test_otlp(make: Maker, signal: str, protocol: str) -> None:
    """`otlp` is the OTLP exporter of the signal and of the protocol that is configured."""
    (exporter,) = make(signal, "otlp", protocol=protocol)
    assert type(exporter) is OTLP[signal, protocol]


@pytest.mark.parametrize("signal", SIGNALS)
def test_names(make: Maker, signal: str) -> None:
    """Several names are several exporters in their order; none is none, an explicit protocol wins by its name."""
    assert [type(exporter) for exporter in make(signal, "console", "otlp")] == [CONSOLE[signal], OTLP[signal, "grpc"]]
    assert [type(exporter) for exporter in make(signal, "otlp_proto_http")] == [OTLP[signal, "http/protobuf"]]
    assert make(signal) == []


@pytest.mark.parametrize("signal", SIGNALS)
def test_unknown_name(signal: str) -> None:
    """A name that nobody provides is told with the variable and all names that there are."""
    problem = problem_of(signal, "zipkin-v9")
    assert (problem.name, problem.read) == (f"OTEL_{signal.upper()}_EXPORTER", "zipkin-v9")
    assert problem.accepted.startswith("otlp, none, or one of ")
    for name in ("console", "otlp_proto_grpc", "otlp_proto_http"):
        assert name in problem.accepted


def test_bad_setting_of_an_exporter(monkeypatch: pytest.MonkeyPatch) -> None:
    """An exporter that refuses its own settings is a wrong setting, in the exporter's words."""
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_COMPRESSION", "brotli9")
    for signal in SIGNALS:
        problem = problem_of(signal, "otlp")
        assert (problem.name, problem.read) == (f"OTEL_{signal.upper()}_EXPORTER", "otlp")
        assert "OTEL_EXPORTER_OTLP_COMPRESSION" in problem.accepted
        assert "brotli9" in problem.accepted


PLUGIN = """
class Exporter:
    def export(self, batch, **options):
        return None
    def shutdown(self):
        pass

class Moody(Exporter):
    def __init__(self):
        raise LookupError("ACME_TOKEN is not set")
"""
ENTRY_POINTS = """
[opentelemetry_logs_exporter]
acme = {module}:Exporter
acme_moody = {module}:Moody
acme_gone = {module}_missing:Exporter
acme_nameless = {module}:Nobody
"""


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Install a package with exporters in a folder of its own, as pip would; gives its module's name."""
    module = "otel_lb_hop_test_acme"
    info = tmp_path / f"{module}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(ENTRY_POINTS.format(module=module))
    (tmp_path / f"{module}.py").write_text(PLUGIN)
    monkeypatch.syspath_prepend(tmp_path)
    yield module
    sys.modules.pop(module, None)


def test_plugin(make: Maker, plugin: str) -> None:
    """An exporter of any installed package is found by its entry point, for its signal only."""
    (exporter,) = make("logs", "acme")
    assert type(exporter).__module__ == plugin
    assert problem_of("traces", "acme").read == "acme"
    assert "acme" in problem_of("logs", "unheard-of").accepted


@pytest.mark.usefixtures("plugin")
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("acme_moody", "ACME_TOKEN is not set"),
        ("acme_gone", "No module named 'otel_lb_hop_test_acme_missing'"),
        ("acme_nameless", "has no attribute 'Nobody'"),
    ],
)
def test_broken_plugin(name: str, words: str) -> None:
    """A plugin that cannot be imported or made is a wrong setting, in the plugin's words."""
    problem = problem_of("logs", name)
    assert problem.read == name
    assert problem.accepted.endswith(words)
