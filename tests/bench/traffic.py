"""The path that the bench sends on: client → router → node1 (takes it in) → node2 (backend); traffic has a core."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, NamedTuple

from tests.lab import Lab
from tests.lab.agent import Agent
from tests.lab.generator import Called, Generator, forget_closed_quickly

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

VIP, PORT = "10.0.10.9", 80
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
        lab.apply([vip_port], announce={VIP: [first]})
        with generator.serving(second.pods[0], 8080):
            yield Path3(lab, generator)


@contextlib.contextmanager
def agents(path: Path3, env: Mapping[str, str]) -> Iterator[list[Agent]]:
    """Run an agent on each node, on its own core."""
    with contextlib.ExitStack() as stack:
        prefix = ["taskset", "-c", AGENT_CPU]
        yield [stack.enter_context(Agent(node, path.lab.vips_path, env, prefix=prefix)) for node in path.lab.nodes]
