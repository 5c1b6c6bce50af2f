"""TCP server of a pod: takes every connection, writes down who came, closes after the client does.

Run as `python -I -S server.py PORT LOG CONTROL`: returns when the port listens, the server itself goes on in the
background. LOG gets a JSON line for every accepted connection. Whoever connects to the unix socket CONTROL is
answered with the number of lines once all connections that were waiting to be accepted are in LOG.
"""

from __future__ import annotations

import os
import resource
import select
import socket
import sys
from pathlib import Path

# As large as it gets: a full accept queue loses connections that the client believes in. somaxconn limits it.
BACKLOG = 65535
MAPPED = "::ffff:"


class Server:
    """One listening port, its open connections and its log."""

    def __init__(self, port: int, log: Path, control: Path) -> None:
        self.listener = socket.socket(socket.AF_INET6, socket.SOCK_STREAM)
        self.listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        self.listener.bind(("::", port))
        self.listener.listen(BACKLOG)
        self.listener.settimeout(0)
        self.control = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.control.bind(str(control))
        self.control.listen()
        self.log = log.open("a", encoding="ascii")
        self.accepted = 0
        self.open: dict[int, socket.socket] = {}

    def accept_all(self, poller: select.epoll) -> None:
        """Take what waits, and have it in the log before returning."""
        while True:
            try:
                connection, peer = self.listener.accept()
            except BlockingIOError:
                break
            except ConnectionAbortedError:
                continue
            local = connection.getsockname()
            self.log.write(
                f'["{peer[0].removeprefix(MAPPED)}", {peer[1]}, "{local[0].removeprefix(MAPPED)}", {local[1]}]\n'
            )
            self.accepted += 1
            self.open[connection.fileno()] = connection
            poller.register(connection.fileno(), select.EPOLLIN)
        self.log.flush()

    def answer(self, poller: select.epoll) -> None:
        """Tell whoever asks that the log is complete, by its length."""
        asker, _ = self.control.accept()
        with asker:
            self.accept_all(poller)
            asker.sendall(str(self.accepted).encode())

    def read_or_close(self, descriptor: int) -> None:
        """Throw away what a client sends; close after it has closed or reset."""
        try:
            if self.open[descriptor].recv(65536):
                return
        except OSError:
            pass
        self.open.pop(descriptor).close()

    def serve_forever(self) -> None:
        """Handle events until killed."""
        poller = select.epoll()
        poller.register(self.listener.fileno(), select.EPOLLIN)
        poller.register(self.control.fileno(), select.EPOLLIN)
        while True:
            for descriptor, _ in poller.poll():
                if descriptor == self.listener.fileno():
                    self.accept_all(poller)
                elif descriptor == self.control.fileno():
                    self.answer(poller)
                else:
                    self.read_or_close(descriptor)


def main(port: str, log: str, control: str) -> None:
    """Listen, then leave the server behind in a session of its own with no tie to the caller."""
    hard_limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard_limit, hard_limit))
    server = Server(int(port), Path(log), Path(control))
    if os.fork():
        os._exit(0)
    os.setsid()
    nowhere = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(nowhere, descriptor)
    server.serve_forever()


if __name__ == "__main__":
    main(*sys.argv[1:])
