"""The path that the bench sends on: client → router → node1 (takes it in) → node2 (backend); traffic has a core."""

from __future__ import annotations

import contextlib
import math
from typing import TYPE_CHECKING, NamedTuple

from tests.bench.measure import Row, median_interval
from tests.lab import Lab
from tests.lab.agent import Agent
from tests.lab.generator import Called, Generator, forget_closed_quickly

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from contextlib import AbstractContextManager
    from pathlib import Path

VIP, PORT = "10.0.10.9", 80
BULK_PORT, BULK_TARGET = 5001, 5002
TRAFFIC_CPU, AGENT_CPU = "0", "1"


class Path3(NamedTuple):
    """The lab with its traffic programs."""

    lab: Lab
    generator: Generator

    def call(self, seconds: float, rate: int = 0) -> Called:
        """Make connections, so many a second or as many as go."""
        return self.generator.call(self.lab, VIP, PORT, seconds, rate)


@contextlib.contextmanager
def traffic_path(folder: Path) -> Iterator[Path3]:
    """Bring up the lab with a server on node2's pod; only node1 announces the VIP."""
    generator = Generator(folder, ["taskset", "-c", TRAFFIC_CPU])
    with Lab(nodes=2) as lab:
        first, second = lab.nodes
        forget_closed_quickly(lab)
        vip_port = lab.vip_port(VIP, PORT, service="bench", backends=[second.pods[0]], target_port=8080)
        bulk_port = lab.vip_port(VIP, BULK_PORT, service="bulk", backends=[second.pods[0]], target_port=BULK_TARGET)
        lab.apply([vip_port, bulk_port], announce={VIP: [first]})
        with generator.serving(second.pods[0], 8080):
            yield Path3(lab, generator)


@contextlib.contextmanager
def agents(path: Path3, env: Mapping[str, str]) -> Iterator[list[Agent]]:
    """Run an agent on each node, on its own core."""
    with contextlib.ExitStack() as stack:
        prefix = ["taskset", "-c", AGENT_CPU]
        yield [stack.enter_context(Agent(node, path.lab.vips_path, env, prefix=prefix)) for node in path.lab.nodes]


def side_by_side(
    what: str,
    aim: float,
    paths: tuple[Path3, Path3],
    watch: Callable[[Path3], AbstractContextManager[object]],
    compare: Callable[[Path3, Path3], list[tuple[int, int]]],
) -> Row:
    """Compare two labs in turns, one of them watched; then they change sides. The row has the 95 % interval.

    The machine's speed drifts by more than what is measured: only neighbours in time are compared, and what one lab
    has over the other by chance cancels out. `compare` answers the nanoseconds of each turn, watched and bare.
    """
    halves = []
    for watched, bare in (paths, paths[::-1]):
        with watch(watched):
            halves.append(median_interval([bare_ns / watched_ns for watched_ns, bare_ns in compare(watched, bare)]))
    ratio = math.sqrt(math.prod(half.median for half in halves))
    # The halves are independent: the errors of their logarithms add up by squares.
    below, above = (
        math.exp(math.hypot(*(math.log(end / half.median) for half, end in zip(halves, ends, strict=True))) / 2)
        for ends in ([half.low for half in halves], [half.high for half in halves])
    )
    interval = f"95 %: {ratio / below:.3f} to {ratio * above:.3f}"
    return Row(what, ratio, interval, f">= {aim}" if aim else "", not aim or ratio >= aim)
