"""A burst of 100,000 connections, faster than the agent looks: what the ring of the default size takes."""

from __future__ import annotations

import time

import pytest

from otel_lb_hop.config import RECORD_RATE
from otel_lb_hop.core.layout import Event, Settings
from otel_lb_hop.kernel.loader import Sizes, load, ring_pages
from tests.kernel.burst import Burst
from tests.kernel.requirements import needs_kernel
from tests.kernel.rig import close

pytestmark = [pytest.mark.root, needs_kernel]

COUNT = 100_000
RATE = int(RECORD_RATE.default)
SECOND = 10**9
DEFAULT = Settings(5 * SECOND, 0, SECOND // RATE, SECOND)
EVERYTHING = DEFAULT._replace(record_interval_ns=1)


def burst(settings: Settings) -> tuple[float, dict[Event, int], int]:
    """Send it; answers seconds, events and how many records lay in the ring."""
    loaded = load(Sizes(ring_pages=ring_pages(RATE)))
    made = Burst(loaded, settings)
    started = time.monotonic()
    made.answer(COUNT)
    seconds = time.monotonic() - started
    events = {event: count for event, count in zip(Event, made.tables.events(), strict=True) if count}
    pending = made.ring.pending_records
    records = made.ring.drain(COUNT)
    made.ring.close()
    close(loaded)
    assert pending == len(records) == len({record[3] for record in records})
    return seconds, events, len(records)


def test_the_default_rate_never_fills_the_ring() -> None:
    """With the defaults nothing is lost in the ring though nobody reads; what is over the rate is counted exactly."""
    seconds, events, told = burst(DEFAULT)
    assert events == {Event.RECORD_SENT: told, Event.RECORD_RATE: COUNT - told}
    assert RATE < told <= RATE * (1 + seconds) + 1


def test_every_loss_of_a_full_ring_is_counted() -> None:
    """With every record wanted and nobody reading, the ring takes what it holds and the rest is counted exactly."""
    _, events, told = burst(EVERYTHING)
    assert events == {Event.RECORD_SENT: told, Event.RECORD_RING_FULL: COUNT - told}
    assert told == ring_pages(RATE) * 4096 // 128 - 1
