"""A client, a node and a pod in network namespaces of their own: real flows through the node's real NAT.

The node has a VIP in no interface, by which traffic comes from the client, and rules that translate it to the pod as
kube-proxy does: destination and, for what comes from outside, source.
"""

from __future__ import annotations

import os
import socket
import struct
import subprocess
from contextlib import contextmanager
from typing import TYPE_CHECKING

from tests.kernel.packets import End
from tests.kernel.rig import entered
from tests.lab.netns import NETNS_DIRECTORY, in_netns, write_sysctls

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

VIP4, VIP6 = "10.23.0.1", "fd23::1"
NODE4, NODE6 = "10.21.0.1", "fd21::1"
CLIENT4, CLIENT6 = "10.21.0.2", "fd21::2"
POD4, POD6 = "10.22.0.2", "fd22::2"
TRANSLATED, UNTRANSLATED, TARGET = 53, 55, 5353
"""Ports of the VIP with and without a rule, and the pod's."""

RULES = """
table inet nat {
  chain translate {
    ip daddr 10.23.0.1 meta l4proto { tcp, udp, sctp } th dport 53 dnat ip to 10.22.0.2:5353
    ip6 daddr fd23::1 meta l4proto { tcp, udp, sctp } th dport 53 dnat ip6 to [fd22::2]:5353
  }
  chain prerouting { type nat hook prerouting priority dstnat; jump translate; }
  chain output { type nat hook output priority -100; jump translate; }
  chain postrouting { type nat hook postrouting priority srcnat; oifname "to_pod" iifname "uplink" masquerade; }
}
table inet filter {
  chain forward {
    type filter hook forward priority filter;
    ct state new ip daddr 10.23.0.1 th dport 57 reject
    ct state new ip6 daddr fd23::1 th dport 57 reject
  }
}
"""
_ADDRESSES = {
    "client": ("uplink0", "02:00:00:00:21:02", [f"{CLIENT4}/24", f"{CLIENT6}/64"], [NODE4, NODE6]),
    "pod": ("eth0", "02:00:00:00:22:02", [f"{POD4}/24", f"{POD6}/64"], ["10.22.0.1", "fd22::1"]),
}


class Crossing:
    """The three namespaces, wired and with rules."""

    def __init__(self) -> None:
        self.client, self.node, self.pod = (f"lbhk{os.getpid()}-{name}" for name in ("client", "node", "pod"))
        try:
            self._build()
        except BaseException:
            self.close()
            raise

    def _build(self) -> None:
        for name in (self.client, self.node, self.pod):
            _run("ip", "netns", "add", name)
        off = {"net.ipv6.conf.default.accept_dad": "0", "net.ipv4.ip_local_port_range": "1024\t2000"}
        for name in (self.client, self.node, self.pod):
            write_sysctls(name, off)
        _ip(
            self.node,
            f"link add uplink address 02:00:00:00:21:01 type veth peer name uplink0 netns {self.client}",
            f"link add to_pod address 02:00:00:00:22:01 type veth peer name eth0 netns {self.pod}",
            "link set lo up",
            "link set uplink up",
            "link set to_pod up",
            f"addr add {NODE4}/24 dev uplink",
            f"addr add {NODE6}/64 dev uplink",
            "addr add 10.22.0.1/24 dev to_pod",
            "addr add fd22::1/64 dev to_pod",
            f"route add default via {CLIENT4}",
            f"route add default via {CLIENT6}",
            *(f"neigh replace {each} lladdr 02:00:00:00:21:02 dev uplink" for each in (CLIENT4, CLIENT6)),
            *(f"neigh replace {each} lladdr 02:00:00:00:22:02 dev to_pod" for each in (POD4, POD6)),
        )
        for name, (device, mac, addresses, gateways) in _ADDRESSES.items():
            _ip(
                self.client if name == "client" else self.pod,
                f"link set {device} address {mac} up",
                "link set lo up",
                *(f"addr add {each} dev {device}" for each in addresses),
                *(f"neigh replace {each} lladdr {mac[:-1]}1 dev {device}" for each in gateways),
                *(f"route add default via {each}" for each in gateways),
            )
        sysctls = {"net.ipv4.ip_forward": "1", "net.ipv6.conf.all.forwarding": "1"}
        write_sysctls(self.node, sysctls)
        _run("ip", "netns", "exec", self.node, "nft", "-f", "-", said=RULES)

    def close(self) -> None:
        """Take the namespaces away."""
        for name in (self.client, self.node, self.pod):
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Put the calling thread into the node for the length of a block."""
        fd = os.open(NETNS_DIRECTORY / self.node, os.O_RDONLY | os.O_CLOEXEC)
        try:
            with entered(fd):
                yield
        finally:
            os.close(fd)

    def forget(self) -> None:
        """Empty the node's conntrack table, so that tuples may be used again."""
        self.conntrack("-F")

    def conntrack(self, *words: str) -> None:
        """Change the node's conntrack table."""
        _run("ip", "netns", "exec", self.node, "conntrack", *words)

    def datagrams(self, netns: str, source: str, ports: Iterable[int], end: End, packets: int = 1) -> None:
        """Send UDP from these ports of an address in a namespace."""
        family = socket.AF_INET6 if ":" in source else socket.AF_INET
        target = (_text(end), end.port)

        def send() -> None:
            for port in ports:
                with socket.socket(family, socket.SOCK_DGRAM) as channel:
                    channel.bind((source, port))
                    for _ in range(packets):
                        channel.sendto(b"?", target)

        in_netns(netns, send)

    def init(self, source: str, port: int, end: End) -> None:
        """Send an SCTP INIT from the client; the kernel here has no SCTP sockets."""
        family = socket.AF_INET6 if ":" in source else socket.AF_INET
        packet = sctp_init(port, end.port)

        def send() -> None:
            with socket.socket(family, socket.SOCK_RAW, 132) as channel:
                channel.bind((source, 0))
                channel.sendto(packet, (_text(end), 0))

        in_netns(self.client, send)

    def ping(self, address: str) -> None:
        """Send an echo request from the client."""
        family, protocol, kind = (socket.AF_INET6, 58, 128) if ":" in address else (socket.AF_INET, 1, 8)
        request = struct.pack("!BBHHH", kind, 0, 0xFFFF - (kind << 8) - 1, 0, 1)

        def send() -> None:
            with socket.socket(family, socket.SOCK_RAW, protocol) as channel:
                channel.sendto(request, (address, 0))

        in_netns(self.client, send)

    def connect(self, netns: str, end: End) -> None:
        """Let a TCP SYN leave a namespace; nobody waits for the answer."""
        family = socket.AF_INET if end.address[:12] == End.of("0.0.0.0", 0).address[:12] else socket.AF_INET6

        def begin() -> None:
            with socket.socket(family, socket.SOCK_STREAM) as channel:
                channel.setblocking(False)  # noqa: FBT003
                channel.connect_ex((_text(end), end.port))

        in_netns(netns, begin)


def _text(end: End) -> str:
    if end.address[:12] == End.of("0.0.0.0", 0).address[:12]:
        return socket.inet_ntop(socket.AF_INET, end.address[12:])
    return socket.inet_ntop(socket.AF_INET6, end.address)


def sctp_init(source_port: int, destination_port: int, chunk: int = 1) -> bytes:
    """Build an SCTP packet with one chunk, an INIT if not told otherwise (RFC 9260, 3.3.2)."""
    body = struct.pack("!BBHIIHHI", chunk, 0, 20, 4711, 65_536, 1, 1, 1)
    ports = struct.pack("!HHI", source_port, destination_port, 0)
    return ports + _crc32c(ports + bytes(4) + body).to_bytes(4, "little") + body


def _crc32c(data: bytes) -> int:
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ 0x82F63B78 * (crc & 1)
    return crc ^ 0xFFFFFFFF


def _ip(netns: str, *commands: str) -> None:
    for family in ("-4", "-6"):
        chosen = [each for each in commands if (" fd2" in each) == (family == "-6")]
        _run("ip", family, "-netns", netns, "-batch", "-", said="\n".join(chosen) + "\n")


def _run(*words: str, said: str = "") -> None:
    subprocess.run(words, input=said, text=True, check=True, capture_output=True)
