"""Random packets, a hundred thousand on every run: the programs against the oracle (`make fuzz` runs millions)."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import pytest

from otel_lb_hop.core.layout import Event
from otel_lb_hop.model import is_ipv4, pack_address
from tests.kernel.fuzz.grammar import VIPS, Grammar
from tests.kernel.fuzz.referee import Fuzzer, Referee, classes_to_meet, explain, referee, told_of
from tests.kernel.oracle import Segment
from tests.kernel.requirements import needs_kernel

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [pytest.mark.root, needs_kernel]

INPUTS = 60_000
"""For each of the two ways in which the programs are compiled."""
COMPARED = 1_500


@pytest.fixture(scope="module")
def judge() -> Iterator[Referee]:
    """Load the programs with a table that a batch does not fill."""
    with referee() as made:
        yield made


@pytest.mark.parametrize("guarded", [False, True], ids=["plain", "guarded"])
def test_random_packets(guarded: bool) -> None:  # noqa: FBT001 - a parameter of the test
    """No packet is counted otherwise than the oracle says, and every class of packets was among them."""
    with referee(guarded=guarded) as judge:
        compare_random_packets(judge)


def compare_random_packets(judge: Referee) -> None:
    """Hold many against the oracle."""
    seed = str(random.SystemRandom().getrandbits(32))
    fuzzer = Fuzzer(judge, seed)
    found = fuzzer.run(INPUTS)
    assert found is None, f"seed {seed}\n{explain(judge.shrink(found))}"
    assert fuzzer.classes.total() == INPUTS
    missed = classes_to_meet() - fuzzer.classes.keys()
    assert not missed, f"seed {seed}: {sorted(missed)}"
    assert effects_of(judge) == EFFECTS


def effects_of(judge: Referee) -> set[object]:
    """Name what was counted at least once, without the ids of rows."""
    named: set[object] = set()
    for effect in judge.effects:
        if isinstance(effect, tuple):
            name, key = effect
            named.add((name, *(str(part) for part in key[1:])) if isinstance(key, tuple) else name)
        else:
            named.add(effect)
    return named


EFFECTS = {
    Event.TRUNCATED, Event.FRAGMENT, Event.EXTENSION, Event.RECORD_OFF,
    ("connections", "0"), ("connections", "1"), ("forwarded", "0"), ("forwarded", "1"), ("verdict", "0"),
    ("verdict", "1"), "retransmits", "forward duration", "handshake duration",
    *(("unforwarded", *key) for key in ("00", "01", "10", "11", "12")),
}  # fmt: skip
"""Origins are internal (0) and external, verdicts answered (0) and refused, reasons in the order of `Unforwarded`."""


def test_a_difference_is_found_and_shrunk(judge: Referee, monkeypatch: pytest.MonkeyPatch) -> None:
    """An oracle that does not know one of the VIP ports differs, and the shortest difference is one SYN to it."""
    (unknown,) = (key for key in judge._vips if key == VIPS[4])
    monkeypatch.delitem(judge._vips, unknown)
    found = Fuzzer(judge, "1").run(5_000)
    assert found is not None
    assert len(found.inputs) > 1
    shortest = judge.shrink(found)
    (left,) = shortest.inputs
    assert left.before == ()
    assert left.last.program in {"lbh_ingress", "lbh_ingress_l3", "lbh_xdp"}
    assert len(left.last.packet) <= 14 + 20 + 20 + 40
    (entry,) = shortest.entries[0]
    assert entry.vip == unknown
    assert left.last.packet.hex() in explain(shortest)


def test_a_second_opinion_of_the_oracle(judge: Referee) -> None:
    """Another library, with its own ideas of headers, reads the same in what the oracle takes for a handshake."""
    import warnings  # noqa: PLC0415

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from scapy.layers import inet, inet6, ipsec, l2  # noqa: F401, PLC0415
        from scapy.packet import Padding  # noqa: PLC0415

    grammar = Grammar(random.Random("second opinion"), judge.rig)
    compared = without = 0
    while compared < COMPARED:
        step = grammar.input().last
        if step.program.startswith("lbh_datagram"):
            continue
        told = told_of(step)
        if not (isinstance(told, Segment) and told.whole):
            continue
        outermost = l2.Ether if not step.program.endswith("_l3") else inet.IP if is_ipv4(told.source) else inet6.IPv6
        packet = outermost(step.packet)
        network = packet[inet.IP if is_ipv4(told.source) else inet6.IPv6]
        segment = packet.getlayer(inet.TCP)
        # Of a routing header it takes only whole addresses, though its length may be another (RFC 8200, 4.4).
        if segment is None or inet6.IPv6ExtHdrRouting in packet:
            without += 1
            continue
        assert (pack_address(network.src), segment.sport) == (told.source, told.source_port), step.packet.hex()
        assert (pack_address(network.dst), segment.dport) == (told.destination, told.destination_port)
        assert (segment.seq, segment.ack, int(segment.flags) & 255) == (told.sequence, told.acknowledgment, told.flags)
        padding = len(packet[Padding]) if Padding in packet else 0
        assert not told.data or len(segment.payload) - padding == told.data, step.packet.hex()
        compared += 1
    assert without < COMPARED // 4
