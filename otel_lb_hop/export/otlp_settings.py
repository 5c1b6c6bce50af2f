"""The `OTEL_EXPORTER_OTLP_*` variables: environment in, all that one signal's sink needs out.

Owns what each variable means, after the OTLP exporter specification and, where that leaves room, after the SDK's
exporters: gRPC takes the host of a URL and nothing of its path, HTTP appends `v1/{signal}` to the endpoint of all
signals. A signal's own variable wins over the one of all signals; empty or blank means not set. No I/O: files are
named here and read by the sinks. Values of headers, user and password of a URL, and queries are secrets and stand in no
message.
"""

from __future__ import annotations

import base64
import ipaddress
import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, NamedTuple, TypeVar
from urllib.parse import SplitResult, quote, unquote, urlsplit

from otel_lb_hop import __version__
from otel_lb_hop.config import one_of
from otel_lb_hop.errors import ConfigError, Problem

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

T = TypeVar("T")

USER_AGENT: Final = f"otel-lb-hop/{__version__}"
DEFAULT_TIMEOUT_SECONDS: Final = 10.0
MAX_TIMEOUT_SECONDS: Final = 86_400.0

OTLP: Final = "otlp"
"""The exporter's name in `OTEL_{METRICS,LOGS,TRACES}_EXPORTER`."""
_PREFIX = "OTEL_EXPORTER_OTLP_"
_PYTHON = "OTEL_PYTHON_EXPORTER_OTLP_"

# W3C Baggage, as parse_env_headers of opentelemetry-api reads it: what fits the first is percent-decoded, what fits
# only the second (a blank in the value) is taken as it stands.
_NAME = r"[\x21\x23-\x27\x2a\x2b\x2d\x2e\x30-\x39\x41-\x5a\x5e-\x7a\x7c\x7e]+"
_ENCODED_HEADER = re.compile(rf"{_NAME}[ \t]*=[ \t]*[\x21\x23-\x2b\x2d-\x3a\x3c-\x5b\x5d-\x7e]*")
_PLAIN_HEADER = re.compile(rf"{_NAME}[ \t]*=[ \t]*[\x20\x21\x23-\x2b\x2d-\x3a\x3c-\x5b\x5d-\x7e]*")

# What may go on the wire: RFC 9110 5.6.2 and 5.5; gRPC over HTTP/2, "Custom-Metadata".
_HTTP_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9a-z-]+")
_HTTP_VALUE = re.compile(r"[\t\x20-\x7e\x80-\xff]*")
_GRPC_NAME = re.compile(r"(?!grpc-)[0-9a-z_.-]+(?<!-bin)")
_GRPC_VALUE = re.compile(r"[\x20-\x7e]*")
_FRAMING = frozenset({"content-length", "transfer-encoding"})

_GRPC_NAMES = frozenset({"dns", "ipv4", "ipv6", "unix", "unix-abstract", "vsock"})
"""Schemes of gRPC's own names, https://github.com/grpc/grpc/blob/master/doc/naming.md."""

_GRPC_CODES = re.compile(
    "CANCELLED|UNKNOWN|INVALID_ARGUMENT|DEADLINE_EXCEEDED|NOT_FOUND|ALREADY_EXISTS|PERMISSION_DENIED|UNAUTHENTICATED|"
    "RESOURCE_EXHAUSTED|FAILED_PRECONDITION|ABORTED|OUT_OF_RANGE|UNIMPLEMENTED|INTERNAL|UNAVAILABLE|DATA_LOSS"
)

_URL_SAFE = "!#$%&'()*+,/:;=?@[]~"

_HEADERS = "name=value items split by commas, values percent-encoded"
_SECONDS = f"seconds above 0, at most {MAX_TIMEOUT_SECONDS:.0f}"
_GRPC_ENDPOINT = "http://HOST:PORT, https://HOST:PORT, HOST:PORT, unix:PATH or another gRPC name"
_HTTP_ENDPOINT = "http://HOST[:PORT][/PATH] or https://..., signs like @ in it percent-encoded"
_PROXY = "http://[USER:PASSWORD@]HOST[:PORT], signs like / in it percent-encoded"


class Named(NamedTuple):
    """A text and the variable it came from, for whoever finds out later that it is wrong."""

    variable: str
    text: str


class Tls(NamedTuple):
    """Paths of PEM files. Without `ca` the usual roots are trusted; `key` may be the certificate's file."""

    ca: Named | None = None
    certificate: Named | None = None
    key: Named | None = None


class Proxy(NamedTuple):
    """An HTTP proxy; `authorization` is the value of Proxy-Authorization."""

    host: str
    port: int
    authorization: str | None


@dataclass(frozen=True, slots=True)
class GrpcSettings:
    """How one signal goes by gRPC."""

    signal: str
    target: str
    """What a gRPC channel is opened to: host and port, or a gRPC name."""
    tls: Tls | None
    """None: in the clear."""
    provider: Named | None
    """Entry point of `opentelemetry_otlp_credential_provider` that gives the channel's credentials; before `tls`."""
    headers: tuple[tuple[str, str], ...]
    compression: str
    """`none` or `gzip`."""
    timeout_seconds: float
    retry_codes: frozenset[str] | None
    """Names of the only status codes after which to try again; None: those of the OTLP specification."""


@dataclass(frozen=True, slots=True)
class HttpSettings:
    """How one signal goes by HTTP/1.1 with protobuf."""

    signal: str
    host: str
    port: int
    path: str
    """The request target, with the query if any."""
    tls: Tls | None
    """None: in the clear."""
    headers: tuple[tuple[str, str], ...]
    """All but Host and Content-Length."""
    compression: str
    """`none`, `gzip` or `deflate`."""
    timeout_seconds: float
    proxy: Proxy | None


def grpc_settings(signal: str, environ: Mapping[str, str]) -> GrpcSettings:
    """Read what is set for `logs`, `traces` or `metrics` by gRPC; raises ConfigError with all that is wrong."""
    reader = _Reader(signal, environ)
    variable, endpoint = reader.find("ENDPOINT")
    endpoint = endpoint or "http://localhost:4317"
    settings = GrpcSettings(
        signal=signal,
        target=reader.checked(variable, endpoint, _GRPC_ENDPOINT, _target, ""),
        tls=None if _insecure(reader, endpoint.partition(":")[0].lower()) else _tls(reader, ()),
        provider=_provider(reader),
        headers=_headers(reader, _GRPC_NAME, _GRPC_VALUE),
        compression=reader.parse("COMPRESSION", "none", "none or gzip", one_of("none", "gzip")),
        timeout_seconds=_timeout(reader),
        retry_codes=_retry_codes(reader),
    )
    reader.done()
    return settings


def http_settings(signal: str, environ: Mapping[str, str]) -> HttpSettings:
    """Read what is set for `logs`, `traces` or `metrics` by HTTP; raises ConfigError with all that is wrong."""
    reader = _Reader(signal, environ)
    variable, endpoint = reader.find("ENDPOINT")
    endpoint = endpoint or "http://localhost:4318"
    url = reader.checked(variable, endpoint, _HTTP_ENDPOINT, _url, urlsplit("http://localhost"))
    if variable != reader.own("ENDPOINT"):
        url = urlsplit(f"{url.geturl().removesuffix('/')}/v1/{signal}")
    compression = reader.parse("COMPRESSION", "none", "none, gzip or deflate", one_of("none", "gzip", "deflate"))
    headers = {"content-type": "application/x-protobuf", "user-agent": USER_AGENT}
    headers |= dict(_headers(reader, _HTTP_NAME, _HTTP_VALUE))
    if compression != "none":
        headers.setdefault("content-encoding", compression)
    if authorization := _basic(url):
        headers["authorization"] = authorization
    _refuse_provider(reader)
    host, port = url.hostname or "", url.port or (443 if url.scheme == "https" else 80)
    settings = HttpSettings(
        signal=signal,
        host=host,
        port=port,
        path=quote((url.path or "/") + (f"?{url.query}" if url.query else ""), safe=_URL_SAFE),
        tls=_tls(reader, ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE")) if url.scheme == "https" else None,
        headers=tuple(headers.items()),
        compression=compression,
        timeout_seconds=_timeout(reader),
        proxy=_proxy(reader, url.scheme, host, port),
    )
    reader.done()
    return settings


def unheeded(environ: Mapping[str, str]) -> list[str]:
    """Tell, for the log, which standard variables of metrics are set to what this agent cannot do."""
    texts = []
    aggregation = _PREFIX + "METRICS_DEFAULT_HISTOGRAM_AGGREGATION"
    if (value := environ.get(aggregation, "").strip()).lower() not in {"", "explicit_bucket_histogram"}:
        texts.append(
            f"{aggregation}={value} is not heeded: histograms have the explicit buckets that the kernel counts in."
        )
    return texts


class _Reader:
    """The variables of one signal, and what was found wrong with them."""

    def __init__(self, signal: str, environ: Mapping[str, str]) -> None:
        self.signal = signal
        self.environ = environ
        self._problems: list[Problem] = []

    def own(self, name: str) -> str:
        """Name the variable of this signal alone."""
        return f"{_PREFIX}{self.signal.upper()}_{name}"

    def text(self, variable: str) -> str:
        return self.environ.get(variable, "").strip()

    def find(self, name: str) -> tuple[str, str]:
        """Find the variable that counts, and its text; empty where neither is set."""
        own, general = self.own(name), _PREFIX + name
        return (own, text) if (text := self.text(own)) else (general, self.text(general))

    def file(self, name: str) -> Named | None:
        variable, text = self.find(name)
        return Named(variable, text) if text else None

    def parse(self, name: str, default: str, accepted: str, parse: Callable[[str], T]) -> T:
        variable, text = self.find(name)
        return self.checked(variable, text or default, accepted, parse, parse(default))

    def checked(self, variable: str, text: str, accepted: str, parse: Callable[[str], T], instead: T) -> T:
        """Parse, or note the problem and go on with `instead`, so that all problems are told at once."""
        try:
            return parse(text)
        except ValueError:
            self.refuse(variable, without_secret(text), accepted)
            return instead

    def refuse(self, variable: str, read: str, accepted: str) -> None:
        self._problems.append(Problem(variable, read, accepted))

    def done(self) -> None:
        if self._problems:
            raise ConfigError(self._problems)


def _seconds(text: str) -> float:
    seconds = float(text)
    if not (math.isfinite(seconds) and 0 < seconds <= MAX_TIMEOUT_SECONDS):
        raise ValueError
    return seconds


def _timeout(reader: _Reader) -> float:
    return reader.parse("TIMEOUT", str(DEFAULT_TIMEOUT_SECONDS), _SECONDS, _seconds)


def _target(endpoint: str) -> str:
    parts = urlsplit(endpoint)
    if parts.scheme in _GRPC_NAMES:
        if parts.netloc or not parts.path or parts.query:
            raise ValueError
        return endpoint
    target = parts.netloc if "//" in endpoint else endpoint
    place = urlsplit(f"//{target}")
    if not place.hostname or place.port == 0 or place.netloc != target or "@" in endpoint or " " in target:
        raise ValueError
    return target


def _url(endpoint: str) -> SplitResult:
    url = urlsplit(endpoint)
    if url.scheme not in {"http", "https"} or not url.hostname or url.port == 0 or " " in url.netloc:
        raise ValueError
    return _whole(url)


def _whole(url: SplitResult) -> SplitResult:
    """Refuse a URL whose password has a sign that ended its host: the secret would be taken for host, port and path."""
    if "@" in url.path + url.query + url.fragment:
        raise ValueError
    return url


def _insecure(reader: _Reader, scheme: str) -> bool:
    """Whether gRPC goes in the clear: never for https, else as INSECURE says, else for http alone."""
    word = reader.parse("INSECURE", "", "true or false", one_of("true", "false", ""))
    return scheme != "https" and (word == "true" if word else scheme == "http")


def _tls(reader: _Reader, bundles: tuple[str, ...]) -> Tls:
    """Name the files; `bundles` are variables that name the roots when ours does not."""
    named = (reader.find("CERTIFICATE"), *((name, reader.text(name)) for name in bundles))
    roots = next((Named(*found) for found in named if found[1]), None)
    certificate, key = reader.file("CLIENT_CERTIFICATE"), reader.file("CLIENT_KEY")
    if key and not certificate:
        accepted = f"a key together with its certificate in {_PREFIX}CLIENT_CERTIFICATE"
        reader.refuse(key.variable, key.text, accepted)
    return Tls(roots, certificate, key or certificate)


def _headers(reader: _Reader, legal_name: re.Pattern[str], legal_value: re.Pattern[str]) -> tuple[tuple[str, str], ...]:
    variable, text = reader.find("HEADERS")
    headers: dict[str, str] = {}
    for number, item in enumerate((part.strip(" \t") for part in text.split(",")), start=1):
        if not item:
            continue
        decode = unquote if _ENCODED_HEADER.fullmatch(item) else str
        name, _, value = item.partition("=")
        name, value = decode(name).strip().lower(), decode(value).strip()
        legal = legal_name.fullmatch(name) and legal_value.fullmatch(value) and name not in _FRAMING
        if legal and _PLAIN_HEADER.fullmatch(item):
            headers[name] = value
        else:
            reader.refuse(variable, f"item {number}", f"{_HEADERS}, of characters that a header may have")
    return tuple(headers.items())


def _retry_codes(reader: _Reader) -> frozenset[str] | None:
    variable = _PYTHON + "GRPC_RETRYABLE_ERROR_CODES"
    codes = frozenset(code.strip().upper() for code in reader.text(variable).split(",") if code.strip())
    if wrong := sorted(code for code in codes if not _GRPC_CODES.fullmatch(code)):
        reader.refuse(variable, ",".join(wrong), "names of gRPC status codes, split by commas")
    return codes or None


def _provider(reader: _Reader) -> Named | None:
    """Find the plugin that gives credentials; a signal's own certificate wins over the plugin of all signals."""
    own, general = (f"{_PYTHON}GRPC_{kind}CREDENTIAL_PROVIDER" for kind in (f"{reader.signal.upper()}_", ""))
    if name := reader.text(own):
        return Named(own, name)
    if (name := reader.text(general)) and not reader.text(reader.own("CERTIFICATE")):
        return Named(general, name)
    return None


def _refuse_provider(reader: _Reader) -> None:
    # Such a plugin gives a session of the requests library, which is not what sends here.
    for kind in (f"{reader.signal.upper()}_", ""):
        variable = f"{_PYTHON}HTTP_{kind}CREDENTIAL_PROVIDER"
        if name := reader.text(variable):
            exporter = f"OTEL_{reader.signal.upper()}_EXPORTER=otlp_proto_http"
            reader.refuse(variable, name, f"nothing with the exporter otlp; {exporter} takes the SDK's, which heeds it")


def _proxy(reader: _Reader, scheme: str, host: str, port: int) -> Proxy | None:
    """Find the proxy as the requests library does: lower case wins, even when empty."""
    environ = reader.environ
    if _direct(host, port, environ.get("no_proxy") or environ.get("NO_PROXY") or ""):
        return None
    for name in (f"{scheme}_proxy", "all_proxy"):
        variable = name if name in environ else name.upper()
        if text := reader.text(variable):
            text = text if "://" in text else f"http://{text}"
            return reader.checked(variable, text, _PROXY, _parse_proxy, None)
    return None


def _parse_proxy(text: str) -> Proxy | None:
    url = _whole(urlsplit(text))
    if url.scheme != "http" or not url.hostname:
        raise ValueError
    return Proxy(url.hostname, url.port or 80, _basic(url))


def _direct(host: str, port: int, listed: str) -> bool:
    """Whether the list of `no_proxy` has the host: by name, by the end of its name, by address or by network."""
    if listed.strip() == "*":
        return True
    for item in listed.lower().replace(" ", "").split(","):
        name = item.lstrip(".")
        if name and any(place == name or place.endswith(f".{name}") for place in (host, f"{host}:{port}")):
            return True
        try:
            if ipaddress.ip_address(host) in ipaddress.ip_network(item, strict=False):
                return True
        except ValueError:
            continue
    return False


def _basic(url: SplitResult) -> str | None:
    if url.username is None or url.password is None:
        return None
    pair = f"{unquote(url.username)}:{unquote(url.password)}"
    return "Basic " + base64.b64encode(pair.encode("latin-1", "replace")).decode()


def without_secret(text: str) -> str:
    """Leave out user, password, query and fragment of a URL, be it well-formed or not."""
    # A password may hold any of the other signs, so that of all @ the last one counts.
    place = re.sub(r"^([a-z][a-z0-9+.-]*://)?.*@", r"\1", text, flags=re.DOTALL | re.IGNORECASE)
    return re.split("[?#]", place, maxsplit=1)[0]
