"""The agent's ledger: at every stage of a record's way, seen = exported + dropped, by reason, + in flight.

    kernel ─ ring ─ decode ─┬─ encode ─ queue ─ transport        (logs, for each exporter)
                            └─ encode ─ queue ─ transport        (traces, for each exporter)

Metrics (in data points) and the agent's own log have ways of their own, with nothing before their first stage. With
delta temporality a point that has not changed goes its way without being sent.

What each stage counts:

- kernel: seen = connections the hooks counted; exported = records put in the ring; dropped: ratio, rate, ring_full,
  no_verdict, off; in flight = handshakes that have no verdict yet.
- ring: seen = records that were ever put in; exported = those of the right shape that this agent read; earlier = those
  that agents before it read and settled, in whose ledgers they stand; dropped: wrong_size; unsettled (an agent before
  read them, and was killed before it noted that they were exported).
- decode: seen = records read; exported = connections that the topology could name; dropped: unresolved.
- encode: seen = connections; exported = records offered to the shipper; dropped: not_sampled, failed; of the agent's
  own log: too_many.
- queue: seen = items offered; exported = items handed to the sink; dropped: queue_full, too_large, superseded.
- transport: seen = items handed over; exported = items that the other side took; dropped: rejected_partially,
  refused, failed, and queue_full and superseded for what gave way while it waited to be sent again.

What is left anywhere when the agent ends is dropped there by the name `shutdown`.

A ledger proves something only if its figures are counted apart from one another: each where its event happens, by a
counter of its own. The shippers' seen, exported and dropped are so, and in flight is what lies in their queues at that
moment; so must be the kernel's, the ring's and those of decode and encode. A figure got by subtraction of the
others would make its stage balance whatever is lost.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

from otel_lb_hop.core.layout import Event

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from otel_lb_hop.core.layout import HopStats, VipStats

METRICS = "metrics"
"""The signal whose items are data points, not records."""
RECORD_SIGNALS = ("logs", "traces")
"""What the last of the shared stages passes on goes to each exporter of these."""

KERNEL = "kernel"
RING = "ring"
MOVING = frozenset({KERNEL, RING})
"""Stages that the kernel changes while they are read."""


class Stage(NamedTuple):
    """One station of a record's way, in items since the start: of the agent, or of the counting (kernel and ring)."""

    name: str
    signal: str
    """`logs`, `traces`, `metrics` or another; "" before records are split by signal."""
    exporter: str
    """"" before records are split by exporter."""
    seen: int
    exported: int
    dropped: Mapping[str, int]
    """Reason → items that ended here."""
    in_flight: int
    earlier: int = 0
    """Items that agents before this one exported or dropped."""

    @property
    def imbalance(self) -> int:
        """Items that are missing; below 0, that are there and never came."""
        return self.seen - self.earlier - self.exported - sum(self.dropped.values()) - self.in_flight

    @property
    def losses(self) -> dict[str, int]:
        """The reasons that occurred."""
        return {reason: items for reason, items in self.dropped.items() if items}

    @property
    def title(self) -> str:
        """What an operator reads: `ring`, `queue of logs to otlp`."""
        of = f" of {self.signal}" if self.signal else ""
        return f"{self.name}{of} to {self.exporter}" if self.exporter else f"{self.name}{of}"


class Ledger(NamedTuple):
    """All stages at one moment: first the shared ones, then each (signal, exporter)'s, in the order of the way.

    Neighbours are read one after the other, so they agree only once nothing moves: at the end, and in tests. The same
    is true of the figures within the kernel's stage and the ring's; those of the others are of one moment.
    """

    stages: tuple[Stage, ...]

    def problems(self) -> list[str]:
        """Tell every stage that does not balance, and all neighbours that do not agree on what passed between them."""
        disagreeing = [
            f"{before.title}: {before.exported:,} exported, but {after.title}: {after.seen:,} seen: "
            f"{_difference(before.exported - after.seen)}"
            for before, after in self._neighbours()
            if before.exported != after.seen
        ]
        return _unbalanced(self.stages) + disagreeing

    def defects(self) -> list[str]:
        """Tell what must not be at any moment: a stage that does not balance though its figures are of one moment."""
        return _unbalanced(stage for stage in self.stages if stage.name not in MOVING)

    def accounts(self) -> list[str]:
        """Tell each stage in a line."""
        return [_account(stage) for stage in self.stages]

    def as_dict(self) -> dict[str, Any]:
        """Give the stages by name for JSON."""
        return {
            stage.title: {
                "seen": stage.seen,
                "exported": stage.exported,
                "dropped": stage.losses,
                "in_flight": stage.in_flight,
            }
            | ({"earlier": stage.earlier} if stage.earlier else {})
            for stage in self.stages
        }

    def _neighbours(self) -> Iterator[tuple[Stage, Stage]]:
        shared = [stage for stage in self.stages if not stage.signal]
        yield from pairwise(shared)
        ways: dict[tuple[str, str], list[Stage]] = {}
        for stage in self.stages:
            if stage.signal:
                ways.setdefault((stage.signal, stage.exporter), []).append(stage)
        for (signal, _), way in ways.items():
            yield from pairwise(shared[-1:] + way if signal in RECORD_SIGNALS else way)


class Rows(NamedTuple):
    """What rows of the kernel's counters say of connections: how many came in, how many got their verdict."""

    connections: int
    verdicts: int

    def plus(self, other: Rows) -> Rows:
        """Add up."""
        return Rows(self.connections + other.connections, self.verdicts + other.verdicts)


def count_rows(vips: Iterable[VipStats], hops: Iterable[HopStats]) -> Rows:
    """Count the connections of rows. A verdict stands in the VIP port's row if it was not forwarded, else the hop's."""
    connections = verdicts = 0
    for vip in vips:
        connections += sum(vip.connections)
        verdicts += sum(map(sum, vip.unforwarded))
    for hop in hops:
        verdicts += hop.answered + hop.refused + hop.timeout + hop.reply_unseen + hop.evicted + hop.translated
    return Rows(connections, verdicts)


_RECORD_DROPS = (
    Event.RECORD_RATIO,
    Event.RECORD_RATE,
    Event.RECORD_RING_FULL,
    Event.RECORD_NO_VERDICT,
    Event.RECORD_OFF,
)


def kernel_stage(rows: Rows, events: Sequence[int]) -> Stage:
    """Make the kernel's stage of all rows there ever were and the counters by `Event`, each counted for itself.

    It balances at rest: rows and events are read one after another.
    """
    dropped = {event.name.lower().removeprefix("record_"): events[event] for event in _RECORD_DROPS}
    in_flight = rows.connections - rows.verdicts
    return Stage(KERNEL, "", "", rows.connections, events[Event.RECORD_SENT], dropped, in_flight)


def _unbalanced(stages: Iterable[Stage]) -> list[str]:
    return [f"{_account(stage)}: {_difference(stage.imbalance)}" for stage in stages if stage.imbalance]


def _account(stage: Stage) -> str:
    reasons = ", ".join(f"{reason} {items:,}" for reason, items in stage.losses.items())
    dropped = f"{sum(stage.dropped.values()):,} dropped" + (f" ({reasons})" if reasons else "")
    earlier = f"{stage.earlier:,} by earlier agents, " if stage.earlier else ""
    came_and_went = f"{stage.seen:,} seen, {earlier}{stage.exported:,} exported, {dropped}"
    return f"{stage.title}: {came_and_went}, {stage.in_flight:,} in flight"


def _difference(items: int) -> str:
    if items > 0:
        return f"{items:,} {'is' if items == 1 else 'are'} missing"
    return f"{-items:,} too many"
