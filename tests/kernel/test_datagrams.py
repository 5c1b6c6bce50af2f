"""Datagrams to VIP ports without endpoints: each flow is one connection that was never forwarded."""

from __future__ import annotations

import struct
import threading
from typing import TYPE_CHECKING

import pytest

from otel_lb_hop.core.layout import Event, Verdict
from otel_lb_hop.model import Policy, Transport, is_ipv4
from tests.kernel.crossing import sctp_init
from tests.kernel.oracle import CTAG, FRAGMENT, STAG
from tests.kernel.packets import End, Extension, ethernet, ipv4, ipv6, tagged, tcp
from tests.kernel.requirements import needs_kernel
from tests.kernel.rig import FLOW, in_threads, vip_port
from tests.kernel.test_conntrack_messages import totals

if TYPE_CHECKING:
    from tests.kernel.rig import Rig

pytestmark = [pytest.mark.root, needs_kernel]

VIP4, VIP6 = End.of("8.0.10.1", 53), End.of("fd00:10:86dd::1", 53)
CLIENT4, CLIENT6 = End.of("8.0.1.5", 4000), End.of("fd00:1:86dd::5", 4000)
BACKEND = End.of("8.0.4.7", 5353)
ENDS = {"v4": (CLIENT4, VIP4), "v6": (CLIENT6, VIP6)}
FAMILIES = pytest.mark.parametrize("family", ENDS)
SECOND = 1_000_000_000
RACES = 4_000
EXTENSIONS = (Extension(0), Extension(60, 2), Extension(FRAGMENT, offset_flags=1))


def udp(source_port: int, destination_port: int) -> bytes:
    """Build a UDP header with some bytes behind it."""
    return struct.pack("!HHHH", source_port, destination_port, 20, 0) + b"what is this"


def packet(source: End, destination: End, *, transport: int = 17, payload: bytes | None = None) -> bytes:
    """Build an IP packet, of UDP or with an SCTP INIT if not told otherwise."""
    if payload is None:
        payload = (udp if transport == 17 else sctp_init)(source.port, destination.port)
    if is_ipv4(source.address):
        return ipv4(source.address, destination.address, payload, protocol=transport)
    return ipv6(source.address, destination.address, payload, last=transport)


def serve(rig: Rig, transport: Transport = Transport.UDP) -> None:
    """Give the node a VIP port of each family without endpoints."""
    rig.serve(vip_port(VIP4, transport=transport), vip_port(VIP6, transport=transport))


@FAMILIES
@pytest.mark.parametrize("transport", [Transport.UDP, Transport.SCTP])
def test_one_flow(rig: Rig, family: str, transport: Transport) -> None:
    """All packets of a flow are one connection, wherever they pass; the record names where the first came in."""
    client, vip = ENDS[family]
    serve(rig, transport)
    for interface in (rig.uplink, rig.uplink, rig.pod):
        rig.datagram(ethernet(packet(client, vip, transport=transport)), interface)
    rig.datagram(packet(client, vip, transport=transport), rig.pod, ethernet=False)
    assert totals(rig) == (1, 0, 1)
    (record,) = rig.records()
    assert (record.verdict, record.origin, record.in_ifindex) == (Verdict.NO_ENDPOINTS, 1, rig.uplink)
    assert (record.client, record.client_port) == (client.address, 4000)
    assert (record.forward_ns, record.snat, record.backend) == (0, bytes(16), bytes(16))
    assert record.syn_ns == record.end_ns > 0
    rig.datagram(ethernet(packet(client._replace(port=4001), vip, transport=transport)), rig.pod)
    assert totals(rig) == (2, 0, 2)
    assert [each.origin for each in rig.records()] == [0]


@pytest.mark.parametrize(("gap_seconds", "counted"), [(0, 1), (29, 1), (31, 2)])
def test_gap(rig: Rig, gap_seconds: int, counted: int) -> None:
    """Packets of one client 30 seconds apart are two flows, as they would be two entries of conntrack."""
    serve(rig)
    frame = ethernet(packet(CLIENT4, VIP4))
    rig.datagram(frame)
    (first,) = rig.records()
    key = FLOW.pack(CLIENT4.address, VIP4.address, b"\x0f\xa0", b"\0\x35", 17)
    assert rig.flows.get(key) == struct.pack("=Q", first.syn_ns)
    rig.flows.put(key, struct.pack("=Q", first.syn_ns - gap_seconds * SECOND))
    for _ in range(3):
        rig.datagram(frame)
    assert totals(rig) == (counted, 0, counted)


def test_reasons(rig: Rig) -> None:
    """It counts under the reason of the VIP port; with endpoints it is conntrack's to count."""
    away = End.of("8.0.10.2", 53), End.of("8.0.10.3", 53)
    rig.serve(
        vip_port(VIP4, transport=Transport.UDP),
        vip_port(away[0], (BACKEND, "node2"), policy=Policy.LOCAL, transport=Transport.UDP),
        vip_port(away[1], (BACKEND, "node2"), transport=Transport.UDP),
    )
    for vip in (VIP4, *away):
        rig.datagram(ethernet(packet(CLIENT4, vip)))
    assert [record.verdict for record in rig.records()] == [Verdict.NO_ENDPOINTS, Verdict.NO_LOCAL_ENDPOINTS]
    assert totals(rig) == (2, 0, 2)
    assert len(list(rig.flows.keys())) == 2


def test_policy_local_is_for_what_comes_from_outside(rig: Rig) -> None:
    """Without endpoints here, what a pod sends is forwarded all the same: conntrack tells; without any, it is not."""
    other = End.of("8.0.10.2", 53)
    rig.serve(
        vip_port(VIP4, (BACKEND, "node2"), policy=Policy.LOCAL, transport=Transport.UDP),
        vip_port(other, policy=Policy.LOCAL, transport=Transport.UDP),
    )
    for vip in (VIP4, other):
        rig.datagram(ethernet(packet(CLIENT4, vip)), rig.pod)
    assert [(record.verdict, record.origin) for record in rig.records()] == [(Verdict.NO_ENDPOINTS, 0)]
    rig.datagram(ethernet(packet(CLIENT4, VIP4)))
    assert [(record.verdict, record.origin) for record in rig.records()] == [(Verdict.NO_LOCAL_ENDPOINTS, 1)]
    assert totals(rig) == (2, 0, 2)


def test_transports_do_not_mix(rig: Rig) -> None:
    """A UDP VIP port is nothing to TCP and SCTP, nor the other way round."""
    serve(rig)
    rig.datagram(ethernet(packet(CLIENT4, VIP4, transport=132)))
    syn = ethernet(packet(CLIENT4, VIP4, transport=6, payload=tcp(4000, 53, 77)))
    rig.into(syn)
    rig.datagram(syn)
    rig.into(ethernet(packet(CLIENT4, VIP4)))
    rig.out(ethernet(packet(CLIENT4, VIP4)))
    assert totals(rig) == (0, 0, 0)
    rig.serve(vip_port(VIP4), vip_port(VIP6))
    rig.datagram(ethernet(packet(CLIENT4, VIP4)))
    rig.datagram(syn)
    assert totals(rig) == (0, 0, 0)
    assert not any(rig.tables.events())


@pytest.mark.parametrize("chunk", [0, 2, 3, 10, 14])
def test_only_init(rig: Rig, chunk: int) -> None:
    """Of SCTP only the INIT begins an association."""
    serve(rig, Transport.SCTP)
    rig.datagram(ethernet(packet(CLIENT4, VIP4, transport=132, payload=sctp_init(4000, 53, chunk))))
    assert totals(rig) == (0, 0, 0)


@pytest.mark.parametrize("tags", [(), (CTAG,), (STAG, CTAG)])
def test_tags_options_extensions(rig: Rig, tags: tuple[int, ...]) -> None:
    """VLAN tags, IPv4 options and IPv6 extension headers are followed; first fragments have ports, later ones none."""
    serve(rig)
    payload = udp(4000, 53)
    frames = [
        ethernet(ipv4(CLIENT4.address, VIP4.address, payload, options=bytes(8), protocol=17), tags=tags),
        ethernet(ipv4(CLIENT4.address, VIP4.address, payload, fragment=0x2000, protocol=17), tags=tags),
        ethernet(ipv4(CLIENT4.address, VIP4.address, payload, fragment=0x2005, protocol=17), tags=tags),
        ethernet(ipv6(CLIENT6.address, VIP6.address, payload, chain=EXTENSIONS, last=17), tags=tags),
        ethernet(
            ipv6(CLIENT6.address, VIP6.address, payload, chain=(Extension(FRAGMENT, offset_flags=8),), last=17),
            tags=tags,
        ),
    ]
    counts = []
    for frame in frames:
        rig.datagram(frame)
        counts.append(totals(rig)[0])
        for key in list(rig.flows.keys()):
            rig.flows.delete(key)
    assert counts == [1, 2, 2, 3, 3]
    assert not any(rig.tables.events()[Event.TRUNCATED :])


@FAMILIES
@pytest.mark.parametrize("transport", [17, 132])
def test_cut_at_every_byte(rig: Rig, family: str, transport: int) -> None:
    """Cut behind its IP header it is counted as truncated, and cut before that by lbh_ingress, once."""
    client, vip = ENDS[family]
    serve(rig, Transport(transport))
    whole = tagged(ethernet(packet(client, vip, transport=transport)))
    begin = 18 + (20 if family == "v4" else 40)
    needed = begin + (20 if transport == 17 else 32)  # as long as it says that it is
    for end in range(16, len(whole) + 1):
        rig.datagram(whole[:end])
        rig.into(whole[:end])
    assert totals(rig) == (1, 0, 1)
    # Within the VLAN tag two lengths are too short, within the IP header all are.
    before = rig.event(Event.TRUNCATED) - (needed - begin)
    for key in list(rig.flows.keys()):
        rig.flows.delete(key)
    rig.datagram(whole[: needed - 1])
    assert totals(rig) == (1, 0, 1)
    rig.datagram(whole[:needed])
    assert totals(rig) == (2, 0, 2)
    assert before == begin - 16


@pytest.mark.parametrize("known", [False, True])
def test_two_cpus(rig: Rig, *, known: bool) -> None:
    """Two packets of one flow at one time on two CPUs are one connection; so they are where an old flow is known."""
    serve(rig)
    frames = [ethernet(packet(CLIENT4._replace(port=port), VIP4)) for port in range(RACES)]
    if known:
        for port in range(RACES):
            key = FLOW.pack(CLIENT4.address, VIP4.address, port.to_bytes(2, "big"), b"\0\x35", 17)
            rig.flows.put(key, struct.pack("=Q", 1))
    together = threading.Barrier(2, timeout=30)

    def send() -> None:
        for frame in frames:
            together.wait()
            rig.datagram(frame)

    in_threads(*[send] * 2)
    assert totals(rig) == (RACES, 0, RACES)


def test_more_flows_than_are_remembered(narrow: Rig) -> None:
    """Each flow counts, however few are remembered."""
    narrow.serve(vip_port(VIP4, transport=Transport.UDP))
    for port in range(500):
        narrow.datagram(ethernet(packet(CLIENT4._replace(port=port), VIP4)))
    assert totals(narrow) == (500, 0, 500)


def test_no_counters(rig: Rig) -> None:
    """A VIP port whose counters are missing is a defect that is counted."""
    serve(rig)
    for key in list(rig.loaded.vip_stats.keys()):
        rig.loaded.vip_stats.delete(key)
    rig.datagram(ethernet(packet(CLIENT4, VIP4)))
    assert rig.event(Event.NO_ROW) == 1
    assert rig.records() == []
