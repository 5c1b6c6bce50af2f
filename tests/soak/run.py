"""One soak, from an empty lab to what is known of it."""

from __future__ import annotations

import contextlib
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from tests.bench.measure import rss_mib
from tests.lab import Lab
from tests.lab.bpffs import bpffs
from tests.lab.generator import Generator, Traffic
from tests.lab.programs import descriptors
from tests.lab.waiting import TookTooLongError, wait_for
from tests.soak.churn import SERVED, UDP_SERVED, Churn
from tests.soak.seats import Seat
from tests.soak.sink import Sink
from tests.soak.verdict import (
    ALL_TABLES,
    KEEP_RETIRED_SECONDS,
    QUICK_TABLES,
    SLOPE_FROM_SECONDS,
    Course,
    Node,
    Quiet,
    progress,
)
from tests.soak.watch import Watch, holding

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from otel_lb_hop.model import VipPort

RATE = 100
FAST_PORT = 8090
WEB_VIPS, FAST_VIP = ("10.70.0.1", "fd00:70::1"), "10.70.0.2"
SIGNALS = ("logs", "traces")
SETTLE_SECONDS = 60.0
ROWS_SECONDS = KEEP_RETIRED_SECONDS + 120
"""Until the rows of what went last are forgotten: endpoints linger, then their rows are kept."""
QUIET_SECONDS = 2.0
REPORT_SECONDS = 60.0


class Soak:
    """Two nodes, an agent on each, a sink; the agent of the first node is never killed, it sends by gRPC."""

    def __init__(self, lab: Lab, seats: list[Seat], sink: Sink, generator: Generator, seed: str) -> None:
        self._lab = lab
        self._seats = seats
        self._sink = sink
        self._generator = generator
        self._steady = steady_services(lab)
        self._tell_again = time.monotonic() + REPORT_SECONDS
        self._churn = Churn(lab, seats, sink, self._steady, seed)

    def run(self, seconds: float, tell: Callable[[str], None]) -> Course:
        """Warm up, be quiet, churn, be quiet, end."""
        self._warm_up()
        before = self._quiet()
        with Watch(self._seats) as watch:
            began = time.monotonic()
            with Traffic(self._lab, self._generator, FAST_VIP, RATE) as traffic:
                tell("the churn begins")
                self._churn.run(seconds, lambda: self._tell_progress(watch, tell))
                self._churn.end()
                self._churn.made["fast"] += traffic.end()
            lasted = time.monotonic() - began
            tell(f"the churn of {lasted:.0f} s is over")
        self._wait_for_all()
        whole = lasted >= SLOPE_FROM_SECONDS
        after = self._settled(before, ROWS_SECONDS if whole else SETTLE_SECONDS, rows=whole)
        for seat in self._seats:
            seat.terminate()
        endings = {seat.node.name: seat.stop() for seat in self._seats}
        nodes = [
            Node(
                name := seat.node.name,
                number == 0,
                watch.samples[name],
                before[name],
                after[name],
                seat.sittings,
                seat.complaints(),
                endings[name],
                {signal: seat.exported(signal) for signal in SIGNALS},
            )
            for number, seat in enumerate(self._seats)
        ]
        churn = self._churn
        return Course(
            lasted,
            churn.events,
            churn.made,
            churn.vip_ports_made,
            frozenset(each.service for each in self._steady),
            nodes,
            self._sink.told(),
        )

    def _tell_progress(self, watch: Watch, tell: Callable[[str], None]) -> None:
        """Tell, once in a while, how it goes."""
        now = time.monotonic()
        if now >= self._tell_again:
            self._tell_again = now + REPORT_SECONDS
            lines = (progress(name, samples) for name, samples in watch.samples.items())
            tell("; ".join(filter(None, lines)) + f"; {self._churn.events['Services come']} Services came")

    def _warm_up(self) -> None:
        """Let agents begin, and do once what is done lazily: connect to the sink for each signal, hear conntrack."""
        self._churn.apply()
        for seat in self._seats:
            seat.begin()
        for seat in self._seats:
            seat.wait()
        wait_for("the agents' own metrics", self._know_tables, SETTLE_SECONDS)
        self._tables = self._sink.told().usage
        self._churn.services()
        self._churn.end()
        for vip in WEB_VIPS:
            results = self._lab.connect(vip, 80, 20)
            assert all(result.ok for result in results)
            self._churn.made["web"] += len(results)
        wait_for("logs and spans of both nodes", self._all_sent, SETTLE_SECONDS)

    def _know_tables(self) -> bool:
        usage = self._sink.told().usage
        return all(usage.get(seat.node.name, {}).get("vip_ports") == len(self._steady) for seat in self._seats)

    def _all_sent(self) -> bool:
        told = self._sink.told()
        return all(each.get(seat.node.name) for each in (told.logs, told.spans) for seat in self._seats)

    def _wait_for_all(self) -> None:
        """Wait until all connections are told; if that does not come, the verdict says what is missing."""
        with contextlib.suppress(TookTooLongError):
            wait_for("all connections", lambda: self._sink.told().connections == dict(self._churn.made), SETTLE_SECONDS)

    def _quiet(self) -> dict[str, Quiet]:
        """Wait until nothing of a node changes for some seconds, and tell what there is.

        In the tables are by now also rows of what came and went while it all warmed up: those of the steady Services
        are told.
        """
        same_since, last = time.monotonic(), self._look()
        while time.monotonic() < same_since + QUIET_SECONDS:
            time.sleep(0.5)
            now = self._look()
            if _shape(now) != _shape(last):
                same_since = time.monotonic()
            last = now
        return {name: quiet._replace(usage=self._tables[name]) for name, quiet in last.items()}

    def _settled(self, before: Mapping[str, Quiet], seconds: float, *, rows: bool) -> dict[str, Quiet]:
        """Wait until all is as it was; if that does not come, the verdict says what is not."""
        with contextlib.suppress(TookTooLongError):
            wait_for("what was before", lambda: _shape(self._look(), rows=rows) == _shape(before, rows=rows), seconds)
        return self._look()

    def _look(self) -> dict[str, Quiet]:
        usage = self._sink.told().usage
        looks = {}
        for seat in self._seats:
            assert seat.ready is not None
            pid = seat.ready.process.pid
            looks[seat.node.name] = Quiet(
                holding(pid), descriptors(pid), seat.pinned, rss_mib(pid), usage.get(seat.node.name, {})
            )
        return looks


def _shape(looks: Mapping[str, Quiet], *, rows: bool = True) -> object:
    return {
        name: (each.holding, each.pinned, {what: each.usage[what] for what in (ALL_TABLES if rows else QUICK_TABLES)})
        for name, each in looks.items()
    }


def steady_services(lab: Lab) -> list[VipPort]:
    """Two Services that never change: the pods on both families, and one pod for the generator."""
    web = [lab.vip_port(vip, 80, backends=lab.pods, target_port=SERVED) for vip in WEB_VIPS]
    return [*web, lab.vip_port(FAST_VIP, 80, service="fast", backends=lab.pods[-1:], target_port=FAST_PORT)]


@contextlib.contextmanager
def soak(seed: str) -> Iterator[Soak]:
    """Build everything; nothing of it is left."""
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        generator = Generator(folder)
        lab = stack.enter_context(Lab(nodes=2, pods_per_node=2))
        for pod in lab.pods:
            pod.serve(SERVED)
            pod.serve_udp(UDP_SERVED)
        stack.enter_context(generator.serving(lab.pods[-1], FAST_PORT))
        sink = stack.enter_context(Sink(lab.mgmt))
        mounted = stack.enter_context(bpffs(lab.directory / "bpf"))
        seats = [
            Seat(node, lab.vips_path, sink.settings(http=number > 0), mounted / node.name)
            for number, node in enumerate(lab.nodes)
        ]
        for seat in seats:
            stack.callback(seat.kill)
        yield Soak(lab, seats, sink, generator, seed)
