"""The threads to the sinks: what arrives, what is lost and counted, and that everything ends in time."""

from __future__ import annotations

import json
import logging
import re
import threading
import time
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING

import pytest

import otel_lb_hop.export.shipper
from otel_lb_hop.core.ledger import Ledger
from otel_lb_hop.export.backlog import Books
from otel_lb_hop.export.delivery import Chunk, Reply
from otel_lb_hop.export.shipper import MetricsShipper, Shipper

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

PATIENCE_SECONDS = 10.0
QUICK_SECONDS = 0.01
LIMIT_BYTES = 1_000

TAKEN = Reply(taken=True)
AGAIN = Reply(taken=False, retry=True, detail="come back later")
REFUSED = Reply(taken=False, detail="not here")

Step = Reply | BaseException
"""What one attempt comes to; at the end of a script everything is taken."""


class ScriptedSink:
    """Answers by a script, and remembers what it was given, what of that it took, and when."""

    name = "otlp"
    place = ""

    def __init__(self, *script: Step) -> None:
        self.script = list(script)
        self.attempts: list[list[object]] = []
        self.timeouts: list[float | None] = []
        self.times: list[float] = []
        self.taken: list[object] = []
        self.closed = threading.Event()

    def send(self, chunks: list[Chunk], timeout_seconds: float | None = None) -> Reply:
        """Answer the next of the script."""
        self.times.append(time.monotonic())
        self.timeouts.append(timeout_seconds)
        payloads = [chunk.payload for chunk in chunks]
        self.attempts.append(payloads)
        step = self.script.pop(0) if self.script else TAKEN
        if isinstance(step, BaseException):
            raise step
        if step.taken:
            self.taken += payloads
        return step

    def close(self) -> None:
        """Note that it is over."""
        self.closed.set()


class HangingSink(ScriptedSink):
    """Hangs in every attempt until it is let go, or closed, which it says was no success."""

    def __init__(self) -> None:
        super().__init__()
        self.entered, self.go_on = threading.Semaphore(0), threading.Event()

    def send(self, chunks: list[Chunk], timeout_seconds: float | None = None) -> Reply:
        """Hang."""
        self.entered.release()
        self.go_on.wait(PATIENCE_SECONDS)
        return AGAIN if self.closed.is_set() else super().send(chunks, timeout_seconds)

    def close(self) -> None:
        """Let the call return."""
        super().close()
        self.go_on.set()


class StubbornSink(HangingSink):
    """Hangs in its end as well, and in the end says that all was well."""

    def close(self) -> None:
        """Hang."""
        self.go_on.wait(PATIENCE_SECONDS)


class RudeSink(ScriptedSink):
    """Raises at its end."""

    def close(self) -> None:
        """Raise."""
        super().close()
        raise OSError("no way")


@pytest.fixture(autouse=True)
def _threads_end() -> Iterator[None]:
    """Fail if a test leaves a thread behind."""
    before = set(threading.enumerate())
    yield
    wait_until(lambda: set(threading.enumerate()) <= before)


def wait_until(condition: Callable[[], object]) -> None:
    """Wait for something that another thread brings about."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.002)


def make(sink: ScriptedSink, limit_bytes: int = LIMIT_BYTES, linger_seconds: float = QUICK_SECONDS) -> Shipper:
    """Make a shipper that lingers less than in earnest, and sends at most four chunks of ten bytes at once."""
    return Shipper("logs", sink, limit_bytes, request_bytes=40, linger_seconds=linger_seconds)


def chunks(*payloads: object, items: int = 1) -> list[Chunk]:
    """Make chunks of ten bytes."""
    return [Chunk("g", payload, items, 10) for payload in payloads]


def in_seconds(seconds: float) -> float:
    """Make a deadline."""
    return time.monotonic() + seconds


def adds_up(shipper: Shipper | MetricsShipper) -> bool:
    """Whether both books and both stages balance."""
    items, size_bytes = shipper.books(), shipper.size_bytes()
    return not Ledger(shipper.stages()).problems() and all(
        books.offered == books.exported + sum(books.dropped.values()) + books.queued + books.sending
        for books in (items, size_bytes)
    )


def close(shipper: Shipper | MetricsShipper, seconds: float = PATIENCE_SECONDS) -> Books:
    """Close within a time; gives the last books, in which nothing is on its way any more."""
    began = time.monotonic()
    shipper.close(began + seconds)
    assert time.monotonic() - began < max(0.0, seconds) + 0.5
    assert adds_up(shipper)
    books = shipper.books()
    assert books.queued == books.sending == 0
    return books


def test_everything_arrives_once_and_in_order() -> None:
    """What is offered reaches the sink once, in order, in requests no larger than the limit."""
    sink = ScriptedSink()
    shipper = make(sink)
    for start in range(0, 23, 5):
        shipper.offer(chunks(*range(start, min(start + 5, 23))))
    assert close(shipper) == Books(23, 23, {}, 0, 0)
    assert sink.taken == list(range(23))
    assert max(len(attempt) for attempt in sink.attempts) <= 4
    assert sink.closed.is_set()
    assert sink.timeouts == [None] * len(sink.attempts)


def test_full_requests_go_at_once() -> None:
    """A full request does not wait for the linger time; what is less than one does, until the end comes."""
    sink = ScriptedSink()
    shipper = make(sink, linger_seconds=PATIENCE_SECONDS)
    shipper.offer(chunks(*range(9)))
    wait_until(lambda: len(sink.attempts) == 2)
    assert sink.attempts == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert shipper.books() == Books(9, 8, {}, 1, 0)
    began = time.monotonic()
    assert close(shipper).exported == 9
    assert time.monotonic() - began < PATIENCE_SECONDS / 2


def test_linger() -> None:
    """Less than a request waits for more, and then goes by itself."""
    sink = ScriptedSink()
    shipper = make(sink, linger_seconds=0.2)
    began = time.monotonic()
    shipper.offer(chunks(1))
    shipper.offer(chunks(2))
    wait_until(lambda: shipper.books().exported == 2)
    assert sink.times[0] - began >= 0.2
    assert sink.attempts == [[1, 2]]
    close(shipper)


def test_newest_are_kept() -> None:
    """While the sink is slow the queue holds the newest, what is on its way included; the oldest are counted."""
    sink = HangingSink()
    shipper = make(sink, limit_bytes=40)
    shipper.offer(chunks("first", items=5))
    assert sink.entered.acquire(timeout=PATIENCE_SECONDS)
    shipper.offer(chunks(*range(10)))
    shipper.offer(chunks(10))
    assert shipper.books() == Books(16, 0, {"queue_full": 8}, 3, 5)
    assert shipper.size_bytes() == Books(120, 0, {"queue_full": 80}, 30, 10)
    sink.go_on.set()
    assert close(shipper) == Books(16, 8, {"queue_full": 8}, 0, 0)
    assert sink.taken == ["first", 8, 9, 10]


def test_sent_again_until_taken() -> None:
    """What is not taken now is tried until it is, in requests of its own, once and in order."""
    sink = ScriptedSink(AGAIN, AGAIN)
    shipper = make(sink)
    shipper.offer(chunks(1, 2))
    wait_until(lambda: sink.attempts)
    shipper.offer(chunks(3, 4, 5))
    wait_until(lambda: shipper.books().exported == 5)
    assert sink.taken == [1, 2, 3, 4, 5]
    assert all(later - earlier < 1.5 for earlier, later in pairwise(sink.times))  # 0.4 s is the longest by now
    assert shipper.last_error is None
    assert shipper.state()["failures_in_a_row"] == 0
    assert close(shipper) == Books(5, 5, {}, 0, 0)


def test_displaced_while_it_waits() -> None:
    """In an outage what waits for its next attempt is the oldest, and gives way first."""
    sink = ScriptedSink(Reply(taken=False, retry=True, retry_after_seconds=0.5))
    shipper = make(sink, limit_bytes=40)
    shipper.offer(chunks(1, 2))
    wait_until(lambda: shipper.last_error)
    assert shipper.last_error == "no reason was given"
    shipper.offer(chunks(3, 4, 5))
    assert shipper.books() == Books(5, 0, {"queue_full": 1}, 3, 1)
    wait_until(lambda: shipper.books().exported == 4)
    assert sink.attempts == [[1, 2], [2], [3], [4, 5]]
    assert sink.times[1] - sink.times[0] >= 0.5
    close(shipper)


@pytest.mark.parametrize(
    ("step", "reason", "error"),
    [
        (REFUSED, "refused", "not here"),
        (Reply(taken=False, reason="failed", detail="X answered FAILURE"), "failed", "X answered FAILURE"),
        (ValueError("broken"), "failed", "ValueError: broken"),
        (SystemExit(3), "failed", "SystemExit: 3"),
        (Reply(taken=True, rejected=4, detail="too old"), "rejected_partially", "too old"),
        (Reply(taken=True, rejected=4), "rejected_partially", "no reason was given"),
    ],
)
def test_losses(step: Step, reason: str, error: str) -> None:
    """What is lost is counted by its reason and told; the thread lives, and after the next success all is well."""
    sink = ScriptedSink(step, step)
    shipper = make(sink)
    for turn in (1, 2):
        shipper.offer(chunks(turn, items=4))
        wait_until(lambda: shipper.books().dropped == {reason: 4 * turn})  # noqa: B023 - called in this turn
        assert (shipper.last_error, shipper.state()["error"]) == (error, error)
    shipper.offer(chunks(3, items=4))
    wait_until(lambda: shipper.last_error is None)
    assert close(shipper) == Books(12, 4, {reason: 8}, 0, 0)
    assert len(sink.attempts) == 3


def test_troubles_are_told_once(caplog: pytest.LogCaptureFixture) -> None:
    """The same trouble is one line however often it comes, other words about it come later, another trouble at once."""
    nasty = [Reply(taken=False, detail=f"not here, request {number}") for number in range(5)]
    sink = ScriptedSink(
        *[Reply(taken=False, retry=True, retry_after_seconds=0.0, detail="come back later")] * 2,
        *[Reply(taken=True, detail="mind the gap")] * 3,
        *nasty,
        *[Reply(taken=True, rejected=1, detail="too old")] * 2,
    )
    shipper = make(sink)
    with caplog.at_level(logging.INFO):
        for number in range(11):  # so that no more than one goes at once, and each finds what is sent again gone
            shipper.offer(chunks(number))
            assert shipper.flush(in_seconds(PATIENCE_SECONDS)) == (number < 3 or number == 10)
        close(shipper)
    assert lines(caplog) == [
        "logs: otlp: not taken, kept to be sent again: come back later",
        "logs: otlp: works again after 2 failures (N s)",
        "logs: otlp: taken, with a warning: mind the gap",
        "logs: otlp: refused, lost: not here, request 0",
        "logs: otlp: taken, some rejected: too old",
        "logs: otlp: works again after 5 failures (N s)",
    ]


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Give what was logged, but for how long it took."""
    return [re.sub(r"\(\d+ s\)", "(N s)", line) for line in caplog.messages]


def told(caplog: pytest.LogCaptureFixture, *replies: Reply) -> list[str]:
    """Let chunks be answered like this, one by one and without quiet times; gives the lines."""
    sink = ScriptedSink(*replies)
    shipper = make(sink)
    with caplog.at_level(logging.INFO):
        for number in range(len(replies)):
            shipper.offer(chunks(number))
            shipper.flush(in_seconds(PATIENCE_SECONDS))
        close(shipper)
    return [line.removeprefix("logs: otlp: ") for line in lines(caplog)]


def test_trouble_that_changes_is_told(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another kind is another line, but not when it comes back; the same kind is, once all was well between."""
    monkeypatch.setattr(otel_lb_hop.export.shipper, "QUIET_SECONDS", 0.0)
    words = ["UNAVAILABLE: reset", "TIMEOUT: 1", "UNAVAILABLE: closed", "TIMEOUT: 2", None, "TIMEOUT: 3", "TIMEOUT: 4"]
    assert told(caplog, *[Reply(taken=False, detail=word) if word else TAKEN for word in words]) == [
        "refused, lost: UNAVAILABLE: reset",
        "refused, lost: TIMEOUT: 1",
        "works again after 4 failures (N s)",
        "refused, lost: TIMEOUT: 3",
    ]


def test_a_warning_that_stays_is_told_once(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also with failures between."""
    monkeypatch.setattr(otel_lb_hop.export.shipper, "QUIET_SECONDS", 0.0)
    warning, failure = Reply(taken=True, detail="mind the gap"), Reply(taken=False, detail="no")
    assert told(caplog, warning, warning, failure, warning, TAKEN, warning) == [
        "taken, with a warning: mind the gap",
        "refused, lost: no",
        "works again after 1 failures (N s)",
        "taken, with a warning: mind the gap",
    ]


def test_a_request_that_is_too_large_goes_in_smaller_ones(caplog: pytest.LogCaptureFixture) -> None:
    """At once, without loss, and the log says so; only a chunk that is too large by itself is lost."""
    too_large = Reply(taken=False, too_large=True, retry_after_seconds=PATIENCE_SECONDS, detail="HTTP 413")
    sink = ScriptedSink(too_large, too_large, TAKEN, too_large)
    shipper = make(sink)
    with caplog.at_level(logging.INFO):
        shipper.offer(chunks(1, 2, 3, 4))
        assert not shipper.flush(in_seconds(PATIENCE_SECONDS / 2))
        assert close(shipper) == Books(4, 3, {"refused": 1}, 0, 0)
    assert sink.attempts == [[1, 2, 3, 4], [1, 2], [1], [2], [3], [4]]
    assert lines(caplog) == [
        "logs: otlp: larger than the other side takes, kept to go in smaller requests: HTTP 413",
        "logs: otlp: refused, lost: HTTP 413",
        "logs: otlp: works again after 1 failures (N s)",
    ]


def test_an_outage_that_is_not_told_does_not_end(caplog: pytest.LogCaptureFixture) -> None:
    """Whoever fails every second and warns all the time gets no line each time it works again."""
    warning, failure = Reply(taken=True, detail="mind the gap"), Reply(taken=False, detail="no")
    assert told(caplog, warning, failure, warning, failure, warning) == [
        "taken, with a warning: mind the gap",
        "refused, lost: no",
        "works again after 1 failures (N s)",
    ]


class PoisonedSink(ScriptedSink):
    """Never takes what has the poison in it; once it took something, it says so only when it may go on."""

    def __init__(self) -> None:
        super().__init__()
        self.go_on = threading.Event()
        self.go_on.set()

    def send(self, chunks: list[Chunk], timeout_seconds: float | None = None) -> Reply:
        """Take it or not."""
        poisoned = any(chunk.payload == "poison" for chunk in chunks)
        self.script = [AGAIN] if poisoned else []
        if poisoned:
            self.go_on.wait(PATIENCE_SECONDS)
        else:
            self.go_on.clear()
        return super().send(chunks, timeout_seconds)


def test_what_is_never_taken_does_not_hold_up_the_rest(caplog: pytest.LogCaptureFixture) -> None:
    """What comes later arrives, the trouble stays in sight, and the back-off of what does not get through grows."""
    sink = PoisonedSink()
    shipper = make(sink)
    with caplog.at_level(logging.INFO):
        shipper.offer(chunks("poison"))
        wait_until(lambda: shipper.state()["failures_in_a_row"] == 3)
        for number in range(5):
            shipper.offer(chunks(number))
            wait_until(lambda: shipper.books().exported == number + 1)  # noqa: B023 - called in this turn
            assert shipper.last_error == "come back later"
            sink.go_on.set()
        assert sink.taken == list(range(5))
        assert shipper.state()["failures_in_a_row"] >= 5
        assert close(shipper, 0.5) == Books(6, 5, {"shutdown": 1}, 0, 0)
    assert caplog.messages == ["logs: otlp: not taken, kept to be sent again: come back later"]


def test_a_warning_is_no_error() -> None:
    """A request that was taken whole, with a word to it, was exported."""
    shipper = make(ScriptedSink(Reply(taken=True, detail="mind the gap")))
    shipper.offer(chunks(1))
    wait_until(lambda: shipper.books().exported == 1)
    assert shipper.last_error is None
    close(shipper)


def test_state() -> None:
    """What an operator sees: what failed, how often in a row, when it is tried again, what is held."""
    sink = ScriptedSink(TAKEN, Reply(taken=False, retry=True, retry_after_seconds=100.0, detail="503"))
    shipper = make(sink)
    assert shipper.state() == {
        "exporter": "otlp",
        "error": None,
        "offered": 0,
        "exported": 0,
        "dropped": {},
        "queued": 0,
        "sending": 0,
        "held_bytes": 0,
        "failures_in_a_row": 0,
        "next_try_seconds": None,
        "exported_seconds_ago": None,
    }
    shipper.offer(chunks(1, items=7))
    assert shipper.flush(in_seconds(PATIENCE_SECONDS))
    shipper.offer(chunks(2, items=3))
    wait_until(lambda: shipper.last_error)
    state = json.loads(json.dumps(shipper.state()))
    assert 90.0 < state.pop("next_try_seconds") <= 100.0
    assert 0.0 <= state.pop("exported_seconds_ago") < PATIENCE_SECONDS
    assert state == {
        "exporter": "otlp",
        "error": "503",
        "offered": 10,
        "exported": 7,
        "dropped": {},
        "queued": 0,
        "sending": 3,
        "held_bytes": 10,
        "failures_in_a_row": 1,
    }
    queue, transport = shipper.stages()
    assert (queue.title, queue.exported, transport.title, transport.in_flight) == (
        "queue of logs to otlp",
        10,
        "transport of logs to otlp",
        3,
    )
    close(shipper, 0.5)


# flush


def test_flush() -> None:
    """A flush does not linger, waits for what was offered before it, and says that all of it was taken."""
    sink = ScriptedSink()
    shipper = make(sink, linger_seconds=PATIENCE_SECONDS)
    shipper.offer(chunks(1, 2, 3, 4, 5))
    wait_until(lambda: len(sink.attempts) == 1 and shipper._work._waiters)  # type: ignore[attr-defined] # it lingers
    sink.script.append(AGAIN)
    assert shipper.flush(in_seconds(PATIENCE_SECONDS / 2))
    assert sink.taken == [1, 2, 3, 4, 5]
    assert len(sink.attempts) == 3
    assert shipper.flush(in_seconds(0.0))
    close(shipper)


@pytest.mark.parametrize("step", [REFUSED, ValueError("broken"), Reply(taken=True, rejected=1)])
def test_flush_tells_losses(step: Step) -> None:
    """A flush that lost something says so, and the next has nothing of it to tell."""
    shipper = make(ScriptedSink(step))
    shipper.offer(chunks(1, 2))
    assert not shipper.flush(in_seconds(PATIENCE_SECONDS))
    shipper.offer(chunks(3))
    assert shipper.flush(in_seconds(PATIENCE_SECONDS))
    close(shipper)


def test_flush_tells_what_was_lost_before() -> None:
    """What gave way before anybody asked is told by the next flush."""
    shipper = make(ScriptedSink(), limit_bytes=20)
    shipper.offer(chunks(1, 2, 3))
    assert not shipper.flush(in_seconds(PATIENCE_SECONDS))
    assert shipper.flush(in_seconds(PATIENCE_SECONDS))
    close(shipper)


def test_flush_ends_at_its_deadline() -> None:
    """A sink that hangs makes a flush say no in time; what came after the call does not matter to it."""
    sink = HangingSink()
    shipper = make(sink, limit_bytes=20)
    shipper.offer(chunks(1))
    began = time.monotonic()
    assert not shipper.flush(began + 0.2)
    assert 0.2 <= time.monotonic() - began < PATIENCE_SECONDS / 2
    answers: list[bool] = []
    thread = threading.Thread(target=lambda: answers.append(shipper.flush(in_seconds(PATIENCE_SECONDS))))
    thread.start()
    wait_until(lambda: shipper._flushing)
    shipper.offer(chunks(2))
    shipper.offer(chunks(3))  # 2 gives way
    assert shipper.books().dropped == {"queue_full": 1}
    sink.go_on.set()
    thread.join(PATIENCE_SECONDS)
    assert answers == [True]
    assert not shipper.flush(in_seconds(PATIENCE_SECONDS))
    close(shipper)


def test_flush_ends_with_the_shipper() -> None:
    """Who waits for a flush is told no when the shipper closes."""
    shipper = make(HangingSink())
    shipper.offer(chunks(1))
    answers: list[bool] = []
    thread = threading.Thread(target=lambda: answers.append(shipper.flush(in_seconds(PATIENCE_SECONDS))))
    thread.start()
    wait_until(lambda: shipper._flushing)
    close(shipper, 0.3)
    thread.join(PATIENCE_SECONDS / 2)
    assert answers == [False]


# the end


@pytest.mark.parametrize("sink_class", [HangingSink, StubbornSink])
def test_close_with_a_hanging_sink(sink_class: type[HangingSink], caplog: pytest.LogCaptureFixture) -> None:
    """Closing keeps its deadline and counts all that is left; a late success changes nothing."""
    sink = sink_class()
    shipper = make(sink)
    shipper.offer(chunks(*range(10)))
    assert sink.entered.acquire(timeout=PATIENCE_SECONDS)
    books = close(shipper, 0.5)
    assert books == Books(10, 0, {"shutdown": 10}, 0, 0)
    queue, transport = shipper.stages()
    assert (queue.losses, transport.losses) == ({"shutdown": 6}, {"shutdown": 4})
    sink.go_on.set()
    wait_until(lambda: not shipper._thread.is_alive())
    assert shipper.books() == books
    assert not sink.entered.acquire(blocking=False)
    assert not caplog.messages  # above all not that it is sent again


def test_close_after_the_deadline() -> None:
    """A deadline that has passed still counts everything and ends; so does what comes later still."""
    sink = HangingSink()
    shipper = make(sink)
    shipper.offer(chunks(1, 2))
    assert sink.entered.acquire(timeout=PATIENCE_SECONDS)
    assert close(shipper, -1.0).dropped == {"shutdown": 2}
    shipper.offer(chunks(3))
    assert shipper.books() == Books(3, 0, {"shutdown": 3}, 0, 0)


def test_close_waits_for_a_slow_sink() -> None:
    """A sink that is only slow gets the time there is, and nothing is lost."""
    sink = HangingSink()
    shipper = make(sink)
    shipper.offer(chunks(*range(10)))
    timer = threading.Timer(0.1, sink.go_on.set)
    timer.start()
    assert close(shipper) == Books(10, 10, {}, 0, 0)


def test_close_without_records() -> None:
    """Nothing to send is sent at once, and the sink is closed."""
    sink = ScriptedSink()
    assert close(make(sink)) == Books(0, 0, {}, 0, 0)
    assert sink.attempts == []
    assert sink.closed.is_set()


def test_close_with_a_rude_sink(caplog: pytest.LogCaptureFixture) -> None:
    """A plugin that raises at its end is told, and that is all."""
    with caplog.at_level(logging.WARNING):
        close(make(RudeSink()))
    assert caplog.messages == ["logs: otlp did not end well: OSError: no way"]


def test_stop_lets_all_signals_end_side_by_side() -> None:
    """After stop, what is queued goes without further waiting; closing then has nothing left to do."""
    shipper = make(ScriptedSink(), linger_seconds=PATIENCE_SECONDS)
    shipper.offer(chunks(1))
    shipper.stop()
    wait_until(lambda: not shipper._thread.is_alive())
    assert close(shipper).exported == 1


def test_the_end_tries_again_until_the_deadline() -> None:
    """A sink that comes back before the deadline gets everything."""
    sink = ScriptedSink(AGAIN, AGAIN, AGAIN)
    shipper = make(sink)
    shipper.offer(chunks(1))
    wait_until(lambda: sink.attempts)
    assert close(shipper) == Books(1, 1, {}, 0, 0)
    assert len(sink.attempts) == 4


def test_the_end_does_not_wait_for_our_own_back_off() -> None:
    """A last attempt is made at once, whatever the wait was."""
    sink = ScriptedSink(AGAIN)
    shipper = make(sink)
    with shipper._lock:
        for _ in range(20):
            shipper._backoff.fail(time.monotonic(), 0.999, None)
    shipper.offer(chunks(1))
    assert not shipper.flush(in_seconds(0.0))
    began = time.monotonic()
    assert close(shipper).exported == 1
    assert time.monotonic() - began < 1.5  # of two seconds


def test_no_attempt_can_begin_in_time() -> None:
    """A sink that asked to be left alone until after the deadline is, and the end does not wait for nothing."""
    sink = ScriptedSink(Reply(taken=False, retry=True, retry_after_seconds=60.0))
    shipper = make(sink)
    shipper.offer(chunks(1, items=6))
    wait_until(lambda: shipper.last_error)
    began = time.monotonic()
    assert close(shipper).dropped == {"shutdown": 6}
    assert time.monotonic() - began < PATIENCE_SECONDS / 2
    assert len(sink.attempts) == 1


def test_books_add_up_at_any_time() -> None:
    """Whoever asks at whatever moment finds every item in exactly one place."""
    quick = Reply(taken=False, retry=True)
    replies: list[Step] = [TAKEN, REFUSED, Reply(taken=True, rejected=1), quick, TAKEN, ValueError("broken")]
    sink = ScriptedSink(*replies * 5)
    shipper = make(sink, limit_bytes=100, linger_seconds=0.0)
    wrong: list[Ledger] = []
    stop = threading.Event()

    def look() -> None:
        while not stop.is_set():
            ledger = Ledger(shipper.stages())
            if ledger.problems():
                wrong.append(ledger)

    lookers = [threading.Thread(target=look) for _ in range(2)]
    for looker in lookers:
        looker.start()
    for turn in range(200):
        shipper.offer(chunks(*range(turn % 7), items=turn % 3))
        held = shipper.size_bytes()  # both of one moment
        assert held.queued + held.sending <= 100
    stop.set()
    for looker in lookers:
        looker.join(PATIENCE_SECONDS)
    assert not wrong
    assert close(shipper).offered == sum((turn % 7) * (turn % 3) for turn in range(200))


# metrics


def test_metrics_keep_only_the_newest() -> None:
    """While an attempt hangs only the newest snapshot waits: it says all that the others would have."""
    sink = HangingSink()
    shipper = MetricsShipper(sink, 1.25)
    shipper.offer(chunks("a", items=5), 1)
    assert sink.entered.acquire(timeout=PATIENCE_SECONDS)
    for number, snapshot in enumerate("bcd", start=2):
        shipper.offer(chunks(snapshot, snapshot.upper(), items=5), number)
    assert shipper.exported_ns == 0
    assert shipper.books() == Books(35, 0, {"superseded": 20}, 10, 5)
    sink.go_on.set()
    wait_until(lambda: shipper.exported_ns == 4)
    assert close(shipper) == Books(35, 15, {"superseded": 20}, 0, 0)
    assert sink.attempts == [["a"], ["d"], ["D"]]
    assert sink.timeouts == [1.25] * 3
    assert (shipper.signal, shipper.name) == ("metrics", "otlp")


def test_metrics_are_sent_again() -> None:
    """A piece that was not taken is tried again, and only then the snapshot is out."""
    sink = ScriptedSink(AGAIN, TAKEN, AGAIN)
    shipper = MetricsShipper(sink, 10.0)
    shipper.offer(chunks("a1", "a2"), 7)
    wait_until(lambda: shipper.exported_ns == 7)
    assert sink.attempts == [["a1"], ["a2"], ["a1"], ["a1"]]
    assert close(shipper) == Books(2, 2, {}, 0, 0)


def test_a_newer_snapshot_keeps_the_back_off() -> None:
    """News do not make the agent knock more often."""
    sink = ScriptedSink(Reply(taken=False, retry=True, retry_after_seconds=0.5))
    shipper = MetricsShipper(sink, 10.0)
    shipper.offer(chunks("a"), 1)
    wait_until(lambda: shipper.last_error)
    shipper.offer(chunks("b"), 2)
    shipper.offer([], 3)
    shipper.offer(chunks("d"), 4)
    wait_until(lambda: shipper.exported_ns == 4)
    assert sink.attempts == [["a"], ["d"]]
    assert sink.times[1] - sink.times[0] >= 0.5
    assert close(shipper) == Books(3, 1, {"superseded": 2}, 0, 0)


def test_metrics_never_wait_for_records() -> None:
    """With the sink of the logs hanging, metrics go on; closing each takes its own time only."""
    hanging, metrics_sink = HangingSink(), ScriptedSink()
    logs, metrics = make(hanging), MetricsShipper(metrics_sink, 10.0)
    logs.offer(chunks(1))
    assert hanging.entered.acquire(timeout=PATIENCE_SECONDS)
    for number in range(1, 4):
        metrics.offer(chunks(number), number)
        wait_until(partial(_is_out, metrics, number))
    assert close(metrics) == Books(3, 3, {}, 0, 0)
    assert close(logs, 0.3) == Books(1, 0, {"shutdown": 1}, 0, 0)


def _is_out(metrics: MetricsShipper, taken_ns: int) -> bool:
    return metrics.exported_ns == taken_ns


def test_metrics_after_the_end() -> None:
    """A snapshot that comes after the end is counted as lost to it."""
    shipper = MetricsShipper(ScriptedSink(), 10.0)
    close(shipper)
    shipper.offer(chunks("a"), 1)
    assert shipper.books() == Books(1, 0, {"shutdown": 1}, 0, 0)
