"""What waits to be sent and what became of the rest: the shippers' policy. Pure: times and chance are arguments.

Reasons of loss, in the words of the ledger:

- `queue_full`: gave way to newer chunks, because together they were larger than the bound.
- `too_large`: a single chunk larger than the whole bound.
- `superseded`: metrics; a newer snapshot says all that this one would have.
- `rejected_partially`: the request was taken, but the other side did not keep these (OTLP partial success).
- `refused`: the other side answered that it will never take them, or not even a single chunk of that size.
- `failed`: an exporter of the SDK or of a plugin gave up or raised.
- `shutdown`: the agent ended before they were sent, or before the answer came.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter, deque
from enum import Enum
from typing import TYPE_CHECKING, ClassVar, NamedTuple

from otel_lb_hop.core.ledger import Stage
from otel_lb_hop.export.delivery import REFUSED

if TYPE_CHECKING:
    from collections.abc import Iterable

    from otel_lb_hop.export.delivery import Chunk, Reply

QUEUE_FULL = "queue_full"
TOO_LARGE = "too_large"
SUPERSEDED = "superseded"
REJECTED = "rejected_partially"
FAILED = "failed"
SHUTDOWN = "shutdown"

FIRST_BACK_OFF_SECONDS = 0.2
LONGEST_BACK_OFF_SECONDS = 2.0
"""With 2 s for a connect and a second for a busy machine: exporting again 5 s after the other side is back."""
PATIENT_FAILURES = 3
"""So many in a row, and what came later no longer waits for what does not get through."""
LONGEST_RETRY_AFTER_SECONDS = 300.0
"""A server that is overloaded may well ask for minutes; one whose clock or proxy is wrong may not ask for days."""


class Books(NamedTuple):
    """offered = exported + Σ dropped + queued + sending, at any time; in items or in bytes.

    In bytes, what was taken counts as exported whole: nobody tells how large the items are that were rejected.
    """

    offered: int
    exported: int
    dropped: dict[str, int]
    queued: int
    sending: int
    """On the way, or waiting to be sent again."""


class Settled(Enum):
    """What a reply means for the chunks that were sent."""

    DONE = "booked for good"
    LATER = "kept for another attempt"
    SMALLER = "kept, to go in smaller requests"


class Backoff:
    """When the next attempt may begin: at random within a time that doubles with each failure (full jitter).

    Seconds are those of any steady clock, fractions are random in [0, 1).
    """

    def __init__(self) -> None:
        self.failures = 0
        """In a row."""
        self._wait_until = 0.0
        self._not_before = 0.0

    @property
    def due(self) -> float:
        """Time before which no attempt is to begin."""
        return max(self._wait_until, self._not_before)

    def fail(self, now: float, fraction: float, retry_after_seconds: float | None) -> None:
        """Wait after a failure, and never less than the other side asked for, up to the cap."""
        # The exponent is bounded only so that it never overflows.
        longest = min(LONGEST_BACK_OFF_SECONDS, FIRST_BACK_OFF_SECONDS * 2.0 ** min(self.failures, 30))
        self.failures += 1
        self._wait_until = now + longest * fraction
        self._not_before = now + min(LONGEST_RETRY_AFTER_SECONDS, retry_after_seconds or 0.0)

    def succeed(self) -> None:
        """Forget the failures: the other side answers."""
        self.failures = 0

    def hurry(self, now: float) -> None:
        """End the wait and begin with short ones again; what the other side asked for still holds."""
        self.failures = 0
        self._wait_until = now


class Flush:
    """What one flush waits for: everything up to an ordinal."""

    def __init__(self, last: int, *, lost: bool) -> None:
        self.last = last
        self.lost = lost


class _Pile:
    """Chunks with the ordinals of their coming, oldest first, and their sums."""

    def __init__(self) -> None:
        self.entries: deque[tuple[int, Chunk]] = deque()
        self.items = 0
        self.size_bytes = 0

    def __bool__(self) -> bool:
        return bool(self.entries)

    def push(self, ordinal: int, chunk: Chunk) -> None:
        self.entries.append((ordinal, chunk))
        self.items += chunk.items
        self.size_bytes += chunk.size_bytes

    def push_front(self, ordinal: int, chunk: Chunk) -> None:
        self.entries.appendleft((ordinal, chunk))
        self.items += chunk.items
        self.size_bytes += chunk.size_bytes

    def pop(self) -> tuple[int, Chunk]:
        ordinal, chunk = self.entries.popleft()
        self.items -= chunk.items
        self.size_bytes -= chunk.size_bytes
        return ordinal, chunk


class Store(ABC):
    """Chunks in three places, and the books of two stages.

    `_fresh` waits for its first attempt: the stage `queue`. `_sending` is with the sink, `_again` waits for its next
    attempt: both are the stage `transport`, so that what passed from one stage to the other only ever grows.
    """

    _QUEUE_REASONS: ClassVar[tuple[str, ...]]
    _TRANSPORT_REASONS: ClassVar[tuple[str, ...]]

    def __init__(self) -> None:
        self._fresh, self._again, self._sending = _Pile(), _Pile(), _Pile()
        self._accepted = 0
        self._offered = 0
        self._handed_over = 0
        self._received = 0
        self._newest_received = 0
        self._exported = 0
        # From the start, so that the first loss is seen as one by whoever looks at differences.
        self._queue_lost: Counter[str] = Counter(dict.fromkeys(self._QUEUE_REASONS, 0))
        self._transport_lost: Counter[str] = Counter(dict.fromkeys(self._TRANSPORT_REASONS, 0))
        self._offered_bytes = 0
        self._exported_bytes = 0
        self._lost_bytes: Counter[str] = Counter()
        self._flushes: list[Flush] = []
        self._untold = False

    @property
    def waiting(self) -> bool:
        """Whether there is anything to take."""
        return bool(self._again or self._fresh)

    @property
    @abstractmethod
    def urgent(self) -> bool:
        """Whether waiting for more would not make the next request any better."""

    @property
    def stuck(self) -> bool:
        """Whether something does not get through, although what came later may."""
        return False

    @abstractmethod
    def take(self) -> list[Chunk]:
        """Take the next request, the oldest first; it is to be settled before the next is taken."""

    def settle(self, reply: Reply) -> Settled:
        """Book the answer to what was taken last. After `abandon` nothing is left to book."""
        sent, self._sending = self._sending, _Pile()
        if not sent:
            return Settled.DONE
        smaller = reply.too_large and len(sent.entries) > 1
        if not reply.taken and (reply.retry or smaller):
            self._put_back(sent)
            return Settled.SMALLER if smaller else Settled.LATER
        lost = min(max(0, reply.rejected), sent.items) if reply.taken else sent.items
        reason = REJECTED if reply.taken else reply.reason
        self._exported += sent.items - lost
        if reply.taken:
            self._exported_bytes += sent.size_bytes
        else:
            self._lost_bytes[reason] += sent.size_bytes
        if lost:
            self._transport_lost[reason] += lost
            self._note_loss(sent.entries[0][0], sent.entries[-1][0])
        return Settled.DONE

    def abandon(self) -> None:
        """Give up all that is here. A request on its way may arrive or not: it is not known to have."""
        for pile, lost in (
            (self._sending, self._transport_lost),
            (self._again, self._transport_lost),
            (self._fresh, self._queue_lost),
        ):
            self._drop_all(pile, lost, SHUTDOWN)

    def items(self) -> Books:
        """Tell what became of all items."""
        return Books(
            self._offered,
            self._exported,
            dict(self._queue_lost + self._transport_lost),
            self._queued_items(),
            self._sending.items + self._again.items,
        )

    def size_bytes(self) -> Books:
        """Tell what became of all bytes."""
        return Books(
            self._offered_bytes,
            self._exported_bytes,
            dict(self._lost_bytes),
            self._queued_bytes(),
            self._sending.size_bytes + self._again.size_bytes,
        )

    def stages(self, signal: str, exporter: str) -> tuple[Stage, Stage]:
        """Give the two stages of the ledger."""
        in_transport = self._sending.items + self._again.items
        return (
            Stage(
                "queue",
                signal,
                exporter,
                seen=self._offered,
                exported=self._handed_over,
                dropped=dict(self._queue_lost),
                in_flight=self._queued_items(),
            ),
            Stage(
                "transport",
                signal,
                exporter,
                seen=self._received,
                exported=self._exported,
                dropped=dict(self._transport_lost),
                in_flight=in_transport,
            ),
        )

    def watch(self) -> Flush:
        """Begin a flush of all that was offered up to now."""
        flush = Flush(self._accepted, lost=self._untold)
        self._untold = False
        self._flushes.append(flush)
        return flush

    def settled(self, flush: Flush) -> bool:
        """Whether nothing that a flush waits for is here any more."""
        return all(
            pile.entries[0][0] > flush.last for pile in (self._sending, self._again, self._fresh) if pile.entries
        )

    def unwatch(self, flush: Flush) -> None:
        """End a flush."""
        self._flushes.remove(flush)

    def _queued_items(self) -> int:
        return self._fresh.items

    def _queued_bytes(self) -> int:
        return self._fresh.size_bytes

    def _enter(self, chunk: Chunk) -> None:
        self._offered += chunk.items
        self._offered_bytes += chunk.size_bytes

    def _accept(self, pile: _Pile, chunk: Chunk) -> None:
        self._accepted += 1
        pile.push(self._accepted, chunk)

    def _hand_over(self, pile: _Pile) -> Chunk:
        """Move the oldest chunk of a pile to the sink."""
        ordinal, chunk = pile.pop()
        if pile is self._fresh:
            self._handed_over += chunk.items
        self._sending.push(ordinal, chunk)
        if ordinal > self._newest_received:
            self._newest_received = ordinal
            self._received += chunk.items
        return chunk

    @abstractmethod
    def _put_back(self, sent: _Pile) -> None:
        """Keep what is to be sent again."""

    def _drop(self, pile: _Pile, lost: Counter[str], reason: str) -> None:
        """Give up the oldest chunk of a pile."""
        ordinal, chunk = pile.pop()
        lost[reason] += chunk.items
        self._lost_bytes[reason] += chunk.size_bytes
        self._note_loss(ordinal, ordinal)

    def _drop_all(self, pile: _Pile, lost: Counter[str], reason: str) -> None:
        while pile:
            self._drop(pile, lost, reason)

    def _note_loss(self, first: int, last: int) -> None:
        """Tell the flushes that wait for one of these chunks that something is lost, else the flush that comes next."""
        for flush in self._flushes:
            flush.lost |= first <= flush.last
        self._untold |= all(flush.last < last for flush in self._flushes)


class Backlog(Store):
    """Records: never more than `limit_bytes`, with what is being sent; the newest are kept, and their order.

    A request is at most `request_bytes`, or one chunk. After a failure half of it is tried, after a success twice as
    much: a slow link or a weak server gets what it can take within one time-out. What the other side calls too large
    is never tried again in that size. What does not get through holds up only itself: from the third failure in a row
    every other attempt is for what has not been tried yet.
    """

    _QUEUE_REASONS = (QUEUE_FULL, TOO_LARGE, SHUTDOWN)
    _TRANSPORT_REASONS = (QUEUE_FULL, REJECTED, REFUSED, FAILED, SHUTDOWN)

    def __init__(self, limit_bytes: int, request_bytes: int) -> None:
        super().__init__()
        self._limit_bytes = limit_bytes
        self._request_bytes = request_bytes
        # Apart, so that a chunk that is never taken does not make all other requests small.
        self._fresh_bytes = self._again_bytes = request_bytes
        self._failures = 0
        self._from_again = False

    @property
    def urgent(self) -> bool:
        """Whether there is a whole request, or one to be sent again."""
        return bool(self._again) or self._fresh.size_bytes >= min(self._fresh_bytes, self._request_bytes)

    @property
    def stuck(self) -> bool:
        """Whether something does not get through, although what came later may."""
        return self._failures > 0

    def offer(self, chunks: Iterable[Chunk]) -> None:
        """Take chunks in; where they do not fit, the oldest that are not on their way give way."""
        for chunk in chunks:
            self._enter(chunk)
            if chunk.size_bytes > self._limit_bytes:
                self._queue_lost[TOO_LARGE] += chunk.items
                self._lost_bytes[TOO_LARGE] += chunk.size_bytes
                self._untold = True
            else:
                self._accept(self._fresh, chunk)
        # What is being sent was within the limit when it waited, so something waits as long as all is too much.
        while self._sending.size_bytes + self._again.size_bytes + self._fresh.size_bytes > self._limit_bytes:
            if self._again:
                self._drop(self._again, self._transport_lost, QUEUE_FULL)
            else:
                self._drop(self._fresh, self._queue_lost, QUEUE_FULL)

    def take(self) -> list[Chunk]:
        """Take the oldest chunk, and what follows of its group while it fits in one request.

        What is sent again goes without what was never sent.
        """
        aside = self._failures >= PATIENT_FAILURES and self._from_again and self._fresh
        self._from_again = bool(self._again) and not aside
        pile = self._again if self._from_again else self._fresh
        fit_bytes = min(self._request_bytes, self._again_bytes if self._from_again else self._fresh_bytes)
        request: list[Chunk] = []
        while pile:
            _, chunk = pile.entries[0]
            too_much = self._sending.size_bytes + chunk.size_bytes > fit_bytes
            if request and (too_much or chunk.group != request[0].group):
                break
            request.append(self._hand_over(pile))
        return request

    def settle(self, reply: Reply) -> Settled:
        """Book the answer to what was taken last, and learn from it how much to try next."""
        size_bytes, alone = self._sending.size_bytes, not self._again
        settled = super().settle(reply)
        if settled is Settled.LATER:
            self._failures += 1
        elif self._from_again or alone:
            self._failures = 0
        if settled is Settled.SMALLER:
            self._request_bytes = size_bytes // 2
        elif self._from_again:
            self._again_bytes = self._next_bytes(settled, size_bytes, self._again_bytes)
        else:
            self._fresh_bytes = self._next_bytes(settled, size_bytes, self._fresh_bytes)
            if alone:
                self._again_bytes = self._fresh_bytes
        return settled

    def _next_bytes(self, settled: Settled, size_bytes: int, fit_bytes: int) -> int:
        if settled is Settled.LATER:
            return size_bytes // 2
        return min(self._request_bytes, 2 * max(size_bytes, fit_bytes))

    def _put_back(self, sent: _Pile) -> None:
        if self._from_again:
            for ordinal, chunk in reversed(sent.entries):
                self._again.push_front(ordinal, chunk)
        else:
            for ordinal, chunk in sent.entries:
                self._again.push(ordinal, chunk)


class Snapshots(Store):
    """Metrics: the pieces of the snapshot that is under way, and the newest one behind it.

    One under way is finished as long as its pieces are taken, so that a slow other side gets all of it and not the
    first pieces of each; once one has to be sent again, the newer snapshot takes its place.
    """

    _QUEUE_REASONS = (SUPERSEDED, SHUTDOWN)
    _TRANSPORT_REASONS = (SUPERSEDED, REJECTED, REFUSED, FAILED, SHUTDOWN)

    def __init__(self) -> None:
        super().__init__()
        self.exported_ns = 0
        """Time of the newest snapshot of which every piece was taken, or some and the rest refused for good."""
        self._behind = _Pile()
        self._behind_ns = 0
        self._under_way_ns = 0
        self._complete = True
        self._any_taken = False

    @property
    def waiting(self) -> bool:
        """Whether there is anything to take."""
        return super().waiting or bool(self._behind)

    @property
    def urgent(self) -> bool:
        """Whether to send at once: always."""
        return True

    def offer(self, chunks: Iterable[Chunk], taken_ns: int) -> None:
        """Take a snapshot in; those that it supersedes are dropped."""
        self._drop_all(self._behind, self._queue_lost, SUPERSEDED)
        for chunk in chunks:
            self._enter(chunk)
            self._accept(self._behind, chunk)
        self._behind_ns = taken_ns
        self._supersede()

    def take(self) -> list[Chunk]:
        """Take the next piece: each is a request of its own."""
        if not super().waiting:
            self._fresh, self._behind = self._behind, self._fresh
            self._under_way_ns = self._behind_ns
            self._complete, self._any_taken = True, False
        pile = self._fresh or self._again
        return [self._hand_over(pile)] if pile else []

    def settle(self, reply: Reply) -> Settled:
        """Book the answer to the piece."""
        if not self._sending:
            return Settled.DONE
        settled = super().settle(reply)
        self._any_taken |= reply.taken
        # A piece that is refused in every snapshot must not keep the others from ever being out.
        self._complete &= settled is Settled.LATER or reply.taken or reply.reason == REFUSED
        self._supersede()
        if self._complete and self._any_taken and not super().waiting:
            self.exported_ns = self._under_way_ns
        return settled

    def abandon(self) -> None:
        """Give up all that is here."""
        super().abandon()
        self._drop_all(self._behind, self._queue_lost, SHUTDOWN)

    def _supersede(self) -> None:
        """Let the snapshot behind take the place of one that does not get through."""
        if self._again and self._behind:
            self._complete = False
            self._drop_all(self._again, self._transport_lost, SUPERSEDED)
            self._drop_all(self._fresh, self._queue_lost, SUPERSEDED)

    def _put_back(self, sent: _Pile) -> None:
        # Behind the others: a piece that is never taken holds up only itself.
        for ordinal, chunk in sent.entries:
            self._again.push(ordinal, chunk)

    def _queued_items(self) -> int:
        return self._fresh.items + self._behind.items

    def _queued_bytes(self) -> int:
        return self._fresh.size_bytes + self._behind.size_bytes
