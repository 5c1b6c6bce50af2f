"""What leaves the agents, attribute by attribute, held against what the lab saw: 23 connections are 23."""

from __future__ import annotations

import socket
import time
from collections import Counter
from typing import TYPE_CHECKING, NamedTuple

import pytest

from otel_lb_hop import __version__
from tests.e2e import truth
from tests.e2e.collector import GRPC, HTTP, Collector
from tests.e2e.conftest import TARGET_PORT
from tests.e2e.otlp import CUMULATIVE, SPAN_KIND_SERVER, STATUS_UNSET, LogRecord, Series, Span
from tests.lab.agent import agents_on
from tests.lab.requirements import needs_lab
from tests.lab.waiting import wait_for

if TYPE_CHECKING:
    from otel_lb_hop.model import VipPort
    from tests.lab import Lab

pytestmark = [pytest.mark.root, pytest.mark.collector, needs_lab]

SENT = 23
VIPS = {
    "web over IPv4": "10.0.10.0",
    "web over IPv6": "fd00:10::1",
    "far over IPv4": "10.0.10.2",
    "far over IPv6": "fd00:10::3",
}
EVERY_VIP = pytest.mark.parametrize("vip", VIPS.values(), ids=VIPS.keys())
RESOURCE = {
    "k8s.namespace.name": "observability",
    "k8s.pod.name": "otel-lb-hop-x7k2p",
    "k8s.pod.uid": "0d9f3b64-3b4c-4b0e-9f0e-6a1d6a6f6f11",
    "k8s.node.uid": "7f1c0a52-9c1e-4b7d-8a55-0d7f6c2b9e01",
    "k8s.cluster.name": "lab",
    "k8s.cluster.uid": "c1a5c1a5-0000-4000-8000-000000000001",
    "deployment.environment.name": "test bench",
}
UNITS = {
    "lb_hop.connections": ("sum", "{connection}"),
    "lb_hop.connections.pending": ("gauge", "{connection}"),
    "lb_hop.syn.retransmits": ("sum", "{packet}"),
    "lb_hop.handshake.failures": ("sum", "{connection}"),
    "lb_hop.forward.duration": ("histogram", "s"),
    "lb_hop.handshake.duration": ("histogram", "s"),
    "lb_hop.endpoints": ("gauge", "{endpoint}"),
    "lb_hop.vip.ports": ("gauge", "{vip_port}"),
    "lb_hop.events.dropped": ("sum", "{event}"),
    "lb_hop.records.seen": ("sum", "{record}"),
    "lb_hop.records.exported": ("sum", "{record}"),
    "lb_hop.records.dropped": ("sum", "{record}"),
    "lb_hop.records.in_flight": ("gauge", "{record}"),
    "lb_hop.data_points.seen": ("sum", "{data_point}"),
    "lb_hop.data_points.exported": ("sum", "{data_point}"),
    "lb_hop.data_points.dropped": ("sum", "{data_point}"),
    "lb_hop.data_points.in_flight": ("gauge", "{data_point}"),
    "lb_hop.topology.age": ("gauge", "s"),
    "lb_hop.map.usage": ("gauge", "{entry}"),
    "lb_hop.map.limit": ("gauge", "{entry}"),
    "lb_hop.cluster.nodes": ("gauge", "{node}"),
    "lb_hop.metric.series": ("gauge", "{series}"),
    "lb_hop.metric.series.limit": ("gauge", "{series}"),
    "lb_hop.metric.series.summed": ("gauge", "{series}"),
    "lb_hop.part.healthy": ("gauge", "{part}"),
    "process.cpu.time": ("sum", "s"),
    "process.memory.usage": ("sum", "By"),
}
FALLS = "process.memory.usage"
"""The only sum that may fall."""
SLACK_NS = 50_000_000
"""How far the agent's wall clock may be from this process's, which reads it at another moment."""


class Run(NamedTuple):
    """What the lab saw and what the Collector had when all had ended."""

    lab: Lab
    services: dict[str, VipPort]
    told: dict[str, list[truth.Told]]
    logs: list[LogRecord]
    spans: list[Span]
    series: list[Series]
    began_ns: int
    ended_ns: int

    def series_of(self, metric: str, vip: str) -> list[Series]:
        """Return the series of a metric for one VIP."""
        return [s for s in self.series if s.metric == metric and s.attributes["server.address"] == vip]


@pytest.fixture(scope="module", params=[GRPC, HTTP])
def run(lab: Lab, request: pytest.FixtureRequest) -> Run:
    """Send 23 connections to every VIP: `web` has a pod on both nodes, `far` one on node2 only."""
    services = {}
    for vip in VIPS.values():
        name, pods = ("web", lab.pods) if vip in {"10.0.10.0", "fd00:10::1"} else ("far", lab.pods[1:])
        services[vip] = lab.vip_port(
            vip, 80, service=name, namespace=f"shop-{name}", backends=pods, target_port=TARGET_PORT
        )
    lab.apply(list(services.values()))
    settings = {
        "OTEL_SERVICE_NAME": "hops",
        "OTEL_RESOURCE_ATTRIBUTES": ",".join(
            ["service.name=loses", *(f"{name}={value.replace(' ', '%20')}" for name, value in RESOURCE.items())]
        ),
    }
    with Collector(lab) as collector:
        if request.param == GRPC:
            settings |= collector.settings(GRPC, family=4)
        else:
            settings |= collector.settings(HTTP, family=6) | {"OTEL_EXPORTER_OTLP_COMPRESSION": "gzip"}
        with agents_on(lab.nodes, lab.vips_path, settings):
            began_ns, told = time.time_ns(), {}
            for vip, service in services.items():
                truth.forget_connections(lab)
                counts = truth.accepted_counts(lab)
                results = lab.connect(vip, 80, SENT)
                told[vip] = truth.follow(lab, service, results, truth.accepted_since(lab, counts))
            ended_ns = time.time_ns()
            everything = SENT * len(services)
            wait_for("all log records", lambda: len(collector.logs()) >= everything)
            wait_for("all spans", lambda: len(collector.spans()) >= everything)
            collector.wait_for_series(
                "lb_hop.connections",
                lambda found: sum(s.value for s in found) >= everything and min(len(s.points) for s in found) >= 3,
            )
    return Run(lab, services, told, collector.logs(), collector.spans(), collector.series(), began_ns, ended_ns)


@EVERY_VIP
def test_connections_are_counted_in_their_class(run: Run, vip: str) -> None:
    """The sum over the nodes is 23, split by node, hop class, backend's node and zone as conntrack says."""
    service, told = run.services[vip], run.told[vip]
    expected = Counter(
        frozenset((truth.vip_port_attributes(service, each.node) | truth.verdict_attributes(service, each)).items())
        for each in told
    )
    counted = {frozenset(s.attributes.items()): s.value for s in run.series_of("lb_hop.connections", vip) if s.value}
    assert len(told) == SENT
    assert counted == expected


@EVERY_VIP
def test_a_log_record_for_each_connection(run: Run, vip: str) -> None:
    """23 records name client, SNAT source, backend, pod, nodes and zones as they were."""
    expected = {
        each.client: truth.record_attributes(run.services[vip], each) | {"connect_seconds": each.connect_seconds}
        for each in run.told[vip]
    }
    records = [record for record in run.logs if record.attributes["server.address"] == vip]
    assert sorted(truth.clients_of(records)) == sorted(expected)
    for record, client in zip(records, truth.clients_of(records), strict=True):
        attributes = dict(record.attributes)
        forward, handshake = attributes.pop("lb_hop.forward.duration"), attributes.pop("lb_hop.handshake.duration")
        connect_seconds = expected[client].pop("connect_seconds")
        assert attributes == expected[client]
        assert 0 < forward < handshake < connect_seconds
        assert run.began_ns - SLACK_NS <= record.time_ns <= run.ended_ns + SLACK_NS
        assert record.time_ns < record.observed_ns
        assert (record.event_name, record.severity, record.severity_number) == (
            "lb_hop.connection.forwarded", "INFO", 9,
        )  # fmt: skip
        for word in (client[0], str(client[1]), attributes["k8s.node.name"], attributes["destination.k8s.pod.name"]):
            assert word in record.body


@EVERY_VIP
def test_a_span_for_each_connection(run: Run, vip: str) -> None:
    """A span tells the same as the log record, from the first packet to the SYN-ACK, with both events between."""
    spans = {span.span_id: span for span in run.spans if span.attributes["server.address"] == vip}
    records = {record.span_id: record for record in run.logs if record.attributes["server.address"] == vip}
    assert len(spans) == len(records) == SENT
    assert len({span.trace_id for span in spans.values()}) == SENT
    for span_id, span in spans.items():
        record = records[span_id]
        assert span.trace_id == record.trace_id
        assert int(span.trace_id, 16)
        assert span.attributes == record.attributes
        assert span.name == f"lb_hop {run.services[vip].namespace}/{run.services[vip].service}"
        assert (span.kind, span.status, span.status_message) == (SPAN_KIND_SERVER, STATUS_UNSET, "")
        assert (span.parent_id, span.trace_state) == ("", "ot=th:0")
        assert span.start_ns == record.time_ns
        assert [event.name for event in span.events] == ["translated", "syn_ack"]
        translated, syn_ack = (event.time_ns for event in span.events)
        assert translated - span.start_ns == pytest.approx(span.attributes["lb_hop.forward.duration"] * 1e9, abs=1)
        assert span.end_ns - span.start_ns == pytest.approx(span.attributes["lb_hop.handshake.duration"] * 1e9, abs=1)
        assert syn_ack == span.end_ns


@EVERY_VIP
@pytest.mark.parametrize("metric", ["lb_hop.forward.duration", "lb_hop.handshake.duration"])
def test_histograms_hold_what_the_records_tell(run: Run, vip: str, metric: str) -> None:
    """Each has 23 observations by hop class, in the buckets where the records' own times belong."""
    told_seconds: dict[tuple[str, str], list[float]] = {}
    for record in run.logs:
        if record.attributes["server.address"] == vip:
            key = record.attributes["k8s.node.name"], record.attributes["lb_hop.hop"]
            told_seconds.setdefault(key, []).append(record.attributes[metric])
    series = run.series_of(metric, vip)
    observations = 0
    for each in series:
        histogram, key = each.last.histogram, (each.attributes["k8s.node.name"], each.attributes["lb_hop.hop"])
        assert histogram is not None
        node = next(node for node in run.lab.nodes if node.name == key[0])
        assert each.attributes == truth.vip_port_attributes(run.services[vip], node) | {"lb_hop.hop": key[1]}
        seconds = told_seconds.pop(key)
        assert histogram.observations == sum(histogram.buckets) == len(seconds)
        assert histogram.total == pytest.approx(sum(seconds))
        assert histogram.total > 0
        assert list(histogram.bounds) == sorted({*histogram.bounds})
        assert len(histogram.buckets) == len(histogram.bounds) + 1
        assert histogram.buckets == tuple(
            sum(low < value <= high for value in seconds)
            for low, high in zip((0.0, *histogram.bounds), (*histogram.bounds, float("inf")), strict=True)
        )
        assert (histogram.least, histogram.most) == (None, None)
        observations += histogram.observations
    assert observations == SENT
    assert not told_seconds


def test_resource(run: Run) -> None:
    """Every signal says who speaks; the standard variables win over what the agent finds itself."""
    speakers: dict[str, tuple[str, dict[str, str]]] = {}
    items: list[LogRecord | Span | Series] = [*run.logs, *run.spans, *run.series]
    for item in items:
        resource = dict(item.resource)
        instance = resource.pop("service.instance.id")
        assert speakers.setdefault(resource["k8s.node.name"], (instance, resource)) == (instance, resource)
        assert item.scope == {"name": "otel_lb_hop", "version": __version__}
        assert item.schema_url == "https://opentelemetry.io/schemas/1.44.0"
    assert len({instance for instance, _ in speakers.values()}) == 2
    for node in run.lab.nodes:
        assert speakers[node.name][1] == RESOURCE | {
            "service.name": "hops",
            "service.version": __version__,
            "k8s.node.name": node.name,
            "host.name": socket.gethostname(),
            "cloud.availability_zone": node.zone,
            "cloud.region": "lab",
        }


def test_metrics_are_cumulative_and_monotonic(run: Run) -> None:
    """Names, kinds and units are the contract's; sums start once, never fall and name no client."""
    assert {s.metric for s in run.series} == UNITS.keys()
    for each in run.series:
        assert (each.kind, each.unit) == UNITS[each.metric]
        assert not each.metric.endswith("_total")
        assert not any(name.startswith(("client.", "source.")) for name in each.attributes)
        assert each.attributes["k8s.node.name"] in {node.name for node in run.lab.nodes}
        assert each.kind == "gauge" or each.temporality == CUMULATIVE
        assert each.kind != "sum" or each.monotonic is (each.metric != FALLS)
        assert len({point.start_ns for point in each.points}) == 1
        times = [point.start_ns for point in each.points[:1]] + [point.time_ns for point in each.points]
        assert times == sorted(set(times))
        if each.kind != "gauge" and each.metric != FALLS:
            values = [point.histogram.observations if point.histogram else point.value for point in each.points]
            assert values == sorted(values)


def test_metrics_about_the_agent_itself(run: Run) -> None:
    """Endpoints by placement, watched VIP ports, healthy parts; every record was exported and none was lost."""
    for node in run.lab.nodes:
        own = [s for s in run.series if s.attributes["k8s.node.name"] == node.name]
        values = {(s.metric, *(v for k, v in s.attributes.items() if k != "k8s.node.name")): s.value for s in own}
        assert values["lb_hop.vip.ports",] == len(VIPS)
        assert values["lb_hop.cluster.nodes",] == len(run.lab.nodes)
        assert {name: value for name, value in values.items() if name[0] == "lb_hop.part.healthy"} == {
            ("lb_hop.part.healthy", part): 1
            for part in (
                *("vips_file", "topology", "conntrack", "interfaces", "metrics", "logs", "traces", "agent_logs"),
                *("ledger", "pins"),
            )
        }
        assert not any(value for name, value in values.items() if name[0].endswith(".dropped"))
        stages = {
            (s.attributes["lb_hop.stage"], s.attributes.get("lb_hop.signal")): s.value
            for s in own
            if s.metric == "lb_hop.records.seen"
        }
        sent = sum(record.resource["k8s.node.name"] == node.name for record in run.logs)
        exported = {s.attributes["lb_hop.signal"]: s.value for s in own if s.metric == "lb_hop.records.exported"}
        assert exported["logs"] == exported["traces"] == sent
        ways = [(stage, signal) for stage in ("encode", "queue", "transport") for signal in ("logs", "traces")]
        for stage in (*[(name, None) for name in ("kernel", "ring", "decode")], *ways):
            assert stages[stage] == sent
        for vip, service in run.services.items():
            local = sum(backend.node == node.name for backend in service.backends)
            placed = {
                s.attributes["lb_hop.placement"]: s.value
                for s in run.series_of("lb_hop.endpoints", vip)
                if s.attributes["k8s.node.name"] == node.name
            }
            assert placed == {"local": local, "same_zone": 0, "other_zone": len(service.backends) - local}
