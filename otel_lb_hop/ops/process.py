"""What the agent's own process uses."""

from __future__ import annotations

import os
import resource
from pathlib import Path

from otel_lb_hop.export.metrics import Usage

_STATM = Path("/proc/self/statm")
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


def process_usage() -> Usage:
    """Read the CPU time of all threads and the resident memory (proc(5), statm)."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return Usage(used.ru_utime, used.ru_stime, int(_STATM.read_bytes().split()[1]) * _PAGE_BYTES)
