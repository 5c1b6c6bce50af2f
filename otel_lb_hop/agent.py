"""The agent: two one-way streets that meet here and nowhere else.

    packets ─ bpf/ ─┬─ counters ─ snapshot ────────── metrics
                    └─ ring ─ decode ─ hops ─ encode ─ logs and spans

    VIP file ─ cluster ─ topology ─ tables in the kernel

`Agent.run` is the main loop: every stage is called from it, none calls back. Exporters, the local API and the
netlink monitor have threads of their own and meet the loop only in queues, events and the health board.
"""

from __future__ import annotations

import gc
import logging
import socket
import time
from typing import TYPE_CHECKING, Any, NamedTuple

from otel_lb_hop.cluster.file_source import FileSource
from otel_lb_hop.core import hops, ids
from otel_lb_hop.core.interfaces import find_uplinks
from otel_lb_hop.core.layout import Settings
from otel_lb_hop.core.topology import KEEP_RETIRED_NS, Topology
from otel_lb_hop.errors import ConfigError, KernelError
from otel_lb_hop.export.metrics import MetricsBuilder, SelfReport
from otel_lb_hop.export.records import RecordBuilder
from otel_lb_hop.export.resource import make_resource
from otel_lb_hop.export.sdk import make_exporters
from otel_lb_hop.export.shipper import MetricsShipper, Shipper, Snapshotted
from otel_lb_hop.kernel.bpf import run_program
from otel_lb_hop.kernel.hooks import Hooks
from otel_lb_hop.kernel.netlink import Monitor, Netlink
from otel_lb_hop.kernel.ring import Ring
from otel_lb_hop.kernel.tables import KernelTables
from otel_lb_hop.ops.api import LocalApi
from otel_lb_hop.ops.health import Health

if TYPE_CHECKING:
    from collections.abc import Callable
    from concurrent.futures import Future

    from otel_lb_hop.config import Config
    from otel_lb_hop.core.topology import Tables
    from otel_lb_hop.errors import Problem
    from otel_lb_hop.kernel.loader import Loaded
    from otel_lb_hop.model import Cluster
    from otel_lb_hop.ops.stop import Stop

log = logging.getLogger(__name__)

TICK_SECONDS = 0.25
SWEEP_TICKS = 8
"""The handshake table is swept in this many parts, one a tick: each slot is looked at every two seconds."""
SOURCE_SECONDS = 1.0
INTERFACES_SECONDS = 30.0
DRAIN_RECORDS = 2_048
"""At most so many at a time, so that nothing else waits long in a burst."""
SHUTDOWN_SECONDS = 4.0
METRICS_RESERVE_SECONDS = 1.0
SETTLED_NS = 10 * 10**9
"""Out of use for so long, a VIP port has no handshake open any more."""
VERDICT_AFTER_NS = 5 * 10**9
"""A client that gets no answer sends its SYN again after one second (RFC 6298, 2.1), and at least once more by now."""


class _Clocks(NamedTuple):
    """The wall clock and how far it is from the monotonic clock that the kernel stamps with."""

    wall_ns: int
    offset_ns: int


def _read_clocks() -> _Clocks:
    wall_ns = time.time_ns()
    return _Clocks(wall_ns, wall_ns - time.monotonic_ns())


class Agent:
    """Everything that runs on one node. Made whole or not at all: `start` raises, `run` does not."""

    def __init__(self, config: Config, loading: Future[Loaded]) -> None:
        self._config = config
        self._loading = loading
        self._health = Health()
        self._topology = Topology(config.node_name)
        self._source = FileSource(config.vips_file) if config.vips_file else None
        self._unresolved = 0
        self._abandoned = 0
        self._due: dict[str, float] = {}
        self._failed: set[str] = set()
        self._pending: Tables | None = None

    def start(self) -> None:
        """Read the topology, load the programs, attach them. Raises ConfigError or KernelError."""
        config = self._config
        cluster, exporters = self._read_sources_and_targets()
        self._api = LocalApi(config.listen, self._health) if config.listen else None
        self._loaded = self._loading.result()
        self._tables = KernelTables(self._loaded)
        self._tables.set_settings(self._settings(VERDICT_AFTER_NS))
        self._ring = Ring(self._loaded.records_fd, self._loaded.sizes.ring_pages)
        self._netlink = Netlink()
        self._monitor = Monitor()
        self._hooks = Hooks(self._loaded.programs, self._netlink)
        if cluster is not None:
            self._take_over(cluster)
        self._reconcile_interfaces()
        self._require_a_hook()
        self._make_exports(exporters, cluster)
        # What only the start needed goes back to the system.
        gc.collect()
        log.info(
            "counting on %s (%s), %d VIP ports; compiled in %.2f s",
            ", ".join(self._hooks.interfaces), self._hooks.method, self._topology.watched, self._loaded.compile_seconds,
        )  # fmt: skip

    def _read_sources_and_targets(self) -> tuple[Cluster | None, dict[str, list[Any]]]:
        """Read the VIP file and make the exporters; what is wrong with any of them is told together."""
        cluster: Cluster | None = None
        exporters: dict[str, list[Any]] = {"metrics": [], "logs": [], "traces": []}
        problems: list[Problem] = []
        try:
            cluster = self._source.poll() if self._source else None
        except ConfigError as error:
            problems += error.problems
        for signal in () if self._config.sdk_disabled else exporters:
            try:
                exporters[signal] = make_exporters(signal, getattr(self._config, signal))
            except ConfigError as error:
                problems += error.problems
        if problems:
            raise ConfigError(problems)
        return cluster, exporters

    def _settings(self, verdict_after_ns: int) -> Settings:
        rate = self._config.record_rate
        return Settings(
            verdict_after_ns=verdict_after_ns,
            reject_below=self._threshold,
            record_interval_ns=10**9 // rate if rate else 0,
            record_burst_ns=10**9,
        )

    @property
    def _threshold(self) -> int:
        return ids.rejection_threshold(self._config.record_ratio)

    def _make_exports(self, exporters: dict[str, list[Any]], cluster: Cluster | None) -> None:
        config = self._config
        own = next((node for node in (cluster.nodes if cluster else ()) if node.name == config.node_name), None)
        resource = make_resource(
            config.node_name, socket.gethostname(), self._topology.zone, own.region if own else None
        )
        self._metrics_builder = MetricsBuilder(resource, self._topology, config.node_name, time.time_ns())
        self._record_builder = RecordBuilder(resource, config.node_name, self._threshold)
        self._metrics = MetricsShipper(exporters["metrics"], config.metric_export_timeout_ms)
        self._logs = Shipper("logs", exporters["logs"])
        self._traces = Shipper("traces", exporters["traces"])

    def run(self, stop: Stop) -> None:
        """Work until `stop` is set, then send what is left within `SHUTDOWN_SECONDS`."""
        wait_seconds = 0.0
        while not stop.wait(wait_seconds):
            more = self._tick(time.monotonic())
            wait_seconds = 0.0 if more else TICK_SECONDS
        self._shut_down()

    def _tick(self, now: float) -> bool:
        """Do what is due; answers whether more records wait than one turn takes."""
        more = bool(self._attempt("records", self._drain))
        if self._is_due("sweep", now, TICK_SECONDS):
            self._attempt("sweep", self._sweep)
        if self._is_due("source", now, SOURCE_SECONDS):
            self._attempt("topology", self._poll_source)
            self._report_exports()
        if self._monitor.changed.is_set() or self._is_due("interfaces", now, INTERFACES_SECONDS):
            self._monitor.changed.clear()
            self._attempt("interfaces", self._reconcile_interfaces)
        if self._is_due("metrics", now, self._config.metric_export_interval_ms / 1e3):
            self._attempt("counters", self._export_metrics)
        self._health.beat(now)
        return more

    def _attempt(self, part: str, work: Callable[[], bool | None]) -> bool | None:
        """Do one step of the loop; what goes wrong in it is told and degrades its part, and the loop goes on."""
        try:
            done = work()
        except Exception as error:
            log.exception("%s: %s; the next try follows", part, type(error).__name__)
            self._health.report(part, healthy=False, vital=False, detail=f"{type(error).__name__}: {error}")
            self._failed.add(part)
            return None
        if part in self._failed:
            self._failed.discard(part)
            if part in {"records", "sweep", "counters"}:  # the others report on themselves
                self._health.report(part, healthy=True, vital=False)
        return done

    def _is_due(self, task: str, now: float, every: float) -> bool:
        if now < self._due.setdefault(task, now + every):
            return False
        self._due[task] = now + every
        return True

    # packets ─ ring ─ decode ─ hops ─ encode ─ logs and spans

    def _drain(self) -> bool:
        clocks = _read_clocks()
        connections = []
        taken = 0
        for taken, record in enumerate(self._ring.drain(DRAIN_RECORDS), start=1):  # noqa: B007 - the last one counts
            connection = hops.resolve(record, self._topology, clocks.offset_ns, self._hooks.name_of)
            if connection is None:
                self._unresolved += 1
            else:
                connections.append(connection)
        if self._logs.enabled:
            self._logs.offer([self._record_builder.log_record(each, clocks.wall_ns) for each in connections])
        if self._traces.enabled:
            self._traces.offer([self._record_builder.span(each) for each in connections])
        return taken == DRAIN_RECORDS

    def _sweep(self) -> None:
        run_program(self._loaded.programs["lbh_sweep"], repeat=-(-self._loaded.sizes.table_buckets // SWEEP_TICKS))

    def _sweep_all(self) -> None:
        self._tables.set_settings(self._settings(0))
        run_program(self._loaded.programs["lbh_sweep"], repeat=self._loaded.sizes.table_buckets)

    # packets ─ counters ─ snapshot ─ metrics

    def _export_metrics(self) -> None:
        now_ns = time.time_ns()
        self._forget_rows(now_ns)
        if not self._metrics.enabled:
            return
        snapshot = self._tables.snapshot()
        self._metrics.offer(
            [
                Snapshotted(
                    self._metrics_builder.build(
                        snapshot.vips, snapshot.hops, self._self_report(snapshot.events), now_ns
                    ),
                    now_ns,
                )
            ]
        )

    def _forget_rows(self, now_ns: int) -> None:
        hop_rows = dict(self._topology.hops.by_id)
        retired_before_ns = now_ns - KEEP_RETIRED_NS
        if self._metrics.enabled:
            # What nobody has received yet is not forgotten, however long the Collector is away.
            retired_before_ns = min(retired_before_ns, self._metrics.exported_ns - SETTLED_NS)
        for hop_id, last in self._tables.keep_rows(self._topology.rows(retired_before_ns)).items():
            row = hop_rows[hop_id]
            if self._metrics.enabled:
                self._metrics_builder.carry_over(row.vip_id, row.hop, last)

    def _self_report(self, events: tuple[int, ...]) -> SelfReport:
        drops = {
            ("", "unresolved"): self._unresolved,
            ("", "wrong_size"): self._ring.wrong_size,
            ("", "shutdown"): self._abandoned,
        }
        for shipper in (self._logs, self._traces):
            for reason, count in shipper.ledger().dropped.items():
                drops[shipper.signal, reason] = count
        return SelfReport(
            events=events,
            record_drops=drops,
            records_exported={each.signal: each.ledger().exported for each in (self._logs, self._traces)},
            vip_ports=self._topology.watched,
            topology_age_s=self._topology.age_ns(time.time_ns()) / 1e9,
            map_usage=self._tables.usage(),
            parts_healthy={name: part.healthy for name, part in self._health.parts().items()},
        )

    # VIP file ─ cluster ─ topology ─ tables in the kernel

    def _poll_source(self) -> None:
        if self._source is None:
            return
        try:
            cluster = self._source.poll()
        except ConfigError as error:
            if self._health.parts()["topology"].detail != str(error):
                log.warning("the VIP file is wrong, the table before it stays:\n%s", error)
            self._health.report("topology", healthy=False, vital=self._pending is not None, detail=str(error))
            return
        if cluster is not None:
            self._take_over(cluster)
        elif self._pending is not None:
            self._write_tables()
        elif self._health.parts()["topology"].healthy:
            self._topology.confirm(time.time_ns())

    def _take_over(self, cluster: Cluster) -> None:
        tables = self._topology.update(cluster, time.time_ns())
        self._pending = tables
        self._write_tables()

    def _write_tables(self) -> None:
        if self._pending is None:
            return
        skipped = [
            f"{each.vip_port.namespace}/{each.vip_port.service} port {each.vip_port.port}: {each.reason}"
            for each in self._topology.skipped
        ]
        try:
            self._tables.apply(self._pending)
        except OSError as error:
            text = f"the kernel's tables do not hold the topology, the next try follows: {error}"
            self._health.report("topology", healthy=False, vital=True, detail=text)
            log.error(text)  # noqa: TRY400 - the errno is all there is
            return
        self._pending = None
        detail = {"vip_ports": self._topology.watched, "skipped": skipped}
        self._health.report("topology", healthy=True, vital=True, detail=detail)
        log.info("topology: %d VIP ports, %d skipped", self._topology.watched, len(skipped))

    # interfaces

    def _reconcile_interfaces(self) -> None:
        config = self._config
        links = self._netlink.links()
        if config.uplinks is None:
            uplinks = find_uplinks(links, *self._netlink.gateway_links())
        else:
            uplinks = frozenset(link.index for link in links if config.uplinks.matches(link.name))
        names = {link.index: link.name for link in links}
        too_many = self._tables.set_uplinks(uplinks)
        self._hooks.reconcile([link for link in links if config.interfaces.matches(link.name)])
        problems = self._hooks.problems | {
            names[index]: "one uplink too many: what comes in here counts as internal" for index in too_many
        }
        self._health.report(
            "interfaces",
            healthy=bool(self._hooks.interfaces) and not problems,
            vital=not self._hooks.interfaces,
            detail={
                "method": self._hooks.method,
                "hooked": self._hooks.interfaces,
                "uplinks": sorted(names[index] for index in uplinks),
                "problems": problems,
            },
        )

    def _require_a_hook(self) -> None:
        if self._hooks.problems and not self._hooks.interfaces:
            name, reason = next(iter(self._hooks.problems.items()))
            raise KernelError(f"no interface could be hooked; {name}: {reason}; CAP_NET_ADMIN is needed for that")

    def _report_exports(self) -> None:
        for shipper in (self._metrics, self._logs, self._traces):
            if shipper.enabled:
                healthy = shipper.last_error is None
                detail = {"error": shipper.last_error, **shipper.ledger()._asdict()}
                self._health.report(shipper.signal, healthy=healthy, vital=False, detail=detail)

    def _shut_down(self) -> None:
        deadline = time.monotonic() + SHUTDOWN_SECONDS
        self._hooks.close()
        # Nobody will see an answer any more: what is open gets its verdict now, or it would vanish uncounted.
        self._attempt("sweep", self._sweep_all)
        while self._attempt("records", self._drain) and time.monotonic() < deadline - METRICS_RESERVE_SECONDS:
            pass
        self._abandoned = self._ring.pending_records
        for shipper in (self._logs, self._traces):
            shipper.stop()
        for shipper in (self._logs, self._traces):
            shipper.close(deadline - METRICS_RESERVE_SECONDS)
            if shipper.enabled:
                log.info("%s: %s", shipper.signal, shipper.ledger())
        # Last, so that they tell what became of the last records.
        self._attempt("counters", self._export_metrics)
        self._metrics.close(deadline)
        self._monitor.close()
        self._netlink.close()
        self._ring.close()
        if self._api:
            self._api.close()
