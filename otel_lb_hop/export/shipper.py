"""Carries chunks to one sink: a queue and a daemon thread for each (signal, sink), every loss counted by reason.

A sink that hangs holds up nothing but its own queue. What may be taken later is sent again, with back-off, for as long
as newer chunks leave it room (records) or until a newer snapshot says more (metrics); there is no other limit. What
is kept, what gives way, how much goes at once and when the next attempt begins is decided in `backlog`, where the
reasons are listed too.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from typing import TYPE_CHECKING, Any

from otel_lb_hop.export.backlog import FAILED, Backlog, Backoff, Settled, Snapshots
from otel_lb_hop.export.delivery import Reply

if TYPE_CHECKING:
    from collections.abc import Sequence

    from otel_lb_hop.core.ledger import Stage
    from otel_lb_hop.export.backlog import Books, Store
    from otel_lb_hop.export.delivery import Chunk, Sink

log = logging.getLogger(__name__)

REQUEST_BYTES = 2 * 2**20
"""Of chunks in one request. A gRPC Collector takes 4 MiB: half of it is left for the envelope, and for sizes that are
estimates. From 1 MiB on a larger one makes a record no cheaper (64 KiB: three to five times the CPU), but every one is
a round trip, and all go one after the other; it is a copy while it is sent, so still more would only cost memory."""
LINGER_SECONDS = 0.5
"""What is less than a request waits so long for more."""
SHUTDOWN_RESERVE_SECONDS = 0.2
"""Of the time to close: for the sink, to let go of what hangs."""
QUIET_SECONDS = 10.0
"""Between two lines about what became of requests, whatever the other side says each time."""


class _Carrier:
    """The thread that empties a store into a sink."""

    def __init__(
        self,
        signal: str,
        sink: Sink,
        store: Store,
        *,
        linger_seconds: float = 0.0,
        timeout_seconds: float | None = None,
    ) -> None:
        self.signal = signal
        self.name = sink.name
        """The exporter's."""
        self.last_error: str | None = None
        """What the last attempt failed by; None once all of a request was taken and nothing older is stuck."""
        self._sink = sink
        self._target = f"{sink.name} at {sink.place}" if sink.place else sink.name
        self._store = store
        self._linger_seconds = linger_seconds
        self._timeout_seconds = timeout_seconds
        self._backoff = Backoff()
        self._lock = threading.Lock()
        self._work = threading.Condition(self._lock)  # the thread waits for it
        self._settled = threading.Condition(self._lock)  # flushes wait for it
        self._flushing = 0
        self._stopping = False
        self._closed = False
        self._give_up_at: float | None = None
        self._exported_at: float | None = None
        self._failures = 0
        self._failing_since = 0.0
        self._told: set[tuple[str, str]] = set()
        self._told_at: dict[str, float] = {}
        self._thread = threading.Thread(target=self._run, name=f"ship-{signal}-{sink.name}", daemon=True)
        self._thread.start()

    def books(self) -> Books:
        """Tell what became of all items that were offered."""
        with self._lock:
            return self._store.items()

    def size_bytes(self) -> Books:
        """Tell what became of all bytes that were offered."""
        with self._lock:
            return self._store.size_bytes()

    def stages(self) -> tuple[Stage, Stage]:
        """Give the ledger's stages `queue` and `transport`, of one moment."""
        with self._lock:
            return self._store.stages(self.signal, self.name)

    def state(self) -> dict[str, Any]:
        """Tell an operator, in JSON, how it goes: items by what became of them, bytes that are held, the next try."""
        with self._lock:
            now = time.monotonic()
            held = self._store.size_bytes()
            retrying = self._backoff.failures > 0
            return {
                "exporter": self.name,
                "error": self.last_error,
                **self._store.items()._asdict(),
                "held_bytes": held.queued + held.sending,
                "failures_in_a_row": self._backoff.failures,
                "next_try_seconds": round(max(0.0, self._backoff.due - now), 1) if retrying else None,
                "exported_seconds_ago": None if self._exported_at is None else round(now - self._exported_at, 1),
            }

    def stop(self) -> None:
        """Send what is queued without waiting for more; returns at once.

        A wait between attempts ends, unless the other side asked for it.
        """
        with self._lock:
            if not self._stopping:
                self._stopping = True
                self._backoff.hurry(time.monotonic())
            self._work.notify()

    def close(self, deadline: float) -> None:
        """Send what is queued until `deadline` (monotonic seconds), then give up, count the rest, close the sink.

        Returns earlier if no attempt could begin in time, and in time whatever the sink does.
        """
        self.stop()
        with self._lock:
            self._give_up_at = deadline - SHUTDOWN_RESERVE_SECONDS
            self._work.notify()
        self._thread.join(max(0.0, self._give_up_at - time.monotonic()))
        with self._lock:
            self._closed = True
            self._store.abandon()
            self._settled.notify_all()
        # A sink that hangs may block its own end: in a daemon thread it ends with the process.
        closer = threading.Thread(target=self._close_sink, name=f"close-{self.signal}-{self.name}", daemon=True)
        closer.start()
        closer.join(max(0.0, deadline - time.monotonic()))

    def _close_sink(self) -> None:
        try:
            self._sink.close()
        except Exception as error:  # noqa: BLE001 - a plugin may raise anything; there is nothing left to save
            log.warning("%s: %s did not end well: %s: %s", self.signal, self.name, type(error).__name__, error)

    def _run(self) -> None:
        while request := self._next_request():
            reply = self._send(request)
            with self._lock:
                if self._closed:
                    return  # and counted there
                settled = self._settle(reply)
                self._settled.notify_all()
            self._tell(reply, settled)

    def _next_request(self) -> list[Chunk]:
        """Wait for a request; an empty one means that there will be no more."""
        with self._lock:
            while True:
                self._work.wait_for(lambda: self._store.waiting or self._stopping)
                if not self._store.waiting:
                    return []
                self._work.wait_for(
                    lambda: self._store.urgent or self._stopping or self._flushing, timeout=self._linger_seconds
                )
                while (wait_seconds := self._backoff.due - time.monotonic()) > 0:
                    if self._give_up_at is not None and self._backoff.due >= self._give_up_at:
                        return []
                    self._work.wait(wait_seconds)
                if request := self._store.take():
                    return request

    def _send(self, request: list[Chunk]) -> Reply:
        try:
            return self._sink.send(request, self._timeout_seconds)
        except BaseException as error:  # noqa: BLE001 - a plugin may raise anything; the agent goes on
            return Reply(taken=False, reason=FAILED, detail=f"{type(error).__name__}: {error}")

    def _settle(self, reply: Reply) -> Settled:
        settled = self._store.settle(reply)
        now = time.monotonic()
        if settled is Settled.LATER:
            self._backoff.fail(now, random.random(), reply.retry_after_seconds)  # noqa: S311 - no secret
        elif not self._store.stuck:
            self._backoff.succeed()
        if reply.taken:
            self._exported_at = now
        if not reply.taken or reply.rejected > 0:
            self.last_error = reply.detail or "no reason was given"
        elif not self._store.stuck:
            self.last_error = None
        return settled

    def _tell(self, reply: Reply, settled: Settled) -> None:
        """Log what an operator has to know: each kind of trouble once until all is well, and never too often."""
        now = time.monotonic()
        text = reply.detail or "no reason was given"
        what = ""
        if settled is Settled.LATER:
            what = "not taken, kept to be sent again"
        elif settled is Settled.SMALLER:
            what = "larger than the other side takes, kept to go in smaller requests"
        elif not reply.taken:
            what = f"{reply.reason}, lost"
        elif reply.rejected > 0:
            what = "taken, some rejected"
        elif reply.detail:
            what = "taken, with a warning"
        if reply.taken and reply.rejected <= 0 and not self._store.stuck:
            still_true = {kind for kind in self._told if kind[0] == what}
            if self._failures and self._told != still_true:
                seconds, failures = now - self._failing_since, self._failures
                log.info("%s: %s: works again after %d failures (%.0f s)", self.signal, self._target, failures, seconds)
            self._failures = 0
            self._told = still_true
        elif not reply.taken and settled is not Settled.SMALLER:
            self._failing_since = self._failing_since if self._failures else now
            self._failures += 1
        # What stands before the colon is a code or the name of an error; behind it each attempt may have its own words.
        kind = what, text.partition(":")[0]
        if what and kind not in self._told and now >= self._told_at.get(what, -QUIET_SECONDS) + QUIET_SECONDS:
            self._told.add(kind)
            self._told_at[what] = now
            log.warning("%s: %s: %s: %s", self.signal, self._target, what, text)


class Shipper(_Carrier):
    """Records of one signal to one sink: `limit_bytes` at most, with what is being sent; the newest are kept."""

    def __init__(
        self,
        signal: str,
        sink: Sink,
        limit_bytes: int,
        *,
        request_bytes: int = REQUEST_BYTES,
        linger_seconds: float = LINGER_SECONDS,
    ) -> None:
        self._backlog = Backlog(limit_bytes, request_bytes)
        super().__init__(signal, sink, self._backlog, linger_seconds=linger_seconds)

    def offer(self, chunks: Sequence[Chunk]) -> None:
        """Queue chunks; where they do not fit, the oldest give way. Never waits for the sink."""
        with self._lock:
            self._backlog.offer(chunks)
            if self._closed:
                self._backlog.abandon()
            self._work.notify()

    def flush(self, deadline: float) -> bool:
        """Send now what is queued; answers, by `deadline` (monotonic seconds), whether the other side took all of it.

        False if anything was lost that was offered before this call, unless an earlier flush has told that already.
        """
        with self._lock:
            flush = self._backlog.watch()
            self._flushing += 1
            self._work.notify()
            try:
                in_time = self._settled.wait_for(
                    lambda: self._backlog.settled(flush), timeout=max(0.0, deadline - time.monotonic())
                )
            finally:
                self._flushing -= 1
                self._backlog.unwatch(flush)
            return in_time and not flush.lost


class MetricsShipper(_Carrier):
    """Metrics to one sink, in data points: the newest snapshot only, since a cumulative one says all that older would.

    No attempt takes longer than `timeout_seconds`.
    """

    def __init__(self, sink: Sink, timeout_seconds: float) -> None:
        self._snapshots = Snapshots()
        super().__init__("metrics", sink, self._snapshots, timeout_seconds=timeout_seconds)

    @property
    def exported_ns(self) -> int:
        """Time of the newest snapshot that was taken whole; 0 before the first."""
        return self._snapshots.exported_ns

    def offer(self, chunks: Sequence[Chunk], taken_ns: int) -> None:
        """Queue a snapshot, each chunk a request of its own; one that did not get through gives way to it."""
        with self._lock:
            self._snapshots.offer(chunks, taken_ns)
            if self._closed:
                self._snapshots.abandon()
            self._work.notify()
