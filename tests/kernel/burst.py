"""Handshakes that nobody sent, by the ten thousand: the programs run on patched packets, nothing is looked at."""

from __future__ import annotations

import socket
import struct
from typing import TYPE_CHECKING

from otel_lb_hop.core.topology import Topology
from otel_lb_hop.kernel import bpf
from otel_lb_hop.kernel.ring import Ring
from otel_lb_hop.kernel.tables import KernelTables
from otel_lb_hop.model import Backend, Cluster, Policy, Transport, VipPort, pack_address

if TYPE_CHECKING:
    from otel_lb_hop.core.layout import Settings
    from otel_lb_hop.kernel.loader import Loaded

PORTS = 64_000


class Burst:
    """Loaded programs that know one VIP port, and their ring."""

    def __init__(self, loaded: Loaded, settings: Settings) -> None:
        self.loaded = loaded
        self.tables = KernelTables(loaded)
        self.tables.set_settings(settings)
        backend = Backend(pack_address("10.100.2.2"), 8080, "node2", "zone-b", pod_namespace="default", pod="web-2")
        vip_port = VipPort(pack_address("10.0.10.9"), 80, Transport.TCP, "default", "web", Policy.CLUSTER, (backend,))
        self.topology = Topology("node1")
        self.topology.replace(Cluster((vip_port,)), 1)
        self.tables.apply(self.topology)
        self.ring = Ring(loaded.records_fd)
        self._made = 0
        self._syn = packet(("198.51.100.7", 0), ("10.0.10.9", 80), 0x02)
        self._translated = packet(("172.18.0.1", 0), ("10.100.2.2", 8080), 0x02)
        self._answer = packet(("10.0.10.9", 80), ("198.51.100.7", 0), 0x12)

    def answer(self, count: int) -> None:
        """Let so many connections come in, be translated and be answered, each with a port and an ISN of its own."""
        run, put = bpf.run_program, struct.pack_into
        ingress, egress = self.loaded.programs["lbh_ingress"], self.loaded.programs["lbh_egress"]
        syn, translated, answer = self._syn, self._translated, self._answer
        for number in range(self._made, self._made + count):
            port, isn = 1_024 + number % PORTS, number * 2_654_435_761 & 0xFFFFFFFF
            put("!HHI", syn, 34, port, 80, isn)
            put("!HHI", translated, 34, port, 8080, isn)
            put("!HII", answer, 36, port, 0, isn + 1 & 0xFFFFFFFF)
            run(ingress, bytes(syn))
            run(egress, bytes(translated))
            run(egress, bytes(answer))
        self._made += count


def packet(
    source: tuple[str, int], destination: tuple[str, int], flags: int, sequence: int = 0, ack: int = 0
) -> bytearray:
    """Make an Ethernet frame with a TCP segment without content, from and to (IPv4 address, port)."""
    addresses = socket.inet_aton(source[0]) + socket.inet_aton(destination[0])
    ip = struct.pack("!BBHHHBBH", 0x45, 0, 40, 0, 0, 64, 6, 0) + addresses
    tcp = struct.pack("!HHIIBBHHH", source[1], destination[1], sequence, ack, 0x50, flags, 1, 0, 0)
    return bytearray(bytes(12) + b"\x08\x00" + ip + tcp)
