"""The resource: who speaks. `OTEL_RESOURCE_ATTRIBUTES` and `OTEL_SERVICE_NAME` win over what is found here."""

from __future__ import annotations

import uuid
from typing import TYPE_CHECKING

from opentelemetry.sdk.resources import OTELResourceDetector, Resource

from otel_lb_hop import __version__, semconv

if TYPE_CHECKING:
    from opentelemetry.util.types import AttributeValue


def make_resource(node_name: str, host_name: str, zone: str | None, region: str | None) -> Resource:
    """Describe this agent.

    The instance id is the same after a restart on the same node, so that its series go on with a new start time.
    """
    attributes: dict[str, AttributeValue] = {
        semconv.RESOURCE_SERVICE_NAME: semconv.SERVICE_NAME,
        semconv.RESOURCE_SERVICE_VERSION: __version__,
        semconv.RESOURCE_SERVICE_INSTANCE_ID: str(uuid.uuid5(uuid.NAMESPACE_DNS, f"{node_name}.otel-lb-hop")),
        semconv.K8S_NODE_NAME: node_name,
        semconv.RESOURCE_HOST_NAME: host_name,
    }
    if zone:
        attributes[semconv.RESOURCE_ZONE] = zone
    if region:
        attributes[semconv.RESOURCE_REGION] = region
    return Resource(attributes, semconv.SCHEMA_URL).merge(OTELResourceDetector().detect())
