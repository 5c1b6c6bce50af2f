"""What the cluster looks like from this node, and the ids under which the kernel counts it.

Owns the identity of counter rows: an id belongs to one set of metric attributes for ever and is never given to
another, so no Service can inherit another's counts. Keeps the tables that the kernel has to hold, and what of them
changed; writing them is kernel/tables.py. A change costs what it touches, not what is known. Pure: the time is an
argument.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from enum import IntEnum
from typing import TYPE_CHECKING, Generic, NamedTuple, TypeAlias, TypeVar

from otel_lb_hop.core.layout import BACKEND_KEY, VIP_KEY, VIP_VALUE, Unforwarded, pack_port
from otel_lb_hop.model import Hop, Policy, Skipped, Transport, format_address

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from otel_lb_hop.model import Backend, Cluster, Node, VipPort

KEEP_RETIRED_NS = 300 * 10**9
"""How long a row outlives its place in the topology: open handshakes settle, and what comes back goes on."""
LINGER_NS = 30 * 10**9
"""How long an endpoint that is gone is still known: kube-proxy may go on translating to it for a moment, and records
of connections to it are told up to seconds later."""


class Source(IntEnum):
    """Where a Service or a node is known from; on the same VIP port the lower one wins."""

    API = 0
    FILE = 1


class ServiceId(NamedTuple):
    """One Service of one source."""

    source: Source
    namespace: str
    name: str


class VipRow(NamedTuple):
    """The identity of a VIP port's row: everything that is a metric attribute of it."""

    namespace: str
    service: str
    address: bytes
    port: int
    transport: Transport
    policy: Policy


class HopRow(NamedTuple):
    """The identity of a hop row: a VIP port, a hop class, and the backend's node.

    Without a node: of an unknown hop class, what went to backends that are not known; of any other, the remainder: what
    the forgotten rows had counted that were alike in all else.
    """

    vip_id: int
    hop: Hop
    node: str | None
    zone_crossed: bool | None
    zone: str | None = None
    """The backend's, where it is told."""

    @property
    def is_remainder(self) -> bool:
        """Whether this row holds what forgotten ones had counted."""
        return self.node is None and self.hop is not Hop.UNKNOWN


Identity: TypeAlias = VipRow | HopRow
"""Of a row of counters."""


class Name(NamedTuple):
    """Whose counters a row holds, and the wall clock's time (ns) from which on they count."""

    identity: Identity
    created_ns: int


class HopGone(NamedTuple):
    """A hop row that is forgotten, and the one that keeps what it counted, or 0 if its VIP port is gone too."""

    hop_id: int
    into: int


class Gone(NamedTuple):
    """The rows that are forgotten."""

    hops: tuple[HopGone, ...]
    vip_ids: tuple[int, ...]


@dataclass(slots=True)
class Pending:
    """The parts of the tables that the kernel may not have yet: row ids, and keys that came, changed or went."""

    vip_ids: set[int] = field(default_factory=set)
    hop_ids: set[int] = field(default_factory=set)
    vip_ports: set[bytes] = field(default_factory=set)
    backends: set[bytes] = field(default_factory=set)

    def __bool__(self) -> bool:
        return bool(self.vip_ids or self.hop_ids or self.vip_ports or self.backends)


@dataclass(slots=True)
class Tables:
    """What the kernel's tables have to hold, keys and values as bytes; whoever wrote a part takes it off `pending`."""

    vip_ports: dict[bytes, bytes] = field(default_factory=dict)
    backends: dict[bytes, bytes] = field(default_factory=dict)
    pending: Pending = field(default_factory=Pending)


class Placement(NamedTuple):
    """Endpoints that a VIP port uses, by where they are, seen from this node; without zones all are in one."""

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

    def use(self, row_ids: Iterable[int]) -> None:
        for row_id in row_ids:
            self._retired_ns.pop(row_id, None)

    def retire(self, row_ids: Iterable[int], now_ns: int) -> None:
        for row_id in row_ids:
            self._retired_ns.setdefault(row_id, now_ns)

    def retired_before(self, limit_ns: int) -> list[int]:
        return [row_id for row_id, retired in self._retired_ns.items() if retired <= limit_ns]

    def forget(self, row_id: int) -> None:
        self._retired_ns.pop(row_id, None)
        del self.created_ns[row_id]
        del self._ids[self.by_id.pop(row_id)]


class _Entry(NamedTuple):
    """What one VIP port has in the tables; `owner` is the Service that has it."""

    owner: ServiceId
    vip_port: VipPort
    vip_id: int
    hop_ids: frozenset[int]
    backend_keys: frozenset[bytes]


class Topology:
    """The current topology and its rows.

    `update` takes what changed and brings `tables` to it. On one VIP port the source, then the name, decides between
    Services that claim it, on every node in the same way and in whatever order they came.
    """

    def __init__(self, node_name: str, now_ns: int = 0, *, tells_zones: bool = False) -> None:
        """`tells_zones`: whether backends of different zones are counted apart even if one node has them."""
        self.node_name = node_name
        self._tells_zones = tells_zones
        self.zone: str | None = None
        self.vips: _Rows[VipRow] = _Rows()
        self.hops: _Rows[HopRow] = _Rows()
        self.tables = Tables()
        self.placements: dict[int, Placement] = {}
        self._services: dict[ServiceId, dict[bytes, VipPort]] = {}
        self._claims: dict[bytes, set[ServiceId]] = {}
        self._contested: set[bytes] = set()
        self._datagrams: dict[bytes, Unforwarded] = {}
        self._entries: dict[bytes, _Entry] = {}
        self._backends: dict[bytes, Backend] = {}
        self._lingering: dict[bytes, int] = {}
        self._touched: set[int] = set()
        self._nodes: dict[Source, dict[str, Node]] = {source: {} for source in Source}
        self._zones: dict[str, str] = {}
        self._zone_of_backends: str | None = None
        self._next_id = 1
        self._current_ns = now_ns

    @property
    def watched(self) -> int:
        """How many VIP ports the kernel watches for us."""
        return len(self._entries)

    @property
    def datagram_needs(self) -> tuple[int, int]:
        """How many UDP and SCTP VIP ports are watched, and how many of them have no endpoint to be forwarded to."""
        unserved = sum(reason is not Unforwarded.DROPPED for reason in self._datagrams.values())
        return len(self._datagrams), unserved

    @property
    def own_node(self) -> Node | None:
        """The node that the agent runs on, if it is known."""
        return self._node(self.node_name)

    @property
    def cluster_nodes(self) -> int | None:
        """How many nodes the API server has, else the VIP file names; None where neither tells of any."""
        return next((len(nodes) for nodes in self._nodes.values() if nodes), None)

    @property
    def skipped(self) -> list[Skipped]:
        """The VIP ports that a Service claims but does not have, and who has them."""
        skipped = []
        for key in sorted(self._contested):
            entry = self._entries[key]
            for loser in sorted(self._claims[key] - {entry.owner}):
                vip_port = self._services[loser][key]
                what = f"{format_address(vip_port.address)} port {vip_port.port} {vip_port.transport.name}"
                reason = f"{entry.owner.namespace}/{entry.owner.name} has this VIP port"
                skipped.append(Skipped(loser.namespace, loser.name, what, reason))
        return skipped

    def age_ns(self, now_ns: int) -> int:
        """How long ago the topology was last known to be current."""
        return max(0, now_ns - self._current_ns)

    def confirm(self, now_ns: int) -> None:
        """Note that the sources said so at that time, with news or without."""
        self._current_ns = now_ns

    def backend(self, vip_id: int, address: bytes, port: int) -> Backend | None:
        """Find the endpoint that a VIP port was translated to, also one that went lately."""
        return self._backends.get(BACKEND_KEY.pack(vip_id, address, pack_port(port)))

    def zone_of(self, backend: Backend) -> str | None:
        """Tell the zone of an endpoint: its own, else its node's."""
        return backend.zone or (self._zones.get(backend.node) if backend.node else None)

    def replace(self, cluster: Cluster, now_ns: int) -> None:
        """Take over the whole content of the VIP file."""
        services: dict[ServiceId, list[VipPort]] = {key: [] for key in self._services if key.source is Source.FILE}
        for vip_port in cluster.vip_ports:
            services.setdefault(ServiceId(Source.FILE, vip_port.namespace, vip_port.service), []).append(vip_port)
        nodes: dict[str, Node | None] = dict.fromkeys(self._nodes[Source.FILE])
        self.update_nodes(Source.FILE, nodes | {node.name: node for node in cluster.nodes}, now_ns)
        self.update(services, now_ns)

    def update(self, services: Mapping[ServiceId, Iterable[VipPort]], now_ns: int) -> None:
        """Take over all VIP ports of these Services; none means that the Service is gone."""
        touched: dict[bytes, None] = {}
        for service_id, vip_ports in services.items():
            before = self._services.pop(service_id, {})
            after = {_vip_key(vip_port): vip_port for vip_port in vip_ports}
            if after:
                self._services[service_id] = after
            for key in before.keys() - after.keys():
                self._claims[key].discard(service_id)
                if not self._claims[key]:
                    del self._claims[key]
            for key in after.keys() - before.keys():
                self._claims.setdefault(key, set()).add(service_id)
            touched |= dict.fromkeys([*before, *after])
            self._learn_zone(after.values())
        if self._find_own_zone():
            touched = dict.fromkeys([*self._entries, *self._claims])
        for key in touched:
            self._rebuild(key, now_ns)

    def update_nodes(self, source: Source, nodes: Mapping[str, Node | None], now_ns: int) -> None:
        """Take over nodes by name; None for one that is gone."""
        for name, node in nodes.items():
            if node is None:
                self._nodes[source].pop(name, None)
            else:
                self._nodes[source][name] = node
        changed = set()
        for name in nodes:
            known = self._node(name)
            zone = (known.zone if known else None) or None
            if zone != self._zones.get(name):
                changed.add(name)
                if zone:
                    self._zones[name] = zone
                else:
                    del self._zones[name]
        everywhere = self._find_own_zone()
        if not everywhere and not changed:
            return
        for key, entry in list(self._entries.items()):
            if everywhere or any(backend.node in changed for backend in entry.vip_port.backends):
                self._rebuild(key, now_ns)

    def adopt(self, names: Mapping[int, Name], last_id: int, now_ns: int) -> None:
        """Go on with the rows that the kernel has from an agent before, ids up to `last_id`; before all else.

        What the sources name again goes on in its row; the rest is retired from now on.
        """
        for row_id, (row, created_ns) in names.items():
            if isinstance(row, VipRow):
                self._add(self.vips, row_id, row, created_ns)
                self._add(self.hops, row_id, HopRow(row_id, Hop.UNKNOWN, None, None), created_ns)
            else:
                self._add(self.hops, row_id, row, created_ns)
        self.vips.retire(self.vips.by_id, now_ns)
        self.hops.retire((hop_id for hop_id, row in self.hops.by_id.items() if not row.is_remainder), now_ns)
        self._next_id = last_id + 1

    def name_of(self, row_id: int) -> Name:
        """Tell whose counters the rows with this id hold; a VIP port's id is also that of its unknown backends."""
        if row_id in self.vips.by_id:
            return Name(self.vips.by_id[row_id], self.vips.created_ns[row_id])
        return Name(self.hops.by_id[row_id], self.hops.created_ns[row_id])

    def forget_rows(self, retired_before_ns: int, now_ns: int) -> Gone:
        """Forget the rows that were retired until then.

        Metrics by (VIP port, hop class) are sums over the nodes of backends: when such a node has long gone and its row
        with it, the sum must not fall, so its counters go into a row that stays as long as the VIP port.
        """
        vip_ids = self.vips.retired_before(retired_before_ns)
        of_vips = set(vip_ids)
        hops = [
            HopGone(hop_id, self._remainder(self.hops.by_id[hop_id], now_ns))
            for hop_id in self.hops.retired_before(retired_before_ns)
            if self.hops.by_id[hop_id].vip_id not in of_vips
        ]
        if vip_ids:
            hops += [HopGone(hop_id, 0) for hop_id, row in self.hops.by_id.items() if row.vip_id in of_vips]
        for gone in hops:
            self.hops.forget(gone.hop_id)
        for vip_id in vip_ids:
            self.vips.forget(vip_id)
        self.tables.pending.vip_ids &= self.vips.by_id.keys()
        self.tables.pending.hop_ids &= self.hops.by_id.keys()
        return Gone(tuple(hops), tuple(vip_ids))

    def _remainder(self, row: HopRow, now_ns: int) -> int:
        """Find or make the row that keeps what was counted by rows of gone nodes."""
        remainder = row._replace(node=None)
        known = self.hops.find(remainder)
        return self._add(self.hops, self._take_id(), remainder, now_ns) if known is None else known

    def forget_endpoints(self, gone_before_ns: int) -> None:
        """Forget the endpoints that went until then."""
        while self._lingering:
            key, gone_ns = next(iter(self._lingering.items()))
            if gone_ns > gone_before_ns:
                return
            del self._lingering[key], self._backends[key]
            self._drop_backend(key)
            self._touched.add(BACKEND_KEY.unpack(key)[0])

    def take_touched(self) -> set[int]:
        """Answer, once, the ids of the VIP ports of which anything may be otherwise than it was."""
        touched, self._touched = self._touched, set()
        return touched

    def _node(self, name: str) -> Node | None:
        return next((nodes[name] for nodes in self._nodes.values() if name in nodes), None)

    def _learn_zone(self, vip_ports: Iterable[VipPort]) -> None:
        for vip_port in vip_ports:
            for backend in vip_port.backends:
                if backend.zone and self._is_local(backend):
                    self._zone_of_backends = backend.zone
                    return

    def _find_own_zone(self) -> bool:
        """Find this node's zone: its node object's, else that of an endpoint on it. Answers whether it changed."""
        before, self.zone = self.zone, self._zones.get(self.node_name) or self._zone_of_backends
        return self.zone != before

    def _rebuild(self, key: bytes, now_ns: int) -> None:
        """Bring one VIP port's part of the tables to what its claimants say now."""
        before = self._entries.pop(key, None)
        claimants = self._claims.get(key, ())
        (self._contested.add if len(claimants) > 1 else self._contested.discard)(key)
        if claimants:
            after = self._enter(key, min(claimants), now_ns)
            self._entries[key] = after
            self._touched.add(after.vip_id)
            keep_vip, keep_hops, keep_backends = {after.vip_id}, after.hop_ids, after.backend_keys
        else:
            keep_vip, keep_hops, keep_backends = set(), frozenset(), frozenset()
            self._datagrams.pop(key, None)
            if self.tables.vip_ports.pop(key, None) is not None:
                self.tables.pending.vip_ports.add(key)
        if before is None:
            return
        self._touched.add(before.vip_id)
        self.vips.retire({before.vip_id} - keep_vip, now_ns)
        self.hops.retire(before.hop_ids - keep_hops, now_ns)
        for backend_key in before.backend_keys - keep_backends:
            self._lingering[backend_key] = now_ns
            if before.vip_id not in keep_vip:
                self._drop_backend(backend_key)
        if before.vip_id not in keep_vip:
            self.placements.pop(before.vip_id, None)

    def _enter(self, key: bytes, owner: ServiceId, now_ns: int) -> _Entry:
        vip_port = self._services[owner][key]
        vip_id = self._vip_id(vip_port, now_ns)
        used = _used(vip_port.backends)
        local = any(self._is_local(backend) for backend in used)
        if vip_port.endpoints_known:
            self.placements[vip_id] = self._placement(used)
        else:
            self.placements.pop(vip_id, None)
        reason = self._unforwarded(vip_port)
        if vip_port.transport is not Transport.TCP:
            self._datagrams[key] = reason
        self._put(self.tables.vip_ports, self.tables.pending.vip_ports, key, VIP_VALUE.pack(vip_id, reason))
        # Its own id is also its row for a backend that is not known (yet).
        if vip_id not in self.hops.by_id:
            self._add(self.hops, vip_id, HopRow(vip_id, Hop.UNKNOWN, None, None), now_ns)
        hop_ids = {vip_id}
        backend_keys = []
        rows: dict[tuple[str | None, str | None], int] = {}
        for backend in vip_port.backends:
            place = backend.node, backend.zone
            hop_id = rows.get(place)
            if hop_id is None:
                hop_id = rows[place] = self._hop_id(vip_id, self._classify(backend, local=local), backend, now_ns)
                hop_ids.add(hop_id)
            backend_key = BACKEND_KEY.pack(vip_id, backend.address, pack_port(backend.port))
            backend_keys.append(backend_key)
            self._backends[backend_key] = backend
            self._lingering.pop(backend_key, None)
            value = hop_id.to_bytes(4, sys.byteorder)
            self._put(self.tables.backends, self.tables.pending.backends, backend_key, value)
        self.vips.use([vip_id])
        self.hops.use(hop_ids)
        return _Entry(owner, vip_port, vip_id, frozenset(hop_ids), frozenset(backend_keys))

    def _put(self, table: dict[bytes, bytes], pending: set[bytes], key: bytes, value: bytes) -> None:
        if table.get(key) != value:
            table[key] = value
            pending.add(key)

    def _drop_backend(self, key: bytes) -> None:
        if self.tables.backends.pop(key, None) is not None:
            self.tables.pending.backends.add(key)

    def _vip_id(self, vip_port: VipPort, now_ns: int) -> int:
        row = VipRow(
            vip_port.namespace, vip_port.service, vip_port.address, vip_port.port, vip_port.transport, vip_port.policy
        )
        known = self.vips.find(row)
        return self._add(self.vips, self._take_id(), row, now_ns) if known is None else known

    def _hop_id(self, vip_id: int, hop: Hop, backend: Backend, now_ns: int) -> int:
        if hop is Hop.UNKNOWN:
            return vip_id
        zone = self.zone_of(backend) if self._tells_zones else None
        row = HopRow(vip_id, hop, backend.node, self._zone_crossed(backend), zone)
        known = self.hops.find(row)
        return self._add(self.hops, self._take_id(), row, now_ns) if known is None else known

    def _add(self, rows: _Rows[_Row], row_id: int, row: _Row, now_ns: int) -> int:
        rows.add(row_id, row, now_ns)
        pending = self.tables.pending
        (pending.vip_ids if isinstance(row, VipRow) else pending.hop_ids).add(row_id)
        return row_id

    def _take_id(self) -> int:
        taken, self._next_id = self._next_id, self._next_id + 1
        return taken

    def _is_local(self, backend: Backend) -> bool:
        return backend.node == self.node_name

    def _zone_crossed(self, backend: Backend) -> bool | None:
        zone = self.zone_of(backend)
        return None if zone is None or self.zone is None else zone != self.zone

    def _classify(self, backend: Backend, *, local: bool) -> Hop:
        if backend.node is None:
            return Hop.UNKNOWN
        if self._is_local(backend):
            return Hop.NONE
        return Hop.AVOIDABLE if local else Hop.REQUIRED

    def _placement(self, used: list[Backend]) -> Placement:
        local = sum(self._is_local(backend) for backend in used)
        crossed = sum(self._zone_crossed(backend) is True for backend in used if not self._is_local(backend))
        return Placement(local, len(used) - local - crossed, crossed)

    def _unforwarded(self, vip_port: VipPort) -> Unforwarded:
        if not vip_port.endpoints_known:
            return Unforwarded.DROPPED
        if not _used(vip_port.backends):
            return Unforwarded.NO_ENDPOINTS
        # With policy Local, kube-proxy falls back to terminating endpoints of its own node alone.
        if vip_port.policy is Policy.LOCAL and not any(
            self._is_local(backend) and (backend.ready or backend.serving) for backend in vip_port.backends
        ):
            return Unforwarded.NO_LOCAL_ENDPOINTS
        return Unforwarded.DROPPED


def _vip_key(vip_port: VipPort) -> bytes:
    return VIP_KEY.pack(vip_port.address, pack_port(vip_port.port), vip_port.transport)


def _used(backends: Iterable[Backend]) -> list[Backend]:
    """Leave those that kube-proxy picks from: the ready ones, else those that still serve while they terminate.

    kubernetes pkg/proxy/topology.go, KEP-1669.
    """
    ready = [backend for backend in backends if backend.ready]
    return ready or [backend for backend in backends if backend.serving]
