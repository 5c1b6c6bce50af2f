"""The kernel's maps as dicts: they have limits and refuse as the kernel does, and the writer can be killed."""

from __future__ import annotations

import errno
import itertools
import struct
import sys
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

from otel_lb_hop.core.layout import HOP_STATS_WORDS, UPLINKS, VIP_STATS_WORDS, VIP_VALUE
from otel_lb_hop.core.pinned import NAME_BYTES, NOTE_BYTES
from otel_lb_hop.core.topology import Topology
from otel_lb_hop.kernel.tables import KernelTables
from tests.unit.samples import NODE

if TYPE_CHECKING:
    from collections.abc import Iterator

    from otel_lb_hop.core.topology import Gone
    from otel_lb_hop.kernel.loader import Loaded
    from otel_lb_hop.model import Cluster

ROOM = 100


def number_key(number: int) -> bytes:
    """Write an id as a key."""
    return number.to_bytes(4, sys.byteorder)


class Killed(BaseException):
    """The agent was killed before it could make a write."""


class Journal:
    """What was written, in order, and how many writes are left to whoever writes."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.writes_left: int | None = None

    def write(self, line: str) -> None:
        """Note a write, or be killed just before it."""
        if self.writes_left is not None:
            if not self.writes_left:
                raise Killed
            self.writes_left -= 1
        self.lines.append(line)


class Map:
    """A map of the kernel with a limit, whose writes stand in a journal."""

    def __init__(self, name: str, journal: Journal, value_size: int) -> None:
        self.entries: dict[bytes, bytes] = {}
        self.limit = ROOM
        self.puts_without_memory = 0
        self.refuses_deletes = False
        self._name = name
        self._journal = journal
        self.value_size = value_size
        self.batch_entries: int | None = None

    def get(self, key: bytes) -> bytes | None:
        """Read one value."""
        return self.entries.get(key)

    def keys(self) -> Iterator[bytes]:
        """Walk over all keys."""
        yield from self.entries

    def items(self) -> Iterator[tuple[bytes, bytes]]:
        """Read all entries; where only so many come by batch, the kernel refuses then."""
        yield from itertools.islice(self.entries.items(), self.batch_entries)
        if self.batch_entries is not None:
            raise OSError(errno.EINVAL, "Invalid argument")

    def put(self, key: bytes, value: bytes) -> None:
        """Write one value, as kernel/bpf/hashtab.c: a key that is there can be written in a full map too."""
        if key not in self.entries and len(self.entries) >= self.limit:
            raise OSError(errno.E2BIG, "Argument list too long")
        if self.puts_without_memory:
            self.puts_without_memory -= 1
            raise OSError(errno.ENOMEM, "Cannot allocate memory")
        self._journal.write(f"{self._name} put")
        assert len(value) <= self.value_size
        self.entries[key] = value.ljust(self.value_size, b"\0")

    def delete(self, key: bytes) -> None:
        """Remove one key; one that is not there is no error."""
        if self.refuses_deletes:
            raise OSError(errno.EBUSY, "Device or resource busy")
        self._journal.write(f"{self._name} delete")
        self.entries.pop(key, None)


class Kernel:
    """The maps, a topology and the writer between them."""

    tells_zones = False
    """Whether the topology of the agent that begins next tells zones."""

    def __init__(self, **limits: int) -> None:
        self.journal = Journal()
        self.vip_ports = Map("vip_ports", self.journal, VIP_VALUE.size)
        self.backends = Map("backends", self.journal, 4)
        self.vip_stats = Map("vip_stats", self.journal, 8 * VIP_STATS_WORDS)
        self.hop_stats = Map("hop_stats", self.journal, 8 * HOP_STATS_WORDS)
        self.names = Map("names", self.journal, NAME_BYTES)
        self.notes = Map("notes", self.journal, NOTE_BYTES)
        self.uplinks = Map("uplinks", self.journal, UPLINKS.size)
        self.maps = {
            "vip_ports": self.vip_ports,
            "backends": self.backends,
            "vip_stats": self.vip_stats,
            "hop_stats": self.hop_stats,
        }
        for name, limit in limits.items():
            self.maps[name].limit = limit
        others: dict[str, Any] = {
            "events": Map("events", self.journal, 8),
            "names": self.names,
            "notes": self.notes,
            "uplinks": self.uplinks,
            "sizes": SimpleNamespace(vip_ports=11, backends=22, hops=33),
        }
        self._loaded = cast("Loaded", SimpleNamespace(**self.maps, **others))
        self.begin_anew()

    def begin_anew(self) -> None:
        """Let the agent end, in whatever it was, and another begin on the same maps, one that knows nothing yet."""
        self.journal.writes_left = None
        self.tables = KernelTables(self._loaded)
        self.topology = Topology(NODE, tells_zones=self.tells_zones)

    def adopt(self, now_ns: int = 1) -> None:
        """Let the agent go on with what one before it left."""
        names, last_id = self.tables.adopt()
        self.topology.adopt(names, last_id, now_ns)

    def take(self, state: Cluster, now_ns: int = 1) -> list[str]:
        """Give the topology a new state and write it; answers what was done in which order, each kind once in a row."""
        self.topology.replace(state, now_ns)
        return self.write()

    def write(self) -> list[str]:
        """Write what is pending; answers what was done."""
        self.journal.lines.clear()
        self.tables.apply(self.topology)
        return self.done

    def forget(self, retired_before_ns: int, now_ns: int) -> Gone:
        """Forget the rows that were retired until then; answers which."""
        self.journal.lines.clear()
        gone = self.topology.forget_rows(retired_before_ns, now_ns)
        self.tables.forget(gone, self.topology)
        return gone

    def count_in_vip(self, number: int, *words: int) -> None:
        """Let the row of a VIP port have counted so much, from its first word on."""
        self._count(self.vip_stats, number, VIP_STATS_WORDS, words)

    def count_in_hop(self, number: int, *words: int) -> None:
        """Let a hop row have counted so much, from its first word on."""
        self._count(self.hop_stats, number, HOP_STATS_WORDS, words)

    def _count(self, table: Map, number: int, size: int, words: tuple[int, ...]) -> None:
        key = number_key(number)
        assert key in table.entries
        table.entries[key] = struct.pack(f"={size}Q", *words, *[0] * (size - len(words)))

    @property
    def done(self) -> list[str]:
        """What was done since the last write began."""
        return [what for what, _ in itertools.groupby(self.journal.lines)]

    @property
    def holds(self) -> tuple[dict[bytes, bytes], dict[bytes, bytes]]:
        """The tables that the programs read."""
        return self.vip_ports.entries, self.backends.entries

    @property
    def wanted(self) -> tuple[dict[bytes, bytes], dict[bytes, bytes]]:
        """The tables that the topology wants."""
        return self.topology.tables.vip_ports, self.topology.tables.backends

    @property
    def rows(self) -> tuple[set[int], set[int]]:
        """The ids that have counters."""
        return ids(self.vip_stats), ids(self.hop_stats)


def unpack_words(table: Map, number: int) -> tuple[int, ...]:
    """Give the words of a row."""
    return struct.unpack(f"={table.value_size // 8}Q", table.entries[number_key(number)])


def ids(table: Map) -> set[int]:
    """Give the keys of a map as ids."""
    return {int.from_bytes(key, sys.byteorder) for key in table.entries}
