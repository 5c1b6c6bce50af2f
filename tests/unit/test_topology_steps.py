"""Any history of changes: the topology is what its sources say now, however they came to say it."""

from __future__ import annotations

import dataclasses
import sys
from typing import NamedTuple

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from otel_lb_hop.core.layout import BACKEND_KEY, VIP_KEY, VIP_VALUE, pack_port, unpack_port
from otel_lb_hop.core.topology import (
    KEEP_RETIRED_NS,
    LINGER_NS,
    HopRow,
    Placement,
    ServiceId,
    Source,
    Topology,
    VipRow,
)
from otel_lb_hop.model import Cluster, Hop, Node, Skipped, VipPort
from tests.unit.samples import NODE, NODES, SECOND, VIP_PORTS, backend, vip_port

START = 1_700_000_000 * SECOND
SERVICES = [ServiceId(source, namespace, "x") for source in Source for namespace in ("a", "b")]

Place = tuple[VipRow, bytes, int]
"""An endpoint of a VIP port: what a backend key means, whatever its id."""
Class = tuple[Hop, str | None, bool | None]


class View(NamedTuple):
    """What a topology says, by the meaning of its ids."""

    vips: dict[bytes, tuple[VipRow, int]]
    backends: dict[Place, Class]
    placements: dict[VipRow, Placement]
    skipped: list[Skipped]
    watched: int
    datagram_needs: tuple[int, int]
    zone: str | None
    own_node: Node | None


class Gone(NamedTuple):
    """An endpoint that lingers: since when, and the class that the kernel still holds of it, if it does."""

    since_ns: int
    held: Class | None


def view(topology: Topology) -> View:
    """Decode the tables; each id in them has a row, and a hop row is of the VIP port of its backend."""
    vips, backends = {}, {}
    for key, value in topology.tables.vip_ports.items():
        vip_id, unforwarded = VIP_VALUE.unpack(value)
        vips[key] = topology.vips.by_id[vip_id], unforwarded
        assert topology.hops.by_id[vip_id] == HopRow(vip_id, Hop.UNKNOWN, None, None)
    for key, value in topology.tables.backends.items():
        vip_id, address, port = BACKEND_KEY.unpack(key)
        row = topology.hops.by_id[int.from_bytes(value, sys.byteorder)]
        assert row.vip_id == vip_id
        backends[topology.vips.by_id[vip_id], address, unpack_port(port)] = row.hop, row.node, row.zone_crossed
    placements = {topology.vips.by_id[vip_id]: placement for vip_id, placement in topology.placements.items()}
    return View(
        vips, backends, placements, topology.skipped, topology.watched, topology.datagram_needs, topology.zone,
        topology.own_node,
    )  # fmt: skip


def calm(vip_port: VipPort) -> VipPort:
    """Have each endpoint once, as both sources do, and those on this node agree on its zone.

    Which of contradicting words counts depends on their order.
    """
    once = {each.address: each for each in vip_port.backends}.values()
    zoned = (dataclasses.replace(each, zone="zone-a") if each.node == NODE and each.zone else each for each in once)
    return dataclasses.replace(vip_port, backends=tuple(zoned))


CALM_PORTS = VIP_PORTS.map(calm)
CHANGES = st.dictionaries(st.sampled_from(SERVICES), st.lists(CALM_PORTS, max_size=3), min_size=1, max_size=3)
NODE_CHANGES = st.dictionaries(st.sampled_from([NODE, "node2"]), NODES.map(lambda nodes: nodes[0] if nodes else None))
FILES = st.builds(Cluster, st.lists(CALM_PORTS, max_size=4).map(tuple), NODES.map(tuple))


class Steps(RuleBasedStateMachine):
    """One topology that is told changes, beside what was said so far and a kernel that only follows `pending`."""

    def __init__(self) -> None:
        super().__init__()
        self.topology = Topology(NODE, START)
        self.now_ns = START
        self.services: dict[ServiceId, dict[bytes, VipPort]] = {}
        self.nodes: dict[Source, dict[str, Node]] = {source: {} for source in Source}
        self.zone_was_told = False
        self.present: dict[Place, Class] = {}
        self.lingering: dict[Place, Gone] = {}
        self.seen: set[Place] = set()
        self.vip_rows: dict[int, tuple[VipRow, int]] = {}
        self.hop_rows: dict[int, tuple[HopRow, int]] = {}
        self.kernel_vip_ports: dict[bytes, bytes] = {}
        self.kernel_backends: dict[bytes, bytes] = {}
        self.kernel_vip_ids: set[int] = set()
        self.kernel_hop_ids: set[int] = set()

    @rule(changes=CHANGES)
    def update(self, changes: dict[ServiceId, list[VipPort]]) -> None:
        """Change some Services, or let them come or go."""
        named = {
            key: [dataclasses.replace(each, namespace=key.namespace, service=key.name) for each in vip_ports]
            for key, vip_ports in changes.items()
        }
        self.topology.update(named, self.now_ns)
        self.say(named)

    @rule(content=FILES)
    def replace(self, content: Cluster) -> None:
        """Give the VIP file another content."""
        self.topology.replace(content, self.now_ns)
        self.nodes[Source.FILE] = {node.name: node for node in content.nodes}
        self.follow()
        services: dict[ServiceId, list[VipPort]] = {key: [] for key in SERVICES if key.source is Source.FILE}
        for each in content.vip_ports:
            services[ServiceId(Source.FILE, each.namespace, each.service)].append(each)
        self.say(services)

    @rule(source=st.sampled_from(Source), changes=NODE_CHANGES)
    def update_nodes(self, source: Source, changes: dict[str, Node | None]) -> None:
        """Let nodes come, go, and change their zone."""
        named = {name: node and dataclasses.replace(node, name=name) for name, node in changes.items()}
        self.topology.update_nodes(source, named, self.now_ns)
        known = self.nodes[source] | named
        self.nodes[source] = {name: node for name, node in known.items() if node}
        self.follow()

    @rule(seconds=st.sampled_from([1, 29, 31, 299, 301]))
    def wait(self, seconds: int) -> None:
        """Let time go by."""
        self.now_ns += seconds * SECOND

    @rule()
    def forget_endpoints(self) -> None:
        """Forget what lingered long enough."""
        limit_ns = self.now_ns - LINGER_NS
        self.topology.forget_endpoints(limit_ns)
        self.lingering = {place: gone for place, gone in self.lingering.items() if gone.since_ns > limit_ns}

    @rule()
    def forget_rows(self) -> None:
        """Forget what was retired long enough, and before that endpoints, which linger for less."""
        self.forget_endpoints()
        rows = dict(self.topology.hops.by_id)
        gone = self.topology.forget_rows(self.now_ns - KEEP_RETIRED_NS, self.now_ns)
        for hop_id, into in gone.hops:
            self.kernel_hop_ids.discard(hop_id)
            row = rows[hop_id]
            # What it had counted goes into the remainder of those like it, or with its VIP port.
            assert (into == 0) is (row.vip_id in gone.vip_ids)
            assert into == 0 or self.topology.hops.by_id[into] == row._replace(node=None)
        self.kernel_vip_ids -= set(gone.vip_ids)

    @rule(every=st.integers(1, 3))
    def apply(self, every: int) -> None:
        """Let the kernel take over what is pending, or a part of it as when a map is full."""
        tables = self.topology.tables
        pending = tables.pending
        for ids, kernel_ids in ((pending.vip_ids, self.kernel_vip_ids), (pending.hop_ids, self.kernel_hop_ids)):
            done = sorted(ids)[::every]
            kernel_ids.update(done)
            ids.difference_update(done)
        for keys, kernel, table in (
            (pending.vip_ports, self.kernel_vip_ports, tables.vip_ports),
            (pending.backends, self.kernel_backends, tables.backends),
        ):
            for key in sorted(keys)[::every]:
                kernel.pop(key, None)
                if key in table:
                    kernel[key] = table[key]
                keys.discard(key)
        assert every > 1 or not pending

    def say(self, services: dict[ServiceId, list[VipPort]]) -> None:
        """Note what these Services are from now on; of one VIP port that a Service has twice the last counts."""
        for key, vip_ports in services.items():
            self.services[key] = {
                VIP_KEY.pack(each.address, pack_port(each.port), each.transport): each for each in vip_ports
            }
            self.zone_was_told |= any(
                one.zone and one.node == NODE for each in self.services[key].values() for one in each.backends
            )
        self.follow()

    def follow(self) -> None:
        """Note which endpoints came and went by that."""
        now = view(self.fresh())
        watched = {row for row, _ in now.vips.values()}
        for place in self.present.keys() - now.backends.keys():
            self.lingering[place] = Gone(self.now_ns, self.present[place] if place[0] in watched else None)
        for place in now.backends:
            self.lingering.pop(place, None)
        self.present = now.backends
        self.seen |= now.backends.keys()

    def fresh(self) -> Topology:
        """Make a topology that is told at once all that is so now, and the zone of this node if it ever was told."""
        made = Topology(NODE)
        if self.zone_was_told:
            passing = ServiceId(Source.API, "passing", "passing")
            made.update({passing: [vip_port(backend("10.100.9.9", zone="zone-a"), address="10.0.10.9")]}, 1)
            made.update({passing: []}, 1)
        vip_ports = {key: list(vip_ports.values()) for key, vip_ports in self.services.items()}
        file_ports = [each for key, some in vip_ports.items() if key.source is Source.FILE for each in some]
        made.update_nodes(Source.API, self.nodes[Source.API], 1)
        made.update({key: each for key, each in vip_ports.items() if key.source is Source.API}, 1)
        made.replace(Cluster(tuple(file_ports), tuple(self.nodes[Source.FILE].values())), 1)
        return made

    @invariant()
    def says_what_is_so(self) -> None:
        """Check that all is as if it had been told at once, but for endpoints that linger."""
        got, wanted = view(self.topology), view(self.fresh())
        held = {place: gone.held for place, gone in self.lingering.items() if gone.held}
        assert got == wanted._replace(backends=wanted.backends | held)

    @invariant()
    def knows_endpoints_by_name(self) -> None:
        """Check that endpoints that are there or linger are found, and what was forgotten is not."""
        for row, address, port in self.seen:
            vip_id = self.topology.vips.find(row)
            known = (row, address, port) in self.present or (row, address, port) in self.lingering
            assert (vip_id is not None and self.topology.backend(vip_id, address, port) is not None) is known

    @invariant()
    def lowest_claim_wins(self) -> None:
        """Check that a VIP port is that of the lowest source, namespace and name that claims it."""
        owners: dict[bytes, VipRow] = {}
        for key in sorted(self.services, reverse=True):
            for vip_key, each in self.services[key].items():
                owners[vip_key] = VipRow(key.namespace, key.name, each.address, each.port, each.transport, each.policy)
        assert {key: row for key, (row, _) in view(self.topology).vips.items()} == owners

    @invariant()
    def ids_keep_their_meaning(self) -> None:
        """Check that an id has the row and start time that it always had, or is younger than all that were taken."""
        taken = max([0, *self.vip_rows, *self.hop_rows])
        vips = {key: (row, self.topology.vips.created_ns[key]) for key, row in self.topology.vips.by_id.items()}
        hops = {key: (row, self.topology.hops.created_ns[key]) for key, row in self.topology.hops.by_id.items()}
        assert all(
            self.vip_rows.get(key) == row if key <= taken else row[1] <= self.now_ns for key, row in vips.items()
        )
        assert all(
            self.hop_rows.get(key) == row if key <= taken else row[1] <= self.now_ns for key, row in hops.items()
        )
        assert len({row for row, _ in vips.values()}) == len(vips)
        assert len({row for row, _ in hops.values()}) == len(hops)
        self.vip_rows |= vips
        self.hop_rows |= hops

    @invariant()
    def pending_is_all_that_the_kernel_lacks(self) -> None:
        """Check that what is not pending is in the kernel as it has to be, and that every row is there or pending."""
        tables = self.topology.tables
        for table, kernel, pending in (
            (tables.vip_ports, self.kernel_vip_ports, tables.pending.vip_ports),
            (tables.backends, self.kernel_backends, tables.pending.backends),
        ):
            settled = (table.keys() | kernel.keys()) - pending
            assert {key: table.get(key) for key in settled} == {key: kernel.get(key) for key in settled}
        assert self.kernel_vip_ids | tables.pending.vip_ids == self.topology.vips.by_id.keys()
        assert self.kernel_hop_ids | tables.pending.hop_ids == self.topology.hops.by_id.keys()

    def teardown(self) -> None:
        """Check that in the end, with all forgotten that went, nothing is left but what is so."""
        self.wait(301)
        self.forget_rows()
        self.apply(1)
        wanted = self.fresh()
        assert view(self.topology) == view(wanted)
        assert self.kernel_vip_ports == self.topology.tables.vip_ports
        assert self.kernel_backends == self.topology.tables.backends
        vip_ids = {VIP_VALUE.unpack(value)[0] for value in self.topology.tables.vip_ports.values()}
        assert self.topology.vips.by_id.keys() == vip_ids
        used = {int.from_bytes(value, sys.byteorder) for value in self.topology.tables.backends.values()}
        remainders = {key for key, row in self.topology.hops.by_id.items() if row.is_remainder}
        assert self.topology.hops.by_id.keys() == used | vip_ids | remainders
        assert not remainders & (used | vip_ids)
        assert {self.topology.hops.by_id[key].vip_id for key in remainders} <= vip_ids
        assert self.topology._backends.keys() == self.topology.tables.backends.keys()
        assert self.topology._claims.keys() == self.topology.tables.vip_ports.keys()


TestSteps = Steps.TestCase
TestSteps.settings = settings(deadline=None, max_examples=100, stateful_step_count=20)
