"""What records cost in user space: from the ring to an OTLP endpoint on another core, by our way and by the SDK's."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from typing import TYPE_CHECKING, NamedTuple

from opentelemetry.sdk.resources import Resource  # noqa: TID251 - as the agent's

from otel_lb_hop.core.hops import Courses
from otel_lb_hop.core.layout import Settings, walk_ring
from otel_lb_hop.export.record_content import Sampling
from otel_lb_hop.export.records import LogEncoder
from otel_lb_hop.export.sdk import make_sdk_sink
from otel_lb_hop.export.sdk_records import SdkEncoder, SdkRecords
from otel_lb_hop.export.shipper import Shipper
from otel_lb_hop.export.transport import make_sink
from otel_lb_hop.kernel import loader
from tests.bench.measure import Row, cpu_seconds, user_seconds
from tests.bench.traffic import AGENT_CPU, TRAFFIC_CPU
from tests.kernel.burst import Burst
from tests.lab.agent import ROOT, Agent

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from otel_lb_hop.core.hops import Course
    from otel_lb_hop.core.layout import RawRecord
    from otel_lb_hop.export.delivery import Chunk
    from tests.bench.traffic import Path3
    from tests.lab.host import Host

ROUND = 16_384
"""Connections that are put in the ring at once: less than it holds."""
OURS_ROUNDS, SDK_ROUNDS = 12, 2
RATE = 10_000
SECONDS = 10.0
"""Of traffic while an agent is watched: as long as the interval of its exports."""
PATIENCE = 60.0
NOTHING = {"OTEL_METRICS_EXPORTER": "none", "OTEL_LOGS_EXPORTER": "none", "OTEL_TRACES_EXPORTER": "none"}
EVERY_RECORD = {"OTEL_LB_HOP_RECORD_RATE": "1000000", "OTEL_LB_HOP_QUEUE_BYTES": str(1 << 28)}


@contextlib.contextmanager
def sink(host: Host | None = None) -> Iterator[dict[str, str]]:
    """Serve OTLP on the traffic's core; gives the settings that lead there."""
    address = host.address4 if host else "127.0.0.1"
    argv = ["env", "-C", str(ROOT), "taskset", "-c", TRAFFIC_CPU, sys.executable, "-m", "tests.bench.sink", address]
    start = host.popen if host else _popen
    with start(argv, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        try:
            yield {"OTEL_EXPORTER_OTLP_ENDPOINT": f"http://{address}:{int(process.stdout.readline())}"}
        finally:
            process.kill()


def _popen(argv: Sequence[str], *, stdout: int) -> subprocess.Popen[str]:
    return subprocess.Popen(argv, stdout=stdout, text=True)


class Encoder(NamedTuple):
    """One way from records to chunks."""

    encode: Callable[[Sequence[RawRecord], Sequence[Course | None], int, int], list[Chunk]]
    shipper: Shipper


def pipeline(kernel: Burst, encoder: Encoder, rounds: int) -> float:
    """Take rounds of records the whole way; answers CPU seconds of this process for one record, filling not counted."""
    courses = Courses(kernel.topology)
    used = 0.0
    for turn in range(rounds + 1):
        kernel.answer(ROUND)
        before = time.process_time()
        while records := kernel.ring.drain(2_048):
            encoder.shipper.offer(encoder.encode(records, courses.of(records), 0, time.time_ns()))
        if not encoder.shipper.flush(time.monotonic() + PATIENCE):
            raise AssertionError(f"not everything was exported: {encoder.shipper.state()}")
        if turn:  # the first warms caches and connects
            used += time.process_time() - before
    return used / rounds / ROUND


def pipeline_costs() -> Iterator[Row]:
    """Compare both ways in this process, the endpoint on the other core; decoding alone besides."""
    kernel = Burst(loader.load(loader.Sizes(ring_pages=1_024)), Settings(5 * 10**9, 0, 1, 10**9))
    resource, sampling = Resource({"service.name": "bench"}), Sampling.make(1.0)
    with sink() as settings, _environment(settings) as environ:
        ours = Encoder(
            LogEncoder(resource, "node1", sampling).encode, Shipper("logs", make_sink("logs", "grpc", environ), 1 << 28)
        )
        sdk = Encoder(
            SdkEncoder("logs", SdkRecords(resource, "node1", sampling)).encode,
            Shipper("logs", make_sdk_sink("logs", "otlp_proto_grpc"), 1 << 28),
        )
        sdk_seconds, our_seconds = pipeline(kernel, sdk, SDK_ROUNDS), pipeline(kernel, ours, OURS_ROUNDS)
        for each in (ours, sdk):
            each.shipper.close(time.monotonic() + 1)
    rate, ratio = 1 / our_seconds, sdk_seconds / our_seconds
    yield Row("records, ring to OTLP/gRPC, logs", rate, "/s a core", ">= 120000", rate >= 120_000)
    yield Row("  the SDK's way", 1 / sdk_seconds, "/s a core")
    yield Row("  ours / the SDK's", ratio, "", ">= 5", ratio >= 5)
    kernel.answer(ROUND)
    data, produced = kernel.ring._data, kernel.ring._position + kernel.ring.pending_records * 128
    seconds = min(_decoding(data, kernel.ring._position, produced) for _ in range(20))
    yield Row("  decode alone", ROUND / seconds, "/s a core", ">= 500000", ROUND / seconds >= 500_000)
    kernel.ring.close()


def _decoding(data: memoryview, position: int, produced: int) -> float:
    before = time.process_time()
    taken = 0
    while taken < ROUND:
        part = walk_ring(data, position, produced, 2_048)
        position = part.position
        taken += len(part.records)
    return time.process_time() - before


@contextlib.contextmanager
def _environment(settings: Mapping[str, str]) -> Iterator[Mapping[str, str]]:
    """Set variables for the SDK's exporters, which read nothing else."""
    os.environ.update(settings)
    try:
        yield settings
    finally:
        for name in settings:
            del os.environ[name]


def _agent_cpu(path: Path3, settings: Mapping[str, str], rate: int) -> tuple[float, float]:
    """Send at a rate; answers user CPU and all CPU of node1's agent in percent of a core."""
    node = path.lab.nodes[0]
    with Agent(node, path.lab.vips_path, settings, prefix=["taskset", "-c", AGENT_CPU]) as agent:
        path.call(1, rate)
        pid = agent.process.pid
        user, every = user_seconds(pid), cpu_seconds(pid)
        called = path.call(SECONDS, rate)
        user, every = user_seconds(pid) - user, cpu_seconds(pid) - every
        scale = rate / called.rate  # where the generator could not keep up
        return user / called.seconds * scale * 100, every / called.seconds * scale * 100


def agent_costs(path: Path3) -> Iterator[Row]:
    """See what a whole agent uses under real traffic: a log record for each connection, and metrics only."""
    with sink(path.lab.mgmt) as settings:
        logs = NOTHING | settings | EVERY_RECORD
        user, every = _agent_cpu(path, logs | {"OTEL_LOGS_EXPORTER": "otlp"}, RATE)
        sdk_user, _ = _agent_cpu(path, logs | {"OTEL_LOGS_EXPORTER": "otlp_proto_grpc"}, RATE)
        yield Row("user CPU at 10,000 connections/s, a log each", user, "% of a core", "<= 8", user <= 8)
        yield Row("  with the system's part", every, "% of a core")
        yield Row("  / the SDK's way", user / sdk_user, "", "<= 0.2", user <= sdk_user * 0.2)
        metrics = NOTHING | settings | {"OTEL_METRICS_EXPORTER": "otlp", "OTEL_METRIC_EXPORT_INTERVAL": "10000"}
        slow, _ = _agent_cpu(path, metrics, RATE // 10)
        fast, _ = _agent_cpu(path, metrics, RATE)
        yield Row("user CPU, metrics only, at 1,000 connections/s", slow, "% of a core", "<= 1", slow <= 1)
        yield Row("  at 10,000 connections/s", fast, "% of a core", "<= 1", fast <= 1)


def record_costs(path: Path3) -> Iterator[Row]:
    """Everything about records."""
    yield from pipeline_costs()
    yield from agent_costs(path)
