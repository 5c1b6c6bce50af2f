"""Values that several tests share: small clusters, a kernel record, rows of counters; each with one thing to change."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from otel_lb_hop.core.layout import BUCKETS, KIND, Histogram, HopStats, Kind, Record, Unforwarded, Verdict, VipStats
from otel_lb_hop.model import Backend, Cluster, Node, Policy, Transport, VipPort, pack_address

NODE = "node1"
SECOND = 10**9
NO_HISTOGRAM = Histogram.of(0, (0,) * BUCKETS)
CLIENT, VIP, SNAT, POD = (pack_address(text) for text in ("192.0.2.7", "10.0.10.0", "172.18.0.3", "10.100.2.2"))


def backend(address: str, node: str | None = NODE, zone: str | None = None, **more: Any) -> Backend:  # noqa: ANN401
    """Make a backend on port 8080 that is ready."""
    return Backend(pack_address(address), more.pop("port", 8080), node, zone, **more)


def vip_port(*backends: Backend, address: str = "10.0.10.0", port: int = 80, **more: Any) -> VipPort:  # noqa: ANN401
    """Make a VIP port of default/web over TCP."""
    namespace, service = more.pop("name", "default/web").split("/")
    transport = more.pop("transport", Transport.TCP)
    policy = more.pop("policy", Policy.CLUSTER)
    return VipPort(pack_address(address), port, transport, namespace, service, policy, backends, **more)


def cluster(*vip_ports: VipPort, **zones: str) -> Cluster:
    """Make a cluster of these VIP ports, with nodes in zones."""
    return Cluster(vip_ports, tuple(Node(name, zone) for name, zone in zones.items()))


LOCAL = backend("10.100.1.2", NODE, pod_namespace="default", pod="web-1")
REMOTE = backend("10.100.2.2", "node2", "zone-b", pod_namespace="default", pod="web-2")


def record(verdict: Verdict = Verdict.ANSWERED, **changes: Any) -> Record:  # noqa: ANN401
    """Make a record of an external connection to VIP 1 that went to a pod by hop row 3 in 2 ms.

    Changes are fields of `Record` or of `Kind`.
    """
    values: dict[str, Any] = {
        "syn_ns": 5 * SECOND,
        "forward_ns": 5 * SECOND + 30_000,
        "end_ns": 5 * SECOND + 2_000_000,
        "trace_id": bytes.fromhex("0123456789abcdeffedcba9876543210"),
        "client": CLIENT,
        "snat": SNAT,
        "client_port": 40000,
        "snat_port": 24048,
        "backend": POD,
        "backend_port": (8080).to_bytes(2, "big"),
        "verdict": int(verdict),
        "origin": 1,
        "vip_id": 1,
        "hop_id": 3,
        "in_ifindex": 2,
        "retransmits": 0,
        "translated": 1,
    }
    if verdict >= Verdict.DROPPED:
        values |= {"forward_ns": 0, "snat": bytes(16), "snat_port": 0, "backend": bytes(16), "backend_port": bytes(2)}
        values |= {"hop_id": 1, "translated": 0}
    values |= changes
    kind = Kind(**{name: values.pop(name) for name in Kind._fields})
    return Record(**values, kind=KIND.pack(*kind))


def histogram(sum_ns: int, **buckets: int) -> Histogram:
    """Make a histogram; buckets are named b0 to b21, the others are empty."""
    return Histogram.of(sum_ns, (buckets.get(f"b{index}", 0) for index in range(BUCKETS)))


def vip_stats(internal: tuple[int, ...] = (), external: tuple[int, ...] = (), retransmits: int = 0) -> VipStats:
    """Make the counters of a VIP port: connections that were not forwarded, by reason."""
    rows = [tuple(counts) + (0,) * (len(Unforwarded) - len(counts)) for counts in (internal, external)]
    return VipStats((sum(rows[0]), sum(rows[1])), (rows[0], rows[1]), retransmits)


def hop_stats(internal: int = 0, external: int = 0, **more: Any) -> HopStats:  # noqa: ANN401
    """Make the counters of a hop row."""
    names = ("answered", "refused", "timeout", "reply_unseen", "evicted", "translated")
    counts = {name: more.get(name, 0) for name in names}
    times = {name: more.get(name, NO_HISTOGRAM) for name in ("forward", "handshake")}
    return HopStats((internal, external), **counts, **times)


_ADDRESSES = st.sampled_from(["10.0.10.0", "fd00:10::1"])
BACKENDS = st.builds(
    backend,
    st.sampled_from(["10.100.1.2", "10.100.2.2", "10.100.3.2"]),
    st.sampled_from([NODE, "node2", "node3", None]),
    st.sampled_from([None, "zone-a", "zone-b"]),
    ready=st.booleans(),
    serving=st.booleans(),
)
VIP_PORTS = st.builds(
    lambda backends, **fields: vip_port(*backends, **fields),
    st.lists(BACKENDS, max_size=4),
    address=_ADDRESSES,
    port=st.sampled_from([80, 443]),
    name=st.sampled_from(["a/x", "b/x"]),
    policy=st.sampled_from(Policy),
    transport=st.sampled_from([Transport.TCP, Transport.TCP, Transport.UDP]),
    endpoints_known=st.booleans(),
)
NODES = st.lists(st.builds(Node, st.sampled_from([NODE, "node2"]), st.sampled_from([None, "", "zone-a", "zone-b"])))
CLUSTERS = st.builds(Cluster, st.lists(VIP_PORTS, max_size=5).map(tuple), NODES.map(tuple))
"""Clusters on few addresses, so that VIP ports collide and nodes, zones and readiness contradict each other."""
