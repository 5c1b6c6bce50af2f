"""Which connections are told: ratio, rate, burst, ring. What is not told is counted, with the reason."""

from __future__ import annotations

import itertools
import time
from typing import TYPE_CHECKING

import pytest

from otel_lb_hop.core.ids import rejection_threshold, trace_id
from otel_lb_hop.core.layout import RING_STRIDE, Event, Verdict, pack_port
from tests.kernel.packets import End, Flow, next_isn
from tests.kernel.requirements import needs_kernel
from tests.kernel.rig import EVERYTHING, FIRST_RETRANSMIT_NS, vip_port

if TYPE_CHECKING:
    from otel_lb_hop.core.layout import Settings
    from tests.kernel.rig import Rig

pytestmark = [pytest.mark.root, needs_kernel]

VIP, BACKEND = End.of("8.0.10.1", 80), End.of("8.0.4.7", 8080)
REASONS = (
    Event.RECORD_RATIO,
    Event.RECORD_RATE,
    Event.RECORD_RING_FULL,
    Event.RECORD_NO_VERDICT,
    Event.RECORD_OFF,
)
ROOM = 4095 // RING_STRIDE
"""Records in a ring of one page, which is never filled to its last byte."""


def flow(number: int) -> Flow:
    """Begin a connection from a port of its own."""
    return Flow(End.of("8.0.1.5", number), VIP, End.of("8.0.2.1", 9), BACKEND, next_isn())


def connect(rig: Rig, count: int, *, first: int = 0) -> list[Flow]:
    """Let so many connections be answered."""
    flows = [flow(first + number) for number in range(count)]
    for each in flows:
        rig.into(each.syn())
        rig.out(each.translated())
        rig.out(each.answer())
    return flows


def prepare(rig: Rig, settings: Settings) -> None:
    """Give a node one VIP port and these settings."""
    rig.serve(vip_port(VIP, (BACKEND, "node2")))
    rig.tables.set_settings(settings)


def ledger(rig: Rig) -> tuple[int, int]:
    """Return how many records were sent, and how many were not, for whatever reason."""
    return rig.event(Event.RECORD_SENT), sum(rig.event(reason) for reason in REASONS)


def ports(rig: Rig) -> list[int]:
    """Take the records and name their clients' ports."""
    return [record.client_port for record in rig.records()]


def randomness(each: Flow) -> int:
    """Return the part of a connection's trace id by which W3C trace context samples."""
    ends = each.snat.address, pack_port(each.snat.port), each.backend.address, pack_port(each.backend.port)
    return trace_id(*ends, each.isn) & (1 << 56) - 1


@pytest.mark.parametrize("ratio", [0.0, 0.01, 0.5, 1.0])
def test_ratio(rig: Rig, ratio: float) -> None:
    """Exactly the answered connections whose trace id reaches the threshold are told."""
    threshold = rejection_threshold(ratio)
    prepare(rig, EVERYTHING._replace(reject_below=threshold))
    flows = connect(rig, 211)
    expected = [each.client.port for each in flows if randomness(each) >= threshold]
    assert ports(rig) == expected
    assert ledger(rig) == (len(expected), 211 - len(expected))
    assert rig.event(Event.RECORD_RATIO) == 211 - len(expected)
    assert {0.0: 0, 1.0: 211}.get(ratio, len(expected)) == len(expected)
    assert ratio != 0.5 or 60 < len(expected) < 150


@pytest.mark.parametrize("above", [0, 1])
def test_threshold_is_reached_by_its_equal(rig: Rig, above: int) -> None:
    """A trace whose randomness is the threshold is kept, one below is not."""
    each = flow(1)
    prepare(rig, EVERYTHING._replace(reject_below=randomness(each) + above))
    rig.into(each.syn())
    rig.out(each.translated())
    rig.out(each.answer())
    assert len(rig.records()) == 1 - above


def test_failures_are_kept(rig: Rig) -> None:
    """With a ratio of 0 all failures are told: refused, timed out, never forwarded; a reply unseen is no failure."""
    prepare(rig, EVERYTHING._replace(reject_below=rejection_threshold(0.0)))
    refused, timed_out, unforwarded, refused_here, unseen = (flow(number) for number in range(5))
    for each in (refused, timed_out, unforwarded, refused_here, unseen, timed_out):
        rig.into(each.syn())
    for each in (refused, timed_out, unseen):
        rig.out(each.translated())
    rig.out(refused.refusal())
    rig.out(refused_here.refusal())
    rig.age(FIRST_RETRANSMIT_NS)
    rig.sweep()
    told = {record.client_port: record.verdict for record in rig.records()}
    assert told == {0: Verdict.REFUSED, 1: Verdict.TIMEOUT, 2: Verdict.DROPPED, 3: Verdict.DROPPED}
    assert rig.event(Event.RECORD_RATIO) == 1


def test_rate_of_zero(rig: Rig) -> None:
    """A rate of zero sends no record at all, not even of a failure, and counts each."""
    prepare(rig, EVERYTHING._replace(record_interval_ns=0))
    connect(rig, 23)
    each = flow(99)
    rig.into(each.syn())
    rig.out(each.refusal())
    assert rig.records() == []
    assert (ledger(rig), rig.event(Event.RECORD_OFF)) == ((0, 24), 24)


def test_burst(rig: Rig) -> None:
    """At one record in 100 s and a burst of 500 s: one is due, five run ahead, the rest is over the rate."""
    second = 10**9
    prepare(rig, EVERYTHING._replace(record_interval_ns=100 * second, record_burst_ns=500 * second))
    flows = connect(rig, 41)
    assert ports(rig) == [each.client.port for each in flows[:6]]
    assert (ledger(rig), rig.event(Event.RECORD_RATE)) == ((6, 35), 35)


def test_failures_go_before(rig: Rig) -> None:
    """Where good connections have used up the rate, failures are still told: as many again as a burst."""
    second = 10**9
    prepare(rig, EVERYTHING._replace(record_interval_ns=100 * second, record_burst_ns=500 * second))
    good = connect(rig, 23)
    bad = [flow(100 + number) for number in range(23)]
    for each in bad:
        rig.into(each.syn())
        rig.out(each.translated())
        rig.out(each.refusal())
    more = connect(rig, 1, first=200)
    assert ports(rig) == [each.client.port for each in good[:6] + bad[:5]]
    assert (ledger(rig), rig.event(Event.RECORD_RATE)) == ((11, 35 + len(more)), 36)


def test_rate(rig: Rig) -> None:
    """Without a burst there is never more than one record in an interval, and in time each interval has one."""
    interval = 5_000_000
    prepare(rig, EVERYTHING._replace(record_interval_ns=interval, record_burst_ns=0))
    started = time.monotonic_ns()
    made = 0
    while time.monotonic_ns() < started + 20 * interval:
        made += len(connect(rig, 1, first=made))
    intervals = (time.monotonic_ns() - started) // interval
    records = rig.records()
    gaps = [later.end_ns - earlier.end_ns for earlier, later in itertools.pairwise(records)]
    assert min(gaps) >= interval
    assert 5 <= len(records) <= intervals + 1
    assert ledger(rig) == (len(records), made - len(records))


def test_ring_full(narrow: Rig) -> None:
    """What finds the ring full is counted as such; once it is drained, records are sent again."""
    prepare(narrow, EVERYTHING)
    flows = connect(narrow, ROOM + 13)
    assert narrow.event(Event.RECORD_RING_FULL) == 13
    assert ledger(narrow) == (ROOM, 13)
    assert ports(narrow) == [each.client.port for each in flows[:ROOM]]
    (again,) = connect(narrow, 1, first=999)
    assert ports(narrow) == [again.client.port]


def test_sent_and_not_sent_are_all(narrow: Rig) -> None:
    """Ratio, rate and a full ring together: what was sent and what was not are all verdicts."""
    prepare(narrow, EVERYTHING._replace(reject_below=rejection_threshold(0.6)))
    connect(narrow, 97)
    narrow.tables.set_settings(EVERYTHING._replace(record_interval_ns=10**15, record_burst_ns=0))
    connect(narrow, 11)
    sent, dropped = ledger(narrow)
    assert sent + dropped == 108
    assert len(narrow.records()) == sent
    assert all(narrow.event(reason) for reason in REASONS[:3])


def test_ring_wraps(narrow: Rig) -> None:
    """Over many times the ring's size, drained in pieces, records come whole, in order, none twice."""
    prepare(narrow, EVERYTHING)
    expected: list[int] = []
    told: list[int] = []
    for turn in range(40):
        expected += [each.client.port for each in connect(narrow, 17, first=turn * 17)]
        assert narrow.ring.pending_records == len(expected) - len(told)
        limit = (11, 23)[turn % 2]
        taken = narrow.records(limit)
        assert len(taken) == min(limit, len(expected) - len(told))
        told += [record.client_port for record in taken]
    told += ports(narrow)
    assert told == expected
    assert (narrow.ring.pending_records, narrow.ring.wrong_size) == (0, 0)
    assert narrow.event(Event.RECORD_RING_FULL) == 0


def test_empty_ring(narrow: Rig) -> None:
    """A ring with nothing in it gives nothing, and a limit of none takes none."""
    assert narrow.records() == []
    prepare(narrow, EVERYTHING)
    connect(narrow, 2)
    assert narrow.records(0) == []
    assert len(narrow.records(1)) == len(narrow.records(1)) == 1
    assert narrow.ring.capacity == 4096
