"""What may end the main loop's wait: the wish to stop, told by a signal handler, and news, told by other threads."""

from __future__ import annotations

import queue


class Stop:
    """Like threading.Event, but `set` may be called from a signal handler, and `wake` ends a wait without stopping.

    A handler runs between any two bytecodes of the main thread, also while that holds an Event's lock, and would wait
    for it for ever; SimpleQueue.put is made for that.
    """

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[bool] = queue.SimpleQueue()
        self._told = False
        self.woken = False
        """Whether the last wait was ended by news."""

    def set(self) -> None:
        """Tell it."""
        self._queue.put(True)  # noqa: FBT003 - the item is whether to stop

    def wake(self) -> None:
        """End the wait that goes on now, or the next one."""
        self._queue.put(False)  # noqa: FBT003 - as above

    def wait(self, seconds: float) -> bool:
        """Wait until it is told or woken, at most so long; answers whether it was told."""
        self.woken = False
        try:
            stop = self._queue.get(timeout=0 if self._told else max(seconds, 0))
            while True:
                self._told |= stop
                self.woken |= not stop
                stop = self._queue.get_nowait()
        except queue.Empty:
            return self._told
