"""Keeps the programs on every wanted interface: tcx links where the kernel has them, clsact filters otherwise.

What comes in by an uplink may be watched by XDP instead, if that is asked for and the uplink takes it.
"""

from __future__ import annotations

import errno
import logging
import os
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple, Protocol

from otel_lb_hop.kernel import bpf
from otel_lb_hop.kernel.netlink import EGRESS_PARENT, INGRESS_PARENT

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Mapping

    from otel_lb_hop.core.interfaces import Link
    from otel_lb_hop.kernel.netlink import Netlink
    from otel_lb_hop.kernel.pins import Pins

log = logging.getLogger(__name__)

XDP_REST_SECONDS = 30.0
"""An uplink that refused XDP is not asked again before: some drivers stop for a moment to find out that they cannot."""
HOOKING_SECONDS = 1.0
"""Of one `reconcile`: each tcx link takes a grace period of RCU (some 15 ms), and the ring holds three seconds."""
_XDP_MODES = {"xdp": bpf.XDP_FLAGS_DRV_MODE, "xdp-generic": bpf.XDP_FLAGS_SKB_MODE}
_NO_ETHERNET = "it has no Ethernet header"
_XDP_REFUSALS = {
    errno.EBUSY: "another XDP program is on it, and what that redirects or drops is not seen",
    errno.EEXIST: "XDP is in use on it in the other mode, or on a device that it is a port of",
    errno.EOPNOTSUPP: "its driver has no XDP, or not with its settings",
    errno.ERANGE: "its MTU is too large for XDP",
    errno.EINVAL: "its driver does not take XDP with its settings, or the kernel is older than 5.9",
}
"""Of net/core/dev.c (dev_xdp_attach) and of drivers; some say EINVAL or EOPNOTSUPP of an MTU, too."""


class Program(NamedTuple):
    """A program and the side of an interface that it is for."""

    name: str
    fd: int
    ingress: bool

    @property
    def parent(self) -> str:
        """The side as clsact names it."""
        return INGRESS_PARENT if self.ingress else EGRESS_PARENT


class Attachment(Protocol):
    """A program on one interface."""

    label: str
    """What it is called by `before`."""

    def before(self) -> list[str] | None:
        """Say what runs before it on its side of the interface, ours too; None if it is not there any more."""

    def detach(self) -> None:
        """Take it off; an interface that has gone is no error."""

    def let_be(self) -> None:
        """Let go of it, and leave it there as far as it can be without this process."""


class _LinkAttachment:
    """A link of a program. It ends with its descriptor, or with its pin."""

    def __init__(self, ifindex: int, name: str, program_fd: int, attach: Callable[[], int], pins: Pins | None) -> None:
        self._place = ifindex, name
        self._pins = pins
        self.not_pinned: str | None = None
        """Why it ends with its descriptor, though pins are wanted."""
        # What an agent before this one pinned goes on; a packet between two links would be lost.
        inherited = pins.obtain_link(ifindex, name, program_fd) if pins else None
        if inherited is not None:
            self._take(inherited)
            if self.before() is not None:
                return
            self.detach()  # it went to another namespace with its interface, and this one has the number now
        self._take(attach())
        if pins:
            try:
                pins.pin_link(ifindex, name, self.fd)
            except OSError as error:
                self.not_pinned = str(error)

    def _take(self, fd: int) -> None:
        self.fd = fd
        joined = bpf.link_info(fd)
        self.link_id, self.label = joined.link_id, f"program {joined.program_id}"

    @property
    def pinned_as(self) -> tuple[int, str]:
        """Interface and name of its pin."""
        return self._place

    def before(self) -> list[str] | None:
        """Ask the link: one whose interface was deleted names none any more; and nothing is before it."""
        return [] if bpf.link_info(self.fd).ifindex else None

    def detach(self) -> None:
        """Take the program off at once: older kernels free late what was pinned, and refuse it again till then."""
        try:
            bpf.detach_link(self.fd)
        finally:
            self.let_be()
            if self._pins:
                self._pins.unpin_link(*self._place)

    def let_be(self) -> None:
        """Close the link; what is pinned stays attached."""
        os.close(self.fd)


class TcxAttachment(_LinkAttachment):
    """A tcx link, before all other programs."""

    def __init__(self, ifindex: int, program: Program, pins: Pins | None) -> None:
        kind = bpf.BPF_TCX_INGRESS if program.ingress else bpf.BPF_TCX_EGRESS
        self._hook = ifindex, kind
        super().__init__(ifindex, program.name, program.fd, lambda: bpf.attach_tcx(program.fd, ifindex, kind), pins)

    def before(self) -> list[str] | None:
        """Ask the interface: a link goes with its interface to another namespace, and lives on there."""
        try:
            running = bpf.tcx_programs(*self._hook)
        except OSError as error:
            if error.errno != errno.ENODEV:
                raise
            return None
        ids = [each.link_id for each in running]
        if self.link_id not in ids:
            return None
        return [f"program {each.program_id}" for each in running[: ids.index(self.link_id)]]


class XdpAttachment(_LinkAttachment):
    """An XDP link, which nobody else's program can take the place of."""

    def __init__(self, ifindex: int, hook: str, program_fd: int, pins: Pins | None) -> None:
        super().__init__(ifindex, hook, program_fd, lambda: bpf.attach_xdp(program_fd, ifindex, _XDP_MODES[hook]), pins)


class ClsactAttachment:
    """A direct-action filter on the interface's clsact qdisc."""

    def __init__(self, netlink: Netlink, ifindex: int, program: Program) -> None:
        self._netlink = netlink
        self._ifindex = ifindex
        self._program = program
        self.label = program.name
        try:
            netlink.add_filter(ifindex, program.parent, program.fd, program.name)
        except OSError:
            self.detach()
            raise

    def before(self) -> list[str] | None:
        """Look what is there, if not somebody removed the qdisc, and the filters with it."""
        names = self._netlink.filters(self._ifindex, self._program.parent)
        return names[: names.index(self.label)] if self.label in names else None

    def detach(self) -> None:
        """Remove the filter, and the qdisc if nobody else uses it."""
        try:
            self._netlink.delete_filter(self._ifindex, self._program.parent, self._program.name)
            self._netlink.delete_empty_clsact(self._ifindex)
        except OSError as error:
            if error.errno not in {errno.ENODEV, errno.ENOENT, errno.EINVAL}:
                raise

    def let_be(self) -> None:
        """Do nothing: filters need nobody to hold them."""


@dataclass(slots=True)
class _Hooked:
    """An interface and what is on it; `datagram` is there only while datagrams are watched."""

    link: Link
    ingress: Attachment
    egress: Attachment
    datagram: Attachment | None = None

    behind: dict[str, list[str]] = field(default_factory=dict)
    """What of others runs before ours, by side; told once when it comes."""

    def attachments(self) -> list[Attachment]:
        return [each for each in (self.ingress, self.egress, self.datagram) if each]

    def look(self) -> dict[str, list[str]] | None:
        """Say what of others runs before ours, by side; None if not all of ours are there any more."""
        ours = {each.label for each in self.attachments()}
        found: dict[str, list[str]] = {"ingress": [], "egress": []}
        for each in self.attachments():
            before = each.before()
            if before is None:
                return None
            side = found["egress" if each is self.egress else "ingress"]
            side += [other for other in dict.fromkeys(before) if other not in ours and other not in side]
        return {side: others for side, others in found.items() if others}


class _Programs(NamedTuple):
    """The tc programs for one kind of device."""

    ingress: Program
    egress: Program
    datagram: Program

    @classmethod
    def find(cls, programs: Mapping[str, int], suffix: str) -> _Programs:
        names = (("lbh_ingress", True), ("lbh_egress", False), ("lbh_datagram", True))
        return cls(*(Program(name + suffix, programs[name + suffix], ingress) for name, ingress in names))


class _Refusal(NamedTuple):
    """Why an uplink does not take XDP, and from when on (CLOCK_MONOTONIC) it may be asked again."""

    reason: str
    again: float


class Hooks:
    """The set of hooked interfaces. `reconcile` makes it match what is wanted and is called on every change.

    An interface has the two programs that watch TCP and, while it is asked for, one more that watches datagrams. With
    the `uplink_hook` xdp or xdp-generic what comes in by an uplink is watched by XDP in place of tc ingress; where XDP
    is refused it stays with tc, and `ingress` says why. Datagrams stay with tc everywhere: an interface holds one XDP
    program only, and ours lets all of them pass.

    With pins what is attached outlives the agent, and what one before it attached is taken over.
    """

    def __init__(
        self,
        programs: Mapping[str, int],
        netlink: Netlink,
        pins: Pins | None = None,
        *,
        tcx: bool | None = None,
        uplink_hook: str = "tc",
    ) -> None:
        self._netlink = netlink
        self._pins = pins
        self._settled = False
        self._tcx = tcx
        self._uplink_hook = uplink_hook
        self._xdp_fd = programs.get("lbh_xdp", -1)
        self._programs = {True: _Programs.find(programs, ""), False: _Programs.find(programs, "_l3")}
        """By whether the device has an Ethernet header."""
        self._hooked: dict[int, _Hooked] = {}
        self._refusals: dict[int, _Refusal] = {}
        """Of XDP, by interface."""
        self.problems: dict[str, str] = {}
        self.waiting = 0
        """How many interfaces the latest `reconcile` had no time for: it is to be called again soon."""

    @property
    def method(self) -> str:
        """How tc programs are attached: tcx, clsact, or unknown before the first interface."""
        return {None: "unknown", True: "tcx", False: "clsact"}[self._tcx]

    @property
    def interfaces(self) -> list[str]:
        """The hooked interfaces by name."""
        return sorted(hooked.link.name for hooked in self._hooked.values())

    @property
    def not_pinned(self) -> str | None:
        """Why some of what is attached would end with this process, though pins are wanted."""
        reasons = [each.not_pinned for each in self._links() if each.not_pinned]
        return f"{len(reasons)} programs on interfaces are not pinned: {reasons[0]}" if reasons else None

    @property
    def ingress(self) -> dict[str, str]:
        """How ingress is watched where XDP is wanted, by name: xdp or xdp-generic, or else what instead, and why."""
        told = {}
        for index, hooked in self._hooked.items():
            if isinstance(hooked.ingress, XdpAttachment):
                told[hooked.link.name] = self._uplink_hook
            elif refusal := self._refusals.get(index):
                told[hooked.link.name] = f"{self.method} in place of {self._uplink_hook}: {refusal.reason}"
        return told

    def reconcile(self, wanted: Iterable[Link], *, uplinks: Collection[int] = (), datagrams: bool = False) -> None:
        """Attach to what is new, let go of what has gone; a refusal is kept in `problems` and tried again.

        `uplinks`: the interfaces of these numbers come first; they are for XDP, if that was asked for. `datagrams`:
        whether datagrams are to be watched too. After `HOOKING_SECONDS` it leaves the rest for the next time.
        """
        in_order = sorted(wanted, key=lambda link: (link.index not in uplinks, link.name in self.problems))
        by_index = {link.index: link for link in in_order}
        for_xdp = {index for index in by_index if self._uplink_hook in _XDP_MODES and index in uplinks}
        for index, hooked in list(self._hooked.items()):
            link = by_index.get(index)
            if link is None or link.ethernet != hooked.link.ethernet or not self._look(hooked):
                del self._hooked[index]
                self._detach(hooked.link, *hooked.attachments())
        self._refusals = {index: each for index, each in self._refusals.items() if index in for_xdp}
        self._hook_all(in_order, for_xdp, datagrams=datagrams)
        for hooked in self._hooked.values():
            if hooked.behind:
                self.problems.setdefault(hooked.link.name, _others(hooked.behind))
        if not self._settled and not self.waiting:
            self._settle(by_index.keys() - self._hooked.keys())
            self._settled = True

    def _settle(self, undecided: Collection[int]) -> None:
        """Take off what an agent before this one watched, and this one does not."""
        if self._pins:
            self._pins.unpin_links_except([each.pinned_as for each in self._links()], undecided)
        if self._tcx is False:
            names = [program.name for programs in self._programs.values() for program in programs]
            remove_filters(names, self._netlink, {*undecided, *self._hooked})

    def _links(self) -> list[_LinkAttachment]:
        attached = [each for hooked in self._hooked.values() for each in hooked.attachments()]
        return [each for each in attached if isinstance(each, _LinkAttachment)]

    def _hook_all(self, links: Iterable[Link], for_xdp: Collection[int], *, datagrams: bool) -> None:
        """Attach to one of these at least, and to as many as there is time for."""
        until = time.monotonic() + HOOKING_SECONDS
        before, self.problems, self.waiting = self.problems, {}, 0
        begun = False
        for link in links:
            known = self._hooked.get(link.index)
            done = known is not None and bool(known.datagram) is datagrams
            if begun and not done and time.monotonic() > until:
                if link.name in before:  # its next try follows with the next news
                    self.problems[link.name] = before[link.name]
                else:
                    self.waiting += 1
                continue
            begun |= not done
            try:
                self._hook(link, xdp=link.index in for_xdp, datagrams=datagrams)
            except OSError as error:
                if error.errno != errno.ENODEV:  # gone again since it was listed
                    self.problems[link.name] = str(error)

    def _look(self, hooked: _Hooked) -> bool:
        """Whether all of ours are on it; also what of others has come before them, which is said once.

        Nobody's place is taken back: two that both want the first one would change it forever.
        """
        behind = hooked.look()
        if behind is None:
            return False
        if behind and behind != hooked.behind:
            log.warning("%s: %s", hooked.link.name, _others(behind))
        hooked.behind = behind
        return True

    def _hook(self, link: Link, *, xdp: bool, datagrams: bool) -> None:
        programs = self._programs[link.ethernet]
        hooked = self._hooked.get(link.index)
        if hooked is None:
            hooked = self._hooked[link.index] = self._hook_new(link, programs, xdp=xdp)
            self._look(hooked)  # a filter may find no place before others, a pinned link may have lost it
        hooked.link = link
        if isinstance(hooked.ingress, XdpAttachment) is not xdp:
            # First the new, then the old: no packet is missed, and the programs know one that both have seen.
            ingress = self._attach_xdp(link) if xdp else self._attach_tc(link, programs.ingress)
            if ingress:
                hooked.ingress, old = ingress, hooked.ingress
                self._detach(link, old)
        if datagrams and not hooked.datagram:
            hooked.datagram = self._attach_tc(link, programs.datagram)
        elif hooked.datagram and not datagrams:
            self._detach(link, hooked.datagram)
            hooked.datagram = None

    def _hook_new(self, link: Link, programs: _Programs, *, xdp: bool) -> _Hooked:
        """Attach both programs that watch TCP, or none."""
        ingress = (self._attach_xdp(link) if xdp else None) or self._attach_tc(link, programs.ingress)
        try:
            egress = self._attach_tc(link, programs.egress)
        except OSError:
            ingress.detach()
            raise
        if self._tcx is False:
            # What a killed agent left, and this one may not need for long.
            left = [programs.datagram] + [programs.ingress] * isinstance(ingress, XdpAttachment)
            for each in left:
                self._netlink.delete_filter(link.index, each.parent, each.name)
        return _Hooked(link, ingress, egress)

    def _attach_tc(self, link: Link, program: Program) -> Attachment:
        if self._tcx is not False:
            try:
                attachment = TcxAttachment(link.index, program, self._pins)
            except OSError as error:
                # Linux before 6.6 does not know the attach type.
                if self._tcx or error.errno != errno.EINVAL:
                    raise
            else:
                self._tcx = True
                return attachment
        clsact = ClsactAttachment(self._netlink, link.index, program)
        self._tcx = False
        return clsact

    def _attach_xdp(self, link: Link) -> XdpAttachment | None:
        """Attach to XDP; None if that is refused, which is kept in `_refusals` and told once."""
        refused = self._refusals.get(link.index)
        if refused and time.monotonic() < refused.again:
            return None
        if link.ethernet:
            try:
                attachment = XdpAttachment(link.index, self._uplink_hook, self._xdp_fd, self._pins)
            except OSError as error:
                if error.errno == errno.ENODEV:
                    raise
                reason = _XDP_REFUSALS.get(error.errno or 0, str(error))
            else:
                self._refusals.pop(link.index, None)
                return attachment
        else:
            reason = _NO_ETHERNET
        if refused is None or refused.reason != reason:
            log.warning("%s is watched by tc in place of %s: %s", link.name, self._uplink_hook, reason)
        self._refusals[link.index] = _Refusal(reason, time.monotonic() + XDP_REST_SECONDS)
        return None

    def _detach(self, link: Link, *attachments: Attachment) -> None:
        for each in attachments:
            try:
                each.detach()
            except OSError as error:
                log.warning("taking the programs off %s failed: %s", link.name, error)

    def close(self) -> None:
        """Take everything off; what is pinned stays where it is and goes on."""
        for hooked in self._hooked.values():
            if self._pins:
                for each in hooked.attachments():
                    each.let_be()
            else:
                self._detach(hooked.link, *hooked.attachments())
        self._hooked = {}


def _others(behind: Mapping[str, list[str]]) -> str:
    told = "; ".join(f"{', '.join(others)} on {side}" for side, others in behind.items())
    return f"others run before ours ({told}): what they do not hand on is not seen"


def remove_filters(programs: Collection[str], netlink: Netlink, kept: Collection[int] = ()) -> int:
    """Take the filters of these programs off all interfaces but those kept, whoever attached them; answers how many."""
    cleared = 0
    for link in netlink.links():
        if link.index in kept:
            continue
        found = [
            (parent, name)
            for parent in (INGRESS_PARENT, EGRESS_PARENT)
            for name in netlink.filters(link.index, parent)
            if name in programs
        ]
        for parent, name in found:
            netlink.delete_filter(link.index, parent, name)
        if found:
            netlink.delete_empty_clsact(link.index)
        cleared += bool(found)
    return cleared
