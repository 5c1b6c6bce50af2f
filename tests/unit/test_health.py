"""Alive and ready."""

from __future__ import annotations

import pytest

from otel_lb_hop.ops.health import STALE_SECONDS, Health, PartState

GOOD_VITAL, BAD_VITAL = ("a", True, True), ("b", False, True)
GOOD_OTHER, BAD_OTHER = ("c", True, False), ("d", False, False)


def health(*parts: tuple[str, bool, bool]) -> Health:
    """Make a board with these (part, healthy, vital) and a beat at second 100."""
    made = Health()
    for part, healthy, vital in parts:
        made.report(part, healthy=healthy, vital=vital, detail="why")
    made.beat(100.0)
    return made


def test_before_the_first_beat() -> None:
    """Nothing is alive or ready before the main loop has run once, whatever the parts say."""
    made = Health()
    made.report("hooks", healthy=True, vital=True)
    assert not made.alive(0.0)
    assert not made.ready(0.0)


@pytest.mark.parametrize(
    ("now", "alive"),
    [(100.0, True), (99.0, True), (100.0 + STALE_SECONDS - 0.001, True), (100.0 + STALE_SECONDS, False), (1e9, False)],
)
def test_beat(now: float, alive: bool) -> None:  # noqa: FBT001
    """A beat counts for ten seconds; then the main loop hangs, and the agent is not ready either."""
    made = health(GOOD_VITAL)
    assert (made.alive(now), made.ready(now)) == (alive, alive)
    made.beat(now)
    assert made.ready(now)


@pytest.mark.parametrize(
    ("parts", "ready"),
    [
        ([], False),
        ([GOOD_VITAL], True),
        ([GOOD_VITAL, GOOD_OTHER], True),
        ([GOOD_VITAL, BAD_OTHER], True),
        ([BAD_OTHER], True),
        ([BAD_VITAL], False),
        ([GOOD_VITAL, BAD_VITAL, GOOD_OTHER], False),
    ],
)
def test_ready(parts: list[tuple[str, bool, bool]], ready: bool) -> None:  # noqa: FBT001
    """Every vital part has to work; others may fail, but there has to be something."""
    assert health(*parts).ready(100.0) is ready


def test_last_report_of_a_part_counts() -> None:
    """A part has one state, the last one; what is handed out does not change with it."""
    made = health(BAD_VITAL)
    before = made.parts()
    made.report("b", healthy=True, vital=False, detail={"count": 1})
    assert before == {"b": PartState(healthy=False, vital=True, detail="why")}
    assert made.parts() == {"b": PartState(healthy=True, vital=False, detail={"count": 1})}
    before.clear()
    assert made.parts()
