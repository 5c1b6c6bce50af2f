"""A place for an agent on each node: one after another sits there, pins in one place, and logs to its own file."""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING

from otel_lb_hop.core.layout import VIP_KEY, VIP_VALUE, pack_port
from otel_lb_hop.kernel.bpf import Map, open_pinned
from tests.lab.agent import Agent
from tests.lab.waiting import wait_for

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    from otel_lb_hop.model import VipPort
    from tests.lab import Node

PATIENCE_SECONDS = 60.0
_BAD = re.compile(r"^.*(?: (?:ERROR|CRITICAL) |Traceback).*$", re.MULTILINE)


class Seat:
    """One node's place for an agent."""

    def __init__(self, node: Node, vips: Path, settings: Mapping[str, str], pins: Path) -> None:
        self.node = node
        self._vips = vips
        self._pins = pins
        self._settings = {**settings, "OTEL_LB_HOP_PIN_PATH": str(pins)}
        self._agents: list[Agent] = []
        self.ready: Agent | None = None
        """The agent that counts and answers; None while there is none."""

    def begin(self) -> None:
        """Let a new one sit down; it is not waited for."""
        self._agents.append(Agent(self.node, self._vips, self._settings, name=f"agent{len(self._agents)}", pinned=True))

    def wait(self) -> Agent:
        """Wait until the newest is ready."""
        self.ready = self._agents[-1].wait_ready()
        return self.ready

    def kill(self) -> None:
        """SIGKILL to the one that sits there, if there is one."""
        self.ready = None
        for agent in self._agents[-1:]:
            agent.kill()

    def stop(self) -> str:
        """End it by SIGTERM; answers what is wrong with its end, the ledger included."""
        agent, self.ready = self.ready, None
        if agent is None:
            return "nobody was there"
        try:
            agent.stop()
        except AssertionError as error:
            return str(error)
        return ""

    def terminate(self) -> None:
        """Send SIGTERM."""
        if self.ready:
            self.ready.terminate()

    @property
    def sittings(self) -> int:
        """How many there were."""
        return len(self._agents)

    def complaints(self) -> list[str]:
        """Return the lines of all logs that tell of an error."""
        return [line for agent in self._agents for line in _BAD.findall(agent.stderr)]

    def exported(self, signal: str) -> int:
        """Tell how many items of a signal the last one says it has exported, once it has ended."""
        accounts = self._agents[-1].accounts()
        return next((each.exported for name, each in accounts.items() if name.startswith(f"transport of {signal}")), 0)

    def wait_for_vip_ports(self, vip_ports: Iterable[VipPort]) -> None:
        """Wait until the programs look for these VIP ports: what comes to them from now on is counted."""
        keys = [VIP_KEY.pack(each.address, pack_port(each.port), each.transport) for each in vip_ports]
        wait_for(f"VIP ports in the tables of {self.node.name}", lambda: all(map(self._has, keys)), PATIENCE_SECONDS)

    def wait_for_conntrack(self, detail: str) -> None:
        """Wait until the agent says this of conntrack: `heard`, `not needed`."""
        agent = self.ready
        assert agent is not None
        wait_for(f"conntrack {detail}", lambda: agent.part("conntrack").get("detail") == detail, PATIENCE_SECONDS)

    @property
    def pinned(self) -> int:
        """How many maps, programs and links are pinned."""
        return sum(len(files) for _, _, files in os.walk(self._pins))

    def _has(self, key: bytes) -> bool:
        for path in self._pins.glob("*/vip_ports"):
            table = Map(open_pinned(path), VIP_KEY.size, VIP_VALUE.size)
            try:
                return table.get(key) is not None
            finally:
                os.close(table.fd)
        return False
