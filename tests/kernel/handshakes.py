"""SYNs of both families to VIP ports that come in by the uplink, and go out to the pod translated, on real devices."""

from __future__ import annotations

import errno
import subprocess
from typing import TYPE_CHECKING

from tests.kernel.oracle import SYN
from tests.kernel.packets import End, ethernet, ipv4, ipv6, next_isn, tcp
from tests.kernel.rig import NODE, vip_port
from tests.kernel.test_devices import sender
from tests.kernel.test_parser import CLIENT4, CLIENT6, VIP4, VIP6
from tests.lab.waiting import wait_for

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.kernel.rig import Rig

POD4, POD6 = End.of("8.0.3.7", 8080), End.of("2001:db8:86dd:3::7", 8080)
WAYS = ((ipv4, CLIENT4, VIP4, POD4), (ipv6, CLIENT6, VIP6, POD6))


class Handshakes:
    """Two VIP ports, one of each family, with a backend behind the interface `pod`."""

    def __init__(self, rig: Rig) -> None:
        self._rig = rig
        set_pod("up")
        with sender("pod") as leave:
            wait_for("the cable to the pod", lambda: _sent(leave, ethernet(b"", ethertype=0x88B5)))  # experimental
        rig.serve(*(vip_port(vip, (pod, NODE)) for _, _, vip, pod in WAYS))

    def send(self, count: int, *, into: str = "far_uplink", out: str = "pod") -> None:
        """Send so many of each family to the node by one interface, and by another from it."""
        with sender(into) as come, sender(out) as leave:
            for _ in range(count):
                for make, client, vip, pod in WAYS:
                    isn = next_isn()
                    come(ethernet(make(client.address, vip.address, tcp(client.port, vip.port, isn, flags=SYN))))
                    _sent(
                        leave, ethernet(make(client.address, pod.address, tcp(client.port, pod.port, isn, flags=SYN)))
                    )

    def seen(self) -> tuple[int, int]:
        """Return how many connections were counted, and how many of them as forwarded."""
        snapshot = self._rig.snapshot()
        connections = sum(sum(row.connections) for row in snapshot.vips.values())
        return connections, sum(sum(row.forwarded) for row in snapshot.hops.values())

    @staticmethod
    def close() -> None:
        """Leave the interfaces as they were."""
        set_pod("down")


def _sent(leave: Callable[[bytes], None], frame: bytes) -> bool:
    """Send a frame; answers whether nothing on the way has dropped it."""
    try:
        leave(frame)
    except OSError as error:
        if error.errno != errno.ENOBUFS:
            raise
        return False
    return True


def set_pod(state: str) -> None:
    """Set both ends of the cable to the pod up or down."""
    for name in ("pod", "far_pod"):
        subprocess.run(["ip", "link", "set", name, state], check=True)
