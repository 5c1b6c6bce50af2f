# ruff: noqa: D102 - the name of a test says it
"""Both sinks against servers with faults: what each becomes in a reply, and that the next attempt gets through."""

from __future__ import annotations

import os
import shutil
import socket
import ssl
import struct
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from otel_lb_hop.errors import ConfigError, Problem
from otel_lb_hop.export.delivery import Chunk, Reply
from otel_lb_hop.export.otlp_http import HttpSink
from otel_lb_hop.export.otlp_settings import http_settings
from otel_lb_hop.export.transport import make_sink
from otel_lb_hop.export.wire import Envelope, text
from tests.lab.waiting import wait_for
from tests.unit.otlp_sink import (
    Answer,
    Certificates,
    GrpcServer,
    HttpServer,
    Relay,
    TcpPeer,
    closed_port,
    make_certificates,
    partial,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from otel_lb_hop.export.delivery import Sink

GRPC, HTTP = "grpc", "http/protobuf"
ENVELOPE = Envelope({"service.name": "test"}, "scope", "1", "https://example.com/schema")
CHUNKS = [
    Chunk(ENVELOPE, b"\x12\x05" + text(3, "one") + b"\x12\x05" + text(3, "two"), 2, 14),
    Chunk(ENVELOPE, b"\x12\x07" + text(3, "three"), 1, 9),
]
"""Log records with a severity text each."""
SOON_SECONDS = 5.0

both = pytest.mark.parametrize("protocol", [GRPC, HTTP])


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    """Make one set for all."""
    return make_certificates(tmp_path_factory.mktemp("certificates"))


def make(protocol: str, url: str, signal: str = "logs", **variables: str) -> Sink:
    """Make a sink, with OTEL_EXPORTER_OTLP_ before the names."""
    environ = {f"OTEL_EXPORTER_OTLP_{name}": value for name, value in variables.items()}
    return make_sink(signal, protocol, {"OTEL_EXPORTER_OTLP_ENDPOINT": url, **environ})


def make_server(protocol: str, *args: Any, **kwargs: Any) -> GrpcServer | HttpServer:  # noqa: ANN401 - passed on
    """Make the server of a protocol."""
    return GrpcServer(*args, **kwargs) if protocol == GRPC else HttpServer(*args, **kwargs)


@pytest.fixture
def server(protocol: str) -> Iterator[GrpcServer | HttpServer]:
    """Run a server in the clear."""
    with make_server(protocol) as running:
        yield running


@pytest.fixture
def sink(protocol: str, server: GrpcServer | HttpServer) -> Iterator[Sink]:
    """Make a sink to it."""
    made = make(protocol, server.url)
    yield made
    made.close()


def failed(reply: Reply) -> bool:
    """Whether nothing was taken and the same may be tried again."""
    return not reply.taken and reply.retry


def in_turn(scripts: Sequence[Callable[[socket.socket], object]]) -> Callable[[socket.socket], None]:
    """Treat each connection as the next of the scripts says."""
    left = list(scripts)

    def script(peer: socket.socket) -> None:
        left.pop(0)(peer)

    return script


def whole_request(peer: socket.socket) -> bool:
    """Read a request; whether there was one."""
    data = b""
    while b"three" not in data:
        if not (part := peer.recv(65536)):
            return False
        data += part
    return True


@both
class TestSending:
    """What arrives."""

    def test_items_arrive_in_one_request_inside_their_envelope(
        self, server: GrpcServer | HttpServer, sink: Sink
    ) -> None:
        assert sink.send(CHUNKS) == Reply(taken=True)
        (received,) = server.received
        (resource,) = received.message().resource_logs
        assert resource.resource.attributes[0].value.string_value == "test"
        (scope,) = resource.scope_logs
        assert (scope.scope.name, scope.schema_url) == ("scope", "https://example.com/schema")
        assert [record.severity_text for record in scope.log_records] == ["one", "two", "three"]

    @pytest.mark.parametrize("signal", ["logs", "traces", "metrics"])
    def test_every_signal_has_its_place(self, protocol: str, server: GrpcServer | HttpServer, signal: str) -> None:
        sink = make(protocol, server.url, signal)
        assert sink.send([Chunk(ENVELOPE, b"\x12\x00", 1, 2)]).taken
        sink.close()
        message = server.received[0].message()
        (_, ((resource,),)) = next((field.name, (value,)) for field, value in message.ListFields())
        (items,) = [len(value) for field, value in resource.ListFields()[1][1][0].ListFields() if field.number == 2]
        assert items == 1
        assert message.DESCRIPTOR.name == f"Export{signal.capitalize().replace('Traces', 'Trace')}ServiceRequest"

    def test_each_signal_has_a_connection_of_its_own(self, protocol: str, server: GrpcServer | HttpServer) -> None:
        # Metrics never wait behind records.
        sinks = [make(protocol, server.url, signal) for signal in ("logs", "metrics")]
        assert all(sink.send([Chunk(ENVELOPE, b"\x12\x00", 1, 2)]).taken for sink in sinks)
        assert len({received.connection for received in server.received}) == 2
        for sink in sinks:
            sink.close()

    @pytest.mark.parametrize("tls", [False, True])
    def test_a_connection_is_kept(self, protocol: str, tls: bool, certificates: Certificates) -> None:  # noqa: FBT001
        with make_server(protocol, *([certificates] if tls else [])) as server:
            sink = make(protocol, server.url, CERTIFICATE=certificates.ca)
            for _ in range(3):
                assert sink.send(CHUNKS) == Reply(taken=True)
            sink.close()
            assert len({received.connection for received in server.received}) == 1

    def test_a_body_of_32_mib_goes_out(self, server: GrpcServer | HttpServer, sink: Sink) -> None:
        payload = text(2, "x" * (32 << 20))
        assert sink.send([Chunk(ENVELOPE, payload, 1, len(payload))]).taken
        assert payload in server.received[0].body

    def test_gzip(self, protocol: str, server: GrpcServer | HttpServer) -> None:
        payload = text(2, "x" * 100_000)
        with Relay(server.port) as relay:
            sink = make(protocol, f"http://127.0.0.1:{relay.port}", COMPRESSION="gzip")
            assert sink.send([Chunk(ENVELOPE, payload, 1, len(payload))]).taken
            sink.close()
            assert payload in server.received[0].body
            assert relay.sent_bytes < 10_000


DATE = "Sun, 06 Nov 1994 08:49:37 GMT"
DATE_SECONDS = 784_111_777.0
LATER_DATE = "Sun, 06 Nov 1994 08:50:37 GMT"
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"
GRPC_ANSWERS = [
    (Answer(grpc_code="UNAVAILABLE"), Reply(taken=False, retry=True, detail="UNAVAILABLE:")),
    (
        Answer(grpc_code="UNAVAILABLE", message="busy", retry_info_seconds=1.5),
        Reply(taken=False, retry=True, retry_after_seconds=1.5, detail="UNAVAILABLE: busy"),
    ),
    (
        Answer(grpc_code="RESOURCE_EXHAUSTED", message="too much"),
        Reply(taken=False, detail="RESOURCE_EXHAUSTED: too much"),
    ),
    (
        Answer(grpc_code="RESOURCE_EXHAUSTED", message="larger than max, later", retry_info_seconds=2),
        Reply(taken=False, retry=True, retry_after_seconds=2.0, detail="RESOURCE_EXHAUSTED: larger than max, later"),
    ),
    *(
        (Answer(grpc_code=code, message=text), Reply(taken=False, too_large=True, detail=f"{code}: {text}"))
        for code, text in (
            ("RESOURCE_EXHAUSTED", "SERVER: Received message larger than max (2072598 vs. 1048576)"),
            ("RESOURCE_EXHAUSTED", "grpc: received message after decompression larger than max 4194304"),
            ("RESOURCE_EXHAUSTED", "gRPC message exceeds maximum size 4194304: 5000000"),
            ("RESOURCE_EXHAUSTED", "Received message exceeds the maximum configured message size."),
            (
                "OUT_OF_RANGE",
                "Error, decoded message length too large: found 5000000 bytes, the limit is: 4194304 bytes",
            ),
        )
    ),
    (
        Answer(grpc_code="RESOURCE_EXHAUSTED", retry_info_seconds=0),
        Reply(taken=False, retry=True, retry_after_seconds=0.0, detail="RESOURCE_EXHAUSTED:"),
    ),
    *(
        (Answer(grpc_code=code, message="no"), Reply(taken=False, retry=True, detail=f"{code}: no"))
        for code in ("CANCELLED", "DEADLINE_EXCEEDED", "ABORTED", "OUT_OF_RANGE", "DATA_LOSS")
    ),
    *(
        (Answer(grpc_code=code, message="no"), Reply(taken=False, detail=f"{code}: no"))
        for code in ("UNKNOWN", "INVALID_ARGUMENT", "NOT_FOUND", "ALREADY_EXISTS", "PERMISSION_DENIED", "INTERNAL")
    ),
    *(
        (Answer(grpc_code=code, message="no", retry_info_seconds=1), Reply(taken=False, detail=f"{code}: no"))
        for code in ("UNAUTHENTICATED", "FAILED_PRECONDITION", "UNIMPLEMENTED")
    ),
]
HTTP_ANSWERS = [
    (
        Answer(http_status=429, message="slow down", retry_after="7"),
        Reply(taken=False, retry=True, retry_after_seconds=7.0, detail="HTTP 429 Too Many Requests: slow down"),
    ),
    (Answer(http_status=429), Reply(taken=False, retry=True, detail="HTTP 429 Too Many Requests:")),
    (
        Answer(http_status=503, retry_after=DATE),
        Reply(taken=False, retry=True, retry_after_seconds=20.0, detail="HTTP 503 Service Unavailable:"),
    ),
    (
        Answer(http_status=503, retry_after=LATER_DATE, date=DATE),
        Reply(taken=False, retry=True, retry_after_seconds=60.0, detail="HTTP 503 Service Unavailable:"),
    ),
    (
        Answer(http_status=503, retry_after="tomorrow", message="<h1>\ngone\n</h1>", content_type="text/html"),
        Reply(taken=False, retry=True, detail="HTTP 503 Service Unavailable: <h1> gone </h1>"),
    ),
    (Answer(http_status=502), Reply(taken=False, retry=True, detail="HTTP 502 Bad Gateway:")),
    (Answer(http_status=504), Reply(taken=False, retry=True, detail="HTTP 504 Gateway Timeout:")),
    *(
        (Answer(http_status=status, message="no", retry_after="7"), Reply(taken=False, detail=f"HTTP {reason}: no"))
        for status, reason in (
            (400, "400 Bad Request"),
            (401, "401 Unauthorized"),
            (404, "404 Not Found"),
            (500, "500 Internal Server Error"),
        )
    ),
    *(
        (
            Answer(http_status=status, location="http://me:secret@127.0.0.1:1/elsewhere?token=secret"),
            Reply(
                taken=False,
                detail=f"HTTP {reason}: redirected to http://127.0.0.1:1/elsewhere; redirects are not followed",
            ),
        )
        for status, reason in ((301, "301 Moved Permanently"), (307, "307 Temporary Redirect"))
    ),
    (
        Answer(body=partial(1).body, cut_after=1),
        Reply(taken=True, detail="taken, with an answer that cannot be read: no end of a number"),
    ),
    (
        Answer(http_status=413, message="no", retry_after="7"),
        Reply(taken=False, too_large=True, detail="HTTP 413 Request Entity Too Large: no"),
    ),
    *(
        (
            Answer(body, http_status=status, content_type=content_type),
            Reply(taken=False, detail=f"HTTP {reason}: a web page, and no answer of an OTLP server"),
        )
        for body, status, reason, content_type in (
            (b"Please log in", 200, "200 OK", "text/html; charset=utf-8"),
            (b"\r\n <!doctype html>", 203, "203 Non-Authoritative Information", "application/octet-stream"),
        )
    ),
    (
        Answer(b"{}", content_type="application/json"),
        Reply(taken=True, detail="taken, with an answer that cannot be read: wire type 3"),
    ),
    (Answer(http_status=202), Reply(taken=True)),
]
TAKEN_ANSWERS = [
    (partial(2, "too old"), Reply(taken=True, rejected=2, detail="too old")),
    (partial(1), Reply(taken=True, rejected=1)),
    (partial(0, "use the new name"), Reply(taken=True, detail="use the new name")),
    (partial(1_000_000), Reply(taken=True, rejected=3)),
    (partial(-5), Reply(taken=True)),
    (partial(1, "a" * 5000), Reply(taken=True, rejected=1, detail="a" * 299 + "…")),
]


class TestAnswers:
    """What each answer becomes."""

    @pytest.mark.parametrize("protocol", [GRPC])
    def test_grpc(self, server: GrpcServer, sink: Sink) -> None:
        for answer, expected in GRPC_ANSWERS:
            server.play(answer)
            assert sink.send(CHUNKS) == expected
            assert sink.send(CHUNKS) == Reply(taken=True)
        assert len(server.received) == 2 * len(GRPC_ANSWERS)

    @pytest.mark.parametrize("protocol", [HTTP])
    def test_http(self, server: HttpServer) -> None:
        environ = {"OTEL_EXPORTER_OTLP_ENDPOINT": server.url}
        sink = HttpSink(http_settings("logs", environ), wall_seconds=lambda: DATE_SECONDS - 20)
        for answer, expected in HTTP_ANSWERS:
            server.play(answer)
            assert sink.send(CHUNKS) == expected
            assert sink.send(CHUNKS) == Reply(taken=True)
        sink.close()
        assert len(server.received) == 2 * len(HTTP_ANSWERS)

    @both
    def test_partial_success(self, server: GrpcServer | HttpServer, sink: Sink) -> None:
        for answer, expected in TAKEN_ANSWERS:
            server.play(answer)
            assert sink.send(CHUNKS) == expected

    @both
    def test_an_unreadable_answer_of_success_is_success(self, server: GrpcServer | HttpServer, sink: Sink) -> None:
        for body in (b"\xff", b"ok", bytes(range(256)), b"\x0a\x7f"):
            server.play(Answer(body))
            reply = sink.send(CHUNKS)
            assert reply.taken
            assert reply.detail.startswith("taken, with an answer that cannot be read")

    @pytest.mark.parametrize("protocol", [GRPC])
    def test_codes_to_try_again_after_can_be_set(self, server: GrpcServer) -> None:
        variable = "OTEL_PYTHON_EXPORTER_OTLP_GRPC_RETRYABLE_ERROR_CODES"
        sink = make_sink("logs", GRPC, {"OTEL_EXPORTER_OTLP_ENDPOINT": server.url, variable: "internal, ABORTED"})
        server.play(*(Answer(grpc_code=code) for code in ("INTERNAL", "ABORTED", "UNAVAILABLE")))
        assert [sink.send(CHUNKS).retry for _ in range(3)] == [True, True, False]
        sink.close()

    @pytest.mark.parametrize("scheme", ["http", "https"])
    def test_an_answer_before_the_end_of_the_body_is_heard(self, scheme: str, certificates: Certificates) -> None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificates.server, certificates.server_key)

        def script(peer: socket.socket) -> None:
            with context.wrap_socket(peer, server_side=True) if scheme == "https" else peer as speaking:
                speaking.recv(1000)
                speaking.sendall(b"HTTP/1.1 413 Too Large\r\nContent-Length: 0\r\n\r\n")

        payload = text(2, "x" * (32 << 20))
        with TcpPeer(script) as peer:
            sink = make(HTTP, f"{scheme}://127.0.0.1:{peer.port}", CERTIFICATE=certificates.ca)
            for _ in range(2):
                reply = sink.send([Chunk(ENVELOPE, payload, 1, len(payload))])
                assert reply == Reply(taken=False, too_large=True, detail="HTTP 413 Too Large:")
            sink.close()

    @pytest.mark.parametrize(
        ("answer", "expected"),
        [
            (b"HTTP/1.1 100 Continue\r\n\r\n" + OK, Reply(taken=True)),
            (b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n" + b"HTTP/1.1 102 Wait\r\n\r\n" + OK, Reply(taken=True)),
            (
                b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 101 + b"Content-Length: 0\r\n\r\n",
                Reply(taken=False, detail="HTTPException: got more than 100 headers"),
            ),
            (
                b"HTTP/1.1 200 OK\r\nX: " + b"y" * 70_000 + b"\r\nContent-Length: 0\r\n\r\n",
                Reply(taken=False, detail="LineTooLong: got more than 65536 bytes when reading header line"),
            ),
        ],
        ids=["100", "103 and 102", "too many headers", "a long header"],
    )
    def test_heads_of_answers(self, answer: bytes, expected: Reply) -> None:
        def script(peer: socket.socket) -> None:
            while whole_request(peer):
                peer.sendall(answer)

        with TcpPeer(script) as peer:
            sink = make(HTTP, f"http://127.0.0.1:{peer.port}")
            assert [sink.send(CHUNKS) for _ in range(2)] == [expected] * 2
            sink.close()

    def test_what_a_proxy_of_grpc_calls_too_large(self) -> None:
        # nginx answers so, without a word of gRPC; here a server of HTTP/2 with one answer, in frames.
        head = b"\x08\x03413"  # :status, indexed name 8, a literal value
        headers = len(head).to_bytes(3, "big") + b"\x01\x05" + (1).to_bytes(4, "big") + head
        settings = bytes(3) + b"\x04\x00" + bytes(4)

        def script(peer: socket.socket) -> None:
            peer.sendall(settings)
            whole_request(peer)
            peer.sendall(headers)
            while peer.recv(65536):
                pass

        with TcpPeer(script) as peer:
            sink = make(GRPC, f"http://127.0.0.1:{peer.port}", TIMEOUT="5")
            reply = sink.send(CHUNKS)
            assert (reply.taken, reply.retry, reply.too_large) == (False, False, True)
            assert "413" in reply.detail
            sink.close()

    def test_a_long_body_of_a_refusal_is_not_read_to_its_end(self) -> None:
        def script(peer: socket.socket) -> None:
            peer.recv(65536)
            peer.sendall(
                b"HTTP/1.1 400 No\r\nContent-Type: text/plain\r\nContent-Length: 99999999\r\n\r\n" + b"x" * 65536
            )
            while peer.recv(65536):
                pass

        with TcpPeer(script) as peer:
            sink = make(HTTP, f"http://127.0.0.1:{peer.port}")
            for _ in range(2):
                reply = sink.send(CHUNKS)
                assert not reply.taken
                assert not reply.retry
                assert reply.detail == "HTTP 400 No: " + "x" * 286 + "…"
            sink.close()


@both
class TestOutages:
    """Nobody there, somebody who does not answer, and the return."""

    def test_refused_then_there(self, server: GrpcServer | HttpServer, sink: Sink) -> None:
        assert sink.send(CHUNKS).taken
        server.stop()
        for _ in range(3):
            reply = sink.send(CHUNKS)
            assert failed(reply)
        assert "refused" in reply.detail
        server.start()
        assert sink.send(CHUNKS) == Reply(taken=True), "the first attempt after the return gets through"

    def test_a_server_that_closed_while_nothing_was_sent(
        self, protocol: str, server: GrpcServer | HttpServer, sink: Sink
    ) -> None:
        assert sink.send(CHUNKS).taken
        server.stop()
        server.start()
        first = sink.send(CHUNKS)
        # A channel of gRPC may hear of the end only by the attempt.
        assert first.taken or (protocol == GRPC and failed(first) and sink.send(CHUNKS).taken)
        assert len(server.received) == 2

    def test_never_answered(self, server: GrpcServer | HttpServer, sink: Sink) -> None:
        server.play(Answer(until=threading.Event()))
        start = time.monotonic()
        reply = sink.send(CHUNKS, timeout_seconds=0.3)
        assert failed(reply)
        assert 0.25 < time.monotonic() - start < SOON_SECONDS
        assert sink.send(CHUNKS) == Reply(taken=True)
        first, second = (received.connection for received in server.received)
        assert first != second, "a connection that a time-out was on is not used again"

    def test_the_limit_of_an_attempt_is_the_variable(self, protocol: str, server: GrpcServer | HttpServer) -> None:
        server.play(Answer(until=threading.Event()), Answer(until=threading.Event()))
        sink = make(protocol, server.url, LOGS_TIMEOUT="0.3")
        for limit in (None, 3600):
            start = time.monotonic()
            assert failed(sink.send(CHUNKS, limit))
            assert 0.25 < time.monotonic() - start < SOON_SECONDS
        sink.close()

    def test_accepted_and_no_word(self, protocol: str) -> None:
        with TcpPeer() as peer:
            sink = make(protocol, f"http://127.0.0.1:{peer.port}", TIMEOUT="0.5")
            start = time.monotonic()
            assert failed(sink.send(CHUNKS))
            assert time.monotonic() - start < SOON_SECONDS
            sink.close()

    def test_no_such_name(self, protocol: str) -> None:
        sink = make(protocol, "http://collector.invalid:4317", TIMEOUT="5")
        assert failed(sink.send(CHUNKS))
        sink.close()

    def test_no_other_language_is_understood(self, protocol: str) -> None:
        def script(peer: socket.socket) -> None:
            peer.recv(65536)
            peer.sendall(b"220 mail.example.com ESMTP\r\n" * 10)

        with TcpPeer(script) as peer:
            sink = make(protocol, f"http://127.0.0.1:{peer.port}")
            assert failed(sink.send(CHUNKS))
            sink.close()

    def test_reset_in_the_middle_of_an_answer(self, protocol: str, server: GrpcServer | HttpServer) -> None:
        # A status line is an answer already; gRPC's comes after some fifty bytes that open the connection.
        with Relay(server.port, 60 if protocol == GRPC else 10) as relay:
            sink = make(protocol, f"http://127.0.0.1:{relay.port}", TIMEOUT="3")
            assert failed(sink.send(CHUNKS))
            relay.answer_bytes = None
            assert sink.send(CHUNKS) == Reply(taken=True)
            sink.close()

    def test_many_failures_leave_nothing_behind(self, protocol: str) -> None:
        with closed_port() as port, TcpPeer(socket.socket.close) as closing:
            sinks = [make(protocol, f"http://127.0.0.1:{place}", TIMEOUT="5") for place in (port, closing.port)]

            def fail(times: int) -> int:
                for _ in range(times):
                    assert all(failed(sink.send(CHUNKS)) for sink in sinks)
                return len(os.listdir("/proc/self/fd")) + len(os.listdir("/proc/self/task"))  # noqa: PTH208 - names do

            before = fail(30)
            # What gRPC keeps for itself comes and goes by a few.
            assert fail(100) < before + 20
            for sink in sinks:
                sink.close()


class TestKeptConnections:
    """A server may end a connection that is not used, and cannot know that it is about to be."""

    @staticmethod
    def replies(*scripts: Callable[[socket.socket], object]) -> list[Reply]:
        """Send twice to a peer that treats its connections like this."""
        with TcpPeer(in_turn(scripts)) as peer:
            sink = make(HTTP, f"http://127.0.0.1:{peer.port}")
            replies = [sink.send(CHUNKS), sink.send(CHUNKS)]
            sink.close()
        return replies

    @staticmethod
    def answer(peer: socket.socket, count: int = 1) -> None:
        for _ in range(count):
            assert whole_request(peer)
            peer.sendall(OK)

    def answer_once_then_end(self, peer: socket.socket) -> None:
        self.answer(peer)
        assert whole_request(peer)

    def answer_once_then_reset(self, peer: socket.socket) -> None:
        self.answer_once_then_end(peer)
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    def answer_once_then_begin(self, peer: socket.socket) -> None:
        self.answer_once_then_reset(peer)
        peer.sendall(b"HTTP/1.1 20")
        time.sleep(0.1)  # a reset overtakes what was not read yet

    def test_one_that_ends_under_a_request_is_no_failure(self) -> None:
        for script in (self.answer_once_then_end, self.answer_once_then_reset):
            assert self.replies(script, self.answer) == [Reply(taken=True)] * 2

    def test_once_only(self) -> None:
        first, second = self.replies(self.answer_once_then_end, whole_request)
        assert first.taken
        assert failed(second)

    def test_a_new_one_that_ends_is_a_failure(self) -> None:
        first, second = self.replies(whole_request, self.answer)
        assert failed(first)
        assert second.taken

    def test_not_after_the_beginning_of_an_answer(self) -> None:
        first, second = self.replies(self.answer_once_then_begin, self.answer)
        assert first.taken
        assert failed(second)

    def test_the_limit_holds_for_both(self) -> None:
        def hang(peer: socket.socket) -> None:
            while peer.recv(65536):
                pass

        with TcpPeer(in_turn([self.answer_once_then_end, hang])) as peer:
            sink = make(HTTP, f"http://127.0.0.1:{peer.port}")
            assert sink.send(CHUNKS).taken
            assert sink.send(CHUNKS, timeout_seconds=0.3) == Reply(
                taken=False, retry=True, detail="TimeoutError: timed out"
            )
            sink.close()

    def test_head_and_body_go_without_delay(self) -> None:
        # With Nagle's algorithm the body waits for the acknowledgement of the head: 40 ms, each time.
        with HttpServer() as server:
            sink = make(HTTP, server.url)
            times = []
            for _ in range(20):
                began = time.monotonic()
                assert sink.send(CHUNKS).taken
                times.append(time.monotonic() - began)
            sink.close()
        assert min(times[1:]) < 0.03


def test_packets_that_nobody_answers_take_the_time_of_connecting_only() -> None:
    """Two seconds, not the half minute of the variable; both ways at once, to save time."""
    with TcpPeer(backlog=0) as peer, ThreadPoolExecutor() as pool:
        peer.fill()
        sinks = [make(protocol, f"http://127.0.0.1:{peer.port}", TIMEOUT="30") for protocol in (GRPC, HTTP)]
        start = time.monotonic()
        replies = list(pool.map(lambda sink: sink.send(CHUNKS), sinks))
        assert [failed(reply) for reply in replies] == [True, True]
        assert 1.5 < time.monotonic() - start < SOON_SECONDS
        for sink in sinks:
            sink.close()


@both
class TestClosing:
    """The end of a sink."""

    def test_close_ends_a_send_that_hangs(self, server: GrpcServer | HttpServer, sink: Sink) -> None:
        server.play(Answer(until=threading.Event()))
        replies: list[Reply] = []
        sender = threading.Thread(target=lambda: replies.append(sink.send(CHUNKS)))
        sender.start()
        wait_for("the request", lambda: server.received)
        start = time.monotonic()
        sink.close()
        sender.join(SOON_SECONDS)
        assert time.monotonic() - start < 2
        assert [failed(reply) for reply in replies] == [True]

    def test_close_ends_a_body_that_nobody_reads(self, protocol: str) -> None:
        accepted = threading.Event()

        def script(peer: socket.socket) -> None:
            accepted.set()
            time.sleep(SOON_SECONDS)
            peer.close()

        payload = text(2, "x" * (32 << 20))
        with TcpPeer(script) as peer:
            sink = make(protocol, f"http://127.0.0.1:{peer.port}")
            replies: list[Reply] = []
            chunks = [Chunk(ENVELOPE, payload, 1, len(payload))]
            sender = threading.Thread(target=lambda: replies.append(sink.send(chunks)))
            sender.start()
            assert accepted.wait(SOON_SECONDS)
            sink.close()
            sender.join(SOON_SECONDS / 2)
            assert [failed(reply) for reply in replies] == [True]

    def test_nothing_is_sent_after(self, server: GrpcServer | HttpServer, sink: Sink) -> None:
        assert sink.send(CHUNKS).taken
        sink.close()
        sink.close()
        reply = sink.send(CHUNKS)
        assert failed(reply)
        assert reply.detail.endswith("the sink is closed")
        assert len(server.received) == 1


def test_an_address_that_swallows_leaves_time_for_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    """The resolver is a fake: no name of this machine has two such addresses."""
    with TcpPeer(backlog=0) as peer, HttpServer() as server:
        peer.fill()
        places = [(socket.AF_INET, socket.SOCK_STREAM, 0, "", ("127.0.0.1", port)) for port in (peer.port, server.port)]
        monkeypatch.setattr(socket, "getaddrinfo", lambda *_args, **_kwargs: places)
        sink = make(HTTP, "http://collector.example.com:4318")
        assert sink.send(CHUNKS) == Reply(taken=True)
        sink.close()


def test_an_answer_that_drips_ends_with_the_limit() -> None:
    """Each byte comes in time, all of them do not."""

    def script(peer: socket.socket) -> None:
        peer.recv(65536)
        for sign in b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 90:
            peer.send(bytes((sign,)))
            time.sleep(0.05)

    with TcpPeer(script) as peer:
        sink = make(HTTP, f"http://127.0.0.1:{peer.port}", TIMEOUT="0.4")
        start = time.monotonic()
        assert sink.send(CHUNKS) == Reply(taken=False, retry=True, detail="TimeoutError: timed out")
        assert time.monotonic() - start < SOON_SECONDS
        sink.close()


def test_a_tunnel_through_a_proxy(certificates: Certificates) -> None:
    """TLS goes through the proxy as it is; what the proxy is told stays with it."""
    asked: list[bytes] = []
    with HttpServer(certificates) as server, Relay(server.port) as relay:

        def script(peer: socket.socket) -> None:
            asked.append(peer.recv(65536))
            peer.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
            relay._pass(peer)

        with TcpPeer(script) as proxy:
            environ = {
                "OTEL_EXPORTER_OTLP_ENDPOINT": server.url,
                "OTEL_EXPORTER_OTLP_CERTIFICATE": certificates.ca,
                "https_proxy": f"http://me:secret@127.0.0.1:{proxy.port}",
            }
            sink = make_sink("logs", HTTP, environ)
            assert sink.send(CHUNKS) == Reply(taken=True)
            sink.close()
    first, *rest = asked[0].split(b"\r\n")
    assert first == b"CONNECT localhost:%d HTTP/1.0" % server.port
    assert b"Proxy-Authorization: Basic bWU6c2VjcmV0" in rest
    assert "proxy-authorization" not in server.received[0].headers


@both
class TestTls:
    """Certificates, good and bad."""

    def test_a_client_is_known_by_its_certificate(self, protocol: str, certificates: Certificates) -> None:
        mutual = {"mutual": True} if protocol == GRPC else {}
        with make_server(protocol, certificates, **mutual) as server:
            sink = make(
                protocol,
                server.url,
                CERTIFICATE=certificates.ca,
                CLIENT_CERTIFICATE=certificates.client,
                CLIENT_KEY=certificates.client_key,
            )
            assert sink.send(CHUNKS) == Reply(taken=True)
            sink.close()
            assert server.received[0].client_name == "agent"

    def test_a_key_may_stand_with_its_certificate(
        self, protocol: str, certificates: Certificates, tmp_path: Path
    ) -> None:
        pair = tmp_path / "pair.pem"
        pair.write_text(Path(certificates.client).read_text() + Path(certificates.client_key).read_text())
        mutual = {"mutual": True} if protocol == GRPC else {}
        with make_server(protocol, certificates, **mutual) as server:
            sink = make(protocol, server.url, CERTIFICATE=certificates.ca, CLIENT_CERTIFICATE=str(pair))
            assert sink.send(CHUNKS) == Reply(taken=True)
            sink.close()
            assert server.received[0].client_name == "agent"

    def test_expired_until_it_is_renewed(self, protocol: str, certificates: Certificates) -> None:
        with make_server(protocol, certificates, expired=True) as server:
            sink = make(protocol, server.url, CERTIFICATE=certificates.ca)
            reply = sink.send(CHUNKS)
            assert failed(reply)
            assert "expired" in reply.detail.lower()
            port = server.port
        renewed = make_server(protocol, certificates)
        renewed.port = port
        with renewed:
            assert sink.send(CHUNKS) == Reply(taken=True)
        sink.close()

    def test_a_stranger_is_not_trusted_until_the_file_says_so(
        self, protocol: str, certificates: Certificates, tmp_path: Path
    ) -> None:
        roots = tmp_path / "ca.pem"
        shutil.copy(certificates.client, roots)
        with make_server(protocol, certificates) as server:
            sink = make(protocol, server.url, CERTIFICATE=str(roots))
            reply = sink.send(CHUNKS)
            assert failed(reply)
            assert "certificate" in reply.detail.lower()
            roots.unlink()
            assert failed(sink.send(CHUNKS)), "a file that is being replaced is no end"
            shutil.copy(certificates.ca, roots)
            assert sink.send(CHUNKS) == Reply(taken=True)
            sink.close()
            assert len(server.received) == 1

    def test_a_name_that_is_not_in_the_certificate(self, protocol: str, certificates: Certificates) -> None:
        with make_server(protocol, certificates) as server:
            sink = make(protocol, f"https://127.0.0.2:{server.port}", CERTIFICATE=certificates.ca)
            assert failed(sink.send(CHUNKS))
            sink.close()
            assert not server.received

    def test_the_usual_roots_do_not_know_the_test(self, protocol: str, certificates: Certificates) -> None:
        with make_server(protocol, certificates) as server:
            sink = make(protocol, server.url)
            assert failed(sink.send(CHUNKS))
            sink.close()
            assert not server.received

    def test_files_that_are_no_good_are_told_at_once(
        self, protocol: str, certificates: Certificates, tmp_path: Path
    ) -> None:
        nothing, garbage = str(tmp_path / "nothing"), tmp_path / "garbage"
        garbage.write_text("-----BEGIN CERTIFICATE-----\nnone\n-----END CERTIFICATE-----\n")
        with pytest.raises(ConfigError) as caught:
            make(
                protocol,
                "https://localhost",
                LOGS_CERTIFICATE=nothing,
                CLIENT_CERTIFICATE=certificates.client,
                CLIENT_KEY=str(garbage),
            )
        assert [problem[:2] for problem in caught.value.problems] == [
            ("OTEL_EXPORTER_OTLP_LOGS_CERTIFICATE", nothing),
            ("OTEL_EXPORTER_OTLP_CLIENT_CERTIFICATE", certificates.client),
        ]
        assert caught.value.problems[0].accepted == "a readable PEM file with certificates (No such file or directory)"
        with pytest.raises(ConfigError, match="OTEL_EXPORTER_OTLP_CERTIFICATE: read"):
            make(protocol, "https://localhost", CERTIFICATE=str(garbage))

    def test_files_that_are_empty_are_told_at_once(
        self, protocol: str, certificates: Certificates, tmp_path: Path
    ) -> None:
        empty = tmp_path / "empty"
        empty.touch()
        pair = {"CLIENT_CERTIFICATE": certificates.client, "CLIENT_KEY": certificates.client_key}
        for name in ("CERTIFICATE", "CLIENT_CERTIFICATE", "CLIENT_KEY"):
            with pytest.raises(ConfigError, match=str(empty)):
                make(protocol, "https://localhost", **(pair | {name: str(empty)}))

    @pytest.mark.parametrize("name", ["ca", "client", "client_key"])
    def test_a_file_that_is_empty_for_a_moment_is_no_end(
        self, protocol: str, certificates: Certificates, tmp_path: Path, name: str
    ) -> None:
        path = tmp_path / name
        shutil.copy(getattr(certificates, name), path)
        files = certificates._replace(**{name: str(path)})
        mutual = {"mutual": True} if protocol == GRPC else {}
        with make_server(protocol, certificates, **mutual) as server, Relay(server.port, 0) as relay:
            sink = make(
                protocol,
                f"https://localhost:{relay.port}",
                CERTIFICATE=files.ca,
                CLIENT_CERTIFICATE=files.client,
                CLIENT_KEY=files.client_key,
            )
            assert failed(sink.send(CHUNKS)), "so that the files are read again"
            relay.answer_bytes = None
            path.write_bytes(b"")
            reply = sink.send(CHUNKS)
            assert failed(reply)
            assert str(path) in reply.detail
            shutil.copy(getattr(certificates, name), path)
            assert sink.send(CHUNKS) == Reply(taken=True)
            sink.close()

    def test_an_encrypted_key_is_told_and_no_password_asked_for(
        self, protocol: str, certificates: Certificates, tmp_path: Path
    ) -> None:
        locked = str(tmp_path / "locked.key")
        words = ["openssl", "pkey", "-aes256", "-passout", "pass:secret", "-in", certificates.client_key]
        subprocess.run([*words, "-out", locked], check=True, capture_output=True, timeout=60)
        with pytest.raises(ConfigError, match="its key not encrypted"):
            make(protocol, "https://localhost", CLIENT_CERTIFICATE=certificates.client, CLIENT_KEY=locked)

    def test_files_do_not_matter_in_the_clear(self, server: GrpcServer | HttpServer, protocol: str) -> None:
        sink = make(protocol, server.url, CERTIFICATE="/nowhere", CLIENT_CERTIFICATE="/nowhere")
        assert sink.send(CHUNKS).taken
        sink.close()


def test_the_usual_roots_are_there() -> None:
    """Whoever names none trusts those of the public."""
    sink = HttpSink(http_settings("logs", {"OTEL_EXPORTER_OTLP_ENDPOINT": "https://localhost"}))
    assert sink._tls
    assert sink._tls.cert_store_stats()["x509_ca"] > 50


def test_a_name_is_looked_for_where_names_belong(certificates: Certificates, tmp_path: Path) -> None:
    """Not in the common name: by HTTP, as the SDK."""
    old, key = str(tmp_path / "old.pem"), str(tmp_path / "old.key")
    words = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    words += ["-subj", "/CN=localhost", "-keyout", key, "-out", old]
    subprocess.run(words, check=True, capture_output=True, timeout=60)
    with HttpServer(certificates._replace(server=old, server_key=key)) as server:
        sink = make(HTTP, server.url, CERTIFICATE=old)
        assert failed(sink.send(CHUNKS))
        sink.close()


class TestProviders:
    """Plugins that give gRPC its credentials: entry points, here of a package that the test writes."""

    PROVIDER = "OTEL_PYTHON_EXPORTER_OTLP_GRPC_CREDENTIAL_PROVIDER"

    @pytest.fixture
    def installed(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, certificates: Certificates) -> None:
        """Install a package with one provider that works and two that do not."""
        (tmp_path / "test_provider.py").write_text(
            "import grpc, pathlib\n"
            f"def good(): return grpc.ssl_channel_credentials(pathlib.Path({certificates.ca!r}).read_bytes())\n"
            "def other(): return 'credentials'\n"
            "def broken(): raise RuntimeError('no vault')\n"
        )
        info = tmp_path / "test_provider-1.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: test-provider\nVersion: 1\n")
        (info / "entry_points.txt").write_text(
            "[opentelemetry_otlp_credential_provider]\n"
            + "".join(f"{name} = test_provider:{name}\n" for name in ("good", "other", "broken"))
        )
        monkeypatch.syspath_prepend(tmp_path)

    @pytest.mark.usefixtures("installed")
    def test_its_credentials_are_used(self, certificates: Certificates) -> None:
        with GrpcServer(certificates) as server:
            sink = make_sink("logs", GRPC, {"OTEL_EXPORTER_OTLP_ENDPOINT": server.url, self.PROVIDER: "good"})
            assert sink.send(CHUNKS) == Reply(taken=True)
            sink.close()

    @pytest.mark.usefixtures("installed")
    @pytest.mark.parametrize(
        ("name", "detail"), [("other", ""), ("broken", " (no vault)"), ("none", "; there are: broken, good, other")]
    )
    def test_one_that_does_not_work_is_told_at_once(self, name: str, detail: str) -> None:
        with pytest.raises(ConfigError) as caught:
            make_sink("logs", GRPC, {"OTEL_EXPORTER_OTLP_ENDPOINT": "https://localhost", self.PROVIDER: name})
        accepted = "an entry point of opentelemetry_otlp_credential_provider that gives grpc.ChannelCredentials"
        assert caught.value.problems == (Problem(self.PROVIDER, name, accepted + detail),)


def run_python(script: str, *args: str) -> subprocess.CompletedProcess[str]:
    """Run a script in a process of its own."""
    words = [sys.executable, "-c", script, *args]
    return subprocess.run(words, capture_output=True, text=True, timeout=60, check=True)


@both
def test_only_what_is_used_is_imported(protocol: str) -> None:
    """Each of them costs megabytes."""
    script = (
        "import sys\n"
        "from otel_lb_hop.export.transport import make_sink\n"
        "make_sink('logs', sys.argv[1], {}).close()\n"
        "print(*{name.partition('.')[0] for name in sys.modules})\n"
    )
    loaded = set(run_python(script, protocol).stdout.split())
    costly = {"grpc", "http", "urllib3", "requests", "google", "opentelemetry"}
    assert loaded & costly == {"grpc" if protocol == GRPC else "http"}


def test_grpc_writes_nothing_to_stderr(certificates: Certificates) -> None:
    """The core of gRPC would write a line of its own for each handshake that fails."""
    script = (
        "import sys\n"
        "from otel_lb_hop.export.delivery import Chunk\n"
        "from otel_lb_hop.export.transport import make_sink\n"
        "from otel_lb_hop.export.wire import Envelope\n"
        "chunk = Chunk(Envelope({}, '', '', ''), b'', 0, 0)\n"
        "for url in sys.argv[1:]:\n"
        "    print(make_sink('logs', 'grpc', {'OTEL_EXPORTER_OTLP_ENDPOINT': url}).send([chunk]).taken)\n"
    )
    with closed_port() as port, GrpcServer(certificates) as server:
        done = run_python(script, f"http://127.0.0.1:{port}", server.url)
    assert (done.stdout, done.stderr) == ("False\nFalse\n", "")
