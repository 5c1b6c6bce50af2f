"""Server of a pod: takes every TCP connection and closes after the client does, or answers every UDP datagram.

Run as `python -I -S server.py tcp|udp PORT LOG CONTROL`: returns when the port listens, the server itself goes on in
the background. LOG gets a JSON line for every accepted connection, or for every datagram, with who it came from.
Whoever connects to the unix socket CONTROL is answered with the number of lines once all that waited is in LOG.
"""

from __future__ import annotations

import os
import resource
import select
import socket
import struct
import sys
from pathlib import Path

# As large as it gets: a full accept queue loses connections that the client believes in. somaxconn limits it.
BACKLOG = 65535
MAPPED = "::ffff:"
_PKTINFO = struct.Struct("=16sI")
"""struct in6_pktinfo: the address a datagram came to, and the interface."""


class Server:
    """One port, what came to it, and its log."""

    kind: socket.SocketKind

    def __init__(self, port: int, log: Path, control: Path) -> None:
        self.listener = socket.socket(socket.AF_INET6, self.kind)
        self.listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        self.listener.bind(("::", port))
        self.listener.settimeout(0)
        self.control = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.control.bind(str(control))
        self.control.listen()
        self.log = log.open("a", encoding="ascii")
        self.lines = 0
        self.poller = select.epoll()

    def take_all(self) -> None:
        """Take what waits, and have it in the log before returning."""
        raise NotImplementedError

    def handle(self, descriptor: int) -> None:
        """Handle an event of anything but the port itself."""
        raise NotImplementedError

    def write(self, peer: tuple[str, int], local: tuple[str, int]) -> None:
        """Put one line in the log."""
        self.log.write(f'["{_plain(peer[0])}", {peer[1]}, "{_plain(local[0])}", {local[1]}]\n')
        self.lines += 1

    def answer(self) -> None:
        """Tell whoever asks that the log is complete, by its length."""
        asker, _ = self.control.accept()
        with asker:
            self.take_all()
            asker.sendall(str(self.lines).encode())

    def serve_forever(self) -> None:
        """Handle events until killed."""
        self.poller.register(self.listener.fileno(), select.EPOLLIN)
        self.poller.register(self.control.fileno(), select.EPOLLIN)
        while True:
            for descriptor, _ in self.poller.poll():
                if descriptor == self.listener.fileno():
                    self.take_all()
                elif descriptor == self.control.fileno():
                    self.answer()
                else:
                    self.handle(descriptor)


class TcpServer(Server):
    """A listening port and its open connections."""

    kind = socket.SOCK_STREAM

    def __init__(self, port: int, log: Path, control: Path) -> None:
        super().__init__(port, log, control)
        self.listener.listen(BACKLOG)
        self.open: dict[int, socket.socket] = {}

    def take_all(self) -> None:
        """Accept every connection."""
        while True:
            try:
                connection, peer = self.listener.accept()
            except BlockingIOError:
                break
            except ConnectionAbortedError:
                continue
            self.write(peer, connection.getsockname())
            self.open[connection.fileno()] = connection
            self.poller.register(connection.fileno(), select.EPOLLIN)
        self.log.flush()

    def handle(self, descriptor: int) -> None:
        """Throw away what a client sends; close after it has closed or reset."""
        try:
            if self.open[descriptor].recv(65536):
                return
        except OSError:
            pass
        self.open.pop(descriptor).close()


class UdpServer(Server):
    """A port that sends every datagram back."""

    kind = socket.SOCK_DGRAM

    def __init__(self, port: int, log: Path, control: Path) -> None:
        super().__init__(port, log, control)
        self.port = port
        self.listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_RECVPKTINFO, 1)
        self.listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2**24)

    def take_all(self) -> None:
        """Write down every datagram, then answer it from the address it came to."""
        while True:
            try:
                payload, (information,), _, peer = self.listener.recvmsg(65536, socket.CMSG_SPACE(_PKTINFO.size))
            except BlockingIOError:
                break
            local, _ = _PKTINFO.unpack(information[2])
            self.write(peer, (socket.inet_ntop(socket.AF_INET6, local), self.port))
            self.log.flush()
            self.listener.sendmsg([payload], [information], 0, peer)


SERVERS = {"tcp": TcpServer, "udp": UdpServer}


def _plain(address: str) -> str:
    return address.removeprefix(MAPPED)


def main(transport: str, port: str, log: str, control: str) -> None:
    """Listen, then leave the server behind in a session of its own with no tie to the caller."""
    hard_limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard_limit, hard_limit))
    server = SERVERS[transport](int(port), Path(log), Path(control))
    if os.fork():
        os._exit(0)
    os.setsid()
    nowhere = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(nowhere, descriptor)
    server.serve_forever()


if __name__ == "__main__":
    main(*sys.argv[1:])
