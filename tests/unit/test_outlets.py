# ruff: noqa: TID251 - a resource is the SDK's
"""The ways out: which sinks the settings make, and what each way says of itself in the ledger."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, Any

import pytest
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.proto.metrics.v1.metrics_pb2 import AGGREGATION_TEMPORALITY_DELTA
from opentelemetry.sdk.metrics.export import AggregationTemporality
from opentelemetry.sdk.resources import Resource

from otel_lb_hop.config import Config
from otel_lb_hop.core.hops import Courses
from otel_lb_hop.core.layout import BUCKETS, Event, Histogram, HopStats, Verdict, VipStats
from otel_lb_hop.core.ledger import Ledger, Stage
from otel_lb_hop.core.topology import Topology
from otel_lb_hop.errors import ConfigError
from otel_lb_hop.export.delivery import Reply
from otel_lb_hop.export.log_lines import LogLine
from otel_lb_hop.export.metrics import MetricsBuilder, SelfReport, Usage
from otel_lb_hop.export.outlets import (
    LinesOutlet,
    MetricsOutlet,
    RecordOutlet,
    Sinks,
    make_record_outlets,
    make_sinks,
)
from otel_lb_hop.export.points import Kind
from otel_lb_hop.export.record_content import Sampling
from tests.unit.samples import LOCAL, NODE, REMOTE, cluster, hop_stats, record, vip_port, vip_stats

if TYPE_CHECKING:
    from otel_lb_hop.core.layout import RawRecord
    from otel_lb_hop.export.delivery import Chunk

RESOURCE = Resource({"service.name": "x"})
ALL = Sampling.make(1.0)
PATIENCE_SECONDS = 10.0
CONNECTIONS = "lb_hop.connections"


class KeepingSink:
    """Takes everything and keeps it."""

    place = ""

    def __init__(self, name: str = "otlp") -> None:
        self.name = name
        self.chunks: list[Chunk] = []

    def send(self, chunks: list[Chunk], timeout_seconds: float | None = None) -> Reply:
        """Keep chunks."""
        del timeout_seconds
        self.chunks += chunks
        return Reply(taken=True)

    def close(self) -> None:
        """Nothing is open."""


def config(**variables: str) -> Config:
    """Read settings beside a VIP file."""
    return Config.from_environ({"OTEL_LB_HOP_VIPS_FILE": "/x", **variables}, NODE)


def test_sinks_by_name() -> None:
    """OTLP is our own sink, anything else one of the SDK; the agent's own log goes where log records go by OTLP."""
    variables = {
        "OTEL_METRICS_EXPORTER": "otlp,console",
        "OTEL_LOGS_EXPORTER": "otlp",
        "OTEL_TRACES_EXPORTER": "none",
        "OTEL_EXPORTER_OTLP_LOGS_PROTOCOL": "http/protobuf",
        "OTEL_EXPORTER_OTLP_ENDPOINT": "http://192.0.2.1:99",
    }
    sinks = make_sinks(config(**variables), variables)
    assert {signal: [sink.name for sink in each] for signal, each in sinks.by_signal.items()} == {
        "metrics": ["otlp", "console"],
        "logs": ["otlp"],
        "traces": [],
    }
    assert [sink.place for sink in sinks.by_signal["metrics"]] == ["192.0.2.1:99", ""]
    assert sinks.by_signal["logs"][0].place == "http://192.0.2.1:99/v1/logs"
    assert sinks.lines is not None
    assert sinks.lines is not sinks.by_signal["logs"][0]


@pytest.mark.parametrize(
    "variables",
    [
        {"OTEL_SDK_DISABLED": "true"},
        dict.fromkeys((f"OTEL_{s}_EXPORTER" for s in ("METRICS", "LOGS", "TRACES")), "none"),
    ],
)
def test_no_sinks(variables: dict[str, str]) -> None:
    """Turned off as a whole or by signal: nothing goes anywhere, not even the agent's own log."""
    assert make_sinks(config(**variables), variables) == Sinks({"metrics": [], "logs": [], "traces": []}, None)


def test_log_to_the_console_only() -> None:
    """The agent's own log is on stderr anyway; without OTLP for logs it goes nowhere else."""
    sinks = make_sinks(config(OTEL_LOGS_EXPORTER="console"), {})
    assert ([sink.name for sink in sinks.by_signal["logs"]], sinks.lines) == (["console"], None)


def test_problems_are_told_once() -> None:
    """What is wrong for all signals alike is one problem, beside what is wrong for one."""
    variables = {"OTEL_EXPORTER_OTLP_TIMEOUT": "soon", "OTEL_METRICS_EXPORTER": "otlp,nothing"}
    with pytest.raises(ConfigError) as caught:
        make_sinks(config(**variables), variables)
    assert [problem.name for problem in caught.value.problems] == [
        "OTEL_EXPORTER_OTLP_TIMEOUT",
        "OTEL_METRICS_EXPORTER",
    ]


def outlets(*sinks: tuple[str, KeepingSink], sampling: Sampling = ALL) -> list[RecordOutlet]:
    """Make record outlets."""
    by_signal: dict[str, list[Any]] = {"metrics": [], "logs": [], "traces": []}
    for signal, sink in sinks:
        by_signal[signal].append(sink)
    return make_record_outlets(Sinks(by_signal, None), RESOURCE, NODE, {"logs": ALL, "traces": sampling}, 3 << 20)


def test_records_by_both_ways() -> None:
    """Each way gets every record that has a course, as bytes or as objects, and its stages agree with the others."""
    topology = Topology(NODE)
    topology.replace(cluster(vip_port(LOCAL, REMOTE), node1="zone-a"), 1)
    records: list[RawRecord] = [record(), record(vip_id=99), record(Verdict.REFUSED)]
    courses = Courses(topology).of(records)
    logs, spans, console = KeepingSink(), KeepingSink(), KeepingSink("console")
    ways = outlets(("logs", logs), ("logs", console), ("traces", spans), sampling=Sampling.make(1.0, 0.0))
    for way in ways:
        way.offer(records, courses, 0, 1)
    assert all(way.shipper.flush(time.monotonic() + PATIENCE_SECONDS) for way in ways)
    stages = [Stage("decode", "", "", 3, 2, {"unresolved": 1}, 0)]
    for way in ways:
        stages += way.stages()
    assert Ledger(tuple(stages)).problems() == []
    assert [(stage.signal, stage.exporter, stage.seen, stage.exported, stage.losses) for stage in stages[1:]] == [
        ("logs", "otlp", 2, 2, {}), ("logs", "otlp", 2, 2, {}), ("logs", "otlp", 2, 2, {}),
        ("logs", "console", 2, 2, {}), ("logs", "console", 2, 2, {}), ("logs", "console", 2, 2, {}),
        ("traces", "otlp", 2, 1, {"not_sampled": 1}), ("traces", "otlp", 1, 1, {}), ("traces", "otlp", 1, 1, {}),
    ]  # fmt: skip
    assert isinstance(logs.chunks[0].payload, bytes)
    assert [log.log_record.severity_text for log in console.chunks[0].payload] == ["INFO", "WARN"]
    for way in ways:
        way.shipper.close(time.monotonic() + 1)


def test_what_cannot_be_encoded() -> None:
    """A way whose encoder fails counts what it was given, and the others get theirs."""

    class BrokenEncoder:
        encoded = not_sampled = 0

        def introduce(self, resource: Resource) -> None:
            del resource

        def encode(self, *_: object) -> list[Chunk]:
            raise ValueError("a name that nobody thought of")

    topology = Topology(NODE)
    topology.replace(cluster(vip_port(LOCAL, REMOTE)), 1)
    records: list[RawRecord] = [record(), record(vip_id=99), record()]
    way = RecordOutlet("logs", KeepingSink(), 1 << 20, BrokenEncoder())
    way.offer(records, Courses(topology).of(records), 0, 1)
    stages = way.stages()
    assert (stages[0].seen, stages[0].exported, stages[0].losses) == (2, 0, {"failed": 2})
    assert Ledger(stages).problems() == []
    way.shipper.close(time.monotonic() + 1)


def test_the_queue_is_shared() -> None:
    """All ways of records together hold no more than the settings allow."""
    ways = outlets(("logs", KeepingSink()), ("logs", KeepingSink("console")), ("traces", KeepingSink()))
    assert [way.shipper._backlog._limit_bytes for way in ways] == [1 << 20] * 3
    for way in ways:
        way.shipper.close(time.monotonic() + 1)


def test_a_new_resource() -> None:
    """What is encoded after the resource has changed goes in an envelope of its own."""
    topology = Topology(NODE)
    topology.replace(cluster(vip_port(LOCAL, REMOTE)), 1)
    sink = KeepingSink()
    (way,) = outlets(("logs", sink))
    courses = Courses(topology).of([record()])
    way.offer([record()], courses, 0, 1)
    way.introduce(Resource({"service.name": "y"}))
    way.offer([record()], courses, 0, 1)
    assert way.shipper.flush(time.monotonic() + PATIENCE_SECONDS)
    way.shipper.close(time.monotonic() + 1)
    bodies = [chunk.group.wrap([chunk.payload]) for chunk in sink.chunks]
    assert [
        b"service.name\x12\x03\n\x01" + value in body for value, body in zip((b"x", b"y"), bodies, strict=True)
    ] == [
        True,
        True,
    ]


@pytest.mark.parametrize("name", ["otlp", "console"])
def test_metrics(name: str) -> None:
    """An export's data points are the ledger's items, as bytes and as the SDK's objects."""
    topology = Topology(NODE)
    topology.replace(cluster(vip_port(LOCAL, REMOTE)), 1)
    idle = Histogram.of(0, (0,) * BUCKETS)
    vips = {1: VipStats((0, 1), ((0, 0, 0), (0, 0, 0)), 0)}
    hops = {2: HopStats((0, 1), 1, 0, 0, 0, 0, idle, idle)}
    report = SelfReport((0,) * len(Event), (), 1, 0.0, {}, {}, Usage(0.0, 0.0, 0))
    sink = KeepingSink(name)
    way = MetricsOutlet(sink, 1.0, RESOURCE)
    way.offer(MetricsBuilder(topology, NODE, 1, 1).build(vips, hops, report), 5)
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not sink.chunks and time.monotonic() < deadline:
        time.sleep(0.01)
    way.shipper.close(time.monotonic() + PATIENCE_SECONDS)
    queue, transport = way.stages()
    points = sum(chunk.items for chunk in sink.chunks)
    assert points == queue.seen == transport.exported
    assert way.shipper.exported_ns == 5
    if name == "console":
        metrics = sink.chunks[0].payload.resource_metrics[0].scope_metrics[0].metrics
        assert points == sum(len(metric.data.data_points) for metric in metrics)


@pytest.mark.parametrize("name", ["otlp", "console"])
def test_metrics_as_deltas(name: str) -> None:
    """The second export says what came since the first; the ledger has the points of the snapshots."""
    topology = Topology(NODE)
    topology.replace(cluster(vip_port(LOCAL)), 1)
    report = SelfReport((0,) * len(Event), (), 1, 0.0, {}, {}, Usage(0.0, 0.0, 0))
    sink = KeepingSink(name)
    way = MetricsOutlet(sink, 1.0, RESOURCE, frozenset({Kind.COUNTER, Kind.HISTOGRAM}))
    builder = MetricsBuilder(topology, NODE, 1, 1)
    for now_ns, count in ((5, 7), (9, 10)):
        way.offer(builder.build({1: vip_stats()}, {2: hop_stats(external=count)}, report), now_ns)
        deadline = time.monotonic() + PATIENCE_SECONDS
        while way.shipper.exported_ns != now_ns and time.monotonic() < deadline:
            time.sleep(0.01)
    way.shipper.close(time.monotonic() + PATIENCE_SECONDS)
    told = []
    for chunk in sink.chunks:
        if name == "otlp":
            request = ExportMetricsServiceRequest.FromString(chunk.group.wrap([chunk.payload]))
            (metric,) = (m for m in request.resource_metrics[0].scope_metrics[0].metrics if m.name == CONNECTIONS)
            assert metric.sum.aggregation_temporality == AGGREGATION_TEMPORALITY_DELTA
            points = [(each.start_time_unix_nano, each.time_unix_nano, each.as_int) for each in metric.sum.data_points]
        else:
            metrics = chunk.payload.resource_metrics[0].scope_metrics[0].metrics
            (data,) = (metric.data for metric in metrics if metric.name == CONNECTIONS)
            assert data.aggregation_temporality is AggregationTemporality.DELTA
            points = [(each.start_time_unix_nano, each.time_unix_nano, each.value) for each in data.data_points]
        told.append([point for point in points if point[2]])
    assert told == [[(1, 5, 7)], [(5, 9, 3)]]
    queue, transport = way.stages()
    assert queue.seen == transport.exported > sum(chunk.items for chunk in sink.chunks)


def test_own_log() -> None:
    """Lines go out as they are; those that made room for others before are counted."""
    sink = KeepingSink()
    way = LinesOutlet(sink, RESOURCE)
    line = LogLine(1, logging.INFO, "f", "counting on eth0", None)
    way.offer([line, line], 0)
    way.offer([], 0)
    way.offer([line], 4)
    assert way.shipper.flush(time.monotonic() + PATIENCE_SECONDS)
    way.shipper.close(time.monotonic() + 1)
    encode, queue, transport = way.stages()
    assert (encode.signal, encode.seen, encode.exported, encode.losses) == ("agent_logs", 7, 3, {"too_many": 4})
    assert (queue.seen, transport.exported) == (3, 3)
    assert Ledger((encode, queue, transport)).problems() == []
    assert sum(chunk.payload.count(b"counting on eth0") for chunk in sink.chunks) == 3
