"""The ways out of the agent, one for each signal and exporter that the settings name: encoder, shipper, sink.

What goes out by OTLP is encoded straight to bytes; `console` and plugins get the SDK's objects.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, NamedTuple, Protocol

from otel_lb_hop import semconv
from otel_lb_hop.core.ledger import RECORD_SIGNALS, Stage
from otel_lb_hop.errors import ConfigError
from otel_lb_hop.export import otlp_metrics
from otel_lb_hop.export.backlog import FAILED
from otel_lb_hop.export.delivery import Chunk, Reply
from otel_lb_hop.export.delta import TEMPORALITIES, Deltas, divide
from otel_lb_hop.export.log_lines import encode_lines
from otel_lb_hop.export.otlp_settings import OTLP
from otel_lb_hop.export.records import LogEncoder, SpanEncoder
from otel_lb_hop.export.resource import make_envelope
from otel_lb_hop.export.shipper import MetricsShipper, Shipper
from otel_lb_hop.export.transport import make_sink

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from collections.abc import Set as AbstractSet

    from opentelemetry.sdk.resources import Resource

    from otel_lb_hop.config import Config
    from otel_lb_hop.core.hops import Course
    from otel_lb_hop.core.layout import RawRecord
    from otel_lb_hop.errors import Problem
    from otel_lb_hop.export.delivery import Sink
    from otel_lb_hop.export.delta import Memory
    from otel_lb_hop.export.log_lines import LogLine
    from otel_lb_hop.export.points import Kind, Metric
    from otel_lb_hop.export.record_content import Sampling

log = logging.getLogger(__name__)

LINES_SIGNAL = "agent_logs"
LINES_BYTES = 1 << 20


class Sinks(NamedTuple):
    """The sinks of each signal, and the one of the agent's own log, which goes where log records go by OTLP."""

    by_signal: dict[str, list[Sink]]
    lines: Sink | None


def make_sinks(config: Config, environ: Mapping[str, str]) -> Sinks:
    """Make all sinks that the settings name. Raises ConfigError with all that is wrong with any of them."""
    problems: list[Problem] = []
    made = Sinks({"metrics": [], "logs": [], "traces": []}, None)
    if config.sdk_disabled:
        return made
    for signal, sinks in made.by_signal.items():
        chosen = getattr(config, signal)
        for name in chosen.exporters:
            try:
                sinks.append(_make_sink(signal, name, chosen.protocol, environ))
            except ConfigError as error:
                problems += error.problems
    if problems:
        # What all signals read alike is wrong once.
        raise ConfigError(dict.fromkeys(problems))
    lines = make_sink("logs", config.logs.protocol, environ) if OTLP in config.logs.exporters else None
    return made._replace(lines=lines)


def _make_sink(signal: str, name: str, protocol: str, environ: Mapping[str, str]) -> Sink:
    if name == OTLP:
        return make_sink(signal, protocol, environ)
    # The SDK takes megabytes that nobody needs who sends by OTLP only.
    from otel_lb_hop.export.sdk import make_sdk_sink  # noqa: PLC0415

    return make_sdk_sink(signal, name)


class Outlet(Protocol):
    """One way out."""

    @property
    def shipper(self) -> Shipper | MetricsShipper:
        """Carry what is encoded."""

    def introduce(self, resource: Resource) -> None:
        """Name another resource from now on."""

    def stages(self) -> tuple[Stage, ...]:
        """Give the ledger's stages of this way, in its order."""


class Encoder(Protocol):
    """Makes chunks of records. What it was given = what it encoded + what it did not sample + what has no course."""

    encoded: int
    not_sampled: int

    def introduce(self, resource: Resource) -> None:
        """Name another resource from now on."""

    def encode(
        self, records: Sequence[RawRecord], courses: Sequence[Course | None], offset_ns: int, observed_ns: int
    ) -> list[Chunk]:
        """Encode the records that have a course."""


class RecordOutlet:
    """The way of one record signal to one exporter."""

    def __init__(self, signal: str, sink: Sink, limit_bytes: int, encoder: Encoder) -> None:
        self.encoder = encoder
        self.shipper = Shipper(signal, sink, limit_bytes)
        self._seen = 0
        self._failed = 0

    def introduce(self, resource: Resource) -> None:
        """Name another resource from now on."""
        self.encoder.introduce(resource)

    def offer(
        self, records: Sequence[RawRecord], courses: Sequence[Course | None], offset_ns: int, observed_ns: int
    ) -> None:
        """Encode and queue records that have a course; what cannot be encoded is counted, and hurts no other way."""
        items = len(records) - courses.count(None)
        self._seen += items
        try:
            chunks = self.encoder.encode(records, courses, offset_ns, observed_ns)
        except Exception:
            self._failed += items
            log.exception("%s: %d records could not be encoded", self.shipper.signal, items)
        else:
            self.shipper.offer(chunks)

    def stages(self) -> tuple[Stage, ...]:
        """Give `encode`, `queue` and `transport`."""
        encoder, shipper = self.encoder, self.shipper
        dropped = {"not_sampled": encoder.not_sampled, FAILED: self._failed}
        encode = Stage("encode", shipper.signal, shipper.name, self._seen, encoder.encoded, dropped, 0)
        return encode, *shipper.stages()


class MetricsOutlet:
    """The way of metrics to one exporter; of `delta_kinds` it gets deltas."""

    def __init__(
        self,
        sink: Sink,
        timeout_seconds: float,
        resource: Resource,
        delta_kinds: AbstractSet[Kind] = frozenset(),
        memory: Memory | None = None,
    ) -> None:
        self._otlp = sink.name == OTLP
        self.introduce(resource)
        self._delta_kinds = delta_kinds
        self.deltas = Deltas(sink.name, memory) if delta_kinds else None
        way = sink if self.deltas is None else DeltaSink(sink, self.deltas, self._encode)
        self.shipper = MetricsShipper(way, timeout_seconds)

    def introduce(self, resource: Resource) -> None:
        """Name another resource from now on."""
        self._resource = resource
        self._envelope = make_envelope(resource)

    def stages(self) -> tuple[Stage, ...]:
        """Give `queue` and `transport`, in data points."""
        return self.shipper.stages()

    def offer(self, metrics: Iterable[Metric], now_ns: int) -> None:
        """Encode and queue one export; it replaces the one before if that was not sent yet."""
        if self.deltas is None:
            chunks = self._encode(metrics, now_ns)
        else:
            # What was delivered by then is known only when it is sent.
            part_bytes = otlp_metrics.CHUNK_BYTES if self._otlp else None
            parts = divide(metrics, self._delta_kinds, now_ns, part_bytes)
            chunks = [Chunk(None, part, part.items, part.size_bytes if self._otlp else 0) for part in parts]
        self.shipper.offer(chunks, now_ns)

    def _encode(self, metrics: Iterable[Metric], now_ns: int) -> list[Chunk]:
        if self._otlp:
            return otlp_metrics.encode(metrics, self._envelope, now_ns)
        from otel_lb_hop.export.sdk_metrics import make_data  # noqa: PLC0415 - see above

        data, points = make_data(metrics, self._resource, now_ns), 0
        for metric in data.resource_metrics[0].scope_metrics[0].metrics:
            points += len(metric.data.data_points)
        return [Chunk(None, data, points, 0)]


class DeltaSink:
    """Takes parts of snapshots, and sends to another sink what was counted since that has taken them."""

    def __init__(self, sink: Sink, deltas: Deltas, encode: Callable[[Iterable[Metric], int], list[Chunk]]) -> None:
        self.name = sink.name
        self.place = sink.place
        self.close = sink.close
        self._sink = sink
        self._deltas = deltas
        self._encode = encode
        self._no_room = False

    def send(self, chunks: list[Chunk], timeout_seconds: float | None = None) -> Reply:
        """Send one part; one in which nothing has changed is as good as taken."""
        (chunk,) = chunks
        part = chunk.payload
        encoded = self._encode(self._deltas.since_told(part), part.now_ns)
        reply = self._sink.send(encoded, timeout_seconds) if encoded else Reply(taken=True)
        if reply.taken and not self._deltas.deliver(part) and not self._no_room:
            self._no_room = True
            log.warning(
                "metrics: %s: there is no room to note what was delivered; the next agent would tell some of it again",
                self.name,
            )
        return reply


class LinesOutlet:
    """The way of the agent's own log, by OTLP."""

    def __init__(self, sink: Sink, resource: Resource) -> None:
        self.shipper = Shipper(LINES_SIGNAL, sink, LINES_BYTES)
        self.introduce(resource)
        self._encoded = 0
        self._taken = 0
        self._lost = 0

    def introduce(self, resource: Resource) -> None:
        """Name another resource from now on."""
        self._envelope = make_envelope(resource, semconv.SCOPE_NAME_AGENT)

    def offer(self, lines: Sequence[LogLine], lost: int) -> None:
        """Encode and queue lines; `lost` are those, since the start, that were not kept until now."""
        self._taken += len(lines)
        self._lost = lost
        chunks = encode_lines(lines, self._envelope)
        self._encoded += sum(chunk.items for chunk in chunks)
        if chunks:
            self.shipper.offer(chunks)

    def stages(self) -> tuple[Stage, ...]:
        """Give `encode`, `queue` and `transport`."""
        shipper = self.shipper
        seen, dropped = self._taken + self._lost, {"too_many": self._lost}
        return Stage("encode", shipper.signal, shipper.name, seen, self._encoded, dropped, 0), *shipper.stages()


def make_record_outlets(
    sinks: Sinks, resource: Resource, node_name: str, sampling: Mapping[str, Sampling], queue_bytes: int
) -> list[RecordOutlet]:
    """Make the ways of log records and spans; they share the bytes that may wait."""
    ways = [(signal, sink) for signal in RECORD_SIGNALS for sink in sinks.by_signal[signal]]
    return [
        RecordOutlet(
            signal, sink, queue_bytes // len(ways), _make_encoder(signal, sink, resource, node_name, sampling[signal])
        )
        for signal, sink in ways
    ]


def make_metrics_outlets(
    sinks: Sinks, config: Config, resource: Resource, memory: Callable[[], Memory | None]
) -> list[MetricsOutlet]:
    """Make the ways of metrics; `memory` opens, for each that gets deltas, what tells an agent after this one."""
    timeout_seconds = config.metric_export_timeout_ms / 1e3
    outlets = []
    for sink in sinks.by_signal["metrics"]:
        kinds = _delta_kinds(sink, config.temporality)
        outlets.append(MetricsOutlet(sink, timeout_seconds, resource, kinds, memory() if kinds else None))
    return outlets


def _delta_kinds(sink: Sink, temporality: str) -> frozenset[Kind]:
    if sink.name == OTLP:
        return TEMPORALITIES[temporality]
    from otel_lb_hop.export.sdk import delta_kinds  # noqa: PLC0415 - see above

    return delta_kinds(sink)


def _make_encoder(signal: str, sink: Sink, resource: Resource, node_name: str, sampling: Sampling) -> Encoder:
    if sink.name == OTLP:
        return (LogEncoder if signal == "logs" else SpanEncoder)(resource, node_name, sampling)
    from otel_lb_hop.export.sdk_records import SdkEncoder, SdkRecords  # noqa: PLC0415 - see above

    return SdkEncoder(signal, SdkRecords(resource, node_name, sampling))
