"""Client that makes TCP connections, or UDP flows of one question and one answer, and tells what became of each.

Run as `python -I -S traffic.py tcp|udp ADDRESS PORT COUNT CONCURRENCY TIMEOUT RESET`; writes one JSON array with
[client address, client port, ok, error, seconds] for every connection, in the order they ended.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import resource
import select
import socket
import struct
import sys
import time
from typing import TypeAlias

Result: TypeAlias = tuple[str, int, bool, str, float]

RESET_ON_CLOSE = struct.pack("ii", 1, 0)
TIMEOUT = "timeout"


class Traffic:
    """COUNT connections to one address, at most CONCURRENCY of them under way at once."""

    kind = socket.SOCK_STREAM
    answered_by = select.EPOLLOUT

    def __init__(self, address: str, port: int, *, timeout: float, reset: bool) -> None:
        self.target = (address, port)
        self.family = socket.AF_INET6 if ":" in address else socket.AF_INET
        self.timeout = timeout
        self.reset = reset
        self.poller = select.epoll()
        # In the order they began, so that the first is the first to run out of time.
        self.pending: dict[int, tuple[socket.socket, float]] = {}
        self.results: list[Result] = []

    def run(self, count: int, concurrency: int) -> list[Result]:
        """Make them all; a result for each."""
        begun = 0
        while len(self.results) < count:
            while begun < count and len(self.pending) < concurrency:
                self.begin()
                begun += 1
            for descriptor, _ in self.poller.poll(self.patience()):
                connection, started = self.pending.pop(descriptor)
                number = connection.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
                self.end(connection, started, errno.errorcode[number] if number else "")
            self.expire()
        return self.results

    def begin(self) -> None:
        """Send one first packet."""
        connection = socket.socket(self.family, self.kind | socket.SOCK_NONBLOCK)
        if self.reset:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
        started = time.perf_counter()
        number = self.send_first(connection)
        if number == errno.EINPROGRESS:
            # Without a wire in between, an ICMP "port unreachable" comes back while connect() still holds the socket;
            # IPv6 then keeps it as a soft error and would tell only after the next SYN, a second later.
            number = connection.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) or errno.EINPROGRESS
        if number in {0, errno.EINPROGRESS}:
            self.pending[connection.fileno()] = connection, started
            self.poller.register(connection.fileno(), self.answered_by)
        else:
            self.end(connection, started, errno.errorcode[number])

    def send_first(self, connection: socket.socket) -> int:
        """Send a SYN; answers an errno or 0."""
        return connection.connect_ex(self.target)

    def end(self, connection: socket.socket, started: float, error: str) -> None:
        """Write the result down and close."""
        seconds = time.perf_counter() - started
        local = connection.getsockname()
        self.close(connection)
        self.results.append((local[0], local[1], not error, error, seconds))

    def close(self, connection: socket.socket) -> None:
        """Be done with a connection."""
        connection.close()

    def patience(self) -> float:
        """Seconds until the oldest connection runs out of time."""
        for _, started in self.pending.values():
            return max(0.0, started + self.timeout - time.perf_counter())
        return 0.0

    def expire(self) -> None:
        """Give up the connections whose time is over."""
        while self.pending and self.patience() <= 0:
            descriptor = next(iter(self.pending))
            connection, started = self.pending.pop(descriptor)
            self.end(connection, started, TIMEOUT)


class Questions(Traffic):
    """The same with UDP: each connection is a datagram from a port of its own, and good once one came back."""

    kind = socket.SOCK_DGRAM
    answered_by = select.EPOLLIN

    def __init__(self, address: str, port: int, *, timeout: float, reset: bool) -> None:
        super().__init__(address, port, timeout=timeout, reset=reset)
        self.asked: list[socket.socket] = []

    def send_first(self, connection: socket.socket) -> int:
        """Ask; answers an errno or 0."""
        try:
            connection.connect(self.target)
            connection.send(b"?")
        except OSError as error:
            return error.errno or errno.EIO
        return 0

    def close(self, connection: socket.socket) -> None:
        """Keep its port until the end, so that no other flow gets it; it says no more."""
        with contextlib.suppress(FileNotFoundError):  # it could not even be sent
            self.poller.unregister(connection)
        self.asked.append(connection)


def stay_on_one_cpu() -> None:
    """Keep the packets of a connection in order.

    The handshake's last ACK is sent by the soft interrupt that took the SYN-ACK, the RST by this process. On two
    CPUs the RST may overtake the ACK in the per-CPU backlogs of veth, and the server would never see a connection
    that succeeded here.
    """
    cpus = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cpus[os.getpid() % len(cpus)]})


def main(words: list[str]) -> None:
    """Make the connections and print the results."""
    transport, address, port, count, concurrency, timeout, reset = words
    hard_limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard_limit, hard_limit))
    stay_on_one_cpu()
    traffic = {"tcp": Traffic, "udp": Questions}[transport](
        address, int(port), timeout=float(timeout), reset=reset == "reset"
    )
    json.dump(traffic.run(int(count), int(concurrency)), sys.stdout)


if __name__ == "__main__":
    main(sys.argv[1:])
