"""What hundreds of interfaces cost an agent: to hook them when they come at once, to watch them, to let them go."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

from pyroute2 import IPRoute  # noqa: TID251 - what our way is compared with

from otel_lb_hop.kernel.netlink import Netlink
from tests.bench.measure import QUIET, Row, cpu_seconds
from tests.lab import Lab
from tests.lab.agent import Agent
from tests.lab.waiting import wait_for

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

PODS = 300
GROUP = "77"
TURNS = 5
IDLE_SECONDS = 5.0
PATIENCE_SECONDS = 120.0


def interface_costs() -> Iterator[Row]:
    """Give a node 300 pods' interfaces in one batch, and take them away again, under an agent."""
    with Lab() as lab:
        node, pod = lab.nodes[0], lab.pods[0]
        lab.apply([])
        batch = "".join(
            f"link add many{n} group {GROUP} type veth peer name many{n} netns {pod.netns}\n" for n in range(PODS)
        )

        def hooked() -> int:
            detail = agent.part("interfaces")["detail"]
            return 0 if detail["waiting"] else len(detail["hooked"])

        with Agent(node, lab.vips_path, QUIET) as agent:
            pid, before = agent.process.pid, hooked()
            descriptors = _descriptors(pid)
            cpu, began = cpu_seconds(pid), time.monotonic()
            node.run(["ip", "-batch", "-"], text=batch, timeout=PATIENCE_SECONDS)
            wait_for("all of them", lambda: hooked() == before + PODS, PATIENCE_SECONDS)
            yield Row(f"{PODS} interfaces in one batch: until all are hooked", time.monotonic() - began, "s")
            yield Row("  CPU of the agent", (cpu_seconds(pid) - cpu) * 1e3, "ms")
            ours, theirs = node.in_netns(lambda: (_time(Netlink), _time(IPRoute)))
            yield Row("  links read by us / by pyroute2, time", ours / theirs, "", "<= 0.2", ours / theirs <= 0.2)
            yield Row("  links read once", ours * 1e3, "ms")
            cpu = cpu_seconds(pid)
            time.sleep(IDLE_SECONDS)
            idle = (cpu_seconds(pid) - cpu) / IDLE_SECONDS * 100
            yield Row("  CPU idle with them", idle, "% of a core")
            cpu, began = cpu_seconds(pid), time.monotonic()
            node.run(["ip", "link", "del", "group", GROUP], timeout=PATIENCE_SECONDS)
            wait_for("their end", lambda: hooked() == before, PATIENCE_SECONDS)
            yield Row("  deleted at once: until all are let go of", time.monotonic() - began, "s")
            yield Row("  CPU of the agent", (cpu_seconds(pid) - cpu) * 1e3, "ms")
            left = _descriptors(pid) - descriptors
            yield Row("  descriptors left", left, "", "<= 0", left <= 0)


def _descriptors(pid: int) -> int:
    return len([*Path(f"/proc/{pid}/fd").iterdir()])


def _time(make: Callable[[], Netlink | IPRoute]) -> float:
    """Take the shortest of some times, in seconds."""
    netlink = make()
    read = netlink.links if isinstance(netlink, Netlink) else netlink.get_links
    times = []
    for _ in range(TURNS):
        began = time.perf_counter()
        list(read())
        times.append(time.perf_counter() - began)
    netlink.close()
    return min(times)
