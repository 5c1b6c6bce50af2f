"""VIPs that reach their node by a VLAN device: each packet passes two hooks, or three, and counts once."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.lab.requirements import needs_lab

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.kernels.scene import Scene
    from tests.lab import Host

pytestmark = [pytest.mark.root, pytest.mark.kernels, needs_lab]

STACKS = {"vlan": [("802.1Q", 100)], "qinq": [("802.1ad", 200), ("802.1Q", 300)]}


def add_tags(host: Host, port: str, stack: list[tuple[str, int]], address: str) -> list[str]:
    """Put VLAN devices on a port, one on the other, with an address on the last; answers their names."""
    names = [port]
    for protocol, number in stack:
        names.append(f"{names[-1]}.{number}")
        kind = ["type", "vlan", "proto", protocol, "id", str(number)]
        host.run(["ip", "link", "add", "link", names[-2], "name", names[-1], *kind])
        host.run(["ip", "link", "set", names[-1], "up"])
    host.run(["ip", "addr", "add", address, "dev", names[-1]])
    return names[1:]


@pytest.fixture(params=STACKS)
def tagged(request: pytest.FixtureRequest, scene: Scene) -> Iterator[str]:
    """Let a Service's VIP and its answers go by tagged frames."""
    name: str = request.param
    router, node = scene.lab.router, scene.node
    first = add_tags(router, "net1", STACKS[name], "10.77.1.1/30")[0]
    names = add_tags(node, "net0", STACKS[name], "10.77.1.2/30")
    node.run(["ip", "route", "replace", "default", "via", "10.77.1.1"])
    scene.route(name, "10.77.1.2")
    scene.hooked(*names)
    yield name
    node.run(["ip", "link", "del", names[0]])
    router.run(["ip", "link", "del", first])
    node.run(["ip", "route", "replace", "default", "via", "172.19.1.1"])


def test_counts_once(scene: Scene, tagged: str) -> None:
    """23 connections by tagged frames are 23, with backend and SNAT source; the port below the VLAN saw them first."""
    scene.deliver(tagged, "net0")
