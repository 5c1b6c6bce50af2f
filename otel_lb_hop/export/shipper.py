"""Carries records to exporters: a bounded queue for each signal, the newest kept, every loss counted by reason.

A thread of its own per signal calls the exporters, so that a Collector that hangs holds up nothing else. The
exporters retry by themselves until their own time-out; what they then refuse is lost, and counted here.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, deque
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Sequence

log = logging.getLogger(__name__)

QUEUE_RECORDS = 16_384
BATCH_RECORDS = 512
LINGER_SECONDS = 0.5
SHUTDOWN_RESERVE_SECONDS = 0.2


class Ledger(NamedTuple):
    """offered = exported + Σ dropped + in_flight, at any time."""

    offered: int
    exported: int
    dropped: dict[str, int]
    in_flight: int


class Shipper:
    """One signal's queue and the thread that empties it into the exporters."""

    batch_records = BATCH_RECORDS
    linger_seconds = LINGER_SECONDS
    full_reason = "queue_full"

    def __init__(self, signal: str, exporters: Sequence[Any], queue_records: int = QUEUE_RECORDS) -> None:
        self.signal = signal
        self.last_error: str | None = None
        self._log = log.getChild(signal)  # to ops.logs, the same line about another signal is another cause
        self._exporters = exporters
        self._limit = queue_records
        self._queue: deque[Any] = deque()
        self._changed = threading.Condition()
        self._sending = 0
        self._offered = 0
        self._exported = 0
        self._dropped: Counter[str] = Counter()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name=f"ship-{signal}", daemon=True)
        if exporters:
            self._thread.start()

    @property
    def enabled(self) -> bool:
        """Whether anything is listening; without exporters nothing should be offered."""
        return bool(self._exporters)

    def offer(self, records: Sequence[Any]) -> None:
        """Queue records; if the queue is full its oldest give way, and are counted."""
        with self._changed:
            self._queue.extend(records)
            self._offered += len(records)
            excess = len(self._queue) - self._limit
            for _ in range(excess):
                self._queue.popleft()
            if excess > 0:
                self._dropped[self.full_reason] += excess
            self._changed.notify()

    def ledger(self) -> Ledger:
        """Tell what became of everything that was offered."""
        with self._changed:
            in_flight = len(self._queue) + self._sending
            return Ledger(self._offered, self._exported, dict(self._dropped), in_flight)

    def stop(self) -> None:
        """Send what is queued without waiting for more; returns at once."""
        with self._changed:
            self._stopping = True
            self._changed.notify()

    def close(self, deadline: float) -> None:
        """Wait for what is queued until `deadline` (monotonic seconds), then give up and count the rest."""
        self.stop()
        if self._thread.is_alive():
            self._thread.join(max(0.0, deadline - time.monotonic() - SHUTDOWN_RESERVE_SECONDS))
        with self._changed:
            # A batch that is still being sent may arrive or not: it is not known to have, so it counts as lost.
            self._dropped["shutdown"] += len(self._queue) + self._sending
            self._queue.clear()
            self._sending = 0
        # An exporter that hangs may block its own shutdown: in a daemon thread it ends with the process.
        enders = [threading.Thread(target=exporter.shutdown, daemon=True) for exporter in self._exporters]
        for ender in enders:
            ender.start()
        for ender in enders:
            ender.join(max(0.0, deadline - time.monotonic()))

    def _run(self) -> None:
        while batch := self._next_batch():
            sent = self._export(batch)
            with self._changed:
                if not self._sending:
                    return  # closed meanwhile, and counted there
                self._sending = 0
                if sent:
                    self._exported += len(batch)
                else:
                    self._dropped["export_failed"] += len(batch)

    def _next_batch(self) -> list[Any]:
        """Wait for a batch; an empty one means that there will be no more."""
        with self._changed:
            while not self._queue and not self._stopping:
                self._changed.wait()
            if not self._stopping and len(self._queue) < self.batch_records:
                self._changed.wait_for(
                    lambda: self._stopping or len(self._queue) >= self.batch_records, timeout=self.linger_seconds
                )
            batch = [self._queue.popleft() for _ in range(min(self.batch_records, len(self._queue)))]
            self._sending = len(batch)
            return batch

    def _export(self, batch: list[Any]) -> bool:
        """Give a batch to every exporter; it counts as exported if all of them took it."""
        good = True
        for exporter in self._exporters:
            try:
                result = self._send(exporter, batch).name
            except Exception as error:  # noqa: BLE001 - a plugin may raise or answer anything; the agent goes on
                good = self._note(f"{type(error).__name__}: {error}")
                continue
            if result != "SUCCESS":
                good = self._note(f"{type(exporter).__name__} answered {result}: is its Collector there?")
        if good:
            self.last_error = None
        return good

    def _send(self, exporter: Any, batch: list[Any]) -> Any:  # noqa: ANN401 - any exporter's own result class
        return exporter.export(batch)

    def _note(self, error: str) -> bool:
        if error != self.last_error:
            self._log.warning("%s could not be exported: %s", self.signal, error)
        self.last_error = error
        return False


class Snapshotted(NamedTuple):
    """One export of metrics and the time of its snapshot."""

    data: Any
    taken_ns: int


class MetricsShipper(Shipper):
    """The metrics' way: only the newest snapshot waits, since a cumulative one says all that the older would."""

    batch_records = 1
    linger_seconds = 0.0
    full_reason = "superseded"

    def __init__(self, exporters: Sequence[Any], timeout_ms: int) -> None:
        self._timeout_ms = timeout_ms
        self.exported_ns = 0
        """Time of the newest snapshot that every exporter took."""
        super().__init__("metrics", exporters, queue_records=1)

    def _send(self, exporter: Any, batch: list[Any]) -> Any:  # noqa: ANN401 - as above
        return exporter.export(batch[0].data, timeout_millis=self._timeout_ms)

    def _export(self, batch: list[Any]) -> bool:
        good = super()._export(batch)
        if good:
            self.exported_ns = batch[0].taken_ns
        return good
