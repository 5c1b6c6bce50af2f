"""OTLP servers on this machine with faults on demand: gRPC, HTTP, a TCP peer that does as it is told, and a relay.

A server keeps what it took, as raw bytes: `Received.message` reads them with the official classes. `play` says what it
answers next; without that it takes everything. Ports are the kernel's choice and stay the same over `stop` and `start`.
"""

from __future__ import annotations

import contextlib
import importlib
import socket
import ssl
import struct
import subprocess
import threading
import zlib
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any, NamedTuple, Self

from google.protobuf.duration_pb2 import Duration
from opentelemetry.proto.collector.logs.v1 import logs_service_pb2 as logs  # noqa: TID251 - what a server speaks
from opentelemetry.proto.collector.metrics.v1 import metrics_service_pb2 as metrics  # noqa: TID251
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as trace  # noqa: TID251

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

# Packages without types.
grpc: Any = importlib.import_module("grpc")
RetryInfo: Any = importlib.import_module("google.rpc.error_details_pb2").RetryInfo
Status: Any = importlib.import_module("google.rpc.status_pb2").Status

_REQUESTS: dict[str, Any] = {
    "/opentelemetry.proto.collector.logs.v1.LogsService/Export": logs.ExportLogsServiceRequest,
    "/opentelemetry.proto.collector.trace.v1.TraceService/Export": trace.ExportTraceServiceRequest,
    "/opentelemetry.proto.collector.metrics.v1.MetricsService/Export": metrics.ExportMetricsServiceRequest,
    "/v1/logs": logs.ExportLogsServiceRequest,
    "/v1/traces": trace.ExportTraceServiceRequest,
    "/v1/metrics": metrics.ExportMetricsServiceRequest,
}
_MAX_MESSAGE_BYTES = 64 * 1024 * 1024


class Certificates(NamedTuple):
    """Paths of PEM files, all signed by `ca`. The server's are for localhost and 127.0.0.1, one of them expired."""

    ca: str
    server: str
    server_key: str
    expired: str
    expired_key: str
    client: str
    client_key: str


def make_certificates(directory: Path) -> Certificates:
    """Make them with openssl, in a few hundredths of a second. The client's name is `agent`."""

    def path(name: str) -> str:
        return str(directory / name)

    def openssl(*words: str) -> None:
        subprocess.run(["openssl", *words], check=True, capture_output=True, timeout=60)

    def request(name: str, subject: str, *words: str) -> None:
        elliptic = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
        openssl("req", *elliptic, "-subj", f"/CN={subject}", "-keyout", path(f"{name}.key"), *words)

    request("ca", "test-ca", "-x509", "-days", "3650", "-out", path("ca.pem"))
    signer = ("-CA", path("ca.pem"), "-CAkey", path("ca.key"))
    alternative = "subjectAltName=DNS:localhost,IP:127.0.0.1"
    signed = ("-x509", *signer, "-days", "3650", "-addext", "basicConstraints=CA:FALSE")
    request("server", "collector", *signed, "-addext", alternative, "-out", path("server.pem"))
    request("client", "agent", *signed, "-out", path("client.pem"))
    request("expired", "collector", "-out", path("expired.csr"))
    (directory / "alternative").write_text(alternative)
    expired = ("-req", "-in", path("expired.csr"), "-days", "-1", "-extfile", path("alternative"))
    openssl("x509", *expired, *signer, "-out", path("expired.pem"))
    return Certificates(
        *(path(f"{name}") for name in ("ca.pem", "server.pem", "server.key", "expired.pem", "expired.key")),
        *(path(f"{name}") for name in ("client.pem", "client.key")),
    )


class Received(NamedTuple):
    """One request."""

    path: str
    """Of HTTP; of gRPC the method."""
    headers: dict[str, str]
    """Names in lower case; of gRPC the metadata."""
    body: bytes
    """Not compressed any more."""
    client_name: str
    """The common name in the client's certificate; empty without one."""
    connection: str
    """Address and port of the other end."""

    def message(self) -> Any:  # noqa: ANN401 - one of three
        """Read the body with the official class."""
        return _REQUESTS[self.path.partition("?")[0]].FromString(self.body)


class Answer(NamedTuple):
    """How one request is answered."""

    body: bytes = b""
    http_status: int = 200
    grpc_code: str = "OK"
    """Other than OK: `body` is not sent, `message` is."""
    message: str = ""
    retry_after: str | None = None
    date: str | None = None
    """HTTP: of the answer; None: it has none."""
    retry_info_seconds: float | None = None
    location: str | None = None
    content_type: str = "application/x-protobuf"
    until: threading.Event | None = None
    """The answer waits for it; or for the server's end."""
    cut_after: int | None = None
    """HTTP: only so many bytes of the body come, and the connection ends."""

    def status(self) -> bytes:
        """Write the google.rpc.Status of a failure."""
        status = Status(code=14, message=self.message)
        if self.retry_info_seconds is not None:
            delay = Duration()
            delay.FromNanoseconds(int(self.retry_info_seconds * 1e9))
            status.details.add().Pack(RetryInfo(retry_delay=delay))
        written: bytes = status.SerializeToString()
        return written


def partial(rejected: int, message: str = "") -> Answer:
    """Take it but for some; the class for logs writes what those of the other signals write."""
    success = logs.ExportLogsPartialSuccess(rejected_log_records=rejected, error_message=message)
    return Answer(logs.ExportLogsServiceResponse(partial_success=success).SerializeToString())


TOO_LARGE = Answer(
    http_status=413,
    grpc_code="RESOURCE_EXHAUSTED",
    message="grpc: received message larger than max (4194305 vs. 4194304)",
    content_type="text/plain",
)


class _Server:
    """What both servers share."""

    scheme = "http"
    address = "127.0.0.1"
    """IPv4, where it listens."""

    def __init__(self) -> None:
        self.received: list[Received] = []
        self.port = 0
        self.most_bytes = _MAX_MESSAGE_BYTES
        """A larger body is refused as too large, whatever `play` says."""
        self._answers: deque[Answer] = deque()
        self._ended = threading.Event()

    @property
    def url(self) -> str:
        """Where it is."""
        return f"{self.scheme}://localhost:{self.port}"

    def play(self, *answers: Answer) -> None:
        """Answer the next requests like this."""
        self._answers.extend(answers)

    def _take(self, received: Received) -> Answer:
        self.received.append(received)
        if len(received.body) > self.most_bytes:
            return TOO_LARGE
        answer = self._answers.popleft() if self._answers else Answer()
        while answer.until and not answer.until.wait(0.02) and not self._ended.is_set():
            pass
        return answer

    def start(self) -> None:
        """Listen, on the same port as before."""
        raise NotImplementedError

    def stop(self) -> None:
        """Close the port and every connection."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


class HttpServer(_Server):
    """OTLP by HTTP, with TLS if it gets a certificate. A client's certificate is asked for and may be left out."""

    def __init__(self, certificates: Certificates | None = None, *, expired: bool = False) -> None:
        super().__init__()
        self._tls: ssl.SSLContext | None = None
        if certificates:
            self.scheme = "https"
            self._tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            if expired:
                self._tls.load_cert_chain(certificates.expired, certificates.expired_key)
            else:
                self._tls.load_cert_chain(certificates.server, certificates.server_key)
            self._tls.load_verify_locations(certificates.ca)
            self._tls.verify_mode = ssl.CERT_OPTIONAL
        self._server: _Listener | None = None

    def start(self) -> None:  # noqa: D102 - as in _Server
        self._ended.clear()
        self._server = _Listener((self.address, self.port), self._tls, self._take)
        self.port = self._server.server_port
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def stop(self) -> None:  # noqa: D102 - as in _Server
        if self._server:
            self._ended.set()
            self._server.shutdown()
            self._server.server_close()
            self._server.cut()
            self._server = None


class _Listener(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def __init__(
        self, address: tuple[str, int], tls: ssl.SSLContext | None, take: Callable[[Received], Answer]
    ) -> None:
        super().__init__(address, _Handler)
        self.take = take
        self._tls = tls
        self._open: set[Any] = set()

    def get_request(self) -> tuple[socket.socket, Any]:
        request, address = super().get_request()
        if self._tls:
            # The handshake is the handler's, in its own thread.
            request = self._tls.wrap_socket(request, server_side=True, do_handshake_on_connect=False)
        self._open.add(request)
        return request, address

    def shutdown_request(self, request: Any) -> None:  # noqa: ANN401 - as in socketserver
        self._open.discard(request)
        try:
            super().shutdown_request(request)
        finally:
            request.close()  # whatever a handshake that failed has left of it

    def handle_error(self, request: Any, client_address: Any) -> None:  # noqa: ANN401 - as in socketserver
        """Say nothing: clients that go away are what this server is for."""

    def cut(self) -> None:
        """End all connections; their handlers close them."""
        for request in list(self._open):
            with contextlib.suppress(OSError):
                socket.socket.shutdown(request, socket.SHUT_RDWR)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Listener

    def setup(self) -> None:
        self.request.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        super().setup()

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        if wbits := {"gzip": 31, "deflate": 15}.get(self.headers.get("content-encoding", "")):
            body = zlib.decompress(body, wbits)
        headers = {name.lower(): value for name, value in self.headers.items()}
        connection = f"{self.client_address[0]}:{self.client_address[1]}"
        answer = self.server.take(Received(self.path, headers, body, self._client_name(), connection))
        self.send_response_only(answer.http_status)
        content = answer.body
        if answer.message:
            content = answer.status() if "protobuf" in answer.content_type else answer.message.encode()
        self.send_header("Content-Type", answer.content_type)
        self.send_header("Content-Length", str(len(content)))
        for name, value in (("Retry-After", answer.retry_after), ("Date", answer.date), ("Location", answer.location)):
            if value is not None:
                self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content if answer.cut_after is None else content[: answer.cut_after])
        self.close_connection = answer.cut_after is not None

    def _client_name(self) -> str:
        shown: Any = self.connection.getpeercert() if isinstance(self.connection, ssl.SSLSocket) else None
        return dict(pair for part in shown["subject"] for pair in part)["commonName"] if shown else ""

    def log_message(self, *_: object) -> None:
        """Say nothing."""


class GrpcServer(_Server):
    """OTLP by gRPC: on a port, with TLS if it gets a certificate (a client's then is needed if `mutual`), or a path."""

    def __init__(
        self,
        certificates: Certificates | None = None,
        *,
        expired: bool = False,
        mutual: bool = False,
        unix: Path | None = None,
    ) -> None:
        super().__init__()
        self._credentials: Any = None
        if certificates:
            self.scheme = "https"
            pair = (certificates.server_key, certificates.server)
            if expired:
                pair = (certificates.expired_key, certificates.expired)
            key, chain, ca = (_read(path) for path in (*pair, certificates.ca))
            self._credentials = grpc.ssl_server_credentials([(key, chain)], ca if mutual else None, mutual)
        self._unix = unix
        self._server: Any = None

    def start(self) -> None:  # noqa: D102 - as in _Server
        self._ended.clear()
        self._server = grpc.server(
            ThreadPoolExecutor(8),
            options=(("grpc.max_receive_message_length", _MAX_MESSAGE_BYTES), ("grpc.so_reuseport", 0)),
        )
        self._server.add_generic_rpc_handlers((_methods(self._call),))
        if self._unix:
            self._server.add_insecure_port(f"unix:{self._unix}")
        elif self._credentials:
            self.port = self._server.add_secure_port(f"{self.address}:{self.port}", self._credentials)
        else:
            self.port = self._server.add_insecure_port(f"{self.address}:{self.port}")
        self._server.start()

    def stop(self) -> None:  # noqa: D102 - as in _Server
        if self._server:
            self._ended.set()
            self._server.stop(0).wait(10)
            self._server = None

    def _call(self, path: str, body: bytes, context: Any) -> bytes:  # noqa: ANN401 - a package without types
        headers = {key: value for key, value in context.invocation_metadata()}  # noqa: C416 - pairs of a class of gRPC's
        names = context.auth_context().get("x509_common_name", [b""])
        answer = self._take(Received(path, headers, body, names[0].decode(), context.peer()))
        if answer.grpc_code == "OK":
            return answer.body
        if answer.message or answer.retry_info_seconds is not None:
            context.set_trailing_metadata((("grpc-status-details-bin", answer.status()),))
        context.abort(grpc.StatusCode[answer.grpc_code], answer.message)
        raise AssertionError("abort raises")


def _methods(call: Callable[[str, bytes, Any], bytes]) -> Any:  # noqa: ANN401 - a package without types
    """Handle every method there is, with bytes for messages."""

    class Handler(grpc.GenericRpcHandler):  # type: ignore[misc] # a package without types
        def service(self, details: Any) -> Any:  # noqa: ANN401 - a package without types
            return grpc.unary_unary_rpc_method_handler(lambda body, context: call(details.method, body, context))

    return Handler()


class TcpPeer:
    """Listens and treats each connection as `script` says, in a thread of its own; without one it never accepts."""

    def __init__(self, script: Callable[[socket.socket], None] | None = None, backlog: int = 64) -> None:
        self._script = script
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=backlog)
        self._open: list[socket.socket] = []
        self.port: int = self._listener.getsockname()[1]

    def __enter__(self) -> Self:
        if self._script:
            threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        for peer in (self._listener, *self._open):
            with contextlib.suppress(OSError):
                peer.shutdown(socket.SHUT_RDWR)
            peer.close()

    def fill(self) -> None:
        """Fill the queue of a peer that never accepts: whoever connects now gets no answer."""
        for _ in range(8):
            client = socket.socket()
            self._open.append(client)
            client.settimeout(0)
            client.connect_ex(("127.0.0.1", self.port))

    def _accept(self) -> None:
        while True:
            try:
                peer, _ = self._listener.accept()
            except OSError:
                return
            self._open.append(peer)
            threading.Thread(target=self._treat, args=(peer,), daemon=True).start()

    def _treat(self, peer: socket.socket) -> None:
        assert self._script
        with contextlib.suppress(OSError):
            self._script(peer)
        with contextlib.suppress(OSError):
            peer.close()


class Relay(TcpPeer):
    """Passes bytes between a client and a server on this machine; counts what the client sent."""

    def __init__(self, port: int, answer_bytes: int | None = None) -> None:
        """Without `answer_bytes` everything passes; else so many bytes of answers, then the connection is reset."""
        super().__init__(self._pass)
        self.sent_bytes = 0
        self.answer_bytes = answer_bytes
        self._server_port = port

    def _pass(self, client: socket.socket) -> None:
        with socket.create_connection(("127.0.0.1", self._server_port)) as server:
            back = threading.Thread(target=self._back, args=(server, client), daemon=True)
            back.start()
            with contextlib.suppress(OSError):
                while data := client.recv(65536):
                    self.sent_bytes += len(data)
                    server.sendall(data)
            with contextlib.suppress(OSError):
                server.shutdown(socket.SHUT_RDWR)
            back.join()

    def _back(self, server: socket.socket, client: socket.socket) -> None:
        passed = 0
        with contextlib.suppress(OSError):
            while data := server.recv(65536):
                limit = self.answer_bytes
                client.sendall(data if limit is None else data[: limit - passed])
                passed += len(data)
                if limit is not None and passed >= limit:
                    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    break
        with contextlib.suppress(OSError):
            client.shutdown(socket.SHUT_RDWR)


@contextlib.contextmanager
def closed_port() -> Any:  # noqa: ANN401 - an iterator to mypy, a context to who uses it
    """Hold a port that refuses connections."""
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        yield holder.getsockname()[1]


def _read(path: str) -> bytes:
    with open(path, "rb") as file:  # noqa: PTH123 - a path that is a text
        return file.read()
