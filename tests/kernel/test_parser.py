"""Every packet passes unchanged, and is counted exactly if the oracle says that it begins a connection."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from otel_lb_hop.core.layout import Event, OriginCode
from otel_lb_hop.kernel.loader import PROGRAMS, XDP_PROGRAMS
from tests.kernel.oracle import (
    ACK,
    CTAG,
    EVENT_OF,
    FIN,
    IPV4,
    IPV6,
    RST,
    STAG,
    SYN,
    Kind,
    Segment,
    Told,
    event_of,
    parse,
)
from tests.kernel.packets import End, Extension, ethernet, ipv4, ipv6, next_isn, tagged, tcp
from tests.kernel.requirements import needs_kernel
from tests.kernel.rig import vip_port

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.kernel.rig import Rig

pytestmark = [pytest.mark.root, needs_kernel]

CLIENT4, VIP4 = End.of("8.0.1.5", 40_000), End.of("8.0.10.1", 80)
CLIENT6, VIP6 = End.of("2001:db8:86dd:1::5", 40_000), End.of("2001:db8:86dd:10::1", 80)
SHORTEST = 14
LARGEST = 3400
"""BPF_PROG_TEST_RUN wants a packet to fit into a page, together with what the kernel keeps around it."""
HOP, ROUTE, FRAG, AUTH, DEST = (Extension(number) for number in (0, 43, 44, 51, 60))
CHAINS = {
    "plain": (),
    "hop": (HOP,),
    "route": (ROUTE,),
    "dest": (DEST,),
    "first-fragment": (FRAG._replace(offset_flags=1),),
    "auth": (AUTH._replace(length=4),),
    "shortest-auth": (AUTH._replace(length=1),),
    "all": (HOP, DEST, ROUTE, FRAG, AUTH._replace(length=4), DEST),
    "long": (HOP._replace(length=255),),
    "six": (HOP,) + (DEST,) * 5,
    "farthest": (HOP._replace(length=255), DEST._replace(length=247)),
    "beyond": (HOP._replace(length=255), DEST._replace(length=255)),
    "seven": (HOP,) + (DEST,) * 6,
    "later-fragment": (FRAG._replace(offset_flags=8),),
    "later-fragment-behind-hop": (HOP, FRAG._replace(offset_flags=0xFFF8)),
    "later-fragment-of-options": (FRAG._replace(offset_flags=8), DEST),
    "reserved-bits": (FRAG._replace(offset_flags=6, length=255),),
    "esp": (Extension(50),),
    "mobility": (Extension(135),),
    "none": (Extension(59),),
}


def syn4(*, options: bytes = b"", fragment: int = 0, protocol: int = 6, flags: int = SYN) -> bytes:
    """Build an IPv4 SYN to the VIP port."""
    header = tcp(CLIENT4.port, VIP4.port, next_isn(), flags=flags)
    return ipv4(CLIENT4.address, VIP4.address, header, options=options, fragment=fragment, protocol=protocol)


def syn6(*chain: Extension, last: int = 6, flags: int = SYN) -> bytes:
    """Build an IPv6 SYN to the VIP port."""
    header = tcp(CLIENT6.port, VIP6.port, next_isn(), flags=flags)
    return ipv6(CLIENT6.address, VIP6.address, header, chain=chain, last=last)


PACKETS: dict[str, Callable[[], bytes]] = {
    "v4": syn4,
    "v4-options": lambda: syn4(options=b"\1" * 4),
    "v4-most-options": lambda: syn4(options=b"\1" * 40),
    "v4-first-fragment": lambda: syn4(fragment=0x2000),
    "v4-do-not-fragment": lambda: syn4(fragment=0x4000),
    "v4-later-fragment": lambda: syn4(fragment=0x2001),
    "v4-last-fragment": lambda: syn4(fragment=0x1FFF),
    "v4-udp": lambda: syn4(protocol=17),
    "v4-udp-fragment": lambda: syn4(protocol=17, fragment=1),
    "v4-auth": lambda: syn4(protocol=51),
    "v4-icmp": lambda: syn4(protocol=1),
    "v4-ack": lambda: syn4(flags=ACK),
    "v4-version-5": lambda: b"\x55" + syn4()[1:],
    "v4-short-header": lambda: b"\x44" + syn4()[1:],
    "v6-version-7": lambda: b"\x70" + syn6()[1:],
    "v6-udp": lambda: syn6(last=17),
    "v6-udp-behind-hop": lambda: syn6(HOP, last=17),
    "v6-udp-later-fragment": lambda: syn6(FRAG._replace(offset_flags=8), last=17),
} | {f"v6-{name}": (lambda chain=chain: syn6(*chain)) for name, chain in CHAINS.items()}

TAGGINGS: dict[str, tuple[int, ...]] = {
    "untagged": (),
    "c": (CTAG,),
    "s": (STAG,),
    "qinq": (STAG, CTAG),
    "c-c": (CTAG, CTAG),
    "three": (STAG, CTAG, CTAG),
}


class Watched:
    """Two VIP ports, and what one more packet changed in their counters."""

    def __init__(self, rig: Rig) -> None:
        self.rig = rig
        marked = rig.serve(vip_port(VIP4), vip_port(VIP6))
        self.vip_ids = {end: each.vip_id for end, each in zip((VIP4, VIP6), marked, strict=True)}
        self.counted: set[tuple[object, ...]] = set()
        self.connections = dict.fromkeys(self.vip_ids.values(), 0)
        self.events = dict.fromkeys(EVENT_OF.values(), 0)

    def check(self, packet: bytes, *, ethernet: bool = True, protocol: int = 0) -> Told:
        """Let a packet in and out; every counter must be what the oracle says."""
        told = self.note(packet, ethernet=ethernet, protocol=protocol)
        self.rig.into(packet, ethernet=ethernet)
        self.compare(packet)
        return told

    def note(self, packet: bytes, *, ethernet: bool = True, protocol: int = 0) -> Told:
        """Count a packet as the oracle sees it."""
        told = parse(packet, ethernet=ethernet, protocol=protocol)
        event = event_of(told, incoming=True)
        if event is not None:
            self.events[event] += 1
        elif isinstance(told, Segment) and told.whole:
            vip_id = self.vip_ids.get(End(told.destination, told.destination_port))
            if vip_id is not None and told.flags & (SYN | ACK | RST | FIN) == SYN:
                assert told[:5] not in self.counted, "each SYN of these tests has an ISN of its own"
                self.counted.add(told[:5])
                self.connections[vip_id] += 1
        return told

    def note_leaving(self, packet: bytes, *, ethernet: bool = True, protocol: int = 0) -> None:
        """Count a packet that leaves and belongs to no connection."""
        event = event_of(parse(packet, ethernet=ethernet, protocol=protocol), incoming=False)
        if event is not None:
            self.events[event] += 1

    def compare(self, packet: bytes = b"") -> None:
        """Compare all counters with what was noted."""
        snapshot = self.rig.snapshot()
        external = {number: row.connections[OriginCode.EXTERNAL] for number, row in snapshot.vips.items()}
        assert external == self.connections, packet.hex(" ")
        assert {event: snapshot.events[event] for event in self.events} == self.events, packet.hex(" ")
        assert not any(row.retransmits or row.connections[OriginCode.INTERNAL] for row in snapshot.vips.values())


@pytest.fixture(params=["tc", "xdp"])
def watched(request: pytest.FixtureRequest, rig: Rig) -> Watched:
    """Give a test two VIP ports without backends; what comes in on Ethernet is watched by tc, then by XDP."""
    rig.xdp = request.param == "xdp"
    return Watched(rig)


NO_XDP = pytest.mark.parametrize("watched", ["tc"], indirect=True)


def refused_by_test_run(frame: bytes) -> bool:
    """Whether BPF_PROG_TEST_RUN takes no such packet: its EtherType promises an IP header that is not whole."""
    header = {IPV4: 20, IPV6: 40}.get(int.from_bytes(frame[12:14], "big"), 0)
    return len(frame) < SHORTEST + header


@pytest.mark.parametrize("tags", TAGGINGS.values(), ids=TAGGINGS)
@pytest.mark.parametrize("make", PACKETS.values(), ids=PACKETS)
def test_each_shape(watched: Watched, make: Callable[[], bytes], tags: tuple[int, ...]) -> None:
    """Each shape of packet, with each tagging, is what the oracle says; trailing bytes make no difference."""
    for trailer in (0, 1, 6, 1000):
        watched.check(ethernet(make() + bytes(trailer), tags=tags)[:LARGEST])


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("v4", None), ("v4-most-options", None), ("v4-first-fragment", None), ("v4-later-fragment", Kind.FRAGMENT),
        ("v4-udp", Kind.OTHER), ("v4-ack", Kind.OTHER), ("v6-plain", None), ("v6-all", None), ("v6-six", None),
        ("v6-farthest", None), ("v6-beyond", Kind.EXTENSION), ("v6-seven", Kind.EXTENSION),
        ("v6-later-fragment", Kind.FRAGMENT), ("v6-first-fragment", None), ("v6-auth", None), ("v6-esp", Kind.OTHER),
    ],
)  # fmt: skip
def test_oracle(name: str, kind: Kind | None) -> None:
    """The oracle itself says what a person would, and knows the fields of a SYN (None stands for one)."""
    packet = PACKETS[name]()
    told = parse(packet, ethernet=False, protocol=IPV4 if name.startswith("v4") else IPV6)
    assert told == parse(ethernet(packet), ethernet=True)
    if kind is not None:
        assert told is kind
    else:
        assert isinstance(told, Segment)
        client, vip = (CLIENT4, VIP4) if name.startswith("v4") else (CLIENT6, VIP6)
        assert (told[:2], told[2:4], told.flags) == (client, vip, SYN)


@pytest.mark.parametrize("tags", TAGGINGS.values(), ids=TAGGINGS)
@pytest.mark.parametrize("name", ["v4", "v4-most-options", "v4-later-fragment", "v6-plain", "v6-all", "v6-seven"])
def test_cut_at_every_byte(watched: Watched, name: str, tags: tuple[int, ...]) -> None:
    """A packet cut at any byte is counted as truncated as soon as it says that it is IP, until it is whole."""
    whole = len(ethernet(PACKETS[name](), tags=tags))
    tried = 0
    for size in range(SHORTEST, whole + 1):
        frame = ethernet(PACKETS[name](), tags=tags)[:size]
        if not refused_by_test_run(frame):
            watched.check(frame)
            tried += 1
    assert tried >= 21
    if not tags:
        return
    kinds = {parse(ethernet(PACKETS[name](), tags=tags)[:size], ethernet=True) for size in range(SHORTEST, whole)}
    assert kinds & {Kind.TRUNCATED, Kind.OTHER}


@NO_XDP
@pytest.mark.parametrize("name", ["v4", "v4-most-options", "v4-udp", "v6-plain", "v6-all", "v6-seven", "v6-beyond"])
def test_cut_without_ethernet(watched: Watched, name: str) -> None:
    """The same on a device without Ethernet header, as far as a test run lets it be cut."""
    protocol = IPV4 if name.startswith("v4") else IPV6
    for size in range(
        SHORTEST + (20 if protocol == IPV4 else 40), min(len(PACKETS[name]()), LARGEST) + 1, 1 + (name == "v6-beyond")
    ):
        watched.check(PACKETS[name]()[:size], ethernet=False, protocol=protocol)


@NO_XDP
def test_egress_parses_alike(watched: Watched) -> None:
    """What leaves is counted as not parsed by the same rules."""
    for make in PACKETS.values():
        for tags in TAGGINGS.values():
            frame = ethernet(make(), tags=tags)[:LARGEST]
            watched.note_leaving(frame)
            watched.rig.out(frame)
    watched.compare()


def patched(packet: bytes, *changes: tuple[int, bytes]) -> bytes:
    """Overwrite bytes of a packet at these offsets."""
    made = bytearray(packet)
    for offset, value in changes:
        made[offset : offset + len(value)] = value
    return bytes(made)


FIRST, LONG = FRAG._replace(offset_flags=1), DEST._replace(length=1)
CLAIMS: dict[str, tuple[Callable[[], bytes], bool]] = {
    # The frame ends before the packet does (ip_rcv_core, ip6_rcv_core).
    "v4-longer-than-the-frame": (lambda: patched(syn4(), (2, b"\0\x29")), False),
    "v6-longer-than-the-frame": (lambda: patched(syn6(), (4, b"\0\x15")), False),
    "v6-longer-behind-options": (lambda: patched(syn6(LONG), (4, b"\0\x25")), False),
    # The frame goes on behind the packet: padding.
    "v4-padded": (lambda: syn4() + bytes(6), True),
    "v6-padded": (lambda: syn6(LONG) + bytes(6), True),
    "v4-header-in-the-padding": (lambda: patched(syn4(), (2, b"\0\x27")), False),
    "v4-header-all-in-the-padding": (lambda: patched(syn4(), (2, b"\0\x14")), False),
    "v4-shorter-than-its-own-header": (lambda: patched(syn4(), (2, b"\0\x13")), False),
    "v4-no-length": (lambda: patched(syn4(), (2, b"\0\0")), False),
    "v4-options-beyond-its-length": (lambda: patched(syn4(options=b"\1" * 40), (2, b"\0\x28")), False),
    "v6-header-in-the-padding": (lambda: patched(syn6(), (4, b"\0\x13")), False),
    "v6-no-length": (lambda: patched(syn6(), (4, b"\0\0")), False),
    # RFC 2675: no length before hop-by-hop options may be a jumbogram. Linux takes it without the option too.
    "v6-no-length-before-options": (lambda: patched(syn6(HOP), (4, b"\0\0")), True),
    "v6-no-length-before-others": (lambda: patched(syn6(DEST), (4, b"\0\0")), False),
    # The data offset of TCP (tcp_error).
    "v4-data-offset-4": (lambda: patched(syn4(), (32, b"\x40")), False),
    "v6-data-offset-0": (lambda: patched(syn6(), (52, b"\0")), False),
    "v4-data-offset-beyond": (lambda: patched(syn4(), (32, b"\x60")), False),
    "v4-data-offset-into-padding": (lambda: patched(syn4(), (32, b"\x60")) + bytes(6), False),
    "v6-data-offset-beyond": (lambda: patched(syn6(), (52, b"\xf0")), False),
    # The options of a first fragment may go on in the next one, its header may not.
    "v4-first-fragment-options-beyond": (lambda: patched(syn4(fragment=0x2000), (32, b"\xf0")), True),
    "v6-first-fragment-options-beyond": (lambda: patched(syn6(FIRST), (60, b"\xf0")), True),
    "v4-first-fragment-in-padding": (lambda: patched(syn4(fragment=0x2000), (2, b"\0\x24")), False),
    "v6-first-fragment-in-padding": (lambda: patched(syn6(FIRST), (4, b"\0\x18")), False),
    # RFC 6946: an atomic fragment is whole.
    "v6-atomic-fragment": (lambda: syn6(FRAG), True),
    "v6-atomic-fragment-offset-beyond": (lambda: patched(syn6(FRAG), (60, b"\x60")), False),
    # What is no matter of its shape: its checksums, its options' contents, the bits that nobody uses.
    "v4-checksum": (lambda: patched(syn4(), (10, b"\xde\xad"), (36, b"\xbe\xef")), True),
    "v4-reserved-bit": (lambda: syn4(fragment=0x8000), True),
    "v4-bad-options": (lambda: syn4(options=b"\x83\xff\xff\xff"), True),
    "v4-reserved-bits-of-tcp": (lambda: patched(syn4(), (32, b"\x5f")), True),
}
"""Packets that lie about their size, and whether conntrack takes them for a SYN all the same."""


@pytest.mark.parametrize("name", CLAIMS)
def test_claimed_length(watched: Watched, name: str) -> None:
    """A SYN that the stack drops for its lengths, or that conntrack and NAT pass over, is none: it is truncated."""
    make, whole = CLAIMS[name]
    told = watched.check(ethernet(make(), tags=(CTAG,)))
    watched.check(ethernet(make()))
    watched.check(make(), ethernet=False, protocol=IPV4 if name.startswith("v4") else IPV6)
    assert isinstance(told, Segment)
    assert told.whole is whole
    watched.note_leaving(packet := ethernet(make()))
    watched.rig.out(packet)
    watched.compare(packet)


@pytest.mark.parametrize("flags", [RST, RST | ACK, SYN | ACK, SYN | FIN, SYN | RST])
@pytest.mark.parametrize("tags", [(), (CTAG,)], ids=["untagged", "c"])
def test_claimed_length_of_what_is_no_syn(watched: Watched, flags: int, tags: tuple[int, ...]) -> None:
    """What comes in and is no SYN is not counted, cut or not; what leaves is, if it could have been an answer."""
    frame = ethernet(patched(syn4(flags=flags), (2, b"\0\x14")), tags=tags)
    watched.check(frame)
    assert watched.events[Event.TRUNCATED] == 0
    watched.note_leaving(frame)
    watched.rig.out(frame)
    watched.compare(frame)
    assert watched.events[Event.TRUNCATED] == 1


@NO_XDP
@given(st.binary(min_size=SHORTEST, max_size=200))
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_bytes(watched: Watched, data: bytes) -> None:
    """Any bytes at all pass every program unchanged."""
    frame = tagged(data) if refused_by_test_run(data) else data
    for program, kind in (PROGRAMS | XDP_PROGRAMS).items():
        if kind != "socket_filter":
            watched.rig.run(program, frame)


@pytest.mark.parametrize("name", ["six", "beyond"])
def test_no_tcp_behind_a_long_chain(watched: Watched, name: str) -> None:
    """UDP behind as many extension headers as are followed, or behind long ones, is nothing that was missed."""
    assert watched.check(ethernet(syn6(*CHAINS[name], last=17))[:LARGEST]) is Kind.OTHER


def test_scapy_agrees(watched: Watched) -> None:
    """Packets that another library built, with its own ideas of options and headers, are counted."""
    import warnings  # noqa: PLC0415

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from scapy.layers import inet, inet6, l2  # noqa: PLC0415

    options = [("MSS", 1460), ("WScale", 7), ("SAckOK", b"")]
    link4 = inet.IP(src="8.0.1.5", dst="8.0.10.1", options=inet.IPOption_Router_Alert())
    link6 = inet6.IPv6(src="2001:db8:86dd:1::5", dst="2001:db8:86dd:10::1")
    layers = [
        link4,
        link6,
        link6 / inet6.IPv6ExtHdrHopByHop(options=inet6.RouterAlert()),
        link6 / inet6.IPv6ExtHdrRouting(addresses=["2001:db8::1"]) / inet6.IPv6ExtHdrDestOpt(),
        link6 / inet6.IPv6ExtHdrFragment(m=1),
    ]
    outer = [l2.Ether(), l2.Ether() / l2.Dot1Q(vlan=5), l2.Ether() / l2.Dot1AD(vlan=5) / l2.Dot1Q(vlan=6)]
    for frame in outer:
        for layer in layers:
            segment = inet.TCP(sport=40_000, dport=80, flags="S", seq=next_isn(), options=options)
            told = watched.check(bytes(frame / layer / segment))
            assert isinstance(told, Segment)
    assert watched.rig.event(Event.TRUNCATED) == 0
