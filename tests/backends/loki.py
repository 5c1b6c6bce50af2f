"""A real Loki on the lab's mgmt host: one process, its store in files, logs by OTLP."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, NamedTuple

from tests.backends.prometheus import Sample
from tests.backends.server import Server, folder_of
from tests.peers import build

if TYPE_CHECKING:
    from collections.abc import Mapping

    from tests.lab import Lab

PORT, GRPC_PORT = 3100, 9195
OTLP = "/otlp"
"""Base of its OTLP endpoint: the standard exporters add /v1/logs."""
MOST_LINES = 5000


class Line(NamedTuple):
    """One log line: `labels` are those of its stream, `metadata` its own, `parsed` what the query made of it."""

    time_ns: int
    text: str
    labels: dict[str, str]
    metadata: dict[str, str]
    parsed: dict[str, str]

    @property
    def fields(self) -> dict[str, str]:
        """Everything that a query can name."""
        return self.labels | self.metadata | self.parsed


class Loki(Server):
    """Use it as a context; it starts empty. `otlp` is what stands under `limits_config.otlp_config`."""

    def __init__(
        self, lab: Lab, name: str = "loki", *, port: int = PORT, otlp: Mapping[str, Any] | None = None
    ) -> None:
        folder = folder_of(lab, name)
        config = {
            "auth_enabled": False,
            "analytics": {"reporting_enabled": False},
            "server": {
                "http_listen_port": port,
                "grpc_listen_address": "127.0.0.1",
                "grpc_listen_port": GRPC_PORT,
                "log_level": "warn",
            },
            "common": {
                "path_prefix": str(folder),
                "instance_addr": "127.0.0.1",
                "replication_factor": 1,
                "ring": {"kvstore": {"store": "inmemory"}},
                "storage": {
                    "filesystem": {
                        "chunks_directory": str(folder / "chunks"),
                        "rules_directory": str(folder / "rules"),
                    }
                },
            },
            "schema_config": {
                "configs": [
                    {
                        "from": "2024-01-01",
                        "store": "tsdb",
                        "object_store": "filesystem",
                        "schema": "v13",
                        "index": {"prefix": "index_", "period": "24h"},
                    }
                ]
            },
            # Without a scheduler between them nobody waits for its ring.
            "frontend_worker": {"frontend_address": f"127.0.0.1:{GRPC_PORT}"},
            # The rings of a single process need no time to settle.
            "ingester": {"lifecycler": {"min_ready_duration": "0s", "join_after": "0s", "final_sleep": "0s"}},
            "limits_config": {
                "allow_structured_metadata": True,
                **({"otlp_config": dict(otlp)} if otlp else {}),
            },
        }
        super().__init__(
            lab,
            name,
            port,
            {"loki.yaml": json.dumps(config)},
            [str(build.build("loki") / "loki"), "-config.file=loki.yaml", "-target=all"],
            ready="/ready",
        )

    def query(self, logql: str, time: float | None = None) -> list[Sample]:
        """Ask a metric query at `time`, unix seconds (default: now)."""
        moment = {} if time is None else {"time": _ns(time)}
        result = self.get("/loki/api/v1/query", {"query": logql, **moment})["data"]["result"]
        return [Sample(each["metric"], float(each["value"][1])) for each in result]

    def lines(self, logql: str, start: float, end: float, limit: int = MOST_LINES) -> list[Line]:
        """Ask a log query between two times in unix seconds; the oldest line first."""
        query = {"query": logql, "start": _ns(start), "end": _ns(end), "limit": limit, "direction": "forward"}
        headers = {"X-Loki-Response-Encoding-Flags": "categorize-labels"}
        streams = self.get("/loki/api/v1/query_range", query, headers)["data"]["result"]
        found = [
            Line(int(moment), text, stream["stream"], more.get("structuredMetadata", {}), more.get("parsed", {}))
            for stream in streams
            for moment, text, more in stream["values"]
        ]
        return sorted(found, key=lambda line: line.time_ns)

    def streams(self, match: str, start: float, end: float) -> list[dict[str, str]]:
        """Name the streams that match a selector: every label there is, without structured metadata."""
        query = {"match[]": match, "start": _ns(start), "end": _ns(end)}
        found: list[dict[str, str]] = self.get("/loki/api/v1/series", query)["data"]
        return found


def _ns(seconds: float) -> int:
    return int(seconds * 1e9)
