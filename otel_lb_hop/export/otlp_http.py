"""OTLP by HTTP/1.1 with protobuf, over one connection that is kept.

Written on http.client: with requests or urllib3 a time-out counts from byte to byte, here it bounds the whole attempt,
and another thread can end a request that hangs.
"""

from __future__ import annotations

import contextlib
import http.client
import io
import select
import socket
import ssl
import threading
import time
import zlib
from typing import TYPE_CHECKING, cast

from otel_lb_hop.errors import ConfigError
from otel_lb_hop.export.answer import one_line, partial_success, retry_after_seconds, status_message
from otel_lb_hop.export.delivery import Reply
from otel_lb_hop.export.otlp_settings import OTLP, without_secret
from otel_lb_hop.export.transport import CONNECT_SECONDS, tls_context, wrap

if TYPE_CHECKING:
    from collections.abc import Callable

    from _typeshed import WriteableBuffer

    from otel_lb_hop.export.delivery import Chunk
    from otel_lb_hop.export.otlp_settings import HttpSettings, Tls

_RETRY_STATUS = frozenset({429, 502, 503, 504})
"""Of the OTLP specification, "Retryable Response Codes"."""
_INTERIM = range(102, 200)
"""Status of an answer before the answer: 100 is http.client's to skip, and 101 is an answer."""
_ENDED = (ConnectionResetError, BrokenPipeError, ssl.SSLEOFError)
"""The other side has ended the connection; the last is what writing by TLS makes of the others."""
_ANSWER_BYTES = 64 * 1024
_LEVEL = 1
_WBITS = {"gzip": 31, "deflate": 15}
"""Of zlib: which header it writes around the same compression."""


class HttpSink:
    """One signal's way to an OTLP HTTP server. `Sink` says what its methods promise."""

    def __init__(self, settings: HttpSettings, wall_seconds: Callable[[], float] = time.time) -> None:
        """Read the files of TLS, which raises ConfigError if they are no good; connect to nobody yet.

        `wall_seconds` tells the time, in seconds of the epoch, from which a date in an answer is counted.
        """
        host = f"[{settings.host}]" if ":" in settings.host else settings.host
        scheme, usual_port = ("https", http.client.HTTPS_PORT) if settings.tls else ("http", http.client.HTTP_PORT)
        place = f"{scheme}://{host}" + (f":{settings.port}" if settings.port != usual_port else "")
        self.name = OTLP
        self.place = place + settings.path.partition("?")[0]
        self._settings = settings
        self._wall_seconds = wall_seconds
        self._headers = dict(settings.headers)
        self._target = settings.path
        if settings.proxy and not settings.tls:
            self._target = place + settings.path
            if settings.proxy.authorization:
                self._headers["proxy-authorization"] = settings.proxy.authorization
        self._tls = _client_tls(settings.tls) if settings.tls else None
        self._lock = threading.Lock()
        self._sending = threading.Lock()
        self._connection: _Connection | None = None
        self._closed = False

    def send(self, chunks: list[Chunk], timeout_seconds: float | None = None) -> Reply:
        """Make one attempt, as `Sink` says; looking up a name is the one step that no limit holds for."""
        limit = self._settings.timeout_seconds
        deadline = time.monotonic() + (limit if timeout_seconds is None else min(limit, timeout_seconds))
        with self._sending:
            try:
                response = self._exchange(chunks, deadline)
                reply = self._read(response, sum(chunk.items for chunk in chunks))
            except (OSError, http.client.HTTPException, ValueError, ConfigError) as error:
                self._drop()
                if isinstance(error, ssl.SSLError):
                    self._tls = None  # its files may have been renewed
                # An answer with more headers than anybody sends by chance is one: the same would come again.
                retry = not (isinstance(error, http.client.LineTooLong) or type(error) is http.client.HTTPException)
                return Reply(taken=False, retry=retry, detail=one_line(f"{type(error).__name__}: {error}"))
            if self._closed or not response.isclosed():
                self._drop()
            return reply

    def close(self) -> None:
        """Let go, as `Sink` says; a request under way fails at once."""
        with self._lock:
            self._closed = True
            if self._connection:
                self._connection.cut()
        if self._sending.acquire(blocking=False):  # else the one who sends notices
            self._drop()
            self._sending.release()

    def _exchange(self, chunks: list[Chunk], deadline: float) -> http.client.HTTPResponse:
        """Send a request and get the head of its answer."""
        kept = self._connection
        connection = self._open(deadline)
        body = self._compressed(wrap(chunks))
        try:
            return connection.exchange(self._target, body, self._headers)
        except _ENDED:
            if connection is not kept or connection.answered:
                raise
        # The other side gave the connection up just as it was used again (RFC 9112 9.3.1), which is no failure.
        self._drop()
        return self._open(deadline).exchange(self._target, body, self._headers)

    def _open(self, deadline: float) -> _Connection:
        """Give a connection that is connected."""
        if self._connection and self._connection.is_stale():
            self._drop()
        with self._lock:
            if self._closed:
                raise ValueError("the sink is closed")
            if not self._connection:
                if self._settings.tls and not self._tls:
                    self._tls = _client_tls(self._settings.tls)
                self._connection = _Connection(self._settings, self._tls)
            connection = self._connection
        connection.deadline = deadline
        if connection.sock is None:
            connection.connect()  # before the work on a body that may have nowhere to go
        return connection

    def _drop(self) -> None:
        with self._lock:
            connection, self._connection = self._connection, None
        if connection:
            connection.close()

    def _compressed(self, body: bytes) -> bytes:
        wbits = _WBITS.get(self._settings.compression)
        return zlib.compress(body, _LEVEL, wbits) if wbits else body

    def _read(self, response: http.client.HTTPResponse, items: int) -> Reply:
        """Make a reply of an answer, of which the status is there and the body may yet fail."""
        status = response.status
        success = 200 <= status < 300  # noqa: PLR2004 - the class of success, RFC 9110 15.3
        try:
            body = response.read(_ANSWER_BYTES)
            if success and not _is_page(response, body):
                rejected, message = partial_success(body)
                return Reply(taken=True, rejected=min(rejected, items), detail=message)
        except (OSError, http.client.HTTPException, ValueError) as error:
            if success:
                return Reply(taken=True, detail=one_line(f"taken, with an answer that cannot be read: {error}"))
            body = b""
        if success:
            # Of a proxy that wants a login, say, or of another server: nobody has taken anything.
            message = "a web page, and no answer of an OTLP server"
        elif 300 <= status < 400:  # noqa: PLR2004 - the class of redirection, RFC 9110 15.4
            place = without_secret(response.headers.get("location", "nowhere"))
            message = f"redirected to {place}; redirects are not followed"
        elif "protobuf" in response.headers.get_content_type():
            message = status_message(body)
        else:
            message = body.decode("utf-8", "replace")
        retry = status in _RETRY_STATUS
        wait_seconds = None
        if retry:
            after, date = response.headers.get("retry-after"), response.headers.get("date")
            wait_seconds = retry_after_seconds(after, date, self._wall_seconds())
        detail = one_line(f"HTTP {status} {response.reason}: {message}")
        too_large = status == http.client.REQUEST_ENTITY_TOO_LARGE
        return Reply(taken=False, retry=retry, retry_after_seconds=wait_seconds, too_large=too_large, detail=detail)


def _is_page(response: http.client.HTTPResponse, body: bytes) -> bool:
    # No message of protobuf begins with this sign, and none of JSON.
    return response.headers.get_content_type() == "text/html" or body.lstrip().startswith(b"<")


def _client_tls(tls: Tls) -> ssl.SSLContext:
    context = tls_context(tls)
    if not tls.ca:
        import certifi  # noqa: PLC0415 - only for who trusts the public

        context.load_verify_locations(certifi.where())
    return context


class _Connection(http.client.HTTPConnection):
    """A connection whose every step ends at `deadline` (monotonic seconds), and that another thread can cut."""

    def __init__(self, settings: HttpSettings, tls: ssl.SSLContext | None) -> None:
        proxy = settings.proxy
        super().__init__(proxy.host if proxy else settings.host, proxy.port if proxy else settings.port)
        if proxy and tls:
            authorization = {"Proxy-Authorization": proxy.authorization} if proxy.authorization else {}
            self.set_tunnel(settings.host, settings.port, authorization)
        self.default_port = http.client.HTTPS_PORT if tls else http.client.HTTP_PORT
        self.deadline = 0.0
        self.answered = False
        """Whether anything came in since the request began."""
        self.response_class = cast("type[http.client.HTTPResponse]", self._response)
        self._through_proxy = bool(proxy and tls)
        self._tls = tls
        self._tls_name = settings.host
        self._peer: socket.socket | None = None
        self._was_cut = False

    def connect(self) -> None:
        """Connect, by TLS if so set, within `CONNECT_SECONDS`."""
        places = socket.getaddrinfo(self.host, self.port, type=socket.SOCK_STREAM)
        deadline = self.deadline
        self.deadline = min(deadline, time.monotonic() + CONNECT_SECONDS)
        for left, (family, kind, number, _, address) in zip(range(len(places), 0, -1), places, strict=True):
            try:
                self.sock = self._peer = socket.socket(family, kind, number)
                self.sock.settimeout(self.left() / left)  # for one that swallows all must leave time for the others
                self.sock.connect(address)
                break
            except OSError:
                if left == 1:
                    raise
                self.close()
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if self._through_proxy:
            self._tunnel()  # type: ignore[attr-defined] # http.client's own, which only its connect calls
        if self._tls:
            # Not in wrap_socket, which leaves nobody a socket to cut.
            self.sock = self._peer = self._tls.wrap_socket(
                self.sock, server_hostname=self._tls_name, do_handshake_on_connect=False
            )
            self.sock.settimeout(self.left())
            self.sock.do_handshake()
        self.deadline = deadline

    def exchange(self, target: str, body: bytes, headers: dict[str, str]) -> http.client.HTTPResponse:
        """Send a request and wait for the head of its answer."""
        self.answered = False
        # If the other side wants no more of it, it may have answered why.
        with contextlib.suppress(*_ENDED):
            self.request("POST", target, body, headers)
        return self.getresponse()

    def send(self, data: bytes) -> None:  # type: ignore[override] # there is nothing else to send here
        """Send all of it, without a copy."""
        view = memoryview(data)
        while view:
            self.sock.settimeout(self.left())
            view = view[self.sock.send(view) :]

    def is_stale(self) -> bool:
        """Whether the other side closed the connection while it was not used."""
        if self.sock is None:
            return False
        poll = select.poll()
        poll.register(self.sock, select.POLLIN)
        return bool(poll.poll(0))

    def cut(self) -> None:
        """Make whatever hangs in another thread fail."""
        self._was_cut = True
        if self._peer:
            with contextlib.suppress(OSError):
                socket.socket.shutdown(self._peer, socket.SHUT_RDWR)

    def left(self) -> float:
        """Tell how many seconds are left; raises what ends the attempt."""
        if self._was_cut:
            raise ConnectionAbortedError("the sink is closed")
        seconds = self.deadline - time.monotonic()
        if seconds <= 0:
            raise TimeoutError("timed out")
        return seconds

    def _response(self, sock: socket.socket, method: str | None = None) -> http.client.HTTPResponse:
        return _Response(cast("socket.socket", _Incoming(sock, self)), method=method)


class _Response(http.client.HTTPResponse):
    """An answer; those that only announce it (RFC 9110 15.2) are skipped."""

    def _read_status(self) -> tuple[str, int, str]:
        while True:
            version, status, reason = super()._read_status()  # type: ignore[misc] # http.client's own
            if status not in _INTERIM:
                return version, status, reason
            http.client.parse_headers(self.fp)


class _Incoming(io.RawIOBase):
    """What comes in by a connection's socket, until its deadline."""

    def __init__(self, sock: socket.socket, connection: _Connection) -> None:
        self._sock = sock
        self._connection = connection
        self._file = sock.makefile("rb", buffering=0)  # it keeps the socket open as long as somebody reads

    def makefile(self, _mode: str) -> io.BufferedReader:
        """Be to `HTTPResponse` what a socket is."""
        return io.BufferedReader(self)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer) -> int | None:
        self._sock.settimeout(self._connection.left())
        count = self._file.readinto(buffer)
        self._connection.answered |= bool(count)
        return count

    def close(self) -> None:
        self._file.close()
        super().close()
