"""Waiting with a deadline: look again and again, never sleep for a guessed time."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")

LOOK_SECONDS = 0.05
PATIENCE = float(os.environ.get("LAB_PATIENCE", "1"))
"""How many times longer all may take: an emulated machine is slow."""


class TookTooLongError(AssertionError):
    """What was waited for did not come."""


def wait_for(what: str, look: Callable[[], T], seconds: float = 10.0) -> T:
    """Return the first true answer of `look`; raises TookTooLongError with the last one after `seconds` x PATIENCE."""
    deadline = time.monotonic() + seconds * PATIENCE
    while not (answer := look()):
        if time.monotonic() > deadline:
            raise TookTooLongError(f"{what} did not come within {seconds} s; the last look: {answer!r}")
        time.sleep(LOOK_SECONDS)
    return answer
