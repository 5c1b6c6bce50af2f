"""What the demo makes of OTLP: figures, shares and sentences from points, without a lab."""

from __future__ import annotations

import pytest
from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceRequest  # noqa: TID251 - the far end
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import (  # noqa: TID251 - the far end
    ExportMetricsServiceRequest,
)

from otel_lb_hop.model import Hop, Origin
from tests.demo import otlp, report, show
from tests.demo.otlp import Point, Value

BOUNDS = (0.001, 0.002, 0.004)


def point(metric: str, node: str, value: float = 0, *, service: str = "web", **more: Value) -> Point:
    """Make a point of default/SERVICE; `more` has `_` for the dots of names."""
    policy = "Local" if service == "web-local" else "Cluster"
    transport = "udp" if service == "dns" else "tcp"
    attributes: dict[str, Value] = {
        "k8s.namespace.name": "default",
        "k8s.service.name": service,
        "k8s.node.name": node,
        "lb_hop.external_traffic_policy": policy,
        "network.transport": transport,
    }
    return Point(metric, attributes | {NAMES[name]: each for name, each in more.items()}, value)


NAMES = {
    "outcome": "lb_hop.outcome",
    "hop": "lb_hop.hop",
    "origin": "lb_hop.origin",
    "to": "destination.k8s.node.name",
    "crossed": "lb_hop.zone.crossed",
    "error": "error.type",
    "placement": "lb_hop.placement",
}


def forwarded(node: str, count: int, hop: str, to: str, *, origin: str = "external", service: str = "web") -> Point:
    """Make a point of connections that reached a backend; every node has a zone of its own."""
    return point(
        "lb_hop.connections",
        node,
        count,
        service=service,
        outcome="forwarded",
        hop=hop,
        to=to,
        crossed=node != to,
        origin=origin,
    )


def handshakes(node: str, hop: str, *buckets: int, service: str = "web") -> Point:
    """Make a histogram of handshake times."""
    return point("lb_hop.handshake.duration", node, service=service, hop=hop)._replace(buckets=buckets, bounds=BOUNDS)


def endpoints(node: str, local: int, service: str = "web") -> Point:
    """Make a gauge of endpoints on a node."""
    return point("lb_hop.endpoints", node, local, service=service, placement="local")


POINTS = [
    forwarded("node1", 60, "none", "node1"),
    forwarded("node1", 40, "avoidable", "node2"),
    forwarded("node2", 50, "required", "node1"),
    forwarded("node2", 50, "required", "node3"),
    forwarded("node2", 7, "required", "node1", origin="internal"),
    forwarded("node1", 30, "none", "node1", service="web-local"),
    point("lb_hop.connections", "node2", 10, service="web-local", outcome="no_local_endpoints", origin="external"),
    forwarded("node1", 5, "none", "node1", service="broken"),
    point("lb_hop.handshake.failures", "node1", 5, service="broken", hop="none", error="refused"),
    point("lb_hop.syn.retransmits", "node2", 10, service="web-local"),
    point("lb_hop.syn.retransmits", "node1", 0, service="web-local"),
    handshakes("node1", "none", 60, 0, 0, 0),
    handshakes("node1", "avoidable", 0, 40, 0, 0),
    handshakes("node2", "required", 0, 107, 0, 0),
    handshakes("node1", "none", 30, 0, 0, 0, service="web-local"),
    endpoints("node1", 1),
    endpoints("node2", 0),
    endpoints("node1", 1, "web-local"),
    endpoints("node2", 0, "web-local"),
]


ANSWERS = """\
default/web: ECMP is balanced: node1 50.0%, node2 50.0%; the busiest node has 1.00 times the even share.
default/web: 140 of 200 connections (70.0%) took an extra hop; 40 of them were avoidable (a ready backend \
was on the node they entered); 140 crossed a zone.
default/web: externalTrafficPolicy: Local would save 40 avoidable hops, and node2 would go dark: 100 \
connections (50.0%) came in there.
default/web-local: ECMP is NOT balanced: node1 75.0%, node2 25.0%; the busiest node has 1.50 times the even share.
default/web-local: none of 40 connections took an extra hop.
default/web-local: externalTrafficPolicy is Local, no endpoint is on node2: 10 of 40 connections (25.0%) were lost.
The median handshake takes 1.5 ms over a hop that is avoidable, 1 ms more than without a hop.
The median handshake takes 1.5 ms over a hop that is required, 1 ms more than without a hop.
default/broken: 5 connections lost: RST from the backend: nobody listens there."""


def test_counted_sums_over_nodes_and_outcomes_by_service_and_origin() -> None:
    """Whatever became of a connection, it counts once."""
    assert report.counted(POINTS) == {
        ("default/web", "external"): 200,
        ("default/web", "internal"): 7,
        ("default/web-local", "external"): 40,
        ("default/broken", "external"): 5,
    }


def test_intake_tells_where_it_came_in_and_where_it_went() -> None:
    """A row for each Service and node; what came from inside stands apart."""
    rows = {(row.service, row.node): row for row in report.intakes(POINTS)}
    web = rows["default/web", "node1"]
    assert (web.policy, web.total, web.forwarded, web.hopped, web.zone_crossed) == ("Cluster", 100, 100, 40, 40)
    assert web.to_node == {"node1": 60, "node2": 40}
    assert web.by_hop == {"none": 60, "avoidable": 40}
    local = rows["default/web-local", "node2"]
    assert (local.policy, local.total, local.forwarded, local.unforwarded) == (
        "Local",
        10,
        0,
        {"no_local_endpoints": 10},
    )
    assert [(row.node, row.total) for row in report.intakes(POINTS, Origin.INTERNAL)] == [("node2", 7)]


def test_delivered_counts_by_backend_node_whatever_the_origin() -> None:
    """Only the Services asked for."""
    assert report.delivered(POINTS, ["default/web"]) == {"node1": 117, "node2": 40, "node3": 50}


def test_serving_are_those_that_answered_and_those_whose_datagrams_were_forwarded() -> None:
    """A Service that only refuses serves nobody; nor does a UDP one that forwards nothing."""
    lost = point("lb_hop.connections", "node1", 3, service="dns", outcome="no_endpoints", origin="external")
    never = forwarded("node1", 0, "none", "node1", service="dns")
    assert report.serving([*POINTS, lost, never]) == ["default/web", "default/web-local"]
    dns = forwarded("node2", 4, "required", "node1", service="dns")
    assert report.serving([*POINTS, dns]) == ["default/dns", "default/web", "default/web-local"]


def test_losses_name_each_reason_once_and_leave_out_zeros() -> None:
    """Outcomes and failed handshakes in one list; a reason that never happened is no row."""
    never = point("lb_hop.handshake.failures", "node1", 0, hop="none", error="timeout")
    assert report.losses([*POINTS, never]) == [
        ("default/broken", "refused", {"node1": 5}),
        ("default/web-local", "no_local_endpoints", {"node2": 10}),
    ]


def test_retransmits_are_summed_by_service() -> None:
    """Over all nodes."""
    assert report.retransmits(POINTS) == {"default/web-local": 10}


def test_times_are_merged_over_nodes_and_services() -> None:
    """One row for each hop class that was measured; what was not measured is None, not zero."""
    rows = {row.hop: row for row in report.times(POINTS)}
    assert list(rows) == [Hop.NONE, Hop.AVOIDABLE, Hop.REQUIRED]
    assert rows[Hop.NONE].forward is None
    assert rows[Hop.NONE].handshake == pytest.approx((90, 0.0005, 0.00099))
    assert rows[Hop.AVOIDABLE].handshake == pytest.approx((40, 0.0015, 0.00199))


@pytest.mark.parametrize(
    ("q", "buckets", "expected"),
    [
        (0.5, (4, 0, 0, 0), 0.0005),
        (1.0, (4, 0, 0, 0), 0.001),
        (0.5, (2, 2, 0, 0), 0.001),
        (0.75, (2, 2, 0, 0), 0.0015),
        (0.5, (0, 0, 10, 0), 0.003),
        (0.5, (1, 0, 0, 1), 0.001),
        (0.99, (1, 0, 0, 99), 0.004),
        (0.0, (0, 4, 0, 0), 0.001),
    ],
)
def test_quantile_is_spread_evenly_within_its_bucket(q: float, buckets: tuple[int, ...], expected: float) -> None:
    """As histogram_quantile of PromQL; above the last bound it is that bound."""
    assert report.quantile(q, buckets, BOUNDS) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        (1.5, "1.5 s"),
        (0.9996, "1 s"),
        (0.0123, "12 ms"),
        (0.000999, "1 ms"),
        (42.6e-6, "43 \N{MICRO SIGN}s"),
        (8.5e-6, "8.5 \N{MICRO SIGN}s"),
    ],
)
def test_duration_has_two_digits_and_a_unit(seconds: float, expected: str) -> None:
    """What is rounded up to the next unit is written in it."""
    assert report.duration(seconds) == expected


def test_answers_are_one_sentence_for_each_question() -> None:
    """Balance, extra hops and policy for Services that answer; then the times; then what was lost."""
    assert "\n".join(report.answers(POINTS)) == ANSWERS


def test_nothing_arrived_is_an_empty_report() -> None:
    """No row and no sentence, and no division by zero."""
    assert report.answers([]) == []
    assert report.times([]) == []
    assert report.share(0, 0) == "-"


def test_points_are_decoded_from_protobuf() -> None:
    """Sums, gauges and histograms with attributes of every kind."""
    request = ExportMetricsServiceRequest()
    metrics = request.resource_metrics.add().scope_metrics.add().metrics
    number = metrics.add(name="a").sum.data_points.add(as_int=23)
    number.attributes.add(key="text").value.string_value = "x"
    number.attributes.add(key="flag").value.bool_value = True
    metrics.add(name="b").gauge.data_points.add(as_double=0.5)
    metrics.add(name="c").histogram.data_points.add(bucket_counts=[1, 2], explicit_bounds=[0.1])
    assert list(otlp.points(request)) == [
        ("a", {"text": "x", "flag": True}, 23, (), ()),
        ("b", {}, 0.5, (), ()),
        ("c", {}, 0, (1, 2), (0.1,)),
    ]


def test_a_record_stands_alone_as_otlp_json() -> None:
    """Ids in hex, 64 bit integers as text, enums as numbers; its resource and scope with it, its neighbours not."""
    request = ExportLogsServiceRequest()
    resource = request.resource_logs.add(schema_url="s")
    resource.resource.attributes.add(key="k8s.node.name").value.string_value = "node1"
    scope = resource.scope_logs.add()
    scope.scope.name = "otel_lb_hop"
    for number in (1, 2):
        log = scope.log_records.add(time_unix_nano=number, severity_number=9, event_name="lb_hop.connection.forwarded")
        log.trace_id, log.span_id = bytes([number] * 16), bytes([number] * 8)
        log.attributes.add(key="client.port").value.int_value = number
    second = list(otlp.records(request))[1]
    assert (second.attributes, second.trace_id, second.span_id) == ({"client.port": 2}, "02" * 16, "02" * 8)
    resource_json = {"attributes": [{"key": "k8s.node.name", "value": {"stringValue": "node1"}}]}
    log_json = {
        "timeUnixNano": "2",
        "severityNumber": 9,
        "eventName": "lb_hop.connection.forwarded",
        "traceId": "02" * 16,
        "spanId": "02" * 8,
        "attributes": [{"key": "client.port", "value": {"intValue": "2"}}],
    }
    scope_json = {"scope": {"name": "otel_lb_hop"}, "logRecords": [log_json]}
    assert otlp.to_json(second) == {
        "resourceLogs": [{"resource": resource_json, "scopeLogs": [scope_json], "schemaUrl": "s"}]
    }


def test_pretty_breaks_only_what_is_too_long_for_a_line() -> None:
    """What fits stays together."""
    long = "x" * 100
    expected = f'{{\n  "short": {{"a": [1, 2]}},\n  "long": [\n    "{long}",\n    null\n  ]\n}}'
    assert show.pretty({"short": {"a": [1, 2]}, "long": [long, None]}) == expected
