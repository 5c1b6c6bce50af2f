"""The points of metrics: what passes from those who make them to those who bound, subtract and encode them."""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

from otel_lb_hop.core.layout import BOUNDS_NS, Histogram
from otel_lb_hop.export.attributes import Labels

if TYPE_CHECKING:
    from collections.abc import Iterable

BOUNDS_S = tuple(bound / 1e9 for bound in BOUNDS_NS)


class Kind(Enum):
    """How points of a metric behave. Sums and histograms are made cumulative."""

    COUNTER = "counter"
    UP_DOWN = "up_down"
    """A sum that may fall."""
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


class Instrument(NamedTuple):
    """Kind, name, unit and description of one metric."""

    kind: Kind
    name: str
    unit: str
    description: str


Point: TypeAlias = tuple[Labels, Labels, int, int | float | Histogram]
"""One series: the labels that its row has on all metrics, those beyond, start time in ns, value; its time is the
snapshot's."""


class Metric(NamedTuple):
    """A metric and its points, which may come only once."""

    instrument: Instrument
    points: Iterable[Point]
    delta: bool = False
    """Whether the points say what was counted since the point before."""
