"""Log records and spans straight to OTLP bytes: what a course has in common is encoded once, the rest spliced in.

`sdk_records` says the same in the SDK's classes and is the oracle of this. Field numbers: opentelemetry-proto
logs/v1 LogRecord, trace/v1 Span, common/v1 KeyValue.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

from otel_lb_hop import semconv
from otel_lb_hop.core.ids import span_id, tracestate
from otel_lb_hop.export import wire
from otel_lb_hop.export.delivery import Chunk
from otel_lb_hop.export.record_content import (
    CHUNK_RECORDS,
    SEVERITY,
    TRACE_FLAGS,
    before_port,
    course_attributes,
    event_name,
    log_attributes,
    sentence_tail,
    span_name,
    what_failed,
)
from otel_lb_hop.export.resource import make_envelope
from otel_lb_hop.model import format_address

if TYPE_CHECKING:
    from collections.abc import Sequence

    from opentelemetry.sdk.resources import Resource

    from otel_lb_hop.core.hops import Course
    from otel_lb_hop.core.layout import RawRecord
    from otel_lb_hop.export.record_content import Sampling

ADDRESSES = 4_096
"""Most addresses of clients, and of SNAT sources, whose text is remembered."""
_HAS_IS_REMOTE = 0x100
"""SPAN_FLAGS_CONTEXT_HAS_IS_REMOTE_MASK: whether the parent is remote is known; there is none here."""
SPAN_KIND_SERVER = 2
STATUS_ERROR = 2

_DOUBLE = struct.Struct("<d")
_TWO_BYTES, _THREE_BYTES = 1 << 7, 1 << 14
"""From here on the varint of a 16-bit number has so many bytes."""


def _head(size: int) -> bytes:
    """Write what stands before a record of so many bytes: field 2 of ScopeLogs and ScopeSpans."""
    return wire.tag(2, wire.DELIMITED) + wire.varint(size)


_HEADS = [_head(size) for size in range(4_096)]


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
        made = self.known[address] = (attribute, before_port(address).encode())
        return made


class _Numbers:
    """A 16-bit number as an attribute. Nothing is remembered of ports: there are as many as connections."""

    def __init__(self, field: int, name: str) -> None:
        self._small = [wire.attribute(field, name, number) for number in range(_TWO_BYTES)]
        self._head_of_two = wire.attribute(field, name, _TWO_BYTES)[:-2]
        self._head_of_three = wire.attribute(field, name, _THREE_BYTES)[:-3]

    def encode(self, number: int) -> bytes:
        if number >= _THREE_BYTES:
            return self._head_of_three + bytes((number & 127 | 128, number >> 7 & 127 | 128, number >> 14))
        if number >= _TWO_BYTES:
            return self._head_of_two + bytes((number & 127 | 128, number >> 7))
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
