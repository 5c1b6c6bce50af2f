"""Traffic that is meant to hurt: floods, equal ISNs, guesses, scans, storms. Counts stay exact and memory bounded."""

from __future__ import annotations

import random
import struct
from collections import Counter
from typing import TYPE_CHECKING, NamedTuple

import pytest

from otel_lb_hop.config import RECORD_RATE
from otel_lb_hop.core.layout import Event, OriginCode, Settings, Verdict
from otel_lb_hop.kernel.bpf import run_program
from otel_lb_hop.model import Transport, is_ipv4
from tests.kernel.ctnetlink import Tuple, message
from tests.kernel.oracle import ACK, RST, SYN
from tests.kernel.packets import End, Flow, ethernet, next_isn
from tests.kernel.requirements import needs_kernel
from tests.kernel.rig import EVERYTHING, FIRST_RETRANSMIT_NS, WAYS, vip_port
from tests.kernel.test_conntrack_messages import totals
from tests.kernel.test_datagrams import packet, udp

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.kernel.rig import Marked, Rig

pytestmark = [pytest.mark.root, needs_kernel]

FLOOD = 200_000
HANDSHAKES = 4_096 * WAYS
"""What the handshake table of an agent holds."""
DATAGRAM_FLOWS = 8_192
SECOND = 10**9
RATED = Settings(0, 0, SECOND // int(RECORD_RATE.default), SECOND)
"""The record rate of an agent; verdicts are due at the next sweep."""
SEEN, FORWARDED = 2, 3


class Family(NamedTuple):
    """The ends of connections of one address family."""

    client: str
    vip: str
    backend: str

    def flow(self, isn: int | None = None, port: int = 40_000) -> Flow:
        """Begin a connection of the client, translated as with policy Local: the client stays the source."""
        client = End.of(self.client, port)
        return Flow(
            client, End.of(self.vip, 80), client, End.of(self.backend, 8080), next_isn() if isn is None else isn
        )


FAMILIES = {
    "v4": Family("8.0.1.5", "8.0.10.1", "8.0.4.7"),
    "v6": Family("fd00:1::5", "fd00:10::1", "fd00:4::7"),
}


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> Family:
    """Take a test through both families."""
    return FAMILIES[request.param]


def serve(rig: Rig, family: Family) -> Marked:
    """Give the node one VIP port with one backend elsewhere."""
    flow = family.flow()
    (marked,) = rig.serve(vip_port(flow.vip, (flow.backend, "node2")))
    return marked


class Template:
    """A packet that is sent over and over with another source, and with another ISN if it is told."""

    def __init__(self, rig: Rig, program: str, frame: bytes, interface: int) -> None:
        self._frame = bytearray(frame)
        self._fd = rig.loaded.programs[program]
        self._context = struct.pack("=40xI", interface)
        header = 14 + (20 if frame[12:14] == b"\x08\x00" else 40)
        self._transport = header
        self._source = header - 8 if header == 34 else header - 20  # the last four bytes of the source address
        self._destination = header - 4

    def send(self, source: int, port: int, isn: int) -> None:
        """Send it from a source: the last 32 bits of the address, and a port."""
        struct.pack_into("!I", self._frame, self._source, source)
        struct.pack_into("!H", self._frame, self._transport, port)
        struct.pack_into("!I", self._frame, self._transport + 4, isn)
        run_program(self._fd, bytes(self._frame), 1, self._context)

    def send_back(self, destination: int, port: int, isn: int) -> None:
        """Send it as an answer to a source of `send`, to its SYN with this ISN."""
        struct.pack_into("!I", self._frame, self._destination, destination)
        struct.pack_into("!H", self._frame, self._transport + 2, port)
        struct.pack_into("!I", self._frame, self._transport + 8, isn + 1 & 0xFFFFFFFF)
        run_program(self._fd, bytes(self._frame), 1, self._context)


def sources(count: int, seed: int = 7) -> Iterator[tuple[int, int, int]]:
    """Make up (address, port, ISN) for a flood; no two have the same address."""
    draw = random.Random(seed)
    for number in range(count):
        bits = draw.getrandbits(48)
        yield number * 2_654_435_761 & 0xFFFFFFFF, bits & 0xFFFF, bits >> 16


def states(rig: Rig) -> Counter[int]:
    """Count the slots of the whole table by state."""
    found: Counter[int] = Counter()
    for key in rig._buckets:
        raw = rig.tags.get(key)
        assert raw is not None
        found.update(tag >> 29 & 7 for (tag,) in struct.iter_unpack("=Q", raw))
    return found


def told(rig: Rig) -> dict[Event, int]:
    """Read what became of the records; a connection with a verdict is in exactly one of these."""
    events = rig.tables.events()
    return {event: events[event] for event in list(Event)[: Event.RECORD_OFF + 1] if events[event]}


def test_syn_flood(default: Rig, family: Family) -> None:
    """Of 200,000 SYNs that nobody answers each is counted; the table keeps what it holds and counts what it gave up."""
    marked = serve(default, family)
    default.tables.set_settings(RATED)
    template = Template(default, "lbh_ingress", family.flow().syn(), default.uplink)
    for each in sources(FLOOD):
        template.send(*each)
    vip = default.vip(marked.vip_id)
    assert vip == ((0, FLOOD), ((0, 0, 0), (FLOOD - HANDSHAKES, 0, 0)), 0)
    assert told(default) == {Event.RECORD_NO_VERDICT: FLOOD - HANDSHAKES}
    assert states(default) == {SEEN: HANDSHAKES}
    default.sweep()
    assert default.vip(marked.vip_id) == ((0, FLOOD), ((0, 0, 0), (FLOOD, 0, 0)), 0)
    assert sum(told(default).values()) == FLOOD
    records = default.records()
    assert len(records) == told(default)[Event.RECORD_SENT]
    # The rate lets those that failed run two seconds ahead; the ring of 64 pages holds a little more.
    assert 2_000 < len(records) <= 2_047
    assert {record.verdict for record in records} == {Verdict.DROPPED}


def learn_buckets(rig: Rig, template: Template, isns: list[int]) -> dict[int, int]:
    """Find out in which bucket each ISN lies, by looking where its SYN is put."""
    found: dict[int, int] = {}
    while len(found) < len(isns):
        rig.forget()
        for isn in (each for each in isns if each not in found):
            template.send(1, 1, isn)
        for bucket, key in enumerate(rig._buckets):
            raw = rig.tags.get(key)
            assert raw is not None
            found |= {tag >> 32: bucket for (tag,) in struct.iter_unpack("=Q", raw) if tag}
    return found


def test_evictions_are_exact(rig: Rig, family: Family) -> None:
    """200,000 connections, of which half are never answered: the table gives up as many as a model of its buckets."""
    serve(rig, family)
    flow = family.flow()
    syn = Template(rig, "lbh_ingress", flow.syn(), rig.uplink)
    translated = Template(rig, "lbh_egress", flow.translated(), rig.pod)
    answer = Template(rig, "lbh_egress", flow.answer(), rig.uplink)
    draw = random.Random(11)
    buckets = learn_buckets(rig, syn, [draw.getrandbits(32) | 1 for _ in range(1_000)])
    isns = list(buckets)
    rig.reset(RATED._replace(verdict_after_ns=3_600 * SECOND))
    marked = serve(rig, family)
    is_open: Counter[int] = Counter()
    evicted = forwarded = answered = 0
    for number, (address, port, _) in enumerate(sources(FLOOD)):
        isn = draw.choice(isns)
        bucket = buckets[isn]
        syn.send(address, port, isn)
        if is_open[bucket] == WAYS:
            evicted += 1
        else:
            is_open[bucket] += 1  # in the place of what is free or has its verdict
        if number % 4 == 0:
            continue
        translated.send(address, port, isn)
        forwarded += 1
        if number % 2:
            answer.send_back(address, port, isn)
            is_open[bucket] -= 1
            answered += 1
    snapshot = rig.snapshot()
    row = snapshot.hops[marked.hops["required", "node2"]]
    unforwarded = sum(snapshot.vips[marked.vip_id].unforwarded[OriginCode.EXTERNAL])
    found = states(rig)
    assert snapshot.vips[marked.vip_id].connections == (0, FLOOD)
    assert (sum(row.forwarded), row.answered) == (forwarded, answered) == (FLOOD * 3 // 4, FLOOD // 2)
    assert unforwarded + row.evicted == snapshot.events[Event.RECORD_NO_VERDICT] == evicted
    assert unforwarded == FLOOD // 4 - found[SEEN]
    assert row.evicted == FLOOD // 4 - found[FORWARDED]
    assert found[SEEN] + found[FORWARDED] == sum(is_open.values())
    assert sum(told(rig).values()) == answered + evicted
    assert evicted > FLOOD // 3
    rig.tables.set_settings(RATED)
    rig.age(FIRST_RETRANSMIT_NS)
    rig.sweep()
    row = rig.hop(marked.hops["required", "node2"])
    assert rig.vip(marked.vip_id).unforwarded[OriginCode.EXTERNAL] == (FLOOD // 4, 0, 0)
    assert row.evicted + row.reply_unseen == FLOOD // 4
    assert sum(told(rig).values()) == FLOOD


def test_one_isn_pushes_out_itself(narrow: Rig, family: Family) -> None:
    """A flood of 10,000 clients with one ISN, into a full bucket of others: it takes one place and no more."""
    marked = serve(narrow, family)
    others = [family.flow(port=41_000 + number) for number in range(WAYS)]
    for each in others:
        narrow.into(each.syn())
        narrow.out(each.translated())
    template = Template(narrow, "lbh_ingress", family.flow().syn(), narrow.uplink)
    isn = next_isn()
    for address, port, _ in sources(10_000):
        template.send(address, port, isn)
    for each in others:
        narrow.out(each.answer())
    row = narrow.hop(marked.hops["required", "node2"])
    assert (sum(row.forwarded), row.answered, row.evicted) == (WAYS, WAYS - 1, 1)
    assert row.handshake.observations == WAYS - 1
    assert narrow.vip(marked.vip_id).unforwarded[OriginCode.EXTERNAL] == (10_000 - 1, 0, 0)
    assert narrow.event(Event.RECORD_NO_VERDICT) == 10_000


@pytest.mark.parametrize("again", ["one hook further", "sent again"])
def test_one_isn_and_a_translation_seen_twice(rig: Rig, family: Family, again: str) -> None:
    """A client's translated SYN that passes twice is not taken for that of another client with the same ISN."""
    marked = serve(rig, family)
    loud = family.flow()
    quiet = family.flow(loud.isn, port=41_000)
    rig.into(quiet.syn())
    rig.into(loud.syn())
    rig.out(loud.translated(), rig.peer)
    assert rig.event(Event.ISN_SHARED) == 1
    if again == "sent again":
        rig.into(loud.syn())
    rig.out(loud.translated())
    hop_id = marked.hops["required", "node2"]
    assert sum(rig.hop(hop_id).forwarded) == 1
    rig.out(loud.answer())
    rig.age(FIRST_RETRANSMIT_NS)
    rig.sweep()
    assert [(record.client_port, record.verdict) for record in rig.records()] == [
        (loud.client.port, Verdict.ANSWERED),
        (quiet.client.port, Verdict.DROPPED),
    ]
    assert rig.event(Event.ISN_SHARED) == 1
    assert rig.event(Event.LATE) == 0


def test_equal_isns_at_once(rig: Rig, family: Family) -> None:
    """Clients with one ISN whose SYNs pass one after the other, as they do: each gets its own verdict and backend."""
    marked = serve(rig, family)
    isn = next_isn()
    flows = [family.flow(isn, port=41_000 + number) for number in range(WAYS)]
    for each in flows:
        rig.into(each.syn())
        rig.out(each.translated())
    for number, each in enumerate(flows):
        rig.out(each.refusal() if number % 2 else each.answer())
    row = rig.hop(marked.hops["required", "node2"])
    assert row[:6] == ((0, 8), 4, 4, 0, 0, 0)
    assert [(record.client_port, record.snat_port) for record in rig.records()] == [(41_000 + n,) * 2 for n in range(8)]
    assert rig.event(Event.ISN_SHARED) == 0


@pytest.mark.parametrize("flags", [SYN | ACK, RST | ACK])
def test_guesses_from_outside(rig: Rig, family: Family, flags: int) -> None:
    """What comes in as the VIP's answer ends nobody's handshake, not even with the right number; what leaves does."""
    marked = serve(rig, family)
    flow = family.flow()
    rig.into(flow.syn())
    rig.out(flow.translated())
    for interface in (rig.uplink, rig.pod):
        guess = Template(rig, "lbh_ingress", flow.answer(flags), interface)
        for distance in range(-5_000, 5_000):
            guess.send_back(int.from_bytes(flow.client.address[12:], "big"), 40_000, flow.isn + distance & 0xFFFFFFFF)
    row = rig.hop(marked.hops["required", "node2"])
    assert row[:6] == ((0, 1), 0, 0, 0, 0, 0)
    assert rig.records() == []
    rig.out(flow.answer(flags))
    (record,) = rig.records()
    assert record.verdict == (Verdict.REFUSED if flags & RST else Verdict.ANSWERED)
    assert not any(rig.tables.events()[Event.RECORD_RATIO :])


def test_copied_syns(rig: Rig, family: Family) -> None:
    """A SYN with the ends and the ISN of a connection, forged before or after its verdict, is none of its own."""
    marked = serve(rig, family)
    flow = family.flow()
    rig.into(flow.syn())
    for _ in range(3):
        rig.into(flow.syn())
    rig.out(flow.translated())
    rig.out(flow.answer())
    for _ in range(20):
        rig.into(flow.syn())
    assert rig.vip(marked.vip_id) == ((0, 1), ((0, 0, 0), (0, 0, 0)), 23)
    (record,) = rig.records()
    assert (record.verdict, record.retransmits) == (Verdict.ANSWERED, 3)


def test_borrowed_isn(rig: Rig, family: Family) -> None:
    """A stranger's SYN with the ISN of a connection is a connection of its own, and neither changes the other."""
    marked = serve(rig, family)
    flow = family.flow()
    stranger = family.flow(flow.isn, port=666)
    rig.into(flow.syn())
    rig.out(flow.translated())
    rig.into(stranger.syn())
    rig.out(stranger.refusal())
    rig.out(flow.answer())
    assert [(each.client_port, each.verdict) for each in rig.records()] == [
        (666, Verdict.DROPPED),
        (40_000, Verdict.ANSWERED),
    ]
    assert rig.vip(marked.vip_id).connections == (0, 2)


@pytest.mark.parametrize("length", [1, 5])
def test_data_that_reach_for_another_answer(rig: Rig, family: Family, length: int) -> None:
    """A SYN whose data end where another client's SYN begins does not take that one's answer away."""
    marked = serve(rig, family)
    flow = family.flow()
    stranger = family.flow(flow.isn - length & 0xFFFFFFFF)
    stranger = stranger._replace(client=End(flow.client.address[:-1] + b"\x4d", flow.client.port))
    rig.into(flow.syn())
    rig.out(flow.translated())
    rig.into(stranger.syn(data=b"x" * length))
    rig.out(flow.answer(), rig.uplink)
    assert rig.hop(marked.hops["required", "node2"]).answered == 1


def test_a_clock_that_is_ahead(rig: Rig, family: Family) -> None:
    """A SYN that another CPU stamped a moment later than this one translates it took no time at all."""
    marked = serve(rig, family)
    flow = family.flow()
    rig.into(flow.syn())
    rig.age(-SECOND)
    rig.out(flow.translated())
    forward = rig.hop(marked.hops["required", "node2"]).forward
    assert (forward.sum_ns, forward.buckets[0]) == (0, 1)


def test_scan(rig: Rig, family: Family) -> None:
    """Of a SYN to each of the 65,536 ports of a VIP only the one to the VIP port counts; no other leaves a trace."""
    marked = serve(rig, family)
    rig.tables.set_settings(EVERYTHING._replace(verdict_after_ns=3_600 * SECOND))
    flow = family.flow()
    for port in range(65_536):
        frame = flow._replace(vip=flow.vip._replace(port=port), isn=port).syn()
        run_program(rig.loaded.programs["lbh_ingress"], frame, 1, struct.pack("=40xI", rig.uplink))
    assert rig.vip(marked.vip_id) == ((0, 1), ((0, 0, 0), (0, 0, 0)), 0)
    assert sum(states(rig)[state] for state in (SEEN, FORWARDED)) == 1
    assert not any(rig.tables.events())


@pytest.mark.parametrize("copies", [1, 65_535, 65_536, FLOOD])
def test_storm(rig: Rig, family: Family, copies: int) -> None:
    """The same SYN again and again is one connection that was never answered; a record tells 65,535 copies at most."""
    marked = serve(rig, family)
    flow = family.flow()
    rig.into(flow.syn())
    rig.out(flow.translated())
    rig.into(flow.syn(), repeat=copies)
    rig.out(flow.translated(), repeat=copies)
    assert rig.vip(marked.vip_id) == ((0, 1), ((0, 0, 0), (0, 0, 0)), copies)
    rig.age(FIRST_RETRANSMIT_NS)
    rig.sweep()
    (record,) = rig.records()
    assert (record.verdict, record.retransmits) == (Verdict.TIMEOUT, min(copies, 65_535))
    assert rig.hop(marked.hops["required", "node2"])[:6] == ((0, 1), 0, 0, 1, 0, 0)


def test_storm_on_two_interfaces(rig: Rig, family: Family) -> None:
    """A storm that comes in by two interfaces at once is counted on the one that had the first SYN."""
    marked = serve(rig, family)
    flow = family.flow()
    for _ in range(50):
        rig.into(flow.syn(), repeat=100)
        rig.into(flow.syn(), rig.peer, repeat=100)
    assert rig.vip(marked.vip_id) == ((0, 1), ((0, 0, 0), (0, 0, 0)), 4_999)
    assert sum(states(rig)[state] for state in (SEEN, FORWARDED)) == 1


def test_vip_as_source(rig: Rig, family: Family) -> None:
    """A SYN that claims to come from the VIP is a connection like any other, and comes from where it came in.

    With the VIP port as both ends (a LAND packet) it is translated and answered too, if the node does that.
    """
    marked = serve(rig, family)
    for number, port in enumerate((80, 81, 12_345), start=1):
        flow = family.flow()
        flow = flow._replace(client=flow.vip._replace(port=port), snat=flow.vip._replace(port=port))
        rig.into(flow.syn())
        rig.out(flow.syn())  # sent on as it came: not translated
        assert sum(rig.hop(marked.hops["required", "node2"]).forwarded) == number - 1
        rig.out(flow.translated())
        rig.into(flow.answer())
        assert rig.hop(marked.hops["required", "node2"]).answered == number - 1
        rig.out(flow.answer())
        (record,) = rig.records()
        assert (record.verdict, record.origin, record.client) == (Verdict.ANSWERED, 1, flow.vip.address)
    rig.into(flow._replace(vip=flow.backend).syn())
    assert rig.vip(marked.vip_id) == ((0, 3), ((0, 0, 0), (0, 0, 0)), 0)
    assert told(rig) == {Event.RECORD_SENT: 3}


def test_datagram_flood(default: Rig, family: Family) -> None:
    """Of 200,000 datagrams to a VIP port without endpoints, each from a client of its own, each is a flow.

    What is remembered of them is bounded.
    """
    flow = family.flow()
    default.serve(vip_port(flow.vip, transport=Transport.UDP))
    default.tables.set_settings(RATED)
    frame = ethernet(packet(flow.client, flow.vip))
    fd, context = default.loaded.programs["lbh_datagram"], struct.pack("=40xI", default.uplink)
    transport = len(frame) - len(udp(1, 80))
    source = transport - (8 if is_ipv4(flow.vip.address) else 20)
    changed = bytearray(frame)
    for address, port, _ in sources(FLOOD):
        struct.pack_into("!I", changed, source, address)
        struct.pack_into("!H", changed, transport, port)
        run_program(fd, bytes(changed), 1, context)
    assert totals(default) == (FLOOD, 0, FLOOD)
    assert DATAGRAM_FLOWS // 2 < len(list(default.flows.keys())) <= DATAGRAM_FLOWS
    assert sum(told(default).values()) == FLOOD
    assert len(default.records()) == told(default)[Event.RECORD_SENT]
    assert {*told(default)} <= {Event.RECORD_SENT, Event.RECORD_RATE, Event.RECORD_RING_FULL}


def test_flood_of_new_conntrack_entries(rig: Rig, family: Family) -> None:
    """Each of 200,000 translated datagram flows that conntrack tells of is counted; nothing of them is kept."""
    flow = family.flow()
    rig.serve(vip_port(flow.vip, (flow.backend, "node2"), transport=Transport.UDP))
    rig.tables.set_settings(RATED)
    snat = End(flow.backend.address[:15] + b"\1", 61_000)
    template = bytes(14) + message(Tuple(flow.client, flow.vip), Tuple(flow.backend, snat))
    address = flow.client.address[12 if is_ipv4(flow.client.address) else 0 :]
    place = template.index(address) + len(address) - 4
    port_place = template.index(struct.pack("!H", flow.client.port), place)
    changed = bytearray(template)
    fd = rig.loaded.programs["lbh_conntrack"]
    for each, port, _ in sources(FLOOD):
        struct.pack_into("!I", changed, place, each)
        struct.pack_into("!H", changed, port_place, port)
        run_program(fd, bytes(changed))
    assert totals(rig) == (FLOOD, FLOOD, 0)
    assert list(rig.flows.keys()) == []
    assert sum(told(rig).values()) == FLOOD
    assert len(rig.records()) == told(rig)[Event.RECORD_SENT]
    assert not any(rig.tables.events()[Event.TRUNCATED :])
