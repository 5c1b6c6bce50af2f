"""The local API over real HTTP."""

from __future__ import annotations

import json
import socket
import threading
import time
from contextlib import closing
from http.client import HTTPConnection
from http.server import ThreadingHTTPServer
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest

from otel_lb_hop.errors import ConfigError
from otel_lb_hop.ops.api import LocalApi
from otel_lb_hop.ops.health import STALE_SECONDS, Health

if TYPE_CHECKING:
    from collections.abc import Iterator


class Answer(NamedTuple):
    """What came back."""

    status: int
    kind: str | None
    body: bytes

    @property
    def content(self) -> Any:  # noqa: ANN401 - JSON
        """The body as JSON."""
        return json.loads(self.body)


@pytest.fixture(autouse=True)
def _quick_to_close(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let servers look more often than twice a second whether they shall end."""
    serve = ThreadingHTTPServer.serve_forever
    monkeypatch.setattr(ThreadingHTTPServer, "serve_forever", lambda server: serve(server, 0.01))


@pytest.fixture
def health() -> Health:
    """Give a board with nothing on it."""
    return Health()


@pytest.fixture
def api(health: Health) -> Iterator[LocalApi]:
    """Serve the board on a port that the kernel picks."""
    with closing(LocalApi(("127.0.0.1", 0), health)) as server:
        yield server


def ask(api: LocalApi, path: str, method: str = "GET", host: str = "127.0.0.1") -> Answer:
    """Ask one question on a connection of its own."""
    with closing(HTTPConnection(host, api.port, timeout=10)) as connection:
        connection.request(method, path)
        response = connection.getresponse()
        return Answer(response.status, response.getheader("Content-Type"), response.read())


def test_before_the_first_beat(api: LocalApi, health: Health) -> None:
    """Until the main loop runs both answers are 503: neither alive nor ready."""
    health.report("hooks", healthy=True, vital=True)
    assert ask(api, "/healthz")[:2] == (503, "application/json")
    assert ask(api, "/healthz").content == {"alive": False}
    ready = ask(api, "/readyz")
    assert (ready.status, ready.content["ready"]) == (503, False)


def test_all_is_well(api: LocalApi, health: Health) -> None:
    """With a beat and healthy parts both are 200, and each part's detail is there as it was reported."""
    health.beat(time.monotonic())
    health.report("interfaces", healthy=True, vital=False, detail={"hooked": ["eth0"], "problems": {}})
    assert ask(api, "/healthz") == (200, "application/json", b'{\n  "alive": true\n}\n')
    ready = ask(api, "/readyz")
    assert (ready.status, ready.kind) == (200, "application/json")
    assert ready.content == {
        "ready": True,
        "degraded": [],
        "parts": {
            "interfaces": {"healthy": True, "vital": False, "detail": {"hooked": ["eth0"], "problems": {}}},
        },
    }


def test_degraded(api: LocalApi, health: Health) -> None:
    """Parts that are not vital may fail: still 200, but they are named."""
    health.beat(time.monotonic())
    health.report("topology", healthy=True, vital=True)
    for part in ("traces", "logs"):
        health.report(part, healthy=False, vital=False, detail="is its Collector there?")
    ready = ask(api, "/readyz")
    assert (ready.status, ready.content["degraded"]) == (200, ["logs", "traces"])
    assert ready.content["parts"]["logs"]["detail"] == "is its Collector there?"


def test_vital_part_fails(api: LocalApi, health: Health) -> None:
    """Without a vital part the agent is alive but not ready, until the part is back."""
    health.beat(time.monotonic())
    health.report("topology", healthy=False, vital=True, detail="no")
    assert ask(api, "/healthz").status == 200
    ready = ask(api, "/readyz")
    assert (ready.status, ready.content["ready"], ready.content["degraded"]) == (503, False, ["topology"])
    health.report("topology", healthy=True, vital=True)
    assert ask(api, "/readyz").status == 200


def test_main_loop_hangs(api: LocalApi, health: Health) -> None:
    """A last beat too long ago is 503 for both."""
    health.report("topology", healthy=True, vital=True)
    health.beat(time.monotonic() - STALE_SECONDS - 1)
    assert (ask(api, "/healthz").status, ask(api, "/readyz").status) == (503, 503)


def test_not_found(api: LocalApi) -> None:
    """Anything else is 404, and says what there is."""
    for path in ("/", "/healthz/", "/metrics", "/../etc/passwd", "/healthz%00"):
        answer = ask(api, path)
        assert answer.status == 404
        assert b"there are /healthz and /readyz" in answer.body


def test_read_only(api: LocalApi) -> None:
    """Nothing can be changed through the API."""
    assert [ask(api, "/healthz", method).status for method in ("POST", "PUT", "DELETE")] == [501] * 3


def test_silent_client_does_not_block_others(api: LocalApi, health: Health) -> None:
    """A client that connects and says nothing holds up nobody else."""
    health.beat(time.monotonic())
    with socket.create_connection(("127.0.0.1", api.port)):
        assert ask(api, "/healthz").status == 200


def test_says_nothing(api: LocalApi, capfd: pytest.CaptureFixture[str]) -> None:
    """Probes leave no lines on stderr."""
    ask(api, "/healthz")
    ask(api, "/nowhere")
    assert capfd.readouterr() == ("", "")


def test_port_in_use(api: LocalApi, health: Health) -> None:
    """A port that is taken is a wrong setting, with its name and what was read."""
    with pytest.raises(ConfigError) as caught:
        LocalApi(("127.0.0.1", api.port), health)
    (problem,) = caught.value.problems
    assert (problem.name, problem.read) == ("OTEL_LB_HOP_LISTEN", f"127.0.0.1:{api.port}")
    assert problem.accepted == "a free local address: [Errno 98] Address already in use"


def test_foreign_address(health: Health) -> None:
    """An address that this machine does not have is a wrong setting as well."""
    with pytest.raises(ConfigError, match=r"OTEL_LB_HOP_LISTEN: read '192\.0\.2\.1:0'"):
        LocalApi(("192.0.2.1", 0), health)


def test_ipv6(health: Health) -> None:
    """An IPv6 address is listened on as such."""
    try:
        server = LocalApi(("::1", 0), health)
    except ConfigError:
        pytest.skip("no IPv6 on this machine's loopback")
    with closing(server):
        assert ask(server, "/healthz", host="::1").status == 503


def test_asks_no_name_server(health: Health, monkeypatch: pytest.MonkeyPatch) -> None:
    """Starting looks no name up: without a DNS server that would take seconds, in which nothing is counted."""

    def look_up(*_: object) -> str:
        raise AssertionError("a name was looked up")

    monkeypatch.setattr(socket, "getfqdn", look_up)
    monkeypatch.setattr(socket, "gethostbyaddr", look_up)
    with closing(LocalApi(("127.0.0.1", 0), health)) as server:
        assert ask(server, "/healthz").status == 503


def test_close(health: Health) -> None:
    """After closing the port is free, the thread ends, and the same address can be had again."""
    server = LocalApi(("127.0.0.1", 0), health)
    ask(server, "/healthz")
    server.close()
    server._thread.join(10)
    assert server._thread not in threading.enumerate()
    with closing(LocalApi(("127.0.0.1", server.port), health)) as again:
        assert ask(again, "/healthz").status == 503
