"""An agent takes over what one before it pinned: real programs on real maps, in a bpffs of the test's own."""

from __future__ import annotations

import contextlib
import os
import shutil
import struct
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from otel_lb_hop.core.layout import Verdict
from otel_lb_hop.core.pinned import STATE, unpack_state
from otel_lb_hop.errors import KernelError
from otel_lb_hop.kernel import bpf, loader
from otel_lb_hop.kernel.loader import Sizes, load, retire_ring
from otel_lb_hop.kernel.pins import PinFolder, Pins, claim
from otel_lb_hop.kernel.ring import Ring
from tests.kernel.packets import End, Flow, next_isn
from tests.kernel.requirements import needs_kernel
from tests.kernel.rig import EVERYTHING, Namespace, Rig, vip_port
from tests.lab.bpffs import bpffs

if TYPE_CHECKING:
    from collections.abc import Iterator

    from otel_lb_hop.kernel.loader import Loaded

pytestmark = [pytest.mark.root, needs_kernel]

SMALL = Sizes(
    vip_ports=8, backends=8, hops=16, places=8, datagram_flows=8, told_flows=8, table_buckets=16, ring_pages=1
)
VIP, CLIENT = End.of("8.0.10.1", 80), End.of("8.0.1.5", 4000)
SNAT, BACKEND = End.of("8.0.2.1", 61000), End.of("8.0.4.7", 8080)
SERVED = vip_port(VIP, (BACKEND, "node2"))
NEVER = EVERYTHING._replace(verdict_after_ns=1 << 62)


@pytest.fixture
def pins(namespace: Namespace, tmp_path: Path) -> Iterator[Path]:
    """Say where to pin, in a namespace of the tests' own."""
    with namespace.entered(), bpffs(tmp_path / "bpf") as mounted:
        yield mounted / "pins"
        # What is pinned goes with the last mount, and the namespace lives on: no link is made in these tests.


def open_fds() -> set[int]:
    """List the descriptors that this process has open."""
    listed = set(map(int, os.listdir("/proc/self/fd")))  # noqa: PTH208 - names of descriptors
    return {fd for fd in listed if Path(f"/proc/self/fd/{fd}").is_symlink()}  # not the one of the listing


@contextlib.contextmanager
def agent(pins: Path, sizes: Sizes = SMALL) -> Iterator[Loaded]:
    """Load as an agent does; on exit all that it has open is closed, as if it had been killed."""
    before = open_fds()
    try:
        folder = claim(pins).folder
        assert folder is not None
        loaded = load(sizes, folder)
        assert loaded.pins is not None
        yield loaded
    finally:
        for fd in open_fds() - before:
            os.close(fd)


@contextlib.contextmanager
def counting(loaded: Loaded, namespace: Namespace) -> Iterator[tuple[Rig, int, int]]:
    """Go on with what is pinned, and know one VIP port; gives its id and its hop row's."""
    rig = Rig(loaded, namespace)
    rig.ring.close()
    rig.ring = Ring(loaded.records_fd, loaded.state.earlier_records)
    if loaded.inherited:
        rig.topology.adopt(*rig.tables.adopt(), 2)
    rig.tables.set_uplinks(frozenset({rig.uplink}))
    rig.tables.set_settings(NEVER)
    (marked,) = rig.serve(SERVED)
    yield rig, marked.vip_id, marked.hops["required", "node2"]
    rig.ring.close()


def flow() -> Flow:
    """Make a connection that nobody has made before."""
    return Flow(CLIENT, VIP, SNAT, BACKEND, next_isn())


def connect(rig: Rig, count: int) -> None:
    """Let so many connections come in, be translated and be answered."""
    for _ in range(count):
        each = flow()
        rig.into(each.syn())
        rig.out(each.translated())
        rig.out(each.answer())


def ids(loaded: Loaded) -> dict[str, int]:
    """Give the kernel's ids of programs."""
    return {name: bpf.program_id(fd) for name, fd in loaded.programs.items()}


def map_id(fd: int) -> int:
    """Give the kernel's id of a map (struct bpf_map_info)."""
    _, number = struct.unpack_from("=II", bpf._info(fd))
    return int(number)


def map_ids(loaded: Loaded) -> list[int]:
    """Give the kernel's ids of the maps that outlive any exchange of programs."""
    return [map_id(each.fd) for each in (loaded.vip_stats, loaded.hop_stats, loaded.events, loaded.names, loaded.notes)]


def generations(pins: Path) -> list[str]:
    """List the generations that are pinned."""
    return sorted(path.name for path in pins.iterdir())


@pytest.fixture
def change_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give a test sources of its own, to be changed."""
    copied = tmp_path / "sources"
    shutil.copytree(loader.bpf_folder(), copied)
    monkeypatch.setattr(loader, "bpf_folder", lambda: copied)
    return copied / "lb_hop.c"


def change(source: Path) -> None:
    """Make another build of the programs."""
    source.write_text(source.read_text() + "/* another build */\n")


def test_the_same_build(pins: Path, namespace: Namespace) -> None:
    """Programs, maps, counters and open handshakes are the same; no compiler is started; the ring goes on."""
    open_ones = [flow() for _ in range(3)]
    with agent(pins) as first:
        assert (first.inherited, first.previous_records_fd) == (False, None)
        assert first.compile_seconds > 0
        programs, maps, state = ids(first), map_ids(first), first.state
        with counting(first, namespace) as (rig, vip_id, hop_id):
            connect(rig, 5)
            for each in open_ones:
                rig.into(each.syn())
                rig.out(each.translated())
            assert len(rig.records(2)) == 2
    assert len(generations(pins)) == 1
    with agent(pins) as second:
        assert (second.inherited, second.previous_records_fd, second.compile_seconds) == (True, None, 0.0)
        assert (ids(second), map_ids(second), second.state) == (programs, maps, state)
        with counting(second, namespace) as (rig, *same):
            assert same == [vip_id, hop_id]
            assert rig.vip(vip_id).connections == (0, 8)
            assert rig.ring.taken_before == 2
            for each in open_ones:
                rig.out(each.answer())
            assert rig.hop(hop_id)[:2] == ((0, 8), 8)
            records = rig.records()
            assert [record.verdict for record in records] == [Verdict.ANSWERED] * 6
            assert (rig.ring.taken, rig.ring.seen) == (6, 8)
    assert len(generations(pins)) == 1


def test_another_build(pins: Path, namespace: Namespace, change_source: Path) -> None:
    """New programs go on with the counters, and follow the handshakes that the old ones have open."""
    answered, refused, untranslated = flow(), flow(), flow()
    with agent(pins) as first, counting(first, namespace) as (rig, vip_id, hop_id):
        programs, maps, state = ids(first), map_ids(first), first.state
        connect(rig, 4)
        for each in (answered, refused, untranslated):
            rig.into(each.syn())
        for each in (answered, refused):
            rig.out(each.translated())
        assert len(rig.records()) == 4
    change(change_source)
    with agent(pins) as second, counting(second, namespace) as (rig, *same):
        assert (second.inherited, second.previous_records_fd) == (True, None)
        assert second.compile_seconds > 0
        assert not set(ids(second).values()) & set(programs.values())
        assert map_ids(second) == maps
        assert second.state == state._replace(build=second.state.build) != state
        assert same == [vip_id, hop_id]
        for each in (answered, refused, untranslated):
            rig.into(each.syn())  # sent again: known, by the same hash
        rig.out(answered.answer())
        rig.out(refused.refusal())
        rig.out(untranslated.translated())
        rig.out(untranslated.answer())
        connect(rig, 2)
        assert rig.vip(vip_id).connections == (0, 9)
        assert rig.vip(vip_id).retransmits == 3
        stats = rig.hop(hop_id)
        assert (stats.forwarded, stats.answered, stats.refused) == ((0, 9), 8, 1)
        assert sorted(record.verdict for record in rig.records()) == [Verdict.ANSWERED] * 4 + [Verdict.REFUSED]
        programs = ids(second)
    with agent(pins) as third:
        assert (ids(third), map_ids(third), third.compile_seconds) == (programs, maps, 0.0)
    assert len(generations(pins)) == 1


def test_another_ring(pins: Path, namespace: Namespace) -> None:
    """All goes on in a larger ring; what the one before still holds, and still gets, is read and counted first."""
    with agent(pins) as first, counting(first, namespace) as (rig, vip_id, _):
        connect(rig, 7)
        assert len(rig.records(4)) == 4
        maps = map_ids(first)
        larger = SMALL._replace(ring_pages=2)
        for _ in range(2):  # the first of these is killed before it has read the old ring
            folder = PinFolder(pins, -1)
            second = load(larger, folder)
            assert (second.inherited, second.state.earlier_records, second.state.previous_ring) == (True, 0, "records")
        connect(rig, 2)  # by links that do not run the new programs yet
        assert second.previous_records_fd is not None
        previous = Ring(second.previous_records_fd, 0)
        assert (previous.taken_before, previous.pending_records, previous.seen) == (4, 5, 9)
        assert len(previous.drain(100)) == 5
        retire_ring(second, previous.seen)
        previous.close()
    with agent(pins, larger) as third, counting(third, namespace) as (rig, *_):
        assert (third.previous_records_fd, third.compile_seconds) == (None, 0.0)
        assert (map_ids(third), rig.ring.capacity) == (maps, 8_192)
        assert (rig.ring.taken_before, rig.ring.seen, rig.records()) == (9, 9, [])
        connect(rig, 5)
        assert rig.vip(vip_id).connections == (0, 14)
        assert len(rig.records()) == 5
    assert len([path.name for path in pins.glob("*/records*")]) == 1


def test_another_layout(pins: Path, namespace: Namespace, caplog: pytest.LogCaptureFixture) -> None:
    """Nothing is taken over: a generation of its own begins, which is the youngest, and the old one can go."""
    with agent(pins) as first, counting(first, namespace) as (rig, *_):
        connect(rig, 3)
        created_ns = first.state.created_ns
    (old,) = generations(pins)
    with agent(pins, SMALL._replace(hops=17)) as second, counting(second, namespace) as (rig, vip_id, _):
        assert not second.inherited
        assert second.state.created_ns > created_ns
        assert rig.vip(vip_id).connections == (0, 0)
        assert "the layout of the counters has changed: all series begin anew" in caplog.text
        both = generations(pins)
        assert len(both) == 2
        assert old in both
    with agent(pins, SMALL._replace(hops=17)) as third:
        assert (third.inherited, third.compile_seconds) == (True, 0.0)
    folder = claim(pins).folder
    assert folder is not None
    found = folder.find()
    assert found is not None
    assert folder.remove_except(found[0]) == 1
    assert generations(pins) == [name for name in both if name != old]
    folder.remove()
    assert not pins.exists()


def test_another_network_namespace(pins: Path) -> None:
    """Its counters are not this node's: it is told what to do, and nothing is touched."""
    with agent(pins) as first:
        state = first.state
    other = Namespace()
    try:
        with (
            other.entered(),
            pytest.raises(KernelError, match="has the counters of another network namespace: give each node"),
            agent(pins),
        ):
            pass
    finally:
        other.close()
    with agent(pins) as again:
        assert (again.inherited, again.state) == (True, state)


class Killed(BaseException):
    """The agent was killed."""


@pytest.mark.parametrize("name", ["lbh_ingress", "lbh_conntrack", "records", "notes"])
def test_killed_while_it_loads(
    pins: Path, namespace: Namespace, change_source: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever it had pinned by then, the next agent has all the counters and programs of one build."""
    with agent(pins) as first, counting(first, namespace) as (rig, vip_id, hop_id):
        connect(rig, 6)
        maps = map_ids(first)
        old_build = first.state.build
    change(change_source)
    larger = SMALL._replace(ring_pages=2)
    pin = Pins._pin

    def pin_until(self: Pins, pinned: str, fd: int) -> None:
        if pinned == f"program_{name}" or pinned.startswith(name):
            raise Killed
        pin(self, pinned, fd)

    def put_until(table: bpf.Map, key: bytes, value: bytes) -> None:
        if name == "notes" and table.value_size == 1_024 and unpack_state(value).build not in {"", old_build}:
            raise Killed
        put(table, key, value)

    put = bpf.Map.put
    with monkeypatch.context() as patch, contextlib.suppress(Killed):
        patch.setattr(Pins, "_pin", pin_until)
        patch.setattr(bpf.Map, "put", put_until)
        with agent(pins, larger):
            pytest.fail("it was not killed")
    with agent(pins, larger) as third, counting(third, namespace) as (rig, *same):
        assert third.inherited
        assert third.compile_seconds > 0
        assert (map_ids(third), same) == (maps, [vip_id, hop_id])
        assert rig.ring.capacity == 8_192
        assert rig.vip(vip_id).connections == (0, 6)
        connect(rig, 5)
        assert rig.hop(hop_id)[:2] == ((0, 11), 11)
        assert len(rig.records()) == 5
        raw = third.notes.get(STATE)
        assert raw is not None
        assert unpack_state(raw).build == third.state.build not in {"", old_build}
        build = ids(third)
    with agent(pins, larger) as fourth:
        assert (fourth.compile_seconds, ids(fourth)) == (0.0, build)


def test_killed_before_a_generation_is_complete(pins: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not taken over: the next agent begins one of its own, and the torso goes."""

    def refuse(*_: object) -> None:
        raise Killed

    with monkeypatch.context() as patch, contextlib.suppress(Killed):
        patch.setattr(Pins, "pin_program", refuse)
        with agent(pins):
            pytest.fail("it was not killed")
    (torso,) = generations(pins)
    with agent(pins) as second:
        assert not second.inherited
        assert torso in generations(pins)
        assert len(generations(pins)) == 2
    folder = claim(pins).folder
    assert folder is not None
    assert folder.remove_except(second.pins) == 1
    assert torso not in generations(pins)
    folder.remove()


def test_a_place_that_takes_no_folder(pins: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Then all ends with the process, as if nothing was to be pinned."""

    def refuse(*_: object, **__: object) -> None:
        raise OSError(30, "Read-only file system")

    before = open_fds()
    folder = claim(pins).folder
    assert folder is not None
    with monkeypatch.context() as patch:
        patch.setattr(Path, "mkdir", refuse)
        loaded = load(SMALL, folder)
    assert (loaded.pins, loaded.inherited, generations(pins)) == (None, False, [])
    for fd in open_fds() - before:
        os.close(fd)
