"""The handshake table under pressure: many connections, few slots, several CPUs. Counts have to add up."""

from __future__ import annotations

import struct
import time
from typing import TYPE_CHECKING

import pytest

from otel_lb_hop.core.layout import BOUNDS_NS, Event, OriginCode, Verdict
from tests.kernel.oracle import ACK, RST, SYN
from tests.kernel.packets import End, Flow, next_isn
from tests.kernel.requirements import needs_kernel
from tests.kernel.rig import EVERYTHING, FIRST_RETRANSMIT_NS, WAYS, in_threads, vip_port

if TYPE_CHECKING:
    from otel_lb_hop.core.layout import HopStats
    from tests.kernel.rig import Marked, Rig

pytestmark = [pytest.mark.root, needs_kernel]

VIP, BACKEND = End.of("8.0.10.1", 80), End.of("8.0.4.7", 8080)
SEEN, SETTLED, BUSY = 2, 5, 1
TICK_SHIFT = 23
FORGET_TICKS = 135_000_000_000 >> TICK_SHIFT


def serve(rig: Rig) -> Marked:
    """Give a node one VIP port with one backend elsewhere."""
    (marked,) = rig.serve(vip_port(VIP, (BACKEND, "node2")))
    return marked


def flow(number: int = 0) -> Flow:
    """Begin a connection from a client of its own."""
    client = End.of(f"8.0.1.{number >> 14 & 255}", 10_000 + (number & 0x3FFF))
    return Flow(client, VIP, End.of("8.0.2.1", client.port), BACKEND, next_isn())


def total(rows: dict[int, HopStats]) -> dict[str, int]:
    """Add up the hop rows, without their histograms."""
    names = ("answered", "refused", "timeout", "reply_unseen", "evicted")
    return {"forwarded": sum(sum(row.forwarded) for row in rows.values())} | {
        name: sum(getattr(row, name) for row in rows.values()) for name in names
    }


def check_sums(rig: Rig, marked: Marked, still_open: int = 0) -> dict[str, int]:
    """Hold the counters to the sums that lb_hop.h promises, and return the hop rows' total."""
    snapshot = rig.snapshot()
    vip = snapshot.vips[marked.vip_id]
    hops = total(snapshot.hops)
    assert sum(vip.connections) == hops["forwarded"] + sum(map(sum, vip.unforwarded)) + still_open
    assert hops["forwarded"] == sum(hops.values()) - hops["forwarded"]
    for row in snapshot.hops.values():
        assert row.forward.sum_ns + row.handshake.sum_ns < 60 * 10**9, "a time that cannot be"
    return hops


def states(rig: Rig) -> list[int]:
    """Read the state of every slot of the first bucket."""
    raw = rig.tags.get(bytes(4))
    assert raw is not None
    return [tag >> 29 & 7 for (tag,) in struct.iter_unpack("=Q", raw)]


def put_tags(rig: Rig, tags: list[int]) -> None:
    """Write the tags of the first bucket."""
    rig.tags.put(bytes(4), struct.pack(f"={WAYS}Q", *tags))


def test_flood(rig: Rig) -> None:
    """Of 9,973 SYNs from as many clients each is counted, though the table holds 1,024."""
    marked = serve(rig)
    for number in range(9973):
        rig.into(flow(number).syn())
    assert rig.vip(marked.vip_id).connections == (0, 9973)
    evicted = rig.event(Event.RECORD_NO_VERDICT)
    assert evicted >= 9973 - 128 * WAYS
    assert sum(rig.vip(marked.vip_id).unforwarded[OriginCode.EXTERNAL]) == evicted
    rig.sweep()
    assert rig.vip(marked.vip_id).unforwarded[OriginCode.EXTERNAL] == (9973, 0, 0)


def test_eviction(narrow: Rig) -> None:
    """With room for 8, open handshakes give way to new ones, and each is counted where it stood."""
    marked = serve(narrow)
    for number in range(101):
        each = flow(number)
        narrow.into(each.syn())
        if number % 3:
            narrow.out(each.translated())
    check = narrow.snapshot()
    hops = total(check.hops)
    seen = states(narrow).count(SEEN)
    assert check.vips[marked.vip_id].connections == (0, 101)
    assert hops["forwarded"] + sum(check.vips[marked.vip_id].unforwarded[OriginCode.EXTERNAL]) + seen == 101
    assert check.events[Event.RECORD_NO_VERDICT] == 101 - WAYS
    assert hops["forwarded"] - hops["evicted"] + seen == WAYS
    narrow.age(FIRST_RETRANSMIT_NS)
    narrow.sweep()
    assert check_sums(narrow, marked)["evicted"] == hops["evicted"] > 0
    assert len(narrow.records()) == WAYS


def test_settled_gives_way_first(narrow: Rig) -> None:
    """Answered handshakes make room before unanswered ones, those before open ones, then the oldest."""
    serve(narrow)
    flows = [flow(number) for number in range(WAYS)]
    for each in flows:
        narrow.into(each.syn())
    narrow.out(flows[5].answer())
    narrow.into(flow(100).syn())
    assert narrow.event(Event.RECORD_NO_VERDICT) == 0
    raw = narrow.tags.get(bytes(4))
    assert raw is not None
    tags = [tag for (tag,) in struct.iter_unpack("=Q", raw)]
    put_tags(narrow, [tag - 40 if tag >> 32 == flows[3].isn else tag for tag in tags])
    narrow.into(flow(101).syn())
    assert narrow.event(Event.RECORD_NO_VERDICT) == 1
    gone = []
    for number, each in enumerate(flows):
        before = sum(sum(row.forwarded) for row in narrow.snapshot().hops.values())
        narrow.out(each.translated())
        if sum(sum(row.forwarded) for row in narrow.snapshot().hops.values()) == before:
            gone.append(number)
    assert gone == [3, 5]


def test_no_slot(narrow: Rig) -> None:
    """A connection that finds every slot being filled by other CPUs is counted as dropped, and said not to be told."""
    marked = serve(narrow)
    put_tags(narrow, [BUSY << 29] * WAYS)
    narrow.into(flow().syn())
    assert narrow.vip(marked.vip_id) == ((0, 1), ((0, 0, 0), (1, 0, 0)), 0)
    assert (narrow.event(Event.NO_SLOT), narrow.event(Event.RECORD_NO_VERDICT)) == (1, 1)
    check_sums(narrow, marked)


@pytest.mark.parametrize(("ticks", "connections"), [(FORGET_TICKS - 9, 1), (FORGET_TICKS + 9, 2)])
def test_forgets(narrow: Rig, ticks: int, connections: int) -> None:
    """The same ISN and tuple after more than 135 s is a new connection, and no late answer belongs to the old one."""
    marked = serve(narrow)
    each = flow()
    narrow.into(each.syn())
    raw = narrow.tags.get(bytes(4))
    assert raw is not None
    past = (time.monotonic_ns() >> TICK_SHIFT) - ticks & 0x1FFFFFFF
    put_tags(narrow, [tag & ~0x1FFFFFFF | past if tag else 0 for (tag,) in struct.iter_unpack("=Q", raw)])
    narrow.into(each.syn())
    vip = narrow.vip(marked.vip_id)
    assert vip.connections == (0, connections)
    assert vip.retransmits == 2 - connections


def test_verdict_comes_with_age(narrow: Rig) -> None:
    """The sweep leaves a handshake alone until it has the age of the settings."""
    serve(narrow)
    narrow.tables.set_settings(EVERYTHING._replace(verdict_after_ns=150_000_000))
    narrow.into(flow().syn())
    narrow.sweep()
    assert narrow.records() == []
    time.sleep(0.17)
    narrow.sweep()
    (record,) = narrow.records()
    assert record.end_ns - record.syn_ns >= 150_000_000 - (1 << TICK_SHIFT)


def test_histogram_buckets(narrow: Rig) -> None:
    """Whatever a handshake takes, up to seconds, its time is in the one bucket whose bounds hold it."""
    marked = serve(narrow)
    expected = [0] * (len(BOUNDS_NS) + 1)
    total_ns = 0
    hop_id = marked.hops["required", "node2"]
    for age in (0, 500_000, *(bound + bound // 2 for bound in BOUNDS_NS[8:]), BOUNDS_NS[-1] * 2):
        narrow.tags.put(bytes(4), b"")
        each = flow()
        narrow.into(each.syn())
        narrow.out(each.translated())
        narrow.age(age)
        narrow.out(each.answer())
        (record,) = narrow.records()
        took = record.end_ns - record.syn_ns
        assert age <= took
        expected[sum(took > bound for bound in BOUNDS_NS)] += 1
        total_ns += took
        histogram = narrow.hop(hop_id).handshake
        assert (histogram.sum_ns, histogram.buckets) == (total_ns, tuple(expected))
    assert sum(count > 0 for count in expected) >= 12


def test_counts_per_cpu(rig: Rig) -> None:
    """Two CPUs that see the same SYN at the same time lose none: every run is a connection or a retransmit."""
    marked = serve(rig)
    packet = flow().syn()
    runs = 20_000

    def hammer() -> None:
        for _ in range(10):
            rig.into(packet, repeat=runs // 10)

    in_threads(hammer, hammer)
    vip = rig.vip(marked.vip_id)
    assert sum(vip.connections) + vip.retransmits == 2 * runs
    assert 1 <= sum(vip.connections) <= 2


def test_two_cpus_whole_handshakes(rig: Rig) -> None:
    """Two CPUs with handshakes of their own over the same buckets: each connection is counted and told once."""
    marked = serve(rig)
    rounds = 400

    def connect(first: int) -> None:
        for number in range(first, first + rounds):
            each = flow(number)
            rig.into(each.syn())
            rig.out(each.translated())
            rig.out(each.answer(SYN | ACK if number % 2 else RST | ACK))

    in_threads(lambda: connect(0), lambda: connect(rounds))
    hops = check_sums(rig, marked)
    assert (hops["answered"], hops["refused"], hops["forwarded"]) == (rounds, rounds, 2 * rounds)
    records = rig.records()
    assert len({(record.client, record.client_port) for record in records}) == len(records) == 2 * rounds
    assert rig.event(Event.RECORD_SENT) == 2 * rounds


def test_cpus_fight_for_slots(narrow: Rig) -> None:
    """New handshakes, translations, answers and the sweep fight on two CPUs for 8 slots: the sums still hold."""
    marked = serve(narrow)
    until = time.monotonic() + 1.2

    def connect(first: int) -> None:
        number = first
        while time.monotonic() < until:
            recent = [flow(number + ahead) for ahead in range(6)]
            number += 6
            for each in recent:
                narrow.into(each.syn(), repeat=3)
            for each in recent:
                narrow.out(each.translated(), repeat=3)
            for each in recent:
                narrow.out(each.answer(), repeat=2)

    def sweep() -> None:
        while time.monotonic() < until:
            narrow.run("lbh_sweep", bytes(14), repeat=3000)

    in_threads(lambda: connect(0), lambda: connect(1 << 20), sweep)
    narrow.sweep()
    hops = check_sums(narrow, marked)
    assert hops["answered"] > 100
    events = dict(zip(Event, narrow.tables.events(), strict=True))
    verdicts = sum(narrow.vip(marked.vip_id).connections)
    told = sum(events[event] for event in list(Event)[: Event.RECORD_NO_VERDICT + 1])
    assert told == verdicts
    assert {record.verdict for record in narrow.records()} <= set(Verdict)
