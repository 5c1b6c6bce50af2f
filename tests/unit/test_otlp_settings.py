# ruff: noqa: TID251, PLC2701 - the SDK's exporters are the oracle, and those of logs still private
# ruff: noqa: D102 - the name of a test says it
"""The OTLP variables: both ways of the SDK and ours send with the same environment, and the servers compare."""

from __future__ import annotations

import importlib
import os
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
from opentelemetry.exporter.otlp.proto.grpc._log_exporter import OTLPLogExporter as GrpcLogs
from opentelemetry.exporter.otlp.proto.grpc.metric_exporter import OTLPMetricExporter as GrpcMetrics
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter as GrpcSpans
from opentelemetry.exporter.otlp.proto.http._log_exporter import OTLPLogExporter as HttpLogs
from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter as HttpMetrics
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter as HttpSpans
from opentelemetry.sdk.metrics.export import MetricsData

from otel_lb_hop.errors import ConfigError
from otel_lb_hop.export.delivery import Chunk, Reply
from otel_lb_hop.export.otlp_settings import (
    GrpcSettings,
    HttpSettings,
    Named,
    Proxy,
    Tls,
    _direct,
    grpc_settings,
    http_settings,
    unheeded,
)
from otel_lb_hop.export.transport import make_sink
from otel_lb_hop.export.wire import Envelope
from tests.unit.otlp_sink import Certificates, GrpcServer, HttpServer, make_certificates

if TYPE_CHECKING:
    from collections.abc import Iterator

grpc: Any = importlib.import_module("grpc")  # a package without types
requests_utils: Any = importlib.import_module("requests.utils")  # as well

GRPC, HTTP = "grpc", "http/protobuf"
SIGNALS = ("logs", "traces", "metrics")
EXPORTERS: dict[tuple[str, str], Any] = {
    (GRPC, "logs"): GrpcLogs,
    (GRPC, "traces"): GrpcSpans,
    (GRPC, "metrics"): GrpcMetrics,
    (HTTP, "logs"): HttpLogs,
    (HTTP, "traces"): HttpSpans,
    (HTTP, "metrics"): HttpMetrics,
}
PREFIX = "OTEL_EXPORTER_OTLP_"
CHUNK = Chunk(Envelope({}, "", "", ""), b"", 0, 0)
THEIR_OWN = {"user-agent", "accept", "accept-encoding", "connection", "content-length"}
"""Headers that say who speaks and how, not what was set."""


class World(NamedTuple):
    """All servers, by protocol and name, and what a row of the table may mention."""

    servers: dict[str, dict[str, GrpcServer | HttpServer]]
    places: dict[str, dict[str, str]]


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    """Make one set for all."""
    return make_certificates(tmp_path_factory.mktemp("certificates"))


@pytest.fixture(scope="module")
def world(certificates: Certificates, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """Run every server that a row may send to."""
    unix = tmp_path_factory.mktemp("unix") / "otlp.sock"
    with ExitStack() as stack:
        grpc_servers: dict[str, GrpcServer | HttpServer] = {
            "clear": stack.enter_context(GrpcServer()),
            "tls": stack.enter_context(GrpcServer(certificates)),
            "mutual": stack.enter_context(GrpcServer(certificates, mutual=True)),
            "unix": stack.enter_context(GrpcServer(unix=unix)),
        }
        http_servers: dict[str, GrpcServer | HttpServer] = {
            "clear": stack.enter_context(HttpServer()),
            "tls": stack.enter_context(HttpServer(certificates)),
        }
        http_servers["mutual"] = http_servers["tls"]
        files = {"ca": certificates.ca, "cert": certificates.client, "key": certificates.client_key, "unix": str(unix)}
        servers = {GRPC: grpc_servers, HTTP: http_servers}
        yield World(
            servers,
            {
                protocol: files | {name: str(server.port) for name, server in named.items() if name != "unix"}
                for protocol, named in servers.items()
            },
        )


CLEAR = {"ENDPOINT": "http://localhost:{clear}"}
SECURE = {"ENDPOINT": "https://localhost:{tls}", "CERTIFICATE": "{ca}"}
MUTUAL = {"ENDPOINT": "https://localhost:{mutual}", "CERTIFICATE": "{ca}"}
PAIR = {"CLIENT_CERTIFICATE": "{cert}", "CLIENT_KEY": "{key}"}
AWAY = {"ENDPOINT": "http://collector.invalid:4318"}

# Names without OTEL_EXPORTER_OTLP_; `S_` becomes the signal. Names in lower case and with `=` before are taken as is.
BOTH_ROWS: dict[str, dict[str, str]] = {
    "endpoint": CLEAR,
    "endpoint by address": {"ENDPOINT": "http://127.0.0.1:{clear}"},
    "scheme in capitals": {"ENDPOINT": "HTTP://localhost:{clear}"},
    "endpoint with a slash": {"ENDPOINT": "http://localhost:{clear}/"},
    "endpoint with a path": {"ENDPOINT": "http://localhost:{clear}/base"},
    "endpoint with a path and a slash": {"ENDPOINT": "http://localhost:{clear}/base/"},
    "own endpoint": {"S_ENDPOINT": "http://localhost:{clear}"},
    "own endpoint with a path": {"S_ENDPOINT": "http://localhost:{clear}/my/own"},
    "own endpoint with a query": {"S_ENDPOINT": "http://localhost:{clear}/my%20own/%C3%A9?a=b%20c&d=/e#f"},
    "own endpoint with signs to quote": {"S_ENDPOINT": 'http://localhost:{clear}/a b"é'},
    "own endpoint wins": {"ENDPOINT": "http://localhost:1", "S_ENDPOINT": "http://localhost:{clear}/v1/x"},
    "headers": CLEAR | {"HEADERS": "api-key=secret, X-Upper =a%20b%3D%2C , empty=,eq=a=b,twice=1,twice=2"},
    "headers with blanks": CLEAR | {"HEADERS": "authorization=Bearer abc%20def ghi,tail=x y "},
    "own headers replace": CLEAR | {"HEADERS": "a=1,b=2", "S_HEADERS": "b=3"},
    "headers with commas too many": CLEAR | {"HEADERS": ",a=1,,b=2,"},
    "percent in a name": CLEAR | {"HEADERS": "a%2Db=1"},
    "gzip": CLEAR | {"COMPRESSION": "gzip"},
    "gzip in capitals": CLEAR | {"COMPRESSION": " GZIP "},
    "own gzip": CLEAR | {"S_COMPRESSION": "gzip"},
    "timeout": CLEAR | {"TIMEOUT": "2.5"},
    "own timeout wins": CLEAR | {"TIMEOUT": "2.5", "S_TIMEOUT": "7"},
    "another signal's variables": CLEAR
    | {"PROFILES_ENDPOINT": "http://localhost:1", "PROFILES_HEADERS": "a=1", "PROFILES_TIMEOUT": "1"},
    "TLS": SECURE,
    "own roots": {"ENDPOINT": "https://localhost:{tls}", "S_CERTIFICATE": "{ca}"},
    "own roots win": SECURE | {"CERTIFICATE": "{cert}", "S_CERTIFICATE": "{ca}"},
    "mutual TLS": MUTUAL | PAIR,
    "own mutual TLS": {"ENDPOINT": "https://localhost:{mutual}", "S_CERTIFICATE": "{ca}"}
    | {"S_CLIENT_CERTIFICATE": "{cert}", "S_CLIENT_KEY": "{key}"},
    "files in the clear": CLEAR | {"CERTIFICATE": "{ca}"} | PAIR,
    "https is never insecure": SECURE | {"INSECURE": "true", "S_INSECURE": "true"},
}
GRPC_ROWS: dict[str, dict[str, str]] = {
    "no scheme": {"ENDPOINT": "localhost:{clear}", "INSECURE": "true"},
    "no scheme, by address": {"ENDPOINT": "127.0.0.1:{clear}", "INSECURE": "TRUE"},
    "no scheme, TLS": {"ENDPOINT": "localhost:{tls}", "CERTIFICATE": "{ca}"},
    "insecure of the signal": {"ENDPOINT": "localhost:{clear}", "S_INSECURE": "true"},
    "insecure of the signal wins": {"ENDPOINT": "localhost:{clear}", "INSECURE": "false", "S_INSECURE": "true"},
    "insecure in vain": SECURE | {"ENDPOINT": "http://localhost:{tls}", "INSECURE": "false"},
    "another scheme": SECURE | {"ENDPOINT": "grpc://localhost:{tls}"},
    "a name of gRPC, dns": {"ENDPOINT": "dns:localhost:{clear}", "INSECURE": "true"},
    "a name of gRPC, dns with slashes": {"ENDPOINT": "dns:///localhost:{clear}", "INSECURE": "true"},
    "a name of gRPC, ipv4": {"ENDPOINT": "ipv4:127.0.0.1:{clear}", "INSECURE": "true"},
    "unix socket": {"ENDPOINT": "unix:{unix}", "INSECURE": "true"},
    "unix socket with slashes": {"S_ENDPOINT": "unix://{unix}", "S_INSECURE": "true"},
}
HTTP_ROWS: dict[str, dict[str, str]] = {
    "deflate": CLEAR | {"COMPRESSION": "deflate"},
    "own none": CLEAR | {"COMPRESSION": "gzip", "S_COMPRESSION": "none"},
    "user and password": {"ENDPOINT": "http://me:p%40ss@localhost:{clear}"},
    "user alone": {"ENDPOINT": "http://me@localhost:{clear}"},
    "user and password win": {"ENDPOINT": "http://me:pass@localhost:{clear}", "HEADERS": "authorization=Bearer x"},
    "headers that are ours": CLEAR | {"HEADERS": "content-type=application/x-other,content-encoding=identity"},
    "header with a sign of Latin": CLEAR | {"HEADERS": "a=%C3%A9"},
    "header host": CLEAR | {"HEADERS": "host=collector.example.com"},
    "insecure means nothing": CLEAR | {"INSECURE": "false"},
    "mutual TLS of both kinds": MUTUAL | {"S_CLIENT_CERTIFICATE": "{cert}", "CLIENT_KEY": "{key}"},
    "client of a signal, roots of all": MUTUAL | {"S_CLIENT_CERTIFICATE": "{cert}", "S_CLIENT_KEY": "{key}"},
    "roots of requests": {"ENDPOINT": "https://localhost:{tls}", "=REQUESTS_CA_BUNDLE": "{ca}"},
    "roots of curl": {"ENDPOINT": "https://localhost:{tls}", "=CURL_CA_BUNDLE": "{ca}"},
    "proxy": AWAY | {"=http_proxy": "http://localhost:{clear}"},
    "proxy in capitals": AWAY | {"=HTTP_PROXY": "http://localhost:{clear}"},
    "proxy of all": AWAY | {"=ALL_PROXY": "http://localhost:{clear}"},
    "proxy without scheme": AWAY | {"=all_proxy": "127.0.0.1:{clear}"},
    "proxy with a password": AWAY | {"=http_proxy": "http://me:p%40ss@localhost:{clear}"},
    "proxy and a query": {"S_ENDPOINT": "http://collector.invalid/a?b=c", "=http_proxy": "http://localhost:{clear}"},
    "no proxy for it": CLEAR | {"=http_proxy": "http://localhost:1", "=no_proxy": "example.com, localhost"},
    "no proxy for any": CLEAR | {"=http_proxy": "http://localhost:1", "=NO_PROXY": "*"},
    "lower case that is empty": CLEAR | {"=http_proxy": "", "=HTTP_PROXY": "http://localhost:1"},
    "proxy of the other scheme": CLEAR | {"=https_proxy": "http://localhost:1"},
}
ROWS = [
    pytest.param(protocol, row, id=f"{protocol}-{name}")
    for protocol, rows in ((GRPC, BOTH_ROWS | GRPC_ROWS), (HTTP, BOTH_ROWS | HTTP_ROWS))
    for name, row in rows.items()
]


def environ_of(row: dict[str, str], signal: str, places: dict[str, str]) -> dict[str, str]:
    """Make the environment of a row."""
    environ = {}
    for name, value in row.items():
        own = name.replace("S_", f"{signal.upper()}_", 1) if name.startswith("S_") else name
        environ[name[1:] if name.startswith("=") else PREFIX + own] = value.format_map(places)
    return environ


def sent_by_sdk(protocol: str, signal: str) -> tuple[float, bool]:
    """Send nothing much as the SDK does; returns its time-out and whether gRPC was to compress."""
    exporter = EXPORTERS[protocol, signal]()
    try:
        result = exporter.export(MetricsData([]) if signal == "metrics" else [])
        assert result.name == "SUCCESS"
        if protocol == GRPC:
            return exporter._timeout, exporter._compression == grpc.Compression.Gzip
        return exporter._client._timeout, False
    finally:
        exporter.shutdown()


def sent_by_us(protocol: str, signal: str, environ: dict[str, str]) -> tuple[float, bool]:
    """Send as little as we do; returns the same."""
    sink = make_sink(signal, protocol, environ)
    assert sink.send([CHUNK]) == Reply(taken=True)
    sink.close()
    settings = grpc_settings(signal, environ) if protocol == GRPC else http_settings(signal, environ)
    return settings.timeout_seconds, protocol == GRPC and settings.compression == "gzip"


def taken_out(servers: dict[str, GrpcServer | HttpServer]) -> list[Any]:
    """Tell what came in since the last look: where, and what of it the variables decide."""
    found = []
    for name, server in servers.items():
        for received in server.received:
            headers = {key: value for key, value in received.headers.items() if key not in THEIR_OWN}
            found.append((name, received.path, headers, received.client_name))
        server.received.clear()
    return found


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> None:
    """Start from an environment without anything that either side reads."""
    for name in os.environ:
        if name.startswith("OTEL_") or name.lower().endswith("_proxy") or name.endswith("_CA_BUNDLE"):
            monkeypatch.delenv(name)


@pytest.mark.parametrize("signal", SIGNALS)
@pytest.mark.parametrize(("protocol", "row"), ROWS)
def test_as_the_sdk(
    world: World, monkeypatch: pytest.MonkeyPatch, protocol: str, row: dict[str, str], signal: str
) -> None:
    """Same server, path, headers, client, time-out and compression, each row by itself."""
    environ = environ_of(row, signal, world.places[protocol])
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    servers = world.servers[protocol]
    by_sdk = sent_by_sdk(protocol, signal)
    received_from_sdk = taken_out(servers)
    assert received_from_sdk
    by_us = sent_by_us(protocol, signal, environ)
    assert (taken_out(servers), by_us) == (received_from_sdk, by_sdk)


@pytest.mark.parametrize("signal", SIGNALS)
def test_defaults_as_the_sdk(signal: str) -> None:
    """Nothing set: nobody listens there, so what the SDK holds is compared."""
    by_grpc, by_http = EXPORTERS[GRPC, signal](), EXPORTERS[HTTP, signal]()
    ours_by_grpc, ours_by_http = grpc_settings(signal, {}), http_settings(signal, {})
    assert ours_by_grpc.target == by_grpc._endpoint
    assert (ours_by_grpc.tls is None) == by_grpc._insecure
    assert f"http://{ours_by_http.host}:{ours_by_http.port}{ours_by_http.path}" == by_http._endpoint
    assert (ours_by_grpc.timeout_seconds, ours_by_http.timeout_seconds) == (by_grpc._timeout, by_http._client._timeout)
    for exporter in (by_grpc, by_http):
        exporter.shutdown()


class TestValues:
    """What the settings are, and where they are meant to differ from the SDK's."""

    def test_grpc(self) -> None:
        environ = {
            "OTEL_EXPORTER_OTLP_ENDPOINT": "https://collector.example.com:4317/ignored",
            "OTEL_EXPORTER_OTLP_LOGS_CERTIFICATE": "/ca.pem",
            "OTEL_EXPORTER_OTLP_HEADERS": "a=b",
            "OTEL_EXPORTER_OTLP_COMPRESSION": "gzip",
            "OTEL_EXPORTER_OTLP_LOGS_TIMEOUT": "3",
            "OTEL_PYTHON_EXPORTER_OTLP_GRPC_RETRYABLE_ERROR_CODES": "unavailable, internal",
            "OTEL_PYTHON_EXPORTER_OTLP_GRPC_LOGS_CREDENTIAL_PROVIDER": "vault",
        }
        assert grpc_settings("logs", environ) == GrpcSettings(
            signal="logs",
            target="collector.example.com:4317",
            tls=Tls(ca=Named("OTEL_EXPORTER_OTLP_LOGS_CERTIFICATE", "/ca.pem")),
            provider=Named("OTEL_PYTHON_EXPORTER_OTLP_GRPC_LOGS_CREDENTIAL_PROVIDER", "vault"),
            headers=(("a", "b"),),
            compression="gzip",
            timeout_seconds=3.0,
            retry_codes=frozenset({"UNAVAILABLE", "INTERNAL"}),
        )

    def test_http(self) -> None:
        environ = {
            "OTEL_EXPORTER_OTLP_ENDPOINT": "https://[2001:DB8::1]:4318/base",
            "OTEL_EXPORTER_OTLP_CLIENT_CERTIFICATE": "/both.pem",
            "OTEL_EXPORTER_OTLP_HEADERS": "a=b",
            "https_proxy": "proxy.example.com:3128",
        }
        both = Named("OTEL_EXPORTER_OTLP_CLIENT_CERTIFICATE", "/both.pem")
        assert http_settings("traces", environ) == HttpSettings(
            signal="traces",
            host="2001:db8::1",
            port=4318,
            path="/base/v1/traces",
            tls=Tls(None, both, both),
            headers=(("content-type", "application/x-protobuf"), ("user-agent", "otel-lb-hop/0.1.0"), ("a", "b")),
            compression="none",
            timeout_seconds=10.0,
            proxy=Proxy("proxy.example.com", 3128, None),
        )

    def test_empty_and_blank_are_not_set(self) -> None:
        names = ("ENDPOINT", "HEADERS", "TIMEOUT", "COMPRESSION", "CERTIFICATE", "CLIENT_KEY", "CLIENT_CERTIFICATE")
        environ = {f"{PREFIX}{kind}{name}": " " for kind in ("", "METRICS_") for name in (*names, "INSECURE")}
        assert grpc_settings("metrics", environ) == grpc_settings("metrics", {})
        assert http_settings("metrics", environ) == http_settings("metrics", {})

    def test_grpc_takes_none_for_a_compression(self) -> None:
        environ = {"OTEL_EXPORTER_OTLP_COMPRESSION": "gzip", "OTEL_EXPORTER_OTLP_LOGS_COMPRESSION": "none"}
        assert grpc_settings("logs", environ).compression == "none"
        assert grpc_settings("traces", environ).compression == "gzip"

    def test_a_client_certificate_counts_without_roots(self) -> None:
        environ = environ_of(PAIR | {"ENDPOINT": "https://localhost"}, "logs", {"cert": "/cert", "key": "/key"})
        tls = grpc_settings("logs", environ).tls
        assert tls
        assert (tls.certificate, tls.key) == (
            Named("OTEL_EXPORTER_OTLP_CLIENT_CERTIFICATE", "/cert"),
            Named("OTEL_EXPORTER_OTLP_CLIENT_KEY", "/key"),
        )

    def test_our_variable_for_the_roots_wins(self) -> None:
        environ = {"ENDPOINT": "https://localhost", "CERTIFICATE": "/ours", "=REQUESTS_CA_BUNDLE": "/theirs"}
        tls = http_settings("logs", environ_of(environ, "logs", {})).tls
        assert tls == Tls(Named("OTEL_EXPORTER_OTLP_CERTIFICATE", "/ours"))

    def test_a_signals_own_roots_win_over_the_plugin_of_all(self) -> None:
        plugin = {"=OTEL_PYTHON_EXPORTER_OTLP_GRPC_CREDENTIAL_PROVIDER": "vault"}
        assert grpc_settings("logs", environ_of(plugin, "logs", {})).provider
        assert not grpc_settings("logs", environ_of(plugin | {"S_CERTIFICATE": "/ca"}, "logs", {})).provider


SECONDS = "seconds above 0, at most 86400"
HEADERS = "name=value items split by commas, values percent-encoded, of characters that a header may have"
GRPC_ENDPOINT = "http://HOST:PORT, https://HOST:PORT, HOST:PORT, unix:PATH or another gRPC name"
HTTP_ENDPOINT = "http://HOST[:PORT][/PATH] or https://..., signs like @ in it percent-encoded"
WRONG = [
    (GRPC, "ENDPOINT", "http://", "http://", GRPC_ENDPOINT),
    (GRPC, "ENDPOINT", "http://:4317", "http://:4317", GRPC_ENDPOINT),
    (GRPC, "ENDPOINT", "http://host:port", "http://host:port", GRPC_ENDPOINT),
    (GRPC, "ENDPOINT", "http://host:99999", "http://host:99999", GRPC_ENDPOINT),
    (GRPC, "ENDPOINT", "http://me:secret@host:1", "http://host:1", GRPC_ENDPOINT),
    (GRPC, "ENDPOINT", "host:1/path", "host:1/path", GRPC_ENDPOINT),
    (GRPC, "ENDPOINT", "a host:1", "a host:1", GRPC_ENDPOINT),
    (GRPC, "ENDPOINT", "http://[::1", "http://[::1", GRPC_ENDPOINT),
    (GRPC, "ENDPOINT", "unix://run/otlp.sock", "unix://run/otlp.sock", GRPC_ENDPOINT),
    (GRPC, "ENDPOINT", "dns://8.8.8.8/host:1", "dns://8.8.8.8/host:1", GRPC_ENDPOINT),
    (GRPC, "INSECURE", "yes", "yes", "true or false"),
    (GRPC, "COMPRESSION", "deflate", "deflate", "none or gzip"),
    (GRPC, "HEADERS", "token-bin=secret", "item 1", HEADERS),
    (GRPC, "HEADERS", "a!=secret", "item 1", HEADERS),
    (GRPC, "HEADERS", "a=b,gRPC-Timeout=1S", "item 2", HEADERS),
    (GRPC, "HEADERS", "a=b%09c", "item 1", HEADERS),
    (GRPC, "HEADERS", "a=b%7Fc", "item 1", HEADERS),
    (GRPC, "ENDPOINT", "dns:host:1?token=secret", "dns:host:1", GRPC_ENDPOINT),
    (GRPC, "HEADERS", "a=%C3%A9", "item 1", HEADERS),
    (HTTP, "ENDPOINT", "localhost:4318", "localhost:4318", HTTP_ENDPOINT),
    (HTTP, "ENDPOINT", "unix:/run/otlp.sock", "unix:/run/otlp.sock", HTTP_ENDPOINT),
    (HTTP, "LOGS_ENDPOINT", "http://", "http://", HTTP_ENDPOINT),
    (HTTP, "LOGS_ENDPOINT", "http://me:secret@host:x", "http://host:x", HTTP_ENDPOINT),
    (HTTP, "COMPRESSION", "zstd", "zstd", "none, gzip or deflate"),
    (HTTP, "HEADERS", "a=b,a=%E2%82%AC", "item 2", HEADERS),
    (HTTP, "HEADERS", "content-length=1", "item 1", HEADERS),
    *(
        (protocol, name, text, read, accepted)
        for protocol in (GRPC, HTTP)
        for name, text, read, accepted in (
            *(
                ("ENDPOINT", text, read, GRPC_ENDPOINT if protocol == GRPC else HTTP_ENDPOINT)
                for text, read in (
                    ("http://me:secret/secret@host:1", "http://host:1"),
                    ("http://me:12/secret@host:1", "http://host:1"),
                    ("http://me:12?secret@host:1/v1", "http://host:1/v1"),
                    ("http://me:12#secret@host:1", "http://host:1"),
                    ("http://secret/me:12@secret@host:1", "http://host:1"),
                    ("HTTPS://me:secret@secret@host:x", "HTTPS://host:x"),
                    ("ftp/me:secret@host", "host"),
                    ("http://host:x/path?api_key=secret", "http://host:x/path"),
                    ("http://host:x#secret", "http://host:x"),
                )
            ),
            ("TIMEOUT", "0", "0", SECONDS),
            ("TIMEOUT", "-1", "-1", SECONDS),
            ("LOGS_TIMEOUT", "10s", "10s", SECONDS),
            ("TIMEOUT", "nan", "nan", SECONDS),
            ("TIMEOUT", "1e9", "1e9", SECONDS),
            ("HEADERS", "secret", "item 1", HEADERS),
            ("LOGS_HEADERS", "a=b,=secret", "item 2", HEADERS),
            ("HEADERS", 'a="secret"', "item 1", HEADERS),
            ("HEADERS", "a=b%0D%0Ac:d", "item 1", HEADERS),
            ("HEADERS", "a=b;c", "item 1", HEADERS),
        )
    ),
]


class TestWrong:
    """What is refused, and how it is told."""

    @pytest.mark.parametrize(("protocol", "name", "text", "read", "accepted"), WRONG)
    def test_each(self, protocol: str, name: str, text: str, read: str, accepted: str) -> None:
        with pytest.raises(ConfigError) as caught:
            make_sink("logs", protocol, {PREFIX + name: text})
        assert caught.value.problems == ((PREFIX + name, read, accepted),)
        assert "secret" not in str(caught.value)

    @pytest.mark.parametrize("protocol", [GRPC, HTTP])
    def test_all_at_once(self, protocol: str) -> None:
        names = {"ENDPOINT": "http://", "LOGS_TIMEOUT": "never", "COMPRESSION": "zip", "HEADERS": "a"}
        with pytest.raises(ConfigError) as caught:
            make_sink("logs", protocol, {PREFIX + name: text for name, text in names.items()})
        assert {problem.name for problem in caught.value.problems} == {PREFIX + name for name in names}

    @pytest.mark.parametrize("protocol", [GRPC, HTTP])
    def test_a_key_without_a_certificate(self, protocol: str) -> None:
        environ = {PREFIX + "ENDPOINT": "https://localhost", PREFIX + "LOGS_CLIENT_KEY": "/key.pem"}
        with pytest.raises(ConfigError) as caught:
            make_sink("logs", protocol, environ)
        accepted = "a key together with its certificate in OTEL_EXPORTER_OTLP_CLIENT_CERTIFICATE"
        assert caught.value.problems == (("OTEL_EXPORTER_OTLP_LOGS_CLIENT_KEY", "/key.pem", accepted),)

    def test_codes(self) -> None:
        variable = "OTEL_PYTHON_EXPORTER_OTLP_GRPC_RETRYABLE_ERROR_CODES"
        with pytest.raises(ConfigError, match=f"{variable}: read 'OK,UNAVAIL'"):
            grpc_settings("logs", {variable: "unavail,ABORTED,ok"})

    @pytest.mark.parametrize("kind", ["", "LOGS_"])
    def test_a_plugin_for_http_is_sent_to_the_sdks_exporter(self, kind: str) -> None:
        variable = f"OTEL_PYTHON_EXPORTER_OTLP_HTTP_{kind}CREDENTIAL_PROVIDER"
        with pytest.raises(ConfigError, match="OTEL_LOGS_EXPORTER=otlp_proto_http"):
            http_settings("logs", {variable: "vault"})

    @pytest.mark.parametrize(
        "text",
        [
            "socks5://localhost:1080",
            "https://me:secret@localhost",
            "http://",
            "http://me:12/secret@localhost",
            "me:12?secret@localhost",
        ],
    )
    def test_proxies_of_other_kinds(self, text: str) -> None:
        with pytest.raises(ConfigError) as caught:
            http_settings("logs", {"all_proxy": text})
        assert caught.value.problems[0].name == "all_proxy"
        assert "secret" not in str(caught.value)
        assert http_settings("logs", {"all_proxy": text, "no_proxy": "localhost"}).proxy is None


@pytest.mark.parametrize("host", ["collector.example.com", "10.1.2.3", "localhost", "otel"])
@pytest.mark.parametrize(
    "listed",
    [
        *(
            "",
            "*",
            "example.com",
            ".example.com",
            "EXAMPLE.com",
            "ample.com",
            "example.com:4318",
            "example.com:1",
            "a, otel",
        ),
        *("10.0.0.0/8", "10.1.2.3", "10.1.2.4", "11.0.0.0/8", "localhost", "com,", ",", "*,x", "10.1.2.3/33"),
    ],
)
def test_no_proxy_as_requests(monkeypatch: pytest.MonkeyPatch, host: str, listed: str) -> None:
    """Names, ends of names, addresses and networks."""
    monkeypatch.setenv("no_proxy", listed)
    assert _direct(host, 4318, listed) == requests_utils.should_bypass_proxies(f"http://{host}:4318", None)


def test_a_place_has_no_secret() -> None:
    """It stands in the log."""
    sink = make_sink("logs", HTTP, {PREFIX + "LOGS_ENDPOINT": "http://me:a@secret@host:1/path?api_key=secret"})
    assert sink.place == "http://host:1/path"


class TestUnheeded:
    """What the metrics cannot be."""

    def test_exponential(self) -> None:
        name = "OTEL_EXPORTER_OTLP_METRICS_DEFAULT_HISTOGRAM_AGGREGATION"
        (line,) = unheeded({name: "base2_exponential_bucket_histogram"})
        assert line.startswith(f"{name}=base2_exponential_bucket_histogram is not heeded:")

    def test_what_is_done_anyway(self) -> None:
        assert not unheeded({})
        assert not unheeded(
            {
                "OTEL_EXPORTER_OTLP_METRICS_TEMPORALITY_PREFERENCE": "delta",
                "OTEL_EXPORTER_OTLP_METRICS_DEFAULT_HISTOGRAM_AGGREGATION": " Explicit_Bucket_Histogram",
            }
        )
