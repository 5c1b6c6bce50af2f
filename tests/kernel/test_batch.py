"""Many rows read by one call, on the kernel's own maps: every row once, whatever comes and goes meanwhile."""

from __future__ import annotations

import errno
import struct
import threading
from collections import Counter
from typing import TYPE_CHECKING

import pytest

from otel_lb_hop.core.layout import HOP_STATS_WORDS, VIP_STATS_WORDS
from otel_lb_hop.kernel.bpf import Map, possible_cpus
from otel_lb_hop.kernel.tables import BATCH_ROWS
from tests.kernel.packets import End
from tests.kernel.requirements import needs_kernel
from tests.kernel.rig import in_threads, vip_port

if TYPE_CHECKING:
    from tests.kernel.rig import Rig

pytestmark = [pytest.mark.root, needs_kernel]

WALKS = 40


def key(number: int) -> bytes:
    """Make a key of vip_stats or hop_stats."""
    return struct.pack("=I", number)


def copies(words: int, *counts: int) -> bytes:
    """Make a per-CPU value: in the copy of the first CPU these counts, in each further one a hundred more."""
    rows = [[count + 100 * cpu for count in counts] + [0] * (words - len(counts)) for cpu in range(possible_cpus())]
    return b"".join(struct.pack(f"={words}Q", *row) for row in rows)


def total(count: int) -> int:
    """Add up what `copies` made of a count."""
    return sum(count + 100 * cpu for cpu in range(possible_cpus()))


@pytest.mark.parametrize("room", [0, 1, 7, 500, 10_000])
def test_every_row_comes_once_with_all_its_copies(rig: Rig, room: int) -> None:
    """However many fit in a call: fewer than a bucket has, as many as there are, or all of them."""
    table = rig.loaded.hop_stats
    rows = {key(number): copies(HOP_STATS_WORDS, number, 7) for number in range(500)}
    for each, value in rows.items():
        table.put(each, value)
    came = list(table.items(room))
    assert len(came) == 500
    assert dict(came) == rows


def test_full_map_with_crowded_buckets(narrow: Rig) -> None:
    """Sixteen rows in as many buckets: some have several, more than there is room for at first."""
    table = narrow.loaded.hop_stats
    for number in range(16):
        table.put(key(number), copies(HOP_STATS_WORDS, number))
    came = list(table.items(1))
    assert len(came) == 16
    assert dict(came) == {key(number): copies(HOP_STATS_WORDS, number) for number in range(16)}


def test_empty_map(narrow: Rig) -> None:
    """Nothing comes of nothing."""
    assert list(narrow.loaded.hop_stats.items()) == []


def test_refusals(narrow: Rig) -> None:
    """A map that cannot be read so, and a descriptor that is none, are told as the kernel tells them."""
    not_supported = 524  # ENOTSUPP, which is the kernel's own and has no name in errno.h
    for fd, expected in ((narrow.loaded.records_fd, not_supported), (1 << 20, errno.EBADF)):
        with pytest.raises(OSError) as caught:  # noqa: PT011 - the number is what counts
            list(Map(fd, 4, 8).items())
        assert caught.value.errno == expected


def test_rows_that_stay_come_once_while_others_come_and_go(rig: Rig) -> None:
    """Rows are deleted and made again all the time: none of the others is missed, and no row is told twice."""
    table = rig.loaded.hop_stats
    stay = {key(number): copies(HOP_STATS_WORDS, number) for number in range(0, 2_000, 2)}
    for each, value in stay.items():
        table.put(each, value)
    done = threading.Event()
    changes: Counter[str] = Counter()

    def change() -> None:
        while not done.is_set():
            for number in range(1, 2_000, 8):
                try:
                    table_of_changes.put(key(number), b"")
                except OSError as error:
                    if error.errno != errno.ENOMEM:
                        raise
                    continue  # the kernel fills its reserve of memory for rows a moment later
                changes["put"] += 1
            for number in range(1, 2_000, 8):
                table_of_changes.delete(key(number))
                changes["deleted"] += 1

    def walk() -> None:
        try:
            for _ in range(WALKS):
                came = list(table.items(16))
                assert max(Counter(each for each, _ in came).values()) == 1
                assert stay.items() <= dict(came).items()
        finally:
            done.set()

    # Another object for the same map: its buffers are not for two threads.
    table_of_changes = Map(table.fd, 4, 8 * HOP_STATS_WORDS, per_cpu=True)
    in_threads(change, walk)
    assert min(changes["put"], changes["deleted"]) > WALKS


def test_snapshot_of_many_rows(rig: Rig) -> None:
    """More rows than a batch: each row's sum over the CPUs, those without counts too, the same as read singly."""
    vips = [End.of(f"8.0.{10 + number // 250}.{1 + number % 250}", 80) for number in range(BATCH_ROWS + 50)]
    rig.serve(*(vip_port(each, (End.of("8.0.4.7", 8080), "node2")) for each in vips))
    vip_ids, hop_ids = sorted(rig.topology.vips.by_id), sorted(rig.topology.hops.by_id)
    assert (len(vip_ids), len(hop_ids)) == (BATCH_ROWS + 50, 2 * (BATCH_ROWS + 50))
    for number in vip_ids[::2]:
        rig.loaded.vip_stats.put(key(number), copies(VIP_STATS_WORDS, 0, number))
    for number in hop_ids[::3]:
        rig.loaded.hop_stats.put(key(number), copies(HOP_STATS_WORDS, number))
    # Rows of nobody are not told; rows that someone else removed are left out.
    rig.loaded.hop_stats.put(key(1 << 30), copies(HOP_STATS_WORDS, 1))
    rig.loaded.hop_stats.delete(key(hop_ids[0]))
    snapshot = rig.snapshot()
    assert {number: row.connections for number, row in snapshot.vips.items()} == {
        number: (total(0), total(number)) if index % 2 == 0 else (0, 0) for index, number in enumerate(vip_ids)
    }
    assert {number: row.forwarded for number, row in snapshot.hops.items()} == {
        number: (total(number), 0) if index % 3 == 0 else (0, 0) for index, number in enumerate(hop_ids) if index
    }
    assert len({id(row) for row in snapshot.hops.values() if row.forwarded == (0, 0)}) == 1
