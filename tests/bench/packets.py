"""What the programs cost a packet, by its kind: BPF_PROG_TEST_RUN against an empty program, caches warm.

A packet of a new connection is another one each time: packets.c, compiled behind bpf/lb_hop.c, changes it before each
run; what that costs is taken off again.
"""

from __future__ import annotations

import random
import shutil
import statistics
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple
from unittest import mock

from otel_lb_hop.core.layout import Settings
from otel_lb_hop.kernel import bpf, loader
from tests.bench.measure import Row, empty_program
from tests.bench.traffic import PORT, VIP
from tests.kernel.burst import Burst, packet
from tests.kernel.rig import close, in_threads

if TYPE_CHECKING:
    from collections.abc import Iterator

    from otel_lb_hop.kernel.loader import Loaded

VARYING = ("bench_syn", "bench_answer", "bench_syn_in", "bench_syn_out", "bench_answer_out")
RING_PAGES = 4_096
CONNECTIONS = 8_000
"""Of a round: a quarter of the table, so that hardly a bucket overflows."""
ROUNDS = 30
TURNS = 60
TURN_RUNS = 4_000
SYN, ACK, ANSWER, DATA = 0x02, 0x10, 0x12, 0x18
CLIENT, VIP_PORT, SNAT, BACKEND = ("198.51.100.7", 1_234), (VIP, PORT), ("172.18.0.1", 4_321), ("10.100.2.2", 8_080)
OTHER, HANDSHAKE, NO_AIM = 2.0, 10.0, 0.0
"""Aims: as many times as long as the empty program."""


class Costs(NamedTuple):
    """Nanoseconds of a packet of a connection, over the bare change of the packet."""

    syn_in: float
    syn_out: float
    answer_out: float


def packet_costs() -> Iterator[Row]:
    """Run single kinds of packets, then whole connections; each row as a multiple of the empty program's time."""
    with tempfile.TemporaryDirectory() as folder:
        loaded = _load(Path(folder))
    burst = Burst(loaded, Settings(5 * 10**9, 0, 1, 1 << 62))
    empty = empty_program()
    base = _fastest(empty, _segment(CLIENT, VIP_PORT, DATA))
    yield Row("empty program", base, "ns")
    ingress, egress = loaded.programs["lbh_ingress"], loaded.programs["lbh_egress"]
    other_port = (VIP, PORT + 1)
    datagram = bytearray(_segment(CLIENT, VIP_PORT, 0))
    datagram[23] = 17  # UDP
    for what, fd, frame, aim in (
        ("data segment in", ingress, _segment(CLIENT, VIP_PORT, DATA), OTHER),
        ("data segment out", egress, _segment(VIP_PORT, CLIENT, DATA), OTHER),
        ("datagram in", ingress, bytes(datagram), OTHER),
        ("datagram out", egress, bytes(datagram), OTHER),
        ("SYN to a port that is no VIP port, in", ingress, _segment(CLIENT, other_port, SYN), NO_AIM),
        ("SYN of no connection to a VIP port, out", egress, _segment(CLIENT, other_port, SYN), NO_AIM),
        ("SYN-ACK of no connection to a VIP port, out", egress, _segment(VIP_PORT, CLIENT, ANSWER, 3, 99), NO_AIM),
        ("SYN to a VIP port, known, in", ingress, _segment(CLIENT, VIP_PORT, SYN), HANDSHAKE),
    ):
        yield _times(what, _fastest(fd, frame), base, aim)
    rounds = [_connections(loaded, burst) for _ in range(ROUNDS)]
    fastest = Costs(*map(min, zip(*rounds, strict=True)))
    yield _times("SYN to a VIP port, new, in", base + fastest.syn_in, base, HANDSHAKE)
    yield _times("translated SYN, out", base + fastest.syn_out, base, HANDSHAKE)
    yield _times("SYN-ACK of a VIP port, with a record, out", base + fastest.answer_out, base, HANDSHAKE)
    flood = [_over(loaded, "bench_syn_in", "bench_syn", _new_syn(), CONNECTIONS * 8) for _ in range(ROUNDS // 3)]
    yield _times("SYN to a VIP port, new, another one evicted, in", base + min(flood[1:]), base, HANDSHAKE)
    yield from _two_cpus(loaded, burst)
    yield Row("compile and load", loaded.compile_seconds, "s")
    burst.ring.close()
    close(loaded)


def _load(folder: Path) -> Loaded:
    """Compile packets.c behind our own programs."""
    sources = folder / "bpf"
    shutil.copytree(loader.bpf_folder(), sources)
    with (sources / "lb_hop.c").open("a") as source:
        source.write(Path(__file__).with_suffix(".c").read_text())
    further = mock.patch.dict(loader.PROGRAMS, dict.fromkeys(VARYING, "tc"))
    with further, mock.patch.object(loader, "bpf_folder", return_value=sources):
        return loader.load(loader.Sizes(ring_pages=RING_PAGES))


def _times(what: str, ns: float, base: float, aim: float) -> Row:
    times = ns / base
    return Row(
        f"{what} ({ns - base:.0f} ns more), / empty", times, "x", f"<= {aim:g}" if aim else "", not aim or times <= aim
    )


def _two_cpus(loaded: Loaded, burst: Burst) -> Iterator[Row]:
    """Compare one CPU with two that run the same program at once on different connections to one VIP port.

    On a machine with a single CPU free both would take turns: the bare change of the packet is run the same way.
    """
    for what, program, bare in (
        ("SYN to a VIP port, new", "bench_syn_in", "bench_syn"),
        ("SYN-ACK with a record", "bench_answer_out", "bench_answer"),
    ):
        ratios = []
        for _ in range(TURNS):
            (alone,) = _at_once(loaded, program, 1)
            (alone_bare,) = _at_once(loaded, bare, 1)
            both, both_bare = _at_once(loaded, program, 2), _at_once(loaded, bare, 2)
            burst.ring.drain(2 * 4 * TURN_RUNS)
            ratios.append((statistics.mean(both) - statistics.mean(both_bare)) / (alone - alone_bare))
        ratio = statistics.median(ratios)
        yield Row(f"{what}: time a run on two CPUs at once / one", ratio, "x", "<= 1.2", ratio <= 1.2)


def _at_once(loaded: Loaded, program: str, cpus: int) -> list[float]:
    """Run a program on so many CPUs at once, each on connections of its own; answers nanoseconds a run."""
    took: list[float] = []

    def work() -> None:
        isn = random.getrandbits(32)
        if program != "bench_answer_out":
            frame = _segment(CLIENT, VIP_PORT, SYN, isn)
        else:
            bpf.run_program(loaded.programs["bench_syn_in"], _segment(CLIENT, VIP_PORT, SYN, isn), TURN_RUNS)
            frame = _segment(VIP_PORT, CLIENT, ANSWER, 5, isn + 1 & 0xFFFFFFFF)
        took.append(float(bpf.run_program(loaded.programs[program], frame, TURN_RUNS)[2]))

    in_threads(*[work] * cpus)
    return took


def _connections(loaded: Loaded, burst: Burst) -> Costs:
    """Let new connections come in, then be translated, then be answered."""
    isn = random.getrandbits(32)
    costs = Costs(
        _over(loaded, "bench_syn_in", "bench_syn", _segment(CLIENT, VIP_PORT, SYN, isn), CONNECTIONS),
        _over(loaded, "bench_syn_out", "bench_syn", _segment(SNAT, BACKEND, SYN, isn), CONNECTIONS),
        _over(
            loaded,
            "bench_answer_out",
            "bench_answer",
            _segment(VIP_PORT, CLIENT, ANSWER, 5, isn + 1 & 0xFFFFFFFF),
            CONNECTIONS,
        ),
    )
    burst.ring.drain(2 * CONNECTIONS)
    return costs


def _over(loaded: Loaded, program: str, bare: str, frame: bytes, runs: int) -> float:
    whole = bpf.run_program(loaded.programs[program], frame, runs)[2]
    return float(whole - bpf.run_program(loaded.programs[bare], frame, runs)[2])


def _new_syn() -> bytes:
    return _segment(CLIENT, VIP_PORT, SYN, random.getrandbits(32))


def _fastest(fd: int, frame: bytes) -> float:
    return float(min(bpf.run_program(fd, frame, repeat=200_000)[2] for _ in range(5)))


def _segment(
    source: tuple[str, int], destination: tuple[str, int], flags: int, sequence: int = 7, ack: int = 0
) -> bytes:
    return bytes(packet(source, destination, flags, sequence, ack))
