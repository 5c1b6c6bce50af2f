"""Every query of every panel and variable, asked of real backends, answers what the lab's truth says.

A point of a graph is one evaluation, so a range query is asked at one moment: with the scene's window as
$__rate_interval and $__range. Panels of one Service are asked for every Service of the scene, those of a node for every
node.
"""

from __future__ import annotations

import math
import re
import time
from collections import Counter, defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

import pytest
import yaml

from otel_lb_hop.core.layout import BOUNDS_NS
from tests.backends import grafana
from tests.backends.grafana import All
from tests.backends.prometheus import Prometheus
from tests.backends.scene import ALL, CLUSTER_NAME, SERVICES, Fate, Scene, needs_scene
from tests.lab.waiting import wait_for

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from tests.backends.prometheus import Sample

pytestmark = needs_scene

TOLERANCE = 0.1
"""rate() and increase() stretch what they saw to the window's ends: see `Scene`; this is for a slow machine."""
EVERYTHING = All(".*")
LAB: dict[str, list[str]] = {"cluster": [CLUSTER_NAME]}
BEYOND_SECONDS = 0.5
"""Longer than any handshake that is answered at once, shorter than one whose first SYN is lost."""

DASHBOARDS = grafana.dashboards()
TARGETS = {target.key: target for dashboard in DASHBOARDS.values() for target in grafana.targets(dashboard)}

Key: TypeAlias = tuple[str, ...]
Values: TypeAlias = dict[str, str | list[str] | All]

LABELS: dict[str, Callable[[Fate], str]] = {
    "k8s_namespace_name": lambda fate: fate.service.split("/")[0],
    "k8s_service_name": lambda fate: fate.service.split("/")[1],
    "server_address": lambda fate: fate.vip,
    "server_port": lambda fate: str(fate.port),
    "network_transport": lambda fate: fate.transport,
    "k8s_node_name": lambda fate: fate.node,
    "destination_k8s_node_name": lambda fate: fate.destination_node or "",
    "lb_hop_hop": lambda fate: fate.hop or "",
    "lb_hop_outcome": lambda fate: fate.outcome,
    "error_type": lambda fate: fate.failure or "",
    "reason": lambda fate: fate.failure or fate.outcome,
}
"""What the contract says of a fate."""

SERVICE = ("k8s_namespace_name", "k8s_service_name")
VIP = (*SERVICE, "server_address")
NODE = ("k8s_node_name",)
VIP_PORT = (*NODE, "server_address", "server_port", "network_transport")


class Choice(NamedTuple):
    """What an operator has chosen on a dashboard, and the measured connections that this is about."""

    scene: Scene
    prometheus: Prometheus
    """The scene's, or for the Collector's own metrics another."""
    at: float
    window: float
    values: Values
    fates: list[Fate]

    def fill(self, text: str) -> str:
        """Put in the variables as Grafana would."""
        span = f"{round(self.window * 1000)}ms"
        return grafana.fill(text, {**self.values, "__rate_interval": span, "__range": span})

    def ask(self, promql: str, at: float | None = None) -> list[Sample]:
        """Ask Prometheus."""
        return self.prometheus.query(self.fill(promql), at or self.at)

    def grown(self, selector: str, by: tuple[str, ...]) -> dict[Key, float]:
        """Take a counter's value before the measured traffic from that after it: what it grew by, to the last one."""
        grown: Counter[Key] = Counter()
        for sign, moment in ((1, self.at), (-1, self.at - self.window)):
            for labels, value in self.ask(selector, moment):
                grown[tuple(labels.get(label, "") for label in by)] += sign * round(value)
        return dict(grown)


Numbers: TypeAlias = "Mapping[Key, float]"


class Expect(NamedTuple):
    """The labels that a query's series have, and their values; what is 0 may be absent."""

    labels: tuple[str, ...]
    numbers: Callable[[Choice], Numbers]
    tolerance: float = TOLERANCE


def external(fate: Fate) -> bool:  # noqa: D103 - its name says it
    return fate.origin == "external"


def forwarded(fate: Fate) -> bool:
    """Not of those that began inside, as most panels."""
    return external(fate) and fate.outcome == "forwarded"


def unforwarded(fate: Fate) -> bool:  # noqa: D103
    return fate.outcome != "forwarded"


def failed(fate: Fate) -> bool:  # noqa: D103
    return fate.failure is not None


def lost(fate: Fate) -> bool:  # noqa: D103
    return unforwarded(fate) or failed(fate)


def hopped(fate: Fate) -> bool:  # noqa: D103
    return forwarded(fate) and fate.hop in {"avoidable", "required"}


def avoidable(fate: Fate) -> bool:  # noqa: D103
    return forwarded(fate) and fate.hop == "avoidable"


def crossed(fate: Fate) -> bool:  # noqa: D103
    return forwarded(fate) and fate.zone_crossed is True


def unseen(fate: Fate) -> bool:  # noqa: D103
    return fate.outcome == "forwarded" and fate.transport == "tcp" and not fate.answered and not failed(fate)


def sent_again(fate: Fate) -> bool:
    """Of those whose client heard nothing and waited: all but the impatient ones; and of those whose first was lost."""
    unheard = fate.failure == "timeout" or fate.outcome in {"dropped", "no_local_endpoints"}
    return unheard or fate.service == "default/slow"


def answered(fate: Fate) -> bool:
    """Those whose handshake was measured."""
    return fate.answered and fate.transport == "tcp"


def translated(fate: Fate) -> bool:
    """Those whose translation was measured."""
    return fate.outcome == "forwarded" and fate.transport == "tcp"


def everything(fate: Fate) -> bool:  # noqa: ARG001, D103
    return True


def nobody(fate: Fate) -> bool:  # noqa: ARG001, D103
    return False


def tally(fates: list[Fate], by: tuple[str, ...], which: Callable[[Fate], bool]) -> Counter[Key]:
    """Count fates by labels."""
    return Counter(tuple(LABELS[label](fate) for label in by) for fate in fates if which(fate))


def counts(which: Callable[[Fate], bool], *by: str) -> Expect:
    """Expect an increase."""
    return Expect(by, lambda choice: tally(choice.fates, by, which))


def rates(which: Callable[[Fate], bool], *by: str) -> Expect:
    """Expect a rate."""
    return Expect(by, lambda choice: {key: n / choice.window for key, n in tally(choice.fates, by, which).items()})


def shares(part: Callable[[Fate], bool], whole: Callable[[Fate], bool], *by: str, of: tuple[str, ...] = ()) -> Expect:
    """Expect parts of wholes that are grouped by the labels `of`."""

    def numbers(choice: Choice) -> Numbers:
        wholes = tally(choice.fates, of, whole)
        if not by:
            return {(): tally(choice.fates, (), part)[()] / wholes[()]} if wholes else {}
        places = [by.index(label) for label in of]
        return {
            key: n / wholes[tuple(key[place] for place in places)] for key, n in tally(choice.fates, by, part).items()
        }

    return Expect(by, numbers)


def same(value: float) -> Expect:
    """Expect one number, exactly."""
    return Expect((), lambda _: {(): value}, 0)


def balance(choice: Choice) -> Numbers:
    """Divide what the busiest node took in by the mean of all that took in something."""
    taken = tally(choice.fates, NODE, external).values()
    return {(): max(taken) * len(taken) / sum(taken)} if taken else {}


def taking_nodes(choice: Choice) -> Numbers:
    """Count the nodes that took in something, by VIP."""
    return Counter(key[:-1] for key in tally(choice.fates, (*VIP, *NODE), external))


def single_owners(choice: Choice) -> Numbers:
    """Count what came in at VIPs with one node alone."""
    nodes = taking_nodes(choice)
    return {key: n for key, n in tally(choice.fates, (*VIP, *NODE), external).items() if nodes[key[:-1]] == 1}


def endpoints(place: str) -> Expect:
    """Count, from the scene's Services, the ready pods that are in a place seen from each node."""
    zones = dict(zip(ALL, ("zone-a", "zone-a", "zone-b"), strict=True))

    def place_of(pod: str, node: str) -> str:
        home = pod.split("-", maxsplit=1)[0]
        if home == node:
            return "local"
        return "same_zone" if zones[home] == zones[node] else "other_zone"

    def numbers(choice: Choice) -> Numbers:
        return {
            (node, vip, str(service.port), service.transport.name.lower()): sum(
                place_of(pod, node) == place for pod in service.pods if service.ready
            )
            for service in SERVICES
            if ("default", service.name) == (choice.values["namespace"], choice.values["service"])
            for vip in service.vips
            if choice.values["vip"] in (EVERYTHING, [vip])
            for node in ALL
        }

    return Expect(VIP_PORT, numbers, 0)


def has_no_pod_here(fate: Fate) -> bool:
    """Whether a connection from outside came in on a node without a ready pod of its Service."""
    (service,) = (each for each in SERVICES if f"default/{each.name}" == fate.service)
    return external(fate) and not (service.ready and any(pod.startswith(fate.node) for pod in service.pods))


def quantile(fraction: float, metric: str, matchers: str, by: tuple[str, ...] = ("lb_hop_hop",)) -> Expect:
    """Expect what interpolation gives in buckets that are added up here, after they were found to hold the truth."""
    measured = answered if metric == HANDSHAKE else translated

    def numbers(choice: Choice) -> Numbers:
        exactly = choice.grown(f"{metric}_count{{{matchers}}}", by)
        assert +Counter(exactly) == tally(choice.fates, by, measured)
        sums: dict[Key, float] = defaultdict(float)
        for labels, value in choice.ask(f"increase({metric}_bucket{{{matchers}}}[$__range])"):
            sums[tuple(labels[label] for label in (*by, "le"))] += value
        les = sorted({key[-1] for key in sums}, key=float)
        found = {key[:-1]: interpolate(fraction, [sums[*key[:-1], le] for le in les], les) for key in sums}
        return {key: value for key, value in found.items() if value is not None}

    return Expect(by, numbers, 1e-6)


def interpolate(fraction: float, cumulative: list[float], les: list[str]) -> float | None:
    """Find the value below which a fraction of all lies, on a straight line through its bucket."""
    if not cumulative or not cumulative[-1]:
        return None
    rank = fraction * cumulative[-1]
    place = next(index for index, count in enumerate(cumulative) if count >= rank)
    if les[place] == "+Inf":
        return float(les[place - 1])
    low, before = (float(les[place - 1]), cumulative[place - 1]) if place else (0.0, 0)
    return low + (float(les[place]) - low) * (rank - before) / (cumulative[place] - before)


HANDSHAKE, FORWARD = "lb_hop_handshake_duration_seconds", "lb_hop_forward_duration_seconds"
SERVICE_MATCHERS = 'k8s_namespace_name="$namespace", k8s_service_name="$service", server_address=~"$vip"'
AGENT_MATCHERS = '{k8s_node_name=~"$node"}'
NODE_MATCHERS = 'k8s_node_name="$node"'


def hop_adds(choice: Choice) -> Numbers:
    """Take the median without a hop from those with one."""
    medians = quantile(0.5, HANDSHAKE, SERVICE_MATCHERS).numbers(choice)
    if ("none",) not in medians:
        return {}
    return {key: value - medians["none",] for key, value in medians.items() if key != ("none",)}


def buckets(choice: Choice) -> Numbers:
    """Tell the growth of each bucket, which for the last one is what was answered."""
    grown = choice.grown(f"lb_hop_handshake_duration_seconds_bucket{{{SERVICE_MATCHERS}}}", ("le",))
    assert grown.get(("+Inf",), 0) == sum(answered(fate) for fate in choice.fates)
    assert not grown or len(grown) == len(BOUNDS_NS) + 1
    return {key: value / choice.window for key, value in grown.items()}


def share_of_all(choice: Choice) -> Numbers:
    """Divide what this node took in by what all did."""
    whole = sum(external(fate) for fate in choice.scene.truth.fates)
    return {(): sum(external(fate) for fate in choice.fates) / whole}


def share_of_vips(choice: Choice) -> Numbers:
    """Divide what this node took in by what all did, for each VIP."""
    wholes = tally(choice.scene.truth.fates, VIP, external)
    return {key: n / wholes[key] for key, n in tally(choice.fates, VIP, external).items()}


def of_each_node(value: Callable[[Choice], float]) -> Callable[[Choice], Numbers]:
    """Expect the same of each agent."""
    return lambda choice: {(node,): value(choice) for node in chosen_nodes(choice)}


def chosen_nodes(choice: Choice) -> list[str]:
    """List the nodes that the Agents dashboard is about."""
    nodes = choice.values["node"]
    return nodes if isinstance(nodes, list) else [*ALL]


def vip_ports(_: Choice) -> float:
    """Count the VIP ports of the scene."""
    return sum(len(service.vips) for service in SERVICES)


def table_shares(choice: Choice) -> Numbers:
    """Divide, for each kernel table, the entries of the fullest by what it can hold."""
    limits = {
        (s.labels["lb_hop_map"], s.labels["k8s_node_name"]): s.value
        for s in choice.ask(f"lb_hop_map_limit{AGENT_MATCHERS}")
    }
    shares: dict[Key, float] = defaultdict(float)
    for labels, used in choice.ask(f"lb_hop_map_usage{AGENT_MATCHERS}"):
        name = labels["lb_hop_map"]
        shares[name,] = max(shares[name,], used / limits[name, labels["k8s_node_name"]])
    assert ("vips",) in shares or ("vip_ports",) in shares, [*shares]
    assert all(0 <= value < 1 for value in shares.values())
    return shares


def fullest_table(choice: Choice) -> Numbers:
    """Pick the fullest of all."""
    return {(): max(table_shares(choice).values())}


def series_shares(choice: Choice) -> Numbers:
    """Count the series of VIP ports that Prometheus has of each agent, a histogram as one."""
    counters = "connections|handshake_failures|replies_unseen|syn_retransmits"
    names = f"lb_hop_(({counters})_total|(forward|handshake)_duration_seconds_count|endpoints|connections_pending)"
    counted = choice.ask(f'count by (k8s_node_name) ({{__name__=~"{names}", {AGENT_MATCHERS[1:]})')
    return {(labels["k8s_node_name"],): value / 20_000 for labels, value in counted}


WAY = ("lb_hop_stage", "lb_hop_signal", "lb_hop_exporter")
SHARED_STAGES = ("kernel", "ring", "decode")
OWN_STAGES = ("encode", "queue", "transport")


def seen(choice: Choice) -> Numbers:
    """Expect every measured connection at every stage of logs and traces."""
    ways = [(stage, signal, "otlp") for stage in OWN_STAGES for signal in ("logs", "traces")]
    return dict.fromkeys([*((stage, "", "") for stage in SHARED_STAGES), *ways], len(choice.fates))


def delivered(choice: Choice) -> Numbers:
    """Expect every measured connection at the end of each way."""
    return {("transport", signal, "otlp"): float(len(choice.fates)) for signal in ("logs", "traces")}


def delivered_points(choice: Choice) -> Numbers:
    """Tell what the counter itself grew by."""
    grown = choice.grown(f"lb_hop_data_points_exported_total{AGENT_MATCHERS}", ())
    exports = len(chosen_nodes(choice)) * choice.window / 0.25
    assert grown[()] > exports * 100, "an export has hundreds of points"
    return {(): grown[()] / choice.window}


def nothing(_: Choice) -> Numbers:
    """Expect no value but 0."""
    return {}


EXPECTED: dict[str, Expect] = {
    "overview/Connections per second/A": rates(external),
    "overview/Took an extra hop/A": shares(hopped, forwarded),
    "overview/Avoidable hops/A": shares(avoidable, forwarded),
    "overview/Crossed a zone/A": shares(crossed, forwarded),
    "overview/Lost/A": shares(lost, everything),
    "overview/Nodes without an agent/A": same(0),
    "overview/Taken in by each node/A": rates(external, *NODE),
    "overview/Taken in by each VIP and node/A": counts(external, *VIP, *NODE),
    "overview/Taken in by each VIP and node/B": shares(external, external, *VIP, *NODE, of=VIP),
    "overview/Which node owns each VIP/A": Expect(VIP, taking_nodes, 0),
    "overview/Which node owns each VIP/B": Expect((*VIP, *NODE), single_owners),
    "overview/Nodes that take in each VIP/A": Expect(VIP, taking_nodes, 0),
    "overview/Hop classes/A": rates(forwarded, "lb_hop_hop"),
    "overview/Crossed a zone, by Service/A": shares(crossed, forwarded, *SERVICE, of=SERVICE),
    "overview/Busiest Services/A": counts(external, *SERVICE),
    "overview/Avoidable hops by Service/A": counts(avoidable, *SERVICE),
    "overview/Not forwarded, by reason/A": rates(unforwarded, "lb_hop_outcome"),
    "overview/Failed handshakes, by kind/A": rates(failed, "error_type"),
    "overview/Where connections are lost/A": counts(lost, *VIP, *NODE, "reason"),
    "service/Connections per second/A": rates(external),
    "service/Took an extra hop/A": shares(hopped, forwarded),
    "service/Avoidable hops/A": shares(avoidable, forwarded),
    "service/Crossed a zone/A": shares(crossed, forwarded),
    "service/Lost/A": shares(lost, everything),
    "service/Busiest node, times the even share/A": Expect((), balance),
    "service/Taken in by each node/A": rates(external, *NODE),
    "service/Share of each node, by VIP/A": shares(external, external, "server_address", *NODE, of=("server_address",)),
    "service/Hop classes/A": rates(forwarded, "lb_hop_hop"),
    "service/From node to node/A": counts(forwarded, *NODE, "destination_k8s_node_name", "lb_hop_hop"),
    "service/Endpoints, seen from each node/A": endpoints("local"),
    "service/Endpoints, seen from each node/B": endpoints("same_zone"),
    "service/Endpoints, seen from each node/C": endpoints("other_zone"),
    "service/Handshake time, by hop/A": quantile(0.5, HANDSHAKE, SERVICE_MATCHERS),
    "service/Handshake time, by hop/B": quantile(0.99, HANDSHAKE, SERVICE_MATCHERS),
    "service/What a hop adds (median)/A": Expect(("lb_hop_hop",), hop_adds, 1e-6),
    "service/Forward time, by hop/A": quantile(0.5, FORWARD, SERVICE_MATCHERS),
    "service/Forward time, by hop/B": quantile(0.99, FORWARD, SERVICE_MATCHERS),
    "service/Handshake times/A": Expect(("le",), buckets),
    "service/Not forwarded, by reason and node/A": rates(unforwarded, "lb_hop_outcome", *NODE),
    "service/Failed handshakes, by kind and node/A": rates(failed, "error_type", *NODE),
    "service/SYNs sent again, by node/A": rates(sent_again, *NODE),
    "service/Replies unseen, by node/A": rates(unseen, *NODE),
    "service/Would save the hop/A": shares(avoidable, external),
    "service/Would move to another node/A": shares(has_no_pod_here, external),
    "service/Nodes that would go dark/A": counts(has_no_pod_here, *VIP_PORT),
    "node/Connections per second/A": rates(external),
    "node/Share of all nodes/A": Expect((), share_of_all),
    "node/Took an extra hop/A": shares(hopped, forwarded),
    "node/Avoidable hops/A": shares(avoidable, forwarded),
    "node/Crossed a zone/A": shares(crossed, forwarded),
    "node/Lost/A": shares(lost, everything),
    "node/Taken in, by Service/A": rates(external, *SERVICE),
    "node/Sent to, by the backend's node/A": rates(forwarded, "destination_k8s_node_name"),
    "node/Taken in, by VIP/A": counts(external, *VIP),
    "node/Taken in, by VIP/B": Expect(VIP, share_of_vips),
    "node/Begun inside, by Service/A": rates(lambda fate: not external(fate), *SERVICE),
    "node/Forward time, by hop/A": quantile(0.5, FORWARD, NODE_MATCHERS),
    "node/Forward time, by hop/B": quantile(0.99, FORWARD, NODE_MATCHERS),
    "node/Handshake time, by hop/A": quantile(0.5, HANDSHAKE, NODE_MATCHERS),
    "node/Handshake time, by hop/B": quantile(0.99, HANDSHAKE, NODE_MATCHERS),
    "node/Not forwarded, by Service and reason/A": rates(unforwarded, *SERVICE, "lb_hop_outcome"),
    "node/Failed handshakes, by Service and kind/A": rates(failed, *SERVICE, "error_type"),
    "node/SYNs sent again, by Service/A": rates(sent_again, *SERVICE),
    "node/Replies unseen, by Service/A": rates(unseen, *SERVICE),
    "node/Lost, by VIP and reason/A": counts(lost, *VIP, "reason"),
    "node/Handshakes without a verdict/A": Expect(SERVICE, nothing),
    "agents/Agents reporting/A": Expect((), lambda choice: {(): len(chosen_nodes(choice))}, 0),
    "agents/Nodes without an agent/A": same(0),
    "agents/Parts that do not work/A": same(0),
    "agents/Records lost/A": same(0),
    "agents/Fullest kernel table/A": Expect((), fullest_table, 0),
    "agents/Which parts, and when/A": Expect(("k8s_node_name", "lb_hop_part"), nothing),
    "agents/Agents and nodes/A": same(3),
    "agents/Agents and nodes/B": same(3),
    "agents/VIP ports watched/A": Expect(NODE, of_each_node(vip_ports), 0),
    "agents/The ledger of records/A": Expect(WAY, seen),
    "agents/The ledger of records/B": Expect(WAY, delivered),
    "agents/The ledger of records/C": Expect(WAY, nothing),
    "agents/The ledger of records/D": Expect(WAY, nothing),
    "agents/Records dropped, by stage and reason/A": Expect(("lb_hop_stage", "reason"), nothing),
    "agents/Records delivered, by signal/A": Expect(
        ("lb_hop_signal", "lb_hop_exporter"),
        lambda choice: {key[1:]: n / choice.window for key, n in delivered(choice).items()},
    ),
    "agents/Data points of metrics/A": Expect((), delivered_points),
    "agents/Data points of metrics/B": Expect(("reason",), nothing),
    "agents/Packets and events that could not be told/A": Expect(("reason",), nothing),
    "agents/Series, share of the limit/A": Expect(NODE, series_shares, 0),
    "agents/Series beyond the limit/A": Expect(NODE, nothing),
    "agents/Kernel tables, share in use/A": Expect(("lb_hop_map",), table_shares, 0),
}
"""dashboard/panel/ref → what it answers. Those that are not of PromQL, or not known to a number, have tests below."""


def of(name: str, value: str) -> Callable[[Fate], bool]:
    """Pick the fates with this value of a field."""
    return lambda fate: bool(getattr(fate, name) == value)


def choices(scene: Scene, dashboard: str) -> Iterator[Choice]:
    """Make all choices that a dashboard is asked for."""

    def choice(values: Values, which: Callable[[Fate], bool]) -> Choice:
        fates = [fate for fate in scene.truth.fates if which(fate)]
        return Choice(scene, scene.prometheus, scene.at, scene.window, {"cluster": EVERYTHING} | values, fates)

    if dashboard == "overview":
        yield choice({"namespace": EVERYTHING, "service": EVERYTHING}, everything)
        two = ["dns", "web"]
        yield choice(
            {**LAB, "namespace": ["default"], "service": [*two]}, lambda fate: fate.service.split("/")[1] in two
        )
        yield choice({"namespace": ["elsewhere"], "service": EVERYTHING}, nobody)
    elif dashboard == "service":
        for service in SERVICES:
            chosen: Values = {"namespace": "default", "service": service.name, "slow": f"{BEYOND_SECONDS}s"}
            yield choice(chosen | {"vip": EVERYTHING}, of("service", f"default/{service.name}"))
        one = next(iter(SERVICES[0].vips))
        chosen = {
            **LAB,
            "namespace": "default",
            "service": SERVICES[0].name,
            "vip": [one],
            "slow": f"{BEYOND_SECONDS}s",
        }
        yield choice(chosen, of("vip", one))
        yield choice({**chosen, "namespace": "elsewhere", "vip": EVERYTHING}, nobody)
    elif dashboard == "node":
        for node in ALL:
            yield choice({**LAB, "node": node, "slow": f"{BEYOND_SECONDS}s"}, of("node", node))
    else:
        yield choice({"node": EVERYTHING}, everything)
        yield choice({**LAB, "node": ["node3"]}, of("node", "node3"))


def answer(samples: list[Sample], labels: tuple[str, ...]) -> Numbers:
    """Read an answer whose series have these labels and no others; a quantile of nothing is no number."""
    found: dict[Key, float] = {}
    for sample in samples:
        assert {*sample.labels} - {"__name__"} <= {*labels}, f"{sample.labels} has labels beyond {labels}"
        key = tuple(sample.labels.get(label, "") for label in labels)
        assert key not in found
        if not math.isnan(sample.value):
            found[key] = sample.value
    return found


ALWAYS_ZERO = {
    "overview/Nodes without an agent/A",
    "agents/Nodes without an agent/A",
    "agents/Parts that do not work/A",
    "agents/Records lost/A",
}


def differences(found: Numbers, expected: Numbers, tolerance: float) -> dict[Key, tuple[float, float]]:
    """Tell what is not as expected, (found, expected)."""
    pairs = {key: (found.get(key, 0.0), expected.get(key, 0.0)) for key in found.keys() | expected.keys()}
    return {key: pair for key, pair in pairs.items() if not math.isclose(*pair, rel_tol=tolerance, abs_tol=1e-12)}


@pytest.mark.parametrize("key", EXPECTED)
def test_a_panel_shows_what_is_true(scene: Scene, key: str) -> None:
    """Ask a panel's query for each choice."""
    target, expect = TARGETS[key], EXPECTED[key]
    told = 0.0
    for choice in choices(scene, key.split("/", maxsplit=1)[0]):
        found = answer(choice.ask(target.text), expect.labels)
        expected = expect.numbers(choice)
        assert differences(found, expected, expect.tolerance) == {}, f"{choice.values}\n{choice.fill(target.text)}"
        told += sum(expected.values())
        # One number is there also when it is 0: "nothing came in" is something else.
        assert expect.labels or found.keys() >= expected.keys()
        if key in ALWAYS_ZERO:
            assert found == {(): 0}
        elif expect.numbers is nothing and choice.fates:
            assert choice.ask(re.sub(" (> |== )0$", "", target.text)), "it would be empty whatever happened"
    if key not in ALWAYS_ZERO and expect.numbers is not nothing:
        assert told > 0, "the scene has nothing for this panel to show"


def test_every_query_of_every_panel_has_its_expectation() -> None:
    """Compare the keys with the files: none is left out, none is of a panel that is gone."""
    elsewhere = {*WITHIN, *OF_COLLECTOR, *LOG_LINES, *SLOW}
    assert not EXPECTED.keys() & elsewhere
    assert EXPECTED.keys() | elsewhere == TARGETS.keys()


WITHIN: dict[str, tuple[float, float]] = {
    "agents/Topology age/A": (0, 60),
    "agents/Oldest topology/A": (0, 60),
    "agents/Waiting to be delivered/A": (0, 100),
    "agents/Waiting to be delivered/B": (0, 5_000),
    "agents/CPU of the agents/A": (0.001, 2),
    "agents/Memory of the agents/A": (20e6, 200e6),
}
"""Of what no truth is known to a number: the least and the most."""


@pytest.mark.parametrize("key", WITHIN)
def test_a_panel_of_the_agents_shows_what_can_be(scene: Scene, key: str) -> None:
    """Look at the state of agents, one series for each."""
    least, most = WITHIN[key]
    choice = next(choices(scene, "agents"))
    found = choice.ask(TARGETS[key].text)
    assert all(least <= value <= most for _, value in found), found
    if key == "agents/Oldest topology/A":
        assert [labels for labels, _ in found] == [{}]
    else:
        assert sorted(labels["k8s_node_name"] for labels, _ in found) == [*ALL]


def test_the_agents_memory_is_what_the_kernel_says(scene: Scene) -> None:
    """Compare it with /proc, a little later."""
    choice = next(choices(scene, "agents"))
    found = answer(choice.ask(TARGETS["agents/Memory of the agents/A"].text), NODE)
    for agent in scene.agents:
        pages = int(Path(f"/proc/{agent.process.pid}/statm").read_text(encoding="ascii").split()[1])
        assert found[agent.node.name,] == pytest.approx(pages * 4096, rel=0.2)


def test_the_truth_of_syns_that_were_sent_again(scene: Scene) -> None:
    """Hold `sent_again`, which knows the node, to what the client's kernel counted, which does not."""
    by_service = Counter(fate.service for fate in scene.truth.fates if sent_again(fate))
    assert by_service == +scene.truth.retransmits


def test_a_handshake_whose_first_syn_is_lost_takes_more_than_a_second(scene: Scene) -> None:
    """Know the quantile by what was done to the packets: the client sends its SYN again after a second."""
    (choice,) = (each for each in choices(scene, "service") if each.values["service"] == "slow")
    for ref in "AB":
        found = answer(choice.ask(TARGETS[f"service/Handshake time, by hop/{ref}"].text), ("lb_hop_hop",))
        assert {key for (key,) in found} == {fate.hop for fate in choice.fates}
        assert all(1 < value <= 2.5 for value in found.values())


LOG_LINES: dict[str, Callable[[Fate], bool]] = {
    "overview/Latest lost connections/A": lost,
    "service/Latest lost connections/A": lost,
    "service/Who is behind an address in the backend's log/A": lambda _: False,
    "node/Latest lost connections/A": lost,
    "agents/The agents' own log/A": lambda _: False,
}
"""Panels of log lines, and which connections have one. The second and the last have tests of their own below."""


def clients(choice: Choice, text: str) -> Counter[tuple[str, int]]:
    """Ask Loki, and count the clients whose records come."""
    scene = choice.scene
    lines = scene.loki.lines(choice.fill(text), scene.started, scene.at)
    return Counter((line.fields["client_address"], int(line.fields["client_port"])) for line in lines)


@pytest.mark.parametrize("key", LOG_LINES)
def test_a_panel_shows_the_log_records_of_its_connections(scene: Scene, key: str) -> None:
    """Compare clients: each of these connections has one record, no other has any."""
    told = 0
    for choice in choices(scene, key.split("/", maxsplit=1)[0]):
        expected = Counter(fate.client for fate in choice.fates if LOG_LINES[key](fate))
        if key != "agents/The agents' own log/A":
            assert clients(choice, TARGETS[key].text) == expected
        told += expected.total()
    assert (told > 0) == (LOG_LINES[key] is lost)


def test_the_client_behind_an_address_in_the_backends_log(scene: Scene) -> None:
    """Write what the backend saw, as it would log it: of each Service and family, with and without SNAT."""
    text = TARGETS["service/Who is behind an address in the backend's log/A"].text
    asked = 0
    for choice in choices(scene, "service"):
        known = {fate.network: fate for fate in choice.fates if fate.answered and fate.source}
        for fate in known.values():
            assert fate.source
            address, port = fate.source
            source = f"[{address}]:{port}" if ":" in address else f"{address}:{port}"
            asking = choice._replace(values={**choice.values, "source": source})
            assert clients(asking, text) == {fate.client: 1}
            asked += 1
    assert asked > 5


def test_the_agents_own_log(scene: Scene) -> None:
    """Each agent has said that it runs; of every choice of nodes only theirs comes."""
    text = TARGETS["agents/The agents' own log/A"].text
    choice = next(choices(scene, "agents"))
    for nodes, expected in ((EVERYTHING, {*ALL}), (["node1", "node3"], {"node1", "node3"})):
        asking = choice._replace(values={**LAB, "node": nodes})
        lines = scene.loki.lines(asking.fill(text), scene.started - 600, scene.at)
        assert {line.fields["k8s_node_name"] for line in lines} == expected


EXPLORE: dict[str, tuple[str, Callable[[Fate], bool]]] = {
    "overview/Not forwarded, by reason": ("lb_hop_outcome", unforwarded),
    "overview/Failed handshakes, by kind": ("error_type", failed),
    "service/Not forwarded, by reason and node": ("", lost),
    "service/Failed handshakes, by kind and node": ("", lost),
}
"""Panels with a link into Explore, the label that it takes along, and the connections that it shows."""


@pytest.mark.parametrize("key", EXPLORE)
def test_a_link_from_a_graph_leads_to_the_log_records(scene: Scene, key: str) -> None:
    """Follow it from each series, as Grafana would: it puts in what was chosen, and the label of the series."""
    dashboard, title = key.split("/")
    (panel,) = (each for each in grafana.panels(DASHBOARDS[f"otel-lb-hop-{dashboard}"]) if each["title"] == title)
    (text,) = grafana.explored(panel["fieldConfig"]["defaults"]["links"])
    label, which = EXPLORE[key]
    told = 0
    for choice in choices(scene, dashboard):
        shown = [fate for fate in choice.fates if which(fate)]
        for value in {LABELS[label](fate) for fate in shown} if label else [""]:
            expected = Counter(fate.client for fate in shown if not label or LABELS[label](fate) == value)
            assert clients(choice, text.replace(f"${{__field.labels.{label}}}", value)) == expected
            told += expected.total()
    assert told > 0


SLOW = {"service/Slow handshakes/A", "node/Slow handshakes/A"}
"""Panels of traces."""


TRACE_LINKS = {
    key: panel["fieldConfig"]["overrides"][0]["properties"][0]["value"]
    for key in SLOW
    for panel in grafana.panels(DASHBOARDS[TARGETS[key].dashboard])
    if panel["title"] == TARGETS[key].panel
}


def is_slow(fate: Fate) -> bool:
    """Whether the second SYN was the first to be heard; what is lost is slow as well, but no handshake."""
    return fate.service == "default/slow"


@pytest.mark.parametrize("key", sorted(SLOW))
def test_a_panel_finds_the_traces_of_slow_handshakes(scene: Scene, key: str) -> None:
    """Compare the clients of the spans that Tempo finds."""
    told = 0
    for choice in choices(scene, key.split("/", maxsplit=1)[0]):
        found = scene.tempo.search(choice.fill(TARGETS[key].text), scene.started, scene.at)
        spans = [span for trace in found for span in scene.tempo.trace(trace.trace_id)]
        expected = Counter(fate.client for fate in choice.fates if is_slow(fate))
        assert Counter((s.attributes["client.address"], s.attributes["client.port"]) for s in spans) == expected
        told += len(spans)
        (to_log,) = grafana.explored(TRACE_LINKS[key])
        for trace in [*found[:3], *(each for each in found[3:] if each.trace_id.startswith("0"))]:
            (span,) = scene.tempo.trace(trace.trace_id)
            client = span.attributes["client.address"], span.attributes["client.port"]
            as_tempo_tells_it = trace.trace_id.lstrip("0")
            assert clients(choice, to_log.replace("${__data.fields.traceID}", as_tempo_tells_it)) == {client: 1}
    assert told > 0


EXPORTERS = {"A": "otlp_http/loki", "B": "prometheus_remote_write", "C": "otlp_http/tempo"}
"""Query of log records, data points and spans → the Collector's exporter."""
OF_COLLECTOR = {
    *(f"agents/Collector: taken from agents/{ref}" for ref in EXPORTERS),
    *(f"agents/Collector: sent to backends/{ref}" for ref in EXPORTERS),
    *(f"agents/Collector: refused or failed/{ref}" for ref in "ABCDEF"),
    "agents/Collector: queues in use/A",
}


@pytest.fixture(scope="module")
def watched(scene: Scene) -> Iterator[Choice]:
    """Scrape the Collector with a Prometheus of its own. The traffic is over: data points go on, records do not."""
    targets = [{"targets": [f"{scene.lab.mgmt.address4}:8888"]}]
    scrape = [{"job_name": "otelcol", "static_configs": targets}]
    with Prometheus(scene.lab, "prometheus-of-collector", port=9290, scrape=scrape, scrape_interval="1s") as prometheus:
        enough = "count_over_time(otelcol_receiver_accepted_log_records[1m]) > 12"
        wait_for("scrapes of the Collector", lambda: prometheus.query(enough), 60)
        yield Choice(scene, prometheus, time.time(), 10, {}, scene.truth.fates)


@pytest.mark.parametrize("ref", EXPORTERS)
def test_the_collector_has_taken_and_sent_what_the_agents_sent(watched: Choice, ref: str) -> None:
    """Compare rates with what the agents say that they deliver; and the counters with all that was ever made."""
    delivering = f"sum(rate(lb_hop_data_points_exported_total[{round(watched.window)}s]))"
    (points,) = watched.scene.prometheus.query(delivering, watched.at)
    assert points.value > 100
    expected = points.value if ref == "B" else 0
    taken = answer(watched.ask(TARGETS[f"agents/Collector: taken from agents/{ref}"].text), ())
    assert taken == {(): pytest.approx(expected, rel=0.2)}
    sent = answer(watched.ask(TARGETS[f"agents/Collector: sent to backends/{ref}"].text), ("exporter",))
    assert sent == {(EXPORTERS[ref],): pytest.approx(expected, rel=0.2)}
    text = TARGETS[f"agents/Collector: taken from agents/{ref}"].text
    (ever,) = watched.ask(re.sub(r"rate\((\w+)\[.*?\]\)", r"\1", text))
    made = len(watched.scene.truth.fates) + len(watched.scene.warm_up.fates)
    # The agents' own log adds some lines.
    assert (ever.value == made) if ref == "C" else (made <= ever.value)


@pytest.mark.parametrize("ref", "ABCDEF")
def test_the_collector_has_refused_and_failed_nothing(watched: Choice, ref: str) -> None:
    """Show nothing; of what was refused there is a 0 below, of what failed the Collector tells only from the first."""
    text = TARGETS[f"agents/Collector: refused or failed/{ref}"].text
    assert watched.ask(text) == []
    if ref in "ABC":
        assert [sample.value for sample in watched.ask(text.removesuffix(" > 0"))] == [0]


def test_the_collectors_queues_are_nearly_empty(watched: Choice) -> None:
    """Divide each queue's size by what it holds at most."""
    found = answer(watched.ask(TARGETS["agents/Collector: queues in use/A"].text), ("exporter",))
    assert {exporter for (exporter,) in found} == {*EXPORTERS.values()}
    assert all(0 <= value < 0.1 for value in found.values())


def full_name(choice: Choice) -> str:
    """Name the Service that was chosen, as fates do."""
    return f"{choice.values['namespace']}/{choice.values['service']}"


def services(choice: Choice) -> set[str]:
    """Name the Services of the namespaces that were chosen."""
    return {service.name for service in SERVICES} if choice.fates else set()


VARIABLES: dict[str, Callable[[Choice], set[str]]] = {
    **{f"{dashboard}/cluster": lambda _: {CLUSTER_NAME} for dashboard in ("overview", "service", "node", "agents")},
    "overview/namespace": lambda _: {"default"},
    "overview/service": services,
    "service/namespace": lambda _: {"default"},
    "service/service": services,
    "service/vip": lambda choice: {fate.vip for fate in choice.scene.truth.fates if fate.service == full_name(choice)},
    "node/node": lambda _: {*ALL},
    "agents/node": lambda _: {*ALL},
}
"""What an operator can choose, for a Service that was chosen."""


@pytest.mark.parametrize("key", VARIABLES)
def test_a_variable_offers_what_there_is(scene: Scene, key: str) -> None:
    """Ask as Grafana does: for the series of a selector, of which it takes the values of one label."""
    dashboard, name = key.split("/")
    query = grafana.variables(DASHBOARDS[f"otel-lb-hop-{dashboard}"])[name]["query"]["query"]
    asked = re.fullmatch(r"label_values\((.*), (\w+)\)", query)
    assert asked
    for choice in choices(scene, dashboard):
        found = scene.prometheus.series(choice.fill(asked[1]), scene.started, scene.at)
        assert {labels[asked[2]] for labels in found} == VARIABLES[key](choice)


def test_every_variable_with_a_query_has_its_expectation() -> None:
    """Compare the keys with the files."""
    asking = {
        f"{uid.removeprefix('otel-lb-hop-')}/{name}"
        for uid, dashboard in DASHBOARDS.items()
        for name, variable in grafana.variables(dashboard).items()
        if variable["type"] == "query"
    }
    assert asking == VARIABLES.keys()


def test_the_data_sources_lead_from_a_span_to_its_log_record_and_its_metrics(scene: Scene) -> None:
    """Ask what Grafana asks at a span: it puts in the trace's id, or the span's attributes as matchers."""
    path = grafana.FOLDER / "provisioning" / "datasources" / "otel-lb-hop.yaml"
    # Grafana makes one dollar sign of two.
    sources = yaml.safe_load(path.read_text(encoding="utf-8").replace("$$", "$"))["datasources"]
    (tempo,) = (each["jsonData"] for each in sources if each["type"] == "tempo")
    fate = scene.truth.select(service="default/web", network="ipv6")[0]
    at = f'{{ span.client.address = "{fate.client[0]}" && span.client.port = {fate.client[1]} }}'
    (trace,) = scene.tempo.search(at, scene.started, scene.at)
    (span,) = scene.tempo.trace(trace.trace_id)
    choice = next(choices(scene, "overview"))
    to_logs = tempo["tracesToLogsV2"]["query"].replace("${__span.traceId}", trace.trace_id)
    assert clients(choice, to_logs) == {fate.client: 1}

    matchers = ", ".join(f'{tag["value"]}="{span.attributes[tag["key"]]}"' for tag in tempo["tracesToMetrics"]["tags"])
    by_node, median = (each["query"].replace("$__tags", matchers) for each in tempo["tracesToMetrics"]["queries"])
    of_vip = [each for each in scene.truth.fates if each.vip == fate.vip]
    expected = {key: n / scene.window for key, n in tally(of_vip, NODE, everything).items()}
    assert differences(answer(choice.ask(by_node), NODE), expected, TOLERANCE) == {}
    assert answer(choice.ask(median), ("lb_hop_hop",)).keys() == {(each.hop,) for each in of_vip}
