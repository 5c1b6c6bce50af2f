"""From a told connection to an OTLP log record and a span, as the SDK's public classes hold them."""

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
from otel_lb_hop.core.ids import span_id, tracestate
from otel_lb_hop.export.attributes import Attributes, vip_attributes
from otel_lb_hop.model import Hop, Outcome, Transport, format_address

if TYPE_CHECKING:
    from opentelemetry.sdk.resources import Resource

    from otel_lb_hop.core.hops import Connection

TRACE_FLAGS = TraceFlags(0x03)
"""Sampled, and the low 56 bits of the trace id are random (W3C trace context level 2)."""
KEEPS_ALL = 0


class RecordBuilder:
    """Makes log records and spans. `threshold` is the rejection threshold that good connections passed."""

    def __init__(self, resource: Resource, node_name: str, threshold: int) -> None:
        self.resource = resource
        self._node_name = node_name
        self._scope = InstrumentationScope(semconv.SCOPE_NAME, __version__, semconv.SCHEMA_URL)
        self._sampled = TraceState([("ot", tracestate(threshold))])
        self._always = TraceState([("ot", tracestate(KEEPS_ALL))])

    def log_record(self, connection: Connection, observed_ns: int) -> ReadableLogRecord:
        """Make the log record of a connection."""
        bad = is_bad(connection)
        record = LogRecord(
            timestamp=connection.start_ns,
            observed_timestamp=observed_ns,
            context=set_span_in_context(NonRecordingSpan(self._span_context(connection))),
            severity_text="WARN" if bad else "INFO",
            severity_number=SeverityNumber.WARN if bad else SeverityNumber.INFO,
            body=self._sentence(connection),
            attributes=record_attributes(connection, self._node_name),
            event_name=event_name(connection),
        )
        return ReadableLogRecord(record, self.resource, self._scope)

    def span(self, connection: Connection) -> ReadableSpan:
        """Make the span of a connection: from its first packet to its SYN-ACK, failure or verdict."""
        events = []
        if connection.forwarded_at_ns is not None:
            events.append(Event(semconv.SPAN_EVENT_TRANSLATED, timestamp=connection.forwarded_at_ns))
        if connection.answered:
            events.append(Event(semconv.SPAN_EVENT_SYN_ACK, timestamp=connection.end_ns))
        return ReadableSpan(
            name=f"lb_hop {connection.vip.namespace}/{connection.vip.service}",
            context=self._span_context(connection),
            resource=self.resource,
            attributes=record_attributes(connection, self._node_name),
            events=events,
            kind=SpanKind.SERVER,
            status=Status(StatusCode.ERROR, _what_failed(connection)) if is_bad(connection) else Status(),
            start_time=connection.start_ns,
            end_time=connection.end_ns,
            instrumentation_scope=self._scope,
        )

    def _span_context(self, connection: Connection) -> SpanContext:
        return SpanContext(
            trace_id=connection.trace_high << 64 | connection.trace_low,
            span_id=span_id(connection.trace_high, connection.trace_low),
            is_remote=False,
            trace_flags=TRACE_FLAGS,
            # Failures are sent whatever the ratio is: to a reader each stands for itself alone.
            trace_state=self._always if is_bad(connection) else self._sampled,
        )

    def _sentence(self, connection: Connection) -> str:
        vip = connection.vip
        text = (
            f"{_endpoint(connection.client)} to {vip.namespace}/{vip.service} at {_endpoint((vip.address, vip.port))}"
        )
        text += f" came in on {self._node_name}"
        if connection.outcome is not Outcome.FORWARDED:
            return f"{text} and was not forwarded: {_what_failed(connection)}"
        if connection.backend is None:
            return f"{text} and was answered by a backend that was not seen"
        text += f" and went to {_endpoint(connection.backend)}"
        if connection.endpoint and connection.endpoint.pod:
            text += f" ({connection.endpoint.pod})"
        text += " on this node" if connection.hop is Hop.NONE else f" on {connection.node or 'an unknown node'}"
        if connection.hop in {Hop.AVOIDABLE, Hop.REQUIRED}:
            text += f", {connection.hop.value} hop"
        if connection.failure:
            return f"{text}: {_what_failed(connection)}"
        if connection.answered is None:
            return text
        if connection.handshake_ns is None:
            return f"{text}; its answer took another way"
        return f"{text}, answered after {connection.handshake_ns / 1e6:.3f} ms"


def is_bad(connection: Connection) -> bool:
    """Whether the connection was lost on the way: never forwarded, or its handshake failed."""
    return connection.failure is not None or connection.outcome is not Outcome.FORWARDED


def event_name(connection: Connection) -> str:
    """Name the event that the log record stands for."""
    if connection.outcome is not Outcome.FORWARDED:
        return semconv.EVENT_UNFORWARDED
    return semconv.EVENT_FAILED if connection.failure else semconv.EVENT_FORWARDED


def _what_failed(connection: Connection) -> str:
    return (connection.failure or connection.outcome).value


def _endpoint(pair: tuple[bytes, int]) -> str:
    text = format_address(pair[0])
    return f"[{text}]:{pair[1]}" if ":" in text else f"{text}:{pair[1]}"


def record_attributes(connection: Connection, node_name: str) -> Attributes:
    """Make the flat attributes of a record; what is not known is left out."""
    endpoint = connection.endpoint
    optional: dict[str, str | int | float | bool | None] = {
        semconv.HOP: connection.hop.value if connection.outcome is Outcome.FORWARDED else None,
        semconv.DESTINATION_NODE: connection.node,
        semconv.DESTINATION_POD: endpoint.pod if endpoint else None,
        semconv.DESTINATION_NAMESPACE: endpoint.pod_namespace if endpoint else None,
        semconv.DESTINATION_ZONE: connection.zone,
        semconv.ZONE_CROSSED: connection.zone_crossed,
        semconv.FORWARD_DURATION_S: _seconds(connection.forward_ns),
        semconv.HANDSHAKE_DURATION_S: _seconds(connection.handshake_ns),
        semconv.SYN_RETRANSMITS: connection.retransmits if connection.vip.transport is Transport.TCP else None,
        semconv.NETWORK_INTERFACE_NAME: connection.interface_in,
        semconv.ERROR_TYPE: _what_failed(connection) if is_bad(connection) else None,
    }
    if connection.snat and connection.backend:
        optional[semconv.SOURCE_ADDRESS] = format_address(connection.snat[0])
        optional[semconv.SOURCE_PORT] = connection.snat[1]
        optional[semconv.DESTINATION_ADDRESS] = format_address(connection.backend[0])
        optional[semconv.DESTINATION_PORT] = connection.backend[1]
    return {
        **vip_attributes(connection.vip, node_name),
        semconv.CLIENT_ADDRESS: format_address(connection.client[0]),
        semconv.CLIENT_PORT: connection.client[1],
        semconv.OUTCOME: connection.outcome.value,
        semconv.ORIGIN: connection.origin.value,
        **{name: value for name, value in optional.items() if value is not None},
    }


def _seconds(ns: int | None) -> float | None:
    return None if ns is None else ns / 1e9
