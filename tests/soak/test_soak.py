"""A short soak on every run; and proof that its verdict sees what it is to see (`make soak` runs for hours)."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
from opentelemetry.proto.metrics.v1.metrics_pb2 import (  # noqa: TID251 - what a sink receives
    AggregationTemporality,
    MetricsData,
)

from tests.kernel.requirements import needs_kernel
from tests.lab.requirements import needs_lab
from tests.soak.run import soak
from tests.soak.sink import Told
from tests.soak.tally import Tally
from tests.soak.verdict import Course, Holding, Node, Quiet, Sample, cpu_share, line, problems, second_half, table

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

SHORT_SECONDS = 12.0
HELD = Holding(descriptors=57, threads=14, maps=19, programs=8, links=10)
TABLES = {"vip_ports": 3, "uplinks": 2, "backends": 9, "vip_stats": 3, "hop_stats": 9}
KINDS = {
    "Services come", "UDP come", "UDP flows", "answered", "interfaces come", "kills", "sink away",
}  # fmt: skip
"""What no plan leaves out."""


@pytest.mark.root
@needs_lab
@needs_kernel
def test_short_soak(capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing is wrong after a few seconds in which everything came and went."""
    seed = str(random.SystemRandom().getrandbits(32))
    with soak(seed) as running:
        course = running.run(SHORT_SECONDS, lambda _: None)
    with capsys.disabled():
        print(f"\n{table(course)}")
    assert problems(course) == [], f"seed {seed}"
    assert course.events.keys() >= KINDS
    assert [node.agents for node in course.nodes] == [1, 1 + course.events["kills"]]
    assert all(len(node.samples) > SHORT_SECONDS / 4 for node in course.nodes)


def sample(seconds: float, rss_mib: float = 50.0, **other: Any) -> Sample:  # noqa: ANN401 - fields of all types
    """Make a sample in which nothing is wrong."""
    return Sample(seconds, rss_mib, seconds / 50, HELD, 200, (), "")._replace(**other)


def node(**other: Any) -> Node:  # noqa: ANN401 - fields of all types
    """Make a node on which nothing is wrong."""
    quiet = Quiet(HELD, {"socket": 9}, 37, 50.0, TABLES)
    samples = [sample(second) for second in range(20)]
    made = Node("node1", True, samples, quiet, quiet, 1, [], "", {"logs": 40, "traces": 40})  # noqa: FBT003 - a field
    return made._replace(**other)


def course(*nodes: Node, **other: Any) -> Course:  # noqa: ANN401 - fields of all types
    """Make a run in which nothing is wrong."""
    told = Told({"web": 40}, {"forwarded none": 40}, {}, {"node1": 40}, {"node1": 40}, [], [], 9)
    return Course(20.0, {"kills": 1}, {"web": 40}, 5, frozenset({"web"}), nodes or [node()], told)._replace(**other)


def test_a_good_run() -> None:
    """There is nothing to say, and the table says what was seen."""
    assert problems(course()) == []
    written = table(course())
    assert "connections made 40, told 40" in written
    assert "descriptors                      57 → 57\n" in written
    assert "CPU, % of a core                 2.0%\n" in written


def quiet(**other: Any) -> Quiet:  # noqa: ANN401 - fields of all types
    """Make what is held at the end."""
    return Quiet(HELD, {"socket": 9}, 37, 50.0, TABLES)._replace(**other)


def told(**other: Any) -> Told:  # noqa: ANN401 - fields of all types
    """Make what was received."""
    return course().told._replace(**other)


WRONG: list[tuple[Course, str]] = [
    (course(made={"web": 41}), "Service web: 41 connections were made and 40 were told"),
    (course(told=told(connections={"web": 40, "x": 1})), "Service x: 0 connections were made and 1 were told"),
    (course(told=told(defects=["fell"])), "fell"),
    (course(told=told(anew=[("web", 5.0)])), "Service web was there all the time, and a series of it began anew"),
    (course(told=told(anew=[("x", 5.0)])), "a series of Service x began anew within the 300 s that it is kept"),
    (
        course(told=told(anew=[("x", -0.5)]), seconds=400),
        "a series of Service x began anew before its last point",
    ),
    (course(told=told(logs={"node1": 39})), "node1: it says 40 logs were taken, and 39 have come"),
    (course(node(complaints=["ERROR x"])), "node1: ERROR x"),
    (course(node(ending="the agent did not end")), "node1: its end: the agent did not end"),
    (
        course(node(samples=[sample(3, ledger="1 is missing")])),
        "node1: after 3 s the ledger had a defect: 1 is missing",
    ),
    (course(node(samples=[sample(3, unhealthy=("logs", "sweep"))])), "node1: after 3 s sweep was not healthy"),
    (course(node(samples=[sample(3, status=503)])), "node1: after 3 s /readyz said 503"),
    (
        course(node(after=quiet(holding=HELD._replace(descriptors=58), kinds={"socket": 8, "/x": 2}))),
        "node1: 57 descriptors before the churn and 58 after it (+2 /x, -1 socket)",
    ),
    (
        course(node(after=quiet(holding=HELD._replace(threads=15)))),
        "node1: 14 threads before the churn and 15 after it",
    ),
    (course(node(after=quiet(holding=HELD._replace(links=11)))), "node1: 10 links before the churn and 11 after it"),
    (course(node(after=quiet(pinned=38))), "node1: 37 pins before the churn and 38 after it"),
    (
        course(node(after=quiet(usage=TABLES | {"vip_ports": 4}))),
        "node1: 3 entries in vip_ports before the churn and 4 after it",
    ),
    (
        course(node(after=quiet(usage=TABLES | {"hop_stats": 70}))),
        "node1: 70 entries in hop_stats, though only 5 VIP ports came after there were 9",
    ),
    (course(node(after=quiet(rss_mib=62.5))), "node1: memory has grown by 12.5 MiB, more than 12"),
]


@pytest.mark.parametrize(("run", "sentence"), WRONG, ids=[sentence for _, sentence in WRONG])
def test_each_thing_that_is_wrong(run: Course, sentence: str) -> None:
    """Each has its sentence, and no other."""
    assert problems(run) == [sentence]


def test_rows_of_a_long_run() -> None:
    """After a run as long as rows are kept, all have to be gone."""
    samples = [sample(second) for second in range(600)]
    after = quiet(usage=TABLES | {"hop_stats": 10})
    assert problems(course(node(after=after, samples=samples), seconds=600)) == [
        "node1: 9 entries in hop_stats before the churn and 10 after it"
    ]


class Memory(NamedTuple):
    """How memory goes, and what is to be said of it."""

    mib: Callable[[int], float]
    grows: bool


NOISE = random.Random("soak")
STEPS = [NOISE.gauss(0, 0.3) for _ in range(1200)]


@pytest.mark.parametrize(
    "memory",
    [
        Memory(lambda _: 50.0, grows=False),
        Memory(lambda second: 50 + STEPS[second], grows=False),
        Memory(lambda second: min(60.0, 50 + second / 60), grows=False),
        Memory(lambda second: 50 + second / 3600, grows=False),
        Memory(lambda second: 50 + 5 * second / 3600, grows=False),
        Memory(lambda second: 50 + 9 * second / 3600 + STEPS[second], grows=True),
        Memory(lambda second: 50.0 + second // 60, grows=True),
    ],
    ids=["flat", "noise", "grown and flat", "slowly", "less than 1 MiB", "a leak in noise", "a leak in steps"],
)
def test_slope(memory: Memory) -> None:
    """Memory that grows in the second half of a long run is told, and noise is not."""
    samples = [sample(second, memory.mib(second)) for second in range(1200)]
    found = problems(course(node(samples=samples), seconds=1200))
    assert [problem.startswith("node1: memory grows by ") for problem in found] == [True] * memory.grows


def test_line() -> None:
    """A straight line has its slope, and nothing on either side of it."""
    slope = line([sample(second, 50 + 3 * second / 3600) for second in range(300)])
    assert slope is not None
    assert [round(each, 6) for each in slope] == [3, 3, 3]
    assert line([sample(second) for second in range(90)]) is None


def test_cpu_and_halves() -> None:
    """CPU is that of each process between its own samples; the second half is one of time."""
    first = [sample(0, cpu_seconds=5), sample(1, cpu_seconds=5.5)]
    second = [sample(999, cpu_seconds=0.25), sample(1000, cpu_seconds=0.5)]
    assert cpu_share([*first, *second]) == 0.375
    assert second_half([*first, *second]) == second
    assert [each.seconds for each in second_half([sample(200), sample(350), sample(400)])] == []


def message(points: Iterable[tuple[int, int, int]], metric: str = "lb_hop.connections") -> MetricsData:
    """Write points of one series: (start, time, value)."""
    data = MetricsData()
    written = data.resource_metrics.add().scope_metrics.add().metrics.add(name=metric)
    written.sum.aggregation_temporality = AggregationTemporality.AGGREGATION_TEMPORALITY_CUMULATIVE
    for start, time, value in points:
        point = written.sum.data_points.add(start_time_unix_nano=start, time_unix_nano=time, as_int=value)
        point.attributes.add(key="k8s.service.name").value.string_value = "web"
        point.attributes.add(key="lb_hop.outcome").value.string_value = "forwarded"
    return data


def test_tally_over_restarts() -> None:
    """A series goes on or begins anew; what it had then still counts. A point that comes late changes nothing."""
    tally = Tally()
    tally.take(message([(1, 10, 5), (1, 20, 9), (1, 15, 7)]))
    assert (tally.connections(), tally.anew, tally.defects) == ({"web": 9}, [], [])
    tally.take(message([(3_000_000_020, 4_000_000_000, 2)]))
    assert (tally.connections(), tally.anew, tally.defects) == ({"web": 11}, [("web", 3.0)], [])


def test_tally_sees_a_fall() -> None:
    """A counter never falls."""
    tally = Tally()
    tally.take(message([(1, 10, 5), (1, 20, 4)]))
    assert len(tally.defects) == 1
    assert tally.defects[0].startswith("lb_hop.connections of web fell from 5 to 4")
