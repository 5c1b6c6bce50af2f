"""The API server as a source of the topology: a thread for each resource that lists and watches it, and a scout.

What to ask is decided in `reflection`, when in `pace`, both pure; here are the threads, the clock and the queue.

Back-off goes to a minute, yet an agent should know the cluster within seconds once the server is back. So while a
resource waits for long, the scout asks every few seconds for one small thing that any server has at hand, the own node.
When that begins to succeed, those that wait go on. If it succeeds all along, the failure is that resource's own (such
as a missing right), and its wait stands.
"""

from __future__ import annotations

import json
import logging
import random
import threading
import time
from collections import deque
from contextlib import suppress
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol
from urllib.parse import quote

from otel_lb_hop.cluster.failure import Cause, ClusterError
from otel_lb_hop.cluster.listing import ListDecoder
from otel_lb_hop.cluster.objects import Change, Kind
from otel_lb_hop.cluster.pace import Pace, Timing, retry_after_seconds
from otel_lb_hop.cluster.reflection import LineSplitter, Reflection, status_error

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from otel_lb_hop.cluster.reflection import Request

log = logging.getLogger(__name__)

CLOSE_SECONDS = 0.5
_RENEWING = {Cause.UNREACHABLE, Cause.UNAUTHORIZED}
"""After these, configuration and credentials are read anew before the next request."""
_UID_SETTLED = {HTTPStatus.OK, HTTPStatus.FORBIDDEN, HTTPStatus.NOT_FOUND}


class Answer(Protocol):
    """An answer that has begun; the methods raise ClusterError."""

    status: int
    retry_after: str | None

    def read(self) -> bytes:
        """Answer what comes next, nothing at the end."""

    def read_small(self) -> bytes:
        """Answer a small body."""

    def close(self) -> None:
        """Be done with it."""


class Connection(Protocol):
    """A way to the API server."""

    def get(self, target: str, head_seconds: float, body_seconds: float) -> Answer:
        """Ask; raises ClusterError."""

    def abort(self) -> None:
        """Break off what another thread waits for."""

    def close(self) -> None:
        """Be done with it."""


class State(NamedTuple):
    """How the reflection of one resource is."""

    synced: bool = False
    """Whether a whole LIST has been queued since the start."""
    error: str | None = None
    """The last failure; None while all is well."""
    contact_ns: int | None = None
    """Wall time when the server last showed that what was queued is what it has."""
    objects: int = 0
    requests: int = 0
    relists: int = 0
    bad_objects: int = 0
    bad_reason: str | None = None


class ApiSource:
    """Changes of Services, EndpointSlices and Nodes, as they come. All methods may be called from any thread.

    `connect` reads the configuration and gives a connection, or raises ClusterError; it is called by each thread, and
    again after credentials failed. `wake` is called from those threads when there is something to take again.
    """

    def __init__(
        self, connect: Callable[[], Connection], node_name: str, wake: Callable[[], None], timing: Timing | None = None
    ) -> None:
        timing = timing or Timing()
        self._shared = _Shared(wake)
        self._reflectors = [_Reflector(kind, _Client(connect), self._shared, timing) for kind in Kind]
        self._scout = _Scout(node_name, _Client(connect), self._shared, timing)
        self._shared.reflectors = self._reflectors
        self._workers: list[_Reflector | _Scout] = [*self._reflectors, self._scout]
        self._threads = [threading.Thread(target=each.run, name=each.name, daemon=True) for each in self._workers]

    def start(self) -> None:
        """Start the threads; an API server that is away is told by `states`."""
        for thread in self._threads:
            thread.start()

    def take(self, limit: int) -> list[Change]:
        """Take at most `limit` changes, the oldest first; does not wait."""
        with self._shared.changed:
            queue = self._shared.queue
            return [queue.popleft() for _ in range(min(limit, len(queue)))]

    def states(self) -> dict[Kind, State]:
        """Tell how each resource is; all of a list that it calls synced is in the queue, or was."""
        with self._shared.changed:
            return {each.kind: each.state for each in self._reflectors}

    def cluster_uid(self) -> str | None:
        """Tell the uid of the namespace kube-system, which stands for the cluster's, if it could be read."""
        return self._scout.cluster_uid

    def close(self) -> None:
        """End the threads; one that is just connecting ends by itself a little later."""
        with self._shared.changed:
            self._shared.closing = True
            self._shared.changed.notify_all()
        for each in self._workers:
            each.client.abort()
        deadline = time.monotonic() + CLOSE_SECONDS
        for thread in self._threads:
            if thread.is_alive():
                thread.join(max(0.0, deadline - time.monotonic()))


class _Shared:
    """What the threads share: all under the lock of `changed`."""

    def __init__(self, wake: Callable[[], None]) -> None:
        self.changed = threading.Condition()
        self.queue: deque[Change] = deque()
        self.closing = False
        self.reflectors: list[_Reflector] = []
        self.scout_wanted = False
        self.scout_failed = False
        """The scout failed, and nothing has succeeded since."""
        self.back_since = 0.0
        """When the server was last found to be back after it was away."""
        self.uid_wanted = False
        self._wake = wake

    def put(self, changes: Sequence[Change]) -> None:
        """Queue changes, with the lock held, and wake the consumer of an empty queue."""
        empty = not self.queue
        self.queue.extend(changes)
        if empty and changes:
            self._wake()

    def want_scout(self) -> None:
        """Send the scout, with the lock held."""
        self.scout_wanted = True
        self.changed.notify_all()

    def sleep(self, seconds: float) -> bool:
        """Sleep; answers whether to go on then."""
        with self.changed:
            return not self.changed.wait_for(lambda: self.closing, seconds)

    def release(self, asked: float = 0.0) -> None:
        """Let those go on that wait for a server that was away; with the lock held.

        `asked` is when the scout asked that found it back: who asked before it and has heard nothing may have asked
        what is no longer there.
        """
        now = time.monotonic()
        if self.scout_failed:
            self.back_since = now
        for each in self.reflectors:
            # Who had no connection is let go even if the scout never failed, but once: its own requests may break it.
            if each.waits and (self.scout_failed or (each.was_unreachable and not each.was_released)):
                each.was_released = True
                each.pace.release(now, _fraction())
            elif self.scout_failed and each.unanswered and each.asked < asked:
                each.client.abort()
        self.scout_failed = False
        self.changed.notify_all()


class _Client:
    """The connection of one thread, made when it is needed."""

    def __init__(self, connect: Callable[[], Connection]) -> None:
        self._connect = connect
        self._connection: Connection | None = None

    def get(self, target: str, head_seconds: float, body_seconds: float) -> Answer:
        """Ask; raises ClusterError."""
        if self._connection is None:
            self._connection = self._connect()
        return self._connection.get(target, head_seconds, body_seconds)

    def renew(self) -> None:
        """Read configuration and credentials anew before the next request."""
        if self._connection is not None:
            self._connection.close()
        self._connection = None

    def abort(self) -> None:
        """Break off what its thread waits for."""
        connection = self._connection
        if connection is not None:
            connection.abort()


class _Reflector:
    """The thread of one resource."""

    def __init__(self, kind: Kind, client: _Client, shared: _Shared, timing: Timing) -> None:
        self.kind = kind
        self.name = f"api-{kind.resource}"
        self.client = client
        self.state = State()
        self.pace = Pace(timing, time.monotonic(), _fraction())
        self.waits = False
        self.asked = 0.0
        self.unanswered = False
        """Whether the answer to what was asked has not begun."""
        self.was_released = False
        """Whether its wait was ended since its last good answer."""
        self.was_unreachable = False
        self._shared = shared
        self._timing = timing
        self._reflection = Reflection(kind)
        self._answered = False
        self._log = log.getChild(kind.resource)  # to ops.logs, the same line about another resource is another cause

    def run(self) -> None:
        """List and watch until closed."""
        while True:
            request = self._reflection.request(_fraction())
            if not self._wait(at_once=request.page):
                return
            try:
                self._ask(request)
            except ClusterError as error:
                self._fail(error)
            except Exception as error:  # noqa: BLE001 - a thread that ended would leave what it holds to grow stale
                self._log.exception("error in the agent itself")
                self._fail(ClusterError(f"error in the agent itself: {error!r}", Cause.GARBLED))

    def _wait(self, *, at_once: bool) -> bool:
        """Wait until the request may be made; answers whether to make it."""
        with self._shared.changed:
            while not self._shared.closing:
                now = time.monotonic()
                due = self.pace.due(now)
                self.waits = due > now and not at_once
                if not self.waits:
                    if not at_once:
                        self.pace.spend(now)
                    self.asked = now
                    self.unanswered = True
                    if self.state.error is not None:  # perhaps nobody will ever answer
                        self._shared.want_scout()
                    self.state = self.state._replace(requests=self.state.requests + 1)
                    return True
                self._shared.changed.wait(due - now)
            return False

    def _ask(self, request: Request) -> None:
        self._answered = False
        doing = f"{'watch' if request.watch else 'list'} {self.kind.resource}"
        timing = self._timing
        if request.watch:
            answer = self.client.get(request.target, timing.watch_head, timing.watch_read)
        else:
            answer = self.client.get(request.target, timing.list_read, timing.list_read)
        self.unanswered = False
        try:
            if answer.status != HTTPStatus.OK:
                raise _refusal(answer, doing)
            self._answered = True
            if request.watch:
                self._follow(answer)
            else:
                self._load(answer, check=request.check)
        finally:
            answer.close()

    def _load(self, answer: Answer, *, check: bool) -> None:
        """Read a page of a LIST, or the answer to a check."""
        decoder = ListDecoder()
        deadline = time.monotonic() + self._timing.list_total
        while chunk := answer.read():
            for item in decoder.feed(chunk):
                self._reflection.take_item(item)
            self._publish()
            if time.monotonic() > deadline:
                raise ClusterError(f"the list is not here after {self._timing.list_total:g} s", Cause.BROKEN)
        for item in decoder.finish():
            self._reflection.take_item(item)
        meta = decoder.meta()
        self._reflection.end_page(meta)
        self._publish(current=not (meta.continue_token or check))
        self._succeed(served=True)

    def _follow(self, answer: Answer) -> None:
        """Read a WATCH to its end."""
        lines = LineSplitter()
        began = time.monotonic()
        contact_ns: int | None = self.state.contact_ns
        self._succeed(served=False)
        self._publish(current=True, well=True)
        try:
            while chunk := answer.read():
                for line in lines.feed(chunk):
                    self._reflection.take_line(line)
                    contact_ns = time.time_ns()
                self._publish(current=True)
        finally:
            seconds = time.monotonic() - began
            with self._shared.changed:
                if seconds >= self._timing.lasting:
                    self.pace.last()
                else:  # that it began does not show that it would have told what is new
                    self.state = self.state._replace(contact_ns=contact_ns)
        if lines.partial:
            raise ClusterError("the watch stopped in the middle of a line", Cause.BROKEN)
        if seconds < self._timing.lasting:
            raise ClusterError(f"the server ended the watch after {seconds:.1f} s", Cause.BROKEN)
        self._reflection.end_watch()
        self._publish(current=True)

    def _publish(self, *, current: bool = False, well: bool = False) -> None:
        """Queue what has changed, and tell with it how things are."""
        reflection = self._reflection
        changes = reflection.take_changes()
        if not (changes or current):
            return
        with self._shared.changed:
            self._shared.put(changes)
            self.state = self.state._replace(
                synced=reflection.synced,
                error=None if well else self.state.error,
                contact_ns=time.time_ns() if current else self.state.contact_ns,
                objects=reflection.objects,
                relists=reflection.relists,
                bad_objects=reflection.bad_objects,
                bad_reason=reflection.bad_reason,
            )

    def _succeed(self, *, served: bool) -> None:
        """Take note of a good answer, which only began or was `served`: what others wait for may be over as well."""
        with self._shared.changed:
            self.pace.answer()
            self.was_released = False
            self._shared.uid_wanted = True
            if self.was_unreachable or (served and self._shared.scout_failed):
                self.was_unreachable = False
                self._shared.release()
            self._shared.changed.notify_all()

    def _fail(self, error: ClusterError) -> None:
        self._publish()
        self._reflection.fail(error.cause)
        if error.cause in _RENEWING:
            self.client.renew()
        with self._shared.changed:
            if self._shared.closing:
                return
            now = time.monotonic()
            fraction = _fraction()
            self.pace.fail(now, fraction, error.cause, error.retry_after_seconds, answered=self._answered)
            self.was_unreachable = error.cause is Cause.UNREACHABLE
            self.unanswered = False
            if self.asked < self._shared.back_since:
                self.pace.release(now, fraction)
            if self.pace.due(now) - now > self._timing.patience:
                self._shared.want_scout()
            if str(error) != self.state.error:
                self._log.warning("%s", error)
            self.state = self.state._replace(error=str(error))


class _Scout:
    """The thread that finds out, for those that wait long, whether the server is back; and once the cluster's uid."""

    def __init__(self, node_name: str, client: _Client, shared: _Shared, timing: Timing) -> None:
        self.name = "api-scout"
        self.client = client
        self.cluster_uid: str | None = None
        self._target = f"{Kind.NODES.value}/{quote(node_name, safe='')}?resourceVersion=0"
        self._shared = shared
        self._timing = timing
        self._uid_settled = False
        self._uid_due = time.monotonic()

    def run(self) -> None:
        """Go whenever somebody waits, until closed."""
        while self._wait():
            try:
                if self._shared.scout_wanted:
                    self._go()
                elif time.monotonic() >= self._uid_due:
                    self._find_uid()
            except Exception:  # without the scout, recovery may take a minute
                log.exception("error in the agent itself")
                self._shared.sleep(self._timing.longest_back_off)

    def _wait(self) -> bool:
        """Wait until there is something to do; answers whether to do it."""
        shared = self._shared
        with shared.changed:
            shared.changed.wait_for(
                lambda: shared.closing or shared.scout_wanted or (shared.uid_wanted and not self._uid_settled)
            )
            if not shared.scout_wanted:  # else it is wanted still when the scout is back
                shared.uid_wanted = False
            return not shared.closing

    def _go(self) -> None:
        """Ask every few seconds as long as somebody waits, and let them go on once it succeeds after it failed."""
        shared = self._shared
        asked = time.monotonic()
        retry_after = 0.0
        while True:
            pause = self._timing.scout_interval + self._timing.scout_spread * _fraction()
            if not shared.sleep(max(asked + pause - time.monotonic(), retry_after)):
                return
            with shared.changed:
                shared.scout_wanted = any(each.waits or each.unanswered for each in shared.reflectors)
                if not shared.scout_wanted:
                    return
                asked = time.monotonic()
                next(each for each in shared.reflectors if each.kind is Kind.NODES).pace.spend(asked)
            try:
                self._ask(self._target, {HTTPStatus.OK, HTTPStatus.NOT_FOUND})
            except ClusterError as error:
                retry_after = error.retry_after_seconds
                self.client.renew()
                with shared.changed:
                    shared.scout_failed = True
                continue
            with shared.changed:
                shared.scout_wanted = False
                shared.release(asked)
            self.client.renew()
            return

    def _find_uid(self) -> None:
        """Ask for the uid of kube-system; a cluster that does not allow that is as good as any."""
        self._uid_due = time.monotonic() + self._timing.longest_back_off
        with suppress(ClusterError):
            metadata = self._ask("/api/v1/namespaces/kube-system", _UID_SETTLED).get("metadata")
            uid = metadata.get("uid") if isinstance(metadata, dict) else None
            self.cluster_uid = uid if isinstance(uid, str) and uid.isascii() else None
            self._uid_settled = True
        self.client.renew()

    def _ask(self, target: str, good: set[HTTPStatus]) -> dict[str, Any]:
        answer = self.client.get(target, self._timing.scout_read, self._timing.scout_read)
        try:
            if answer.status not in good:
                raise _refusal(answer, f"get {target}")
            body = _json(answer.read_small())
        finally:
            answer.close()
        if not isinstance(body, dict):
            raise ClusterError(f"get {target}: the answer is no object", Cause.GARBLED)
        return body


def _refusal(answer: Answer, doing: str) -> ClusterError:
    seconds = retry_after_seconds(answer.retry_after, time.time())
    return status_error(_json(answer.read_small()), answer.status, seconds, doing)


def _json(body: bytes) -> object:
    with suppress(ValueError, RecursionError):
        return json.loads(body)
    return None


def _fraction() -> float:
    return random.random()  # noqa: S311 - jitter
