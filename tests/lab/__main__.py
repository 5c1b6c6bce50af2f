"""`python -m tests.lab`: a laboratory to look around in. It stays until `down`."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections import Counter
from statistics import quantiles
from typing import TYPE_CHECKING

from otel_lb_hop.model import Policy
from tests.lab import reaper
from tests.lab.lab import Lab, LabError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from otel_lb_hop.model import VipPort

WEB_VIPS = ("10.0.10.0", "fd00:10::1")
WEB_LOCAL_VIPS = ("10.0.10.1", "fd00:10::2")
TARGET_PORT = 8080


def example_services(lab: Lab) -> list[VipPort]:
    """Describe default/web (Cluster, a pod on each node) and default/web-local (Local, a pod on node1 only)."""
    everywhere = [node.pods[0] for node in lab.nodes]
    web = [lab.vip_port(vip, 80, backends=everywhere, target_port=TARGET_PORT) for vip in WEB_VIPS]
    local = [
        lab.vip_port(
            vip, 80, service="web-local", policy=Policy.LOCAL, backends=everywhere[:1], target_port=TARGET_PORT
        )
        for vip in WEB_LOCAL_VIPS
    ]
    return [*web, *local]


def up(arguments: argparse.Namespace) -> None:
    """Build a lab that nobody owns, with pods serving and the example Services."""
    lab = Lab(arguments.nodes, arguments.pods, arguments.name)
    lab.up(outlive=True)
    try:
        for pod in lab.pods:
            pod.serve(TARGET_PORT)
        lab.apply(example_services(lab))
    except BaseException:
        lab.down()
        raise
    print(lab.name)


def down(arguments: argparse.Namespace) -> None:
    """Remove one lab, or all that nobody owns or whose owner is dead."""
    if not arguments.all and arguments.name is None:
        raise LabError("name the lab to remove, or say --all")
    for name in _unowned_labs() if arguments.all else [arguments.name]:
        Lab.attach(name).down()


def show(_: argparse.Namespace) -> None:
    """Print every lab with its size and owner."""
    for path in sorted(reaper.STATE_DIRECTORY.glob("*.json")):
        state = json.loads(path.read_text(encoding="utf-8"))
        owner = f"owner {state['owner_pid']}" if state["owner_pid"] else "stays until `down`"
        print(f"{path.stem}: {state['nodes']} nodes, {state['pods_per_node']} pods each, {owner}")


def execute(arguments: argparse.Namespace) -> None:
    """Become a command inside a host's namespace, with a /sys that shows it."""
    lab = Lab.attach(arguments.name)
    if arguments.host not in lab.plan.hosts:
        raise LabError(f"hosts of this lab: {', '.join(lab.plan.hosts)}")
    os.execvp("ip", ["ip", "netns", "exec", lab.plan.netns(arguments.host), *arguments.command])  # noqa: S606 - becoming it is the point


def traffic(arguments: argparse.Namespace) -> None:
    """Make connections from the client and print what became of them, on both sides."""
    lab = Lab.attach(arguments.name)
    before = {pod.name: len(pod.accepted()) for pod in lab.pods}
    results = lab.connect(arguments.vip, arguments.port, arguments.count, concurrency=arguments.concurrency)
    for outcome, count in Counter(result.error or "ok" for result in results).items():
        print(f"{outcome}: {count}")
    times = [1e3 * result.connect_seconds for result in results if result.ok]
    if len(times) > 1:
        percentiles = quantiles(times, n=100)
        print(f"handshake: median {percentiles[49]:.3f} ms, 99th percentile {percentiles[98]:.3f} ms")
    for pod in lab.pods:
        print(f"{pod.name} ({pod.zone}) accepted: {len(pod.accepted()) - before[pod.name]}")


def vips(arguments: argparse.Namespace) -> None:
    """Print the VIP file of the Services applied last."""
    print(Lab.attach(arguments.name).vips_path.read_text(encoding="utf-8"), end="")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; 0, or 1 with a line on standard error."""
    arguments = _parser().parse_args(argv)
    try:
        arguments.function(arguments)
    except LabError as error:
        print(f"lab: {error}", file=sys.stderr)
        return 1
    return 0


def _unowned_labs() -> list[str]:
    reaper.remove_stale_labs()
    paths = sorted(reaper.STATE_DIRECTORY.glob("*.json"))
    return [path.stem for path in paths if json.loads(path.read_text(encoding="utf-8"))["owner_pid"] is None]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.lab", description=__doc__)
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("up", help="build a lab with two example Services and print its name")
    command.add_argument("--nodes", type=int, default=2)
    command.add_argument("--pods", type=int, default=1, help="pods per node")
    command.add_argument("--name")
    command.set_defaults(function=up)
    command = commands.add_parser("down", help="remove a lab")
    command.add_argument("name", nargs="?")
    command.add_argument("--all", action="store_true", help="every lab that no living process owns")
    command.set_defaults(function=down)
    command = commands.add_parser("list", help="show the labs")
    command.set_defaults(function=show)
    command = commands.add_parser("exec", help="run a command in a host: exec NAME node1 -- ip addr")
    command.add_argument("name")
    command.add_argument("host")
    command.add_argument("command", nargs="+", metavar="CMD")
    command.set_defaults(function=execute)
    command = commands.add_parser("traffic", help="make connections from the client to a VIP")
    command.add_argument("name")
    command.add_argument("vip")
    command.add_argument("port", type=int)
    command.add_argument("count", type=int)
    command.add_argument("--concurrency", type=int, default=8)
    command.set_defaults(function=traffic)
    command = commands.add_parser("vips", help="print the VIP file")
    command.add_argument("name")
    command.set_defaults(function=vips)
    return parser


if __name__ == "__main__":
    sys.exit(main())
