"""The sinks of OTLP: one attempt to send, one reply. Retry and back-off are the shipper's.

The bytes of the chunks go out as they are, inside their envelope. Whatever the network or the server does becomes a
`Reply`; after a failure that may lie with the connection, the next attempt makes a new one: names resolved, files of
TLS read again. Only the protocol that is used is imported, for each costs megabytes.
"""

from __future__ import annotations

import ssl
from typing import TYPE_CHECKING, Final

from otel_lb_hop.errors import ConfigError, Problem
from otel_lb_hop.export.otlp_settings import grpc_settings, http_settings

if TYPE_CHECKING:
    from collections.abc import Mapping

    from otel_lb_hop.export.delivery import Chunk, Sink
    from otel_lb_hop.export.otlp_settings import Named, Tls

CONNECT_SECONDS: Final = 2.0
"""Most that connecting may take, with TLS: an outage that ends is then noticed soon."""


def make_sink(signal: str, protocol: str, environ: Mapping[str, str]) -> Sink:
    """Make the sink of `logs`, `traces` or `metrics` by `grpc` or `http/protobuf`.

    Nothing is sent and nobody connected to. Raises ConfigError with all that is wrong with the variables, else with
    the files that they name.
    """
    if protocol == "grpc":
        from otel_lb_hop.export.otlp_grpc import GrpcSink  # noqa: PLC0415 - see above

        return GrpcSink(grpc_settings(signal, environ))
    from otel_lb_hop.export.otlp_http import HttpSink  # noqa: PLC0415 - see above

    return HttpSink(http_settings(signal, environ))


def wrap(chunks: list[Chunk]) -> bytes:
    """Make the body of a request."""
    body: bytes = chunks[0].group.wrap([chunk.payload for chunk in chunks])
    return body


def tls_context(tls: Tls) -> ssl.SSLContext:
    """Read the files of TLS and make of them what a client needs, all but the usual roots.

    Raises ConfigError with all that is wrong.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.hostname_checks_common_name = False
    problems = []
    if tls.ca:
        try:
            context.load_verify_locations(tls.ca.text)
        except OSError as error:  # as every ssl.SSLError is
            problems.append(_file_problem(tls.ca, "certificates", error))
    if tls.certificate and tls.key:
        try:
            # Without a password here, OpenSSL would ask for one at the terminal.
            context.load_cert_chain(tls.certificate.text, tls.key.text, password=b"")
        except OSError as error:
            content = f"a certificate, its key not encrypted in {tls.key.text}"
            problems.append(_file_problem(tls.certificate, content, error))
    if problems:
        raise ConfigError(problems)
    return context


def _file_problem(file: Named, content: str, error: OSError) -> Problem:
    return Problem(file.variable, file.text, f"a readable PEM file with {content} ({error.strerror or error})")
