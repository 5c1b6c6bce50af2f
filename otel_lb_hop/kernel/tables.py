"""Brings the kernel's tables to what the topology wants, by differences, and reads the counters."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, NamedTuple

from otel_lb_hop.core.layout import MAX_UPLINKS, UPLINKS, Event, sum_cpus, unpack_hop_stats, unpack_vip_stats

if TYPE_CHECKING:
    from otel_lb_hop.core.layout import HopStats, Settings, VipStats
    from otel_lb_hop.core.topology import Rows, Tables
    from otel_lb_hop.kernel.bpf import Map
    from otel_lb_hop.kernel.loader import Loaded


class Snapshot(NamedTuple):
    """All counters at one time: rows by id, and the events by `Event`."""

    vips: dict[int, VipStats]
    hops: dict[int, HopStats]
    events: tuple[int, ...]


def _id(number: int) -> bytes:
    return number.to_bytes(4, sys.byteorder)


class KernelTables:
    """The writer of the tables and the reader of the counters; knows what it wrote, so it writes only changes.

    Order matters: a row exists before anything points to it, and goes after nothing does, so that no connection
    finds an id without counters.
    """

    def __init__(self, loaded: Loaded) -> None:
        self._loaded = loaded
        self._vip_ports: dict[bytes, bytes] = {}
        self._backends: dict[bytes, bytes] = {}
        self._uplinks: frozenset[int] = frozenset()
        self._vip_ids: set[int] = set()
        self._hop_ids: set[int] = set()

    def set_settings(self, settings: Settings) -> None:
        """Write the settings; before anything is attached."""
        self._loaded.settings.put(_id(0), settings.pack())

    def apply(self, tables: Tables) -> None:
        """Make the kernel hold exactly these tables; raises OSError if a map is full, with what fits in place."""
        self._add_rows(tables.vip_ids, tables.hop_ids)
        _write_changes(self._loaded.backends, self._backends, tables.backends)
        _write_changes(self._loaded.vip_ports, self._vip_ports, tables.vip_ports)
        _remove_gone(self._loaded.vip_ports, self._vip_ports, tables.vip_ports)
        _remove_gone(self._loaded.backends, self._backends, tables.backends)

    def keep_rows(self, rows: Rows) -> dict[int, HopStats]:
        """Remove the rows that are no longer wanted; answers what the hop rows among them had counted at last."""
        last = {}
        for number in self._hop_ids - rows.hop_ids:
            raw = self._loaded.hop_stats.get(_id(number))
            if raw is not None:
                last[number] = unpack_hop_stats(raw)
            self._loaded.hop_stats.delete(_id(number))
        for number in self._vip_ids - rows.vip_ids:
            self._loaded.vip_stats.delete(_id(number))
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

    def _add_rows(self, vip_ids: frozenset[int], hop_ids: frozenset[int]) -> None:
        for number in vip_ids - self._vip_ids:
            self._loaded.vip_stats.put(_id(number), b"")
            self._vip_ids.add(number)
        for number in hop_ids - self._hop_ids:
            self._loaded.hop_stats.put(_id(number), b"")
            self._hop_ids.add(number)

    def set_uplinks(self, indexes: frozenset[int]) -> frozenset[int]:
        """Tell which interfaces lead out of the cluster; answers those that found no room (over `MAX_UPLINKS`)."""
        taken = sorted(indexes)[:MAX_UPLINKS]
        if frozenset(taken) != self._uplinks:
            self._loaded.uplinks.put(_id(0), UPLINKS.pack(*taken, *[0] * (MAX_UPLINKS - len(taken))))
            self._uplinks = frozenset(taken)
        return indexes - self._uplinks

    def snapshot(self) -> Snapshot:
        """Read every row. A row that the kernel does not have is left out."""
        vips = {number: self._loaded.vip_stats.get(_id(number)) for number in self._vip_ids}
        hops = {number: self._loaded.hop_stats.get(_id(number)) for number in self._hop_ids}
        return Snapshot(
            {number: unpack_vip_stats(raw) for number, raw in vips.items() if raw is not None},
            {number: unpack_hop_stats(raw) for number, raw in hops.items() if raw is not None},
            self.events(),
        )

    def events(self) -> tuple[int, ...]:
        """Read the event counters."""
        counters = []
        for event in Event:
            raw = self._loaded.events.get(_id(event))
            counters.append(sum_cpus(raw, 1)[0] if raw else 0)
        return tuple(counters)


def _write_changes(table: Map, present: dict[bytes, bytes], wanted: dict[bytes, bytes]) -> None:
    for key, value in wanted.items():
        if present.get(key) != value:
            table.put(key, value)
            present[key] = value


def _remove_gone(table: Map, present: dict[bytes, bytes], wanted: dict[bytes, bytes]) -> None:
    for key in present.keys() - wanted.keys():
        table.delete(key)
        del present[key]
