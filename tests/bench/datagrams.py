"""What UDP VIP ports cost: program time for each flow, and what conntrack's messages cost each flow of the node."""

from __future__ import annotations

import os
import statistics
import time
from contextlib import closing
from typing import TYPE_CHECKING

from otel_lb_hop.core.layout import Settings
from otel_lb_hop.core.topology import Topology
from otel_lb_hop.kernel import loader
from otel_lb_hop.kernel.conntrack import ConntrackSocket
from otel_lb_hop.kernel.hooks import Hooks
from otel_lb_hop.kernel.netlink import Netlink
from otel_lb_hop.kernel.tables import KernelTables
from otel_lb_hop.model import Cluster, Transport
from tests.bench.measure import Row, bpf_stats, run_time
from tests.kernel.crossing import CLIENT4, POD4, TARGET, TRANSLATED, VIP4, Crossing
from tests.kernel.packets import End
from tests.kernel.rig import vip_port

if TYPE_CHECKING:
    from collections.abc import Iterator

FLOWS = range(10_000, 16_000)
TURNS = 9
WITHOUT_ENDPOINTS, NO_VIP_PORT = 57, 99


def datagram_costs() -> Iterator[Row]:
    """Measure real flows from a client through a node's NAT to a pod."""
    loaded = loader.load()
    tables, topology = KernelTables(loaded), Topology("node1")
    tables.set_settings(Settings(5 * 10**9, 0, 1, 1 << 62))
    vip_ports = (
        vip_port(End.of(VIP4, TRANSLATED), (End.of(POD4, TARGET), "node1"), transport=Transport.UDP),
        vip_port(End.of(VIP4, WITHOUT_ENDPOINTS), transport=Transport.UDP),
    )
    topology.replace(Cluster(vip_ports), 1)
    tables.apply(topology)
    program = loaded.programs["lbh_conntrack"]
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    with closing(Crossing()) as crossing:
        flows = _Flows(crossing)
        with closing(flows.heard(program)), bpf_stats():
            for what, port in (("to a VIP port", TRANSLATED), ("of others", NO_VIP_PORT)):
                yield Row(f"lbh_conntrack, a UDP flow {what}", flows.program_ns(program, port), "ns")
        with crossing.entered(), closing(Netlink()) as netlink, closing(Hooks(loaded.programs, netlink)) as hooks:
            hooks.reconcile(netlink.links(), datagrams=True)
            program = loaded.programs["lbh_datagram"]
            with bpf_stats():
                for what, port in (
                    ("the first of a flow", WITHOUT_ENDPOINTS),
                    ("the next", WITHOUT_ENDPOINTS),
                    ("of others", NO_VIP_PORT),
                ):
                    yield Row(f"lbh_datagram, a datagram, {what}", flows.program_ns(program, port), "ns")
        with_it, without = [], []
        for _ in range(TURNS):
            without.append(flows.send(TRANSLATED))
            with closing(flows.heard(loaded.programs["lbh_conntrack"])):
                with_it.append(flows.send(TRANSLATED))
    ratio = statistics.median(a / b for a, b in zip(without, with_it, strict=True))
    yield Row("rate of UDP flows with conntrack heard / without", ratio)


class _Flows:
    """Sends the same flows over and over."""

    def __init__(self, crossing: Crossing) -> None:
        self._crossing = crossing
        self.send(TRANSLATED)

    def heard(self, program: int) -> ConntrackSocket:
        with self._crossing.entered():
            return ConntrackSocket(program)

    def send(self, port: int) -> float:
        self._crossing.forget()
        started = time.perf_counter()
        self._crossing.datagrams(self._crossing.client, CLIENT4, FLOWS, End.of(VIP4, port))
        return time.perf_counter() - started

    def program_ns(self, program: int, port: int) -> float:
        before = run_time(program)
        self.send(port)
        after = run_time(program)
        return (after.ns - before.ns) / (after.runs - before.runs)


if __name__ == "__main__":
    for each in datagram_costs():
        print(f"{each.what}: {each.figure:.2f} {each.unit}")
