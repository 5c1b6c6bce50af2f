"""Other programs on the same hooks: ours run first, or it is said that they do not."""

from __future__ import annotations

import contextlib
import os
import struct
from typing import TYPE_CHECKING, NamedTuple

import pytest

from otel_lb_hop.kernel import bpf
from otel_lb_hop.kernel.hooks import Hooks
from otel_lb_hop.kernel.netlink import EGRESS_PARENT, INGRESS_PARENT
from otel_lb_hop.kernel.pins import Pins
from tests.bench.measure import empty_program, load_program
from tests.kernel.requirements import needs_kernel
from tests.kernel.test_hooks import SENT, links_named, said
from tests.lab.bpffs import bpffs
from tests.lab.waiting import wait_for

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from otel_lb_hop.kernel.netlink import Netlink
    from tests.kernel.handshakes import Handshakes
    from tests.kernel.rig import Rig

pytestmark = [pytest.mark.root, needs_kernel]

LINK_CREATE = 28
FIRST, LAST = 1 << 3, 1 << 4
"""BPF_F_BEFORE and BPF_F_AFTER, of all that is there."""
SIDES = {"ingress": bpf.BPF_TCX_INGRESS, "egress": bpf.BPF_TCX_EGRESS}
PARENTS = {"ingress": INGRESS_PARENT, "egress": EGRESS_PARENT}
OK, SHOT, STOLEN = 0, 2, 4
"""TC_ACT_*: the stack takes the packet and no program behind is asked; it is dropped; it is somebody's."""
REDIRECT = 23
"""BPF_FUNC_redirect."""
NOT_SEEN = "what they do not hand on is not seen"


def instruction(code: int, register: int, value: int) -> bytes:
    """Write one struct bpf_insn with a destination register and an immediate value."""
    return struct.pack("=BBhi", code, register, 0, value)


def returning(verdict: int) -> bytes:
    """Write a program that says the same of every packet."""
    return instruction(0xB7, 0, verdict) + instruction(0x95, 0, 0)


def redirecting(ifindex: int) -> bytes:
    """Write a program that lets every packet leave by another interface."""
    return (
        instruction(0xB7, 1, ifindex)
        + instruction(0xB7, 2, 0)
        + instruction(0x85, 0, REDIRECT)
        + instruction(0x95, 0, 0)
    )


class Foreign(NamedTuple):
    """Somebody else's program on both sides of an interface."""

    program: int
    links: tuple[int, ...]

    def close(self) -> None:
        """Take it off."""
        for fd in (*self.links, self.program):
            os.close(fd)

    @property
    def label(self) -> str:
        """How it is called on /readyz."""
        return f"program {bpf.program_id(self.program)}"


def put(interface: int, instructions: bytes, place: int) -> Foreign:
    """Put a program on both sides of an interface by tcx, before or behind all others."""
    program = load_program(instructions)
    wishes = [struct.pack("=IIIIIxxxxQ", program, interface, kind, place, 0, 0) for kind in SIDES.values()]
    return Foreign(program, tuple(bpf._bpf(LINK_CREATE, wish) for wish in wishes))


@contextlib.contextmanager
def watching(rig: Rig, netlink: Netlink, *, tcx: bool = True, pins: Pins | None = None) -> Iterator[Hooks]:
    """Watch both interfaces by hooks, and let go in the end."""
    made = Hooks(rig.loaded.programs, netlink, pins, tcx=tcx)
    try:
        made.reconcile(links_named(netlink, "uplink", "pod"))
        assert made.interfaces == ["pod", "uplink"]
        yield made
    finally:
        made.close()


GREEDY: dict[str, Callable[[Rig], bytes]] = {
    "takes": lambda _: returning(OK),
    "drops": lambda _: returning(SHOT),
    "steals": lambda _: returning(STOLEN),
    "redirects": lambda rig: redirecting(rig.uplink),
}


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("greedy", GREEDY)
def test_ours_come_first(rig: Rig, netlink: Netlink, handshakes: Handshakes, greedy: str, when: str) -> None:
    """Whatever another program does with the packets, and whether it came earlier or later: each is seen before."""
    foreign = []
    if when == "before":
        foreign = [put(index, GREEDY[greedy](rig), FIRST) for index in (rig.uplink, rig.pod)]
    with watching(rig, netlink) as hooks:
        if when == "after":
            foreign = [put(index, GREEDY[greedy](rig), LAST) for index in (rig.uplink, rig.pod)]
        hooks.reconcile(links_named(netlink, "uplink", "pod"))
        assert hooks.problems == {}
        handshakes.send(SENT)
        wait_for("all of them", lambda: handshakes.seen() == (2 * SENT, 2 * SENT))
    for each in foreign:
        each.close()


def test_pushed_from_the_first_place(
    rig: Rig, netlink: Netlink, handshakes: Handshakes, caplog: pytest.LogCaptureFixture
) -> None:
    """Who puts itself before ours later stays there, and is named as long as it does; ours see what it hands on."""
    wanted = links_named(netlink, "uplink", "pod")
    with watching(rig, netlink) as hooks:
        polite = put(rig.uplink, returning(-1), FIRST)
        told = f"others run before ours ({polite.label} on ingress; {polite.label} on egress): {NOT_SEEN}"
        for datagrams in (False, True, True):
            hooks.reconcile(wanted, datagrams=datagrams)
            assert hooks.problems == {"uplink": told}
        assert hooks.interfaces == ["pod", "uplink"]
        handshakes.send(SENT)
        wait_for("all of them", lambda: handshakes.seen() == (2 * SENT, 2 * SENT))
        greedy = put(rig.uplink, returning(OK), FIRST)
        hooks.reconcile(wanted, datagrams=True)
        both = f"{greedy.label}, {polite.label}"
        assert hooks.problems == {"uplink": f"others run before ours ({both} on ingress; {both} on egress): {NOT_SEEN}"}
        handshakes.send(SENT)
        greedy.close()
        polite.close()
        hooks.reconcile(wanted, datagrams=True)
        assert hooks.problems == {}
        handshakes.send(SENT)
        wait_for("the others", lambda: handshakes.seen()[0] >= 4 * SENT)
        assert handshakes.seen()[0] == 4 * SENT  # what the greedy one took is missing, as was said
    assert [each.count("others run before ours") for each in caplog.messages] == [1, 1]


def test_a_pinned_link_keeps_its_place(rig: Rig, netlink: Netlink, tmp_path: Path) -> None:
    """What was pushed back while an agent watched is said by the next one too, which takes over the same links."""
    with bpffs(tmp_path / "bpf") as folder:
        pins = Pins(folder)
        with watching(rig, netlink, pins=pins):
            pass
        foreign = put(rig.uplink, returning(-1), FIRST)
        with watching(rig, netlink, pins=pins) as hooks:
            told = f"({foreign.label} on ingress; {foreign.label} on egress)"
            assert hooks.problems == {"uplink": f"others run before ours {told}: {NOT_SEEN}"}
            foreign.close()
            hooks.reconcile(links_named(netlink, "uplink", "pod"))
            assert hooks.problems == {}


def test_clsact_where_the_first_priority_is_taken(rig: Rig, netlink: Netlink, handshakes: Handshakes) -> None:
    """Filters of another protocol or kind keep their priority; ours comes behind, sees what they leave, and says so."""
    program = empty_program()
    netlink._socket.tc("add", "clsact", rig.uplink)
    for parent in PARENTS.values():
        place = {"parent": parent, "prio": 1, "protocol": 0x0800}
        netlink._socket.tc("add-filter", "bpf", rig.uplink, fd=program, name="foreign", direct_action=True, **place)
    try:
        with watching(rig, netlink, tcx=False) as hooks:
            for _ in range(2):
                hooks.reconcile(links_named(netlink, "uplink", "pod"))
                told = "others run before ours (foreign on ingress; foreign on egress)"
                assert hooks.problems == {"uplink": f"{told}: {NOT_SEEN}"}
            assert "protocol all pref 2 bpf " in said("tc", "filter", "show", "dev", "uplink", "ingress")
            handshakes.send(SENT)
            wait_for("all of them", lambda: handshakes.seen() == (2 * SENT, 2 * SENT))
        for side in SIDES:
            rest = said("tc", "filter", "show", "dev", "uplink", side)
            assert "lbh_" not in rest
            assert "protocol ip pref 1 bpf " in rest
    finally:
        said("tc", "qdisc", "del", "dev", "uplink", "clsact")
        os.close(program)


@pytest.mark.parametrize("side", SIDES)
def test_clsact_before_a_greedy_filter(rig: Rig, netlink: Netlink, handshakes: Handshakes, side: str) -> None:
    """A BPF filter of the first priority that was there before and takes all packets runs behind ours."""
    program = load_program(returning(SHOT))
    netlink.add_filter(rig.uplink if side == "ingress" else rig.pod, PARENTS[side], program, "greedy")
    try:
        with watching(rig, netlink, tcx=False) as hooks:
            hooks.reconcile(links_named(netlink, "uplink", "pod"))
            assert hooks.problems == {}
            handshakes.send(SENT)
            wait_for("all of them", lambda: handshakes.seen() == (2 * SENT, 2 * SENT))
    finally:
        said("tc", "qdisc", "del", "dev", "uplink" if side == "ingress" else "pod", "clsact")
        os.close(program)


def test_clsact_pushed_back_later(rig: Rig, netlink: Netlink) -> None:
    """A BPF filter of the first priority that comes later runs before ours: it is named."""
    program = empty_program()
    with watching(rig, netlink, tcx=False) as hooks:
        netlink.add_filter(rig.uplink, INGRESS_PARENT, program, "late")
        hooks.reconcile(links_named(netlink, "uplink", "pod"))
        assert hooks.problems == {"uplink": f"others run before ours (late on ingress): {NOT_SEEN}"}
    said("tc", "qdisc", "del", "dev", "uplink", "clsact")
    os.close(program)


def test_qdisc_ingress(rig: Rig, netlink: Netlink) -> None:
    """Where somebody has the older qdisc ingress egress cannot be watched: it is told, and done once that has gone."""
    said("tc", "qdisc", "add", "dev", "uplink", "ingress")
    hooks = Hooks(rig.loaded.programs, netlink, tcx=False)
    try:
        hooks.reconcile(links_named(netlink, "uplink", "pod"))
        assert hooks.interfaces == ["pod"]
        assert "it has the qdisc ingress, which leaves no room for clsact" in hooks.problems["uplink"]
        assert said("tc", "filter", "show", "dev", "uplink", "ingress") == ""
        assert "ingress ffff:" in said("tc", "qdisc", "show", "dev", "uplink")
        said("tc", "qdisc", "del", "dev", "uplink", "ingress")
        hooks.reconcile(links_named(netlink, "uplink", "pod"))
        assert (hooks.interfaces, hooks.problems) == (["pod", "uplink"], {})
    finally:
        hooks.close()
