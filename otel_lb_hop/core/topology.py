"""What the cluster looks like from this node, and the ids under which the kernel counts it.

Owns the identity of counter rows: an id belongs to one set of metric attributes for ever and is never given to
another, so no Service can inherit another's counts. Makes the tables that the kernel has to hold; writing them is
kernel/tables.py. Pure: the time is an argument.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Generic, NamedTuple, TypeVar

from otel_lb_hop.core.layout import BACKEND_KEY, VIP_KEY, VIP_VALUE, Unforwarded, pack_port
from otel_lb_hop.model import Hop, Policy, Transport

if TYPE_CHECKING:
    from collections.abc import Iterable

    from otel_lb_hop.model import Backend, Cluster, VipPort

KEEP_RETIRED_NS = 300 * 10**9
"""How long a row outlives its place in the topology: open handshakes settle, and what comes back goes on."""


class VipRow(NamedTuple):
    """The identity of a VIP port's row: everything that is a metric attribute of it."""

    namespace: str
    service: str
    address: bytes
    port: int
    transport: Transport
    policy: Policy


class HopRow(NamedTuple):
    """The identity of a hop row: a VIP port, a hop class, and the backend's node."""

    vip_id: int
    hop: Hop
    node: str | None
    zone_crossed: bool | None


class Rows(NamedTuple):
    """The rows of counters that are remembered, in use or retired: ids of vip_stats and of hop_stats."""

    vip_ids: frozenset[int]
    hop_ids: frozenset[int]


class Tables(NamedTuple):
    """What the kernel's tables have to hold, keys and values as bytes, and the rows that they point to."""

    vip_ports: dict[bytes, bytes]
    backends: dict[bytes, bytes]
    vip_ids: frozenset[int]
    hop_ids: frozenset[int]


class Skipped(NamedTuple):
    """A VIP port that is known but not watched, and why."""

    vip_port: VipPort
    reason: str


class Placement(NamedTuple):
    """Ready endpoints of a VIP port by where they are, seen from this node; without zones all are in one."""

    local: int
    same_zone: int
    other_zone: int


_Row = TypeVar("_Row", bound=tuple[object, ...])


class _Rows(Generic[_Row]):
    """Rows by id and ids by row, with the time each was made and, once out of use, retired."""

    def __init__(self) -> None:
        self.by_id: dict[int, _Row] = {}
        self.created_ns: dict[int, int] = {}
        self._ids: dict[_Row, int] = {}
        self._retired_ns: dict[int, int] = {}

    def find(self, row: _Row) -> int | None:
        return self._ids.get(row)

    def add(self, row_id: int, row: _Row, now_ns: int) -> None:
        self.by_id[row_id] = row
        self._ids[row] = row_id
        self.created_ns[row_id] = now_ns

    def retire_all_but(self, used: Iterable[int], now_ns: int) -> None:
        for row_id in self.by_id.keys() - set(used):
            self._retired_ns.setdefault(row_id, now_ns)
        for row_id in used:
            self._retired_ns.pop(row_id, None)

    def forget_before(self, limit_ns: int) -> None:
        for row_id in [row_id for row_id, retired in self._retired_ns.items() if retired <= limit_ns]:
            del self._retired_ns[row_id], self.created_ns[row_id]
            del self._ids[self.by_id.pop(row_id)]


class Topology:
    """The current topology and its rows. `update` takes a whole new cluster state and answers what it means."""

    def __init__(self, node_name: str) -> None:
        self.node_name = node_name
        self.zone: str | None = None
        self.vips: _Rows[VipRow] = _Rows()
        self.hops: _Rows[HopRow] = _Rows()
        self.skipped: tuple[Skipped, ...] = ()
        self.placements: dict[int, Placement] = {}
        self._backends: dict[tuple[int, bytes, int], Backend] = {}
        self._next_id = 1
        self._zones: dict[str, str] = {}
        self._updated_ns = 0

    @property
    def watched(self) -> int:
        """How many VIP ports the kernel watches for us."""
        return len(self.placements)

    def age_ns(self, now_ns: int) -> int:
        """How long ago the topology was last known to be current."""
        return max(0, now_ns - self._updated_ns) if self._updated_ns else 0

    def confirm(self, now_ns: int) -> None:
        """Note that the source was read again and says the same."""
        self._updated_ns = now_ns

    def backend(self, vip_id: int, address: bytes, port: int) -> Backend | None:
        """Find the endpoint that a VIP port was translated to."""
        return self._backends.get((vip_id, address, port))

    def update(self, cluster: Cluster, now_ns: int) -> Tables:
        """Take over a new cluster state; returns the whole content that the kernel tables should have."""
        self._updated_ns = now_ns
        self._zones = {node.name: node.zone for node in cluster.nodes if node.zone}
        self.zone = self._zones.get(self.node_name) or self._zone_by_backends(cluster)
        skipped: list[Skipped] = []
        claimed: dict[bytes, VipPort] = {}
        for vip_port in sorted(cluster.vip_ports, key=lambda each: (each.namespace, each.service)):
            key = VIP_KEY.pack(vip_port.address, pack_port(vip_port.port), vip_port.transport)
            if vip_port.transport is not Transport.TCP:
                skipped.append(Skipped(vip_port, f"{vip_port.transport.name} is not watched by this version"))
            elif key in claimed:
                winner = claimed[key]
                skipped.append(Skipped(vip_port, f"{winner.namespace}/{winner.service} has this VIP port"))
            else:
                claimed[key] = vip_port
        self.skipped = tuple(skipped)
        self._backends = {}
        self.placements = {}
        vip_table: dict[bytes, bytes] = {}
        backend_table: dict[bytes, bytes] = {}
        hop_ids: set[int] = set()
        for key, vip_port in claimed.items():
            vip_id = self._vip_id(vip_port, now_ns)
            local = any(backend.ready and self._is_local(backend) for backend in vip_port.backends)
            self.placements[vip_id] = self._placement(vip_port)
            vip_table[key] = VIP_VALUE.pack(vip_id, _unforwarded(vip_port, local=local))
            # Its own id is also its row for a backend that is not known (yet).
            self._add_hop(vip_id, HopRow(vip_id, Hop.UNKNOWN, None, None), now_ns)
            hop_ids.add(vip_id)
            for backend in vip_port.backends:
                self._backends[vip_id, backend.address, backend.port] = backend
                hop_id = self._hop_id(vip_id, self._classify(backend, local=local), backend, now_ns)
                hop_ids.add(hop_id)
                backend_key = BACKEND_KEY.pack(vip_id, backend.address, pack_port(backend.port))
                backend_table[backend_key] = hop_id.to_bytes(4, sys.byteorder)
        self.vips.retire_all_but(self.placements, now_ns)
        self.hops.retire_all_but(hop_ids, now_ns)
        return Tables(vip_table, backend_table, frozenset(self.placements), frozenset(hop_ids))

    def rows(self, retired_before_ns: int) -> Rows:
        """Forget the rows that were retired until then, and tell which ones the kernel has to keep."""
        self.vips.forget_before(retired_before_ns)
        self.hops.forget_before(retired_before_ns)
        return Rows(frozenset(self.vips.by_id), frozenset(self.hops.by_id))

    def _vip_id(self, vip_port: VipPort, now_ns: int) -> int:
        row = VipRow(
            vip_port.namespace, vip_port.service, vip_port.address, vip_port.port, vip_port.transport, vip_port.policy
        )
        return self._known_or_new(self.vips, row, now_ns)

    def _hop_id(self, vip_id: int, hop: Hop, backend: Backend, now_ns: int) -> int:
        if hop is Hop.UNKNOWN:
            return vip_id
        row = HopRow(vip_id, hop, backend.node, self._zone_crossed(backend))
        return self._known_or_new(self.hops, row, now_ns)

    def _known_or_new(self, rows: _Rows[_Row], row: _Row, now_ns: int) -> int:
        known = rows.find(row)
        if known is not None:
            return known
        row_id = self._take_id()
        rows.add(row_id, row, now_ns)
        return row_id

    def _add_hop(self, hop_id: int, row: HopRow, now_ns: int) -> None:
        if hop_id not in self.hops.by_id:
            self.hops.add(hop_id, row, now_ns)

    def _take_id(self) -> int:
        taken, self._next_id = self._next_id, self._next_id + 1
        return taken

    def _is_local(self, backend: Backend) -> bool:
        return backend.node == self.node_name

    def zone_of(self, backend: Backend) -> str | None:
        """Tell the zone of an endpoint: its own, else its node's."""
        return backend.zone or (self._zones.get(backend.node) if backend.node else None)

    def _zone_crossed(self, backend: Backend) -> bool | None:
        zone = self.zone_of(backend)
        return None if zone is None or self.zone is None else zone != self.zone

    def _zone_by_backends(self, cluster: Cluster) -> str | None:
        for vip_port in cluster.vip_ports:
            for backend in vip_port.backends:
                if self._is_local(backend) and backend.zone:
                    return backend.zone
        return None

    def _classify(self, backend: Backend, *, local: bool) -> Hop:
        if backend.node is None:
            return Hop.UNKNOWN
        if self._is_local(backend):
            return Hop.NONE
        return Hop.AVOIDABLE if local else Hop.REQUIRED

    def _placement(self, vip_port: VipPort) -> Placement:
        ready = [backend for backend in vip_port.backends if backend.ready]
        local = sum(self._is_local(backend) for backend in ready)
        crossed = sum(self._zone_crossed(backend) is True for backend in ready if not self._is_local(backend))
        return Placement(local, len(ready) - local - crossed, crossed)


def _unforwarded(vip_port: VipPort, *, local: bool) -> Unforwarded:
    if not any(backend.ready for backend in vip_port.backends):
        return Unforwarded.NO_ENDPOINTS
    if vip_port.policy is Policy.LOCAL and not local:
        return Unforwarded.NO_LOCAL_ENDPOINTS
    return Unforwarded.DROPPED
