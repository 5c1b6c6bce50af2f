# ruff: noqa: TID251 - the SDK's classes are what is made, its encoders are the oracle
"""Log records and spans of every kind of connection, with every name and value spelt out.

Both ways to make them are held to the same: the SDK's classes (`sdk_records`), whose encoders are the oracle, and our
own encoders (`records`), compared message by message.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry._logs import SeverityNumber  # noqa: PLC2701 - logs are not stable yet
from opentelemetry.exporter.otlp.proto.common._log_encoder import encode_logs  # noqa: PLC2701 - as above
from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans
from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceRequest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.resources import Resource
from opentelemetry.trace import SpanKind, StatusCode

from otel_lb_hop import __version__, semconv
from otel_lb_hop.core.hops import Courses, resolve, tell
from otel_lb_hop.core.ids import tracestate
from otel_lb_hop.core.layout import KIND, Kind, Record, Verdict
from otel_lb_hop.core.topology import Topology
from otel_lb_hop.export.record_content import CHUNK_RECORDS, Sampling
from otel_lb_hop.export.records import LogEncoder, SpanEncoder
from otel_lb_hop.export.sdk_records import SdkEncoder, SdkRecords
from otel_lb_hop.model import Policy, Transport, pack_address
from tests.unit.samples import LOCAL, NODE, REMOTE, SECOND, backend, cluster, record, vip_port

if TYPE_CHECKING:
    from collections.abc import Iterable

    from opentelemetry.proto.common.v1.common_pb2 import KeyValue
    from opentelemetry.proto.trace.v1.trace_pb2 import Span as OtlpSpan
    from opentelemetry.sdk._logs import ReadableLogRecord
    from opentelemetry.sdk.trace import ReadableSpan
    from opentelemetry.trace import SpanContext

    from otel_lb_hop.core.hops import Connection, Course
    from otel_lb_hop.export.delivery import Chunk

OFFSET = 1_700_000_000 * SECOND
START = OFFSET + 5 * SECOND
OBSERVED = START + SECOND
TRACE_ID = 0x0123456789ABCDEFFEDCBA9876543210
SPAN_ID = 0xFEDCBA9876543210
RATIO_STATE, KEPT_STATE = "th:c", "th:0"
QUARTER = Sampling.make(0.25)
RESOURCE = Resource({"service.name": "x"}, semconv.SCHEMA_URL)
BUILDER = SdkRecords(RESOURCE, NODE, QUARTER)

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
        record(forward_ns=0, hop_id=1, translated=0),
        ALWAYS | {"lb_hop.outcome": "forwarded", "lb_hop.hop": "unknown", "lb_hop.handshake.duration": 0.002},
        f"{ARRIVED} and went to a backend that was not seen, answered after 2.000 ms",
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


def known() -> Topology:
    """Know VIP port 1: a backend here (row 2), on node2 in another zone (3), on node3 (4)."""
    topology = Topology(NODE)
    topology.replace(cluster(vip_port(LOCAL, REMOTE, backend("10.100.3.2", "node3")), node1="zone-a"), OFFSET)
    return topology


def told(kernel_record: Record, topology: Topology | None = None) -> Connection:
    """Resolve a record."""
    course = resolve(kernel_record.kind, topology or known(), {2: "eth0"}.get)
    assert course is not None
    return tell(kernel_record, course, OFFSET)


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
    sampled = {} if case.status else {"sampling.threshold": "c"}
    assert dict(log_of(case).log_record.attributes or {}) == case.attributes | sampled
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
    wanted = case.attributes | ({} if case.status else {"sampling.threshold": "c"})
    assert decoded(log.attributes) == wanted
    assert {name: type(value) for name, value in decoded(log.attributes).items()} == {
        name: type(value) for name, value in wanted.items()
    }
    assert (log.event_name, log.body.string_value) == (case.event, case.body)
    assert (log.time_unix_nano, log.observed_time_unix_nano) == (START, OBSERVED)
    assert (log.severity_text, log.severity_number) == (("WARN", 13) if case.status else ("INFO", 9))
    assert (log.trace_id, log.span_id) == (TRACE_ID.to_bytes(16, "big"), SPAN_ID.to_bytes(8, "big"))
    assert (log.flags, log.dropped_attributes_count) == (3, 0)
    assert (scope.scope.name, scope.scope.version, scope.schema_url) == (
        "otel_lb_hop", __version__, semconv.SCHEMA_URL,
    )  # fmt: skip
    assert (decoded(resource.resource.attributes), resource.schema_url) == ({"service.name": "x"}, semconv.SCHEMA_URL)


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
    kernel_record = record(**changes, hop_id=2)
    log = BUILDER.log_record(told(kernel_record, topology), OBSERVED).log_record
    assert log.body == (
        "[2001:db8::7]:40000 to default/web at [fd00:10::1]:443 came in on node1"
        " and went to [fd00:100::2]:8080 on node2, required hop, answered after 2.000 ms"
    )
    assert_same([kernel_record], topology, QUARTER)
    got = dict(log.attributes or {})
    names = ("client.address", "server.address", "source.address", "destination.address", "network.type")
    assert [got[name] for name in names] == ["2001:db8::7", "fd00:10::1", "fd00:18::3", "fd00:100::2", "ipv6"]


@pytest.mark.parametrize(("ratio", "state"), [(1.0, "th:0"), (0.5, "th:8"), (0.1, "th:e6666666666666")])
@pytest.mark.parametrize("name", GOOD)
def test_tracestate_tells_the_ratio(name: str, ratio: float, state: str) -> None:
    """Good connections carry the threshold that they passed, so that a reader can count up."""
    builder = SdkRecords(Resource({}), NODE, Sampling.make(ratio))
    context = context_of(builder.span(told(CASES[name].record)))
    assert dict(context.trace_state) == {"ot": state}


def assert_same(records: list[Record], topology: Topology, sampling: Sampling) -> None:
    """Hold our encoders to what the SDK's way makes of the same records."""
    known_courses = Courses(topology)
    known_courses.name_interfaces({2: "eth0", 3: "veth1"})
    courses = known_courses.of(records)
    builder = SdkRecords(RESOURCE, NODE, sampling)
    connections = [tell(each, course, OFFSET) for each, course in zip(records, courses, strict=True) if course]
    logs = encode_logs([builder.log_record(each, OBSERVED) for each in connections])
    spans = encode_spans([builder.span(each) for each in connections])
    for span in (span for each in spans.resource_spans for scope in each.scope_spans for span in scope.spans):
        # trace.proto wants W3C's flags in the low eight bits; the SDK's encoder leaves them out, and has them in logs.
        span.flags |= 3
    log_encoder, span_encoder = LogEncoder(RESOURCE, NODE, sampling), SpanEncoder(RESOURCE, NODE, sampling)
    log_chunks, span_chunks = [], []
    middle = len(records) // 2
    for part in (slice(middle), slice(middle, None)):
        log_chunks += log_encoder.encode(records[part], courses[part], OFFSET, OBSERVED)
        span_chunks += span_encoder.encode(records[part], courses[part], OFFSET, OBSERVED)
    assert ExportLogsServiceRequest.FromString(request_of(log_chunks)) == logs
    assert ExportTraceServiceRequest.FromString(request_of(span_chunks)) == spans
    for chunks in (log_chunks, span_chunks):
        assert sum(chunk.items for chunk in chunks) == len(connections)
        assert all(chunk.size_bytes == len(chunk.payload) for chunk in chunks)


def request_of(chunks: list[Chunk]) -> bytes:
    """Put chunks into one request, as a sink does."""
    return bytes(chunks[0].group.wrap([chunk.payload for chunk in chunks])) if chunks else b""


@pytest.mark.parametrize("ratio", [1.0, 0.25])
def test_our_encoders_say_what_the_sdk_says(ratio: float) -> None:
    """All kinds of connections in one batch: both signals decode to equal messages."""
    assert_same([case.record for case in CASES.values()], known(), Sampling.make(ratio))


def test_records_without_a_course_are_left_out() -> None:
    """What is not known of is not told, and the rest of the batch is."""
    assert_same([record(vip_id=99), record(), record(vip_id=98)], known(), QUARTER)
    assert_same([record(vip_id=99)], known(), QUARTER)


def test_a_chunk_is_bounded() -> None:
    """A large batch comes as several chunks, in order."""
    records = [record(client_port=port) for port in range(2 * CHUNK_RECORDS + 23)]
    courses: list[Course | None] = [told(records[0]).course] * len(records)
    chunks = LogEncoder(RESOURCE, NODE, QUARTER).encode(records, courses, OFFSET, OBSERVED)
    assert [chunk.items for chunk in chunks] == [CHUNK_RECORDS, CHUNK_RECORDS, 23]
    logs = ExportLogsServiceRequest.FromString(request_of(chunks)).resource_logs[0].scope_logs[0].log_records
    assert [decoded(log.attributes)["client.port"] for log in logs] == list(range(len(records)))


def test_many_clients() -> None:
    """More addresses than are remembered come out right all the same."""
    encoder = LogEncoder(RESOURCE, NODE, QUARTER)
    course = told(record()).course
    for number in range(20_000):
        client = pack_address(f"10.9.{number >> 8}.{number & 255}")
        (chunk,) = encoder.encode([record(client=client)], [course], OFFSET, OBSERVED)
        assert f"10.9.{number >> 8}.{number & 255}:40000 to".encode() in chunk.payload
    assert len(encoder._clients.known) <= 4_096


@pytest.mark.parametrize(
    ("kernel", "own", "kept"), [(1.0, 0.5, 500), (0.25, 0.5, 1000), (1.0, 0.0, 0), (1.0, 1.0, 1000)]
)
def test_spans_sampled_more_thinly(kernel: float, own: float, kept: int) -> None:
    """A ratio of the signal's own keeps whole traces and all failures; what it leaves out is counted, in both ways."""
    sampling = Sampling.make(kernel, own)
    ids = [number * 2**56 // 1000 for number in range(1000)]
    good = [record(trace_id=b"x" * 9 + each.to_bytes(7)) for each in ids]
    bad = [record(Verdict.REFUSED, trace_id=b"x" * 16)] * 23
    courses: list[Course | None] = [told(each).course for each in (good[0], bad[0])]
    courses = courses[:1] * 1000 + [None] + courses[1:] * 23
    batch = [*good, record(vip_id=99), *bad]
    ours, sdk = (
        SpanEncoder(RESOURCE, NODE, sampling),
        SdkEncoder("traces", SdkRecords(RESOURCE, NODE, sampling)),
    )
    if kernel < 1.0:
        courses, batch = courses[750:], batch[750:]  # what the kernel let through
        kept = 250
    for encoder in (ours, sdk):
        chunks = encoder.encode(batch, courses, OFFSET, OBSERVED)
        assert sum(chunk.items for chunk in chunks) == encoder.encoded == kept + 23
        assert encoder.not_sampled == len(batch) - 24 - kept
    states = {span.trace_state for span in spans_of(ours.encode(batch, courses, OFFSET, OBSERVED))}
    assert states <= {"ot=th:0", f"ot={tracestate(sampling.threshold)}"}


def spans_of(chunks: list[Chunk]) -> list[OtlpSpan]:
    """Read spans back."""
    return list(ExportTraceServiceRequest.FromString(request_of(chunks)).resource_spans[0].scope_spans[0].spans)


ADDRESSES = st.one_of(
    st.binary(min_size=16, max_size=16), st.binary(min_size=4, max_size=4).map((bytes(10) + b"\xff\xff").__add__)
)
PORTS = st.integers(0, 65_535)
TIMES = st.integers(0, 2**62)
NAMES = st.text(st.characters(exclude_categories=["Cs"]), max_size=300)


@st.composite
def worlds(draw: st.DrawFn) -> tuple[Topology, list[Record]]:
    """Draw a topology with names of any length in any script, and records of anything."""
    address = draw(ADDRESSES)
    backends = [
        replace(
            backend("10.100.1.2", draw(st.sampled_from([None, NODE, "node2", "node3"]))),
            address=end,
            port=port,
            pod=draw(NAMES) or None,
            pod_namespace=draw(NAMES) or None,
            zone=draw(NAMES) or None,
        )
        for end, port in draw(st.lists(st.tuples(ADDRESSES, PORTS), max_size=3))
    ]
    served = replace(
        vip_port(*backends),
        namespace=draw(NAMES),
        service=draw(NAMES),
        address=address,
        port=draw(PORTS),
        transport=draw(st.sampled_from(Transport)),
        policy=draw(st.sampled_from(Policy)),
    )
    topology = Topology(NODE)
    topology.replace(cluster(served, **draw(st.sampled_from([{}, {"node1": "zone-a"}]))), OFFSET)
    ends = st.sampled_from([(each.address, each.port) for each in backends]) if backends else st.nothing()
    kinds = []
    for _ in range(draw(st.integers(1, 3))):
        verdict = draw(st.sampled_from(Verdict))
        translated = verdict < Verdict.DROPPED and (verdict is Verdict.TRANSLATED or draw(st.booleans()))
        end, port = draw(ends | st.tuples(ADDRESSES, PORTS)) if translated else (bytes(16), 0)
        kinds.append(
            Kind(
                backend=end,
                backend_port=port.to_bytes(2, "big"),
                verdict=verdict,
                origin=draw(st.sampled_from([0, 1, 1, 2])),
                vip_id=draw(st.sampled_from([1, 1, 1, 7])),
                hop_id=draw(st.integers(1, 5)),
                in_ifindex=draw(st.integers(0, 3)),
                translated=int(translated),
            )
        )
    # Far more connections than kinds, as it is: what is made once for all of a kind serves each of them.
    records = [draw(records_of(kind)) for kind in draw(st.lists(st.sampled_from(kinds), max_size=12))]
    return topology, records


@st.composite
def records_of(draw: st.DrawFn, kind: Kind) -> Record:
    """Draw a connection of a kind; a clock that two CPUs read may run backwards."""
    syn_ns, translated = draw(TIMES), bool(kind.translated)
    return Record(
        syn_ns=syn_ns,
        forward_ns=max(0, syn_ns + draw(st.integers(-1_000, 10**12))) if translated else 0,
        end_ns=max(0, syn_ns + draw(st.integers(-1_000, 10**12))),
        trace_id=draw(st.binary(min_size=16, max_size=16).filter(lambda each: any(each[:8]) and any(each[8:]))),
        client=draw(ADDRESSES),
        snat=draw(ADDRESSES) if translated else bytes(16),
        client_port=draw(PORTS),
        snat_port=draw(PORTS) if translated else 0,
        retransmits=draw(st.integers(0, 2**16 - 1)),
        kind=KIND.pack(*kind),
    )


@pytest.mark.parametrize("port", [0, 1, 127, 128, 255, 256, 16_383, 16_384, 65_535])
def test_ports_of_every_length(port: int) -> None:
    """A port is written as the SDK writes it, however many bytes it takes."""
    records = [case.record for case in CASES.values()]
    changed = [each._replace(client_port=port, snat_port=port) for each in records]
    assert_same(changed, known(), Sampling.make(1.0))


@given(worlds(), st.floats(0, 1))
def test_any_record_is_what_the_sdk_says(world: tuple[Topology, list[Record]], ratio: float) -> None:
    """Whatever the kernel tells and however things are called: both signals are what the SDK's way makes of it."""
    topology, records = world
    assert_same(records, topology, Sampling.make(ratio))
