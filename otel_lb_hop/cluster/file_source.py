"""The VIP file as a source of the topology: read at start, read again when it changes, in a thread of its own."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import threading
import time
from typing import TYPE_CHECKING

from otel_lb_hop.cluster.static_file import MAX_BYTES, decode, parse
from otel_lb_hop.errors import ConfigError, Problem

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from otel_lb_hop.model import Cluster

POLL_SECONDS = 1.0

_Stamp = tuple[int, int, int, int]


class FileSource:
    """One file on disk. Its stamp (device, inode, size, mtime) is looked at; it is read only when that differs.

    A ConfigMap volume swaps a symbolic link: the stamp follows links, so that is seen as well.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._stamp: _Stamp | None = None

    def poll(self) -> Cluster | None:
        """Answer the new content, or None if nothing changed.

        Raises ConfigError if the file is wrong or cannot be read. A wrong file is not read again until it changes;
        one that cannot be read is tried at each call.
        """
        try:
            raw = self._read_if_changed()
        except OSError as error:
            self._stamp = None
            problem = Problem(str(self._path), error.strerror or str(error), "a readable VIP file")
            raise ConfigError([problem]) from error
        return None if raw is None else parse(decode(raw, str(self._path)), str(self._path))

    def _read_if_changed(self) -> bytes | None:
        # Without O_NONBLOCK, opening a FIFO would wait for a writer.
        with os.fdopen(os.open(self._path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise OSError(errno.EINVAL, "not a regular file")
            stamp = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
            if stamp == self._stamp:
                return None
            self._stamp = stamp
            return file.read(MAX_BYTES + 1)


class FileWatcher:
    """Polls the file in a thread, because reading thousands of Services takes seconds that the main loop has not.

    `error` tells what is wrong with the file as it is now, and `confirmed_ns` (wall time) when it was last found to be
    what was taken.
    """

    def __init__(self, source: FileSource, wake: Callable[[], None], poll_seconds: float = POLL_SECONDS) -> None:
        self._source = source
        self._wake = wake
        self._poll_seconds = poll_seconds
        self._content: Cluster | None = None
        self._lock = threading.Lock()
        self._end = threading.Event()
        self.error: ConfigError | None = None
        self.confirmed_ns = 0

    def read(self) -> None:
        """Poll once; raises ConfigError, after which the content that was taken before stays."""
        try:
            content = self._source.poll()
        except ConfigError as error:
            self.error = error
            raise
        if content is not None:
            with self._lock:
                self._content = content
            self.error = None
            self._wake()
        if self.error is None:
            self.confirmed_ns = time.time_ns()

    def start(self) -> None:
        """Poll from now on."""
        threading.Thread(target=self._run, name="vips-file", daemon=True).start()

    def take(self) -> Cluster | None:
        """Answer the newest content, once."""
        with self._lock:
            content, self._content = self._content, None
            return content

    def close(self) -> None:
        """End the thread soon."""
        self._end.set()

    def _run(self) -> None:
        while not self._end.wait(self._poll_seconds):
            with contextlib.suppress(ConfigError):  # it stands in `error`
                self.read()
