"""Work inside a named network namespace, one short-lived thread at a time.

The calling thread never changes its namespace: a program started from the borrowed thread inherits the
namespace, the rest of the process stays where it was. The file systems stay the root's: `/sys/class/net` shows
the root's interfaces, and /sys/fs/bpf is the root's too. Who needs a /sys of the namespace runs `ip netns exec`.
"""

from __future__ import annotations

import ctypes
import os
import threading
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

NETNS_DIRECTORY = Path("/run/netns")
CLONE_NEWNET = 0x40000000

T = TypeVar("T")

_libc = ctypes.CDLL(None, use_errno=True)


def in_netns(netns: str, work: Callable[[], T]) -> T:
    """Return what `work` returns (or raise what it raises) when called inside the namespace."""
    outcome: Future[T] = Future()

    def borrowed() -> None:
        try:
            _enter(netns)
            outcome.set_result(work())
        except BaseException as error:  # noqa: BLE001 - handed to the caller, whatever it is
            outcome.set_exception(error)

    thread = threading.Thread(target=borrowed, name=f"in {netns}", daemon=True)
    thread.start()
    try:
        return outcome.result()
    finally:
        thread.join(timeout=1)


def write_sysctls(netns: str, values: dict[str, str], *, skip_missing: bool = False) -> None:
    """Set sysctls (dotted names under `net.`) in the namespace; /proc/sys shows the namespace of the thread."""

    def write() -> None:
        for name, value in values.items():
            path = Path("/proc/sys") / name.replace(".", "/")
            if path.exists() or not skip_missing:
                path.write_text(value, encoding="ascii")

    in_netns(netns, write)


def _enter(netns: str) -> None:
    # os.setns exists from Python 3.12 on only.
    descriptor = os.open(NETNS_DIRECTORY / netns, os.O_RDONLY | os.O_CLOEXEC)
    try:
        if _libc.setns(descriptor, CLONE_NEWNET) != 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number), netns)
    finally:
        os.close(descriptor)
