"""The agent's own log, on stderr and by OTLP: one line per cause and ten seconds, however often the cause comes up."""

from __future__ import annotations

import logging
import time
from collections import deque

from otel_lb_hop.export.log_lines import LogLine

QUIET_SECONDS = 10.0
REMEMBERED_CAUSES = 1_000
KEPT_LINES = 256
"""Most lines that wait to be exported: the agent takes them each second."""


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


class LineKeeper(logging.Handler):
    """Keeps lines until they are taken to be exported; if nobody comes, the newest. Stderr has them all."""

    def __init__(self) -> None:
        super().__init__()
        self.lost = 0
        """Lines that made room for newer ones."""
        self._lines: deque[LogLine] = deque(maxlen=KEPT_LINES)

    def emit(self, record: logging.LogRecord) -> None:
        """Take over one line; one that cannot be written hurts nobody, as with logging's own handlers."""
        try:
            self._keep(record)
        except Exception:  # noqa: BLE001 - whatever a library's arguments raise
            self.handleError(record)

    def _keep(self, record: logging.LogRecord) -> None:
        exception = None
        if record.exc_info and record.exc_info[0]:
            trace = logging.Formatter().formatException(record.exc_info)
            exception = record.exc_info[0].__qualname__, str(record.exc_info[1]), trace
        function = f"{record.name}.{record.funcName}"
        line = LogLine(int(record.created * 1e9), record.levelno, function, record.getMessage(), exception)
        self.lost += len(self._lines) == KEPT_LINES
        self._lines.append(line)

    def take(self) -> list[LogLine]:
        """Give the lines out, each once."""
        return [self._lines.popleft() for _ in range(len(self._lines))]


def set_up_logging(level: str) -> LineKeeper:
    """Send log lines of `level` and above to stderr, and keep them for whoever exports them."""
    stderr, kept = logging.StreamHandler(), LineKeeper()
    stderr.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    for handler in (stderr, kept):
        handler.addFilter(OncePerCause())
    # It tells each netlink message at debug level.
    logging.getLogger("pyroute2").setLevel(logging.WARNING)
    logging.basicConfig(level=level.upper(), handlers=[stderr, kept], force=True)
    return kept
