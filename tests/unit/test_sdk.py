# ruff: noqa: TID251 - real exporters are what is made
"""Exporters of the SDK and of plugins as sinks: found by name, given what they take, their answers understood."""

from __future__ import annotations

import os
import sys
import time
from typing import TYPE_CHECKING, Any

import pytest
from opentelemetry.exporter.otlp.proto.grpc import _log_exporter as grpc_logs  # noqa: PLC2701 - logs are not stable yet
from opentelemetry.exporter.otlp.proto.grpc import metric_exporter as grpc_metrics
from opentelemetry.exporter.otlp.proto.grpc import trace_exporter as grpc_traces
from opentelemetry.exporter.otlp.proto.http import _log_exporter as http_logs  # noqa: PLC2701 - as above
from opentelemetry.exporter.otlp.proto.http import metric_exporter as http_metrics
from opentelemetry.exporter.otlp.proto.http import trace_exporter as http_traces
from opentelemetry.sdk._logs.export import ConsoleLogRecordExporter  # noqa: PLC2701 - as above
from opentelemetry.sdk.metrics.export import (
    ConsoleMetricExporter,
    Gauge,
    Metric,
    MetricsData,
    NumberDataPoint,
    ResourceMetrics,
    ScopeMetrics,
)
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import ConsoleSpanExporter
from opentelemetry.sdk.util.instrumentation import InstrumentationScope

from otel_lb_hop.errors import ConfigError, Problem
from otel_lb_hop.export.backlog import Books
from otel_lb_hop.export.delivery import Chunk, Reply, Sink
from otel_lb_hop.export.points import Kind
from otel_lb_hop.export.sdk import delta_kinds, make_sdk_sink
from otel_lb_hop.export.shipper import Shipper

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

SIGNALS = ("metrics", "logs", "traces")
EXPORTERS = {
    ("metrics", "otlp_proto_grpc"): grpc_metrics.OTLPMetricExporter,
    ("logs", "otlp_proto_grpc"): grpc_logs.OTLPLogExporter,
    ("traces", "otlp_proto_grpc"): grpc_traces.OTLPSpanExporter,
    ("metrics", "otlp_proto_http"): http_metrics.OTLPMetricExporter,
    ("logs", "otlp_proto_http"): http_logs.OTLPLogExporter,
    ("traces", "otlp_proto_http"): http_traces.OTLPSpanExporter,
    ("metrics", "console"): ConsoleMetricExporter,
    ("logs", "console"): ConsoleLogRecordExporter,
    ("traces", "console"): ConsoleSpanExporter,
}


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("OTEL_")]:
        monkeypatch.delenv(name)
    # The HTTP exporters' sessions look for a proxy.
    monkeypatch.setenv("NO_PROXY", "*")


class Maker:
    """Makes sinks, and closes them in the end."""

    def __init__(self) -> None:
        self.made: list[Sink] = []

    def __call__(self, signal: str, name: str) -> Any:  # noqa: ANN401 - a sink, for a white-box look
        """Make the sink of one exporter."""
        self.made.append(make_sdk_sink(signal, name))
        return self.made[-1]


@pytest.fixture
def make() -> Iterator[Maker]:
    """Give the maker of sinks that end with the test."""
    maker = Maker()
    yield maker
    for sink in maker.made:
        sink.close()


def problem_of(signal: str, name: str) -> Problem:
    """Give the only problem with which making a sink ends."""
    with pytest.raises(ConfigError) as caught:
        make_sdk_sink(signal, name)
    (problem,) = caught.value.problems
    return problem


@pytest.mark.parametrize(("signal", "name"), EXPORTERS)
def test_names(make: Maker, signal: str, name: str) -> None:
    """Every exporter of the SDK is found by its name, which is the sink's."""
    sink = make(signal, name)
    assert type(sink._exporter) is EXPORTERS[signal, name]
    assert sink.name == name


@pytest.mark.parametrize("name", ["otlp_proto_grpc", "otlp_proto_http"])
def test_deltas_that_an_exporter_wants(make: Maker, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """The SDK's own OTLP reads the preference by itself; counters are observable ones."""
    wanted = {"": set(), "cumulative": set(), "lowmemory": {Kind.HISTOGRAM}, "delta": {Kind.COUNTER, Kind.HISTOGRAM}}
    for preference, kinds in wanted.items():
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_METRICS_TEMPORALITY_PREFERENCE", preference)
        assert delta_kinds(make("metrics", name)) == kinds


@pytest.mark.usefixtures("plugin")
def test_an_exporter_without_a_preference(make: Maker) -> None:
    """What says nothing of temporality gets everything cumulative."""
    assert delta_kinds(make("metrics", "acme")) == delta_kinds(make("metrics", "console")) == set()


def test_metrics_in_pieces(make: Maker) -> None:
    """The SDK's own OTLP splits metrics so that a Collector takes the messages."""
    for name in ("otlp_proto_grpc", "otlp_proto_http"):
        assert make("metrics", name)._exporter._max_export_batch_size == 500


@pytest.mark.parametrize("signal", SIGNALS)
def test_unknown_name(signal: str) -> None:
    """A name that nobody provides is told with the variable and all names that there are."""
    problem = problem_of(signal, "zipkin-v9")
    assert (problem.name, problem.read) == (f"OTEL_{signal.upper()}_EXPORTER", "zipkin-v9")
    assert problem.accepted == "one or more of console, none, otlp, otlp_proto_grpc, otlp_proto_http"


def test_bad_setting_of_an_exporter(monkeypatch: pytest.MonkeyPatch) -> None:
    """An exporter that refuses its own settings is a wrong setting, in the exporter's words."""
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_COMPRESSION", "brotli9")
    for signal in SIGNALS:
        problem = problem_of(signal, "otlp_proto_grpc")
        assert (problem.name, problem.read) == (f"OTEL_{signal.upper()}_EXPORTER", "otlp_proto_grpc")
        assert "OTEL_EXPORTER_OTLP_COMPRESSION" in problem.accepted
        assert "brotli9" in problem.accepted


def test_console_records(make: Maker, capfd: pytest.CaptureFixture[str]) -> None:
    """All records of all chunks are printed, in order."""
    spans = [ReadableSpan(name) for name in ("first", "second", "third")]
    sink = make("traces", "console")
    assert sink.send([Chunk(None, spans[:2], 2, 100), Chunk(None, spans[2:], 1, 50)]) == Reply(taken=True)
    printed = capfd.readouterr().out
    assert [name for name in printed.split('"') if name in {"first", "second", "third"}] == ["first", "second", "third"]


def test_console_metrics(make: Maker, capfd: pytest.CaptureFixture[str]) -> None:
    """A snapshot is printed as one."""
    gauge = Metric("answer", "", "1", Gauge([NumberDataPoint({}, 0, 1, 42)]))
    scope = ScopeMetrics(InstrumentationScope("test"), [gauge], "")
    snapshot = MetricsData([ResourceMetrics(Resource({}), [scope], "")])
    assert make("metrics", "console").send([Chunk(None, snapshot, 1, 100)], 5.0) == Reply(taken=True)
    printed = capfd.readouterr().out
    assert '"name": "answer"' in printed
    assert '"value": 42' in printed


PLUGIN = """
from enum import Enum

class Result(Enum):
    SUCCESS = 0
    FAILURE = 1

class Exporter:
    def __init__(self):
        self.calls = []
        self.ended = False
        self.result = Result.SUCCESS
    def export(self, batch, **options):
        self.calls.append((batch, options))
        return self.result
    def shutdown(self):
        self.ended = True

class Moody:
    def __init__(self):
        raise LookupError("ACME_TOKEN is not set")
"""
ENTRY_POINTS = """
[opentelemetry_logs_exporter]
acme = {module}:Exporter
acme_moody = {module}:Moody
acme_gone = {module}_missing:Exporter
acme_nameless = {module}:Nobody

[opentelemetry_metrics_exporter]
acme = {module}:Exporter
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
    """An exporter of any installed package is found by its entry point, for its signals only."""
    assert type(make("logs", "acme")._exporter).__module__ == plugin
    assert problem_of("traces", "acme").read == "acme"
    assert "acme" in problem_of("logs", "unheard-of").accepted


@pytest.mark.usefixtures("plugin")
def test_what_an_exporter_gets(make: Maker) -> None:
    """Records come as one list, a snapshot alone and with its time-out; the end comes once."""
    logs, metrics = make("logs", "acme"), make("metrics", "acme")
    logs.send([Chunk(None, ["a", "b"], 2, 10), Chunk(None, ["c"], 1, 5)], 7.0)
    assert logs._exporter.calls == [(["a", "b", "c"], {})]
    metrics.send([Chunk(None, "snapshot", 9, 10)], 7.5)
    metrics.send([Chunk(None, "snapshot 2", 9, 10)])
    assert metrics._exporter.calls == [("snapshot", {"timeout_millis": 7500.0}), ("snapshot 2", {})]
    logs.close()
    assert (logs._exporter.ended, metrics._exporter.ended) == (True, False)


@pytest.mark.usefixtures("plugin")
def test_an_exporter_that_gives_up(make: Maker) -> None:
    """What an exporter gave up is lost: it has tried again by itself."""
    sink = make("logs", "acme")
    sink._exporter.result = sys.modules[type(sink._exporter).__module__].Result.FAILURE
    assert sink.send([Chunk(None, ["a"], 1, 10)]) == Reply(
        taken=False, detail="Exporter answered FAILURE: is its Collector there?", reason="failed"
    )


@pytest.mark.usefixtures("plugin")
def test_an_exporter_that_answers_nonsense(make: Maker) -> None:
    """A plugin whose author forgot the return loses its records, by the name of the trouble, and nothing else."""
    sink = make("logs", "acme")
    sink._exporter.result = None
    shipper = Shipper("logs", sink, 1_000)
    shipper.offer([Chunk(None, ["a", "b"], 2, 10)])
    assert not shipper.flush(time.monotonic() + 10.0)
    assert shipper.books() == Books(2, 0, {"failed": 2}, 0, 0)
    assert shipper.last_error == "AttributeError: 'NoneType' object has no attribute 'name'"
    shipper.close(time.monotonic() + 10.0)
    assert sink._exporter.ended


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
