"""A client and a server in C: more connections a second than Python makes, each counted."""

from __future__ import annotations

import contextlib
import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Self

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from tests.lab import Lab
    from tests.lab.host import Host

SOURCE = Path(__file__).with_name("connections.c")


def compiled(source: Path, folder: Path) -> Path:
    """Compile a program of the lab into a folder."""
    program = folder / source.stem
    subprocess.run(["cc", "-O2", "-o", str(program), str(source)], check=True)
    return program


class Called(NamedTuple):
    """What the client did."""

    made: int
    seconds: float

    @property
    def rate(self) -> float:
        """Connections per second."""
        return self.made / self.seconds


class Generator:
    """The compiled program; `prefix` (taskset) is put before every run of it."""

    def __init__(self, folder: Path, prefix: Sequence[str] = ()) -> None:
        self.program = compiled(SOURCE, folder)
        self._prefix = list(prefix)

    def command(self, *words: str) -> list[str]:
        """Write a command line."""
        return [*self._prefix, str(self.program), *words]

    @contextlib.contextmanager
    def serving(self, host: Host, port: int) -> Iterator[None]:
        """Take connections, one at a time, and end them when the client does."""
        with host.popen(self.command("serve", str(port)), stdout=subprocess.PIPE) as server:
            assert server.stdout is not None
            server.stdout.readline()
            try:
                yield
            finally:
                server.kill()

    def call(self, lab: Lab, vip: str, port: int, seconds: float, rate: int = 0) -> Called:
        """Make connections one after another, so many a second or as many as go; all must succeed."""
        words = ["call", vip, str(port), str(round(seconds * 1000)), str(rate)]
        done = lab.client.run(self.command(*words), timeout=seconds + 30)
        made, failed, took_ns = map(int, done.stdout.split())
        if failed:
            raise AssertionError(f"{failed} of {made + failed} connections failed")
        return Called(made, took_ns / 1e9)


class Traffic:
    """Connections to port 80 of a VIP all the time, so many a second or as many as the machine makes, while inside."""

    def __init__(self, lab: Lab, generator: Generator, vip: str, rate: int) -> None:
        self._lab = lab
        self._generator = generator
        self._vip = vip
        self._rate = rate
        self._enough = threading.Event()

    def __enter__(self) -> Self:
        self._thread = ThreadPoolExecutor(1)
        self._made = self._thread.submit(self._run)
        return self

    def __exit__(self, *_: object) -> None:
        self._enough.set()
        self._thread.shutdown()

    def end(self) -> int:
        """Make the last ones; answers how many there were."""
        self._enough.set()
        return self._made.result()

    def _run(self) -> int:
        made = 0
        while not self._enough.is_set():
            made += self._generator.call(self._lab, self._vip, 80, 2, self._rate).made
        return made


def forget_closed_quickly(lab: Lab) -> None:
    """Let conntrack free the port of a closed connection after a second: one client calls 10,000 times a second."""
    for node in lab.nodes:
        node.sysctl("net.netfilter.nf_conntrack_tcp_timeout_close", 1)
