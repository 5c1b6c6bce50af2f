"""Brings the kernel's tables to what the topology wants, by differences, and reads the counters."""

from __future__ import annotations

import contextlib
import errno
import logging
import sys
import time
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from otel_lb_hop.core.layout import (
    HOP_STATS_WORDS,
    MAX_UPLINKS,
    UPLINKS,
    VIP_KEY,
    VIP_VALUE,
    Event,
    Unforwarded,
    add_cpus,
    sum_cpus,
    unpack_hop_stats,
    unpack_vip_stats,
)
from otel_lb_hop.core.ledger import Rows, count_rows
from otel_lb_hop.core.pinned import JOURNAL, Journal, pack_journal, pack_name, unpack_journal, unpack_name
from otel_lb_hop.core.topology import HopRow, VipRow
from otel_lb_hop.errors import WireError
from otel_lb_hop.model import Transport

if TYPE_CHECKING:
    from collections.abc import Callable
    from collections.abc import Set as AbstractSet

    from otel_lb_hop.core.layout import HopStats, Settings, VipStats
    from otel_lb_hop.core.topology import Gone, Name, Tables, Topology
    from otel_lb_hop.kernel.bpf import Map
    from otel_lb_hop.kernel.loader import Loaded

log = logging.getLogger(__name__)

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


class Inheritance(NamedTuple):
    """What an agent before this one left: the rows by id, and the highest id that was ever used."""

    names: dict[int, Name]
    last_id: int


def _id(number: int) -> bytes:
    return number.to_bytes(4, sys.byteorder)


def _number(key: bytes) -> int:
    return int.from_bytes(key, sys.byteorder)


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
        self.forgotten = Rows(0, 0)
        """What rows that are gone had counted."""
        self._last_forgotten = 0

    def adopt(self) -> Inheritance:
        """Find out what the kernel holds from an agent before, and finish what that one had begun.

        What its tables point to stays so until `drop_unknown`.
        """
        loaded = self._loaded
        journal = unpack_journal(loaded.notes.get(JOURNAL) or pack_journal(Journal(0, 0)))
        self._carry_out(journal)
        names, unread = self._read_names()
        found_vips = set(map(_number, loaded.vip_stats.keys()))
        found_hops = set(map(_number, loaded.hop_stats.keys()))
        last_id = max([journal.last_id, *names, *unread, *found_vips, *found_hops], default=0)
        vip_ids = {number for number, name in names.items() if isinstance(name.identity, VipRow)}
        hop_ids = {
            number
            for number, (identity, _) in names.items()
            if number in vip_ids or (isinstance(identity, HopRow) and identity.vip_id in vip_ids)
        }
        # Nobody can tell any more whose counters these are.
        for number in found_vips - vip_ids:
            self._forget(number, is_vip=True)
        for number in (found_hops | names.keys() | unread) - hop_ids:
            self._forget(number, is_vip=False)
            names.pop(number, None)
        self._vip_ids, self._hop_ids = found_vips & vip_ids, found_hops & hop_ids
        self._vip_ports = set(loaded.vip_ports.keys())
        self._backends = set(loaded.backends.keys())
        uplinks = loaded.uplinks.get(_id(0))
        self._uplinks = frozenset(UPLINKS.unpack(uplinks) if uplinks else ()) - {0}
        return Inheritance(names, last_id)

    def _read_names(self) -> tuple[dict[int, Name], set[int]]:
        """Read whose counters the rows hold; answers also the ids of those that cannot be read."""
        names: dict[int, Name] = {}
        unread: set[int] = set()
        for key, raw in self._loaded.names.items():
            try:
                names[_number(key)] = unpack_name(raw)
            except WireError as error:
                log.warning("%s; its counters begin anew", error)
                unread.add(_number(key))
        return names, unread

    @property
    def vip_ports(self) -> AbstractSet[bytes]:
        """The keys of the VIP ports that the kernel watches."""
        return self._vip_ports

    @property
    def datagram_ports(self) -> AbstractSet[bytes]:
        """Those of UDP and SCTP."""
        return {key for key in self._vip_ports if VIP_KEY.unpack(key)[2] != Transport.TCP}

    @property
    def datagram_needs(self) -> tuple[int, int]:
        """How many UDP and SCTP VIP ports the kernel watches, and how many of them have no endpoint."""
        values = map(self._loaded.vip_ports.get, self.datagram_ports)
        reasons = [VIP_VALUE.unpack(value)[1] for value in values if value]
        return len(reasons), sum(reason != Unforwarded.DROPPED for reason in reasons)

    def drop_unknown(self, tables: Tables) -> None:
        """Let go, at the next `apply`, what an agent before this one wrote and no source names any more."""
        tables.pending.vip_ports |= self._vip_ports - tables.vip_ports.keys()
        tables.pending.backends |= self._backends - tables.backends.keys()

    def set_settings(self, settings: Settings) -> None:
        """Write the settings; before anything is attached."""
        self._loaded.settings.put(_id(0), settings.pack())

    def apply(self, topology: Topology) -> None:
        """Bring the kernel to the topology's tables by what is pending, and take off what is done.

        Does all that can be done, then raises the first OSError if there was one, as when a map is full; what could
        not be written stays pending.
        """
        tables, pending = topology.tables, topology.tables.pending
        errors: list[OSError] = []
        _do_each(pending.vip_ids, lambda number: self._add_vip_row(number, topology), errors)
        _do_each(pending.hop_ids, lambda number: self._add_hop_row(number, topology), errors)
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

    def forget(self, gone: Gone, topology: Topology) -> None:
        """Remove rows. What they had counted goes into the rows named, or stands in `forgotten`."""
        # A VIP port goes before its hops: should they be left to the next agent, that one has nobody to give them to.
        # The other way round the VIP port could come back without what its hops had counted.
        for vip_id in gone.vip_ids:
            self._forget(vip_id, is_vip=True)
        for hop_id, into in gone.hops:
            if into and into not in self._hop_ids:
                self._put_name(into, topology)
            self._forget(hop_id, is_vip=False, into=into)

    def _forget(self, number: int, *, is_vip: bool, into: int = 0) -> None:
        """Write down what is to be done, then do it: whoever is killed in between leaves it to the next agent."""
        table = self._loaded.vip_stats if is_vip else self._loaded.hop_stats
        raw = table.get(_id(number))
        counted, merged = Rows(0, 0), bytes(8 * HOP_STATS_WORDS)
        if raw is None:
            into = 0  # it never found room
        elif into:
            merged = add_cpus(raw, self._loaded.hop_stats.get(_id(into)) or b"", HOP_STATS_WORDS)
        else:
            counted = count_rows([unpack_vip_stats(raw)] if is_vip else [], [] if is_vip else [unpack_hop_stats(raw)])
        last_id = max(self._last_forgotten, number)
        journal = Journal(*self.forgotten.plus(counted), last_id, number, is_vip, into, merged)
        self._loaded.notes.put(JOURNAL, pack_journal(journal))
        self._carry_out(journal)
        (self._vip_ids if is_vip else self._hop_ids).discard(number)
        if into:
            self._hop_ids.add(into)

    def _carry_out(self, journal: Journal) -> None:
        loaded, key = self._loaded, _id(journal.removed)
        self.forgotten, self._last_forgotten = Rows(journal.connections, journal.verdicts), journal.last_id
        if not journal.removed:
            return
        (loaded.vip_stats if journal.is_vip else loaded.hop_stats).delete(key)
        if journal.into:
            # Only now: in a full map it takes the room of the one that went.
            _insist(lambda into: loaded.hop_stats.put(into, journal.merged), _id(journal.into), REFILL_SECONDS)
        # Of a VIP port's own hop row it is the VIP port's, which went before.
        loaded.names.delete(key)

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

    def _add_vip_row(self, number: int, topology: Topology) -> None:
        if number not in self._vip_ids:
            self._loaded.vip_stats.put(_id(number), b"")
            self._put_name(number, topology)
            self._vip_ids.add(number)

    def _add_hop_row(self, number: int, topology: Topology) -> None:
        if number not in self._hop_ids:
            self._loaded.hop_stats.put(_id(number), b"")
            self._put_name(number, topology)
            self._hop_ids.add(number)

    def _put_name(self, number: int, topology: Topology) -> None:
        try:
            self._loaded.names.put(_id(number), pack_name(topology.name_of(number)))
        except WireError as error:
            log.warning("its counters will begin anew when the agent does: %s", error)

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
