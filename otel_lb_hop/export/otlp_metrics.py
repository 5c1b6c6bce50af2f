"""Metrics straight to OTLP bytes: labels are encoded once per row, of a point only times and value are set.

Field numbers: opentelemetry-proto metrics/v1. Metric: name 1, description 2, unit 3, gauge 5, sum 7, histogram 9. Each
of the three: data_points 1, aggregation_temporality 2, is_monotonic 3.
"""

from __future__ import annotations

import struct
import sys
from functools import lru_cache
from typing import TYPE_CHECKING

from otel_lb_hop.core.layout import BUCKETS
from otel_lb_hop.export import wire
from otel_lb_hop.export.delivery import Chunk
from otel_lb_hop.export.points import BOUNDS_S, Kind

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from otel_lb_hop.export.points import Metric

CHUNK_BYTES = 1 << 19
"""Most bytes of a chunk, which is a request: with its envelope less than the 1 MiB that nginx takes if nobody told it
otherwise (client_max_body_size). A Collector's gRPC server takes 4 MiB a message."""
PIECE_BYTES = CHUNK_BYTES // 4
"""A metric is split into pieces of about so many bytes, and chunks are filled with those."""

_CUMULATIVE = wire.tag(2, wire.VARINT) + wire.varint(2)
_DELTA = wire.tag(2, wire.VARINT) + wire.varint(1)
_MONOTONIC = wire.tag(3, wire.VARINT) + wire.varint(1)
_KINDS = {
    (Kind.GAUGE, False): (5, b""),
    (Kind.COUNTER, False): (7, _CUMULATIVE + _MONOTONIC),
    (Kind.COUNTER, True): (7, _DELTA + _MONOTONIC),
    (Kind.UP_DOWN, False): (7, _CUMULATIVE),
    (Kind.HISTOGRAM, False): (9, _CUMULATIVE),
    (Kind.HISTOGRAM, True): (9, _DELTA),
}
"""Kind, and whether as delta → field of Metric, and what stands behind the points."""

_START, _TIME, _AS_DOUBLE, _AS_INT = (wire.tag(field, wire.FIXED64) for field in (2, 3, 4, 6))
_START_TIME = struct.Struct("<cQ")
_INT = struct.Struct("<cQcq")
_DOUBLE = struct.Struct("<cQcd")
_COUNT, _SUM = (wire.tag(field, wire.FIXED64) for field in (4, 5))
_BUCKETS = wire.tag(6, wire.DELIMITED) + wire.varint(8 * BUCKETS)
_BOUNDS = wire.delimited(7, struct.pack(f"<{len(BOUNDS_S)}d", *BOUNDS_S))
_LITTLE = sys.byteorder == "little"
"""Then the kernel's words are what OTLP wants."""
_HISTOGRAM = struct.Struct(f"<cQcQcd{len(_BUCKETS)}s{8 * BUCKETS}s{len(_BOUNDS)}s")


def encode(metrics: Iterable[Metric], envelope: wire.Envelope, now_ns: int) -> list[Chunk]:
    """Encode one export, as of `now_ns`: chunks of at most about `CHUNK_BYTES`, whole metrics or pieces of them.

    A payload is repeated `metrics`, field 2 of ScopeMetrics.
    """
    chunks: list[Chunk] = []
    fields: list[bytes] = []
    size = items = 0
    for metric in metrics:
        for field, points in _pieces(metric, now_ns):
            if size + len(field) > CHUNK_BYTES:
                chunks.append(Chunk(envelope, b"".join(fields), items, size))
                fields, size, items = [], 0, 0
            fields.append(field)
            size += len(field)
            items += points
    if fields:
        chunks.append(Chunk(envelope, b"".join(fields), items, size))
    return chunks


def _pieces(metric: Metric, now_ns: int) -> Iterator[tuple[bytes, int]]:
    """Encode a metric in as many pieces as it takes, each a whole Metric; without points in none."""
    kind, name, unit, description = metric.instrument
    head = wire.text(1, name) + wire.text(2, description) + wire.text(3, unit)
    number, tail = _KINDS[kind, metric.delta]
    for points, count in _points(metric, now_ns):
        body_bytes = len(points) + len(tail)
        before = head + wire.tag(number, wire.DELIMITED) + wire.varint(body_bytes)
        size = wire.tag(2, wire.DELIMITED) + wire.varint(len(before) + body_bytes)
        yield b"".join((size, before, points, tail)), count


def _points(metric: Metric, now_ns: int) -> Iterator[tuple[bytes, int]]:
    """Encode points as repeated `data_points`, some `PIECE_BYTES` at a time, and count them."""
    gauge = metric.instrument.kind is Kind.GAUGE
    parts: list[bytes] = []
    size = count = 0
    for own, beyond, start_ns, value in metric.points:
        first, second = own.number, beyond.number
        # The SDK gives gauges no start time: their values have no past.
        start = b"" if gauge else _START_TIME.pack(_START, start_ns)
        if isinstance(value, int):
            rest = _INT.pack(_TIME, now_ns, _AS_INT, value)
        elif isinstance(value, float):
            rest = _DOUBLE.pack(_TIME, now_ns, _AS_DOUBLE, value)
        else:
            words = value.words if _LITTLE else struct.pack(f"<{BUCKETS}Q", *value.buckets)
            first, second = own.histogram, beyond.histogram
            rest = _HISTOGRAM.pack(
                _TIME, now_ns, _COUNT, value.observations, _SUM, value.sum_ns / 1e9, _BUCKETS, words, _BOUNDS
            )
        point_bytes = len(first) + len(second) + len(start) + len(rest)
        parts += (_head(point_bytes), first, second, start, rest)
        size += point_bytes
        count += 1
        if size >= PIECE_BYTES:
            yield b"".join(parts), count
            parts, size, count = [], 0, 0
    if parts:
        yield b"".join(parts), count


@lru_cache(1_024)
def _head(size: int) -> bytes:
    return wire.tag(1, wire.DELIMITED) + wire.varint(size)
