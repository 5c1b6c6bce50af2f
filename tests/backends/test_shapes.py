"""What a span is in Tempo and a log record in Loki: names, kinds, labels, links, held against the lab's truth."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.backends.scene import AGENT_NAMESPACE, CLUSTER_NAME, needs_scene

if TYPE_CHECKING:
    from tests.backends.loki import Line
    from tests.backends.scene import Fate, Scene
    from tests.backends.tempo import Span

pytestmark = needs_scene

EVERY_KIND = pytest.mark.parametrize(
    "where",
    [
        {"service": "default/web", "network": "ipv4", "hop": "required", "origin": "external"},
        {"service": "default/web", "network": "ipv6", "hop": "avoidable"},
        {"service": "default/web", "origin": "internal"},
        {"service": "default/web-local", "network": "ipv6", "outcome": "forwarded"},
        {"service": "default/web-local", "network": "ipv4", "outcome": "no_local_endpoints"},
        {"service": "default/dns"},
        {"service": "default/wrong-port"},
        {"service": "default/firewalled"},
        {"service": "default/impatient"},
        {"service": "default/empty"},
        {"service": "default/blackhole"},
    ],
    ids=lambda where: "-".join(where.values()).removeprefix("default/"),
)
LABELS = {
    "service_name",
    "service_instance_id",
    "k8s_cluster_name",
    "cloud_availability_zone",
    "cloud_region",
}
"""Loki's own choice among what the Collector leaves of the resource: all of the agent, none of a connection."""
ZONE_OF = {"node1": "zone-a", "node2": "zone-a", "node3": "zone-b"}


def attributes(fate: Fate) -> dict[str, object]:
    """Say what record and span of a connection have to tell, in the words of the contract."""
    found: dict[str, object] = {
        "k8s.namespace.name": "default",
        "k8s.service.name": fate.service.removeprefix("default/"),
        "k8s.node.name": fate.node,
        "server.address": fate.vip,
        "server.port": fate.port,
        "network.transport": fate.transport,
        "network.type": fate.network,
        "lb_hop.external_traffic_policy": fate.policy,
        "lb_hop.outcome": fate.outcome,
        "lb_hop.origin": fate.origin,
        "client.address": fate.client[0],
        "client.port": fate.client[1],
    }
    if failed(fate):
        found["error.type"] = fate.failure or fate.outcome
    if fate.source and fate.destination:
        found |= {
            "lb_hop.hop": fate.hop,
            "lb_hop.zone.crossed": fate.zone_crossed,
            "source.address": fate.source[0],
            "source.port": fate.source[1],
            "destination.address": fate.destination[0],
            "destination.port": fate.destination[1],
            "destination.k8s.node.name": fate.destination_node,
            "destination.k8s.pod.name": fate.pod,
            "destination.k8s.namespace.name": "default",
            "destination.cloud.availability_zone": ZONE_OF[str(fate.destination_node)],
        }
    return found


def failed(fate: Fate) -> bool:
    """Tell whether a connection came to nothing."""
    return fate.outcome != "forwarded" or fate.failure is not None


def measured(fate: Fate) -> set[str]:
    """Name what is told of a connection beyond what the lab can know exactly."""
    if fate.transport == "udp":
        return set()  # known from conntrack alone
    names = {"network.interface.name", "lb_hop.syn.retransmits"}
    if fate.outcome == "forwarded":
        names.add("lb_hop.forward.duration")
    if fate.answered:
        names.add("lb_hop.handshake.duration")
    return names


def span_of(scene: Scene, fate: Fate) -> Span:
    """Find the one span of a connection, by its client."""
    query = (
        f'{{ span.client.address = "{fate.client[0]}" && span.client.port = {fate.client[1]}'
        f' && span.server.address = "{fate.vip}" }}'
    )
    (found,) = scene.tempo.search(query, scene.started, scene.ended)
    (span,) = scene.tempo.trace(found.trace_id)
    return span


def record_of(scene: Scene, fate: Fate) -> Line:
    """Find the one log record of a connection, by its client."""
    query = (
        f'{{service_name="otel-lb-hop"}} | client_address="{fate.client[0]}" | client_port="{fate.client[1]}"'
        f' | server_address="{fate.vip}"'
    )
    (line,) = scene.loki.lines(query, scene.started, scene.ended)
    return line


@EVERY_KIND
def test_a_span_in_tempo(scene: Scene, where: dict[str, str]) -> None:
    """Name of low cardinality, kind server, error if it failed, events for what happened, the facts as attributes."""
    fate = scene.truth.select(**where)[0]
    span = span_of(scene, fate)
    assert span.name == f"lb_hop {fate.service}"
    assert span.kind == "SPAN_KIND_SERVER"
    assert span.status == ("STATUS_CODE_ERROR" if failed(fate) else "STATUS_CODE_UNSET")
    assert span.parent_id == ""
    tcp = fate.transport == "tcp" and fate.outcome == "forwarded"
    events = [name for name, there in (("translated", tcp), ("syn_ack", tcp and fate.answered)) if there]
    assert [name for name, _ in span.events] == events
    times = [span.start_ns, *(moment for _, moment in span.events), span.end_ns]
    assert times == sorted(times)
    assert scene.started <= span.start_ns / 1e9 <= scene.ended
    assert span.attributes.keys() - measured(fate) == attributes(fate).keys()
    assert {name: span.attributes[name] for name in attributes(fate)} == attributes(fate)
    assert measured(fate) <= span.attributes.keys()
    agent = {"service.name": "otel-lb-hop", "k8s.cluster.name": CLUSTER_NAME, "k8s.namespace.name": AGENT_NAMESPACE}
    assert agent.items() <= span.resource.items()
    assert span.resource["k8s.node.name"] == fate.node
    assert span.resource["cloud.availability_zone"] == ZONE_OF[fate.node]


@EVERY_KIND
def test_a_log_record_in_loki(scene: Scene, where: dict[str, str]) -> None:
    """The agent's attributes are labels, the connection's are structured metadata, and it is known how bad it is."""
    fate = scene.truth.select(**where)[0]
    line = record_of(scene, fate)
    assert line.labels.keys() == LABELS
    assert line.labels["service_name"] == "otel-lb-hop"
    assert line.labels["cloud_availability_zone"] == ZONE_OF[fate.node]
    expected = {name.replace(".", "_"): _text(value) for name, value in attributes(fate).items()}
    assert {name: line.metadata.get(name) for name in expected} == expected
    assert {name.replace(".", "_") for name in measured(fate)} <= line.metadata.keys()
    severity = ("WARN", "13", "warn") if failed(fate) else ("INFO", "9", "info")
    found = tuple(line.metadata[name] for name in ("severity_text", "severity_number", "detected_level"))
    assert found == severity
    assert line.metadata["scope_name"] == "otel_lb_hop"
    assert fate.service in line.text
    assert scene.started <= line.time_ns / 1e9 <= scene.ended


def test_streams_do_not_grow_with_traffic(scene: Scene) -> None:
    """A stream for each agent, whatever is written to it."""
    streams = scene.loki.streams('{service_name="otel-lb-hop"}', scene.started, scene.at)
    assert len({stream["service_instance_id"] for stream in streams}) == len(streams) == len(scene.agents)
    assert all(stream.keys() == LABELS for stream in streams)


@EVERY_KIND
def test_from_a_record_to_its_trace_and_back(scene: Scene, where: dict[str, str]) -> None:
    """The ids of a record lead to the span of the same connection; and the span's trace id to the record."""
    fate = scene.truth.select(**where)[-1]
    line = record_of(scene, fate)
    (span,) = scene.tempo.trace(line.metadata["trace_id"])
    assert span.span_id == line.metadata["span_id"]
    assert (span.attributes["client.address"], span.attributes["client.port"]) == fate.client
    assert span.start_ns == line.time_ns
    (back,) = scene.loki.lines(
        f'{{service_name="otel-lb-hop"}} | trace_id="{span.trace_id}"', scene.started, scene.ended
    )
    assert back == line


def test_an_unknown_trace(scene: Scene) -> None:
    """Tempo has no span for an id that nobody sent, so finding one means something."""
    assert scene.tempo.trace("0af7651916cd43dd8448eb211c80319c") == []


def _text(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
