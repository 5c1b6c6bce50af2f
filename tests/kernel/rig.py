"""A test's hold on the loaded programs: a network namespace of its own, packets in, counters and records out.

How BPF_PROG_TEST_RUN treats what it is given (net/bpf/test_run.c), found out on Linux 6.18:
- The context may carry `ifindex`, of an interface in the caller's network namespace (any other is ENODEV); skb->dev
  is then that device, lo without it. `protocol` must be zero: it comes from bytes 12 and 13 (see packets.py). So must
  `vlan_present`, `vlan_tci`, `vlan_proto` and `data_end`: no tag in metadata, no page fragments. `gso_size` may be set.
- The data of a tc program begins at the first byte given. Less than 14 bytes are refused, and so is a packet whose
  EtherType says IP when no whole IP header follows those 14 bytes; behind a VLAN tag it is let through.
- The skb is always linear.
- The context of an XDP program names the packet's end and an `ingress_ifindex`; its packets may end anywhere behind the
  14 bytes (Linux 5.14 and later).
- A socket filter gets the data from byte 14 on, and what comes back has zeros before it.
What it cannot do is done on real devices in test_devices.py.
"""

from __future__ import annotations

import ctypes
import os
import socket
import struct
import subprocess
import threading
from collections import Counter
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

from otel_lb_hop.core.layout import KIND, Event, OriginCode, Settings, Unforwarded, Verdict
from otel_lb_hop.core.topology import Topology
from otel_lb_hop.kernel import bpf
from otel_lb_hop.kernel.bpf import Map, run_program
from otel_lb_hop.kernel.conntrack import Places
from otel_lb_hop.kernel.ring import Ring
from otel_lb_hop.kernel.tables import KernelTables
from otel_lb_hop.model import Backend, Cluster, Node, Policy, Transport, VipPort

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from otel_lb_hop.core.layout import HopStats, VipStats
    from otel_lb_hop.kernel.loader import Loaded
    from otel_lb_hop.kernel.tables import Snapshot
    from tests.kernel.packets import End

CONTEXT = struct.Struct("=40xI132xI")
"""struct __sk_buff, as far as it can be set here: ifindex and gso_size."""
UNSPEC = 0xFFFFFFFF
"""TC_ACT_UNSPEC (-1) as BPF_PROG_TEST_RUN returns it."""
XDP_PASS = 2
XDP = "lbh_xdp"
XDP_CONTEXT = struct.Struct("=IIIIII")
"""struct xdp_md: data, data_end, data_meta, ingress_ifindex and two that are not used."""
CLONE_NEWNET = 0x40000000
BPF_MAP_GET_FD_BY_ID = 14
WAYS = 8
"""LBH_WAYS: handshakes in a bucket."""
FIRST_RETRANSMIT_NS = 1_200_000_000
"""By this age a client that has heard nothing has sent its SYN again (LBH_FIRST_RETRANSMIT_NS)."""
NODE = "node1"
FLOW = struct.Struct("=16s16s2s2sB3x")
"""struct lbh_flow, which the agent has no business with: client, vip, client_port, vip_port, transport."""
EVERYTHING = Settings(verdict_after_ns=0, reject_below=0, record_interval_ns=1, record_burst_ns=1 << 62)
"""Settings that send every record and give every verdict at the next sweep."""

_libc = ctypes.CDLL(None, use_errno=True)


def _check(result: int) -> None:
    if result != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


@contextmanager
def entered(netns_fd: int) -> Iterator[None]:
    """Put the calling thread into a network namespace for the length of a block."""
    home = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        _check(_libc.setns(netns_fd, CLONE_NEWNET))
        yield
    finally:
        _check(_libc.setns(home, CLONE_NEWNET))
        os.close(home)


class Namespace:
    """A network namespace without a name: it is gone with its descriptor, however the tests end.

    It has two pairs of interfaces: uplink and pod are what packets pass, their peers are far_uplink and far_pod.
    """

    def __init__(self) -> None:
        failed: list[BaseException] = []
        thread = threading.Thread(target=self._make, args=(failed,))
        thread.start()
        thread.join()
        if failed:
            raise failed[0]
        with self.entered():
            commands = (
                "link add uplink type veth peer name far_uplink\n"
                "link add pod type veth peer name far_pod\n"
                "link set uplink mtu 9000 up\nlink set far_uplink mtu 9000 up\n"
            )
            subprocess.run(["ip", "-batch", "-"], input=commands, text=True, check=True)
            self.uplink, self.pod, self.far_uplink = map(socket.if_nametoindex, ("uplink", "pod", "far_uplink"))

    def _make(self, failed: list[BaseException]) -> None:
        # In a thread that ends: nobody is left in there by accident.
        try:
            _check(_libc.unshare(CLONE_NEWNET))
            self.fd = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            failed.append(error)

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Put the calling thread into the namespace for the length of a block."""
        with entered(self.fd):
            yield

    def close(self) -> None:
        """Let go of it, and of its interfaces."""
        os.close(self.fd)


class Marked(NamedTuple):
    """The ids that the topology gave out: the VIP port's, and of each of its hop rows by (hop, node)."""

    vip_id: int
    hops: dict[tuple[str, str | None], int]


class Told(NamedTuple):
    """A record and its kind, all in one."""

    syn_ns: int
    forward_ns: int
    end_ns: int
    trace_id: bytes
    client: bytes
    snat: bytes
    client_port: int
    snat_port: int
    retransmits: int
    backend: bytes
    backend_port: bytes
    verdict: int
    origin: int
    vip_id: int
    hop_id: int
    in_ifindex: int
    translated: int


class Rig:
    """Runs packets through the programs and reads what came of it."""

    def __init__(self, loaded: Loaded, namespace: Namespace) -> None:
        self.loaded = loaded
        self.namespace = namespace
        self.xdp = False
        """Whether what comes in on Ethernet is watched by XDP."""
        self.uplink, self.pod, self.peer = namespace.uplink, namespace.pod, namespace.far_uplink
        self.ring = Ring(loaded.records_fd)
        inner = maps_of(loaded.programs["lbh_sweep"])
        datagrams = maps_of(loaded.programs["lbh_datagram"])
        self._inner_fds = [*inner.values(), *datagrams.values()]
        self.flows = Map(datagrams["datagram_flows"], FLOW.size, 8)
        sizes = loaded.sizes
        self.handshakes = Map(inner["handshakes"], 4, 128)
        self.tags = Map(inner["handshake_tags"], 4, 8 * WAYS)
        self._record_due = Map(inner["record_due_ns"], 4, 8)
        self._cursor = Map(inner["sweep_cursor"], 4, 4)
        self._buckets = [number.to_bytes(4, "little") for number in range(sizes.table_buckets)]
        self.topology = Topology(NODE)
        self.tables = KernelTables(loaded)
        self.places = Places(loaded.places)

    def close(self) -> None:
        """Unmap the ring, close what is open here."""
        self.ring.close()
        for fd in self._inner_fds:
            os.close(fd)

    def reset(self, settings: Settings = EVERYTHING) -> None:
        """Make everything as it was when the programs were loaded; the uplink is one."""
        self.forget()
        self.xdp = False
        zero = bytes(4)
        self._record_due.put(zero, b"")
        self._cursor.put(zero, b"")
        loaded = self.loaded
        rows = (loaded.vip_stats, loaded.hop_stats, loaded.names)
        for table in (loaded.vip_ports, loaded.backends, *rows, loaded.places, self.flows, loaded.told_flows):
            for key in list(table.keys()):
                table.delete(key)
        for event in Event:
            loaded.events.put(struct.pack("=I", event), b"")
        while self.records():
            pass
        loaded.uplinks.put(zero, b"")
        self.topology = Topology(NODE)
        self.tables = KernelTables(loaded)
        self.tables.set_uplinks(frozenset({self.uplink}))
        self.tables.set_settings(settings)
        self.places = Places(loaded.places)

    def forget(self) -> None:
        """Empty the handshake table."""
        for key in self._buckets:
            self.tags.put(key, b"")

    def serve(self, *vip_ports: VipPort) -> list[Marked]:
        """Tell the kernel about VIP ports, through topology and tables as the agent does."""
        nodes = (Node(NODE, "a"), Node("node2", "b"))
        self.topology.replace(Cluster(vip_ports, nodes), 1)
        self.tables.apply(self.topology)
        marked = []
        for vip_port in vip_ports:
            rows = self.topology.vips.by_id.items()
            # A change of policy makes a new row; the old one is kept for a while.
            sought = vip_port.address, vip_port.port, vip_port.transport
            vip_id = max(n for n, row in rows if (row.address, row.port, row.transport) == sought)
            hops = self.topology.hops.by_id.items()
            marked.append(
                Marked(vip_id, {(str(row.hop), row.node): number for number, row in hops if row.vip_id == vip_id})
            )
        return marked

    def run(self, program: str, packet: bytes, interface: int = 0, gso_size: int = 0, *, repeat: int = 1) -> None:
        """Run a program on a packet that passes an interface; it must let it go on unchanged.

        `gso_size`: of each of the segments that the packet stands for, as the kernel carries large ones.
        """
        context, passed = b"", XDP_PASS if program == XDP else UNSPEC
        if interface and passed == UNSPEC:
            context = CONTEXT.pack(interface, gso_size)
        elif interface:
            context = XDP_CONTEXT.pack(0, len(packet), 0, interface, 0, 0)
        result, after, _ = run_program(self.loaded.programs[program], packet, repeat, context)
        assert result == passed
        assert after == packet

    def into(self, packet: bytes, interface: int | None = None, *, ethernet: bool = True, repeat: int = 1) -> None:
        """Let a packet come in, by the uplink if not told otherwise."""
        by_ethernet = "lbh_xdp" if self.xdp else "lbh_ingress"
        name = by_ethernet if ethernet else "lbh_ingress_l3"
        self.run(name, packet, self.uplink if interface is None else interface, repeat=repeat)

    def out(self, packet: bytes, interface: int | None = None, *, ethernet: bool = True, repeat: int = 1) -> None:
        """Let a packet leave, towards the pods if not told otherwise."""
        name = "lbh_egress" if ethernet else "lbh_egress_l3"
        self.run(name, packet, self.pod if interface is None else interface, repeat=repeat)

    def datagram(self, packet: bytes, interface: int | None = None, *, ethernet: bool = True) -> None:
        """Let a datagram come in, by the uplink if not told otherwise."""
        name = "lbh_datagram" if ethernet else "lbh_datagram_l3"
        self.run(name, packet, self.uplink if interface is None else interface)

    def hear(self, message: bytes, repeat: int = 1) -> None:
        """Let conntrack's socket hear a message; it must not keep it."""
        result, after, _ = run_program(self.loaded.programs["lbh_conntrack"], bytes(14) + message, repeat)
        assert result == 0
        assert after == bytes(14) + message

    def sweep(self) -> None:
        """Let the sweep pass over every bucket once."""
        self.run("lbh_sweep", bytes(14), repeat=len(self._buckets))

    def age(self, ns: int) -> None:
        """Let every handshake in the table be so much older; its tag stays."""
        for bucket, key in enumerate(self._buckets):
            tags = self.tags.get(key)
            if tags is None or not any(tags):
                continue
            for number in range(bucket * WAYS, bucket * WAYS + WAYS):
                slot = struct.pack("=I", number)
                raw = self.handshakes.get(slot)
                assert raw is not None
                first, last = struct.unpack_from("=QQ", raw)
                if first:
                    self.handshakes.put(slot, struct.pack("=QQ", first - ns, last - ns) + raw[16:])

    def snapshot(self) -> Snapshot:
        """Read all counters."""
        return self.tables.snapshot()

    def vip(self, vip_id: int) -> VipStats:
        """Read the row of a VIP port."""
        return self.snapshot().vips[vip_id]

    def hop(self, hop_id: int) -> HopStats:
        """Read a hop row."""
        return self.snapshot().hops[hop_id]

    def event(self, event: Event) -> int:
        """Read one event counter."""
        return self.tables.events()[event]

    def records(self, limit: int = 1 << 20) -> list[Told]:
        """Take the records that wait in the ring."""
        return [Told(*raw[:-1], *KIND.unpack(raw[-1])) for raw in self.ring.drain(limit)]


def counts_of(snapshot: Snapshot) -> Counter[object]:
    """Name every counter that is not zero, as the oracle's models do."""
    counts: Counter[object] = Counter(dict(zip(Event, snapshot.events, strict=True)))
    for vip_id, vip in snapshot.vips.items():
        counts["retransmits", vip_id] = vip.retransmits
        for origin in OriginCode:
            counts["connections", (vip_id, origin)] = vip.connections[origin]
            for reason in Unforwarded:
                counts["unforwarded", (vip_id, origin, reason)] = vip.unforwarded[origin][reason]
    for hop_id, hop in snapshot.hops.items():
        for origin in OriginCode:
            counts["forwarded", (hop_id, origin)] = hop.forwarded[origin]
        verdicts = hop.answered, hop.refused, hop.timeout, hop.reply_unseen, hop.translated
        for verdict, number in enumerate(verdicts):
            counts["verdict", (hop_id, Verdict(verdict))] = number
        counts["evicted", hop_id] = hop.evicted
        counts["forward duration", hop_id] = hop.forward.observations
        counts["handshake duration", hop_id] = hop.handshake.observations
    return +counts


def close(loaded: Loaded) -> None:
    """Let go of the programs and maps that were loaded."""
    maps = (loaded.vip_ports, loaded.backends, loaded.vip_stats, loaded.hop_stats, loaded.places, loaded.uplinks)
    others = (loaded.settings, loaded.events, loaded.told_flows, loaded.names, loaded.notes)
    fds = [each.fd for each in (*maps, *others)]
    for fd in (*loaded.programs.values(), *fds, loaded.records_fd):
        os.close(fd)


def maps_of(program_fd: int) -> dict[str, int]:
    """Open the maps of a program by their names: also those that the agent has no business with."""
    ids = (ctypes.c_uint32 * 32)()
    info = ctypes.create_string_buffer(64)
    struct.pack_into("=IQ", info, 52, len(ids), ctypes.addressof(ids))  # struct bpf_prog_info
    _information(program_fd, info)
    (count,) = struct.unpack_from("=I", info, 52)
    found = {}
    for number in ids[:count]:
        fd = bpf._bpf(BPF_MAP_GET_FD_BY_ID, struct.pack("=I", number))
        described = ctypes.create_string_buffer(40)
        _information(fd, described)  # struct bpf_map_info
        found[described.raw[24:40].rstrip(b"\0").decode()] = fd
    return found


def _information(fd: int, info: ctypes.Array[ctypes.c_char]) -> None:
    bpf._bpf(bpf._OBJ_GET_INFO_BY_FD, struct.pack("=IIQ", fd, len(info), ctypes.addressof(info)))


def vip_port(
    vip: End,
    *backends: tuple[End, str | None],
    policy: Policy = Policy.CLUSTER,
    ready: bool = True,
    transport: Transport = Transport.TCP,
) -> VipPort:
    """Make a VIP port with backends, each with its node."""
    return VipPort(
        vip.address,
        vip.port,
        transport,
        "default",
        f"service-{vip.port}",
        policy,
        tuple(Backend(end.address, end.port, node, ready=ready) for end, node in backends),
    )


def in_threads(*works: Callable[[], None]) -> None:
    """Run each work in a thread of its own, pinned to a CPU of its own, and raise what any of them raises."""
    failed: list[BaseException] = []
    cpus = sorted(os.sched_getaffinity(0))

    def pinned(cpu: int, work: Callable[[], None]) -> None:
        try:
            os.sched_setaffinity(threading.get_native_id(), {cpu})
            work()
        except BaseException as error:  # noqa: BLE001 - raised in the test
            failed.append(error)

    threads = [
        threading.Thread(target=pinned, args=(cpus[number % len(cpus)], work)) for number, work in enumerate(works)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failed:
        raise failed[0]
