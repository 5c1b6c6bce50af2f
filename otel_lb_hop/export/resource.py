"""The resource: who speaks. `OTEL_RESOURCE_ATTRIBUTES` and `OTEL_SERVICE_NAME` win over what is found here."""

from __future__ import annotations

import uuid
from typing import NamedTuple

from opentelemetry.sdk.resources import OTELResourceDetector, Resource

from otel_lb_hop import __version__, semconv
from otel_lb_hop.export.wire import Envelope


class Identity(NamedTuple):
    """What the agent knows of itself and its place; None where it does not."""

    node_name: str
    host_name: str
    node_uid: str | None = None
    zone: str | None = None
    region: str | None = None
    cluster_uid: str | None = None
    pod_namespace: str | None = None
    pod_name: str | None = None
    pod_uid: str | None = None


def make_resource(identity: Identity) -> Resource:
    """Describe this agent.

    The instance id is the same after a restart on the same node, so that its series go on with a new start time.
    """
    attributes = {
        semconv.RESOURCE_SERVICE_NAME: semconv.SERVICE_NAME,
        semconv.RESOURCE_SERVICE_VERSION: __version__,
        semconv.RESOURCE_SERVICE_INSTANCE_ID: str(uuid.uuid5(uuid.NAMESPACE_DNS, f"{identity.node_name}.otel-lb-hop")),
        semconv.K8S_NODE_NAME: identity.node_name,
        semconv.RESOURCE_NODE_UID: identity.node_uid,
        semconv.RESOURCE_CLUSTER_UID: identity.cluster_uid,
        semconv.K8S_NAMESPACE_NAME: identity.pod_namespace,
        semconv.RESOURCE_POD_NAME: identity.pod_name,
        semconv.RESOURCE_POD_UID: identity.pod_uid,
        semconv.RESOURCE_HOST_NAME: identity.host_name,
        semconv.RESOURCE_ZONE: identity.zone,
        semconv.RESOURCE_REGION: identity.region,
    }
    known = {name: value for name, value in attributes.items() if value}
    return Resource(known, semconv.SCHEMA_URL).merge(OTELResourceDetector().detect())


def make_envelope(
    resource: Resource, scope_name: str = semconv.SCOPE_NAME, scope_version: str = __version__
) -> Envelope:
    """Write the resource and a scope for OTLP. The attributes above and those of the detector are all plain values."""
    plain = {name: value for name, value in resource.attributes.items() if isinstance(value, str | bool | int | float)}
    return Envelope(plain, scope_name, scope_version, semconv.SCHEMA_URL)
