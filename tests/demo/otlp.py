"""From OTLP protobuf messages to plain values: what the report is made from. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from google.protobuf.json_format import MessageToDict
from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceRequest  # noqa: TID251 - the far end

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import (  # noqa: TID251 - the far end
        ExportMetricsServiceRequest,
    )
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (  # noqa: TID251 - the far end
        ExportTraceServiceRequest,
    )
    from opentelemetry.proto.common.v1.common_pb2 import KeyValue  # noqa: TID251 - the far end

Value: TypeAlias = str | int | float | bool

ID_FIELDS = ("traceId", "spanId")


class Point(NamedTuple):
    """One data point of a metric: `value` of a sum or gauge, `buckets` between `bounds` of a histogram."""

    metric: str
    attributes: Mapping[str, Value]
    value: float = 0
    buckets: tuple[int, ...] = ()
    bounds: tuple[float, ...] = ()


class Record(NamedTuple):
    """One log record, and the request that holds it and nothing else, as OTLP/JSON."""

    event_name: str
    attributes: Mapping[str, Value]
    trace_id: str
    span_id: str
    request: ExportLogsServiceRequest


def points(request: ExportMetricsServiceRequest) -> Iterator[Point]:
    """Decode every point of an export."""
    for resource in request.resource_metrics:
        for scope in resource.scope_metrics:
            for metric in scope.metrics:
                for number in (*metric.sum.data_points, *metric.gauge.data_points):
                    value = number.as_int if number.HasField("as_int") else number.as_double
                    yield Point(metric.name, _attributes(number.attributes), value)
                for each in metric.histogram.data_points:
                    buckets, bounds = tuple(each.bucket_counts), tuple(each.explicit_bounds)
                    yield Point(metric.name, _attributes(each.attributes), 0, buckets, bounds)


def records(request: ExportLogsServiceRequest) -> Iterator[Record]:
    """Decode every log record of an export that tells of a connection; lines of the agents' own logs are no events."""
    for resource in request.resource_logs:
        for scope in resource.scope_logs:
            for log in scope.log_records:
                if not log.event_name:
                    continue
                alone = ExportLogsServiceRequest()
                kept = alone.resource_logs.add(resource=resource.resource, schema_url=resource.schema_url)
                kept.scope_logs.add(scope=scope.scope, schema_url=scope.schema_url, log_records=[log])
                yield Record(log.event_name, _attributes(log.attributes), log.trace_id.hex(), log.span_id.hex(), alone)


def span_ids(request: ExportTraceServiceRequest) -> Iterator[tuple[str, str]]:
    """Name every span of an export by its trace and span id."""
    for resource in request.resource_spans:
        for scope in resource.scope_spans:
            for span in scope.spans:
                yield span.trace_id.hex(), span.span_id.hex()


def to_json(record: Record) -> dict[str, Any]:
    """Write a log record as OTLP/JSON: protobuf's JSON, with ids in hex and enums as numbers."""
    tree: dict[str, Any] = MessageToDict(record.request, use_integers_for_enums=True)
    (log,) = tree["resourceLogs"][0]["scopeLogs"][0]["logRecords"]
    log |= dict(zip(ID_FIELDS, (record.trace_id, record.span_id), strict=True))
    return tree


def _attributes(pairs: Iterable[KeyValue]) -> dict[str, Value]:
    return {pair.key: getattr(pair.value, pair.value.WhichOneof("value") or "string_value") for pair in pairs}
