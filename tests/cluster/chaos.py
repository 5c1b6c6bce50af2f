"""A front before the API server that fails as a server, a proxy or a network can, told how while it runs.

    with Front(plane, 7001) as front:
        settings = plane.agent_settings(server=front.url)
        front.fail(chaos.refusal(503, "ServiceUnavailable"))
        ...
        front.heal()

It takes one request on each connection and hands it on with its token, over TLS on both sides; what comes back is
passed through as it comes. A failure meets requests, and breaks off what is under way; `silence` meets connections.
"""

from __future__ import annotations

import contextlib
import json
import socket
import ssl
import threading
import time
from dataclasses import dataclass, field
from http import HTTPStatus
from http.client import HTTPResponse
from typing import TYPE_CHECKING, NamedTuple, Self, TypeAlias
from urllib.parse import parse_qs, urlsplit

from tests.cluster.control_plane import PORT

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.cluster.control_plane import ControlPlane

MAX_HEAD_BYTES = 2**16
DRIPS = 50


class Request(NamedTuple):
    """One request that came in: when (monotonic clock), for what, and the failure that met it (empty for none)."""

    seconds: float
    method: str
    resource: str
    verb: str
    target: str
    failure: str


@dataclass
class Exchange:
    """One request and what an act may do with it. Its connection ends with the act, unless it is `kept`."""

    client: ssl.SSLSocket
    reach: Callable[[], ssl.SSLSocket]
    server: ssl.SSLSocket | None = None
    silent: bool = False
    kept: bool = False
    head: bytes = b""
    verb: str = ""
    resource: str = ""

    def relay(self) -> None:
        """Pass the real answer through as it comes."""
        server = self._ask()
        while data := server.recv(2**16):
            if self.silent:
                self.kept = True
                return
            self.client.sendall(data)

    def body(self) -> bytes:
        """Get the body of the real answer, whole."""
        answer = HTTPResponse(self._ask())
        answer.begin()
        return answer.read()

    def drop(self) -> None:
        """Break off both sides, whatever their threads are doing."""
        for each in (self.client, self.server):
            if each is not None:
                with contextlib.suppress(OSError):
                    # Not SSLSocket's own, which takes the TLS state away from under another thread.
                    socket.socket.shutdown(each, socket.SHUT_RDWR)

    def _ask(self) -> ssl.SSLSocket:
        lines = self.head.split(b"\r\n")
        lines = [lines[0], b"Connection: close", *(line for line in lines[1:] if not line.lower().startswith(b"conn"))]
        self.server = self.reach()
        self.server.sendall(b"\r\n".join(lines))
        return self.server


Act: TypeAlias = "Callable[[Exchange], None]"


@dataclass
class Front:
    """The front, on the lab's mgmt host, with the API server's own certificate. Use it as a context."""

    plane: ControlPlane
    port: int
    log: list[Request] = field(default_factory=list)
    _failure: tuple[Act, str, str] | None = None
    _deaf: bool = False
    _exchanges: list[Exchange] = field(default_factory=list)
    _listener: socket.socket | None = None

    def __post_init__(self) -> None:
        certificate, key = (str(self.plane.folder / f"tls.{kind}") for kind in ("crt", "key"))
        self._toward_clients = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._toward_clients.load_cert_chain(certificate, key)
        self._toward_server = ssl.create_default_context(cafile=certificate)
        self._host = self.plane.lab.mgmt

    def __enter__(self) -> Self:
        self.heal()
        return self

    def __exit__(self, *_: object) -> None:
        self.refuse()
        for each in [*self._exchanges]:
            each.drop()
            each.client.close()

    @property
    def url(self) -> str:
        """Where it is."""
        return f"https://{self._host.address4}:{self.port}"

    def fail(self, act: Act, name: str = "failure", resource: str = "") -> None:
        """Let this act meet each request (for one resource or all); what is under way for it breaks off."""
        self._failure = act, name, resource
        for each in [*self._exchanges]:
            if resource in {"", each.resource} and not each.kept:
                each.drop()

    def silence(self, *, newcomers: bool) -> None:
        """Let nothing more come through, while TCP still acknowledges; with `newcomers` not for new connections either.

        `heal` helps new connections only.
        """
        self._deaf = newcomers
        for each in [*self._exchanges]:
            each.silent = each.kept = True

    def refuse(self) -> None:
        """Let nobody listen, and break off everything; until `heal`."""
        listener, self._listener = self._listener, None
        if listener:
            with contextlib.suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)
            listener.close()
        for each in [*self._exchanges]:
            if not each.kept:
                each.drop()

    def heal(self) -> None:
        """Pass everything through from now on; what was left without an answer stays so."""
        self._failure = None
        self._deaf = False
        if self._listener is None:
            address = self._host.address4, self.port
            self._listener = self._host.in_netns(lambda: socket.create_server(address))
            threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()

    def since(self, begin: float, end: float = float("inf")) -> list[Request]:
        """Give the requests that came from one time to another."""
        return [each for each in self.log if begin <= each.seconds < end]

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                accepted, _ = listener.accept()
            except OSError:
                return  # it was closed
            client = self._toward_clients.wrap_socket(accepted, server_side=True, do_handshake_on_connect=False)
            exchange = Exchange(client, self._reach, kept=self._deaf)
            self._exchanges.append(exchange)
            if not self._deaf:
                threading.Thread(target=self._serve, args=(exchange,), daemon=True).start()

    def _serve(self, exchange: Exchange) -> None:
        with contextlib.suppress(OSError):  # one side has gone, or was dropped
            exchange.client.do_handshake()
            while b"\r\n\r\n" not in exchange.head and len(exchange.head) < MAX_HEAD_BYTES:
                more = exchange.client.recv(2**16)
                if not more:
                    break
                exchange.head += more
            else:
                self._answer(exchange)
        if not exchange.kept:
            self._exchanges.remove(exchange)
            exchange.client.close()
        if exchange.server:
            exchange.server.close()

    def _answer(self, exchange: Exchange) -> None:
        method, target = exchange.head.split(b" ", 2)[:2]
        url = urlsplit(target.decode())
        words = url.path.partition("/v1/")[2].split("/")
        listed = len(words) == 1
        exchange.resource = words[0]
        exchange.verb = "get" if not listed else "watch" if "watch" in parse_qs(url.query) else "list"
        act, name, only = self._failure or (Exchange.relay, "", "")
        if only not in {"", exchange.resource}:
            act, name = Exchange.relay, ""
        self.log.append(
            Request(time.monotonic(), method.decode(), exchange.resource, exchange.verb, target.decode(), name)
        )
        act(exchange)

    def _reach(self) -> ssl.SSLSocket:
        address = self._host.address4
        plain = self._host.in_netns(lambda: socket.create_connection((address, PORT), timeout=5))
        plain.settimeout(None)
        return self._toward_server.wrap_socket(plain, server_hostname=address)


# What is said instead of a real answer.


def status(code: int, reason: str, message: str) -> bytes:
    """Write the Status object that the API tells failures by."""
    told = {"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure"}
    return json.dumps(told | {"message": message, "reason": reason, "code": code}).encode()


def whole(body: bytes, code: int = HTTPStatus.OK, **headers: str) -> bytes:
    """Write an answer of known length."""
    return _head(code, Content_Length=str(len(body)), **headers) + body


def chunked(*lines: bytes) -> bytes:
    """Write the beginning of an answer in chunks, each of one line."""
    return _head(HTTPStatus.OK, Transfer_Encoding="chunked") + b"".join(
        b"%x\r\n%b\n\r\n" % (len(line) + 1, line) for line in lines
    )


def _head(code: int, **headers: str) -> bytes:
    fields = {"Content-Type": "application/json", "Connection": "close", **headers}
    lines = [f"HTTP/1.1 {code} {HTTPStatus(code).phrase}"]
    lines += [f"{name.replace('_', '-')}: {text}" for name, text in fields.items()]
    return "\r\n".join([*lines, "", ""]).encode()


LAST_CHUNK = b"0\r\n\r\n"
HALF_LINE = b'{"type":"MODIFIED","object":{"kind":"Serv'


# Acts: what is done with a request.


def instead(*, watch: bytes | None, document: Callable[[bytes], bytes] | None) -> Act:
    """Answer a watch with these bytes, anything else with what is made of the real body; None for the real answer."""

    def act(exchange: Exchange) -> None:
        if exchange.verb == "watch":
            if watch is None:
                exchange.relay()
            else:
                exchange.client.sendall(watch)
        elif document is None:
            exchange.relay()
        else:
            exchange.client.sendall(document(exchange.body()))

    return act


def always(answer: bytes) -> Act:
    """Answer everything with these bytes; the API server hears nothing of it."""
    return lambda exchange: exchange.client.sendall(answer)


def refusal(code: int, reason: str, message: str = "chaos says no", **headers: str) -> Act:
    """Refuse with a Status."""
    return always(whole(status(code, reason, message), code, **headers))


def error_event(code: int, reason: str, message: str) -> Act:
    """Let each watch end with an ERROR event; anything else works."""
    event = b'{"type":"ERROR","object":%b}' % status(code, reason, message)
    return instead(watch=chunked(event) + LAST_CHUNK, document=None)


eof = instead(
    watch=chunked() + b"29\r\n" + HALF_LINE + b"\r\n",
    document=lambda body: whole(body)[: -len(body) // 2],
)
"""The connection ends in the middle of a body, or of a watch's line."""

broken_chunk = instead(
    watch=chunked() + b"1000\r\n" + HALF_LINE,
    document=lambda body: chunked(body[: len(body) // 2]) + b"xyz\r\n",
)
"""A chunk breaks off; in a LIST there is none where its size should be."""

no_http = always(b"SSH-2.0-OpenSSH_9.2p1\r\n\x00\xff\x00\xff")
garbled_line = instead(watch=chunked(b'{"type":"ADDED",,,\xff'), document=None)
"""A line of a watch is no JSON; LIST works."""

broken_json = instead(watch=chunked(b"}{"), document=lambda body: whole(body[: len(body) // 2]))
"""Each watch fails so that a LIST must follow, and its JSON breaks off although its length is as told."""


def hang(exchange: Exchange) -> None:
    """Never answer, not even when the failure is over."""
    exchange.kept = True


def slow_list(seconds: float) -> Act:
    """Let the first watch of each resource end with 410, and the LIST that follows drip for some time."""
    expired: set[str] = set()
    event = b'{"type":"ERROR","object":%b}' % status(410, "Expired", "too old resource version")

    def act(exchange: Exchange) -> None:
        if exchange.verb == "watch" and exchange.resource not in expired:
            expired.add(exchange.resource)
            exchange.client.sendall(chunked(event) + LAST_CHUNK)
        elif exchange.verb == "list":
            answer = whole(exchange.body())
            step = len(answer) // DRIPS + 1
            for at in range(0, len(answer), step):
                exchange.client.sendall(answer[at : at + step])
                time.sleep(seconds / DRIPS)
        else:
            exchange.relay()

    return act
