"""OTLP in its JSON encoding, as the Collector's file exporter writes it, read into plain values. Pure.

Read by this project's own hand on purpose: nothing of the agent's code stands between the wire and the tests.
https://opentelemetry.io/docs/specs/otlp/#json-protobuf-encoding
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

Attributes = dict[str, Any]
Json = dict[str, Any]

CUMULATIVE = 2  # AggregationTemporality in metrics.proto
SPAN_KIND_SERVER = 2  # trace.proto
STATUS_UNSET, STATUS_ERROR = 0, 2  # trace.proto


class LogRecord(NamedTuple):
    """One log record with the resource and scope it came under."""

    resource: Attributes
    scope: Attributes
    schema_url: str
    time_ns: int
    observed_ns: int
    severity: str
    severity_number: int
    body: str
    event_name: str
    trace_id: str
    span_id: str
    flags: int
    attributes: Attributes


class SpanEvent(NamedTuple):
    """One event of a span."""

    name: str
    time_ns: int


class Span(NamedTuple):
    """One span with its resource."""

    resource: Attributes
    scope: Attributes
    schema_url: str
    name: str
    kind: int
    trace_id: str
    span_id: str
    parent_id: str
    trace_state: str
    start_ns: int
    end_ns: int
    status: int
    status_message: str
    events: list[SpanEvent]
    attributes: Attributes


class Histogram(NamedTuple):
    """The value of a histogram point."""

    observations: int
    total: float
    buckets: tuple[int, ...]
    bounds: tuple[float, ...]
    least: float | None
    most: float | None


class Point(NamedTuple):
    """One point of a series: a sum or gauge has `value`, a histogram has `histogram`."""

    start_ns: int
    time_ns: int
    value: float
    histogram: Histogram | None


@dataclass(slots=True)
class Series:
    """One metric with one set of attributes from one resource, and its points in the order they came."""

    resource: Attributes
    scope: Attributes
    schema_url: str
    metric: str
    unit: str
    kind: str
    temporality: int
    monotonic: bool
    attributes: Attributes
    points: list[Point] = field(default_factory=list)

    @property
    def last(self) -> Point:
        """The latest point."""
        return self.points[-1]

    @property
    def value(self) -> float:
        """Value of the latest point."""
        return self.last.value


OWN_LOG = "otel_lb_hop.agent"
"""The scope of the agent's own log."""


def log_records(lines: Iterable[Json], *, own: bool = False) -> list[LogRecord]:
    """Read what the logs pipeline wrote of connections, or of the agents' own logs."""
    return [
        LogRecord(
            resource,
            scope,
            schema_url,
            int(record["timeUnixNano"]),
            int(record["observedTimeUnixNano"]),
            record["severityText"],
            record["severityNumber"],
            record["body"]["stringValue"],
            record.get("eventName", ""),
            record.get("traceId", ""),
            record.get("spanId", ""),
            record.get("flags", 0),
            _attributes(record),
        )
        for resource, scope, schema_url, record in _items(lines, "resourceLogs", "scopeLogs", "logRecords")
        if (scope["name"] == OWN_LOG) is own
    ]


def spans(lines: Iterable[Json]) -> list[Span]:
    """Read what the traces pipeline wrote."""
    return [
        Span(
            resource,
            scope,
            schema_url,
            span["name"],
            span["kind"],
            span["traceId"],
            span["spanId"],
            span.get("parentSpanId", ""),
            span.get("traceState", ""),
            int(span["startTimeUnixNano"]),
            int(span["endTimeUnixNano"]),
            span["status"].get("code", STATUS_UNSET),
            span["status"].get("message", ""),
            [SpanEvent(event["name"], int(event["timeUnixNano"])) for event in span.get("events", ())],
            _attributes(span),
        )
        for resource, scope, schema_url, span in _items(lines, "resourceSpans", "scopeSpans", "spans")
    ]


def metric_series(lines: Iterable[Json]) -> list[Series]:
    """Read what the metrics pipeline wrote."""
    found: dict[object, Series] = {}
    for resource, scope, schema_url, metric in _items(lines, "resourceMetrics", "scopeMetrics", "metrics"):
        kind = next(kind for kind in ("sum", "gauge", "histogram") if kind in metric)
        data = metric[kind]
        for point in data["dataPoints"]:
            attributes = _attributes(point)
            key = (frozenset(resource.items()), metric["name"], frozenset(attributes.items()))
            if key not in found:
                found[key] = Series(
                    resource,
                    scope,
                    schema_url,
                    metric["name"],
                    metric["unit"],
                    kind,
                    data.get("aggregationTemporality", 0),
                    data.get("isMonotonic", False),
                    attributes,
                )
            found[key].points.append(_point(point, kind))
    return list(found.values())


def _point(point: Json, kind: str) -> Point:
    value, histogram = 0.0, None
    if kind == "histogram":
        histogram = Histogram(
            int(point.get("count", 0)),
            point["sum"],
            tuple(map(int, point.get("bucketCounts", ()))),
            tuple(point.get("explicitBounds", ())),
            point.get("min"),
            point.get("max"),
        )
    else:
        # A 64-bit integer is written as a string.
        value = int(point["asInt"]) if "asInt" in point else float(point["asDouble"])
    return Point(int(point.get("startTimeUnixNano", 0)), int(point["timeUnixNano"]), value, histogram)


def _items(
    lines: Iterable[Json], by_resource: str, by_scope: str, items: str
) -> Iterator[tuple[Attributes, Attributes, str, Json]]:
    for line in lines:
        for group in line.get(by_resource, ()):
            for scoped in group[by_scope]:
                scope = {name: scoped["scope"].get(name, "") for name in ("name", "version")}
                for item in scoped[items]:
                    yield _attributes(group["resource"]), scope, scoped.get("schemaUrl", ""), item


def _attributes(holder: Json) -> Attributes:
    pairs = [(entry["key"], _value(entry["value"])) for entry in holder.get("attributes", ())]
    attributes = dict(pairs)
    assert len(attributes) == len(pairs), f"an attribute stands there twice: {pairs}"
    return attributes


def _value(value: Json) -> str | int | float | bool:
    ((kind, content),) = value.items()
    read: str | int | float | bool = int(content) if kind == "intValue" else content
    return read
