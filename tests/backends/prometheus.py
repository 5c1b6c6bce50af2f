"""A real Prometheus on the lab's mgmt host: takes remote write and OTLP, scrapes and judges rules if told to."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, NamedTuple

from tests.backends.server import Server, folder_of
from tests.peers import build

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from tests.lab import Lab

PORT = 9090
REMOTE_WRITE = "/api/v1/write"
OTLP = "/api/v1/otlp"
"""Base of its OTLP endpoint: the standard exporters add /v1/metrics."""

Labels = dict[str, str]


class Sample(NamedTuple):
    """One element of an instant vector. The name of a metric is the label `__name__`."""

    labels: Labels
    value: float


class Run(NamedTuple):
    """One element of a range: (unix seconds, value) for each step that has one."""

    labels: Labels
    values: list[tuple[float, float]]


class Prometheus(Server):
    """Use it as a context; it starts empty.

    `rules` are rule files, judged every `evaluation_interval`; `scrape` is a list as `scrape_configs` takes it, scraped
    every `scrape_interval`; `otlp` is what stands under that key of its configuration; `settings` overrides whole keys,
    `flags` are more words of its command line.
    """

    def __init__(
        self,
        lab: Lab,
        name: str = "prometheus",
        *,
        port: int = PORT,
        rules: Sequence[Path] = (),
        evaluation_interval: str = "1s",
        scrape: Sequence[Mapping[str, Any]] = (),
        scrape_interval: str = "1s",
        otlp: Mapping[str, Any] | None = None,
        settings: Mapping[str, Any] | None = None,
        flags: Sequence[str] = (),
    ) -> None:
        config = {
            "global": {
                "evaluation_interval": evaluation_interval,
                "scrape_interval": scrape_interval,
                "scrape_timeout": scrape_interval,
            },
            "rule_files": [str(path.resolve()) for path in rules],
            "scrape_configs": list(scrape),
            # Several senders, and batches that overtake each other.
            "storage": {"tsdb": {"out_of_order_time_window": "10m"}},
            "otlp": dict(otlp or {}),
            **(settings or {}),
        }
        super().__init__(
            lab,
            name,
            port,
            {"prometheus.yml": json.dumps(config)},
            [
                str(build.build("prometheus") / "prometheus"),
                "--config.file=prometheus.yml",
                f"--storage.tsdb.path={folder_of(lab, name) / 'data'}",
                "--storage.tsdb.retention.time=1h",
                f"--web.listen-address=[::]:{port}",
                "--web.enable-remote-write-receiver",
                "--web.enable-otlp-receiver",
                "--web.enable-lifecycle",
                "--log.level=warn",
                *flags,
            ],
            ready="/-/ready",
        )

    def query(self, promql: str, time: float | None = None) -> list[Sample]:
        """Ask for an instant vector (or a scalar, which has no labels) at `time`, unix seconds (default: now)."""
        data = self._data("query", {"query": promql, **({} if time is None else {"time": time})})
        if data["resultType"] == "scalar":
            return [Sample({}, float(data["result"][1]))]
        return [Sample(each["metric"], float(each["value"][1])) for each in data["result"]]

    def query_range(self, promql: str, start: float, end: float, step: float) -> list[Run]:
        """Ask for a range vector between two times in unix seconds, a value every `step` seconds."""
        data = self._data("query_range", {"query": promql, "start": start, "end": end, "step": step})
        return [
            Run(each["metric"], [(moment, float(value)) for moment, value in each["values"]]) for each in data["result"]
        ]

    def series(self, match: str, start: float | None = None, end: float | None = None) -> list[Labels]:
        """Name the series that match a selector."""
        times = {key: value for key, value in (("start", start), ("end", end)) if value is not None}
        found: list[Labels] = self._data("series", {"match[]": match, **times})
        return found

    def metadata(self) -> dict[str, list[dict[str, str]]]:
        """Tell type, unit and help of each metric by its name, where the sender told them."""
        found: dict[str, list[dict[str, str]]] = self._data("metadata")
        return found

    def alerts(self) -> list[dict[str, Any]]:
        """List the alerts that are pending or firing: labels, annotations, state, activeAt, value."""
        found: list[dict[str, Any]] = self._data("alerts")["alerts"]
        return found

    def rules(self) -> list[dict[str, Any]]:
        """List the rules of all groups: name, query, type, health, lastError, and for alerts state and alerts."""
        return [rule for group in self._data("rules")["groups"] for rule in group["rules"]]

    def _data(self, what: str, query: Mapping[str, object] | None = None) -> Any:  # noqa: ANN401 - JSON
        return self.get(f"/api/v1/{what}", query)["data"]
