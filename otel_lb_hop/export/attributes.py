"""From rows of the topology to attributes: the low-cardinality part that metrics and records share."""

from __future__ import annotations

from typing import TYPE_CHECKING

from otel_lb_hop import semconv
from otel_lb_hop.model import format_address, is_ipv4

if TYPE_CHECKING:
    from otel_lb_hop.core.topology import HopRow, VipRow

Attributes = dict[str, str | int | float | bool]


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
    return attributes
