"""Attaching and letting go, both ways: tcx links and clsact filters."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

from otel_lb_hop.kernel import bpf, loader
from otel_lb_hop.kernel.hooks import Hooks, remove_filters
from otel_lb_hop.kernel.loader import PROGRAMS
from otel_lb_hop.kernel.netlink import EGRESS_PARENT, INGRESS_PARENT, Monitor, Netlink, filter_program
from otel_lb_hop.kernel.pins import Pins
from otel_lb_hop.model import Transport
from tests.bench.measure import DROP, empty_program, returning_program
from tests.kernel.packets import ethernet, ipv4
from tests.kernel.requirements import HAS_TCX, needs_kernel
from tests.kernel.rig import maps_of, vip_port
from tests.kernel.test_datagrams import udp
from tests.kernel.test_devices import sender
from tests.kernel.test_parser import CLIENT4, VIP4, syn4
from tests.lab.bpffs import bpffs
from tests.lab.programs import attached
from tests.lab.waiting import wait_for

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from otel_lb_hop.core.interfaces import Link
    from tests.kernel.rig import Rig

pytestmark = [pytest.mark.root, needs_kernel]

SENT = 23
WAYS = [pytest.param(False, id="clsact")]
if HAS_TCX:
    WAYS.insert(0, pytest.param(True, id="tcx"))
BOTH_WAYS = pytest.mark.parametrize("tcx", WAYS)


def hooks_of(rig: Rig, netlink: Netlink, *, tcx: bool | None) -> Hooks:
    """Make hooks that attach in one way."""
    return Hooks(rig.loaded.programs, netlink, tcx=tcx)


def links_named(netlink: Netlink, *names: str) -> list[Link]:
    """List the interfaces of these names."""
    return [link for link in netlink.links() if link.name in names]


def said(*words: str) -> str:
    """Run a command in the namespace and return what it printed."""
    return subprocess.run(words, check=True, capture_output=True, text=True).stdout


def send_syns(count: int = SENT) -> None:
    """Let SYNs to the VIP port come in by the uplink."""
    with sender("far_uplink") as send:
        for _ in range(count):
            send(ethernet(syn4()))


def wait_for_connections(rig: Rig, vip_id: int, count: int) -> int:
    """Wait a moment for so many external connections; answers how many there are."""
    until = time.monotonic() + 2
    while (seen := rig.vip(vip_id).connections[1]) < count and time.monotonic() < until:
        time.sleep(0.001)
    return seen


@BOTH_WAYS
def test_counts_what_comes_in(rig: Rig, netlink: Netlink, *, tcx: bool) -> None:
    """Attached either way, every SYN is counted once, however often the interfaces are gone over."""
    (marked,) = rig.serve(vip_port(VIP4))
    hooks = hooks_of(rig, netlink, tcx=tcx)
    try:
        for _ in range(3):
            hooks.reconcile(links_named(netlink, "uplink", "pod"))
        assert (hooks.interfaces, hooks.problems) == (["pod", "uplink"], {})
        assert hooks.method == ("tcx" if tcx else "clsact")
        send_syns()
        assert wait_for_connections(rig, marked.vip_id, SENT) == SENT
    finally:
        hooks.close()
    send_syns()
    time.sleep(0.05)
    assert rig.vip(marked.vip_id).connections == (0, SENT)


@BOTH_WAYS
def test_datagrams_only_while_asked_for(rig: Rig, netlink: Netlink, *, tcx: bool) -> None:
    """The program that watches datagrams comes and goes beside the two others, which stay and count."""
    (marked,) = rig.serve(vip_port(VIP4))
    (datagrams,) = rig.serve(vip_port(VIP4, transport=Transport.UDP))
    rig.serve(vip_port(VIP4), vip_port(VIP4, transport=Transport.UDP))
    hooks = hooks_of(rig, netlink, tcx=tcx)
    frame = ethernet(ipv4(CLIENT4.address, VIP4.address, udp(CLIENT4.port, VIP4.port), protocol=17))
    try:
        for turn, asked in enumerate((False, True, True, False, True)):
            hooks.reconcile(links_named(netlink, "uplink", "pod"), datagrams=asked)
            assert (hooks.interfaces, hooks.problems) == (["pod", "uplink"], {})
            for key in list(rig.flows.keys()):
                rig.flows.delete(key)
            send_syns(1)
            with sender("far_uplink") as send:
                send(frame)
            assert wait_for_connections(rig, marked.vip_id, turn + 1) == turn + 1
        assert wait_for_connections(rig, datagrams.vip_id, 3) == 3
    finally:
        hooks.close()
    for index in (rig.uplink, rig.pod):
        assert attached(index, bpf.BPF_TCX_INGRESS) == []
    assert "clsact" not in said("tc", "qdisc", "show")


def test_killed_while_it_watched_datagrams(rig: Rig, netlink: Netlink) -> None:
    """What a killed agent left by clsact to watch datagrams goes, though the next one does not need it."""
    hooks_of(rig, netlink, tcx=False).reconcile(links_named(netlink, "uplink"), datagrams=True)  # never closed: killed
    hooks = hooks_of(rig, netlink, tcx=False)
    assert said("tc", "filter", "show", "dev", "uplink", "ingress").count(" direct-action") == 2
    hooks.reconcile(links_named(netlink, "uplink"))
    shown = said("tc", "filter", "show", "dev", "uplink", "ingress")
    assert shown.count(" direct-action") == shown.count(" name lbh_ingress ") == 1
    hooks.close()
    assert "clsact" not in said("tc", "qdisc", "show", "dev", "uplink")


@BOTH_WAYS
def test_leaves_nothing(rig: Rig, netlink: Netlink, *, tcx: bool) -> None:
    """After close an interface has the qdiscs and programs it had before."""
    before = said("tc", "qdisc", "show", "dev", "uplink")
    hooks = hooks_of(rig, netlink, tcx=tcx)
    hooks.reconcile(links_named(netlink, "uplink"))
    hooks.close()
    assert said("tc", "qdisc", "show", "dev", "uplink") == before
    # Nothing holds the place: an exclusive way to ask, and for both directions.
    for kind in (bpf.BPF_TCX_INGRESS, bpf.BPF_TCX_EGRESS):
        assert attached(rig.uplink, kind) == []


def test_the_way_is_found_out(
    rig: Rig, netlink: Netlink, record_testsuite_property: Callable[[str, object], None]
) -> None:
    """Not told which way, tcx is used where the kernel has it, and clsact before."""
    (marked,) = rig.serve(vip_port(VIP4))
    hooks = hooks_of(rig, netlink, tcx=None)
    try:
        hooks.reconcile(links_named(netlink, "uplink", "pod"))
        assert (hooks.method, hooks.interfaces, hooks.problems) == (
            "tcx" if HAS_TCX else "clsact",
            ["pod", "uplink"],
            {},
        )
        record_testsuite_property("hooks", hooks.method)  # for the table of kernels
        send_syns()
        assert wait_for_connections(rig, marked.vip_id, SENT) == SENT
    finally:
        hooks.close()


def dropped() -> int:
    """Count what the filters of the uplink's clsact have dropped."""
    qdiscs = json.loads(said("tc", "-s", "-j", "qdisc", "show", "dev", "uplink"))
    return sum(int(qdisc["drops"]) for qdisc in qdiscs if qdisc["kind"] == "clsact")


def test_clsact_before_one_that_drops(rig: Rig, netlink: Netlink) -> None:
    """Another's program that drops everything, at the same priority and there first, is behind ours and still runs."""
    said("tc", "qdisc", "add", "dev", "uplink", "clsact")
    place = {"parent": INGRESS_PARENT, "prio": 1, "direct_action": True}
    netlink._socket.tc("add-filter", "bpf", rig.uplink, fd=returning_program(DROP), name="foreign", **place)
    hooks = hooks_of(rig, netlink, tcx=False)
    try:
        (marked,) = rig.serve(vip_port(VIP4))
        hooks.reconcile(links_named(netlink, "uplink"))
        send_syns()
        assert wait_for_connections(rig, marked.vip_id, SENT) == SENT
        assert dropped() == SENT
        hooks.close()
        send_syns()
        wait_for("the drops of what came later", lambda: dropped() == 2 * SENT)
        assert rig.vip(marked.vip_id).connections == (0, SENT)
    finally:
        said("tc", "qdisc", "del", "dev", "uplink", "clsact")


def test_clsact_behind_another_kind(rig: Rig, netlink: Netlink) -> None:
    """Where a filter of another kind has the first priority, ours takes the next one; what it leaves is counted."""
    said("tc", "qdisc", "add", "dev", "uplink", "clsact")
    elsewhere = ["u32", "match", "ip", "dst", "203.0.113.1/32", "flowid", "1:1"]
    for side in ("ingress", "egress"):
        said("tc", "filter", "add", "dev", "uplink", side, "protocol", "ip", "prio", "1", *elsewhere)
    hooks = hooks_of(rig, netlink, tcx=False)
    try:
        (marked,) = rig.serve(vip_port(VIP4))
        for _ in range(2):
            hooks.reconcile(links_named(netlink, "uplink"))
            assert hooks.interfaces == ["uplink"]
            assert list(hooks.problems) == ["uplink"]
            assert "others run before ours (u32 on ingress; u32 on egress)" in hooks.problems["uplink"]
        send_syns()
        assert wait_for_connections(rig, marked.vip_id, SENT) == SENT
        hooks.close()
        for side in ("ingress", "egress"):
            rest = said("tc", "filter", "show", "dev", "uplink", side)
            assert ("lbh_" in rest, "u32" in rest) == (False, True)
    finally:
        said("tc", "qdisc", "del", "dev", "uplink", "clsact")


def test_clsact_of_somebody_else_stays(rig: Rig, netlink: Netlink) -> None:
    """A clsact qdisc that was there stays, though nobody has a filter on it; that of a killed agent does not."""
    said("tc", "qdisc", "add", "dev", "uplink", "clsact")
    try:
        for _ in range(2):
            hooks = hooks_of(rig, netlink, tcx=False)
            hooks.reconcile(links_named(netlink, "uplink"), datagrams=True)
            hooks.close()
            assert "clsact" in said("tc", "qdisc", "show", "dev", "uplink")
            assert not said("tc", "filter", "show", "dev", "uplink", "ingress")
    finally:
        said("tc", "qdisc", "del", "dev", "uplink", "clsact")
    hooks_of(rig, netlink, tcx=False).reconcile(links_named(netlink, "uplink"))  # never closed: killed
    after = Netlink()
    hooks = hooks_of(rig, after, tcx=False)
    hooks.reconcile(links_named(after, "uplink"))
    hooks.close()
    after.close()
    assert "clsact" not in said("tc", "qdisc", "show", "dev", "uplink")


def test_clsact_beside_a_foreign_filter(rig: Rig, netlink: Netlink) -> None:
    """A filter that was there before stays, with its qdisc, and what a killed agent left is replaced."""
    netlink.add_filter(rig.uplink, INGRESS_PARENT, empty_program(), "foreign")
    try:
        (marked,) = rig.serve(vip_port(VIP4))
        hooks_of(rig, netlink, tcx=False).reconcile(links_named(netlink, "uplink"))  # never closed: killed
        hooks = hooks_of(rig, netlink, tcx=False)
        hooks.reconcile(links_named(netlink, "uplink"))
        send_syns()
        assert wait_for_connections(rig, marked.vip_id, SENT) == SENT
        shown = said("tc", "filter", "show", "dev", "uplink", "ingress")
        assert shown.count(" lbh_ingress direct-action") == 1
        hooks.close()
        rest = said("tc", "filter", "show", "dev", "uplink", "ingress")
        assert "lbh_" not in rest
        assert "foreign" in rest
    finally:
        said("tc", "qdisc", "del", "dev", "uplink", "clsact")


def filters(netlink: Netlink, interface: int, parent: str = INGRESS_PARENT) -> dict[str, tuple[int, int, int]]:
    """Give handle, priority and program of each filter on one side of an interface, by name."""
    found = {}
    for message in netlink._filters(interface, parent):
        program = filter_program(message)
        assert program is not None
        found[message.get_attr("TCA_OPTIONS").get_attr("TCA_BPF_NAME")] = (
            message["handle"], message["info"] >> 16, program,
        )  # fmt: skip
    return found


def test_clsact_filters_are_taken_over(rig: Rig, netlink: Netlink) -> None:
    """With the same programs they are not touched; other programs take their places; nobody else's is moved."""
    foreign, other = empty_program(), empty_program()
    programs = rig.loaded.programs
    netlink.add_filter(rig.uplink, INGRESS_PARENT, foreign, "foreign")
    try:
        hooks_of(rig, netlink, tcx=False).reconcile(links_named(netlink, "uplink"))  # never closed: killed
        before = [filters(netlink, rig.uplink, parent) for parent in (INGRESS_PARENT, EGRESS_PARENT)]
        assert [each.keys() for each in before] == [{"foreign", "lbh_ingress"}, {"lbh_egress"}]
        assert before[0]["lbh_ingress"][2] == bpf.program_id(programs["lbh_ingress"])
        hooks = hooks_of(rig, netlink, tcx=False)
        hooks.reconcile(links_named(netlink, "uplink"))
        assert [filters(netlink, rig.uplink, parent) for parent in (INGRESS_PARENT, EGRESS_PARENT)] == before
        changed = Hooks({**programs, "lbh_ingress": other}, netlink, tcx=False)
        changed.reconcile(links_named(netlink, "uplink"))
        after = [filters(netlink, rig.uplink, parent) for parent in (INGRESS_PARENT, EGRESS_PARENT)]
        assert after == [
            before[0] | {"lbh_ingress": (*before[0]["lbh_ingress"][:2], bpf.program_id(other))},
            before[1],
        ]
        hooks.close()
        assert filters(netlink, rig.uplink).keys() == {"foreign"}
        assert filters(netlink, rig.uplink)["foreign"] == before[0]["foreign"]
    finally:
        said("tc", "qdisc", "del", "dev", "uplink", "clsact")
        for fd in (foreign, other):
            os.close(fd)


@contextmanager
def second_build(rig: Rig) -> Iterator[dict[str, int]]:
    """Load the programs once more, on the same maps."""
    given = {}
    for program in rig.loaded.programs.values():
        for name, fd in maps_of(program).items():
            if name in given:
                os.close(fd)
            else:
                given[name] = fd
    made, _ = loader._compile(loader._recipe(rig.loaded.sizes, xdp=True), rig.loaded.state.hash_secrets, given)
    try:
        yield {name: made[name] for name in PROGRAMS}
    finally:
        for fd in {*made.values(), *given.values()}:
            os.close(fd)


def test_no_packet_passes_while_programs_are_exchanged(rig: Rig, netlink: Netlink) -> None:
    """SYNs come in all the time while one program takes another's place again and again: each is counted, and once."""
    (marked,) = rig.serve(vip_port(VIP4))
    sent: list[int] = []
    enough = threading.Event()

    def send() -> None:
        with rig.namespace.entered(), sender("far_uplink") as out:
            while not enough.is_set():
                out(ethernet(syn4()))
                sent.append(len(sent))
                if len(sent) % 100 == 0:  # what waits in the device is dropped if it is too much
                    wait_for("what was sent", lambda: rig.vip(marked.vip_id).connections[1] >= len(sent))

    with second_build(rig) as other, ThreadPoolExecutor(1) as pool:
        programs = [rig.loaded.programs["lbh_ingress"], other["lbh_ingress"]]
        netlink.add_filter(rig.uplink, INGRESS_PARENT, programs[0], "lbh_ingress")
        try:
            place = filters(netlink, rig.uplink)["lbh_ingress"][:2]
            sending = pool.submit(send)
            exchanged = 0
            while (exchanged < 300 or len(sent) < 1_000) and not sending.done():
                exchanged += 1
                program = programs[exchanged % 2]
                netlink.add_filter(rig.uplink, INGRESS_PARENT, program, "lbh_ingress")
                assert filters(netlink, rig.uplink) == {"lbh_ingress": (*place, bpf.program_id(program))}
            enough.set()
            sending.result()
            assert (exchanged >= 300, len(sent) >= 1_000) == (True, True)
            assert wait_for_connections(rig, marked.vip_id, len(sent)) == len(sent)
        finally:
            enough.set()
            said("tc", "qdisc", "del", "dev", "uplink", "clsact")


def test_filters_are_removed_from_all_interfaces(rig: Rig, netlink: Netlink) -> None:
    """Ours go, whoever attached them; a foreign one stays where it is, and so does its qdisc."""
    foreign = empty_program()
    netlink.add_filter(rig.uplink, INGRESS_PARENT, foreign, "foreign")
    netlink.add_filter(rig.peer, EGRESS_PARENT, foreign, "lbh")  # not quite ours
    hooks_of(rig, netlink, tcx=False).reconcile(links_named(netlink, "uplink", "pod"), datagrams=True)
    try:
        assert remove_filters(PROGRAMS, netlink) == 2
        assert filters(netlink, rig.uplink).keys() == {"foreign"}
        assert filters(netlink, rig.peer, EGRESS_PARENT).keys() == {"lbh"}
        shown = said("tc", "qdisc", "show")
        assert shown.count("clsact") == 2
        assert "clsact" not in said("tc", "qdisc", "show", "dev", "pod")
        assert remove_filters(PROGRAMS, netlink) == 0
    finally:
        for name in ("uplink", "far_uplink"):
            said("tc", "qdisc", "del", "dev", name, "clsact")
        os.close(foreign)


@pytest.fixture
def pins(tmp_path: Path) -> Iterator[Pins]:
    """Give a test a folder to pin in."""
    with bpffs(tmp_path / "bpf") as mounted:
        yield Pins(mounted)
        for path in mounted.glob("link_*"):
            path.unlink()


@pytest.mark.tcx
def test_pinned_links_go_on_and_are_taken_over(rig: Rig, netlink: Netlink, pins: Pins) -> None:
    """Closed hooks count on; the next agent's have the same links, and let go of what it does not watch."""
    (marked,) = rig.serve(vip_port(VIP4))
    programs = rig.loaded.programs
    hooks = Hooks(programs, netlink, pins, tcx=True)
    hooks.reconcile(links_named(netlink, "uplink", "pod", "far_pod"), datagrams=True)
    hooks.close()
    send_syns()
    assert wait_for_connections(rig, marked.vip_id, SENT) == SENT
    watched = attached(rig.uplink, bpf.BPF_TCX_INGRESS)
    assert sorted(watched) == sorted(bpf.program_id(programs[name]) for name in ("lbh_ingress", "lbh_datagram"))
    hooks = Hooks(programs, netlink, pins, tcx=True)
    hooks.reconcile(links_named(netlink, "uplink", "pod"))
    # The kernel takes a link off a moment after its name has gone.
    left = [bpf.program_id(programs["lbh_ingress"])]
    wait_for("the end of a link", lambda: attached(rig.uplink, bpf.BPF_TCX_INGRESS) == left)
    far_pod = socket.if_nametoindex("far_pod")
    wait_for("the end of a link", lambda: attached(far_pod, bpf.BPF_TCX_INGRESS) == [])
    send_syns()
    assert wait_for_connections(rig, marked.vip_id, 2 * SENT) == 2 * SENT
    hooks.reconcile(links_named(netlink, "pod"))
    wait_for("the end of a link", lambda: attached(rig.uplink, bpf.BPF_TCX_INGRESS) == [])
    hooks.close()
    assert len(attached(rig.pod, bpf.BPF_TCX_EGRESS)) == 1
    pins.unpin_links_except([], ())
    wait_for("the end of a link", lambda: attached(rig.pod, bpf.BPF_TCX_EGRESS) == [])


@BOTH_WAYS
def test_interface_goes_and_comes_back(rig: Rig, netlink: Netlink, *, tcx: bool) -> None:
    """A deleted interface is let go of without a word; one of the same name and number is hooked anew."""
    hooks = hooks_of(rig, netlink, tcx=tcx)
    try:
        for _ in range(2):
            said("ip", "link", "add", "brief", "index", "777", "type", "veth", "peer", "name", "far_brief")
            hooks.reconcile(links_named(netlink, "uplink", "brief"))
            assert (hooks.interfaces, hooks.problems) == (["brief", "uplink"], {})
            said("ip", "link", "del", "brief")
        said("ip", "link", "add", "brief", "index", "777", "type", "veth", "peer", "name", "far_brief")
        hooks.reconcile(links_named(netlink, "uplink", "brief"))
        if tcx:
            assert attached(777, bpf.BPF_TCX_INGRESS) != []
        else:
            assert "lbh_ingress" in said("tc", "filter", "show", "dev", "brief", "ingress")
        said("ip", "link", "del", "brief")
        hooks.reconcile(links_named(netlink, "uplink", "brief"))
        assert hooks.interfaces == ["uplink"]
    finally:
        hooks.close()


def test_refusal_is_told_and_tried_again(rig: Rig, netlink: Netlink) -> None:
    """An interface that refuses is named with the reason; the others are hooked, and it is tried again."""
    programs = dict(rig.loaded.programs)
    hooks = Hooks({**programs, "lbh_egress": programs["lbh_sweep"] + 10_000}, netlink, tcx=HAS_TCX)
    hooks.reconcile(links_named(netlink, "uplink"))
    assert hooks.interfaces == []
    assert "uplink" in hooks.problems
    # Nothing by halves.
    assert attached(rig.uplink, bpf.BPF_TCX_INGRESS) == []
    assert "clsact" not in said("tc", "qdisc", "show", "dev", "uplink")
    hooks.close()


@pytest.mark.usefixtures("rig")
def test_monitor_hears_of_a_new_interface() -> None:
    """An interface that appears is told of at once."""
    monitor = Monitor()
    try:
        said("ip", "link", "add", "brief", "type", "veth", "peer", "name", "far_brief")
        assert monitor.changed.wait(2)
    finally:
        said("ip", "link", "del", "brief")
        monitor.close()
