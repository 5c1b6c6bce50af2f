"""Brings the kernel's tables to what the topology wants, by differences, and reads the counters."""

from __future__ import annotations

import contextlib
import errno
import sys
import time
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from otel_lb_hop.core.layout import MAX_UPLINKS, UPLINKS, VIP_VALUE, Event, sum_cpus, unpack_hop_stats, unpack_vip_stats

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from collections.abc import Set as AbstractSet

    from otel_lb_hop.core.layout import HopStats, Settings, VipStats
    from otel_lb_hop.core.topology import Rows, Tables
    from otel_lb_hop.kernel.bpf import Map
    from otel_lb_hop.kernel.loader import Loaded

_Key = TypeVar("_Key")
_Stats = TypeVar("_Stats", bound=tuple[object, ...])

REFILL_SECONDS = (0.001, 0.004, 0.016)
"""The kernel takes the memory of rows from a reserve that it fills again a moment later (mm/percpu.c): thousands of new
rows at once find it empty now and then."""

BATCH_ROWS = 256
"""A batch walks all buckets of a map, of which there are as many as rows may be: for fewer rows that costs more."""


class Snapshot(NamedTuple):
    """All counters at one time: rows by id, and the events by `Event`."""

    vips: dict[int, VipStats]
    hops: dict[int, HopStats]
    events: tuple[int, ...]


class LastCounts(NamedTuple):
    """The counters of rows that are no more, by id."""

    vips: dict[int, VipStats]
    hops: dict[int, HopStats]


def _id(number: int) -> bytes:
    return number.to_bytes(4, sys.byteorder)


class KernelTables:
    """The writer of the tables and the reader of the counters; knows what the kernel holds.

    Order matters: a row exists before anything points to it, and goes after nothing does, so that no connection
    finds an id without counters.
    """

    def __init__(self, loaded: Loaded) -> None:
        self._loaded = loaded
        self._vip_ports: set[bytes] = set()
        self._backends: set[bytes] = set()
        self._uplinks: frozenset[int] = frozenset()
        self._vip_ids: set[int] = set()
        self._hop_ids: set[int] = set()

    def set_settings(self, settings: Settings) -> None:
        """Write the settings; before anything is attached."""
        self._loaded.settings.put(_id(0), settings.pack())

    def apply(self, tables: Tables) -> None:
        """Bring the kernel to these tables by what is pending, and take off what is done.

        Does all that can be done, then raises the first OSError if there was one, as when a map is full; what could
        not be written stays pending.
        """
        pending = tables.pending
        errors: list[OSError] = []
        _do_each(pending.vip_ids, self._add_vip_row, errors)
        _do_each(pending.hop_ids, self._add_hop_row, errors)
        gone_backends = pending.backends - tables.backends.keys()
        gone_vip_ports = pending.vip_ports - tables.vip_ports.keys()
        pending.backends -= gone_backends
        pending.vip_ports -= gone_vip_ports
        _do_each(pending.backends, lambda key: self._put_backend(key, tables.backends[key]), errors)
        _do_each(pending.vip_ports, lambda key: self._put_vip_port(key, tables.vip_ports[key]), errors)
        _do_each(gone_vip_ports, self._delete_vip_port, errors)
        _do_each(gone_backends, self._delete_backend, errors)
        pending.vip_ports |= gone_vip_ports
        pending.backends |= gone_backends
        if errors:
            raise errors[0]

    def keep_rows(self, rows: Rows) -> LastCounts:
        """Remove the rows that are no longer wanted; answers what they had counted at last."""
        last = LastCounts(
            hops=_remove(self._loaded.hop_stats, self._hop_ids - rows.hop_ids, unpack_hop_stats),
            vips=_remove(self._loaded.vip_stats, self._vip_ids - rows.vip_ids, unpack_vip_stats),
        )
        self._vip_ids &= rows.vip_ids
        self._hop_ids &= rows.hop_ids
        return last

    def usage(self) -> dict[str, tuple[int, int]]:
        """Entries and limit of each table."""
        sizes = self._loaded.sizes
        return {
            "vip_ports": (len(self._vip_ports), sizes.vip_ports),
            "backends": (len(self._backends), sizes.backends),
            "vip_stats": (len(self._vip_ids), sizes.vip_ports),
            "hop_stats": (len(self._hop_ids), sizes.hops),
            "uplinks": (len(self._uplinks), MAX_UPLINKS),
        }

    def _add_vip_row(self, number: int) -> None:
        self._loaded.vip_stats.put(_id(number), b"")
        self._vip_ids.add(number)

    def _add_hop_row(self, number: int) -> None:
        self._loaded.hop_stats.put(_id(number), b"")
        self._hop_ids.add(number)

    def _put_vip_port(self, key: bytes, value: bytes) -> None:
        vip_id = VIP_VALUE.unpack(value)[0]
        # Its own hop row takes what goes to unknown backends: without that, forwarded connections would vanish.
        if vip_id not in self._vip_ids or vip_id not in self._hop_ids:
            self._delete_vip_port(key)  # what the kernel has may be another Service's counters
            raise OSError(errno.E2BIG, "no room for the counters of a VIP port")
        self._loaded.vip_ports.put(key, value)
        self._vip_ports.add(key)

    def _put_backend(self, key: bytes, value: bytes) -> None:
        if int.from_bytes(value, sys.byteorder) not in self._hop_ids:
            self._delete_backend(key)  # what the kernel has is another class's counters
            raise OSError(errno.E2BIG, "no room for the counters of a hop")
        self._loaded.backends.put(key, value)
        self._backends.add(key)

    def _delete_vip_port(self, key: bytes) -> None:
        self._loaded.vip_ports.delete(key)
        self._vip_ports.discard(key)

    def _delete_backend(self, key: bytes) -> None:
        self._loaded.backends.delete(key)
        self._backends.discard(key)

    def set_uplinks(self, indexes: frozenset[int]) -> frozenset[int]:
        """Tell which interfaces lead out of the cluster; answers those that found no room (over `MAX_UPLINKS`)."""
        taken = sorted(indexes)[:MAX_UPLINKS]
        if frozenset(taken) != self._uplinks:
            self._loaded.uplinks.put(_id(0), UPLINKS.pack(*taken, *[0] * (MAX_UPLINKS - len(taken))))
            self._uplinks = frozenset(taken)
        return indexes - self._uplinks

    def snapshot(self) -> Snapshot:
        """Read every row. A row that the kernel does not have is left out.

        A connection is counted when it comes in and again when it is forwarded: read the other way round, no row
        ever tells more connections forwarded than came in.
        """
        hops = _read(self._loaded.hop_stats, self._hop_ids, unpack_hop_stats)
        vips = _read(self._loaded.vip_stats, self._vip_ids, unpack_vip_stats)
        return Snapshot(vips, hops, self.events())

    def events(self) -> tuple[int, ...]:
        """Read the event counters."""
        return tuple(map(self.event, Event))

    def event(self, event: Event) -> int:
        """Read one event counter."""
        raw = self._loaded.events.get(_id(event))
        return sum_cpus(raw, 1)[0] if raw else 0


def _read(table: Map, numbers: AbstractSet[int], unpack: Callable[[bytes], _Stats]) -> dict[int, _Stats]:
    """Read rows. Those that have counted nothing, in a large cluster almost all, share one value."""
    rows: dict[int, _Stats] = {}
    zeros = bytes(table.value_size)
    idle = unpack(zeros)
    if len(numbers) >= BATCH_ROWS:
        # Where the kernel cannot (before 5.6, or for lack of memory), single reads do without, or tell what is wrong.
        with contextlib.suppress(OSError):
            for key, raw in table.items():
                number = int.from_bytes(key, sys.byteorder)
                if number in numbers:
                    rows[number] = idle if raw == zeros else unpack(raw)
    for number in numbers - rows.keys():
        single = table.get(_id(number))
        if single is not None:
            rows[number] = idle if single == zeros else unpack(single)
    return rows


def _remove(table: Map, numbers: Iterable[int], unpack: Callable[[bytes], _Stats]) -> dict[int, _Stats]:
    last = {}
    for number in numbers:
        raw = table.get(_id(number))
        if raw is not None:
            last[number] = unpack(raw)
        table.delete(_id(number))
    return last


def _do_each(keys: set[_Key], work: Callable[[_Key], None], errors: list[OSError]) -> None:
    """Do the work for each key and take it off the set; where the kernel refuses, it stays."""
    for key in list(keys):
        try:
            # Once something was refused for good, nothing else waits.
            _insist(work, key, () if errors else REFILL_SECONDS)
        except OSError as error:
            errors.append(error)
        else:
            keys.discard(key)


def _insist(work: Callable[[_Key], None], key: _Key, waits: tuple[float, ...]) -> None:
    """Do the work, again after each wait while the kernel has no memory for it just now."""
    for seconds in waits:
        try:
            return work(key)
        except OSError as error:
            if error.errno != errno.ENOMEM:
                raise
        time.sleep(seconds)
    return work(key)
