"""Pieces of PromQL that many panels share. Names are as Prometheus has them: dots are underscores."""

from __future__ import annotations

CONNECTIONS = "lb_hop_connections_total"
FAILURES = "lb_hop_handshake_failures_total"
RETRANSMITS = "lb_hop_syn_retransmits_total"
UNSEEN = "lb_hop_replies_unseen_total"
ENDPOINTS = "lb_hop_endpoints"
FORWARD = "lb_hop_forward_duration_seconds_bucket"
HANDSHAKE = "lb_hop_handshake_duration_seconds_bucket"

CLUSTER = 'k8s_cluster_name=~"$cluster"'
"""The Collector's configurations add this label where agents have a k8s.cluster.name; all is also what has none."""
TOLD_APART = 'otel_metric_overflow=""'
"""What is beyond the agents' bound on series is one sum, without a Service or an outcome: `!=` would match it."""
EXTERNAL = 'lb_hop_origin="external"'
FORWARDED = 'lb_hop_outcome="forwarded"'
UNFORWARDED = 'lb_hop_outcome!="forwarded"'
HOPPED = 'lb_hop_hop=~"avoidable|required"'
AVOIDABLE = 'lb_hop_hop="avoidable"'
CROSSED = 'lb_hop_zone_crossed="true"'
ZONES_KNOWN = 'lb_hop_zone_crossed!=""'

NODE = "k8s_node_name"
SERVICE = "k8s_namespace_name, k8s_service_name"
VIP = f"{SERVICE}, server_address"


def select(metric: str, *matchers: str) -> str:
    """Select the series of a metric, of the agents in the clusters that were chosen."""
    return f"{metric}{{{', '.join((CLUSTER, *matchers))}}}"


def choices(metric: str, label: str, *matchers: str) -> str:
    """List the values of a label, for a variable."""
    return f"label_values({select(metric, *matchers)}, {label})"


def rate(metric: str, *matchers: str) -> str:
    """Tell a counter's growth per second around each point of a graph."""
    return rate_of(select(metric, *matchers))


def rate_of(selected: str) -> str:
    """Tell the growth per second of a counter that is not the agents'."""
    return f"rate({selected}[$__rate_interval])"


def increase(metric: str, *matchers: str) -> str:
    """Tell a counter's growth over the time that the dashboard shows."""
    return f"increase({select(metric, *matchers)}[$__range])"


def total(expression: str, by: str = "") -> str:
    """Add up, by labels."""
    return f"sum by ({by}) ({expression})" if by else f"sum({expression})"


def or_zero(expression: str) -> str:
    """Tell 0 where no series exists; only of what has no labels left."""
    return f"({expression} or vector(0))"


def share(part: str, whole: str) -> str:
    """Divide; nothing, not NaN, where the whole is 0."""
    return f"{part} / ({whole} > 0)"


AGENTS = f"count(count by (k8s_cluster_name, k8s_node_name) ({select('lb_hop_vip_ports')}))"
NODES = f"sum(max by (k8s_cluster_name) ({select('lb_hop_cluster_nodes')}))"


def quantile(fraction: float, buckets: str, by: str, *matchers: str) -> str:
    """Interpolate in a histogram's buckets, by labels."""
    labels = f"le, {by}" if by else "le"
    return f"histogram_quantile({fraction}, {total(rate(buckets, *matchers), labels)})"


def hop_share(*matchers: str) -> str:
    """Tell which share of the forwarded connections from outside took a hop."""
    return _share_of_forwarded(matchers, HOPPED)


def avoidable_share(*matchers: str) -> str:
    """Tell which share of the forwarded connections from outside took a hop that a local backend would have spared."""
    return _share_of_forwarded(matchers, AVOIDABLE)


def crossed_share(*matchers: str) -> str:
    """Tell which share of the connections from outside crossed a zone, of those with both zones known."""
    known = total(increase(CONNECTIONS, *matchers, EXTERNAL, ZONES_KNOWN))
    return share(or_zero(total(increase(CONNECTIONS, *matchers, EXTERNAL, CROSSED))), known)


def lost_share(*matchers: str) -> str:
    """Tell which share of all connections was not forwarded, or forwarded and not answered."""
    unforwarded = or_zero(total(increase(CONNECTIONS, *matchers, UNFORWARDED)))
    failed = or_zero(total(increase(FAILURES, *matchers)))
    return share(f"({unforwarded} + {failed})", total(increase(CONNECTIONS, *matchers)))


def lost_by_reason(by: str, *matchers: str) -> str:
    """Count the lost connections by labels and `reason`: the outcome, or what became of the handshake."""
    unforwarded = increase(CONNECTIONS, *matchers, UNFORWARDED)
    failed = increase(FAILURES, *matchers)
    reasons = (
        f'label_replace({unforwarded}, "reason", "$1", "lb_hop_outcome", "(.+)")'
        f' or label_replace({failed}, "reason", "$1", "error_type", "(.+)")'
    )
    return f"{total(reasons, f'{by}, reason')} > 0"


def taken_in(by: str, *matchers: str) -> str:
    """Count the connections from outside over the time that the dashboard shows."""
    return total(increase(CONNECTIONS, *matchers, EXTERNAL), by)


def _share_of_forwarded(matchers: tuple[str, ...], what: str) -> str:
    forwarded = total(increase(CONNECTIONS, *matchers, EXTERNAL, FORWARDED))
    return share(or_zero(total(increase(CONNECTIONS, *matchers, EXTERNAL, FORWARDED, what))), forwarded)
