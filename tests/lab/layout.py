"""The plan of a laboratory: every name, address, link and route, as text for `ip -batch`. Pure.

    client --- router ===(ECMP)=== node1 .. nodeN      net0: uplinks, 172.19.i.0/24
                                    |  |  |
                     pods on vpodK _|  |  |_ mgmt      172.30.0.0/24, a Collector's place, no routes through it
                      10.100.i.0/24    |
                                       fabric          eth0: 172.18.0.0/24, node to node

Addresses repeat from lab to lab: nothing of a lab is visible outside its own namespaces.
"""

from __future__ import annotations

from dataclasses import dataclass
from string import ascii_lowercase

MAX_NODES = 200
MAX_PODS = 200
REGION = "lab"
# Older kernels have these for the whole machine only, not in a namespace: there a lab refuses 1000 a second at most.
SYSCTLS_OF_SOME_KERNELS = {"net.ipv4.icmp_msgs_per_sec": "1000000", "net.ipv4.icmp_msgs_burst": "1000000"}
FIVE_TUPLE = str(0x01 | 0x02 | 0x04 | 0x10 | 0x20)  # addresses, protocol, ports


@dataclass(frozen=True, slots=True)
class Plan:
    """Which lab this is and how large; answers every name and every command that builds it."""

    name: str
    nodes: int
    pods_per_node: int

    def netns(self, host: str) -> str:
        """Name of the namespace of one host of this lab."""
        return f"lbh-{self.name}-{host}"

    @property
    def node_numbers(self) -> range:
        """Nodes count from 1, as their names do."""
        return range(1, self.nodes + 1)

    @property
    def pod_numbers(self) -> range:
        """Pods of each node count from 1."""
        return range(1, self.pods_per_node + 1)

    @property
    def hosts(self) -> list[str]:
        """Every host that has a namespace."""
        nodes = [f"node{node}" for node in self.node_numbers]
        pods = [pod_name(node, pod) for node in self.node_numbers for pod in self.pod_numbers]
        return ["client", "router", "fabric", "mgmt", *nodes, *pods]


def zone_name(node: int) -> str:
    """Name a zone of its own for every node: zone-a, zone-b, ... zone-z, zone-aa, ..."""
    lead, last = divmod(node - 1, 26)
    return f"zone-{ascii_lowercase[lead - 1] if lead else ''}{ascii_lowercase[last]}"


def pod_name(node: int, pod: int) -> str:
    """Name of a pod's host, unique in the lab."""
    return f"node{node}-pod{pod}"


def pod_addresses(node: int, pod: int) -> tuple[str, str]:
    """IPv4 and IPv6 of a pod; number 1 of each network is the node's side of all its vpodK."""
    return f"10.100.{node}.{pod + 1}", f"fd00:100:{node:x}::{pod + 1:x}"


def fabric_addresses(node: int) -> tuple[str, str]:
    """IPv4 and IPv6 of a node's eth0: what Kubernetes would call its InternalIP."""
    return f"172.18.0.{node + 1}", f"fd00:18::{node + 1:x}"


def uplink_addresses(node: int) -> tuple[str, str]:
    """IPv4 and IPv6 of a node's net0: the next hop of a VIP."""
    return f"172.19.{node}.2", f"fd00:19:{node:x}::2"


def mgmt_addresses(node: int) -> tuple[str, str]:
    """IPv4 and IPv6 of a node's `mgmt` interface; node 0 is the mgmt host itself."""
    return f"172.30.0.{node + 1}", f"fd00:30::{node + 1:x}"


CLIENT_ADDRESSES = ("192.168.0.2", "fd00:192::2")
ROUTER_ADDRESSES = ("192.168.0.1", "fd00:192::1")


def link_commands(plan: Plan) -> list[str]:
    """Create every veth pair with both ends already in their namespaces."""
    pairs = [("router", "client", "client", "net0")]
    for node in plan.node_numbers:
        pairs += [
            ("router", f"net{node}", f"node{node}", "net0"),
            ("fabric", f"node{node}", f"node{node}", "eth0"),
            ("mgmt", f"node{node}", f"node{node}", "mgmt"),
        ]
        pairs += [(f"node{node}", f"vpod{pod}", pod_name(node, pod), "eth0") for pod in plan.pod_numbers]
    return [
        f"link add {port} netns {plan.netns(host)} type veth peer name {peer_port} netns {plan.netns(peer)}"
        for host, port, peer, peer_port in pairs
    ]


def host_commands(plan: Plan) -> dict[str, list[str]]:
    """Addresses and routes of every host, to be run inside its namespace."""
    commands = {
        "client": [*_port("net0", CLIENT_ADDRESSES), *_route("default", ROUTER_ADDRESSES)],
        "router": [*_port("client", ROUTER_ADDRESSES), *(line for n in plan.node_numbers for line in _toward_node(n))],
        "fabric": _bridge(plan),
        "mgmt": [*_bridge(plan), *_port("br0", mgmt_addresses(0))],
    }
    for node in plan.node_numbers:
        commands[f"node{node}"] = _node(plan, node)
        for pod in plan.pod_numbers:
            gateway = pod_addresses(node, 0)
            commands[pod_name(node, pod)] = [
                *_port("eth0", pod_addresses(node, pod), prefixes=(32, 128)),
                *(line for address in gateway for line in [f"route add {address} dev eth0"]),
                *_route("default", gateway),
            ]
    return {host: ["link set lo up", *lines] for host, lines in commands.items()}


def _toward_node(node: int) -> list[str]:
    gateway = uplink_addresses(node)
    return [
        *_port(f"net{node}", (f"172.19.{node}.1", f"fd00:19:{node:x}::1")),
        *_route((f"10.100.{node}.0/24", f"fd00:100:{node:x}::/64"), gateway),
    ]


def _node(plan: Plan, node: int) -> list[str]:
    lines = [
        *_port("net0", uplink_addresses(node)),
        *_route("default", (f"172.19.{node}.1", f"fd00:19:{node:x}::1")),
        *_port("eth0", fabric_addresses(node)),
        *_port("mgmt", mgmt_addresses(node)),
    ]
    for pod in plan.pod_numbers:
        lines += _port(f"vpod{pod}", pod_addresses(node, 0), prefixes=(32, 128))
        lines += [f"route add {address} dev vpod{pod}" for address in pod_addresses(node, pod)]
    for other in plan.node_numbers:
        if other != node:
            lines += _route((f"10.100.{other}.0/24", f"fd00:100:{other:x}::/64"), fabric_addresses(other))
    return lines


def _bridge(plan: Plan) -> list[str]:
    lines = ["link add br0 type bridge stp_state 0 forward_delay 0 mcast_snooping 0", "link set br0 up"]
    for node in plan.node_numbers:
        lines += [f"link set node{node} master br0", f"link set node{node} up"]
    return lines


def _port(port: str, addresses: tuple[str, str], prefixes: tuple[int, int] = (24, 64)) -> list[str]:
    return [
        f"link set {port} up",
        f"addr add {addresses[0]}/{prefixes[0]} dev {port}",
        f"addr add {addresses[1]}/{prefixes[1]} dev {port} nodad",
    ]


def _route(destination: str | tuple[str, str], gateways: tuple[str, str]) -> list[str]:
    destination4, destination6 = (destination, destination) if isinstance(destination, str) else destination
    return [f"route add {destination4} via {gateways[0]}", f"route add {destination6} via {gateways[1]}"]


def sysctls(host: str) -> dict[str, str]:
    """Say which settings a host needs before it has links: a new link takes over `default`."""
    values = {
        "net.ipv4.conf.all.rp_filter": "0",
        "net.ipv4.conf.default.rp_filter": "0",
        "net.ipv6.conf.all.disable_ipv6": "0",
        "net.ipv6.conf.default.disable_ipv6": "0",
        "net.ipv6.conf.all.accept_dad": "0",
        "net.ipv6.conf.default.accept_dad": "0",
        "net.ipv6.conf.default.accept_ra": "0",
        "net.core.somaxconn": "65535",
        "net.ipv4.tcp_max_syn_backlog": "65535",
        # Every refused connection is told so, not only the first six of a second.
        "net.ipv4.icmp_ratelimit": "0",
        "net.ipv6.icmp.ratelimit": "0",
    }
    if host != "mgmt":
        # All ports but the privileged ones: fast traffic would use up the default range within seconds. Not where the
        # servers are: an API server's connection to etcd would take a Collector's port.
        values["net.ipv4.ip_local_port_range"] = "1024 65535"
    if host == "router" or host.startswith("node"):
        values |= {
            "net.ipv4.ip_forward": "1",
            "net.ipv6.conf.all.forwarding": "1",
            # Policy 1 would take the hash that the client's socket left on the packet, which changes when a SYN is sent
            # again; a router behind a wire sees the 5-tuple only. Policy 3 with all five fields is that.
            "net.ipv4.fib_multipath_hash_policy": "3",
            "net.ipv4.fib_multipath_hash_fields": FIVE_TUPLE,
            "net.ipv6.fib_multipath_hash_policy": "3",
            "net.ipv6.fib_multipath_hash_fields": FIVE_TUPLE,
        }
    return values
