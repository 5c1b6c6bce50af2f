"""The report on a terminal or in a file: tables of rich, one JSON record. Only looks, no figures of its own."""

from __future__ import annotations

import json
import re
import sys
from io import StringIO
from typing import TYPE_CHECKING, NamedTuple

from rich import box
from rich.console import Console
from rich.table import Table

from otel_lb_hop.model import Hop, Origin
from tests.demo import otlp, report

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tests.demo.otlp import Point, Record

WIDTH = 110
BAR = 12
_BLANKS = re.compile(" +$", re.MULTILINE)
STYLE_OF = {Hop.NONE: "green", Hop.AVOIDABLE: "red", Hop.REQUIRED: "yellow", Hop.UNKNOWN: "dim"}


class Check(NamedTuple):
    """A figure from OTLP beside the lab's own."""

    what: str
    told: int
    true: int

    @property
    def exact(self) -> bool:
        """Whether they are the same."""
        return self.told == self.true


class _Trimmed(StringIO):
    """Standard output without the blanks with which tables end their lines: for files and READMEs."""

    def write(self, text: str) -> int:
        return sys.stdout.write(_BLANKS.sub("", text))

    def flush(self) -> None:
        sys.stdout.flush()


def make_console() -> Console:
    """At most `WIDTH` wide; exactly that where no terminal tells its width."""
    if sys.stdout.isatty():
        console = Console(highlight=False)
        console.width = min(console.width, WIDTH)
        return console
    return Console(file=_Trimmed(), width=WIDTH, highlight=False)


def show_report(console: Console, points: Sequence[Point]) -> None:
    """Every table, then the sentences."""
    rows = [row for row in report.intakes(points) if row.service in report.serving(points)]
    nodes = sorted({report.node_of(point) for point in points})
    _heading(console, "Which nodes take in the traffic, and where does it go?", "lb_hop.connections, from outside")
    console.print(_intake_table(rows, nodes))
    _heading(console, "How much takes an extra hop, or crosses a zone?", "lb_hop.connections, by lb_hop.hop")
    inside = report.intakes(points, Origin.INTERNAL)
    console.print(_hop_table(rows, inside))
    _heading(
        console,
        "How long does it take?",
        "lb_hop.forward.duration and lb_hop.handshake.duration; interpolated in their buckets",
    )
    console.print(_times_table(report.times(points)))
    note = "All of this is one machine: a hop is a pair of virtual interfaces here, not a wire between zones."
    console.print(f"[dim]{note}[/]")
    _heading(console, "What was lost, and why?", "lb_hop.connections, lb_hop.handshake.failures")
    console.print(_loss_table(report.losses(points), nodes))
    again = {service: count for service, count in sorted(report.retransmits(points).items()) if count}
    text = ", ".join(f"{service} {count:,}" for service, count in again.items()) or "none"
    console.print(f"SYNs that clients sent again (lb_hop.syn.retransmits): {text}.")
    _heading(console, "In short")
    table = Table.grid(padding=(0, 1))
    for sentence in report.answers(points):
        table.add_row(" -", sentence)
    console.print(table)


def show_record(console: Console, record: Record, *, span_came: bool) -> None:
    """One log record as it left, and whose connection it was."""
    _heading(console, "One connection, as its log record left", "OTLP/JSON")
    console.print(pretty(otlp.to_json(record)), markup=False, soft_wrap=True)
    client, snat, pod = (
        f"{record.attributes[f'{end}.address']}:{record.attributes[f'{end}.port']}"
        for end in ("client", "source", "destination")
    )
    console.print(f"So the client behind {snat} in the access log of {pod} is [bold]{client}[/].")
    if span_came:
        console.print(f"Its span {record.span_id} of trace {record.trace_id} has arrived as well.")


def show_checks(console: Console, checks: Sequence[Check]) -> None:
    """Compare; every row must be exact."""
    _heading(console, "Is it true?", "what arrived over OTLP beside what clients and pods counted themselves")
    table = _table("", "over OTLP>", "in the lab>", "")
    for check in checks:
        mark = "[green]exact[/]" if check.exact else f"[bold red]off by {check.told - check.true:+,}[/]"
        table.add_row(check.what, f"{check.told:,}", f"{check.true:,}", mark)
    console.print(table)


def pretty(tree: object, indent: int = 0) -> str:
    """Write JSON with everything on one line that fits into one."""
    line = json.dumps(tree, ensure_ascii=False)
    if len(line) + indent <= WIDTH or not isinstance(tree, dict | list):
        return line
    inner, end = " " * (indent + 2), " " * indent
    if isinstance(tree, dict):
        items = [f"{inner}{json.dumps(key)}: {pretty(value, indent + 2)}" for key, value in tree.items()]
        return "{\n" + ",\n".join(items) + f"\n{end}}}"
    return "[\n" + ",\n".join(inner + pretty(value, indent + 2) for value in tree) + f"\n{end}]"


def _intake_table(rows: Sequence[report.Intake], nodes: Sequence[str]) -> Table:
    table = _table("Service", "policy", "came in on", "taken in>", "share>", "", *(f"to {n}>" for n in nodes), "lost>")
    previous = ""
    for row in rows:
        if previous and previous != row.service:
            table.add_section()
        total = sum(each.total for each in rows if each.service == row.service)
        busiest = max(each.total for each in rows if each.service == row.service)
        bar = "█" * round(BAR * row.total / busiest) if busiest else ""
        names = (row.service, row.policy) if row.service != previous else ("", "")
        to_nodes = [f"{row.to_node[node]:,}" if row.to_node[node] else "[dim]-[/]" for node in nodes]
        lost = row.unforwarded.total()
        table.add_row(
            *names,
            row.node,
            f"{row.total:,}",
            report.share(row.total, total),
            f"[cyan]{bar}[/]",
            *to_nodes,
            f"[red]{lost:,}[/]" if lost else "[dim]-[/]",
        )
        previous = row.service
    return table


def _hop_table(rows: Sequence[report.Intake], inside: Sequence[report.Intake]) -> Table:
    table = _table("Service", "came in on", *(f"{hop.value}>" for hop in report.CLASSES), "zone crossed>")
    previous = ""
    for row in (row for row in rows if row.forwarded):
        if previous and previous != row.service:
            table.add_section()
        table.add_row(row.service if row.service != previous else "", row.node, *_hop_cells(row))
        previous = row.service
    if any(row.forwarded for row in inside):
        table.add_section()
    for row in inside:
        if row.forwarded:
            table.add_row(row.service, f"a pod of {row.node}", *_hop_cells(row))
    return table


def _hop_cells(row: report.Intake) -> list[str]:
    cells = [
        f"[{STYLE_OF[hop]}]{_with_share(row.by_hop[hop], row.forwarded)}[/]" if row.by_hop[hop] else "[dim]-[/]"
        for hop in report.CLASSES
    ]
    return [*cells, _with_share(row.zone_crossed, row.forwarded) if row.zone_crossed else "[dim]-[/]"]


def _with_share(part: int, whole: int) -> str:
    return f"{part:,} ({report.share(part, whole)})"


def _times_table(rows: Sequence[report.Times]) -> Table:
    table = _table(
        "hop", "forwarded>", "forward p50>", "p99>", "answered>", "handshake p50>", "p99>", "handshake, median"
    )
    longest = max((row.handshake.p50 for row in rows if row.handshake), default=1.0)
    for row in rows:
        cells: list[str] = []
        for each in (row.forward, row.handshake):
            cells += (
                [f"{each.observations:,}", report.duration(each.p50), report.duration(each.p99)]
                if each
                else ["[dim]-[/]"] * 3
            )
        bar = "█" * round(BAR * row.handshake.p50 / longest) if row.handshake else ""
        style = STYLE_OF[row.hop]
        table.add_row(f"[{style}]{row.hop.value}[/]", *cells, f"[{style}]{bar}[/]")
    return table


def _loss_table(rows: Sequence[report.Loss], nodes: Sequence[str]) -> Table:
    table = _table("Service", "why", *(f"{node}>" for node in nodes), "what it means")
    for row in rows:
        counts = [f"{row.by_node[node]:,}" if row.by_node[node] else "[dim]-[/]" for node in nodes]
        table.add_row(row.service, f"[red]{row.reason}[/]", *counts, report.MEANING.get(row.reason, ""))
    return table


def _table(*columns: str) -> Table:
    """Make an empty table; a column that ends in > holds numbers."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, header_style="bold", padding=(0, 1, 0, 0))
    for column in columns:
        table.add_column(column.removesuffix(">"), justify="right" if column.endswith(">") else "left", no_wrap=True)
    return table


def _heading(console: Console, title: str, source: str = "") -> None:
    console.print()
    console.print(f"[bold]{title}[/]" + (f" [dim]({source})[/]" if source else ""))
    console.print()
