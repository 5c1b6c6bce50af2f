"""Real flows through a real NAT, told by the kernel's conntrack to the filter on its socket."""

from __future__ import annotations

import errno
import os
import socket
import struct
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

from otel_lb_hop.core.interfaces import find_places, find_uplinks, gateway_links
from otel_lb_hop.core.layout import Event, Verdict
from otel_lb_hop.errors import KernelError
from otel_lb_hop.kernel import conntrack
from otel_lb_hop.kernel.bpf import run_program
from otel_lb_hop.kernel.conntrack import ConntrackSocket, events_problem, list_entries
from otel_lb_hop.kernel.hooks import Hooks
from otel_lb_hop.kernel.netlink import Netlink
from otel_lb_hop.model import Transport, VipPort
from tests.kernel.crossing import (
    CLIENT4,
    CLIENT6,
    NODE4,
    NODE6,
    POD4,
    POD6,
    TARGET,
    TRANSLATED,
    UNTRANSLATED,
    VIP4,
    VIP6,
    Crossing,
)
from tests.kernel.packets import End
from tests.kernel.requirements import needs_kernel
from tests.kernel.rig import EVERYTHING, in_threads, vip_port
from tests.kernel.test_conntrack_messages import totals
from tests.lab.netns import in_netns
from tests.lab.requirements import lacking

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.kernel.rig import Marked, Rig

pytestmark = [
    pytest.mark.root,
    needs_kernel,
    pytest.mark.skipif(lacking() is not None, reason=lacking() or ""),
]

FAMILIES = pytest.mark.parametrize(
    ("client", "vip", "pod"), [(CLIENT4, VIP4, POD4), (CLIENT6, VIP6, POD6)], ids=["v4", "v6"]
)
PORTS = range(10_000, 60_000)


@pytest.fixture(scope="module")
def _crossing() -> Iterator[Crossing]:
    made = Crossing()
    yield made
    made.close()


@pytest.fixture
def crossing(_crossing: Crossing, rig: Rig) -> Iterator[Crossing]:
    """Give a test client, node and pod; the node's places are known, and its socket hears."""
    _crossing.forget()
    with _crossing.entered():
        _note_places(rig)
        hears = ConntrackSocket(rig.loaded.programs["lbh_conntrack"])
    yield _crossing
    hears.close()


@pytest.fixture
def deaf(_crossing: Crossing, rig: Rig) -> Crossing:
    """Give a test client, node and pod, while nobody hears of connections."""
    _crossing.forget()
    with _crossing.entered():
        _note_places(rig)
    return _crossing


def count_listed(rig: Rig, crossing: Crossing, *, tcp: bool = False) -> int:
    """Count what the node's conntrack has, as an agent does that begins; answers how many entries were handed over."""
    with crossing.entered():
        messages = list(list_entries(rig.tables.vip_ports if tcp else rig.tables.datagram_ports))
    for each in messages:
        assert run_program(rig.loaded.programs["lbh_conntrack"], each)[0] == 0
    return len(messages)


def _note_places(rig: Rig) -> None:
    netlink = Netlink()
    try:
        routes = netlink.routes()
        uplinks = find_uplinks(netlink.links(), *gateway_links(routes))
        assert uplinks == {socket.if_nametoindex("uplink")}
        places, left_out = find_places(routes, uplinks, 100)
        assert left_out == 0
        rig.places.set(places)
    finally:
        netlink.close()


def serve(rig: Rig, vip: str, pod: str, transport: Transport = Transport.UDP) -> tuple[Marked, Marked]:
    """Give the node a VIP port with a rule and one without."""
    backend = (End.of(pod, TARGET), "node1")
    ports: list[VipPort] = [
        vip_port(End.of(vip, port), backend, transport=transport) for port in (TRANSLATED, UNTRANSLATED)
    ]
    translated, untranslated = rig.serve(*ports)
    return translated, untranslated


def settle(rig: Rig, connections: int) -> tuple[int, int, int]:
    """Wait until so many connections are counted, and a moment for more than that."""
    until = time.monotonic() + 5
    while totals(rig)[0] < connections and time.monotonic() < until:
        time.sleep(0.005)
    time.sleep(0.05)
    return totals(rig)


@FAMILIES
def test_ten_thousand_flows(rig: Rig, crossing: Crossing, client: str, vip: str, pod: str) -> None:
    """From both CPUs at once, 10,000 flows of three packets each: as many connections, exactly."""
    translated, _ = serve(rig, vip, pod)
    end = End.of(vip, TRANSLATED)
    halves = PORTS[:5_000], PORTS[5_000:10_000]
    in_threads(*(lambda ports=half: crossing.datagrams(crossing.client, client, ports, end, 3) for half in halves))
    assert settle(rig, 10_000) == (10_000, 10_000, 0)
    assert rig.vip(translated.vip_id).connections == (0, 10_000)
    assert rig.hop(translated.hops["none", "node1"]).forwarded == (0, 10_000)
    sent, full = rig.event(Event.RECORD_SENT), rig.event(Event.RECORD_RING_FULL)
    assert sent + full == 10_000
    records = rig.records()
    assert len(records) == sent > 1_000
    assert {record.client for record in records} == {End.of(client, 0).address}
    assert len({record.client_port for record in records}) == sent
    assert len({record.trace_id for record in records}) == sent


def test_the_socket_stays_empty(rig: Rig, crossing: Crossing) -> None:
    """What the filter has counted does not wait in the socket."""
    serve(rig, VIP4, POD4)
    with crossing.entered():
        hears = ConntrackSocket(rig.loaded.programs["lbh_conntrack"])
    try:
        crossing.datagrams(crossing.client, CLIENT4, PORTS[:23], End.of(VIP4, TRANSLATED))
        assert settle(rig, 46) == (46, 46, 0)
        with pytest.raises(BlockingIOError):
            hears._socket.recv(1, socket.MSG_DONTWAIT)
    finally:
        hears.close()


@FAMILIES
def test_snat_source(rig: Rig, crossing: Crossing, client: str, vip: str, pod: str) -> None:
    """Backend and SNAT source in the records are what the pod sees."""
    serve(rig, vip, pod)
    family = socket.AF_INET6 if ":" in pod else socket.AF_INET
    seen = set()
    with in_netns(crossing.pod, lambda: socket.socket(family, socket.SOCK_DGRAM)) as server:
        server.bind((pod, TARGET))
        server.settimeout(2)
        crossing.datagrams(crossing.client, client, PORTS[:23], End.of(vip, TRANSLATED))
        for _ in range(23):
            peer = server.recvfrom(64)[1]
            seen.add((End.of(peer[0], 0).address, peer[1]))
    assert settle(rig, 23) == (23, 23, 0)
    records = rig.records()
    assert {(record.snat, record.snat_port) for record in records} == seen
    assert len(seen) == 23
    assert End.of(client, 0).address not in {peer for peer, _ in seen}
    assert {(record.backend, record.backend_port) for record in records} == {(End.of(pod, 0).address, b"\x14\xe9")}
    assert {record.verdict for record in records} == {Verdict.TRANSLATED}


@FAMILIES
def test_untranslated(rig: Rig, crossing: Crossing, client: str, vip: str, pod: str) -> None:
    """A flow to a VIP port for which the node has no rule is routed on as it came: not forwarded."""
    _, untranslated = serve(rig, vip, pod)
    crossing.datagrams(crossing.client, client, PORTS[:23], End.of(vip, UNTRANSLATED))
    assert settle(rig, 23) == (23, 0, 23)
    assert rig.vip(untranslated.vip_id).unforwarded == ((0, 0, 0), (23, 0, 0))
    assert {record.verdict for record in rig.records()} == {Verdict.DROPPED}


@FAMILIES
def test_unknown_backend(rig: Rig, crossing: Crossing, client: str, vip: str, pod: str) -> None:
    """A backend that the topology does not know counts in the VIP port's own row."""
    (marked,) = rig.serve(
        vip_port(End.of(vip, TRANSLATED), (End.of(pod, TARGET + 1), "node1"), transport=Transport.UDP)
    )
    crossing.datagrams(crossing.client, client, PORTS[:23], End.of(vip, TRANSLATED))
    assert settle(rig, 23) == (23, 23, 0)
    assert rig.hop(marked.vip_id).forwarded == (0, 23)


@FAMILIES
def test_origin(rig: Rig, crossing: Crossing, client: str, vip: str, pod: str) -> None:
    """Flows of the client are external; those of a pod and of the node itself are internal."""
    translated, _ = serve(rig, vip, pod)
    end = End.of(vip, TRANSLATED)
    crossing.datagrams(crossing.client, client, PORTS[:5], end)
    crossing.datagrams(crossing.pod, pod, PORTS[:7], end)
    crossing.datagrams(crossing.node, NODE6 if ":" in vip else NODE4, PORTS[:11], end)
    assert settle(rig, 23) == (23, 23, 0)
    assert rig.vip(translated.vip_id).connections == (18, 5)
    assert sorted(record.origin for record in rig.records()) == [0] * 18 + [1] * 5


@FAMILIES
def test_rejected(rig: Rig, crossing: Crossing, client: str, vip: str, pod: str) -> None:
    """A flow that a filter rejects, as kube-proxy does without endpoints, is never told of by conntrack."""
    serve(rig, vip, pod)
    rig.serve(vip_port(End.of(vip, 57), transport=Transport.UDP))
    crossing.datagrams(crossing.client, client, PORTS[:23], End.of(vip, 57))
    assert settle(rig, 0) == (0, 0, 0)


@FAMILIES
def test_without_endpoints(rig: Rig, crossing: Crossing, client: str, vip: str, pod: str) -> None:
    """What is rejected for want of endpoints is seen where it comes in; translated after all, it is counted once."""
    rejected, late = rig.serve(
        vip_port(End.of(vip, 57), transport=Transport.UDP),
        # The rules still have a backend that the topology has no more.
        vip_port(End.of(vip, TRANSLATED), transport=Transport.UDP),
    )
    with crossing.entered(), _hooked(rig, datagrams=True):
        crossing.datagrams(crossing.client, client, PORTS[:23], End.of(vip, 57), 3)
        crossing.datagrams(crossing.client, client, PORTS[:19], End.of(vip, TRANSLATED), 3)
        crossing.datagrams(crossing.pod, pod, PORTS[:7], End.of(vip, TRANSLATED))
        # No hook sees what the node itself sends: conntrack alone tells.
        crossing.datagrams(crossing.node, NODE6 if ":" in vip else NODE4, PORTS[:5], End.of(vip, TRANSLATED))
        assert settle(rig, 54) == (54, 5, 49)
    assert rig.vip(rejected.vip_id).unforwarded == ((0, 0, 0), (0, 23, 0))
    assert rig.vip(late.vip_id).connections == (12, 19)
    assert rig.vip(late.vip_id).unforwarded == ((0, 7, 0), (0, 19, 0))
    assert rig.event(Event.LATE) == 26


@FAMILIES
def test_sctp(rig: Rig, crossing: Crossing, client: str, vip: str, pod: str) -> None:
    """An SCTP association counts at its INIT."""
    translated, untranslated = serve(rig, vip, pod, Transport.SCTP)
    for port in PORTS[:23]:
        crossing.init(client, port, End.of(vip, TRANSLATED))
    crossing.init(client, PORTS[0], End.of(vip, UNTRANSLATED))
    assert settle(rig, 24) == (24, 23, 1)
    assert rig.vip(translated.vip_id).connections == (0, 23)
    assert rig.vip(untranslated.vip_id).connections == (0, 1)


@FAMILIES
@pytest.mark.parametrize("own_calls", [0, 1])
def test_own_tcp_calls(rig: Rig, crossing: Crossing, client: str, vip: str, pod: str, *, own_calls: int) -> None:  # noqa: ARG001
    """TCP: what the node itself calls counts if asked for; what came in by an interface counts there, and once."""
    translated, _ = serve(rig, vip, pod, Transport.TCP)
    rig.tables.set_settings(EVERYTHING._replace(own_calls=own_calls, verdict_after_ns=1 << 62))
    end = End.of(vip, TRANSLATED)
    with crossing.entered(), _hooked(rig):
        for netns in [crossing.client] * 5 + [crossing.pod] * 7 + [crossing.node] * 11:
            crossing.connect(netns, end)
        until = time.monotonic() + 2
        while sum(rig.vip(translated.vip_id).connections) < 12 + 11 * own_calls and time.monotonic() < until:
            time.sleep(0.005)
        time.sleep(0.05)
    assert rig.vip(translated.vip_id).connections == (7 + 11 * own_calls, 5)
    hop = rig.hop(translated.hops["none", "node1"])
    assert hop.forwarded == (7 + 11 * own_calls, 5)
    assert hop.translated == 11 * own_calls
    told = [record.verdict for record in rig.records() if record.verdict == Verdict.TRANSLATED]
    assert len(told) == 11 * own_calls


@contextmanager
def _hooked(rig: Rig, *, datagrams: bool = False) -> Iterator[None]:
    netlink = Netlink()
    rig.tables.set_uplinks(frozenset({socket.if_nametoindex("uplink")}))
    hooks = Hooks(rig.loaded.programs, netlink)
    try:
        hooks.reconcile(netlink.links(), datagrams=datagrams)
        # Some kernels put tunnels of their own into each namespace.
        assert {*hooks.interfaces} >= {"to_pod", "uplink"}
        yield
    finally:
        hooks.close()
        netlink.close()


@FAMILIES
def test_flows_that_began_while_nobody_listened(rig: Rig, deaf: Crossing, client: str, vip: str, pod: str) -> None:
    """They are counted from a list, once, as if they had been heard of; what goes elsewhere is not asked about."""
    translated, untranslated = serve(rig, vip, pod)
    deaf.datagrams(deaf.client, client, PORTS[:23], End.of(vip, TRANSLATED))
    deaf.datagrams(deaf.pod, pod, PORTS[:7], End.of(vip, TRANSLATED))
    deaf.datagrams(deaf.client, client, PORTS[:5], End.of(vip, UNTRANSLATED))
    deaf.datagrams(deaf.client, client, PORTS[:3], End.of(pod, TARGET + 7))
    deaf.ping(pod)
    assert totals(rig) == (0, 0, 0)
    for _ in range(2):
        assert count_listed(rig, deaf) == 35
        assert totals(rig) == (35, 30, 5)
    assert rig.vip(translated.vip_id).connections == (7, 23)
    assert rig.vip(untranslated.vip_id).connections == (0, 5)
    assert rig.hop(translated.hops["none", "node1"]).forwarded == (7, 23)
    records = rig.records()
    assert {record.client for record in records} == {End.of(client, 0).address, End.of(pod, 0).address}
    assert len({(record.client, record.client_port, record.vip_id) for record in records}) == len(records) == 35
    assert rig.event(Event.CONNTRACK_UNREAD) == 0


@FAMILIES
def test_flows_that_were_heard_of_are_not_counted_from_a_list(
    rig: Rig, deaf: Crossing, client: str, vip: str, pod: str
) -> None:
    """An agent heard of the first, nobody of the next, and the last began while the list was read: each counts once."""
    serve(rig, vip, pod)
    end = End.of(vip, TRANSLATED)
    with deaf.entered():
        hears = ConntrackSocket(rig.loaded.programs["lbh_conntrack"])
    deaf.datagrams(deaf.client, client, PORTS[:11], end)
    assert settle(rig, 11) == (11, 11, 0)
    hears.close()
    deaf.datagrams(deaf.client, client, PORTS[11:23], end)
    with deaf.entered():
        hears = ConntrackSocket(rig.loaded.programs["lbh_conntrack"])
    deaf.datagrams(deaf.client, client, PORTS[23:40], end)
    try:
        assert settle(rig, 28) == (28, 28, 0)
        assert count_listed(rig, deaf) == 40
        assert totals(rig) == (40, 40, 0)
        # What goes on in flows that are known is no news.
        deaf.datagrams(deaf.client, client, PORTS[:40], end)
        deaf.datagrams(deaf.client, client, PORTS[40:43], end)
        assert settle(rig, 43) == (43, 43, 0)
        assert count_listed(rig, deaf) == 43
        assert totals(rig) == (43, 43, 0)
    finally:
        hears.close()


@FAMILIES
def test_a_flow_that_is_told_a_moment_after_it_was_listed(
    rig: Rig, deaf: Crossing, client: str, vip: str, pod: str
) -> None:
    """The kernel's news of a real entry, after the same entry was read: one connection, in either order."""
    serve(rig, vip, pod)
    deaf.datagrams(deaf.client, client, PORTS[:1], End.of(vip, TRANSLATED))
    with deaf.entered():
        (listed,) = list_entries(rig.tables.datagram_ports)
    flags = 14 + 6
    assert listed[flags : flags + 2] == struct.pack("=H", 0x602)
    news = listed[:flags] + struct.pack("=H", 0x600) + listed[flags + 2 :]
    for message in (listed, news, listed):
        run_program(rig.loaded.programs["lbh_conntrack"], message)
        assert totals(rig) == (1, 1, 0)


@FAMILIES
def test_tcp_is_left_out_of_a_list(rig: Rig, deaf: Crossing, client: str, vip: str, pod: str) -> None:
    """Entries of TCP are not asked about, or, with the node's own calls, only those count."""
    backend = (End.of(pod, TARGET), "node1")
    end = End.of(vip, TRANSLATED)
    rig.serve(*(vip_port(end, backend, transport=each) for each in (Transport.TCP, Transport.UDP)))
    node = NODE6 if ":" in vip else NODE4
    # Put in by hand: the kernel forgets a refused call at once.
    for number, source in enumerate([client] * 2 + [pod] * 3 + [node] * 4):
        port = str(20_000 + number)
        original = ["-s", source, "-d", vip, "--sport", port, "--dport", str(TRANSLATED)]
        reply = ["-r", pod, "-q", node, "--reply-port-src", str(TARGET), "--reply-port-dst", port]
        deaf.conntrack("-I", "-p", "tcp", *original, *reply, "-t", "600", "--state", "ESTABLISHED")
    deaf.datagrams(deaf.client, client, PORTS[:5], end)
    assert count_listed(rig, deaf) == 5
    assert totals(rig) == (5, 5, 0)
    assert count_listed(rig, deaf, tcp=True) == 14
    assert totals(rig) == (5, 5, 0)
    rig.tables.set_settings(EVERYTHING._replace(own_calls=1))
    assert count_listed(rig, deaf, tcp=True) == 14
    assert totals(rig) == (9, 9, 0)
    assert len(rig.records()) == 9


def test_a_long_list(rig: Rig, deaf: Crossing) -> None:
    """It comes in many parts, of which none is left out."""
    serve(rig, VIP4, POD4)
    deaf.datagrams(deaf.client, CLIENT4, PORTS[:3_000], End.of(VIP4, TRANSLATED))
    assert count_listed(rig, deaf) == 3_000
    assert totals(rig) == (3_000, 3_000, 0)


def test_an_empty_list(rig: Rig, deaf: Crossing) -> None:
    """Nothing in conntrack, or no VIP port, is no entry."""
    serve(rig, VIP4, POD4)
    assert count_listed(rig, deaf) == 0
    deaf.datagrams(deaf.client, CLIENT4, PORTS[:3], End.of(VIP4, TRANSLATED))
    with deaf.entered():
        assert list(list_entries(set())) == []
        assert len(list(list_entries(rig.tables.datagram_ports))) == 3


@FAMILIES
def test_only_while_it_is_open(rig: Rig, crossing: Crossing, client: str, vip: str, pod: str) -> None:
    """A second socket counts once more, so there is one; closed, nothing is counted."""
    serve(rig, vip, pod)
    end = End.of(vip, TRANSLATED)
    with crossing.entered():
        second = ConntrackSocket(rig.loaded.programs["lbh_conntrack"])
    crossing.datagrams(crossing.client, client, PORTS[:3], end)
    assert settle(rig, 6)[0] == 6
    second.close()
    crossing.datagrams(crossing.client, client, PORTS[3:7], end)
    assert settle(rig, 10)[0] == 10


def test_inserted_by_a_program(rig: Rig, crossing: Crossing) -> None:
    """An entry that a program puts in, as conntrackd does at a fail-over, is no connection; nor is a change of one."""
    serve(rig, VIP4, POD4)
    entry = ["-p", "udp", "-s", CLIENT4, "-d", VIP4, "--sport", "999", "--dport", str(TRANSLATED)]
    reply = ["-r", POD4, "-q", NODE4, "--reply-port-src", str(TARGET), "--reply-port-dst", "999"]
    crossing.conntrack("-I", *entry, *reply, "-t", "50", "-u", "SEEN_REPLY")
    crossing.conntrack("-U", *entry, "-t", "70")
    crossing.datagrams(crossing.client, CLIENT4, PORTS[:1], End.of(VIP4, TRANSLATED))
    assert settle(rig, 1) == (1, 1, 0)
    assert rig.event(Event.CONNTRACK_UNREAD) == 0


def test_other_transports(rig: Rig, crossing: Crossing) -> None:
    """Pings and TCP of others are read and passed over: nothing is unread."""
    serve(rig, VIP4, POD4)
    crossing.ping(POD4)
    crossing.ping(POD6)
    crossing.connect(crossing.client, End.of(POD4, 99))
    assert settle(rig, 0) == (0, 0, 0)
    assert rig.event(Event.CONNTRACK_UNREAD) == 0


def test_no_program(crossing: Crossing) -> None:
    """A descriptor that is no socket filter is refused with a word about it, and the socket closed."""
    with crossing.entered(), pytest.raises(KernelError, match="cannot be heard of from conntrack"):
        ConntrackSocket(1 << 20)


@pytest.mark.parametrize(
    ("code", "hint"),
    [
        (errno.EPERM, "CAP_NET_ADMIN is needed"),
        (errno.EINVAL, "modprobe nf_conntrack_netlink"),
        (errno.EPROTONOSUPPORT, "modprobe nf_conntrack_netlink"),
        (errno.ENOBUFS, "the next try follows"),
    ],
)
def test_explain(code: int, hint: str) -> None:
    """What the kernel refuses is told with what to do."""
    assert hint in conntrack._explain(OSError(code, os.strerror(code)))


def test_events_problem(tmp_path: Path) -> None:
    """Events that are switched off are told; the sysctl is only read."""
    sysctl = tmp_path / "nf_conntrack_events"
    assert "nf_conntrack loaded" in str(events_problem(sysctl))
    for value, problem in (("0\n", True), ("1\n", False), ("2\n", False)):
        sysctl.write_text(value)
        assert bool(events_problem(sysctl)) is problem
    assert "cannot be read" in str(events_problem(tmp_path))


def test_events_are_on(crossing: Crossing) -> None:
    """The kernel of this machine sends events."""
    with crossing.entered():
        assert events_problem() is None
