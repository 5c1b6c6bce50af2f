"""Names in a real bpffs: who may use them, which are found, and what goes with whom."""

from __future__ import annotations

import fcntl
import os
import subprocess
from typing import TYPE_CHECKING

import pytest

from otel_lb_hop.core.pinned import STATE, Delivered, State, pack_delivered, pack_state, unpack_delivered
from otel_lb_hop.errors import KernelError
from otel_lb_hop.kernel import bpf
from otel_lb_hop.kernel.hooks import Hooks
from otel_lb_hop.kernel.netlink import INGRESS_PARENT, Netlink
from otel_lb_hop.kernel.pins import NOTES_SHAPE, PinFolder, Pinning, Pins, claim, leave, own_netns, reclaim
from otel_lb_hop.kernel.told import DELIVERED, SHAPE, open_told
from otel_lb_hop.ops.uninstall import uninstall
from tests.bench.measure import empty_program
from tests.kernel.requirements import needs_kernel
from tests.kernel.test_hooks import links_named, said
from tests.lab.bpffs import bpffs
from tests.lab.programs import attached
from tests.lab.waiting import wait_for

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.kernel.rig import Rig

pytestmark = [pytest.mark.root, needs_kernel]

STATE_OF = State("layout", "build", (1, 2), 5, 6, "node1", "records", "", 7)


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Path]:
    """Mount a bpffs."""
    with bpffs(tmp_path / "bpf") as folder:
        yield folder


@pytest.fixture
def path(mounted: Path) -> Path:
    """Say where to pin."""
    return mounted / "otel-lb-hop"


@pytest.fixture
def folder(path: Path) -> Iterator[PinFolder]:
    """Claim a place to pin."""
    made = claim(path).folder
    assert made is not None
    yield made
    os.close(made._lock_fd)


def names(folder: Path) -> set[str]:
    """List a folder, without the two files that the kernel puts into each bpffs."""
    return {each.name for each in folder.iterdir()} - {"maps.debug", "progs.debug"}


def pin_a_map(path: Path, entries: int = 1) -> None:
    """Pin a new map by hand."""
    made = bpf.create_map(bpf.MapShape(bpf.HASH, 4, 4, entries), "foreign")
    bpf.pin(made.fd, path)
    os.close(made.fd)


def complete(folder: PinFolder, state: State | bytes) -> Pins:
    """Make a generation that has a map and its notes."""
    generation = folder.make()
    pin_a_map(generation._folder / "vip_ports")
    notes = bpf.create_map(NOTES_SHAPE, "notes")
    notes.put(STATE, pack_state(state) if isinstance(state, State) else state)
    generation.pin_map("notes", notes.fd)
    os.close(notes.fd)
    return generation


def test_nothing_is_pinned_if_that_is_off() -> None:
    """That is no problem."""
    assert claim(None) == Pinning(None, None)


def test_one_agent_at_a_time(path: Path) -> None:
    """Who comes second is told, whether to count or to take off; when the first has gone the next one may."""
    first = claim(path).folder
    assert first is not None
    assert path.stat().st_mode & 0o777 == 0o700
    for second in (claim, reclaim):
        with pytest.raises(KernelError, match=f"another agent counts here, it holds {path}: stop that one first"):
            second(path)
    os.close(first._lock_fd)
    for _ in range(2):
        again = claim(path)
        assert again.problem is None
        assert again.folder is not None
        os.close(again.folder._lock_fd)


def test_what_was_delivered_is_found_again(folder: PinFolder) -> None:
    """By the next agent, and by each exporter of one; a map of another shape gives way. Without pins there is none."""
    pins = complete(folder, STATE_OF)
    nothing = [(None, True), (None, False), (pins, False)]
    assert [open_told(each, DELIVERED, make=make) for each, make in nothing] == [None] * 3
    pin_a_map(pins._folder / "delivered")
    opened = [open_told(pins, DELIVERED, make=True) for _ in range(3)]
    told, key = Delivered(2**63, -7, bytes(range(176))), bytes(range(16))
    for each in opened:
        assert each is not None
        assert bpf.map_shape(each.fd) == SHAPE
        each.put(key, pack_delivered(told))
        assert [(name, unpack_delivered(raw)) for name, raw in each.items()] == [(key, told)]
        os.close(each.fd)
    assert names(pins._folder) == {"vip_ports", "notes", "delivered"}


def test_not_a_bpffs(tmp_path: Path) -> None:
    """It is told what to mount, and nothing is made."""
    folder, problem = claim(tmp_path / "pins")
    assert folder is None
    assert problem is not None
    assert problem.startswith(f"{tmp_path}/pins is on ")
    assert f"and not on a bpffs; mount one (mount -t bpf bpf {tmp_path}; in a pod a hostPath volume of " in problem
    assert problem.endswith(", or set OTEL_LB_HOP_PIN_PATH to off")
    assert list(tmp_path.iterdir()) == []
    assert reclaim(tmp_path / "pins") is None


def test_a_mount_with_a_space_and_a_link_to_it(tmp_path: Path) -> None:
    """The file system is that of the place where a path leads to."""
    with bpffs(tmp_path / "a b\\c") as mounted:
        (tmp_path / "link").symlink_to(mounted)
        folder, problem = claim(tmp_path / "link/pins")
        assert problem is None
        assert folder is not None
        os.close(folder._lock_fd)
        assert names(mounted) == {"pins"}
        (mounted / "pins").rmdir()


def test_read_only(mounted: Path, path: Path) -> None:
    """A bpffs that takes no names is told, whether the folder is there or not."""
    remount = ["mount", "-o", "remount,{}", str(mounted)]
    subprocess.run([word.format("ro") for word in remount], check=True)
    assert claim(path) == Pinning(None, f"{path} cannot be made: Read-only file system")
    subprocess.run([word.format("rw") for word in remount], check=True)
    path.mkdir()
    subprocess.run([word.format("ro") for word in remount], check=True)
    assert claim(path) == Pinning(None, f"{path} is not writable")


def test_no_folder_for_it(mounted: Path, path: Path) -> None:
    """Neither a missing folder above it nor a pin of that name is an error that ends the agent."""
    assert claim(mounted / "a/b") == Pinning(None, f"{mounted}/a/b cannot be made: No such file or directory")
    pin_a_map(path)
    assert claim(path) == Pinning(None, f"{path} cannot be made: File exists")
    assert reclaim(path) is None
    assert path.exists()


def test_nothing_found(folder: PinFolder) -> None:
    """An empty folder has no generation."""
    assert folder.find() is None
    assert folder.remove_except(None) == 0


def test_youngest_complete_generation(folder: PinFolder, caplog: pytest.LogCaptureFixture) -> None:
    """What was begun and not finished, and what cannot be read, is not taken over, and goes when all else does."""
    older = complete(folder, STATE_OF._replace(created_ns=8))
    youngest = complete(folder, STATE_OF._replace(created_ns=9))
    complete(folder, STATE_OF._replace(created_ns=7))
    unfinished = folder.make()
    pin_a_map(unfinished._folder / "vip_ports")
    unread = complete(folder, b"[]")
    found = folder.find()
    assert found is not None
    assert (found[0]._folder, found[1]) == (youngest._folder, STATE_OF._replace(created_ns=9))
    assert f"{unread._folder}: a note that an agent left cannot be read" in caplog.text
    assert str(unfinished._folder) not in caplog.text
    assert older._folder.exists()
    assert folder.remove_except(found[0]) == 4
    assert names(folder.path) == {youngest._folder.name}
    assert names(youngest._folder) == {"vip_ports", "notes"}


def test_what_is_not_ours_is_left_alone(folder: PinFolder) -> None:
    """Pins and folders of others in the same folder stay, and so it does itself."""
    pin_a_map(folder.path / "theirs")
    pin_a_map(folder.path / "v4_0123abcd")  # as a generation, but a map
    (folder.path / "their_folder").mkdir()
    pin_a_map(folder.path / "their_folder/map")
    (folder.path / "v4_0123abcx").mkdir()
    complete(folder, STATE_OF)
    foreign = {"theirs", "v4_0123abcd", "their_folder", "v4_0123abcx"}
    assert folder.remove_except(None) == 1
    assert names(folder.path) == foreign
    again = PinFolder(folder.path, os.dup(folder._lock_fd))
    again.remove()
    assert names(folder.path) == foreign
    assert names(folder.path / "their_folder") == {"map"}


def test_a_pin_is_replaced_in_one_step(folder: PinFolder) -> None:
    """A map takes the name of another, and what a killed agent left of such a step is no hindrance."""
    generation = folder.make()
    for entries in (1, 2, 3):
        if entries == 3:
            pin_a_map(generation._folder / "records_new")
        made = bpf.create_map(bpf.MapShape(bpf.HASH, 4, 4, entries), "records")
        generation.pin_map("records", made.fd)
        os.close(made.fd)
        fd = generation.open_map("records")
        assert bpf.map_shape(fd).entries == entries
        os.close(fd)
        assert names(generation._folder) == {"records"}


def test_links(rig: Rig, folder: PinFolder) -> None:
    """A pinned link outlives who made it, takes another program in its place, and goes with its name."""
    generation = folder.make()
    programs = empty_program(), empty_program()
    assert generation.obtain_link(rig.uplink, "lbh_ingress", programs[0]) is None
    link = bpf.attach_tcx(programs[0], rig.uplink, bpf.BPF_TCX_INGRESS)
    generation.pin_link(rig.uplink, "lbh_ingress", link)
    os.close(link)
    for program in (programs[0], programs[1]):
        assert len(attached(rig.uplink, bpf.BPF_TCX_INGRESS)) == 1
        taken = generation.obtain_link(rig.uplink, "lbh_ingress", program)
        assert taken is not None
        assert attached(rig.uplink, bpf.BPF_TCX_INGRESS) == [bpf.program_id(program)]
        os.close(taken)
    assert generation.obtain_link(rig.pod, "lbh_ingress", programs[0]) is None
    generation.unpin_links_except([(rig.uplink, "lbh_ingress"), (rig.uplink, "lbh_egress")], ())
    assert len(attached(rig.uplink, bpf.BPF_TCX_INGRESS)) == 1
    generation.unpin_links_except([(rig.pod, "lbh_ingress"), (rig.uplink, "lbh_egress")], ())
    # The kernel takes a link off a moment after its name has gone.
    wait_for("the end of a link", lambda: attached(rig.uplink, bpf.BPF_TCX_INGRESS) == [])
    generation.unpin_link(rig.uplink, "lbh_ingress")
    for program in programs:
        os.close(program)


@pytest.mark.usefixtures("rig")
def test_a_link_of_a_deleted_interface_is_none(folder: PinFolder) -> None:
    """Its name goes, and the next interface of that number is hooked anew."""
    generation, program = folder.make(), empty_program()
    for _ in range(2):
        said("ip", "link", "add", "brief", "index", "777", "type", "veth", "peer", "name", "far_brief")
        assert generation.obtain_link(777, "lbh_ingress", program) is None
        assert names(generation._folder) == set()
        link = bpf.attach_tcx(program, 777, bpf.BPF_TCX_INGRESS)
        generation.pin_link(777, "lbh_ingress", link)
        os.close(link)
        assert names(generation._folder) == {"link_777_lbh_ingress"}
        said("ip", "link", "del", "brief")
    os.close(program)


def test_own_netns(rig: Rig) -> None:
    """It is that of the process, by its inode."""
    assert own_netns() == os.fstat(rig.namespace.fd).st_ino


def test_uninstall(rig: Rig, folder: PinFolder) -> None:
    """Pins, links and filters go, whoever made them; what others attached stays. The second time nothing is left."""
    generation = complete(folder, STATE_OF)
    link = bpf.attach_tcx(rig.loaded.programs["lbh_ingress"], rig.uplink, bpf.BPF_TCX_INGRESS)
    generation.pin_link(rig.uplink, "lbh_ingress", link)
    os.close(link)
    foreign = empty_program()
    netlink = Netlink()
    netlink.add_filter(rig.uplink, INGRESS_PARENT, foreign, "foreign")
    Hooks(rig.loaded.programs, netlink, tcx=False).reconcile(links_named(netlink, "uplink", "pod"), datagrams=True)
    try:
        with pytest.raises(KernelError, match="another agent counts here"):
            uninstall(folder.path)
        assert "lbh_ingress" in said("tc", "filter", "show", "dev", "uplink", "ingress")
        assert len(attached(rig.uplink, bpf.BPF_TCX_INGRESS)) == 1
        fcntl.flock(folder._lock_fd, fcntl.LOCK_UN)
        assert uninstall(folder.path) == [
            f"{folder.path}: programs, links and counters removed",
            "filters removed from 2 interfaces",
        ]
        assert not folder.path.exists()
        wait_for("the end of a link", lambda: attached(rig.uplink, bpf.BPF_TCX_INGRESS) == [])
        shown = said("tc", "filter", "show", "dev", "uplink", "ingress")
        assert "foreign" in shown
        assert "lbh_" not in shown
        assert "clsact" not in said("tc", "qdisc", "show", "dev", "pod")
        assert uninstall(folder.path) == []
    finally:
        netlink.close()
        os.close(foreign)
        said("tc", "qdisc", "del", "dev", "uplink", "clsact")


@pytest.mark.usefixtures("rig")
def test_uninstall_deletes_nothing_in_an_ordinary_folder(tmp_path: Path) -> None:
    """Whatever stands there, and however it is called: only a bpffs has pins."""
    generation = tmp_path / "pins/v4_0123abcd"
    generation.mkdir(parents=True)
    for name in ("notes", "vip_ports", "link_2_lbh_ingress"):
        (generation / name).write_text(name)
    before = sorted(tmp_path.rglob("*"))
    assert uninstall(tmp_path / "pins") == []
    assert uninstall(tmp_path / "nowhere") == []
    assert uninstall(None) == []
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("own", [True, False])
def test_an_agent_that_pins_nothing(path: Path, own: bool) -> None:  # noqa: FBT001 - a parameter of the test
    """It takes off what would count beside it on this node, and nothing of another node's."""
    assert leave(path) is None
    folder = claim(path).folder
    assert folder is not None
    complete(folder, STATE_OF._replace(netns=own_netns() + (not own)))
    said = leave(path)
    assert said is not None
    assert "has programs that count beside this agent, which pins nothing: another agent counts here" in said
    os.close(folder._lock_fd)
    said = leave(path)
    assert said == (f"{path}: what was pinned there is taken off, it would count on beside this agent" if own else None)
    assert path.exists() is not own


def test_a_folder_of_somebody_else(path: Path) -> None:
    """Whoever owns it could take it away, so nothing is pinned there; of its own, nobody else sees anything."""
    path.mkdir(mode=0o777)
    path.chmod(0o777)
    os.chown(path, 65534, 65534)
    folder, problem = claim(path)
    assert (folder, problem) == (None, f"{path} belongs to user 65534, who could take it away")
    os.chown(path, 0, 0)
    assert claim(path).folder is not None
    assert path.stat().st_mode & 0o777 == 0o700
    assert claim(path.parent).problem == f"{path.parent} is where a bpffs is mounted, name a folder in it"


def test_notes_of_another_version(folder: PinFolder, caplog: pytest.LogCaptureFixture) -> None:
    """Notes of another size are not read at all: they would not fit."""
    generation = folder.make()
    for shape in (NOTES_SHAPE._replace(value_size=4_096), NOTES_SHAPE._replace(entries=4)):
        notes = bpf.create_map(shape, "notes")
        generation.pin_map("notes", notes.fd)
        os.close(notes.fd)
        assert folder.find() is None
    assert caplog.text.count("the notes there are of another version") == 2
