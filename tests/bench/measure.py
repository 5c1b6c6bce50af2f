"""How the bench measures: run times of BPF programs, memory and CPU of processes; and what a row is."""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
import statistics
import struct
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from otel_lb_hop.kernel import bpf

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

_PROG_LOAD = 5
_PROG_GET_NEXT_ID = 11
_PROG_GET_FD_BY_ID = 13
_OBJ_GET_INFO_BY_FD = 15
_ENABLE_STATS = 32
DROP = 2
"""TC_ACT_SHOT."""
_SCHED_CLS = 3
_NAME_OFFSET = 64
_RUN_TIME_OFFSET = 192


QUIET = {"OTEL_METRICS_EXPORTER": "none", "OTEL_LOGS_EXPORTER": "none", "OTEL_TRACES_EXPORTER": "none"}
SENDING = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://172.30.0.1:4317"}


class Row(NamedTuple):
    """One line of the bench."""

    what: str
    figure: float
    unit: str = ""
    aim: str = ""
    good: bool = True


class RunTime(NamedTuple):
    """What one kind of program used: nanoseconds and runs, over all loaded programs of that name."""

    ns: float
    runs: float


class Interval(NamedTuple):
    """A median and where it is with a confidence of 95 %."""

    low: float
    median: float
    high: float


def median_interval(values: Sequence[float]) -> Interval:
    """Take it from the order of the values (binomial, in its normal approximation): no shape is assumed, no outlier."""
    ordered, count = sorted(values), len(values)
    half = 0.98 * math.sqrt(count)
    low, high = max(0, math.floor(count / 2 - half)), min(count - 1, math.ceil(count / 2 + half))
    return Interval(ordered[low], statistics.median(ordered), ordered[high])


@contextlib.contextmanager
def bpf_stats() -> Iterator[None]:
    """Let the kernel time programs while inside (about 20 ns a run); a descriptor, no sysctl is written."""
    fd = bpf._bpf(_ENABLE_STATS, struct.pack("=I", 0))
    try:
        yield
    finally:
        os.close(fd)


def run_times() -> dict[str, RunTime]:
    """Read the run times of all our programs, by name."""
    found: dict[str, RunTime] = {}
    buffer = ctypes.create_string_buffer(struct.pack("=III", 0, 0, 0), 128)
    while True:
        try:
            bpf._call(_PROG_GET_NEXT_ID, buffer)
        except FileNotFoundError:
            return found
        (program_id,) = struct.unpack_from("=I", buffer, 4)
        struct.pack_into("=I", buffer, 0, program_id)
        with contextlib.suppress(FileNotFoundError):
            name, time = _info(bpf._bpf(_PROG_GET_FD_BY_ID, struct.pack("=I", program_id)))
            if name.startswith("lbh_"):
                before = found.get(name, RunTime(0, 0))
                found[name] = RunTime(before.ns + time.ns, before.runs + time.runs)


def run_time(fd: int) -> RunTime:
    """Read the run time of one program."""
    return _info(os.dup(fd))[1]


def _info(fd: int) -> tuple[str, RunTime]:
    info = ctypes.create_string_buffer(256)
    try:
        bpf._bpf(_OBJ_GET_INFO_BY_FD, struct.pack("=IIQ", fd, len(info), ctypes.addressof(info)))
    finally:
        os.close(fd)
    name = info.raw[_NAME_OFFSET : _NAME_OFFSET + 16].split(b"\0")[0].decode()
    return name, RunTime(*struct.unpack_from("=QQ", info, _RUN_TIME_OFFSET))


def empty_program() -> int:
    """Load a tc program that does nothing (`return TC_ACT_UNSPEC`): what a measurement is compared with."""
    return returning_program(-1)


def returning_program(verdict: int) -> int:
    """Load a tc program that does nothing but return this."""
    return load_program(struct.pack("=BBhiBBhi", 0xB7, 0, 0, verdict, 0x95, 0, 0, 0))


def load_program(instructions: bytes) -> int:
    """Load a tc program of these instructions (struct bpf_insn)."""
    code = ctypes.create_string_buffer(instructions, len(instructions))
    licence = ctypes.create_string_buffer(b"Dual BSD/GPL")
    attributes = struct.pack(
        "=IIQQIIQII",
        _SCHED_CLS,
        len(instructions) // 8,
        ctypes.addressof(code),
        ctypes.addressof(licence),
        0,
        0,
        0,
        0,
        0,
    )
    return bpf._bpf(_PROG_LOAD, attributes)


def rss_mib(pid: int) -> float:
    """Resident memory of a process."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def peak_rss_mib(pid: int) -> float:
    """Most resident memory that a process ever had."""
    status = Path(f"/proc/{pid}/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM:")) / 1024


def cpu_seconds(pid: int) -> float:
    """User and system time of a process so far, in the scheduler's nanoseconds (all threads)."""
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks) / 1e9


def user_seconds(pid: int) -> float:
    """User time of a process so far, of all threads, exact to a clock tick (10 ms)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) / os.sysconf("SC_CLK_TCK")
