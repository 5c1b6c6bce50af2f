"""When a request may be made, so that the API server never gets more than one a second. Pure: times are arguments.

Seconds are those of any steady clock, fractions are random in [0, 1).
"""

from __future__ import annotations

from email.utils import parsedate_to_datetime
from typing import Final, NamedTuple

from otel_lb_hop.cluster.failure import Cause

MAX_RETRY_AFTER_SECONDS: Final = 600.0
"""A server, or a proxy with a wrong clock, may not silence an agent for longer."""
_ANSWERS = {Cause.EXPIRED, Cause.AHEAD, Cause.GARBLED}


class Timing(NamedTuple):
    """Every time that matters towards the API server, in seconds."""

    start_spread: float = 0.5
    """All agents of a cluster may be started at once."""
    first_back_off: float = 1.0
    longest_back_off: float = 60.0
    longest_rewatch: float = 3.0
    """A watch that was accepted and came to nothing is asked for again at least so often: it costs the server little,
    and unlike other waits this one is not ended by the scout."""
    lasting: float = 10.0
    """After so long a watch was a success, and what failed before is forgotten."""
    release_spread: float = 0.6
    patience: float = 3.0
    """A wait longer than this calls for the scout."""
    scout_interval: float = 1.6
    scout_spread: float = 0.6
    """From question to question; with `release_spread` and a turn of the main loop less than 5 s."""
    watch_head: float = 10.0
    """A watch answers at once, before it has anything to tell."""
    scout_read: float = 2.0
    watch_read: float = 55.0
    """Longer than any watch is asked to last, so that a silent one is dead; found so within 60 s."""
    list_read: float = 30.0
    list_total: float = 300.0


class Pace:
    """The next request of one resource: not before `due`.

    A bucket bounds all requests together: at most 5 + 0.8 for each second, so 29 in any 30 s, whatever happens. What
    the scout asks for a node counts among the nodes'.
    """

    burst: Final = 5.0
    per_second: Final = 0.8

    def __init__(self, timing: Timing, now: float, fraction: float) -> None:
        self._timing = timing
        self._tokens = self.burst
        self._counted = now
        self._not_before = now
        self._wait_until = now + timing.start_spread * fraction
        self._away = 0
        self._bad = 0

    def due(self, now: float) -> float:
        """Tell when the next request may be made."""
        lacking = 1.0 - self._level(now)
        return max(self._wait_until, self._not_before, now + lacking / self.per_second if lacking > 0 else now)

    def spend(self, now: float) -> None:
        """Count a request that is made now."""
        self._tokens = self._level(now) - 1.0
        self._counted = now

    def fail(self, now: float, fraction: float, cause: Cause, retry_after: float, *, answered: bool) -> None:
        """Wait longer after each failure, and never less than the server asked for.

        Two things are counted: failures of a server that is away or refuses, up to its first good answer, and good
        answers (`answered`) that came to nothing, up to a lasting success or an outage. So a server that is back but
        has to send us back to a LIST is not left alone for a minute, and one that accepts watches only to drop them is
        not rushed.
        """
        bad = answered or cause in _ANSWERS
        times = self._bad if bad else self._away
        if bad:
            self._bad += 1
        else:
            self._away += 1
            self._bad = 0  # a server that was away may well send us back to a LIST
        timing = self._timing
        longest = timing.longest_rewatch if answered and cause not in _ANSWERS else timing.longest_back_off
        # The exponent is bounded only so that it never overflows.
        seconds = min(longest, timing.first_back_off * 2.0 ** min(times, 30))
        self._wait_until = now + seconds * (0.5 + 0.5 * fraction)
        self._not_before = now + min(retry_after, MAX_RETRY_AFTER_SECONDS)

    def answer(self) -> None:
        """Take note of a good answer that begins."""
        self._away = 0

    def last(self) -> None:
        """Take note that a watch lasted."""
        self._bad = 0

    def release(self, now: float, fraction: float) -> None:
        """End a wait early, because the server is back; what it asked for itself still holds."""
        self._wait_until = min(self._wait_until, now + self._timing.release_spread * fraction)
        self._away = 0  # one that has just started may refuse a little longer

    def _level(self, now: float) -> float:
        return min(self.burst, self._tokens + (now - self._counted) * self.per_second)


def retry_after_seconds(text: str | None, wall_seconds: float) -> float:
    """Read a Retry-After header: seconds or a date (RFC 9110, 10.2.3); 0 for none or one that cannot be read."""
    if not text:
        return 0.0
    try:
        seconds = float(text) if text.strip().isdigit() else parsedate_to_datetime(text).timestamp() - wall_seconds
    except (ValueError, OverflowError):
        return 0.0
    return min(max(0.0, seconds), MAX_RETRY_AFTER_SECONDS)
