"""Log records and spans in the SDK's public classes: for `console` and plugins, and the oracle of `records`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from opentelemetry._logs import LogRecord, SeverityNumber  # noqa: PLC2701 - logs are not stable yet (opentelemetry-python#2240)
from opentelemetry.sdk._logs import ReadableLogRecord  # noqa: PLC2701 - as above
from opentelemetry.sdk.trace import Event, ReadableSpan
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import (
    NonRecordingSpan,
    SpanContext,
    SpanKind,
    Status,
    StatusCode,
    TraceFlags,
    TraceState,
    set_span_in_context,
)

from otel_lb_hop import __version__, semconv
from otel_lb_hop.core.hops import tell
from otel_lb_hop.core.ids import span_id, tracestate
from otel_lb_hop.export import record_content
from otel_lb_hop.export.delivery import Chunk

if TYPE_CHECKING:
    from collections.abc import Sequence

    from opentelemetry.sdk.resources import Resource

    from otel_lb_hop.core.hops import Connection, Course
    from otel_lb_hop.core.layout import RawRecord

RECORD_BYTES = 2_560
"""About what a log record or a span takes in memory."""


class SdkRecords:
    """Makes log records and spans of connections."""

    def __init__(self, resource: Resource, node_name: str, sampling: record_content.Sampling) -> None:
        self.resource = resource
        self._node_name = node_name
        self._scope = InstrumentationScope(semconv.SCOPE_NAME, __version__, semconv.SCHEMA_URL)
        self.sampling = sampling

    def log_record(self, connection: Connection, observed_ns: int) -> ReadableLogRecord:
        """Make the log record of a connection."""
        course = connection.course
        number, word = record_content.SEVERITY[course.bad]
        record = LogRecord(
            timestamp=connection.start_ns,
            observed_timestamp=observed_ns,
            context=set_span_in_context(NonRecordingSpan(self._span_context(connection))),
            severity_text=word,
            severity_number=SeverityNumber(number),
            body=record_content.sentence(connection, self._node_name),
            attributes=record_content.log_attributes(course, self._node_name, self.sampling)
            | record_content.connection_attributes(connection),
            event_name=record_content.event_name(course),
        )
        return ReadableLogRecord(record, self.resource, self._scope)

    def span(self, connection: Connection) -> ReadableSpan:
        """Make the span of a connection: from its first packet to its SYN-ACK, failure or verdict."""
        course = connection.course
        events = []
        if connection.forwarded_at_ns is not None:
            events.append(Event(semconv.SPAN_EVENT_TRANSLATED, timestamp=connection.forwarded_at_ns))
        if course.answered:
            events.append(Event(semconv.SPAN_EVENT_SYN_ACK, timestamp=connection.end_ns))
        return ReadableSpan(
            name=record_content.span_name(course),
            context=self._span_context(connection),
            resource=self.resource,
            attributes=record_content.course_attributes(course, self._node_name)
            | record_content.connection_attributes(connection),
            events=events,
            kind=SpanKind.SERVER,
            status=Status(StatusCode.ERROR, record_content.what_failed(course)) if course.bad else Status(),
            start_time=connection.start_ns,
            end_time=connection.end_ns,
            instrumentation_scope=self._scope,
        )

    def _span_context(self, connection: Connection) -> SpanContext:
        return SpanContext(
            trace_id=int.from_bytes(connection.trace_id, "big"),
            span_id=int.from_bytes(span_id(connection.trace_id), "big"),
            is_remote=False,
            trace_flags=TraceFlags(record_content.TRACE_FLAGS),
            trace_state=self._trace_state(connection.course),
        )

    def _trace_state(self, course: Course) -> TraceState:
        return TraceState([("ot", tracestate(self.sampling.of(course)))])


class SdkEncoder:
    """Does for an exporter of the SDK what an encoder of `records` does for OTLP: the chunks hold objects."""

    def __init__(self, signal: str, maker: SdkRecords) -> None:
        self.signal = signal
        self.encoded = 0
        self.not_sampled = 0
        self._maker = maker

    def introduce(self, resource: Resource) -> None:
        """Name another resource from now on."""
        self._maker.resource = resource

    def encode(
        self, records: Sequence[RawRecord], courses: Sequence[Course | None], offset_ns: int, observed_ns: int
    ) -> list[Chunk]:
        """Make chunks of the records that have a course."""
        not_sampled = 0
        made: list[ReadableLogRecord | ReadableSpan] = []
        for record, course in zip(records, courses, strict=True):
            if course is None:
                continue
            if not self._maker.sampling.keeps(course, record[3]):
                not_sampled += 1
                continue
            connection = tell(record, course, offset_ns)
            logs = self.signal == "logs"
            made.append(self._maker.log_record(connection, observed_ns) if logs else self._maker.span(connection))
        self.encoded += len(made)
        self.not_sampled += not_sampled
        parts = [
            made[start : start + record_content.CHUNK_RECORDS]
            for start in range(0, len(made), record_content.CHUNK_RECORDS)
        ]
        return [Chunk(None, part, len(part), len(part) * RECORD_BYTES) for part in parts]
