"""One command in a small virtual machine: another kernel over this machine's own root file system, read-only.

What the command leaves in the folder of results is the only thing that stays.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

from tests.kernels import fetch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tests.kernels.fetch import Kernel

ROOT = Path(__file__).parents[2]
MEMORY, CPUS = "4G", "2"


def run(kernel: Kernel, command: Sequence[str], results: Path, seconds: float) -> None:
    """Run a command under a kernel; `results` is writable there, and gets the console. Ends after so many seconds."""
    programs = fetch.virtme()
    words = ["nice", str(programs / "vng"), "--verbose", "--force-9p", "--memory", MEMORY, "--cpus", CPUS]
    # Emulated, always: a virtual machine may have a /dev/kvm that opens and does not work.
    words += ["--disable-kvm"]
    words += ["--run", str(kernel.image), f"--rwdir={results}", "--", shlex.join(["env", "-C", str(ROOT), *command])]
    # vng finds the others of its programs on PATH.
    environment = {**os.environ, "PATH": f"{programs}:{os.environ['PATH']}"}
    with (
        (results / "console.txt").open("w") as console,
        subprocess.Popen(
            words,
            stdin=subprocess.DEVNULL,
            stdout=console,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        ) as process,
    ):
        try:
            process.wait(seconds)
        finally:
            # It may have left qemu behind, which is of its session; when all have gone there is nobody to end.
            _end(process.pid)


def _end(group: int) -> None:
    try:
        os.killpg(group, signal.SIGKILL)
    except ProcessLookupError:
        return
