"""The source against a small API server on loopback: real sockets and threads, short times."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Self

import pytest

from otel_lb_hop.cluster import objects
from otel_lb_hop.cluster.api_source import ApiSource, State
from otel_lb_hop.cluster.connect import connector
from otel_lb_hop.cluster.objects import Change, Kind
from otel_lb_hop.cluster.pace import Timing
from otel_lb_hop.config import ApiConfig
from otel_lb_hop.model import EndpointSlice, Node, Service
from tests.unit.fake_api import NODES, SERVICES, SLICES, SYSTEM, FakeApi, Handler, write_kubeconfig

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

NEVER = 1000.0
QUICK = Timing(
    start_spread=0.0,
    first_back_off=0.05,
    lasting=NEVER,
    release_spread=0.01,
    patience=NEVER,
    scout_interval=0.5,
    scout_spread=0.0,
)
SLOW_BACK_OFF = QUICK._replace(first_back_off=60.0, longest_rewatch=60.0, patience=1.0)
"""So that nothing goes on within a test unless it is let go."""


class Consumer:
    """What the agent does with a source: it takes changes when it is woken."""

    def __init__(self, api: FakeApi, path: Path, timing: Timing = QUICK, **user: str) -> None:
        self.woken = threading.Event()
        self.wakes = 0
        self.told: dict[tuple[Kind, str], Service | EndpointSlice | Node] = {}
        self.changes: list[Change] = []
        config = write_kubeconfig(path / "kubeconfig", api.url, **user)
        self.source = ApiSource(connector(ApiConfig(config)), "n1", self._wake, timing)

    def _wake(self) -> None:
        self.wakes += 1
        self.woken.set()

    def __enter__(self) -> Self:
        """Start it."""
        self.source.start()
        return self

    def __exit__(self, *_: object) -> None:
        """End it."""
        self.source.close()

    def update(self) -> None:
        """Take everything."""
        for change in self.source.take(10_000):
            self.changes.append(change)
            if change.value is None:
                del self.told[change.kind, change.key[1]]
            else:
                self.told[change.kind, change.key[1]] = change.value

    def until(self, condition: Callable[[], object], seconds: float = 5.0) -> float:
        """Take changes until a condition holds; gives the seconds that it took."""
        began = time.monotonic()
        while not condition():
            assert time.monotonic() - began < seconds, self.source.states()
            time.sleep(0.005)
            self.update()
        return time.monotonic() - began

    def synced(self) -> bool:
        """Tell whether all lists are there."""
        return all(state.synced for state in self.source.states().values())

    def well(self) -> bool:
        """Tell whether all is synced and nothing fails."""
        return self.synced() and not any(self.errors())

    def state(self, kind: Kind) -> State:
        """Give one resource's state."""
        return self.source.states()[kind]

    def errors(self) -> list[str | None]:
        """Give what fails."""
        return [state.error for state in self.source.states().values()]

    def nodes(self) -> set[str]:
        """Name the nodes that are known."""
        return {name for kind, name in self.told if kind is Kind.NODES}


@pytest.fixture
def api() -> Iterator[FakeApi]:
    """Run a server with one object of each kind."""
    with FakeApi() as server:
        server.put(NODES, "n1")
        server.put(SERVICES, "web", spec={"externalIPs": ["10.0.0.1"], "ports": [{"port": 80}]})
        server.put(SERVICES, "internal", spec={"ports": [{"port": 80}]})
        server.put(SLICES, "web-x", addressType="IPv4", endpoints=[], ports=[])
        server.objects[SLICES]["web-x"]["metadata"]["labels"] = {"kubernetes.io/service-name": "web"}
        yield server


def refuse(status: int, **headers: str) -> Callable[[Handler], None]:
    """Make a mood that refuses."""
    return lambda handler: handler.refuse(status, "not now", **headers)


def cut(handler: Handler) -> None:
    """Be a mood that breaks off in the middle of an answer."""
    handler.begin()
    handler.chunk(b'{"kind":')
    handler.connection.shutdown(2)


def hang(handler: Handler) -> None:
    """Be a mood that never answers."""
    with handler.api.changed:
        handler.api.changed.wait_for(lambda: not handler.api.serves(handler.server), 10.0)


def begin_and_hang(handler: Handler) -> None:
    """Be a mood that says no more after the first word."""
    handler.begin()
    hang(handler)


def test_first_sync(api: FakeApi, tmp_path: Path) -> None:
    """Everything that is needed, and nothing else, is there within a moment; then the watches stand."""
    with Consumer(api, tmp_path, token="secret") as consumer:  # noqa: S106
        consumer.until(consumer.synced)
        consumer.update()
        assert {(kind, name): type(value) for (kind, name), value in consumer.told.items()} == {
            (Kind.NODES, "n1"): Node,
            (Kind.SERVICES, "web"): Service,
            (Kind.ENDPOINT_SLICES, "web-x"): EndpointSlice,
        }
        consumer.until(lambda: all(api.count(path) == 2 for path in (NODES, SERVICES, SLICES)))
        states = consumer.source.states()
        assert list(states) == [Kind.SERVICES, Kind.ENDPOINT_SLICES, Kind.NODES]
        assert states[Kind.SERVICES]._replace(contact_ns=None) == State(synced=True, objects=1, requests=2)
        assert all(abs(time.time_ns() - (state.contact_ns or 0)) < 5e9 for state in states.values())
        consumer.until(lambda: consumer.source.cluster_uid() == "uid-of-kube-system")
        assert consumer.wakes >= 1
    headers = api.asked[0].headers
    assert headers["authorization"] == "Bearer secret"
    assert headers["user-agent"].startswith("otel-lb-hop/")
    assert headers["accept"] == "application/json"
    assert headers.get("accept-encoding", "identity") == "identity"
    assert {each.path for each in api.asked} == {NODES, SERVICES, SLICES, SYSTEM}


def test_changes_follow(api: FakeApi, tmp_path: Path) -> None:
    """Each change comes at once and in order, and wakes; what changes nothing needed does not."""
    with Consumer(api, tmp_path) as consumer:
        consumer.until(consumer.synced)
        consumer.until(lambda: api.count(NODES, watch=True))
        consumer.changes.clear()
        consumer.woken.clear()
        api.put(NODES, "n1", status={"conditions": [{"lastHeartbeatTime": "now"}]})
        api.put(NODES, "n2")
        assert consumer.woken.wait(1.0)
        consumer.until(lambda: "n2" in consumer.nodes())
        api.delete(NODES, "n2")
        consumer.until(lambda: consumer.nodes() == {"n1"})
        assert consumer.changes == [
            Change(Kind.NODES, ("", "n2"), Node("n2")),
            Change(Kind.NODES, ("", "n2"), None),
        ]


def test_take_is_bounded(api: FakeApi, tmp_path: Path) -> None:
    """At most so many at once, the oldest first; of what is called synced, all is there."""
    for number in range(100):
        api.put(NODES, f"m{number:03}")
    with Consumer(api, tmp_path) as consumer:
        while not consumer.state(Kind.NODES).synced:
            time.sleep(0.005)
        taken = []
        while part := consumer.source.take(7):
            assert len(part) <= 7
            taken += [change.key[1] for change in part if change.kind is Kind.NODES]
        assert taken == ["n1", *(f"m{number:03}" for number in range(100))]


def test_deleted_while_away(api: FakeApi, tmp_path: Path) -> None:
    """What went while the watch was refused as expired is found by the difference of the lists."""
    with Consumer(api, tmp_path) as consumer:
        consumer.until(consumer.synced)
        api.stop()
        api.put(NODES, "n2")
        api.delete(NODES, "n1")
        api.events.clear()
        api.moods[f"{NODES}?watch"] = refuse(410)
        api.start()
        consumer.until(lambda: consumer.nodes() == {"n2"})
        api.moods.clear()
        consumer.until(consumer.well)
        assert consumer.state(Kind.NODES).relists >= 1
        asked = [each.query for each in api.asked if each.path == NODES and "watch" not in each.query]
        lists = [query for query in asked if query != {"limit": "1"}]  # whether its state is older is asked as well
        assert lists[0] == {"limit": "500", "resourceVersion": "0"}
        assert lists[1]["resourceVersionMatch"] == "NotOlderThan"
        assert consumer.state(Kind.SERVICES).relists == 0


def test_cut_watch(api: FakeApi, tmp_path: Path) -> None:
    """A watch that breaks off goes on from where it was, without a list, and is not rushed."""
    with Consumer(api, tmp_path) as consumer:
        consumer.until(consumer.synced)
        consumer.until(lambda: api.count(NODES, watch=True))
        api.put(NODES, "n2")
        consumer.until(lambda: "n2" in consumer.nodes())
        api.moods[f"{NODES}?watch"] = cut
        api.stop()
        api.start()
        consumer.until(lambda: api.count(NODES, watch=True) >= 4)
        consumer.until(lambda: "stopped" in str(consumer.state(Kind.NODES).error))
        api.put(NODES, "n3")
        api.moods.clear()
        consumer.until(lambda: "n3" in consumer.nodes())
        consumer.until(consumer.well)
        assert consumer.state(Kind.NODES).relists == 0
        assert consumer.state(Kind.NODES).requests <= 9


def test_watches_that_tell_nothing(api: FakeApi, tmp_path: Path) -> None:
    """That the server begins watches does not show that what is known is what it has."""
    looked = threading.Event()

    def cut_later(handler: Handler) -> None:
        looked.wait(10.0)  # while a watch is open, the time of contact is that of its beginning
        cut(handler)

    api.moods[f"{NODES}?watch"] = cut_later
    with Consumer(api, tmp_path) as consumer:
        consumer.until(consumer.synced)
        listed_ns = consumer.state(Kind.NODES).contact_ns
        looked.set()
        consumer.until(lambda: api.count(NODES, watch=True) >= 3)
        consumer.until(lambda: consumer.state(Kind.NODES).contact_ns == listed_ns)
        api.moods.clear()
        consumer.until(lambda: api.count(NODES, watch=True) >= 4 and consumer.well())
        assert (consumer.state(Kind.NODES).contact_ns or 0) > (listed_ns or 0)


def test_garbage(api: FakeApi, tmp_path: Path) -> None:
    """After a line that cannot be read the list is read again."""
    api.moods[f"{NODES}?watch"] = lambda handler: handler.answer(b"<html>\n")
    with Consumer(api, tmp_path) as consumer:
        consumer.until(lambda: "undecodable" in str(consumer.state(Kind.NODES).error))
        consumer.until(lambda: consumer.state(Kind.NODES).relists)
        api.moods.clear()
        consumer.until(consumer.well)


def test_a_list_that_is_none_ends_nothing(api: FakeApi, tmp_path: Path) -> None:
    """An answer that is no list leaves what is known as it is."""
    with Consumer(api, tmp_path) as consumer:
        consumer.until(consumer.synced)
        api.moods[f"{NODES}?watch"] = refuse(410)
        api.moods[NODES] = lambda handler: handler.answer({"metadata": {"resourceVersion": "5"}})
        api.stop()
        api.start()
        consumer.until(lambda: "promises" in str(consumer.state(Kind.NODES).error))
        assert consumer.nodes() == {"n1"}


def test_half_open(api: FakeApi, tmp_path: Path) -> None:
    """A watch that falls silent is given up after its time and asked for again."""
    with Consumer(api, tmp_path, QUICK._replace(watch_read=0.3)) as consumer:
        consumer.until(consumer.synced)
        consumer.until(lambda: "nothing more came" in str(consumer.state(Kind.NODES).error))
        consumer.until(lambda: api.count(NODES, watch=True) >= 2)
        assert api.count(NODES, watch=False) == 1


def test_hang(api: FakeApi, tmp_path: Path) -> None:
    """A server that accepts and says nothing is given up after its time."""
    api.moods["/"] = hang
    with Consumer(api, tmp_path, QUICK._replace(list_read=0.2)) as consumer:
        consumer.until(lambda: "does not answer in 0.2 s" in str(consumer.state(Kind.NODES).error))
        api.moods.clear()
        consumer.until(consumer.well)


def test_a_list_that_drips(api: FakeApi, tmp_path: Path) -> None:
    """A list is bounded in time as a whole too."""

    def drip(handler: Handler) -> None:
        handler.begin()
        while handler.api.serves(handler.server):
            handler.chunk(b" ")
            time.sleep(0.02)

    api.moods[f"{NODES}?limit"] = drip
    with Consumer(api, tmp_path, QUICK._replace(list_total=0.2)) as consumer:
        consumer.until(lambda: consumer.state(Kind.NODES).error == "the list is not here after 0.2 s")


def test_new_token(api: FakeApi, tmp_path: Path) -> None:
    """After a 401 the token's file is read again before the next try."""
    token = tmp_path / "token"
    token.write_text("old")
    api.tokens = {"Bearer new"}
    with Consumer(api, tmp_path, tokenFile=str(token)) as consumer:
        consumer.until(lambda: all("401" in str(error) for error in consumer.errors()))
        token.write_text("new")
        consumer.until(consumer.well)


def test_released_by_the_scout(api: FakeApi, tmp_path: Path) -> None:
    """A server absent from boot: once it is there all is known within moments, however long the waits were to be."""
    api.stop()
    with Consumer(api, tmp_path, SLOW_BACK_OFF) as consumer:
        consumer.until(lambda: all("refused" in str(error) for error in consumer.errors()))
        time.sleep(0.2)
        assert [state.requests for state in consumer.source.states().values()] == [1, 1, 1]
        api.start()
        assert consumer.until(consumer.well) < 2.0
        assert api.count(f"{NODES}/n1") == 1


def test_released_after_refusals(api: FakeApi, tmp_path: Path) -> None:
    """The same when the server was there and refused all: the scout has to see it fail first."""
    api.moods["/"] = refuse(503)
    with Consumer(api, tmp_path, SLOW_BACK_OFF) as consumer:
        consumer.until(lambda: api.count(f"{NODES}/n1") >= 2)
        api.moods.clear()
        assert consumer.until(consumer.well) < 2.0


def test_unanswered_until_it_was_back(api: FakeApi, tmp_path: Path) -> None:
    """What the server took while it hung will never be answered: once the scout is, all is asked again."""
    api.moods["/"] = refuse(503)
    with Consumer(api, tmp_path, QUICK._replace(list_read=NEVER, scout_read=0.2, scout_interval=1.3)) as consumer:
        consumer.until(lambda: all(consumer.errors()))
        api.moods["/"] = hang
        hung = [api.count(path) for path in (SERVICES, SLICES, NODES)]
        consumer.until(
            lambda: all(api.count(path) > before for path, before in zip((SERVICES, SLICES, NODES), hung, strict=True))
        )
        consumer.until(lambda: api.count(f"{NODES}/n1") >= 2)
        api.moods.clear()
        assert consumer.until(consumer.well) < 5.0


def test_scout_counts_among_the_nodes(api: FakeApi, tmp_path: Path) -> None:
    """All requests for nodes are bounded together: while the scout asks much, the others wait."""
    api.moods["/"] = refuse(503)
    with Consumer(api, tmp_path, QUICK._replace(longest_back_off=0.05, scout_interval=0.1)) as consumer:
        consumer.until(lambda: api.count(SERVICES) >= 7, 10)
        assert api.count(f"{NODES}/n1") >= 7
        assert api.count(NODES) <= 5


def test_one_resource_alone(api: FakeApi, tmp_path: Path) -> None:
    """A right that is missing is no outage: the scout asks once for each wait, and lets nobody go."""
    api.moods[SERVICES] = refuse(403)
    with Consumer(api, tmp_path, SLOW_BACK_OFF) as consumer:
        consumer.until(lambda: api.count(f"{NODES}/n1") == 1)
        consumer.until(lambda: consumer.state(Kind.NODES).synced and consumer.state(Kind.ENDPOINT_SLICES).synced)
        time.sleep(0.3)
        assert (api.count(f"{NODES}/n1"), api.count(SERVICES)) == (1, 1)
        assert not consumer.state(Kind.SERVICES).synced
        assert consumer.state(Kind.SERVICES).contact_ns is None
        assert consumer.state(Kind.SERVICES).error == (
            "list services: 403 not now; the ClusterRole of the agent needs get, list and watch of services, "
            "endpointslices and nodes"
        )
        assert consumer.errors()[1:] == [None, None]


def test_no_such_node(api: FakeApi, tmp_path: Path) -> None:
    """To the scout, a server that knows no such node is back."""
    api.delete(NODES, "n1")
    api.stop()
    with Consumer(api, tmp_path, SLOW_BACK_OFF) as consumer:
        consumer.until(lambda: all(consumer.errors()))
        api.start()
        consumer.until(consumer.well)


def test_retry_after(api: FakeApi, tmp_path: Path) -> None:
    """What the server asks for is kept, also by the scout."""
    api.moods["/"] = refuse(429, Retry_After="60")
    with Consumer(api, tmp_path, QUICK._replace(patience=1.0)) as consumer:
        consumer.until(lambda: api.count(f"{NODES}/n1") == 1)
        api.moods.clear()
        time.sleep(0.5)
        assert {path: api.count(path) for path in (SERVICES, SLICES, NODES, f"{NODES}/n1")} == dict.fromkeys(
            (SERVICES, SLICES, NODES, f"{NODES}/n1"), 1
        )


def test_one_success_releases_the_others(api: FakeApi, tmp_path: Path) -> None:
    """Whoever first finds the server back lets the others know, also before the scout does."""
    api.stop()
    with Consumer(api, tmp_path, SLOW_BACK_OFF._replace(scout_interval=NEVER)) as consumer:
        consumer.until(lambda: all(consumer.errors()))
        api.start()
        shared = consumer.source._shared
        with shared.changed:
            shared.reflectors[0].pace.release(time.monotonic(), 0.0)
            shared.changed.notify_all()
        consumer.until(consumer.well)


def test_a_resource_that_breaks_its_own_connection_is_let_go_once(api: FakeApi, tmp_path: Path) -> None:
    """The scout sees a server that is well all along: after one more try that resource's wait stands."""
    api.moods[SERVICES] = lambda handler: handler.connection.shutdown(2)
    with Consumer(api, tmp_path, SLOW_BACK_OFF._replace(scout_interval=0.1)) as consumer:
        consumer.until(lambda: api.count(SERVICES) == 2)
        consumer.until(lambda: api.count(f"{NODES}/n1") >= 2)
        time.sleep(0.5)
        assert api.count(SERVICES) == 2


@pytest.mark.parametrize("status", [403, 404])
def test_no_right_to_see_the_cluster_uid(api: FakeApi, tmp_path: Path, status: int) -> None:
    """Then there is none, for ever, and nothing is said of it."""
    api.moods[SYSTEM] = refuse(status)
    with Consumer(api, tmp_path, QUICK._replace(watch_read=0.1)) as consumer:
        consumer.until(lambda: api.count(NODES, watch=True) >= 2)
        assert api.count(SYSTEM) == 1
        assert consumer.source.cluster_uid() is None


def test_the_cluster_uid_is_tried_again(api: FakeApi, tmp_path: Path) -> None:
    """A failure of another kind says nothing about it; but only now and then."""
    api.moods[SYSTEM] = refuse(500)
    with Consumer(api, tmp_path, QUICK._replace(watch_read=0.1, longest_back_off=0.5)) as consumer:
        consumer.until(lambda: api.count(NODES, watch=True) >= 3)
        assert api.count(SYSTEM) == 1
        consumer.until(lambda: api.count(SYSTEM) >= 2)
        api.moods.clear()
        consumer.until(lambda: consumer.source.cluster_uid() == "uid-of-kube-system")


def test_bad_object(api: FakeApi, tmp_path: Path) -> None:
    """One that cannot be read is counted and named; the others are there."""
    api.put(NODES, "n2", status=5)
    with Consumer(api, tmp_path) as consumer:
        consumer.until(consumer.well)
        state = consumer.state(Kind.NODES)
        assert (state.objects, state.bad_objects, state.bad_reason) == (1, 1, "n2: status: read 5")


def threads() -> set[threading.Thread]:
    """Give the threads of sources that are still alive."""
    return {thread for thread in threading.enumerate() if thread.name.startswith("api-")}


@pytest.mark.parametrize("mood", ["well", "away", "refused", "list hangs"])
def test_close(api: FakeApi, tmp_path: Path, mood: str) -> None:
    """Whatever the threads wait for, they end soon; once closed is closed."""
    before = threads()
    if mood == "away":
        api.stop()
    elif mood == "refused":
        api.moods["/"] = refuse(500)
    elif mood == "list hangs":
        api.moods[NODES] = begin_and_hang
    consumer = Consumer(api, tmp_path, SLOW_BACK_OFF)
    with consumer:
        if mood == "well":
            consumer.until(consumer.well)
        elif mood == "list hangs":
            consumer.until(lambda: api.count(NODES))
            time.sleep(0.1)
        else:
            consumer.until(lambda: all(consumer.errors()))
        began = time.monotonic()
        consumer.source.close()
        assert time.monotonic() - began < 1.0
        consumer.until(lambda: threads() <= before)
    consumer.source.close()


def test_an_error_of_our_own_is_told(
    api: FakeApi, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A thread that stumbles goes on after a wait, and says so."""
    with Consumer(api, tmp_path) as consumer:
        consumer.until(lambda: api.count(NODES, watch=True))
        with monkeypatch.context() as patch:
            patch.setattr(objects, "read", lambda *_: 1 / 0)
            api.put(NODES, "n2")
            consumer.until(lambda: "ZeroDivisionError" in str(consumer.state(Kind.NODES).error))
        assert "error in the agent itself" in caplog.text
        consumer.until(consumer.well)
        assert consumer.nodes() == {"n1", "n2"}
