# ruff: noqa: TID251 - the SDK's classes are what is made, its encoders are the oracle
"""Log records and spans of every kind of connection, with every name and value spelt out, and through OTLP and back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
from opentelemetry._logs import SeverityNumber  # noqa: PLC2701 - logs are not stable yet
from opentelemetry.exporter.otlp.proto.common._log_encoder import encode_logs  # noqa: PLC2701 - as above
from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans
from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceRequest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.resources import Resource
from opentelemetry.trace import SpanKind, StatusCode

from otel_lb_hop import __version__, semconv
from otel_lb_hop.core.hops import resolve
from otel_lb_hop.core.ids import mix, rejection_threshold
from otel_lb_hop.core.layout import Verdict
from otel_lb_hop.core.topology import Topology
from otel_lb_hop.export.records import RecordBuilder
from otel_lb_hop.model import pack_address
from tests.unit.samples import LOCAL, NODE, REMOTE, SECOND, backend, cluster, record, vip_port

if TYPE_CHECKING:
    from collections.abc import Iterable

    from opentelemetry.proto.common.v1.common_pb2 import KeyValue
    from opentelemetry.sdk._logs import ReadableLogRecord
    from opentelemetry.sdk.trace import ReadableSpan
    from opentelemetry.trace import SpanContext

    from otel_lb_hop.core.hops import Connection
    from otel_lb_hop.core.layout import Record

OFFSET = 1_700_000_000 * SECOND
START = OFFSET + 5 * SECOND
OBSERVED = START + SECOND
TRACE_HIGH, TRACE_LOW = 0x0123456789ABCDEF, 0xFEDCBA9876543210
TRACE_ID = TRACE_HIGH << 64 | TRACE_LOW
SPAN_ID = mix(TRACE_HIGH ^ TRACE_LOW)
RATIO_STATE, KEPT_STATE = "th:c", "th:0"
BUILDER = RecordBuilder(Resource({"service.name": "x"}, "https://schema"), NODE, rejection_threshold(0.25))

ALWAYS = {
    "k8s.namespace.name": "default",
    "k8s.service.name": "web",
    "server.address": "10.0.10.0",
    "server.port": 80,
    "network.transport": "tcp",
    "network.type": "ipv4",
    "lb_hop.external_traffic_policy": "Cluster",
    "k8s.node.name": "node1",
    "client.address": "192.0.2.7",
    "client.port": 40000,
    "lb_hop.origin": "external",
    "lb_hop.syn.retransmits": 0,
    "network.interface.name": "eth0",
}
TRANSLATED = ALWAYS | {
    "lb_hop.outcome": "forwarded",
    "source.address": "172.18.0.3",
    "source.port": 24048,
    "destination.address": "10.100.2.2",
    "destination.port": 8080,
    "lb_hop.forward.duration": 0.00003,
}
TO_NODE2 = TRANSLATED | {
    "lb_hop.hop": "avoidable",
    "destination.k8s.node.name": "node2",
    "destination.k8s.pod.name": "web-2",
    "destination.k8s.namespace.name": "default",
    "destination.cloud.availability_zone": "zone-b",
    "lb_hop.zone.crossed": True,
}
ARRIVED = "192.0.2.7:40000 to default/web at 10.0.10.0:80 came in on node1"
WENT = f"{ARRIVED} and went to 10.100.2.2:8080"


class Case(NamedTuple):
    """A kernel record and what has to come of it; `status` is the span's description of an error."""

    record: Record
    attributes: dict[str, Any]
    body: str
    event: str = "lb_hop.connection.forwarded"
    status: str | None = None
    span_events: tuple[str, ...] = ("translated", "syn_ack")


CASES = {
    "answered, avoidable hop": Case(
        record(),
        TO_NODE2 | {"lb_hop.handshake.duration": 0.002},
        f"{WENT} (web-2) on node2, avoidable hop, answered after 2.000 ms",
    ),
    "answered on this node, from inside, SYN sent twice": Case(
        record(backend=LOCAL.address, hop_id=2, origin=0, retransmits=1),
        TRANSLATED
        | {
            "destination.address": "10.100.1.2",
            "lb_hop.hop": "none",
            "destination.k8s.node.name": "node1",
            "destination.k8s.pod.name": "web-1",
            "destination.k8s.namespace.name": "default",
            "destination.cloud.availability_zone": "zone-a",
            "lb_hop.zone.crossed": False,
            "lb_hop.handshake.duration": 0.002,
            "lb_hop.origin": "internal",
            "lb_hop.syn.retransmits": 1,
        },
        f"{ARRIVED} and went to 10.100.1.2:8080 (web-1) on this node, answered after 2.000 ms",
    ),
    "refused by the backend": Case(
        record(Verdict.REFUSED),
        TO_NODE2 | {"error.type": "refused"},
        f"{WENT} (web-2) on node2, avoidable hop: refused",
        "lb_hop.connection.failed",
        "refused",
        ("translated",),
    ),
    "timed out": Case(
        record(Verdict.TIMEOUT, retransmits=2),
        TO_NODE2 | {"error.type": "timeout", "lb_hop.syn.retransmits": 2},
        f"{WENT} (web-2) on node2, avoidable hop: timeout",
        "lb_hop.connection.failed",
        "timeout",
        ("translated",),
    ),
    "reply unseen": Case(
        record(Verdict.REPLY_UNSEEN),
        TO_NODE2,
        f"{WENT} (web-2) on node2, avoidable hop; its answer took another way",
        span_events=("translated",),
    ),
    "dropped": Case(
        record(Verdict.DROPPED),
        ALWAYS | {"lb_hop.outcome": "dropped", "error.type": "dropped"},
        f"{ARRIVED} and was not forwarded: dropped",
        "lb_hop.connection.unforwarded",
        "dropped",
        (),
    ),
    "no endpoints": Case(
        record(Verdict.NO_ENDPOINTS),
        ALWAYS | {"lb_hop.outcome": "no_endpoints", "error.type": "no_endpoints"},
        f"{ARRIVED} and was not forwarded: no_endpoints",
        "lb_hop.connection.unforwarded",
        "no_endpoints",
        (),
    ),
    "no local endpoints": Case(
        record(Verdict.NO_LOCAL_ENDPOINTS),
        ALWAYS | {"lb_hop.outcome": "no_local_endpoints", "error.type": "no_local_endpoints"},
        f"{ARRIVED} and was not forwarded: no_local_endpoints",
        "lb_hop.connection.unforwarded",
        "no_local_endpoints",
        (),
    ),
    "answered, translation not seen": Case(
        record(forward_ns=0, hop_id=1),
        ALWAYS | {"lb_hop.outcome": "forwarded", "lb_hop.hop": "unknown", "lb_hop.handshake.duration": 0.002},
        f"{ARRIVED} and was answered by a backend that was not seen",
        span_events=("syn_ack",),
    ),
    "backend not in the topology, interface gone": Case(
        record(backend=pack_address("10.100.9.9"), hop_id=1, in_ifindex=77),
        {name: value for name, value in TRANSLATED.items() if name != "network.interface.name"}
        | {"destination.address": "10.100.9.9", "lb_hop.hop": "unknown", "lb_hop.handshake.duration": 0.002},
        f"{ARRIVED} and went to 10.100.9.9:8080 on an unknown node, answered after 2.000 ms",
    ),
    "backend without pod and zone": Case(
        record(backend=pack_address("10.100.3.2"), hop_id=4),
        TRANSLATED
        | {
            "destination.address": "10.100.3.2",
            "lb_hop.hop": "avoidable",
            "destination.k8s.node.name": "node3",
            "lb_hop.handshake.duration": 0.002,
        },
        f"{ARRIVED} and went to 10.100.3.2:8080 on node3, avoidable hop, answered after 2.000 ms",
    ),
}
GOOD = [name for name, case in CASES.items() if case.status is None]


def told(kernel_record: Record) -> Connection:
    """Resolve a record with VIP port 1: a backend here (row 2), on node2 in another zone (3), on node3 (4)."""
    topology = Topology(NODE)
    topology.replace(cluster(vip_port(LOCAL, REMOTE, backend("10.100.3.2", "node3")), node1="zone-a"), OFFSET)
    connection = resolve(kernel_record, topology, OFFSET, {2: "eth0", 3: "veth1"}.get)
    assert connection is not None
    return connection


def log_of(case: Case) -> ReadableLogRecord:
    """Make the log record of a case."""
    return BUILDER.log_record(told(case.record), OBSERVED)


def span_of(case: Case) -> ReadableSpan:
    """Make the span of a case."""
    return BUILDER.span(told(case.record))


def context_of(span: ReadableSpan) -> SpanContext:
    """Take the context of a span."""
    context = span.get_span_context()
    assert context is not None
    return context


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    """Go through all kinds of connections."""
    return CASES[request.param]


def test_attributes(case: Case) -> None:
    """Log record and span have the same attributes, all that is known and nothing that is not."""
    assert dict(log_of(case).log_record.attributes or {}) == case.attributes
    assert dict(span_of(case).attributes or {}) == case.attributes


def test_nothing_is_empty(case: Case) -> None:
    """What is not known is left out: no None, no empty text, and every name is in semconv."""
    names = {value for name, value in vars(semconv).items() if name.isupper()}
    for name, value in (log_of(case).log_record.attributes or {}).items():
        assert name in names
        assert value not in {None, "", "None", "unknown"} or name == "lb_hop.hop"


def test_log_record(case: Case) -> None:
    """A log record has its event name, severity, sentence, times and the ids of the span."""
    log = log_of(case).log_record
    bad = case.status is not None
    assert (log.event_name, log.body) == (case.event, case.body)
    assert (log.severity_text, log.severity_number) == (
        ("WARN", SeverityNumber.WARN) if bad else ("INFO", SeverityNumber.INFO)
    )
    assert (log.timestamp, log.observed_timestamp) == (START, OBSERVED)
    assert (log.trace_id, log.span_id, log.trace_flags) == (TRACE_ID, SPAN_ID, 3)


def test_span(case: Case) -> None:
    """A span runs from the first packet to the verdict, with its events, and is an error if the connection was lost."""
    span = span_of(case)
    assert (span.name, span.kind, span.parent) == ("lb_hop default/web", SpanKind.SERVER, None)
    assert (span.start_time, span.end_time) == (START, START + 2_000_000)
    times = {"translated": START + 30_000, "syn_ack": START + 2_000_000}
    assert [(event.name, event.timestamp) for event in span.events] == [
        (each, times[each]) for each in case.span_events
    ]
    wanted = StatusCode.ERROR if case.status else StatusCode.UNSET
    assert (span.status.status_code, span.status.description) == (wanted, case.status)


def test_span_context(case: Case) -> None:
    """Ids are the kernel's; flags say sampled and random; failures are kept whatever the ratio, and say so."""
    context = context_of(span_of(case))
    assert (context.trace_id, context.span_id, context.trace_flags, context.is_remote) == (TRACE_ID, SPAN_ID, 3, False)
    assert dict(context.trace_state) == {"ot": KEPT_STATE if case.status else RATIO_STATE}
    assert context.is_valid


def test_resource_and_scope(case: Case) -> None:
    """Both signals name the resource and the scope with its version and schema."""
    log, span = log_of(case), span_of(case)
    assert log.resource is span.resource
    assert log.instrumentation_scope == span.instrumentation_scope
    scope = span.instrumentation_scope
    assert scope is not None
    assert (scope.name, scope.version, scope.schema_url) == ("otel_lb_hop", __version__, semconv.SCHEMA_URL)


def decoded(attributes: Iterable[KeyValue]) -> dict[str, Any]:
    """Read OTLP attributes back, each once, with the type that they were sent as."""
    pairs = [(each.key, getattr(each.value, each.value.WhichOneof("value") or "")) for each in attributes]
    assert len(dict(pairs)) == len(pairs)
    return dict(pairs)


def test_log_through_otlp(case: Case) -> None:
    """What the official encoder writes decodes to equal values of equal types."""
    request = ExportLogsServiceRequest.FromString(encode_logs([log_of(case)]).SerializeToString())
    (resource,) = request.resource_logs
    (scope,) = resource.scope_logs
    (log,) = scope.log_records
    assert decoded(log.attributes) == case.attributes
    assert {name: type(value) for name, value in decoded(log.attributes).items()} == {
        name: type(value) for name, value in case.attributes.items()
    }
    assert (log.event_name, log.body.string_value) == (case.event, case.body)
    assert (log.time_unix_nano, log.observed_time_unix_nano) == (START, OBSERVED)
    assert (log.severity_text, log.severity_number) == (("WARN", 13) if case.status else ("INFO", 9))
    assert (log.trace_id, log.span_id) == (TRACE_ID.to_bytes(16, "big"), SPAN_ID.to_bytes(8, "big"))
    assert (log.flags, log.dropped_attributes_count) == (3, 0)
    assert (scope.scope.name, scope.scope.version, scope.schema_url) == (
        "otel_lb_hop", __version__, semconv.SCHEMA_URL,
    )  # fmt: skip
    assert (decoded(resource.resource.attributes), resource.schema_url) == ({"service.name": "x"}, "https://schema")


def test_span_through_otlp(case: Case) -> None:
    """What the official encoder writes decodes to equal values, with tracestate, events and status."""
    request = ExportTraceServiceRequest.FromString(encode_spans([span_of(case)]).SerializeToString())
    (span,) = request.resource_spans[0].scope_spans[0].spans
    assert decoded(span.attributes) == case.attributes
    assert (span.trace_id, span.span_id) == (TRACE_ID.to_bytes(16, "big"), SPAN_ID.to_bytes(8, "big"))
    assert (span.parent_span_id, span.trace_state) == (b"", f"ot={KEPT_STATE if case.status else RATIO_STATE}")
    assert (span.start_time_unix_nano, span.end_time_unix_nano) == (START, START + 2_000_000)
    assert tuple(event.name for event in span.events) == case.span_events
    assert (span.status.code, span.status.message) == ((2, case.status) if case.status else (0, ""))
    assert (span.name, span.kind) == ("lb_hop default/web", 2)


def test_ipv6() -> None:
    """IPv6 addresses are written as people do, with brackets before a port in the sentence."""
    topology = Topology(NODE)
    topology.replace(cluster(vip_port(backend("fd00:100::2", "node2"), address="fd00:10::1", port=443)), OFFSET)
    ends = {"client": "2001:db8::7", "snat": "fd00:18::3", "backend": "fd00:100::2"}
    changes: dict[str, Any] = {name: pack_address(address) for name, address in ends.items()}
    connection = resolve(record(**changes, hop_id=2), topology, OFFSET, {2: "eth0"}.get)
    assert connection is not None
    log = BUILDER.log_record(connection, OBSERVED).log_record
    assert log.body == (
        "[2001:db8::7]:40000 to default/web at [fd00:10::1]:443 came in on node1"
        " and went to [fd00:100::2]:8080 on node2, required hop, answered after 2.000 ms"
    )
    got = dict(log.attributes or {})
    names = ("client.address", "server.address", "source.address", "destination.address", "network.type")
    assert [got[name] for name in names] == ["2001:db8::7", "fd00:10::1", "fd00:18::3", "fd00:100::2", "ipv6"]


@pytest.mark.parametrize(("ratio", "state"), [(1.0, "th:0"), (0.5, "th:8"), (0.1, "th:e6666666666666")])
@pytest.mark.parametrize("name", GOOD)
def test_tracestate_tells_the_ratio(name: str, ratio: float, state: str) -> None:
    """Good connections carry the threshold that they passed, so that a reader can count up."""
    builder = RecordBuilder(Resource({}), NODE, rejection_threshold(ratio))
    context = context_of(builder.span(told(CASES[name].record)))
    assert dict(context.trace_state) == {"ot": state}
