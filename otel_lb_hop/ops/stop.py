"""The wish to stop, told by a signal handler to the main loop."""

from __future__ import annotations

import queue


class Stop:
    """Like threading.Event, but `set` may be called from a signal handler.

    A handler runs between any two bytecodes of the main thread, also while that holds an Event's lock, and would wait
    for it for ever; SimpleQueue.put is made for that.
    """

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._told = False

    def set(self) -> None:
        """Tell it."""
        self._queue.put(None)

    def wait(self, seconds: float) -> bool:
        """Wait until it is told, at most so long; answers whether it was."""
        if not self._told:
            try:
                self._queue.get(timeout=seconds) if seconds > 0 else self._queue.get_nowait()
                self._told = True
            except queue.Empty:
                pass
        return self._told
