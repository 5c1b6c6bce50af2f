"""Uplinks watched by XDP: attached, refused, gone over to and from, and let go of."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import threading
from functools import partial
from typing import TYPE_CHECKING, Self

import pytest

from otel_lb_hop.kernel import bpf, hooks
from otel_lb_hop.kernel.hooks import Hooks, XdpAttachment
from otel_lb_hop.model import Transport
from tests.kernel.packets import ethernet, ipv4
from tests.kernel.requirements import needs_kernel
from tests.kernel.rig import vip_port
from tests.kernel.test_datagrams import udp
from tests.kernel.test_devices import SOL_PACKET, Tun, sender, set_mtu
from tests.kernel.test_hooks import BOTH_WAYS, SENT, links_named, said
from tests.kernel.test_parser import CLIENT4, VIP4, VIP6, syn4, syn6
from tests.lab.programs import attached, foreign_xdp
from tests.lab.waiting import wait_for

if TYPE_CHECKING:
    from collections.abc import Iterator

    from otel_lb_hop.kernel.netlink import Netlink
    from tests.kernel.rig import Rig

pytestmark = [pytest.mark.root, needs_kernel]

XDP = pytest.mark.parametrize("hook", ["xdp", "xdp-generic"])
MODES = {"xdp": bpf.XDP_FLAGS_DRV_MODE, "xdp-generic": bpf.XDP_FLAGS_SKB_MODE}
SHOWN = {"xdp": " xdp ", "xdp-generic": " xdpgeneric "}
ETH_P_IP, PACKET_STATISTICS = 0x0800, 6
TURNS = 20
"""How often an interface goes over, to XDP and back."""


@pytest.fixture(autouse=True)
def _small(rig: Rig) -> Iterator[None]:  # noqa: ARG001 - whose namespace the thread is in
    """Let the driver of the uplink's veth take XDP: a packet must fit into a page."""
    set_mtu(1500)
    yield
    set_mtu(9000)
    assert "xdp" not in said("ip", "-d", "link", "show")


@contextlib.contextmanager
def hooked(rig: Rig, netlink: Netlink, hook: str, *, tcx: bool | None = None) -> Iterator[Hooks]:
    """Make hooks for this uplink hook, and let go of everything in the end."""
    made = Hooks(rig.loaded.programs, netlink, tcx=tcx, uplink_hook=hook)
    try:
        yield made
    finally:
        made.close()


@contextlib.contextmanager
def occupied(interface: int, hook: str) -> Iterator[None]:
    """Let somebody else's XDP program be on an interface."""
    program = foreign_xdp()
    link = bpf.attach_xdp(program, interface, MODES[hook])
    try:
        yield
    finally:
        os.close(link)
        os.close(program)


class Arrivals:
    """Counts the IPv4 packets that come in by an interface, behind all hooks: those of a packet socket, kept or not."""

    def __init__(self, interface: str) -> None:
        self._socket = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
        self._socket.bind((interface, ETH_P_IP))
        self._count = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    @property
    def count(self) -> int:
        """How many so far."""
        # Asking sets the kernel's count back (packet(7)).
        self._count += struct.unpack("=II", self._socket.getsockopt(SOL_PACKET, PACKET_STATISTICS, 8))[0]
        return self._count

    def reach(self, count: int) -> bool:
        """Whether there are so many."""
        return self.count >= count


def send(count: int = SENT) -> None:
    """Let SYNs of both families to the VIP ports come in by the uplink."""
    with sender("far_uplink") as put:
        for _ in range(count):
            put(ethernet(syn4()))
            put(ethernet(syn6()))


def counted(rig: Rig) -> list[tuple[int, int]]:
    """Return connections by origin for each VIP port."""
    return [row.connections for _, row in sorted(rig.snapshot().vips.items())]


def by_tc(made: Hooks, name: str, way: str) -> list[str]:
    """Return what tc has on a side (ingress or egress) of an interface."""
    if made.method == "tcx":
        kind = bpf.BPF_TCX_INGRESS if way == "ingress" else bpf.BPF_TCX_EGRESS
        return [str(number) for number in attached(socket.if_nametoindex(name), kind)]
    lines = said("tc", "filter", "show", "dev", name, way).splitlines()
    return [line for line in lines if " direct-action" in line]


def shown(name: str) -> str:
    """Return what `ip link` says of an interface, in one line."""
    return said("ip", "-o", "link", "show", "dev", name)


@XDP
@BOTH_WAYS
def test_counts_what_comes_in(rig: Rig, netlink: Netlink, hook: str, *, tcx: bool) -> None:
    """The uplink's ingress is with XDP, its egress and all else with tc; every SYN counts once, from outside."""
    rig.serve(vip_port(VIP4), vip_port(VIP6))
    with hooked(rig, netlink, hook, tcx=tcx) as made:
        for _ in range(3):
            made.reconcile(links_named(netlink, "uplink", "pod"), uplinks={rig.uplink})
        assert (made.interfaces, made.problems) == (["pod", "uplink"], {})
        assert (made.method, made.ingress) == ("tcx" if tcx else "clsact", {"uplink": hook})
        assert SHOWN[hook] in shown("uplink")
        assert "xdp" not in shown("pod")
        on = [len(by_tc(made, name, way)) for name in ("uplink", "pod") for way in ("ingress", "egress")]
        assert on == [0, 1, 1, 1]
        send()
        wait_for("the SYNs", lambda: counted(rig) == [(0, SENT)] * 2)
    assert "xdp" not in shown("uplink")
    send()
    assert counted(rig) == [(0, SENT)] * 2


@XDP
def test_datagrams_stay_with_tc(rig: Rig, netlink: Netlink, hook: str) -> None:
    """Datagrams to a VIP port without endpoints are seen on the uplink as before."""
    rig.serve(vip_port(VIP4), vip_port(VIP4, transport=Transport.UDP))
    with hooked(rig, netlink, hook) as made:
        made.reconcile(links_named(netlink, "uplink"), uplinks={rig.uplink}, datagrams=True)
        send(1)
        with sender("far_uplink") as put:
            put(ethernet(ipv4(CLIENT4.address, VIP4.address, udp(CLIENT4.port, VIP4.port), protocol=17)))
        wait_for("both", lambda: counted(rig) == [(0, 1)] * 2)
        made.reconcile(links_named(netlink, "uplink"), uplinks={rig.uplink})
        assert by_tc(made, "uplink", "ingress") == []


@pytest.mark.parametrize(
    ("hook", "theirs", "reason"),
    [
        ("xdp", "xdp", "another XDP program is on it, and what that redirects or drops is not seen"),
        ("xdp-generic", "xdp-generic", "another XDP program is on it, and what that redirects or drops is not seen"),
        ("xdp", "xdp-generic", "XDP is in use on it in the other mode, or on a device that it is a port of"),
        ("xdp-generic", "xdp", "XDP is in use on it in the other mode, or on a device that it is a port of"),
    ],
)
def test_foreign_program(
    rig: Rig,
    netlink: Netlink,
    hook: str,
    theirs: str,
    reason: str,
    *,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Where somebody else's XDP program is, tc takes its place and counts all; it is said once, and tried again."""
    monkeypatch.setattr(hooks, "XDP_REST_SECONDS", 0.0)
    rig.serve(vip_port(VIP4), vip_port(VIP6))
    wanted = links_named(netlink, "uplink", "pod")
    with hooked(rig, netlink, hook) as made:
        with occupied(rig.uplink, theirs):
            for _ in range(3):
                made.reconcile(wanted, uplinks={rig.uplink})
                assert made.ingress == {"uplink": f"{made.method} in place of {hook}: {reason}"}
            assert (made.interfaces, made.problems) == (["pod", "uplink"], {})
            send()
            wait_for("the SYNs", lambda: counted(rig) == [(0, SENT)] * 2)
        made.reconcile(wanted, uplinks={rig.uplink})
        assert made.ingress == {"uplink": hook}
        assert by_tc(made, "uplink", "ingress") == []
        send()
        wait_for("more SYNs", lambda: counted(rig) == [(0, 2 * SENT)] * 2)
    assert caplog.messages == [f"uplink is watched by tc in place of {hook}: {reason}"]


def test_refusal_rests(rig: Rig, netlink: Netlink) -> None:
    """An uplink that refused is left alone for a while, and forgotten when it is no uplink any more."""
    wanted = links_named(netlink, "uplink")
    with hooked(rig, netlink, "xdp") as made:
        with occupied(rig.uplink, "xdp"):
            made.reconcile(wanted, uplinks={rig.uplink})
        made.reconcile(wanted, uplinks={rig.uplink})
        assert "in place of xdp" in made.ingress["uplink"]
        made.reconcile(wanted)
        assert made.ingress == {}
        made.reconcile(wanted, uplinks={rig.uplink})
        assert made.ingress == {"uplink": "xdp"}


def test_jumbo_frames(rig: Rig, netlink: Netlink) -> None:
    """The driver of a veth whose packets may be longer than a page refuses XDP; the stack takes it."""
    set_mtu(9000)
    for hook, told in (("xdp", "{} in place of xdp: its MTU is too large for XDP"), ("xdp-generic", "xdp-generic")):
        with hooked(rig, netlink, hook) as made:
            made.reconcile(links_named(netlink, "uplink"), uplinks={rig.uplink})
            assert (made.interfaces, made.problems) == (["uplink"], {})
            assert made.ingress == {"uplink": told.format(made.method)}


def test_driver_without_xdp(rig: Rig, netlink: Netlink) -> None:
    """A driver that has no XDP is told as such, and where there is no Ethernet header nothing is tried."""
    said("ip", "link", "add", "bridge", "type", "bridge")
    tun = Tun("tunnel")
    try:
        links = links_named(netlink, "bridge", "tunnel")
        with hooked(rig, netlink, "xdp") as made:
            made.reconcile(links, uplinks={link.index for link in links})
            assert (made.interfaces, made.problems) == (["bridge", "tunnel"], {})
            assert made.ingress == {
                "bridge": f"{made.method} in place of xdp: its driver has no XDP, or not with its settings",
                "tunnel": f"{made.method} in place of xdp: it has no Ethernet header",
            }
    finally:
        tun.close()
        said("ip", "link", "del", "bridge")


@XDP
@BOTH_WAYS
def test_goes_over_under_traffic(rig: Rig, netlink: Netlink, hook: str, *, tcx: bool) -> None:
    """An interface becomes an uplink and ceases to be one, again and again: each SYN that comes in counts once.

    A veth throws away what waits in its queue when XDP leaves its driver, so what comes in is counted where both
    hooks have passed: by a packet socket.
    """
    rig.serve(vip_port(VIP4))
    wanted = links_named(netlink, "uplink")
    done = threading.Event()

    def traffic() -> None:
        with sender("far_uplink") as put:
            while not done.is_set():
                put(ethernet(syn4()))

    with hooked(rig, netlink, hook, tcx=tcx) as made, Arrivals("uplink") as arrivals:
        made.reconcile(wanted)
        thread = threading.Thread(target=traffic)
        thread.start()
        try:
            for turn in range(TURNS):
                for uplinks in ({rig.uplink}, set()):
                    wait_for("traffic", partial(arrivals.reach, arrivals.count + 20))
                    made.reconcile(wanted, uplinks=uplinks)
                    assert (made.ingress, made.problems) == ({"uplink": hook} if uplinks else {}, {}), turn
        finally:
            done.set()
            thread.join()
        wait_for("as many as came in", lambda: counted(rig) == [(0, arrivals.count)])
        assert sum(row.retransmits for row in rig.snapshot().vips.values()) == 0


def test_interface_goes_and_comes_back(rig: Rig, netlink: Netlink) -> None:
    """A deleted uplink is let go of without a word; one of the same name and number is hooked anew."""
    with hooked(rig, netlink, "xdp") as made:
        for _ in range(3):
            said("ip", "link", "add", "brief", "index", "777", "type", "veth", "peer", "name", "far_brief")
            made.reconcile(links_named(netlink, "brief"), uplinks={777})
            assert (made.interfaces, made.problems, made.ingress) == (["brief"], {}, {"brief": "xdp"})
            assert SHOWN["xdp"] in shown("brief")
            said("ip", "link", "del", "brief")
        made.reconcile(links_named(netlink, "brief"), uplinks={777})
        assert (made.interfaces, made.problems, made.ingress) == ([], {}, {})


def test_nothing_by_halves(rig: Rig, netlink: Netlink) -> None:
    """Where egress is refused, XDP does not stay alone."""
    programs = dict(rig.loaded.programs) | {"lbh_egress": rig.loaded.programs["lbh_sweep"] + 10_000}
    made = Hooks(programs, netlink, uplink_hook="xdp")
    made.reconcile(links_named(netlink, "uplink"), uplinks={rig.uplink})
    assert made.interfaces == []
    assert "uplink" in made.problems
    assert "xdp" not in shown("uplink")


def test_killed_when_it_watched_by_tc(rig: Rig, netlink: Netlink) -> None:
    """The filter that a killed agent left on ingress goes when the next one watches by XDP."""
    Hooks(rig.loaded.programs, netlink, tcx=False).reconcile(links_named(netlink, "uplink"))  # never closed: killed
    with hooked(rig, netlink, "xdp", tcx=False) as made:
        made.reconcile(links_named(netlink, "uplink"), uplinks={rig.uplink})
        assert [len(by_tc(made, "uplink", way)) for way in ("ingress", "egress")] == [0, 1]
    assert "clsact" not in said("tc", "qdisc", "show", "dev", "uplink")


def test_stays_where_the_new_hook_is_refused(rig: Rig, netlink: Netlink) -> None:
    """An interface that ceases to be an uplink stays with XDP as long as tc refuses it, and that is told."""
    (marked,) = rig.serve(vip_port(VIP4))
    made = Hooks(rig.loaded.programs | {"lbh_ingress": 10_000}, netlink, uplink_hook="xdp")
    try:
        made.reconcile(links_named(netlink, "uplink"), uplinks={rig.uplink})
        assert made.problems == {}
        for _ in range(2):
            made.reconcile(links_named(netlink, "uplink"))
            assert (made.interfaces, made.ingress) == (["uplink"], {"uplink": "xdp"})
            assert made.problems.keys() == {"uplink"}
        send()
        wait_for("the SYNs", lambda: rig.vip(marked.vip_id).connections == (0, SENT))
    finally:
        made.close()


def test_link_that_was_forced_off(rig: Rig, netlink: Netlink) -> None:
    """Where somebody has taken our link's program off the interface it is put there again."""
    with hooked(rig, netlink, "xdp") as made:
        for _ in range(2):
            made.reconcile(links_named(netlink, "uplink"), uplinks={rig.uplink})
            assert SHOWN["xdp"] in shown("uplink")
            ingress = made._hooked[rig.uplink].ingress
            assert isinstance(ingress, XdpAttachment)
            bpf.detach_link(ingress.fd)
            assert "xdp" not in shown("uplink")
