# ruff: noqa: TID251 - the official classes are the oracle
"""The agent's own log lines, through OTLP and back."""

from __future__ import annotations

import logging

import pytest
from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceRequest
from opentelemetry.sdk.resources import Resource

from otel_lb_hop import __version__
from otel_lb_hop.export.log_lines import LONGEST_TEXT, LogLine, encode_lines
from otel_lb_hop.export.resource import make_envelope

ENVELOPE = make_envelope(Resource({"service.name": "x"}), "otel_lb_hop.agent")


@pytest.mark.parametrize(
    ("level", "severity"),
    [
        (logging.DEBUG, (5, "DEBUG")),
        (logging.INFO, (9, "INFO")),
        (logging.WARNING, (13, "WARN")),
        (logging.ERROR, (17, "ERROR")),
        (logging.CRITICAL, (21, "FATAL")),
        (1, (5, "DEBUG")),
        (35, (13, "WARN")),
        (99, (21, "FATAL")),
    ],
)
def test_line(level: int, severity: tuple[int, str]) -> None:
    """A line has its time, severity, text and place, in a scope of the agent's own."""
    line = LogLine(1_700_000_000_000_000_001, level, "otel_lb_hop.agent.run", "counting on eth0 \u2713", None)
    (chunk,) = encode_lines([line], ENVELOPE)
    assert (chunk.items, chunk.size_bytes) == (1, len(chunk.payload))
    (resource,) = ExportLogsServiceRequest.FromString(chunk.group.wrap([chunk.payload])).resource_logs
    (scope,) = resource.scope_logs
    (log,) = scope.log_records
    assert (scope.scope.name, scope.scope.version) == ("otel_lb_hop.agent", __version__)
    assert [(each.key, each.value.string_value) for each in resource.resource.attributes] == [("service.name", "x")]
    assert log.time_unix_nano == log.observed_time_unix_nano == 1_700_000_000_000_000_001
    assert (log.severity_number, log.severity_text, log.body.string_value) == (*severity, "counting on eth0 \u2713")
    assert [(each.key, each.value.string_value) for each in log.attributes] == [
        ("code.function.name", "otel_lb_hop.agent.run")
    ]


def test_exception() -> None:
    """An exception is told by the attributes of the semantic conventions."""
    line = LogLine(1, logging.ERROR, "f", "counters", ("KeyError", "'row'", "Traceback ..."))
    (chunk,) = encode_lines([line, line], ENVELOPE)
    request = ExportLogsServiceRequest.FromString(chunk.group.wrap([chunk.payload]))
    first, second = request.resource_logs[0].scope_logs[0].log_records
    assert first == second
    assert {each.key: each.value.string_value for each in first.attributes} == {
        "code.function.name": "f",
        "exception.type": "KeyError",
        "exception.message": "'row'",
        "exception.stacktrace": "Traceback ...",
    }


def test_no_line() -> None:
    """Nothing to tell is no chunk."""
    assert encode_lines([], ENVELOPE) == []


def test_long_line() -> None:
    """A line or a trace of any length takes no more room than others."""
    line = LogLine(1, logging.ERROR, "f", "x" * 10**6, ("E", "m", "y" * 10**6))
    (chunk,) = encode_lines([line], ENVELOPE)
    (log,) = (
        ExportLogsServiceRequest.FromString(chunk.group.wrap([chunk.payload]))
        .resource_logs[0]
        .scope_logs[0]
        .log_records
    )
    assert log.body.string_value == "x" * LONGEST_TEXT
    assert chunk.size_bytes < 40_000
