"""The bound on series: whatever comes and goes, totals are exact, no series falls, and there are never too many."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from otel_lb_hop.core.layout import Histogram
from otel_lb_hop.export.attributes import Labels
from otel_lb_hop.export.limit import Limit, SeriesUsage
from otel_lb_hop.export.points import Instrument, Kind, Metric
from tests.unit.samples import histogram
from tests.unit.test_delta import Memory

if TYPE_CHECKING:
    from collections.abc import Iterable

    from otel_lb_hop.export.points import Point

COUNTER = Instrument(Kind.COUNTER, "c", "1", "")
HISTOGRAM = Instrument(Kind.HISTOGRAM, "h", "s", "")
GAUGE = Instrument(Kind.GAUGE, "g", "1", "")
NO_LABELS = Labels(dict, {})
ROWS = [Labels(dict, {"row": number}) for number in range(8)]
SINCE, NOW = 5, 1_000
OVERFLOW = {"k8s.node.name": "node1", "otel.metric.overflow": True}


def make(
    points: int, memory: Memory | None = None, now_ns: int = NOW, attributes: tuple[bool, ...] = (False, True)
) -> Limit:
    """Make a bound for three metrics; a memory is found, and made, where the test has one."""
    return Limit(
        points,
        {"k8s.node.name": "node1"},
        metrics=3,
        attributes=attributes,
        since_ns=SINCE,
        now_ns=now_ns,
        open_memory=lambda make: memory if make or (memory and memory.entries) else None,
    )


def snapshot(rows: dict[int, int]) -> list[Metric]:
    """Make a counter, a histogram and a gauge of each row that there is."""
    counters: list[Point] = [(ROWS[row], NO_LABELS, SINCE, count) for row, count in rows.items()]
    times: list[Point] = [(NO_LABELS, ROWS[row], SINCE, histogram(count, b3=count)) for row, count in rows.items()]
    gauges: list[Point] = [(ROWS[row], NO_LABELS, 0, 1) for row in rows]
    return [Metric(COUNTER, iter(counters)), Metric(HISTOGRAM, iter(times)), Metric(GAUGE, iter(gauges))]


def told(metrics: Iterable[Metric]) -> dict[tuple[str, int | None], tuple[int, int]]:
    """Give (start, value) of each point by metric and row, None for what is summed; each stands there once."""
    found: dict[tuple[str, int | None], tuple[int, int]] = {}
    for metric in metrics:
        for own, beyond, start_ns, value in metric.points:
            pairs = own.pairs | beyond.pairs
            row = pairs.get("row")
            assert row is not None or pairs == OVERFLOW
            key = metric.instrument.name, None if row is None else int(row)
            assert key not in found
            number = value.observations if isinstance(value, Histogram) else int(value)
            found[key] = start_ns, number
    return found


def test_room_for_all() -> None:
    """As long as there is room nothing is summed, and nothing noted."""
    memory = Memory()
    limit = make(9, memory)
    assert told(limit.hold(snapshot({0: 1, 1: 2}))) == {
        ("c", 0): (SINCE, 1), ("c", 1): (SINCE, 2), ("h", 0): (SINCE, 1), ("h", 1): (SINCE, 2),
        ("g", 0): (0, 1), ("g", 1): (0, 1),
    }  # fmt: skip
    assert limit.usage == SeriesUsage(6, 0, 9)
    assert not memory.entries


def test_what_is_beyond_is_summed() -> None:
    """First come, first told; one point of each metric sums the rest; none has more than half, gauges come last."""
    limit = make(6)
    assert told(limit.hold(snapshot({0: 1, 1: 2, 2: 30}))) == {
        ("c", 0): (SINCE, 1), ("c", 1): (SINCE, 2), ("c", None): (SINCE, 30), ("h", 0): (SINCE, 1),
        ("h", None): (SINCE, 32), ("g", None): (SINCE, 3),
    }  # fmt: skip
    assert limit.usage == SeriesUsage(3, 6, 6)


def test_decided_once() -> None:
    """A series that had room keeps it, one that was summed stays so, also when room comes; gauges take that."""
    limit = make(6)
    told(limit.hold(snapshot({0: 1, 1: 2})))
    points = told(limit.hold(snapshot({2: 9, 1: 5, 0: 4})))
    assert points == {
        ("c", 0): (SINCE, 4), ("c", 1): (SINCE, 5), ("c", None): (SINCE, 9),
        ("h", 0): (SINCE, 4), ("h", None): (SINCE, 14), ("g", None): (SINCE, 3),
    }  # fmt: skip
    # Row 1 goes. What its histogram had counted was summed, and stays in the sum.
    for _ in range(2):
        points = told(limit.hold(snapshot({2: 10, 0: 6})))
        assert {key: value for key, value in points.items() if key[0] != "g"} == {
            ("c", 0): (SINCE, 6), ("c", None): (SINCE, 10), ("h", 0): (SINCE, 6), ("h", None): (SINCE, 15),
        }  # fmt: skip
    assert (points["g", 2], points["g", None]) == ((0, 1), (SINCE, 1))


ROW = st.integers(0, len(ROWS) - 1)
STEPS = st.one_of(
    st.tuples(st.just("count"), ROW, st.integers(0, 3)),
    st.tuples(st.just("forget"), ROW),
    st.just(("export",)),
    st.just(("restart",)),
)


@settings(deadline=None, max_examples=400)
@given(st.lists(STEPS, max_size=50), st.integers(3, 30))
def test_any_history(steps: list[tuple[object, ...]], bound: int) -> None:
    """The sum of all points is what the rows hold and what gone ones had, as far as those were summed.

    Also a restart changes neither what is summed nor the sums; no series falls while it is there; none is too many.
    """
    memory = Memory()
    limit, counts = make(bound, memory), dict[int, int]()
    last: dict[tuple[str, int | None], tuple[int, int]] = {}
    gone: Counter[str] = Counter()
    for step, *of in (*steps, ("export",)):
        if step == "count":
            row, times = (int(str(each)) for each in of)
            counts[row] = counts.get(row, 0) + times
        elif step == "restart":
            limit = make(bound, memory, NOW + 1)
        else:
            # An agent that forgets a row has told it whole before, and tells at once that it is gone.
            points = told(limit.hold(snapshot(counts)))
            if step == "forget" and (count := counts.pop(int(str(of[0])), None)) is not None:
                gone.update({name: count for name in ("c", "h") if (name, of[0]) not in points})
                before, points = points, told(limit.hold(snapshot(counts)))
                assert_none_fell(before, points)
            assert len(points) <= bound
            assert_none_fell(last, points)
            for name in ("c", "h"):
                total = sum(value for (metric, _), (_, value) in points.items() if metric == name)
                assert total == sum(counts.values()) + gone[name]
            assert sum(value for (metric, _), (_, value) in points.items() if metric == "g") == len(counts)
            for key in last.keys() & points.keys():
                assert points[key][0] == last[key][0] or key[0] == "g"
            last = points


def assert_none_fell(
    before: dict[tuple[str, int | None], tuple[int, int]], after: dict[tuple[str, int | None], tuple[int, int]]
) -> None:
    """Hold that a counter told both times has not less, and that what is summed goes on being told."""
    for key, (_, value) in before.items():
        if key[0] != "g":
            assert key[1] is not None or key in after
            assert key not in after or after[key][1] >= value


@pytest.mark.parametrize("bound", [4, 6])
def test_another_bound(bound: int) -> None:
    """Under another bound it is decided anew, and the sums are others, with a start of their own."""
    memory = Memory()
    told(make(5, memory).hold(snapshot({0: 1, 1: 2, 2: 3})))
    assert memory.entries
    points = told(make(bound, memory, NOW).hold(snapshot({0: 1, 1: 2, 2: 3})))
    assert ("c", None) not in points or points["c", None][0] == NOW
    assert points["h", None][0] == NOW
    assert sum(value for (name, _), (_, value) in points.items() if name == "h") == 6
    # And so it stays.
    assert told(make(bound, memory, NOW + 1).hold(snapshot({0: 1, 1: 2, 2: 3}))) == points


def test_no_room_to_note() -> None:
    """Without a memory that has room the sums are right all the same."""
    limit = make(4, Memory(limit=1))
    for count in (1, 2):
        points = told(limit.hold(snapshot({0: count, 1: 5, 2: 6})))
        assert points["c", 0] == (SINCE, count)
        assert points["c", None] == (SINCE, 11)
        assert points["h", None] == (SINCE, 11 + count)


def test_other_attributes() -> None:
    """Where other attributes are told, the same connections are other series: the sums begin anew, and none falls."""
    memory = Memory()
    assert told(make(5, memory).hold(snapshot({0: 1, 1: 2, 2: 300})))["c", None] == (SINCE, 302)
    points = told(make(5, memory, attributes=(True, True)).hold(snapshot({5: 200, 6: 103})))
    assert points["c", None] == (NOW, 103)
    assert told(make(5, memory, NOW + 1, (True, True)).hold(snapshot({5: 200, 6: 103}))) == points


def test_notes_that_are_not_whole() -> None:
    """If not all that is summed could be noted, the next agent may sum other series: its sums have their own start."""
    memory = Memory(limit=4)
    points = told(make(5, memory).hold(snapshot({0: 100, 1: 200, 2: 300, 3: 400})))
    assert (points["c", None], points["h", None]) == ((SINCE, 900), (SINCE, 900))
    points = told(make(5, memory).hold(snapshot({3: 400, 2: 300, 1: 200, 0: 100})))
    assert (points["c", 3], points["c", None]) == ((SINCE, 400), (NOW, 600))
    assert (points["h", 3], points["h", None]) == ((SINCE, 400), (NOW, 600))


def test_a_place_that_is_left() -> None:
    """What is gone leaves its place to what is new in the same export; the bound holds."""
    limit = make(9)
    told(limit.hold(snapshot({0: 1, 1: 2, 2: 3})))
    points = told(limit.hold(snapshot({3: 9, 1: 2, 2: 3})))
    assert points["c", 3] == (SINCE, 9)
    assert ("c", None) not in points
    assert len(points) <= 9
