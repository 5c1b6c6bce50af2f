"""The agent's own log: one line per cause and ten seconds."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING

import pytest

from otel_lb_hop.ops.logs import KEPT_LINES, QUIET_SECONDS, REMEMBERED_CAUSES, LineKeeper, OncePerCause, set_up_logging

if TYPE_CHECKING:
    from collections.abc import Iterator


class Clock:
    """A monotonic clock that stands still until it is set."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(time, "monotonic", lambda: self.now)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Hold the clock in hand."""
    return Clock(monkeypatch)


@pytest.fixture
def root() -> Iterator[logging.Logger]:
    """Give the root logger, and put it back as it was."""
    logger = logging.getLogger()
    handlers, level = list(logger.handlers), logger.level
    logger.handlers.clear()
    yield logger
    logger.handlers[:] = handlers
    logger.setLevel(level)


def line(
    message: object, *arguments: object, level: int = logging.WARNING, name: str = "otel_lb_hop.x"
) -> logging.LogRecord:
    """Make a log line."""
    return logging.LogRecord(name, level, __file__, 1, message, arguments, None)


def test_once_in_ten_seconds(clock: Clock) -> None:
    """The same cause passes once, again after the quiet time, and each time begins a new quiet time."""
    once = OncePerCause()
    passed = []
    for second in (0, 0.1, QUIET_SECONDS - 0.1, QUIET_SECONDS, QUIET_SECONDS + 1, 2 * QUIET_SECONDS):
        clock.now = 1000.0 + second
        passed.append(once.filter(line("it broke")))
    assert passed == [True, False, False, True, False, True]


@pytest.mark.usefixtures("clock")
def test_what_a_cause_is() -> None:
    """For our own loggers the whole line makes a cause, for a library's the text before its arguments."""
    once = OncePerCause()
    assert once.filter(line("%s broke", "this"))
    assert not once.filter(line("%s broke", "this", level=logging.ERROR))
    assert once.filter(line("%s broke", "that"))
    assert once.filter(line("%s broke", "this", name="otel_lb_hop.y"))
    assert once.filter(line("retry in %s", "1 s", name="opentelemetry.exporter"))
    assert not once.filter(line("retry in %s", "2 s", name="opentelemetry.exporter"))
    assert once.filter(line("retry at %s", "2 s", name="opentelemetry.exporter"))


@pytest.mark.usefixtures("clock")
def test_causes_are_not_remembered_without_end() -> None:
    """However many causes come up, the memory of them stays bounded."""
    once = OncePerCause()
    assert all(once.filter(line(f"cause {number}")) for number in range(3 * REMEMBERED_CAUSES))
    assert len(once._next) <= REMEMBERED_CAUSES


@pytest.mark.usefixtures("clock")
def test_information_is_never_held_back() -> None:
    """Lines up to INFO pass however often they come."""
    once = OncePerCause()
    assert all(once.filter(line("well", level=level)) for level in [logging.INFO, logging.DEBUG] * 3)


@pytest.mark.usefixtures("clock")
def test_messages_that_are_no_text() -> None:
    """Libraries log exceptions and lists as messages: they count by their text."""
    once = OncePerCause()
    assert once.filter(line(ValueError("no")))
    assert not once.filter(line(ValueError("no")))
    assert once.filter(line(["a", "list"]))


@pytest.mark.parametrize(("level", "lines"), [("debug", 4), ("info", 3), ("warning", 2), ("error", 1)])
def test_set_up(root: logging.Logger, level: str, lines: int, capsys: pytest.CaptureFixture[str]) -> None:
    """Lines of the level and above go to stderr, with level and logger's name, and once per cause."""
    set_up_logging(level)
    set_up_logging(level)  # anew, not in addition
    for _ in range(2):
        logging.getLogger("one").error("failed %d", 1)
        logging.getLogger("one").warning("careful")
    logging.getLogger("one").info("by the way")
    logging.getLogger("one").debug("deep inside")
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.splitlines()) == lines
    assert err.splitlines()[0].endswith(" ERROR one: failed 1")
    for handler in root.handlers:
        handler.close()


def test_lines_are_kept_until_they_are_taken(root: logging.Logger) -> None:
    """What goes to stderr can be exported too, once: each line with its time, level, place and exception."""
    kept = set_up_logging("info")
    logger = logging.getLogger("otel_lb_hop.agent")
    before = time.time_ns()
    logger.info("counting on %s", "eth0")
    logger.debug("not at this level")
    for _ in range(23):
        logger.warning("the Collector is away")
    rows: dict[str, int] = {}
    try:
        rows["row"] += 1
    except KeyError:
        logger.exception("counters")
    lines = kept.take()
    assert [(line.level, line.text) for line in lines] == [
        (logging.INFO, "counting on eth0"),
        (logging.WARNING, "the Collector is away"),
        (logging.ERROR, "counters"),
    ]
    assert all(before - 1_000_000 <= line.time_ns <= time.time_ns() for line in lines)
    name = "otel_lb_hop.agent.test_lines_are_kept_until_they_are_taken"
    assert {line.function for line in lines} == {name}
    assert [line.exception is not None for line in lines] == [False, False, True]
    assert lines[2].exception is not None
    kind, message, trace = lines[2].exception
    assert (kind, message) == ("KeyError", "'row'")
    assert trace.startswith("Traceback")
    assert kept.take() == []
    assert len(root.handlers) == 2


def test_lines_that_nobody_takes() -> None:
    """The newest are kept, and it is known how many were not."""
    kept = LineKeeper()
    for number in range(KEPT_LINES + 23):
        kept.handle(logging.LogRecord("x", logging.INFO, __file__, 1, "line %d", (number,), None, "f"))
    lines = kept.take()
    assert (len(lines), lines[0].text, kept.lost) == (KEPT_LINES, "line 23", 23)


def test_a_line_that_cannot_be_written(root: logging.Logger, capsys: pytest.CaptureFixture[str]) -> None:
    """A library's wrong arguments are a note on stderr; whoever logs goes on, and so does the log."""
    kept = set_up_logging("info")
    logger = logging.getLogger("somebody.else")
    logger.warning("%d items", "three")
    logger.warning("and on")
    assert [line.text for line in kept.take()] == ["and on"]
    assert "--- Logging error ---" in capsys.readouterr().err
    assert root.handlers
