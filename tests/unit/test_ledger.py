"""The ledger: what balances, what does not, and the words for it."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from otel_lb_hop.core.layout import Event, Histogram, HopStats, VipStats
from otel_lb_hop.core.ledger import Ledger, Rows, Stage, count_rows, kernel_stage

KERNEL = Stage("kernel", "", "", 1_200, 1_000, {"ratio": 150, "rate": 30, "ring_full": 0, "no_verdict": 5}, 15)
RING = Stage("ring", "", "", 1_000, 995, {"wrong_size": 5}, 0)
DECODE = Stage("decode", "", "", 995, 990, {"unresolved": 5}, 0)
ENCODE = Stage("encode", "logs", "otlp", 990, 990, {}, 0)
QUEUE = Stage("queue", "logs", "otlp", 990, 600, {"queue_full": 90}, 300)
TRANSPORT = Stage("transport", "logs", "otlp", 600, 500, {"refused": 10, "shutdown": 90}, 0)
SPANS = Stage("encode", "traces", "otlp", 990, 990, {}, 0)
PRINTED = Stage("queue", "logs", "console", 990, 990, {}, 0)
POINTS = Stage("queue", "metrics", "otlp", 7, 5, {"superseded": 2}, 0)
LINES = Stage("encode", "agent_logs", "otlp", 4, 3, {"too_many": 1}, 0)
GOOD = (KERNEL, RING, DECODE, ENCODE, QUEUE, TRANSPORT, SPANS, PRINTED, POINTS, LINES)


def test_all_is_well() -> None:
    """Stages that balance and agree have no problem; what are no records agrees with no stage of theirs."""
    assert Ledger(GOOD).problems() == []
    assert Ledger(()).problems() == []


@pytest.mark.parametrize(
    ("stage", "changes", "problems"),
    [
        (
            RING,
            {"exported": 990},
            [
                "ring: 1,000 seen, 990 exported, 5 dropped (wrong_size 5), 0 in flight: 5 are missing",
                "ring: 990 exported, but decode: 995 seen: 5 too many",
            ],
        ),
        (
            TRANSPORT,
            {"dropped": {"refused": 99, "failed": 0}},
            [("transport of logs to otlp: 600 seen, 500 exported, 99 dropped (refused 99), 0 in flight: 1 is missing")],
        ),
        (
            PRINTED,
            {"in_flight": 1_000},
            ["queue of logs to console: 990 seen, 990 exported, 0 dropped, 1,000 in flight: 1,000 too many"],
        ),
        (
            DECODE,
            {"exported": 989, "dropped": {"unresolved": 6}},
            [
                "decode: 989 exported, but encode of logs to otlp: 990 seen: 1 too many",
                "decode: 989 exported, but encode of traces to otlp: 990 seen: 1 too many",
                "decode: 989 exported, but queue of logs to console: 990 seen: 1 too many",
            ],
        ),
        (
            QUEUE,
            {"exported": 602, "in_flight": 298},
            ["queue of logs to otlp: 602 exported, but transport of logs to otlp: 600 seen: 2 are missing"],
        ),
    ],
)
def test_problems(stage: Stage, changes: dict[str, object], problems: list[str]) -> None:
    """A stage that does not balance, and neighbours that disagree, in words an operator can read."""
    wrong = stage._replace(**changes)  # type: ignore[arg-type]
    assert Ledger(tuple(wrong if each is stage else each for each in GOOD)).problems() == problems


def test_accounts() -> None:
    """The end of the agent's log: every stage in a line."""
    assert Ledger((RING, TRANSPORT)).accounts() == [
        "ring: 1,000 seen, 995 exported, 5 dropped (wrong_size 5), 0 in flight",
        "transport of logs to otlp: 600 seen, 500 exported, 100 dropped (refused 10, shutdown 90), 0 in flight",
    ]


def test_json() -> None:
    """What /readyz shows: each stage under its title, only the reasons that occurred."""
    assert json.loads(json.dumps(Ledger((KERNEL, TRANSPORT)).as_dict())) == {
        "kernel": {
            "seen": 1_200,
            "exported": 1_000,
            "dropped": {"ratio": 150, "rate": 30, "no_verdict": 5},
            "in_flight": 15,
        },
        "transport of logs to otlp": {
            "seen": 600,
            "exported": 500,
            "dropped": {"refused": 10, "shutdown": 90},
            "in_flight": 0,
        },
    }


def test_defects() -> None:
    """What the kernel changes while it is read may be off for a moment; any other stage that is off is a defect."""
    off = [stage._replace(seen=stage.seen + 1) for stage in (KERNEL, RING, QUEUE)]
    assert Ledger(GOOD).defects() == []
    assert Ledger(tuple(off)).defects() == [
        "queue of logs to otlp: 991 seen, 600 exported, 90 dropped (queue_full 90), 300 in flight: 1 is missing"
    ]


COUNTS = st.integers(0, 10**6)
WAYS = (("logs", "otlp"), ("logs", "console"), ("traces", "otlp"))


@st.composite
def flows(draw: st.DrawFn) -> tuple[Stage, ...]:
    """Let records flow: each stage gets what the one before passed on, and loses and holds some."""

    def stage(name: str, signal: str, exporter: str, seen: int) -> Stage:
        lost, lost_too, held = (draw(st.integers(0, seen // 3)) for _ in range(3))
        dropped = {"a": lost, "b": lost_too}
        return Stage(name, signal, exporter, seen, seen - lost - lost_too - held, dropped, held)

    shared = [stage("kernel", "", "", draw(COUNTS))]
    for name in ("ring", "decode"):
        shared.append(stage(name, "", "", shared[-1].exported))
    ways = []
    for signal, exporter in WAYS:
        way = [shared[-1]]
        for name in ("encode", "queue", "transport"):
            way.append(stage(name, signal, exporter, way[-1].exported))
        ways += way[1:]
    return (*shared, *ways)


@given(flows())
def test_whatever_flows_balances(stages: tuple[Stage, ...]) -> None:
    """Nothing is a problem as long as each item is somewhere."""
    assert Ledger(stages).problems() == []


@given(
    flows(),
    st.integers(0, 11),
    st.sampled_from(["seen", "exported", "in_flight", "dropped"]),
    st.integers(-(10**6), 10**6).filter(bool),
)
def test_any_miscount_shows(stages: tuple[Stage, ...], index: int, field: str, by: int) -> None:
    """One figure that is wrong, by whatever amount, is told with the name of its stage and the amount."""
    stage = stages[index]
    value = {**stage.dropped, "a": stage.dropped["a"] + by} if field == "dropped" else getattr(stage, field) + by
    wrong = stage._replace(**{field: value})  # type: ignore[arg-type]
    first, *_ = Ledger((*stages[:index], wrong, *stages[index + 1 :])).problems()
    assert first.startswith(f"{stage.title}: {wrong.seen:,} seen, ")
    missing = by if field == "seen" else -by
    assert wrong.imbalance == missing
    amount = f"{missing:,} {'is' if missing == 1 else 'are'} missing" if missing > 0 else f"{-missing:,} too many"
    assert first.endswith(f" in flight: {amount}")


@given(flows(), st.integers(1, 5))
def test_a_loss_between_stages_shows(stages: tuple[Stage, ...], lost: int) -> None:
    """What a stage passed on and the next never saw is told, although each balances by itself."""
    for index, (before, after) in enumerate(pairwise(stages[:6]), start=1):
        changed = after._replace(seen=after.seen - lost, in_flight=after.in_flight - lost)
        problems = Ledger((*stages[:index], changed, *stages[index + 1 :])).problems()
        assert problems == [
            (
                f"{before.title}: {before.exported:,} exported, but {after.title}: {changed.seen:,} seen: "
                f"{lost} {'is' if lost == 1 else 'are'} missing"
            )
        ]


def test_kernel_stage() -> None:
    """Connections are those of the rows, what is without a verdict is in flight, the rest stands in the events."""
    idle = Histogram.of(0, (0,) * 22)
    vips = [VipStats((1, 20), ((0, 1, 0), (2, 0, 3)), 9), VipStats((0, 7), ((0, 0, 0), (0, 0, 0)), 0)]
    hops = [HopStats((1, 13), 4, 3, 2, 1, 1, idle, idle, 2), HopStats((0, 5), 5, 0, 0, 0, 0, idle, idle)]
    rows = count_rows(vips, hops)
    assert rows == (28, 24)
    events = [0] * len(Event)
    events[Event.RECORD_SENT] = 15
    for count, event in enumerate(
        (Event.RECORD_RATIO, Event.RECORD_RATE, Event.RECORD_RING_FULL, Event.RECORD_NO_VERDICT, Event.RECORD_OFF)
    ):
        events[event] = count
    events[Event.TRUNCATED] = 99
    stage = kernel_stage(rows.plus(Rows(2, 2)), events)
    dropped = {"ratio": 0, "rate": 1, "ring_full": 2, "no_verdict": 3, "off": 4}
    assert stage == Stage("kernel", "", "", 30, 15, dropped, 4)
    assert stage.imbalance == 1
