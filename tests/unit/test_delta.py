# ruff: noqa: TID251 - the official classes read what is sent
"""Deltas: whatever is delivered or not, in whatever order, they add up to what was counted, without gap or overlap."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest

from otel_lb_hop import __version__, semconv
from otel_lb_hop.core.layout import BUCKETS, Histogram
from otel_lb_hop.export import otlp_metrics
from otel_lb_hop.export.attributes import Labels
from otel_lb_hop.export.backlog import Snapshots
from otel_lb_hop.export.delivery import Chunk, Reply
from otel_lb_hop.export.delta import TEMPORALITIES, Deltas, divide
from otel_lb_hop.export.outlets import DeltaSink
from otel_lb_hop.export.points import Instrument, Kind, Metric
from otel_lb_hop.export.wire import Envelope

if TYPE_CHECKING:
    from collections.abc import Iterable

    from otel_lb_hop.export.points import Point

CUMULATIVE, DELTA = 2, 1
"""AGGREGATION_TEMPORALITY_*."""
ENVELOPE = Envelope({"service.name": "x"}, semconv.SCOPE_NAME, __version__, semconv.SCHEMA_URL)
COUNTER = Instrument(Kind.COUNTER, "c", "1", "")
HISTOGRAM = Instrument(Kind.HISTOGRAM, "h", "s", "")
UP_DOWN = Instrument(Kind.UP_DOWN, "u", "1", "")
GAUGE = Instrument(Kind.GAUGE, "g", "1", "")
SECONDS = Instrument(Kind.COUNTER, "s", "s", "")
NO_LABELS = Labels(dict, {})
ROWS = [Labels(dict, {"row": number}) for number in range(4)]


class Memory:
    """A map of the kernel with room for so many entries."""

    def __init__(self, limit: int = 1_000) -> None:
        self.entries: dict[bytes, bytes] = {}
        self._limit = limit

    def items(self) -> Iterable[tuple[bytes, bytes]]:
        """Give all."""
        return list(self.entries.items())

    def put(self, key: bytes, value: bytes) -> None:
        """Write one."""
        if key not in self.entries and len(self.entries) == self._limit:
            raise OSError(7, "Argument list too long")
        self.entries[key] = value

    def delete(self, key: bytes) -> None:
        """Let one go."""
        del self.entries[key]


class Told(NamedTuple):
    """A point as the other side has it."""

    start_ns: int
    time_ns: int
    value: float
    buckets: tuple[int, ...]


class Server:
    """Takes a request or not, as it is told, and keeps the deltas of what it took."""

    name, place = "otlp", ""

    def __init__(self) -> None:
        self.reply = Reply(taken=True)
        self.keeps = True
        self.requests = 0
        self.deltas: dict[tuple[str, int], list[Told]] = {}
        self.temporality: dict[str, int] = {}

    def send(self, chunks: list[Chunk], timeout_seconds: float | None = None) -> Reply:
        """Keep what is taken."""
        del timeout_seconds
        self.requests += 1
        if self.keeps:
            request = ExportMetricsServiceRequest.FromString(ENVELOPE.wrap([chunk.payload for chunk in chunks]))
            for metric in request.resource_metrics[0].scope_metrics[0].metrics:
                data = getattr(metric, metric.WhichOneof("data") or "")
                self.temporality[metric.name] = getattr(data, "aggregation_temporality", 0)
                for point in data.data_points:
                    value = point.sum if metric.name == "h" else point.as_int + point.as_double
                    buckets = tuple(point.bucket_counts) if metric.name == "h" else ()
                    told = Told(point.start_time_unix_nano, point.time_unix_nano, value, buckets)
                    row = next((each.value.int_value for each in point.attributes), -1)
                    self.deltas.setdefault((metric.name, row), []).append(told)
        return self.reply

    def close(self) -> None:
        """Nothing is open."""


class Counted:
    """Counters as the kernel keeps them, which outlive the agent."""

    def __init__(self) -> None:
        self.now_ns = 1_000
        self.start_ns = [self.now_ns] * len(ROWS)
        self.counts = [0] * len(ROWS)
        self.buckets = [[0] * BUCKETS for _ in ROWS]
        self.ever: Counter[tuple[str, int]] = Counter()

    def count(self, row: int, bucket: int, times: int) -> None:
        """Count in both metrics of a row."""
        self.counts[row] += times
        self.buckets[row][bucket] += times
        for name in ("c", "h"):
            self.ever[name, row] += times

    def begin_anew(self, row: int) -> None:
        """Forget a row, and make another for the same attributes."""
        self.start_ns[row] = self.now_ns
        self.counts[row], self.buckets[row] = 0, [0] * BUCKETS

    def metrics(self) -> list[Metric]:
        """Make a snapshot."""
        counters: list[Point] = []
        histograms: list[Point] = []
        for row, labels in enumerate(ROWS):
            counters.append((labels, NO_LABELS, self.start_ns[row], self.counts[row]))
            value = Histogram.of(sum(self.buckets[row]) * 10**9, self.buckets[row])
            histograms.append((NO_LABELS, labels, self.start_ns[row], value))
        return [Metric(COUNTER, iter(counters)), Metric(HISTOGRAM, iter(histograms))]


class Way:
    """What an agent has for one exporter, without its thread; a part is a request for two points or so."""

    def __init__(self, server: Server, memory: Memory | None, part_bytes: int = 500) -> None:
        self.snapshots = Snapshots()
        self.deltas = Deltas(server.name, memory)
        self._part_bytes = part_bytes
        self._sink = DeltaSink(server, self.deltas, lambda told, now: otlp_metrics.encode(told, ENVELOPE, now))

    def offer(self, metrics: Iterable[Metric], now_ns: int, preference: str = "delta") -> None:
        """Queue a snapshot."""
        parts = divide(metrics, TEMPORALITIES[preference], now_ns, self._part_bytes)
        self.snapshots.offer([Chunk(None, part, part.items, part.size_bytes) for part in parts], now_ns)

    def send(self) -> bool:
        """Send one part, if any waits."""
        request = self.snapshots.take()
        if request:
            self.snapshots.settle(self._sink.send(request))
        return bool(request)

    def send_all(self) -> None:
        """Send what waits."""
        while self.send():
            pass


REPLIES = {
    "taken": Reply(taken=True),
    "again": Reply(taken=False, retry=True),
    "refused": Reply(taken=False),
    "gave up": Reply(taken=False, reason="failed"),
}
STEPS = st.one_of(
    st.tuples(st.just("count"), st.integers(0, 3), st.integers(0, BUCKETS - 1), st.integers(1, 3)),
    st.just(("export",)),
    st.tuples(st.just("send"), st.sampled_from([*REPLIES])),
    st.just(("restart",)),
    st.tuples(st.just("begin anew"), st.integers(0, 3)),
)


@settings(deadline=None, max_examples=300)
@given(st.lists(STEPS, max_size=40))
def test_any_history(steps: list[tuple[object, ...]]) -> None:
    """The sum of all deltas is what was counted, through failures, restarts and rows that begin anew.

    The intervals of a series follow one another, and of what a row counted none begins before the row.
    """
    counted, server, memory = Counted(), Server(), Memory()
    way = Way(server, memory)
    starts: dict[int, set[int]] = {row: {1_000} for row in range(len(ROWS))}

    def deliver_all() -> None:
        counted.now_ns += 1
        way.offer(counted.metrics(), counted.now_ns)
        server.reply, server.keeps = REPLIES["taken"], True
        way.send_all()

    for name, *of in steps:
        counted.now_ns += 1
        if name == "count":
            counted.count(*of)  # type: ignore[arg-type]
        elif name == "export":
            way.offer(counted.metrics(), counted.now_ns)
        elif name == "send":
            server.reply = REPLIES[str(of[0])]
            server.keeps = server.reply.taken
            way.send()
        elif name == "restart":
            way = Way(server, memory)
        else:
            deliver_all()  # an agent forgets no row before that
            counted.now_ns += 1
            counted.begin_anew(int(str(of[0])))
            starts[int(str(of[0]))].add(counted.now_ns)
    deliver_all()
    told: Counter[tuple[str, int]] = Counter()
    for (name, row), points in server.deltas.items():
        told[name, row] = sum(int(point.value) for point in points)
        assert all(sum(point.buckets) == point.value for point in points if name == "h")
        end_ns = 0
        for point in points:
            assert point.start_ns == end_ns or point.start_ns in starts[row]
            assert end_ns <= point.start_ns <= point.time_ns
            end_ns = point.time_ns
    assert told == counted.ever
    assert len(memory.entries) == 2 * len(ROWS)


def test_only_what_has_counted_is_told_again() -> None:
    """A series is told when it is new, then when it has counted; a part of which nothing is told is no request."""
    counted, server = Counted(), Server()
    way = Way(server, None, part_bytes=100_000)
    way.offer(counted.metrics(), 2_000)
    way.send_all()
    counted.count(2, 5, 7)
    for now_ns in (3_000, 4_000, 5_000):
        way.offer(counted.metrics(), now_ns)
        way.send_all()
    counted.count(2, 6, 1)
    way.offer(counted.metrics(), 6_000)
    way.send_all()
    assert server.deltas["c", 1] == [Told(1_000, 2_000, 0, ())]
    assert server.deltas["c", 2] == [
        Told(1_000, 2_000, 0, ()),
        Told(2_000, 3_000, 7, ()),
        Told(3_000, 6_000, 1, ()),
    ]
    assert server.requests == 3
    assert way.snapshots.items().exported == 5 * 8


@pytest.mark.parametrize(
    ("preference", "expected"),
    [
        ("delta", {"c": DELTA, "h": DELTA, "u": CUMULATIVE, "g": 0, "s": DELTA}),
        ("lowmemory", {"c": CUMULATIVE, "h": DELTA, "u": CUMULATIVE, "g": 0, "s": CUMULATIVE}),
    ],
)
def test_what_is_told_as_delta(preference: str, expected: dict[str, int]) -> None:
    """Counters and histograms with `delta`, histograms with `lowmemory`; what may fall and gauges are as they are."""
    counted, server = Counted(), Server()
    counted.count(0, 0, 3)
    way = Way(server, None)
    for now_ns in (2_000, 3_000):
        others = [
            Metric(instrument, [(NO_LABELS, NO_LABELS, 1_000, value)])
            for instrument, value in ((UP_DOWN, 5), (GAUGE, 6), (SECONDS, now_ns / 1_000))
        ]
        way.offer([*counted.metrics(), *others], now_ns, preference)
        way.send_all()
    assert server.temporality == expected
    assert [told.value for told in server.deltas["c", 0]] == ([3] if preference == "delta" else [3, 3])
    assert [told.value for told in server.deltas["h", 0]] == [3]
    assert [told.value for told in server.deltas["u", -1]] == [5, 5]
    assert [told.value for told in server.deltas["s", -1]] == ([2.0, 1.0] if preference == "delta" else [2.0, 3.0])


def test_an_answer_that_is_lost() -> None:
    """What was taken without an answer is told twice, with the same start; what was rejected is not told again."""
    counted, server = Counted(), Server()
    counted.count(0, 0, 3)
    way = Way(server, None, part_bytes=100_000)
    way.offer(counted.metrics(), 2_000)
    server.reply = REPLIES["again"]
    way.send()
    server.reply = Reply(taken=True, rejected=1)
    way.send_all()
    way.offer(counted.metrics(), 3_000)
    way.send_all()
    assert server.deltas["c", 0] == [Told(1_000, 2_000, 3, ())] * 2


def test_no_room_to_remember(caplog: pytest.LogCaptureFixture) -> None:
    """Without room deltas are right all the same, and an operator is told once."""
    counted, server, memory = Counted(), Server(), Memory(limit=3)
    way = Way(server, memory)
    for now_ns in (2_000, 3_000):
        counted.count(0, 0, 3)
        way.offer(counted.metrics(), now_ns)
        way.send_all()
    assert [told.value for told in server.deltas["h", 0]] == [3, 3]
    assert [record.message for record in caplog.records] == [
        "metrics: otlp: there is no room to note what was delivered; the next agent would tell some of it again"
    ]


def test_exporters_remember_apart() -> None:
    """What one exporter has another does not have, also in the same memory."""
    counted, first, second, memory = Counted(), Server(), Server(), Memory()
    second.name = "plugin"
    counted.count(0, 0, 3)
    for server, now_ns in ((first, 2_000), (second, 3_000), (first, 4_000), (second, 5_000)):
        way = Way(server, memory)
        way.offer(counted.metrics(), now_ns)
        way.send_all()
    for server in (first, second):
        assert [told.value for told in server.deltas["c", 0]] == [3]


def test_a_clock_that_was_set_back() -> None:
    """No interval ends before it begins."""
    counted, server = Counted(), Server()
    way = Way(server, None)
    for now_ns in (5_000, 3_000, 6_000):
        counted.count(0, 0, 1)
        way.offer(counted.metrics(), now_ns)
        way.send_all()
    assert [(told.start_ns, told.time_ns) for told in server.deltas["c", 0]] == [
        (1_000, 5_000), (3_000, 3_000), (3_000, 6_000),
    ]  # fmt: skip


def test_a_clock_that_was_set_back_before_a_row_was_told() -> None:
    """Also the first interval of a series does not end before it begins."""
    counted, server = Counted(), Server()
    counted.start_ns[0] = 4_000
    counted.count(0, 0, 1)
    way = Way(server, None)
    way.offer(counted.metrics(), 3_000)
    way.send_all()
    assert server.deltas["c", 0] == [Told(3_000, 3_000, 1, ())]


def test_a_sum_that_began_anew() -> None:
    """What has less than it was told with is told whole: a negative number of connections is none."""
    counted, server, memory = Counted(), Server(), Memory()
    for now_ns, times in ((2_000, 9), (3_000, -5), (4_000, 1)):
        counted.count(0, 3, times)
        way = Way(server, memory)
        way.offer(counted.metrics(), now_ns)
        way.send_all()
    for name in ("c", "h"):
        assert [(each.start_ns, each.time_ns, each.value) for each in server.deltas[name, 0]] == [
            (1_000, 2_000, 9), (2_000, 3_000, 4), (3_000, 4_000, 1),
        ]  # fmt: skip
