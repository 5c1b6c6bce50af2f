"""The agent's own log on stderr: one line per cause and ten seconds, however often the cause comes up."""

from __future__ import annotations

import logging
import time

QUIET_SECONDS = 10.0
REMEMBERED_CAUSES = 1_000


class OncePerCause(logging.Filter):
    """Lets the same line through once in `QUIET_SECONDS`; for libraries, the same text before the arguments go in."""

    def __init__(self) -> None:
        super().__init__()
        self._next: dict[tuple[str, str], float] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        """Decide over one line; information is never held back."""
        if record.levelno <= logging.INFO:
            return True
        now = time.monotonic()
        # Our own lines are written once a change; those of libraries repeat with other numbers in them.
        ours = record.name.startswith("otel_lb_hop")
        key = (record.name, record.getMessage() if ours else str(record.msg))
        if now < self._next.get(key, 0.0):
            return False
        if len(self._next) >= REMEMBERED_CAUSES:
            self._next.clear()
        self._next[key] = now + QUIET_SECONDS
        return True


def set_up_logging(level: str) -> None:
    """Send log lines of `level` and above to stderr."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    handler.addFilter(OncePerCause())
    # It tells each netlink message at debug level.
    logging.getLogger("pyroute2").setLevel(logging.WARNING)
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
