"""Reads the ring buffer of records through its memory map, by time and never by wake-up."""

from __future__ import annotations

import mmap
import struct
import sys
from typing import TYPE_CHECKING

from otel_lb_hop.core.layout import RING_STRIDE, walk_ring
from otel_lb_hop.kernel import bpf

if TYPE_CHECKING:
    from otel_lb_hop.core.layout import RawRecord


class Ring:
    """The consumer side of one BPF_MAP_TYPE_RINGBUF.

    Layout (kernel/bpf/ringbuf.c): a page with the consumer's position, a page with the producer's, then the data
    area mapped twice in a row. The kernel publishes a record's header after its bytes; between reading a position
    and reading the record the interpreter executes far more than any reordering window of the CPU.
    """

    def __init__(self, fd: int, earlier: int = 0) -> None:
        """`earlier`: how many records went through rings before this one."""
        page = mmap.PAGESIZE
        self.capacity = bpf.map_shape(fd).entries
        self._consumer = mmap.mmap(fd, page, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
        self._producer = mmap.mmap(fd, page + 2 * self.capacity, mmap.MAP_SHARED, mmap.PROT_READ, offset=page)
        self._data = memoryview(self._producer)[page:]
        self._position = int.from_bytes(self._consumer[:8], sys.byteorder)
        self._earlier = earlier
        self.taken_before = earlier + self._position // RING_STRIDE
        """Records that were given out before this process began, to agents before it."""
        self.taken = 0
        """Records that were given out."""
        self.wrong_size = 0

    def follow(self, previous: Ring) -> None:
        """Go on where another ring ended that was read to its end."""
        self.taken_before, self.taken, self.wrong_size = previous.taken_before, previous.taken, previous.wrong_size

    @property
    def seen(self) -> int:
        """How many records were ever put in, read or not: the kernel's position, in records."""
        return self._earlier + int.from_bytes(self._producer[:8], sys.byteorder) // RING_STRIDE

    @property
    def pending_records(self) -> int:
        """How many records wait to be read."""
        waiting = int.from_bytes(self._producer[:8], sys.byteorder) - self._position
        return waiting // RING_STRIDE

    def drain(self, limit: int) -> list[RawRecord]:
        """Take up to `limit` records and give their space back to the kernel."""
        produced = int.from_bytes(self._producer[:8], sys.byteorder)
        taken = walk_ring(self._data, self._position, produced, limit)
        self._position = taken.position
        self.taken += len(taken.records)
        self.wrong_size += taken.wrong_size
        struct.pack_into("=Q", self._consumer, 0, self._position)
        return taken.records

    def close(self) -> None:
        """Unmap it."""
        self._data.release()
        self._producer.close()
        self._consumer.close()
