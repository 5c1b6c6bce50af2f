"""`python -m tests.demo`. Exit codes: 0 the counts are exact, 1 they are not, 2 this machine or an agent cannot."""

from __future__ import annotations

import importlib.util
import signal
import sys
import threading
import time
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn

from otel_lb_hop import semconv
from otel_lb_hop.model import Hop, Origin
from tests.cluster.api import ApiError
from tests.demo import dataplane, report, scenario, show
from tests.demo.agents import AgentError, Agents
from tests.demo.sink import Sink, listen
from tests.lab import Lab, LabError
from tests.lab.requirements import lacking

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from rich.console import Console

    from tests.demo.otlp import Record
    from tests.demo.scenario import Truth

READY_SECONDS = 30.0
VERDICT_SECONDS = 15.0
"""A verdict comes 5 s after the first SYN, the sweep that gives it every 2 s; the rest is for a slow machine."""
RECORDS_SECONDS = 5.0
POLL_SECONDS = 0.1
EXIT_INEXACT, EXIT_UNABLE, EXIT_INTERRUPTED = 1, 2, 130


def main() -> int:
    """Run the demo and print it."""
    console = show.make_console()
    if reason := _lacking():
        print(f"demo: {reason}", file=sys.stderr)
        return EXIT_UNABLE
    # As after Ctrl-C, the lab goes down.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(EXIT_UNABLE))
    try:
        reason = dataplane.make_peers()
        began = time.monotonic()
        sink, truth = _run(console, reason)
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    # Of the control plane, what ends by itself or does not come is an AssertionError.
    except (AgentError, ApiError, AssertionError, LabError, TimeoutError) as error:
        print(f"demo: {error}", file=sys.stderr)
        return EXIT_UNABLE
    points, records = sink.points(), sink.records()
    show.show_report(console, points)
    if record := _example(records):
        show.show_record(console, record, span_came=(record.trace_id, record.span_id) in sink.spans())
    checks = _checks(sink, truth)
    show.show_checks(console, checks)
    made = truth.made.total()
    exact = all(check.exact for check in checks)
    verdict = "[bold green]Exact[/]" if exact else "[bold red]NOT EXACT[/]"
    told = report.counted(points).total()
    took = time.monotonic() - began
    console.print(
        f"\n{verdict}: {made:,} connections made, {told:,} in lb_hop.connections. The demo took {took:.0f} s."
    )
    return 0 if exact else EXIT_INEXACT


def _lacking() -> str | None:
    if importlib.util.find_spec("bcc") is None:
        return "bcc is missing (Debian: python3-bpfcc, and a venv made with --system-site-packages)"
    return lacking()


def _run(console: Console, no_cluster: str | None) -> tuple[Sink, Truth]:
    """Do everything that needs the lab; when it returns the lab is gone and all has arrived.

    An API server and kube-proxies serve the VIPs; if they cannot be had (`no_cluster` says why), the lab does.
    """
    sink = Sink()
    if no_cluster:
        console.print(f"[yellow]No API server and no kube-proxy:[/] {escape(no_cluster)}", soft_wrap=True)
    with Lab(nodes=scenario.NODES) as lab, ExitStack() as stack:
        with _step(console, f"Lab: a client, an ECMP router, {len(lab.nodes)} nodes in as many zones, pods"):
            scenario.prepare(lab)
        services = f"{len(scenario.SERVICES)} Services"
        if no_cluster:
            with _step(console, f"{services}: translated by the lab's own rules, told to the agents by a file"):
                known = dataplane.serve_by_lab(lab)
        else:
            with _step(console, f"An API server, and a kube-proxy (nftables) on every node: {services}"):
                known = stack.enter_context(dataplane.serve_by_cluster(lab))
        server = lab.mgmt.in_netns(lambda: listen(sink, lab.mgmt.address4))
        try:
            with Agents(lab, known) as agents:
                text = f"An agent on every node: compiled, attached, following {known.source}, exporting by OTLP"
                with _step(console, text, len(lab.nodes)) as at:
                    _wait(lambda: min(agents.ready(), len(sink.nodes())), len(lab.nodes), READY_SECONDS, at, agents)
                truth = _traffic(console, lab)
                unanswered = truth.unanswered.total()
                text = f"Verdicts on the {unanswered:,} without an answer: 5-7 s after each one's first SYN"
                with _step(console, text, unanswered) as at:
                    # Late is told by the comparison at the end, so it is no error here.
                    _wait(lambda: _lost(sink), unanswered, VERDICT_SECONDS, at, agents, strict=False)
                with _step(console, "Records and spans: one of each for every connection", scenario.TOTAL) as at:
                    told = scenario.TOTAL
                    _wait(
                        lambda: min(len(sink.records()), len(sink.spans())),
                        told,
                        RECORDS_SECONDS,
                        at,
                        agents,
                        strict=False,
                    )
                with _step(console, "Agents stopped: each has sent its last counts"):
                    agents.stop()
        finally:
            server.shutdown()
            server.server_close()
    return sink, truth


def _traffic(console: Console, lab: Lab) -> Truth:
    made, lock = 0, threading.Lock()
    text = f"{scenario.TOTAL:,} connections, IPv4 and IPv6, TCP and UDP, from the client and from a pod"
    with _step(console, text, scenario.TOTAL) as at:

        def add(count: int) -> None:
            nonlocal made
            with lock:
                made += count
                at(made)

        return scenario.drive(lab, add)


def _wait(
    read: Callable[[], int],
    goal: int,
    seconds: float,
    at: Callable[[int], None],
    agents: Agents,
    *,
    strict: bool = True,
) -> None:
    """Watch a figure come up to its goal; raises TimeoutError if that is needed to go on."""
    deadline = time.monotonic() + seconds
    while (now := read()) < goal:
        at(now)
        agents.check()
        if time.monotonic() > deadline:
            if strict:
                raise TimeoutError(f"only {now} of {goal} after {seconds:.0f} s")
            return
        time.sleep(POLL_SECONDS)
    at(goal)


@contextmanager
def _step(console: Console, text: str, total: int | None = None) -> Iterator[Callable[[int], None]]:
    """Show a step while it runs (on a terminal) and a line of it when it is done (everywhere)."""
    columns = [SpinnerColumn(), TextColumn("{task.description}")]
    if total is not None:
        columns += [BarColumn(20), MofNCompleteColumn()]
    began = time.monotonic()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(text, total=total)
        yield lambda done: progress.update(task, completed=done)
    console.print(f"[green]{time.monotonic() - began:5.1f} s[/]  {text}")


def _lost(sink: Sink) -> int:
    return sum(loss.by_node.total() for loss in report.losses(sink.points()))


def _example(records: list[Record]) -> Record | None:
    """Choose a record that tells most: from outside, over a hop that was required, answered, IPv4."""
    wanted = {
        semconv.HOP: Hop.REQUIRED.value,
        semconv.ORIGIN: Origin.EXTERNAL.value,
        semconv.NETWORK_TYPE: "ipv4",
        semconv.K8S_SERVICE_NAME: scenario.WEB.name,
    }
    good = [
        record
        for record in records
        if record.event_name == semconv.EVENT_FORWARDED and wanted.items() <= record.attributes.items()
    ]
    return good[len(good) // 2] if good else None


def _checks(sink: Sink, truth: Truth) -> list[show.Check]:
    points, records = sink.points(), sink.records()
    counted = report.counted(points)
    told = [
        show.Check(f"connections to {service}, {origin}", counted[service, origin], truth.made[service, origin])
        for service, origin in sorted(truth.made | counted)
    ]
    answering = report.serving(points)
    delivered = report.delivered(points, answering)
    pods = [
        show.Check(f"went to {node} / accepted by its pod", delivered[node], truth.accepted[node])
        for node in sorted(truth.accepted | delivered)
    ]
    unanswered = show.Check("got no answer", _lost(sink), truth.unanswered.total())
    good = [record.attributes for record in records if record.event_name == semconv.EVENT_FORWARDED]
    clients = {(each[semconv.SERVER_ADDRESS], each[semconv.CLIENT_ADDRESS], each[semconv.CLIENT_PORT]) for each in good}
    pod_sees = (semconv.NETWORK_TRANSPORT, semconv.SOURCE_ADDRESS, semconv.SOURCE_PORT, semconv.DESTINATION_POD)
    peers = {tuple(each.get(name) for name in pod_sees) for each in good}
    spans = {(record.trace_id, record.span_id) for record in records} & sink.spans()
    made = truth.made.total()
    return [
        *told,
        *pods,
        unanswered,
        show.Check("log records", len(records), made),
        show.Check("spans with the ids of a log record", len(spans), made),
        show.Check("clients in records that were answered", len(clients & truth.clients), len(truth.clients)),
        show.Check("SNAT sources in records that pods saw", len(peers & truth.peers), len(truth.peers)),
    ]


if __name__ == "__main__":
    sys.exit(main())
