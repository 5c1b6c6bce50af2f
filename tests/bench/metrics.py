"""What one export of metrics costs, from the kernel's tables to OTLP bytes, and what the SDK's way costs.

Real tables, with rows written as the programs would have counted; no packet passes.
"""

from __future__ import annotations

import statistics
import struct
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

from opentelemetry.exporter.otlp.proto.common.metrics_encoder import encode_metrics  # noqa: TID251 - compared with
from opentelemetry.metrics import Observation  # noqa: TID251 - as above
from opentelemetry.sdk.metrics import MeterProvider  # noqa: TID251 - as above
from opentelemetry.sdk.metrics.export import InMemoryMetricReader  # noqa: TID251 - as above

from otel_lb_hop import __version__, semconv
from otel_lb_hop.core.layout import HISTOGRAM_WORDS, HOP_STATS_WORDS, VIP_STATS_WORDS, Event
from otel_lb_hop.core.topology import Topology
from otel_lb_hop.export import otlp_metrics
from otel_lb_hop.export.metrics import MetricsBuilder, SelfReport, Usage
from otel_lb_hop.export.wire import Envelope
from otel_lb_hop.kernel import loader
from otel_lb_hop.kernel.bpf import possible_cpus
from otel_lb_hop.kernel.tables import KernelTables
from otel_lb_hop.model import Backend, Cluster, Transport, VipPort, pack_address
from tests.bench.measure import Row
from tests.kernel.rig import close
from tests.lab.waiting import wait_for

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from opentelemetry.metrics import CallbackOptions  # noqa: TID251 - as above

    from otel_lb_hop.export.delivery import Chunk

SERIES = 10_000
SERIES_OF_VIP_PORT = 18
"""In use, with endpoints on this node and on two others: connections 3 forwarded and 2 not, endpoints 3, failures 4,
forward and handshake duration by hop class 2 each, SYNs sent again, pending."""
SERVICES = 5_000
SDK_SERIES_OF_INSTRUMENT = 1_000
"""The SDK folds more than 2,000 into one."""
TIMES = 9
FORWARD_WORDS = (7, *range(9, 17))
"""Of a hop row: the sum, and the buckets from 1 to 500 us."""
HANDSHAKE_WORDS = (7 + HISTOGRAM_WORDS, *range(14 + HISTOGRAM_WORDS, 24 + HISTOGRAM_WORDS))
"""The sum, and the buckets from 100 us to 250 ms."""
NODES = ("node1", "node2", "node3")
REPORT = SelfReport((0,) * len(Event), (), 0, 0.0, {}, {}, Usage(0.0, 0.0, 0))


def metrics_costs() -> Iterator[Row]:
    """Measure an export of 10,000 series, the SDK's of as many, and one of a large cluster without traffic."""
    vip_ports = -(-SERIES // SERIES_OF_VIP_PORT)
    with _exporter(vip_ports) as (tables, export):
        _count(tables)
        ours = _median(export)  # before the SDK has filled the memory that the garbage collector walks
        sdk = _median(_sdk_export())
        points = sum(chunk.items for chunk in export())
        assert SERIES <= points < SERIES + 100, f"{points} data points"
        yield Row(f"export of {SERIES:,} series, snapshot to bytes: CPU", ours * 1e3, "ms", "<= 50", ours <= 0.05)
        yield Row("  the SDK's observable counters / ours", sdk / ours, "", ">= 5", sdk >= 5 * ours)
    with _exporter(SERVICES) as (_, export):
        idle = _median(export)
        yield Row(f"export of {SERVICES:,} Services without traffic: CPU", idle * 1e3, "ms")
        sizes = [chunk.size_bytes for chunk in export()]
        yield Row("  largest chunk", max(sizes) / 2**20, "MiB", "<= 1", max(sizes) <= 2**20)


def _median(work: Callable[[], object]) -> float:
    """Take the median CPU seconds; the first time makes what is made once per row."""
    seconds = []
    for _ in range(TIMES + 1):
        before = time.thread_time()
        work()
        seconds.append(time.thread_time() - before)
    return statistics.median(seconds[1:])


@contextmanager
def _exporter(vip_ports: int) -> Iterator[tuple[KernelTables, Callable[[], list[Chunk]]]]:
    """Make tables with so many VIP ports of 3 endpoints each, and what exports them."""
    loaded = loader.load()
    try:
        tables, topology = KernelTables(loaded), Topology(NODES[0])
        topology.replace(Cluster(tuple(map(_vip_port, range(vip_ports)))), 1)
        wait_for("all rows in the kernel", lambda: _written(tables, topology), 60)
        builder = MetricsBuilder(topology, NODES[0], 1, 1)
        resource = {"service.name": semconv.SERVICE_NAME}
        envelope = Envelope(resource, semconv.SCOPE_NAME, __version__, semconv.SCHEMA_URL)

        def export() -> list[Chunk]:
            snapshot = tables.snapshot()
            metrics = builder.build(snapshot.vips, snapshot.hops, REPORT)
            return otlp_metrics.encode(metrics, envelope, time.time_ns())

        yield tables, export
    finally:
        close(loaded)


def _written(tables: KernelTables, topology: Topology) -> bool:
    try:
        tables.apply(topology)
    except OSError:
        return False  # the kernel fills its reserve of memory for rows a moment later
    return True


def _vip_port(number: int) -> VipPort:
    high, low = divmod(number, 250)
    backends = tuple(
        Backend(pack_address(f"10.{100 + place}.{high}.{low + 1}"), 8080, node, f"zone-{place}")
        for place, node in enumerate(NODES)
    )
    address = pack_address(f"10.0.{high}.{low + 1}")
    return VipPort(address, 80, Transport.TCP, "default", f"service-{number}", backends=backends)


def _count(tables: KernelTables) -> None:
    """Let every row of a known backend have counted on every CPU: connections from outside, and their times."""
    loaded = tables._loaded
    vip_ids = set(loaded.vip_stats.keys())
    for table, words, counted in (
        (loaded.vip_stats, VIP_STATS_WORDS, (1, VIP_STATS_WORDS - 1)),
        (loaded.hop_stats, HOP_STATS_WORDS, (1, 2, *FORWARD_WORDS, *HANDSHAKE_WORDS)),
    ):
        for number, key in enumerate(list(table.keys())):
            if table is loaded.vip_stats or key not in vip_ids:
                values = [10_000 + number + word if word in counted else 0 for word in range(words)]
                table.put(key, struct.pack(f"={words}Q", *values) * possible_cpus())


def _sdk_export() -> Callable[[], bytes]:
    """Make the SDK's way: observable counters of 8 attributes each, read and encoded."""
    reader = InMemoryMetricReader()
    meter = MeterProvider([reader]).get_meter("bench")
    for instrument in range(SERIES // SDK_SERIES_OF_INSTRUMENT):
        labels: list[dict[str, str | int]] = [
            {
                "k8s.namespace.name": "default",
                "k8s.service.name": f"service-{number}",
                "server.address": f"10.0.{instrument}.{number}",
                "server.port": 80,
                "network.transport": "tcp",
                "network.type": "ipv4",
                "lb_hop.external_traffic_policy": "Cluster",
                "k8s.node.name": NODES[0],
            }
            for number in range(SDK_SERIES_OF_INSTRUMENT)
        ]

        def observe(_: CallbackOptions, labels: list[dict[str, str | int]] = labels) -> Iterable[Observation]:
            return [Observation(time.monotonic_ns(), each) for each in labels]

        meter.create_observable_counter(f"connections.{instrument}", [observe])

    def export() -> bytes:
        data = reader.get_metrics_data()
        assert data is not None
        return encode_metrics(data).SerializeToString()

    return export
