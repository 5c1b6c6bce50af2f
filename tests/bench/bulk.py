"""Throughput of one TCP stream through a VIP, with an agent on its way and without."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
from typing import TYPE_CHECKING

from tests.bench.measure import SENDING, Row
from tests.bench.traffic import BULK_PORT, BULK_TARGET, TRAFFIC_CPU, VIP, agents, side_by_side, traffic_path

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.bench.traffic import Path3

TURN_BYTES = 16 << 20
_ROOM = 1 << 20
_AGREED = b"."


def bulk_throughput(folder: Path, turns: int) -> Iterator[Row]:
    """Send so many bytes on a stream in one lab, then in the other, an agent on both nodes of one of them."""
    home = os.sched_getaffinity(0)
    with traffic_path(folder) as first, traffic_path(folder) as second, _sink(first), _sink(second):
        try:
            os.sched_setaffinity(0, {int(TRAFFIC_CPU)})
            yield side_by_side(
                "throughput of one TCP stream with agents / without",
                0.99,
                (first, second),
                lambda path: agents(path, SENDING),
                lambda here, there: _compare(here, there, turns),
            )
        finally:
            os.sched_setaffinity(0, home)


def _compare(here: Path3, there: Path3, turns: int) -> list[tuple[int, int]]:
    with _stream(here) as one, _stream(there) as other:
        for stream in (one, other):
            _send(stream)  # the window has to open first
        return [(_send(one), _send(other)) for _ in range(turns)]


def _stream(path: Path3) -> socket.socket:
    return path.lab.client.in_netns(lambda: socket.create_connection((VIP, BULK_PORT), timeout=30))


def _send(stream: socket.socket) -> int:
    """Send the bytes of a turn; answers the nanoseconds until all have arrived."""
    started = time.perf_counter_ns()
    for _ in range(TURN_BYTES // _ROOM):
        stream.sendall(bytes(_ROOM))
    if stream.recv(1) != _AGREED:
        raise ConnectionError("the sink has gone")
    return time.perf_counter_ns() - started


@contextlib.contextmanager
def _sink(path: Path3) -> Iterator[None]:
    """Take streams in node2's pod."""
    argv = ["taskset", "-c", TRAFFIC_CPU, sys.executable, "-m", "tests.bench.bulk", str(BULK_TARGET)]
    with path.lab.nodes[1].pods[0].popen(argv, stdout=subprocess.PIPE) as sink:
        assert sink.stdout is not None
        sink.stdout.readline()
        try:
            yield
        finally:
            sink.kill()


def _take(port: int) -> None:
    """Take one stream after another; agree to the bytes of each turn when all are here."""
    room = bytearray(_ROOM)
    with socket.create_server(("", port)) as listener:
        print("ready", flush=True)
        while True:
            stream, _ = listener.accept()
            with stream:
                left = TURN_BYTES
                while taken := stream.recv_into(room, min(left, _ROOM)):
                    left -= taken
                    if not left:
                        stream.sendall(_AGREED)
                        left = TURN_BYTES


if __name__ == "__main__":
    _take(int(sys.argv[1]))
