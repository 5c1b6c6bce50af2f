"""A shipper and a real sink against real servers with faults: everything arrives in the end, or is counted exactly."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest

from otel_lb_hop.core.ledger import Ledger
from otel_lb_hop.export.backlog import Books
from otel_lb_hop.export.delivery import Chunk
from otel_lb_hop.export.shipper import MetricsShipper, Shipper
from otel_lb_hop.export.transport import make_sink
from otel_lb_hop.export.wire import Envelope, delimited, text
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
    from collections.abc import Iterator

Server = GrpcServer | HttpServer

PROTOCOLS = ("grpc", "http/protobuf")
BACK_SECONDS = 5.0
"""The promise: so soon after the other side's return everything is exported."""
ENVELOPE = Envelope({"service.name": "test"}, "scope", "1", "https://example.org/1")
UNAVAILABLE: dict[str, Any] = {"grpc_code": "UNAVAILABLE", "http_status": 503, "message": "overloaded"}
LIMITED: dict[str, Any] = {"grpc_code": "RESOURCE_EXHAUSTED", "http_status": 429, "message": "slow down"}


def logs(*bodies: str) -> Chunk:
    """Make a chunk of log records; ScopeLogs has them in field 2, LogRecord its body in 5, AnyValue a string in 1."""
    payload = b"".join(delimited(2, delimited(5, text(1, body))) for body in bodies)
    return Chunk(ENVELOPE, payload, len(bodies), len(payload))


def points(name: str) -> Chunk:
    """Make a chunk of one gauge with one point; Metric: name 1, gauge 5, its points 1."""
    payload = delimited(2, text(1, name) + delimited(5, delimited(1, b"")))
    return Chunk(ENVELOPE, payload, 1, len(payload))


def bodies(server: Server) -> list[list[str]]:
    """Tell, request by request, which log records reached a server, whatever it answered."""
    return [
        [
            record.body.string_value
            for resource in received.message().resource_logs
            for scope in resource.scope_logs
            for record in scope.log_records
        ]
        for received in list(server.received)
    ]


def server_of(protocol: str, certificates: Certificates | None = None, *, expired: bool = False) -> Server:
    """Make a server that does not listen yet."""
    return (GrpcServer if protocol == "grpc" else HttpServer)(certificates, expired=expired)


def settings(url: str, **more: str) -> dict[str, str]:
    """Make the environment."""
    return {"OTEL_EXPORTER_OTLP_ENDPOINT": url} | more


class Made(NamedTuple):
    """Makes shippers that are closed in the end."""

    shippers: list[Shipper | MetricsShipper]

    def logs(self, protocol: str, url: str, **more: str) -> Shipper:
        """Make one for logs, that lingers less than in earnest."""
        sink = make_sink("logs", protocol, settings(url, **more))
        shipper = Shipper("logs", sink, 10**6, linger_seconds=0.01)
        self.shippers.append(shipper)
        return shipper

    def metrics(self, protocol: str, url: str) -> MetricsShipper:
        """Make one for metrics."""
        shipper = MetricsShipper(make_sink("metrics", protocol, settings(url)), 10.0)
        self.shippers.append(shipper)
        return shipper


@pytest.fixture
def make() -> Iterator[Made]:
    """Make shippers; in the end each closes in time, and its ledger balances."""
    made = Made([])
    yield made
    for shipper in made.shippers:
        began = time.monotonic()
        shipper.close(began + 1.0)
        assert time.monotonic() - began < 1.5
        assert Ledger(shipper.stages()).problems() == []
        books = shipper.books()
        assert (books.queued, books.sending) == (0, 0)
    threads = [thread for thread in threading.enumerate() if thread.name.startswith(("ship-", "close-"))]
    for thread in threads:
        thread.join(5.0)
        assert not thread.is_alive()


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    """Make certificates."""
    return make_certificates(tmp_path_factory.mktemp("tls"))


def exported(shipper: Shipper, items: int, seconds: float = 10.0) -> None:
    """Wait until so many items are exported."""
    wait_for(f"{items} exported", lambda: shipper.books().exported == items, seconds)


def failures(shipper: Shipper, count: int) -> None:
    """Wait until so many attempts in a row have failed."""
    wait_for(f"{count} failures", lambda: shipper.state()["failures_in_a_row"] >= count)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_refused(make: Made, protocol: str) -> None:
    """Nobody listens, and then somebody does: all that was offered meanwhile is there within five seconds, once."""
    with closed_port() as port:
        shipper = make.logs(protocol, f"http://localhost:{port}")
        shipper.offer([logs("a", "b"), logs("c")])
        failures(shipper, 3)
        assert shipper.last_error
    server = server_of(protocol)
    server.port = port
    with server:
        shipper.offer([logs("d")])
        exported(shipper, 4, BACK_SECONDS)
        # After three failures in a row what was not tried yet may come first.
        assert sorted(body for request in bodies(server) for body in request) == ["a", "b", "c", "d"]
    assert shipper.books() == Books(4, 4, {}, 0, 0)
    assert shipper.last_error is None


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_black_hole(make: Made, protocol: str) -> None:
    """Whoever connects gets no answer: an attempt ends all the same, and after the return all is there in time."""
    with TcpPeer(backlog=0) as hole:
        hole.fill()
        shipper = make.logs(protocol, f"http://127.0.0.1:{hole.port}")
        shipper.offer([logs("a")])
        failures(shipper, 1)
    server = server_of(protocol)
    server.port = hole.port
    with server:
        exported(shipper, 1, BACK_SECONDS)
        assert bodies(server) == [["a"]]


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_restarted(make: Made, protocol: str) -> None:
    """A server that was restarted between two requests gets the second like the first."""
    with server_of(protocol) as server:
        shipper = make.logs(protocol, server.url)
        shipper.offer([logs("a")])
        assert shipper.flush(time.monotonic() + 10.0)
        server.stop()
        shipper.offer([logs("b")])
        failures(shipper, 1)
        server.start()
        exported(shipper, 2, BACK_SECONDS)
        assert bodies(server) == [["a"], ["b"]]


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_overloaded(make: Made, protocol: str) -> None:
    """A server that says 503 twice gets the same a third time."""
    with server_of(protocol) as server:
        server.play(Answer(**UNAVAILABLE), Answer(**UNAVAILABLE))
        shipper = make.logs(protocol, server.url)
        shipper.offer([logs("a", "b")])
        exported(shipper, 2)
        assert bodies(server) == [["a", "b"]] * 3


@pytest.mark.parametrize(("protocol", "answer"), [("grpc", LIMITED), ("http/protobuf", UNAVAILABLE)])
def test_asked_to_wait(make: Made, protocol: str, answer: dict[str, Any]) -> None:
    """A server that asks for a second gets it, also from what is offered meanwhile."""
    with server_of(protocol) as server:
        server.play(Answer(**answer, retry_after="1", retry_info_seconds=1.0))
        shipper = make.logs(protocol, server.url)
        began = time.monotonic()
        shipper.offer([logs("a")])
        failures(shipper, 1)
        shipper.offer([logs("b")])
        exported(shipper, 2)
        assert time.monotonic() - began >= 1.0
        assert bodies(server) == [["a"], ["a"], ["b"]]


def test_limited_without_a_word(make: Made) -> None:
    """By HTTP a 429 is tried again; by gRPC RESOURCE_EXHAUSTED without RetryInfo is for good, says OTLP."""
    for protocol, books in (("http/protobuf", Books(1, 1, {}, 0, 0)), ("grpc", Books(1, 0, {"refused": 1}, 0, 0))):
        with server_of(protocol) as server:
            server.play(Answer(**LIMITED))
            shipper = make.logs(protocol, server.url)
            shipper.offer([logs("a")])
            shipper.flush(time.monotonic() + 10.0)
            assert shipper.books() == books


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_refused_for_good(make: Made, protocol: str) -> None:
    """What a server will never take is counted, and the next goes on."""
    with server_of(protocol) as server:
        server.play(Answer(grpc_code="INVALID_ARGUMENT", http_status=400, message="nonsense"))
        shipper = make.logs(protocol, server.url)
        shipper.offer([logs("a", "b")])
        assert not shipper.flush(time.monotonic() + 10.0)
        assert "nonsense" in str(shipper.last_error)
        shipper.offer([logs("c")])
        assert shipper.flush(time.monotonic() + 10.0)
        assert shipper.books() == Books(3, 1, {"refused": 2}, 0, 0)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_larger_than_the_server_takes(make: Made, protocol: str) -> None:
    """What is more than a server takes at once arrives in smaller requests; only a chunk that is by itself is lost."""
    with server_of(protocol) as server:
        server.most_bytes = 10_000
        shipper = make.logs(protocol, server.url)
        small = [f"{number} " + "x" * 1_000 for number in range(40)]
        shipper.offer([*(logs(body) for body in small[:20]), logs("y" * 10_000), *(logs(body) for body in small[20:])])
        assert not shipper.flush(time.monotonic() + 10.0)
        assert shipper.books() == Books(41, 40, {"refused": 1}, 0, 0)
        server.received[:] = [received for received in server.received if len(received.body) <= server.most_bytes]
        assert [body for request in bodies(server) for body in request] == small


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_partial_rejection(make: Made, protocol: str) -> None:
    """What a server took but for some is not sent again; those are counted."""
    with server_of(protocol) as server:
        server.play(partial(2, "too old"))
        shipper = make.logs(protocol, server.url)
        shipper.offer([logs("a", "b", "c")])
        assert not shipper.flush(time.monotonic() + 10.0)
        assert shipper.books() == Books(3, 1, {"rejected_partially": 2}, 0, 0)
        assert shipper.last_error == "too old"
        assert bodies(server) == [["a", "b", "c"]]


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_slow(make: Made, protocol: str) -> None:
    """A server that takes its time gets one request at a time, and what came meanwhile in the next."""
    go_on = threading.Event()
    with server_of(protocol) as server:
        server.play(Answer(until=go_on))
        shipper = make.logs(protocol, server.url)
        shipper.offer([logs("a")])
        wait_for("the first", lambda: server.received)
        for body in "bcd":
            shipper.offer([logs(body)])
        assert shipper.books() == Books(4, 0, {}, 3, 1)
        go_on.set()
        exported(shipper, 4)
        assert bodies(server) == [["a"], ["b", "c", "d"]]


@pytest.mark.parametrize(("protocol", "answer_bytes"), [("grpc", 100), ("http/protobuf", 5)])
def test_closing_in_the_middle(make: Made, protocol: str, answer_bytes: int) -> None:
    """A connection that breaks within the answer: nobody knows, so it is sent again, and counted once."""
    with server_of(protocol) as server, Relay(server.port, answer_bytes) as relay:
        shipper = make.logs(protocol, f"http://localhost:{relay.port}")
        shipper.offer([logs("a")])
        failures(shipper, 1)
        wait_for("an attempt that arrived", lambda: server.received)
        relay.answer_bytes = None
        exported(shipper, 1, BACK_SECONDS)
        assert shipper.books() == Books(1, 1, {}, 0, 0)
        arrived = bodies(server)
        assert len(arrived) >= 2
        assert arrived == [["a"]] * len(arrived)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_certificate_expired(make: Made, protocol: str, certificates: Certificates) -> None:
    """A server whose certificate has expired gets nothing until it is renewed; then everything, in time."""
    server = server_of(protocol, certificates, expired=True)
    with server:
        shipper = make.logs(protocol, server.url, OTEL_EXPORTER_OTLP_CERTIFICATE=certificates.ca)
        shipper.offer([logs("a")])
        failures(shipper, 2)
        assert server.received == []
    renewed = server_of(protocol, certificates)
    renewed.port = server.port
    with renewed:
        exported(shipper, 1, BACK_SECONDS)
        assert bodies(renewed) == [["a"]]


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_end_while_it_hangs(make: Made, protocol: str) -> None:
    """The end comes in time with a server that hangs; what may have arrived and what waits is counted as lost."""
    with server_of(protocol) as server:
        server.play(Answer(until=threading.Event()))
        shipper = make.logs(protocol, server.url)
        shipper.offer([logs("a", "b")])
        wait_for("the first", lambda: server.received)
        shipper.offer([logs("c")])
        began = time.monotonic()
        shipper.close(began + 0.5)
        assert time.monotonic() - began < 1.0
        assert shipper.books() == Books(3, 0, {"shutdown": 3}, 0, 0)
        assert len(server.received) == 1
        make.shippers.remove(shipper)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_metrics_go_on(make: Made, protocol: str) -> None:
    """While the logs' server hangs, metrics arrive."""
    with server_of(protocol) as hanging, server_of(protocol) as server:
        hanging.play(Answer(until=threading.Event()))
        shipper, metrics = make.logs(protocol, hanging.url), make.metrics(protocol, server.url)
        shipper.offer([logs("a")])
        wait_for("the logs", lambda: hanging.received)
        for taken_ns in (1, 2, 3):
            metrics.offer([points(f"a{taken_ns}"), points(f"b{taken_ns}")], taken_ns)
            wait_for("the metrics", lambda: metrics.exported_ns == taken_ns)  # noqa: B023 - called in this turn
        names = [
            received.message().resource_metrics[0].scope_metrics[0].metrics[0].name for received in server.received
        ]
        assert names == ["a1", "b1", "a2", "b2", "a3", "b3"]
        assert shipper.books() == Books(1, 0, {}, 0, 1)
