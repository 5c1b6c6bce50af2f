"""When the topology hears what the sources say, and what a person hears of the sources."""

from __future__ import annotations

from typing import TYPE_CHECKING

from otel_lb_hop.cluster import feed as feed_module
from otel_lb_hop.cluster.api_source import State
from otel_lb_hop.cluster.feed import Feed, SourceState
from otel_lb_hop.cluster.file_source import FileSource, FileWatcher
from otel_lb_hop.cluster.objects import Change, Kind
from otel_lb_hop.core.inventory import Inventory
from otel_lb_hop.core.topology import Placement, Topology
from otel_lb_hop.model import (
    EndpointSlice,
    Node,
    Policy,
    Service,
    ServicePort,
    SlicePort,
    Transport,
    pack_address,
)
from tests.unit.samples import LOCAL, NODE, REMOTE, SECOND

if TYPE_CHECKING:
    from pathlib import Path

START = 1_700_000_000 * SECOND
TCP = Transport.TCP
MANY = 3 * feed_module.ENDPOINTS_PER_STEP
SYNCED = State(synced=True, contact_ns=START)
NODES = [Change(Kind.NODES, ("", name), Node(name, zone)) for name, zone in ((NODE, "zone-a"), ("node2", "zone-b"))]


def service(name: str = "web", vip: str = "10.0.10.0", **more: tuple[tuple[str, str], ...]) -> Change:
    """Make a Service with one port."""
    value = Service("default", name, Policy.CLUSTER, (pack_address(vip),), (ServicePort("http", 80, TCP),), **more)  # type: ignore[arg-type]
    return Change(Kind.SERVICES, ("default", name), value)


SLICE = Change(
    Kind.ENDPOINT_SLICES,
    ("default", "web-1"),
    EndpointSlice("default", "web-1", "web", (SlicePort("http", TCP, (LOCAL, REMOTE)),)),
)


class FakeApi:
    """Stands in for the API source: its queue and its states are set by the test."""

    def __init__(self, *changes: Change) -> None:
        self.queue = list(changes)
        self.kinds = dict.fromkeys(Kind, State())
        self.uid: str | None = None
        self.closed = False

    def sync(self, *kinds: Kind) -> None:
        """Let the lists of these resources be complete."""
        self.kinds |= dict.fromkeys(kinds, SYNCED)

    def take(self, limit: int) -> list[Change]:
        """Give what is queued."""
        taken, self.queue = self.queue[:limit], self.queue[limit:]
        return taken

    def states(self) -> dict[Kind, State]:
        """Give the states."""
        return dict(self.kinds)

    def cluster_uid(self) -> str | None:
        """Give the uid."""
        return self.uid

    def close(self) -> None:
        """Note it."""
        self.closed = True


class Scene:
    """A feed of a fake API server, and the topology that it brings up."""

    def __init__(self, *changes: Change) -> None:
        self.api = FakeApi(*changes)
        self.topology = Topology(NODE, START)
        self.feed = Feed(None, self.api, Inventory(frozenset(Policy), external_ips=True))  # type: ignore[arg-type]

    def update(self, seconds: float = 0) -> bool:
        """Let the feed take one step, so long after the start."""
        return self.feed.update(self.topology, START + int(seconds * SECOND))


def test_nothing_is_told_before_all_lists() -> None:
    """Services without their endpoints would be told as having none: the first word waits for all three lists."""
    scene = Scene(service(), SLICE, *NODES)
    for kinds in ((), (Kind.SERVICES,), (Kind.ENDPOINT_SLICES,)):
        scene.api.sync(*kinds)
        assert not scene.update(1)
        assert (scene.feed.begun, scene.topology.watched) == (False, 0)
    scene.api.sync(Kind.NODES)
    assert not scene.update(1)
    assert (scene.feed.begun, scene.topology.watched) == (True, 1)
    assert list(scene.topology.placements.values()) == [Placement(1, 0, 1)]
    assert scene.topology.zone == "zone-a"


def test_endless_wait_for_endpoints_is_not_endured() -> None:
    """Without a right to read endpoints, connections are still counted by VIP, and no reason is made up."""
    scene = Scene(service(), *NODES)
    scene.api.sync(Kind.SERVICES, Kind.NODES)
    scene.update(1)
    scene.update(6)
    assert not scene.feed.begun
    scene.update(6.1)
    assert (scene.feed.begun, scene.topology.watched) == (True, 1)
    (value,) = scene.topology.tables.vip_ports.values()
    assert value[4] == 0  # dropped: not that there are no endpoints
    scene.api.queue.append(SLICE)
    scene.api.sync(Kind.ENDPOINT_SLICES)
    scene.update(7)
    assert list(scene.topology.placements.values()) == [Placement(1, 0, 1)]


def test_a_service_without_slices_has_no_endpoints_once_all_were_read() -> None:
    """That is a reason, and it is told."""
    scene = Scene(service(), *NODES)
    scene.api.sync(*Kind)
    scene.update()
    (value,) = scene.topology.tables.vip_ports.values()
    assert value[4] == 1  # no endpoints


def test_changes_come_in_steps() -> None:
    """Many changes take many short steps, each of which says that there is more; endpoints count as Services do."""
    services = [service(f"s{number}", f"10.0.{number // 250}.{number % 250}") for number in range(1_000)]
    slices = [
        Change(
            Kind.ENDPOINT_SLICES,
            ("default", f"s{number}-1"),
            EndpointSlice("default", f"s{number}-1", f"s{number}", (SlicePort("http", TCP, (LOCAL, REMOTE)),)),
        )
        for number in range(900)
    ]
    scene = Scene(*services, *slices, *NODES)
    scene.api.sync(*Kind)
    steps = 1
    while scene.update():
        steps += 1
    assert scene.topology.watched == 1_000
    assert steps == -(-(1_000 + 2 * 900) // feed_module.ENDPOINTS_PER_STEP)


def test_complete_once_the_last_step_is_taken() -> None:
    """Before that, a VIP port that no source has named yet may still be named."""
    scene = Scene(*[service(f"s{number}", f"10.0.{number // 250}.{number % 250}") for number in range(MANY)], *NODES)
    scene.api.sync(*Kind)
    told = []
    while scene.update():
        told.append((scene.feed.begun, scene.feed.complete))
    assert set(told) == {(False, False)}
    assert len(told) > 1
    assert (scene.feed.begun, scene.feed.complete, scene.topology.watched) == (True, True, MANY)
    scene.api.queue = [service(f"t{number}", f"10.1.{number // 250}.{number % 250}") for number in range(MANY)]
    assert scene.update()
    assert scene.feed.complete  # once for all: later news is no first word


def test_a_long_queue_is_drained_before_the_first_word() -> None:
    """What a list has queued is taken in full before anything of it is told."""
    slices = [SLICE._replace(key=("default", f"web-{number}")) for number in range(feed_module.CHANGES_PER_STEP)]
    scene = Scene(service(), *slices[:-1], *NODES)
    scene.api.sync(*Kind)
    assert scene.update()
    assert not scene.feed.begun
    assert not scene.update()
    assert scene.feed.begun


def test_deletion_and_news() -> None:
    """Later changes go through at once."""
    scene = Scene(service(), SLICE, *NODES)
    scene.api.sync(*Kind)
    scene.update()
    scene.api.queue = [Change(Kind.NODES, ("", NODE), Node(NODE, "zone-b")), SLICE._replace(value=None)]
    scene.update()
    assert scene.topology.zone == "zone-b"
    assert list(scene.topology.placements.values()) == [Placement(0, 0, 0)]
    scene.api.queue = [Change(Kind.SERVICES, ("default", "web"), None)]
    scene.update()
    assert scene.topology.watched == 0


def test_age_is_that_of_the_oldest_list() -> None:
    """The topology is as current as the resource that was heard of longest ago; unheard ones leave it at the start."""
    scene = Scene()
    scene.api.kinds |= dict.fromkeys((Kind.SERVICES, Kind.NODES), State(synced=True, contact_ns=START + 9 * SECOND))
    scene.update(10)
    assert scene.topology.age_ns(START + 10 * SECOND) == 10 * SECOND
    scene.api.kinds[Kind.ENDPOINT_SLICES] = State(synced=True, contact_ns=START + 7 * SECOND)
    scene.update(10)
    assert scene.topology.age_ns(START + 10 * SECOND) == 3 * SECOND


def test_states() -> None:
    """Each resource's error and staleness is told, and that one was not read yet."""
    scene = Scene(*NODES)
    scene.api.sync(*Kind)
    scene.update()
    assert scene.feed.states(scene.topology, START + 2 * SECOND)["kubernetes"].error is None
    scene.api.kinds[Kind.SERVICES] = State(synced=True, error="403: list services is forbidden", contact_ns=START)
    scene.api.kinds[Kind.NODES] = State()
    state = scene.feed.states(scene.topology, START + 2 * SECOND)["kubernetes"]
    assert state.error == "services: 403: list services is forbidden; nodes: not read yet"
    assert state.detail["services"]["stale_seconds"] == 2.0
    assert state.detail["nodes"]["stale_seconds"] is None


def test_a_wrong_node_name_is_told() -> None:
    """With a name that no Node has, every backend would be elsewhere: that is told, not passed over."""
    scene = Scene(NODES[1])
    scene.api.sync(Kind.SERVICES, Kind.ENDPOINT_SLICES)
    scene.update()
    assert "no node is called" not in str(scene.feed.states(scene.topology, START)["kubernetes"].error)
    scene.api.sync(Kind.NODES)
    error = scene.feed.states(scene.topology, START)["kubernetes"].error
    assert error is not None
    assert error.startswith("no node is called node1")
    assert "OTEL_LB_HOP_NODE_NAME" in error


def test_new_services_while_slices_fail() -> None:
    """While no slices come in, a new Service is not told to have no endpoints; once they do, it is."""
    scene = Scene(*NODES)
    scene.api.sync(*Kind)
    scene.update()
    scene.api.kinds[Kind.ENDPOINT_SLICES] = State(synced=True, error="403", contact_ns=START)
    scene.api.queue = [service()]
    scene.update()
    (value,) = scene.topology.tables.vip_ports.values()
    assert value[4] == 0  # dropped
    assert scene.topology.placements == {}
    scene.api.sync(Kind.ENDPOINT_SLICES)
    scene.update()
    (value,) = scene.topology.tables.vip_ports.values()
    assert value[4] == 1  # no endpoints
    assert list(scene.topology.placements.values()) == [Placement(0, 0, 0)]


def test_skipped_and_uid() -> None:
    """What is skipped is told with its reason, the cluster's uid as soon as it is known."""
    scene = Scene(service(skipped=(("lb.example.org", "a host name, not an address"),)))
    scene.api.sync(*Kind)
    scene.update()
    assert [str(each) for each in scene.feed.skipped] == ["default/web lb.example.org: a host name, not an address"]
    assert scene.feed.cluster_uid is None
    scene.api.uid = "c-1"
    assert scene.feed.cluster_uid == "c-1"


def test_file_and_api_server(tmp_path: Path) -> None:
    """The file serves until the API server has told its own, which wins on the same VIP port; the other stays."""
    path = tmp_path / "vips.yaml"
    path.write_text(
        "services:\n"
        "- {name: file/web, vips: [10.0.10.0], ports: [{port: 80}]}\n"
        "- {name: file/other, vips: [10.0.10.1], ports: [{port: 80}]}\n"
    )
    watcher = FileWatcher(FileSource(path), lambda: None)
    watcher.read()
    scene = Scene(service(), SLICE, *NODES)
    feed = Feed(watcher, scene.api, Inventory(frozenset(Policy), external_ips=True))  # type: ignore[arg-type]
    feed.update(scene.topology, START)
    assert (feed.begun, feed.complete, scene.topology.watched) == (True, False, 2)
    assert feed.states(scene.topology, START)["vips_file"] == SourceState(None, None)
    scene.api.sync(*Kind)
    feed.update(scene.topology, START)
    assert (feed.complete, scene.topology.watched) == (True, 2)
    assert [(each.namespace, each.reason) for each in scene.topology.skipped] == [
        ("file", "default/web has this VIP port")
    ]
    feed.close()
    assert scene.api.closed


def test_a_file_alone_is_complete_once_it_was_read(tmp_path: Path) -> None:
    """A file that names nothing has said so."""
    path = tmp_path / "vips.yaml"
    path.write_text("services: []\n")
    watcher = FileWatcher(FileSource(path), lambda: None)
    feed = Feed(watcher, None, Inventory(frozenset(Policy), external_ips=True))
    topology = Topology(NODE, START)
    feed.update(topology, START)
    assert (feed.begun, feed.complete) == (False, False)
    watcher.read()
    feed.update(topology, START)
    assert (feed.begun, feed.complete) == (True, True)
    feed.close()
