"""Whole handshakes, packet by packet: what is counted, and what the record tells."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, NamedTuple

import pytest

from otel_lb_hop.core.ids import trace_id
from otel_lb_hop.core.layout import BOUNDS_NS, Event, OriginCode, Unforwarded, Verdict, pack_port
from otel_lb_hop.model import MAPPED_PREFIX, Policy
from tests.kernel.oracle import ACK, CWR, ECE, FIN, PSH, RST, SYN
from tests.kernel.packets import End, Flow, Wire, next_isn
from tests.kernel.requirements import needs_kernel
from tests.kernel.rig import EVERYTHING, FIRST_RETRANSMIT_NS, NODE, UNSPEC, vip_port

if TYPE_CHECKING:
    from otel_lb_hop.core.layout import Histogram
    from tests.kernel.rig import Marked, Rig, Told

pytestmark = [pytest.mark.root, needs_kernel]


class Family(NamedTuple):
    """Addresses of one family, and the devices that the packets pass."""

    client: str
    vip: str
    snat: str
    near: str
    far: str
    stranger: str
    wire: Wire
    xdp: bool = False

    def flow(self, *, port: int = 80, client_port: int = 40_000, backend: str | None = None) -> Flow:
        """Begin a connection; to the far backend if not told otherwise."""
        ends = End.of(self.client, client_port), End.of(self.vip, port), End.of(self.snat, client_port + 1)
        return Flow(*ends, End.of(backend or self.far, 8080), next_isn(), self.wire)

    def near_end(self) -> End:
        """Name the backend on this node."""
        return End.of(self.near, 8080)

    def far_end(self) -> End:
        """Name the backend on another node."""
        return End.of(self.far, 8080)


V4 = ("8.0.1.5", "8.0.10.1", "8.0.2.1", "8.0.3.7", "8.0.4.7", "8.0.5.7")
V6 = (
    "2001:db8:86dd:1::7", "2001:db8:86dd:10::7", "2001:db8:86dd:2::7",
    "2001:db8:86dd:3::7", "2001:db8:86dd:4::7", "2001:db8:86dd:5::7",
)  # fmt: skip


@pytest.fixture(params=["v4", "v6", "v4-l3", "v6-l3", "v4-xdp", "v6-xdp"])
def family(request: pytest.FixtureRequest) -> Family:
    """Take each test through both families, with and without Ethernet header, and with ingress watched by XDP."""
    words = request.param.split("-")
    return Family(*(V4 if words[0] == "v4" else V6), Wire(words[-1] != "l3"), xdp=words[-1] == "xdp")


class Node:
    """A node with one VIP port, on port 80."""

    def __init__(self, rig: Rig, family: Family) -> None:
        self.rig, self.family = rig, family
        rig.xdp = family.xdp
        self.ethernet = family.wire.is_ethernet
        self.marked = self.serve()

    def serve(self, *, near: bool = True, far: bool = True, ready: bool = True, local: bool = False) -> Marked:
        """Give the VIP port its backends: one near, one far."""
        backends = [(self.family.near_end(), NODE)] * near + [(self.family.far_end(), "node2")] * far
        policy = Policy.LOCAL if local else Policy.CLUSTER
        vip = End.of(self.family.vip, 80)
        (self.marked,) = self.rig.serve(vip_port(vip, *backends, ready=ready, policy=policy))
        return self.marked

    def into(self, packet: bytes, interface: int | None = None) -> None:
        """Let a packet in."""
        self.rig.into(packet, interface, ethernet=self.ethernet)

    def out(self, packet: bytes, interface: int | None = None) -> None:
        """Let a packet out."""
        self.rig.out(packet, interface, ethernet=self.ethernet)

    def record(self) -> Told:
        """Take the only record."""
        (record,) = self.rig.records()
        return record

    def events(self) -> dict[Event, int]:
        """Read the events that are not zero."""
        return {event: count for event, count in zip(Event, self.rig.tables.events(), strict=True) if count}


@pytest.fixture
def node(rig: Rig, family: Family) -> Node:
    """Give a test a node with a VIP port that has a near and a far backend."""
    return Node(rig, family)


def observed_once(histogram: Histogram, duration_ns: int) -> bool:
    """Whether exactly this one duration stands in a histogram."""
    bucket = sum(duration_ns > bound for bound in BOUNDS_NS)
    return histogram.sum_ns == duration_ns and histogram.buckets == tuple(
        int(number == bucket) for number in range(len(BOUNDS_NS) + 1)
    )


def test_answered(node: Node) -> None:
    """SYN in, translated SYN out, SYN-ACK out: counted once everywhere, and every field of the record is right."""
    flow = node.family.flow()
    before = time.monotonic_ns()
    node.into(flow.syn())
    node.out(flow.translated())
    node.out(flow.answer(), node.rig.uplink)
    after = time.monotonic_ns()
    record = node.record()
    hop_id = node.marked.hops["avoidable", "node2"]
    trace = trace_id(
        flow.snat.address, pack_port(flow.snat.port), flow.backend.address, pack_port(flow.backend.port), flow.isn
    )
    assert record.trace_id == trace.to_bytes(16)
    assert before <= record.syn_ns <= record.forward_ns <= record.end_ns <= after
    assert record[4:] == (
        flow.client.address, flow.snat.address, flow.client.port, flow.snat.port, 0,
        flow.backend.address, pack_port(flow.backend.port),
        Verdict.ANSWERED, OriginCode.EXTERNAL, node.marked.vip_id, hop_id, node.rig.uplink, 1,
    )  # fmt: skip
    snapshot = node.rig.snapshot()
    assert snapshot.vips == {node.marked.vip_id: ((0, 1), ((0, 0, 0), (0, 0, 0)), 0)}
    row = snapshot.hops.pop(hop_id)
    assert row[:6] == ((0, 1), 1, 0, 0, 0, 0)
    assert observed_once(row.forward, record.forward_ns - record.syn_ns)
    assert observed_once(row.handshake, record.end_ns - record.syn_ns)
    assert not any(any(other.forwarded) or other.answered for other in snapshot.hops.values())
    assert node.events() == {Event.RECORD_SENT: 1}


def test_settled_stays_settled(node: Node) -> None:
    """What comes after the verdict of an answered connection changes nothing but retransmits."""
    flow = node.family.flow()
    node.into(flow.syn())
    for _ in range(3):
        node.out(flow.translated())
        node.out(flow.answer())
        node.out(flow.refusal())
    node.rig.sweep()
    node.into(flow.syn())
    node.out(flow.translated())
    assert node.record().verdict == Verdict.ANSWERED
    assert node.rig.vip(node.marked.vip_id) == ((0, 1), ((0, 0, 0), (0, 0, 0)), 1)
    assert node.rig.hop(node.marked.hops["avoidable", "node2"])[:6] == ((0, 1), 1, 0, 0, 0, 0)
    assert node.events() == {Event.RECORD_SENT: 1}


@pytest.mark.parametrize(
    ("hop", "near", "backend"),
    [("none", True, "near"), ("avoidable", True, "far"), ("required", False, "far"), ("unknown", True, "stranger")],
)
def test_hop_row(node: Node, hop: str, near: bool, backend: str) -> None:  # noqa: FBT001
    """A connection is counted in the row of its hop class, an unknown backend in the VIP port's own."""
    marked = node.serve(near=near)
    flow = node.family.flow(backend=getattr(node.family, backend))
    node.into(flow.syn())
    node.out(flow.translated())
    node.out(flow.answer())
    expected = marked.hops[hop, {"near": NODE, "far": "node2", "stranger": None}[backend]]
    assert (expected == marked.vip_id) is (hop == "unknown")
    assert node.record().hop_id == expected
    hops = node.rig.snapshot().hops
    assert {number: row.forwarded for number, row in hops.items() if any(row.forwarded)} == {expected: (0, 1)}
    assert hops[expected].answered == hops[expected].forward.observations == hops[expected].handshake.observations == 1


def test_backend_port_is_part_of_the_backend(node: Node) -> None:
    """The address of a backend with another port is a backend that is not known."""
    flow = node.family.flow()
    flow = flow._replace(backend=End(flow.backend.address, 8081))
    node.into(flow.syn())
    node.out(flow.translated())
    assert node.rig.hop(node.marked.vip_id).forwarded == (0, 1)


def test_internal_origin(node: Node) -> None:
    """A SYN that came in by no uplink began inside."""
    flow = node.family.flow()
    node.into(flow.syn(), node.rig.pod)
    node.out(flow.translated(), node.rig.uplink)
    node.out(flow.answer(), node.rig.pod)
    record = node.record()
    assert (record.origin, record.in_ifindex) == (OriginCode.INTERNAL, node.rig.pod)
    assert node.rig.vip(node.marked.vip_id).connections == (1, 0)
    assert node.rig.hop(node.marked.hops["avoidable", "node2"]).forwarded == (1, 0)


def test_answer_without_translation(node: Node) -> None:
    """A SYN-ACK whose translated SYN passed no hook: forwarded, answered, the hop unknown, no forward time."""
    flow = node.family.flow()
    node.into(flow.syn())
    node.out(flow.answer())
    record = node.record()
    assert (record.verdict, record.hop_id, record.forward_ns) == (Verdict.ANSWERED, node.marked.vip_id, 0)
    row = node.rig.hop(node.marked.vip_id)
    assert row[:6] == ((0, 1), 1, 0, 0, 0, 0)
    assert row.forward.observations == 0
    assert observed_once(row.handshake, record.end_ns - record.syn_ns)


def test_untranslated_trace_id(node: Node) -> None:
    """A connection that was not translated has the trace id of the client's own tuple."""
    flow = node.family.flow()
    node.into(flow.syn())
    node.rig.sweep()
    record = node.record()
    trace = trace_id(flow.client.address, pack_port(flow.client.port), flow.vip.address, pack_port(80), flow.isn)
    assert record.trace_id == trace.to_bytes(16)


def test_refused_by_the_backend(node: Node) -> None:
    """RST after the translated SYN: forwarded, refused, no handshake time."""
    flow = node.family.flow()
    node.into(flow.syn())
    node.out(flow.translated())
    node.out(flow.refusal())
    record = node.record()
    row = node.rig.hop(node.marked.hops["avoidable", "node2"])
    assert record.verdict == Verdict.REFUSED
    assert record.syn_ns <= record.forward_ns <= record.end_ns
    assert row[:6] == ((0, 1), 0, 1, 0, 0, 0)
    assert row.handshake.observations == row.handshake.sum_ns == 0


@pytest.mark.parametrize("how", ["refused", "swept"])
@pytest.mark.parametrize("reason", list(Unforwarded))
def test_unforwarded(node: Node, reason: Unforwarded, how: str) -> None:
    """Never translated, then refused by this node or never answered: unforwarded, for the VIP port's reason."""
    if reason is Unforwarded.NO_ENDPOINTS:
        node.serve(ready=False)
    if reason is Unforwarded.NO_LOCAL_ENDPOINTS:
        node.serve(near=False, local=True)
    flow = node.family.flow()
    node.into(flow.syn())
    if how == "refused":
        node.out(flow.refusal())
    else:
        node.rig.sweep()
    record = node.record()
    assert record.verdict == Verdict.DROPPED + reason
    assert (record.hop_id, record.forward_ns) == (node.marked.vip_id, 0)
    vip = node.rig.vip(node.marked.vip_id)
    assert vip.connections == (0, 1)
    assert vip.unforwarded[OriginCode.INTERNAL] == (0, 0, 0)
    assert vip.unforwarded[OriginCode.EXTERNAL] == tuple(int(each is reason) for each in Unforwarded)
    assert not any(any(row.forwarded) or row.refused for row in node.rig.snapshot().hops.values())


def test_policy_local_binds_only_what_comes_from_outside(node: Node) -> None:
    """A pod's call to a VIP of policy Local is forwarded to any node: a loss has another reason."""
    node.serve(near=False, local=True)
    node.into(node.family.flow().syn(), node.rig.pod)
    node.rig.sweep()
    assert node.record().verdict == Verdict.DROPPED
    assert node.rig.vip(node.marked.vip_id).unforwarded == ((1, 0, 0), (0, 0, 0))


def test_a_syn_sent_again_counts_where_the_first_one_did(node: Node) -> None:
    """A VIP port that goes over to other counters between two SYNs takes no retransmission of the first along."""
    flow = node.family.flow()
    before = node.marked.vip_id
    node.into(flow.syn())
    after = node.serve(local=True).vip_id
    node.into(flow.syn())
    assert before != after
    assert (node.rig.vip(before).retransmits, node.rig.vip(after).retransmits) == (1, 0)


def test_reason_is_that_of_the_beginning(node: Node) -> None:
    """A VIP port that loses its backends after the SYN does not change why that one was not forwarded."""
    node.into(node.family.flow().syn())
    node.serve(ready=False)
    node.rig.sweep()
    assert node.rig.vip(node.marked.vip_id).unforwarded[OriginCode.EXTERNAL] == (1, 0, 0)


def test_open_until_swept(node: Node) -> None:
    """Without an answer there is no verdict until the time for it has come."""
    node.rig.tables.set_settings(EVERYTHING._replace(verdict_after_ns=60 * 10**9))
    flow, other = node.family.flow(), node.family.flow(client_port=41_000)
    node.into(flow.syn())
    node.out(flow.translated())
    node.into(other.syn())
    node.rig.sweep()
    assert node.rig.records() == []
    row = node.rig.hop(node.marked.hops["avoidable", "node2"])
    assert row[:6] == ((0, 1), 0, 0, 0, 0, 0)
    assert node.rig.vip(node.marked.vip_id) == ((0, 2), ((0, 0, 0), (0, 0, 0)), 0)
    node.rig.tables.set_settings(EVERYTHING)
    node.rig.age(FIRST_RETRANSMIT_NS)
    node.rig.sweep()
    assert {record.verdict for record in node.rig.records()} == {Verdict.REPLY_UNSEEN, Verdict.DROPPED}


@pytest.mark.parametrize("again", [0, 1, 3])
def test_no_answer(node: Node, again: int) -> None:
    """Forwarded and not answered: a time-out if the client sent its SYN again, else the reply was not seen."""
    flow = node.family.flow()
    node.into(flow.syn())
    node.out(flow.translated())
    for _ in range(again):
        node.into(flow.syn())
        node.out(flow.translated())
    before = time.monotonic_ns()
    node.rig.age(FIRST_RETRANSMIT_NS)
    node.rig.sweep()
    node.rig.sweep()
    record = node.record()
    row = node.rig.hop(node.marked.hops["avoidable", "node2"])
    assert record.verdict == (Verdict.TIMEOUT if again else Verdict.REPLY_UNSEEN)
    assert record.retransmits == again == node.rig.vip(node.marked.vip_id).retransmits
    assert record.syn_ns + FIRST_RETRANSMIT_NS <= before <= record.end_ns
    assert row[:6] == ((0, 1), 0, 0, int(again > 0), int(again == 0), 0)


@pytest.mark.parametrize("again", [0, 1])
def test_swept_early(node: Node, again: int) -> None:
    """Swept before the client could send its SYN again: no verdict, unless it has done so already."""
    flow = node.family.flow()
    node.into(flow.syn())
    node.out(flow.translated())
    for _ in range(again):
        node.into(flow.syn())
    node.rig.sweep()
    row = node.rig.hop(node.marked.hops["avoidable", "node2"])
    assert row[:6] == ((0, 1), 0, 0, again, 0, 1 - again)
    assert len(node.rig.records()) == again
    assert node.events() == {Event.RECORD_SENT if again else Event.RECORD_NO_VERDICT: 1}


def test_late(node: Node) -> None:
    """Translated or answered after the verdict: said so, and nothing else is changed."""
    never, quiet = node.family.flow(), node.family.flow(client_port=41_000)
    node.into(never.syn())
    node.into(quiet.syn())
    node.out(quiet.translated())
    node.rig.age(FIRST_RETRANSMIT_NS)
    node.rig.sweep()
    before = node.rig.snapshot()
    assert len(node.rig.records()) == 2
    node.out(never.translated())
    node.out(never.answer())
    node.out(quiet.answer())
    node.out(quiet.translated())
    node.out(quiet.refusal())
    after = node.rig.snapshot()
    assert after[:2] == before[:2]
    assert after.events[Event.LATE] == 3
    assert node.rig.records() == []


def test_syn_again_after_the_verdict(node: Node) -> None:
    """A client that goes on sending its SYN after the verdict is still the same connection."""
    flow = node.family.flow()
    node.into(flow.syn())
    node.rig.sweep()
    node.into(flow.syn())
    assert node.rig.vip(node.marked.vip_id) == ((0, 1), ((0, 0, 0), (1, 0, 0)), 1)


def test_same_packet_on_another_interface(node: Node) -> None:
    """A bridge and its port both show the SYN: one connection, and only what the first one sees is sent again."""
    flow = node.family.flow()
    for _ in range(4):
        node.into(flow.syn())
        node.into(flow.syn(), node.rig.peer)
    assert node.rig.vip(node.marked.vip_id) == ((0, 1), ((0, 0, 0), (0, 0, 0)), 3)


XDP_AND_TC = pytest.mark.parametrize("family", ["v4-xdp", "v6-xdp"], indirect=True)


@XDP_AND_TC
@pytest.mark.parametrize("order", [(True, False), (False, True)], ids=["xdp-tc", "tc-xdp"])
def test_same_packet_on_both_hooks(node: Node, order: tuple[bool, bool]) -> None:
    """While an uplink goes over from one hook to the other both see each SYN: it counts once, one sent again once."""
    flow = node.family.flow()
    for times in range(3):
        for node.rig.xdp in order:
            node.into(flow.syn())
        stats = node.rig.vip(node.marked.vip_id)
        assert (stats.connections, stats.retransmits) == ((0, 1), times)


@XDP_AND_TC
@pytest.mark.parametrize("xdp", [True, False], ids=["to-xdp", "to-tc"])
def test_again_on_the_other_hook(node: Node, *, xdp: bool) -> None:
    """A SYN that is sent again after its uplink went over to the other hook is a retransmission."""
    flow = node.family.flow()
    node.rig.xdp = not xdp
    node.into(flow.syn())
    node.rig.age(FIRST_RETRANSMIT_NS)
    node.rig.xdp = xdp
    node.into(flow.syn())
    stats = node.rig.vip(node.marked.vip_id)
    assert (stats.connections, stats.retransmits) == ((0, 1), 1)


def test_again_by_another_interface(node: Node) -> None:
    """Long after the first, a SYN on another interface is no longer the same packet: it was sent again."""
    flow = node.family.flow()
    node.into(flow.syn())
    time.sleep(0.21)
    node.into(flow.syn(), node.rig.peer)
    assert node.rig.vip(node.marked.vip_id) == ((0, 1), ((0, 0, 0), (0, 0, 0)), 1)


def test_first_translation_counts(node: Node) -> None:
    """A translated SYN that passes a bridge and a veth is taken once, on the first of them."""
    flow = node.family.flow()
    node.into(flow.syn())
    node.out(flow.translated(), node.rig.peer)
    between_ns = time.monotonic_ns()
    node.out(flow.translated(), node.rig.pod)
    node.out(flow.answer())
    assert node.record().forward_ns < between_ns
    assert node.rig.hop(node.marked.hops["avoidable", "node2"]).forwarded == (0, 1)


def test_routed_on_is_no_translation(node: Node) -> None:
    """A SYN that leaves for the VIP as it came is not translated; the one that leaves later for a backend is."""
    flow = node.family.flow()
    node.into(flow.syn())
    node.out(flow.syn())
    assert not any(any(row.forwarded) for row in node.rig.snapshot().hops.values())
    node.out(flow.translated())
    assert node.rig.hop(node.marked.hops["avoidable", "node2"]).forwarded == (0, 1)
    assert node.events() == {}


def test_shared_isn(node: Node) -> None:
    """Two clients with one ISN: the younger is taken for the first translation and that is said, then the other."""
    older = node.family.flow()
    younger = older._replace(client=End(older.client.address, 41_000), snat=End(older.snat.address, 41_001))
    node.into(older.syn())
    node.into(younger.syn())
    assert node.rig.vip(node.marked.vip_id).connections == (0, 2)
    node.out(younger.translated())
    assert node.rig.event(Event.ISN_SHARED) == 1
    node.out(older.translated())
    assert node.rig.event(Event.ISN_SHARED) == 1
    node.out(older.answer())
    node.out(younger.answer())
    told = [(record.client_port, record.snat_port) for record in node.rig.records()]
    assert told == [(each.client.port, each.snat.port) for each in (older, younger)]


def test_isn_wraps(node: Node) -> None:
    """An ISN of 2^32 - 1 is acknowledged with 0."""
    flow = node.family.flow()._replace(isn=0xFFFFFFFF)
    node.into(flow.syn())
    node.out(flow.translated())
    node.out(flow.answer())
    assert node.record().verdict == Verdict.ANSWERED


@pytest.mark.parametrize("flags", [0, ACK, FIN, RST, SYN | FIN, SYN | RST, SYN | ACK, RST | ACK, SYN | FIN | PSH, 0xFF])
def test_no_syn(node: Node, flags: int) -> None:
    """Flags that are no plain SYN begin no connection."""
    node.into(node.family.flow().syn(flags))
    assert node.rig.vip(node.marked.vip_id).connections == (0, 0)
    assert node.events() == {}


@pytest.mark.parametrize("flags", [SYN | ECE | CWR, SYN | PSH, SYN | 0x20])
def test_syn_with_more(node: Node, flags: int) -> None:
    """ECN (RFC 3168, 6.1.1), PSH and URG do not hide a SYN, nor its translation, nor its answer."""
    flow = node.family.flow()
    node.into(flow.syn(flags))
    node.out(flow.translated(flags))
    node.out(flow.answer(SYN | ACK | ECE))
    assert node.record().verdict == Verdict.ANSWERED


@pytest.mark.parametrize("flags", [ACK, SYN, RST, FIN | ACK, SYN | ACK | FIN, SYN | ACK | RST, RST | ACK | FIN])
def test_no_answer_flags(node: Node, flags: int) -> None:
    """Only SYN-ACK and RST-ACK end a handshake."""
    flow = node.family.flow()
    node.into(flow.syn())
    node.out(flow.translated())
    node.out(flow.answer(flags))
    assert node.rig.records() == []
    assert node.rig.hop(node.marked.hops["avoidable", "node2"])[:6] == ((0, 1), 0, 0, 0, 0, 0)


def test_directions_are_told_apart(node: Node) -> None:
    """A SYN to a VIP port that only leaves, and answers that only come in, are nothing."""
    flow = node.family.flow()
    node.out(flow.syn())
    node.into(flow.answer())
    node.into(flow.syn())
    node.into(flow.translated())
    node.into(flow.answer())
    node.into(flow.refusal())
    assert node.rig.records() == []
    assert node.rig.vip(node.marked.vip_id) == ((0, 1), ((0, 0, 0), (0, 0, 0)), 0)
    assert not any(any(row.forwarded) for row in node.rig.snapshot().hops.values())


def flipped(end: End, bit: int) -> End:
    """Change one bit of an end: of its port, then of its address."""
    number = int.from_bytes(end.address + end.port.to_bytes(2, "big"), "big") ^ 1 << bit
    raw = number.to_bytes(18, "big")
    return End(raw[:16], int.from_bytes(raw[16:], "big"))


def sendable_bits(end: End) -> range:
    """Which bits of an end can be sent: an IPv4 packet has no others."""
    return range(16 + (32 if end.address.startswith(MAPPED_PREFIX) else 128))


def test_one_bit_is_another_destination(node: Node) -> None:
    """A SYN whose destination differs in any one bit from the VIP port is not counted."""
    family, rig = node.family, node.rig
    flow = family.flow()
    for bit in sendable_bits(flow.vip):
        node.into(flow._replace(vip=flipped(flow.vip, bit), isn=next_isn()).syn())
    assert rig.vip(node.marked.vip_id).connections == (0, 0)


def test_one_bit_is_another_client(node: Node) -> None:
    """A SYN or answer that differs in one bit of either end, or in the ISN, is of another connection."""
    family, rig = node.family, node.rig
    flow = family.flow()
    node.into(flow.syn())
    node.out(flow.translated())
    for bit in sendable_bits(flow.client):
        node.out(flow._replace(client=flipped(flow.client, bit)).answer())
        node.out(flow._replace(vip=flipped(flow.vip, bit)).answer())
    for bit in range(32):
        node.out(flow._replace(isn=flow.isn ^ 1 << bit).answer())
        node.out(flow._replace(isn=flow.isn ^ 1 << bit).translated())
    assert rig.records() == []
    for count, bit in enumerate((0, 15, 16, 20, 31), start=2):
        node.into(flow._replace(client=flipped(flow.client, bit)).syn())
        assert rig.vip(node.marked.vip_id) == ((0, count), ((0, 0, 0), (0, 0, 0)), 0)
    node.out(flow.answer())
    assert node.record().verdict == Verdict.ANSWERED


def test_family_is_part_of_the_address(rig: Rig) -> None:
    """A VIP of one family is not met by the same bytes of the other: ::8.0.10.1 is not 8.0.10.1."""
    ipv4, ipv6 = Family(*V4, Wire()), Family(*V6, Wire())
    node = Node(rig, ipv4)
    flow = ipv6.flow()
    low = End(bytes(12) + End.of(ipv4.vip, 80).address[12:], 80)
    node.into(flow._replace(vip=low).syn())
    assert rig.vip(node.marked.vip_id).connections == (0, 0)


def test_two_vip_ports(rig: Rig, family: Family) -> None:
    """Two ports of one VIP are two rows, and one backend behind both is two hop rows."""
    backend = (family.far_end(), "node2")
    web, admin = rig.serve(vip_port(End.of(family.vip, 80), backend), vip_port(End.of(family.vip, 81), backend))
    for port, count in ((80, 2), (81, 3)):
        for number in range(count):
            flow = family.flow(port=port, client_port=40_000 + number)
            rig.into(flow.syn(), ethernet=family.wire.is_ethernet)
            rig.out(flow.translated(), ethernet=family.wire.is_ethernet)
    assert (rig.vip(web.vip_id).connections, rig.vip(admin.vip_id).connections) == ((0, 2), (0, 3))
    assert rig.hop(web.hops["required", "node2"]).forwarded == (0, 2)
    assert rig.hop(admin.hops["required", "node2"]).forwarded == (0, 3)


def test_missing_rows_are_told(node: Node) -> None:
    """An id without a row of counters is a defect that shows in the events, and disturbs nothing else."""
    flow = node.family.flow()
    node.into(flow.syn())
    hop_id = node.marked.hops["avoidable", "node2"]
    node.rig.loaded.hop_stats.delete(hop_id.to_bytes(4, "little"))
    node.out(flow.translated())
    node.rig.loaded.vip_stats.delete(node.marked.vip_id.to_bytes(4, "little"))
    node.into(node.family.flow().syn())
    assert node.events() == {Event.NO_ROW: 2}


def test_removed_vip_port(node: Node) -> None:
    """A VIP port that is taken away counts no new connection; the ones it has are forwarded in its rows."""
    flow = node.family.flow()
    marked = node.marked
    node.into(flow.syn())
    node.rig.serve()
    node.into(node.family.flow(client_port=41_000).syn())
    node.out(flow.translated())
    assert node.rig.vip(marked.vip_id).connections == (0, 1)
    assert node.rig.hop(marked.vip_id).forwarded == (0, 1)
    assert node.events() == {}


@pytest.mark.parametrize("change", ["removed", "policy"])
def test_answer_after_a_change_of_the_vip_port(node: Node, change: str) -> None:
    """A handshake that was open when its VIP port was taken away, or got another policy, is still answered."""
    flow = node.family.flow()
    marked = node.marked
    node.into(flow.syn())
    node.out(flow.translated())
    if change == "removed":
        node.rig.serve()
    else:
        node.serve(local=True)
    node.out(flow.answer())
    assert node.rig.hop(marked.hops["avoidable", "node2"]).answered == 1


def test_syn_again_after_a_change_of_policy(node: Node) -> None:
    """A SYN sent again after its Service got another policy is no new connection."""
    flow = node.family.flow()
    node.into(flow.syn())
    node.serve(local=True)
    node.into(flow.syn())
    assert sum(vip.connections[OriginCode.EXTERNAL] for vip in node.rig.snapshot().vips.values()) == 1


def test_without_vip_ports(rig: Rig) -> None:
    """With empty tables every packet passes, and nothing is counted."""
    flow = Family(*V4, Wire()).flow()
    for packet in (flow.syn(), flow.translated(), flow.answer(), flow.refusal()):
        rig.into(packet)
        rig.out(packet)
    rig.sweep()
    assert not any(rig.tables.events())
    assert UNSPEC == 2**32 - 1
