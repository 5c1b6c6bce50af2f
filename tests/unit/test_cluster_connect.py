"""Connections: where configuration and credentials come from, and what is said when they are not good."""

from __future__ import annotations

import socket
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from otel_lb_hop.cluster import connect as module
from otel_lb_hop.cluster.connect import connector
from otel_lb_hop.cluster.failure import Cause, ClusterError
from otel_lb_hop.config import ApiConfig
from tests.unit.fake_api import CERTIFICATE_A, CERTIFICATE_B, SYSTEM, FakeApi, Handler, write_kubeconfig

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from otel_lb_hop.cluster.connect import Connection


@pytest.fixture
def api() -> Iterator[FakeApi]:
    """Run a server."""
    with FakeApi() as server:
        yield server


@pytest.fixture
def tls_api(tmp_path: Path) -> Iterator[FakeApi]:
    """Run a server with TLS."""
    with FakeApi(tmp_path) as server:
        yield server


def get(connection: Connection, target: str = SYSTEM) -> tuple[int, bytes]:
    """Ask for a small thing."""
    answer = connection.get(target, 5.0, 5.0)
    body = answer.read_small()
    answer.close()
    return answer.status, body


def pod(api: FakeApi, account: Path, token: str = "t1", certificate: str = CERTIFICATE_A) -> Callable[[], Connection]:  # noqa: S107
    """Make the files of a pod's ServiceAccount and what connects by them."""
    account.mkdir(exist_ok=True)
    (account / "token").write_text(token)
    (account / "ca.crt").write_text(certificate)
    environ = {"KUBERNETES_SERVICE_HOST": "127.0.0.1", "KUBERNETES_SERVICE_PORT": str(api.port)}
    return connector(ApiConfig(None), environ, account)


def failure(action: Callable[[], object]) -> ClusterError:
    """Let something fail."""
    with pytest.raises(ClusterError) as caught:
        action()
    return caught.value


def test_in_a_pod(tls_api: FakeApi, tmp_path: Path) -> None:
    """Address from the environment, token and CA certificate from the ServiceAccount's files."""
    status, body = get(pod(tls_api, tmp_path / "account")())
    assert (status, b"uid-of-kube-system" in body) == (200, True)
    assert tls_api.asked[0].headers["authorization"] == "bearer t1"


def test_rotated(tls_api: FakeApi, tmp_path: Path) -> None:
    """A connection that is made after the files changed has the new token and the new CA certificate."""
    connect = pod(tls_api, tmp_path / "account", certificate=CERTIFICATE_B)
    error = failure(lambda: get(connect()))
    assert error.cause is Cause.UNREACHABLE
    assert str(error).startswith(f"TLS with {tls_api.url} failed: ")
    assert str(error).endswith("; is the CA certificate the cluster's?")
    pod(tls_api, tmp_path / "account", token="t2")  # noqa: S106
    assert get(connect())[0] == 200
    assert tls_api.asked[-1].headers["authorization"] == "bearer t2"


@pytest.mark.parametrize("missing", ["token", "ca.crt"])
def test_not_in_a_pod(api: FakeApi, tmp_path: Path, missing: str) -> None:
    """What is missing is told when a connection is made, and looked for again each time."""
    connect = pod(api, tmp_path)
    (tmp_path / missing).unlink()
    error = failure(connect)
    assert error.cause is Cause.UNREACHABLE
    assert str(error).startswith("no configuration for the API server from the pod's ServiceAccount: Service ")
    (tmp_path / missing).write_text(CERTIFICATE_A)
    connect().close()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "No configuration found"),
        ("", "is empty"),
        ("{}", "current-context"),
        ("[", "expected the node content"),
        ("[]", ""),
        ("clusters: 5\ncontexts: {}\nusers: x\ncurrent-context: 7\n", ""),
    ],
)
def test_bad_kubeconfig(tmp_path: Path, text: str | None, said: str) -> None:
    """Whatever is wrong with the file is told with its name."""
    path = tmp_path / "kubeconfig"
    if text is not None:
        path.write_text(text)
    error = failure(connector(ApiConfig(str(path))))
    assert error.cause is Cause.UNREACHABLE
    assert str(error).startswith(f"no configuration for the API server from {path}: ")
    assert said in str(error)


def test_several_kubeconfigs(api: FakeApi, tmp_path: Path) -> None:
    """KUBECONFIG may name several files, some of which may be missing."""
    path = write_kubeconfig(tmp_path / "config", api.url, token="t")  # noqa: S106
    connection = connector(ApiConfig(f"{tmp_path / 'none'}:{path}"))()
    assert get(connection)[0] == 200
    connection.close()


@pytest.mark.parametrize(
    ("user", "sent"),
    [
        ({"token": "t"}, "Bearer t"),
        ({"token": "t\n"}, "Bearer t"),
        ({"username": "u", "password": "p"}, "Basic dTpw"),
        ({}, None),
    ],
)
def test_credentials(api: FakeApi, tmp_path: Path, user: dict[str, str], sent: str | None) -> None:
    """Whatever the package makes of a user is sent."""
    get(connector(ApiConfig(write_kubeconfig(tmp_path / "config", api.url, **user)))())
    assert api.asked[0].headers.get("authorization") == sent


def test_proxy(api: FakeApi, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The proxy of the environment is used, but for what NO_PROXY names."""
    monkeypatch.setenv("http_proxy", api.url)
    path = write_kubeconfig(tmp_path / "config", "http://api.cluster.example:8080")
    assert get(connector(ApiConfig(path))())[0] == 200
    assert api.asked[0].path == SYSTEM
    assert api.asked[0].headers["host"] == "api.cluster.example:8080"
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    assert get(connector(ApiConfig(write_kubeconfig(tmp_path / "config", api.url)))())[0] == 200


def test_refused(api: FakeApi, tmp_path: Path) -> None:
    """Nobody listens."""
    connection = connector(ApiConfig(write_kubeconfig(tmp_path / "config", api.url)))()
    api.stop()
    error = failure(lambda: get(connection))
    assert (error.cause, str(error)) == (Cause.UNREACHABLE, f"{api.url} cannot be reached: Connection refused")


def test_unknown_name(api: FakeApi, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There is no such name."""
    connection = connector(ApiConfig(write_kubeconfig(tmp_path / "config", "http://api.invalid")))()
    monkeypatch.setenv("RES_OPTIONS", "timeout:1 attempts:1")
    error = failure(lambda: get(connection))
    assert error.cause is Cause.UNREACHABLE
    assert str(error) == "the name of http://api.invalid cannot be resolved; does DNS work here?"
    assert not api.asked


def test_no_handshake(tls_api: FakeApi, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who accepts and does not begin with TLS is not there, which is something else than slow."""
    connect = pod(tls_api, tmp_path / "account")
    monkeypatch.setattr(module, "CONNECT_SECONDS", 0.2)
    tls_api.stop()
    with socket.create_server(("127.0.0.1", tls_api.port)):
        error = failure(lambda: get(connect()))
    assert error.cause is Cause.UNREACHABLE
    assert str(error) == f"{tls_api.url} cannot be reached: no TLS handshake in 0.2 s"


def test_a_token_of_two_lines(api: FakeApi, tmp_path: Path) -> None:
    """It cannot be sent, and is not told to anybody."""
    connection = connector(ApiConfig(write_kubeconfig(tmp_path / "config", api.url, token="sec\nret")))()  # noqa: S106
    error = failure(lambda: get(connection))
    assert error.cause is Cause.UNREACHABLE
    assert "are the credentials one line of text?" in str(error)
    assert "sec" not in str(error)


def test_dropped_before_the_answer(api: FakeApi, tmp_path: Path) -> None:
    """A balancer without servers behind it accepts and hangs up."""
    api.moods["/"] = lambda handler: handler.connection.shutdown(2)
    connection = connector(ApiConfig(write_kubeconfig(tmp_path / "config", api.url)))()
    error = failure(lambda: get(connection))
    assert error.cause is Cause.UNREACHABLE
    assert "cannot be reached: Remote end closed connection" in str(error)


def test_no_http(api: FakeApi, tmp_path: Path) -> None:
    """What answers is something else; what it says is told on one line and in ASCII."""
    api.moods["/"] = lambda handler: handler.connection.sendall(b"SSH-2.0-\xff\r\n")
    connection = connector(ApiConfig(write_kubeconfig(tmp_path / "config", api.url)))()
    error = failure(lambda: get(connection))
    assert error.cause is Cause.UNREACHABLE
    assert str(error) == f"{api.url} answers what is no HTTP: SSH-2.0-\\xff\\r\\n"


def test_half_a_head(api: FakeApi, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A head that breaks off is an answer without body, and no news for the log."""

    def break_off(handler: Handler) -> None:
        handler.connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Type: appl")
        handler.connection.shutdown(2)

    api.moods["/"] = break_off
    connection = connector(ApiConfig(write_kubeconfig(tmp_path / "config", api.url)))()
    assert get(connection) == (200, b"")
    assert not caplog.records


def test_redirect(api: FakeApi, tmp_path: Path) -> None:
    """The API redirects nobody: the token is not taken elsewhere."""
    api.moods[SYSTEM] = lambda handler: handler.answer({}, 302, Location="/elsewhere")
    connection = connector(ApiConfig(write_kubeconfig(tmp_path / "config", api.url)))()
    assert get(connection)[0] == 302
    assert len(api.asked) == 1


def test_kept_alive(api: FakeApi, tmp_path: Path) -> None:
    """One connection serves one request after the other."""
    ports: list[int] = []

    def answer_and_note(handler: Handler) -> None:
        ports.append(handler.client_address[1])
        handler.answer({})

    api.moods["/"] = answer_and_note
    connection = connector(ApiConfig(write_kubeconfig(tmp_path / "config", api.url)))()
    for _ in range(3):
        get(connection)
    assert len(ports) == 3
    assert len(set(ports)) == 1


def chunked(handler: Handler) -> None:
    """Be a mood that ends in the middle of a chunk."""
    handler.begin()
    handler.chunk(b"one")
    handler.wfile.write(b"5\r\ntw")
    handler.connection.shutdown(2)


def counted(handler: Handler) -> None:
    """Be a mood that promises more than it sends."""
    handler.send_response(200)
    handler.send_header("Content-Length", "10")
    handler.end_headers()
    handler.wfile.write(b"one")
    handler.connection.shutdown(2)


@pytest.mark.parametrize("mood", [chunked, counted])
def test_truncated(api: FakeApi, tmp_path: Path, mood: Callable[[Handler], None]) -> None:
    """An answer that is cut is never taken for a whole one."""
    api.moods[SYSTEM] = mood
    connection = connector(ApiConfig(write_kubeconfig(tmp_path / "config", api.url)))()
    answer = connection.get(SYSTEM, 5.0, 5.0)
    assert answer.read() == b"one"

    def read_on() -> None:
        while answer.read():
            pass

    error = failure(read_on)
    assert error.cause is Cause.BROKEN
    assert str(error).startswith("the answer stopped: ")
    answer.close()


def test_what_comes_is_read_at_once(api: FakeApi, tmp_path: Path) -> None:
    """A watch's line does not wait for a buffer to be full, whether in chunks or up to the end of the connection."""

    def drip(handler: Handler) -> None:
        handler.send_response(200)
        handler.send_header("Connection", "close")
        handler.end_headers()
        handler.wfile.write(b"one\n")
        with handler.api.changed:
            handler.api.changed.wait(5.0)
        handler.wfile.write(b"two\n")

    api.moods[SYSTEM] = drip
    answer = connector(ApiConfig(write_kubeconfig(tmp_path / "config", api.url)))().get(SYSTEM, 5.0, 5.0)
    assert answer.read() == b"one\n"
    with api.changed:
        api.changed.notify_all()
    assert answer.read() == b"two\n"
    assert answer.read() == b""
    answer.close()


def run(code: str) -> str:
    """Run code in an interpreter of its own and return what it printed."""
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.strip()


def test_only_what_is_needed_is_loaded(tmp_path: Path) -> None:
    """No models and no other parts of the package; and who needs all of it afterwards, as OIDC does, gets it."""
    path = write_kubeconfig(tmp_path / "config", "http://127.0.0.1:1")
    code = (
        "import sys; from otel_lb_hop.cluster.connect import connector, _whole_client;"
        f"from otel_lb_hop.config import ApiConfig; connector(ApiConfig({path!r}))();"
        "print([name for name in sys.modules if name.startswith('kubernetes') and name.count('.') < 2]);"
        "print(type(_whole_client()).__name__, 'kubernetes.client.models' in sys.modules)"
    )
    assert run(code) == "[]\nApiClient True"
