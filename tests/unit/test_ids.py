"""Trace ids, span ids and sampling thresholds, against a second small implementation and published values."""

from __future__ import annotations

import itertools
import struct
import sys
from ctypes import c_uint64

import pytest
from hypothesis import given
from hypothesis import strategies as st

from otel_lb_hop.core.ids import mix, rejection_threshold, span_id, trace_id, tracestate
from otel_lb_hop.model import pack_address

GOLDEN_GAMMA = 0x9E3779B97F4A7C15
ADDRESSES = st.binary(min_size=16, max_size=16)
PORTS = st.binary(min_size=2, max_size=2)
ISNS = st.integers(0, 2**32 - 1)


def second_mix(value: int) -> int:
    """Finalize as java.util.SplittableRandom does, in the arithmetic of C."""
    word = c_uint64(value)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        word = c_uint64((word.value ^ (word.value >> shift)) * factor)
    return word.value ^ (word.value >> 31)


def second_trace_id(source: bytes, source_port: bytes, destination: bytes, destination_port: bytes, isn: int) -> int:
    """Do what trace_id_of in bpf/lb_hop.c does, with its types: u16 fields, u32 words, u64 hashes."""
    ports = [struct.unpack("@H", port)[0] for port in (source_port, destination_port)]
    words = [*struct.unpack("@4I", source), *struct.unpack("@4I", destination)]
    low = second_mix(ports[0] * 2**48 + ports[1] * 2**32 + isn)
    for index in (0, 2, 4, 6):
        low = second_mix(low ^ (words[index] + words[index + 1] * 2**32))
    high = second_mix(low ^ isn ^ GOLDEN_GAMMA)
    return high * 2**64 + low


def test_mix_is_splitmix64() -> None:
    """The finalizer gives the published outputs of SplitMix64 with the seed 1234567."""
    published = [
        6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821,
    ]  # fmt: skip
    assert [mix((1234567 + turn * GOLDEN_GAMMA) % 2**64) for turn in range(1, 6)] == published


# Source, destination, ISN → the id on a little-endian machine.
VECTORS = [
    (("172.18.0.3", 24048), ("10.100.2.2", 8080), 0x12345678, "05b26865cde7f05e43dc4ee267a1d249"),
    (("fd00:18::3", 24048), ("fd00:100::2", 8080), 0xFFFFFFFF, "e0fb29d4ed32e1b49c1672ef800ed35e"),
    (("0.0.0.0", 0), ("0.0.0.0", 0), 0, "d0e4fd80735fe33cf22805f14c6a99ad"),
]


@pytest.mark.skipif(sys.byteorder != "little", reason="the vectors are those of a little-endian machine")
@pytest.mark.parametrize(("source", "destination", "isn", "expected"), VECTORS)
def test_trace_id_vectors(source: tuple[str, int], destination: tuple[str, int], isn: int, expected: str) -> None:
    """Known connections have known ids: nodes with different versions of the agent still agree."""
    ends = [(pack_address(address), port.to_bytes(2, "big")) for address, port in (source, destination)]
    got = trace_id(*ends[0], *ends[1], isn)
    assert f"{got:032x}" == expected


@given(ADDRESSES, PORTS, ADDRESSES, PORTS, ISNS)
def test_trace_id_is_that_of_the_second_implementation(
    source: bytes, source_port: bytes, destination: bytes, destination_port: bytes, isn: int
) -> None:
    """Any tuple and ISN give the same id in both implementations, in 128 bits."""
    fields = (source, source_port, destination, destination_port, isn)
    assert trace_id(*fields) == second_trace_id(*fields) < 2**128


def test_every_part_matters() -> None:
    """A change in any one part of the tuple or in the ISN, and swapping the ends, gives another id."""
    source, destination = pack_address("172.18.0.3"), pack_address("10.100.2.2")
    fields: list[tuple[bytes, bytes, bytes, bytes, int]] = [
        (source, b"\x00\x01", destination, b"\x00\x02", 7),
        (pack_address("172.18.0.4"), b"\x00\x01", destination, b"\x00\x02", 7),
        (source, b"\x01\x00", destination, b"\x00\x02", 7),
        (source, b"\x00\x01", pack_address("10.100.2.3"), b"\x00\x02", 7),
        (source, b"\x00\x01", destination, b"\x02\x00", 7),
        (source, b"\x00\x01", destination, b"\x00\x02", 8),
        (destination, b"\x00\x02", source, b"\x00\x01", 7),
    ]
    ids = [trace_id(*each) for each in fields]
    assert len({each & 2**64 - 1 for each in ids}) == len({each >> 64 for each in ids}) == len(fields)


def test_span_id() -> None:
    """A span id follows from the trace id alone: its low half."""
    assert span_id(bytes.fromhex("05b26865cde7f05e43dc4ee267a1d249")).hex() == "43dc4ee267a1d249"


@pytest.mark.parametrize(
    ("ratio", "threshold", "state"),
    [
        (1.0, 0, "th:0"),
        (0.5, 0x80000000000000, "th:8"),
        (0.25, 0xC0000000000000, "th:c"),
        (0.75, 0x40000000000000, "th:4"),
        (0.0625, 0xF0000000000000, "th:f"),
        (0.1, 0xE6666666666666, "th:e6666666666666"),
        (1 / 3, 0xAAAAAAAAAAAAAC, "th:aaaaaaaaaaaaac"),
        (0.01, 0xFD70A3D70A3D71, "th:fd70a3d70a3d71"),
        (2.0**-56, 0xFFFFFFFFFFFFFF, "th:ffffffffffffff"),
    ],
)
def test_threshold(ratio: float, threshold: int, state: str) -> None:
    """Ratios become the thresholds of OpenTelemetry's tracestate handling, trailing zeros left out."""
    assert rejection_threshold(ratio) == threshold
    assert tracestate(threshold) == state


@pytest.mark.parametrize("ratio", [0.0, 1e-20])
def test_ratio_zero_rejects_all(ratio: float) -> None:
    """No randomness of 56 bits reaches the threshold of a ratio of zero, or of next to nothing."""
    assert rejection_threshold(ratio) > 2**56 - 1


@given(st.floats(2.0**-56, 1))
def test_tracestate_says_the_ratio(ratio: float) -> None:
    """A reader who fills the digits up with zeros gets the threshold, and from it the ratio, back."""
    digits = tracestate(rejection_threshold(ratio)).removeprefix("th:")
    threshold = int(digits.ljust(14, "0"), 16)
    assert threshold == rejection_threshold(ratio)
    assert (2**56 - threshold) / 2**56 == pytest.approx(ratio, rel=1e-9, abs=2.0**-56)


@pytest.mark.parametrize("ratio", [0.01, 0.1, 0.5, 0.9])
def test_a_ratio_keeps_that_share(ratio: float) -> None:
    """Of many connections that differ little, the ratio's share has the randomness to be kept."""
    threshold = rejection_threshold(ratio)
    source, destination = pack_address("172.18.0.3"), pack_address("10.100.2.2")
    tuples = itertools.product(range(20_000, 20_100), range(0, 100 * 64_000, 64_000))
    kept = 0
    for port, isn in tuples:
        trace = trace_id(source, port.to_bytes(2, "big"), destination, b"\x1f\x90", isn)
        kept += trace % 2**56 >= threshold
    # Five standard deviations of a binomial distribution with 10,000 draws.
    assert kept == pytest.approx(10_000 * ratio, abs=5 * (10_000 * ratio * (1 - ratio)) ** 0.5)
