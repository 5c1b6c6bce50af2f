"""The settings: environment in, one frozen `Config` out, or a `ConfigError` that names every bad one at once.

Owns each setting's name, default and meaning, once, in `SETTINGS` (ours) and `STANDARD` (OpenTelemetry's that we
must know too; every other `OTEL_*` is the SDK's alone). No I/O: environment and host name are handed in.
"""

from __future__ import annotations

import difflib
import fnmatch
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Final, Generic, NamedTuple, TypeVar

from otel_lb_hop import semconv
from otel_lb_hop.errors import ConfigError, Problem
from otel_lb_hop.model import Policy, pack_address

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)

PREFIX: Final = "OTEL_LB_HOP_"

IFNAME_BYTES: Final = 15  # IFNAMSIZ of linux/if.h is 16, with the closing NUL
MAX_INT32: Final = 2**31 - 1
MAX_PORT: Final = 65535

_ITEM = re.compile(r"(\s*!?\s*/[^/]*/\s*|[^,]*),")  # a comma inside /.../ belongs to the regex
_IFNAME = re.compile(r"[^\s/:!][^\s/:]*")
_DECIMAL = re.compile(r"([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]{1,3})?")
_EXPORTER = re.compile(r"[A-Za-z0-9_.-]+")
_LISTEN = re.compile(r"(?:\[(?P<v6>[0-9A-Fa-f:.]+)\]|(?P<host>[^:\[\]]+)):(?P<port>[0-9]{1,5})")

# Kubernetes gives these to every pod in the namespace of a Service that is called otel-lb-hop.
_INJECTED = re.compile(PREFIX + r"(SERVICE_HOST|SERVICE_PORT(_.*)?|PORT(_[0-9]+_(TCP|UDP|SCTP)(_.*)?)?)")


class InterfacePattern(NamedTuple):
    """One item of an interface list, as written and as compiled; `exact` when it is a plain name."""

    text: str
    regex: re.Pattern[str]
    exclude: bool
    exact: bool


@dataclass(frozen=True, slots=True)
class InterfaceMatcher:
    """Which interfaces are meant: any that an item names and no `!` item does; only `!` items: all the others.

    `lo` is meant only by its plain name: a glob or regex that happens to fit it never picks it.
    """

    patterns: tuple[InterfacePattern, ...]

    def matches(self, name: str) -> bool:
        """Whether an interface of this name is meant."""
        hits = [pattern for pattern in self.patterns if pattern.regex.fullmatch(name)]
        if any(pattern.exclude for pattern in hits):
            return False
        if name == "lo":
            return any(pattern.exact for pattern in hits)
        return bool(hits) or all(pattern.exclude for pattern in self.patterns)


@dataclass(frozen=True, slots=True)
class SignalConfig:
    """Where one signal goes: exporter names (empty = `none`, the signal is off) and the OTLP protocol."""

    exporters: tuple[str, ...]
    protocol: str


class MetricAttributes(NamedTuple):
    """Which attributes of `lb_hop.connections` are told, beyond those that always are."""

    zone: bool = False
    """Of the intermediate node."""
    destination_zone: bool = False
    """Of the backend."""
    destination_node: bool = True


@dataclass(frozen=True, slots=True)
class Setting(Generic[T_co]):
    """One variable; `parse` makes its value from stripped text, or raises ValueError, with the detail if any."""

    name: str
    default: str
    accepted: str
    meaning: str
    parse: Callable[[str], T_co]


def _fits(pattern: str) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if not re.fullmatch(pattern, text):
            raise ValueError
        return text

    return parse


def _interface_pattern(item: str) -> InterfacePattern:
    exclude, body = item.startswith("!"), item.removeprefix("!").strip()
    if body.startswith("/"):
        return InterfacePattern(item, _regex(body), exclude, exact=False)
    if not _IFNAME.fullmatch(body):
        raise ValueError(f"{item!r} cannot be an interface" if body else "an item is empty")
    if set(body) & set("*?["):
        return InterfacePattern(item, re.compile(fnmatch.translate(body)), exclude, exact=False)
    if len(body.encode("utf-8", "surrogateescape")) > IFNAME_BYTES:
        raise ValueError(f"{item!r} is longer than {IFNAME_BYTES} bytes")
    return InterfacePattern(item, re.compile(re.escape(body)), exclude, exact=True)


def _regex(body: str) -> re.Pattern[str]:
    if len(body) < len("/x/") or not body.endswith("/"):
        raise ValueError(f"{body!r} is not /regex/")
    try:
        return re.compile(body[1:-1])
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"{body!r}: {error}") from error


def _interfaces(text: str) -> InterfaceMatcher:
    return InterfaceMatcher(tuple(_interface_pattern(item.strip()) for item in _ITEM.findall(text + ",")))


def _uplinks(text: str) -> InterfaceMatcher | None:
    return _interfaces(text) if text else None


def _path(text: str) -> Path | None:
    return Path(text) if text else None


def _pin_path(text: str) -> Path | None:
    if text.lower() == "off":
        return None
    if not text.startswith("/"):
        raise ValueError
    return Path(text)


_POLICY_SETS = {"all": frozenset(Policy), "cluster": frozenset({Policy.CLUSTER}), "local": frozenset({Policy.LOCAL})}


def _policies(text: str) -> frozenset[Policy]:
    if text.lower() not in _POLICY_SETS:
        raise ValueError
    return _POLICY_SETS[text.lower()]


def one_of(*words: str) -> Callable[[str], str]:
    """Make a parser that takes these words, in upper or lower case, and gives the lower one."""

    def parse(text: str) -> str:
        if text.lower() not in words:
            raise ValueError
        return text.lower()

    return parse


def _name(text: str) -> str | None:
    if not re.fullmatch("[!-~]{0,253}", text):
        raise ValueError
    return text or None


def _record_ratio(text: str) -> float:
    if not _DECIMAL.fullmatch(text) or float(text) > 1:
        raise ValueError
    return float(text)


def _listen(text: str) -> tuple[str, int] | None:
    if text.lower() == "off":
        return None
    match = _LISTEN.fullmatch(text)
    if not match or int(match["port"]) > MAX_PORT:
        raise ValueError
    host = (match["v6"] or match["host"]).lower()
    if host != "localhost":
        pack_address(host)
    if match["v6"] and ":" not in host:
        raise ValueError("brackets are for IPv6")
    return host, int(match["port"])


def _exporters(text: str) -> tuple[str, ...]:
    if text.lower() == "none":
        return ()
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",")))
    if not all(_EXPORTER.fullmatch(name) and name.lower() != "none" for name in names):
        raise ValueError
    return names


_ADD_ZONE, _ADD_DESTINATION_ZONE = semconv.RESOURCE_ZONE, semconv.DESTINATION_ZONE
_LEAVE_OUT_NODE = "-" + semconv.DESTINATION_NODE


def _metric_attributes(text: str) -> MetricAttributes:
    items = [item.strip() for item in text.split(",")] if text else []
    for item in items:
        if item not in {_ADD_ZONE, _ADD_DESTINATION_ZONE, _LEAVE_OUT_NODE}:
            raise ValueError(f"{item!r} is none of these" if item else "an item is empty")
    return MetricAttributes(_ADD_ZONE in items, _ADD_DESTINATION_ZONE in items, _LEAVE_OUT_NODE not in items)


def _true(text: str) -> bool:
    return text.lower() == "true"


def _integer(name: str, default: str, least: int, most: int, meaning: str) -> Setting[int]:
    def parse(text: str) -> int:
        if not re.fullmatch("[0-9]{1,10}", text) or not least <= int(text) <= most:
            raise ValueError
        return int(text)

    return Setting(name, default, f"a whole number from {least} to {most}", meaning, parse)


_PATTERNS = f"names up to {IFNAME_BYTES} bytes, globs (eth*), /regex/ of the whole name, by commas; ! leaves one out"
_PRINTABLE = "1 to 253 printable ASCII characters without spaces"

NODE_NAME: Final = Setting(
    PREFIX + "NODE_NAME",
    "",  # the host name, which only the caller knows
    _PRINTABLE,
    "Name of the Kubernetes node the agent runs on (downward API: `spec.nodeName`); the host name when not set.",
    _fits("[!-~]{1,253}"),
)
INTERFACES: Final = Setting(
    PREFIX + "INTERFACES",
    "*",
    _PATTERNS,
    "Interfaces to watch; `lo` is watched only when its plain name is listed.",
    _interfaces,
)
UPLINKS: Final = Setting(
    PREFIX + "UPLINKS",
    "",
    _PATTERNS,
    "Interfaces by which clients from outside come in; found from the routes when not set.",
    _uplinks,
)
HOOK: Final = Setting(
    PREFIX + "HOOK",
    "tc",
    "tc, xdp or xdp-generic",
    "What watches packets that come in by uplinks: a tc program, or one on XDP, before all of tc, in the driver "
    "(`xdp`) or in the stack (`xdp-generic`). An interface holds one XDP program; one that refuses is watched by tc.",
    one_of("tc", "xdp", "xdp-generic"),
)
VIPS_FILE: Final = Setting(
    PREFIX + "VIPS_FILE",
    "",
    "the path of a VIP file",
    "YAML or JSON file with VIPs, ports and backends, beside the API server or in place of it; read again on change.",
    _path,
)
KUBERNETES: Final = Setting(
    PREFIX + "KUBERNETES",
    "auto",
    "auto, on or off",
    "The API server as a source: by `KUBECONFIG` if set, else as a pod; `auto` is off where there is neither, "
    "`on` then takes ~/.kube/config.",
    one_of("auto", "on", "off"),
)
POLICY: Final = Setting(
    PREFIX + "POLICY",
    "all",
    "all, cluster or local",
    "Watch only Services of the API server with this externalTrafficPolicy.",
    _policies,
)
EXTERNAL_IPS: Final = Setting(
    PREFIX + "EXTERNAL_IPS",
    "true",
    "true or false",
    "Whether `spec.externalIPs` of Services are VIPs.",
    one_of("true", "false"),
)
CONNTRACK: Final = Setting(
    PREFIX + "CONNTRACK",
    "auto",
    "auto, on or off",
    "Conntrack events for UDP and SCTP VIP ports: `auto` only while there is one, `on` always and for the node's own "
    "TCP calls too. It costs some microseconds for each new connection of the node.",
    one_of("auto", "on", "off"),
)
PIN_PATH: Final = Setting(
    PREFIX + "PIN_PATH",
    "/sys/fs/bpf/otel-lb-hop",
    "an absolute path on a bpffs, or off",
    "Where counters and programs are pinned, so that counting goes on while the agent is down; `off` ends all with it.",
    _pin_path,
)
POD_NAME: Final = Setting(
    PREFIX + "POD_NAME", "", _PRINTABLE, "Name of the agent's pod (downward API: `metadata.name`).", _name
)
POD_NAMESPACE: Final = Setting(
    PREFIX + "POD_NAMESPACE", "", _PRINTABLE, "Its namespace (downward API: `metadata.namespace`).", _name
)
POD_UID: Final = Setting(PREFIX + "POD_UID", "", _PRINTABLE, "Its uid (downward API: `metadata.uid`).", _name)
RECORD_RATIO: Final = Setting(
    PREFIX + "RECORD_RATIO",
    "1.0",
    "a number from 0 to 1",
    "Share of good connections that get a log record and a span; failures always do, metrics count all.",
    _record_ratio,
)
RECORD_RATE: Final = _integer(
    PREFIX + "RECORD_RATE",
    "1000",
    0,
    10_000_000,
    "Most connections per second that get a log record and a span; failures go before; 0 sends none.",
)
METRIC_ATTRIBUTES: Final = Setting(
    PREFIX + "METRIC_ATTRIBUTES",
    "",
    f"{_ADD_ZONE}, {_ADD_DESTINATION_ZONE} and {_LEAVE_OUT_NODE}, split by commas",
    "Attributes of `lb_hop.connections` to add or, with `-`, to leave out: the zone of the node where connections come "
    "in, the backend's zone, the backend's node.",
    _metric_attributes,
)
METRIC_SERIES: Final = _integer(
    PREFIX + "METRIC_SERIES",
    "20000",
    100,
    1_000_000,
    "Most data points about VIP ports in an export; series beyond it are summed into one point of each metric, with "
    "`otel.metric.overflow`.",
)
QUEUE_BYTES: Final = _integer(
    PREFIX + "QUEUE_BYTES",
    str(32 << 20),
    8 << 20,
    1 << 33,
    "Most bytes of log records and spans that wait for a Collector, all together; the newest are kept.",
)
LISTEN: Final = Setting(
    PREFIX + "LISTEN",
    "127.0.0.1:9465",
    "IPV4:PORT, [IPV6]:PORT or localhost:PORT with port 0 to 65535, or off",
    "Where health and the local API listen; port 0 lets the kernel pick one, `off` opens nothing.",
    _listen,
)
LOG_LEVEL: Final = Setting(
    PREFIX + "LOG_LEVEL",
    "info",
    "debug, info, warning or error",
    "Least severity of the agent's own log.",
    one_of("debug", "info", "warning", "error"),
)

SETTINGS: Final[tuple[Setting[object], ...]] = (
    NODE_NAME,
    KUBERNETES,
    VIPS_FILE,
    POLICY,
    EXTERNAL_IPS,
    INTERFACES,
    UPLINKS,
    HOOK,
    CONNTRACK,
    PIN_PATH,
    RECORD_RATIO,
    RECORD_RATE,
    METRIC_ATTRIBUTES,
    METRIC_SERIES,
    QUEUE_BYTES,
    LISTEN,
    LOG_LEVEL,
    POD_NAME,
    POD_NAMESPACE,
    POD_UID,
)

_SIGNALS = ("METRICS", "LOGS", "TRACES")
_NAMES = "exporter names of A-Z a-z 0-9 _ . - split by commas, or none alone"
_PROTOCOLS = "grpc or http/protobuf"

_EXPORTERS = {
    signal: Setting(f"OTEL_{signal}_EXPORTER", "otlp", _NAMES, f"Exporters of {signal.lower()}.", _exporters)
    for signal in _SIGNALS
}
_PROTOCOL = Setting(
    "OTEL_EXPORTER_OTLP_PROTOCOL", "grpc", _PROTOCOLS, "OTLP protocol of all signals.", _fits("grpc|http/protobuf")
)
_SIGNAL_PROTOCOL = {
    signal: Setting(
        f"OTEL_EXPORTER_OTLP_{signal}_PROTOCOL",
        "",  # the one of all signals
        _PROTOCOLS,
        f"OTLP protocol of {signal.lower()}; the one of all signals when not set.",
        _fits("(grpc|http/protobuf)?"),
    )
    for signal in _SIGNALS
}
_METRIC_INTERVAL = _integer(
    "OTEL_METRIC_EXPORT_INTERVAL", "60000", 100, MAX_INT32, "Milliseconds between two exports of metrics."
)
_METRIC_TIMEOUT = _integer(
    "OTEL_METRIC_EXPORT_TIMEOUT", "30000", 1, MAX_INT32, "Most milliseconds that one export of metrics may take."
)
_TEMPORALITY = Setting(
    "OTEL_EXPORTER_OTLP_METRICS_TEMPORALITY_PREFERENCE",
    "cumulative",
    "cumulative, delta or lowmemory",
    "Whether metrics by OTLP say what was counted since the start or, with `delta`, since the export before; "
    "`lowmemory` has histograms as deltas and counters, which are read from the kernel, cumulative.",
    one_of("cumulative", "delta", "lowmemory"),
)
_SAMPLER = Setting(
    "OTEL_TRACES_SAMPLER",
    "parentbased_always_on",
    "always_on, always_off or traceidratio, alone or behind parentbased_",
    "Sampler of spans, beside the one of all records: no span has a parent outside, so `parentbased_` says the same; "
    "`always_off` turns spans off.",
    _fits("(parentbased_)?(always_on|always_off|traceidratio)"),
)
_SAMPLER_ARG = Setting(
    "OTEL_TRACES_SAMPLER_ARG",
    "1.0",
    "a number from 0 to 1",
    "Share of good connections that get a span, with `traceidratio`.",
    _record_ratio,
)
_SDK_DISABLED = Setting("OTEL_SDK_DISABLED", "false", "true, or anything for false", "Whether to send nothing.", _true)

STANDARD: Final[tuple[Setting[object], ...]] = (
    *_EXPORTERS.values(),
    _PROTOCOL,
    *_SIGNAL_PROTOCOL.values(),
    _METRIC_INTERVAL,
    _METRIC_TIMEOUT,
    _TEMPORALITY,
    _SAMPLER,
    _SAMPLER_ARG,
    _SDK_DISABLED,
)


class ApiConfig(NamedTuple):
    """How to find the API server: the paths of `KUBECONFIG`, or None for the way of a pod."""

    kubeconfig: str | None


@dataclass(frozen=True, slots=True)
class Config:
    """Every setting, checked; `unknown` are variables with our prefix that mean nothing, for the caller to warn of."""

    node_name: str
    interfaces: InterfaceMatcher
    uplinks: InterfaceMatcher | None
    hook: str
    vips_file: Path | None
    api: ApiConfig | None
    policies: frozenset[Policy]
    external_ips: bool
    conntrack: str
    pin_path: Path | None
    pod_name: str | None
    pod_namespace: str | None
    pod_uid: str | None
    record_ratio: float
    record_rate: int
    span_ratio: float
    metric_attributes: MetricAttributes
    metric_series: int
    queue_bytes: int
    listen: tuple[str, int] | None
    log_level: str
    metrics: SignalConfig
    logs: SignalConfig
    traces: SignalConfig
    metric_export_interval_ms: int
    metric_export_timeout_ms: int
    temporality: str
    sdk_disabled: bool
    unknown: tuple[str, ...] = ()

    @classmethod
    def from_environ(cls, environ: Mapping[str, str], hostname: str) -> Config:
        """Read every setting; empty or blank means not set. Raises ConfigError with all that is wrong."""
        texts = _texts(environ, hostname)
        problems = [problem for setting in (*SETTINGS, *STANDARD) if (problem := _problem(setting, texts))]
        api = _api(texts[KUBERNETES.name].lower(), environ)
        if not api and not texts[VIPS_FILE.name]:
            problems.append(Problem(VIPS_FILE.name, "", _NO_SOURCE))
        if problems:
            raise ConfigError(problems)

        def value(setting: Setting[T]) -> T:
            return setting.parse(texts[setting.name])

        def signal(name: str) -> SignalConfig:
            return SignalConfig(value(_EXPORTERS[name]), value(_SIGNAL_PROTOCOL[name]) or value(_PROTOCOL))

        traces = signal("TRACES")
        if value(_SAMPLER).endswith("always_off"):
            traces = replace(traces, exporters=())

        return cls(
            node_name=value(NODE_NAME),
            interfaces=value(INTERFACES),
            uplinks=value(UPLINKS),
            hook=value(HOOK),
            vips_file=value(VIPS_FILE),
            api=api,
            policies=value(POLICY),
            external_ips=value(EXTERNAL_IPS) == "true",
            conntrack=value(CONNTRACK),
            pin_path=value(PIN_PATH),
            pod_name=value(POD_NAME),
            pod_namespace=value(POD_NAMESPACE),
            pod_uid=value(POD_UID),
            record_ratio=value(RECORD_RATIO),
            record_rate=value(RECORD_RATE),
            span_ratio=_span_ratio(value(_SAMPLER), value(_SAMPLER_ARG)),
            metric_attributes=value(METRIC_ATTRIBUTES),
            metric_series=value(METRIC_SERIES),
            queue_bytes=value(QUEUE_BYTES),
            listen=value(LISTEN),
            log_level=value(LOG_LEVEL),
            metrics=signal("METRICS"),
            logs=signal("LOGS"),
            traces=traces,
            metric_export_interval_ms=value(_METRIC_INTERVAL),
            metric_export_timeout_ms=value(_METRIC_TIMEOUT),
            temporality=value(_TEMPORALITY),
            sdk_disabled=value(_SDK_DISABLED),
            unknown=_unknown(environ),
        )


_NO_SOURCE = (
    "a source of VIP ports: the path of a VIP file here, or an API server "
    f"({KUBERNETES.name} not off, and KUBECONFIG set or this a pod)"
)


def _api(wish: str, environ: Mapping[str, str]) -> ApiConfig | None:
    if wish == "off":
        return None
    if kubeconfig := environ.get("KUBECONFIG", "").strip():
        return ApiConfig(kubeconfig)
    if environ.get("KUBERNETES_SERVICE_HOST", "").strip():
        return ApiConfig(None)
    return ApiConfig("~/.kube/config") if wish == "on" else None


def _span_ratio(sampler: str, argument: float) -> float:
    return {"always_on": 1.0, "always_off": 0.0}.get(sampler.removeprefix("parentbased_"), argument)


def pin_path_of(environ: Mapping[str, str]) -> Path | None:
    """Read where agents pin, and nothing else; raises ConfigError."""
    if problem := _problem(PIN_PATH, texts := _texts(environ, "")):
        raise ConfigError([problem])
    return PIN_PATH.parse(texts[PIN_PATH.name])


def closest_setting(name: str) -> str | None:
    """Find the setting that somebody who wrote `name` most likely meant, if any comes near."""
    # Without the prefix, which is alike in all of them, only the telling part is compared.
    known = [setting.name.removeprefix(PREFIX) for setting in SETTINGS]
    near = difflib.get_close_matches(name.removeprefix(PREFIX), known, n=1)
    return PREFIX + near[0] if near else None


def _texts(environ: Mapping[str, str], hostname: str) -> dict[str, str]:
    defaults = {setting.name: setting.default for setting in (*SETTINGS, *STANDARD)} | {NODE_NAME.name: hostname}
    return {name: environ.get(name, "").strip() or default for name, default in defaults.items()}


def _problem(setting: Setting[object], texts: Mapping[str, str]) -> Problem | None:
    text = texts[setting.name]
    try:
        setting.parse(text)
    except ValueError as error:
        detail = f" ({error})" if error.args else ""
        return Problem(setting.name, text, setting.accepted + detail)
    return None


def _unknown(environ: Mapping[str, str]) -> tuple[str, ...]:
    known = {setting.name for setting in SETTINGS}
    ours = {name for name in environ if name.startswith(PREFIX) and not _INJECTED.fullmatch(name)}
    return tuple(sorted(ours - known))
