"""Capabilities: what each process needs, what it is told when it has not got it, and how it gives up all else.

| process | holds | why |
|---|---|---|
| main, until the compile child is started | what follows, for the child to have it | |
| compile child | CAP_BPF, CAP_NET_ADMIN, CAP_PERFMON if there | it loads the programs |
| main, from then on | CAP_BPF, CAP_NET_ADMIN | maps and test runs (Linux before 5.19), new interfaces, conntrack |

Capabilities belong to threads (capabilities(7)): they are given up before there is a second one. What `python -m`
starts as root gets its bounding set back, but with no_new_privs only what its parent held (security/commoncap.c,
cap_bprm_creds_from_file); as another user it gets the ambient set.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import logging
import os
import platform
import re
import resource
import struct
from enum import IntEnum
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from otel_lb_hop.errors import KernelError
from otel_lb_hop.kernel import bpf

if TYPE_CHECKING:
    from collections.abc import Iterator

_STATUS = Path("/proc/thread-self/status")
"""Capabilities are a thread's own: /proc/self tells those of the main thread, which may have given some up by now."""
_LAST_CAPABILITY = Path("/proc/sys/kernel/cap_last_cap")

_PR_CAPBSET_READ, _PR_CAPBSET_DROP = 23, 24
_PR_SET_NO_NEW_PRIVS = 38
_PR_CAP_AMBIENT = 47
_PR_CAP_AMBIENT_RAISE, _PR_CAP_AMBIENT_CLEAR_ALL = 2, 4
_CAPABILITY_VERSION_3 = 0x20080522
_LOCKED_MEMORY_BEFORE = (5, 11)

_libc = ctypes.CDLL(None, use_errno=True)

log = logging.getLogger(__name__)


class Capability(IntEnum):
    """Those that matter here, by their number (include/uapi/linux/capability.h)."""

    SETPCAP = 8
    NET_ADMIN = 12
    SYS_ADMIN = 21
    SYS_RESOURCE = 24
    PERFMON = 38
    BPF = 39

    def __str__(self) -> str:
        return f"CAP_{self.name}"


_LOAD = "to load BPF programs and to read their maps"
_ATTACH = "to attach the programs to interfaces and to hear of UDP and SCTP from conntrack"


class Holding(NamedTuple):
    """What a thread holds, as sets of capabilities in one number (proc(5), status)."""

    permitted: int
    effective: int
    inheritable: int
    bounding: int
    ambient: int

    @classmethod
    def read(cls, status: str) -> Holding:
        """Read it from the text of /proc/PID/status."""
        found = dict(re.findall(r"^Cap(\w+):\s*([0-9a-f]+)$", status, re.MULTILINE))
        return cls(*(int(found[name], 16) for name in ("Prm", "Eff", "Inh", "Bnd", "Amb")))


def kernel_version() -> tuple[int, int]:
    """Tell the first two numbers of the running kernel; zeros if it has none."""
    match = re.match(r"(\d+)\.(\d+)", platform.release())
    return (int(match[1]), int(match[2])) if match else (0, 0)


def needs(last_capability: int) -> dict[Capability, str]:
    """Name what the start needs and what for, on a kernel whose capabilities end with this one.

    CAP_BPF came with Linux 5.8, and with older ones of distributions; where it is not, CAP_SYS_ADMIN is asked for.
    """
    if last_capability < Capability.BPF:
        return {
            Capability.SYS_ADMIN: f"{_LOAD}: this kernel has no CAP_BPF, which came with Linux 5.8",
            Capability.NET_ADMIN: _ATTACH,
        }
    return {Capability.BPF: _LOAD, Capability.NET_ADMIN: _ATTACH}


def choose(needed: dict[Capability, str], holding: Holding, user: int) -> frozenset[Capability]:
    """Tell by which capabilities the needs are met; raises KernelError that names each missing one and its purpose."""
    chosen: set[Capability] = set()
    missing: list[Capability] = []
    for capability in needed:
        # CAP_SYS_ADMIN does for CAP_BPF (bpf_capable in include/linux/capability.h).
        ways = (capability, Capability.SYS_ADMIN) if capability is Capability.BPF else (capability,)
        held = [way for way in ways if holding.permitted >> way & 1]
        chosen.update(held[:1])
        if not held:
            missing.append(capability)
    if missing:
        told = "; ".join(f"{capability} is missing, it is needed {needed[capability]}" for capability in missing)
        if user != 0 and all(holding.bounding >> capability & 1 for capability in missing):
            told += f" (allowed here, but user {user} does not hold it: run as root, or let it be ambient)"
        raise KernelError(told)
    return frozenset(chosen)


def lift_memory_limit(version: tuple[int, int]) -> None:
    """Let maps be as large as they are: Linux before 5.11 counts them as locked memory.

    Raises KernelError if the limit may not be lifted.
    """
    if version >= _LOCKED_MEMORY_BEFORE:
        return
    unlimited = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
    limit, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    try:
        resource.setrlimit(resource.RLIMIT_MEMLOCK, unlimited)
    except (ValueError, PermissionError) as error:
        raise KernelError(
            f"{Capability.SYS_RESOURCE} is missing, it is needed to lift the limit of locked memory"
            f" ({limit} bytes), in which Linux {'.'.join(map(str, version))} counts BPF maps; with RLIMIT_MEMLOCK"
            " unlimited, or with Linux 5.11 and later, it is not needed"
        ) from error


@contextlib.contextmanager
def least() -> Iterator[None]:
    """Inside, hold what a compile child needs and hand it on; afterwards what the running agent needs.

    The rest is given up for good, also by what this process will ever start. For a process that has no thread besides;
    those that begin inside keep what the child needs until they end, those that begin later do not have it. Raises
    KernelError if something is missing.
    """
    chosen, running = _choose()
    lift_memory_limit(kernel_version())
    may_bound = bool(_holding().effective >> Capability.SETPCAP & 1)
    # To narrow the bounding set once more afterwards.
    extra = {Capability.SETPCAP} if may_bound else set()
    _limit(chosen | extra, bounding=chosen if may_bound else None)
    _require_bpf()
    if is_guarded():
        log.info("without %s: the kernel guards the programs, each handshake costs it more time", Capability.PERFMON)
    if os.geteuid() != 0:
        _hand_on(chosen, chosen | extra)
    try:
        yield
    finally:
        _limit(running, bounding=running if may_bound else None)


def is_guarded() -> bool:
    """Whether programs that this thread has loaded are held to more, and guarded against speculation."""
    # perfmon_capable in include/linux/capability.h.
    return not any(_holding().permitted >> each & 1 for each in (Capability.PERFMON, Capability.SYS_ADMIN))


def least_for_child() -> None:
    """Hold what the compile child needs, and hand nothing on."""
    _limit(_choose()[0])


def _choose() -> tuple[frozenset[Capability], frozenset[Capability]]:
    """Tell what a compile child holds, and what the running agent."""
    holding = _holding()
    running = choose(needs(int(_LAST_CAPABILITY.read_text(encoding="ascii"))), holding, os.geteuid())
    faster = {Capability.PERFMON} & {each for each in Capability if holding.permitted >> each & 1}
    return running | faster, running


def _holding() -> Holding:
    return Holding.read(_STATUS.read_text(encoding="utf-8", errors="replace"))


def _require_bpf() -> None:
    """Tell apart the capability, which is there, from what else may stand before bpf(2)."""
    code = bpf.refusal()
    if code == errno.ENOSYS:
        raise KernelError("this kernel has no bpf(2): it needs CONFIG_BPF_SYSCALL and CONFIG_NET_CLS_BPF")
    if code in {errno.EPERM, errno.EACCES}:
        raise KernelError(
            "bpf(2) is denied though the capabilities are there: the container's seccomp profile has to allow it"
            " (RuntimeDefault does for CAP_BPF; in container runtimes from before 2023 for CAP_SYS_ADMIN only)"
        )


def _limit(keep: frozenset[Capability] | set[Capability], bounding: frozenset[Capability] | None = None) -> None:
    """Hold exactly these, nothing inheritable or ambient, and never get more by starting a program."""
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)
    _prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL)
    if bounding is not None:
        for number in range(64):
            if number not in bounding and _libc.prctl(_PR_CAPBSET_READ, number, 0, 0, 0) == 1:
                _prctl(_PR_CAPBSET_DROP, number)
    _capset(keep, frozenset())


def _hand_on(inheritable: frozenset[Capability], keep: frozenset[Capability] | set[Capability]) -> None:
    """Let a program that another user than root starts have these."""
    _capset(keep, inheritable)
    for capability in inheritable:
        _prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_RAISE, capability)


def _prctl(option: int, *arguments: int) -> None:
    values = [ctypes.c_ulong(value) for value in (*arguments, 0, 0, 0, 0)[:4]]
    if _libc.prctl(option, *values) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), f"prctl({option})")


def _capset(held: frozenset[Capability] | set[Capability], inheritable: frozenset[Capability]) -> None:
    """Set what this thread holds (capget(2)): header and two times three words of 32 bits."""
    mask, handed = (sum(1 << capability for capability in each) for each in (held, inheritable))
    header = ctypes.create_string_buffer(struct.pack("=Ii", _CAPABILITY_VERSION_3, 0))
    low, high = ((mask >> shift & 0xFFFF_FFFF, handed >> shift & 0xFFFF_FFFF) for shift in (0, 32))
    words = ctypes.create_string_buffer(struct.pack("=6I", low[0], *low, high[0], *high))
    if _libc.capset(header, words) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), "capset")
