"""Metrics in the SDK's public classes: for `console` and plugins, and the oracle of `otlp_metrics`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from opentelemetry.sdk.metrics.export import (
    AggregationTemporality,
    Gauge,
    HistogramDataPoint,
    Metric,
    MetricsData,
    NumberDataPoint,
    ResourceMetrics,
    ScopeMetrics,
    Sum,
)
from opentelemetry.sdk.metrics.export import Histogram as HistogramData
from opentelemetry.sdk.util.instrumentation import InstrumentationScope

from otel_lb_hop import __version__, semconv
from otel_lb_hop.core.layout import Histogram
from otel_lb_hop.export.points import BOUNDS_S, Kind

if TYPE_CHECKING:
    from collections.abc import Iterable

    from opentelemetry.sdk.resources import Resource

    from otel_lb_hop.export import points
    from otel_lb_hop.export.attributes import Attributes

_SCOPE = InstrumentationScope(semconv.SCOPE_NAME, __version__, semconv.SCHEMA_URL)


def make_data(told: Iterable[points.Metric], resource: Resource, now_ns: int) -> MetricsData:
    """Make one export, as of `now_ns`; a metric without points is left out."""
    made = [_metric(metric, now_ns) for metric in told]
    scope = ScopeMetrics(_SCOPE, [metric for metric in made if metric.data.data_points], semconv.SCHEMA_URL)
    return MetricsData([ResourceMetrics(resource, [scope], resource.schema_url)])


def _metric(metric: points.Metric, now_ns: int) -> Metric:
    kind, name, unit, description = metric.instrument
    numbers: list[NumberDataPoint] = []
    histograms: list[HistogramDataPoint] = []
    for own, beyond, start_ns, value in metric.points:
        if isinstance(value, Histogram):
            histograms.append(_histogram(own.pairs | beyond.pairs, start_ns, now_ns, value))
        else:
            numbers.append(NumberDataPoint(own.pairs | beyond.pairs, start_ns, now_ns, value))
    temporality = AggregationTemporality.DELTA if metric.delta else AggregationTemporality.CUMULATIVE
    data: Gauge | Sum | HistogramData
    if kind is Kind.HISTOGRAM:
        data = HistogramData(histograms, temporality)
    elif kind is Kind.GAUGE:
        data = Gauge(numbers)
    else:
        data = Sum(numbers, temporality, is_monotonic=kind is Kind.COUNTER)
    return Metric(name, description, unit, data)


def _histogram(attributes: Attributes, start_ns: int, now_ns: int, histogram: Histogram) -> HistogramDataPoint:
    return HistogramDataPoint(
        attributes=attributes,
        start_time_unix_nano=start_ns,
        time_unix_nano=now_ns,
        count=histogram.observations,
        sum=histogram.sum_ns / 1e9,
        bucket_counts=histogram.buckets,
        explicit_bounds=BOUNDS_S,
        # OTLP makes both optional, and the kernel keeps neither; None leaves them out.
        min=None,  # type: ignore[arg-type]
        max=None,  # type: ignore[arg-type]
    )
