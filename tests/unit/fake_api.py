"""A small API server on loopback for tests: nodes, Services and EndpointSlices, lists and watches, and its moods.

Just enough of the API for one client: what matters about the protocol is tested from recorded answers.
"""

from __future__ import annotations

import json
import ssl
import threading
import time
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any, NamedTuple, Self, cast
from urllib.parse import parse_qs, urlsplit

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

SERVICES = "/api/v1/services"
SLICES = "/apis/discovery.k8s.io/v1/endpointslices"
NODES = "/api/v1/nodes"
SYSTEM = "/api/v1/namespaces/kube-system"

# Self-signed for 127.0.0.1, for a hundred years; they protect nothing.
CERTIFICATE_A = """\
-----BEGIN CERTIFICATE-----
MIIBmjCCAUCgAwIBAgIUc5jDNRVBguqQs0TDYGE9BiFlKnwwCgYIKoZIzj0EAwIw
ETEPMA0GA1UEAwwGdGVzdC1hMCAXDTI2MTEyMTE0MDc1OFoYDzIxMjYxMDI4MTQw
NzU4WjARMQ8wDQYDVQQDDAZ0ZXN0LWEwWTATBgcqhkjOPQIBBggqhkjOPQMBBwNC
AARfCa+clS52X65mjDdD+84QvLA/T1l0wdpDtUDbz6yJViPKJpLV+ER/R4jmNWuZ
6CxEtbFCd6iW3aFI/hVAOmdfo3QwcjAdBgNVHQ4EFgQUARObK0HlbF5i1tYAcVBq
9VSNtSUwHwYDVR0jBBgwFoAUARObK0HlbF5i1tYAcVBq9VSNtSUwDwYDVR0RBAgw
BocEfwAAATAPBgNVHRMBAf8EBTADAQH/MA4GA1UdDwEB/wQEAwIChDAKBggqhkjO
PQQDAgNIADBFAiEAtCz5yKxLIO4u5Z2XDgQjTvS9UTUAZYF7fK/LTYLtJJwCIGe8
0yliIjEOKvaTBEXn/naNaUXYENCQKsT1y7aBf1tB
-----END CERTIFICATE-----
"""
CERTIFICATE_B = """\
-----BEGIN CERTIFICATE-----
MIIBmTCCAUCgAwIBAgIUaPKfTEEQmU9YeDSr2Bg9EKZUvmIwCgYIKoZIzj0EAwIw
ETEPMA0GA1UEAwwGdGVzdC1iMCAXDTI2MTEyMTE0MDc1OFoYDzIxMjYxMDI4MTQw
NzU4WjARMQ8wDQYDVQQDDAZ0ZXN0LWIwWTATBgcqhkjOPQIBBggqhkjOPQMBBwNC
AARDOrSnbVRstEjrGGDdOgrq7Y54qJzqQXbwLJmH3UxcMXG01Ezs4++zXUqCeg7V
OyvEb8GrxHp6v8Q1Y0lDvWTUo3QwcjAdBgNVHQ4EFgQUdJJBzjh51c6WgKb+lrNO
D+XnT+swHwYDVR0jBBgwFoAUdJJBzjh51c6WgKb+lrNOD+XnT+swDwYDVR0RBAgw
BocEfwAAATAPBgNVHRMBAf8EBTADAQH/MA4GA1UdDwEB/wQEAwIChDAKBggqhkjO
PQQDAgNHADBEAiAxjtAp8XGn4RNwVPO34dkcLwB7e+YZGNXrleft2VbrJQIgKQAK
4bR6jmgx/VI+krRrni+NpnYT4Xaaj8c5+IH3U2E=
-----END CERTIFICATE-----
"""
KEY = """\
-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQg07f+7xjwbl2M9WrS
Pb63GfOgmTx0O/phWYdvfEcG4bGhRANCAARfCa+clS52X65mjDdD+84QvLA/T1l0
wdpDtUDbz6yJViPKJpLV+ER/R4jmNWuZ6CxEtbFCd6iW3aFI/hVAOmdf
-----END PRIVATE KEY-----
"""


class Asked(NamedTuple):
    """One request that came in; the headers' names in lower case."""

    path: str
    query: dict[str, str]
    headers: dict[str, str]


class FakeApi:
    """The server. `moods` says for a path, or its beginning, what is done instead of answering."""

    def __init__(self, tls: Path | None = None) -> None:
        self.moods: dict[str, Callable[[Handler], None]] = {}
        self.tokens: set[str] | None = None
        self.asked: list[Asked] = []
        self.version = 100
        self.changed = threading.Condition()
        self.objects: dict[str, dict[str, Any]] = {SERVICES: {}, SLICES: {}, NODES: {}}
        self.events: list[tuple[int, str, str, Any]] = []
        self._tls = tls
        self._server: Server | None = None
        self.port = 0

    def __enter__(self) -> Self:
        """Start it on a port that stays the same."""
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop it."""
        self.stop()

    @property
    def url(self) -> str:
        """Where it is."""
        return f"{'https' if self._tls else 'http'}://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Listen."""
        self._server = Server(("127.0.0.1", self.port), Handler)
        self._server.api = self
        self.port = self._server.server_address[1]
        if self._tls:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            (self._tls / "server.pem").write_text(KEY + CERTIFICATE_A)
            context.load_cert_chain(self._tls / "server.pem")
            self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def stop(self) -> None:
        """Stop listening and drop every connection."""
        server, self._server = self._server, None
        if server:
            server.shutdown()
            server.server_close()
            server.drop()
        with self.changed:
            self.changed.notify_all()

    def put(self, path: str, name: str, **fields: object) -> None:
        """Create or change an object of the namespace `default`, or a node."""
        with self.changed:
            self.version += 1
            metadata = {"name": name, "resourceVersion": str(self.version)}
            if path != NODES:
                metadata["namespace"] = "default"
            kind = "MODIFIED" if name in self.objects[path] else "ADDED"
            self.objects[path][name] = {"metadata": metadata, **fields}
            self.events.append((self.version, path, kind, self.objects[path][name]))
            self.changed.notify_all()

    def delete(self, path: str, name: str) -> None:
        """Delete an object."""
        with self.changed:
            self.version += 1
            self.events.append((self.version, path, "DELETED", self.objects[path].pop(name)))
            self.changed.notify_all()

    def count(self, path: str, *, watch: bool | None = None) -> int:
        """Count the requests for a path; only watches, or all but watches, if told so."""
        return sum(each.path == path and watch in {None, "watch" in each.query} for each in self.asked)

    def serves(self, server: object) -> bool:
        """Whether this is still the one that listens."""
        return self._server is server


class Server(ThreadingHTTPServer):
    """The socket; it knows its connections, to drop them."""

    daemon_threads = True
    block_on_close = False
    api: FakeApi

    def __init__(self, *arguments: Any) -> None:  # noqa: ANN401 - as the base class
        super().__init__(*arguments)
        self._connections: list[Any] = []

    def process_request(self, request: Any, client_address: Any) -> None:  # noqa: ANN401 - as the base class
        """Keep the connection in mind."""
        self._connections.append(request)
        super().process_request(request, client_address)

    def handle_error(self, request: object, client_address: object) -> None:
        """Say nothing when a client goes away."""

    def drop(self) -> None:
        """Close all connections."""
        for each in self._connections:
            with suppress(OSError):
                each.shutdown(2)


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"

    @property
    def api(self) -> FakeApi:
        """The server's state."""
        return cast("Server", self.server).api

    def log_message(self, *_: object) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        """Answer by mood, or as the API does."""
        parts = urlsplit(self.path)
        query = {name: values[0] for name, values in parse_qs(parts.query).items()}
        headers = {name.lower(): value for name, value in self.headers.items()}
        self.api.asked.append(Asked(parts.path, query, headers))
        mood = max((each for each in self.api.moods if self.path.startswith(each)), key=len, default=None)
        if mood is not None:
            self.api.moods[mood](self)
        elif self.api.tokens is not None and self.headers["Authorization"] not in self.api.tokens:
            self.refuse(401, "Unauthorized")
        elif parts.path == SYSTEM:
            self.answer({"metadata": {"name": "kube-system", "uid": "uid-of-kube-system"}})
        elif parts.path not in self.api.objects:
            self.answer_node(parts.path.rpartition("/")[2])
        elif "watch" in query:
            self.watch(parts.path, query)
        else:
            with self.api.changed:
                metadata = {"resourceVersion": str(self.api.version)}
                items = list(self.api.objects[parts.path].values())
            self.answer({"kind": "List", "metadata": metadata, "items": items})

    def answer_node(self, name: str) -> None:
        """Answer one node, or that there is none."""
        node = self.api.objects[NODES].get(name)
        if node:
            self.answer(node)
        else:
            self.refuse(404, f'nodes "{name}" not found')

    def watch(self, path: str, query: dict[str, str]) -> None:
        """Answer events as they come."""
        self.begin()
        seen = int(query["resourceVersion"])
        deadline = time.monotonic() + int(query["timeoutSeconds"])
        with self.api.changed:
            while time.monotonic() < deadline and self.api.serves(self.server):
                for version, where, kind, raw in self.api.events:
                    if where == path and version > seen:
                        seen = version
                        self.chunk(json.dumps({"type": kind, "object": version_of(raw, version)}).encode() + b"\n")
                self.api.changed.wait(max(0.0, deadline - time.monotonic()))
        self.chunk(b"")

    def answer(self, body: object, status: int = 200, **headers: str) -> None:
        """Answer a whole document."""
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(raw)), "Content-Type": "application/json", **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(raw)

    def refuse(self, status: int, message: str, **headers: str) -> None:
        """Answer a Status."""
        self.answer({"kind": "Status", "status": "Failure", "message": message, "code": status}, status, **headers)

    def begin(self) -> None:
        """Begin an answer in chunks."""
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()

    def chunk(self, data: bytes) -> None:
        """Send a chunk; an empty one is the end."""
        self.wfile.write(b"%x\r\n%b\r\n" % (len(data), data))
        self.wfile.flush()


def version_of(raw: dict[str, Any], version: int) -> dict[str, Any]:
    """Give an object as of this version, as the event of a deletion has it."""
    return raw | {"metadata": raw["metadata"] | {"resourceVersion": str(version)}}


def write_kubeconfig(path: Path, url: str, **user: str) -> str:
    """Write a kubeconfig file for a server and a user; gives its path."""
    config = {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "c", "cluster": {"server": url}}],
        "users": [{"name": "u", "user": user}],
        "contexts": [{"name": "x", "context": {"cluster": "c", "user": "u"}}],
        "current-context": "x",
    }
    path.write_text(json.dumps(config))
    return str(path)
