"""The API server fails in every way: the agent counts on, tells it, does not press, and is right again at once.

A failure takes its time, so several agents on one node go through failures side by side, each behind a front of its
own; what was seen of each failure is held against the promises afterwards.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest

from tests.cluster import chaos, objects
from tests.cluster.chaos import Front
from tests.cluster.conftest import TARGET_PORT
from tests.cluster.knowledge import CONSOLE, Export, truth
from tests.cluster.kube_proxy import Mode
from tests.cluster.requirements import needs_control_plane
from tests.lab.agent import Agent
from tests.lab.waiting import wait_for

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from tests.cluster.api import Object
    from tests.cluster.control_plane import ControlPlane
    from tests.cluster.knowledge import Known
    from tests.lab import Lab

pytestmark = [pytest.mark.root, pytest.mark.kubernetes, needs_control_plane, pytest.mark.timeout(300)]

OUTAGE_SECONDS = 14.0
RECOVERY_SECONDS = 5.0
LATE_SECONDS = 4.0
PATIENCE_SECONDS = 30.0
"""How long a recovery is watched that takes too long."""
SENT = 23
WEB = [objects.port(80, target=TARGET_PORT)]
VIP = "10.0.10.0"
BESIDE_OTHERS = {"interfaces"}
"""What is degraded because these agents are on one node: the programs of one run before those of another."""
RETRY_AFTER_SECONDS = 2
BURST = 5
FOUND_SECONDS = 60.0
"""The longest that a half-open connection is not found."""


class Fault(NamedTuple):
    """One failure: what it does to a front, and a part of the text by which the agent must name it."""

    begin: Callable[[Front], None]
    text: str
    informed: bool = False
    """Whether the agent comes to know what is new all the same."""
    recovery_seconds: float = RECOVERY_SECONDS


def _failing(act: chaos.Act, text: str, **promises: Any) -> Fault:  # noqa: ANN401 - fields of Fault
    return Fault(lambda front: front.fail(act, text), text, **promises)


BY_LISTS: dict[str, Any] = {"informed": True, "recovery_seconds": OUTAGE_SECONDS + 5.0}
"""Lists succeed and no watch does: a list costs the server too much to try often. The wait doubles up to a minute, and
so is no longer than the failure was until then."""

TRACKS: list[dict[str, Fault]] = [
    {
        "event-410": _failing(chaos.error_event(410, "Expired", "too old"), "410 too old", **BY_LISTS),
        "403": _failing(chaos.refusal(403, "Forbidden"), "403 chaos says no"),
        "eof": _failing(chaos.eof, "the answer stopped"),
    },
    {
        "garbled-line": _failing(chaos.garbled_line, "undecodable line", **BY_LISTS),
        "refuse": Fault(Front.refuse, "Connection refused"),
        "event-500": _failing(chaos.error_event(500, "InternalError", "broken"), "500 broken"),
    },
    {
        "slow-list": _failing(chaos.slow_list(8), "410 too old resource version", informed=True),
        "500": _failing(chaos.refusal(500, "InternalError"), "500 chaos says no"),
        "broken-chunk": _failing(chaos.broken_chunk, "the answer stopped"),
    },
    {
        "429": _failing(chaos.refusal(429, "TooManyRequests", Retry_After=str(RETRY_AFTER_SECONDS)), "429 chaos"),
        "no-http": _failing(chaos.no_http, "no HTTP"),
        "broken-json": _failing(chaos.broken_json, "stopped in the middle of a list"),
    },
    {
        "410": _failing(chaos.refusal(410, "Expired"), "410 chaos says no"),
        "hang": _failing(chaos.hang, "does not answer"),
        "503": _failing(chaos.refusal(503, "ServiceUnavailable"), "503 chaos"),
    },
]
"""What each agent goes through, one after the other; all agents begin and end a failure at the same time."""

LONG: dict[str, Fault] = {
    "half-open": Fault(partial(Front.silence, newcomers=False), "nothing more came in time", informed=True),
    "half-open-all": Fault(partial(Front.silence, newcomers=True), "nothing more came in time"),
}
"""What is found out only after a while: these go on for as long as all the others take one after another."""

FAULTS = {name: fault for track in [*TRACKS, LONG] for name, fault in track.items()}


@dataclass
class Outage:
    """What one agent went through in one failure; times by the monotonic clock."""

    fault: Fault
    agent: Agent
    front: Front
    began: float
    asked: Counter[str]
    """Requests that the agent began by itself, by resource; also those that reached nobody."""
    statuses: set[int] = field(default_factory=set)
    degraded: set[str] = field(default_factory=set)
    errors: set[str] = field(default_factory=set)
    found_seconds: float | None = None
    """How long it took until an error was told."""
    connections: tuple[int, int] = 0, 0
    """Made by the lab and counted by the agent, at the end."""
    ended: float = 0.0
    known: Known = field(default_factory=dict)
    age_seconds: float = 0.0
    well_seconds: float | None = None
    """How long after its end the failure was over for the agent."""
    known_after: Known = field(default_factory=dict)

    @property
    def seconds(self) -> float:
        """How long the failure lasted."""
        return self.ended - self.began

    def look(self) -> None:
        """See how the agent is while it fails."""
        status, content = self.agent.readyz()
        self.statuses.add(status)
        self.degraded |= {*content["degraded"]} - BESIDE_OTHERS
        errors = {each["error"] for each in content["parts"]["kubernetes"]["detail"].values() if each["error"]}
        if errors and self.found_seconds is None:
            self.found_seconds = time.monotonic() - self.began
        self.errors |= errors

    def end(self, made: int) -> None:
        """See how the agent is as the failure ends, and end it."""
        export = Export(self.agent)
        self.connections = made, export.connections
        self.known, self.age_seconds = export.known, export.topology_age
        self.asked = asked(self.agent) - self.asked
        self.ended = time.monotonic()
        self.front.heal()

    def is_over(self, expected: Known) -> bool:
        """See whether all is well again."""
        if self.well_seconds is None:
            self.known_after = Export(self.agent).known
            degraded = {*self.agent.readyz().content["degraded"]} - BESIDE_OTHERS
            if self.known_after == expected and not degraded:
                self.well_seconds = time.monotonic() - self.ended
        return self.well_seconds is not None


def asked(agent: Agent) -> Counter[str]:
    """Count the requests that the agent has begun, by resource."""
    return Counter(
        {kind.replace("_", ""): each["requests"] for kind, each in agent.part("kubernetes")["detail"].items()}
    )


class Drill:
    """Agents on node1, a front for each, and one cluster that changes behind them."""

    def __init__(self, lab: Lab, plane: ControlPlane) -> None:
        self._lab = lab
        self._plane = plane
        self._agents: list[tuple[Agent, Front]] = []
        self._made = 0
        self._round = 0
        self._under_way: list[Outage] = []

    @contextlib.contextmanager
    def agents(self, count: int) -> Iterator[None]:
        """Begin with all well."""
        self._lab.announce(dict.fromkeys((VIP, *map(new_vip, range(5))), self._lab.nodes[:1]))
        self._plane.apply(*self._web(), *self._new(0))
        with contextlib.ExitStack() as stack:
            stack.enter_context(self._plane.kube_proxies(self._lab.nodes[:1], Mode.NFTABLES))
            for number in range(count):
                front = stack.enter_context(Front(self._plane, 7001 + number))
                settings = self._plane.agent_settings(server=front.url) | CONSOLE
                agent = Agent(self._lab.nodes[0], None, settings, name=f"agent{number}", port=9465 + number)
                stack.callback(agent.kill)
                self._agents.append((agent, front))
            for agent, _ in self._agents:
                agent.wait_ready(60)
            self._connect(VIP)
            yield
            self._wait_for_counts()
            for agent, _ in self._agents:
                agent.terminate()
            for agent, _ in self._agents:
                agent.stop()

    def begin(self, places: Iterable[int], faults: Iterable[Fault]) -> list[Outage]:
        """Begin a failure at each of these agents, which are well."""
        begun = []
        expected = truth(self._plane, self._lab.nodes[0])
        for place, fault in zip(places, faults, strict=True):
            agent, front = self._agents[place]
            wait_for("what the cluster is", partial(_knows, agent, expected))
            begun.append(Outage(fault, agent, front, time.monotonic(), asked(agent)))
            fault.begin(front)
        self._under_way += begun
        return begun

    def suffer(self, until: float) -> None:
        """Change the cluster: scale a Service, delete one, create one; and let traffic go on."""
        self._connect(VIP)
        self._round += 1
        self._plane.apply(*self._web(), *self._new(self._round))
        self._plane.delete(*self._new(self._round - 1))
        self._plane.settle()
        while time.monotonic() < until:
            self._connect(VIP, 1)
            self._look()
        self._wait_for_counts()

    def end(self, outages: list[Outage]) -> None:
        """End these failures, and see how long it takes until all is right."""
        expected = truth(self._plane, self._lab.nodes[0])
        for outage in outages:
            self._under_way.remove(outage)
            outage.end(self._made)
        deadline = time.monotonic() + PATIENCE_SECONDS
        while time.monotonic() < deadline:
            self._look()
            if sum(outage.is_over(expected) for outage in outages) == len(outages):
                break

    def _web(self) -> list[Object]:
        return objects.web("web", [VIP], self._lab.pods[: 1 + self._round % 2], WEB)

    def _new(self, number: int) -> list[Object]:
        """Write the Service that comes with this round, and goes with the next."""
        return objects.web(f"new-{number}", [new_vip(number)], self._lab.pods[:1], WEB)

    def _connect(self, vip: str, count: int = SENT) -> None:
        assert [result.error for result in self._lab.connect(vip, 80, count)] == [""] * count
        self._made += count

    def _wait_for_counts(self) -> None:
        with contextlib.suppress(AssertionError):  # it is held against each failure later
            for agent, _ in self._agents:
                wait_for("all connections", partial(_has_counted, agent, self._made), 5)

    def _look(self) -> None:
        for outage in self._under_way:
            outage.look()


def _knows(agent: Agent, expected: Known) -> bool:
    return Export(agent).known == expected


def _has_counted(agent: Agent, made: int) -> bool:
    return Export(agent).connections == made


def new_vip(number: int) -> str:
    """Say what the VIP of the Service is that comes with a round."""
    return f"10.0.11.{number}"


@pytest.fixture(scope="module")
def outages(lab: Lab, plane: ControlPlane) -> dict[str, Outage]:
    """Go through all failures."""
    drill = Drill(lab, plane)
    found: dict[str, Outage] = {}
    with drill.agents(len(TRACKS) + len(LONG)):
        long = drill.begin(range(len(TRACKS), len(TRACKS) + len(LONG)), LONG.values())
        found |= dict(zip(LONG, long, strict=True))
        for names in zip(*TRACKS, strict=True):
            now = drill.begin(range(len(TRACKS)), [FAULTS[name] for name in names])
            found |= dict(zip(names, now, strict=True))
            last = names == tuple(track[-1] for track in map(list, TRACKS))
            drill.suffer(max(now[-1].began + OUTAGE_SECONDS, long[-1].began + FOUND_SECONDS if last else 0.0))
            drill.end([*now, *(long if last else ())])
    return found


each_fault = pytest.mark.parametrize("name", FAULTS)


@each_fault
def test_counting_never_stops(outages: dict[str, Outage], name: str) -> None:
    """Every connection made so far is counted while the failure lasts, and the agent is ready all the while."""
    made, counted = outages[name].connections
    assert counted == made >= SENT
    assert outages[name].statuses == {200}


@each_fault
def test_failure_is_told(outages: dict[str, Outage], name: str) -> None:
    """The failure stands on /readyz with its cause, and nothing else is degraded."""
    outage = outages[name]
    if name != "half-open":  # over so soon after it was found that a look may miss it
        assert outage.degraded == {"kubernetes"}
        assert any(outage.fault.text in error for error in outage.errors), outage.errors
    assert outage.fault.text in outage.agent.stderr


@each_fault
def test_staleness_is_told(outages: dict[str, Outage], name: str) -> None:
    """lb_hop.topology.age grows as long as nothing new comes to be known."""
    outage = outages[name]
    if not outage.fault.informed:
        assert outage.age_seconds >= outage.seconds - 1.0


@each_fault
def test_server_is_not_pressed(outages: dict[str, Outage], name: str) -> None:
    """After a first burst at most one request per second and resource, what the scout asks included."""
    outage = outages[name]
    seen = Counter(request.resource for request in outage.front.since(outage.began, outage.ended))
    for resource in ("services", "endpointslices", "nodes"):
        assert max(seen[resource], outage.asked[resource]) <= BURST + outage.seconds


@each_fault
def test_right_again_at_once(outages: dict[str, Outage], name: str) -> None:
    """Soon after its end the agent knows what a fresh LIST tells, and nothing is degraded.

    Seven agents and their fronts share the machine with other tests, and what an agent knows is seen up to 1.5 s late
    (its report, its export): one of many may take longer than is promised.
    """
    outage = outages[name]
    assert outage.well_seconds is not None, outage.known_after
    assert outage.well_seconds <= outage.fault.recovery_seconds + LATE_SECONDS


def test_right_again_within_the_promised_time(outages: dict[str, Outage]) -> None:
    """Most are right again within 5 s, as is promised to one agent on a node."""
    promised = [each for each in outages.values() if each.fault.recovery_seconds == RECOVERY_SECONDS]
    took = [each.well_seconds for each in promised if each.well_seconds is not None]
    assert len(took) == len(promised) >= 15
    assert statistics.median(took) <= RECOVERY_SECONDS


def test_retry_after_is_kept(outages: dict[str, Outage]) -> None:
    """No resource is asked for again sooner than the server said."""
    outage = outages["429"]
    times: dict[str, list[float]] = {}
    for request in outage.front.since(outage.began, outage.ended):
        times.setdefault(f"{request.verb} {request.resource}", []).append(request.seconds)
    pauses = [after - before for each in times.values() for before, after in pairwise(each)]
    assert len(pauses) >= 9
    assert min(pauses) >= RETRY_AFTER_SECONDS
