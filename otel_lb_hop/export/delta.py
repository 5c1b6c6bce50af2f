"""Delta temporality: from points that say what was counted since the start to what was counted since it was told. Pure.

The kernel's counters only grow, so a delta is a difference to what the other side has, and that is known only once it
has answered. So a delta is made when it is sent, against what was delivered by then: what did not get through is told
again, in a longer interval, with what came since. A series is told when it is new and when it has counted; the interval
of a point begins where that of the point before it ended.

Told twice is only what a request had that was taken and whose answer was lost, or after which the agent was killed
before it had noted that; as with records, twice rather than never. Lost is only what the other side says that it
rejected, and what it refused until the row that had counted it was forgotten; both are in the ledger.
"""

from __future__ import annotations

import sys
from hashlib import blake2b
from typing import TYPE_CHECKING, NamedTuple, Protocol

from otel_lb_hop.core.layout import BUCKETS, Histogram
from otel_lb_hop.core.pinned import DELIVERED_KEY_BYTES, Delivered, pack_delivered, unpack_delivered
from otel_lb_hop.export.points import Kind, Metric

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from collections.abc import Set as AbstractSet

    from otel_lb_hop.export.points import Point

_TAG_BYTES = 4
_KEY_BYTES = DELIVERED_KEY_BYTES - _TAG_BYTES
_POINT_BYTES, _HISTOGRAM_BYTES = 64, 64 + 2 * 8 * BUCKETS
"""Of a point beyond its attributes, and more rather than less."""

TEMPORALITIES: Mapping[str, frozenset[Kind]] = {
    "cumulative": frozenset(),
    "delta": frozenset({Kind.COUNTER, Kind.HISTOGRAM}),
    "lowmemory": frozenset({Kind.HISTOGRAM}),
}
"""Preference → kinds of metrics that are told as deltas. All counters are asynchronous instruments in the words of the
OTLP exporter's specification: they are read when they are exported, so `lowmemory` leaves them cumulative."""


class Part(NamedTuple):
    """What is sent at once of a snapshot, with the keys of the points of metrics that are told as deltas."""

    now_ns: int
    metrics: tuple[Metric, ...]
    keys: tuple[tuple[bytes, ...], ...]
    everything: AbstractSet[bytes]
    """The keys of all parts; the same object in all of them."""
    items: int
    """Points."""
    size_bytes: int
    """As OTLP, at most."""


class Memory(Protocol):
    """Where it stands what was delivered, for an agent after this one: a map of the kernel."""

    def items(self) -> Iterable[tuple[bytes, bytes]]:
        """Give all."""

    def put(self, key: bytes, value: bytes) -> None:
        """Write one. Raises OSError if there is no room."""

    def delete(self, key: bytes) -> None:
        """Let one go."""


def divide(metrics: Iterable[Metric], kinds: AbstractSet[Kind], now_ns: int, part_bytes: int | None) -> list[Part]:
    """Divide a snapshot into parts of at most about so many bytes, or into one."""
    part_bytes = part_bytes or sys.maxsize
    everything: set[bytes] = set()
    parts: list[Part] = []
    rooms: list[tuple[Metric, tuple[bytes, ...]]] = []
    items = size = 0

    def close() -> None:
        if rooms:
            pieces, keys = zip(*rooms, strict=True)
            parts.append(Part(now_ns, pieces, keys, everything, items, size))

    for metric in metrics:
        for points, points_bytes in _cut(metric.points, part_bytes // 4):
            if size + points_bytes > part_bytes:
                close()
                rooms, items, size = [], 0, 0
            keys = tuple(_key(metric, point) for point in points) if metric.instrument.kind in kinds else ()
            everything.update(keys)
            rooms.append((metric._replace(points=points), keys))
            items += len(points)
            size += points_bytes
    close()
    return parts


def _cut(points: Iterable[Point], piece_bytes: int) -> Iterator[tuple[tuple[Point, ...], int]]:
    piece: list[Point] = []
    size = 0
    for point in points:
        own, beyond, _, value = point
        size += len(own.number) + len(beyond.number)
        size += _HISTOGRAM_BYTES if isinstance(value, Histogram) else _POINT_BYTES
        piece.append(point)
        if size >= piece_bytes:
            yield tuple(piece), size
            piece, size = [], 0
    if piece:
        yield tuple(piece), size


def _key(metric: Metric, point: Point) -> bytes:
    """Name a series: one with another start is another."""
    own, beyond, start_ns, _ = point
    content = b"".join(
        (metric.instrument.name.encode(), b"\0", start_ns.to_bytes(8, sys.byteorder), own.identity, beyond.identity)
    )
    return blake2b(content, digest_size=_KEY_BYTES).digest()


class Deltas:
    """What one exporter has of each series. Parts come in the order of their snapshots."""

    def __init__(self, exporter: str, memory: Memory | None = None) -> None:
        """Go on with what the memory has of this exporter."""
        self._tag = blake2b(exporter.encode(), digest_size=_TAG_BYTES).digest()
        self._memory = memory
        self._told: dict[bytes, Delivered] = {}
        self._everything: AbstractSet[bytes] | None = None
        for key, value in memory.items() if memory else ():
            if key.startswith(self._tag):
                self._told[key[_TAG_BYTES:]] = unpack_delivered(value)

    def since_told(self, part: Part) -> list[Metric]:
        """Make the deltas of a part; what is cumulative in it stays as it is."""
        if part.everything is not self._everything:
            self._everything = part.everything
            # Of a snapshot before this one nothing is sent any more.
            self._forget(self._told.keys() - part.everything)
        return [
            metric._replace(points=list(self._points(metric, keys, part.now_ns)), delta=True) if keys else metric
            for metric, keys in zip(part.metrics, part.keys, strict=True)
        ]

    def _points(self, metric: Metric, keys: Iterable[bytes], now_ns: int) -> Iterator[Point]:
        for key, point in zip(keys, metric.points, strict=True):
            own, beyond, start_ns, value = point
            told = self._told.get(key)
            # The wall clock may have been set back.
            if told is None:
                yield own, beyond, min(start_ns, now_ns), value
            elif not _same(value, told):
                yield own, beyond, min(told.time_ns, now_ns), value if _fell(value, told) else _less(value, told)

    def deliver(self, part: Part) -> bool:
        """Take note that the deltas of a part were taken; answers whether the memory had room for that."""
        kept = True
        for metric, keys in zip(part.metrics, part.keys, strict=True):
            for key, (_, _, _, value) in zip(keys, metric.points, strict=False):
                before = self._told.get(key)
                if before is None or not _same(value, before):
                    told = self._told[key] = _told(part.now_ns, value)
                    kept &= self._remember(key, told)
        return kept

    def _remember(self, key: bytes, told: Delivered) -> bool:
        # Seconds of CPU begin anew with each agent.
        if self._memory is None or isinstance(told.number, float):
            return True
        try:
            self._memory.put(self._tag + key, pack_delivered(told))
        except OSError:
            return False
        return True

    def _forget(self, keys: AbstractSet[bytes]) -> None:
        for key in keys:
            del self._told[key]
            if self._memory is not None:
                self._memory.delete(self._tag + key)


def _told(now_ns: int, value: float | Histogram) -> Delivered:
    return (
        Delivered(now_ns, value.sum_ns, value.words) if isinstance(value, Histogram) else Delivered(now_ns, value, b"")
    )


def _same(value: float | Histogram, told: Delivered) -> bool:
    return value.words == told.words if isinstance(value, Histogram) else value == told.number


def _fell(value: float | Histogram, told: Delivered) -> bool:
    """Whether it began anew: the sum beyond the bound on series, if it is not known what an agent before summed."""
    if isinstance(value, Histogram):
        return any(map(int.__lt__, value.buckets, Histogram(0, told.words).buckets))
    return value < told.number


def _less(value: float | Histogram, told: Delivered) -> int | float | Histogram:
    if not isinstance(value, Histogram):
        return value - told.number
    return value.minus(Histogram(int(told.number), told.words))
