"""What a machine must have to run the programs, and the pytest mark that skips, with the reason, where it has not."""

from __future__ import annotations

import importlib.util
import platform
import re
import shutil
from pathlib import Path

import pytest

CAP_NET_ADMIN, CAP_SYS_ADMIN = 12, 21
KERNEL = tuple(int(number) for number in re.findall(r"\d+", platform.release())[:2])
HAS_TCX = KERNEL >= (6, 6)


def lacking() -> str | None:
    """Return what this machine lacks, as a reason to skip; None when nothing."""
    needed = 1 << CAP_NET_ADMIN | 1 << CAP_SYS_ADMIN
    if _effective_capabilities() & needed != needed:
        return "the programs need root: CAP_NET_ADMIN and CAP_SYS_ADMIN, for BPF and a network namespace"
    if importlib.util.find_spec("bcc") is None:
        return "the programs need the Python package bcc (Debian: python3-bpfcc)"
    if shutil.which("ip") is None:
        return "the interfaces of the tests need ip (Debian: iproute2)"
    return None


def _effective_capabilities() -> int:
    status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    return next(int(line.split()[1], 16) for line in status.splitlines() if line.startswith("CapEff:"))


needs_kernel = pytest.mark.skipif(lacking() is not None, reason=lacking() or "")
