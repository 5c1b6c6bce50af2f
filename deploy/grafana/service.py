"""One Service: balance over nodes, hops and their times, losses, and what policy Local would change."""

from __future__ import annotations

from typing import TYPE_CHECKING

from grafana_foundation_sdk.models.common import StackingMode

from deploy.grafana import parts
from deploy.grafana.parts import About, Query
from deploy.grafana.promql import (
    CLUSTER,
    CONNECTIONS,
    ENDPOINTS,
    EXTERNAL,
    FAILURES,
    FORWARD,
    FORWARDED,
    HANDSHAKE,
    HOPPED,
    NODE,
    RETRANSMITS,
    UNFORWARDED,
    UNSEEN,
    avoidable_share,
    choices,
    crossed_share,
    hop_share,
    lost_share,
    or_zero,
    quantile,
    rate,
    select,
    share,
    taken_in,
    total,
)

if TYPE_CHECKING:
    from grafana_foundation_sdk.models.dashboard import Dashboard

CHOSEN = ('k8s_namespace_name="$namespace"', 'k8s_service_name="$service"', 'server_address=~"$vip"')
VIP_PORT = f"{NODE}, server_address, server_port, network_transport"
HERE = 'lb_hop_placement="local"'
_TAKEN = f"{taken_in(VIP_PORT, *CHOSEN)} > 0"
DARK = f"{_TAKEN} and {total(select(ENDPOINTS, *CHOSEN, HERE), VIP_PORT)} == 0"
"""What came in on nodes without an endpoint, by VIP port."""
OF_SERVICE = (
    f'{parts.RECORDS} | {CLUSTER} | k8s_service_name="$service"'
    f' | label_format k8s_service_namespace="{parts.SERVICE_NAMESPACE}" | k8s_service_namespace="$namespace"'
)
SOURCE = "{{ if contains `:` .source_address }}[{{ .source_address }}]{{ else }}{{ .source_address }}{{ end }}"
BEHIND = f'{OF_SERVICE} | label_format lb_hop_source="{SOURCE}:{{{{ .source_port }}}}" | lb_hop_source="$source"'
SLOW = (
    '{ resource.service.name = "otel-lb-hop" && span.k8s.namespace.name = "$namespace"'
    ' && span.k8s.service.name = "$service" && span.lb_hop.handshake.duration > 0.0 && duration > $slow }'
)

_TO_NODE = parts.node_link(parts.field("k8s_node_name"))
_NODE_CELL = {"k8s_node_name": parts.node_link(parts.cell("k8s_node_name"))}
_NO_CONNECTIONS = "No connection came in at this Service's VIPs in this time"
_NO_TIMES = (
    "Nothing was measured in this time: no TCP connection, or none was answered on its way back through the node"
)


def build() -> Dashboard:
    """Build the dashboard."""
    return parts.make(
        parts.SERVICE,
        "One Service: where its connections come in and go, which hops they take, how long, and which are lost.",
        [
            parts.choice(
                "namespace",
                "Namespace",
                choices(ENDPOINTS, "k8s_namespace_name"),
                "Namespace of the Service",
            ),
            parts.choice(
                "service",
                "Service",
                choices(ENDPOINTS, "k8s_service_name", *CHOSEN[:1]),
                "The Service",
            ),
            parts.choice(
                "vip",
                "VIP",
                choices(ENDPOINTS, "server_address", *CHOSEN[:2]),
                "Addresses of the Service; a dual-stack one has two",
                several=True,
            ),
            parts.entry(
                "source",
                "Client behind",
                "",
                "What the backend saw as its client, as in its access log: address:port or [address]:port",
            ),
            parts.entry("slow", "Slow from", "10ms", "Spans longer than this are listed, as 500us, 10ms or 1s"),
        ],
        {
            "In short": _in_short(),
            "Where it comes in": _balance(),
            "Hops": _hops(),
            "Times": _times(),
            "Loss": _loss(),
            "What externalTrafficPolicy: Local would change": _local(),
            "Single connections": _single(),
        },
    )


def _in_short() -> list[parts.AnyPanel]:
    return [
        parts.stat_panel(
            About(
                "Connections per second",
                "New connections from outside at the Service's VIPs, all nodes together.",
                _NO_CONNECTIONS,
            ),
            "si:conn/s",
            total(rate(CONNECTIONS, *CHOSEN, EXTERNAL)),
        ),
        parts.stat_panel(
            About(
                "Took an extra hop",
                "Share of the forwarded connections whose backend was on another node than the one they came in on.",
                _NO_CONNECTIONS,
            ),
            "percentunit",
            hop_share(*CHOSEN),
        ),
        parts.stat_panel(
            About(
                "Avoidable hops",
                "Share of the forwarded connections that took a hop although a ready backend was on the node they came"
                " in on.",
                _NO_CONNECTIONS,
            ),
            "percentunit",
            avoidable_share(*CHOSEN),
            alarm=(0.25, 0.5),
        ),
        parts.stat_panel(
            About(
                "Crossed a zone",
                "Share of the connections whose backend was in another zone than the node they came in on.",
                "No zones: the nodes have no label topology.kubernetes.io/zone, or nothing came in",
            ),
            "percentunit",
            crossed_share(*CHOSEN),
            alarm=(0.5, 0.8),
        ),
        parts.stat_panel(
            About(
                "Lost",
                "Share of the connections that were not forwarded, or whose handshake was refused or timed out.",
                _NO_CONNECTIONS,
            ),
            "percentunit",
            lost_share(*CHOSEN),
            alarm=(0.001, 0.01),
        ),
        parts.stat_panel(
            About(
                "Busiest node, times the even share",
                "What the busiest node took in, over the mean of the nodes that took in anything. 1 is an even balance;"
                " from 1.5 on look at the router's ECMP. A node that gets nothing at all is not in the mean: compare"
                " with the number of nodes that announce the VIP.",
                _NO_CONNECTIONS,
            ),
            "none",
            f"max({taken_in(NODE, *CHOSEN)}) / avg({taken_in(NODE, *CHOSEN)} > 0)",
            alarm=(1.5, 2),
        ),
    ]


def _balance() -> list[parts.AnyPanel]:
    return [
        parts.graph(
            About(
                "Taken in by each node",
                "New connections per second from outside, by the node they came in on. A line that falls to 0 while the"
                " others rise: the node was withdrawn.",
                _NO_CONNECTIONS,
            ),
            "si:conn/s",
            Query(total(rate(CONNECTIONS, *CHOSEN, EXTERNAL), NODE), "{{k8s_node_name}}"),
            stacking=StackingMode.NORMAL,
            links=[_TO_NODE],
        ),
        parts.listing(
            About(
                "Share of each node, by VIP",
                "Each node's share of a VIP's connections from outside in the time shown. A VIP with one row is taken"
                " in by one node alone.",
                _NO_CONNECTIONS,
            ),
            "percentunit",
            f"server_address, {NODE}",
            Query(
                f"{taken_in(f'server_address, {NODE}', *CHOSEN)} / on (server_address) group_left ()"
                f" ({taken_in('server_address', *CHOSEN)} > 0) > 0",
                "Share of the VIP",
            ),
            links=_NODE_CELL,
        ),
    ]


def _hops() -> list[parts.AnyPanel]:
    places = {"local": "On this node", "same_zone": "Elsewhere, same zone", "other_zone": "In another zone"}
    return [
        parts.graph(
            About(
                "Hop classes",
                "Forwarded connections from outside: none (backend on the same node), avoidable (a ready one was there,"
                " another was picked), required (none was there), unknown (the backend is not in the topology).",
                _NO_CONNECTIONS,
            ),
            "si:conn/s",
            Query(total(rate(CONNECTIONS, *CHOSEN, EXTERNAL, FORWARDED), "lb_hop_hop"), "{{lb_hop_hop}}"),
            stacking=StackingMode.PERCENT,
        ),
        parts.listing(
            About(
                "From node to node",
                "Forwarded connections from outside in the time shown: the node they came in on, the backend's node,"
                " the hop. An empty node is one that the agent does not know (hop unknown).",
                _NO_CONNECTIONS,
            ),
            "short",
            f"{NODE}, destination_k8s_node_name, lb_hop_hop",
            Query(
                f"{taken_in(f'{NODE}, destination_k8s_node_name, lb_hop_hop', *CHOSEN, FORWARDED)} > 0", "Connections"
            ),
            links=_NODE_CELL,
        ),
        parts.listing(
            About(
                "Endpoints, seen from each node",
                "Endpoints that kube-proxy picks from, by VIP port, as each node's agent knows them. Nodes that differ"
                " in their sums do not agree on the topology: one agent is behind, see the Agents dashboard.",
                "No agent knows endpoints of this Service",
            ),
            "short",
            VIP_PORT,
            *(
                Query(total(select(ENDPOINTS, *CHOSEN, f'lb_hop_placement="{place}"'), VIP_PORT), title)
                for place, title in places.items()
            ),
            links=_NODE_CELL,
            w=24,
        ),
    ]


def _times() -> list[parts.AnyPanel]:
    hopped = quantile(0.5, HANDSHAKE, "lb_hop_hop", *CHOSEN, HOPPED)
    stayed = quantile(0.5, HANDSHAKE, "", *CHOSEN, 'lb_hop_hop="none"')
    return [
        parts.times_by_hop(
            About(
                "Handshake time, by hop",
                "From the client's SYN in to the backend's SYN-ACK out, on the node it came in on: the way to the"
                " backend and back, without the client's own. Interpolated in buckets that are a factor of 2 to 2.5"
                " wide.",
                _NO_TIMES,
            ),
            HANDSHAKE,
            *CHOSEN,
        ),
        parts.graph(
            About(
                "What a hop adds (median)",
                "The median handshake over a hop, less that of a backend on the same node. About the round trip between"
                " the nodes; far more means that the way between them, or the other node, is busy.",
                "Needs connections both with and without a hop in this time",
            ),
            "s",
            Query(f"{hopped} - on () group_left () {stayed}", "{{lb_hop_hop}}"),
        ),
        parts.times_by_hop(
            About(
                "Forward time, by hop",
                "From the first packet in to the translated packet out, on one node: what kube-proxy's rules cost, some"
                " microseconds. It grows with long rule chains (iptables mode with many Services) and a busy CPU.",
                _NO_TIMES,
            ),
            FORWARD,
            *CHOSEN,
        ),
        parts.spread(
            About(
                "Handshake times",
                "How many handshakes per second took how long. Two bands are two kinds of ways, as same node and other"
                " zone; a band at 1 s is of SYNs that were lost and sent again.",
                _NO_TIMES,
            ),
            total(rate(HANDSHAKE, *CHOSEN), "le"),
        ),
    ]


def _loss() -> list[parts.AnyPanel]:
    nothing = "Nothing is lost: no such connection in this time"
    records = [parts.explore_logs("Log records", parts.lost_of("${cluster:pipe}", "${namespace}", "${service}"))]
    return [
        parts.graph(
            About(
                "Not forwarded, by reason and node",
                "No backend was picked. no_endpoints: no ready one exists. no_local_endpoints: policy Local, and none"
                " on that node, which should not get traffic. dropped on one node alone: its kube-proxy or firewall.",
                nothing,
            ),
            "si:conn/s",
            Query(
                total(rate(CONNECTIONS, *CHOSEN, UNFORWARDED), f"lb_hop_outcome, {NODE}"),
                "{{lb_hop_outcome}} {{k8s_node_name}}",
            ),
            links=records,
        ),
        parts.graph(
            About(
                "Failed handshakes, by kind and node",
                "Forwarded, but refused (a reset: nobody listens) or timed out (no answer, the client sent its SYN"
                " again). On all nodes: the backend; on one: its way to it.",
                nothing,
            ),
            "si:conn/s",
            Query(total(rate(FAILURES, *CHOSEN), f"error_type, {NODE}"), "{{error_type}} {{k8s_node_name}}"),
            links=records,
        ),
        parts.graph(
            About(
                "SYNs sent again, by node",
                "SYNs that clients sent again because nothing came back in time: the first sign of loss, before"
                " connections fail. Not of UDP.",
                "No TCP connection came in at this Service's VIPs in this time",
            ),
            "si:SYN/s",
            Query(total(rate(RETRANSMITS, *CHOSEN), NODE), "{{k8s_node_name}}"),
            links=[_TO_NODE],
        ),
        parts.graph(
            About(
                "Replies unseen, by node",
                "Forwarded, and the answer took another way (direct server return, asymmetric routing). Not a failure,"
                " but these connections have no handshake time. Where no such set-up is meant, look at the routes.",
                "All answers came back through the node: no reply was unseen in this time",
            ),
            "si:conn/s",
            Query(total(rate(UNSEEN, *CHOSEN), NODE), "{{k8s_node_name}}"),
            links=[_TO_NODE],
        ),
    ]


def _local() -> list[parts.AnyPanel]:
    taken = f"({taken_in('', *CHOSEN)})"
    avoided = or_zero(taken_in("", *CHOSEN, 'lb_hop_hop="avoidable"'))
    return [
        parts.stat_panel(
            About(
                "Would save the hop",
                "Share of the connections from outside that took a hop although a ready backend was on their node: with"
                " policy Local they would stay there.",
                _NO_CONNECTIONS,
            ),
            "percentunit",
            share(avoided, taken),
            w=6,
        ),
        parts.stat_panel(
            About(
                "Would move to another node",
                "Share of the connections from outside that came in on nodes without an endpoint. With policy Local the"
                " announcer has to withdraw those nodes, and these connections come in elsewhere; until it has, they"
                " are lost. Endpoints as they are now, connections of the time shown.",
                _NO_CONNECTIONS,
            ),
            "percentunit",
            share(or_zero(f"sum({DARK})"), taken),
            alarm=(0.1, 0.5),
            w=6,
        ),
        parts.listing(
            About(
                "Nodes that would go dark",
                "Nodes that took in connections and have no endpoint of this VIP port now. With policy Local they take"
                " nothing any more. Where the policy is Local already they should not be announced: what comes in there"
                " is lost as no_local_endpoints.",
                "None: every node that took in connections has an endpoint",
            ),
            "short",
            VIP_PORT,
            Query(DARK, "Connections"),
            links=_NODE_CELL,
        ),
    ]


def _single() -> list[parts.AnyPanel]:
    return [
        parts.log_lines(
            About(
                "Latest lost connections",
                "One line for each: the client, the VIP, the node, the backend if one was picked, why it was lost. Its"
                " trace id leads to the span.",
                "Nothing is lost, or no log records arrive in Loki",
            ),
            parts.lost_of("$cluster", "$namespace", "$service"),
        ),
        parts.log_lines(
            About(
                "Who is behind an address in the backend's log",
                "Copy what the backend logs as its client (address:port) into 'Client behind' above: the record names"
                " the real client. Look at the time too; ports are used again.",
                "Write an address and port into 'Client behind' above; or there is no such record (records may be"
                " sampled)",
            ),
            BEHIND,
        ),
        parts.traces(
            About(
                "Slow handshakes",
                "Traces of this Service whose handshake was answered, and took longer than 'Slow from' above.",
                "No span is that long, or no spans arrive in Tempo",
            ),
            SLOW,
        ),
    ]
