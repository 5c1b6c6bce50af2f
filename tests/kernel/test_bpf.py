"""The thin wrapper around bpf(2), and the tables written through it."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

import pytest

from otel_lb_hop.core.layout import HOP_STATS_WORDS, MAX_UPLINKS, UPLINKS, VIP_KEY, VIP_VALUE, Event, unpack_hop_stats
from otel_lb_hop.kernel.bpf import Map, possible_cpus, run_program
from otel_lb_hop.kernel.loader import PROGRAMS
from otel_lb_hop.model import Hop
from tests.kernel.packets import End
from tests.kernel.requirements import needs_kernel
from tests.kernel.rig import UNSPEC, in_threads, vip_port

if TYPE_CHECKING:
    from tests.kernel.rig import Rig

pytestmark = [pytest.mark.root, needs_kernel]


def vip_key(number: int) -> bytes:
    """Make a key of vip_ports."""
    return VIP_KEY.pack(*End.of(f"8.0.10.{number}", 80)[:1], b"\0\x50", 6)


def test_map(narrow: Rig) -> None:
    """What is put can be got, is replaced by the next, listed, and gone after a delete."""
    table = narrow.loaded.vip_ports
    assert (table.get(vip_key(1)), list(table.keys())) == (None, [])
    for number in range(1, 6):
        table.put(vip_key(number), VIP_VALUE.pack(number, 0))
    table.put(vip_key(3), VIP_VALUE.pack(33, 2))
    assert table.get(vip_key(3)) == VIP_VALUE.pack(33, 2)
    assert sorted(table.keys()) == [vip_key(number) for number in range(1, 6)]
    table.delete(vip_key(3))
    table.delete(vip_key(3))
    assert table.get(vip_key(3)) is None
    assert len(list(table.keys())) == 4
    for key in table.keys():  # noqa: SIM118 - no dict
        table.delete(key)
    assert table.get(vip_key(1)) is None


def test_key_size(narrow: Rig) -> None:
    """A key of another size is refused before the kernel reads past it."""
    with pytest.raises(ValueError, match="a key has 3 bytes, the map wants 20"):
        narrow.loaded.vip_ports.get(b"abc")


def test_full_map(narrow: Rig) -> None:
    """A map with no room for one more key says so, and keeps what it has."""
    table = narrow.loaded.vip_ports
    for number in range(8):
        table.put(vip_key(number), VIP_VALUE.pack(number, 0))
    with pytest.raises(OSError, match="Argument list too long"):
        table.put(vip_key(8), VIP_VALUE.pack(8, 0))
    assert len(list(table.keys())) == 8


def test_bad_descriptor() -> None:
    """An error of the kernel is told as such."""
    with pytest.raises(OSError, match="Bad file descriptor"):
        Map(1 << 20, 4, 4).get(bytes(4))


def test_per_cpu_map(narrow: Rig) -> None:
    """A per-CPU value is its copies, one for each possible CPU; nothing is a copy of zeros for each."""
    table = narrow.loaded.hop_stats
    key = struct.pack("=I", 7)
    size = HOP_STATS_WORDS * 8
    assert table.value_size == size * possible_cpus()
    table.put(key, b"")
    assert table.get(key) == bytes(table.value_size)
    copies = [struct.pack("=Q", number + 1).ljust(size, b"\0") for number in range(possible_cpus())]
    table.put(key, b"".join(copies))
    raw = table.get(key)
    assert raw == b"".join(copies)
    assert unpack_hop_stats(raw).forwarded == (possible_cpus() * (possible_cpus() + 1) // 2, 0)
    assert list(table.keys()) == [key]
    table.delete(key)
    assert list(table.keys()) == []


def test_array_map(narrow: Rig) -> None:
    """An array has all its keys always, and no others."""
    events = narrow.loaded.events
    assert list(events.keys()) == [struct.pack("=I", event) for event in Event]
    assert events.get(struct.pack("=I", len(Event))) is None


def test_each_cpu_counts_in_its_own_copy(rig: Rig) -> None:
    """Runs on two CPUs are found in two copies of the row."""
    (marked,) = rig.serve(vip_port(End.of("8.0.10.1", 80)))
    fragment = bytes(12) + b"\x08\0\x45\0\0\x28\0\1\0\1\x40\6".ljust(22, b"\0")
    in_threads(*[lambda: rig.into(fragment, repeat=23)] * 2)
    raw = rig.loaded.events.get(struct.pack("=I", Event.FRAGMENT))
    assert raw is not None
    copies = struct.unpack(f"={possible_cpus()}Q", raw)
    assert sum(copies) == 46
    assert sorted(copies)[-2:] == [23, 23] or possible_cpus() == 1
    assert rig.event(Event.FRAGMENT) == 46
    assert marked.vip_id in rig.snapshot().vips


def test_run_program(rig: Rig) -> None:
    """A run answers result, packet and duration; a short packet is filled up to what the kernel takes."""
    for name, kind in PROGRAMS.items():
        if kind != "tc":
            continue
        result, after, duration = run_program(rig.loaded.programs[name], b"\1", repeat=100)
        assert (result, after) == (UNSPEC, b"\1" + bytes(13))
        assert 0 <= duration < 1_000_000


def test_interface_of_the_context_must_exist(rig: Rig) -> None:
    """An interface that this namespace does not have is refused: these tests are in a namespace of their own."""
    with pytest.raises(OSError, match="No such device"):
        rig.into(bytes(14), 4711)
    with pytest.raises(OSError, match="No such device"):
        rig.run("lbh_sweep", bytes(14), 99)


def test_tables_are_brought_to_what_is_wanted(rig: Rig) -> None:
    """VIP ports and backends that are gone from the topology are gone from the kernel; their rows stay for a while."""
    first, second = End.of("8.0.10.1", 80), End.of("8.0.10.2", 80)
    backend = End.of("8.0.4.7", 8080)
    rig.serve(vip_port(first, (backend, "node2")), vip_port(second, (backend, "node2")))
    assert rig.tables.usage()["vip_ports"][0] == len(list(rig.loaded.vip_ports.keys())) == 2
    assert rig.tables.usage()["backends"][0] == len(list(rig.loaded.backends.keys())) == 2
    rig.serve(vip_port(second))
    assert len(list(rig.loaded.vip_ports.keys())) == 1
    # What went from a VIP port that stays lingers.
    assert rig.tables.usage()["backends"][0] == len(list(rig.loaded.backends.keys())) == 1
    rig.topology.forget_endpoints(1)
    rig.tables.apply(rig.topology)
    assert list(rig.loaded.backends.keys()) == []
    assert len(list(rig.loaded.vip_stats.keys())) == 2
    assert len(rig.snapshot().hops) == 4
    rig.tables.forget(rig.topology.forget_rows(1 << 62, 2), rig.topology)
    assert len(list(rig.loaded.vip_stats.keys())) == len(rig.snapshot().vips) == 1
    # The VIP port's own row, and the remainder: what had gone to the forgotten row of its backend.
    assert len(list(rig.loaded.hop_stats.keys())) == len(rig.snapshot().hops) == 2
    (remainder,) = [row for row in rig.topology.hops.by_id.values() if row.is_remainder]
    assert (remainder.hop, remainder.node) == (Hop.REQUIRED, None)


def test_uplinks_come_and_go(rig: Rig) -> None:
    """The set of uplinks in the kernel is the one that was told last."""
    assert rig.tables.set_uplinks(frozenset({3, 5})) == frozenset()
    assert rig.tables.set_uplinks(frozenset({7, 5})) == frozenset()
    told = rig.loaded.uplinks.get(bytes(4))
    assert told is not None
    assert [index for index in UPLINKS.unpack(told) if index] == [5, 7]


def test_more_uplinks_than_fit(rig: Rig) -> None:
    """The first 64 uplinks are told to the kernel and the others to the caller."""
    assert rig.tables.set_uplinks(frozenset(range(1, MAX_UPLINKS + 3))) == {MAX_UPLINKS + 1, MAX_UPLINKS + 2}
    told = rig.loaded.uplinks.get(bytes(4))
    assert told is not None
    assert UPLINKS.unpack(told) == tuple(range(1, MAX_UPLINKS + 1))
