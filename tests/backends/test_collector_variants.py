"""Every variant of collector-config/ at work: what real agents told of 23 connections is in the real backend, 23 times.

One run of agents serves all: a Collector of the test's own passes everything on to each variant, marked with the
variant's name as `k8s.cluster.name`, as if each were a cluster's.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest

from otel_lb_hop.model import Policy
from tests.backends.collectors import COMPAT, Configured, signals, variants
from tests.backends.loki import Loki
from tests.backends.prometheus import Prometheus
from tests.backends.tempo import OTLP_HTTP_PORT, Tempo
from tests.e2e import otlp
from tests.e2e.firewall import deafen
from tests.lab import Lab, reaper
from tests.lab.agent import agents_on
from tests.lab.requirements import needs_lab
from tests.lab.waiting import wait_for
from tests.unit.otlp_sink import HttpServer

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from tests.backends.prometheus import Sample

pytestmark = [
    pytest.mark.root,
    pytest.mark.collector,
    pytest.mark.prometheus,
    pytest.mark.loki,
    pytest.mark.tempo,
    pytest.mark.timeout(300),
    needs_lab,
]

SENT = 23
TARGET_PORT, DEAF_PORT = 8080, 8081
WEB, LOCAL, WEB6 = "10.0.10.0", "10.0.10.1", "fd00:10::1"
PLACES = {
    "prometheus.yaml": "127.0.0.11",
    "prometheus-scrape.yaml": "127.0.0.12",
    "prometheus-otlp.yaml": "127.0.0.13",
    "loki.yaml": "127.0.0.14",
    "tempo.yaml": "127.0.0.15",
    "all.yaml": "127.0.0.16",
    "vendor.yaml": "127.0.0.17",
    "agent.yaml": "127.0.0.18",
    "gateway.yaml": "127.0.0.20",
}
"""Variant → where on mgmt it listens."""
FILE = "127.0.0.19"
"""Where file.yaml listens, the gateway of agent.yaml."""
COMPATIBLE = ("prometheus.yaml", "prometheus-scrape.yaml", "prometheus-otlp.yaml", "all.yaml")
METRICS = [variant for variant in PLACES if variant.startswith("prometheus") or variant == "all.yaml"]
KEY = "s3cret: {not YAML"
AGENT = {
    "OTEL_LB_HOP_POD_NAMESPACE": "observability",
    "OTEL_LB_HOP_POD_NAME": "otel-lb-hop-x7k2p",
    "OTEL_LB_HOP_POD_UID": "0d9f3b64-3b4c-4b0e-9f0e-6a1d6a6f6f11",
}
PICKED = "lb_inter_node_exporter_picked_total"


class Run(NamedTuple):
    """The backends, and what the lab knows."""

    prometheus: Prometheus
    loki: Loki
    tempo: Tempo
    vendor: HttpServer
    file: Path
    picked: Counter[tuple[str, str, str]]
    """(node, client, VIP) → connections to `web` and to the deaf port of its VIP, told by conntrack."""
    collectors: dict[str, Configured]
    started: float
    ended: float

    def select(self, variant: str, metric: str = "lb_hop_connections_total", matchers: str = "") -> list[Sample]:
        """Ask Prometheus for what came through one variant."""
        return self.prometheus.query(f'{metric}{{k8s_cluster_name="{name_of(variant)}"{matchers}}}')


def name_of(variant: str) -> str:
    """Name the cluster that a variant serves."""
    return variant.removesuffix(".yaml")


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    """Build two nodes with a serving pod each; nothing of it is left afterwards."""
    with Lab() as built:
        for pod in built.pods:
            pod.serve(TARGET_PORT)
            deafen(pod, f"tcp dport {DEAF_PORT}")
        built.apply(
            [
                built.vip_port(WEB, 80, backends=built.pods, target_port=TARGET_PORT),
                built.vip_port(WEB, 81, service="deaf", backends=built.pods, target_port=DEAF_PORT),
                built.vip_port(WEB6, 80, backends=built.pods, target_port=TARGET_PORT),
                built.vip_port(
                    LOCAL, 80, service="local", policy=Policy.LOCAL, backends=built.pods, target_port=TARGET_PORT
                ),
            ]
        )
        yield built
    assert reaper.lab_namespaces(built.name) == []


@pytest.fixture(scope="module")
def run(lab: Lab) -> Iterator[Run]:
    """Send 23 connections to `web`, and others that the old counter knew or did not, through every variant."""
    with ExitStack() as stack:
        scrape = {
            "job_name": "collector",
            "honor_labels": True,
            "static_configs": [{"targets": [f"{PLACES['prometheus-scrape.yaml']}:8889"]}],
        }
        # As it comes: a Prometheus refuses samples that are older than the last.
        backends = (Prometheus(lab, scrape=[scrape], settings={"storage": {}}), Loki(lab), Tempo(lab))
        prometheus, loki, tempo = backends
        vendor = HttpServer()
        lab.mgmt.in_netns(vendor.start)
        stack.callback(vendor.stop)
        settings = {
            "LB_HOP_PROMETHEUS_ENDPOINT": f"http://{prometheus.address}/api/v1/write",
            "LB_HOP_PROMETHEUS_OTLP_ENDPOINT": f"http://{prometheus.address}/api/v1/otlp",
            "LB_HOP_LOKI_ENDPOINT": f"http://{loki.address}/otlp",
            "LB_HOP_TEMPO_ENDPOINT": f"http://{lab.mgmt.address4}:{OTLP_HTTP_PORT}",
            "LB_HOP_VENDOR_ENDPOINT": f"http://127.0.0.1:{vendor.port}",
            "LB_HOP_VENDOR_HEADERS": json.dumps({"api-key": KEY, "x-team": "network"}),
            "LB_HOP_GATEWAY_ENDPOINT": f"http://{FILE}:4317",
            "LB_HOP_COMPAT_INTERVAL": "1s",
            "LB_HOP_DECISION_WAIT": "1s",
        }
        collectors = {
            variant: Configured(
                lab.mgmt,
                [variant, COMPAT] if variant in COMPATIBLE else [variant],
                settings | {"LB_HOP_COMPAT_LISTEN": f"{place}:8890"},
                listen=place,
            )
            for variant, place in (PLACES | {"file.yaml": FILE}).items()
        }
        for backend in backends:
            stack.enter_context(backend)
        for collector in collectors.values():
            stack.enter_context(collector)
        fan = lab.directory / "fan-out.json"
        fan.write_text(json.dumps(fan_out(PLACES)))
        stack.enter_context(Configured(lab.mgmt, [fan], listen=lab.mgmt.address4))
        started = time.time()
        sent = {
            "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://{lab.mgmt.address4}:4317",
            "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc",
        }
        with agents_on(lab.nodes, lab.vips_path, AGENT | sent) as agents:
            # Its record comes seconds after those of the others: no answer, and a second SYN.
            lab.connect(WEB, 81, 1, timeout=2.0)
            lab.connect(WEB, 80, SENT)
            picked = Counter(
                (node.name, entry.source, entry.destination)
                for node in lab.nodes
                for entry in node.conntrack()
                if entry.destination == WEB
            )
            lab.connect(LOCAL, 80, 5)
            lab.connect(WEB6, 80, 4)
            lab.pods[0].connect(WEB, 80, 3)
            wait_for(
                "all records to be sent",
                lambda: sum(agent.shipped("logs").get("exported", 0) for agent in agents) >= SENT + 1 + 5 + 4 + 3,
                30,
            )
        for collector in collectors.values():
            assert "deprecated" not in collector.stderr
        yield Run(
            prometheus, loki, tempo, vendor, collectors["file.yaml"].folder, picked, collectors, started, time.time()
        )


def fan_out(places: Mapping[str, str]) -> dict[str, Any]:
    """Configure a Collector that passes each signal on to every variant that takes it, marked with its name.

    Spans get an id for each variant, too: Tempo keeps a span once.
    """
    pipelines = {
        f"{signal}/{name_of(variant)}": {
            "receivers": ["otlp"],
            "processors": [f"resource/{name_of(variant)}", f"transform/{name_of(variant)}"],
            "exporters": [f"otlp_grpc/{name_of(variant)}"],
        }
        for variant in places
        for signal in (*signals(variant), *(["logs"] if variant in COMPATIBLE else []))
    }
    return {
        "receivers": {"otlp": {"protocols": {"grpc": {"endpoint": "${env:LB_HOP_LISTEN}:4317"}}}},
        "processors": {
            f"resource/{name_of(variant)}": {
                "attributes": [{"key": "k8s.cluster.name", "value": name_of(variant), "action": "upsert"}]
            }
            for variant in places
        }
        | {
            f"transform/{name_of(variant)}": {"trace_statements": [f"set(span.span_id, SpanID(0x{number:016x}))"]}
            for number, variant in enumerate(places, 1)
        },
        "exporters": {
            f"otlp_grpc/{name_of(variant)}": {
                "endpoint": f"http://{place}:4317",
                "tls": {"insecure": True},
                "sending_queue": {"num_consumers": 1},
            }
            for variant, place in places.items()
        },
        "extensions": {"health_check": {"endpoint": "${env:LB_HOP_LISTEN}:13133", "path": "/health"}},
        "service": {
            "extensions": ["health_check"],
            "pipelines": pipelines,
            "telemetry": {"metrics": {"level": "none"}},
        },
    }


def test_no_variant_is_left_out() -> None:
    """Every file is at work here, but for balancer.yaml, which has a test with its gateways."""
    assert {*PLACES, "file.yaml", "balancer.yaml"} == {*variants()}


@pytest.mark.parametrize("variant", METRICS)
def test_metrics(run: Run, variant: str) -> None:
    """Remote write, scrape and OTLP give the same series: 23 are 23, and the cluster is a label of each."""
    matchers = f', k8s_service_name="web", server_address="{WEB}", lb_hop_origin="external"'

    def count() -> float:
        return sum(sample.value for sample in run.select(variant, matchers=matchers))

    wait_for(f"{SENT} connections", lambda: count() == SENT, 30)
    for sample in run.select(variant, matchers=matchers):
        assert sample.labels.keys() - {"destination_k8s_node_name", "lb_hop_zone_crossed", "lb_hop_hop"} == {
            "__name__",
            "job",
            "instance",
            "k8s_cluster_name",
            "k8s_namespace_name",
            "k8s_node_name",
            "k8s_service_name",
            "lb_hop_external_traffic_policy",
            "lb_hop_origin",
            "lb_hop_outcome",
            "network_transport",
            "network_type",
            "server_address",
            "server_port",
        }
        assert sample.labels["job"] == "otel-lb-hop"
        assert sample.labels["k8s_namespace_name"] == "default"
    handshakes = run.select(variant, "lb_hop_handshake_duration_seconds_count", matchers.partition(", lb_hop")[0])
    # Those of the pod, which came in by no uplink, are among them.
    assert sum(sample.value for sample in handshakes) == SENT + 3
    info = run.select(variant, "target_info")
    assert Counter(sample.labels["k8s_node_name"] for sample in info) == {"node1": 1, "node2": 1}
    assert {sample.labels["k8s_pod_name"] for sample in info} == {"otel-lb-hop-x7k2p"}
    assert run.collectors[variant].own_metric("otelcol_exporter_send_failed_metric_points") == 0


@pytest.mark.parametrize("variant", ["loki.yaml", "all.yaml", "gateway.yaml"])
def test_logs(run: Run, variant: str) -> None:
    """Loki has a line for each connection; its streams are the agents, and what a connection has of its own is none."""
    stream = f'{{service_name="otel-lb-hop", k8s_cluster_name="{name_of(variant)}"}}'
    query = f'{stream} | k8s_namespace_name="default" | k8s_service_name="web" | server_address="{WEB}"'
    found = wait_for(
        "lines",
        lambda: [
            line
            for line in run.loki.lines(f'{query} | lb_hop_origin="external"', run.started, run.ended)
            if len(run.loki.lines(query, run.started, run.ended)) == SENT + 3
        ],
        30,
    )
    assert len(found) == SENT
    assert {line.fields["client_address"] for line in found} == {"192.168.0.2"}
    streams = run.loki.streams(stream, run.started, run.ended)
    assert len(streams) == 2
    for labels in streams:
        assert labels.keys() == {
            "service_name",
            "service_instance_id",
            "k8s_cluster_name",
            "cloud_region",
            "cloud_availability_zone",
        }


@pytest.mark.parametrize("variant", ["tempo.yaml", "all.yaml", "gateway.yaml"])
def test_traces(run: Run, variant: str) -> None:
    """Tempo has a trace for each connection."""
    traceql = (
        f'{{resource.k8s.cluster.name="{name_of(variant)}" && name="lb_hop default/web" '
        f'&& span.server.address="{WEB}" && span.lb_hop.origin="external"}}'
    )
    wait_for("traces", lambda: len(run.tempo.search(traceql, run.started, run.ended)) == SENT, 30)


def test_vendor(run: Run) -> None:
    """All three signals come to the vendor, each request with the headers that the environment names."""

    def logs() -> int:
        records = [
            record
            for received in [*run.vendor.received]
            if received.path == "/v1/logs"
            for group in received.message().resource_logs
            for scoped in group.scope_logs
            for record in scoped.log_records
        ]
        return sum(
            any(pair.key == "server.address" and pair.value.string_value == WEB for pair in record.attributes)
            for record in records
            if record.event_name == "lb_hop.connection.forwarded"
        )

    wait_for("log records", lambda: logs() == SENT + 3, 30)
    assert {received.path for received in run.vendor.received} == {"/v1/metrics", "/v1/logs", "/v1/traces"}
    assert {received.headers["api-key"] for received in run.vendor.received} == {KEY}
    assert {received.headers["x-team"] for received in run.vendor.received} == {"network"}


def test_agent_and_file(run: Run) -> None:
    """agent.yaml passes everything on; file.yaml writes it down, a line for each message."""

    def lines(signal: str) -> list[dict[str, Any]]:
        path = run.file / f"{signal}.jsonl"
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]

    def to_web(attributes: Mapping[str, Any]) -> bool:
        return (attributes.get("server.address"), attributes.get("server.port")) == (WEB, 80)

    wait_for("records", lambda: sum(to_web(r.attributes) for r in otlp.log_records(lines("logs"))) == SENT + 3, 30)
    wait_for("spans", lambda: sum(to_web(span.attributes) for span in otlp.spans(lines("traces"))) == SENT + 3, 30)
    series = [each for each in otlp.metric_series(lines("metrics")) if each.metric == "lb_hop.connections"]
    assert sum(each.value for each in series if to_web(each.attributes)) == SENT + 3
    assert {each.resource["k8s.cluster.name"] for each in series} == {"agent"}


@pytest.mark.parametrize("variant", COMPATIBLE)
def test_compatibility(run: Run, variant: str) -> None:
    """The old counter has what its program would have counted, a late record included, and nothing else.

    Not counted: IPv6, a Service with policy Local, calls from a pod.
    """
    assert run.picked.total() == SENT + 1

    def counted() -> dict[tuple[str, str, str], float]:
        return {
            (sample.labels["instance"], sample.labels["src"], sample.labels["dst"]): sample.value
            for sample in run.select(variant, PICKED)
        }

    wait_for("the old counter", lambda: counted() == run.picked, 30)
    for sample in run.select(variant, PICKED):
        assert sample.labels.keys() == {"__name__", "job", "instance", "k8s_cluster_name", "src", "dst"}
        assert sample.labels["job"] == "lb-inter-node-exporter"
    # A page that is read anew every second is a point every second, connections or none: rate() has what it needs.
    points = run.prometheus.query(f'count_over_time({PICKED}{{k8s_cluster_name="{name_of(variant)}"}}[10s])')
    assert len(points) == len(run.picked)
    assert all(point.value > 2 for point in points)
    # What a scrape tells of itself stays out.
    assert run.prometheus.query('up{job="lb_inter_node_exporter"}') == []
    collector = run.collectors[variant]
    assert collector.own_metric("otelcol_deltatocumulative_datapoints", 'error="') == 0
    assert collector.own_metric("otelcol_deltatocumulative_datapoints") >= 2
