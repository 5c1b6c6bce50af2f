"""What a SYN flood costs: user CPU of an agent that sends everything, and program time for each forged SYN.

The flood is ignored by the backend, so that the handshake table is full of open handshakes: the worst for both.
"""

from __future__ import annotations

import struct
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from otel_lb_hop.kernel import bpf
from otel_lb_hop.model import Policy
from tests.bench import measure
from tests.bench.measure import Row, bpf_stats, cpu_seconds, user_seconds
from tests.bench.records import sink
from tests.bench.traffic import AGENT_CPU, PORT, TRAFFIC_CPU, VIP
from tests.e2e.firewall import deafen
from tests.lab import Lab
from tests.lab.agent import Agent
from tests.lab.hostile import SPOOFED, Hostile, flood, from_outside, swallow_answers

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.lab.hostile import Wire

SECONDS = 12
CALM, SLOW, FAST = 1_000, 10_000, 40_000
"""SYNs a second: as many as get a record by default, and floods."""
VERDICT_SECONDS = 8


class Used(NamedTuple):
    """What was used while SYNs came in: CPU of the agent in percent of a core, program time for each SYN."""

    user: float
    every: float
    ingress_ns: float
    egress_ns: float
    rate: float


def hostile_costs() -> Iterator[Row]:
    """Compare a quiet node, one with as many SYNs as get a record, and floods."""
    with tempfile.TemporaryDirectory() as name, Lab(nodes=1) as lab:
        (node,) = lab.nodes
        hostile = Hostile(Path(name), ["taskset", "-c", TRAFFIC_CPU])
        vip_port = lab.vip_port(VIP, PORT, service="bench", policy=Policy.LOCAL, backends=lab.pods, target_port=8080)
        lab.apply([vip_port])
        swallow_answers(lab)
        # Conntrack holds 262,144 entries by default, and would drop what is over.
        node.sysctl("net.netfilter.nf_conntrack_tcp_timeout_syn_sent", 1)
        deafen(lab.pods[0], f"ip saddr {SPOOFED[4]}")
        wire = from_outside(lab)
        with sink(lab.mgmt) as settings:
            prefix = ["taskset", "-c", AGENT_CPU]
            with Agent(node, lab.vips_path, settings, prefix=prefix) as agent, bpf_stats():
                used = {rate: _used(agent, hostile, wire, rate) for rate in (0, CALM, SLOW, FAST)}
    yield Row("user CPU, records and metrics sent, no traffic", used[0].user, "% of a core")
    yield Row(f"  {CALM:,} SYNs/s, the record rate", used[CALM].user, "% of a core")
    for rate in (SLOW, FAST):
        flat = used[rate].user <= 1.5 * used[CALM].user + 0.5
        yield Row(f"  SYN flood of {used[rate].rate:,.0f}/s", used[rate].user, "% of a core", "flat", flat)
        yield Row("    with the system's part", used[rate].every, "% of a core")
    yield Row("lbh_ingress, a forged SYN, handshake table full", used[FAST].ingress_ns, "ns")
    yield Row("  with room in the table", used[CALM].ingress_ns, "ns")
    yield Row("lbh_egress, a forged SYN, handshake table full", used[FAST].egress_ns, "ns")


def _used(agent: Agent, hostile: Hostile, wire: Wire, rate: int) -> Used:
    """Send at a rate and see what that takes; other packets of the hooks are few beside it."""
    pid = agent.process.pid
    time.sleep(VERDICT_SECONDS)  # for what was sent before
    user, every, before = user_seconds(pid), cpu_seconds(pid), _run_times(agent)
    started = time.monotonic()
    sent = 0
    if rate:
        sent = hostile.send(wire, flood(VIP, PORT), SECONDS * rate, rate).packets
    else:
        time.sleep(SECONDS)
    seconds = time.monotonic() - started
    user, every, after = user_seconds(pid) - user, cpu_seconds(pid) - every, _run_times(agent)
    ingress, egress = (
        (after[name].ns - before[name].ns) / max(1, after[name].runs - before[name].runs)
        for name in ("lbh_ingress", "lbh_egress")
    )
    return Used(user / seconds * 100, every / seconds * 100, ingress, egress, sent / seconds)


def _run_times(agent: Agent) -> dict[str, measure.RunTime]:
    """Read the run times of this agent's programs alone, by name."""
    return dict(measure._info(bpf._bpf(measure._PROG_GET_FD_BY_ID, struct.pack("=I", each))) for each in agent.programs)


if __name__ == "__main__":
    for each in hostile_costs():
        print(f"{each.what}: {each.figure:.3g} {each.unit} {each.aim} {'' if each.good else 'MISSED'}")
