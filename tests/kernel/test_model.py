"""Any order of packets: the kernel counts what the model counts."""

from __future__ import annotations

import random
import time
from collections import Counter
from typing import TYPE_CHECKING

import pytest

from otel_lb_hop.core.layout import Event, Unforwarded
from otel_lb_hop.model import Policy
from tests.kernel.oracle import Model, parse
from tests.kernel.packets import End, Flow, next_isn
from tests.kernel.requirements import needs_kernel
from tests.kernel.rig import FIRST_RETRANSMIT_NS, NODE, counts_of, vip_port

if TYPE_CHECKING:
    from tests.kernel.rig import Rig

pytestmark = [pytest.mark.root, needs_kernel]

NEAR, FAR, STRANGER = (End.of(f"8.0.{number}.7", 8080) for number in (3, 4, 5))
VIPS = [End.of("8.0.10.1", 80), End.of("8.0.10.1", 81)]
CLIENTS = [End.of("8.0.1.5", 40_000), End.of("8.0.1.6", 40_000)]
SEQUENCES, STEPS = 120, 40


class Both:
    """A node and its model: one VIP port has backends near and far, the other, of policy Local, has none here."""

    def __init__(self, rig: Rig) -> None:
        self.rig = rig
        marked = rig.serve(
            vip_port(VIPS[0], (NEAR, NODE), (FAR, "node2")), vip_port(VIPS[1], (FAR, "node2"), policy=Policy.LOCAL)
        )
        reasons = (Unforwarded.DROPPED, Unforwarded.NO_LOCAL_ENDPOINTS)
        backends = {
            (marked[0].vip_id, *NEAR): marked[0].hops["none", NODE],
            (marked[0].vip_id, *FAR): marked[0].hops["avoidable", "node2"],
            (marked[1].vip_id, *FAR): marked[1].hops["required", "node2"],
        }
        ids = [each.vip_id for each in marked]
        self.model = Model(
            dict(zip(VIPS, zip(ids, reasons, strict=True), strict=True)), backends, frozenset({rig.uplink})
        )
        self.told: Counter[tuple[int, int]] = Counter()

    def into(self, packet: bytes, interface: int, *, xdp: bool = False) -> None:
        """Let a packet into both."""
        now = time.monotonic_ns()
        self.rig.xdp = xdp
        self.rig.into(packet, interface)
        self.model.incoming(parse(packet, ethernet=True), interface, now, xdp=xdp)

    def out(self, packet: bytes) -> None:
        """Let a packet out of both."""
        self.rig.out(packet)
        self.model.outgoing(parse(packet, ethernet=True))

    def sweep(self, *, early: bool) -> None:
        """Give the verdicts in both, early or after a client would have sent its SYN again."""
        if not early:
            self.rig.age(FIRST_RETRANSMIT_NS)
            self.model.age(FIRST_RETRANSMIT_NS)
        self.rig.sweep()
        self.model.sweep(early=early)

    def compare(self) -> None:
        """Hold every counter and the records against each other."""
        snapshot, model = self.rig.snapshot(), self.model
        records = self.rig.records()
        self.told.update((record.verdict, record.retransmits) for record in records)
        assert self.told == Counter((int(verdict), again) for _, verdict, again in model.told)
        assert all(record.syn_ns <= record.end_ns for record in records)
        assert all(record.syn_ns <= record.forward_ns <= record.end_ns for record in records if record.forward_ns)
        model.events[Event.RECORD_SENT] = len(model.told)
        assert counts_of(snapshot) == model.counts()


def step(both: Both, draw: random.Random, isns: list[int]) -> None:
    """Let one packet pass, or the sweep."""
    rig = both.rig
    backend = draw.choice((NEAR, FAR, FAR, STRANGER))
    ends = draw.choice(CLIENTS), draw.choice(VIPS), End.of("8.0.2.1", draw.randrange(1024, 1030)), backend
    flow = Flow(*ends, draw.choice(isns))
    action = draw.random()
    if action < 0.4:
        both.into(flow.syn(), draw.choice((rig.uplink, rig.uplink, rig.peer, rig.pod)), xdp=draw.random() < 0.5)
    elif action < 0.6:
        both.out(flow.translated())
    elif action < 0.65:
        both.out(flow.syn())
    elif action < 0.8:
        both.out(flow.answer())
    elif action < 0.88:
        both.out(flow.refusal())
    elif action < 0.92:
        both.sweep(early=True)
    else:
        both.into(draw.choice((flow.answer(), flow.refusal(), flow.translated())), rig.uplink)


def test_any_order_of_packets(rig: Rig) -> None:
    """Few clients, few VIP ports and few ISNs, so that everything meets everything: all counters are the model's."""
    seed = random.SystemRandom().getrandbits(32)
    draw = random.Random(seed)
    both = Both(rig)
    for number in range(SEQUENCES):
        isns = [next_isn() for _ in range(2)]  # all their connections fit into one bucket
        for _ in range(STEPS):
            step(both, draw, isns)
        both.sweep(early=False)
        try:
            both.compare()
        except AssertionError as error:
            raise AssertionError(f"seed {seed}, sequence {number}") from error
        rig.forget()  # a full bucket would forget what the model remembers
    assert set(both.model.events) >= {Event.LATE, Event.ISN_SHARED}
    assert len({verdict for _, verdict, _ in both.model.told}) == 6


def test_routed_on_late_is_not_late(rig: Rig) -> None:
    """A SYN that is routed on to the VIP as it came, after the verdict, was not translated late."""
    both = Both(rig)
    flow = Flow(CLIENTS[0], VIPS[0], End.of("8.0.2.1", 5), FAR, next_isn())
    rig.into(flow.syn())
    rig.sweep()
    rig.out(flow.syn())
    assert both.rig.event(Event.LATE) == 0


def test_routed_on_takes_none(rig: Rig) -> None:
    """A SYN that is routed on to the VIP as it came takes neither of two connections with one ISN."""
    both = Both(rig)
    flow = Flow(CLIENTS[0], VIPS[0], End.of("8.0.2.1", 5), FAR, next_isn())
    for client in CLIENTS:
        rig.into(flow._replace(client=client).syn())
    rig.out(flow.syn())
    assert both.rig.event(Event.ISN_SHARED) == 0


def test_routed_on_beside_a_shared_isn(rig: Rig) -> None:
    """A SYN that is routed on to its VIP as it came is not taken for another client's translation to that VIP."""
    both = Both(rig)
    older = Flow(CLIENTS[0], VIPS[0], End.of("8.0.2.1", 5), FAR, next_isn())
    younger = older._replace(client=CLIENTS[1], vip=VIPS[1])
    rig.into(older.syn())
    rig.into(younger.syn())
    rig.out(older.syn())
    assert not any(any(row.forwarded) for row in both.rig.snapshot().hops.values())
