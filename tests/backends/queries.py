"""The worked queries of docs/queries.md: read from the page, asked of the scene, their output written into the page.

`python -m tests.backends.queries` plays the scene and writes every output anew.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from tests.backends.scene import play

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from tests.backends.loki import Line
    from tests.backends.prometheus import Sample
    from tests.backends.scene import Fate, Scene
    from tests.backends.tempo import Found

PAGE = Path(__file__).parents[2] / "docs" / "queries.md"
LANGUAGES = ("promql", "logql", "traceql")
WINDOW = "[5m]"
SERVICE_OF = {
    "node-to-node": "web",
    "handshake-median": "web",
    "hop-cost": "web",
    "slow-traces": "slow",
    "long-traces": "slow",
    "failed-records": "firewalled",
    "failed-traces": "firewalled",
    "top-clients": "web",
}
"""What `$service` is in a query."""
MOST_ROWS = {"promql": 12, "logql": 4, "traceql": 4}
_BLOCK = re.compile(
    r"(?:^<!-- query: (?P<name>[a-z0-9-]+) -->\n)?^```(?P<language>promql|logql|traceql)\n(?P<text>.*?)^```\n"
    r"(?P<output>(?:\n<!-- output -->\n.*?<!-- end -->\n)?)",
    re.MULTILINE | re.DOTALL,
)


class Query(NamedTuple):
    """One query of the page."""

    name: str
    language: str
    text: str
    columns: tuple[str, ...]
    """Of the output that stands below it; empty where there is none yet."""


@dataclass
class Answer:
    """What a backend has answered: an instant vector, log lines or traces."""

    samples: list[Sample] = field(default_factory=list)
    lines: list[Line] = field(default_factory=list)
    traces: list[Found] = field(default_factory=list)

    def values(self, *labels: str) -> dict[tuple[str, ...], float]:
        """Return the vector by these labels, which are all that there are but for a metric's name."""
        found = {tuple(sample.labels.get(label, "") for label in labels): sample.value for sample in self.samples}
        assert len(found) == len(self.samples)
        assert all(sample.labels.keys() <= {*labels, "__name__"} for sample in self.samples)
        return found


class Table(NamedTuple):
    """An answer as rows of text."""

    columns: tuple[str, ...]
    rows: list[tuple[str, ...]]


def read(page: str) -> list[Query]:
    """List the queries of a page; one without a name has an empty one."""
    return [
        Query(
            block["name"] or "",
            block["language"],
            block["text"].rstrip("\n"),
            tuple(cell.strip() for cell in _header(block["output"])),
        )
        for block in _BLOCK.finditer(page)
    ]


def words(scene: Scene, service: str) -> dict[str, str]:
    """Say what the words with a `$` are in a query: a Service, a node, or one connection that the truth knows."""
    fate = connection(scene)
    assert fate.source
    return {
        "vip": "10.0.10.0",
        "service": service,
        "node": "node1",
        "client_address": fate.client[0],
        "client_port": str(fate.client[1]),
        "source_address": fate.source[0],
        "source_port": str(fate.source[1]),
        "trace_id": scene.tempo.search(
            f'{{ span.client.address = "{fate.client[0]}" && span.client.port = {fate.client[1]} }}',
            scene.started,
            scene.ended,
        )[0].trace_id.lstrip("0"),  # as Tempo tells it
    }


def connection(scene: Scene) -> Fate:
    """Pick the connection that is looked up by address: over a hop, with its source address replaced."""
    taken = scene.truth.select(service="default/web", network="ipv6", hop="avoidable")
    # A port may have come up twice, with another VIP.
    ports = scene.truth.count("client")
    return next(fate for fate in taken if ports[fate.client,] == 1)


def fill(text: str, scene: Scene, values: Mapping[str, str]) -> str:
    """Put values in the place of `$words`, and the scene's window in the place of the page's."""
    for name, value in sorted(values.items(), reverse=True):
        text = text.replace(f"${name}", value)
    return text.replace(WINDOW, f"[{scene.range}]")


def ask(scene: Scene, query: Query, service: str | None = None) -> Answer:
    """Ask a query of the page, of the Service that it is about there or of another one."""
    values = words(scene, service or SERVICE_OF.get(query.name, "web")) if "$" in query.text else {}
    text = fill(query.text, scene, values)
    if query.language == "promql":
        return Answer(samples=scene.prometheus.query(text, scene.at))
    if query.language == "traceql":
        return Answer(traces=scene.tempo.search(text, scene.started, scene.ended))
    if WINDOW in query.text:
        return Answer(samples=scene.loki.query(text, scene.at))
    return Answer(lines=scene.loki.lines(text, scene.started, scene.ended))


def tabulate(query: Query, answer: Answer) -> Table:
    """Make a table of an answer, its columns in the order in which the query names them."""
    if query.language == "traceql":
        names = sorted({name for found in answer.traces for span in found.spans for name in span}, key=_place(query))
        rows = [
            (found.trace_id, found.root_name, f"{found.duration_ms} ms", *(str(span.get(name, "")) for name in names))
            for found in answer.traces
            for span in found.spans
        ]
        return Table(("trace", "name", "duration", *names), rows)
    if not answer.samples and answer.lines:
        return Table(("line",), [(line.text,) for line in answer.lines])
    labels = sorted({name for sample in answer.samples for name in sample.labels}, key=_place(query))
    rows = [(*(sample.labels.get(name, "") for name in labels), _number(sample.value)) for sample in answer.samples]
    if not query.text.startswith("sort"):
        rows.sort()
    return Table((*labels, "value"), rows) if rows else Table((), [])


def written(query: Query, table: Table) -> str:
    """Write a table as Markdown between its marks."""
    if not table.rows:
        body = "*Nothing.*\n"
    else:
        most = MOST_ROWS[query.language]
        lines = [table.columns, tuple("---" for _ in table.columns), *table.rows[:most]]
        body = "".join(f"| {' | '.join(line)} |\n" for line in lines)
        if len(table.rows) > most:
            body += f"\n... and {len(table.rows) - most} more.\n"
    return f"\n<!-- output -->\n{body}<!-- end -->\n"


def rewrite(page: str, outputs: Mapping[str, str]) -> str:
    """Put the outputs below their queries."""
    return _BLOCK.sub(
        lambda block: block[0].removesuffix(block["output"]) + outputs.get(block["name"] or "", block["output"]), page
    )


def _header(output: str) -> Sequence[str]:
    header = next((line for line in output.splitlines() if line.startswith("|")), "")
    return header.strip("|").split(" | ") if header else ()


def _place(query: Query) -> Callable[[str], tuple[int, str]]:
    """Sort names by where the query first has them, the others behind."""

    def key(name: str) -> tuple[int, str]:
        place = query.text.find(name)
        return (place if place >= 0 else len(query.text)), name

    return key


def _number(value: float) -> str:
    return f"{value:.4g}"


def main() -> None:
    """Play the scene, ask everything, write the page."""
    page = PAGE.read_text(encoding="utf-8")
    with play() as scene:
        outputs = {query.name: written(query, tabulate(query, ask(scene, query))) for query in read(page)}
    PAGE.write_text(rewrite(page, outputs), encoding="utf-8")


if __name__ == "__main__":
    main()
