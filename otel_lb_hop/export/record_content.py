"""What a record says of a connection, in attributes and words, whichever way it is sent.

What all connections of a course have in common stands apart from what each has for itself: `records` encodes the first
part once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from otel_lb_hop import semconv
from otel_lb_hop.core.ids import randomness, rejection_threshold, tracestate
from otel_lb_hop.export.attributes import Attributes, vip_attributes
from otel_lb_hop.model import Hop, Outcome, format_address

if TYPE_CHECKING:
    from otel_lb_hop.core.hops import Connection, Course

CHUNK_RECORDS = 256
"""Some 200 KiB: what is lost together when a queue is full."""
TRACE_FLAGS = 0x03
"""Sampled, and the low 56 bits of the trace id are random (W3C trace context level 2)."""
KEEPS_ALL = 0
SEVERITY = {False: (9, "INFO"), True: (13, "WARN")}
"""Of good and of bad connections."""


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
    return f"{before_port(address)}{port}"


def before_port(address: bytes) -> str:
    """Write an address as it stands before a port."""
    text = format_address(address)
    return f"[{text}]:" if ":" in text else f"{text}:"


def _seconds(ns: int | None) -> float | None:
    return None if ns is None else ns / 1e9
