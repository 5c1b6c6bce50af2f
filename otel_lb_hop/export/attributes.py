"""From rows of the topology to attributes: the low-cardinality part that metrics and records share."""

from __future__ import annotations

from typing import TYPE_CHECKING

from otel_lb_hop import semconv
from otel_lb_hop.export import wire
from otel_lb_hop.model import format_address, is_ipv4

if TYPE_CHECKING:
    from collections.abc import Callable

    from otel_lb_hop.core.topology import HopRow, VipRow

Attributes = dict[str, str | int | float | bool]

NUMBER_ATTRIBUTES = 7
"""Field of a NumberDataPoint."""
HISTOGRAM_ATTRIBUTES = 9
"""Field of a HistogramDataPoint."""


def vip_attributes(vip: VipRow, node_name: str) -> Attributes:
    """Describe a VIP port and the intermediate node."""
    return {
        semconv.K8S_NAMESPACE_NAME: vip.namespace,
        semconv.K8S_SERVICE_NAME: vip.service,
        semconv.SERVER_ADDRESS: format_address(vip.address),
        semconv.SERVER_PORT: vip.port,
        semconv.NETWORK_TRANSPORT: vip.transport.name.lower(),
        semconv.NETWORK_TYPE: "ipv4" if is_ipv4(vip.address) else "ipv6",
        semconv.TRAFFIC_POLICY: vip.policy.value,
        semconv.K8S_NODE_NAME: node_name,
    }


def hop_attributes(row: HopRow) -> Attributes:
    """Describe a hop; what is not known is left out rather than made up."""
    attributes: Attributes = {semconv.HOP: row.hop.value}
    if row.node is not None:
        attributes[semconv.DESTINATION_NODE] = row.node
    if row.zone_crossed is not None:
        attributes[semconv.ZONE_CROSSED] = row.zone_crossed
    if row.zone is not None:
        attributes[semconv.DESTINATION_ZONE] = row.zone
    return attributes


class Labels:
    """Attributes of a metric's point, or the part of them that many points share.

    Kept as bytes, which are made once; the attributes themselves are told anew each time, so that a row of a large
    cluster is not in memory twice.
    """

    __slots__ = ("_histogram", "_of", "_tell", "identity", "number")

    def __init__(self, tell: Callable[..., Attributes], *of: object) -> None:
        self._tell = tell
        self._of = of
        self.number = wire.attributes(NUMBER_ATTRIBUTES, self.pairs)
        """As fields of a NumberDataPoint."""
        self.identity = self.number
        """What tells them from others: without attributes that may come later or change, if there are any."""
        self._histogram: bytes | None = None

    @property
    def pairs(self) -> Attributes:
        """The attributes by name."""
        return self._tell(*self._of)

    @property
    def histogram(self) -> bytes:
        """As fields of a HistogramDataPoint, of which most rows have none."""
        if self._histogram is None:
            self._histogram = wire.attributes(HISTOGRAM_ATTRIBUTES, self.pairs)
        return self._histogram
