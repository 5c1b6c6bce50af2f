"""More VIP ports than one message to a Collector can tell of."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.e2e.collector import Collector
from tests.lab.agent import Agent
from tests.lab.requirements import needs_lab
from tests.lab.waiting import wait_for

if TYPE_CHECKING:
    from pathlib import Path

    from tests.lab import Lab

pytestmark = [pytest.mark.root, pytest.mark.collector, needs_lab]

VIPS, PORTS = 64, 64
SECONDS = 60


def test_thousands_of_vip_ports_arrive(lab: Lab, tmp_path: Path) -> None:
    """4,096 VIP ports are 12,288 points of endpoints, over 4 MiB: a Collector takes that by gRPC only in pieces."""
    vips = ", ".join(f"10.1.0.{number}" for number in range(VIPS))
    ports = ", ".join(f"{{port: {number}}}" for number in range(1, PORTS + 1))
    path = tmp_path / "vips.yaml"
    path.write_text(f"services:\n- {{name: default/many, vips: [{vips}], ports: [{ports}]}}\n", encoding="utf-8")
    with Collector(lab) as collector:
        settings = collector.settings() | {"OTEL_METRIC_EXPORT_INTERVAL": "5000"}
        with Agent(lab.nodes[0], path, settings) as agent:
            wait_for("an export that was taken", lambda: agent.shipped("metrics").get("exported"), SECONDS)
        endpoints = collector.series("lb_hop.endpoints")
    assert len({(s.attributes["server.address"], s.attributes["server.port"]) for s in endpoints}) == VIPS * PORTS
    assert len(endpoints) == 3 * VIPS * PORTS
