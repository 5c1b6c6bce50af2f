"""OTLP by gRPC: a unary call that takes bytes and gives bytes."""

from __future__ import annotations

import contextlib
import importlib
import os
import re
import threading
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from otel_lb_hop.errors import ConfigError, Problem
from otel_lb_hop.export.answer import one_line, partial_success, status_retry_seconds
from otel_lb_hop.export.delivery import Reply
from otel_lb_hop.export.otlp_settings import OTLP, USER_AGENT
from otel_lb_hop.export.transport import CONNECT_SECONDS, tls_context, wrap

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from otel_lb_hop.export.delivery import Chunk
    from otel_lb_hop.export.otlp_settings import GrpcSettings, Named

METHODS: Final = {
    signal: f"/opentelemetry.proto.collector.{package}.v1.{service}/Export"
    for signal, package, service in (
        ("logs", "logs", "LogsService"),
        ("traces", "trace", "TraceService"),
        ("metrics", "metrics", "MetricsService"),
    )
}

_VERBOSITY = "GRPC_VERBOSITY"
_CONNECT_MS = int(CONNECT_SECONDS * 1000)
_OPTIONS = (
    ("grpc.primary_user_agent", USER_AGENT),
    # Connecting takes at most the least back-off: 20 s when not set. A pool of its own, because out of the shared one
    # all signals get the same connection, and metrics would wait behind records.
    ("grpc.min_reconnect_backoff_ms", _CONNECT_MS),
    ("grpc.max_reconnect_backoff_ms", _CONNECT_MS),
    ("grpc.use_local_subchannel_pool", 1),
)

_RETRY_CODES = frozenset({"CANCELLED", "DEADLINE_EXCEEDED", "ABORTED", "OUT_OF_RANGE", "UNAVAILABLE", "DATA_LOSS"})
"""Of the OTLP specification, "Failures"; RESOURCE_EXHAUSTED too, but only with RetryInfo."""
_CONNECTION_CODES = frozenset({"CANCELLED", "DEADLINE_EXCEEDED", "INTERNAL", "UNAVAILABLE", "UNKNOWN"})
"""What a call ends with when the connection is to blame."""

_STATUS_DETAILS = "grpc-status-details-bin"

_TOO_LARGE_CODES = frozenset({"RESOURCE_EXHAUSTED", "OUT_OF_RANGE", "UNKNOWN"})
_TOO_LARGE = re.compile(
    "larger than max|exceeds (the )?maximum|length too large|http2 header with status: 413", re.IGNORECASE
)
"""How servers put it: gRPC's core and Go; Java and .NET; Rust; and what the core makes of nginx's 413."""


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Let gRPC's core write nothing to stderr: it would write lines for every TLS handshake that fails.

    It looks at the variable once, while it is loaded; what an operator set stays.
    """
    if _VERBOSITY in os.environ:
        yield
        return
    os.environ[_VERBOSITY] = "NONE"
    try:
        yield
    finally:
        del os.environ[_VERBOSITY]


with _quiet():
    grpc: Any = importlib.import_module("grpc")  # a package without types


class GrpcSink:
    """One signal's way to an OTLP gRPC server. `Sink` says what its methods promise."""

    def __init__(self, settings: GrpcSettings) -> None:
        """Read the files of TLS, which raises ConfigError if they are no good; connect to nobody yet."""
        self.name = OTLP
        self.place = settings.target
        self._settings = settings
        self._method = METHODS[settings.signal]
        self._compression = grpc.Compression.Gzip if settings.compression == "gzip" else grpc.Compression.NoCompression
        self._provided = _provided(settings.provider) if settings.provider and settings.tls else None
        if settings.tls and not self._provided and any(settings.tls):
            tls_context(settings.tls)
        self._lock = threading.Lock()
        self._channel: Any = None
        self._export: Callable[..., bytes]
        self._closed = False

    def send(self, chunks: list[Chunk], timeout_seconds: float | None = None) -> Reply:
        """Make one attempt, as `Sink` says."""
        settings = self._settings
        seconds = (
            settings.timeout_seconds if timeout_seconds is None else min(settings.timeout_seconds, timeout_seconds)
        )
        try:
            answer = self._open()(wrap(chunks), timeout=seconds, metadata=settings.headers)
        except grpc.RpcError as error:
            return self._failed(error)
        except (ConfigError, ValueError) as error:  # files of TLS that are gone; a channel that was closed meanwhile
            return Reply(taken=False, retry=True, detail=one_line(str(error)))
        return _taken(answer, sum(chunk.items for chunk in chunks))

    def close(self) -> None:
        """Let go, as `Sink` says; a call under way ends as cancelled."""
        with self._lock:
            self._closed = True
        self._drop()

    def _open(self) -> Callable[..., bytes]:
        with self._lock:
            if self._closed:
                raise ValueError("the sink is closed")
            if not self._channel:
                self._channel = self._connect()
                self._export = self._channel.unary_unary(self._method)
            return self._export

    def _connect(self) -> Any:  # noqa: ANN401 - a package without types
        """Make a channel; it connects when it is used."""
        target, compression = self._settings.target, self._compression
        if not self._settings.tls:
            return grpc.insecure_channel(target, _OPTIONS, compression)
        return grpc.secure_channel(target, self._provided or self._credentials(), _OPTIONS, compression)

    def _credentials(self) -> Any:  # noqa: ANN401 - a package without types
        roots, certificate, key = (_read(file) if file else None for file in self._settings.tls or ())
        return grpc.ssl_channel_credentials(roots, key, certificate)

    def _drop(self) -> None:
        with self._lock:
            channel, self._channel = self._channel, None
        if channel:
            channel.close()

    def _failed(self, error: Any) -> Reply:  # noqa: ANN401 - a package without types
        code: str = error.code().name
        if code in _CONNECTION_CODES:
            # Also when it was the server that said UNAVAILABLE on a sound connection: nothing tells that from a broken
            # one for sure, and a channel that is kept waits for its own back-off and looks up names only every 30 s. It
            # costs a connect and a handshake for each failed attempt, and the shipper's back-off makes those rare.
            self._drop()
        metadata = dict(error.trailing_metadata() or ())
        wait_seconds = status_retry_seconds(metadata.get(_STATUS_DETAILS, b""))
        detail = one_line(f"{code}: {error.details()}")
        if wait_seconds is None and code in _TOO_LARGE_CODES and _TOO_LARGE.search(detail):
            return Reply(taken=False, too_large=True, detail=detail)
        if self._settings.retry_codes is not None:
            retry = code in self._settings.retry_codes
        else:
            retry = code in _RETRY_CODES or (code == "RESOURCE_EXHAUSTED" and wait_seconds is not None)
        return Reply(taken=False, retry=retry, retry_after_seconds=wait_seconds if retry else None, detail=detail)


def _taken(answer: bytes, items: int) -> Reply:
    try:
        rejected, message = partial_success(answer)
    except ValueError:
        return Reply(taken=True, detail="taken, with an answer that cannot be read")
    return Reply(taken=True, rejected=min(rejected, items), detail=message)


def _read(file: Named) -> bytes:
    try:
        content = Path(file.text).read_bytes()
    except OSError as error:
        raise ConfigError([Problem(file.variable, file.text, f"a readable PEM file ({error.strerror})")]) from error
    if not content:
        # As while it is being written. An empty certificate or key would end the process in gRPC's core
        # (grpc/grpc#40732); for empty roots the core would take the usual ones.
        raise ConfigError([Problem(file.variable, file.text, "a readable PEM file (it is empty)")])
    return content


def _provided(provider: Named) -> Any:  # noqa: ANN401 - a package without types
    """Get the credentials of a plugin."""
    group = "opentelemetry_otlp_credential_provider"
    available = {entry.name: entry for entry in entry_points(group=group)}
    accepted = f"an entry point of {group} that gives grpc.ChannelCredentials"
    if provider.text not in available:
        found = ", ".join(sorted(available)) or "none"
        raise ConfigError([Problem(provider.variable, provider.text, f"{accepted}; there are: {found}")])
    try:
        credentials = available[provider.text].load()()
    except Exception as error:
        # Whatever a plugin raises is about its own settings, and the operator has to read it.
        raise ConfigError([Problem(provider.variable, provider.text, f"{accepted} ({error})")]) from error
    if not isinstance(credentials, grpc.ChannelCredentials):
        raise ConfigError([Problem(provider.variable, provider.text, accepted)])
    return credentials
