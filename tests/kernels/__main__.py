"""`python -m tests.kernels [SERIES...]`: runs the chosen tests under each kernel and here, and prints the table."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from tests.kernels import boot, fetch
from tests.kernels.guest import pytest_command
from tests.peers import build

if TYPE_CHECKING:
    from collections.abc import Iterable

HERE = "here"
TESTS = (
    # What the verifier takes and the programs count, on packets made by hand and on devices.
    "tests/kernel/test_hooks.py",
    "tests/kernel/test_devices.py",
    "tests/kernel/test_handshakes.py",
    "tests/kernel/test_datagrams.py",
    "tests/kernel/test_conntrack.py",
    # Agents in a laboratory.
    "tests/kernels",
)
PATIENCE = 40
"""How many times longer all may take on an emulated CPU."""
MOST_SECONDS = 5400
"""For one kernel. It takes some 15 minutes on two slow cores that emulate it."""


class Row(NamedTuple):
    """A row of the table."""

    kernel: str
    hooks: str
    tests: int
    failed: int
    seconds: float

    @property
    def passed(self) -> str:
        """Count those that passed."""
        return f"{self.tests - self.failed} of {self.tests}" if self.tests else "the guest did not get so far"


def under(kernel: fetch.Kernel, results: Path) -> Row:
    """Run the tests under another kernel."""
    environment = {
        "CI": "true",
        "HOME": "/tmp",  # noqa: S108 - the guest's own, and gone with it
        "HYPOTHESIS_STORAGE_DIRECTORY": "/tmp/hypothesis",  # noqa: S108
        "LAB_PATIENCE": str(PATIENCE),
        "PATH": os.environ["PATH"],
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONUNBUFFERED": "1",
        "WITH_EVERY_KERNEL_TEST": "1",
        "XDG_CACHE_HOME": str(build.cache().parent),
    }
    words = ["env", *(f"{name}={value}" for name, value in environment.items())]
    words += [sys.executable, "-m", "tests.kernels.guest", str(results), *TESTS]
    started = time.monotonic()
    try:
        boot.run(kernel, words, results, MOST_SECONDS)
    except subprocess.TimeoutExpired:
        print(f"Linux {kernel.version} had not done within {MOST_SECONDS} s", file=sys.stderr)
    return _row(kernel.version, results, time.monotonic() - started)


def here(results: Path) -> Row:
    """Run those of the tests that this kernel can do."""
    started = time.monotonic()
    with (results / "pytest.txt").open("w") as said:
        subprocess.run(pytest_command(results, *TESTS), cwd=boot.ROOT, stdout=said, stderr=said, check=False)
    return _row(f"{platform.release()} (this machine's)", results, time.monotonic() - started)


def _row(kernel: str, results: Path, seconds: float) -> Row:
    """Read what pytest has left; a guest that ended before is a failure, and its last words are shown."""
    report = results / "junit.xml"
    if not report.exists():
        for name in ("pytest.txt", "console.txt"):
            if (results / name).exists():
                print((results / name).read_text(encoding="utf-8", errors="replace")[-4000:], file=sys.stderr)
        return Row(kernel, "unknown", 0, 1, seconds)
    suite = next(ET.parse(report).iter("testsuite"))  # noqa: S314 - our own file
    hooks = sorted({each.get("value", "") for each in suite.iter("property") if each.get("name") == "hooks"})
    failed = sum(int(suite.get(kind, "0")) for kind in ("failures", "errors", "skipped"))
    if failed:
        print((results / "pytest.txt").read_text(encoding="utf-8", errors="replace")[-20_000:], file=sys.stderr)
    return Row(kernel, ", ".join(hooks) or "unknown", int(suite.get("tests", "0")), failed, seconds)


def table(rows: Iterable[Row]) -> str:
    """Write the table as it stands in the README."""
    lines = ["| kernel | hooks used | tests passed |", "|---|---|---|"]
    return "\n".join([*lines, *(f"| {row.kernel} | {row.hooks} | {row.passed} |" for row in rows)])


def main(chosen: list[str]) -> int:
    """Run the tests, one kernel after another, and print the table."""
    names = [*(series.name for series in fetch.SERIES), HERE]
    if not set(chosen) <= set(names):
        print(f"usage: python -m tests.kernels [SERIES...]; they are {', '.join(names)}", file=sys.stderr)
        return 2
    rows = []
    with tempfile.TemporaryDirectory(prefix="lbh-kernels-") as folder:
        for name in chosen or names:
            results = Path(folder) / name
            results.mkdir()
            print(f"{name}: running", file=sys.stderr, flush=True)
            try:
                series = next((series for series in fetch.SERIES if series.name == name), None)
                row = under(fetch.kernel(series), results) if series else here(results)
            except fetch.FetchError as error:
                print(error, file=sys.stderr)
                return 1
            print(f"{name}: {row.passed}, {row.seconds:.0f} s", file=sys.stderr, flush=True)
            rows.append(row)
    print(table(rows))
    return int(any(row.failed for row in rows))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
