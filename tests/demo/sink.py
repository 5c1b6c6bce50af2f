"""A small OTLP/HTTP receiver in the place of a Collector: it keeps what arrives and says 200."""

from __future__ import annotations

import threading
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING

from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceRequest  # noqa: TID251 - the far end
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import (  # noqa: TID251 - the far end
    ExportMetricsServiceRequest,
)
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (  # noqa: TID251 - the far end
    ExportTraceServiceRequest,
)

from otel_lb_hop import semconv
from tests.demo import otlp

if TYPE_CHECKING:
    from tests.demo.otlp import Point, Record

PORT = 4318


class Sink:
    """What has arrived: of each node the newest metrics (they are cumulative), every log record, every span."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._points: dict[str, list[Point]] = {}
        self._records: list[Record] = []
        self._spans: set[tuple[str, str]] = set()

    def nodes(self) -> set[str]:
        """Name the nodes whose metrics have arrived."""
        with self._lock:
            return set(self._points)

    def points(self) -> list[Point]:
        """Return the newest points of all nodes."""
        with self._lock:
            return [point for points in self._points.values() for point in points]

    def records(self) -> list[Record]:
        """Return every log record."""
        with self._lock:
            return list(self._records)

    def spans(self) -> set[tuple[str, str]]:
        """Return the trace and span id of every span."""
        with self._lock:
            return set(self._spans)

    def take(self, path: str, body: bytes) -> bool:
        """Keep one request; False for a path that OTLP does not have."""
        if path == "/v1/metrics":
            self._take_metrics(ExportMetricsServiceRequest.FromString(body))
        elif path == "/v1/logs":
            records = list(otlp.records(ExportLogsServiceRequest.FromString(body)))
            with self._lock:
                self._records += records
        elif path == "/v1/traces":
            ids = set(otlp.span_ids(ExportTraceServiceRequest.FromString(body)))
            with self._lock:
                self._spans |= ids
        else:
            return False
        return True

    def _take_metrics(self, request: ExportMetricsServiceRequest) -> None:
        points = list(otlp.points(request))
        nodes = {str(point.attributes[semconv.K8S_NODE_NAME]) for point in points}
        with self._lock:
            for node in nodes:
                self._points[node] = [p for p in points if p.attributes[semconv.K8S_NODE_NAME] == node]


def listen(sink: Sink, address: str) -> ThreadingHTTPServer:
    """Serve a sink from threads of this process; the socket stays in the network namespace this is called in."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(HTTPStatus.OK if sink.take(self.path, body) else HTTPStatus.NOT_FOUND)
            # An empty protobuf message is no bytes: all was accepted.
            self.send_header("Content-Type", "application/x-protobuf")
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class names it
            """Say nothing: the demo has its own words."""

    server = ThreadingHTTPServer((address, PORT), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, name="sink", daemon=True).start()
    return server
