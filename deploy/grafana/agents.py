"""Whether the agents are well: what the other dashboards show is true only as far as this one is green."""

from __future__ import annotations

from typing import TYPE_CHECKING

from deploy.grafana import parts
from deploy.grafana.parts import About, Query
from deploy.grafana.promql import AGENTS, CLUSTER, NODES, choices, increase, rate, rate_of, select, share, total

if TYPE_CHECKING:
    from grafana_foundation_sdk.models.dashboard import Dashboard

CHOSEN = ('k8s_node_name=~"$node"',)
BY_CHOICE = 'reason!~"ratio|off|not_sampled"'
"""Left out by a setting, not lost."""
WAY = "lb_hop_stage, lb_hop_signal, lb_hop_exporter"
OF_AGENTS = "and on (job, instance, k8s_node_name) lb_hop_vip_ports"
"""Others have metrics of their process as well, by the same names."""
COLLECTOR = "Needs the Collector's own metrics (otelcol_*): scrape its port 8888"

_TO_NODE = parts.node_link(parts.field("k8s_node_name"))


def build() -> Dashboard:
    """Build the dashboard."""
    return parts.make(
        parts.AGENTS,
        "The agents and the Collector: who reports, what is healthy, where records are lost, what it costs.",
        [
            parts.choice(
                "node", "Node", choices("lb_hop_vip_ports", "k8s_node_name"), "Nodes with an agent", several=True
            )
        ],
        {
            "In short": _in_short(),
            "State": _state(),
            "Records and data points": _ledger(),
            "Kernel tables and series": [*_kernel(), *_series()],
            "Cost": _cost(),
            "Collector": _collector(),
            "In their own words": [
                parts.log_lines(
                    About(
                        "The agents' own log",
                        "What the agents say of themselves, the newest first.",
                        "The agents have said nothing in this time, or no log records arrive in Loki",
                    ),
                    f'{parts.OWN_LOG} | {CLUSTER} | k8s_node_name=~"$node"',
                ),
            ],
        },
    )


def _in_short() -> list[parts.AnyPanel]:
    return [
        parts.stat_panel(
            About(
                "Agents reporting",
                "Agents whose metrics arrive. Fewer than there are pods: those cannot reach the Collector.",
                "No agent reports: is the DaemonSet there, and OTEL_EXPORTER_OTLP_ENDPOINT right?",
            ),
            "short",
            f"count({select('lb_hop_vip_ports', *CHOSEN)})",
        ),
        parts.stat_panel(
            About(
                "Nodes without an agent",
                "Nodes of the cluster less agents that report, over all nodes: what comes in there is not seen. Look"
                " for pods of the DaemonSet that are missing, or tolerations that it lacks.",
                "The agents are told no nodes (they run without the Kubernetes API)",
            ),
            "short",
            f"{NODES} - {AGENTS}",
            alarm=(1, 1),
        ),
        parts.stat_panel(
            About(
                "Parts that do not work",
                "Parts of agents that say that they do not work; the graph below says which, `otel-lb-hop` on the node"
                " and /readyz say why.",
                "No agent reports",
            ),
            "short",
            f"count({select('lb_hop_part_healthy', *CHOSEN)}) - sum({select('lb_hop_part_healthy', *CHOSEN)})",
            alarm=(1, 3),
        ),
        parts.stat_panel(
            About(
                "Oldest topology",
                "How long ago the agent that is most behind last knew its Services, endpoints and nodes to be current."
                " Minutes: it cannot reach the API server, and new backends count as unknown.",
                "No agent reports",
            ),
            "s",
            f"max({select('lb_hop_topology_age_seconds', *CHOSEN)})",
            alarm=(120, 600),
        ),
        parts.stat_panel(
            About(
                "Records lost",
                "Log records and spans that were lost on their way in the time shown, not counting those that a setting"
                " leaves out (sampling). Metrics stay exact whatever is lost here.",
                "No agent reports",
            ),
            "short",
            total(increase("lb_hop_records_dropped_total", *CHOSEN, BY_CHOICE)),
            alarm=(1, 1000),
        ),
        parts.stat_panel(
            About(
                "Fullest kernel table",
                "Share of the entries in use, of the fullest table of any agent. At 100 % new VIP ports, hops or"
                " backends are not counted: raise the limit, or watch fewer Services.",
                "No agent reports",
            ),
            "percentunit",
            f"max({select('lb_hop_map_usage', *CHOSEN)} / {select('lb_hop_map_limit', *CHOSEN)})",
            alarm=(0.8, 0.95),
        ),
    ]


def _state() -> list[parts.AnyPanel]:
    return [
        parts.states(
            About(
                "Which parts, and when",
                "Parts of agents while they did not work as they should: its programs, its sources (API, file), the"
                " topology, conntrack, each signal's exporter, the ledger. What works has no line: of hundreds of"
                " agents nobody would find the one that does not.",
                "Every part of every agent that reports works",
            ),
            f"min by (k8s_node_name, lb_hop_part) ({select('lb_hop_part_healthy', *CHOSEN)}) == 0",
            "{{k8s_node_name}} {{lb_hop_part}}",
            {"0": ("does not work", "red")},
        ),
        parts.graph(
            About(
                "Topology age",
                "Since the topology was last known to be current. A line that climbs: that agent has lost the API"
                " server (or its file); its counters go on with what it knows.",
                "No agent reports",
            ),
            "s",
            Query(f"max by (k8s_node_name) ({select('lb_hop_topology_age_seconds', *CHOSEN)})", "{{k8s_node_name}}"),
            alarm=(120, 600),
            links=[_TO_NODE],
        ),
        parts.graph(
            About(
                "Agents and nodes",
                "Agents that report, and nodes that the cluster has. A gap is a node that nobody watches.",
                "No agent reports",
            ),
            "short",
            Query(AGENTS, "agents"),
            Query(NODES, "nodes"),
        ),
        parts.graph(
            About(
                "VIP ports watched",
                "VIP ports that each agent knows. All agree, but for moments: one that does not is behind.",
                "No agent reports",
            ),
            "short",
            Query(f"max by (k8s_node_name) ({select('lb_hop_vip_ports', *CHOSEN)})", "{{k8s_node_name}}"),
        ),
    ]


def _ledger() -> list[parts.AnyPanel]:
    dropped = "lb_hop_records_dropped_total"
    return [
        parts.listing(
            About(
                "The ledger of records",
                "What came to each stage in the time shown, what left the last one, what ended there, what is there"
                " now. The way: kernel, ring, decode, then encode, queue and transport of each signal. What is dropped"
                " by a setting (sampling) is in Dropped too; the graph beside it tells the reasons.",
                "No agent reports",
            ),
            "short",
            WAY,
            Query(total(increase("lb_hop_records_seen_total", *CHOSEN), WAY), "Seen"),
            Query(total(increase("lb_hop_records_exported_total", *CHOSEN), WAY), "Delivered"),
            Query(total(increase(dropped, *CHOSEN), WAY), "Dropped"),
            Query(total(select("lb_hop_records_in_flight", *CHOSEN), WAY), "In flight"),
            sort_by="Seen",
            w=24,
        ),
        parts.graph(
            About(
                "Records dropped, by stage and reason",
                "ratio, off, not_sampled: by a setting. rate: more connections than OTEL_LB_HOP_RECORD_RATE. ring_full:"
                " the agent got no CPU. queue_full, refused, failed: the Collector is away or too slow.",
                "No record is dropped",
            ),
            "si:rec/s",
            Query(
                f"{total(rate(dropped, *CHOSEN), 'lb_hop_stage, reason')} > 0",
                "{{lb_hop_stage}} {{reason}}",
            ),
        ),
        parts.graph(
            About(
                "Records delivered, by signal",
                "Log records and spans that the Collector took.",
                "No log records or spans are exported",
            ),
            "si:rec/s",
            Query(
                total(rate("lb_hop_records_exported_total", *CHOSEN), "lb_hop_signal, lb_hop_exporter"),
                "{{lb_hop_signal}} {{lb_hop_exporter}}",
            ),
        ),
        parts.graph(
            About(
                "Data points of metrics",
                "Delivered, and dropped by reason. superseded is no loss: a newer snapshot took the place of one that"
                " was waiting.",
                "No metrics are exported",
            ),
            "si:points/s",
            Query(total(rate("lb_hop_data_points_exported_total", *CHOSEN)), "delivered"),
            Query(f"{total(rate('lb_hop_data_points_dropped_total', *CHOSEN), 'reason')} > 0", "dropped: {{reason}}"),
        ),
        parts.graph(
            About(
                "Waiting to be delivered",
                "Records and data points in each agent's queues. A line that climbs: the Collector is away or slow; at"
                " the bound the oldest are dropped.",
                "No agent reports",
            ),
            "short",
            Query(
                total(select("lb_hop_records_in_flight", *CHOSEN, 'lb_hop_stage=~"queue|transport"'), "k8s_node_name"),
                "{{k8s_node_name}} records",
            ),
            Query(
                total(select("lb_hop_data_points_in_flight", *CHOSEN), "k8s_node_name"),
                "{{k8s_node_name}} data points",
            ),
        ),
    ]


def _kernel() -> list[parts.AnyPanel]:
    return [
        parts.graph(
            About(
                "Packets and events that could not be told",
                "By reason. no_slot, late: more open handshakes than the table holds (a flood); the counts stay exact,"
                " times are missing. truncated, fragment, extension: packets that cannot be read. conntrack_unread:"
                " conntrack told more than was read.",
                "Everything could be told: no such event in this time",
            ),
            "si:events/s",
            Query(f"{total(rate('lb_hop_events_dropped_total', *CHOSEN), 'reason')} > 0", "{{reason}}"),
        ),
        parts.graph(
            About(
                "Kernel tables, share in use",
                "Share of the entries in use, of each table the fullest agent's. At 100 % what is new is not counted.",
                "No agent reports",
            ),
            "percentunit",
            Query(
                f"max by (lb_hop_map) ({select('lb_hop_map_usage', *CHOSEN)} / {select('lb_hop_map_limit', *CHOSEN)})",
                "{{lb_hop_map}}",
            ),
            alarm=(0.8, 0.95),
        ),
    ]


def _series() -> list[parts.AnyPanel]:
    told, limit = select("lb_hop_metric_series", *CHOSEN), select("lb_hop_metric_series_limit", *CHOSEN)
    return [
        parts.graph(
            About(
                "Series, share of the limit",
                "Series of VIP ports that each agent tells, of OTEL_LB_HOP_METRIC_SERIES. They grow with Services,"
                " nodes and hops.",
                "No agent reports",
            ),
            "percentunit",
            Query(f"max by (k8s_node_name) ({told} / {limit})", "{{k8s_node_name}}"),
            alarm=(0.8, 1),
            links=[_TO_NODE],
        ),
        parts.graph(
            About(
                "Series beyond the limit",
                "Series that are summed into one that has neither a Service nor a hop. Above 0 the other panels lack"
                " what is in there: raise the limit, or leave attributes out (OTEL_LB_HOP_METRIC_ATTRIBUTES).",
                "No agent reports",
            ),
            "short",
            Query(f"max by (k8s_node_name) ({select('lb_hop_metric_series_summed', *CHOSEN)})", "{{k8s_node_name}}"),
            alarm=(1, 1),
            links=[_TO_NODE],
        ),
    ]


def _cost() -> list[parts.AnyPanel]:
    return [
        parts.graph(
            About(
                "CPU of the agents",
                "Cores that each agent's process uses, without the kernel's programs. It follows the records per"
                " second, not the packets: sample them (OTEL_LB_HOP_RECORD_RATIO) to lower it.",
                "No agent reports",
            ),
            "si:cores",
            Query(
                total(f"{rate('process_cpu_time_seconds_total', *CHOSEN)} {OF_AGENTS}", "k8s_node_name"),
                "{{k8s_node_name}}",
            ),
            links=[_TO_NODE],
        ),
        parts.graph(
            About(
                "Memory of the agents",
                "Resident memory of each agent's process. It follows the number of Services and endpoints.",
                "No agent reports",
            ),
            "bytes",
            Query(
                total(f"{select('process_memory_usage_bytes', *CHOSEN)} {OF_AGENTS}", "k8s_node_name"),
                "{{k8s_node_name}}",
            ),
            links=[_TO_NODE],
        ),
    ]


def _collectors(counter: str) -> str:
    """Name a counter of the Collector with and without the suffix: that depends on its version and its reader."""
    return f"{rate_of(f'otelcol_{counter}')} or {rate_of(f'otelcol_{counter}_total')}"


def _collector() -> list[parts.AnyPanel]:
    kinds = {"log records": "log_records", "data points": "metric_points", "spans": "spans"}
    return [
        parts.graph(
            About(
                "Collector: taken from agents",
                "What its receivers accepted, of all senders. Less than the agents deliver: another Collector gets it.",
                COLLECTOR,
            ),
            "si:items/s",
            *(Query(total(_collectors(f"receiver_accepted_{kind}")), title) for title, kind in kinds.items()),
        ),
        parts.graph(
            About(
                "Collector: sent to backends",
                "What its exporters delivered. Less than it took: it filters, or a backend is away.",
                COLLECTOR,
            ),
            "si:items/s",
            *(
                Query(total(_collectors(f"exporter_sent_{kind}"), "exporter"), f"{{{{exporter}}}} {title}")
                for title, kind in kinds.items()
            ),
        ),
        parts.graph(
            About(
                "Collector: refused or failed",
                "Refused: it has too little memory (memory_limiter), and agents send again. Failed: a backend did not"
                " take it, and it is lost.",
                f"Nothing refused or failed; or: {COLLECTOR.lower()}",
            ),
            "si:items/s",
            *(
                Query(total(_collectors(f"{what}_{kind}")) + " > 0", f"{word} {title}")
                for what, word in (("receiver_refused", "refused"), ("exporter_send_failed", "failed"))
                for title, kind in kinds.items()
            ),
        ),
        parts.graph(
            About(
                "Collector: queues in use",
                "Share of each exporter's queue that is full. Towards 100 %: its backend is too slow; then it is lost.",
                COLLECTOR,
            ),
            "percentunit",
            Query(
                share(
                    "max by (exporter) (otelcol_exporter_queue_size)",
                    "max by (exporter) (otelcol_exporter_queue_capacity)",
                ),
                "{{exporter}}",
            ),
            alarm=(0.5, 0.9),
        ),
    ]
