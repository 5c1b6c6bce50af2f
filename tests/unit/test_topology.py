"""What a cluster state becomes in the kernel's tables, and how long an id means the same."""

from __future__ import annotations

import dataclasses
import itertools
import sys
from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from otel_lb_hop.core.layout import BACKEND_KEY, VIP_KEY, VIP_VALUE, Unforwarded
from otel_lb_hop.core.topology import (
    KEEP_RETIRED_NS,
    LINGER_NS,
    Gone,
    HopGone,
    HopRow,
    Name,
    Pending,
    Placement,
    ServiceId,
    Source,
    Topology,
    VipRow,
)
from otel_lb_hop.model import Backend, Cluster, Hop, Node, Policy, Skipped, Transport, format_address, pack_address
from tests.unit.samples import CLUSTERS, LOCAL, NODE, REMOTE, SECOND, backend, cluster, vip_port

START = 1_700_000_000 * SECOND
AWAY = backend("10.100.3.2", "node3")
HOMELESS = backend("10.100.4.2", None)
NOTHING_GONE = Gone((), ())


def serving(address: str, node: str = NODE) -> Backend:
    """Make a backend that terminates and still serves."""
    return backend(address, node, ready=False, serving=True)


class Told(NamedTuple):
    """A frozen copy of the tables, with the ids of the rows that they lead to."""

    vip_ports: dict[bytes, bytes]
    backends: dict[bytes, bytes]
    vip_ids: frozenset[int]
    hop_ids: frozenset[int]


def told(topology: Topology) -> Told:
    """Copy what the kernel has to hold now."""
    tables = topology.tables
    vip_ids = {VIP_VALUE.unpack(value)[0] for value in tables.vip_ports.values()}
    hop_ids = vip_ids | {int.from_bytes(value, sys.byteorder) for value in tables.backends.values()}
    return Told(dict(tables.vip_ports), dict(tables.backends), frozenset(vip_ids), frozenset(hop_ids))


def replace(topology: Topology, state: Cluster, now_ns: int) -> Told:
    """Give the topology the content of a VIP file, and answer the tables."""
    topology.replace(state, now_ns)
    return told(topology)


class _Vip(NamedTuple):
    address: str
    port: int
    transport: int
    vip_id: int
    unforwarded: Unforwarded


def decode_vips(tables: Told) -> list[_Vip]:
    """Read the VIP table back from its bytes."""
    decoded = []
    for key, value in tables.vip_ports.items():
        address, port, transport = VIP_KEY.unpack(key)
        vip_id, reason = VIP_VALUE.unpack(value)
        text = format_address(address)
        decoded.append(_Vip(text, int.from_bytes(port, "big"), transport, vip_id, Unforwarded(reason)))
    return decoded


def decode_backends(tables: Told) -> dict[tuple[int, str, int], int]:
    """Read the backend table back from its bytes: (VIP id, address, port) → hop id."""
    decoded = {}
    for key, value in tables.backends.items():
        vip_id, address, port = BACKEND_KEY.unpack(key)
        decoded[vip_id, format_address(address), int.from_bytes(port, "big")] = int.from_bytes(value, sys.byteorder)
    return decoded


def hops_of(topology: Topology, tables: Told) -> dict[str, HopRow]:
    """Tell the hop row that each backend address points to."""
    return {address: topology.hops.by_id[hop] for (_, address, _), hop in decode_backends(tables).items()}


def vip_id_of(tables: Told) -> int:
    """Give the id of the only VIP port."""
    (only,) = decode_vips(tables)
    return only.vip_id


@pytest.mark.parametrize(
    ("backends", "classes"),
    [
        ([LOCAL], {"10.100.1.2": Hop.NONE}),
        ([LOCAL, REMOTE, AWAY], {"10.100.1.2": Hop.NONE, "10.100.2.2": Hop.AVOIDABLE, "10.100.3.2": Hop.AVOIDABLE}),
        ([REMOTE, AWAY], {"10.100.2.2": Hop.REQUIRED, "10.100.3.2": Hop.REQUIRED}),
        ([backend("10.100.1.2", ready=False), REMOTE], {"10.100.1.2": Hop.NONE, "10.100.2.2": Hop.REQUIRED}),
        ([HOMELESS, LOCAL], {"10.100.4.2": Hop.UNKNOWN, "10.100.1.2": Hop.NONE}),
        ([HOMELESS, REMOTE], {"10.100.4.2": Hop.UNKNOWN, "10.100.2.2": Hop.REQUIRED}),
        ([], {}),
    ],
)
def test_hop_classes(backends: list[Backend], classes: dict[str, Hop]) -> None:
    """A backend here is no hop, one elsewhere is avoidable only beside a ready one here, one without a node unknown."""
    topology = Topology(NODE)
    tables = replace(topology, cluster(vip_port(*backends)), START)
    assert {address: row.hop for address, row in hops_of(topology, tables).items()} == classes


def test_backend_without_a_node_counts_on_the_vip_ports_own_row() -> None:
    """The id of a VIP port is also its hop row for what is not known, so that the kernel needs no second default."""
    topology = Topology(NODE)
    tables = replace(topology, cluster(vip_port(HOMELESS, REMOTE)), START)
    vip_id = vip_id_of(tables)
    assert decode_backends(tables)[vip_id, "10.100.4.2", 8080] == vip_id
    assert topology.hops.by_id[vip_id] == HopRow(vip_id, Hop.UNKNOWN, None, None)
    assert vip_id in tables.hop_ids


@pytest.mark.parametrize(
    ("address", "port", "pod", "pod_port"),
    [
        ("10.0.10.0", 80, "10.100.1.2", 8080),
        ("fd00:10::1", 65535, "fd00:100::2", 1),
        ("10.0.10.0", 256, "10.100.1.2", 255),
    ],
)
def test_tables_decode_to_what_was_given(address: str, port: int, pod: str, pod_port: int) -> None:
    """Addresses of both families and ports stand in the bytes in network order."""
    topology = Topology(NODE)
    tables = replace(topology, cluster(vip_port(backend(pod, port=pod_port), address=address, port=port)), START)
    assert decode_vips(tables) == [_Vip(address, port, 6, 1, Unforwarded.DROPPED)]
    assert list(decode_backends(tables)) == [(1, pod, pod_port)]
    assert (tables.vip_ids, tables.hop_ids) == (frozenset({1}), frozenset({1, 2}))
    assert [len(key) for key in (*tables.vip_ports, *tables.backends)] == [20, 24]


def test_vip_key_bytes() -> None:
    """A key is, byte by byte, what a program on a packet puts together."""
    topology = Topology(NODE)
    tables = replace(topology, cluster(vip_port(address="10.0.10.1", port=443)), START)
    assert list(tables.vip_ports) == [bytes(10) + b"\xff\xff" + b"\x0a\x00\x0a\x01" + b"\x01\xbb" + b"\x06" + b"\0"]


@pytest.mark.parametrize(
    ("policy", "backends", "reason"),
    [
        (Policy.CLUSTER, [], Unforwarded.NO_ENDPOINTS),
        (Policy.CLUSTER, [backend("10.100.1.2", ready=False)], Unforwarded.NO_ENDPOINTS),
        (Policy.CLUSTER, [REMOTE], Unforwarded.DROPPED),
        (Policy.CLUSTER, [LOCAL], Unforwarded.DROPPED),
        (Policy.LOCAL, [], Unforwarded.NO_ENDPOINTS),
        (Policy.LOCAL, [REMOTE], Unforwarded.NO_LOCAL_ENDPOINTS),
        (Policy.LOCAL, [HOMELESS], Unforwarded.NO_LOCAL_ENDPOINTS),
        (Policy.LOCAL, [backend("10.100.1.2", ready=False), REMOTE], Unforwarded.NO_LOCAL_ENDPOINTS),
        (Policy.LOCAL, [LOCAL, REMOTE], Unforwarded.DROPPED),
        (Policy.CLUSTER, [serving("10.100.1.2")], Unforwarded.DROPPED),
        (Policy.CLUSTER, [serving("10.100.2.2", "node2")], Unforwarded.DROPPED),
        (Policy.LOCAL, [serving("10.100.2.2", "node2")], Unforwarded.NO_LOCAL_ENDPOINTS),
        (Policy.LOCAL, [serving("10.100.1.2")], Unforwarded.DROPPED),
        (Policy.LOCAL, [serving("10.100.1.2"), REMOTE], Unforwarded.DROPPED),  # each policy falls back by itself
        (Policy.LOCAL, [serving("10.100.2.2", "node2"), LOCAL], Unforwarded.DROPPED),
    ],
)
def test_why_a_connection_would_not_be_forwarded(policy: Policy, backends: list[Backend], reason: Unforwarded) -> None:
    """The reason follows from the policy and the ready endpoints; dropped when nothing in the topology explains it."""
    tables = replace(Topology(NODE), cluster(vip_port(*backends, policy=policy)), START)
    assert [vip.unforwarded for vip in decode_vips(tables)] == [reason]


@pytest.mark.parametrize("policy", Policy)
def test_endpoints_that_are_not_known_are_no_reason(policy: Policy) -> None:
    """Before the endpoints were read, that there are none explains nothing; afterwards it does."""
    topology = Topology(NODE)
    unknown = replace(topology, cluster(vip_port(policy=policy, endpoints_known=False)), START)
    known = replace(topology, cluster(vip_port(policy=policy)), START)
    assert [vip.unforwarded for tables in (unknown, known) for vip in decode_vips(tables)] == [
        Unforwarded.DROPPED, Unforwarded.NO_ENDPOINTS,
    ]  # fmt: skip


def test_ready_local_backend_comes_and_goes() -> None:
    """A backend's id changes with its hop class and comes back with it, so that counts stay with their class."""
    topology = Topology(NODE)
    alone, beside = cluster(vip_port(REMOTE)), cluster(vip_port(REMOTE, LOCAL))
    ids = [
        decode_backends(replace(topology, state, START + turn * SECOND))[1, "10.100.2.2", 8080]
        for turn, state in enumerate([alone, beside, alone, beside])
    ]
    assert ids[0] == ids[2] != ids[1] == ids[3]
    assert topology.hops.by_id[ids[0]].hop is Hop.REQUIRED
    assert topology.hops.by_id[ids[1]].hop is Hop.AVOIDABLE
    assert topology.forget_rows(START + 4 * SECOND - KEEP_RETIRED_NS, START + 4 * SECOND) == NOTHING_GONE
    assert {ids[0], ids[1]} <= topology.hops.by_id.keys()


def test_readiness_of_the_local_backend_decides() -> None:
    """The local backend turning unready makes the others required, and keeps its own row."""
    topology = Topology(NODE)
    before = replace(topology, cluster(vip_port(LOCAL, REMOTE)), START)
    unready = backend("10.100.1.2", ready=False)
    after = replace(topology, cluster(vip_port(unready, REMOTE)), START + SECOND)
    assert decode_backends(before)[1, "10.100.1.2", 8080] == decode_backends(after)[1, "10.100.1.2", 8080]
    assert hops_of(topology, after)["10.100.2.2"].hop is Hop.REQUIRED


def test_same_state_again_changes_nothing() -> None:
    """An update with what is known makes equal tables, takes no ids and leaves the start times alone."""
    topology = Topology(NODE)
    state = cluster(vip_port(LOCAL, REMOTE, HOMELESS), vip_port(port=81), node1="a", node2="b")
    first = replace(topology, state, START)
    created = dict(topology.vips.created_ns), dict(topology.hops.created_ns)
    assert replace(topology, state, START + SECOND) == first
    assert (topology.vips.created_ns, topology.hops.created_ns) == created
    assert set(created[0].values()) | set(created[1].values()) == {START}


def test_backends_on_one_node_share_a_row() -> None:
    """Two backends of one node and class count in one row: pods come and go without new series."""
    topology = Topology(NODE)
    tables = replace(topology, cluster(vip_port(REMOTE, backend("10.100.2.3", "node2", "zone-b"))), START)
    assert len(set(decode_backends(tables).values())) == 1


def test_backends_on_one_node_may_be_in_different_zones() -> None:
    """What an endpoint says of its zone counts for it alone."""
    topology = Topology(NODE)
    backends = [backend(f"10.100.2.{n}", "node2", zone) for n, zone in enumerate(["zone-b", "zone-a", None], 2)]
    tables = replace(topology, cluster(vip_port(*backends), node1="zone-a"), START)
    assert {address: row.zone_crossed for address, row in hops_of(topology, tables).items()} == {
        "10.100.2.2": True, "10.100.2.3": False, "10.100.2.4": None,
    }  # fmt: skip


def test_policy_is_part_of_the_identity() -> None:
    """Another policy is another row with its own start time; the old policy's row comes back with the policy."""
    topology = Topology(NODE)
    ids = []
    for turn, policy in enumerate([Policy.CLUSTER, Policy.LOCAL, Policy.CLUSTER]):
        tables = replace(topology, cluster(vip_port(LOCAL, policy=policy)), START + turn * SECOND)
        ids.append(vip_id_of(tables))
    assert ids[0] == ids[2] != ids[1]
    assert topology.vips.by_id[ids[1]].policy is Policy.LOCAL
    assert topology.vips.created_ns[ids[1]] == START + SECOND


def test_deleted_rows_outlive_their_place_by_the_retirement_time() -> None:
    """A deleted Service leaves the tables at once and its rows after the retirement time, not a moment earlier."""
    topology = Topology(NODE)
    replace(topology, cluster(vip_port(LOCAL, REMOTE)), START)
    gone = START + 10 * SECOND
    assert replace(topology, Cluster(), gone) == Told({}, {}, frozenset(), frozenset())
    assert topology.watched == 0
    replace(topology, Cluster(), gone + SECOND)  # being told again that it is gone does not prolong its life
    assert topology.forget_rows(gone - 1, gone + 2 * SECOND) == NOTHING_GONE
    assert (set(topology.vips.by_id), set(topology.hops.by_id)) == ({1}, {1, 2, 3})
    assert topology.forget_rows(gone, gone + 2 * SECOND) == Gone((HopGone(1, 0), HopGone(2, 0), HopGone(3, 0)), (1,))
    assert not topology.vips.by_id
    assert not topology.hops.created_ns


def test_come_back_within_the_retirement_time() -> None:
    """What comes back in time goes on in its old rows and is retired no longer."""
    topology = Topology(NODE)
    state = cluster(vip_port(LOCAL, REMOTE))
    first = replace(topology, state, START)
    replace(topology, Cluster(), START + SECOND)
    assert replace(topology, state, START + 299 * SECOND) == first
    assert topology.vips.created_ns[1] == START
    later = START + 10_000 * SECOND
    assert topology.forget_rows(later - KEEP_RETIRED_NS, later) == NOTHING_GONE
    assert (frozenset(topology.vips.by_id), frozenset(topology.hops.by_id)) == (first.vip_ids, first.hop_ids)


def test_come_back_after_the_retirement_time() -> None:
    """What comes back too late gets new ids and new start times: its old ids are never used again."""
    topology = Topology(NODE)
    state = cluster(vip_port(LOCAL, REMOTE))
    first = replace(topology, state, START)
    replace(topology, Cluster(), START)
    topology.forget_rows(START, START)
    later = START + KEEP_RETIRED_NS + SECOND
    second = replace(topology, state, later)
    assert min(second.vip_ids | second.hop_ids) > max(first.vip_ids | first.hop_ids)
    assert set(topology.vips.created_ns.values()) == {later}


def test_recreated_with_the_same_name_elsewhere() -> None:
    """A Service made anew under its name at another VIP is another row; the old VIP's is only retired."""
    topology = Topology(NODE)
    replace(topology, cluster(vip_port(LOCAL)), START)
    replace(topology, Cluster(), START + SECOND)
    tables = replace(topology, cluster(vip_port(LOCAL, address="10.0.10.9")), START + 2 * SECOND)
    (vip,) = decode_vips(tables)
    assert (vip.address, vip.vip_id) == ("10.0.10.9", 3)
    assert topology.vips.by_id[1].address == pack_address("10.0.10.0")


def test_vip_moves_to_another_service() -> None:
    """A VIP port that another Service takes over inherits no counts."""
    topology = Topology(NODE)
    old = vip_id_of(replace(topology, cluster(vip_port(LOCAL)), START))
    new = vip_id_of(replace(topology, cluster(vip_port(LOCAL, name="default/other")), START + SECOND))
    assert new != old
    assert [row.service for row in topology.vips.by_id.values()] == ["web", "other"]


def test_two_services_claim_one_vip_port() -> None:
    """The first by namespace and name wins whatever the order; the other is skipped with the winner's name."""
    ours, theirs = vip_port(LOCAL, name="b/web"), vip_port(REMOTE, name="a/web")
    for state in (cluster(ours, theirs), cluster(theirs, ours)):
        topology = Topology(NODE)
        tables = replace(topology, state, START)
        assert topology.vips.by_id[vip_id_of(tables)].namespace == "a"
        assert topology.skipped == [Skipped("b", "web", "10.0.10.0 port 80 TCP", "a/web has this VIP port")]
        assert [address for _, address, _ in decode_backends(tables)] == ["10.100.2.2"]


def test_several_ports_and_services_on_one_vip() -> None:
    """Ports of one VIP are VIP ports of their own, also when different Services share the address."""
    topology = Topology(NODE)
    ports = [vip_port(LOCAL, port=80), vip_port(LOCAL, port=81), vip_port(LOCAL, port=82, name="a/b")]
    tables = replace(topology, cluster(*ports), START)
    assert sorted(vip.port for vip in decode_vips(tables)) == [80, 81, 82]
    assert (topology.watched, topology.skipped) == (3, [])
    assert len(decode_backends(tables)) == 3


@pytest.mark.parametrize("transport", [Transport.UDP, Transport.SCTP])
def test_another_transport_on_the_same_port_is_another_vip_port(transport: Transport) -> None:
    """TCP and another transport on one VIP and port have rows and backends of their own, also of one Service."""
    topology = Topology(NODE)
    tables = replace(topology, cluster(vip_port(LOCAL), vip_port(REMOTE, transport=transport)), START)
    vips = decode_vips(tables)
    assert [(vip.address, vip.port, vip.transport) for vip in vips] == [
        ("10.0.10.0", 80, 6), ("10.0.10.0", 80, transport.value),
    ]  # fmt: skip
    assert list(decode_backends(tables)) == [(vips[0].vip_id, "10.100.1.2", 8080), (vips[1].vip_id, "10.100.2.2", 8080)]
    assert (topology.skipped, topology.watched) == ([], 2)
    assert topology.datagram_needs == (1, 0)


def test_what_datagrams_need() -> None:
    """UDP and SCTP VIP ports are counted, and those of them that a connection could not be forwarded by."""
    topology = Topology(NODE)
    udp, sctp = Transport.UDP, Transport.SCTP
    for vip_ports, needs in [
        ([vip_port(LOCAL)], (0, 0)),
        ([vip_port(), vip_port(transport=udp)], (1, 1)),
        ([vip_port(REMOTE, transport=udp), vip_port(transport=sctp)], (2, 1)),
        ([vip_port(REMOTE, transport=udp), vip_port(REMOTE, transport=sctp, policy=Policy.LOCAL)], (2, 1)),
        ([vip_port(REMOTE, transport=udp), vip_port(transport=sctp, endpoints_known=False)], (2, 0)),
        ([vip_port(LOCAL, transport=udp)], (1, 0)),
        ([vip_port(LOCAL)], (0, 0)),
    ]:
        replace(topology, cluster(*vip_ports), START)
        assert topology.datagram_needs == needs


@pytest.mark.parametrize(
    ("backends", "zones", "own", "crossed"),
    [
        ([REMOTE], {"node1": "zone-a"}, "zone-a", True),
        ([REMOTE], {"node1": "zone-b"}, "zone-b", False),
        ([REMOTE], {}, None, None),
        ([AWAY], {"node1": "zone-a"}, "zone-a", None),
        ([AWAY], {"node1": "zone-a", "node3": "zone-c"}, "zone-a", True),
        ([REMOTE], {"node1": "zone-a", "node2": "zone-a"}, "zone-a", True),  # the endpoint's own word counts first
        ([backend("10.100.1.2", NODE, "zone-a"), REMOTE], {}, "zone-a", True),
        ([backend("10.100.1.2", NODE, "zone-b"), REMOTE], {"node1": ""}, "zone-b", False),
    ],
)
def test_zones(backends: list[Backend], zones: dict[str, str], own: str | None, crossed: bool | None) -> None:  # noqa: FBT001
    """This node's zone is its node object's or that of a backend on it; crossing is told only if both are known."""
    topology = Topology(NODE)
    tables = replace(topology, cluster(vip_port(*backends), **zones), START)
    assert topology.zone == own
    assert list(hops_of(topology, tables).values())[-1].zone_crossed is crossed


def test_backend_here_crosses_no_zone() -> None:
    """A backend on this node is in this node's zone, if that is known at all."""
    topology = Topology(NODE)
    assert hops_of(topology, replace(topology, cluster(vip_port(LOCAL)), START))["10.100.1.2"].zone_crossed is None
    tables = replace(topology, cluster(vip_port(LOCAL), node1="a"), START + SECOND)
    assert hops_of(topology, tables)["10.100.1.2"].zone_crossed is False


@pytest.mark.parametrize(
    ("backends", "zones", "placement"),
    [
        ([], {}, Placement(0, 0, 0)),
        ([LOCAL, REMOTE, AWAY], {"node1": "zone-a", "node3": "zone-a"}, Placement(1, 1, 1)),
        ([LOCAL, REMOTE, AWAY], {}, Placement(1, 2, 0)),
        ([HOMELESS], {"node1": "zone-a"}, Placement(0, 1, 0)),
        ([backend("10.100.1.2", ready=False), REMOTE], {"node1": "zone-a"}, Placement(0, 0, 1)),
    ],
)
def test_placements(backends: list[Backend], zones: dict[str, str], placement: Placement) -> None:
    """Ready endpoints are counted by where they are; without zones all that are not here are in the same."""
    topology = Topology(NODE)
    replace(topology, cluster(vip_port(*backends), **zones), START)
    assert topology.placements == {1: placement}


def test_find_a_backend() -> None:
    """An endpoint is found by VIP port, address and port; what is gone and forgotten is not found."""
    topology = Topology(NODE)
    replace(topology, cluster(vip_port(REMOTE)), START)
    assert topology.backend(1, REMOTE.address, 8080) == REMOTE
    assert topology.backend(1, REMOTE.address, 8081) is None
    assert topology.backend(2, REMOTE.address, 8080) is None
    replace(topology, cluster(vip_port(LOCAL)), START)
    topology.forget_endpoints(START)
    assert topology.backend(1, REMOTE.address, 8080) is None


def test_age() -> None:
    """The age runs from the last confirmation, at first from the start; news are none; and it is never negative."""
    topology = Topology(NODE, START)
    assert topology.age_ns(START + 3) == 3
    replace(topology, cluster(vip_port(LOCAL)), START + 4)
    assert topology.age_ns(START + 7) == 7
    topology.confirm(START + 5)
    assert topology.age_ns(START + 7) == 2
    assert topology.age_ns(START) == 0


def test_terminating_endpoints_serve_when_none_is_ready() -> None:
    """As long as one is ready, those that only serve while they terminate are not picked from (KEP-1669)."""
    topology = Topology(NODE)
    ending, ended = serving("10.100.1.2"), backend("10.100.3.2", ready=False)
    tables = replace(topology, cluster(vip_port(ending, REMOTE, ended)), START)
    assert hops_of(topology, tables)["10.100.2.2"].hop is Hop.REQUIRED
    assert topology.placements == {1: Placement(0, 1, 0)}
    unready = dataclasses.replace(REMOTE, ready=False)
    tables = replace(topology, cluster(vip_port(ending, unready, serving("10.100.3.2", "node3"))), START + SECOND)
    assert {address: row.hop for address, row in hops_of(topology, tables).items()} == {
        "10.100.1.2": Hop.NONE, "10.100.2.2": Hop.AVOIDABLE, "10.100.3.2": Hop.AVOIDABLE,
    }  # fmt: skip
    assert topology.placements == {1: Placement(1, 1, 0)}


def test_endpoint_that_goes_lingers() -> None:
    """What went from a VIP port keeps its class and its name for the time of grace, and not a moment longer."""
    topology = Topology(NODE)
    before = replace(topology, cluster(vip_port(LOCAL, REMOTE)), START)
    after = replace(topology, cluster(vip_port(REMOTE)), START + SECOND)
    assert after.backends.keys() == before.backends.keys()
    assert {address: row.hop for address, row in hops_of(topology, after).items()} == {
        "10.100.1.2": Hop.NONE, "10.100.2.2": Hop.REQUIRED,
    }  # fmt: skip
    assert topology.placements == {1: Placement(0, 1, 0)}
    topology.forget_endpoints(START + SECOND - 1)
    assert told(topology) == after
    assert topology.backend(1, LOCAL.address, 8080) == LOCAL
    topology.tables.pending = Pending()
    topology.forget_endpoints(START + SECOND)
    assert list(decode_backends(told(topology))) == [(1, "10.100.2.2", 8080)]
    assert topology.tables.pending == Pending(backends=before.backends.keys() - told(topology).backends.keys())
    assert topology.backend(1, LOCAL.address, 8080) is None
    assert topology.backend(1, REMOTE.address, 8080) == REMOTE


def test_endpoint_comes_back_while_it_lingers() -> None:
    """It goes on in its row, and its time of grace begins anew when it goes again."""
    topology = Topology(NODE)
    first = replace(topology, cluster(vip_port(LOCAL, REMOTE)), START)
    replace(topology, cluster(vip_port(REMOTE)), START + SECOND)
    assert replace(topology, cluster(vip_port(LOCAL, REMOTE)), START + 2 * SECOND) == first
    topology.forget_endpoints(START + 2 * SECOND)
    assert told(topology) == first
    replace(topology, cluster(vip_port(REMOTE)), START + 20 * SECOND)
    topology.forget_endpoints(START + 2 * SECOND)
    assert topology.backend(1, LOCAL.address, 8080) == LOCAL


def test_endpoints_of_a_deleted_vip_port_linger_by_name() -> None:
    """The tables lose the VIP port and its endpoints at once; records of its last connections still find them."""
    topology = Topology(NODE)
    replace(topology, cluster(vip_port(LOCAL), vip_port(LOCAL, port=81)), START)
    tables = replace(topology, cluster(vip_port(LOCAL, port=81)), START + SECOND)
    assert [vip.port for vip in decode_vips(tables)] == [81]
    assert list(decode_backends(tables)) == [(3, "10.100.1.2", 8080)]
    assert topology.placements == {3: Placement(1, 0, 0)}
    assert topology.backend(1, LOCAL.address, 8080) == LOCAL
    topology.forget_endpoints(START + SECOND)
    assert topology.backend(1, LOCAL.address, 8080) is None
    assert topology.backend(3, LOCAL.address, 8080) == LOCAL


def test_lingering_is_shorter_than_retirement() -> None:
    """A row that a lingering endpoint leads to is not forgotten before it."""
    assert (LINGER_NS, KEEP_RETIRED_NS) == (30 * SECOND, 300 * SECOND)


@pytest.mark.parametrize("order", list(itertools.permutations([0, 1, 2])))
def test_contested_vip_port_is_the_lowest_claim_s(order: tuple[int, ...]) -> None:
    """The API server's word counts before the file's, then the name, in whatever order the claims come and go."""
    topology = Topology(NODE)
    claims = [ServiceId(Source.API, "a", "x"), ServiceId(Source.API, "b", "x"), ServiceId(Source.FILE, "a", "a")]
    for number in order:
        topology.update({claims[number]: [vip_port(LOCAL, name="/".join(claims[number][1:]))]}, START)
    what = "10.0.10.0 port 80 TCP"
    assert topology.vips.by_id[vip_id_of(told(topology))][:2] == ("a", "x")
    assert topology.skipped == [
        Skipped("b", "x", what, "a/x has this VIP port"), Skipped("a", "a", what, "a/x has this VIP port"),
    ]  # fmt: skip
    topology.update({claims[0]: []}, START)
    assert topology.vips.by_id[vip_id_of(told(topology))][:2] == ("b", "x")
    assert topology.skipped == [Skipped("a", "a", what, "b/x has this VIP port")]
    topology.update({claims[1]: []}, START)
    assert topology.vips.by_id[vip_id_of(told(topology))][:2] == ("a", "a")
    assert (topology.skipped, topology.watched) == ([], 1)
    topology.update({claims[2]: []}, START)
    assert (told(topology), topology.watched) == (Told({}, {}, frozenset(), frozenset()), 0)


def test_both_sources_say_the_same() -> None:
    """One Service in the API and in the file is one row, so that it goes on when one of them falls silent."""
    topology = Topology(NODE)
    by_file = replace(topology, cluster(vip_port(LOCAL)), START)
    by_api = {ServiceId(Source.API, "default", "web"): [vip_port(LOCAL, REMOTE)]}
    topology.update(by_api, START + SECOND)
    assert topology.skipped == [Skipped("default", "web", "10.0.10.0 port 80 TCP", "default/web has this VIP port")]
    assert topology.placements == {1: Placement(1, 1, 0)}
    topology.update(dict.fromkeys(by_api, ()), START + 2 * SECOND)
    topology.forget_endpoints(START + 2 * SECOND)
    assert told(topology) == by_file
    assert topology.skipped == []


def test_service_recreated_under_its_name_goes_on() -> None:
    """A Service that is deleted and made anew at its VIP goes on in its rows."""
    topology = Topology(NODE)
    web = ServiceId(Source.API, "default", "web")
    topology.update({web: [vip_port(LOCAL)]}, START)
    first = told(topology)
    topology.update({web: []}, START + SECOND)
    topology.update({web: [vip_port(LOCAL)]}, START + 2 * SECOND)
    assert told(topology) == first
    assert set(topology.vips.created_ns.values()) | set(topology.hops.created_ns.values()) == {START}


def test_a_change_touches_only_its_service() -> None:
    """One endpoint that comes makes one key and one row pending, whatever else is known."""
    topology = Topology(NODE)
    services = {ServiceId(Source.API, "default", f"web{n}"): [vip_port(LOCAL, port=n)] for n in range(1, 9)}
    topology.update(services, START)
    topology.tables.pending = Pending()
    changed = ServiceId(Source.API, "default", "web5")
    topology.update({changed: [vip_port(LOCAL, REMOTE, port=5)]}, START + SECOND)
    assert told(topology).backends.keys() >= topology.tables.pending.backends
    (key,) = topology.tables.pending.backends
    assert (BACKEND_KEY.unpack(key)[1], topology.tables.pending.hop_ids) == (REMOTE.address, {17})
    assert (topology.tables.pending.vip_ids, topology.tables.pending.vip_ports) == (set(), set())


def test_rows_that_are_forgotten_before_they_were_written_are_not_pending() -> None:
    """What came and went before the kernel took it leaves nothing to do but what may be there."""
    topology = Topology(NODE)
    replace(topology, cluster(vip_port(LOCAL)), START)
    replace(topology, Cluster(), START)
    topology.forget_rows(START, START)
    assert (topology.tables.pending.vip_ids, topology.tables.pending.hop_ids) == (set(), set())


def test_own_zone_learnt_later() -> None:
    """As soon as this node's zone is known, all backends go over to rows that tell whether a zone is crossed."""
    topology = Topology(NODE)
    first = ServiceId(Source.API, "default", "first")
    topology.update({first: [vip_port(REMOTE, name="default/first")]}, START)
    assert hops_of(topology, told(topology))["10.100.2.2"].zone_crossed is None
    local = backend("10.100.1.2", NODE, "zone-a")
    topology.update({ServiceId(Source.API, "default", "second"): [vip_port(local, port=81)]}, START + SECOND)
    assert hops_of(topology, told(topology))["10.100.2.2"].zone_crossed is True
    assert topology.placements[1] == Placement(0, 0, 1)
    topology.update_nodes(Source.API, {NODE: Node(NODE, "zone-b")}, START + 2 * SECOND)
    assert topology.zone == "zone-b"
    assert hops_of(topology, told(topology))["10.100.2.2"].zone_crossed is False
    assert topology.placements[1] == Placement(0, 1, 0)


def test_zone_of_a_node_learnt_later() -> None:
    """An endpoint that does not know its zone has its node's, and loses it with the node."""
    topology = Topology(NODE)
    replace(topology, cluster(vip_port(AWAY), node1="zone-a"), START)
    assert hops_of(topology, told(topology))["10.100.3.2"].zone_crossed is None
    topology.update_nodes(Source.API, {"node3": Node("node3", "zone-c"), "node4": Node("node4", "zone-d")}, START)
    assert (topology.zone_of(AWAY), hops_of(topology, told(topology))["10.100.3.2"].zone_crossed) == ("zone-c", True)
    topology.update_nodes(Source.API, {"node3": None, "unheard-of": None}, START)
    assert (topology.zone_of(AWAY), hops_of(topology, told(topology))["10.100.3.2"].zone_crossed) == (None, None)


def test_nodes_of_the_cluster() -> None:
    """The API server's count where it has told any, since a file need not name all; None where nobody does."""
    topology = Topology(NODE)
    counts = [topology.cluster_nodes]
    topology.replace(cluster(node1="zone-a", elsewhere="zone-b"), 0)
    counts.append(topology.cluster_nodes)
    topology.update_nodes(Source.API, {name: Node(name) for name in (NODE, "node2", "node3")}, 0)
    counts.append(topology.cluster_nodes)
    topology.update_nodes(Source.API, {"node3": None}, 0)
    counts.append(topology.cluster_nodes)
    assert counts == [None, 2, 3, 2]


def test_own_node() -> None:
    """The node object of this node is the API server's, else the file's, else none."""
    topology = Topology(NODE)
    assert [topology.own_node, topology.zone] == [None, None]
    replace(topology, cluster(node1="zone-a", node2="zone-b"), START)
    assert topology.own_node == Node(NODE, "zone-a")
    topology.update_nodes(Source.API, {NODE: Node(NODE, "zone-b", uid="u")}, START)
    assert [topology.own_node, topology.zone] == [Node(NODE, "zone-b", uid="u"), "zone-b"]
    topology.update_nodes(Source.API, {NODE: None}, START)
    assert [topology.own_node, topology.zone] == [Node(NODE, "zone-a"), "zone-a"]
    replace(topology, Cluster(), START)
    assert [topology.own_node, topology.zone] == [None, None]


WEB_ROW = VipRow("default", "web", pack_address("10.0.10.0"), 80, Transport.TCP, Policy.CLUSTER)
SHOP_ROW = WEB_ROW._replace(service="shop", port=81)
ADOPTED = {
    3: Name(WEB_ROW, START),
    4: Name(HopRow(3, Hop.NONE, NODE, None), START + SECOND),
    5: Name(HopRow(3, Hop.AVOIDABLE, "node2", None), START + 2 * SECOND),
    6: Name(HopRow(3, Hop.AVOIDABLE, None, None), START + 3 * SECOND),
    8: Name(SHOP_ROW, START),
    9: Name(HopRow(8, Hop.NONE, NODE, None), START),
}
"""What an agent left: web, of which node3 was forgotten, and a shop; ids up to 20 were used."""
BEGAN = START + 1_000 * SECOND


def adopted() -> Topology:
    """Make a topology that goes on with what an agent left."""
    topology = Topology(NODE, BEGAN)
    topology.adopt(ADOPTED, 20, BEGAN)
    return topology


def test_adopted_rows_go_on() -> None:
    """What a source names again is in its row with its old start time; what is new takes ids that nobody ever had."""
    topology = adopted()
    assert (topology.watched, told(topology)) == (0, Told({}, {}, frozenset(), frozenset()))
    tables = replace(topology, cluster(vip_port(LOCAL, REMOTE, AWAY)), BEGAN + SECOND)
    assert vip_id_of(tables) == 3
    assert {key[1]: hop for key, hop in decode_backends(tables).items()} == {
        "10.100.1.2": 4, "10.100.2.2": 5, "10.100.3.2": 21,
    }  # fmt: skip
    assert topology.vips.created_ns == {3: START, 8: START}
    assert topology.hops.created_ns == {
        3: START,
        4: START + SECOND,
        5: START + 2 * SECOND,
        6: START + 3 * SECOND,
        8: START,
        9: START,
        21: BEGAN + SECOND,
    }
    assert topology.hops.by_id[3] == HopRow(3, Hop.UNKNOWN, None, None)


def test_adopted_rows_may_be_lacking() -> None:
    """Whether the kernel has them all is for who writes the tables to know."""
    topology = adopted()
    assert topology.tables.pending.vip_ids == {3, 8}
    assert topology.tables.pending.hop_ids == {3, 4, 5, 6, 8, 9}


def test_what_no_source_names_is_forgotten_after_the_retirement_time() -> None:
    """The adopted rest is retired from the adoption on; a remainder never, before its VIP port."""
    topology = adopted()
    replace(topology, cluster(vip_port(LOCAL)), BEGAN + SECOND)
    assert topology.forget_rows(BEGAN - 1, BEGAN) == NOTHING_GONE
    gone = topology.forget_rows(BEGAN, BEGAN + 300 * SECOND)
    assert gone == Gone((HopGone(5, 6), HopGone(8, 0), HopGone(9, 0)), (8,))
    assert topology.forget_rows(BEGAN + 10**6 * SECOND, BEGAN) == NOTHING_GONE
    assert topology.hops.by_id.keys() == {3, 4, 6}
    replace(topology, Cluster(), BEGAN + 400 * SECOND)
    assert topology.forget_rows(BEGAN + 400 * SECOND, BEGAN) == Gone(
        (HopGone(3, 0), HopGone(4, 0), HopGone(6, 0)), (3,)
    )
    replace(topology, cluster(vip_port(LOCAL)), BEGAN + 500 * SECOND)
    assert topology.vips.by_id.keys() == {21}


def test_names_of_rows() -> None:
    """A row is named by who is counted in it and since when; a VIP port's id names the VIP port in both tables."""
    topology = adopted()
    assert {number: topology.name_of(number) for number in ADOPTED} == ADOPTED
    replace(topology, cluster(vip_port(AWAY)), BEGAN + SECOND)
    assert topology.name_of(21) == Name(HopRow(3, Hop.REQUIRED, "node3", None), BEGAN + SECOND)
    again = Topology(NODE)
    again.adopt(ADOPTED, 20, BEGAN + 5)
    assert {number: again.name_of(number) for number in ADOPTED} == ADOPTED


def test_remainders() -> None:
    """Rows of gone nodes of one class leave their counts to one row, which is as old as the first of them is gone."""
    topology = Topology(NODE)
    replace(topology, cluster(vip_port(LOCAL, REMOTE, AWAY)), START)
    replace(topology, cluster(vip_port(LOCAL, AWAY)), START + SECOND)
    assert topology.forget_rows(START + SECOND, START + 400 * SECOND) == Gone((HopGone(3, 5),), ())
    assert (topology.hops.by_id[5], topology.hops.created_ns[5]) == (
        HopRow(1, Hop.AVOIDABLE, None, None),
        START + 400 * SECOND,
    )
    assert [row.is_remainder for row in topology.hops.by_id.values()] == [False, False, False, True]
    assert 5 in topology.tables.pending.hop_ids
    replace(topology, cluster(vip_port(LOCAL)), START + 401 * SECOND)
    assert topology.forget_rows(START + 401 * SECOND, START + 800 * SECOND) == Gone((HopGone(4, 5),), ())
    # Alone, the backend on node2 is required: another class, another remainder.
    replace(topology, cluster(vip_port(REMOTE)), START + 900 * SECOND)
    replace(topology, cluster(vip_port(LOCAL)), START + 901 * SECOND)
    assert topology.forget_rows(START + 901 * SECOND, START) == Gone((HopGone(6, 7),), ())
    assert topology.hops.by_id[7] == HopRow(1, Hop.REQUIRED, None, None)


_STEPS = st.lists(st.tuples(st.sampled_from([1, 100, 299, 301]), st.booleans(), CLUSTERS), max_size=8)


@settings(deadline=None, max_examples=100)
@given(_STEPS)
def test_an_id_has_one_identity_for_ever(steps: list[tuple[int, bool, Cluster]]) -> None:
    """Whatever is updated, no id changes its meaning or is used again, and all that points to a row finds it."""
    topology, now = Topology(NODE), START
    vip_rows: dict[int, VipRow] = {}
    hop_rows: dict[int, HopRow] = {}
    for seconds, forget, state in steps:
        now += seconds * SECOND
        taken = max([0, *vip_rows, *hop_rows])
        topology.forget_endpoints(now - LINGER_NS)
        tables = replace(topology, state, now)
        for known, rows in ((vip_rows, topology.vips), (hop_rows, topology.hops)):
            for row_id, row in rows.by_id.items():
                # An id is either one that had this identity before or younger than all that were ever taken.
                assert known.get(row_id) == row if row_id <= taken and row_id in known else row_id > taken
                assert rows.created_ns[row_id] <= now
            assert len(set(rows.by_id.values())) == len(rows.by_id)
            known.update(rows.by_id)  # type: ignore[arg-type]
        before = topology.vips.by_id.keys() | topology.hops.by_id.keys()
        gone = topology.forget_rows(now - KEEP_RETIRED_NS, now) if forget else NOTHING_GONE
        _check_tables(topology, tables, state)
        assert tables.vip_ids <= topology.vips.by_id.keys()
        assert tables.hop_ids <= topology.hops.by_id.keys()
        assert {*gone.vip_ids, *(hop_id for hop_id, _ in gone.hops)} <= before
        # What a row had counted stays as long as its VIP port does, in a row that is there.
        assert all((hop_rows[hop_id].vip_id in gone.vip_ids) is (into == 0) for hop_id, into in gone.hops)
        assert {into for _, into in gone.hops} - {0} <= topology.hops.by_id.keys()
        hop_rows.update(topology.hops.by_id)
    # A hop row never outlives the VIP port's row that it belongs to.
    assert {row.vip_id for row in topology.hops.by_id.values()} <= topology.vips.by_id.keys()


def _check_tables(topology: Topology, tables: Told, state: Cluster) -> None:
    vips, backends = decode_vips(tables), decode_backends(tables)
    # A Service claims a VIP port once, with what it says of it last.
    claims = {(each.address, each.port, each.transport, each.namespace): each for each in state.vip_ports}
    owners = {claim[:3]: claims[claim] for claim in sorted(claims, reverse=True)}
    assert (topology.watched, topology.watched + len(topology.skipped)) == (len(owners), len(claims))
    assert {vip.vip_id for vip in vips} == tables.vip_ids
    known = {
        vip.vip_id
        for vip in vips
        if owners[pack_address(vip.address), vip.port, Transport(vip.transport)].endpoints_known
    }
    assert topology.placements.keys() == known
    for vip in vips:
        row = topology.vips.by_id[vip.vip_id]
        assert (format_address(row.address), row.port, row.transport) == vip[:3]
        owner = owners[row.address, row.port, row.transport]
        assert row == VipRow(owner.namespace, owner.service, owner.address, owner.port, owner.transport, owner.policy)
        picked = [one for one in owner.backends if one.ready] or [one for one in owner.backends if one.serving]
        assert vip.vip_id not in known or sum(topology.placements[vip.vip_id]) == len(picked)
        assert all((vip.vip_id, format_address(one.address), one.port) in backends for one in owner.backends)
        assert {topology.backend(vip.vip_id, one.address, one.port) for one in owner.backends} <= set(owner.backends)
    for (vip_id, _, _), hop_id in backends.items():
        assert topology.hops.by_id[hop_id].vip_id == vip_id
