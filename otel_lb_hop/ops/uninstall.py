"""The command `uninstall`: takes off this node all that agents left attached or pinned."""

from __future__ import annotations

from typing import TYPE_CHECKING

from otel_lb_hop.kernel.hooks import remove_filters
from otel_lb_hop.kernel.loader import PROGRAMS
from otel_lb_hop.kernel.netlink import Netlink
from otel_lb_hop.kernel.pins import reclaim

if TYPE_CHECKING:
    from pathlib import Path


def uninstall(pin_path: Path | None) -> list[str]:
    """Take off programs, links, maps and filters; answers what was done, in words.

    Raises KernelError if an agent still counts there, OSError if the kernel refuses.
    """
    done = []
    if pin_path and (folder := reclaim(pin_path)):
        folder.remove()
        done.append(f"{pin_path}: programs, links and counters removed")
    netlink = Netlink()
    cleared = remove_filters(PROGRAMS, netlink)
    netlink.close()
    if cleared:
        done.append(f"filters removed from {cleared} interfaces")
    return done
