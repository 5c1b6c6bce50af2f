"""The handshake's time by hop class follows a delay between the nodes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.lab.requirements import needs_lab
from tests.lab.waiting import wait_for

if TYPE_CHECKING:
    from tests.kernels.scene import Scene

pytestmark = [pytest.mark.root, pytest.mark.kernels, needs_lab]

DELAY_SECONDS = 0.005


def fastest(scene: Scene) -> dict[str, float]:
    """Send connections one after another; answers the shortest handshake of each hop class."""
    found: dict[str, float] = {}
    for record in scene.deliver("delay", "net0", concurrency=1):
        hop, seconds = str(record.attributes["lb_hop.hop"]), float(record.attributes["lb_hop.handshake.duration"])
        found[hop] = min(found.get(hop, seconds), seconds)
    return found


def by_bound(scene: Scene, hop: str) -> tuple[int, int]:
    """Count the handshakes of a hop class up to the delay, and above, by the histogram."""
    points = [
        each for each in scene.points("lb_hop.handshake.duration", "delay") if each.attributes["lb_hop.hop"] == hop
    ]
    (point,) = points
    split = point.bounds.index(DELAY_SECONDS) + 1
    return sum(point.buckets[:split]), sum(point.buckets[split:])


def test_follows_the_delay(scene: Scene) -> None:
    """Without a delay both ways have handshakes below 5 ms; with 5 ms between the nodes the far one has none."""
    scene.route("delay", scene.node.uplink4)
    # A busy machine may need more than one try.
    wait_for("quick handshakes", lambda: max(fastest(scene).values()) < DELAY_SECONDS, 60)
    quick = by_bound(scene, "avoidable")
    far = scene.lab.nodes[1]
    far.run(["tc", "qdisc", "add", "dev", "eth0", "root", "netem", "delay", "5ms"])
    try:
        delayed = fastest(scene)
        assert delayed["avoidable"] >= DELAY_SECONDS
        wait_for("quick handshakes on the node", lambda: fastest(scene)["none"] < DELAY_SECONDS, 60)
    finally:
        far.run(["tc", "qdisc", "del", "dev", "eth0", "root"])
    after = by_bound(scene, "avoidable")
    assert after[0] == quick[0]
    assert after[1] > quick[1]
