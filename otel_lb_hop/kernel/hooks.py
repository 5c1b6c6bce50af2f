"""Keeps the programs on every wanted interface: tcx links where the kernel has them, clsact filters otherwise."""

from __future__ import annotations

import errno
import logging
import os
from typing import TYPE_CHECKING, NamedTuple, Protocol

from otel_lb_hop.kernel import bpf
from otel_lb_hop.kernel.netlink import EGRESS_PARENT, INGRESS_PARENT

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from otel_lb_hop.core.interfaces import Link
    from otel_lb_hop.kernel.netlink import Netlink
    from otel_lb_hop.kernel.pins import Pins

log = logging.getLogger(__name__)


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
    """Programs on one interface."""

    def alive(self) -> bool:
        """Whether they are still there."""

    def detach(self) -> None:
        """Take them off; an interface that has gone is no error."""

    def let_be(self) -> None:
        """Let go of them, and leave them there as far as they can be without this process."""


class TcxAttachment:
    """Tcx links, before all other programs. They end with their descriptors, or with their pins."""

    def __init__(self, ifindex: int, programs: Sequence[Program], pins: Pins | None) -> None:
        self._ifindex = ifindex
        self._programs = programs
        self._pins = pins
        self._fds: list[int] = []
        try:
            for each in programs:
                self._fds.append(self._obtain(each))
        except OSError:
            self.detach()
            raise

    def alive(self) -> bool:
        """Ask the links: one whose interface was deleted names none any more."""
        return all(bpf.link_info(fd).ifindex for fd in self._fds)

    def detach(self) -> None:
        """Take the programs off."""
        if self._pins:
            for each in self._programs:
                self._pins.unpin_link(self._ifindex, each.name)
        self.let_be()

    def let_be(self) -> None:
        """Close the links; what is pinned stays attached."""
        for fd in self._fds:
            os.close(fd)
        self._fds = []

    def _obtain(self, program: Program) -> int:
        """Take over the link that an agent before this one pinned, or make one."""
        if self._pins and (fd := self._pins.obtain_link(self._ifindex, program.name, program.fd)) is not None:
            return fd
        kind = bpf.BPF_TCX_INGRESS if program.ingress else bpf.BPF_TCX_EGRESS
        fd = bpf.attach_tcx(program.fd, self._ifindex, kind)
        if self._pins:
            try:
                self._pins.pin_link(self._ifindex, program.name, fd)
            except OSError:
                os.close(fd)
                raise
        return fd


class ClsactAttachment:
    """Direct-action filters on the interface's clsact qdisc."""

    def __init__(self, netlink: Netlink, ifindex: int, programs: Sequence[Program]) -> None:
        self._netlink = netlink
        self._ifindex = ifindex
        self._programs = programs
        try:
            for each in programs:
                netlink.add_filter(ifindex, each.parent, each.fd, each.name)
        except OSError:
            self.detach()
            raise

    def alive(self) -> bool:
        """Look whether somebody removed the qdisc, and the filters with it."""
        return all(self._netlink.has_filter(self._ifindex, each.parent, each.name) for each in self._programs)

    def detach(self) -> None:
        """Remove the filters, and the qdisc if nobody else uses it."""
        try:
            for each in self._programs:
                self._netlink.delete_filter(self._ifindex, each.parent, each.name)
            self._netlink.delete_empty_clsact(self._ifindex)
        except OSError as error:
            if error.errno not in {errno.ENODEV, errno.ENOENT, errno.EINVAL}:
                raise

    def let_be(self) -> None:
        """Do nothing: filters need nobody to hold them."""


class Hooks:
    """The set of hooked interfaces. `reconcile` makes it match what is wanted and is called on every change.

    An interface has the two programs that watch TCP and, while it is asked for, one more that watches datagrams.
    With pins what is attached outlives the agent, and what one before it attached is taken over.
    """

    def __init__(
        self, programs: Mapping[str, int], netlink: Netlink, pins: Pins | None = None, *, tcx: bool | None = None
    ) -> None:
        self._netlink = netlink
        self._pins = pins
        self._settled = False
        self._tcx = tcx
        self._tcp, self._datagrams = {}, {}
        for ethernet, suffix in ((True, ""), (False, "_l3")):
            ingress, egress, datagram = f"lbh_ingress{suffix}", f"lbh_egress{suffix}", f"lbh_datagram{suffix}"
            self._tcp[ethernet] = (
                Program(ingress, programs[ingress], ingress=True),
                Program(egress, programs[egress], ingress=False),
            )
            self._datagrams[ethernet] = (Program(datagram, programs[datagram], ingress=True),)
        self._attached: dict[tuple[int, bool], tuple[Link, Attachment]] = {}
        """By interface, and whether it is the program that watches datagrams."""
        self.problems: dict[str, str] = {}

    @property
    def method(self) -> str:
        """How programs are attached: tcx, clsact, or unknown before the first interface."""
        return {None: "unknown", True: "tcx", False: "clsact"}[self._tcx]

    @property
    def interfaces(self) -> list[str]:
        """The hooked interfaces by name."""
        return sorted(link.name for (_, datagrams), (link, _) in self._attached.items() if not datagrams)

    def reconcile(self, wanted: Iterable[Link], *, datagrams: bool = False) -> None:
        """Attach to what is new, let go of what has gone; a refusal is kept in `problems` and tried again.

        `datagrams`: whether datagrams are to be watched too.
        """
        kinds = (False, True) if datagrams else (False,)
        by_place = {(link.index, kind): link for link in wanted for kind in kinds}
        for place in list(self._attached):
            link, attachment = self._attached[place]
            if place not in by_place or by_place[place].ethernet != link.ethernet or not attachment.alive():
                del self._attached[place]
                self._detach(link, attachment)
        self.problems = {}
        for place, link in by_place.items():
            if place in self._attached:
                self._attached[place] = (link, self._attached[place][1])
                continue
            try:
                self._attached[place] = (link, self._attach(link, datagrams=place[1]))
            except OSError as error:
                if error.errno != errno.ENODEV:  # gone again since it was listed
                    self.problems[link.name] = str(error)
        if self._pins and not self._settled:
            # What an agent before this one watched, and this one does not.
            self._pins.unpin_links_except(
                (index, program.name)
                for (index, kind), (link, _) in self._attached.items()
                for program in self._programs_of(link, datagrams=kind)
            )
            self._settled = True

    def _programs_of(self, link: Link, *, datagrams: bool) -> Sequence[Program]:
        return (self._datagrams if datagrams else self._tcp)[link.ethernet]

    def _attach(self, link: Link, *, datagrams: bool) -> Attachment:
        programs = self._programs_of(link, datagrams=datagrams)
        if self._tcx is not False:
            try:
                attachment = TcxAttachment(link.index, programs, self._pins)
            except OSError as error:
                # Linux before 6.6 does not know the attach type.
                if self._tcx or error.errno != errno.EINVAL:
                    raise
            else:
                self._tcx = True
                return attachment
        clsact = ClsactAttachment(self._netlink, link.index, programs)
        self._tcx = False
        if (link.index, True) not in self._attached and not datagrams:
            # What a killed agent left, and this one may not need for long.
            for each in self._datagrams[link.ethernet]:
                self._netlink.delete_filter(link.index, each.parent, each.name)
        return clsact

    def _detach(self, link: Link, attachment: Attachment) -> None:
        try:
            attachment.detach()
        except OSError as error:
            log.warning("taking the programs off %s failed: %s", link.name, error)

    def close(self) -> None:
        """Take everything off; what is pinned stays where it is and goes on."""
        for link, attachment in self._attached.values():
            if self._pins:
                attachment.let_be()
            else:
                self._detach(link, attachment)
        self._attached = {}


def remove_filters(programs: Iterable[str], netlink: Netlink) -> int:
    """Take the filters of these programs off all interfaces, whoever attached them; answers how many interfaces."""
    cleared = 0
    for link in netlink.links():
        found = [
            (parent, name)
            for parent in (INGRESS_PARENT, EGRESS_PARENT)
            for name in programs
            if netlink.has_filter(link.index, parent, name)
        ]
        for parent, name in found:
            netlink.delete_filter(link.index, parent, name)
        if found:
            netlink.delete_empty_clsact(link.index)
        cleared += bool(found)
    return cleared
