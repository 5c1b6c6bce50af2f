"""LIST and WATCH from recorded answers: what is asked next, and what changes."""

from __future__ import annotations

import itertools
import json
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl, urlsplit

import pytest
from hypothesis import given
from hypothesis import strategies as st

from otel_lb_hop.cluster import reflection as module
from otel_lb_hop.cluster.failure import Cause, ClusterError
from otel_lb_hop.cluster.listing import ListDecoder
from otel_lb_hop.cluster.objects import Change, Kind
from otel_lb_hop.cluster.reflection import LineSplitter, Reflection, status_error
from otel_lb_hop.model import Node

if TYPE_CHECKING:
    from otel_lb_hop.model import EndpointSlice, Service

# As kube-apiserver 1.36 writes them.
EXPIRED = {
    "kind": "Status",
    "apiVersion": "v1",
    "metadata": {},
    "status": "Failure",
    "message": "too old resource version: 5 (4100)",
    "reason": "Expired",
    "code": 410,
}
TOO_LARGE = {
    "kind": "Status",
    "apiVersion": "v1",
    "metadata": {},
    "status": "Failure",
    "message": "Timeout: Too large resource version: 999999, current: 4711",
    "reason": "Timeout",
    "details": {
        "causes": [{"reason": "ResourceVersionTooLarge", "message": "Too large resource version"}],
        "retryAfterSeconds": 1,
    },
    "code": 504,
}
FORBIDDEN = {
    "kind": "Status",
    "apiVersion": "v1",
    "metadata": {},
    "status": "Failure",
    "message": 'nodes is forbidden: User "system:serviceaccount:lb:agent" cannot list resource "nodes" in API group "" '
    "at the cluster scope",
    "reason": "Forbidden",
    "details": {"kind": "nodes"},
    "code": 403,
}

NEEDED = "; the ClusterRole of the agent needs get, list and watch of services, endpointslices and nodes"


def raw_node(name: str, version: int, zone: str = "z1") -> dict[str, Any]:
    """Write a node as the API server does."""
    return {
        "kind": "Node",
        "apiVersion": "v1",
        "metadata": {
            "name": name,
            "uid": f"uid-{name}",
            "resourceVersion": str(version),
            "labels": {"topology.kubernetes.io/zone": zone},
            "managedFields": [{"manager": "kubelet", "operation": "Update", "fieldsV1": {"f:status": {}}}],
        },
        "spec": {"podCIDR": "10.244.0.0/24"},
        "status": {"conditions": [{"type": "Ready", "lastHeartbeatTime": str(version)}]},
    }


def node(name: str, zone: str = "z1") -> Node:
    """Give the value of that."""
    return Node(name, zone, uid=f"uid-{name}")


def change(name: str, value: Service | EndpointSlice | Node | None) -> Change:
    """Give the change of one node."""
    return Change(Kind.NODES, ("", name), value)


def event(kind: str, raw: object) -> bytes:
    """Write a line of a watch."""
    return json.dumps({"type": kind, "object": raw}, separators=(",", ":")).encode()


def bookmark(version: int) -> bytes:
    """Write a bookmark as the API server does."""
    return event(
        "BOOKMARK", {"kind": "Node", "apiVersion": "v1", "metadata": {"resourceVersion": str(version)}, "spec": {}}
    )


def page(reflection: Reflection, version: int, *nodes: dict[str, Any], follows: str = "") -> list[Change]:
    """Let a page of a LIST be the answer."""
    metadata = {"resourceVersion": str(version)} | ({"continue": follows, "remainingItemCount": 7} if follows else {})
    document = {"kind": "NodeList", "apiVersion": "v1", "metadata": metadata, "items": nodes}
    decoder = ListDecoder()
    for item in decoder.feed(json.dumps(document).encode()):
        reflection.take_item(item)
    for item in decoder.finish():
        reflection.take_item(item)
    reflection.end_page(decoder.meta())
    return reflection.take_changes()


def lines(reflection: Reflection, *events: bytes) -> list[Change]:
    """Let lines of a watch come in."""
    for line in events:
        reflection.take_line(line)
    return reflection.take_changes()


def asked(reflection: Reflection, fraction: float = 0.0) -> dict[str, str]:
    """Give the query of the next request."""
    request = reflection.request(fraction)
    parts = urlsplit(request.target)
    assert parts.path == "/api/v1/nodes"
    query = dict(parse_qsl(parts.query))
    assert request.watch == ("watch" in query)
    assert request.page == ("continue" in query)
    return query


def watching(version: int = 100, *nodes: dict[str, Any]) -> Reflection:
    """Make a reflection that has listed these."""
    reflection = Reflection(Kind.NODES)
    page(reflection, version, *nodes)
    return reflection


@pytest.mark.parametrize("kind", Kind)
def test_paths(kind: Kind) -> None:
    """Each resource has the API's own path."""
    paths = {
        Kind.SERVICES: "/api/v1/services?limit=500&resourceVersion=0",
        Kind.ENDPOINT_SLICES: "/apis/discovery.k8s.io/v1/endpointslices?limit=500&resourceVersion=0",
        Kind.NODES: "/api/v1/nodes?limit=500&resourceVersion=0",
    }
    assert Reflection(kind).request(0.0).target == paths[kind]


def test_list_then_watch() -> None:
    """Any state first, from the watch cache, and then what comes after it."""
    reflection = Reflection(Kind.NODES)
    assert asked(reflection) == {"limit": "500", "resourceVersion": "0"}
    assert not reflection.synced
    assert page(reflection, 100, raw_node("n1", 90), raw_node("n2", 80)) == [
        change("n1", node("n1")),
        change("n2", node("n2")),
    ]
    assert (reflection.synced, reflection.objects, reflection.relists) == (True, 2, 0)
    watch = {"watch": "1", "resourceVersion": "100", "allowWatchBookmarks": "true"}
    assert asked(reflection, 0.0) == watch | {"timeoutSeconds": "40"}
    assert asked(reflection, 0.999) == watch | {"timeoutSeconds": "50"}


def test_pages() -> None:
    """A list is complete when all its pages are; only then is it known what is gone."""
    reflection = watching(50, raw_node("old", 1))
    reflection.fail(Cause.EXPIRED)
    reflection.fail(Cause.AHEAD)
    assert asked(reflection) == {"limit": "500"}
    assert page(reflection, 100, raw_node("n1", 90), follows="a/b=") == [change("n1", node("n1"))]
    assert asked(reflection) == {"limit": "500", "continue": "a/b="}
    assert page(reflection, 100, raw_node("n2", 80)) == [change("n2", node("n2")), change("old", None)]
    assert asked(reflection)["resourceVersion"] == "100"


def test_not_synced_before_the_last_page() -> None:
    """One page is not the list."""
    reflection = Reflection(Kind.NODES)
    page(reflection, 100, raw_node("n1", 90), follows="a")
    assert not reflection.synced


def test_expired_token() -> None:
    """A list whose next page is not kept any more begins again, with the newest state."""
    reflection = Reflection(Kind.NODES)
    page(reflection, 100, raw_node("n1", 90), follows="a")
    reflection.fail(status_error(EXPIRED, 410, 0.0, "list nodes").cause)
    assert asked(reflection) == {"limit": "500"}
    assert page(reflection, 200, raw_node("n2", 80)) == [change("n2", node("n2")), change("n1", None)]


def test_a_broken_list_begins_again() -> None:
    """From its first page; what came is held, and what is gone is known at the end only."""
    reflection = Reflection(Kind.NODES)
    page(reflection, 100, raw_node("n1", 90), follows="a")
    reflection.fail(Cause.BROKEN)
    assert asked(reflection) == {"limit": "500", "resourceVersion": "0"}
    assert page(reflection, 200, raw_node("n1", 90), raw_node("n2", 80)) == [change("n2", node("n2"))]


@pytest.mark.parametrize("follows", ["a", "b"])
def test_endless_list(follows: str) -> None:
    """Pages that bring nothing new are not asked for without end."""
    reflection = Reflection(Kind.NODES)
    nodes = [raw_node("n2", 1)] if follows == "a" else []
    page(reflection, 100, raw_node("n1", 90), follows="a")
    with pytest.raises(ClusterError, match="without end"):
        page(reflection, 100, *nodes, follows=follows)


def test_watch() -> None:
    """Each event moves the state, and the version from which the watch goes on."""
    reflection = watching(100, raw_node("n1", 90))
    assert lines(reflection, event("ADDED", raw_node("n2", 101))) == [change("n2", node("n2"))]
    assert lines(reflection, event("MODIFIED", raw_node("n1", 102, "z2"))) == [change("n1", node("n1", "z2"))]
    assert lines(reflection, event("DELETED", raw_node("n2", 103))) == [change("n2", None)]
    assert asked(reflection)["resourceVersion"] == "103"
    assert lines(reflection, bookmark(150)) == []
    assert asked(reflection)["resourceVersion"] == "150"
    assert reflection.relists == 0


def test_what_changes_nothing() -> None:
    """A heartbeat, an event twice and the deletion of what is not held give no change."""
    reflection = watching(100, raw_node("n1", 90))
    assert lines(reflection, event("MODIFIED", raw_node("n1", 101)), event("DELETED", raw_node("n9", 102))) == []
    assert asked(reflection)["resourceVersion"] == "102"


def test_an_object_that_is_not_needed_any_more() -> None:
    """A Service that loses its VIP is gone for us, and comes back with it."""
    reflection = Reflection(Kind.SERVICES)
    raw: dict[str, Any] = {
        "metadata": {"name": "web", "namespace": "a", "resourceVersion": "7"},
        "spec": {"externalIPs": ["10.0.0.1"]},
    }
    reflection.take_item(raw)
    (first,) = reflection.take_changes()
    assert first.key == ("a", "web")
    assert first.value is not None
    raw["spec"] = {}
    assert lines(reflection, event("MODIFIED", raw)) == [Change(Kind.SERVICES, ("a", "web"), None)]
    assert reflection.objects == 0


def test_lost_watch_goes_on() -> None:
    """A watch that ends or breaks off, or is refused for now, is asked for again from the last version."""
    reflection = watching()
    for cause in (Cause.BROKEN, Cause.UNREACHABLE, Cause.UNAUTHORIZED, Cause.REFUSED):
        reflection.fail(cause)
        page(reflection, 100)
        assert asked(reflection)["watch"] == "1"
        assert asked(reflection)["resourceVersion"] == "100"


def test_back_with_an_older_state() -> None:
    """A server that was away may have been restored from a backup: a list of one tells how far it is."""
    reflection = watching(100, raw_node("a", 90))
    reflection.fail(Cause.UNREACHABLE)
    for version in (100, 130):
        request = reflection.request(0.0)
        assert (request.target, request.watch, request.check) == ("/api/v1/nodes?limit=1", False, True)
        assert page(reflection, version, raw_node("b", 95), follows="more") == []
        assert asked(reflection)["resourceVersion"] == "100"
        assert asked(reflection)["watch"] == "1"
        reflection.fail(Cause.UNREACHABLE)
    assert asked(reflection) == {"limit": "1"}
    with pytest.raises(ClusterError, match="older state") as caught:
        page(reflection, 99)
    reflection.fail(caught.value.cause)
    assert asked(reflection) == {"limit": "500"}
    assert page(reflection, 99, raw_node("b", 95)) == [change("b", node("b")), change("a", None)]
    assert asked(reflection)["resourceVersion"] == "99"


def test_a_watch_in_which_nothing_was_heard() -> None:
    """Where bookmarks come, a whole watch without a word may mean a server with an older state: one object is asked."""
    reflection = watching()
    asked(reflection)
    reflection.end_watch()
    assert asked(reflection)["watch"] == "1"  # this one may send no bookmarks at all
    lines(reflection, bookmark(101))
    reflection.end_watch()
    assert asked(reflection)["resourceVersion"] == "101"
    reflection.end_watch()
    assert asked(reflection) == {"limit": "1"}
    assert page(reflection, 105, raw_node("b", 3)) == []
    assert asked(reflection)["resourceVersion"] == "101"
    reflection.end_watch()
    assert asked(reflection) == {"limit": "1"}
    with pytest.raises(ClusterError, match="older state") as caught:
        page(reflection, 7, raw_node("a", 5))
    reflection.fail(caught.value.cause)
    assert asked(reflection) == {"limit": "500"}
    assert page(reflection, 7, raw_node("a", 5)) == [change("a", node("a"))]
    assert asked(reflection)["resourceVersion"] == "7"
    lines(reflection, event("MODIFIED", raw_node("a", 8, "z2")))
    reflection.end_watch()
    assert asked(reflection)["resourceVersion"] == "8"


def test_a_version_that_a_watch_never_gets_past() -> None:
    """After ten errors in a row it is listed again: there may be an event that the server cannot tell."""
    reflection = watching()
    error = {"kind": "Status", "code": 500, "message": "no key for it"}
    causes = []
    for _ in range(10):
        asked(reflection)
        with pytest.raises(ClusterError) as caught:
            lines(reflection, event("ERROR", error))
        causes.append(caught.value.cause)
        reflection.fail(caught.value.cause)
    assert causes == [Cause.REFUSED] * 9 + [Cause.GARBLED]
    assert asked(reflection) == {"resourceVersion": "100", "resourceVersionMatch": "NotOlderThan"}


@pytest.mark.parametrize("cause", [Cause.EXPIRED, Cause.GARBLED])
def test_relist(cause: Cause) -> None:
    """After a loss the list may not be older than what was seen: another API server may lag behind."""
    reflection = watching(100, raw_node("n1", 90), raw_node("n2", 90))
    lines(reflection, bookmark(120))
    reflection.fail(cause)
    assert asked(reflection) == {"resourceVersion": "120", "resourceVersionMatch": "NotOlderThan"}
    assert reflection.relists == 1
    assert page(reflection, 130, raw_node("n1", 125, "z2"), raw_node("n3", 126)) == [
        change("n1", node("n1", "z2")),
        change("n3", node("n3")),
        change("n2", None),
    ]
    assert asked(reflection)["resourceVersion"] == "130"


@pytest.mark.parametrize("cause", [Cause.AHEAD, Cause.EXPIRED])
def test_relist_refused(cause: Cause) -> None:
    """If the server knows no such version, the newest state is asked for, until a list is complete."""
    reflection = watching(100)
    reflection.fail(Cause.EXPIRED)
    reflection.fail(cause)
    assert asked(reflection) == {"limit": "500"}
    reflection.fail(Cause.BROKEN)
    assert asked(reflection) == {"limit": "500"}
    page(reflection, 30)
    reflection.fail(Cause.EXPIRED)
    assert asked(reflection) == {"resourceVersion": "30", "resourceVersionMatch": "NotOlderThan"}


def test_a_watch_from_a_version_that_is_too_large() -> None:
    """The newest state is asked for at once."""
    reflection = watching(999_999)
    reflection.fail(status_error(TOO_LARGE, 504, 0.0, "watch nodes").cause)
    assert asked(reflection) == {"limit": "500"}


def test_error_event() -> None:
    """An expired version may be told within the watch; what came before counts."""
    reflection = watching(100)
    lines(reflection, event("ADDED", raw_node("n1", 101)))
    with pytest.raises(ClusterError, match="too old resource version") as caught:
        reflection.take_line(event("ERROR", EXPIRED))
    assert caught.value.cause is Cause.EXPIRED
    reflection.fail(caught.value.cause)
    assert asked(reflection) == {"resourceVersion": "101", "resourceVersionMatch": "NotOlderThan"}


def test_other_error_event() -> None:
    """Any other error ends the watch, and it goes on from where it was."""
    reflection = watching(100)
    with pytest.raises(ClusterError) as caught:
        reflection.take_line(event("ERROR", {"message": "etcd is away", "code": 500, "details": None}))
    assert caught.value.cause is Cause.REFUSED
    reflection.fail(caught.value.cause)
    assert asked(reflection)["watch"] == "1"


@pytest.mark.parametrize(
    "line",
    [
        b"<html>",
        b'{"type":"ADDED","object":{"metadata":',
        b"[]",
        b"5",
        b"null",
        b'{"type":"ADDED"}',
        b'{"object":{}}',
        b'{"type":"ADDED","object":{"metadata":{"name":"n1"}}}',
        b'{"type":"ADDED","object":null}',
        b'{"type":"RENAMED","object":{"metadata":{"name":"n1","resourceVersion":"7"}}}',
        b'{"type":{},"object":{"metadata":{"name":"n1","resourceVersion":"7"}}}',
        b"[" * 100_000,
        b"\xff",
    ],
)
def test_garbage_line(line: bytes) -> None:
    """Something may have been lost: the version stays, and a list is asked for."""
    reflection = watching(100)
    with pytest.raises(ClusterError) as caught:
        reflection.take_line(line)
    assert caught.value.cause is Cause.GARBLED
    reflection.fail(caught.value.cause)
    assert asked(reflection) == {"resourceVersion": "100", "resourceVersionMatch": "NotOlderThan"}


def test_bad_object() -> None:
    """It is counted and told with its name; the others are taken, and its old state is not kept for the new one."""
    reflection = watching(100, raw_node("n1", 90))
    bad = raw_node("n1", 101) | {"status": 5}
    assert lines(reflection, event("MODIFIED", bad), event("ADDED", raw_node("n2", 102))) == [
        change("n1", None),
        change("n2", node("n2")),
    ]
    assert (reflection.bad_objects, reflection.bad_reason) == (1, "n1: status: read 5")
    reflection.take_item({"metadata": {}})
    assert (reflection.bad_objects, reflection.bad_reason) == (2, ": metadata.name: read None")


def test_changes_before_a_failure_are_not_lost() -> None:
    """What was taken over before an answer broke off is given, since it will not be given again."""
    reflection = Reflection(Kind.NODES)
    reflection.take_item(raw_node("n1", 90))
    reflection.fail(Cause.BROKEN)
    assert reflection.take_changes() == [change("n1", node("n1"))]
    assert page(reflection, 100, raw_node("n1", 90)) == []


class Server:
    """An API server with nodes, whose events one reflection gets as far as it asks for them."""

    def __init__(self) -> None:
        self.reflection = Reflection(Kind.NODES)
        self.told: dict[str, object] = {}
        self.nodes: dict[str, Node] = {}
        self._raw: dict[str, dict[str, Any]] = {}
        self._events: list[tuple[int, bytes]] = []
        self._version = 1

    def put(self, name: str, zone: str) -> None:
        """Create or change a node."""
        self._version += 1
        kind = "MODIFIED" if name in self.nodes else "ADDED"
        self._raw[name] = raw_node(name, self._version, zone)
        self.nodes[name] = node(name, zone)
        self._events.append((self._version, event(kind, self._raw[name])))

    def delete(self, name: str) -> None:
        """Delete a node, if it is there."""
        if self.nodes.pop(name, None):
            self._version += 1
            self._events.append((self._version, event("DELETED", self._raw.pop(name) | raw_node(name, self._version))))

    def answer(self, part: float = 1.0) -> None:
        """Answer the next request, or a part of the answer before it breaks off."""
        query = asked(self.reflection)
        if "watch" in query:
            events = [line for version, line in self._events if version > int(query["resourceVersion"])]
            lines_read = lines(self.reflection, *events[: round(len(events) * part)])
            self._hear(lines_read)
        elif part == 1.0:
            self._hear(page(self.reflection, self._version, *self._raw.values()))
        else:
            for raw in list(self._raw.values())[: round(len(self._raw) * part)]:
                self.reflection.take_item(raw)
        if part < 1.0:
            self.reflection.fail(Cause.BROKEN)
            self._hear(self.reflection.take_changes())

    def _hear(self, changes: list[Change]) -> None:
        for _, (_, name), value in changes:
            assert self.told.get(name) != value
            self.told[name] = value


STEPS = st.one_of(
    st.tuples(st.just("put"), st.sampled_from("abcd"), st.sampled_from(["z1", "z2"])),
    st.tuples(st.just("delete"), st.sampled_from("abcd")),
    st.tuples(st.just("answer"), st.sampled_from([0.0, 0.3, 0.7, 1.0])),
    st.tuples(st.just("fail"), st.sampled_from(Cause)),
)


@given(st.lists(STEPS, max_size=40))
def test_the_changes_add_up_to_what_the_server_has(steps: list[tuple[str, Any]]) -> None:
    """Whatever broke off and was refused in between; and no change is told that is none."""
    server = Server()
    for name, *arguments in steps:
        owner = server.reflection if name == "fail" else server
        getattr(owner, name)(*arguments)
    server.answer()
    server.answer()
    assert {name: value for name, value in server.told.items() if value is not None} == server.nodes


@pytest.mark.parametrize(
    ("status", "code", "cause", "retry_after", "text"),
    [
        (EXPIRED, 410, Cause.EXPIRED, 0.0, "list nodes: 410 too old resource version: 5 (4100)"),
        (
            TOO_LARGE,
            504,
            Cause.AHEAD,
            1.0,
            "list nodes: 504 Timeout: Too large resource version: 999999, current: 4711",
        ),
        (
            FORBIDDEN,
            403,
            Cause.REFUSED,
            0.0,
            f"list nodes: 403 {FORBIDDEN['message']}{NEEDED}",
        ),
        (
            {"message": "Unauthorized"},
            401,
            Cause.UNAUTHORIZED,
            0.0,
            "list nodes: 401 Unauthorized; is the token still good, and for this cluster?",
        ),
        ({"reason": "BadRequest"}, 400, Cause.AHEAD, 0.0, "list nodes: 400 BadRequest"),
        (None, 502, Cause.REFUSED, 0.0, "list nodes: 502 no reason given"),
        ([], 502, Cause.REFUSED, 0.0, "list nodes: 502 no reason given"),
        ({"message": "x\n\ud800" + "y" * 500}, 500, Cause.REFUSED, 0.0, "list nodes: 500 x\\n\\ud800" + "y" * 291),
        (
            {"details": {"causes": 5, "retryAfterSeconds": "7"}},
            429,
            Cause.REFUSED,
            0.0,
            "list nodes: 429 no reason given",
        ),
        ({"details": {"retryAfterSeconds": 7}}, 429, Cause.REFUSED, 7.0, "list nodes: 429 no reason given"),
        (EXPIRED, None, Cause.EXPIRED, 0.0, "list nodes: 410 too old resource version: 5 (4100)"),
        ({"code": []}, None, Cause.REFUSED, 0.0, "list nodes: [] no reason given"),
    ],
)
def test_status(status: object, code: int | None, cause: Cause, retry_after: float, text: str) -> None:
    """What the server refuses is told in its words, with what to do."""
    error = status_error(status, code, 0.0, "list nodes")
    assert (error.cause, error.retry_after_seconds, str(error)) == (cause, retry_after, text)


def test_the_header_wins() -> None:
    """Retry-After of the answer is what counts, if there is one."""
    assert status_error(TOO_LARGE, 504, 30.0, "list nodes").retry_after_seconds == 30.0


@given(st.lists(st.binary(min_size=1, max_size=5)), st.lists(st.integers(0, 60), max_size=8))
def test_lines(parts: list[bytes], cuts: list[int]) -> None:
    """However the pieces are cut, the lines are the same."""
    stream = b"".join(part + b"\n" for part in parts)
    borders = [0, *sorted(cuts), len(stream)]
    splitter = LineSplitter()
    found = []
    for begin, end in itertools.pairwise(borders):
        found += splitter.feed(stream[begin:end])
    assert found == [line for line in stream.split(b"\n") if line.strip()]
    assert not splitter.partial


def test_partial_line() -> None:
    """A stream that ends within a line is known to be cut."""
    splitter = LineSplitter()
    assert splitter.feed(b'{"a"') == []
    assert splitter.partial
    assert splitter.feed(b":1}\n") == [b'{"a":1}']
    assert not splitter.partial


def test_a_line_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is given up before it takes all memory."""
    monkeypatch.setattr(module, "MAX_LINE_BYTES", 100)
    splitter = LineSplitter()
    splitter.feed(b"x" * 60)
    with pytest.raises(ClusterError, match="more than 100 bytes"):
        splitter.feed(b"x" * 60)
