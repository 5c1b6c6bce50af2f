"""Every query of docs/queries.md on the real backends, against what the lab saw itself."""

from __future__ import annotations

import statistics
from collections import Counter
from typing import TYPE_CHECKING

import pytest

from tests.backends import queries
from tests.backends.scene import needs_scene

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from tests.backends.queries import Answer, Query
    from tests.backends.scene import Fate, Scene
    from tests.backends.tempo import Found

pytestmark = needs_scene

ROUGHLY = 0.08
"""increase() extends what it saw by up to two export intervals; the window is many of them."""
SHARE = 0.03
"""Shares are off by less: of all series alike, but for the phase of each agent's exports."""
ZONE_OF = {"node1": "zone-a", "node2": "zone-a", "node3": "zone-b"}

EXPECTED: dict[str, Callable[[Scene, Answer], None]] = {}
BOUNDS = [number * 10.0**power for power in range(-6, 1) for number in (1, 2.5, 5)]
"""Of the histograms, in seconds."""


def expects(name: str) -> Callable[[Callable[[Scene, Answer], None]], Callable[[Scene, Answer], None]]:
    """Make a function the expectation of a query."""

    def note(function: Callable[[Scene, Answer], None]) -> Callable[[Scene, Answer], None]:
        assert name not in EXPECTED
        EXPECTED[name] = function
        return function

    return note


QUERIES = queries.read(queries.PAGE.read_text(encoding="utf-8"))


def test_each_query_has_a_name_and_an_expectation() -> None:
    """And nothing is expected that is not on the page."""
    assert sorted(query.name for query in QUERIES) == sorted(EXPECTED)


def test_no_query_is_overlooked() -> None:
    """Every fenced block of a query language has been read."""
    page = queries.PAGE.read_text(encoding="utf-8")
    assert len(QUERIES) == sum(page.count(f"```{language}\n") for language in queries.LANGUAGES)


@pytest.mark.parametrize("query", QUERIES, ids=lambda query: query.name)
def test_query(scene: Scene, query: Query) -> None:
    """It answers what the lab saw; and what stands below it on the page has the form of an answer."""
    answer = queries.ask(scene, query)
    EXPECTED[query.name](scene, answer)
    assert query.columns == queries.tabulate(query, answer).columns


# Who takes in what


def named(fate: Fate) -> str:
    """Give the Service's name without its namespace, as most queries have it."""
    return fate.service.removeprefix("default/")


def tally(fates: Iterable[Fate], key: Callable[[Fate], tuple[str, ...]]) -> dict[tuple[str, ...], int]:
    """Count connections by a key of words."""
    return dict(Counter(key(fate) for fate in fates))


def check_counts(found: Mapping[tuple[str, ...], float], expected: Mapping[tuple[str, ...], int]) -> None:
    """Hold what increase() told against counts; what is 0 may be told or not."""
    assert {key: value for key, value in found.items() if value} == pytest.approx(dict(expected), rel=ROUGHLY)


def check_shares(
    found: Mapping[tuple[str, ...], float],
    part: Mapping[tuple[str, ...], int],
    whole: Callable[[tuple[str, ...]], int],
) -> None:
    """Hold shares against counts; what is 0 may be told or not."""
    expected = {key: count / whole(key) for key, count in part.items()}
    assert {key: value for key, value in found.items() if value} == pytest.approx(expected, abs=SHARE)


@expects("taken-in")
def _(scene: Scene, answer: Answer) -> None:
    expected = tally(scene.truth.select(origin="external"), lambda fate: (named(fate), fate.node))
    check_counts(answer.values("k8s_service_name", "k8s_node_name"), expected)


@expects("taken-in-share")
def _(scene: Scene, answer: Answer) -> None:
    fates = scene.truth.select(origin="external", vip="10.0.10.0")
    check_shares(answer.values("k8s_node_name"), tally(fates, lambda fate: (fate.node,)), lambda _: len(fates))


@expects("imbalance")
def _(scene: Scene, answer: Answer) -> None:
    expected = {}
    for (vip,) in scene.truth.count("vip"):
        by_node = scene.truth.count("node", vip=vip, origin="external")
        expected[str(vip),] = max(by_node.values()) / statistics.mean(by_node.values())
    assert answer.values("server_address") == pytest.approx(expected, abs=SHARE)


@expects("owner")
def _(scene: Scene, answer: Answer) -> None:
    counts = tally(scene.truth.select(origin="external"), lambda fate: (fate.vip, fate.node))
    owners = Counter(vip for vip, _ in counts)
    alone = {key: count for key, count in counts.items() if owners[key[0]] == 1}
    check_counts(answer.values("server_address", "k8s_node_name"), alone)
    assert alone.keys() >= {("10.0.10.6", "node2"), ("fd00:10::6", "node2")}


# Hops and zones


@expects("hop-share")
def _(scene: Scene, answer: Answer) -> None:
    fates = scene.truth.select(origin="external", outcome="forwarded")
    of_service = Counter(map(named, fates))
    check_shares(
        answer.values("k8s_service_name", "lb_hop_hop"),
        tally(fates, lambda fate: (named(fate), str(fate.hop))),
        lambda key: of_service[key[0]],
    )


@expects("node-to-node")
def _(scene: Scene, answer: Answer) -> None:
    fates = scene.truth.select(service="default/web", outcome="forwarded", origin="external")
    check_counts(
        answer.values("k8s_node_name", "destination_k8s_node_name", "lb_hop_hop"),
        tally(fates, lambda fate: (fate.node, str(fate.destination_node), str(fate.hop))),
    )


@expects("zone-crossed-share")
def _(scene: Scene, answer: Answer) -> None:
    forwarded = Counter(map(named, scene.truth.select(outcome="forwarded", origin="external")))
    crossed = tally(scene.truth.select(zone_crossed=True, origin="external"), lambda fate: (named(fate),))
    check_shares(answer.values("k8s_service_name"), crossed, lambda key: forwarded[key[0]])


@expects("zone-to-zone")
def _(scene: Scene, answer: Answer) -> None:
    fates = scene.truth.select(outcome="forwarded")
    check_counts(
        answer.values("from_zone", "to_zone"),
        tally(fates, lambda fate: (ZONE_OF[fate.node], ZONE_OF[str(fate.destination_node)])),
    )


# Times


def upper_bound(seconds: float) -> float:
    """Name the end of the histogram's bucket that a time is in."""
    return min(bound for bound in BOUNDS if bound >= seconds)


def answered(scene: Scene, service: str, **where: object) -> list[float]:
    """List how long the clients of a Service themselves waited for their handshakes."""
    fates = scene.truth.select(service=f"default/{service}", transport="tcp", answered=True, **where)
    return [fate.connect_seconds for fate in fates]


@expects("handshake-median")
def _(scene: Scene, answer: Answer) -> None:
    """Know that a node sees the SYN after its client sent it, and the answer before its client has it."""
    found = answer.values("lb_hop_hop")
    assert found.keys() == {("none",), ("avoidable",), ("required",)}
    for (hop,), median in found.items():
        assert 0 < median < upper_bound(statistics.median(answered(scene, "web", hop=hop)))


@expects("hop-cost")
def _(scene: Scene, answer: Answer) -> None:
    medians = queries.ask(scene, query_named("handshake-median")).values("lb_hop_hop")
    expected = {(hop,): medians[hop,] - medians["none",] for hop in ("avoidable", "required")}
    assert answer.values("lb_hop_hop") == pytest.approx(expected)


@expects("slow-share")
def _(scene: Scene, answer: Answer) -> None:
    found = answer.values("k8s_service_name")
    assert {key: value for key, value in found.items() if value > SHARE} == pytest.approx({("slow",): 1})
    assert min(answered(scene, "slow")) > 0.5  # the lab's own word for it
    assert found.keys() >= {("web",), ("web-local",), ("l2",)}


@expects("forward-p99")
def _(scene: Scene, answer: Answer) -> None:
    found = answer.values("k8s_node_name")
    assert found.keys() == {("node1",), ("node2",), ("node3",)}
    longest = upper_bound(max(fate.connect_seconds for fate in scene.truth.fates))
    assert all(0 < value < longest for value in found.values())


def check_traces(scene: Scene, found: list[Found], fates: list[Fate]) -> None:
    """Hold the traces that were found against connections: each one's client, and no other."""
    clients = []
    for each in found:
        (span,) = scene.tempo.trace(each.trace_id)
        clients.append((span.attributes["client.address"], span.attributes["client.port"]))
    assert sorted(clients) == sorted(fate.client for fate in fates)


def query_named(name: str) -> Query:
    """Pick a query of the page."""
    return next(query for query in QUERIES if query.name == name)


@expects("slow-traces")
def _(scene: Scene, answer: Answer) -> None:
    check_traces(scene, answer.traces, scene.truth.select(service="default/slow"))
    assert queries.ask(scene, query_named("slow-traces"), "web").traces == []


@expects("long-traces")
def _(scene: Scene, answer: Answer) -> None:
    check_traces(scene, answer.traces, scene.truth.select(service="default/slow"))
    assert queries.ask(scene, query_named("long-traces"), "firewalled").traces == []
    assert queries.ask(scene, query_named("long-traces"), "web").traces == []


def check_lines(answer: Answer, fates: list[Fate]) -> None:
    """Hold log records against connections."""
    clients = [(line.metadata["client_address"], int(line.metadata["client_port"])) for line in answer.lines]
    assert sorted(clients) == sorted(fate.client for fate in fates)


@expects("slow-records")
def _(scene: Scene, answer: Answer) -> None:
    check_lines(answer, scene.truth.select(service="default/slow"))


# Losses


@expects("unforwarded")
def _(scene: Scene, answer: Answer) -> None:
    fates = [fate for fate in scene.truth.fates if fate.outcome != "forwarded"]
    check_counts(
        answer.values("k8s_service_name", "k8s_node_name", "lb_hop_outcome"),
        tally(fates, lambda fate: (named(fate), fate.node, fate.outcome)),
    )


@expects("handshake-failures")
def _(scene: Scene, answer: Answer) -> None:
    fates = [fate for fate in scene.truth.fates if fate.failure]
    check_counts(
        answer.values("k8s_service_name", "k8s_node_name", "error_type"),
        tally(fates, lambda fate: (named(fate), fate.node, str(fate.failure))),
    )


def lost(fate: Fate) -> bool:
    """Tell whether a connection came to nothing."""
    return fate.failure is not None or fate.outcome != "forwarded"


@expects("lost-share")
def _(scene: Scene, answer: Answer) -> None:
    all_of = Counter((named(fate), fate.vip) for fate in scene.truth.fates)
    part = tally(filter(lost, scene.truth.fates), lambda fate: (named(fate), fate.vip))
    check_shares(answer.values("k8s_service_name", "server_address"), part, lambda key: all_of[key[0], key[1]])


@expects("failures-by-reason")
def _(scene: Scene, answer: Answer) -> None:
    fates = filter(lost, scene.truth.select(node="node1"))
    expected = tally(fates, lambda fate: (named(fate), fate.failure or fate.outcome))
    assert answer.values("k8s_service_name", "error_type") == expected


@expects("failed-records")
def _(scene: Scene, answer: Answer) -> None:
    check_lines(answer, scene.truth.select(service="default/firewalled"))
    assert all(line.text.endswith(": timeout") for line in answer.lines)


@expects("failed-traces")
def _(scene: Scene, answer: Answer) -> None:
    check_traces(scene, answer.traces, scene.truth.select(service="default/firewalled"))


@expects("refused-on-node")
def _(scene: Scene, answer: Answer) -> None:
    check_traces(scene, answer.traces, scene.truth.select(node="node1", failure="refused"))


@expects("replies-unseen")
def _(scene: Scene, answer: Answer) -> None:
    expected = tally(scene.truth.select(service="default/impatient"), lambda fate: (named(fate), fate.node))
    check_counts(answer.values("k8s_service_name", "k8s_node_name"), expected)


@expects("retransmits")
def _(scene: Scene, answer: Answer) -> None:
    made = Counter(fate.service for fate in scene.truth.select(transport="tcp"))
    part: dict[tuple[str, ...], int] = {
        (service.removeprefix("default/"),): count for service, count in scene.truth.retransmits.items()
    }
    check_shares(answer.values("k8s_service_name"), part, lambda key: made[f"default/{key[0]}"])


# Who it was


@expects("who")
def _(scene: Scene, answer: Answer) -> None:
    fate = queries.connection(scene)
    (line,) = answer.lines
    assert line.text == f"client {fate.client[0]} port {fate.client[1]} by {fate.node} to {fate.pod}"


@expects("trace-of-source")
def _(scene: Scene, answer: Answer) -> None:
    check_traces(scene, answer.traces, [queries.connection(scene)])


@expects("trace-of-client")
def _(scene: Scene, answer: Answer) -> None:
    fate = queries.connection(scene)
    (found,) = answer.traces
    (span,) = scene.tempo.trace(found.trace_id)
    assert (span.attributes["source.address"], span.attributes["source.port"]) == fate.source
    assert (span.attributes["destination.address"], span.attributes["destination.port"]) == fate.destination


@expects("top-clients")
def _(scene: Scene, answer: Answer) -> None:
    by_client = Counter(fate.client[0] for fate in scene.truth.select(service="default/web"))
    assert answer.values("client_address") == {(client,): count for client, count in by_client.most_common(3)}
    values = [sample.value for sample in answer.samples]
    assert values == sorted(values, reverse=True)


@expects("record-of-trace")
def _(scene: Scene, answer: Answer) -> None:
    check_lines(answer, [queries.connection(scene)])


# What Local would change


def dark(fate: Fate) -> bool:
    """Tell whether a connection came in on a node without a ready endpoint of its Service, of policy Cluster."""
    nodes_of = {
        "web": {"node1", "node2"},
        "dns": {"node1", "node2"},
        "l2": {"node1", "node3"},
        "slow": {"node1"},
        "wrong-port": {"node1", "node2"},
        "firewalled": {"node2"},
        "impatient": {"node2"},
        "empty": set(),
        "blackhole": {"node1"},
    }
    return fate.policy == "Cluster" and fate.origin == "external" and fate.node not in nodes_of[named(fate)]


@expects("local-dark-nodes")
def _(scene: Scene, answer: Answer) -> None:
    expected = tally(filter(dark, scene.truth.fates), lambda fate: (named(fate), fate.node))
    check_counts(answer.values("k8s_service_name", "k8s_node_name"), expected)


@expects("local-dark-share")
def _(scene: Scene, answer: Answer) -> None:
    made = Counter(map(named, scene.truth.select(origin="external")))
    part = tally(filter(dark, scene.truth.fates), lambda fate: (named(fate),))
    check_shares(answer.values("k8s_service_name"), part, lambda key: made[key[0]])


@expects("local-saved-share")
def _(scene: Scene, answer: Answer) -> None:
    forwarded = Counter(map(named, scene.truth.select(origin="external", outcome="forwarded", policy="Cluster")))
    part = tally(scene.truth.select(origin="external", hop="avoidable"), lambda fate: (named(fate),))
    check_shares(answer.values("k8s_service_name"), part, lambda key: forwarded[key[0]])


# The agents


@expects("agents")
def _(scene: Scene, answer: Answer) -> None:
    (sample,) = answer.samples
    assert sample.value == len(scene.agents)


@expects("nodes-without-agent")
def _(scene: Scene, answer: Answer) -> None:
    (sample,) = answer.samples
    assert sample.value == len(scene.lab.nodes) - len(scene.agents) == 0


@expects("unhealthy")
def _(scene: Scene, answer: Answer) -> None:
    assert answer.samples == []
    parts = scene.prometheus.query("count by (k8s_node_name) (lb_hop_part_healthy == 1)", scene.at)
    assert {sample.labels["k8s_node_name"] for sample in parts} == set(ZONE_OF)


@expects("topology-age")
def _(_: Scene, answer: Answer) -> None:
    found = answer.values("k8s_node_name")
    assert found.keys() == {(node,) for node in ZONE_OF}
    assert all(0 <= age < 60 for age in found.values())


@expects("records-exported")
def _(scene: Scene, answer: Answer) -> None:
    everything = len(scene.truth.fates)
    check_counts(answer.values("lb_hop_signal"), {("logs",): everything, ("traces",): everything})


@expects("records-dropped")
def _(scene: Scene, answer: Answer) -> None:
    assert answer.samples == []
    assert scene.prometheus.query("count(lb_hop_records_dropped_total)", scene.at)[0].value > 3


@expects("ledger")
def _(_: Scene, answer: Answer) -> None:
    assert answer.values("k8s_node_name") == {(node,): 0 for node in ZONE_OF}


@expects("events-dropped")
def _(scene: Scene, answer: Answer) -> None:
    assert answer.samples == []
    assert scene.prometheus.query("count(lb_hop_events_dropped_total)", scene.at)[0].value > 3


@expects("table-usage")
def _(scene: Scene, answer: Answer) -> None:
    found = answer.values("lb_hop_map")
    (ports,) = scene.prometheus.query("max(lb_hop_vip_ports)", scene.at)
    (limit,) = scene.prometheus.query('max(lb_hop_map_limit{lb_hop_map="vip_ports"})', scene.at)
    assert found["vip_ports",] == pytest.approx(ports.value / limit.value)
    assert all(0 < usage < 1 for usage in found.values())
