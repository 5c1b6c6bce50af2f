"""Removal of a laboratory: every process inside its namespaces, the namespaces, its mounts, its state.

Standard library only and self-contained, because it is also the janitor: a process in its own session, started
with `python -I -S reaper.py NAME OWNER`, that waits for the owner's death (its pipe closes or its pid goes) and
then removes what the owner could not.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

NETNS_DIRECTORY = Path("/run/netns")
STATE_DIRECTORY = Path("/run/otel-lb-hop-lab")
GIVE_UP_SECONDS = 5.0
DISMISSED = b"q"


def state_file(name: str) -> Path:
    """Say where a lab's owner and size are written."""
    return STATE_DIRECTORY / f"{name}.json"


def work_directory(name: str) -> Path:
    """Directory of a lab's logs, sockets and mounts."""
    return STATE_DIRECTORY / name


def start_time(pid: int) -> int | None:
    """Start time of a process in clock ticks since boot, None when it is gone: tells a reused pid apart."""
    try:
        # The name of the program, in parentheses, may hold spaces: count fields after it.
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] == "Z" else int(fields[19])


def lab_namespaces(name: str) -> list[str]:
    """Return the names of the namespaces that carry this lab's prefix."""
    return sorted(path.name for path in NETNS_DIRECTORY.glob(f"lbh-{name}-*"))


def lab_processes(namespaces: list[str]) -> list[int]:
    """Return the processes inside any of the namespaces; one look at /proc for all of them."""
    inside = set()
    for namespace in namespaces:
        with contextlib.suppress(OSError):
            inside.add(_identity(NETNS_DIRECTORY / namespace))
    found = []
    for process in map(int, filter(str.isdigit, os.listdir("/proc"))):  # noqa: PTH208 - a Path each costs more
        if process != os.getpid():
            with contextlib.suppress(OSError):
                if _identity(Path(f"/proc/{process}/ns/net")) in inside:
                    found.append(process)
    return found


def remove_lab(name: str) -> list[str]:
    """Remove everything of a lab; returns what could not be removed. Safe to call twice, or by two at once."""
    deadline = time.monotonic() + GIVE_UP_SECONDS
    namespaces = lab_namespaces(name)
    while (processes := lab_processes(namespaces)) and time.monotonic() < deadline:
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        time.sleep(0.005)
    if namespaces:
        lines = "".join(f"netns del {namespace}\n" for namespace in namespaces)
        # -force goes on after a namespace that somebody else has removed meanwhile; the look below decides.
        subprocess.run(["ip", "-force", "-batch", "-"], input=lines, text=True, capture_output=True, check=False)
    for mount in _mounts_below(work_directory(name)):
        subprocess.run(["umount", "-l", mount], capture_output=True, check=False)
    left = [f"process {process}" for process in processes] + lab_namespaces(name)
    left += _mounts_below(work_directory(name))
    if not left:
        shutil.rmtree(work_directory(name), ignore_errors=True)
        state_file(name).unlink(missing_ok=True)
    return left


def remove_stale_labs() -> list[str]:
    """Remove every lab whose owner is dead; returns their names. A lab without owner is meant to stay."""
    removed = []
    for path in STATE_DIRECTORY.glob("*.json"):
        try:
            state = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        owner = state["owner_pid"]
        if owner is not None and start_time(owner) != state["owner_start"]:
            remove_lab(path.stem)
            removed.append(path.stem)
    return removed


def _identity(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_dev, status.st_ino


def _mounts_below(directory: Path) -> list[str]:
    lines = Path("/proc/self/mounts").read_text(encoding="utf-8").splitlines()
    return [line.split()[1] for line in lines if line.split()[1].startswith(f"{directory}/")]


def _owner_gone(owner: int) -> bool:
    """Wait until the owner dismisses the janitor (False) or dies (True); standard input is the owner's pipe."""
    waiting = select.poll()
    waiting.register(0, select.POLLIN | select.POLLHUP)
    try:
        # A forked child of the owner may hold the pipe open: the owner's pid is watched as well.
        waiting.register(os.pidfd_open(owner), select.POLLIN)
    except OSError:
        return True
    for descriptor, _ in waiting.poll():
        if descriptor == 0:
            return os.read(0, 1) != DISMISSED
    return True


def _janitor(name: str, owner: int) -> None:
    if not _owner_gone(owner):
        return
    remove_lab(name)
    # An `ip` the owner had started may still be adding: look again until it is quiet.
    for _ in range(3):
        time.sleep(0.2)
        remove_lab(name)


if __name__ == "__main__":
    _janitor(sys.argv[1], int(sys.argv[2]))
