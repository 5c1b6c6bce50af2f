"""Waiting with a deadline: look again and again, never sleep for a guessed time."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")

LOOK_SECONDS = 0.05


class TookTooLongError(AssertionError):
    """What was waited for did not come."""


def wait_for(what: str, look: Callable[[], T], seconds: float = 10.0) -> T:
    """Return the first true answer of `look`; raises TookTooLongError after `seconds`, with the last answer."""
    deadline = time.monotonic() + seconds
    while not (answer := look()):
        if time.monotonic() > deadline:
            raise TookTooLongError(f"{what} did not come within {seconds} s; the last look: {answer!r}")
        time.sleep(LOOK_SECONDS)
    return answer
