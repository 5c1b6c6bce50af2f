"""What a machine must have for the laboratory, and the pytest mark that skips, with the reason, where it has not."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

PROGRAMS = ("ip", "nft", "conntrack")
PACKAGE_OF = {
    "ip": "iproute2",
    "nft": "nftables",
    "conntrack": "conntrack",
    "etcd": "etcd-server",
    "iptables": "iptables",
    "openssl": "openssl",
}
CAP_NET_ADMIN, CAP_SYS_ADMIN = 12, 21


def lacking(programs: tuple[str, ...] = PROGRAMS) -> str | None:
    """Return what this machine lacks to run a lab (with these programs), as a reason to skip; None when nothing."""
    missing = [program for program in programs if shutil.which(program) is None]
    if missing:
        packages = ", ".join(PACKAGE_OF[program] for program in missing)
        return f"the lab needs {', '.join(missing)} (Debian: {packages})"
    needed = 1 << CAP_NET_ADMIN | 1 << CAP_SYS_ADMIN
    if _effective_capabilities() & needed != needed:
        return "the lab needs root: CAP_NET_ADMIN and CAP_SYS_ADMIN, for network namespaces"
    return None


def _effective_capabilities() -> int:
    status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    return next(int(line.split()[1], 16) for line in status.splitlines() if line.startswith("CapEff:"))


needs_lab = pytest.mark.skipif(lacking() is not None, reason=lacking() or "")
