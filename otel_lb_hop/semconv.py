"""Every name that leaves this project, once: metrics, attributes, events. The contract of users and dashboards.

Names without the prefix `lb_hop.` are those of the OpenTelemetry semantic conventions 1.44
(https://opentelemetry.io/docs/specs/semconv/); `destination.k8s.*` follows the shape other flow agents use.
"""

from __future__ import annotations

SCHEMA_URL = "https://opentelemetry.io/schemas/1.44.0"
SCOPE_NAME = "otel_lb_hop"
SCOPE_NAME_AGENT = "otel_lb_hop.agent"
"""Of the agent's own log."""
SERVICE_NAME = "otel-lb-hop"

# Resource: https://opentelemetry.io/docs/specs/semconv/resource/
RESOURCE_SERVICE_NAME = "service.name"
RESOURCE_SERVICE_VERSION = "service.version"
RESOURCE_SERVICE_INSTANCE_ID = "service.instance.id"
RESOURCE_HOST_NAME = "host.name"
RESOURCE_NODE_UID = "k8s.node.uid"
RESOURCE_CLUSTER_UID = "k8s.cluster.uid"
RESOURCE_POD_NAME = "k8s.pod.name"
RESOURCE_POD_UID = "k8s.pod.uid"
RESOURCE_ZONE = "cloud.availability_zone"
RESOURCE_REGION = "cloud.region"

# The VIP port's attributes, on every point and record
K8S_NAMESPACE_NAME = "k8s.namespace.name"
K8S_SERVICE_NAME = "k8s.service.name"
K8S_NODE_NAME = "k8s.node.name"
SERVER_ADDRESS = "server.address"
SERVER_PORT = "server.port"
NETWORK_TRANSPORT = "network.transport"
NETWORK_TYPE = "network.type"
TRAFFIC_POLICY = "lb_hop.external_traffic_policy"

# What became of a connection
OUTCOME = "lb_hop.outcome"
HOP = "lb_hop.hop"
ORIGIN = "lb_hop.origin"
ZONE_CROSSED = "lb_hop.zone.crossed"
ERROR_TYPE = "error.type"
DESTINATION_NODE = "destination.k8s.node.name"

# Records only: never on metrics
CLIENT_ADDRESS = "client.address"
CLIENT_PORT = "client.port"
SOURCE_ADDRESS = "source.address"
SOURCE_PORT = "source.port"
DESTINATION_ADDRESS = "destination.address"
DESTINATION_PORT = "destination.port"
DESTINATION_POD = "destination.k8s.pod.name"
DESTINATION_NAMESPACE = "destination.k8s.namespace.name"
DESTINATION_ZONE = "destination.cloud.availability_zone"
NETWORK_INTERFACE_NAME = "network.interface.name"
FORWARD_DURATION_S = "lb_hop.forward.duration"
HANDSHAKE_DURATION_S = "lb_hop.handshake.duration"
SYN_RETRANSMITS = "lb_hop.syn.retransmits"
SAMPLING_THRESHOLD = "sampling.threshold"
"""As the Collector's probabilistic sampler writes it into log records, which have no tracestate."""

METRIC_OVERFLOW = "otel.metric.overflow"
"""On the point that sums the series for which there was no room, as the SDK's specification has it."""

# Self-telemetry
PLACEMENT = "lb_hop.placement"
REASON = "reason"
SIGNAL = "lb_hop.signal"
MAP = "lb_hop.map"
PART = "lb_hop.part"

CODE_FUNCTION_NAME = "code.function.name"
EXCEPTION_TYPE = "exception.type"
EXCEPTION_MESSAGE = "exception.message"
EXCEPTION_STACKTRACE = "exception.stacktrace"

EVENT_FORWARDED = "lb_hop.connection.forwarded"
EVENT_UNFORWARDED = "lb_hop.connection.unforwarded"
EVENT_FAILED = "lb_hop.connection.failed"
SPAN_EVENT_TRANSLATED = "translated"
SPAN_EVENT_SYN_ACK = "syn_ack"

METRIC_CONNECTIONS = "lb_hop.connections"
METRIC_CONNECTIONS_PENDING = "lb_hop.connections.pending"
METRIC_HANDSHAKE_FAILURES = "lb_hop.handshake.failures"
METRIC_REPLIES_UNSEEN = "lb_hop.replies.unseen"
METRIC_SYN_RETRANSMITS = "lb_hop.syn.retransmits"
METRIC_FORWARD_DURATION = "lb_hop.forward.duration"
METRIC_HANDSHAKE_DURATION = "lb_hop.handshake.duration"
METRIC_ENDPOINTS = "lb_hop.endpoints"
METRIC_VIP_PORTS = "lb_hop.vip.ports"
METRIC_CLUSTER_NODES = "lb_hop.cluster.nodes"
METRIC_EVENTS_DROPPED = "lb_hop.events.dropped"
METRIC_RECORDS_EXPORTED = "lb_hop.records.exported"
METRIC_RECORDS_DROPPED = "lb_hop.records.dropped"
METRIC_TOPOLOGY_AGE = "lb_hop.topology.age"
METRIC_MAP_USAGE = "lb_hop.map.usage"
METRIC_MAP_LIMIT = "lb_hop.map.limit"
METRIC_SERIES = "lb_hop.metric.series"
METRIC_SERIES_LIMIT = "lb_hop.metric.series.limit"
METRIC_SERIES_SUMMED = "lb_hop.metric.series.summed"
METRIC_PART_HEALTHY = "lb_hop.part.healthy"

# The ledger: records at each stage of their way; METRIC_RECORDS_EXPORTED and METRIC_RECORDS_DROPPED belong to it. And
# the same of data points, which are no records: nothing is lost with a snapshot that a newer one replaced.
STAGE = "lb_hop.stage"
EXPORTER = "lb_hop.exporter"
METRIC_RECORDS_SEEN = "lb_hop.records.seen"
METRIC_RECORDS_IN_FLIGHT = "lb_hop.records.in_flight"
METRIC_POINTS_SEEN = "lb_hop.data_points.seen"
METRIC_POINTS_EXPORTED = "lb_hop.data_points.exported"
METRIC_POINTS_DROPPED = "lb_hop.data_points.dropped"
METRIC_POINTS_IN_FLIGHT = "lb_hop.data_points.in_flight"

# The agent's process: https://opentelemetry.io/docs/specs/semconv/system/process-metrics/
CPU_MODE = "cpu.mode"
METRIC_PROCESS_CPU_TIME = "process.cpu.time"
METRIC_PROCESS_MEMORY_USAGE = "process.memory.usage"
