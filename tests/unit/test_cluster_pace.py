"""When requests may be made: every kind of failure for ten minutes of simulated time."""

from __future__ import annotations

import random

import pytest

from otel_lb_hop.cluster.failure import Cause
from otel_lb_hop.cluster.pace import Pace, Timing, retry_after_seconds

TIMING = Timing()
Step = tuple[float, bool, Cause | None]
"""What one request comes to: how long it takes, whether a good answer began, and how it failed."""


def simulate(steps: list[Step], seed: int, *, release: bool = False, seconds: float = 600.0) -> list[float]:
    """Make requests that come to these, over and over, and give their times; `release` is a scout gone mad."""
    rng = random.Random(seed)
    now = 0.0
    pace = Pace(TIMING, now, rng.random())
    made: list[float] = []
    while now < seconds:
        if release:
            pace.release(now, rng.random())
        now = max(now, pace.due(now))
        pace.spend(now)
        made.append(now)
        took, answered, cause = steps[(len(made) - 1) % len(steps)]
        now += took
        if answered:
            pace.answer()
            if took >= TIMING.lasting:
                pace.last()
        if cause:
            pace.fail(now, rng.random(), cause, 0.0, answered=answered)
    return made


def most_in(made: list[float], seconds: float) -> int:
    """Give the most requests that any span of so many seconds holds."""
    return max(sum(begin <= at < begin + seconds for at in made) for begin in made)


FAILURES: dict[str, list[Step]] = {
    "connection refused": [(0.0, False, Cause.UNREACHABLE)],
    "connect time-out": [(5.0, False, Cause.UNREACHABLE)],
    "401": [(0.01, False, Cause.UNAUTHORIZED)],
    "403, 429, 500": [(0.01, False, Cause.REFUSED)],
    "hang": [(10.0, False, Cause.BROKEN)],
    "list cut": [(0.1, True, Cause.BROKEN)],
    "list garbled": [(0.1, True, Cause.GARBLED)],
    "list good, watch refused": [(0.1, True, None)] + [(0.0, False, Cause.REFUSED)] * 50,
    "list good, watch expired": [(0.1, True, None), (0.0, False, Cause.EXPIRED)],
    "list good, watch expired within": [(0.1, True, None), (0.0, True, Cause.EXPIRED)],
    "list good, watch garbled": [(0.1, True, None), (0.0, True, Cause.GARBLED)],
    "watch cut at once": [(0.0, True, Cause.BROKEN)],
    "watch cut after 9 s": [(9.0, True, Cause.BROKEN)],
    "watch garbled after 11 s": [(0.1, True, None), (11.0, True, Cause.GARBLED)],
    "refused and cut in turn": [(0.0, False, Cause.UNREACHABLE), (0.0, True, Cause.BROKEN)],
    "everything in turn": [
        (0.0, False, Cause.UNREACHABLE),
        (0.0, True, None),
        (0.0, True, Cause.EXPIRED),
        (0.0, False, Cause.REFUSED),
        (0.0, True, Cause.GARBLED),
        (11.0, True, Cause.BROKEN),
    ],
}


@pytest.mark.parametrize("release", [False, True])
@pytest.mark.parametrize("name", FAILURES)
def test_never_more_than_one_a_second(name: str, release: bool) -> None:  # noqa: FBT001 - a parameter of the test
    """Over any 30 s, whatever fails, and even if every wait is cut short."""
    for seed in range(5):
        assert most_in(simulate(FAILURES[name], seed, release=release), 30.0) <= 30


@pytest.mark.parametrize(
    ("name", "least", "most"),
    [
        ("connection refused", 12, 22),
        ("403, 429, 500", 12, 22),
        ("list garbled", 12, 22),
        ("list good, watch expired", 24, 44),
        ("watch cut at once", 150, 320),
    ],
)
def test_calm(name: str, least: int, most: int) -> None:
    """In ten minutes of a failure that lasts: few requests, but for a watch that is accepted, which costs little."""
    for seed in range(20):
        assert least <= len(simulate(FAILURES[name], seed)) <= most


def waits(cause: Cause, *, answered: bool, fraction: float) -> list[float]:
    """Give the waits after ten failures in a row."""
    pace = Pace(TIMING, 0.0, 0.0)
    found = []
    now = 0.0
    for _ in range(10):
        pace.fail(now, fraction, cause, 0.0, answered=answered)
        found.append(pace.due(now) - now)
        now = pace.due(now)
    return found


@pytest.mark.parametrize(
    ("cause", "answered", "expected"),
    [
        (Cause.UNREACHABLE, False, [1, 2, 4, 8, 16, 32, 60, 60, 60, 60]),
        (Cause.BROKEN, False, [1, 2, 4, 8, 16, 32, 60, 60, 60, 60]),
        (Cause.GARBLED, True, [1, 2, 4, 8, 16, 32, 60, 60, 60, 60]),
        (Cause.BROKEN, True, [1, 2, 3, 3, 3, 3, 3, 3, 3, 3]),
        (Cause.REFUSED, True, [1, 2, 3, 3, 3, 3, 3, 3, 3, 3]),
    ],
)
def test_exponential(cause: Cause, answered: bool, expected: list[float]) -> None:  # noqa: FBT001 - a parameter
    """Twice as long each time up to a minute, jittered down to a half."""
    assert waits(cause, answered=answered, fraction=1.0) == expected
    assert waits(cause, answered=answered, fraction=0.0) == [each / 2 for each in expected]


def test_an_outage_forgets_what_was_bad() -> None:
    """A server that was away and is back sends us to a LIST: that is waited for as if it were the first time."""
    pace = Pace(TIMING, 0.0, 0.0)
    for now in (0.0, 20.0, 40.0):
        pace.fail(now, 1.0, Cause.GARBLED, 0.0, answered=True)
    assert pace.due(40.0) == 44.0
    pace.fail(60.0, 1.0, Cause.UNREACHABLE, 0.0, answered=False)
    pace.fail(80.0, 1.0, Cause.EXPIRED, 0.0, answered=False)
    assert pace.due(80.0) == 81.0


def test_refused_after_the_release() -> None:
    """A server that has just started may refuse a little longer: the waits begin anew."""
    pace = Pace(TIMING, 0.0, 0.0)
    for now in (0.0, 20.0, 40.0):
        pace.fail(now, 1.0, Cause.UNREACHABLE, 0.0, answered=False)
    assert pace.due(40.0) == 44.0
    pace.release(41.0, 0.0)
    pace.fail(60.0, 1.0, Cause.REFUSED, 0.0, answered=False)
    assert pace.due(60.0) == 61.0


def test_far_beyond() -> None:
    """A year of failures overflows nothing."""
    pace = Pace(TIMING, 0.0, 0.0)
    for _ in range(5000):
        pace.fail(0.0, 1.0, Cause.REFUSED, 0.0, answered=False)
    assert pace.due(0.0) == 60.0


def test_start() -> None:
    """The first request comes within half a second, spread evenly."""
    assert [Pace(TIMING, 100.0, fraction).due(100.0) for fraction in (0.0, 0.5, 1.0)] == [100.0, 100.25, 100.5]


def test_the_bucket() -> None:
    """Five at once, and then four in five seconds."""
    pace = Pace(TIMING, 0.0, 0.0)
    now = 0.0
    made = []
    for _ in range(9):
        now = pace.due(now)
        pace.spend(now)
        made.append(round(now, 6))
    assert made == [0, 0, 0, 0, 0, 1.25, 2.5, 3.75, 5.0]


def test_retry_after_is_the_least() -> None:
    """What the server asks for holds also if it is longer than our wait, and if we are let go."""
    pace = Pace(TIMING, 0.0, 0.0)
    pace.fail(0.0, 1.0, Cause.REFUSED, 30.0, answered=False)
    assert pace.due(0.0) == 30.0
    pace.release(1.0, 1.0)
    assert pace.due(1.0) == 30.0
    pace.fail(30.0, 1.0, Cause.REFUSED, 1e9, answered=False)
    assert pace.due(30.0) == 630.0


def test_release() -> None:
    """Those who wait for a server that is back go on within a second; who would go sooner, goes."""
    pace = Pace(TIMING, 0.0, 0.0)
    for _ in range(8):
        pace.fail(0.0, 1.0, Cause.UNREACHABLE, 0.0, answered=False)
    assert pace.due(10.0) == 60.0
    pace.release(10.0, 0.5)
    assert pace.due(10.0) == 10.3
    pace.release(10.3, 1.0)
    assert pace.due(10.3) == 10.3


def failed(pace: Pace, cause: Cause, *, answered: bool) -> float:
    """Fail once more; gives the wait."""
    pace.fail(0.0, 1.0, cause, 0.0, answered=answered)
    return pace.due(0.0)


def test_an_answer_forgets_that_the_server_was_away() -> None:
    """A server that is back and sends us back to a LIST does so after a second, not after a minute."""
    pace = Pace(TIMING, 0.0, 0.0)
    for _ in range(8):
        failed(pace, Cause.UNREACHABLE, answered=False)
    assert failed(pace, Cause.EXPIRED, answered=False) == 1.0
    assert failed(pace, Cause.UNREACHABLE, answered=False) == 60.0
    pace.answer()
    assert failed(pace, Cause.UNREACHABLE, answered=False) == 1.0


def test_only_a_lasting_watch_forgets_bad_answers() -> None:
    """To be accepted is not enough."""
    pace = Pace(TIMING, 0.0, 0.0)
    for _ in range(4):
        failed(pace, Cause.GARBLED, answered=True)
        pace.answer()
    assert failed(pace, Cause.GARBLED, answered=True) == 16.0
    pace.last()
    assert failed(pace, Cause.GARBLED, answered=True) == 1.0


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        (None, 0.0),
        ("", 0.0),
        ("7", 7.0),
        (" 7 ", 7.0),
        ("0", 0.0),
        ("100000", 600.0),
        ("9" * 400, 600.0),
        ("-7", 0.0),
        ("1.5", 0.0),
        ("soon", 0.0),
        ("nan", 0.0),
        ("Sat, 21 Nov 2026 13:30:30 GMT", 30.0),
        ("Sat, 21 Nov 2026 13:29:00 GMT", 0.0),
        ("Sat, 21 Nov 2099 13:29:00 GMT", 600.0),
        ("Sat, 99 Nov 2026 13:29:00 GMT", 0.0),
    ],
)
def test_retry_after(text: str | None, seconds: float) -> None:
    """Seconds or a date, bounded; what cannot be read asks for nothing."""
    now = 1795267800.0  # 2026-11-21 13:30:00 UTC
    assert retry_after_seconds(text, now) == seconds
