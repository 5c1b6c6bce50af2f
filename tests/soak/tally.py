"""What all agents have sent, added up as it comes: no more of it is kept than the sums need. Pure."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Iterable

CONNECTIONS, USAGE = "lb_hop.connections", "lb_hop.map.usage"
COUNTERS = {CONNECTIONS, "lb_hop.handshake.failures", "lb_hop.syn.retransmits"}
HISTOGRAMS = {"lb_hop.handshake.duration", "lb_hop.forward.duration"}

Labels: TypeAlias = tuple[tuple[str, str], ...]


@dataclass(slots=True)
class Life:
    """One series from its start time on: its latest value, and when that was."""

    start_ns: int
    time_ns: int
    value: int


@dataclass(slots=True)
class Tally:
    """Fed with the messages of OTLP requests. Which agent of a node sent a point is of no interest: pins outlive it."""

    lives: dict[tuple[str, Labels], Life] = field(default_factory=dict)
    ended: Counter[str] = field(default_factory=Counter)
    """Service → connections of series that were replaced by one with a newer start."""
    defects: list[str] = field(default_factory=list)
    anew: list[tuple[str, float]] = field(default_factory=list)
    """Service of each series that began anew, and the seconds from its last point to the new start."""
    usage: dict[str, dict[str, int]] = field(default_factory=dict)
    """Node → kernel table → entries."""
    logs: Counter[str] = field(default_factory=Counter)
    """Node → log records of connections."""
    spans: Counter[str] = field(default_factory=Counter)

    def take(self, message: Any) -> None:  # noqa: ANN401 - one of three
        """Add one request."""
        for group in getattr(message, "resource_metrics", ()):
            for scoped in group.scope_metrics:
                for metric in scoped.metrics:
                    self._take_metric(metric)
        for group in getattr(message, "resource_logs", ()):
            events = sum(bool(record.event_name) for scoped in group.scope_logs for record in scoped.log_records)
            self.logs[_node(group)] += events
        for group in getattr(message, "resource_spans", ()):
            self.spans[_node(group)] += sum(len(scoped.spans) for scoped in group.scope_spans)

    def connections(self) -> Counter[str]:
        """Count the connections of each Service, over all series that ever were."""
        counts = Counter(self.ended)
        for (metric, labels), life in self.lives.items():
            if metric == CONNECTIONS:
                counts[_service(labels)] += life.value
        return counts

    def by_outcome(self) -> Counter[str]:
        """Count the connections of the series that there are, by outcome and hop."""
        counts: Counter[str] = Counter()
        for (metric, labels), life in self.lives.items():
            if metric == CONNECTIONS:
                told = dict(labels)
                counts[" ".join(filter(None, (told["lb_hop.outcome"], told.get("lb_hop.hop"))))] += life.value
        return counts

    def _take_metric(self, metric: Any) -> None:  # noqa: ANN401 - a class of protobuf's
        if metric.name in COUNTERS:
            for point in metric.sum.data_points:
                self._see(metric.name, point, point.as_int)
        elif metric.name in HISTOGRAMS:
            for point in metric.histogram.data_points:
                self._see(metric.name, point, point.count)
        elif metric.name == USAGE:
            for point in metric.gauge.data_points:
                told = dict(_labels(point.attributes))
                self.usage.setdefault(told["k8s.node.name"], {})[told["lb_hop.map"]] = point.as_int

    def _see(self, name: str, point: Any, value: int) -> None:  # noqa: ANN401 - a class of protobuf's
        labels = _labels(point.attributes)
        life = self.lives.get((name, labels))
        start_ns, time_ns = point.start_time_unix_nano, point.time_unix_nano
        if life is None:
            self.lives[name, labels] = Life(start_ns, time_ns, value)
            return
        if start_ns != life.start_ns:
            self.anew.append((_service(labels), (start_ns - life.time_ns) / 1e9))
            if name == CONNECTIONS:
                self.ended[_service(labels)] += life.value
        elif time_ns < life.time_ns:
            return  # sent again, after a newer one
        elif value < life.value:
            self.defects.append(f"{name} of {_service(labels)} fell from {life.value} to {value}: {dict(labels)}")
        life.start_ns, life.time_ns, life.value = start_ns, time_ns, value


def _labels(pairs: Iterable[Any]) -> Labels:
    return tuple(sorted((pair.key, pair.value.string_value or str(pair.value.int_value)) for pair in pairs))


def _service(labels: Labels) -> str:
    return dict(labels)["k8s.service.name"]


def _node(group: Any) -> str:  # noqa: ANN401 - a class of protobuf's
    return dict(_labels(group.resource.attributes))["k8s.node.name"]
