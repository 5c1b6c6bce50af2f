"""The bound on series: what is beyond it is summed into one point of its metric, so that totals stay exact. Pure.

Whether a counter or histogram has a point of its own is decided once, when it is first told, and holds as long as it is
there, through restarts too: no sum falls because a series moved. What a series had counted that was summed and is gone
stays in the sum. No metric takes more than half of the room, so that the one that tells the nodes of backends leaves
the others theirs. Gauges come last: they get what counters leave, anew each time.
"""

from __future__ import annotations

from contextlib import suppress
from hashlib import blake2b
from typing import TYPE_CHECKING, NamedTuple, TypeAlias, cast

from otel_lb_hop import semconv
from otel_lb_hop.core.layout import Histogram
from otel_lb_hop.core.pinned import DELIVERED_KEY_BYTES, Delivered, pack_delivered, unpack_delivered
from otel_lb_hop.export.attributes import Labels
from otel_lb_hop.export.points import Kind

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from otel_lb_hop.export.delta import Memory
    from otel_lb_hop.export.points import Metric, Point

_Key: TypeAlias = tuple[bytes, bytes]
_Value: TypeAlias = int | float | Histogram
_SETTING = bytes(DELIVERED_KEY_BYTES)
"""The key of the settings by which it was decided, and of the time from which on sums count."""
_INCOMPLETE = 0
"""In place of the settings: not all that is summed could be noted."""


class SeriesUsage(NamedTuple):
    """How far the bound is used, in series."""

    own: int
    """That have a point of their own."""
    summed: int
    limit: int


class Limit:
    """Holds exports to so many points."""

    def __init__(
        self,
        points: int,
        common: Mapping[str, str],
        *,
        metrics: int,
        attributes: tuple[bool, ...] = (),
        since_ns: int,
        now_ns: int,
        open_memory: Callable[[bool], Memory | None] = lambda _: None,
    ) -> None:
        """Hold as many `metrics` as there may be to `points`.

        What is summed counts since `since_ns`, or since now, if another bound held before, if other `attributes` were
        told, or if what was summed could not be noted. `common` are attributes of every point; `open_memory` opens what
        an agent before this one noted, or makes it if told to.
        """
        self._points = points
        # One bit each; the bound is never 0, and neither is this.
        self._setting = points << len(attributes) | sum(told << bit for bit, told in enumerate(attributes))
        self._room = points - metrics
        self._most = (self._room + 1) // 2
        self._labels = Labels(dict, common)
        self._summed_labels = Labels(dict, {semconv.METRIC_OVERFLOW: True})
        self._open_memory = open_memory
        self._memory = open_memory(False)  # noqa: FBT003 - not to make it
        self._tried = False
        self._own: dict[str, list[tuple[Labels, Labels]]] = {}
        self._summed: dict[str, dict[_Key, _Value]] = {}
        self._gone: dict[str, _Value] = {}
        self._noted: set[bytes] = set()
        self._carried: dict[bytes, Delivered] = {}
        self._since_ns = since_ns
        self._gauges = 0, 0
        self._free = 0
        if self._memory is not None:
            self._go_on(self._memory, now_ns)

    def _go_on(self, memory: Memory, now_ns: int) -> None:
        entries = {key: unpack_delivered(value) for key, value in memory.items()}
        setting = entries.pop(_SETTING, None)
        if setting is None or setting.number != self._setting:
            # Then other series are summed: that is another sum.
            for key in entries:
                memory.delete(key)
            self._since_ns = now_ns
            self._note_setting()
            return
        self._since_ns = setting.time_ns
        for key, value in entries.items():
            if value.time_ns:
                self._carried[key] = value
            else:
                self._noted.add(key)

    def _note_setting(self) -> None:
        self._put(_SETTING, Delivered(self._since_ns, self._setting, b""))

    @property
    def usage(self) -> SeriesUsage:
        """Tell how far the bound is used, as of the latest export."""
        own, summed = self._gauges
        return SeriesUsage(
            own + sum(map(len, self._own.values())), summed + sum(map(len, self._summed.values())), self._points
        )

    def hold(self, metrics: Iterable[Metric]) -> Iterator[Metric]:
        """Let through what has a point of its own, and add the sum of the rest; counters before gauges."""
        self._free = self._room - sum(map(len, self._own.values()))
        self._gauges = 0, 0
        for metric in metrics:
            gauge = metric.instrument.kind is Kind.GAUGE
            yield metric._replace(points=self._let_through(metric) if gauge else self._hold(metric))
        # What an agent before has noted and is not there: its row is gone.
        for key in self._noted:
            if self._memory is not None:
                self._memory.delete(key)
        self._noted.clear()

    def _hold(self, metric: Metric) -> list[Point]:
        name = metric.instrument.name
        points = list(metric.points)
        before, summed = self._own.get(name, []), self._summed.get(name, {})
        left = min(self._most - len(before), self._free)
        if len(points) <= len(before) + left and not (summed or self._noted or self._carried or name in self._gone):
            # As nearly always: there is room for all.
            self._free -= len(points) - len(before)
            self._own[name] = [point[:2] for point in points]
            return points
        own = {(labels.identity, beyond.identity) for labels, beyond in before}
        still: dict[_Key, _Value] = {}
        through: list[Point] = []
        for point in points:
            key = point[0].identity, point[1].identity
            if key not in own:
                if key in summed or self._is_to_sum(name, key, full=left <= 0):
                    still[key] = point[3]
                    continue
                left -= 1
                self._free -= 1
            through.append(point)
        self._own[name], self._summed[name] = [point[:2] for point in through], still
        for key in summed.keys() - still.keys():
            self._keep(name, key, summed[key])
        total = self._total_gone(name, still)
        for value in still.values():
            total = value if total is None else _added(total, value)
        if total is not None:
            through.append((self._labels, self._summed_labels, self._since_ns, total))
        return through

    def _let_through(self, metric: Metric) -> Iterator[Point]:
        own = summed = total = 0
        for point in metric.points:
            if self._free > 0:
                self._free -= 1
                own += 1
                yield point
            else:
                summed += 1
                total += point[3]  # type: ignore[assignment, operator] # of gauges here all are integers
        self._gauges = self._gauges[0] + own, self._gauges[1] + summed
        if summed:
            yield self._labels, self._summed_labels, self._since_ns, total

    def _is_to_sum(self, name: str, key: _Key, *, full: bool) -> bool:
        """Decide on a series that is new, unless an agent before has."""
        if self._noted and (digest := _digest(name, key)) in self._noted:
            self._noted.discard(digest)
            return True
        if not full:
            return False
        if self._memory is None and not self._tried:
            self._tried = True
            self._memory = self._open_memory(True)  # noqa: FBT003 - to make it
            self._note_setting()
        self._put(_digest(name, key), Delivered(0, 0, b""))
        return True

    def _total_gone(self, name: str, still: dict[_Key, _Value]) -> _Value | None:
        """Tell what summed series had counted that are gone."""
        if self._carried and (carried := self._carried.pop(_digest(name), None)) is not None:
            histogram = isinstance(next(iter(still.values()), None), Histogram) or any(carried.words)
            self._gone[name] = Histogram(int(carried.number), carried.words) if histogram else carried.number
        return self._gone.get(name)

    def _keep(self, name: str, key: _Key, value: _Value) -> None:
        gone = self._gone.get(name)
        gone = self._gone[name] = value if gone is None else _added(gone, value)
        if isinstance(gone, Histogram):
            self._put(_digest(name), Delivered(1, gone.sum_ns, gone.words))
        else:
            self._put(_digest(name), Delivered(1, gone, b""))
        if self._memory is not None:
            self._memory.delete(_digest(name, key))

    def _put(self, key: bytes, value: Delivered) -> None:
        if self._memory is None:
            return
        try:
            self._memory.put(key, pack_delivered(value))
        except OSError:
            # An agent after this one would sum others. An entry that is there can be written without room.
            with suppress(OSError):
                self._memory.put(_SETTING, pack_delivered(Delivered(self._since_ns, _INCOMPLETE, b"")))


def _digest(name: str, key: _Key = (b"", b"")) -> bytes:
    return blake2b(b"\0".join((name.encode(), *key)), digest_size=DELIVERED_KEY_BYTES).digest()


def _added(first: _Value, second: _Value) -> _Value:
    """Add up two values of one metric."""
    if isinstance(first, Histogram):
        return first.plus(cast("Histogram", second))
    return first + cast("int | float", second)
