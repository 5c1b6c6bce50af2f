"""Keeps the programs on every wanted interface: tcx links where the kernel has them, clsact filters otherwise."""

from __future__ import annotations

import errno
import logging
import os
from typing import TYPE_CHECKING, NamedTuple, Protocol

from otel_lb_hop.kernel import bpf
from otel_lb_hop.kernel.netlink import EGRESS_PARENT, INGRESS_PARENT

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from otel_lb_hop.core.interfaces import Link
    from otel_lb_hop.kernel.netlink import Netlink

log = logging.getLogger(__name__)


REMEMBERED_NAMES = 4_096
"""Names of interfaces that have gone are kept for records still under way, but not for ever."""


class Pair(NamedTuple):
    """The two programs of one interface: names and descriptors."""

    ingress: str
    ingress_fd: int
    egress: str
    egress_fd: int


class Attachment(Protocol):
    """Programs on one interface."""

    def alive(self) -> bool:
        """Whether they are still there."""

    def detach(self) -> None:
        """Take them off; an interface that has gone is no error."""


class TcxAttachment:
    """Two tcx links, before all other programs. They end with their descriptors, so a kill leaves nothing."""

    def __init__(self, ifindex: int, pair: Pair) -> None:
        self._fds = [bpf.attach_tcx(pair.ingress_fd, ifindex, bpf.BPF_TCX_INGRESS)]
        try:
            self._fds.append(bpf.attach_tcx(pair.egress_fd, ifindex, bpf.BPF_TCX_EGRESS))
        except OSError:
            self.detach()
            raise

    def alive(self) -> bool:
        """Ask the links: one whose interface was deleted names none any more."""
        return all(bpf.tcx_ifindex(fd) for fd in self._fds)

    def detach(self) -> None:
        """Close the links."""
        for fd in self._fds:
            os.close(fd)
        self._fds = []


class ClsactAttachment:
    """Two direct-action filters on the interface's clsact qdisc."""

    def __init__(self, netlink: Netlink, ifindex: int, pair: Pair) -> None:
        self._netlink = netlink
        self._ifindex = ifindex
        self._pair = pair
        try:
            netlink.add_filter(ifindex, INGRESS_PARENT, pair.ingress_fd, pair.ingress)
            netlink.add_filter(ifindex, EGRESS_PARENT, pair.egress_fd, pair.egress)
        except OSError:
            self.detach()
            raise

    def alive(self) -> bool:
        """Look whether somebody removed the qdisc, and the filters with it."""
        return self._netlink.has_filter(self._ifindex, INGRESS_PARENT, self._pair.ingress) and self._netlink.has_filter(
            self._ifindex, EGRESS_PARENT, self._pair.egress
        )

    def detach(self) -> None:
        """Remove the filters, and the qdisc if nobody else uses it."""
        try:
            self._netlink.delete_filter(self._ifindex, INGRESS_PARENT, self._pair.ingress)
            self._netlink.delete_filter(self._ifindex, EGRESS_PARENT, self._pair.egress)
            self._netlink.delete_empty_clsact(self._ifindex)
        except OSError as error:
            if error.errno not in {errno.ENODEV, errno.ENOENT, errno.EINVAL}:
                raise


class Hooks:
    """The set of hooked interfaces. `reconcile` makes it match what is wanted and is called on every change."""

    def __init__(self, programs: Mapping[str, int], netlink: Netlink, *, tcx: bool | None = None) -> None:
        self._netlink = netlink
        self._tcx = tcx
        self._ethernet = Pair("lbh_ingress", programs["lbh_ingress"], "lbh_egress", programs["lbh_egress"])
        self._l3 = Pair("lbh_ingress_l3", programs["lbh_ingress_l3"], "lbh_egress_l3", programs["lbh_egress_l3"])
        self._attached: dict[int, tuple[Link, Attachment]] = {}
        self._names: dict[int, str] = {}
        self.problems: dict[str, str] = {}

    @property
    def method(self) -> str:
        """How programs are attached: tcx, clsact, or unknown before the first interface."""
        return {None: "unknown", True: "tcx", False: "clsact"}[self._tcx]

    @property
    def interfaces(self) -> list[str]:
        """The hooked interfaces by name."""
        return sorted(link.name for link, _ in self._attached.values())

    def name_of(self, ifindex: int) -> str | None:
        """Name an interface that is or was hooked."""
        return self._names.get(ifindex)

    def reconcile(self, wanted: Iterable[Link]) -> None:
        """Attach to what is new, let go of what has gone; a refusal is kept in `problems` and tried again."""
        by_index = {link.index: link for link in wanted}
        for index in list(self._attached):
            link, attachment = self._attached[index]
            if index not in by_index or by_index[index].ethernet != link.ethernet or not attachment.alive():
                del self._attached[index]
                self._detach(link, attachment)
        self.problems = {}
        if len(self._names) > REMEMBERED_NAMES:
            self._names = {}
        for index, link in by_index.items():
            self._names[index] = link.name
            if index in self._attached:
                self._attached[index] = (link, self._attached[index][1])
                continue
            try:
                self._attached[index] = (link, self._attach(link))
            except OSError as error:
                if error.errno != errno.ENODEV:  # gone again since it was listed
                    self.problems[link.name] = str(error)

    def _attach(self, link: Link) -> Attachment:
        pair = self._ethernet if link.ethernet else self._l3
        if self._tcx is not False:
            try:
                attachment = TcxAttachment(link.index, pair)
            except OSError as error:
                # Linux before 6.6 does not know the attach type.
                if self._tcx or error.errno != errno.EINVAL:
                    raise
            else:
                self._tcx = True
                return attachment
        clsact = ClsactAttachment(self._netlink, link.index, pair)
        self._tcx = False
        return clsact

    def _detach(self, link: Link, attachment: Attachment) -> None:
        try:
            attachment.detach()
        except OSError as error:
            log.warning("taking the programs off %s failed: %s", link.name, error)

    def close(self) -> None:
        """Take everything off."""
        for link, attachment in self._attached.values():
            self._detach(link, attachment)
        self._attached = {}
