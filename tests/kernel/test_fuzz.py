"""Random packets, a hundred thousand on every run: the programs against the oracle (`make fuzz` runs millions)."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import pytest

from otel_lb_hop.core.layout import Event
from tests.kernel.fuzz.grammar import VIPS
from tests.kernel.fuzz.referee import Fuzzer, Referee, classes_to_meet, explain, referee
from tests.kernel.requirements import needs_kernel

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [pytest.mark.root, needs_kernel]

INPUTS = 110_000


@pytest.fixture(scope="module")
def judge() -> Iterator[Referee]:
    """Load the programs with a table that a batch does not fill."""
    with referee() as made:
        yield made


def test_random_packets(judge: Referee) -> None:
    """No packet is counted otherwise than the oracle says, and every class of packets was among them."""
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
    assert left.last.program.startswith("lbh_ingress")
    assert len(left.last.packet) <= 14 + 20 + 20 + 40
    (entry,) = shortest.entries[0]
    assert entry.vip == unknown
    assert left.last.packet.hex() in explain(shortest)
