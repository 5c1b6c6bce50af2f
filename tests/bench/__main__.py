"""`make bench`: what the agent costs. Each row is one run's figure or ratio beside its aim; nothing here is a test.

The path is that of a hop that was needed: client → router → node1 (takes it in) → node2 (backend), an agent on
both nodes, records on. Client and server run on one core and the agents on the other, so what is compared is what
the programs add to the packets' path.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import socket
import subprocess
import tempfile
import time
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from otel_lb_hop.kernel import bpf
from tests.bench.bulk import bulk_throughput
from tests.bench.cluster import cluster_costs
from tests.bench.datagrams import datagram_costs
from tests.bench.hostile import hostile_costs
from tests.bench.interfaces import interface_costs
from tests.bench.measure import (
    QUIET,
    SENDING,
    Row,
    RunTime,
    bpf_stats,
    cpu_seconds,
    empty_program,
    rss_mib,
    run_time,
    run_times,
)
from tests.bench.metrics import metrics_costs
from tests.bench.packets import packet_costs
from tests.bench.records import record_costs
from tests.bench.traffic import PORT, VIP, Path3, agents, side_by_side, traffic_path
from tests.lab.agent import Agent
from tests.lab.bpffs import bpffs

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

OBSERVED_SECONDS = 4.0
CONNECTIONS_A_TURN = 50


def connection_rate(folder: Path, turns: int) -> Iterator[Row]:
    """Compare two labs in turns of milliseconds; empty programs on the same hooks show the kernel's own part."""
    with traffic_path(folder) as first, traffic_path(folder) as second:
        for what, aim, watch in (
            ("connection rate with empty programs / without", 0, empty_hooks),
            ("connection rate with agents, records on / without", 0.98, lambda path: agents(path, SENDING)),
        ):
            yield side_by_side(what, aim, (first, second), watch, lambda here, there: compare(here, there, turns))


def compare(here: Path3, there: Path3, turns: int) -> list[tuple[int, int]]:
    """Take turns with two labs; answers the nanoseconds of each turn, here and there."""
    netns = [f"/run/netns/{path.lab.client.netns}" for path in (here, there)]
    argv = here.generator.command("compare", *netns, VIP, str(PORT), str(CONNECTIONS_A_TURN), str(turns))
    lines = subprocess.run(argv, check=True, capture_output=True, text=True).stdout.splitlines()
    return [(int(here_ns), int(there_ns)) for here_ns, there_ns in map(str.split, lines)]


@contextlib.contextmanager
def empty_hooks(path: Path3) -> Iterator[int]:
    """Attach a program that does nothing wherever an agent attaches one of its own."""
    program = empty_program()
    links = [link for node in path.lab.nodes for link in node.in_netns(lambda: _attach_everywhere(program))]
    try:
        yield program
    finally:
        for fd in (*links, program):
            os.close(fd)


def program_time(path: Path3) -> Iterator[Row]:
    """Time our programs on the path, and empty programs on the same hooks: the difference is ours.

    The kernel's timing of a program has a cost of its own, larger than a short program's.
    """
    with empty_hooks(path) as empty, bpf_stats():
        idle = _path_time(path, lambda: {"empty": run_time(empty)})
    with agents(path, SENDING), bpf_stats():
        ours = _path_time(path, lambda: {name: run_times()[name] for name in ("lbh_ingress", "lbh_egress")})
    for name, time_used in (idle | ours).items():
        yield Row(f"  {name}: time a run", time_used.ns / time_used.runs, "ns")
    over = sum(each.ns for each in ours.values()) - sum(each.ns for each in idle.values())
    yield Row(
        "program time per connection and node, all hooks, over empty ones", over / 1000, "us", "<= 0.7", over <= 700
    )
    runs = sum(each.runs for each in ours.values())
    yield Row("  runs per connection and node", runs)


def _attach_everywhere(program: int) -> list[int]:
    return [
        bpf.attach_tcx(program, index, hook)
        for index, name in socket.if_nameindex()
        if name != "lo"
        for hook in (bpf.BPF_TCX_INGRESS, bpf.BPF_TCX_EGRESS)
    ]


def _path_time(path: Path3, read: Callable[[], dict[str, RunTime]]) -> dict[str, RunTime]:
    """Measure what programs use per connection and node; both nodes see the whole connection."""
    path.call(0.3)
    before = read()
    made = path.call(2).made
    after = read()
    return {
        name: RunTime((after[name].ns - before[name].ns) / made / 2, (after[name].runs - before[name].runs) / made / 2)
        for name in after
    }


def one_agent(path: Path3) -> Iterator[Row]:
    """Start an agent under traffic and see what it counted at last; then let others idle."""
    node, vips = path.lab.nodes[0], path.lab.vips_path
    agent = Agent(node, vips, {**QUIET, "OTEL_METRICS_EXPORTER": "console", "OTEL_METRIC_EXPORT_INTERVAL": "60000"})
    made_at = []
    while agent.readyz().status != HTTPStatus.OK or time.monotonic() - agent.spawned < OBSERVED_SECONDS:
        (made,) = path.lab.connect(VIP, PORT, 1, concurrency=1)
        made_at.append(time.monotonic() - agent.spawned)
        assert made.ok
    agent.stop()
    first = made_at[-_counted(agent.stdout)]
    yield Row("time to the first counted connection", first, "s", "<= 2.5", first <= 2.5)
    with Agent(node, vips, QUIET) as agent:
        time.sleep(2)
        memory = rss_mib(agent.process.pid)
        yield Row("RSS idle, no exporter", memory, "MiB", "<= 56", memory <= 56)
        before = cpu_seconds(agent.process.pid)
        time.sleep(5)
        idle = (cpu_seconds(agent.process.pid) - before) / 5 * 100
        yield Row("CPU idle", idle, "% of a core", "<= 0.2", idle <= 0.2)
    with Agent(node, vips, SENDING) as agent:
        time.sleep(2)
        memory = rss_mib(agent.process.pid)
        yield Row("RSS idle, OTLP/gRPC for all signals", memory, "MiB", "<= 56", memory <= 56)


def restart(path: Path3) -> Iterator[Row]:
    """Kill an agent that pins, and see how long the next one takes until it is ready."""
    with bpffs(path.lab.directory / "bpf") as mounted:
        settings = QUIET | {"OTEL_LB_HOP_PIN_PATH": str(mounted / "pins")}
        Agent(path.lab.nodes[0], path.lab.vips_path, settings).wait_ready().kill()
        with Agent(path.lab.nodes[0], path.lab.vips_path, settings) as again:
            ready = time.monotonic() - again.spawned
    yield Row("ready again after a kill, by what was pinned", ready, "s")


def _counted(output: str) -> int:
    """Add up lb_hop.connections in the last export that the console exporter printed."""
    export, _ = json.JSONDecoder().raw_decode(output)
    metrics = export["resource_metrics"][0]["scope_metrics"][0]["metrics"]
    return sum(
        int(point["value"])
        for metric in metrics
        if metric["name"] == "lb_hop.connections"
        for point in metric["data"]["data_points"]
    )


def _told(console: Console, measurement: Iterator[Row]) -> Iterator[Row]:
    for row in measurement:
        console.print(f"[dim]{row.what}: {row.figure:.4g} {row.unit}")
        yield row


def main() -> None:
    """Run all rows and print them."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    parser.add_argument("--turns", type=int, default=1500, help="turns with and without agents, twice")
    parser.add_argument("--json", action="store_true", help="print the rows as JSON")
    arguments = parser.parse_args()
    rows = []
    console = Console(stderr=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with traffic_path(folder) as path:
            for measurement in (
                packet_costs(), one_agent(path), restart(path), program_time(path), record_costs(path),
            ):  # fmt: skip
                rows += list(_told(console, measurement))
        rows += list(_told(console, connection_rate(folder, arguments.turns)))
        rows += list(_told(console, bulk_throughput(folder, arguments.turns // 5)))
    rows += list(_told(console, hostile_costs()))
    rows += list(_told(console, metrics_costs()))
    rows += list(_told(console, cluster_costs()))
    rows += list(_told(console, interface_costs()))
    rows += list(_told(console, datagram_costs()))  # last: it puts this process on one CPU
    if arguments.json:
        print(json.dumps([row._asdict() for row in rows], indent=2))
        return
    table = Table("what", "figure", "unit", "aim", "", title="otel-lb-hop bench")
    for row in rows:
        verdict = "" if not row.aim else "ok" if row.good else "MISSED"
        table.add_row(row.what, f"{row.figure:.3g}", row.unit, row.aim, verdict)
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
