"""From OTLP points to the rows and sentences an operator wants. Pure: knows nothing of the lab."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from otel_lb_hop import semconv
from otel_lb_hop.model import Hop, Origin, Outcome, Policy

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from tests.demo.otlp import Point

BALANCED = 1.25
"""ECMP spreads by hash: up to this many times the even share on one node is taken for even."""

HOPPED = (Hop.AVOIDABLE, Hop.REQUIRED)
CLASSES = (Hop.NONE, *HOPPED)


@dataclass
class Intake:
    """What one node took in for one Service from outside."""

    service: str
    policy: str
    node: str
    total: int = 0
    to_node: Counter[str] = field(default_factory=Counter)
    by_hop: Counter[str] = field(default_factory=Counter)
    unforwarded: Counter[str] = field(default_factory=Counter)
    zone_crossed: int = 0

    @property
    def forwarded(self) -> int:
        """How many were translated to a backend."""
        return sum(self.by_hop.values())

    @property
    def hopped(self) -> int:
        """How many left this node for their backend."""
        return sum(self.by_hop[hop] for hop in HOPPED)


class Percentiles(NamedTuple):
    """Of how many observations, the median and the 99th percentile in seconds."""

    observations: int
    p50: float
    p99: float


class Times(NamedTuple):
    """The times of one hop class, over all nodes and Services."""

    hop: Hop
    forward: Percentiles | None
    handshake: Percentiles | None


class Loss(NamedTuple):
    """Connections of one Service lost for one reason: an outcome, or the `error.type` of a failed handshake."""

    service: str
    reason: str
    by_node: Counter[str]


def service_of(point: Point) -> str:
    """Name the Service as namespace/name."""
    return f"{point.attributes[semconv.K8S_NAMESPACE_NAME]}/{point.attributes[semconv.K8S_SERVICE_NAME]}"


def node_of(point: Point) -> str:
    """Name the intermediate node."""
    return str(point.attributes[semconv.K8S_NODE_NAME])


def of(points: Iterable[Point], metric: str) -> list[Point]:
    """Pick the points of one metric."""
    return [point for point in points if point.metric == metric]


def counted(points: Iterable[Point]) -> Counter[tuple[str, str]]:
    """Count connections by (Service, origin), over all nodes: what must equal what clients made."""
    counts: Counter[tuple[str, str]] = Counter()
    for point in of(points, semconv.METRIC_CONNECTIONS):
        counts[service_of(point), str(point.attributes[semconv.ORIGIN])] += int(point.value)
    return counts


def intakes(points: Iterable[Point], origin: Origin = Origin.EXTERNAL) -> list[Intake]:
    """One row for each Service and node, in their order."""
    rows: dict[tuple[str, str], Intake] = {}
    for point in of(points, semconv.METRIC_CONNECTIONS):
        if point.attributes[semconv.ORIGIN] != origin.value:
            continue
        key = service_of(point), node_of(point)
        row = rows.setdefault(key, Intake(key[0], str(point.attributes[semconv.TRAFFIC_POLICY]), key[1]))
        count = int(point.value)
        row.total += count
        outcome = str(point.attributes[semconv.OUTCOME])
        if outcome != Outcome.FORWARDED.value:
            row.unforwarded[outcome] += count
            continue
        row.by_hop[str(point.attributes[semconv.HOP])] += count
        row.to_node[str(point.attributes.get(semconv.DESTINATION_NODE, "unknown"))] += count
        row.zone_crossed += count * bool(point.attributes.get(semconv.ZONE_CROSSED))
    return [rows[key] for key in sorted(rows)]


def delivered(points: Iterable[Point], services: Iterable[str]) -> Counter[str]:
    """Count forwarded connections of these Services by their backend's node, whatever their origin."""
    counts: Counter[str] = Counter()
    for point in of(points, semconv.METRIC_CONNECTIONS):
        if service_of(point) in services and semconv.DESTINATION_NODE in point.attributes:
            counts[str(point.attributes[semconv.DESTINATION_NODE])] += int(point.value)
    return counts


def losses(points: Sequence[Point]) -> list[Loss]:
    """One row for each Service and reason why a connection got no answer."""
    rows: dict[tuple[str, str], Counter[str]] = {}
    reasons = {semconv.METRIC_CONNECTIONS: semconv.OUTCOME, semconv.METRIC_HANDSHAKE_FAILURES: semconv.ERROR_TYPE}
    for metric, attribute in reasons.items():
        for point in of(points, metric):
            reason = str(point.attributes[attribute])
            if reason != Outcome.FORWARDED.value and point.value:
                rows.setdefault((service_of(point), reason), Counter())[node_of(point)] += int(point.value)
    return [Loss(*key, rows[key]) for key in sorted(rows)]


def retransmits(points: Iterable[Point]) -> Counter[str]:
    """SYNs that clients sent again, by Service; a Service without any is there with 0."""
    counts: Counter[str] = Counter()
    for point in of(points, semconv.METRIC_SYN_RETRANSMITS):
        counts[service_of(point)] += int(point.value)
    return counts


def times(points: Sequence[Point]) -> list[Times]:
    """One row for each hop class that was measured."""
    rows = [
        Times(
            hop,
            _percentiles(points, semconv.METRIC_FORWARD_DURATION, hop),
            _percentiles(points, semconv.METRIC_HANDSHAKE_DURATION, hop),
        )
        for hop in Hop
    ]
    return [row for row in rows if row.forward or row.handshake]


def quantile(q: float, buckets: Sequence[int], bounds: Sequence[float]) -> float:
    """Estimate a quantile as PromQL's histogram_quantile does: evenly spread within its bucket.

    What lies above the last bound is told as that bound.
    """
    rank, below = q * sum(buckets), 0
    lower = 0.0
    for count, upper in zip(buckets, bounds, strict=False):
        if count and below + count >= rank:
            return lower + (upper - lower) * (rank - below) / count
        below += count
        lower = upper
    return bounds[-1]


def dark_nodes(points: Iterable[Point], service: str) -> list[str]:
    """Name the nodes without a ready endpoint of the Service: with policy Local nothing would be answered there."""
    local: Counter[str] = Counter()
    for point in of(points, semconv.METRIC_ENDPOINTS):
        if service_of(point) == service and point.attributes[semconv.PLACEMENT] == "local":
            local[node_of(point)] += int(point.value)
    return sorted(node for node, count in local.items() if not count)


def answers(points: Sequence[Point]) -> list[str]:
    """Answer the operator's questions, one sentence each, for the Services that have answered anybody."""
    rows = intakes(points)
    sentences = []
    for service in serving(points):
        own = [row for row in rows if row.service == service]
        if own:
            sentences += [_balance(service, own), *_extra_hops(service, own), *_what_local_does(points, service, own)]
    sentences += _what_a_hop_costs(times(points))
    # What policy Local drops has its sentence already.
    sentences += [_lost(loss) for loss in losses(points) if loss.reason != Outcome.NO_LOCAL_ENDPOINTS.value]
    return sentences


def serving(points: Sequence[Point]) -> list[str]:
    """Name the Services that have answered anybody; one that fails everywhere is told by its losses alone.

    Datagrams have no handshake: there, to be forwarded has to do.
    """
    answered = {service_of(point) for point in of(points, semconv.METRIC_HANDSHAKE_DURATION) if sum(point.buckets)}
    datagrams = {
        service_of(point)
        for point in of(points, semconv.METRIC_CONNECTIONS)
        if point.attributes[semconv.NETWORK_TRANSPORT] == "udp"
        and point.attributes[semconv.OUTCOME] == Outcome.FORWARDED.value
        and point.value
    }
    return sorted(answered | datagrams)


def share(part: float, whole: float) -> str:
    """Write a share in per cent; of nothing, a dash."""
    return f"{part / whole:.1%}" if whole else "-"


def duration(seconds: float) -> str:
    """Write a time with two digits: an estimate from buckets has no more."""
    rounded = float(f"{seconds:.2g}")
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if rounded >= size:
            return f"{rounded / size:g} {unit}"
    return f"{rounded * 1e6:g} \N{MICRO SIGN}s"


def _percentiles(points: Iterable[Point], metric: str, hop: Hop) -> Percentiles | None:
    own = [point for point in of(points, metric) if point.attributes[semconv.HOP] == hop.value]
    if not own:
        return None
    bounds = own[0].bounds
    buckets = [sum(counts) for counts in zip(*(point.buckets for point in own), strict=True)]
    return Percentiles(sum(buckets), quantile(0.5, buckets, bounds), quantile(0.99, buckets, bounds))


def _balance(service: str, rows: Sequence[Intake]) -> str:
    total = sum(row.total for row in rows)
    most = max(rows, key=lambda row: row.total)
    ratio = most.total * len(rows) / total if total else 0.0
    word = "balanced" if ratio <= BALANCED else "NOT balanced"
    shares = ", ".join(f"{row.node} {share(row.total, total)}" for row in rows)
    return f"{service}: ECMP is {word}: {shares}; the busiest node has {ratio:.2f} times the even share."


def _extra_hops(service: str, rows: Sequence[Intake]) -> list[str]:
    total, hopped = sum(row.total for row in rows), sum(row.hopped for row in rows)
    if not hopped:
        return [f"{service}: none of {total:,} connections took an extra hop."]
    avoidable = sum(row.by_hop[Hop.AVOIDABLE] for row in rows)
    crossed = sum(row.zone_crossed for row in rows)
    sentence = (
        f"{service}: {hopped:,} of {total:,} connections ({share(hopped, total)}) took an extra hop; {avoidable:,} of "
        f"them were avoidable (a ready backend was on the node they entered); {crossed:,} crossed a zone."
    )
    return [sentence]


def _what_local_does(points: Sequence[Point], service: str, rows: Sequence[Intake]) -> list[str]:
    dark = dark_nodes(points, service)
    there = [row for row in rows if row.node in dark]
    total, hit = sum(row.total for row in rows), sum(row.total for row in there)
    if rows[0].policy == Policy.LOCAL.value:
        lost = sum(row.unforwarded[Outcome.NO_LOCAL_ENDPOINTS] for row in rows)
        if not lost:
            return []
        loss = f"{lost:,} of {total:,} connections ({share(lost, total)})"
        return [f"{service}: externalTrafficPolicy is Local, no endpoint is on {_names(dark)}: {loss} were lost."]
    saved = sum(row.by_hop[Hop.AVOIDABLE] for row in rows)
    effect = f"would save {saved:,} avoidable hops"
    if dark:
        effect += f", and {_names(dark)} would go dark: {hit:,} connections ({share(hit, total)}) came in there"
    return [f"{service}: externalTrafficPolicy: Local {effect}."]


def _what_a_hop_costs(rows: Sequence[Times]) -> list[str]:
    medians = {row.hop: row.handshake.p50 for row in rows if row.handshake}
    if Hop.NONE not in medians:
        return []
    return [
        f"The median handshake takes {duration(medians[hop])} over a hop that is {hop.value}, "
        f"{_difference(medians[hop] - medians[Hop.NONE])} than without a hop."
        for hop in HOPPED
        if hop in medians
    ]


def _difference(seconds: float) -> str:
    return f"{duration(abs(seconds))} {'more' if seconds >= 0 else 'less'}"


def _lost(loss: Loss) -> str:
    return f"{loss.service}: {loss.by_node.total():,} connections lost: {MEANING.get(loss.reason, loss.reason)}."


def _names(names: Sequence[str]) -> str:
    return " and ".join(names) or "no node"


MEANING = {
    "no_endpoints": "the Service has no ready endpoint",
    "no_local_endpoints": "policy Local, no ready endpoint on the node",
    "dropped": "not translated, although the topology has endpoints",
    "refused": "RST from the backend: nobody listens there",
    "timeout": "no answer, though the SYN was sent again",
}
