"""The queues to the exporters: what is kept, what is lost and counted, and that everything ends."""

from __future__ import annotations

import logging
import threading
import time
from enum import Enum
from typing import TYPE_CHECKING, Any

import pytest

from otel_lb_hop.export.shipper import Ledger, MetricsShipper, Shipper, Snapshotted

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

PATIENCE_SECONDS = 10.0


class Result(Enum):
    """What exporters answer: the SDK has such a class for each signal."""

    SUCCESS = 0
    FAILURE = 1


class FakeExporter:
    """Takes batches and remembers them."""

    def __init__(self) -> None:
        self.batches: list[Any] = []
        self.timeouts: list[float | None] = []
        self.closed = threading.Event()

    def export(self, batch: Any, timeout_millis: float | None = None) -> Any:  # noqa: ANN401 - each its own result
        """Take one batch."""
        self.batches.append(batch)
        self.timeouts.append(timeout_millis)
        return self.answer()

    def answer(self) -> Any:  # noqa: ANN401 - a wrong plugin answers anything
        """Say how it went."""
        return Result.SUCCESS

    def shutdown(self) -> None:
        """Note that it is over."""
        self.closed.set()

    @property
    def records(self) -> list[Any]:
        """All that arrived, in order."""
        return [record for batch in self.batches for record in batch]


class FailingExporter(FakeExporter):
    """Answers that it failed, as long as `failing`."""

    failing = True

    def answer(self) -> Result:
        """Say how it went."""
        return Result.FAILURE if self.failing else Result.SUCCESS


class RaisingExporter(FakeExporter):
    """Breaks in every way a plugin can."""

    def answer(self) -> Result:
        """Raise."""
        raise ValueError(f"broken {len(self.batches)}")


class NonsenseExporter(FakeExporter):
    """Answers nothing, as a plugin whose author forgot the return does."""

    def answer(self) -> None:
        """Answer nothing."""


class HangingExporter(FakeExporter):
    """Hangs in every export until it is let go."""

    def __init__(self) -> None:
        super().__init__()
        self.entered, self.go_on = threading.Semaphore(0), threading.Event()

    def answer(self) -> Result:
        """Hang."""
        self.entered.release()
        self.go_on.wait(PATIENCE_SECONDS)
        return Result.SUCCESS


class StubbornExporter(HangingExporter):
    """Hangs in its shutdown as well."""

    def shutdown(self) -> None:
        """Hang, then note that it is over."""
        self.go_on.wait(PATIENCE_SECONDS)
        super().shutdown()


class QuickShipper(Shipper):
    """Lingers less than in earnest, and sends small batches."""

    linger_seconds = 0.01
    batch_records = 4


@pytest.fixture(autouse=True)
def _threads_end() -> Iterator[None]:
    """Fail if a test leaves a thread behind."""
    before = set(threading.enumerate())
    yield
    wait_until(lambda: set(threading.enumerate()) <= before)


def wait_until(condition: Callable[[], object]) -> None:
    """Wait for something that another thread brings about."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.002)


def adds_up(ledger: Ledger) -> bool:
    """Whether nothing is missing and nothing is there twice."""
    return ledger.offered == ledger.exported + sum(ledger.dropped.values()) + ledger.in_flight


def close(shipper: Shipper, seconds: float = PATIENCE_SECONDS) -> Ledger:
    """Close within a time; gives the last ledger, in which nothing is on its way any more."""
    started = time.monotonic()
    shipper.close(started + seconds)
    assert time.monotonic() - started < max(0.0, seconds) + 0.5
    ledger = shipper.ledger()
    assert adds_up(ledger)
    assert ledger.in_flight == 0
    return ledger


def lost(ledger: Ledger) -> dict[str, int]:
    """Give the reasons for which something was lost."""
    return {reason: count for reason, count in ledger.dropped.items() if count}


def test_everything_arrives_once_and_in_order() -> None:
    """What is offered reaches every exporter, in order, in batches no larger than the limit."""
    exporters = [FakeExporter(), FakeExporter()]
    shipper = QuickShipper("logs", exporters)
    assert shipper.enabled
    for start in range(0, 23, 5):
        shipper.offer(range(start, min(start + 5, 23)))
    assert close(shipper) == Ledger(23, 23, {"shutdown": 0}, 0)
    for exporter in exporters:
        assert exporter.records == list(range(23))
        assert max(len(batch) for batch in exporter.batches) <= 4
        assert exporter.closed.wait(PATIENCE_SECONDS)


def test_full_batches_go_at_once() -> None:
    """A full batch does not wait for the linger time; what is less than one does."""
    exporter = FakeExporter()
    shipper = QuickShipper("logs", [exporter])
    shipper.linger_seconds = PATIENCE_SECONDS
    shipper.offer(range(9))
    wait_until(lambda: len(exporter.batches) == 2)
    assert exporter.batches == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert shipper.ledger().in_flight == 1
    started = time.monotonic()
    assert close(shipper).exported == 9
    assert time.monotonic() - started < PATIENCE_SECONDS / 2


def test_linger() -> None:
    """Less than a batch goes by itself after the linger time."""
    exporter = FakeExporter()
    shipper = QuickShipper("logs", [exporter])
    shipper.offer([1])
    wait_until(lambda: shipper.ledger().exported == 1)
    close(shipper)


def test_newest_are_kept() -> None:
    """While an exporter is slow the queue holds its limit of the newest; the oldest are counted as lost."""
    exporter = HangingExporter()
    shipper = QuickShipper("logs", [exporter], queue_records=3)
    shipper.offer(["first"])
    assert exporter.entered.acquire(timeout=PATIENCE_SECONDS)
    shipper.offer(range(10))
    shipper.offer([10])
    assert shipper.ledger() == Ledger(12, 0, {"queue_full": 8}, 4)
    exporter.go_on.set()
    assert lost(close(shipper)) == {"queue_full": 8}
    assert exporter.records == ["first", 8, 9, 10]


def test_offer_of_more_than_the_queue_holds() -> None:
    """One offer larger than the queue leaves its newest part."""
    exporter = HangingExporter()
    shipper = QuickShipper("logs", [exporter], queue_records=2)
    shipper.offer(range(100))
    assert lost(shipper.ledger()) == {"queue_full": 98}
    exporter.go_on.set()
    close(shipper)
    assert exporter.records == [98, 99]


@pytest.mark.parametrize(
    ("exporter", "error"),
    [
        (FailingExporter(), "FailingExporter answered FAILURE: is its Collector there?"),
        (RaisingExporter(), "ValueError: broken 3"),
        (NonsenseExporter(), "AttributeError: 'NoneType' object has no attribute 'name'"),
    ],
)
def test_bad_exporters(exporter: FakeExporter, error: str) -> None:
    """Whatever an exporter does wrong, its batch is counted as lost, the error is kept, and the thread goes on."""
    shipper = QuickShipper("logs", [exporter])
    for turn in range(1, 4):
        shipper.offer(range(4))
        wait_until(lambda: lost(shipper.ledger()) == {"export_failed": 4 * turn})  # noqa: B023 - called in this turn
    assert shipper.last_error == error
    assert close(shipper).exported == 0
    assert len(exporter.batches) == 3


def test_one_bad_exporter_of_two() -> None:
    """A batch counts as exported only if every exporter took it; the good one gets it all the same."""
    good, bad = FakeExporter(), RaisingExporter()
    shipper = QuickShipper("logs", [bad, good])
    shipper.offer(range(4))
    assert lost(close(shipper)) == {"export_failed": 4}
    assert good.records == [0, 1, 2, 3]
    assert shipper.last_error == "ValueError: broken 1"


def test_recovery() -> None:
    """After the first batch that is taken again, nothing is wrong any more."""
    exporter = FailingExporter()
    shipper = QuickShipper("logs", [exporter])
    shipper.offer(range(4))
    wait_until(lambda: shipper.last_error)
    exporter.failing = False
    shipper.offer(range(4))
    wait_until(lambda: shipper.last_error is None)
    ledger = close(shipper)
    assert (ledger.exported, lost(ledger)) == (4, {"export_failed": 4})


def test_an_error_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    """The same error is one line however often it comes, and each signal tells its own."""
    with caplog.at_level(logging.WARNING):
        for signal in ("logs", "traces"):
            shipper = QuickShipper(signal, [FailingExporter()])
            shipper.offer(range(12))
            close(shipper)
    error = "could not be exported: FailingExporter answered FAILURE: is its Collector there?"
    assert caplog.messages == [f"logs {error}", f"traces {error}"]
    assert len({each.name for each in caplog.records}) == 2  # so that ops.logs holds neither back


@pytest.mark.parametrize("exporter_class", [HangingExporter, StubbornExporter])
def test_close_with_a_hanging_exporter(exporter_class: type[HangingExporter]) -> None:
    """Closing keeps its deadline and counts all that is left as lost; a late success changes nothing."""
    exporter = exporter_class()
    shipper = QuickShipper("logs", [exporter])
    shipper.offer(range(10))
    assert exporter.entered.acquire(timeout=PATIENCE_SECONDS)
    ledger = close(shipper, 0.5)
    assert ledger == Ledger(10, 0, {"shutdown": 10}, 0)
    exporter.go_on.set()
    assert exporter.closed.wait(PATIENCE_SECONDS)
    wait_until(lambda: not shipper._thread.is_alive())
    assert shipper.ledger() == ledger
    assert len(exporter.batches) == 1


def test_close_after_the_deadline() -> None:
    """A deadline that has passed still counts everything and ends."""
    exporter = HangingExporter()
    shipper = QuickShipper("logs", [exporter])
    shipper.offer(range(2))
    assert exporter.entered.acquire(timeout=PATIENCE_SECONDS)
    assert lost(close(shipper, -1.0)) == {"shutdown": 2}
    exporter.go_on.set()


def test_close_waits_for_a_slow_exporter() -> None:
    """An exporter that is only slow gets the time there is, and nothing is lost."""
    exporter = HangingExporter()
    shipper = QuickShipper("logs", [exporter])
    shipper.offer(range(10))
    timer = threading.Timer(0.1, exporter.go_on.set)
    timer.start()
    assert close(shipper) == Ledger(10, 10, {"shutdown": 0}, 0)


def test_close_without_records() -> None:
    """Nothing to send is sent at once."""
    exporter = FakeExporter()
    shipper = QuickShipper("logs", [exporter])
    assert close(shipper) == Ledger(0, 0, {"shutdown": 0}, 0)
    assert exporter.batches == []
    assert exporter.closed.wait(PATIENCE_SECONDS)


def test_stop_lets_all_signals_end_side_by_side() -> None:
    """After stop, what is queued goes without further waiting; closing then has nothing left to do."""
    exporter = FakeExporter()
    shipper = QuickShipper("logs", [exporter])
    shipper.linger_seconds = PATIENCE_SECONDS
    shipper.offer([1])
    shipper.stop()
    wait_until(lambda: not shipper._thread.is_alive())
    assert close(shipper).exported == 1


def test_no_exporters() -> None:
    """Without exporters the signal is off: no thread, nothing enabled, and closing is harmless."""
    for shipper in (Shipper("logs", []), MetricsShipper([], 1000)):
        assert not shipper.enabled
        assert not shipper._thread.is_alive()
        assert close(shipper).offered == 0


def test_ledger_adds_up_at_any_time() -> None:
    """Whoever asks at whatever moment finds every record in exactly one place."""
    exporter = FailingExporter()
    shipper = QuickShipper("logs", [exporter], queue_records=6)
    shipper.linger_seconds = 0.0
    ledgers = []
    for turn in range(300):
        shipper.offer(range(turn % 11))
        exporter.failing = turn % 3 == 0
        ledgers.append(shipper.ledger())
        if not turn % 50:
            time.sleep(0.005)
    last = close(shipper)
    assert all(adds_up(ledger) for ledger in ledgers)
    assert last.offered == sum(turn % 11 for turn in range(300))
    assert set(lost(last)) <= {"queue_full", "export_failed"}


def test_metrics_keep_only_the_newest() -> None:
    """While an export hangs only the newest snapshot waits: it says all that the others would have."""
    exporter = HangingExporter()
    shipper = MetricsShipper([exporter], 1234)
    shipper.offer([Snapshotted("a", 1)])
    assert exporter.entered.acquire(timeout=PATIENCE_SECONDS)
    for number, snapshot in enumerate("bcd", start=2):
        shipper.offer([Snapshotted(snapshot, number)])
    assert shipper.exported_ns == 0
    assert shipper.ledger() == Ledger(4, 0, {"superseded": 2}, 2)
    exporter.go_on.set()
    ledger = close(shipper)
    assert (ledger.exported, lost(ledger)) == (2, {"superseded": 2})
    assert exporter.batches == ["a", "d"]
    assert shipper.exported_ns == 4
    assert exporter.timeouts == [1234, 1234]


def test_metrics_failure_is_kept_apart() -> None:
    """A snapshot that is not taken counts as lost under the metrics' own name."""
    shipper = MetricsShipper([RaisingExporter()], 1000)
    shipper.offer([Snapshotted("a", 1)])
    assert lost(close(shipper)) == {"export_failed": 1}
    assert shipper.exported_ns == 0
    assert (shipper.signal, shipper.last_error) == ("metrics", "ValueError: broken 1")
