"""Connections that are lost, each in its own way, and those that begin inside: all at once, then one look at the end.

An answer that does not come gets its verdict 5 to 7 s after the first SYN, so the cases share one such wait.
"""

from __future__ import annotations

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, NamedTuple

import pytest

from otel_lb_hop.model import Policy, format_address
from tests.e2e import truth
from tests.e2e.collector import Collector
from tests.e2e.conftest import TARGET_PORT
from tests.e2e.firewall import deafen
from tests.e2e.otlp import STATUS_ERROR, LogRecord, Series, Span
from tests.lab.agent import agents_on
from tests.lab.requirements import needs_lab
from tests.lab.waiting import wait_for

if TYPE_CHECKING:
    from collections.abc import Sequence

    from otel_lb_hop.model import VipPort
    from tests.lab import Accepted, Connection, Lab, Node

pytestmark = [pytest.mark.root, pytest.mark.collector, needs_lab]

SENT = 23
ONE_RETRY_SECONDS = 1.5
"""A client sends its SYN again after 1 s, then after 2 s (Linux, tcp_syn_linear_timeouts) or 3 s (RFC 6298)."""
VERDICT_NS = (5 * 10**9, 8 * 10**9)
SILENT_PORT, CLOSED_PORT = 7777, 9999
FAMILIES = {4: "10.0.20.{}", 6: "fd00:20::{}"}
EVERY_FAMILY = pytest.mark.parametrize("family", FAMILIES)


class Run(NamedTuple):
    """What was sent, what the lab saw of it, and what the Collector had when all had ended."""

    lab: Lab
    services: dict[tuple[str, int], VipPort]
    results: dict[tuple[str, int], list[Connection]]
    accepted: list[Accepted]
    told_inside: dict[tuple[str, int], list[truth.Told]]
    syns_sent_again: int
    logs: list[LogRecord]
    spans: list[Span]
    series: list[Series]

    def records(self, case: str, family: int) -> list[LogRecord]:
        """Return the log records of one case."""
        vip = format_address(self.services[case, family].address)
        return [record for record in self.logs if record.attributes["server.address"] == vip]

    def spans_of(self, records: list[LogRecord]) -> list[Span]:
        """Return the span of each log record; each has one."""
        spans = {span.span_id: span for span in self.spans}
        return [spans[record.span_id] for record in records]

    def counted(self, case: str, family: int, metric: str = "lb_hop.connections") -> dict[frozenset[object], float]:
        """Return what a metric has counted in one case, by the attributes beyond the VIP port's and the node's name."""
        service = self.services[case, family]
        found: dict[frozenset[object], float] = {}
        for node in self.lab.nodes:
            base = truth.vip_port_attributes(service, node)
            for each in self.series:
                if each.metric == metric and each.value and base.items() <= each.attributes.items():
                    found[frozenset([node.name, *(each.attributes.items() - base.items())])] = each.value
        return found

    def entered(self, case: str, family: int) -> Counter[str]:
        """Count the records of a case by the node that took the connection in."""
        return Counter(record.attributes["k8s.node.name"] for record in self.records(case, family))


def services_of(lab: Lab, family: int) -> dict[tuple[str, int], VipPort]:
    """Describe one Service for each case; the ones called from inside are not called from outside."""
    vips = FAMILIES[family]

    def service(case: str, number: int, port: int = TARGET_PORT, policy: Policy = Policy.CLUSTER) -> VipPort:
        pods = {"none": [], "local": lab.pods[:1], "silent": lab.pods[1:], "local-inside": lab.pods[:1]}
        return lab.vip_port(
            vips.format(number), 80, service=case, policy=policy, backends=pods.get(case, lab.pods), target_port=port
        )

    found = [
        service("local", 1, policy=Policy.LOCAL),
        service("refused", 2, CLOSED_PORT),
        service("none", 3),
        service("silent", 4, SILENT_PORT),
        service("inside", 5),
        service("local-inside", 6, policy=Policy.LOCAL),
    ]
    return {(vip_port.service, family): vip_port for vip_port in found}


@pytest.fixture(scope="module")
def run(lab: Lab) -> Run:
    """Send 23 connections to each case over both families, wait for the verdicts, stop everything."""
    services = {key: service for family in FAMILIES for key, service in services_of(lab, family).items()}
    lab.apply(list(services.values()))
    deafen(lab.pods[1], f"tcp dport {SILENT_PORT}")
    with Collector(lab) as collector, agents_on(lab.nodes, lab.vips_path, collector.settings()):
        told_inside = {
            (case, family): _call_from_node2(lab, services[case, family])
            for case, family in services
            if case.endswith("inside")
        }
        again_before, counts = _syns_sent_again(lab), truth.accepted_counts(lab)
        outside = {key: service for key, service in services.items() if not key[0].endswith("inside")}
        with ThreadPoolExecutor(len(outside)) as pool:
            results = dict(zip(outside, pool.map(lambda service: _send(lab, service), outside.values()), strict=True))
        everything = SENT * len(services)
        wait_for("all log records", lambda: len(collector.logs()) >= everything, 15)
        wait_for("all spans", lambda: len(collector.spans()) >= everything)
        accepted, again = truth.accepted_since(lab, counts), _syns_sent_again(lab) - again_before
    logs, spans, series = collector.logs(), collector.spans(), collector.series()
    return Run(lab, services, results, accepted, told_inside, again, logs, spans, series)


def _send(lab: Lab, service: VipPort) -> list[Connection]:
    vip = format_address(service.address)
    return lab.connect(vip, service.port, SENT, concurrency=SENT, timeout=ONE_RETRY_SECONDS)


def _call_from_node2(lab: Lab, service: VipPort) -> list[truth.Told]:
    truth.forget_connections(lab)
    counts = truth.accepted_counts(lab)
    results = lab.pods[1].connect(format_address(service.address), service.port, SENT)
    assert all(result.ok for result in results)
    return truth.follow(lab, service, results, truth.accepted_since(lab, counts))


def _syns_sent_again(lab: Lab) -> int:
    """Count the SYNs that the client's kernel has sent again."""
    lines = lab.client.run(["cat", "/proc/net/netstat"]).stdout.splitlines()
    names, values = (line.split() for line in lines if line.startswith("TcpExt:"))
    return int(dict(zip(names, values, strict=True))["TCPSynRetrans"])


def _is_forwarded(record: LogRecord) -> bool:
    return record.event_name == "lb_hop.connection.forwarded"


def _assert_lost(run: Run, records: Sequence[LogRecord], event_name: str, error_type: str) -> None:
    """Hold what all records and spans of lost connections have in common."""
    for record, span in zip(records, run.spans_of(list(records)), strict=True):
        assert (record.event_name, record.severity, record.severity_number) == (event_name, "WARN", 13)
        assert record.attributes["error.type"] == error_type
        assert record.attributes["network.interface.name"] == "net0"
        assert record.attributes["lb_hop.origin"] == "external"
        assert "lb_hop.handshake.duration" not in record.attributes
        assert error_type in record.body
        assert span.attributes == record.attributes
        assert (span.status, span.status_message, span.trace_state) == (STATUS_ERROR, error_type, "ot=th:0")
        assert "syn_ack" not in {event.name for event in span.events}
        assert (span.trace_id, span.start_ns) == (record.trace_id, record.time_ns)


def _assert_untranslated(run: Run, service: VipPort, records: Sequence[LogRecord], outcome: str, again: int) -> None:
    """Hold the attributes of connections that were never forwarded: all of them, and no more."""
    nodes: dict[str, Node] = {node.name: node for node in run.lab.nodes}
    for record in records:
        client, port = record.attributes["client.address"], record.attributes["client.port"]
        assert record.attributes == truth.vip_port_attributes(
            service, nodes[record.attributes["k8s.node.name"]]
        ) | {
            "client.address": client,
            "client.port": port,
            "lb_hop.outcome": outcome,
            "lb_hop.origin": "external",
            "lb_hop.syn.retransmits": again,
            "network.interface.name": "net0",
            "error.type": outcome,
        }  # fmt: skip
    for span in run.spans_of(list(records)):
        assert span.events == []
        assert VERDICT_NS[0] <= span.end_ns - span.start_ns <= VERDICT_NS[1]


@EVERY_FAMILY
def test_local_vip_on_a_node_without_endpoint(run: Run, family: int) -> None:
    """What ECMP sends to a node without endpoint is counted once each as no_local_endpoints, however often it asks."""
    results = run.results["local", family]
    lost = [(result.client_address, result.client_port) for result in results if result.error == "timeout"]
    records = [record for record in run.records("local", family) if not _is_forwarded(record)]
    assert 0 < len(lost) < SENT
    assert sorted(truth.clients_of(records)) == sorted(lost)
    assert {record.attributes["k8s.node.name"] for record in records} == {"node2"}
    _assert_lost(run, records, "lb_hop.connection.unforwarded", "no_local_endpoints")
    _assert_untranslated(run, run.services["local", family], records, "no_local_endpoints", again=1)
    dropped = {"node2", ("lb_hop.outcome", "no_local_endpoints"), ("lb_hop.origin", "external")}
    counted = run.counted("local", family)
    assert counted.pop(frozenset(dropped)) == len(lost)
    assert sum(counted.values()) == SENT - len(lost)
    assert run.counted("local", family, "lb_hop.syn.retransmits") == {frozenset({"node2"}): len(lost)}


@EVERY_FAMILY
def test_local_vip_keeps_the_client(run: Run, family: int) -> None:
    """On the node with the endpoint the backend's client is the real one, and there is no hop."""
    good = {(r.client_address, r.client_port) for r in run.results["local", family] if r.ok}
    records = [record for record in run.records("local", family) if _is_forwarded(record)]
    pod = run.lab.pods[0]
    address = pod.address4 if family == 4 else pod.address6
    assert {*truth.clients_of(records)} == good == {(each.peer_address, each.peer_port) for each in run.accepted} & good
    for record in records:
        attributes = record.attributes
        assert (attributes["source.address"], attributes["source.port"]) in good
        assert (attributes["source.port"], attributes["client.port"]) == (attributes["client.port"],) * 2
        assert attributes["source.address"] == attributes["client.address"]
        assert (attributes["destination.address"], attributes["destination.port"]) == (address, TARGET_PORT)
        assert (attributes["k8s.node.name"], attributes["lb_hop.hop"]) == ("node1", "none")
        assert attributes["lb_hop.zone.crossed"] is False


@EVERY_FAMILY
def test_refused(run: Run, family: int) -> None:
    """A backend that nobody listens on: forwarded, then failed with error.type refused."""
    records, results = run.records("refused", family), run.results["refused", family]
    assert {result.error for result in results} == {"ECONNREFUSED"}
    assert sorted(truth.clients_of(records)) == sorted((r.client_address, r.client_port) for r in results)
    _assert_lost(run, records, "lb_hop.connection.failed", "refused")
    for record, span in zip(records, run.spans_of(records), strict=True):
        assert record.attributes["lb_hop.outcome"] == "forwarded"
        assert record.attributes["destination.port"] == CLOSED_PORT
        assert record.attributes["lb_hop.syn.retransmits"] == 0
        assert [event.name for event in span.events] == ["translated"]
        assert 0 < span.end_ns - span.start_ns < 10**9
    _assert_failures(run, "refused", family)


@EVERY_FAMILY
def test_silent_backend(run: Run, family: int) -> None:
    """A backend that drops every SYN: forwarded, then failed with error.type timeout once the verdict is due."""
    records, results = run.records("silent", family), run.results["silent", family]
    assert {result.error for result in results} == {"timeout"}
    assert sorted(truth.clients_of(records)) == sorted((r.client_address, r.client_port) for r in results)
    _assert_lost(run, records, "lb_hop.connection.failed", "timeout")
    for record, span in zip(records, run.spans_of(records), strict=True):
        assert record.attributes["lb_hop.outcome"] == "forwarded"
        assert record.attributes["destination.k8s.pod.name"] == run.lab.pods[1].name
        assert record.attributes["lb_hop.syn.retransmits"] == 1
        assert [event.name for event in span.events] == ["translated"]
        assert VERDICT_NS[0] <= span.end_ns - span.start_ns <= VERDICT_NS[1]
    _assert_failures(run, "silent", family)


def _assert_failures(run: Run, case: str, family: int) -> None:
    """Hold the two metrics of failed connections against the records, class by class."""
    error_type = {"refused": "refused", "silent": "timeout"}[case]
    by_class: Counter[frozenset[object]] = Counter()
    forwarded: Counter[frozenset[object]] = Counter()
    service = run.services[case, family]
    for record in run.records(case, family):
        node = next(node for node in run.lab.nodes if node.name == record.attributes["k8s.node.name"])
        pod = next(pod for pod in run.lab.pods if pod.name == record.attributes["destination.k8s.pod.name"])
        hop = truth.hop_class(service, node, pod)
        assert record.attributes["lb_hop.hop"] == hop
        by_class[frozenset({node.name, ("lb_hop.hop", hop), ("error.type", error_type)})] += 1
        forwarded[
            frozenset(
                {
                    node.name,
                    ("lb_hop.outcome", "forwarded"),
                    ("lb_hop.hop", hop),
                    ("lb_hop.origin", "external"),
                    ("destination.k8s.node.name", pod.node),
                    ("lb_hop.zone.crossed", pod.zone != node.zone),
                }
            )
        ] += 1
    assert run.counted(case, family, "lb_hop.handshake.failures") == by_class
    assert run.counted(case, family) == forwarded
    assert forwarded.total() == SENT
    assert not run.counted(case, family, "lb_hop.replies.unseen")


@EVERY_FAMILY
def test_no_endpoints(run: Run, family: int) -> None:
    """A Service without endpoints rejects: each connection is counted as no_endpoints on the node it came to."""
    records, results = run.records("none", family), run.results["none", family]
    assert {result.error for result in results} == {"ECONNREFUSED"}
    assert sorted(truth.clients_of(records)) == sorted((r.client_address, r.client_port) for r in results)
    _assert_lost(run, records, "lb_hop.connection.unforwarded", "no_endpoints")
    _assert_untranslated(run, run.services["none", family], records, "no_endpoints", again=0)
    assert run.counted("none", family) == {
        frozenset({node, ("lb_hop.outcome", "no_endpoints"), ("lb_hop.origin", "external")}): count
        for node, count in run.entered("none", family).items()
    }


def test_retransmits_are_those_of_the_client(run: Run) -> None:
    """Over all VIPs and nodes the SYNs sent again are as many as the client's kernel has counted."""
    counted = sum(each.value for each in run.series if each.metric == "lb_hop.syn.retransmits")
    assert counted == run.syns_sent_again > 0


@EVERY_FAMILY
@pytest.mark.parametrize("case", ["inside", "local-inside"])
def test_call_from_a_pod(run: Run, case: str, family: int) -> None:
    """A pod that calls a VIP is served in place: origin internal, whatever the policy and without an uplink."""
    service, told = run.services[case, family], run.told_inside[case, family]
    records = run.records(case, family)
    expected = {each.client: truth.record_attributes(service, each, "vpod1", "internal") for each in told}
    assert {each.node.name for each in told} == {"node2"}
    assert sorted(truth.clients_of(records)) == sorted(expected)
    for record, client in zip(records, truth.clients_of(records), strict=True):
        times = {name for name in record.attributes if name.endswith(".duration")}
        assert times == {"lb_hop.forward.duration", "lb_hop.handshake.duration"}
        assert {k: v for k, v in record.attributes.items() if k not in times} == expected[client]
    verdicts = Counter(
        frozenset(["node2", *truth.verdict_attributes(service, each, "internal").items()]) for each in told
    )
    assert run.counted(case, family) == verdicts
    assert verdicts.total() == SENT
    if case == "local-inside":
        assert {record.attributes["lb_hop.hop"] for record in records} == {"required"}
        assert {each.source for each in told} == {each.client for each in told}
