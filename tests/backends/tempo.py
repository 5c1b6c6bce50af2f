"""A real Tempo on the lab's mgmt host: one process, its store in files, spans by OTLP."""

from __future__ import annotations

import base64
import json
from typing import TYPE_CHECKING, Any, NamedTuple

from tests.backends.server import RefusedError, Server, folder_of
from tests.peers import build

if TYPE_CHECKING:
    from tests.lab import Lab

PORT, GRPC_PORT = 3200, 9196
OTLP_GRPC_PORT, OTLP_HTTP_PORT = 4417, 4418
"""Beside a Collector's 4317 and 4318 on the same host."""
MOST_TRACES = 10_000

Attributes = dict[str, Any]


class Span(NamedTuple):
    """One span as Tempo keeps it; ids are hex, kind and status are OTLP's words."""

    trace_id: str
    span_id: str
    parent_id: str
    name: str
    kind: str
    start_ns: int
    end_ns: int
    status: str
    events: list[tuple[str, int]]
    """(name, unix ns)."""
    attributes: Attributes
    resource: Attributes


class Found(NamedTuple):
    """One trace that a search has found, with the attributes that the query named of each of its matching spans."""

    trace_id: str
    root_name: str
    duration_ms: int
    spans: list[Attributes]


class Tempo(Server):
    """Use it as a context; it starts empty. A trace can be searched for about a second after its last span."""

    def __init__(self, lab: Lab, name: str = "tempo", *, port: int = PORT) -> None:
        folder = folder_of(lab, name)
        store = {"kvstore": {"store": "inmemory"}}
        ring = {**store, "instance_addr": "127.0.0.1"}
        config = {
            "usage_report": {"reporting_enabled": False},
            "server": {
                "http_listen_port": port,
                "grpc_listen_address": "127.0.0.1",
                "grpc_listen_port": GRPC_PORT,
                "log_level": "warn",
            },
            "distributor": {
                "ring": ring,
                "receivers": {
                    "otlp": {
                        "protocols": {
                            "grpc": {"endpoint": f"[::]:{OTLP_GRPC_PORT}"},
                            "http": {"endpoint": f"[::]:{OTLP_HTTP_PORT}"},
                        }
                    }
                },
            },
            "ingester": {
                "lifecycler": {
                    "address": "127.0.0.1",
                    "ring": {**store, "replication_factor": 1},
                    "min_ready_duration": "0s",
                    "join_after": "0s",
                    "final_sleep": "0s",
                },
                "trace_idle_period": "300ms",
                "flush_check_period": "300ms",
            },
            "querier": {"frontend_worker": {"frontend_address": f"127.0.0.1:{GRPC_PORT}"}},
            "storage": {
                "trace": {
                    "backend": "local",
                    "wal": {"path": str(folder / "wal")},
                    "local": {"path": str(folder / "blocks")},
                }
            },
            # Thousands of traces in a second are no mistake here.
            "overrides": {"ingestion_rate_limit_bytes": 10**9, "ingestion_burst_size_bytes": 10**9},
        }
        super().__init__(
            lab,
            name,
            port,
            {"tempo.yaml": json.dumps(config)},
            [str(build.build("tempo")), "-config.file=tempo.yaml", "-target=all"],
            ready="/ready",
        )

    def search(self, traceql: str, start: float, end: float, limit: int = MOST_TRACES) -> list[Found]:
        """Find traces by TraceQL between two times in unix seconds."""
        query = {"q": traceql, "start": int(start), "end": int(end) + 1, "limit": limit}
        return [
            Found(
                each["traceID"].rjust(32, "0"),
                each.get("rootTraceName", ""),
                int(each.get("durationMs", 0)),
                [_attributes(span.get("attributes", ())) for span in each.get("spanSet", {}).get("spans", ())],
            )
            for each in self.get("/api/search", query).get("traces", ())
        ]

    def trace(self, trace_id: str) -> list[Span]:
        """Return the spans of one trace; none if Tempo does not have it."""
        try:
            content = self.get(f"/api/traces/{trace_id}")
        except RefusedError as refused:
            if " answers 404 " in str(refused):
                return []
            raise
        return [
            Span(
                _hex(span["traceId"]),
                _hex(span["spanId"]),
                _hex(span.get("parentSpanId", "")),
                span["name"],
                span.get("kind", ""),
                int(span["startTimeUnixNano"]),
                int(span["endTimeUnixNano"]),
                span.get("status", {}).get("code", "STATUS_CODE_UNSET"),
                [(event["name"], int(event["timeUnixNano"])) for event in span.get("events", ())],
                _attributes(span.get("attributes", ())),
                _attributes(batch["resource"].get("attributes", ())),
            )
            for batch in content["batches"]
            for scope in batch["scopeSpans"]
            for span in scope["spans"]
        ]


def _attributes(pairs: Any) -> Attributes:  # noqa: ANN401 - JSON
    return {pair["key"]: _value(pair["value"]) for pair in pairs}


def _value(value: dict[str, Any]) -> Any:  # noqa: ANN401 - JSON
    (kind, content), *_ = value.items()
    return int(content) if kind == "intValue" else content


def _hex(encoded: str) -> str:
    return base64.b64decode(encoded).hex()
