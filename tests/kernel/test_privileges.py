"""What a thread holds is its own."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.kernel.requirements import needs_kernel
from tests.lab.agent import ROOT

pytestmark = [pytest.mark.root, needs_kernel]

LATE = """
import threading
from otel_lb_hop.kernel import privileges

given_up = threading.Event()
told = []
thread = threading.Thread(target=lambda: (given_up.wait(), told.append(privileges.is_guarded())))
thread.start()
privileges._limit(set())
given_up.set()
thread.join()
print(*told, privileges.is_guarded())
"""


def test_a_thread_that_is_late() -> None:
    """The thread that loads holds what it began with, though the main thread has given that up by then.

    Else a slow start would load guarded programs, and the next would find that the programs have changed.
    """
    done = subprocess.run([sys.executable, "-c", LATE], cwd=ROOT, text=True, capture_output=True, check=True)
    assert done.stdout == "False True\n"
