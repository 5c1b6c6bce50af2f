"""Interfaces that come, go, are renamed, move to other namespaces and back, and change their MTU, under the hooks."""

from __future__ import annotations

import os
import subprocess
import threading
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from otel_lb_hop.kernel import bpf
from otel_lb_hop.kernel import hooks as hooks_module
from otel_lb_hop.kernel.hooks import Hooks, TcxAttachment
from otel_lb_hop.kernel.netlink import Monitor
from otel_lb_hop.kernel.pins import Pins
from tests.kernel.packets import ethernet
from tests.kernel.requirements import needs_kernel
from tests.kernel.rig import Namespace, vip_port
from tests.kernel.test_devices import sender, set_mtu
from tests.kernel.test_hooks import BOTH_WAYS, SENT, links_named, said
from tests.kernel.test_parser import VIP4, syn4
from tests.kernel.test_xdp_hooks import Arrivals, shown
from tests.lab.bpffs import bpffs
from tests.lab.programs import attached
from tests.lab.waiting import wait_for

if TYPE_CHECKING:
    from collections.abc import Iterator

    from otel_lb_hop.kernel.netlink import Netlink
    from tests.kernel.handshakes import Handshakes
    from tests.kernel.rig import Rig

pytestmark = [pytest.mark.root, needs_kernel]

INDEX = 777
MANY = 20
HOOKS = (bpf.BPF_TCX_INGRESS, bpf.BPF_TCX_EGRESS)
WAYS = pytest.mark.parametrize("way", ["tcx", "clsact", "xdp"])


@pytest.fixture
def elsewhere(rig: Rig) -> Iterator[Namespace]:  # noqa: ARG001 - from whose namespace a test looks
    """Give a test another namespace, as of a pod."""
    made = Namespace()
    yield made
    made.close()


@pytest.fixture
def brief(netlink: Netlink, elsewhere: Namespace) -> Iterator[None]:  # noqa: ARG001 - the order of their ends
    """Give a test a cable from `brief` (number 777) to `far_brief`, up."""
    plug()
    yield
    for name in ("brief", "far_brief"):
        subprocess.run(["ip", "link", "del", name], check=False, capture_output=True)


def descriptors() -> int:
    """Count the descriptors of this process."""
    return len([*Path("/proc/self/fd").iterdir()])


def plug(name: str = "brief") -> None:
    """Make an interface of the number 777, with a cable to another."""
    said("ip", "link", "add", name, "index", str(INDEX), "type", "veth", "peer", "name", f"far_{name}")
    said("ip", "link", "set", f"far_{name}", "up")
    said("ip", "link", "set", name, "up")


def move(name: str, namespace_fd: int) -> None:
    """Put an interface into another namespace, as CNI plugins do with a pod's."""
    said("ip", "link", "set", name, "netns", f"/proc/{os.getpid()}/fd/{namespace_fd}")


def make_hooks(rig: Rig, netlink: Netlink, way: str, pins: Pins | None = None) -> Hooks:
    """Make hooks that attach in this way."""
    return Hooks(rig.loaded.programs, netlink, pins, tcx=way != "clsact", uplink_hook="xdp" if way == "xdp" else "tc")


def reconcile(hooks: Hooks, netlink: Netlink) -> None:
    """Let the hooks follow what there is now; 777 is an uplink."""
    hooks.reconcile(links_named(netlink, "brief", "uplink"), uplinks={INDEX})
    assert hooks.problems == {}


def on(name: str, index: int = INDEX) -> list[int]:
    """Count the programs on an interface: by tcx, clsact and XDP."""
    by_tcx = sum(len(attached(index, kind)) for kind in HOOKS)
    sides = [said("tc", "filter", "show", "dev", name, side) for side in ("ingress", "egress")]
    return [by_tcx, sum(side.count(" direct-action") for side in sides), shown(name).count(" xdp ")]


EXPECTED = {"tcx": [2, 0, 0], "clsact": [0, 2, 0], "xdp": [1, 0, 1]}


@WAYS
@pytest.mark.usefixtures("brief")
def test_moves_away_and_back(
    rig: Rig, netlink: Netlink, elsewhere: Namespace, handshakes: Handshakes, way: str
) -> None:
    """In the other namespace nothing of ours remains; back again it is hooked, and counts."""
    hooks = make_hooks(rig, netlink, way)
    before = descriptors()
    try:
        for turn in range(1, 4):
            reconcile(hooks, netlink)
            assert on("brief") == EXPECTED[way]
            handshakes.send(SENT, into="far_brief")
            wait_for("what came in", lambda: handshakes.seen()[0] == 2 * SENT * turn)  # noqa: B023
            move("brief", elsewhere.fd)
            reconcile(hooks, netlink)
            assert hooks.interfaces == ["uplink"]
            with elsewhere.entered():
                said("ip", "link", "set", "brief", "up")
                assert on("brief") == [0, 0, 0]
                move("brief", rig.namespace.fd)
            said("ip", "link", "set", "brief", "up")
    finally:
        hooks.close()
    assert descriptors() == before
    assert on("brief") == [0, 0, 0]


@pytest.mark.parametrize("pinned", [False, True], ids=["", "pinned"])
@pytest.mark.usefixtures("brief")
def test_its_number_is_given_to_another(
    rig: Rig, netlink: Netlink, elsewhere: Namespace, handshakes: Handshakes, tmp_path: Path, *, pinned: bool
) -> None:
    """An interface moves away, one with its name and number takes its place at once: that one is hooked, and no other.

    The link that went with the first still names the number.
    """
    with bpffs(tmp_path / "bpf") as folder:
        pins = Pins(folder) if pinned else None
        hooks = make_hooks(rig, netlink, "tcx", pins)
        reconcile(hooks, netlink)
        if pinned:
            hooks.close()  # and it comes back after what happens now
        move("brief", elsewhere.fd)
        said("ip", "link", "set", "far_brief", "name", "was_brief")
        plug()
        hooks = make_hooks(rig, netlink, "tcx", pins) if pinned else hooks
        try:
            reconcile(hooks, netlink)
            assert on("brief") == [2, 0, 0]
            handshakes.send(SENT, into="far_brief")
            wait_for("what came in", lambda: handshakes.seen()[0] == 2 * SENT)
            with elsewhere.entered():
                assert on("brief") == [0, 0, 0]
        finally:
            hooks.close()


@pytest.mark.parametrize("way", ["tcx", "xdp"])
@pytest.mark.usefixtures("brief")
def test_moves_while_nobody_watches(rig: Rig, netlink: Netlink, elsewhere: Namespace, tmp_path: Path, way: str) -> None:
    """What is pinned goes with the interface, until the next agent begins: it takes that off."""
    with bpffs(tmp_path / "bpf") as folder:
        hooks = make_hooks(rig, netlink, way, Pins(folder))
        reconcile(hooks, netlink)
        hooks.close()
        names = {path.name for path in folder.iterdir()}
        move("brief", elsewhere.fd)
        hooks = make_hooks(rig, netlink, way, Pins(folder))
        reconcile(hooks, netlink)
        with elsewhere.entered():
            wait_for("the end of what was pinned", lambda: on("brief") == [0, 0, 0])
        gone = names - {path.name for path in folder.iterdir()}
        assert len(gone) == 2
        assert {name.split("_")[1] for name in gone} == {str(INDEX)}
        hooks.close()


@pytest.mark.usefixtures("brief")
def test_one_of_two_is_forced_off(rig: Rig, netlink: Netlink, handshakes: Handshakes, tmp_path: Path) -> None:
    """Where somebody takes one of our pinned programs off, it is there again after the next look, the other too."""
    with bpffs(tmp_path / "bpf") as folder:
        hooks = make_hooks(rig, netlink, "tcx", Pins(folder))
        try:
            for turn in range(1, 4):
                reconcile(hooks, netlink)
                assert on("brief") == [2, 0, 0]
                handshakes.send(SENT, into="far_brief")
                wait_for("what came in", lambda: handshakes.seen()[0] == 2 * SENT * turn)  # noqa: B023
                egress = hooks._hooked[INDEX].egress
                assert isinstance(egress, TcxAttachment)
                bpf.detach_link(egress.fd)
        finally:
            hooks.close()


@WAYS
@pytest.mark.usefixtures("brief")
def test_renamed(rig: Rig, netlink: Netlink, handshakes: Handshakes, way: str) -> None:
    """An interface keeps what is on it under a new name, down and up again too."""
    hooks = make_hooks(rig, netlink, way)
    try:
        reconcile(hooks, netlink)
        said("ip", "link", "set", "brief", "down")
        said("ip", "link", "set", "brief", "name", "renamed")
        there = on("renamed")
        said("ip", "link", "set", "renamed", "up")
        for _ in range(2):
            hooks.reconcile(links_named(netlink, "renamed", "uplink"), uplinks={INDEX})
        assert (hooks.interfaces, hooks.problems) == (["renamed", "uplink"], {})
        assert on("renamed") == there == EXPECTED[way]
        handshakes.send(SENT, into="far_brief")
        wait_for("what came in", lambda: handshakes.seen()[0] == 2 * SENT)
    finally:
        hooks.close()
        subprocess.run(["ip", "link", "del", "renamed"], check=False)


@pytest.mark.parametrize("hook", ["xdp", "xdp-generic"])
def test_mtu_changes_under_traffic(rig: Rig, netlink: Netlink, hook: str) -> None:
    """An uplink watched by XDP takes other MTUs: nothing is attached anew, what comes in is counted, each once.

    What would not fit into a page any more is refused by the kernel while XDP is in the driver.
    """
    (marked,) = rig.serve(vip_port(VIP4))
    set_mtu(1500)
    done = threading.Event()

    def traffic() -> None:
        with sender("far_uplink") as put:
            while not done.is_set():
                put(ethernet(syn4()))

    hooks = Hooks(rig.loaded.programs, netlink, uplink_hook=hook)
    links = links_named(netlink, "uplink")
    try:
        hooks.reconcile(links, uplinks={rig.uplink})
        first = shown("uplink").partition("prog/xdp")[2]
        with Arrivals("uplink") as arrivals:
            thread = threading.Thread(target=traffic)
            thread.start()
            try:
                for mtu in (1400, 3000, 1280, 1500) * 3:
                    wait_for("traffic", partial(arrivals.reach, arrivals.count + 20))
                    set_mtu(mtu)
                    hooks.reconcile(links, uplinks={rig.uplink})
                    assert (hooks.ingress, hooks.problems) == ({"uplink": hook}, {})
            finally:
                done.set()
                thread.join()
            wait_for("as many as came in", lambda: rig.vip(marked.vip_id).connections == (0, arrivals.count))
        assert shown("uplink").partition("prog/xdp")[2] == first
        if hook == "xdp":
            with pytest.raises(subprocess.CalledProcessError):
                set_mtu(9000)
    finally:
        hooks.close()
        set_mtu(9000)


@BOTH_WAYS
def test_many_come_and_go(rig: Rig, netlink: Netlink, *, tcx: bool) -> None:
    """Twenty pairs are hooked; when they have gone, no descriptor, pin or problem is left of them."""
    hooks = Hooks(rig.loaded.programs, netlink, tcx=tcx)
    hooks.reconcile(netlink.links())
    fds, before = descriptors(), hooks.interfaces
    added = [f"link add m{number} group {INDEX} type veth peer name n{number}\n" for number in range(MANY)]
    ends = [f"{end}{number}" for number in range(MANY) for end in ("m", "n")]
    try:
        for datagrams in (False, True):
            subprocess.run(["ip", "-batch", "-"], input="".join(added), text=True, check=True)
            hooks.reconcile(netlink.links(), datagrams=datagrams)
            while hooks.waiting:
                hooks.reconcile(netlink.links(), datagrams=datagrams)
            assert (hooks.interfaces, hooks.problems) == (sorted([*before, *ends]), {})
            said("ip", "link", "del", "group", str(INDEX))
            hooks.reconcile(netlink.links())
            assert (hooks.interfaces, hooks.problems) == (before, {})
            assert descriptors() == fds
    finally:
        hooks.close()


def test_more_than_there_is_time_for(
    rig: Rig, netlink: Netlink, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With no time at all each look hooks one interface more, uplinks first; pinned links wait for their turn."""
    wanted = links_named(netlink, "uplink", "pod", "far_uplink")
    with bpffs(tmp_path / "bpf") as folder:
        pins = Pins(folder)
        for _ in range(2):
            monkeypatch.setattr(hooks_module, "HOOKING_SECONDS", 0.0)
            hooks = Hooks(rig.loaded.programs, netlink, pins, tcx=True)
            steps = []
            for _ in range(4):
                hooks.reconcile(wanted, uplinks={rig.pod})
                steps.append((hooks.interfaces, hooks.waiting, len([*folder.glob("link_*")])))
                assert hooks.problems == {}
            assert [waiting for _, waiting, _ in steps] == [2, 1, 0, 0]
            assert steps[0][0] == ["pod"]
            assert steps[2][0] == ["far_uplink", "pod", "uplink"]
            hooks.close()
        assert [pinned for *_, pinned in steps] == [6, 6, 6, 6]
        monkeypatch.setattr(hooks_module, "HOOKING_SECONDS", 10.0)
        hooks = Hooks(rig.loaded.programs, netlink, pins, tcx=True)
        hooks.reconcile(wanted)
        assert (hooks.interfaces, hooks.waiting) == (["far_uplink", "pod", "uplink"], 0)
        monkeypatch.setattr(hooks_module, "HOOKING_SECONDS", 0.0)
        turns = []
        for _ in range(3):
            hooks.reconcile(wanted, datagrams=True)
            turns.append((hooks.waiting, len([*folder.glob("link_*")])))
        assert turns == [(2, 7), (1, 8), (0, 9)]
        hooks.reconcile([])
        assert list(folder.glob("link_*")) == []
        hooks.close()


@pytest.mark.usefixtures("rig")
@pytest.mark.parametrize(
    "change",
    [
        "link set brief down",
        "link set brief mtu 1400",
        "link set brief name renamed",
        "link set brief master bridge",
        "link del brief",
    ],
)
def test_monitor_hears_of_every_change(brief: None, change: str) -> None:  # noqa: ARG001 - it is what changes
    """Whatever happens to an interface is told of at once, and while nothing happens nothing is."""
    said("ip", "link", "add", "bridge", "type", "bridge")
    monitor = Monitor()
    try:
        while monitor.changed.wait(0.3):  # what the new interfaces still bring with them
            monitor.changed.clear()
        said("ip", *change.split())
        assert monitor.changed.wait(10)
    finally:
        monitor.close()
        said("ip", "link", "del", "bridge")
        subprocess.run(["ip", "link", "del", "renamed"], check=False, capture_output=True)
