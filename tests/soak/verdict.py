"""What a soak has shown: a table to read, and a sentence for each thing that is wrong. Pure."""

from __future__ import annotations

import itertools
import math
import statistics
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from tests.soak.sink import Told

SLOPE_FROM_SECONDS = 600.0
"""A shorter run tells nothing about a slope."""
FILLED_SECONDS = 360.0
"""Rows of gone Services are kept for 300 s, after their endpoints have lingered: so long memory grows as it should."""
SLOPE_MIB_PER_HOUR = 2.0
LEAST_GROWTH_MIB = 1.0
"""In the time of the slope: less is what a heap and gRPC take now and then. A longer run sees a smaller leak."""
BLOCK_SECONDS = 15.0
"""Samples are averaged over so long before a line is laid through them: those of one second follow one another."""
FEWEST_BLOCKS = 8
GROWTH_MIB = 12.0
"""From the first quiet point to the last, in a run too short for a slope; 3 were measured."""
KEEP_RETIRED_SECONDS = 300.0
ROWS_OF_ONE = 12
"""Rows of counters that a VIP port may have: its own, and one for each hop class and node."""
QUICK_TABLES = ("vip_ports", "uplinks")
"""Kernel tables that are at once as they were; the others keep what is gone for a while. (Places are brought up to date
only while conntrack is heard.)"""
ALL_TABLES = (*QUICK_TABLES, "backends", "vip_stats", "hop_stats")
DEFECTIVE_PARTS = {"ledger", "topology", "records", "sweep", "counters", "report", "conntrack", "pins"}
"""Never unhealthy, whatever goes on. Exports are while the sink is away; an interface may go while it is hooked."""
HTTP_OK = 200


class Holding(NamedTuple):
    """What a process holds."""

    descriptors: int
    threads: int
    maps: int
    programs: int
    links: int


class Sample(NamedTuple):
    """One look at an agent."""

    seconds: float
    """Since the watch began."""
    rss_mib: float
    cpu_seconds: float
    """Of the process so far."""
    holding: Holding
    status: int
    """Of /readyz."""
    unhealthy: tuple[str, ...]
    ledger: str
    """What is wrong with it."""


class Quiet(NamedTuple):
    """One agent's node when nothing happens: no churn, no traffic, the sink there."""

    holding: Holding
    kinds: Mapping[str, int]
    """What the descriptors are of: `socket`, `anon_inode:bpf-map`, a path."""
    pinned: int
    rss_mib: float
    usage: Mapping[str, int]
    """Kernel table → entries."""


class Slope(NamedTuple):
    """MiB an hour, and between what with a confidence of 95 %."""

    low: float
    middle: float
    high: float


class Node(NamedTuple):
    """All about one node."""

    name: str
    steady: bool
    """Its agent is never killed."""
    samples: Sequence[Sample]
    """Of the churn."""
    before: Quiet
    after: Quiet
    agents: int
    complaints: Sequence[str]
    ending: str
    """What was wrong with the last agent's end."""
    exported: Mapping[str, int]
    """Signal → items that the last agent says it has exported."""


class Course(NamedTuple):
    """All about one run."""

    seconds: float
    """Of churn."""
    events: Mapping[str, int]
    """What was done, how often."""
    made: Mapping[str, int]
    """Service → connections that its clients made."""
    vip_ports_made: int
    steady_services: frozenset[str]
    nodes: Sequence[Node]
    told: Told


def line(samples: Sequence[Sample]) -> Slope | None:
    """Lay a line through the memory by least squares; None of too few samples.

    Through means of blocks; what blocks still have of one another (the residuals' correlation) widens the interval.
    """
    blocks: dict[int, list[Sample]] = {}
    for sample in samples:
        blocks.setdefault(int(sample.seconds // BLOCK_SECONDS), []).append(sample)
    if len(blocks) < FEWEST_BLOCKS:
        return None
    hours = [statistics.fmean(each.seconds for each in block) / 3600 for block in blocks.values()]
    mibs = [statistics.fmean(each.rss_mib for each in block) for block in blocks.values()]
    slope, intercept = statistics.linear_regression(hours, mibs)
    residuals = [mib - intercept - slope * hour for hour, mib in zip(hours, mibs, strict=True)]
    squares = math.fsum(each**2 for each in residuals)
    if not squares:
        return Slope(slope, slope, slope)
    following = math.fsum(a * b for a, b in itertools.pairwise(residuals)) / squares
    correlation = min(max(following, 0.0), 0.9)
    freedom = max(2.0, len(hours) * (1 - correlation) / (1 + correlation) - 2)
    mean = statistics.fmean(hours)
    error = math.sqrt(squares / freedom / math.fsum((hour - mean) ** 2 for hour in hours))
    half = _student(freedom) * error
    return Slope(slope - half, slope, slope + half)


def _student(freedom: float) -> float:
    """Approximate the 97.5 % quantile of Student's t (Abramowitz and Stegun, 26.7.5)."""
    z = statistics.NormalDist().inv_cdf(0.975)
    first, second = (z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96
    return z + first / freedom + second / freedom**2


def second_half(samples: Sequence[Sample]) -> list[Sample]:
    """Leave the samples of the second half of their time, once as much is remembered as ever will be."""
    if not samples:
        return []
    begin = max((samples[0].seconds + samples[-1].seconds) / 2, samples[0].seconds + FILLED_SECONDS)
    return [sample for sample in samples if sample.seconds >= begin]


def problems(course: Course) -> list[str]:
    """Tell everything that is wrong, a sentence each."""
    found = [*_wrong_counts(course), *_wrong_series(course)]
    for node in course.nodes:
        found += [f"{node.name}: {problem}" for problem in _wrong_node(course, node)]
    return found


def _wrong_counts(course: Course) -> Iterator[str]:
    counted = course.told.connections
    for service in sorted({*course.made, *counted}):
        made, told = course.made.get(service, 0), counted.get(service, 0)
        if made != told:
            yield f"Service {service}: {made:,} connections were made and {told:,} were told"


def _wrong_series(course: Course) -> Iterator[str]:
    yield from course.told.defects
    kept = f"within the {KEEP_RETIRED_SECONDS:.0f} s that it is kept"
    found = set()
    for service, gap_seconds in course.told.anew:
        if service in course.steady_services:
            found.add(f"Service {service} was there all the time, and a series of it began anew")
        elif course.seconds < KEEP_RETIRED_SECONDS:
            found.add(f"a series of Service {service} began anew {kept}")
        elif gap_seconds < 0:
            found.add(f"a series of Service {service} began anew before its last point")
    yield from sorted(found)


def _wrong_node(course: Course, node: Node) -> Iterator[str]:
    yield from node.complaints
    if node.ending:
        yield f"its end: {node.ending}"
    yield from _wrong_health(node.samples)
    yield from _left_over(course, node)
    if node.steady:
        yield from _wrong_memory(course, node)
    told = {"logs": course.told.logs, "traces": course.told.spans}
    for signal, items in node.exported.items():
        if node.steady and told[signal].get(node.name, 0) < items:
            yield f"it says {items:,} {signal} were taken, and {told[signal].get(node.name, 0):,} have come"


def _wrong_health(samples: Sequence[Sample]) -> Iterator[str]:
    """Tell each thing once, with the first time."""
    found: dict[str, float] = {}
    for sample in samples:
        if sample.ledger:
            found.setdefault(f"the ledger had a defect: {sample.ledger}", sample.seconds)
        for part in DEFECTIVE_PARTS.intersection(sample.unhealthy) - ({"ledger"} if sample.ledger else set()):
            found.setdefault(f"{part} was not healthy", sample.seconds)
        if sample.status != HTTP_OK:
            found.setdefault(f"/readyz said {sample.status}", sample.seconds)
    for what, seconds in found.items():
        yield f"after {seconds:.0f} s {what}"


def _left_over(course: Course, node: Node) -> Iterator[str]:
    before, after = node.before, node.after
    for name, was, now in zip(Holding._fields, before.holding, after.holding, strict=True):
        if was != now:
            what = f" ({_difference(before.kinds, after.kinds)})" if name == "descriptors" else ""
            yield f"{was} {name} before the churn and {now} after it{what}"
    if before.pinned != after.pinned:
        yield f"{before.pinned} pins before the churn and {after.pinned} after it"
    for what in ALL_TABLES:
        was, now = before.usage[what], after.usage[what]
        if what in QUICK_TABLES or course.seconds >= SLOPE_FROM_SECONDS:
            if was != now:
                yield f"{was} entries in {what} before the churn and {now} after it"
        elif now > was + ROWS_OF_ONE * course.vip_ports_made:
            yield f"{now} entries in {what}, though only {course.vip_ports_made} VIP ports came after there were {was}"


def _difference(before: Mapping[str, int], after: Mapping[str, int]) -> str:
    changes = {kind: after.get(kind, 0) - before.get(kind, 0) for kind in sorted({*before, *after})}
    return ", ".join(f"{change:+d} {kind}" for kind, change in changes.items() if change)


def _wrong_memory(course: Course, node: Node) -> Iterator[str]:
    if course.seconds < SLOPE_FROM_SECONDS:
        grown = node.after.rss_mib - node.before.rss_mib
        if grown > GROWTH_MIB:
            yield f"memory has grown by {grown:.1f} MiB, more than {GROWTH_MIB:.0f}"
        return
    samples = second_half(node.samples)
    slope = line(samples)
    if slope is None:
        yield "too few samples for a slope"
        return
    grown = slope.middle * (samples[-1].seconds - samples[0].seconds) / 3600
    if slope.low > SLOPE_MIB_PER_HOUR and grown > LEAST_GROWTH_MIB:
        yield (
            f"memory grows by {slope.middle:.1f} MiB an hour ({slope.low:.1f} to {slope.high:.1f}), "
            f"more than {SLOPE_MIB_PER_HOUR:.0f}"
        )


def progress(name: str, samples: Sequence[Sample]) -> str:
    """Write how an agent is by now; empty before anything is known."""
    if not samples:
        return ""
    last = samples[-1]
    used = f"{last.rss_mib:.1f} MiB, {last.holding.descriptors} descriptors, {last.holding.threads} threads"
    return f"{name} {used}, {cpu_share(samples):.1%} of a core"


def table(course: Course) -> str:
    """Write what was done and what was seen."""
    told = course.told
    outcomes = ", ".join(f"{what} {count:,}" for what, count in sorted(told.outcomes.items()))
    done = ", ".join(f"{count:,} {what}" for what, count in sorted(course.events.items()))
    columns = [["", *_LABELS]]
    columns += [
        [f"{node.name} ({'never killed' if node.steady else 'killed'})", *_column(node)] for node in course.nodes
    ]
    widths = [max(map(len, column)) for column in columns]
    rows = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in zip(*columns, strict=True)]
    words = [
        f"{course.seconds:.0f} s of churn: {done}",
        f"connections made {sum(course.made.values()):,}, told {sum(told.connections.values()):,}",
        f"of the Services that are still told: {outcomes}",
        f"{told.requests:,} requests, {sum(told.logs.values()):,} logs, {sum(told.spans.values()):,} spans",
    ]
    return "\n".join([*words, *rows])


_LABELS = (
    "agents, one after another", "RSS quiet before → after, MiB", "RSS most, MiB", "RSS slope of second half, MiB/h",
    "CPU, % of a core", "descriptors", "threads", "BPF maps, programs, links", "pins", "kernel tables",
    "samples; unhealthy parts", "error lines",
)  # fmt: skip


def _column(node: Node) -> list[str]:
    before, after = node.before, node.after
    slope = line(second_half(node.samples)) if node.steady else None
    unhealthy: dict[str, int] = {}
    for sample in node.samples:
        for part in sample.unhealthy:
            unhealthy[part] = unhealthy.get(part, 0) + 1
    return [
        str(node.agents),
        f"{before.rss_mib:.1f} → {after.rss_mib:.1f}",
        f"{max((sample.rss_mib for sample in node.samples), default=0):.1f}",
        f"{slope.middle:+.2f} ({slope.low:+.2f} to {slope.high:+.2f})" if slope else "-",
        f"{cpu_share(node.samples):.1%}",
        f"{before.holding.descriptors} → {after.holding.descriptors}",
        f"{before.holding.threads} → {after.holding.threads}",
        " → ".join(f"{each.maps} {each.programs} {each.links}" for each in (before.holding, after.holding)),
        f"{before.pinned} → {after.pinned}",
        ", ".join(f"{name} {was}→{after.usage.get(name, 0)}" for name, was in sorted(before.usage.items())),
        f"{len(node.samples)}; " + (", ".join(f"{part} {n}" for part, n in sorted(unhealthy.items())) or "none"),
        str(len(node.complaints)),
    ]


def cpu_share(samples: Sequence[Sample]) -> float:
    """Tell which part of a core was used between neighbouring samples of one process."""
    pairs = [(a, b) for a, b in itertools.pairwise(samples) if b.cpu_seconds >= a.cpu_seconds]
    seconds = math.fsum(b.seconds - a.seconds for a, b in pairs)
    return math.fsum(b.cpu_seconds - a.cpu_seconds for a, b in pairs) / seconds if seconds else 0.0
