"""The first look: who takes in what, how much of it hops or crosses a zone, what is lost."""

from __future__ import annotations

from typing import TYPE_CHECKING

from grafana_foundation_sdk.models.common import StackingMode

from deploy.grafana import parts
from deploy.grafana.parts import About, Query
from deploy.grafana.promql import (
    AGENTS,
    AVOIDABLE,
    CONNECTIONS,
    CROSSED,
    ENDPOINTS,
    EXTERNAL,
    FAILURES,
    FORWARDED,
    NODE,
    NODES,
    SERVICE,
    TOLD_APART,
    UNFORWARDED,
    VIP,
    ZONES_KNOWN,
    avoidable_share,
    choices,
    crossed_share,
    hop_share,
    lost_by_reason,
    lost_share,
    rate,
    share,
    taken_in,
    total,
)

if TYPE_CHECKING:
    from grafana_foundation_sdk.models.dashboard import Dashboard

CHOSEN = ('k8s_namespace_name=~"$namespace"', 'k8s_service_name=~"$service"', TOLD_APART)
BY_NODE = f"{VIP}, {NODE}"
TAKING_NODES = f"count by ({VIP}) ({taken_in(BY_NODE, *CHOSEN)} > 0)"

_TO_SERVICE = parts.service_link(parts.field("k8s_namespace_name"), parts.field("k8s_service_name"))
_TO_NODE = parts.node_link(parts.field("k8s_node_name"))
_CELLS = {
    "k8s_service_name": parts.service_link(parts.cell("k8s_namespace_name"), parts.cell("k8s_service_name")),
    "k8s_node_name": parts.node_link(parts.cell("k8s_node_name")),
}
_LOST = parts.lost_of("${cluster:pipe}", "${namespace:pipe}", "${service:pipe}")
_OUTCOME = parts.field("lb_hop_outcome")
_ERROR = parts.field("error_type")
_NO_CONNECTIONS = "No connection came in at these Services' VIPs in this time"


def build() -> Dashboard:
    """Build the dashboard."""
    return parts.make(
        parts.OVERVIEW,
        "Which nodes take in the traffic of the VIPs, how much of it takes an extra hop or crosses a zone, what is"
        " lost.",
        [
            parts.choice(
                "namespace",
                "Namespace",
                choices(ENDPOINTS, "k8s_namespace_name"),
                "Namespaces of Services with a VIP",
                several=True,
            ),
            parts.choice(
                "service",
                "Service",
                choices(ENDPOINTS, "k8s_service_name", CHOSEN[0]),
                "Services with a VIP",
                several=True,
            ),
        ],
        {
            "In short": [
                parts.stat_panel(
                    About(
                        "Connections per second",
                        "New connections from outside, at all VIPs and nodes together; UDP flows count as connections.",
                        "No agent has told of a connection: see the Agents dashboard",
                    ),
                    "si:conn/s",
                    total(rate(CONNECTIONS, *CHOSEN, EXTERNAL)),
                ),
                parts.stat_panel(
                    About(
                        "Took an extra hop",
                        "Share of the forwarded connections whose backend was on another node than the one they came in"
                        " on. With N nodes and backends on all of them, kube-proxy sends about (N-1)/N over a hop.",
                        _NO_CONNECTIONS,
                    ),
                    "percentunit",
                    hop_share(*CHOSEN),
                ),
                parts.stat_panel(
                    About(
                        "Avoidable hops",
                        "Share of the forwarded connections that took a hop although a ready backend was on the node"
                        " they came in on. externalTrafficPolicy: Local, or an internal load balancer that prefers its"
                        " own node, would save them: look at what that would change on the Service dashboard.",
                        _NO_CONNECTIONS,
                    ),
                    "percentunit",
                    avoidable_share(*CHOSEN),
                    alarm=(0.25, 0.5),
                ),
                parts.stat_panel(
                    About(
                        "Crossed a zone",
                        "Share of the connections whose backend was in another zone than the node they came in on: they"
                        " are slower, and many clouds bill them. Only those count whose zones are both known.",
                        "No zones: the nodes have no label topology.kubernetes.io/zone, or nothing came in",
                    ),
                    "percentunit",
                    crossed_share(*CHOSEN),
                    alarm=(0.5, 0.8),
                ),
                parts.stat_panel(
                    About(
                        "Lost",
                        "Share of all connections that were not forwarded (no endpoint, none on the node under policy"
                        " Local, dropped) or whose handshake was refused or timed out. The tables below say where and"
                        " why.",
                        _NO_CONNECTIONS,
                    ),
                    "percentunit",
                    lost_share(*CHOSEN),
                    alarm=(0.001, 0.01),
                ),
                parts.stat_panel(
                    About(
                        "Nodes without an agent",
                        "Nodes of the cluster on which no agent reports: what comes in there is not seen at all. Look"
                        " for pods of the DaemonSet that are missing, or tolerations that it lacks.",
                        "The agents are told no nodes (they run without the Kubernetes API)",
                    ),
                    "short",
                    f"{NODES} - {AGENTS}",
                    alarm=(1, 1),
                ),
            ],
            "Who takes in what": [
                parts.graph(
                    About(
                        "Taken in by each node",
                        "New connections per second from outside, by the node that they came in on. Even lines are a"
                        " balanced ECMP; one line alone is an L2 VIP, whose node changes on a failover.",
                        _NO_CONNECTIONS,
                    ),
                    "si:conn/s",
                    Query(total(rate(CONNECTIONS, *CHOSEN, EXTERNAL), NODE), "{{k8s_node_name}}"),
                    stacking=StackingMode.NORMAL,
                    links=[_TO_NODE],
                ),
                parts.listing(
                    About(
                        "Taken in by each VIP and node",
                        "Connections from outside in the time shown, and the node's share of its VIP. A share far from"
                        " the others' is an imbalance of the router's ECMP: few flows, a hash of addresses alone, or"
                        " next hops that are listed twice.",
                        _NO_CONNECTIONS,
                    ),
                    "short",
                    BY_NODE,
                    Query(f"{taken_in(BY_NODE, *CHOSEN)} > 0", "Connections"),
                    Query(
                        f"{taken_in(BY_NODE, *CHOSEN)} / on ({VIP}) group_left () ({taken_in(VIP, *CHOSEN)} > 0) > 0",
                        "Share of the VIP",
                        "percentunit",
                    ),
                    links=_CELLS,
                ),
                parts.listing(
                    About(
                        "Which node owns each VIP",
                        "How many nodes took in connections of each VIP, and which one if it was one alone. One is"
                        " right for an L2 VIP (ARP, NDP): that node owns the address. For a VIP announced by BGP it"
                        " means that the other nodes get nothing. Two for an L2 VIP: a failover in this time, or two"
                        " owners at once; the graph beside it tells which.",
                        _NO_CONNECTIONS,
                    ),
                    "short",
                    BY_NODE,
                    Query(TAKING_NODES, "Nodes"),
                    Query(
                        f"{taken_in(BY_NODE, *CHOSEN)} > 0 and on ({VIP}) {TAKING_NODES} == 1",
                        "Connections, of one node alone",
                    ),
                    links=_CELLS,
                ),
                parts.graph(
                    About(
                        "Nodes that take in each VIP",
                        "How many nodes take in connections at the same time. A step down: a node was withdrawn, or"
                        " lost its session. An L2 VIP stays at 1; longer at 2, two nodes answer for one address.",
                        _NO_CONNECTIONS,
                    ),
                    "short",
                    Query(
                        f"count by ({VIP}) ({total(rate(CONNECTIONS, *CHOSEN, EXTERNAL), BY_NODE)} > 0)",
                        "{{k8s_namespace_name}}/{{k8s_service_name}} {{server_address}}",
                    ),
                    links=[_TO_SERVICE],
                ),
            ],
            "Hops": [
                parts.graph(
                    About(
                        "Hop classes",
                        "Forwarded connections from outside by their hop: none (backend on the same node), avoidable (a"
                        " ready backend was there, another was picked), required (none was there), unknown (the backend"
                        " is not in the topology: an agent that is behind, or a backend outside the cluster).",
                        _NO_CONNECTIONS,
                    ),
                    "si:conn/s",
                    Query(total(rate(CONNECTIONS, *CHOSEN, EXTERNAL, FORWARDED), "lb_hop_hop"), "{{lb_hop_hop}}"),
                    stacking=StackingMode.PERCENT,
                ),
                parts.graph(
                    About(
                        "Crossed a zone, by Service",
                        "Share of each Service's connections from outside whose backend was in another zone than the"
                        " node they came in on. To lower it: backends in every zone, and policy Local or a"
                        " trafficDistribution that prefers close ones.",
                        "No zones: the nodes have no label topology.kubernetes.io/zone, or nothing came in",
                    ),
                    "percentunit",
                    Query(
                        share(
                            total(rate(CONNECTIONS, *CHOSEN, EXTERNAL, CROSSED), SERVICE),
                            total(rate(CONNECTIONS, *CHOSEN, EXTERNAL, ZONES_KNOWN), SERVICE),
                        ),
                        "{{k8s_namespace_name}}/{{k8s_service_name}}",
                    ),
                    links=[_TO_SERVICE],
                ),
                parts.top(
                    About(
                        "Busiest Services",
                        "The ten Services with the most connections from outside in the time shown. A click opens the"
                        " Service.",
                        _NO_CONNECTIONS,
                    ),
                    "short",
                    Query(
                        f"sort_desc(topk(10, {taken_in(SERVICE, *CHOSEN)}))",
                        "{{k8s_namespace_name}}/{{k8s_service_name}}",
                    ),
                    _TO_SERVICE,
                ),
                parts.listing(
                    About(
                        "Avoidable hops by Service",
                        "Connections from outside that took a hop although a ready backend was on the node they came in"
                        " on, in the time shown. The first rows gain the most by externalTrafficPolicy: Local.",
                        "No Service took an avoidable hop in this time",
                    ),
                    "short",
                    SERVICE,
                    Query(f"{taken_in(SERVICE, *CHOSEN, AVOIDABLE)} > 0", "Avoidable hops"),
                    links={"k8s_service_name": _CELLS["k8s_service_name"]},
                ),
            ],
            "Loss": [
                parts.graph(
                    About(
                        "Not forwarded, by reason",
                        "Connections that no backend was picked for. no_endpoints: the Service has no ready endpoint."
                        " no_local_endpoints: policy Local, and the node has none, so it should not be announced."
                        " dropped: packets came in and never went on; a firewall, a policy, or kube-proxy is behind.",
                        "Nothing is lost: no such connection in this time",
                    ),
                    "si:conn/s",
                    Query(total(rate(CONNECTIONS, *CHOSEN, UNFORWARDED), "lb_hop_outcome"), "{{lb_hop_outcome}}"),
                    links=[
                        parts.explore_logs("Log records", f'{_LOST} | lb_hop_outcome="{_OUTCOME}"'),
                    ],
                ),
                parts.graph(
                    About(
                        "Failed handshakes, by kind",
                        "Forwarded, but not answered. refused: the backend sent a reset, nobody listens there. timeout:"
                        " the client sent its SYN again and heard nothing; a network policy, a full accept queue, or a"
                        " backend that is gone.",
                        "Nothing is lost: no handshake failed in this time",
                    ),
                    "si:conn/s",
                    Query(total(rate(FAILURES, *CHOSEN), "error_type"), "{{error_type}}"),
                    links=[parts.explore_logs("Log records", f'{_LOST} | error_type="{_ERROR}"')],
                ),
                parts.listing(
                    About(
                        "Where connections are lost",
                        "Lost connections in the time shown, by VIP, node and reason. One node alone with no_endpoints"
                        " or dropped is a black hole: take it out of the announcements, then look at its kube-proxy.",
                        "Nothing is lost: no such connection in this time",
                    ),
                    "short",
                    f"{BY_NODE}, reason",
                    Query(lost_by_reason(BY_NODE, *CHOSEN), "Connections"),
                    links=_CELLS,
                    w=24,
                ),
                parts.log_lines(
                    About(
                        "Latest lost connections",
                        "One line for each: the client, the VIP, the node, the backend if one was picked, and why it"
                        " was lost. Its trace id leads to the span.",
                        "Nothing is lost, or no log records arrive in Loki",
                    ),
                    parts.lost_of("$cluster", "$namespace", "$service"),
                ),
            ],
        },
    )
