"""The dashboards as Grafana reads them: their panels and queries, and how it fills in variables."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import parse_qs, urlsplit

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

FOLDER = Path(__file__).parents[2] / "deploy" / "grafana"
Json = dict[str, Any]

_VARIABLE = re.compile(r"\$(\w+)|\$\{(\w+)(?::(\w+))?\}")


class All(NamedTuple):
    """The choice of all values, with what the variable says that this stands for."""

    value: str


class Target(NamedTuple):
    """One query of one panel."""

    dashboard: str
    """Its uid."""
    panel: str
    ref: str
    source: str
    """`prometheus`, `loki` or `tempo`."""
    text: str
    instant: bool

    @property
    def key(self) -> str:
        """How an expectation names it."""
        return f"{self.dashboard.removeprefix('otel-lb-hop-')}/{self.panel}/{self.ref}"


def dashboards() -> dict[str, Json]:
    """Read all files: uid → dashboard."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(FOLDER.glob("dashboards/*.json"))]
    return {each["uid"]: each for each in found}


def panels(dashboard: Json) -> list[Json]:
    """List the panels that show something: all but the rows."""
    return [panel for panel in dashboard["panels"] if panel["type"] != "row"]


def variables(dashboard: Json) -> dict[str, Json]:
    """List the variables by name."""
    return {each["name"]: each for each in dashboard["templating"]["list"]}


def targets(dashboard: Json) -> Iterator[Target]:
    """List every query of every panel."""
    for panel in panels(dashboard):
        for target in panel["targets"]:
            source = target["datasource"]["type"]
            text = target["query" if source == "tempo" else "expr"]
            instant = target.get("instant", False)
            yield Target(dashboard["uid"], panel["title"], target["refId"], source, text, instant)


def explored(links: list[Json]) -> list[str]:
    """Read the queries of the links that lead into Explore."""
    found = []
    for link in links:
        url = urlsplit(link["url"])
        if url.path == "/explore":
            (panes,) = parse_qs(url.query)["panes"]
            found += [query["expr"] for pane in json.loads(panes).values() for query in pane["queries"]]
    return found


def fill(text: str, values: Mapping[str, str | list[str] | All]) -> str:
    """Put the values of variables into a query; what is no variable's name stays.

    One value is written into a string in quotes, several are made a regular expression in one, or joined if the
    variable says `:pipe`.
    """

    def value(match: re.Match[str]) -> str:
        chosen = values.get(match[1] or match[2])
        if chosen is None:
            return match[0]
        if isinstance(chosen, All):
            return chosen.value
        if isinstance(chosen, str):
            return chosen.replace("\\", "\\\\").replace('"', '\\"')
        if match[3] == "pipe":
            return "|".join(chosen)
        escaped = [_escaped(each) for each in chosen]
        return escaped[0] if len(escaped) == 1 else f"({'|'.join(escaped)})"

    return _VARIABLE.sub(value, text)


def _escaped(value: str) -> str:
    """Take a value literally in a regular expression that stands in a string of PromQL or LogQL."""
    return re.sub(r"[$^*{}\[\]'+?.()|]", r"\\\\\g<0>", value.replace("\\", "\\\\\\\\"))
