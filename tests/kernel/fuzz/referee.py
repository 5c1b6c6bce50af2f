"""Runs inputs through the programs and through the oracle's models, and holds what came of it against each other.

Inputs are compared by the batch: all counters and the whole handshake table, entry by entry. A batch has only inputs of
which the oracle says the same, and a program counts a packet once at most, so faults of two inputs cannot make up for
each other.
"""

from __future__ import annotations

import ctypes
import itertools
import random
import struct
import sys
import time
from collections import Counter
from contextlib import closing, contextmanager
from functools import lru_cache, partial
from typing import TYPE_CHECKING, NamedTuple, TypeVar
from unittest import mock

from otel_lb_hop.core.layout import Event, Settings, Unforwarded, unpack_port
from otel_lb_hop.kernel import bpf, loader
from otel_lb_hop.kernel.loader import Sizes
from otel_lb_hop.model import Policy, Transport
from tests.kernel.fuzz.grammar import (
    BACKENDS,
    DATAGRAM_PORT,
    LARGEST,
    LOCAL_DATAGRAM_PORT,
    LOCAL_PORT,
    VIPS,
    XDP,
    Grammar,
    Input,
    Step,
    is_taken,
    protocol_of,
)  # fmt: skip
from tests.kernel.oracle import (
    ACK,
    CTAG,
    FIN,
    IPV4,
    IPV6,
    RST,
    SAME_PACKET_NS,
    STAG,
    SYN,
    Datagram,
    DatagramModel,
    Entry,
    Kind,
    Model,
    Segment,
    Told,
    parse,
)  # fmt: skip
from tests.kernel.rig import (
    CONTEXT,
    FLOW,
    NODE,
    UNSPEC,
    WAYS,
    XDP_CONTEXT,
    XDP_PASS,
    Namespace,
    Rig,
    close,
    counts_of,
    vip_port,
)  # fmt: skip

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from otel_lb_hop.model import VipPort

BATCH = 128
SIZES = Sizes(vip_ports=64, backends=64, hops=64, places=8, table_buckets=1024, ring_pages=1)
"""A bucket that gets nine of a batch's handshakes, and gives one up, comes once in 10^13 batches."""
SILENT = Settings(verdict_after_ns=0, reject_below=0, record_interval_ns=0, record_burst_ns=0)
HANDSHAKE = struct.Struct("=16x16s16s2s2sIIHBBQ16s16s2s2sI16x")
"""struct lbh_handshake without the times of its SYNs."""
TEST_RUN = struct.Struct("=IIIIQQIIIIQQ64x")
"""union bpf_attr of BPF_PROG_TEST_RUN: program, result, sizes in and out, addresses, repeat, duration, context."""
EMPTY = bytes(8 * WAYS)
TAGS = {CTAG.to_bytes(2, "big"), STAG.to_bytes(2, "big")}
VERSIONS = {IPV4.to_bytes(2, "big"): 4, IPV6.to_bytes(2, "big"): 6}

T = TypeVar("T")


class Class(NamedTuple):
    """A class of inputs: the outcome is one of `Kind`, or CUT for a handshake that is none by its lengths."""

    program: str
    outcome: str
    detail: int
    """Flags of a segment, transport of a datagram."""
    version: int
    """Of IP; 0 if the EtherType is another."""
    tags: int
    """In the frame."""


class Difference(NamedTuple):
    """Inputs on which kernel and oracle differ, and how."""

    inputs: tuple[Input, ...]
    counts: dict[object, tuple[int, int]]
    """Counter → (kernel's, oracle's)."""
    entries: tuple[tuple[Entry, ...], tuple[Entry, ...]]
    """Entries of the handshake table that only the kernel has, and that only the oracle has."""
    flows: tuple[tuple[Datagram, ...], tuple[Datagram, ...]]
    error: str = ""
    """What went wrong with a run itself: its return value, or the packet it left."""


class Runner:
    """Runs programs as `Rig.run` does, a packet at a time and by the million: with buffers that stay."""

    def __init__(self, programs: dict[str, int]) -> None:
        self._programs = programs
        self._packet, self._after = (ctypes.create_string_buffer(LARGEST + 256) for _ in range(2))
        self._context = ctypes.create_string_buffer(CONTEXT.size)
        self._attributes = ctypes.create_string_buffer(TEST_RUN.size)

    def __call__(self, program: str, packet: bytes, interface: int, gso_size: int) -> None:
        """Let a packet pass an interface; it must go on unchanged."""
        ctypes.memmove(self._packet, packet, len(packet))
        xdp = program == XDP
        if xdp:
            XDP_CONTEXT.pack_into(self._context, 0, 0, len(packet), 0, interface, 0, 0)
        else:
            CONTEXT.pack_into(self._context, 0, interface, gso_size)
        context_size = XDP_CONTEXT.size if xdp else CONTEXT.size
        data, after, context = map(ctypes.addressof, (self._packet, self._after, self._context))
        program_fd, room = self._programs[program], len(self._after)
        TEST_RUN.pack_into(
            self._attributes, 0, program_fd, 0, len(packet), room, data, after, 1, 0, context_size, 0, context, 0
        )  # fmt: skip
        bpf._call(bpf._PROG_TEST_RUN, self._attributes)
        _, result, _, size, *_ = TEST_RUN.unpack_from(self._attributes)
        assert result == (XDP_PASS if xdp else UNSPEC)
        assert ctypes.string_at(after, size) == packet


@contextmanager
def referee(*, guarded: bool = False) -> Iterator[Referee]:
    """Load the programs into a namespace of their own and give them a referee.

    `guarded`: as they are compiled where CAP_PERFMON is missing.
    """
    with closing(Namespace()) as namespace:
        with mock.patch.object(loader, "is_guarded", return_value=guarded):
            loaded = loader.load(SIZES, xdp=True)
        try:
            with closing(Rig(loaded, namespace)) as rig, namespace.entered():
                rig.reset(SILENT)
                yield Referee(rig)
        finally:
            close(loaded)


def ports_of_the_node() -> list[tuple[VipPort, Unforwarded]]:
    """Name the VIP ports, each with the reason under which it counts what is never translated."""
    ports = []
    for version, vip in VIPS.items():
        near, far, _ = BACKENDS[version]
        ports.append((vip_port(vip, (near, NODE), (far, "node2")), Unforwarded.DROPPED))
        local = vip_port(vip._replace(port=LOCAL_PORT), (far, "node2"), policy=Policy.LOCAL)
        ports.append((local, Unforwarded.NO_LOCAL_ENDPOINTS))
        for transport in (Transport.UDP, Transport.SCTP):
            closed = vip_port(vip._replace(port=DATAGRAM_PORT), transport=transport)
            ports.append((closed, Unforwarded.NO_ENDPOINTS))
            away = vip._replace(port=LOCAL_DATAGRAM_PORT)
            local = vip_port(away, (far, "node2"), policy=Policy.LOCAL, transport=transport)
            ports.append((local, Unforwarded.NO_LOCAL_ENDPOINTS))
    return ports


class Referee:
    """Knows the node that both sides play, and compares."""

    def __init__(self, rig: Rig) -> None:
        self.rig = rig
        self.effects: set[object] = set()
        """What was counted at least once, by the oracle."""
        self._vips: dict[tuple[bytes, int], tuple[int, Unforwarded]] = {}
        self._datagram_vips: dict[tuple[int, bytes, int], tuple[int, Unforwarded]] = {}
        self._backends: dict[tuple[int, bytes, int], int] = {}
        ports = ports_of_the_node()
        for (port, reason), marked in zip(ports, rig.serve(*(port for port, _ in ports)), strict=True):
            if port.transport is not Transport.TCP:
                self._datagram_vips[port.transport, port.address, port.port] = marked.vip_id, reason
                continue
            self._vips[port.address, port.port] = marked.vip_id, reason
            for (_, node), hop_id in marked.hops.items():
                for backend in port.backends:
                    if backend.node == node:
                        self._backends[marked.vip_id, backend.address, backend.port] = hop_id
        self._seen = counts_of(rig.snapshot())
        self._run = Runner(rig.loaded.programs)

    def compare(self, inputs: Sequence[Input]) -> Difference | None:
        """Let inputs pass on both sides, which begin with empty tables; None if they do not differ."""
        while True:
            began = time.monotonic_ns()
            difference = self._compare(inputs)
            # A pause longer than this between two packets is one that only the programs' clock has seen.
            if time.monotonic_ns() - began < SAME_PACKET_NS:
                return difference

    def _compare(self, inputs: Sequence[Input]) -> Difference | None:
        uplinks = frozenset({self.rig.uplink})
        model = Model(self._vips, self._backends, uplinks)
        datagrams = DatagramModel(self._datagram_vips, uplinks)
        error = ""
        try:
            for each in inputs:
                for step in (*each.before, each.last):
                    self._run(*step)
                    predict(model, datagrams, step)
        except (AssertionError, OSError) as failure:
            error = repr(failure)
        model.events[Event.RECORD_OFF] = len(model.told) + len(datagrams.flows)
        expected = model.counts() + datagrams.counts
        counts = counts_of(self.rig.snapshot())
        seen, self._seen = counts - self._seen, counts
        self.effects |= expected.keys()
        differing = {name: (seen[name], expected[name]) for name in seen | expected if seen[name] != expected[name]}
        has, wants = take_entries(self.rig), model.entries()
        flows = self._take_flows()
        if not (differing or error or has != wants or flows != datagrams.flows):
            return None
        entries = tuple((has - wants).elements()), tuple((wants - has).elements())
        only = tuple(flows - datagrams.flows), tuple(datagrams.flows - flows)
        return Difference(tuple(inputs), differing, entries, only, error)

    def shrink(self, found: Difference) -> Difference:
        """Look for fewer inputs, with fewer bytes, on which both sides still differ."""
        steps = [step for each in found.inputs for step in (*each.before, each.last)]
        found = self._smaller(found, steps, lambda fewer: fewer)
        for at in range(len(found.inputs)):
            steps = [each.last for each in found.inputs]
            found = self._smaller(found, list(steps[at].packet), partial(with_packet, steps, at))
        return found

    def _smaller(self, found: Difference, parts: list[T], steps_of: Callable[[list[T]], list[Step]]) -> Difference:
        """Leave out as many parts as may be, in halves, quarters and so on (delta debugging)."""
        size = max(1, len(parts) // 2)
        while parts and size:
            at = 0
            while at < len(parts):
                fewer = parts[:at] + parts[at + size :]
                steps = steps_of(fewer)
                smaller = self.compare([Input((), step) for step in steps]) if all(map(is_taken, steps)) else None
                if smaller:
                    parts, found = fewer, smaller
                else:
                    at += size
            size //= 2
        return found

    def _take_flows(self) -> set[Datagram]:
        flows = set()
        for key in list(self.rig.flows.keys()):
            client, vip, client_port, vip_port, transport = FLOW.unpack(key)
            flows.add(Datagram(transport, True, client, unpack_port(client_port), vip, unpack_port(vip_port)))  # noqa: FBT003
            self.rig.flows.delete(key)
        return flows


def take_entries(rig: Rig) -> Counter[Entry]:
    """Read the handshake table, and empty it."""
    entries: Counter[Entry] = Counter()
    for key, tags in list(rig.tags.items()):
        if tags == EMPTY:
            continue
        bucket = int.from_bytes(key, sys.byteorder)
        for way, tag in enumerate(struct.unpack(f"={WAYS}Q", tags)):
            if tag:
                raw = rig.handshakes.get(struct.pack("=I", bucket * WAYS + way))
                assert raw is not None
                entries[entry_of(tag, raw)] += 1
        rig.tags.put(key, b"")
    return entries


def entry_of(tag: int, raw: bytes) -> Entry:
    """Read a slot of the handshake table."""
    (
        client, vip, client_port, vip_port, vip_id, interface, retransmits, origin, unforwarded, forward_ns,
        snat, backend, snat_port, backend_port, hop_id,
    ) = HANDSHAKE.unpack(raw)  # fmt: skip
    return Entry(
        tag >> 32,
        tag >> 29 & 7,
        (client, unpack_port(client_port)),
        (vip, unpack_port(vip_port)),
        vip_id,
        hop_id,
        interface,
        retransmits,
        origin,
        unforwarded,
        (snat, unpack_port(snat_port), backend, unpack_port(backend_port)) if forward_ns else None,
    )


def with_packet(steps: list[Step], at: int, packet: list[int]) -> list[Step]:
    """Give one of several steps another packet."""
    return [*steps[:at], steps[at]._replace(packet=bytes(packet)), *steps[at + 1 :]]


@lru_cache(BATCH)
def told_of(step: Step) -> Told:
    """Ask the oracle what a packet is to a program."""
    packet, program = step.packet, step.program
    is_ethernet = not program.endswith("_l3")
    return parse(packet, ethernet=is_ethernet, protocol=protocol_of(packet), datagrams="datagram" in program)


def predict(model: Model, datagrams: DatagramModel, step: Step) -> None:
    """Let the models take a step."""
    told = told_of(step)
    if step.program.startswith("lbh_ingress") or step.program == XDP:
        model.incoming(told, step.interface, 0, xdp=step.program == XDP)
    elif step.program.startswith("lbh_egress"):
        model.outgoing(told)
    else:
        datagrams.incoming(told, step.interface)


def class_of(step: Step) -> Class:
    """Name the class of an input; every class has to be met."""
    told = told_of(step)
    tags, version = layers(step.packet, is_ethernet=not step.program.endswith("_l3"))
    if isinstance(told, Kind):
        return Class(step.program, told.name, 0, version, tags)
    outcome = "HANDSHAKE" if told.whole else "CUT"
    detail = told.flags & (SYN | ACK | RST | FIN) if isinstance(told, Segment) else told.transport
    return Class(step.program, outcome, detail, version, tags)


def layers(packet: bytes, *, is_ethernet: bool) -> tuple[int, int]:
    """Count the VLAN tags in a packet, up to three, and name the IP version that its EtherType does."""
    at, tags = 12, 0
    while is_ethernet and packet[at : at + 2] in TAGS and tags < 3:
        at += 4
        tags += 1
    return tags, VERSIONS.get(packet[at : at + 2], 0)


def classes_to_meet() -> set[Class]:
    """Name all classes of inputs that BPF_PROG_TEST_RUN can bring about."""
    classes = set()
    flags = {each & (SYN | ACK | RST | FIN) for each in range(256) if each & (SYN | RST)}
    for program in ("lbh_ingress", XDP, "lbh_egress", "lbh_datagram"):
        is_datagram = program == "lbh_datagram"
        details = [Transport.UDP, Transport.SCTP] if is_datagram else sorted(flags)
        for suffix, most in (("", 2), ("_l3", 0)) if program != XDP else (("", 2),):
            for version, tags in itertools.product((4, 6), range(most + 1)):
                met = {Kind.OTHER, Kind.TRUNCATED, Kind.FRAGMENT, Kind.EXTENSION}
                if version == 4:
                    met -= {Kind.EXTENSION}
                if version == 4 and is_datagram and not tags:
                    met -= {Kind.TRUNCATED}  # only within the IP header, which a test run wants whole
                classes |= {Class(program + suffix, kind.name, 0, version, tags) for kind in met}
                for outcome, detail in itertools.product(("HANDSHAKE", "CUT"), details):
                    classes.add(Class(program + suffix, outcome, detail, version, tags))
        classes |= {Class(program, Kind.EXTENSION.name, 0, version, 3) for version in (4, 6)}
    return classes


class Fuzzer:
    """Makes inputs from a seed and has them compared."""

    def __init__(self, judge: Referee, seed: str) -> None:
        self.classes: Counter[Class] = Counter()
        self._judge = judge
        self._grammar = Grammar(random.Random(seed), judge.rig)
        self._batches: dict[tuple[str, str], list[Input]] = {}

    def run(self, count: int) -> Difference | None:
        """Compare so many inputs more; stops at the first batch that differs."""
        for _ in range(count):
            made = self._grammar.input()
            met = class_of(made.last)
            self.classes[met] += 1
            batch = self._batches.setdefault(met[:2], [])
            batch.append(made)
            if len(batch) == BATCH and (found := self._flush(batch)):
                return found
        for batch in self._batches.values():
            if found := self._flush(batch):
                return found
        return None

    def _flush(self, batch: list[Input]) -> Difference | None:
        found = self._judge.compare(batch)
        batch.clear()
        return found


def explain(found: Difference) -> str:
    """Tell what differs, and each step in a line from which it can be made again."""
    lines = [f"the run itself: {found.error}"] if found.error else []
    lines += [f"{name}: kernel {kernel}, oracle {oracle}" for name, (kernel, oracle) in found.counts.items()]
    for name, only in (("handshake", found.entries), ("flow", found.flows)):
        for side, values in zip(("kernel", "oracle"), only, strict=True):
            lines += [f"{name} only of the {side}: {value}" for value in values]
    for each in found.inputs:
        lines += [f"{step.program} {step.interface} {step.gso_size} {step.packet.hex()}" for step in each.before]
        lines.append(f"the oracle takes the next for {told_of(each.last)}")
        lines.append(f"{each.last.program} {each.last.interface} {each.last.gso_size} {each.last.packet.hex()}")
    return "\n".join(lines)
