"""Which BPF programs a process holds, and whether the kernel still has them."""

from __future__ import annotations

import contextlib
import os
import re
import struct
from pathlib import Path

from otel_lb_hop.kernel import bpf

_PROG_GET_FD_BY_ID = 13


def held_by(pid: int) -> set[int]:
    """Ids of the programs that a process holds by itself or by a link; ids are not given out again for long."""
    found = set()
    for path in Path(f"/proc/{pid}/fdinfo").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed since it was listed
            found |= {int(number) for number in re.findall(r"^prog_id:\t(\d+)$", path.read_text(), re.MULTILINE)}
    return found


def still_loaded(ids: set[int]) -> set[int]:
    """Which of these programs the kernel still has."""
    return {number for number in ids if _exists(number)}


def _exists(number: int) -> bool:
    try:
        os.close(bpf._bpf(_PROG_GET_FD_BY_ID, struct.pack("=I", number)))
    except FileNotFoundError:
        return False
    return True
