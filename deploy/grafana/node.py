"""One node: what it takes in, where it sends it, what it loses and how long it takes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from grafana_foundation_sdk.models.common import StackingMode

from deploy.grafana import parts
from deploy.grafana.parts import About, Query
from deploy.grafana.promql import (
    CLUSTER,
    CONNECTIONS,
    EXTERNAL,
    FAILURES,
    FORWARD,
    FORWARDED,
    HANDSHAKE,
    RETRANSMITS,
    SERVICE,
    TOLD_APART,
    UNFORWARDED,
    UNSEEN,
    VIP,
    avoidable_share,
    choices,
    crossed_share,
    hop_share,
    lost_by_reason,
    lost_share,
    rate,
    select,
    share,
    taken_in,
    total,
)

if TYPE_CHECKING:
    from grafana_foundation_sdk.models.dashboard import Dashboard

CHOSEN = ('k8s_node_name="$node"', TOLD_APART)
SLOW = (
    '{ resource.service.name = "otel-lb-hop" && span.k8s.node.name = "$node"'
    " && span.lb_hop.handshake.duration > 0.0 && duration > $slow }"
)

_SERVICE_NAMES = "{{k8s_namespace_name}}/{{k8s_service_name}}"
_TO_SERVICE = parts.service_link(parts.field("k8s_namespace_name"), parts.field("k8s_service_name"))
_SERVICE_CELL = {
    "k8s_service_name": parts.service_link(parts.cell("k8s_namespace_name"), parts.cell("k8s_service_name"))
}
_NO_CONNECTIONS = "No connection came in on this node in this time"
_NO_LOSS = "Nothing is lost: no such connection in this time"
_NO_TIMES = (
    "Nothing was measured in this time: no TCP connection, or none was answered on its way back through the node"
)


def build() -> Dashboard:
    """Build the dashboard."""
    return parts.make(
        parts.NODE,
        "One node: which Services' connections it takes in, to which nodes it sends them, what it loses.",
        [
            parts.choice("node", "Node", choices("lb_hop_vip_ports", "k8s_node_name"), "The node"),
            parts.entry("slow", "Slow from", "10ms", "Spans longer than this are listed, as 500us, 10ms or 1s"),
        ],
        {
            "In short": _in_short(),
            "Traffic": _traffic(),
            "Times": _times(),
            "Loss": _loss(),
            "Single connections": _single(),
        },
    )


def _in_short() -> list[parts.AnyPanel]:
    return [
        parts.stat_panel(
            About("Connections per second", "New connections from outside that come in on this node.", _NO_CONNECTIONS),
            "si:conn/s",
            total(rate(CONNECTIONS, *CHOSEN, EXTERNAL)),
        ),
        parts.stat_panel(
            About(
                "Share of all nodes",
                "This node's share of the connections from outside that all nodes took in. With ECMP over N nodes about"
                " 1/N; far above it is the owner of L2 VIPs, or an imbalance.",
                _NO_CONNECTIONS,
            ),
            "percentunit",
            share(taken_in("", *CHOSEN), taken_in("")),
        ),
        parts.stat_panel(
            About(
                "Took an extra hop",
                "Share of the forwarded connections that left this node for their backend.",
                _NO_CONNECTIONS,
            ),
            "percentunit",
            hop_share(*CHOSEN),
        ),
        parts.stat_panel(
            About(
                "Avoidable hops",
                "Share of the forwarded connections that left this node although a ready backend was on it.",
                _NO_CONNECTIONS,
            ),
            "percentunit",
            avoidable_share(*CHOSEN),
            alarm=(0.25, 0.5),
        ),
        parts.stat_panel(
            About(
                "Crossed a zone",
                "Share of the connections whose backend was in another zone than this node.",
                "No zones: the nodes have no label topology.kubernetes.io/zone, or nothing came in",
            ),
            "percentunit",
            crossed_share(*CHOSEN),
            alarm=(0.5, 0.8),
        ),
        parts.stat_panel(
            About(
                "Lost",
                "Share of the connections that were not forwarded, or whose handshake was refused or timed out. Far"
                " above other nodes': withdraw it (drain, cordon, or stop its speaker), then look at its kube-proxy.",
                _NO_CONNECTIONS,
            ),
            "percentunit",
            lost_share(*CHOSEN),
            alarm=(0.001, 0.01),
        ),
    ]


def _traffic() -> list[parts.AnyPanel]:
    return [
        parts.graph(
            About(
                "Taken in, by Service",
                "New connections per second from outside that come in on this node. All lines at 0: the router sends"
                " nothing here, or the node is withdrawn.",
                _NO_CONNECTIONS,
            ),
            "si:conn/s",
            Query(total(rate(CONNECTIONS, *CHOSEN, EXTERNAL), SERVICE), _SERVICE_NAMES),
            stacking=StackingMode.NORMAL,
            links=[_TO_SERVICE],
        ),
        parts.graph(
            About(
                "Sent to, by the backend's node",
                "Forwarded connections from outside by the node of their backend; this node's own name is no hop.",
                _NO_CONNECTIONS,
            ),
            "si:conn/s",
            Query(
                total(rate(CONNECTIONS, *CHOSEN, EXTERNAL, FORWARDED), "destination_k8s_node_name"),
                "{{destination_k8s_node_name}}",
            ),
            stacking=StackingMode.NORMAL,
        ),
        parts.listing(
            About(
                "Taken in, by VIP",
                "Connections from outside in the time shown, and this node's share of the VIP. 100 %: this node alone"
                " takes it in (L2, or the only next hop).",
                _NO_CONNECTIONS,
            ),
            "short",
            VIP,
            Query(f"{taken_in(VIP, *CHOSEN)} > 0", "Connections"),
            Query(f"{taken_in(VIP, *CHOSEN)} / {taken_in(VIP)} > 0", "Share of the VIP", "percentunit"),
            links=_SERVICE_CELL,
        ),
        parts.graph(
            About(
                "Begun inside, by Service",
                "Connections to a VIP that pods of this node, or the node itself, made: kube-proxy translates them in"
                " place, and they never reach the load balancer.",
                "Nobody on this node called a VIP in this time",
            ),
            "si:conn/s",
            Query(total(rate(CONNECTIONS, *CHOSEN, 'lb_hop_origin="internal"'), SERVICE), _SERVICE_NAMES),
            links=[_TO_SERVICE],
        ),
    ]


def _times() -> list[parts.AnyPanel]:
    return [
        parts.times_by_hop(
            About(
                "Forward time, by hop",
                "From the first packet in to the translated packet out, on this node: what kube-proxy's rules cost."
                " More than on other nodes: a busy CPU, or rules that have grown.",
                _NO_TIMES,
            ),
            FORWARD,
            *CHOSEN,
        ),
        parts.times_by_hop(
            About(
                "Handshake time, by hop",
                "From the SYN in to the SYN-ACK out, on this node. Slow without a hop: the backends here; slow over a"
                " hop alone: the way between the nodes.",
                _NO_TIMES,
            ),
            HANDSHAKE,
            *CHOSEN,
        ),
    ]


def _loss() -> list[parts.AnyPanel]:
    return [
        parts.graph(
            About(
                "Not forwarded, by Service and reason",
                "No backend was picked on this node. Of many Services at once: this node's kube-proxy or firewall."
                " no_local_endpoints: policy Local, and the node is announced without an endpoint.",
                _NO_LOSS,
            ),
            "si:conn/s",
            Query(
                total(rate(CONNECTIONS, *CHOSEN, UNFORWARDED), f"{SERVICE}, lb_hop_outcome"),
                f"{_SERVICE_NAMES} {{{{lb_hop_outcome}}}}",
            ),
            links=[_TO_SERVICE],
        ),
        parts.graph(
            About(
                "Failed handshakes, by Service and kind",
                "Forwarded from this node, but refused or timed out. Of many Services at once: the way from this node"
                " to the others.",
                _NO_LOSS,
            ),
            "si:conn/s",
            Query(total(rate(FAILURES, *CHOSEN), f"{SERVICE}, error_type"), f"{_SERVICE_NAMES} {{{{error_type}}}}"),
            links=[_TO_SERVICE],
        ),
        parts.graph(
            About(
                "SYNs sent again, by Service",
                "SYNs that clients sent again, having heard nothing: loss before connections fail.",
                "No TCP connection came in on this node in this time",
            ),
            "si:SYN/s",
            Query(total(rate(RETRANSMITS, *CHOSEN), SERVICE), _SERVICE_NAMES),
            links=[_TO_SERVICE],
        ),
        parts.graph(
            About(
                "Replies unseen, by Service",
                "Forwarded, and the answer took another way (direct server return, asymmetric routing). Not a failure.",
                "All answers came back through the node: no reply was unseen in this time",
            ),
            "si:conn/s",
            Query(total(rate(UNSEEN, *CHOSEN), SERVICE), _SERVICE_NAMES),
            links=[_TO_SERVICE],
        ),
        parts.listing(
            About(
                "Lost, by VIP and reason",
                "Connections that were lost on this node in the time shown.",
                _NO_LOSS,
            ),
            "short",
            f"{VIP}, reason",
            Query(lost_by_reason(VIP, *CHOSEN), "Connections"),
            links=_SERVICE_CELL,
        ),
        parts.graph(
            About(
                "Handshakes without a verdict",
                "Connections that are neither forwarded nor given up yet: those of the last seconds. A line that only"
                " rises is a defect of the agent, or a flood of SYNs.",
                "No connection came in on this node",
            ),
            "short",
            Query(total(select("lb_hop_connections_pending", *CHOSEN), SERVICE), _SERVICE_NAMES),
        ),
    ]


def _single() -> list[parts.AnyPanel]:
    return [
        parts.log_lines(
            About(
                "Latest lost connections",
                "Those that this node took in and lost: client, VIP, backend if one was picked, and why.",
                "Nothing is lost, or no log records arrive in Loki",
            ),
            f'{parts.RECORDS} | {CLUSTER} | error_type!="" | k8s_node_name="$node"',
        ),
        parts.traces(
            About(
                "Slow handshakes",
                "Traces of connections through this node whose handshake was answered, and took longer than 'Slow from'"
                " above.",
                "No span is that long, or no spans arrive in Tempo",
            ),
            SLOW,
        ),
    ]
