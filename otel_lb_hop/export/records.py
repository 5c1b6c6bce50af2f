"""Log records and spans straight to OTLP bytes: what a course has in common is encoded once, the rest spliced in.

Also owns what a record says, in attributes and words, for `sdk_records` too, which says the same in the SDK's classes
and is the oracle of this one. Field numbers: opentelemetry-proto logs/v1 LogRecord, trace/v1 Span, common/v1 KeyValue.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, NamedTuple

from otel_lb_hop import semconv
from otel_lb_hop.core.ids import randomness, rejection_threshold, span_id, tracestate
from otel_lb_hop.export import wire
from otel_lb_hop.export.attributes import Attributes, vip_attributes
from otel_lb_hop.export.delivery import Chunk
from otel_lb_hop.export.resource import make_envelope
from otel_lb_hop.model import Hop, Outcome, format_address

if TYPE_CHECKING:
    from collections.abc import Sequence

    from opentelemetry.sdk.resources import Resource

    from otel_lb_hop.core.hops import Connection, Course
    from otel_lb_hop.core.layout import RawRecord

CHUNK_RECORDS = 256
"""Some 200 KiB: what is lost together when a queue is full."""
ADDRESSES = 4_096
"""Most addresses of clients, and of SNAT sources, whose text is remembered."""
TRACE_FLAGS = 0x03
"""Sampled, and the low 56 bits of the trace id are random (W3C trace context level 2)."""
_HAS_IS_REMOTE = 0x100
"""SPAN_FLAGS_CONTEXT_HAS_IS_REMOTE_MASK: whether the parent is remote is known; there is none here."""
KEEPS_ALL = 0
SPAN_KIND_SERVER = 2
STATUS_ERROR = 2
SEVERITY = {False: (9, "INFO"), True: (13, "WARN")}


class Sampling(NamedTuple):
    """How a reader counts up: the rejection threshold that good connections passed. Failures are all sent.

    A signal may be sampled more thinly than the kernel samples for all, never less.
    """

    threshold: int
    kernel_threshold: int

    @classmethod
    def make(cls, kernel_ratio: float, ratio: float = 1.0) -> Sampling:
        """Sample a signal by its own ratio where the kernel samples by another."""
        kernel_threshold = rejection_threshold(kernel_ratio)
        return cls(max(kernel_threshold, rejection_threshold(ratio)), kernel_threshold)

    def keeps(self, course: Course, trace_id: bytes) -> bool:
        """Whether this signal has a record of a connection that the kernel told of."""
        return course.bad or randomness(trace_id) >= self.threshold

    def of(self, course: Course) -> int:
        """Tell the rejection threshold that a record of this course passed."""
        return KEEPS_ALL if course.bad else self.threshold


def event_name(course: Course) -> str:
    """Name the event that the log record stands for."""
    if course.outcome is not Outcome.FORWARDED:
        return semconv.EVENT_UNFORWARDED
    return semconv.EVENT_FAILED if course.failure else semconv.EVENT_FORWARDED


def span_name(course: Course) -> str:
    """Name the span: of low cardinality."""
    return f"lb_hop {course.vip.namespace}/{course.vip.service}"


def what_failed(course: Course) -> str:
    """Say in one word why a bad connection was lost."""
    return (course.failure or course.outcome).value


def course_attributes(course: Course, node_name: str) -> Attributes:
    """Make the attributes that all connections of a course have; what is not known is left out."""
    endpoint = course.endpoint
    known: dict[str, str | int | float | bool | None] = {
        **vip_attributes(course.vip, node_name),
        semconv.OUTCOME: course.outcome.value,
        semconv.ORIGIN: course.origin.value,
        semconv.HOP: course.hop.value if course.outcome is Outcome.FORWARDED else None,
        semconv.DESTINATION_NODE: course.node,
        semconv.DESTINATION_POD: endpoint.pod if endpoint else None,
        semconv.DESTINATION_NAMESPACE: endpoint.pod_namespace if endpoint else None,
        semconv.DESTINATION_ZONE: course.zone,
        semconv.ZONE_CROSSED: course.zone_crossed,
        semconv.NETWORK_INTERFACE_NAME: course.interface_in,
        semconv.ERROR_TYPE: what_failed(course) if course.bad else None,
    }
    if course.backend:
        known[semconv.DESTINATION_ADDRESS] = format_address(course.backend[0])
        known[semconv.DESTINATION_PORT] = course.backend[1]
    return {name: value for name, value in known.items() if value is not None}


def connection_attributes(connection: Connection) -> Attributes:
    """Make the attributes that each connection has for itself, in the order in which the encoders splice them in."""
    known: dict[str, str | int | float | None] = {semconv.CLIENT_ADDRESS: format_address(connection.client[0])}
    if connection.snat:
        known[semconv.SOURCE_ADDRESS] = format_address(connection.snat[0])
    known[semconv.CLIENT_PORT] = connection.client[1]
    if connection.snat:
        known[semconv.SOURCE_PORT] = connection.snat[1]
    known[semconv.SYN_RETRANSMITS] = connection.retransmits if connection.course.tcp else None
    known[semconv.FORWARD_DURATION_S] = _seconds(connection.forward_ns)
    known[semconv.HANDSHAKE_DURATION_S] = _seconds(connection.handshake_ns)
    return {name: value for name, value in known.items() if value is not None}


def log_attributes(course: Course, node_name: str, sampling: Sampling) -> Attributes:
    """Make a log record's attributes of its course: a span's, and how it was sampled, as a log has no tracestate."""
    attributes = course_attributes(course, node_name)
    if threshold := sampling.of(course):
        attributes[semconv.SAMPLING_THRESHOLD] = tracestate(threshold).removeprefix("th:")
    return attributes


def sentence_tail(course: Course, node_name: str) -> str:
    """Write what stands behind the client's address in a record's sentence; an answer's milliseconds follow."""
    vip = course.vip
    text = f" to {vip.namespace}/{vip.service} at {host_port(vip.address, vip.port)} came in on {node_name}"
    if course.outcome is not Outcome.FORWARDED:
        return f"{text} and was not forwarded: {what_failed(course)}"
    if course.backend is None:
        text += " and went to a backend that was not seen"
    else:
        text += f" and went to {host_port(*course.backend)}"
        if course.endpoint and course.endpoint.pod:
            text += f" ({course.endpoint.pod})"
        text += " on this node" if course.hop is Hop.NONE else f" on {course.node or 'an unknown node'}"
        if course.hop in {Hop.AVOIDABLE, Hop.REQUIRED}:
            text += f", {course.hop.value} hop"
    if course.failure:
        return f"{text}: {what_failed(course)}"
    if course.answered is None:
        return text
    return f"{text}, answered after " if course.answered else f"{text}; its answer took another way"


def sentence(connection: Connection, node_name: str) -> str:
    """Write a record's one line for people."""
    text = host_port(*connection.client) + sentence_tail(connection.course, node_name)
    handshake_ns = connection.handshake_ns
    return text if handshake_ns is None else f"{text}{handshake_ns / 1e6:.3f} ms"


def host_port(address: bytes, port: int) -> str:
    """Write an address and a port as people do."""
    return f"{_before_port(address)}{port}"


def _before_port(address: bytes) -> str:
    text = format_address(address)
    return f"[{text}]:" if ":" in text else f"{text}:"


def _seconds(ns: int | None) -> float | None:
    return None if ns is None else ns / 1e9


_DOUBLE = struct.Struct("<d")
_THREE_BYTES = 1 << 14
"""From here on the varint of a 16-bit number has three bytes."""
_HEADS = [wire.tag(2, wire.DELIMITED) + wire.varint(size) for size in range(4_096)]
"""What stands before a record of so many bytes: field 2 of ScopeLogs and ScopeSpans."""


class _Texts:
    """Addresses as an attribute and as the beginning of a sentence, remembered up to a limit."""

    def __init__(self, field: int, name: str) -> None:
        self._field = field
        self._name = name
        self.known: dict[bytes, tuple[bytes, bytes]] = {}

    def learn(self, address: bytes) -> tuple[bytes, bytes]:
        if len(self.known) >= ADDRESSES:
            self.known.clear()
        attribute = wire.attribute(self._field, self._name, format_address(address))
        made = self.known[address] = (attribute, _before_port(address).encode())
        return made


class _Numbers:
    """A 16-bit number as an attribute."""

    def __init__(self, field: int, name: str) -> None:
        self._field = field
        self._name = name
        self._small: dict[int, bytes] = {}
        self._head = wire.attribute(field, name, _THREE_BYTES)[:-3]

    def encode(self, number: int) -> bytes:
        if number >= _THREE_BYTES:
            return self._head + bytes((number & 127 | 128, number >> 7 & 127 | 128, number >> 14))
        if number not in self._small:
            self._small[number] = wire.attribute(self._field, self._name, number)
        return self._small[number]


class _Encoder:
    """What the encoders of both signals share; `field` is that of the attributes."""

    signal: str
    field: int

    def __init__(self, resource: Resource, node_name: str, sampling: Sampling) -> None:
        self.introduce(resource)
        self.encoded = 0
        self.not_sampled = 0
        self._node_name = node_name
        self._sampling = sampling
        self._clients = _Texts(self.field, semconv.CLIENT_ADDRESS)
        self._sources = _Texts(self.field, semconv.SOURCE_ADDRESS)
        self._client_port = _Numbers(self.field, semconv.CLIENT_PORT).encode
        self._source_port = _Numbers(self.field, semconv.SOURCE_PORT).encode
        self._retransmits = _Numbers(self.field, semconv.SYN_RETRANSMITS).encode
        self._forward_head = wire.attribute(self.field, semconv.FORWARD_DURATION_S, 0.0)[:-8]
        self._handshake_head = wire.attribute(self.field, semconv.HANDSHAKE_DURATION_S, 0.0)[:-8]

    def introduce(self, resource: Resource) -> None:
        """Name another resource from now on."""
        self._envelope = make_envelope(resource)

    def encode(
        self, records: Sequence[RawRecord], courses: Sequence[Course | None], offset_ns: int, observed_ns: int
    ) -> list[Chunk]:
        """Encode the records that have a course. `offset_ns` is wall time minus monotonic time.

        Answers chunks of at most `CHUNK_RECORDS`: repeated log records or spans as field 2 of their scope.
        """
        courses, not_sampled = self._choose(records, courses)
        chunks = []
        for start in range(0, len(records), CHUNK_RECORDS):
            stop = start + CHUNK_RECORDS
            parts = self._encode(records[start:stop], courses[start:stop], offset_ns, observed_ns)
            heads = _HEADS
            longest = len(heads)
            body = b"".join([(heads[len(each)] if len(each) < longest else _head(len(each))) + each for each in parts])
            if parts:
                chunks.append(Chunk(self._envelope, body, len(parts), len(body)))
        self.encoded += sum(chunk.items for chunk in chunks)
        self.not_sampled += not_sampled
        return chunks

    def _choose(
        self, records: Sequence[RawRecord], courses: Sequence[Course | None]
    ) -> tuple[Sequence[Course | None], int]:
        """Leave out what this signal samples more thinly than the kernel did for all; count it."""
        if self._sampling.threshold <= self._sampling.kernel_threshold:
            return courses, 0
        chosen = [
            course if course and self._sampling.keeps(course, record[3]) else None
            for record, course in zip(records, courses, strict=True)
        ]
        return chosen, chosen.count(None) - list(courses).count(None)

    def _encode(
        self, records: Sequence[RawRecord], courses: Sequence[Course | None], offset_ns: int, observed_ns: int
    ) -> list[bytes]:
        raise NotImplementedError


def _head(size: int) -> bytes:
    return wire.tag(2, wire.DELIMITED) + wire.varint(size)


class LogEncoder(_Encoder):
    """Encodes connections as log records."""

    signal = "logs"
    field = 6
    _FIXED = struct.Struct("<cQcQ2s16s2s8s")
    """time_unix_nano 1, observed_time_unix_nano 11, trace_id 9, span_id 10."""

    def _template(self, course: Course) -> tuple[bytes, bytes]:
        number, word = SEVERITY[course.bad]
        head = b"".join(
            (
                wire.tag(2, wire.VARINT) + wire.varint(number),
                wire.text(3, word),
                wire.tag(8, wire.FIXED32) + struct.pack("<I", TRACE_FLAGS),
                wire.text(12, event_name(course)),
                wire.attributes(self.field, log_attributes(course, self._node_name, self._sampling)),
            )
        )
        made = course.templates[self.signal] = head, sentence_tail(course, self._node_name).encode(errors="replace")
        return made

    def _encode(
        self, records: Sequence[RawRecord], courses: Sequence[Course | None], offset_ns: int, observed_ns: int
    ) -> list[bytes]:
        signal, fixed, double, head5 = self.signal, self._FIXED.pack, _DOUBLE.pack, _BODY_HEADS
        clients, sources = self._clients.known, self._sources.known
        forward_head, handshake_head = self._forward_head, self._handshake_head
        out = []
        for (syn_ns, forward_ns, end_ns, trace_id, client, snat, client_port, snat_port, retransmits, _), course in zip(
            records, courses, strict=True
        ):
            if course is None:
                continue
            head, tail = course.templates.get(signal) or self._template(course)
            client_attribute, before_port = clients.get(client) or self._clients.learn(client)
            if course.backend:
                source_attribute = (sources.get(snat) or self._sources.learn(snat))[0]
                source_port = self._source_port(snat_port)
            else:
                source_attribute = source_port = b""
            again = self._retransmits(retransmits) if course.tcp else b""
            forward = forward_head + double((forward_ns - syn_ns) / 1e9) if course.timed else b""
            if course.answered:
                body = b"%b%d%b%.3f ms" % (before_port, client_port, tail, (end_ns - syn_ns) / 1e6)
                handshake = handshake_head + double((end_ns - syn_ns) / 1e9)
            else:
                body = b"%b%d%b" % (before_port, client_port, tail)
                handshake = b""
            size = len(body)
            out.append(
                b"".join(
                    (
                        head,
                        client_attribute,
                        source_attribute,
                        self._client_port(client_port),
                        source_port,
                        again,
                        forward,
                        handshake,
                        fixed(
                            b"\x09", syn_ns + offset_ns, b"\x59", observed_ns,
                            b"\x4a\x10", trace_id, b"\x52\x08", span_id(trace_id),
                        ),
                        head5[size] if size < len(head5) else _body_head(size),
                        body,
                    )
                )
            )  # fmt: skip
        return out


def _body_head(size: int) -> bytes:
    """Write what stands before a body of so many bytes: field 5, AnyValue, of a string."""
    inner = wire.tag(1, wire.DELIMITED) + wire.varint(size)
    return wire.tag(5, wire.DELIMITED) + wire.varint(len(inner) + size) + inner


_BODY_HEADS = [_body_head(size) for size in range(512)]


class SpanEncoder(_Encoder):
    """Encodes connections as spans: from the first packet to the SYN-ACK, failure or verdict."""

    signal = "traces"
    field = 9
    _FIXED = struct.Struct("<2s16s2s8scQcQ")
    """trace_id 1, span_id 2, start_time_unix_nano 7, end_time_unix_nano 8."""

    def __init__(self, resource: Resource, node_name: str, sampling: Sampling) -> None:
        super().__init__(resource, node_name, sampling)
        self._translated = _event_around(semconv.SPAN_EVENT_TRANSLATED)
        self._syn_ack = _event_around(semconv.SPAN_EVENT_SYN_ACK)

    def _template(self, course: Course) -> bytes:
        status = wire.text(2, what_failed(course)) + wire.tag(3, wire.VARINT) + wire.varint(STATUS_ERROR)
        made = course.templates[self.signal] = b"".join(
            (
                wire.text(3, f"ot={tracestate(self._sampling.of(course))}"),
                wire.text(5, span_name(course)),
                wire.tag(6, wire.VARINT) + wire.varint(SPAN_KIND_SERVER),
                wire.delimited(15, status if course.bad else b""),
                wire.tag(16, wire.FIXED32) + struct.pack("<I", _HAS_IS_REMOTE | TRACE_FLAGS),
                wire.attributes(self.field, course_attributes(course, self._node_name)),
            )
        )
        return made

    def _encode(
        self, records: Sequence[RawRecord], courses: Sequence[Course | None], offset_ns: int, observed_ns: int
    ) -> list[bytes]:
        del observed_ns  # a span has no such time
        signal, fixed, double, time = self.signal, self._FIXED.pack, _DOUBLE.pack, _TIME.pack
        clients, sources = self._clients.known, self._sources.known
        forward_head, handshake_head = self._forward_head, self._handshake_head
        (translated_head, translated_tail), (syn_ack_head, syn_ack_tail) = self._translated, self._syn_ack
        out = []
        for (syn_ns, forward_ns, end_ns, trace_id, client, snat, client_port, snat_port, retransmits, _), course in zip(
            records, courses, strict=True
        ):
            if course is None:
                continue
            parts = [
                course.templates.get(signal) or self._template(course),
                fixed(
                    b"\x0a\x10", trace_id, b"\x12\x08", span_id(trace_id),
                    b"\x39", syn_ns + offset_ns, b"\x41", end_ns + offset_ns,
                ),
                (clients.get(client) or self._clients.learn(client))[0],
            ]  # fmt: skip
            if course.backend:
                parts += (
                    (sources.get(snat) or self._sources.learn(snat))[0],
                    self._client_port(client_port),
                    self._source_port(snat_port),
                )
            else:
                parts.append(self._client_port(client_port))
            if course.tcp:
                parts.append(self._retransmits(retransmits))
            if course.timed:
                parts += (
                    forward_head,
                    double((forward_ns - syn_ns) / 1e9),
                    translated_head,
                    time(forward_ns + offset_ns),
                    translated_tail,
                )
            if course.answered:
                parts += (
                    handshake_head,
                    double((end_ns - syn_ns) / 1e9),
                    syn_ack_head,
                    time(end_ns + offset_ns),
                    syn_ack_tail,
                )
            out.append(b"".join(parts))
        return out


_TIME = struct.Struct("<Q")


def _event_around(name: str) -> tuple[bytes, bytes]:
    """Write what stands before and behind the time of a span's event: field 11, time_unix_nano 1, name 2."""
    event = wire.delimited(11, wire.fixed64(1, 0) + wire.text(2, name))
    behind = wire.text(2, name)
    return event[: -len(behind) - _TIME.size], behind
