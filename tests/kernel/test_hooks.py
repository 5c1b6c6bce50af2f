"""Attaching and letting go, both ways: tcx links and clsact filters."""

from __future__ import annotations

import json
import subprocess
import time
from typing import TYPE_CHECKING

import pytest

from otel_lb_hop.kernel import bpf
from otel_lb_hop.kernel.hooks import Hooks
from otel_lb_hop.kernel.netlink import INGRESS_PARENT, Monitor, Netlink
from otel_lb_hop.model import Transport
from tests.bench.measure import DROP, empty_program, returning_program
from tests.kernel.packets import ethernet
from tests.kernel.requirements import HAS_TCX, needs_kernel
from tests.kernel.rig import vip_port
from tests.kernel.test_devices import sender
from tests.kernel.test_parser import VIP4, syn4
from tests.lab.programs import attached
from tests.lab.waiting import wait_for

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from otel_lb_hop.core.interfaces import Link
    from tests.kernel.rig import Rig

pytestmark = [pytest.mark.root, needs_kernel]

SENT = 23
WAYS = [pytest.param(False, id="clsact")]
if HAS_TCX:
    WAYS.insert(0, pytest.param(True, id="tcx"))
BOTH_WAYS = pytest.mark.parametrize("tcx", WAYS)


@pytest.fixture
def netlink(rig: Rig) -> Iterator[Netlink]:  # noqa: ARG001 - whose namespace the thread is in
    """Give a test a netlink socket in the namespace of the rig."""
    made = Netlink()
    yield made
    made.close()


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
    frame = ethernet(syn4(protocol=17))
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
            assert (hooks.interfaces, hooks.problems) == (["uplink"], {})
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
