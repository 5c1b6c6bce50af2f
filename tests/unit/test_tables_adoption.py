"""Counters that outlive their agent: whenever it is killed, the next one finds every count once, under its name."""

from __future__ import annotations

import struct
from collections import Counter
from itertools import count
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from otel_lb_hop.core.layout import (
    BACKEND_KEY,
    HOP_STATS_WORDS,
    VIP_VALUE,
    unpack_hop_stats,
    unpack_vip_stats,
)
from otel_lb_hop.core.ledger import Rows, count_rows
from otel_lb_hop.core.pinned import pack_name, unpack_name
from otel_lb_hop.core.topology import KEEP_RETIRED_NS, HopGone, HopRow, Name, VipRow
from otel_lb_hop.model import Cluster, Hop, Transport
from tests.unit.fake_kernel import Kernel, Killed, ids, number_key
from tests.unit.samples import CLUSTERS, LOCAL, REMOTE, SECOND, backend, cluster, vip_port

if TYPE_CHECKING:
    from collections.abc import Callable
    from random import Random


SECOND_REMOTE = backend("10.100.3.2", "node3")
MADE = 11
"""When the rows were made."""
GONE = 20
"""When their Services went."""
LATER = 30
WEB, SHOP = vip_port(LOCAL, REMOTE, SECOND_REMOTE), vip_port(LOCAL, port=81, name="default/shop")
WEB_ALONE = cluster(vip_port(LOCAL))
"""Web, whose backends on other nodes have gone, without the shop."""


def served() -> Kernel:
    """Give a kernel that has counted 66 connections to web (of 77) and 6 to the shop (of 8); some have a verdict.

    Web is row 1, its hops 1 (unknown), 2 (this node), 3 (node2) and 4 (node3); the shop is row 5, its hops 5 and 6.
    """
    kernel = Kernel()
    kernel.take(cluster(WEB, SHOP), MADE)
    assert kernel.rows == ({1, 5}, {1, 2, 3, 4, 5, 6})
    kernel.count_in_vip(1, 7, 70, 4)  # 77 connections, 4 of them never forwarded
    kernel.count_in_vip(5, 0, 8, 0, 0, 0, 1)  # 8, 1 never forwarded
    for hop_id, words in {
        1: (1, 0, 1),
        2: (2, 3, 5),
        3: (4, 6, 7, 2),
        4: (10, 40, 30, 20),
        5: (1,),
        6: (0, 5, 5),
    }.items():
        kernel.count_in_hop(hop_id, *words)
    return kernel


ALL = Rows(connections=77 + 8, verdicts=4 + 1 + 1 + 5 + 9 + 50 + 5)
OF_SHOP = Rows(8, 1 + 5)
FORWARDED = {("web", Hop.UNKNOWN): 1, ("web", Hop.NONE): 5, ("web", Hop.AVOIDABLE): 60}
REFUSED = {("web", Hop.AVOIDABLE): 22}


def books(kernel: Kernel) -> Rows:
    """Add up what rows hold, and what those that went had held."""
    vips = map(unpack_vip_stats, kernel.vip_stats.entries.values())
    hops = map(unpack_hop_stats, kernel.hop_stats.entries.values())
    return count_rows(vips, hops).plus(kernel.tables.forgotten)


def named(kernel: Kernel) -> dict[int, Name]:
    """Read the names that the kernel holds."""
    return {number: unpack_name(kernel.names.entries[number_key(number)]) for number in ids(kernel.names)}


def by_class(kernel: Kernel) -> tuple[dict[tuple[str, Hop], int], dict[tuple[str, Hop], int]]:
    """Sum up forwarded and refused connections by Service and hop class, as the names in the kernel say."""
    names = named(kernel)
    forwarded: Counter[tuple[str, Hop]] = Counter()
    refused: Counter[tuple[str, Hop]] = Counter()
    for key, raw in kernel.hop_stats.entries.items():
        identity = names[int.from_bytes(key, "little")].identity
        hop = Hop.UNKNOWN
        if isinstance(identity, HopRow):
            hop = identity.hop
            identity = names[identity.vip_id].identity
        assert isinstance(identity, VipRow)
        stats = unpack_hop_stats(raw)
        forwarded[identity.service, hop] += sum(stats.forwarded)
        refused[identity.service, hop] += stats.refused
    return +forwarded, +refused


def let_go(kernel: Kernel, now_ns: int = GONE) -> None:
    """Let web lose its other nodes and the shop go, rows stay for now."""
    kernel.take(WEB_ALONE, now_ns)
    kernel.topology.forget_endpoints(now_ns)
    kernel.write()


def killed(work: Callable[[], object], kernel: Kernel, writes: int) -> bool:
    """Do the work as an agent that is killed after so many writes, and let another begin; answers whether it was."""
    kernel.journal.writes_left = writes
    try:
        work()
    except Killed:
        return True
    finally:
        kernel.journal.writes_left = None
    return False


def check_end(kernel: Kernel) -> None:
    """Let the sources speak and what is retired be forgotten: all counts are there once, and in the right rows."""
    kernel.take(WEB_ALONE, LATER)
    kernel.tables.drop_unknown(kernel.topology.tables)
    kernel.write()
    kernel.forget(LATER, LATER)
    kernel.write()
    assert books(kernel) == ALL
    assert kernel.tables.forgotten == OF_SHOP
    assert by_class(kernel) == (FORWARDED, REFUSED)
    assert kernel.holds == kernel.wanted
    names = named(kernel)
    (remainder,) = [number for number in names if number > 6]
    assert names == {
        1: Name(VipRow("default", "web", WEB.address, 80, Transport.TCP, WEB.policy), MADE),
        2: Name(HopRow(1, Hop.NONE, "node1", None), MADE),
        remainder: Name(HopRow(1, Hop.AVOIDABLE, None, None), names[remainder].created_ns),
    }
    assert kernel.rows == ({1}, {1, 2, remainder})
    snapshot = kernel.tables.snapshot()
    assert (set(snapshot.vips), set(snapshot.hops)) == kernel.rows
    assert not kernel.topology.tables.pending


def test_counters_go_on() -> None:
    """The next agent has the same rows under the same ids, with their counts and start times, and writes nothing."""
    kernel = served()
    before = [dict(each.entries) for each in (*kernel.maps.values(), kernel.names)]
    forwarded = by_class(kernel)
    kernel.begin_anew()
    kernel.journal.lines.clear()
    kernel.adopt(GONE)
    kernel.topology.replace(cluster(WEB, SHOP), GONE)
    kernel.tables.drop_unknown(kernel.topology.tables)
    kernel.tables.apply(kernel.topology)
    assert set(kernel.journal.lines) == {"vip_ports put", "backends put"}  # each as it was
    assert [dict(each.entries) for each in (*kernel.maps.values(), kernel.names)] == before
    assert (books(kernel), by_class(kernel)) == (ALL, forwarded)
    assert set(kernel.topology.vips.created_ns.values()) == set(kernel.topology.hops.created_ns.values()) == {MADE}
    assert kernel.tables.usage()["hop_stats"] == (6, 33)
    assert kernel.forget(LATER, LATER) == ((), ())


def test_forgetting_moves_counts_and_loses_none() -> None:
    """Nobody is killed: what gone nodes counted is in the remainder of its class, what the shop counted in the sum."""
    kernel = served()
    let_go(kernel)
    kernel.forget(GONE, LATER)
    kernel.write()
    check_end(kernel)
    assert named(kernel)[7].created_ns == LATER


def test_killed_between_any_two_writes_while_it_forgets() -> None:
    """Whatever was begun is finished once by the next agent: before each write, and each of its own writes too."""
    kernel = served()
    let_go(kernel)
    kernel.forget(GONE, LATER)
    writes = len(kernel.journal.lines)
    # Of the shop's three rows and web's two: a journal, the row and the name; twice the remainder, once its name.
    assert writes == 5 * 3 + 2 + 1
    for first in range(writes):
        for second in count():
            kernel = served()
            let_go(kernel)
            assert killed(lambda kernel=kernel: kernel.forget(GONE, LATER), kernel, first)  # type: ignore[misc]
            kernel.begin_anew()
            again = killed(lambda kernel=kernel: kernel.adopt(LATER), kernel, second)  # type: ignore[misc]
            if again:
                kernel.begin_anew()
                kernel.adopt(LATER)
            assert books(kernel) == ALL, (first, second)
            forwarded, refused = by_class(kernel)
            assert FORWARDED.items() <= forwarded.items(), (first, second)
            assert REFUSED.items() <= refused.items(), (first, second)
            assert forwarded.keys() <= FORWARDED.keys() | {("shop", Hop.UNKNOWN), ("shop", Hop.NONE)}
            assert kernel.tables.snapshot().hops.keys() == ids(kernel.hop_stats)
            check_end(kernel)
            if not again:
                break
        assert second >= (2 if first else 0)


def test_killed_between_any_two_writes_while_it_applies() -> None:
    """Rows that are half made are finished or go; none has counts that are not its own."""
    more = cluster(WEB, vip_port(REMOTE, port=82, name="default/third"))
    whole = served()
    whole.take(more, GONE)
    for writes in range(len(whole.journal.lines)):
        kernel = served()
        assert killed(lambda kernel=kernel: kernel.take(more, GONE), kernel, writes)  # type: ignore[misc]
        kernel.begin_anew()
        kernel.adopt(GONE)
        assert books(kernel) == ALL
        kernel.take(more, GONE)
        kernel.tables.drop_unknown(kernel.topology.tables)
        kernel.write()
        assert kernel.holds == kernel.wanted
        assert books(kernel) == ALL
        assert by_class(kernel) == by_class(whole)
        kernel.forget(GONE, LATER)
        assert (books(kernel), kernel.tables.forgotten) == (ALL, OF_SHOP)
        assert ids(kernel.names) == kernel.rows[0] | kernel.rows[1]


@pytest.mark.parametrize("writes", range(1, 10))
def test_a_vip_port_that_comes_back_half_forgotten(writes: int) -> None:
    """It begins anew with all its rows: no series goes on without a part of what it had counted."""
    kernel = served()
    kernel.take(cluster(WEB), GONE)
    assert killed(lambda: kernel.forget(GONE, LATER), kernel, writes) is (writes < 9)
    kernel.begin_anew()
    kernel.adopt(LATER)
    assert books(kernel) == ALL
    kernel.take(cluster(WEB, SHOP), LATER)
    assert kernel.rows == ({1, 7}, {1, 2, 3, 4, 7, 8})
    assert kernel.topology.vips.created_ns == {1: MADE, 7: LATER}
    kernel.count_in_hop(7, 0, 9, 9)
    for _ in range(3):
        kernel.begin_anew()
        kernel.adopt(LATER)
        assert books(kernel) == Rows(ALL.connections, ALL.verdicts + 9)
        assert unpack_hop_stats(kernel.hop_stats.entries[number_key(7)]).forwarded == (0, 9)


def test_ids_are_never_used_again() -> None:
    """Not even the highest, when a lower one was forgotten after it, and nothing else names it."""
    kernel = Kernel()
    kernel.take(cluster(WEB), MADE)
    kernel.take(cluster(WEB, SHOP), MADE)
    kernel.take(cluster(SHOP), GONE)
    kernel.take(Cluster(), GONE + 1)
    kernel.forget(GONE + 1, LATER)
    assert kernel.rows == (set(), set())
    assert kernel.names.entries == {}
    for _ in range(2):
        kernel.begin_anew()
        assert kernel.tables.adopt() == ({}, 6)
    kernel.begin_anew()
    kernel.adopt(LATER)
    kernel.take(cluster(SHOP), LATER)
    assert kernel.rows == ({7}, {7, 8})


def test_ids_of_unnamed_rows_are_never_used_again() -> None:
    """A row whose name could not be kept goes with its agent, its counts into the sum, its id to nobody."""
    kernel = Kernel()
    long = vip_port(LOCAL, REMOTE, name=f"{'n' * 253}/{'s' * 253}")
    kernel.take(cluster(vip_port(LOCAL, port=81), long), MADE)
    assert kernel.rows == ({1, 3}, {1, 2, 3, 4, 5})
    kernel.count_in_vip(1, 0, 5)
    kernel.count_in_hop(2, 0, 5, 5)
    kernel.count_in_vip(3, 2, 8, 1)
    kernel.count_in_hop(3, 1, 1, 2)
    kernel.count_in_hop(5, 3, 4, 7)
    assert kernel.tables.snapshot().vips.keys() == {1, 3}
    kernel.begin_anew()
    assert kernel.tables.adopt()[1] == 5
    assert kernel.tables.forgotten == Rows(10, 1 + 2 + 7)
    assert books(kernel) == Rows(15, 15)
    assert kernel.rows == ({1}, {1, 2})
    assert ids(kernel.names) == {1, 2}


@pytest.mark.parametrize("garbage", [b"", b"{}", pack_name(Name(HopRow(99, Hop.NONE, "node1", None), 1))])
@pytest.mark.parametrize("row", [1, 3, 7])
def test_names_that_say_nothing(garbage: bytes, row: int) -> None:
    """A name that cannot be read, or is of a VIP port that nobody knows, goes with its rows; no count does."""
    kernel = served()
    kernel.names.put(number_key(row), garbage)
    kernel.begin_anew()
    names, last_id = kernel.tables.adopt()
    assert last_id == max(6, row)
    assert row not in names
    assert books(kernel) == ALL
    left = {1: {5, 6}, 3: {1, 2, 4, 5, 6}, 7: {1, 2, 3, 4, 5, 6}}[row]
    assert names.keys() == ids(kernel.names) == kernel.rows[1] == left
    # The second time there is nothing to be said any more.
    kernel.begin_anew()
    assert kernel.tables.adopt() == (names, last_id)
    assert books(kernel) == ALL


def test_names_without_rows_are_made_when_there_is_room() -> None:
    """Rows that are lacking are no reason not to begin, even if the maps are full; they come as soon as they can."""
    kernel = served()
    taken = kernel.hop_stats.entries.pop(number_key(3))
    del kernel.vip_stats.entries[number_key(5)]
    kernel.hop_stats.limit, kernel.vip_stats.limit = 5, 1
    kernel.begin_anew()
    kernel.adopt(GONE)
    assert (3 in kernel.topology.hops.by_id, 5 in kernel.topology.vips.by_id) == (True, True)
    with pytest.raises(OSError, match="Argument list too long"):
        kernel.take(cluster(WEB, SHOP), GONE)
    assert kernel.rows == ({1}, {1, 2, 4, 5, 6})
    # What has no row is not watched; what it had is in nobody else's.
    assert [VIP_VALUE.unpack(value)[0] for value in kernel.vip_ports.entries.values()] == [1]
    assert REMOTE.address not in {BACKEND_KEY.unpack(key)[1] for key in kernel.backends.entries}
    kernel.hop_stats.limit = kernel.vip_stats.limit = 100
    kernel.write()
    assert kernel.holds == kernel.wanted
    assert kernel.rows == ({1, 5}, {1, 2, 3, 4, 5, 6})
    assert unpack_hop_stats(kernel.hop_stats.entries[number_key(3)]) == unpack_hop_stats(bytes(len(taken)))


def test_a_full_map_takes_a_remainder_in_the_place_of_what_it_remains_of() -> None:
    """Forgetting needs no room, and what is pending afterwards does not write over it."""
    kernel = served()
    kernel.hop_stats.limit = 6
    let_go(kernel)
    kernel.forget(GONE, LATER)
    kernel.write()
    check_end(kernel)


def test_a_remainder_waits_for_memory_that_the_kernel_lacks_for_a_moment() -> None:
    """As new rows do."""
    kernel = served()
    let_go(kernel)
    kernel.hop_stats.puts_without_memory = 3
    kernel.forget(GONE, LATER)
    assert kernel.hop_stats.puts_without_memory == 0
    check_end(kernel)


def test_a_row_that_never_found_room_takes_nothing_from_the_remainder() -> None:
    """It has counted nothing, and the counts of others stay what they are."""
    kernel = served()
    let_go(kernel)
    kernel.forget(GONE, LATER)
    kernel.write()
    kernel.hop_stats.limit = len(kernel.hop_stats.entries)
    with pytest.raises(OSError, match="Argument list too long"):
        kernel.take(cluster(vip_port(LOCAL, REMOTE)), LATER)
    kernel.topology.replace(WEB_ALONE, LATER + 1)
    assert kernel.forget(LATER + 1, LATER + 1) == ((HopGone(8, 7),), ())
    assert by_class(kernel) == (FORWARDED, REFUSED)
    assert books(kernel) == ALL


def test_a_remainder_of_an_adopted_generation_goes_on() -> None:
    """The next agent adds to the remainder that it found, which keeps its id and start time."""
    kernel = served()
    let_go(kernel)
    kernel.forget(GONE, LATER)
    kernel.write()
    for turn in range(3):
        kernel.begin_anew()
        kernel.adopt(100 + turn)
        kernel.take(cluster(vip_port(LOCAL, REMOTE)), 100 + turn)
        (far,) = [n for n, row in kernel.topology.hops.by_id.items() if row.node == "node2"]
        kernel.count_in_hop(far, 0, 1000, 0, 1)
        kernel.take(WEB_ALONE, 200 + turn)
        kernel.forget(200 + turn, 300)
        assert by_class(kernel)[0] == FORWARDED | {("web", Hop.AVOIDABLE): 60 + 1000 * (turn + 1)}
        assert by_class(kernel)[1] == {("web", Hop.AVOIDABLE): 22 + turn + 1}
        assert named(kernel)[7] == Name(HopRow(1, Hop.AVOIDABLE, None, None), LATER)
    assert kernel.rows == ({1}, {1, 2, 7})


def test_drop_unknown() -> None:
    """VIP ports and backends that no source names any more stay until they are dropped, and then go with their rows."""
    kernel = served()
    before = dict(kernel.vip_ports.entries), dict(kernel.backends.entries)
    kernel.begin_anew()
    kernel.adopt(GONE)
    assert kernel.tables.vip_ports == before[0].keys()
    kernel.take(WEB_ALONE, GONE)
    assert kernel.holds == before  # as far as it is known by now: another source may name it yet
    kernel.tables.drop_unknown(kernel.topology.tables)
    assert kernel.write() == ["vip_ports delete", "backends delete"]
    assert kernel.holds == kernel.wanted
    kernel.tables.drop_unknown(kernel.topology.tables)
    assert kernel.write() == []


def test_needs_of_what_is_adopted() -> None:
    """How many UDP and SCTP VIP ports the kernel watches, and how many of them can be forwarded to nobody."""
    kernel = Kernel()
    dns = vip_port(LOCAL, port=53, name="default/dns", transport=Transport.UDP)
    empty = vip_port(port=54, name="default/empty", transport=Transport.SCTP)
    kernel.take(cluster(WEB, dns, empty))
    wanted = kernel.topology.datagram_needs
    kernel.begin_anew()
    assert (kernel.tables.datagram_needs, kernel.tables.datagram_ports) == ((0, 0), set())
    kernel.adopt()
    assert kernel.tables.datagram_needs == wanted == (2, 1)
    assert {key[-2] for key in kernel.tables.datagram_ports} == {17, 132}
    assert len(kernel.tables.datagram_ports) == 2


def test_uplinks_are_adopted() -> None:
    """Those that the kernel has are not written again."""
    kernel = Kernel()
    kernel.tables.set_uplinks(frozenset({3, 9}))
    kernel.begin_anew()
    kernel.adopt()
    assert kernel.tables.usage()["uplinks"] == (2, 64)
    kernel.journal.lines.clear()
    kernel.tables.set_uplinks(frozenset({3, 9}))
    assert kernel.journal.lines == []


class _Life:
    """Agents on one kernel, one after another, and what was counted by rows that something points to."""

    def __init__(self) -> None:
        self.kernel = Kernel()
        for each in (*self.kernel.maps.values(), self.kernel.names):
            each.limit = 10_000
        self.counted = Rows(0, 0)
        self.forwarded: Counter[VipRow] = Counter()

    def count(self, random: Random) -> None:
        """Let packets pass: whatever the tables lead to has its row."""
        kernel = self.kernel
        for value in kernel.vip_ports.entries.values():
            vip_id = VIP_VALUE.unpack(value)[0]
            self._add(vip_id, vip=random.randrange(3))
            self._add(vip_id, hop=random.randrange(3))
        for key, value in kernel.backends.entries.items():
            hop_id = int.from_bytes(value, "little")
            name = named(kernel)[hop_id].identity
            assert isinstance(name, VipRow) or name.vip_id == BACKEND_KEY.unpack(key)[0]
            self._add(hop_id, hop=random.randrange(3))

    def _add(self, number: int, vip: int = 0, hop: int = 0) -> None:
        key = number_key(number)
        for table, word, more in ((self.kernel.vip_stats, 1, vip), (self.kernel.hop_stats, 2, hop)):
            if more:
                words = list(struct.unpack(f"={table.value_size // 8}Q", table.entries[key]))
                words[word] += more
                table.entries[key] = struct.pack(f"={len(words)}Q", *words)
        self.counted = self.counted.plus(Rows(vip, hop))

    def answered(self) -> Counter[VipRow]:
        """Sum up over all hop rows of each VIP port."""
        names = named(self.kernel)
        sums: Counter[VipRow] = Counter()
        for key, raw in self.kernel.hop_stats.entries.items():
            row = names[int.from_bytes(key, "little")].identity
            row = names[row.vip_id].identity if isinstance(row, HopRow) else row
            assert isinstance(row, VipRow)
            sums[row] += unpack_hop_stats(raw).answered
        return sums

    def step(self, state: Cluster, now_ns: int) -> None:
        """Do what an agent does in a turn."""
        kernel = self.kernel
        kernel.take(state, now_ns)
        kernel.tables.drop_unknown(kernel.topology.tables)
        kernel.write()
        kernel.topology.forget_endpoints(now_ns)
        kernel.write()
        kernel.forget(now_ns - KEEP_RETIRED_NS, now_ns)
        kernel.write()


_TURNS = st.tuples(
    CLUSTERS, st.sampled_from([1, 299, 301]), st.none() | st.integers(0, 40), st.none() | st.integers(0, 9)
)


@settings(deadline=None, max_examples=40)
@given(st.lists(_TURNS, min_size=1, max_size=6), st.randoms())
def test_any_history_of_kills(turns: list[tuple[Cluster, int, int | None, int | None]], random: Random) -> None:
    """However Services come and go, and whenever agents are killed: no count is lost, none is there twice."""
    life, now_ns = _Life(), 1
    kernel = life.kernel
    for state, seconds, first, second in turns:
        now_ns += seconds * SECOND
        before = life.answered()
        if first is not None and killed(lambda: life.step(state, now_ns), kernel, first):  # noqa: B023 - called here
            kernel.begin_anew()
            if second is not None and killed(lambda: kernel.adopt(now_ns), kernel, second):  # noqa: B023
                kernel.begin_anew()
                kernel.adopt(now_ns)
            elif second is None:
                kernel.adopt(now_ns)
        assert books(kernel) == life.counted
        life.step(state, now_ns)
        assert books(kernel) == life.counted
        assert kernel.holds == kernel.wanted
        assert ids(kernel.names) == kernel.rows[0] | kernel.rows[1]
        after = life.answered()
        assert all(after[row] >= before[row] for row in before if row in kernel.topology.vips.by_id.values())
        life.count(random)
        assert books(kernel) == life.counted


def test_the_row_has_the_words_that_the_tests_count_in() -> None:
    """Word 2 of a hop row counts answers, and a row has 54 words."""
    assert HOP_STATS_WORDS == 54
    assert unpack_hop_stats(struct.pack("=54Q", 0, 0, 5, *[0] * 51)).answered == 5
