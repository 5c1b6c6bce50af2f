"""The kernel's own stack and NAT as the judge: what it translates is counted, what it drops as malformed is not.

Real frames and real sockets, of shapes that BPF_PROG_TEST_RUN cannot make or that only a stack can judge.
"""

from __future__ import annotations

import os
import selectors
import socket
import struct
import subprocess
import threading
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, NamedTuple

import pytest

from otel_lb_hop.core.layout import Event
from otel_lb_hop.kernel import bpf
from tests.bench.measure import load_program
from tests.kernel import test_parser
from tests.kernel.crossing import CLIENT4, CLIENT6, POD4, POD6, TARGET, TRANSLATED, VIP4, VIP6, Crossing
from tests.kernel.fuzz.grammar import BACKENDS, CLIENTS, SNATS, VIPS
from tests.kernel.fuzz.referee import take_entries
from tests.kernel.oracle import ACK, CTAG, CWR, ECE, IPV4, IPV6, SYN, Segment, parse
from tests.kernel.packets import End, Flow, checksum, ethernet, ipv4, ipv6, next_isn, tcp, with_checksums
from tests.kernel.requirements import needs_kernel
from tests.kernel.rig import vip_port
from tests.kernel.test_devices import SOL_PACKET, Tun, attached, sender
from tests.kernel.test_parser import CLAIMS, PACKETS
from tests.lab.netns import in_netns, write_sysctls
from tests.lab.requirements import lacking
from tests.lab.waiting import wait_for

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from otel_lb_hop.core.layout import HopStats
    from tests.kernel.oracle import Entry
    from tests.kernel.rig import Rig

pytestmark = [
    pytest.mark.root,
    needs_kernel,
    pytest.mark.skipif(lacking() is not None, reason=lacking() or ""),
]

SENT = 23
JUMBO = 9000
MACS = bytes.fromhex("020000002101020000002102")
"""The node's, then the client's."""
ENDS = {4: (CLIENT4, VIP4, POD4), 6: (CLIENT6, VIP6, POD6)}
VERSIONS = pytest.mark.parametrize("version", [4, 6], ids=["v4", "v6"])
PACKET_AUXDATA, TP_STATUS_VLAN_VALID = 8, 16
BPF_FUNC_SKB_VLAN_PUSH = 18
TCP_FASTOPEN, TCP_FASTOPEN_CONNECT = 23, 30
IPV6_HOPOPTS, IPV6_DSTOPTS = 54, 59


class Wiretap:
    """Sees every frame that comes to the pod."""

    def __init__(self, netns: str) -> None:
        self.frames: list[bytes] = []
        self._socket = in_netns(netns, self._open)

    @staticmethod
    def _open() -> socket.socket:
        made = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
        made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 24)
        made.bind(("eth0", 0))
        made.setblocking(False)  # noqa: FBT003
        return made

    def look(self) -> list[bytes]:
        """Take what has come; answers all that ever came in."""
        while True:
            try:
                frame, address = self._socket.recvfrom(1 << 17)
            except BlockingIOError:
                return self.frames
            if address[2] != socket.PACKET_OUTGOING:
                self.frames.append(frame)

    def syns(self) -> dict[int, bytes]:
        """Name the SYNs by their initial sequence number."""
        told = [(parse(frame, ethernet=True), frame) for frame in self.look()]
        return {
            each.sequence: frame
            for each, frame in told
            if isinstance(each, Segment) and each.flags & (SYN | ACK) == SYN and each.destination_port == TARGET
        }

    def close(self) -> None:
        """Stop listening."""
        self._socket.close()


class Scene(NamedTuple):
    """A node with its programs between a client and a pod."""

    rig: Rig
    crossing: Crossing
    tap: Wiretap

    def send(self, *packets: bytes) -> None:
        """Let the client put packets on its wire."""

        def put() -> None:
            with sender("uplink0") as send:
                for packet in packets:
                    send(MACS + ethernet(packet)[12:])

        in_netns(self.crossing.client, put)

    def totals(self) -> tuple[int, int, int, int]:
        """Read the connections, those forwarded, answered, refused."""
        snapshot = self.rig.snapshot()
        rows: list[HopStats] = list(snapshot.hops.values())
        return (
            sum(sum(row.connections) for row in snapshot.vips.values()),
            sum(sum(row.forwarded) for row in rows),
            sum(row.answered for row in rows),
            sum(row.refused for row in rows),
        )

    def not_parsed(self) -> tuple[int, ...]:
        """Read the packets counted as truncated, fragments, extensions."""
        return self.rig.tables.events()[Event.TRUNCATED : Event.EXTENSION + 1]


@pytest.fixture(scope="module")
def _crossing() -> Iterator[Crossing]:
    made = Crossing()
    try:
        # As on a node: what is not translated is not routed on.
        for vip in (VIP4, VIP6):
            subprocess.run(["ip", "-netns", made.node, "route", "add", "blackhole", vip], check=True)
        for netns, device in (
            (made.client, "uplink0"), (made.node, "uplink"), (made.node, "to_pod"), (made.pod, "eth0"),
        ):  # fmt: skip
            subprocess.run(["ip", "-netns", netns, "link", "set", device, "mtu", str(JUMBO)], check=True)
        yield made
    finally:
        made.close()


@pytest.fixture
def scene(rig: Rig, _crossing: Crossing) -> Iterator[Scene]:
    """Give a test the node, its programs attached, and a tap at the pod."""
    _crossing.forget()
    ports = [vip_port(End.of(vip, TRANSLATED), (End.of(pod, TARGET), "node1")) for _, vip, pod in ENDS.values()]
    rig.serve(*ports)
    tap = Wiretap(_crossing.pod)
    with ExitStack() as stack:
        stack.callback(tap.close)
        stack.enter_context(_crossing.entered())
        uplink, to_pod = socket.if_nametoindex("uplink"), socket.if_nametoindex("to_pod")
        for program, interface in (
            ("lbh_ingress", uplink), ("lbh_egress", uplink), ("lbh_ingress", to_pod), ("lbh_egress", to_pod),
        ):  # fmt: skip
            stack.enter_context(attached(rig, program, interface))
        rig.tables.set_uplinks(frozenset({uplink}))
        yield Scene(rig, _crossing, tap)


def syn(version: int, port: int, options: bytes = b"") -> bytes:
    """Build a whole SYN from the client to the VIP, its checksums right."""
    source, destination = (End.of(address, 0).address for address in ENDS[version][:2])
    header = tcp(port, TRANSLATED, next_isn(), options=options)
    packet = (ipv4 if version == 4 else ipv6)(source, destination, header)
    return with_checksums(packet, len(packet) - len(header), len(packet))


def moved(packet: bytes, *, sums: bool) -> tuple[int, bytes]:
    """Make a packet of test_parser one from this client to this VIP; `sums`: with its checksums right."""
    version = packet[0] >> 4 if packet[0] >> 4 in ENDS else 4
    old = [(test_parser.CLIENT4, test_parser.VIP4), (test_parser.CLIENT6, test_parser.VIP6)][version == 6]
    new = [End.of(address, 0).address for address in ENDS[version][:2]]
    before, after = ((a[12:] + b[12:] if version == 4 else a + b) for a, b in ((old[0].address, old[1].address), new))
    packet = packet.replace(before, after)
    ports = struct.pack("!HH", old[0].port, old[1].port)
    packet = packet.replace(ports, struct.pack("!HH", old[0].port, TRANSLATED))
    header = packet.index(struct.pack("!HH", old[0].port, TRANSLATED))
    (sequence,) = struct.unpack_from("!I", packet, header + 4)
    claimed = int.from_bytes(packet[2:4] if version == 4 else packet[4:6], "big") + (0 if version == 4 else 40)
    end = claimed if header + 20 <= claimed <= len(packet) else len(packet)
    return sequence, with_checksums(packet, header, end) if sums else packet


def seen_by_all(scene: Scene, shapes: dict[str, tuple[int, bytes]]) -> tuple[set[str], set[str], set[str]]:
    """Send shapes; answers which were counted, which the programs saw translated, and which came to the pod."""
    last = syn(4, 50_000)
    scene.send(*(packet for _, packet in shapes.values()), last)
    told = parse(last, ethernet=False, protocol=IPV4)
    assert isinstance(told, Segment)
    wait_for("the last SYN", lambda: told.sequence in scene.tap.syns())
    # Each CPU hands on what it got in order, so what the last one has overtaken is on its way.
    wait_for("what the programs saw", lambda: scene.totals()[1] >= len(scene.tap.syns()))
    names = {isn: name for name, (isn, _) in shapes.items()}
    assert len(names) == len(shapes)
    entries: list[Entry] = [each for each in take_entries(scene.rig) if each.isn in names]
    return (
        {names[each.isn] for each in entries},
        {names[each.isn] for each in entries if each.translated},
        {names[isn] for isn in scene.tap.syns() if isn in names},
    )


def test_claimed_lengths(scene: Scene) -> None:
    """Of packets that lie about their size exactly those count that the stack takes, and all those are translated."""
    names = [name for name in CLAIMS if "first-fragment" not in name]  # the rest of those never comes
    shapes = {name: moved(CLAIMS[name][0](), sums=name != "v4-checksum") for name in names}
    counted, translated, arrived = seen_by_all(scene, shapes)
    assert counted == {name for name in names if CLAIMS[name][1]}
    # A wrong checksum and bad options of IP: connections that this node drops.
    assert translated == arrived == counted - {"v4-checksum", "v4-bad-options"}
    assert scene.not_parsed() == (sum(not CLAIMS[name][1] for name in names), 0, 0)


def test_headers_between(scene: Scene) -> None:
    """What the kernel translates through whatever headers is counted; what is not followed is counted as that."""
    shapes = {name: moved(make(), sums=True) for name, make in PACKETS.items() if name in FOLLOWED + NOT_FOLLOWED}
    assert len(shapes) == 20
    counted, translated, arrived = seen_by_all(scene, shapes)
    assert counted == set(FOLLOWED)
    # What nobody translates: padding options that hold data, and TCP behind AH, which forbids it (RFC 4302, 3.3.3.1).
    assert translated == arrived == counted - {"v6-long", "v6-farthest", "v6-auth", "v6-shortest-auth", "v6-all"}
    # One of them is translated: it is met again as it leaves.
    assert scene.not_parsed() == (0, 0, 3)


FOLLOWED = (
    "v4-options", "v4-most-options", "v4-do-not-fragment", "v6-plain", "v6-hop", "v6-route", "v6-dest", "v6-auth",
    "v6-shortest-auth", "v6-all", "v6-long", "v6-six", "v6-farthest", "v6-reserved-bits",
)  # fmt: skip
NOT_FOLLOWED = ("v6-beyond", "v6-seven", "v6-esp", "v6-mobility", "v6-none", "v4-auth")


@VERSIONS
def test_fragments(scene: Scene, version: int) -> None:
    """A SYN in two fragments is one connection, and told by the first: conntrack puts them together before NAT."""
    whole = [syn(version, 41_000 + number, b"\2\4\5\xb4" + b"\1" * 36) for number in range(SENT)]
    for number, packet in enumerate(whole):
        first, second = halves(packet, number)
        assert isinstance(parse(first, ethernet=False, protocol=IPV4 if version == 4 else IPV6), Segment)
        scene.send(*((first, second) if number % 2 else (second, first)))
    wait_for("all translated", lambda: scene.totals()[1] >= SENT)
    wait_for("all answered", lambda: scene.totals()[3] >= SENT)
    assert scene.totals() == (SENT, SENT, 0, SENT)
    assert len(scene.tap.syns()) == SENT
    assert scene.not_parsed() == (0, 2 * SENT, 0)  # it leaves in two again


def halves(packet: bytes, identification: int) -> tuple[bytes, bytes]:
    """Cut a SYN with 40 bytes of options into two fragments, the first with its header and four bytes of options."""
    if packet[0] >> 4 == 4:
        made = []
        for field, payload in ((0x2000, packet[20:44]), (3, packet[44:])):
            header = bytearray(packet[:20])
            header[2:4] = (20 + len(payload)).to_bytes(2, "big")
            header[4:6] = (1000 + identification).to_bytes(2, "big")
            header[6:8] = field.to_bytes(2, "big")
            header[10:12] = b"\0\0"
            header[10:12] = checksum(bytes(header))
            made.append(bytes(header) + payload)
        return made[0], made[1]
    made = []
    for field, payload in ((1, packet[40:64]), (24, packet[64:])):
        fragment = b"\6\0" + field.to_bytes(2, "big") + (1000 + identification).to_bytes(4, "big")
        size = (8 + len(payload)).to_bytes(2, "big")
        made.append(packet[:4] + size + b"\x2c" + packet[7:40] + fragment + payload)
    return made[0], made[1]


@contextmanager
def echo(scene: Scene, *, fast_open: bool = False) -> Iterator[None]:
    """Let the pod send back how many bytes came, for each connection."""

    def listen() -> socket.socket:
        server = socket.create_server(("::", TARGET), family=socket.AF_INET6, dualstack_ipv6=True, backlog=SENT)
        if fast_open:
            server.setsockopt(socket.IPPROTO_TCP, TCP_FASTOPEN, SENT)
        return server

    def serve() -> None:
        while True:
            try:
                channel, _ = server.accept()
            except OSError:
                return
            with channel:
                size = 0
                while data := channel.recv(1 << 16):
                    size += len(data)
                channel.sendall(str(size).encode())

    server = in_netns(scene.crossing.pod, listen)
    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield
    finally:
        server.shutdown(socket.SHUT_RDWR)
        server.close()
        thread.join()


def calls(
    scene: Scene, version: int, prepare: Callable[[socket.socket], None] = lambda _: None, content: bytes = b"hello"
) -> None:
    """Call the VIP port by real sockets, one call after the other."""
    family = socket.AF_INET if version == 4 else socket.AF_INET6

    def call() -> None:
        for _ in range(SENT):
            with socket.socket(family, socket.SOCK_STREAM) as channel:
                channel.settimeout(20)
                prepare(channel)
                channel.connect((ENDS[version][1], TRANSLATED))
                channel.sendall(content)
                channel.shutdown(socket.SHUT_WR)
                answer = b"".join(iter(lambda: channel.recv(100), b""))
                assert answer == str(len(content)).encode()

    in_netns(scene.crossing.client, call)


def exact(scene: Scene) -> dict[int, bytes]:
    """Hold the counts to what was sent; answers the SYNs that came to the pod."""
    assert scene.totals() == (SENT, SENT, SENT, 0)
    assert scene.not_parsed() == (0, 0, 0)
    syns = scene.tap.syns()
    assert len(syns) == SENT
    return syns


def told(frame: bytes) -> Segment:
    """Read a SYN."""
    segment = parse(frame, ethernet=True)
    assert isinstance(segment, Segment)
    return segment


@VERSIONS
def test_ecn(scene: Scene, version: int) -> None:
    """Clients that ask for ECN (RFC 3168, 6.1.1: SYN with ECE and CWR) are connections like others."""
    for netns in (scene.crossing.client, scene.crossing.pod):
        write_sysctls(netns, {"net.ipv4.tcp_ecn": "1"})
    try:
        with echo(scene):
            calls(scene, version)
    finally:
        for netns in (scene.crossing.client, scene.crossing.pod):
            write_sysctls(netns, {"net.ipv4.tcp_ecn": "2"})
    assert {told(frame).flags for frame in exact(scene).values()} == {SYN | ECE | CWR}


@VERSIONS
def test_fast_open(scene: Scene, version: int) -> None:
    """Fast Open (RFC 7413): the first SYN asks for a cookie, the others carry the request itself."""
    for netns in (scene.crossing.client, scene.crossing.pod):
        write_sysctls(netns, {"net.ipv4.tcp_fastopen": "3"})
    with echo(scene, fast_open=True):
        calls(
            scene,
            version,
            lambda channel: channel.setsockopt(socket.IPPROTO_TCP, TCP_FASTOPEN_CONNECT, 1),
            b"hello at once",
        )
    frames = list(exact(scene).values())
    assert [b"hello at once" in frame for frame in frames] == [False] + [True] * (SENT - 1)


def test_options_of_ipv4(scene: Scene) -> None:
    """Sockets with IP options on all that they send: NOPs and a router alert (RFC 2113)."""
    options = b"\1\1\1\1\x94\4\0\0"
    with echo(scene):
        calls(scene, 4, lambda channel: channel.setsockopt(socket.IPPROTO_IP, socket.IP_OPTIONS, options))
    assert {frame[14] for frame in exact(scene).values()} == {0x47}


@pytest.mark.parametrize(("option", "number"), [(IPV6_HOPOPTS, 0), (IPV6_DSTOPTS, 60)], ids=["hop", "destination"])
def test_options_of_ipv6(scene: Scene, option: int, number: int) -> None:
    """Sockets with an extension header on all that they send."""
    padding = bytes([0, 0, 1, 4, 0, 0, 0, 0])
    with echo(scene):
        calls(scene, 6, lambda channel: channel.setsockopt(socket.IPPROTO_IPV6, option, padding))
    assert {frame[20] for frame in exact(scene).values()} == {number}


@VERSIONS
def test_jumbo_and_gso(scene: Scene, version: int) -> None:
    """Bulk over jumbo frames, handed on in pieces larger than any frame (GSO): only the connections are counted."""
    with echo(scene):
        calls(scene, version, content=bytes(1 << 18))
    exact(scene)
    assert max(map(len, scene.tap.frames)) > JUMBO + 14


@contextmanager
def tunnel(scene: Scene) -> Iterator[int]:
    """Join client and node by a pair of devices without Ethernet header; answers the node's index."""
    stop, wake = os.pipe()
    client = in_netns(scene.crossing.client, lambda: Tun("tunnel0"))
    node = Tun("tunnel")

    def pump() -> None:
        with selectors.DefaultSelector() as selector:
            for fd, other in ((client.fd, node.fd), (node.fd, client.fd), (stop, -1)):
                selector.register(fd, selectors.EVENT_READ, other)
            while True:
                for key, _ in selector.select():
                    if key.data < 0:
                        return
                    os.write(key.data, os.read(key.fd, 1 << 16))

    thread = threading.Thread(target=pump)
    thread.start()
    try:
        commands = {
            scene.crossing.client: ("tunnel0", "2", (VIP4, VIP6)),
            scene.crossing.node: ("tunnel", "1", ()),
        }
        for netns, (device, last, vips) in commands.items():
            for command in (
                f"addr add 10.24.0.{last}/24 dev {device}",
                f"addr add fd24::{last}/64 dev {device} nodad",
                *(f"route add {vip} dev {device} src {'fd24::2' if ':' in vip else '10.24.0.2'}" for vip in vips),
            ):
                subprocess.run(["ip", "-netns", netns, *command.split()], check=True)
        yield node.index
    finally:
        os.write(wake, b"x")
        thread.join()
        for each in (client, node):
            each.close()
        os.close(stop)
        os.close(wake)


@VERSIONS
def test_without_ethernet(scene: Scene, version: int) -> None:
    """Real calls that come in by a device without Ethernet header, and leave as frames."""
    with (
        tunnel(scene) as index,
        attached(scene.rig, "lbh_ingress_l3", index),
        attached(scene.rig, "lbh_egress_l3", index),
        echo(scene),
    ):
        scene.rig.tables.set_uplinks(frozenset({index}))
        calls(scene, version)
    exact(scene)
    assert sum(row.connections[1] for row in scene.rig.snapshot().vips.values()) == SENT


def tagging_program(tag: int) -> int:
    """Load a tc program that puts a VLAN tag into the metadata of what passes, as a VLAN device does, and goes on."""
    return load_program(
        struct.pack(
            "=" + "BBhi" * 5,
            *(0xB7, 0x02, 0, socket.htons(CTAG)),  # r2: the EtherType of the tag
            *(0xB7, 0x03, 0, tag),  # r3: the tag
            *(0x85, 0x00, 0, BPF_FUNC_SKB_VLAN_PUSH),
            *(0xB7, 0x00, 0, -1),  # TC_ACT_UNSPEC
            *(0x95, 0x00, 0, 0),
        )
    )


@pytest.mark.parametrize("tags", [1, 2])
@VERSIONS
def test_leaves_with_a_tag_in_metadata(rig: Rig, version: int, tags: int) -> None:
    """What leaves by a VLAN device has its tag in the skb's metadata: the frame begins as if it had none."""
    vip, backend = (VIPS[version], BACKENDS[version][1])
    rig.serve(vip_port(vip, (backend, "node2")))
    flows = [
        Flow(CLIENTS[version]._replace(port=2000 + number), vip, SNATS[version], backend, next_isn())
        for number in range(SENT)
    ]
    pushing = [tagging_program(100 + number) for number in range(tags)]
    with ExitStack() as stack:
        for fd in pushing:
            stack.callback(os.close, fd)
        stack.enter_context(attached(rig, "lbh_egress", rig.peer))
        for fd in pushing:  # each before those that are there
            stack.callback(os.close, bpf.attach_tcx(fd, rig.peer, bpf.BPF_TCX_EGRESS))
        hears = stack.enter_context(socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3)))
        hears.setsockopt(SOL_PACKET, PACKET_AUXDATA, 1)
        hears.bind(("uplink", 0))
        hears.settimeout(10)
        send = stack.enter_context(sender("far_uplink"))
        for flow in flows:
            rig.into(flow.syn())
            send(flow.translated())
            send(flow.answer())
        for _ in range(2 * SENT):
            frame, metadata, _, _ = hears.recvmsg(2000, 100)
            (status,) = struct.unpack_from("=I", metadata[0][2])
            assert status & TP_STATUS_VLAN_VALID
            assert (frame[12:14] == b"\x81\0") is (tags == 2)
    snapshot = rig.snapshot()
    assert sum(row.forwarded[1] for row in snapshot.hops.values()) == SENT
    assert sum(row.answered for row in snapshot.hops.values()) == SENT
    assert not any(snapshot.events[Event.TRUNCATED : Event.EXTENSION + 1])


@VERSIONS
def test_simultaneous_open(rig: Rig, version: int) -> None:
    """Both sides send a SYN (RFC 9293, 3.5): the client's is the connection, and the SYN-ACK to it the answer."""
    vip, backend = (VIPS[version], BACKENDS[version][1])
    (marked,) = rig.serve(vip_port(vip, (backend, "node2")))
    for number in range(SENT):
        client, snat = (ends[version]._replace(port=2000 + number) for ends in (CLIENTS, SNATS))
        flow = Flow(client, vip, snat, backend, next_isn())
        theirs = next_isn()
        wire = flow.wire
        rig.into(flow.syn())
        rig.out(flow.translated())
        rig.into(wire.segment(backend, snat, theirs))  # the backend's own SYN, crossing the client's
        rig.out(wire.segment(vip, client, theirs))
        rig.into(wire.segment(client, vip, flow.isn, theirs + 1 & 0xFFFFFFFF, SYN | ACK))
        rig.out(wire.segment(snat, backend, flow.isn, theirs + 1 & 0xFFFFFFFF, SYN | ACK))
        rig.into(wire.segment(backend, snat, theirs, flow.isn + 1 & 0xFFFFFFFF, SYN | ACK))
        rig.out(wire.segment(vip, client, theirs, flow.isn + 1 & 0xFFFFFFFF, SYN | ACK))
    assert sum(rig.vip(marked.vip_id).connections) == SENT
    row = rig.hop(marked.hops["avoidable", "node2"]) if ("avoidable", "node2") in marked.hops else None
    rows = [row] if row else list(rig.snapshot().hops.values())
    assert sum(sum(each.forwarded) for each in rows) == SENT
    assert sum(each.answered for each in rows) == SENT
    assert sum(each.refused for each in rows) == 0
