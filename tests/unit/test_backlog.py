"""What is kept, what gives way, and when the next attempt begins: no thread, no clock."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from otel_lb_hop.core.ledger import Ledger
from otel_lb_hop.export.backlog import Backlog, Backoff, Books, Flush, Settled, Snapshots, Store
from otel_lb_hop.export.delivery import Chunk, Reply

TAKEN = Reply(taken=True)
AGAIN = Reply(taken=False, retry=True)
REFUSED = Reply(taken=False)
TOO_LARGE = Reply(taken=False, too_large=True)


def chunk(payload: object, items: int = 1, size_bytes: int = 10, group: object = "g") -> Chunk:
    """Make a chunk."""
    return Chunk(group, payload, items, size_bytes)


def payloads(chunks: list[Chunk]) -> list[object]:
    """Tell which chunks these are."""
    return [each.payload for each in chunks]


def send_all(store: Store, reply: Reply = TAKEN) -> list[list[object]]:
    """Settle everything that waits with one answer; gives the requests."""
    requests = []
    while request := store.take():
        requests.append(payloads(request))
        store.settle(reply)
    return requests


def check(store: Store) -> None:
    """Both books and both stages balance, and the stages agree."""
    for books in (store.items(), store.size_bytes()):
        assert books.offered == books.exported + sum(books.dropped.values()) + books.queued + books.sending
    assert Ledger(store.stages("metrics", "otlp")).problems() == []


def test_requests() -> None:
    """Neighbours of one group go together while they fit; a chunk that is larger than a request goes alone."""
    backlog = Backlog(1_000, 30)
    backlog.offer([chunk(1), chunk(2), chunk(3), chunk(4), chunk(5, group="h"), chunk(6), chunk(7, size_bytes=31)])
    backlog.offer([chunk(8)])
    assert send_all(backlog) == [[1, 2, 3], [4], [5], [6], [7], [8]]
    assert backlog.items() == Books(8, 8, {}, 0, 0)
    assert backlog.size_bytes() == Books(101, 101, {}, 0, 0)


def test_urgent() -> None:
    """A whole request need not wait for more, nor does one that is sent again."""
    backlog = Backlog(1_000, 30)
    backlog.offer([chunk(1), chunk(2)])
    found = [backlog.urgent]
    backlog.offer([chunk(3)])
    found.append(backlog.urgent)
    backlog.take()
    found.append(backlog.urgent)
    backlog.settle(AGAIN)
    found.append(backlog.urgent)
    assert found == [False, True, False, True]


def test_urgent_after_failures() -> None:
    """As much as goes at once need not wait for more."""
    backlog = Backlog(1_000, 40)
    backlog.offer([chunk(number) for number in range(4)])
    for reply in (AGAIN, TAKEN, TAKEN):
        backlog.take()
        backlog.settle(reply)
    found = []
    for number in (4, 5):
        backlog.offer([chunk(number)])
        found.append(backlog.urgent)
    assert found == [False, True]


def test_newest_are_kept() -> None:
    """What is on its way counts against the bound and stays; of what waits the oldest give way."""
    backlog = Backlog(50, 20)
    backlog.offer([chunk(1, items=3), chunk(2)])
    assert payloads(backlog.take()) == [1, 2]
    backlog.offer([chunk(number, items=number) for number in range(3, 8)])
    assert backlog.items() == Books(29, 0, {"queue_full": 7}, 18, 4)
    assert backlog.size_bytes() == Books(70, 0, {"queue_full": 20}, 30, 20)
    backlog.settle(TAKEN)
    assert send_all(backlog) == [[5, 6], [7]]


def test_sent_again() -> None:
    """A request that was not taken is the oldest again: sent first, or displaced first."""
    backlog = Backlog(60, 30)
    backlog.offer([chunk(1), chunk(2)])
    backlog.take()
    backlog.offer([chunk(3), chunk(4)])
    assert backlog.settle(AGAIN) is Settled.LATER
    assert payloads(backlog.take()) == [1]
    assert backlog.settle(AGAIN) is Settled.LATER
    backlog.offer([chunk(5), chunk(6), chunk(7)])
    assert backlog.items() == Books(7, 0, {"queue_full": 1}, 5, 1)
    assert send_all(backlog) == [[2], [3], [4, 5], [6, 7]]
    queue, transport = backlog.stages("logs", "otlp")
    assert (queue.seen, queue.exported, queue.losses, queue.in_flight) == (7, 7, {}, 0)
    assert (transport.seen, transport.exported, transport.losses, transport.in_flight) == (7, 6, {"queue_full": 1}, 0)


def test_a_slow_link_gets_what_it_can_take() -> None:
    """Half as much after each failure, down to one chunk, however much waits; twice as much after each success."""
    backlog = Backlog(10_000, 160)
    backlog.offer([chunk(number) for number in range(100)])
    sizes = []
    for reply in [AGAIN] * 2 + [TAKEN] * 4 + [AGAIN, TAKEN, TAKEN, TAKEN]:
        sizes.append(len(backlog.take()))
        backlog.settle(reply)
    # The first 16 go by themselves until they are taken; what was never sent begins with half of what failed.
    assert sizes == [16, 8, 4, 8, 4, 8, 16, 8, 8, 8]
    assert backlog.items().exported == 48
    check(backlog)


def test_a_server_that_takes_little_at_once() -> None:
    """A request that is too large goes again in halves, at once, in order, and never so large again."""
    backlog = Backlog(10_000, 160)
    backlog.offer([chunk(number) for number in range(40)])
    replies = [TOO_LARGE, TOO_LARGE, *[TAKEN] * 3]
    settled, sent = [], []
    for reply in replies:
        sent.append(payloads(backlog.take()))
        settled.append(backlog.settle(reply))
        assert not backlog.stuck
    assert settled == [Settled.SMALLER] * 2 + [Settled.DONE] * 3
    assert sent == [[*range(16)], [*range(8)], [*range(4)], [*range(4, 8)], [*range(8, 12)]]
    assert [len(request) for request in send_all(backlog)] == [4] * 7
    assert backlog.items() == Books(40, 40, {}, 0, 0)


def test_a_single_chunk_that_is_too_large_is_refused() -> None:
    """It alone, and it does not make the others smaller."""
    backlog = Backlog(10_000, 160)
    backlog.offer([chunk(1), chunk(2, items=7, size_bytes=100), chunk(3), chunk(4)])
    sent = []
    while request := payloads(backlog.take()):
        sent.append(request)
        backlog.settle(TOO_LARGE if 2 in request else TAKEN)
    assert sent == [[1, 2, 3, 4], [1], [2], [3, 4]]
    assert backlog.items() == Books(10, 3, {"refused": 7}, 0, 0)
    check(backlog)


def test_what_is_never_taken_holds_up_only_itself() -> None:
    """From the third failure every other attempt is for what was not tried yet, in whole requests; order is kept."""
    backlog = Backlog(1_000, 40)
    backlog.offer([chunk("poison"), chunk(1), chunk(2), chunk(3)])
    sent = []
    for turn in range(12):
        backlog.offer([chunk(10 * turn + number) for number in range(10, 14)])
        sent.append(payloads(backlog.take()))
        backlog.settle(AGAIN if "poison" in sent[-1] else TAKEN)
        assert backlog.stuck
    poison, first = ["poison"], ["poison", 1, 2, 3]
    assert sent[:5] == [first, ["poison", 1], poison, [10, 11], poison]
    assert sent[5:8] == [[12, 13, 20, 21], poison, [22, 23, 30, 31]]
    assert sent[8::2] == [poison] * 2
    backlog.take()
    backlog.settle(TAKEN)
    assert not backlog.stuck
    assert payloads(backlog.take()) == [1, 2]
    check(backlog)


def test_in_an_outage_order_is_kept() -> None:
    """What was tried aside waits behind what was tried before it, and of both the oldest give way."""
    backlog = Backlog(60, 20)
    backlog.offer([chunk(number) for number in range(1, 7)])
    for _ in range(6):
        backlog.take()
        assert backlog.settle(AGAIN) is Settled.LATER
    backlog.offer([chunk(7)])
    assert [number for request in send_all(backlog) for number in request] == [2, 3, 4, 5, 6, 7]
    assert backlog.items() == Books(7, 6, {"queue_full": 1}, 0, 0)
    check(backlog)


def test_too_large() -> None:
    """A chunk that could never be held displaces nothing; one that is as large as the bound is the only one."""
    backlog = Backlog(50, 20)
    backlog.offer([chunk(1), chunk(2, items=9, size_bytes=51)])
    assert backlog.items() == Books(10, 0, {"too_large": 9}, 1, 0)
    backlog.offer([chunk(3, size_bytes=50)])
    assert backlog.items() == Books(11, 0, {"too_large": 9, "queue_full": 1}, 1, 0)
    assert send_all(backlog) == [[3]]


def test_a_flush_hears_of_a_chunk_that_could_never_be_held() -> None:
    """As of every other loss, once."""
    backlog = Backlog(50, 20)
    backlog.offer([chunk(1, size_bytes=51)])
    assert [backlog.watch().lost, backlog.watch().lost] == [True, False]


@pytest.mark.parametrize(
    ("reply", "books"),
    [
        (Reply(taken=True), Books(10, 10, {}, 0, 0)),
        (Reply(taken=True, detail="mind the gap"), Books(10, 10, {}, 0, 0)),
        (Reply(taken=True, rejected=3), Books(10, 7, {"rejected_partially": 3}, 0, 0)),
        (Reply(taken=True, rejected=10**9), Books(10, 0, {"rejected_partially": 10}, 0, 0)),
        (Reply(taken=True, rejected=-5), Books(10, 10, {}, 0, 0)),
        (Reply(taken=True, retry=True), Books(10, 10, {}, 0, 0)),
        (Reply(taken=False), Books(10, 0, {"refused": 10}, 0, 0)),
        (Reply(taken=False, reason="failed"), Books(10, 0, {"failed": 10}, 0, 0)),
        (Reply(taken=False, retry=True), Books(10, 0, {}, 0, 10)),
        (Reply(taken=False, too_large=True), Books(10, 0, {}, 0, 10)),
        (Reply(taken=False, retry=True, too_large=True), Books(10, 0, {}, 0, 10)),
        (Reply(taken=True, too_large=True), Books(10, 10, {}, 0, 0)),
    ],
)
def test_replies(reply: Reply, books: Books) -> None:
    """Each answer is booked once, whatever nonsense it holds."""
    backlog = Backlog(100, 20)
    backlog.offer([chunk(1, items=4), chunk(2, items=6)])
    backlog.take()
    assert (backlog.settle(reply) is Settled.DONE) == (books.sending == 0)
    assert backlog.items() == books
    check(backlog)


def test_abandon() -> None:
    """What is given up is counted where it is: in the queue, or with the sink; an answer that comes later is not."""
    backlog = Backlog(100, 10)
    backlog.offer([chunk(1), chunk(2, items=2), chunk(3, items=3)])
    backlog.take()
    backlog.abandon()
    backlog.settle(TAKEN)
    queue, transport = backlog.stages("logs", "otlp")
    assert (queue.losses, transport.losses) == ({"shutdown": 5}, {"shutdown": 1})
    assert backlog.items() == Books(6, 0, {"shutdown": 6}, 0, 0)


class AnyHistory(RuleBasedStateMachine):
    """The backlog against two lists: books, bounds, order, the newest kept, whose turn it is, what flushes answer."""

    limit_bytes = 60
    request_bytes = 25

    def __init__(self) -> None:
        super().__init__()
        self.backlog = Backlog(self.limit_bytes, self.request_bytes)
        self.offered = self.exported = self.last_number = 0
        self.dropped: dict[str, int] = {}
        self.again: list[Chunk] = []
        self.fresh: list[Chunk] = []
        self.sending: list[Chunk] = []
        self.most_bytes = {"again": self.request_bytes, "fresh": self.request_bytes}
        self.ceiling_bytes = self.request_bytes
        self.failures = 0
        self.turn = "fresh"
        self.untold = False
        self.flushes: list[tuple[Flush, int]] = []
        self.expect_lost: list[bool] = []

    @rule(
        shapes=st.lists(
            st.tuples(st.integers(1, 9), st.sampled_from([1, 5, 10, 24, 26, 59, 60, 61]), st.sampled_from("ab")),
            max_size=6,
        )
    )
    def offer(self, shapes: list[tuple[int, int, str]]) -> None:
        """Offer chunks; the suffix that fits beside what is on its way stays."""
        chunks = []
        for items, size_bytes, group in shapes:
            self.last_number += 1
            chunks.append(chunk(self.last_number, items, size_bytes, group))
            self.offered += items
            if size_bytes > self.limit_bytes:
                self._lose("too_large", items, self.last_number, self.last_number)
        self.backlog.offer(chunks)
        room = self.limit_bytes - sum(each.size_bytes for each in self.sending)
        kept: list[Chunk] = []
        for each in reversed(
            [*self.again, *self.fresh, *(each for each in chunks if each.size_bytes <= self.limit_bytes)]
        ):
            room -= each.size_bytes
            if room < 0:
                self._lose("queue_full", each.items, each.payload, each.payload)
            else:
                kept.append(each)
        self.again = [each for each in kept[::-1] if each in self.again]
        self.fresh = [each for each in kept[::-1] if each not in self.again]

    @precondition(lambda self: not self.sending)
    @rule()
    def take(self) -> None:
        """Take a request: a prefix of what was tried or of what was not, of one group, as long as it may be."""
        self.sending = self.backlog.take()
        assert bool(self.sending) == bool(self.again or self.fresh)
        if self.again and self.fresh and self.failures >= 3:
            self.turn = "fresh" if self.turn == "again" else "again"
        else:
            self.turn = "again" if self.again else "fresh"
        waiting = self.again if self.turn == "again" else self.fresh
        count = len(self.sending)
        assert self.sending == waiting[:count]
        assert len({each.group for each in self.sending}) <= 1
        most_bytes = min(self.ceiling_bytes, self.most_bytes[self.turn])
        size_bytes = sum(each.size_bytes for each in self.sending)
        assert count <= 1 or size_bytes <= most_bytes
        if count < len(waiting):
            after = waiting[count]
            assert after.group != self.sending[0].group or size_bytes + after.size_bytes > most_bytes
        del waiting[:count]

    @precondition(lambda self: self.sending)
    @rule(rejected=st.one_of(st.just(0), st.integers(-1, 20)))
    def taken(self, rejected: int) -> None:
        """Let the request be taken, or most of it."""
        items = sum(each.items for each in self.sending)
        lost = max(0, min(rejected, items))
        self.exported += items - lost
        if lost:
            self._lose("rejected_partially", lost, self.sending[0].payload, self.sending[-1].payload)
        assert self.backlog.settle(Reply(taken=True, rejected=rejected)) is Settled.DONE
        self._grow()

    @precondition(lambda self: self.sending)
    @rule()
    def not_now(self) -> None:
        """Let the other side ask for the same later."""
        half_bytes = sum(each.size_bytes for each in self.sending) // 2
        assert self.backlog.settle(AGAIN) is Settled.LATER
        if self.turn == "fresh" and not self.again:
            self.most_bytes["again"] = half_bytes
        self.most_bytes[self.turn] = half_bytes
        self.failures += 1
        self._put_back()

    @precondition(lambda self: len(self.sending) > 1)
    @rule()
    def too_large(self) -> None:
        """Let the other side call it too large."""
        assert self.backlog.settle(TOO_LARGE) is Settled.SMALLER
        self.ceiling_bytes = sum(each.size_bytes for each in self.sending) // 2
        if self.turn == "again" or not self.again:
            self.failures = 0
        self._put_back()

    @precondition(lambda self: self.sending)
    @rule(reason=st.sampled_from(["refused", "failed"]), too_large=st.booleans())
    def never(self, reason: str, too_large: bool) -> None:  # noqa: FBT001 - drawn by name
        """Let the request be refused for good."""
        items = sum(each.items for each in self.sending)
        self._lose(reason, items, self.sending[0].payload, self.sending[-1].payload)
        reply = Reply(taken=False, reason=reason, too_large=too_large and len(self.sending) == 1)
        assert self.backlog.settle(reply) is Settled.DONE
        self._grow()

    @rule()
    def flush(self) -> None:
        """Somebody wants to know."""
        self.flushes.append((self.backlog.watch(), self.last_number))
        self.expect_lost.append(self.untold)
        self.untold = False

    @precondition(lambda self: self.flushes)
    @rule(data=st.data())
    def flush_ends(self, data: st.DataObject) -> None:
        """One of those who asked is answered."""
        index = data.draw(st.integers(0, len(self.flushes) - 1))
        (flush, _), lost = self.flushes.pop(index), self.expect_lost.pop(index)
        assert flush.lost == lost
        self.backlog.unwatch(flush)

    @rule()
    def abandon(self) -> None:
        """End it; for the test it begins again."""
        for each in (*self.sending, *self.again, *self.fresh):
            self._lose("shutdown", each.items, each.payload, each.payload)
        self.backlog.abandon()
        self.again, self.fresh, self.sending = [], [], []

    def _put_back(self) -> None:
        self.again = sorted(self.again + self.sending, key=lambda each: each.payload)
        self.sending = []

    def _grow(self) -> None:
        size_bytes = sum(each.size_bytes for each in self.sending)
        more_bytes = min(self.ceiling_bytes, 2 * max(size_bytes, self.most_bytes[self.turn]))
        if self.turn == "fresh" and not self.again:
            self.most_bytes["again"] = more_bytes
        self.most_bytes[self.turn] = more_bytes
        if self.turn == "again" or not self.again:
            self.failures = 0
        self.sending = []

    def _lose(self, reason: str, items: int, first: int, last: int) -> None:
        self.dropped[reason] = self.dropped.get(reason, 0) + items
        for index, (_, asked_at) in enumerate(self.flushes):
            self.expect_lost[index] |= first <= asked_at
        self.untold |= all(asked_at < last for _, asked_at in self.flushes)

    @invariant()
    def books_hold(self) -> None:
        """Every item is in one place, and it is the right one."""
        books = self.backlog.items()
        assert (books.offered, books.exported, books.dropped) == (self.offered, self.exported, self.dropped)
        assert books.queued == sum(each.items for each in self.fresh)
        assert books.sending == sum(each.items for each in (*self.again, *self.sending))
        assert self.backlog.stuck == (self.failures > 0)
        check(self.backlog)

    @invariant()
    def bytes_are_bounded(self) -> None:
        """Hold never more than the limit, and what the model holds."""
        held = self.backlog.size_bytes()
        assert held.queued + held.sending == sum(each.size_bytes for each in (*self.again, *self.fresh, *self.sending))
        assert held.queued + held.sending <= self.limit_bytes

    @invariant()
    def flushes_are_settled(self) -> None:
        """End a flush once nothing is here that came before it."""
        here = [each.payload for each in (*self.sending, *self.again, *self.fresh)]
        for flush, asked_at in self.flushes:
            assert self.backlog.settled(flush) == all(number > asked_at for number in here)


TestAnyHistory = AnyHistory.TestCase
TestAnyHistory.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


# metrics


def test_pieces() -> None:
    """Each piece is a request of its own; once all are taken, the snapshot is out."""
    snapshots = Snapshots()
    snapshots.offer([chunk("a1", items=5), chunk("a2", items=2)], 100)
    assert snapshots.take() == [chunk("a1", items=5)]
    snapshots.settle(TAKEN)
    assert (snapshots.items(), snapshots.exported_ns) == (Books(7, 5, {}, 2, 0), 0)
    assert send_all(snapshots) == [["a2"]]
    assert (snapshots.items(), snapshots.exported_ns) == (Books(7, 7, {}, 0, 0), 100)


def test_only_the_newest_waits() -> None:
    """While one is under way only the newest waits behind it; the one under way is finished."""
    snapshots = Snapshots()
    snapshots.offer([chunk("a1"), chunk("a2")], 100)
    snapshots.take()
    snapshots.offer([chunk("b1", items=3), chunk("b2", items=4)], 200)
    snapshots.offer([chunk("c1")], 300)
    assert snapshots.items() == Books(10, 0, {"superseded": 7}, 2, 1)
    snapshots.settle(TAKEN)
    assert payloads(snapshots.take()) == ["a2"]
    snapshots.settle(TAKEN)
    assert snapshots.exported_ns == 100
    assert send_all(snapshots) == [["c1"]]
    assert snapshots.exported_ns == 300
    check(snapshots)


def test_a_newer_one_ends_the_retries() -> None:
    """A snapshot that does not get through is tried until a newer one is there, whenever that comes."""
    snapshots = Snapshots()
    snapshots.offer([chunk("a1"), chunk("a2")], 100)
    snapshots.take()
    assert snapshots.settle(AGAIN) is Settled.LATER
    snapshots.offer([chunk("b1")], 200)
    assert snapshots.items() == Books(3, 0, {"superseded": 2}, 1, 0)
    assert payloads(snapshots.take()) == ["b1"]
    snapshots.offer([chunk("c1"), chunk("c2")], 300)
    assert snapshots.settle(AGAIN) is Settled.LATER
    assert (snapshots.items(), snapshots.exported_ns) == (Books(5, 0, {"superseded": 3}, 2, 0), 0)
    assert send_all(snapshots) == [["c1"], ["c2"]]
    assert snapshots.exported_ns == 300
    check(snapshots)


def test_a_bad_piece_holds_up_only_itself() -> None:
    """A piece to be sent again goes behind the others of its snapshot."""
    snapshots = Snapshots()
    snapshots.offer([chunk("a1"), chunk("a2"), chunk("a3")], 100)
    sent = []
    for reply in (AGAIN, TAKEN, TAKEN, AGAIN, TAKEN):
        assert snapshots.exported_ns == 0
        sent += payloads(snapshots.take())
        snapshots.settle(reply)
    assert sent == ["a1", "a2", "a3", "a1", "a1"]
    assert (snapshots.items(), snapshots.exported_ns) == (Books(3, 3, {}, 0, 0), 100)


@pytest.mark.parametrize(
    ("reply", "exported_ns"),
    [
        (TAKEN, 200),
        (Reply(taken=True, rejected=1), 200),
        (REFUSED, 200),
        (TOO_LARGE, 200),
        (Reply(taken=False, reason="failed"), 100),
    ],
)
def test_time_of_the_newest(reply: Reply, exported_ns: int) -> None:
    """A piece that will never be taken does not count; one that got lost does, but not beyond its snapshot."""
    snapshots = Snapshots()
    snapshots.offer([chunk("a1")], 100)
    send_all(snapshots)
    snapshots.offer([chunk("b1"), chunk("b2")], 200)
    snapshots.take()
    snapshots.settle(reply)
    send_all(snapshots)
    assert snapshots.exported_ns == exported_ns
    snapshots.offer([chunk("c1")], 300)
    send_all(snapshots)
    assert snapshots.exported_ns == 300
    check(snapshots)


def test_a_snapshot_of_which_nothing_is_taken_is_not_out() -> None:
    """With a wrong token, say: what it tells has reached nobody."""
    snapshots = Snapshots()
    for taken_ns in (100, 200):
        snapshots.offer([chunk("a1"), chunk("a2")], taken_ns)
        send_all(snapshots, REFUSED)
    assert (snapshots.items(), snapshots.exported_ns) == (Books(4, 0, {"refused": 4}, 0, 0), 0)


def test_metrics_abandoned() -> None:
    """Whatever is left of whichever snapshot is counted; none of it is out."""
    snapshots = Snapshots()
    snapshots.offer([chunk("a1"), chunk("a2", items=2)], 100)
    snapshots.take()
    snapshots.offer([chunk("b1", items=4)], 200)
    snapshots.abandon()
    snapshots.settle(TAKEN)
    assert (snapshots.items(), snapshots.exported_ns) == (Books(7, 0, {"shutdown": 7}, 0, 0), 0)
    assert snapshots.take() == []
    check(snapshots)


# back-off


def test_waits_grow_to_a_bound() -> None:
    """At random between nothing and a time that doubles up to two seconds; an answer ends that."""
    backoff = Backoff()
    waits = []
    for failures in range(1, 9):
        backoff.fail(1_000.0, 0.5, None)
        assert backoff.failures == failures
        waits.append(round(backoff.due - 1_000.0, 6))
    assert waits == [0.1, 0.2, 0.4, 0.8, 1.0, 1.0, 1.0, 1.0]
    backoff.succeed()
    backoff.fail(1_000.0, 0.0, None)
    assert (backoff.due, backoff.failures) == (1_000.0, 1)


def test_after_any_outage_the_next_attempt_is_near() -> None:
    """After a thousand failures as after ten: less than 2.5 s, however chance falls."""
    backoff = Backoff()
    for _ in range(1_000):
        backoff.fail(0.0, 0.999_999, None)
        assert backoff.due < 2.5


@pytest.mark.parametrize(
    ("asked", "due"),
    [
        (None, 0.1),
        (0.0, 0.1),
        (0.05, 0.1),
        (-7.0, 0.1),
        (7.5, 7.5),
        (300.0, 300.0),
        (1e9, 300.0),
        (float("inf"), 300.0),
    ],
)
def test_retry_after(asked: float | None, due: float) -> None:
    """What the other side asks for holds, up to five minutes; a shorter wait than ours does not make us hurry."""
    backoff = Backoff()
    backoff.fail(0.0, 0.5, asked)
    assert backoff.due == due
    backoff.fail(1_000.0, 0.5, None)
    assert backoff.due == 1_000.2


def test_hurry() -> None:
    """At the end our own wait is over; what the other side asked for is not."""
    backoff = Backoff()
    for _ in range(9):
        backoff.fail(100.0, 0.9, None)
    backoff.hurry(100.5)
    assert (backoff.due, backoff.failures) == (100.5, 0)
    backoff.fail(101.0, 0.9, 30.0)
    backoff.hurry(102.0)
    assert backoff.due == 131.0
