"""The agent: two one-way streets that meet here and nowhere else.

    packets ─ bpf/ ─┬─ counters ─ snapshot ─ points ─── outlet ─ metrics
                    └─ ring ─ decode ─ courses ─ encode ─ outlet ─ logs and spans

    API server ─ reflector ─┬─ feed ─ inventory ─ topology ─ tables in the kernel
    VIP file ─ watcher ─────┘

`Agent.run` is the main loop: every stage is called from it, none calls back. Shippers, sources, the local API and
the netlink monitor have threads of their own and meet the loop only in queues, events and the health board.
"""

from __future__ import annotations

import gc
import logging
import socket
import time
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from otel_lb_hop.cluster.api_source import ApiSource
from otel_lb_hop.cluster.connect import connector
from otel_lb_hop.cluster.feed import Feed
from otel_lb_hop.cluster.file_source import FileSource, FileWatcher
from otel_lb_hop.config import METRIC_ATTRIBUTES, METRIC_SERIES
from otel_lb_hop.core import ids
from otel_lb_hop.core.hops import Courses
from otel_lb_hop.core.interfaces import find_places, find_uplinks, gateway_links
from otel_lb_hop.core.inventory import Inventory
from otel_lb_hop.core.layout import Event, Settings
from otel_lb_hop.core.ledger import RING, Ledger, Rows, Stage, count_rows, kernel_stage
from otel_lb_hop.core.pinned import MARK, Mark, pack_mark, unpack_mark
from otel_lb_hop.core.topology import KEEP_RETIRED_NS, LINGER_NS, Topology
from otel_lb_hop.errors import ConfigError, KernelError
from otel_lb_hop.export.metrics import MetricsBuilder, SelfReport
from otel_lb_hop.export.outlets import LinesOutlet, make_metrics_outlets, make_record_outlets, make_sinks
from otel_lb_hop.export.points import Metric
from otel_lb_hop.export.record_content import Sampling
from otel_lb_hop.export.resource import Identity, make_resource
from otel_lb_hop.kernel.bpf import run_program
from otel_lb_hop.kernel.conntrack import ConntrackSocket, Places, events_problem, list_entries
from otel_lb_hop.kernel.hooks import Hooks
from otel_lb_hop.kernel.loader import retire_ring
from otel_lb_hop.kernel.netlink import Monitor, Netlink
from otel_lb_hop.kernel.ring import Ring
from otel_lb_hop.kernel.tables import KernelTables
from otel_lb_hop.kernel.told import DELIVERED, SUMMED, open_told
from otel_lb_hop.ops.api import LocalApi
from otel_lb_hop.ops.health import Health
from otel_lb_hop.ops.process import process_usage

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from otel_lb_hop.config import Config
    from otel_lb_hop.core.interfaces import Prefix, Route
    from otel_lb_hop.core.layout import Place
    from otel_lb_hop.errors import Problem
    from otel_lb_hop.export.outlets import Outlet, Sinks
    from otel_lb_hop.kernel.bpf import Map
    from otel_lb_hop.kernel.loader import Loading
    from otel_lb_hop.kernel.tables import Snapshot
    from otel_lb_hop.ops.logs import LineKeeper
    from otel_lb_hop.ops.stop import Stop

log = logging.getLogger(__name__)

TICK_SECONDS = 0.5
"""The ring holds three seconds of records."""
SWEEP_TICKS = 4
"""The handshake table is swept in this many parts, one a tick: each slot is looked at every two seconds."""
TOPOLOGY_SECONDS = 1.0
"""Without news: what lingers is forgotten, what was refused is tried again, what is waited for is given up."""
REPORT_SECONDS = 1.0
NEWS_SECONDS = 0.02
"""After news the loop waits for more of it: a thousand changes a second are then fifty turns, not a thousand."""
SKIPPED_SHOWN = 50
"""On /readyz and in the log, of the VIP ports that are skipped."""
INTERFACES_SECONDS = 30.0
ROUTES_REST = 20
"""Reading routes takes no more of the loop's time than one part in so many."""
DRAIN_RECORDS = 2_048
"""At most so many at a time, so that nothing else waits long in a burst."""
LOADING_SECONDS = 60.0
"""Between two looks, should nobody wake it."""
SHUTDOWN_SECONDS = 3.5
METRICS_RESERVE_SECONDS = 1.0
SETTLED_NS = 10 * 10**9
"""Out of use for so long, a VIP port has no handshake open any more."""
TOLD_FLOWS_SURE = 0.9
"""A table of flows that is fuller may have dropped some."""
CLOCK_STEP_NS = 10**9
"""The wall clock was set by more than that: for once it does not tell how long a row has been out of use."""
VERDICT_AFTER_NS = 5 * 10**9
"""A client that gets no answer sends its SYN again after one second (RFC 6298, 2.1), and at least once more by now."""


def _clock_offset_ns() -> int:
    """Tell how far the wall clock is from the monotonic clock that the kernel stamps with."""
    return time.time_ns() - time.monotonic_ns()


class Agent:
    """Everything that runs on one node. Made whole or not at all: `start` raises, `run` does not."""

    def __init__(
        self,
        config: Config,
        environ: Mapping[str, str],
        loading: Loading,
        stop: Stop,
        lines: LineKeeper,
    ) -> None:
        self._config = config
        self._environ = environ
        self._folder, self._not_pinned = loading.pinning
        self._loading = loading.loaded
        self._stop = stop
        self._lines = lines
        self._health = Health()
        self._topology = Topology(
            config.node_name, time.time_ns(), tells_zones=config.metric_attributes.destination_zone
        )
        self._file = FileWatcher(FileSource(config.vips_file), stop.wake) if config.vips_file else None
        self._api = ApiSource(connector(config.api), config.node_name, stop.wake) if config.api else None
        self._feed = Feed(self._file, self._api, Inventory(config.policies, external_ips=config.external_ips))
        self._resolved = 0
        self._unresolved = 0
        self._abandoned = 0
        self._settled_before = 0
        self._settled = 0
        self._offset_ns = _clock_offset_ns()
        self._kernel_stage = kernel_stage(Rows(0, 0), (0,) * len(Event))
        self._unconfirmed = False
        self._unlisted = False
        self._needs_before = (0, 0)
        self._due: dict[str, float] = {}
        self._failed: set[str] = set()
        self._unfinished = False
        self._needs = (False, False)
        self._routes: list[Route] = []
        self._routes_again = 0.0
        self._routes_old = False
        self._unwritten: str | None = None
        self._write_again = 0.0
        self._source_errors: dict[str, str | None] = {}
        self._size = (0, 0)
        self._told_summed = False

    def start(self) -> bool:
        """Read the topology, load the programs, attach them. Raises ConfigError or KernelError.

        Answers False if it was told to stop before anything was attached.
        """
        config = self._config
        sinks = self._open_sources_and_sinks()
        self._local_api = LocalApi(config.listen, self._health) if config.listen else None
        self._loading.add_done_callback(lambda _: self._stop.wake())
        while not self._loading.done():
            if self._stop.wait(LOADING_SECONDS):
                self._feed.close()
                return False
        self._loaded = self._loading.result()
        self._tables = KernelTables(self._loaded)
        if self._loaded.inherited:
            self._inherit()
        logs, traces = (bool(sinks.by_signal[signal]) for signal in ("logs", "traces"))
        self._record_rate = config.record_rate if logs or traces else 0
        # What no signal wants is not sampled by the kernel, so that the rate is left to what is wanted.
        self._record_ratio = config.record_ratio if logs else min(config.record_ratio, config.span_ratio)
        self._tables.set_settings(self._settings(VERDICT_AFTER_NS))
        self._netlink = Netlink()
        self._monitor = Monitor()
        self._hooks = Hooks(self._loaded.programs, self._netlink, self._loaded.pins, uplink_hook=config.hook)
        self._courses = Courses(self._topology)
        self._places = Places(self._loaded.places)
        self._conntrack: ConntrackSocket | None = None
        while self._follow_cluster():
            pass
        self._report_topology()
        self._reconcile_interfaces()
        self._require_a_hook()
        self._settle_pins()
        self._make_outlets(sinks)
        self._open_ring()
        self._keep_books(self._tables.snapshot())  # the first report is earlier than the first export
        # What only the start needed goes back to the system; what stays is never again looked through for garbage.
        gc.collect()
        gc.freeze()
        interfaces = ", ".join(self._hooks.interfaces) or "no interface yet"
        log.info(
            "counting on %s (%s), %d VIP ports; %s",
            interfaces, self._hooks.method, self._watched, self._how_loaded(),
        )  # fmt: skip
        return True

    def _inherit(self) -> None:
        """Go on with the counters of an agent before, and with its VIP ports until all sources have spoken."""
        names, last_id = self._tables.adopt()
        self._topology.adopt(names, last_id, time.time_ns())
        mark = self._loaded.notes.get(MARK)
        self._settled_before, self._unlisted = unpack_mark(mark) if mark else (0, False)
        self._settled = self._settled_before
        self._unconfirmed = True
        self._needs_before = self._tables.datagram_needs

    def _how_loaded(self) -> str:
        loaded = self._loaded
        since = datetime.fromtimestamp(loaded.state.created_ns / 1e9, UTC).isoformat(timespec="seconds")
        how = f"compiled in {loaded.compile_seconds:.2f} s" if loaded.compile_seconds else "nothing to compile"
        return f"{how}; counters since {since}" if loaded.inherited else how

    def _settle_pins(self) -> None:
        """Take off what was pinned before and is of no use; say once if nothing is."""
        pins = self._loaded.pins
        if self._folder and pins:
            gone = self._folder.remove_except(pins)
            if gone:
                log.info("took off %d older generations of programs", gone)
        elif self._folder:
            self._not_pinned = f"{self._folder.path} takes no pins"
        if self._not_pinned:
            log.warning(
                "nothing is pinned, so counters begin anew with each start and nothing counts in between: %s",
                self._not_pinned,
            )
        self._report_pins()

    def _report_pins(self) -> None:
        """Tell whether what is counted outlives the agent."""
        problem = self._not_pinned or self._hooks.not_pinned
        detail = problem or ("pinned" if self._loaded.pins else "off")
        self._health.report("pins", healthy=problem is None, vital=False, detail=detail)

    def _open_sources_and_sinks(self) -> Sinks:
        """Read the VIP file, begin to read the API server, make the sinks; all that is wrong is told together."""
        problems: list[Problem] = []
        if self._api:
            self._api.start()  # the first lists come while the child compiles
        if self._file:
            try:
                self._file.read()
            except ConfigError as error:
                problems += error.problems
            self._file.start()
        try:
            sinks = make_sinks(self._config, self._environ)
        except ConfigError as error:
            problems += error.problems
        if problems:
            raise ConfigError(problems)
        return sinks

    def _settings(self, verdict_after_ns: int) -> Settings:
        return Settings(
            verdict_after_ns=verdict_after_ns,
            reject_below=ids.rejection_threshold(self._record_ratio),
            record_interval_ns=10**9 // self._record_rate if self._record_rate else 0,
            record_burst_ns=10**9,
            own_calls=int(self._config.conntrack == "on"),
        )

    def _make_outlets(self, sinks: Sinks) -> None:
        config = self._config
        self._identity = self._identify()
        resource = make_resource(self._identity)
        since_ns = self._loaded.state.created_ns
        self._metrics_builder = MetricsBuilder(
            self._topology,
            config.node_name,
            time.time_ns(),
            since_ns,
            attributes=config.metric_attributes,
            series=config.metric_series,
            open_memory=lambda make: self._told_before(SUMMED, make=make),
        )
        self._metrics = make_metrics_outlets(sinks, config, resource, lambda: self._told_before(DELIVERED, make=True))
        sampling = {
            "logs": Sampling.make(self._record_ratio),
            "traces": Sampling.make(self._record_ratio, config.span_ratio),
        }
        self._records = make_record_outlets(sinks, resource, config.node_name, sampling, config.queue_bytes)
        self._own_log = [LinesOutlet(sinks.lines, resource)] if sinks.lines else []

    def _told_before(self, name: str, *, make: bool) -> Map | None:
        """Open what agents before this one noted of their exports, or go on without."""
        try:
            return open_told(self._loaded.pins, name, make=make)
        except OSError as error:
            log.warning("what was told before cannot be noted for the next agent: %s: %s", name, error)
            return None

    def _identify(self) -> Identity:
        config, node = self._config, self._topology.own_node
        return Identity(
            node_name=config.node_name,
            host_name=socket.gethostname(),
            node_uid=node.uid if node else None,
            zone=self._topology.zone,
            region=node.region if node else None,
            cluster_uid=self._feed.cluster_uid,
            pod_namespace=config.pod_namespace,
            pod_name=config.pod_name,
            pod_uid=config.pod_uid,
        )

    def _introduce(self) -> None:
        """Name in the resource what the API server tells only after the start, or tells anew."""
        identity = self._identify()
        if identity != self._identity:
            self._identity = identity
            resource = make_resource(identity)
            for outlet in self._outlets:
                outlet.introduce(resource)

    def run(self) -> None:
        """Work until told to stop, then send what is left within `SHUTDOWN_SECONDS`."""
        wait_seconds = 0.0
        rest_seconds = min(TICK_SECONDS, self._config.metric_export_interval_ms / 1e3)
        while not self._stop.wait(wait_seconds):
            more = self._tick(time.monotonic())
            if self._stop.woken:
                time.sleep(NEWS_SECONDS)
            wait_seconds = 0.0 if more else rest_seconds
        self._shut_down()

    def _tick(self, now: float) -> bool:
        """Do what is due; answers whether more waits than one turn takes."""
        more = bool(self._attempt("records", self._drain))
        if self._is_due("sweep", now, TICK_SECONDS):
            self._attempt("sweep", self._sweep)
            if self._loaded.pins:
                self._attempt("records", self._mark_settled)
        if self._stop.woken or self._unfinished or self._is_due("topology", now, TOPOLOGY_SECONDS):
            self._unfinished = bool(self._attempt("topology", self._follow_cluster))
            more |= self._unfinished
        if self._is_due("report", now, REPORT_SECONDS):
            self._attempt("report", self._report)
        needs = self._datagram_needs()
        if (
            self._monitor.changed.is_set()
            or needs != self._needs
            or (self._routes_old and now >= self._routes_again)
            or self._hooks.waiting
            or self._is_due("interfaces", now, INTERFACES_SECONDS)
        ):
            self._monitor.changed.clear()
            self._needs = needs
            self._attempt("interfaces", self._reconcile_interfaces)
            more |= self._hooks.waiting > 0
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
            if part in {"records", "sweep", "counters", "report"}:  # the others report on themselves
                self._health.report(part, healthy=True, vital=False)
        return done

    def _is_due(self, task: str, now: float, every: float) -> bool:
        if now < self._due.setdefault(task, now + every):
            return False
        self._due[task] = now + every
        return True

    # packets ─ ring ─ decode ─ courses ─ encode ─ logs and spans

    def _open_ring(self) -> None:
        """Begin to read the ring; first to its end the one before it, if it gave way to one of another size."""
        loaded = self._loaded
        if loaded.previous_records_fd is None:
            self._ring = Ring(loaded.records_fd, loaded.state.earlier_records)
            return
        while self._hooks.waiting:
            self._reconcile_interfaces()
        # Nothing is put there any more: every link runs the new programs.
        previous = self._ring = Ring(loaded.previous_records_fd, loaded.state.earlier_records)
        while previous.pending_records:
            self._drain()
        self._ring = Ring(loaded.records_fd, previous.seen)
        self._ring.follow(previous)
        retire_ring(loaded, previous.seen)
        previous.close()

    def _drain(self) -> bool:
        offset_ns = _clock_offset_ns()
        records = self._ring.drain(DRAIN_RECORDS)
        if not records:
            return False  # and no shipper is woken
        courses = self._courses.of(records)
        unresolved = courses.count(None)
        self._unresolved += unresolved
        self._resolved += len(records) - unresolved
        observed_ns = time.time_ns()  # after the last record was taken, and so after it was written
        for outlet in self._records:
            outlet.offer(records, courses, offset_ns, observed_ns)
        return len(records) == DRAIN_RECORDS

    def _mark_settled(self) -> None:
        """Write down how many records need nobody's care any more, for the next agent, should this one be killed."""
        stages = [stage for outlet in self._records for stage in outlet.stages()]
        ways: dict[tuple[str, str], int] = {}
        for stage in stages:
            way = stage.signal, stage.exporter
            ways[way] = ways.get(way, 0) + stage.in_flight
        self._note(self._ring.taken_before + self._ring.taken - max(ways.values(), default=0))

    def _note(self, settled: int) -> None:
        """Leave to the next agent how far this one has come."""
        self._settled = settled
        self._loaded.notes.put(MARK, pack_mark(Mark(settled, self._conntrack is not None)))

    def _sweep(self) -> None:
        run_program(self._loaded.programs["lbh_sweep"], repeat=-(-self._loaded.sizes.table_buckets // SWEEP_TICKS))

    def _sweep_all(self) -> None:
        self._tables.set_settings(self._settings(0))
        run_program(self._loaded.programs["lbh_sweep"], repeat=self._loaded.sizes.table_buckets)

    # packets ─ counters ─ snapshot ─ points ─ metrics

    def _export_metrics(self) -> None:
        now_ns = time.time_ns()
        self._forget_rows(now_ns)
        snapshot = self._tables.snapshot()
        self._keep_books(snapshot)
        if not self._metrics:
            return
        report = self._self_report(snapshot.events)
        metrics: Iterable[Metric] = self._metrics_builder.build(snapshot.vips, snapshot.hops, report)
        if len(self._metrics) > 1:
            metrics = [Metric(each.instrument, tuple(each.points)) for each in metrics]
        for outlet in self._metrics:
            outlet.offer(metrics, now_ns)
        if (usage := self._metrics_builder.usage).summed and not self._told_summed:
            self._told_summed = True
            log.warning(
                "there is room for %d series of VIP ports (%s), and %d more: those are summed into one of each metric, "
                "with otel.metric.overflow; %s=-destination.k8s.node.name makes fewer",
                usage.limit, METRIC_SERIES.name, usage.summed, METRIC_ATTRIBUTES.name,
            )  # fmt: skip

    def _check_sums(self) -> None:
        """Hold, when every verdict is given, that all adds up: each VIP port's connections, and the ledger."""
        snapshot = self._tables.snapshot()
        self._keep_books(snapshot)
        pending = self._metrics_builder.pending(snapshot.vips, snapshot.hops)
        wrong = {vip_id: count for vip_id, count in pending.items() if count}
        if wrong:
            vip_id, count = next(iter(wrong.items()))
            row = self._topology.vips.by_id[vip_id]
            log.error(
                "connections do not add up on %d VIP ports; %d of %s/%s port %d came in and have no outcome",
                len(wrong), count, row.namespace, row.service, row.port,
            )  # fmt: skip
        self._check_ledger()

    def _check_ledger(self) -> Ledger:
        ledger = self._ledger()
        # What is pinned goes on counting while it is read.
        for problem in ledger.defects() if self._loaded.pins else ledger.problems():
            log.error("the ledger does not add up: %s", problem)
        return ledger

    def _keep_books(self, snapshot: Snapshot) -> None:
        rows = count_rows(snapshot.vips.values(), snapshot.hops.values())
        self._kernel_stage = kernel_stage(rows.plus(self._tables.forgotten), snapshot.events)

    def _ledger(self) -> Ledger:
        """Account for every record; the kernel's stage is as of the latest snapshot."""
        ring = self._ring
        ring_dropped = {
            "wrong_size": ring.wrong_size,
            "shutdown": self._abandoned,
            "unsettled": ring.taken_before - self._settled_before,
        }
        in_ring = ring.pending_records - self._abandoned
        stages = [
            self._kernel_stage,
            Stage(RING, "", "", ring.seen, ring.taken, ring_dropped, in_ring, earlier=self._settled_before),
            Stage("decode", "", "", ring.taken, self._resolved, {"unresolved": self._unresolved}, 0),
        ]
        for outlet in self._outlets:
            stages += outlet.stages()
        return Ledger(tuple(stages))

    def _forget_rows(self, now_ns: int) -> None:
        offset_ns = _clock_offset_ns()
        stepped, self._offset_ns = abs(offset_ns - self._offset_ns) > CLOCK_STEP_NS, offset_ns
        if stepped:
            return  # nothing is as long out of use as it looks
        if self._unconfirmed:
            return  # what no source has named yet may be in use
        retired_before_ns = now_ns - KEEP_RETIRED_NS
        for outlet in self._metrics:
            # What nobody has received yet is not forgotten, however long the Collector is away.
            retired_before_ns = min(retired_before_ns, outlet.shipper.exported_ns - SETTLED_NS)
        self._tables.forget(self._topology.forget_rows(retired_before_ns, now_ns), self._topology)

    def _self_report(self, events: tuple[int, ...]) -> SelfReport:
        return SelfReport(
            events=events,
            stages=self._ledger().stages,
            vip_ports=self._watched,
            topology_age_s=self._topology.age_ns(time.time_ns()) / 1e9,
            map_usage=self._tables.usage() | {"places": (len(self._places), self._loaded.sizes.places)},
            parts_healthy={name: part.healthy for name, part in self._health.parts().items()},
            process=process_usage(),
            cluster_nodes=self._topology.cluster_nodes,
        )

    # API server and VIP file ─ feed ─ topology ─ tables in the kernel

    def _follow_cluster(self) -> bool:
        now_ns = time.time_ns()
        more = self._feed.update(self._topology, now_ns)
        self._topology.forget_endpoints(now_ns - LINGER_NS)
        if touched := self._topology.take_touched():
            self._courses.forget(touched)
        if self._unconfirmed and self._feed.complete and not more:
            self._unconfirmed = False
            self._tables.drop_unknown(self._topology.tables)
        if self._topology.tables.pending and time.monotonic() >= self._write_again:
            try:
                self._tables.apply(self._topology)
                self._unwritten = None
            except OSError as error:
                self._write_again = time.monotonic() + REPORT_SECONDS
                self._unwritten = f"the kernel's tables do not hold the topology, the next try follows: {error}"
        return more

    @property
    def _watched(self) -> int:
        """How many VIP ports are watched; before all sources have spoken, with those of an agent before this one."""
        return len(self._tables.vip_ports) if self._unconfirmed else self._topology.watched

    def _report_topology(self) -> None:
        """Tell how sources and tables are. Without the sources the tables before serve on."""
        now_ns = time.time_ns()
        for name, source in self._feed.states(self._topology, now_ns).items():
            if source.error != self._source_errors.get(name):
                self._source_errors[name] = source.error
                if source.error:
                    log.warning("%s: what was known before stays: %s", name, source.error)
                else:
                    log.info("%s: well", name)
            self._health.report(name, healthy=source.error is None, vital=False, detail=source.detail)
        skipped = [*self._topology.skipped, *self._feed.skipped]
        size = self._watched, len(skipped)
        if size != self._size:
            self._size = size
            log.info("topology: %d VIP ports, %d skipped", *size)
        if "topology" in self._failed:
            return  # as the loop has told
        known = self._feed.begun or self._watched
        trouble = self._unwritten if known else "no source has told its VIP ports yet"
        if trouble:
            log.error("topology: %s", trouble)
            self._health.report("topology", healthy=False, vital=True, detail=trouble)
            return
        detail = {
            "vip_ports": self._watched,
            "skipped": [str(each) for each in skipped[:SKIPPED_SHOWN]],
            "skipped_more": max(0, len(skipped) - SKIPPED_SHOWN),
        }
        self._health.report("topology", healthy=True, vital=True, detail=detail)

    # interfaces

    def _reconcile_interfaces(self) -> None:
        config = self._config
        links = self._netlink.links()
        routes = self._read_routes()
        if config.uplinks is None:
            uplinks = find_uplinks(links, *gateway_links(routes))
        else:
            uplinks = frozenset(link.index for link in links if config.uplinks.matches(link.name))
        names = {link.index: link.name for link in links}
        self._courses.name_interfaces(names)
        too_many = self._tables.set_uplinks(uplinks)
        heard, unserved = self._datagram_needs()
        self._reconcile_conntrack(heard=heard, places=find_places(routes, uplinks, self._loaded.sizes.places))
        watched = [link for link in links if config.interfaces.matches(link.name)]
        self._hooks.reconcile(watched, uplinks=uplinks, datagrams=unserved)
        problems = self._hooks.problems | {
            names[index]: "one uplink too many: what comes in here counts as internal" for index in too_many
        }
        self._health.report(
            "interfaces",
            healthy=bool(self._hooks.interfaces) and not problems and not self._hooks.waiting,
            vital=not self._hooks.interfaces,
            detail={
                "method": self._hooks.method,
                "hooked": self._hooks.interfaces,
                "ingress": self._hooks.ingress,
                "uplinks": sorted(names[index] for index in uplinks),
                "problems": problems,
                "waiting": self._hooks.waiting,
            },
        )

    def _read_routes(self) -> list[Route]:
        """Read the routes, or take those of a moment ago: where each node is a route, that takes seconds."""
        began = time.monotonic()
        self._routes_old = began < self._routes_again
        if not self._routes_old:
            self._routes = self._netlink.routes()
            ended = time.monotonic()
            self._routes_again = ended + (ended - began) * ROUTES_REST
        return self._routes

    def _datagram_needs(self) -> tuple[bool, bool]:
        """Whether conntrack is to be heard, and datagrams to be watched on the interfaces too."""
        datagrams, unserved = self._topology.datagram_needs
        if self._unconfirmed:
            datagrams, unserved = datagrams + self._needs_before[0], unserved + self._needs_before[1]
        wish = self._config.conntrack
        heard = wish == "on" or (wish == "auto" and datagrams > 0)
        return heard, heard and unserved > 0

    def _reconcile_conntrack(self, places: tuple[dict[Prefix, Place], int], *, heard: bool) -> None:
        """Hear of UDP and SCTP from conntrack while that is needed, and only then: it costs the whole node."""
        if not heard:
            if self._conntrack:
                self._conntrack.close()
                self._conntrack = None
            unheard = self._topology.datagram_needs[0]
            detail = f"off: {unheard} UDP and SCTP VIP ports are not counted" if unheard else "not needed"
            self._health.report("conntrack", healthy=True, vital=False, detail=detail)
            return
        known, left_out = places
        try:
            self._places.set(known)
            if not self._conntrack:
                self._conntrack = ConntrackSocket(self._loaded.programs["lbh_conntrack"])
                self._note(self._settled)
            if self._unlisted:
                self._settle_conntrack()
            problem = events_problem()
        except (KernelError, OSError) as error:
            problem = str(error)
        if left_out and not problem:
            problem = f"{left_out} prefixes of routes found no room: what comes from there counts as external"
        self._health.report("conntrack", healthy=problem is None, vital=False, detail=problem or "heard")

    def _settle_conntrack(self) -> None:
        """Count what began while no agent listened, as far as conntrack still has it."""
        told = sum(1 for _ in self._loaded.told_flows.keys())  # noqa: SIM118 - no dict
        if told > TOLD_FLOWS_SURE * self._loaded.sizes.told_flows:
            log.warning("too many flows are open to tell which began while no agent listened; those are not counted")
            self._unlisted = False
            return
        fd = self._loaded.programs["lbh_conntrack"]
        handed = 0
        own_calls = self._config.conntrack == "on"
        for message in list_entries(self._tables.vip_ports if own_calls else self._tables.datagram_ports):
            run_program(fd, message)
            handed += 1
        self._unlisted = False
        log.info("conntrack has %d connections of UDP or SCTP; those that nobody had heard of are counted now", handed)

    def _require_a_hook(self) -> None:
        if self._hooks.problems and not self._hooks.interfaces:
            name, reason = next(iter(self._hooks.problems.items()))
            raise KernelError(f"no interface could be hooked; {name}: {reason}; CAP_NET_ADMIN is needed for that")

    def _report(self) -> None:
        self._report_topology()
        self._report_pins()
        self._report_exports()
        self._introduce()

    def _report_exports(self) -> None:
        self._export_own_log()
        states: dict[str, list[dict[str, Any]]] = {}
        for outlet in self._outlets:
            states.setdefault(outlet.shipper.signal, []).append(outlet.shipper.state())
        for signal, each in states.items():
            healthy = all(state["error"] is None for state in each)
            self._health.report(signal, healthy=healthy, vital=False, detail=each)
        ledger = self._ledger()
        defects = ledger.defects()
        if nowhere := self._tables.event(Event.NO_ROW):
            defects.append(f"{nowhere:,} connections found no row to be counted in")
        self._health.report("ledger", healthy=not defects, vital=False, detail=defects or ledger.as_dict())

    def _export_own_log(self) -> None:
        lines, lost = self._lines.take(), self._lines.lost
        for outlet in self._own_log:
            outlet.offer(lines, lost)

    @property
    def _outlets(self) -> list[Outlet]:
        return [*self._records, *self._metrics, *self._own_log]

    def _shut_down(self) -> None:
        deadline = time.monotonic() + SHUTDOWN_SECONDS
        self._feed.close()
        self._hooks.close()
        if self._conntrack:
            self._conntrack.close()
        pinned = self._loaded.pins is not None
        if not pinned:
            # Nobody will see an answer any more: what is open gets its verdict now, or it would vanish uncounted.
            self._attempt("sweep", self._sweep_all)
        while self._attempt("records", self._drain) and time.monotonic() < deadline - METRICS_RESERVE_SECONDS:
            pass
        if not pinned:
            self._abandoned = self._ring.pending_records
        self._close(self._records, deadline - METRICS_RESERVE_SECONDS)
        if not pinned:
            self._attempt("counters", self._check_sums)
        self._export_own_log()
        # Last, so that they tell what became of the last records.
        self._attempt("counters", self._export_metrics)
        self._close([*self._metrics, *self._own_log], deadline)
        self._attempt("records", self._mark_settled)
        for account in self._check_ledger().accounts():
            log.info("%s", account)
        self._monitor.close()
        self._netlink.close()
        self._ring.close()
        if self._local_api:
            self._local_api.close()

    def _close(self, outlets: Sequence[Outlet], deadline: float) -> None:
        """Let shippers send what they have, all at once, until the deadline."""
        for outlet in outlets:
            outlet.shipper.stop()
        for outlet in outlets:
            outlet.shipper.close(deadline)
