"""The writer of the kernel's tables, on maps that are dicts: in which order it writes, and what if one is full."""

from __future__ import annotations

import errno

import pytest

from otel_lb_hop.core.ledger import Rows
from otel_lb_hop.core.topology import HopGone, Pending
from otel_lb_hop.kernel.tables import BATCH_ROWS
from otel_lb_hop.model import Cluster
from tests.unit.fake_kernel import ROOM, Kernel
from tests.unit.samples import LOCAL, REMOTE, backend, cluster, hop_stats, vip_port, vip_stats

WEB = cluster(vip_port(LOCAL, REMOTE))
SHOP = cluster(vip_port(LOCAL, REMOTE), vip_port(LOCAL, port=81, name="default/shop"))


def test_rows_come_first_and_vip_ports_last() -> None:
    """A row exists before anything points to it, and the backends of a VIP port before the VIP port."""
    kernel = Kernel()
    written = kernel.take(WEB)
    assert [what for what in written if what != "names put"] == [
        "vip_stats put", "hop_stats put", "hop_stats put", "hop_stats put", "backends put", "vip_ports put",
    ]  # fmt: skip
    assert written.count("names put") == 4
    assert kernel.holds == kernel.wanted
    assert kernel.rows == ({1}, {1, 2, 3})
    assert not kernel.topology.tables.pending


def test_vip_ports_go_before_their_backends() -> None:
    """What comes is there before what it replaces goes, and rows stay: open handshakes settle in them."""
    kernel = Kernel()
    kernel.take(WEB)
    assert kernel.take(cluster(vip_port(LOCAL, port=81))) == [
        "vip_stats put", "names put", "hop_stats put", "names put", "hop_stats put", "names put",
        "backends put", "vip_ports put", "vip_ports delete", "backends delete",
    ]  # fmt: skip
    assert kernel.holds == kernel.wanted
    assert kernel.rows == ({1, 4}, {1, 2, 3, 4, 5})


def test_only_what_is_pending_is_written() -> None:
    """The same again writes nothing; one endpoint more is one row and one backend."""
    kernel = Kernel()
    kernel.take(SHOP)
    assert kernel.take(SHOP) == []
    kernel.topology.replace(cluster(*SHOP.vip_ports[:1], vip_port(LOCAL, REMOTE, port=81, name="default/shop")), 1)
    kernel.write()
    assert kernel.journal.lines == ["hop_stats put", "names put", "backends put"]
    assert kernel.holds == kernel.wanted


def test_what_came_and_went_unwritten_is_no_error() -> None:
    """A VIP port that the kernel never had is removed without harm."""
    kernel = Kernel()
    kernel.topology.replace(WEB, 1)
    kernel.topology.replace(Cluster(), 1)
    kernel.topology.forget_rows(1, 1)
    assert kernel.write() == ["vip_ports delete", "backends delete"]
    assert (kernel.holds, kernel.rows) == (({}, {}), (set(), set()))
    assert not kernel.topology.tables.pending


@pytest.mark.parametrize(
    ("full", "limit", "left", "done"),
    [
        ("vip_ports", 1, {"vip_ports": 1}, {"vip_ports": 1, "backends": 3, "vip_stats": 2, "hop_stats": 5}),
        ("backends", 2, {"backends": 1}, {"vip_ports": 2, "backends": 2, "vip_stats": 2, "hop_stats": 5}),
        # Without its row no VIP port is watched, and no backend known.
        (
            "vip_stats",
            1,
            {"vip_ids": 1, "vip_ports": 1},
            {"vip_ports": 1, "backends": 3, "vip_stats": 1, "hop_stats": 5},
        ),
        (
            "hop_stats",
            0,
            {"hop_ids": 5, "backends": 3, "vip_ports": 2},
            {"vip_ports": 0, "backends": 0, "vip_stats": 2, "hop_stats": 0},
        ),
    ],
)
def test_a_full_map_keeps_what_found_no_room_pending(
    full: str, limit: int, left: dict[str, int], done: dict[str, int]
) -> None:
    """All the rest is done, the error is told each time, and it is made good as soon as there is room."""
    kernel = Kernel(**{full: limit})
    pending = kernel.topology.tables.pending
    for _ in range(2):
        with pytest.raises(OSError, match="Argument list too long") as caught:
            kernel.take(SHOP)
        assert caught.value.errno == errno.E2BIG
        sizes = {name: len(getattr(pending, name)) for name in ("vip_ids", "hop_ids", "vip_ports", "backends")}
        assert {name: size for name, size in sizes.items() if size} == left
        assert {name: len(each.entries) for name, each in kernel.maps.items()} == done
        assert {name: used for name, (used, _) in kernel.tables.usage().items() if name != "uplinks"} == done
        assert pending
    kernel.maps[full].limit = ROOM
    kernel.write()
    assert (pending, kernel.holds) == (Pending(), kernel.wanted)
    assert kernel.rows == ({1, 4}, {1, 2, 3, 4, 5})


def test_memory_that_the_kernel_lacks_for_a_moment_is_waited_for() -> None:
    """Its reserve for rows is filled again within milliseconds: the turn that finds it empty still writes them all."""
    kernel = Kernel()
    kernel.hop_stats.puts_without_memory = 2
    kernel.take(cluster(vip_port(LOCAL, REMOTE)))
    assert kernel.holds == kernel.wanted
    assert not kernel.topology.tables.pending


def test_memory_that_does_not_come_is_waited_for_once() -> None:
    """Four tries for the first row, one for each of the two others; all of it stays pending."""
    kernel = Kernel()
    kernel.hop_stats.puts_without_memory = ROOM
    with pytest.raises(OSError, match="Cannot allocate memory"):
        kernel.take(cluster(vip_port(LOCAL, REMOTE)))
    assert kernel.hop_stats.puts_without_memory == ROOM - 6
    assert len(kernel.topology.tables.pending.hop_ids) == 3
    kernel.hop_stats.puts_without_memory = 0
    kernel.write()
    assert kernel.holds == kernel.wanted


def test_what_goes_makes_room_for_the_next_time() -> None:
    """In a full map a VIP port finds no room before another has gone."""
    kernel = Kernel(vip_ports=1)
    kernel.take(WEB)
    moved = cluster(vip_port(LOCAL, port=81))
    with pytest.raises(OSError, match="Argument list too long"):
        kernel.take(moved)
    assert kernel.vip_ports.entries == {}
    assert kernel.write() == ["vip_ports put"]
    assert kernel.holds == kernel.wanted


def test_a_vip_port_without_a_row_is_not_counted_as_the_service_it_was() -> None:
    """A VIP port that went over to another Service, whose row finds no room, is not watched rather than wrong."""
    kernel = Kernel(vip_stats=1)
    kernel.take(WEB)
    with pytest.raises(OSError, match="Argument list too long"):
        kernel.take(cluster(vip_port(LOCAL, REMOTE, name="default/shop")))
    assert kernel.vip_ports.entries == {}
    kernel.vip_stats.limit = ROOM
    kernel.write()
    assert kernel.holds == kernel.wanted


def test_a_backend_without_a_row_is_not_counted_in_the_class_it_was() -> None:
    """A backend whose hop has become avoidable, and whose row finds no room, counts as unknown rather than wrong."""
    kernel = Kernel()
    kernel.take(cluster(vip_port(REMOTE)))
    kernel.hop_stats.limit = 3
    with pytest.raises(OSError, match="Argument list too long"):
        kernel.take(cluster(vip_port(LOCAL, REMOTE)))
    assert len(kernel.backends.entries) == 1
    assert kernel.backends.entries.items() <= kernel.topology.tables.backends.items()
    kernel.hop_stats.limit = ROOM
    kernel.write()
    assert kernel.holds == kernel.wanted


@pytest.mark.parametrize("refusing", ["vip_ports", "backends"])
def test_a_refused_delete_stays_pending(refusing: str) -> None:
    """What could not be removed is removed the next time, and what comes is not kept waiting by it."""
    kernel = Kernel()
    kernel.take(WEB)
    kernel.maps[refusing].refuses_deletes = True
    with pytest.raises(OSError, match="busy"):
        kernel.take(cluster(vip_port(LOCAL, port=81)))
    assert all(kernel.holds[number].items() >= kernel.wanted[number].items() for number in (0, 1))
    assert kernel.holds != kernel.wanted
    assert kernel.topology.tables.pending
    kernel.maps[refusing].refuses_deletes = False
    assert kernel.write() == [f"{refusing} delete"]
    assert kernel.holds == kernel.wanted


def test_rows_that_are_forgotten_leave_their_counts() -> None:
    """The rows of a VIP port that was forgotten go, what they had counted is kept as a sum, the others stay."""
    kernel = Kernel()
    kernel.take(SHOP)
    kernel.count_in_hop(3, 0, 7)
    kernel.count_in_hop(5, 0, 8, 4)
    kernel.topology.replace(cluster(vip_port(LOCAL, REMOTE)), 5)
    kernel.count_in_vip(4, 2, 9, 1)
    assert kernel.forget(4, 5) == ((), ())
    assert kernel.tables.forgotten == (0, 0)
    kernel.write()
    assert kernel.forget(5, 5) == ((HopGone(4, 0), HopGone(5, 0)), (4,))
    assert kernel.tables.forgotten == Rows(connections=11, verdicts=5)
    assert kernel.journal.lines == [
        "notes put", "vip_stats delete", "names delete",
        "notes put", "hop_stats delete", "names delete",
        "notes put", "hop_stats delete", "names delete",
    ]  # fmt: skip
    assert kernel.rows == ({1}, {1, 2, 3})
    usage = kernel.tables.usage()
    assert (usage["vip_stats"], usage["hop_stats"]) == ((1, 11), (3, 33))
    snapshot = kernel.tables.snapshot()
    assert snapshot.vips == {1: vip_stats()}
    assert snapshot.hops == {1: hop_stats(), 2: hop_stats(), 3: hop_stats(external=7)}


def test_snapshot_leaves_out_what_the_kernel_lost() -> None:
    """A row that someone else removed is neither told nor an error."""
    kernel = Kernel()
    kernel.take(cluster(vip_port(backend("10.100.1.2"))))
    kernel.hop_stats.entries.popitem()
    kernel.vip_stats.entries.clear()
    snapshot = kernel.tables.snapshot()
    assert (snapshot.vips, list(snapshot.hops.values())) == ({}, [hop_stats()])


def test_idle_rows_of_a_snapshot_share_one_value() -> None:
    """In a large cluster almost all are idle; a row that has counted keeps its own."""
    kernel = Kernel()
    kernel.take(cluster(vip_port(LOCAL, REMOTE)))
    kernel.count_in_hop(2, 7)
    hops = kernel.tables.snapshot().hops
    assert sorted(stats.forwarded for stats in hops.values()) == [(0, 0), (0, 0), (7, 0)]
    assert len({id(stats) for stats in hops.values()}) == 2


@pytest.mark.parametrize("batch_entries", [None, 0, 100])
def test_many_rows_are_all_read_whatever_becomes_of_a_batch(batch_entries: int | None) -> None:
    """Where the kernel reads no batches, or stops in the middle of one, the rest is read singly: each row once."""
    kernel = Kernel()
    for each in (*kernel.maps.values(), kernel.names):
        each.limit = 2_000
    kernel.take(Cluster(tuple(vip_port(LOCAL, port=port) for port in range(1, BATCH_ROWS + 1))))
    for number in range(1, 2 * BATCH_ROWS, 2):
        kernel.count_in_hop(number, 0, number)
    kernel.hop_stats.batch_entries = kernel.vip_stats.batch_entries = batch_entries
    snapshot = kernel.tables.snapshot()
    vip_ids, hop_ids = kernel.rows
    assert snapshot.vips.keys() == vip_ids
    assert snapshot.hops == {number: hop_stats(external=number if number % 2 else 0) for number in hop_ids}
    assert (len(vip_ids), len(hop_ids)) == (BATCH_ROWS, 2 * BATCH_ROWS)


def test_usage() -> None:
    """Entries and limit of each table; there are as many rows of VIP ports as VIP ports may be."""
    kernel = Kernel()
    kernel.take(SHOP)
    assert kernel.tables.usage() == {
        "vip_ports": (2, 11),
        "backends": (3, 22),
        "vip_stats": (2, 11),
        "hop_stats": (5, 33),
        "uplinks": (0, 64),
    }
