"""Clients that call without end, at a steady rate, whatever becomes of their calls."""

from __future__ import annotations

import contextlib
import select
import socket
import struct
import threading
import time
from collections import deque
from typing import TYPE_CHECKING, NamedTuple, Self

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tests.lab.host import Host

TICK_SECONDS = 0.02
RESET_ON_CLOSE = struct.pack("ii", 1, 0)


class Calls(NamedTuple):
    """TCP connections to an IPv4 VIP, so many a second, each given up after `patience_seconds` if not answered."""

    vip: str
    rate: float
    patience_seconds: float = 0.5
    """A SYN is sent again after a second, if anybody is still there to send it."""
    port: int = 80


class Callers:
    """Make all these calls from one host while inside; each connection is reset as soon as it stands."""

    def __init__(self, host: Host, calls: Sequence[Calls]) -> None:
        self._host = host
        self._calls = calls
        self._enough = threading.Event()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="callers")

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._enough.set()
        self._thread.join()
        if self._error:
            raise self._error

    def _run(self) -> None:
        try:
            self._host.in_netns(self._call)
        except BaseException as error:  # noqa: BLE001 - raised where the thread is joined
            self._error = error

    def _call(self) -> None:
        # For each patience those that are under way, oldest first.
        open_calls: dict[float, deque[tuple[socket.socket, float]]] = {}
        under_way: dict[int, socket.socket] = {}
        due = [0.0] * len(self._calls)
        poller = select.epoll()
        last = time.monotonic()
        with contextlib.closing(poller):
            while not self._enough.wait(TICK_SECONDS):
                now = time.monotonic()
                for number, calls in enumerate(self._calls):
                    # What a slow machine has missed is not made up for: that would be a burst.
                    due[number] = min(due[number] + calls.rate * (now - last), 1 + calls.rate / 4)
                    while due[number] >= 1:
                        due[number] -= 1
                        connection = _begin(calls)
                        poller.register(connection, select.EPOLLOUT)
                        under_way[connection.fileno()] = connection
                        queue = open_calls.setdefault(calls.patience_seconds, deque())
                        queue.append((connection, now + calls.patience_seconds))
                last = now
                for descriptor, _ in poller.poll(0):
                    under_way.pop(descriptor).close()
                for queue in open_calls.values():
                    while queue and (queue[0][0].fileno() < 0 or queue[0][1] <= now):
                        connection, _ = queue.popleft()
                        under_way.pop(connection.fileno(), None)
                        connection.close()
            for connection in under_way.values():
                connection.close()


def _begin(calls: Calls) -> socket.socket:
    connection = socket.socket(socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
    # What cannot even be sent, for want of a route, is over as well.
    connection.connect_ex((calls.vip, calls.port))
    return connection
