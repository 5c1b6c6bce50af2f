"""One resource of the API server, reflected: what to ask next, and what changes by each answer. Pure.

LIST and WATCH as the API promises them (Kubernetes API concepts: resource versions; KEP-2523 resourceVersionMatch,
KEP-365 paging, KEP-956 bookmarks) and as client-go's reflector.go goes about them: first any state, from the watch
cache (`resourceVersion=0`); after a loss one not older than what was seen, so that a server that lags behind does not
take us back in time; and if the server does not know that version, as after a backup of etcd was restored, the newest.
"""

from __future__ import annotations

import json
from enum import Enum, auto
from typing import TYPE_CHECKING, Any, Final, NamedTuple
from urllib.parse import urlencode

from otel_lb_hop.cluster import objects
from otel_lb_hop.cluster.failure import Cause, ClusterError
from otel_lb_hop.cluster.objects import Change

if TYPE_CHECKING:
    from otel_lb_hop.cluster.listing import ListMeta
    from otel_lb_hop.cluster.objects import Key, Kind
    from otel_lb_hop.model import EndpointSlice, Node, Service

PAGE_ITEMS: Final = 500
MAX_LINE_BYTES: Final = 8 * 2**20
WATCH_SECONDS: Final = 40
WATCH_SPREAD_SECONDS: Final = 10
"""Watches are short on purpose: a half-open connection is found soon even behind a proxy that keeps it alive, which
bookmarks, one a minute, would not do."""

ERRORS_TO_RELIST: Final = 10
"""So many errors in a row, and the server may never get past that version, as with an event that it cannot decode."""

_SHOWN = 300
_CAUSES = {400: Cause.AHEAD, 401: Cause.UNAUTHORIZED, 410: Cause.EXPIRED}
_HINTS = {
    401: "; is the token still good, and for this cluster?",
    403: "; the ClusterRole of the agent needs get, list and watch of services, endpointslices and nodes",
}
_EVENTS = ("ADDED", "MODIFIED", "DELETED", "BOOKMARK")
_RELIST = {Cause.EXPIRED, Cause.AHEAD, Cause.GARBLED}


class Request(NamedTuple):
    """What to ask: the path with its query, and whether it is a watch, or a page of a list that has begun.

    A `check` is answered as a list, of which only the version counts.
    """

    target: str
    watch: bool
    page: bool
    check: bool = False


class _List(Enum):
    """Which state a LIST asks for."""

    ANY = auto()
    NOT_OLDER = auto()
    NEWEST = auto()


class Reflection:
    """What is held of one resource. What an answer changes in it adds up until `take_changes`, also if it broke off."""

    def __init__(self, kind: Kind) -> None:
        self.kind = kind
        self.synced = False
        """Whether a LIST was read to its end."""
        self.relists = 0
        """LISTs that were begun after the first complete one."""
        self.bad_objects = 0
        """Objects of which something could not be read, each time one came."""
        self.bad_reason: str | None = None
        """What was wrong with the last of them."""
        self._held: dict[Key, Service | EndpointSlice | Node] = {}
        self._changes: list[Change] = []
        self._version = ""
        self._watching = False
        self._doubt = False
        """Whether the server was away and may be back with the state of a backup: it takes a watch from a version that
        it has yet to come to, and says nothing until then."""
        self._heard = False
        self._errors = 0
        self._has_bookmarks = False
        self._wish = _List.ANY
        self._continue = ""
        self._page_empty = True
        self._seen: set[Key] = set()

    @property
    def objects(self) -> int:
        """How many objects are held."""
        return len(self._held)

    def request(self, fraction: float) -> Request:
        """Tell what to ask next; `fraction` is random in [0, 1)."""
        if self._watching and self._doubt:
            return Request(f"{self.kind.value}?limit=1", watch=False, page=False, check=True)
        if self._watching:
            self._heard = False
            query = {
                "watch": "1",
                "resourceVersion": self._version,
                "allowWatchBookmarks": "true",
                "timeoutSeconds": str(WATCH_SECONDS + round(WATCH_SPREAD_SECONDS * fraction)),
            }
        elif self._continue:
            query = {"limit": str(PAGE_ITEMS), "continue": self._continue}
        elif self._wish is _List.NOT_OLDER:
            # No limit: that would be answered by etcd itself instead of the watch cache (reflector.go, list).
            query = {"resourceVersion": self._version, "resourceVersionMatch": "NotOlderThan"}
        else:
            query = {"limit": str(PAGE_ITEMS)} | ({"resourceVersion": "0"} if self._wish is _List.ANY else {})
        if self.synced and not (self._watching or self._continue):
            self.relists += 1
        return Request(f"{self.kind.value}?{urlencode(query)}", self._watching, bool(self._continue))

    def take_changes(self) -> list[Change]:
        """Answer what has changed since the last call, the oldest first."""
        changes, self._changes = self._changes, []
        return changes

    def take_item(self, raw: object) -> None:
        """Take over one item of a LIST."""
        if self._watching and self._doubt:
            return  # of a check
        self._page_empty = False
        key, value = self._read(raw)
        if key is not None:
            if value is not None:
                self._seen.add(key)
            self._put(key, value)

    def end_page(self, meta: ListMeta) -> None:
        """Take note that a page is complete; if it is the last, what none of them named is gone."""
        if self._watching and self._doubt:
            self._doubt = False
            if _is_older(meta.resource_version, self._version):
                raise ClusterError("the server is back with an older state, as from a backup", Cause.AHEAD)
            return
        if meta.continue_token:
            if self._page_empty or meta.continue_token == self._continue:
                raise ClusterError("a list without end: a page brings nothing new", Cause.GARBLED)
            self._continue = meta.continue_token
            self._page_empty = True
            return
        for key in sorted(self._held.keys() - self._seen):
            self._put(key, None)
        self._version = meta.resource_version
        self._begin_list(_List.NOT_OLDER)
        self._watching = True
        self._doubt = False
        self.synced = True

    def take_line(self, line: bytes) -> None:
        """Take over one line of a WATCH; ClusterError if the server tells one, or for what cannot be understood."""
        try:
            event = json.loads(line)
            kind, raw = event["type"], event["object"]
        except (ValueError, RecursionError, TypeError, KeyError) as error:
            raise ClusterError("an undecodable line in the watch", Cause.GARBLED) from error
        if kind == "ERROR":
            self._heard = True
            self._errors += 1
            told = status_error(raw, None, 0.0, f"watch {self.kind.resource}")
            if self._errors % ERRORS_TO_RELIST == 0:
                told.cause = Cause.GARBLED
            raise told
        version = _version(raw)
        if kind not in _EVENTS or not version:
            raise ClusterError("an event of unknown type in the watch", Cause.GARBLED)
        if kind != "BOOKMARK":
            key, value = self._read(raw)
            if key is not None:
                self._put(key, None if kind == "DELETED" else value)
        self._version = version
        self._errors = 0
        self._heard = True
        self._has_bookmarks |= kind == "BOOKMARK"

    def end_watch(self) -> None:
        """Take note that a watch lasted as long as it was asked to.

        A server that sends bookmarks sends one shortly before the end, if its version has gone on (apiserver,
        cacher/cache_watcher.go). If it sent nothing, it may have been restored from a backup, and wait until it comes
        to our version: a LIST of one object finds out.
        """
        self._doubt |= self._has_bookmarks and not self._heard

    def fail(self, cause: Cause) -> None:
        """Take note that the request failed; what was held stays held."""
        self._doubt |= cause in {Cause.UNREACHABLE, Cause.REFUSED} and not self._heard
        if self._watching and cause in _RELIST:
            self._watching = False
            self._begin_list(_List.NEWEST if cause is Cause.AHEAD else _List.NOT_OLDER)
        elif not self._watching:
            newest = self._wish is _List.NEWEST or cause in {Cause.EXPIRED, Cause.AHEAD}
            self._begin_list(_List.NEWEST if newest else self._wish)

    def _begin_list(self, wish: _List) -> None:
        self._wish = wish
        self._continue = ""
        self._page_empty = True
        self._seen = set()

    def _read(self, raw: object) -> tuple[Key | None, Service | EndpointSlice | Node | None]:
        key, value, problems = objects.read(self.kind, raw)
        if problems:
            self.bad_objects += 1
            self.bad_reason = f"{'/'.join(filter(None, key or ()))}: {problems[0]}"
        return key, value

    def _put(self, key: Key, value: Service | EndpointSlice | Node | None) -> None:
        if self._held.get(key) == value:
            return
        if value is None:
            del self._held[key]
        else:
            self._held[key] = value
        self._changes.append(Change(self.kind, key, value))


class LineSplitter:
    """Makes lines of what comes in by pieces; ClusterError for one that is too long."""

    def __init__(self) -> None:
        self._pieces: list[bytes] = []
        self._waiting_bytes = 0

    @property
    def partial(self) -> bool:
        """Whether there is a line that has not ended."""
        return bool(self._waiting_bytes)

    def feed(self, chunk: bytes) -> list[bytes]:
        """Take what came in and answer the lines that are complete, without empty ones."""
        *lines, rest = chunk.split(b"\n")
        if lines:
            lines[0] = b"".join((*self._pieces, lines[0]))
            self._pieces.clear()
            self._waiting_bytes = 0
        if rest:
            self._pieces.append(rest)
            self._waiting_bytes += len(rest)
        if self._waiting_bytes > MAX_LINE_BYTES:
            raise ClusterError(f"a line of more than {MAX_LINE_BYTES} bytes in the watch", Cause.GARBLED)
        return [line for line in lines if line.strip()]


def status_error(status: object, code: int | None, retry_after_seconds: float, doing: str) -> ClusterError:
    """Make the error that a Status object of the API tells; `code` is the answer's own status, if it has one."""
    told = _mapping(status)
    details = _mapping(told.get("details"))
    number = told.get("code") if code is None else code
    message = ascii(str(told.get("message") or told.get("reason") or "no reason given"))[1:-1][:_SHOWN]
    asked = details.get("retryAfterSeconds")
    if not retry_after_seconds and type(asked) is int:
        retry_after_seconds = float(asked)
    cause = _CAUSES.get(number, Cause.REFUSED) if isinstance(number, int) else Cause.REFUSED
    if _is_too_large(message, details):
        cause = Cause.AHEAD
    hint = _HINTS.get(number, "") if isinstance(number, int) else ""
    return ClusterError(f"{doing}: {number} {message}{hint}", cause, retry_after_seconds)


def _is_too_large(message: str, details: dict[str, Any]) -> bool:
    """Whether the server knows no version as new as the asked one (reflector.go, isTooLargeResourceVersionError)."""
    causes = details.get("causes")
    return "Too large resource version" in message or any(
        isinstance(each, dict) and each.get("reason") == "ResourceVersionTooLarge"
        for each in (causes if isinstance(causes, list) else ())
    )


def _is_older(version: str, other: str) -> bool:
    """Compare versions, as far as they are the numbers that they should be (KEP-5504)."""
    return version.isdecimal() and other.isdecimal() and int(version) < int(other)


def _version(raw: object) -> str:
    version = _mapping(_mapping(raw).get("metadata")).get("resourceVersion")
    return version if isinstance(version, str) else ""


def _mapping(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
