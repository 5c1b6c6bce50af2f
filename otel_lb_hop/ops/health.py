"""What works and what does not: one state for each part of the agent, in one place, for /readyz and the metrics."""

from __future__ import annotations

import threading
from typing import Any, NamedTuple

STALE_SECONDS = 10.0
"""The main loop beats several times a second; this long without a beat means that it hangs."""


class PartState(NamedTuple):
    """Whether a part works; if not, why. Without a `vital` part the agent is not ready."""

    healthy: bool
    vital: bool
    detail: Any


class Health:
    """The states of all parts. Written by the main loop, read by the API's threads."""

    def __init__(self) -> None:
        self._parts: dict[str, PartState] = {}
        self._beat_seconds: float | None = None
        self._lock = threading.Lock()

    def report(self, part: str, *, healthy: bool, vital: bool, detail: object = "") -> None:
        """Take over the state of one part."""
        with self._lock:
            self._parts[part] = PartState(healthy, vital, detail)

    def beat(self, now_seconds: float) -> None:
        """Note that the main loop is alive."""
        self._beat_seconds = now_seconds

    def alive(self, now_seconds: float) -> bool:
        """Whether the main loop has run lately."""
        return self._beat_seconds is not None and now_seconds - self._beat_seconds < STALE_SECONDS

    def parts(self) -> dict[str, PartState]:
        """Copy the states."""
        with self._lock:
            return dict(self._parts)

    def ready(self, now_seconds: float) -> bool:
        """Whether connections are being counted: the main loop runs and every vital part works."""
        parts = self.parts().values()
        return bool(parts) and self.alive(now_seconds) and all(part.healthy for part in parts if part.vital)
