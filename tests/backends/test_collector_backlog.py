"""What a Collector has kept while nobody took it, or what comes to it all at once: nothing is lost or out of order."""

from __future__ import annotations

import http.client
import json
from concurrent.futures import ThreadPoolExecutor
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

import pytest

from tests.backends.collectors import COMPAT, Configured
from tests.lab import Lab, reaper
from tests.lab.requirements import needs_lab
from tests.lab.waiting import PATIENCE, wait_for

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

pytestmark = [
    pytest.mark.root,
    pytest.mark.collector,
    pytest.mark.timeout(300),
    needs_lab,
]

AGENT, GATEWAY = "127.0.0.2", "127.0.0.3"
OLD_PAGE = 8890
REQUESTS, RECORDS = 12, 500
AT_ONCE = 80
LINE = "x" * 1000
"""Makes a record about as large as one of an agent."""
FROM_CLIENT = {
    "lb_hop.origin": "external",
    "network.transport": "tcp",
    "network.type": "ipv4",
    "lb_hop.external_traffic_policy": "Cluster",
    "server.address": "10.0.10.0",
}


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    """Build the smallest lab; only its mgmt host is of use here."""
    with Lab(1) as built:
        yield built
    assert reaper.lab_namespaces(built.name) == []


def attributes(values: Mapping[str, str]) -> list[dict[str, Any]]:
    """Write attributes as OTLP's JSON does."""
    return [{"key": key, "value": {"stringValue": value}} for key, value in values.items()]


def request(records: Sequence[Mapping[str, str]], line: str = "", time_ns: int = 0) -> bytes:
    """Make a request of an agent on node1, with a log record for each set of attributes."""
    resource = {"service.name": "otel-lb-hop", "service.instance.id": "node1", "k8s.node.name": "node1"}
    written = [
        {"timeUnixNano": str(time_ns), "body": {"stringValue": line}, "attributes": attributes(record)}
        for record in records
    ]
    group = {"resource": {"attributes": attributes(resource)}, "scopeLogs": [{"logRecords": written}]}
    return json.dumps({"resourceLogs": [group]}).encode()


def post(lab: Lab, address: str, body: bytes) -> None:
    """Send one request; the Collector takes it."""

    def send() -> int:
        connection = http.client.HTTPConnection(address, 4318, timeout=30 * PATIENCE)
        try:
            connection.request("POST", "/v1/logs", body, {"Content-Type": "application/json"})
            return connection.getresponse().status
        finally:
            connection.close()

    assert lab.mgmt.in_netns(send) == HTTPStatus.OK


def test_backlog_of_an_agent(lab: Lab) -> None:
    """What agent.yaml kept while there was no gateway, more than a gRPC message may be, comes whole and in order."""
    settings = {"LB_HOP_GATEWAY_ENDPOINT": f"http://{GATEWAY}:4317"}
    with Configured(lab.mgmt, ["agent.yaml"], settings, listen=AGENT) as agent:
        for number in range(REQUESTS):
            post(lab, AGENT, request([{"number": str(number)}] * RECORDS, LINE))
        waiting = agent.own_metric("otelcol_exporter_queue_size", 'data_type="logs"')
        assert waiting == REQUESTS
        with Configured(lab.mgmt, ["file.yaml"], listen=GATEWAY) as gateway:
            path = gateway.folder / "logs.jsonl"

            def numbers() -> list[int]:
                text = path.read_text(encoding="utf-8") if path.exists() else ""
                return [
                    int(record["attributes"][0]["value"]["stringValue"])
                    for line in text.splitlines(keepends=True)
                    if line.endswith("\n")
                    for group in json.loads(line)["resourceLogs"]
                    for scoped in group["scopeLogs"]
                    for record in scoped["logRecords"]
                ]

            wait_for("all records", lambda: len(numbers()) >= REQUESTS * RECORDS, 60)
            assert numbers() == [number for number in range(REQUESTS) for _ in range(RECORDS)]
        assert agent.own_metric("otelcol_exporter_send_failed_log_records") == 0


def test_old_counter_of_requests_at_once(lab: Lab) -> None:
    """Requests of one node that come at once, as a Collector before this one may send them, are all counted."""
    clients = [f"192.168.1.{number}" for number in range(200)]
    body = request([FROM_CLIENT | {"client.address": client} for client in clients])
    settings = {"LB_HOP_COMPAT_LISTEN": f"{AGENT}:{OLD_PAGE}"}
    with Configured(lab.mgmt, ["prometheus-scrape.yaml", COMPAT], settings, listen=AGENT) as collector:
        with ThreadPoolExecutor(8) as threads:
            list(threads.map(lambda _: post(lab, AGENT, body), range(AT_ONCE)))
        counted = "lb_inter_node_exporter_picked_total"
        wait_for(
            "every client, every time",
            lambda: collector.page(OLD_PAGE, counted) == [AT_ONCE] * len(clients),
            30,
        )
        assert collector.own_metric("otelcol_deltatocumulative_datapoints", 'error="') == 0
