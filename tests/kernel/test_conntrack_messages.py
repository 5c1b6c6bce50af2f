"""What the filter on conntrack's socket makes of a message: crafted ones, cut at every byte, changed at every byte."""

from __future__ import annotations

import random
import struct
from typing import TYPE_CHECKING, Any

import pytest

from otel_lb_hop.core.ids import rejection_threshold, trace_id
from otel_lb_hop.core.interfaces import Prefix
from otel_lb_hop.core.layout import Event, Place, Verdict, pack_port
from otel_lb_hop.model import Policy, Transport
from tests.kernel import ctnetlink
from tests.kernel.ctnetlink import SCTP, TCP, UDP, ZONE, Tuple, Unread, attribute, message
from tests.kernel.packets import End
from tests.kernel.requirements import needs_kernel
from tests.kernel.rig import EVERYTHING, FLOW, in_threads, vip_port

if TYPE_CHECKING:
    from tests.kernel.rig import Marked, Rig

pytestmark = [pytest.mark.root, needs_kernel]

VIP4, VIP6 = End.of("8.0.10.1", 53), End.of("fd00:10::1", 53)
CLIENT4, CLIENT6 = End.of("8.0.1.5", 4000), End.of("fd00:1::5", 4000)
BACKEND4, BACKEND6 = End.of("8.0.4.7", 5353), End.of("fd00:4::7", 5353)
SNAT4, SNAT6 = End.of("8.0.2.1", 61000), End.of("fd00:2::1", 61000)
FLOW4 = Tuple(CLIENT4, VIP4), Tuple(BACKEND4, SNAT4)
FLOW6 = Tuple(CLIENT6, VIP6), Tuple(BACKEND6, SNAT6)
FAMILIES = pytest.mark.parametrize("flow", [FLOW4, FLOW6], ids=["v4", "v6"])
HOST = 128


def serve(rig: Rig, flow: tuple[Tuple, Tuple] = FLOW4, transport: Transport = Transport.UDP) -> Marked:
    """Give a node a VIP port of each family; answers the ids of the flow's."""
    four, six = rig.serve(
        vip_port(VIP4, (BACKEND4, "node2"), transport=transport),
        vip_port(VIP6, (BACKEND6, "node2"), transport=transport),
    )
    return four if flow is FLOW4 else six


def totals(rig: Rig) -> tuple[int, int, int]:
    """Add up connections, those forwarded and those not, over all rows; they must be told alike in all places."""
    snapshot = rig.snapshot()
    connections = sum(sum(row.connections) for row in snapshot.vips.values())
    forwarded = sum(sum(row.forwarded) for row in snapshot.hops.values())
    unforwarded = sum(sum(map(sum, row.unforwarded)) for row in snapshot.vips.values())
    assert connections == forwarded + unforwarded
    assert forwarded == sum(row.translated for row in snapshot.hops.values())
    assert not any(row.answered + row.refused + row.timeout + row.evicted for row in snapshot.hops.values())
    assert not any(row.forward.observations + row.handshake.observations for row in snapshot.hops.values())
    return connections, forwarded, unforwarded


@FAMILIES
@pytest.mark.parametrize("transport", [Transport.UDP, Transport.SCTP])
def test_translated(rig: Rig, flow: tuple[Tuple, Tuple], transport: Transport) -> None:
    """A translated flow is a connection, forwarded to its backend's hop; the record has both ends and no duration."""
    marked = serve(rig, flow, transport)
    vip_id = marked.vip_id
    rig.hear(message(*flow, transport))
    assert totals(rig) == (1, 1, 0)
    assert rig.vip(vip_id).connections == (0, 1)
    (record,) = rig.records()
    assert (record.verdict, record.origin, record.vip_id) == (Verdict.TRANSLATED, 1, vip_id)
    assert record.hop_id == marked.hops["required", "node2"]
    assert (record.client, record.client_port) == (flow[0].source.address, 4000)
    assert (record.backend, record.backend_port) == (flow[1].source.address, b"\x14\xe9")
    assert (record.snat, record.snat_port) == (flow[1].destination.address, 61000)
    assert (record.forward_ns, record.in_ifindex, record.retransmits) == (0, 0, 0)
    assert record.syn_ns == record.end_ns > 0
    ends = record.snat, pack_port(record.snat_port), record.backend, record.backend_port
    assert record.trace_id == trace_id(*ends, record.syn_ns & 0xFFFFFFFF).to_bytes(16)
    assert rig.event(Event.CONNTRACK_UNREAD) == 0


@FAMILIES
def test_hop_of_the_backend(rig: Rig, flow: tuple[Tuple, Tuple]) -> None:
    """The hop row is the backend's; of a backend that the topology does not know, the VIP port's own."""
    vip_id = serve(rig, flow).vip_id
    rig.hear(message(*flow))
    stranger = flow[1].source._replace(port=5354)
    rig.hear(message(flow[0], flow[1]._replace(source=stranger)), repeat=2)
    known, *unknown = rig.records()
    assert known.hop_id != vip_id
    assert [record.hop_id for record in unknown] == [vip_id, vip_id]
    assert rig.hop(known.hop_id).forwarded == (0, 1)
    assert rig.hop(vip_id).forwarded == (0, 2)


@FAMILIES
def test_untranslated(rig: Rig, flow: tuple[Tuple, Tuple]) -> None:
    """A flow whose reply comes from the VIP port itself was never translated, masqueraded or not."""
    serve(rig)
    reply = Tuple(flow[0].destination, flow[0].source)
    rig.hear(message(flow[0], reply))
    rig.hear(message(flow[0], reply._replace(destination=flow[1].destination)))
    assert totals(rig) == (2, 0, 2)
    assert [record.verdict for record in rig.records()] == [Verdict.DROPPED, Verdict.DROPPED]
    # Another port of the same address is a translation.
    rig.hear(message(flow[0], Tuple(flow[0].destination._replace(port=54), flow[0].source)))
    assert totals(rig) == (3, 1, 2)


def test_untranslated_for_a_reason(rig: Rig) -> None:
    """What is never translated counts under the reason of its VIP port."""
    rig.serve(
        vip_port(VIP4, transport=Transport.UDP),
        vip_port(VIP6, (BACKEND6, "node2"), policy=Policy.LOCAL, transport=Transport.UDP),
    )
    for flow in (FLOW4, FLOW6):
        rig.hear(message(flow[0], Tuple(flow[0].destination, flow[0].source)))
    assert [record.verdict for record in rig.records()] == [Verdict.NO_ENDPOINTS, Verdict.NO_LOCAL_ENDPOINTS]
    assert totals(rig) == (2, 0, 2)


@pytest.mark.parametrize(
    "changes",
    [
        {"kind": 1 << 8 | 2},  # IPCTNL_MSG_CT_DELETE
        {"kind": 2 << 8 | 0},  # IPCTNL_MSG_EXP_NEW
        {"flags": 0},  # a change of an entry that was there
        {"flags": 0x400},
        {"port_id": 4711},  # put in by a program
        {"family": 7},  # AF_BRIDGE
        {"transport": 1},  # ICMP
    ],
)
def test_nothing_of_ours(rig: Rig, changes: dict[str, Any]) -> None:
    """What is no new connection of a transport with ports is passed over without a count."""
    serve(rig)
    rig.hear(message(*FLOW4, **changes))
    assert totals(rig) == (0, 0, 0)
    assert not any(rig.tables.events())


@pytest.mark.parametrize("end", [VIP4._replace(port=54), End.of("8.0.10.2", 53)])
def test_no_vip_port(rig: Rig, end: End) -> None:
    """Another port or address is not the VIP port, nor is it by another transport."""
    serve(rig)
    rig.hear(message(FLOW4[0]._replace(destination=end), FLOW4[1]))
    rig.hear(message(*FLOW4, SCTP))
    assert totals(rig) == (0, 0, 0)
    assert not any(rig.tables.events())


def test_origin(rig: Rig) -> None:
    """The longest prefix with the client's address tells the origin; both families, one table."""
    serve(rig)
    clients = {
        "8.0.1.5": 1,  # in no prefix
        "8.0.2.9": 0,  # in a range of pods
        "8.0.3.9": 1,  # in a hole in it
        "8.0.9.1": 0,  # this node
        "fd00:1::5": 1,
        "fd00:2::5": 0,
        "fd00:2:0:1::5": 1,
        "fd00:9::1": 0,
    }
    rig.places.set(
        {
            Prefix(HOST - 32 + 15, End.of("8.0.2.0", 0).address): Place.INSIDE,
            Prefix(HOST - 32 + 24, End.of("8.0.3.0", 0).address): Place.OUTSIDE,
            Prefix(HOST, End.of("8.0.9.1", 0).address): Place.THIS_NODE,
            Prefix(32, End.of("fd00:2::", 0).address): Place.INSIDE,
            Prefix(64, End.of("fd00:2:0:1::", 0).address): Place.OUTSIDE,
            Prefix(HOST, End.of("fd00:9::1", 0).address): Place.THIS_NODE,
        }
        | {Prefix(HOST, End.of("8.0.1.5", 0).address): Place.OUTSIDE}
    )
    for client in clients:
        flow = FLOW6 if ":" in client else FLOW4
        rig.hear(message(flow[0]._replace(source=End.of(client, 4000)), flow[1]))
    assert [record.origin for record in rig.records()] == list(clients.values())
    assert [row.connections for row in rig.snapshot().vips.values()] == [(2, 2), (2, 2)]
    assert sorted(rig.hop(number).forwarded for number in rig.snapshot().hops) == [(0, 0), (0, 0), (2, 2), (2, 2)]


def test_places_follow(rig: Rig) -> None:
    """The table of places holds what was asked for last, and nothing else."""
    first, second = (Prefix(HOST, End.of(f"8.0.9.{number}", 0).address) for number in (1, 2))
    rig.places.set({first: Place.INSIDE, second: Place.THIS_NODE})
    rig.places.set({second: Place.INSIDE})
    assert list(rig.loaded.places.keys()) == [struct.pack("=I16s", 128, second.address)]
    assert rig.loaded.places.get(struct.pack("=I16s", 128, second.address)) == b"\1\0\0\0"
    assert len(rig.places) == 1
    rig.places.set({})
    assert list(rig.loaded.places.keys()) == []


def test_places_that_do_not_fit(narrow: Rig) -> None:
    """A full table refuses, keeps what fits, and takes the rest once there is room."""
    wanted = {Prefix(HOST, End.of(f"8.0.9.{number}", 0).address): Place.INSIDE for number in range(9)}
    with pytest.raises(OSError, match="No space left on device"):
        narrow.places.set(wanted)
    assert len(narrow.places) == len(list(narrow.loaded.places.keys())) == 8
    wanted.pop(next(iter(wanted)))
    narrow.places.set(wanted)
    assert len(narrow.places) == len(list(narrow.loaded.places.keys())) == 8


@FAMILIES
@pytest.mark.parametrize("own_calls", [0, 1])
def test_own_calls(rig: Rig, flow: tuple[Tuple, Tuple], own_calls: int) -> None:
    """A TCP connection counts only if it is asked for and only from this node; others came by an interface."""
    vip_id = serve(rig, flow, Transport.TCP).vip_id
    rig.tables.set_settings(EVERYTHING._replace(own_calls=own_calls))
    client = flow[0].source.address
    for places in ({}, {Prefix(HOST, client): Place.INSIDE}, {Prefix(HOST, client): Place.THIS_NODE}):
        rig.places.set(places)
        rig.hear(message(*flow, TCP))
    rig.hear(message(flow[0], Tuple(flow[0].destination, flow[0].source), TCP))
    assert totals(rig) == (2 * own_calls, own_calls, own_calls)
    assert rig.vip(vip_id).connections == (2 * own_calls, 0)
    expected = [Verdict.TRANSLATED, Verdict.DROPPED] if own_calls else []
    assert [record.verdict for record in rig.records()] == expected


def test_transports_do_not_mix(rig: Rig) -> None:
    """The same address and port by TCP, UDP and SCTP are three VIP ports."""
    rig.tables.set_settings(EVERYTHING._replace(own_calls=1))
    rig.places.set({Prefix(HOST, CLIENT4.address): Place.THIS_NODE})
    marked = rig.serve(*(vip_port(VIP4, (BACKEND4, "node2"), transport=transport) for transport in Transport))
    for times, transport in enumerate(Transport, start=1):
        rig.hear(message(*FLOW4, transport), repeat=times)
    assert [rig.vip(each.vip_id).connections for each in marked] == [(1, 0), (2, 0), (3, 0)]


@FAMILIES
@pytest.mark.parametrize("name", ["zone in the tuple", "zone between", "seven between"])
def test_attributes_in_between(rig: Rig, flow: tuple[Tuple, Tuple], name: str) -> None:
    """Zones and what may come are passed over: in the original tuple, and up to seven between the two."""
    zone = attribute(ZONE, b"\0\5")
    more: dict[str, Any] = {
        "zone in the tuple": {"zone": attribute(ctnetlink.TUPLE_ZONE, b"\0\5")},
        "zone between": {"between": zone},
        "seven between": {"between": zone * 7},
    }[name]
    serve(rig)
    rig.hear(message(*flow, **more))
    assert totals(rig) == (1, 1, 0)
    assert rig.event(Event.CONNTRACK_UNREAD) == 0


def test_too_much_in_between(rig: Rig) -> None:
    """What is further on is not looked for, and counted as not read."""
    serve(rig)
    rig.hear(message(*FLOW4, between=attribute(ZONE, b"\0\5") * 8))
    assert totals(rig) == (0, 0, 0)
    assert rig.event(Event.CONNTRACK_UNREAD) == 1


class Compared:
    """Messages given to the filter and to the reader in Python; both must say the same."""

    def __init__(self, rig: Rig) -> None:
        self.rig = rig
        self.connections = self.forwarded = self.unread = 0
        self.vip_ports = set()
        for vip, transport in ((VIP4, UDP), (VIP6, UDP), (VIP4, SCTP), (VIP6, SCTP)):
            self.vip_ports.add((vip, transport))
        rig.serve(*(vip_port(vip, transport=Transport(transport)) for vip, transport in sorted(self.vip_ports)))

    def hear(self, data: bytes) -> None:
        """Give a message to both; what was told of its entry before does not matter here."""
        for key in list(self.rig.loaded.told_flows.keys()):
            self.rig.loaded.told_flows.delete(key)
        self.rig.hear(data)
        try:
            told = ctnetlink.read(data, lambda original, transport: (original.destination, transport) in self.vip_ports)
        except Unread:
            self.unread += 1
        else:
            if told is not None:
                self.connections += 1
                self.forwarded += told.reply.source != told.original.destination
        counted = totals(self.rig)
        expected = (self.connections, self.forwarded, self.connections - self.forwarded)
        assert (*counted, self.rig.event(Event.CONNTRACK_UNREAD)) == (*expected, self.unread), data.hex()


@FAMILIES
@pytest.mark.parametrize("told", [False, True], ids=["header-of-the-whole", "header-of-the-part"])
def test_cut_at_every_byte(rig: Rig, flow: tuple[Tuple, Tuple], *, told: bool) -> None:
    """Cut anywhere, with the length it had or the length it has, it is read whole or counted as not read."""
    compared = Compared(rig)
    whole = message(*flow)
    for end in range(1, len(whole) + 1):
        compared.hear(struct.pack("=I", end)[: min(end, 4)] + whole[4:end] if told else whole[:end])
    assert compared.unread + compared.connections == len(whole)
    tuples = len(whole) - 16
    assert compared.connections == (len(whole) - tuples + 1 if told else 1)


@FAMILIES
def test_every_byte_changed(rig: Rig, flow: tuple[Tuple, Tuple]) -> None:
    """With any byte changed, to any of some values, it is read as the reader in Python reads it."""
    compared = Compared(rig)
    whole = message(*flow)
    for at in range(len(whole)):
        for value in {0, 1, 4, 0xFF, whole[at] ^ 1, whole[at] ^ 0x80, whole[at] + 4 & 0xFF, whole[at] - 4 & 0xFF}:
            compared.hear(whole[:at] + bytes([value]) + whole[at + 1 :])
    assert min(compared.unread, compared.connections) > 100


def test_garbage(rig: Rig) -> None:
    """Random bytes, alone or behind a good header or in a good message, are never taken for a connection by guess."""
    compared = Compared(rig)
    source = random.Random(20261121)
    for _ in range(1_500):
        whole = bytearray(message(*source.choice([FLOW4, FLOW6]), source.choice([UDP, SCTP, TCP, 1])))
        kind = source.randrange(3)
        if kind == 0:
            whole = bytearray(source.randbytes(source.randrange(1, 300)))
        elif kind == 1:
            whole[20:] = source.randbytes(len(whole) - 20)
        else:
            for _ in range(source.randrange(1, 5)):
                whole[source.randrange(20, len(whole))] = source.choice([0, 1, 2, 3, 4, 8, 0x80, source.randrange(256)])
        compared.hear(bytes(whole))
    assert min(compared.unread, compared.connections) > 20


def test_two_messages_in_one(rig: Rig) -> None:
    """The kernel puts one message into an skb; two are not taken for one."""
    serve(rig)
    rig.hear(message(*FLOW4) * 2)
    assert totals(rig) == (0, 0, 0)
    assert rig.event(Event.CONNTRACK_UNREAD) == 1


def test_two_cpus(rig: Rig) -> None:
    """Heard on two CPUs at once, every message counts."""
    four = serve(rig).vip_id
    in_threads(*[lambda: rig_hear(rig, 20_011)] * 2)
    assert rig.vip(four).connections == (0, 40_022)
    assert totals(rig) == (40_022, 40_022, 0)
    assert rig.event(Event.RECORD_SENT) + rig.event(Event.RECORD_RING_FULL) == 40_022


def rig_hear(rig: Rig, times: int) -> None:
    """Hear one message many times."""
    rig.hear(message(*FLOW4), repeat=times)


def test_sampled(rig: Rig) -> None:
    """Translated flows are sampled by their trace id, which is another one each time; untranslated ones are kept."""
    serve(rig)
    rig.tables.set_settings(EVERYTHING._replace(reject_below=rejection_threshold(0.5)))
    rig.hear(message(*FLOW4), repeat=400)
    sent = rig.event(Event.RECORD_SENT)
    assert 120 < sent < 280
    assert sent + rig.event(Event.RECORD_RATIO) == 400
    assert len({record.trace_id for record in rig.records()}) == sent
    rig.hear(message(FLOW4[0], Tuple(VIP4, CLIENT4)), repeat=23)
    assert len(rig.records()) == 23


def test_rate_of_zero(rig: Rig) -> None:
    """Without records all is counted."""
    serve(rig)
    rig.tables.set_settings(EVERYTHING._replace(record_interval_ns=0))
    rig.hear(message(*FLOW4), repeat=23)
    assert totals(rig) == (23, 23, 0)
    assert (rig.records(), rig.event(Event.RECORD_OFF)) == ([], 23)


def test_no_counters(rig: Rig) -> None:
    """A VIP port whose counters are missing is a defect that is counted."""
    four = serve(rig).vip_id
    rig.loaded.vip_stats.delete(struct.pack("=I", four))
    rig.hear(message(*FLOW4))
    assert rig.event(Event.NO_ROW) == 1
    assert rig.records() == []


NEWS, LIST = False, True


@FAMILIES
@pytest.mark.parametrize(
    ("heard", "counted"),
    [
        ([(LIST, 7)], 1),
        ([(LIST, None)], 1),
        ([(LIST, 7), (LIST, 7)], 1),
        ([(LIST, None), (LIST, None)], 1),
        ([(NEWS, 7), (LIST, 7)], 1),
        ([(NEWS, 7), (LIST, 7), (LIST, 7)], 1),
        ([(LIST, 7), (NEWS, 7)], 1),  # told a moment after it was read
        ([(NEWS, 7), (NEWS, 7)], 2),  # the kernel tells once of an entry: this is another one
        ([(NEWS, 7), (NEWS, 8), (LIST, 8)], 2),
        ([(NEWS, 7), (LIST, 8)], 2),  # the flow began again while nobody listened
        ([(LIST, 7), (NEWS, 8)], 2),
        ([(LIST, 7), (LIST, 0xFFFFFFFF), (LIST, 0xFFFFFFFF)], 2),
    ],
)
def test_listed(rig: Rig, flow: tuple[Tuple, Tuple], heard: list[tuple[bool, int | None]], counted: int) -> None:
    """An entry is counted once, whether it was heard of, read in a list, or both; another of the same flow again."""
    serve(rig, flow)
    for listed, entry in heard:
        rig.hear(message(*flow, listed=listed, entry=entry))
    assert totals(rig) == (counted, counted, 0)
    assert len(rig.records()) == counted
    # Another client's flow is another.
    other = flow[0]._replace(source=flow[0].source._replace(port=4001))
    rig.hear(message(other, flow[1], listed=True, entry=heard[-1][1]))
    assert totals(rig) == (counted + 1, counted + 1, 0)


@pytest.mark.parametrize(("age_ms", "counted"), [(0, 0), (150, 0), (250, 1), (40_000, 1)])
def test_told_long_after_it_was_read(rig: Rig, age_ms: int, counted: int) -> None:
    """News of an entry are late by a moment at most: what comes later is of another one, whatever its id."""
    serve(rig)
    rig.hear(message(*FLOW4, listed=True))
    key = FLOW.pack(CLIENT4.address, VIP4.address, b"\x0f\xa0", b"\0\x35", UDP)
    told = rig.loaded.told_flows.get(key)
    assert told is not None
    read_ns, entry = struct.unpack("=Q4s4x", told)
    assert (read_ns > 0, entry) == (True, b"\0\0\0\7")
    rig.loaded.told_flows.put(key, struct.pack("=Q4s4x", read_ns - age_ms * 1_000_000, entry))
    rig.hear(message(*FLOW4))
    assert totals(rig)[0] == 1 + counted


def test_listed_tcp(rig: Rig) -> None:
    """Of TCP only the node's own calls are counted, and only if asked for, listed or not."""
    serve(rig, transport=Transport.TCP)
    for own_calls, place, counted in ((0, Place.THIS_NODE, 0), (1, Place.INSIDE, 0), (1, Place.THIS_NODE, 1)):
        rig.tables.set_settings(EVERYTHING._replace(own_calls=own_calls))
        rig.places.set({Prefix(HOST, CLIENT4.address): place})
        rig.hear(message(*FLOW4, TCP, listed=True))
        assert totals(rig) == (counted, counted, 0)


@pytest.mark.parametrize(("age_ms", "counted"), [(0, 0), (150, 0), (250, 1), (40_000, 1)])
def test_told_as_a_datagram(rig: Rig, age_ms: int, counted: int) -> None:
    """A packet that lbh_datagram has counted is not counted again if conntrack tells of it after all."""
    serve(rig)
    rig.hear(message(*FLOW4))
    (first,) = rig.records()
    key = FLOW.pack(CLIENT4.address, VIP4.address, b"\x0f\xa0", b"\0\x35", UDP)
    # The clock of the records is the one of the flows.
    rig.flows.put(key, struct.pack("=Q", first.syn_ns - age_ms * 1_000_000))
    rig.hear(message(*FLOW4))
    assert totals(rig)[0] == 1 + counted
    assert rig.event(Event.LATE) == 1 - counted
