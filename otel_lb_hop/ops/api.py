"""The local HTTP API: /healthz and /readyz. Loopback by default; read only."""

from __future__ import annotations

import json
import socket
import threading
import time
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socketserver import TCPServer
from typing import TYPE_CHECKING, Any, ClassVar

from otel_lb_hop.errors import ConfigError, Problem

if TYPE_CHECKING:
    from otel_lb_hop.ops.health import Health

REQUEST_SECONDS = 5


class _Handler(BaseHTTPRequestHandler):
    health: ClassVar[Health]
    timeout = REQUEST_SECONDS

    def do_GET(self) -> None:
        now = time.monotonic()
        if self.path == "/healthz":
            alive = self.health.alive(now)
            self._answer(alive, {"alive": alive})
        elif self.path == "/readyz":
            ready = self.health.ready(now)
            parts = {name: state._asdict() for name, state in self.health.parts().items()}
            degraded = sorted(name for name, state in parts.items() if not state["healthy"])
            self._answer(ready, {"ready": ready, "degraded": degraded, "parts": parts})
        else:
            self.send_error(HTTPStatus.NOT_FOUND, "there are /healthz and /readyz")

    def _answer(self, good: bool, content: dict[str, Any]) -> None:  # noqa: FBT001 - one place, one meaning
        body = json.dumps(content, indent=2).encode() + b"\n"
        self.send_response(HTTPStatus.OK if good else HTTPStatus.SERVICE_UNAVAILABLE)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class names it
        """Say nothing: probes come every few seconds."""


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, address: tuple[str, int], handler: type[_Handler]) -> None:
        if ":" in address[0]:
            self.address_family = socket.AF_INET6
        super().__init__(address, handler)

    def server_bind(self) -> None:
        """Bind without asking for the host's name as HTTPServer does: without a DNS server that takes seconds."""
        TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])


class LocalApi:
    """The server in a thread of its own."""

    def __init__(self, listen: tuple[str, int], health: Health) -> None:
        handler = type("Handler", (_Handler,), {"health": health})
        try:
            self._server = _Server(listen, handler)
        except OSError as error:
            problem = Problem("OTEL_LB_HOP_LISTEN", f"{listen[0]}:{listen[1]}", f"a free local address: {error}")
            raise ConfigError([problem]) from error
        self.port = int(self._server.server_address[1])
        self._thread = threading.Thread(target=self._server.serve_forever, name="api", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop listening."""
        self._server.shutdown()
        self._server.server_close()
