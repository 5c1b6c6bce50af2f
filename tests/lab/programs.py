"""Which BPF programs and descriptors a process holds, and whether the kernel still has them."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import re
import struct
from collections import Counter
from pathlib import Path

from otel_lb_hop.kernel import bpf

_PROG_LOAD = 5
_PROG_GET_FD_BY_ID = 13
_TYPE_XDP = 6
_RETURN_XDP_PASS = struct.pack("=BBhiBBhi", 0xB7, 0, 0, 2, 0x95, 0, 0, 0)


def held_by(pid: int) -> set[int]:
    """Ids of the programs that a process holds by itself or by a link; ids are not given out again for long."""
    found = set()
    for path in Path(f"/proc/{pid}/fdinfo").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed since it was listed
            found |= {int(number) for number in re.findall(r"^prog_id:\t(\d+)$", path.read_text(), re.MULTILINE)}
    return found


def descriptors(pid: int) -> Counter[str]:
    """Count what the descriptors of a process are of: `socket`, `anon_inode:bpf-map`, a path."""
    found: Counter[str] = Counter()
    for path in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            found[str(path.readlink()).partition(":[")[0]] += 1
    return found


def still_loaded(ids: set[int]) -> set[int]:
    """Which of these programs the kernel still has."""
    return {number for number in ids if _exists(number)}


def attached(ifindex: int, attach_type: int) -> list[int]:
    """List the ids of the programs on a tcx hook, in the order they run; none where the kernel has no tcx."""
    try:
        return [each.program_id for each in bpf.tcx_programs(ifindex, attach_type)]
    except OSError as error:
        if error.errno == errno.EINVAL:  # of an interface that is not there it is ENODEV
            return []
        raise


def foreign_xdp() -> int:
    """Load an XDP program that is not ours: it lets every packet pass."""
    code, licence = (ctypes.create_string_buffer(text) for text in (_RETURN_XDP_PASS, b"GPL"))
    wanted = struct.pack("=IIQQ", _TYPE_XDP, 2, ctypes.addressof(code), ctypes.addressof(licence))
    return bpf._bpf(_PROG_LOAD, wanted)


def _exists(number: int) -> bool:
    try:
        os.close(bpf._bpf(_PROG_GET_FD_BY_ID, struct.pack("=I", number)))
    except FileNotFoundError:
        return False
    return True
