from __future__ import annotations

import os
import signal
import time

from otel_lb_hop.ops.stop import Stop


def test_waits_until_told() -> None:
    """Untold it waits its time; once told it answers at once, every time."""
    stop = Stop()
    assert not stop.wait(0)
    assert not stop.wait(0.01)
    stop.set()
    assert stop.wait(10)
    assert stop.wait(10)


def test_woken() -> None:
    """News ends one wait, however often they were told, and stops nothing."""
    stop = Stop()
    stop.wake()
    stop.wake()
    started = time.monotonic()
    told = [(stop.wait(10), stop.woken)]
    assert time.monotonic() - started < 5
    started = time.monotonic()
    told.append((stop.wait(0.05), stop.woken))
    assert time.monotonic() - started >= 0.05
    assert told == [(False, True), (False, False)]
    stop.wake()
    stop.set()
    stop.wake()
    assert stop.wait(10)


def test_told_by_a_handler_in_the_middle_of_waiting() -> None:
    """A signal handler may tell it while the same thread waits."""
    stop = Stop()
    before = signal.signal(signal.SIGUSR1, lambda *_: stop.set())
    try:
        os.kill(os.getpid(), signal.SIGUSR1)
        started = time.monotonic()
        assert stop.wait(10)
        assert time.monotonic() - started < 5
    finally:
        signal.signal(signal.SIGUSR1, before)
