"""What the programs have to do, said again in Python from the RFCs and the contract in bpf/lb_hop.h.

`parse` tells what a packet is; `Model` counts packets as a node would whose handshake table never fills. Neither
is a translation of the C: it reads front to back over the bytes that are there, with exceptions for what is not.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from enum import Enum, IntEnum, auto
from typing import TYPE_CHECKING, Any, NamedTuple

from otel_lb_hop.core.layout import Event, OriginCode, Unforwarded, Verdict
from otel_lb_hop.model import MAPPED_PREFIX

if TYPE_CHECKING:
    from collections.abc import Mapping

FIN, SYN, RST, PSH, ACK, URG, ECE, CWR = (1 << bit for bit in range(8))

ETHERNET = 14
IPV4, IPV6, CTAG, STAG = 0x0800, 0x86DD, 0x8100, 0x88A8  # IEEE 802 numbers; 802.1Q for the tags
UDP, SCTP = 17, 132  # IANA protocol numbers
TCP, HOP_BY_HOP, ROUTING, FRAGMENT, AUTHENTICATION, DESTINATION = 6, 0, 43, 44, 51, 60  # IANA protocol numbers
EXTENSIONS = {HOP_BY_HOP, ROUTING, FRAGMENT, AUTHENTICATION, DESTINATION}

TRANSPORTS = ({TCP}, {UDP, SCTP})
"""What the programs for TCP look for, and those for datagrams."""

TAGS_FOLLOWED = 2
EXTENSIONS_FOLLOWED = 6
FARTHEST = 4096
"""Headers beginning further into the packet are not looked at (LBH_MAX_OFFSET)."""

SAME_PACKET_NS = 200_000_000


class Kind(Enum):
    """What a packet is to the programs."""

    HANDSHAKE = auto()
    OTHER = auto()
    TRUNCATED = auto()
    FRAGMENT = auto()
    EXTENSION = auto()


EVENT_OF = {Kind.TRUNCATED: Event.TRUNCATED, Kind.FRAGMENT: Event.FRAGMENT, Kind.EXTENSION: Event.EXTENSION}


class Segment(NamedTuple):
    """The handshake fields of a TCP segment with SYN or RST.

    `whole` tells whether it is one by the lengths that its headers claim: conntrack, and with it NAT, takes no other.
    """

    source: bytes
    source_port: int
    destination: bytes
    destination_port: int
    sequence: int
    acknowledgment: int
    flags: int
    whole: bool = True
    data: int = 0
    """Bytes behind the header; 0 in a fragment."""


class Datagram(NamedTuple):
    """The ports of a datagram, of SCTP only with an INIT; without them if its header is not whole."""

    transport: int
    whole: bool = False
    source: bytes = b""
    source_port: int = 0
    destination: bytes = b""
    destination_port: int = 0


Told = Kind | Segment | Datagram


def event_of(packet: Told, *, incoming: bool) -> Event | None:
    """Name the event under which a packet is counted that begins or ends no connection.

    Of what comes in only a SYN is looked at so closely; an Ethernet frame's other segments are passed over at a glance.
    """
    if isinstance(packet, Kind):
        return EVENT_OF.get(packet)
    if packet.whole:
        return None
    if isinstance(packet, Segment) and incoming and packet.flags & (SYN | ACK | RST | FIN) != SYN:
        return None
    return Event.TRUNCATED


class _CutError(Exception):
    """The packet ends before the header does."""


class _Reader:
    """Takes headers off the front of a packet.

    `end` is where the packet ends by its own IP header, as an offset (RFC 791, 3.1, Total Length; RFC 8200, 3, Payload
    Length): an Ethernet frame may go on with padding. `continued`: more of it is in later fragments.
    """

    def __init__(self, packet: bytes) -> None:
        self.size = len(packet)
        self.rest = packet
        self.offset = 0
        self.end = 0
        self.continued = False

    def need(self, size: int) -> bytes:
        if len(self.rest) < size:
            raise _CutError
        return self.rest[:size]

    def take(self, size: int) -> None:
        """Step over a header; what it claims may reach behind the end, and is then missed by the next one."""
        self.rest = self.rest[size:]
        self.offset += size

    def holds(self, size: int) -> bool:
        """Whether so many bytes from here on are the packet's, and all that it claims to be has come."""
        return self.offset + size <= self.end <= self.size


def parse(packet: bytes, *, ethernet: bool, protocol: int = 0, datagrams: bool = False) -> Told:
    """Tell what a packet is to the programs for TCP, or to those for datagrams.

    `protocol` is the EtherType in the skb, which counts where there is no Ethernet header.
    """
    reader = _Reader(packet)
    if ethernet and len(packet) < ETHERNET:
        return Kind.OTHER
    try:
        if ethernet:
            protocol = _ethertype(reader)
        if protocol in {CTAG, STAG}:
            return Kind.EXTENSION
        if protocol == IPV4:
            return _ipv4(reader, datagrams=datagrams)
        if protocol == IPV6:
            return _ipv6(reader, datagrams=datagrams)
    except _CutError:
        return Kind.TRUNCATED
    return Kind.OTHER


def _ethertype(reader: _Reader) -> int:
    ethertype = int.from_bytes(reader.need(ETHERNET)[12:], "big")
    reader.take(ETHERNET)
    for _ in range(TAGS_FOLLOWED):
        if ethertype in {CTAG, STAG}:
            ethertype = int.from_bytes(reader.need(4)[2:], "big")
            reader.take(4)
    return ethertype


def _ipv4(reader: _Reader, *, datagrams: bool) -> Told:
    """RFC 791, 3.1."""
    header = reader.need(20)
    version, words = header[0] >> 4, header[0] & 15
    if version != 4 or words < 5 or header[9] not in TRANSPORTS[datagrams]:
        return Kind.OTHER
    fragment = int.from_bytes(header[6:8], "big")
    if fragment & 0x1FFF:
        return Kind.FRAGMENT
    reader.end = reader.offset + int.from_bytes(header[2:4], "big")
    reader.continued = bool(fragment & 0x2000)
    reader.take(words * 4)
    return _transport(reader, header[9], MAPPED_PREFIX + header[12:16], MAPPED_PREFIX + header[16:20])


def _ipv6(reader: _Reader, *, datagrams: bool) -> Told:
    """RFC 8200, 3 and 4."""
    header = reader.need(40)
    if header[0] >> 4 != 6:
        return Kind.OTHER
    source, destination, following = header[8:24], header[24:40], header[6]
    reader.take(40)
    size = int.from_bytes(header[4:6], "big")
    # RFC 2675, 2: a jumbogram has no length here and a hop-by-hop option instead, which Linux does not insist on.
    reader.end = reader.size if size == 0 and following == HOP_BY_HOP else reader.offset + size
    for followed in range(EXTENSIONS_FOLLOWED + 1):
        if following not in TRANSPORTS[datagrams] and following not in EXTENSIONS:
            return Kind.OTHER
        if reader.offset > FARTHEST:
            return Kind.EXTENSION
        if following in TRANSPORTS[datagrams]:
            return _transport(reader, following, source, destination)
        if followed == EXTENSIONS_FOLLOWED:
            break
        extension = reader.need(8)
        if following == FRAGMENT:
            offset_flags = int.from_bytes(extension[2:4], "big")
            if offset_flags >> 3:
                # What a later fragment holds is told by the header that the fragmented part began with.
                return Kind.FRAGMENT if extension[0] in TRANSPORTS[datagrams] else Kind.OTHER
            reader.continued |= bool(offset_flags & 1)
            reader.take(8)
        elif following == AUTHENTICATION:
            reader.take((extension[1] + 2) * 4)  # RFC 4302, 2.2: words minus two
        else:
            reader.take((extension[1] + 1) * 8)  # RFC 8200, 4.3: eights beyond the first
        following = extension[0]
    return Kind.EXTENSION


def _transport(reader: _Reader, protocol: int, source: bytes, destination: bytes) -> Told:
    if protocol == TCP:
        return _tcp(reader, source, destination)
    try:
        return _datagram(reader, protocol, source, destination)
    except _CutError:
        return Datagram(protocol)


def _tcp(reader: _Reader, source: bytes, destination: bytes) -> Kind | Segment:
    """RFC 9293, 3.1. Options may go on in the next fragment, the rest of the header may not (RFC 7112, RFC 1858)."""
    header = reader.need(20)
    flags = header[13]
    if not flags & (SYN | RST):
        return Kind.OTHER
    size = (header[12] >> 4) * 4
    whole = size >= 20 and reader.holds(20 if reader.continued else size)
    numbers = [int.from_bytes(header[start:end], "big") for start, end in ((0, 2), (2, 4), (4, 8), (8, 12))]
    data = 0 if reader.continued else reader.end - reader.offset - size
    return Segment(source, numbers[0], destination, numbers[1], numbers[2], numbers[3], flags, whole, data)


def _datagram(reader: _Reader, protocol: int, source: bytes, destination: bytes) -> Kind | Datagram:
    """RFC 768; RFC 9260, 3.1 and 3.3.2."""
    header = reader.need(8)
    if protocol == UDP:
        size = int.from_bytes(header[4:6], "big")
        whole = size >= 8 and reader.holds(8 if reader.continued else size)
    else:
        if reader.need(13)[12] != 1:
            return Kind.OTHER
        whole = reader.holds(32)
    ports = int.from_bytes(header[0:2], "big"), int.from_bytes(header[2:4], "big")
    return Datagram(protocol, whole, source, ports[0], destination, ports[1])


class _State(IntEnum):
    """`enum lbh_state`, as far as a handshake has one between two packets."""

    SEEN = 2
    FORWARDED = 3
    UNANSWERED = 4
    SETTLED = 5


class Entry(NamedTuple):
    """What the handshake table holds of a connection; `translated` is SNAT source and backend."""

    isn: int
    state: int
    client: tuple[bytes, int]
    vip: tuple[bytes, int]
    vip_id: int
    hop_id: int
    interface: int
    retransmits: int
    origin: int
    unforwarded: int
    translated: tuple[bytes, int, bytes, int] | None


@dataclass
class _Handshake:
    vip_id: int
    hop_id: int
    vip: tuple[bytes, int]
    origin: OriginCode
    unforwarded: Unforwarded
    hook: tuple[int, bool]
    last_ns: int
    state: _State = _State.SEEN
    translated: tuple[bytes, int, bytes, int] | None = None
    retransmits: int = 0


_Tuple = tuple[int, bytes, int, bytes, int]
"""ISN, client, client port, VIP, VIP port."""


@dataclass
class Model:
    """Counts packets: VIP ports as (address, port) → (id, reason), backends as (id, address, port) → row."""

    vips: dict[tuple[bytes, int], tuple[int, Unforwarded]]
    backends: dict[tuple[int, bytes, int], int]
    uplinks: frozenset[int]
    connections: Counter[tuple[int, OriginCode]] = field(default_factory=Counter)
    unforwarded: Counter[tuple[int, OriginCode, Unforwarded]] = field(default_factory=Counter)
    retransmits: Counter[int] = field(default_factory=Counter)
    forwarded: Counter[tuple[int, OriginCode]] = field(default_factory=Counter)
    verdicts: Counter[tuple[int, Verdict]] = field(default_factory=Counter)
    evicted: Counter[int] = field(default_factory=Counter)
    measured_forward: Counter[int] = field(default_factory=Counter)
    events: Counter[Event] = field(default_factory=Counter)
    told: list[tuple[int, Verdict, int]] = field(default_factory=list)
    """ISN, verdict and retransmits of every record, in order."""
    _handshakes: dict[_Tuple, _Handshake] = field(default_factory=dict)
    _early: dict[_Tuple, int] = field(default_factory=dict)
    """SYNs with data, the sequence number of their last byte in place of the ISN → ISN."""

    def incoming(self, packet: Told, interface: int, now_ns: int, *, xdp: bool) -> None:
        """Take a packet that comes in by an interface, and is seen on its tc hook or by XDP."""
        if not self._is_handshake(packet, incoming=True):
            return
        assert isinstance(packet, Segment)
        vip = packet.destination, packet.destination_port
        if packet.flags & (SYN | ACK | RST | FIN) != SYN or vip not in self.vips:
            return
        vip_id, reason = self.vips[vip]
        key = (packet.sequence, packet.source, packet.source_port, *vip)
        if packet.data:
            self._early[packet.sequence + packet.data & 0xFFFFFFFF, *key[1:]] = packet.sequence
        known = self._handshakes.get(key)
        if known is None:
            origin = OriginCode.EXTERNAL if interface in self.uplinks else OriginCode.INTERNAL
            if origin is OriginCode.INTERNAL and reason is Unforwarded.NO_LOCAL_ENDPOINTS:
                reason = Unforwarded.DROPPED  # policy Local binds only what comes from outside
            self._handshakes[key] = _Handshake(vip_id, vip_id, vip, origin, reason, (interface, xdp), now_ns)
            self.connections[vip_id, origin] += 1
            return
        if (interface, xdp) == known.hook or now_ns - known.last_ns > SAME_PACKET_NS:
            known.retransmits += 1
            self.retransmits[known.vip_id] += 1
        known.last_ns = now_ns

    def outgoing(self, packet: Told) -> None:
        """Take a packet that leaves."""
        if not self._is_handshake(packet, incoming=False):
            return
        assert isinstance(packet, Segment)
        flags = packet.flags & (SYN | ACK | RST | FIN)
        if flags == SYN:
            self._leaves(packet)
        elif flags in {SYN | ACK, RST | ACK}:
            self._answered(packet, refused=bool(flags & RST))

    def counts(self) -> Counter[object]:
        """Tell what was counted so far, under the names that `rig.counts_of` gives it."""
        counts: Counter[object] = Counter(self.events)
        rows: dict[str, Mapping[Any, int]] = {
            "connections": self.connections,
            "unforwarded": self.unforwarded,
            "retransmits": self.retransmits,
            "forwarded": self.forwarded,
            "verdict": self.verdicts,
            "evicted": self.evicted,
            "forward duration": self.measured_forward,
        }
        for name, row in rows.items():
            counts.update({(name, key): number for key, number in row.items()})
        answers = {key[0]: number for key, number in self.verdicts.items() if key[1] is Verdict.ANSWERED}
        counts.update({("handshake duration", key): number for key, number in answers.items()})
        return counts

    def entries(self) -> Counter[Entry]:
        """Tell what the handshake table has to hold."""
        return Counter(
            Entry(
                key[0], each.state, key[1:3], each.vip, each.vip_id, each.hop_id, each.hook[0], each.retransmits,
                each.origin, each.unforwarded, each.translated,
            )
            for key, each in self._handshakes.items()
        )  # fmt: skip

    def age(self, ns: int) -> None:
        """Let every handshake be so much older."""
        for each in self._handshakes.values():
            each.last_ns -= ns

    def sweep(self, *, early: bool) -> None:
        """Give the verdict over all that is still open; early: before a client would have sent its SYN again."""
        for key, each in self._handshakes.items():
            if each.state is _State.SEEN:
                self._never_forwarded(key[0], each)
            elif each.state is _State.FORWARDED and early and not each.retransmits:
                self.evicted[each.hop_id] += 1
                self.events[Event.RECORD_NO_VERDICT] += 1
            elif each.state is _State.FORWARDED:
                verdict = Verdict.TIMEOUT if each.retransmits else Verdict.REPLY_UNSEEN
                self.verdicts[each.hop_id, verdict] += 1
                self.told.append((key[0], verdict, each.retransmits))
            if each.state in {_State.SEEN, _State.FORWARDED}:
                each.state = _State.UNANSWERED

    def _is_handshake(self, packet: Told, *, incoming: bool) -> bool:
        event = event_of(packet, incoming=incoming)
        if event is not None:
            self.events[event] += 1
        return isinstance(packet, Segment) and packet.whole

    def _leaves(self, packet: Segment) -> None:
        target = packet.destination, packet.destination_port
        if (packet.sequence, packet.source, packet.source_port, *target) in self._handshakes:
            return  # routed on as it came
        translation = packet.source, packet.source_port, *target
        if any(key[0] == packet.sequence and each.translated == translation for key, each in self._handshakes.items()):
            return  # it passes one more hook, or was sent again
        # What leaves for a VIP is not its own entries' translation. With one ISN for several, each entry is told of.
        same = [each for key, each in self._handshakes.items() if key[0] == packet.sequence and each.vip != target]
        waiting = [each for each in same if each.state is _State.SEEN]
        self.events[Event.LATE] += sum(each.state is _State.UNANSWERED and not each.translated for each in same)
        self.events[Event.ISN_SHARED] += max(0, len(waiting) - 1)
        if not waiting:
            return
        youngest = waiting[-1]  # a dict keeps the order of insertion
        youngest.state, youngest.translated = _State.FORWARDED, translation
        youngest.hop_id = self.backends.get((youngest.vip_id, *target), youngest.vip_id)
        self.forwarded[youngest.hop_id, youngest.origin] += 1
        self.measured_forward[youngest.hop_id] += 1

    def _answered(self, packet: Segment, *, refused: bool) -> None:
        isn = packet.acknowledgment - 1 & 0xFFFFFFFF
        ends = packet.destination, packet.destination_port, packet.source, packet.source_port
        # RFC 7413, 4.2, and RFC 9293, 3.10.7.1: with the SYN its data are acknowledged.
        isn = self._early.get((isn, *ends), isn)
        known = self._handshakes.get((isn, *ends))
        if known is None or known.state is _State.SETTLED:
            return
        if known.state is _State.UNANSWERED:
            self.events[Event.LATE] += not refused
            return
        if refused and known.state is _State.SEEN:
            self._never_forwarded(isn, known)
        else:
            verdict = Verdict.REFUSED if refused else Verdict.ANSWERED
            if known.state is _State.SEEN:
                self.forwarded[known.hop_id, known.origin] += 1
            self.verdicts[known.hop_id, verdict] += 1
            self.told.append((isn, verdict, known.retransmits))
        known.state = _State.SETTLED

    def _never_forwarded(self, isn: int, known: _Handshake) -> None:
        self.unforwarded[known.vip_id, known.origin, known.unforwarded] += 1
        self.told.append((isn, Verdict(Verdict.DROPPED + known.unforwarded), known.retransmits))


@dataclass
class DatagramModel:
    """Counts datagrams: VIP ports as (transport, address, port) → (id, reason)."""

    vips: dict[tuple[int, bytes, int], tuple[int, Unforwarded]]
    uplinks: frozenset[int]
    flows: set[Datagram] = field(default_factory=set)
    counts: Counter[object] = field(default_factory=Counter)

    def incoming(self, packet: Told, interface: int) -> None:
        """Take a packet that comes in by an interface. Of what is no datagram, lbh_ingress counts the faults."""
        if not isinstance(packet, Datagram):
            return
        if not packet.whole:
            self.counts[Event.TRUNCATED] += 1
            return
        vip = self.vips.get((packet.transport, packet.destination, packet.destination_port))
        if vip is None or packet in self.flows:
            return
        vip_id, reason = vip
        origin = OriginCode.EXTERNAL if interface in self.uplinks else OriginCode.INTERNAL
        if reason is Unforwarded.DROPPED or (
            origin is OriginCode.INTERNAL and reason is Unforwarded.NO_LOCAL_ENDPOINTS
        ):
            return
        self.flows.add(packet)
        self.counts["connections", (vip_id, origin)] += 1
        self.counts["unforwarded", (vip_id, origin, reason)] += 1
