from __future__ import annotations

import json
import shutil
import struct
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

from otel_lb_hop.core import layout
from otel_lb_hop.errors import WireError
from otel_lb_hop.kernel.loader import bpf_folder

if TYPE_CHECKING:
    from pathlib import Path

COMPILER = shutil.which("cc")

# What the header says, printed as JSON by a program that the host's compiler makes of it.
PROBE = r"""
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
typedef uint8_t u8; typedef uint16_t u16; typedef uint32_t u32; typedef uint64_t u64;
#include "lb_hop.h"
#define BOUND(x) "," #x
#define SIZE(t) printf("\"sizeof %s\": %zu,", #t, sizeof(struct t));
#define AT(t, f) printf("\"%s.%s\": %zu,", #t, #f, offsetof(struct t, f));
#define NUMBER(n) printf("\"%s\": %llu,", #n, (unsigned long long)(n));
int main(void)
{
    printf("{");
    SIZE(lbh_vip_key) SIZE(lbh_vip) SIZE(lbh_backend_key) SIZE(lbh_vip_stats) SIZE(lbh_hop_stats)
    SIZE(lbh_handshake) SIZE(lbh_tags) SIZE(lbh_record) SIZE(lbh_settings) SIZE(lbh_uplinks) SIZE(lbh_histogram)
    SIZE(lbh_prefix) SIZE(lbh_kind)
    @FIELDS@
    @NUMBERS@
    printf("\"bounds\": [%s]}", (LBH_BOUNDS(BOUND)) + 1);
    return 0;
}
"""

FIELDS = {
    "lbh_vip_key": (layout.VIP_KEY, ("address", "port", "transport")),
    "lbh_vip": (layout.VIP_VALUE, ("vip_id", "unforwarded")),
    "lbh_backend_key": (layout.BACKEND_KEY, ("vip_id", "address", "port")),
    "lbh_prefix": (layout.PREFIX, ("bits", "address")),
    "lbh_uplinks": (layout.UPLINKS, ("ifindexes",)),
    "lbh_settings": (layout.SETTINGS, layout.Settings._fields),
    "lbh_kind": (layout.KIND, layout.Kind._fields),
    "lbh_record": (layout.RECORD, layout.Record._fields),
}
NUMBERS = {
    "LBH_MAX_UPLINKS": layout.MAX_UPLINKS,
    "LBH_LAYOUT_VERSION": layout.LAYOUT_VERSION,
    "LBH_BUCKETS": layout.BUCKETS,
    "LBH_UNFORWARDED_REASONS": len(layout.Unforwarded),
    "LBH_ORIGINS": len(layout.OriginCode),
    "LBH_EVENTS": len(layout.Event),
    **{f"LBH_{each.name}": each.value for each in layout.Unforwarded},
    **{f"LBH_{each.name}": each.value for each in layout.OriginCode},
    **{f"LBH_{each.name}": each.value for each in layout.Place},
    **{f"LBH_{each.name}": each.value for each in layout.Event},
    **{f"LBH_VERDICT_{each.name}": each.value for each in layout.Verdict if each < layout.Verdict.DROPPED},
    "LBH_VERDICT_UNFORWARDED": layout.Verdict.DROPPED,
}


@pytest.fixture(scope="module")
def header(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Read the header: numbers by name, and the list of bounds."""
    if COMPILER is None:
        pytest.skip("no C compiler (cc) on this machine")
    folder: Path = tmp_path_factory.mktemp("layout")
    fields = " ".join(f"AT({name}, {field})" for name, (_, names) in FIELDS.items() for field in names)
    counters = " ".join(
        [
            "AT(lbh_vip_stats, connections) AT(lbh_vip_stats, unforwarded) AT(lbh_vip_stats, retransmits)",
            *(f"AT(lbh_hop_stats, {field})" for field in layout.HopStats._fields),
            "AT(lbh_histogram, buckets)",
        ]
    )
    source = PROBE.replace("@FIELDS@", fields + counters)
    source = source.replace("@NUMBERS@", " ".join(f"NUMBER({name})" for name in NUMBERS))
    (folder / "probe.c").write_text(source)
    subprocess.run(
        [COMPILER, "-Wall", "-Werror", f"-I{bpf_folder()}", "-o", str(folder / "probe"), str(folder / "probe.c")],
        check=True,
    )
    answer = subprocess.run([str(folder / "probe")], check=True, capture_output=True, text=True).stdout
    parsed: dict[str, Any] = json.loads(answer)
    return parsed


def _offsets(form: struct.Struct, names: tuple[str, ...]) -> dict[str, int]:
    """Find where each field of a struct format starts, by packing one field at a time."""
    values = [b"\xff" * 16 if isinstance(value, bytes) else 1 for value in form.unpack(bytes(form.size))]
    empty = [b"" if isinstance(value, bytes) else 0 for value in values]
    offsets = {}
    for index, name in enumerate(names):
        packed = form.pack(*[values[i] if i == index else empty[i] for i in range(len(values))])
        start = next(i for i, byte in enumerate(packed) if byte)
        # A multi-byte 1 shows at its low end only.
        offsets[name] = start if sys.byteorder == "little" or isinstance(values[index], bytes) else -1
    return offsets


@pytest.mark.parametrize("name", FIELDS)
def test_struct(header: dict[str, Any], name: str) -> None:
    """Size and every offset of a struct are what the header says."""
    form, names = FIELDS[name]
    assert header[f"sizeof {name}"] == form.size
    assert {field: header[f"{name}.{field}"] for field in names} == _offsets(form, names)


@pytest.mark.parametrize("name", NUMBERS)
def test_number(header: dict[str, Any], name: str) -> None:
    """Every constant and enumerator has the value of the header."""
    assert header[name] == NUMBERS[name]


def test_bounds(header: dict[str, Any]) -> None:
    """The histogram bounds are those of the header."""
    assert header["bounds"] == list(layout.BOUNDS_NS)
    assert list(layout.BOUNDS_NS) == sorted(set(layout.BOUNDS_NS))


def test_counter_rows(header: dict[str, Any]) -> None:
    """Rows of counters have the words that the header says, each where the reader expects it."""
    assert header["sizeof lbh_vip_stats"] == layout.VIP_STATS_WORDS * 8
    assert header["sizeof lbh_hop_stats"] == layout.HOP_STATS_WORDS * 8
    assert header["sizeof lbh_histogram"] == layout.HISTOGRAM_WORDS * 8
    vip = layout.unpack_vip_stats(struct.pack("=9Q", *range(9)))
    assert vip.connections[0] == header["lbh_vip_stats.connections"] // 8
    assert vip.unforwarded[0][0] == header["lbh_vip_stats.unforwarded"] // 8
    assert vip.retransmits == header["lbh_vip_stats.retransmits"] // 8
    hop = layout.unpack_hop_stats(struct.pack(f"={layout.HOP_STATS_WORDS}Q", *range(layout.HOP_STATS_WORDS)))
    for name in ("answered", "refused", "timeout", "reply_unseen", "evicted", "translated"):
        assert getattr(hop, name) == header[f"lbh_hop_stats.{name}"] // 8
    assert hop.forwarded[0] == header["lbh_hop_stats.forwarded"] // 8
    assert hop.forward.sum_ns == header["lbh_hop_stats.forward"] // 8
    assert hop.handshake.sum_ns == header["lbh_hop_stats.handshake"] // 8
    assert hop.forward.buckets[0] - hop.forward.sum_ns == header["lbh_histogram.buckets"] // 8


def test_handshake_fits_cache_lines(header: dict[str, Any]) -> None:
    """A bucket's tags fill one cache line and a handshake two."""
    assert header["sizeof lbh_tags"] == 64
    assert header["sizeof lbh_handshake"] == 128


def test_sum_over_cpus_is_exact_for_large_counters() -> None:
    """Counters near 2^63 add up without touching their neighbours."""
    first, second = (2**63 - 1, 5, 0), (2**63, 7, 2**64 - 1)
    raw = struct.pack("=3Q", *first) + struct.pack("=3Q", *second)
    assert layout.sum_cpus(raw, 3) == (2**64 - 1, 12, 2**64 - 1)


@pytest.mark.parametrize("raw", [b"", bytes(7), bytes(25)])
def test_sum_refuses_partial_rows(raw: bytes) -> None:
    """A value that is no whole number of rows is an error, not a guess."""
    with pytest.raises(WireError):
        layout.sum_cpus(raw, 3)


def _ring(capacity: int) -> bytearray:
    return bytearray(2 * capacity)


def _put(data: bytearray, position: int, header: int, payload: bytes) -> int:
    capacity = len(data) // 2
    start = position % capacity
    content = struct.pack("=II", header, 0) + payload
    for offset, byte in enumerate(content):
        place = (start + offset) % capacity
        data[place] = data[place + capacity] = byte
    return position + (len(content) + 7 & ~7)


def _payload(number: int) -> bytes:
    """Make a record that can be told by its first field."""
    return struct.pack("=Q", number) + bytes(layout.RECORD.size - 8)


def _numbers(taken: layout.RingSlice) -> list[int]:
    return [record[0] for record in taken.records]


SIZE = layout.RECORD.size


def test_ring_walk_stops_at_a_busy_record() -> None:
    """A record that is still being written, and all behind it, wait for the next pass."""
    data = _ring(4096)
    end = _put(data, 0, SIZE, _payload(1))
    busy = _put(data, end, SIZE | layout.RING_BUSY, _payload(2))
    produced = _put(data, busy, SIZE, _payload(3))
    taken = layout.walk_ring(memoryview(data), 0, produced, 10)
    assert (_numbers(taken), taken.position, taken.wrong_size) == ([1], end, 0)


def test_ring_walk_skips_discarded_and_counts_wrong_sizes() -> None:
    """A discarded record is nobody's loss; one of a wrong size is counted."""
    data = _ring(4096)
    position = _put(data, 0, SIZE, _payload(1))
    position = _put(data, position, SIZE | layout.RING_DISCARD, _payload(2))
    position = _put(data, position, 24, b"y" * 24)
    position = _put(data, position, 24 | layout.RING_DISCARD, b"y" * 24)
    position = _put(data, position, SIZE, _payload(3))
    taken = layout.walk_ring(memoryview(data), 0, position, 10)
    assert (_numbers(taken), taken.position, taken.wrong_size) == ([1, 3], position, 1)


@pytest.mark.parametrize("before", [64, 0, 8, 2 * layout.RING_STRIDE - 8])
def test_ring_walk_over_the_end(before: int) -> None:
    """A record that begins before the end of the ring and ends after it is read in one piece."""
    data = _ring(4096)
    start = position = 4096 * 3 - before
    for number in range(5):
        position = _put(data, position, SIZE, _payload(number))
    taken = layout.walk_ring(memoryview(data), start, position, 10)
    assert (_numbers(taken), taken.position) == ([0, 1, 2, 3, 4], position)


def test_ring_walk_takes_a_full_ring() -> None:
    """A ring filled to its end, from anywhere in it, is taken whole."""
    for start in (0, 24, 4096 - 8):
        data = _ring(4096)
        position = start
        for number in range(4096 // layout.RING_STRIDE):
            position = _put(data, position, SIZE, _payload(number))
        taken = layout.walk_ring(memoryview(data), start, position, 100)
        assert (_numbers(taken), taken.position) == (list(range(32)), position)


def test_ring_walk_obeys_the_limit() -> None:
    """No more than the limit is taken, and the rest is still there."""
    data = _ring(4096)
    position = 0
    for number in range(5):
        position = _put(data, position, SIZE, _payload(number))
    first = layout.walk_ring(memoryview(data), 0, position, 2)
    rest = layout.walk_ring(memoryview(data), first.position, position, 10)
    assert (_numbers(first), _numbers(rest)) == ([0, 1], [2, 3, 4])


def test_records_decode_with_every_field_in_its_place() -> None:
    """A payload becomes a record, and its kind what connections have in common."""
    kind = layout.Kind(b"b" * 16, b"\x1f\x90", 1, 1, 6, 7, 8, 1)
    record = layout.Record(1, 2, 3, b"t" * 16, b"c" * 16, b"s" * 16, 40000, 24048, 9, layout.KIND.pack(*kind))
    data = _ring(4096)
    produced = _put(data, 0, SIZE, layout.RECORD.pack(*record))
    (got,) = layout.walk_ring(memoryview(data), 0, produced, 10).records
    assert layout.Record._make(got) == record
    assert layout.Kind._make(layout.KIND.unpack(got[-1])) == kind
