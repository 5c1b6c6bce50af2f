"""Each setting's accepted and refused texts, and how all problems come together."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from otel_lb_hop.config import (
    PREFIX,
    SETTINGS,
    STANDARD,
    ApiConfig,
    Config,
    MetricAttributes,
    SignalConfig,
    closest_setting,
    pin_path_of,
)
from otel_lb_hop.errors import ConfigError, Problem
from otel_lb_hop.model import Policy

if TYPE_CHECKING:
    from collections.abc import Mapping

BASE = {"OTEL_LB_HOP_VIPS_FILE": "/etc/vips.yaml"}
NAMES = [setting.name for setting in (*SETTINGS, *STANDARD)]


def read(**settings: str) -> Config:
    """Read these settings on top of the least that is needed."""
    return Config.from_environ(BASE | settings, "node1")


def own(name: str, text: str) -> Config:
    """Read one setting of ours."""
    return read(**{PREFIX + name: text})


def refused(environ: Mapping[str, str], hostname: str = "node1") -> tuple[Problem, ...]:
    """Give the problems that reading this environment ends with, none if it is accepted."""
    try:
        Config.from_environ(environ, hostname)
    except ConfigError as error:
        return error.problems
    return ()


def test_defaults() -> None:
    """With only a VIP file named, everything else has the documented default."""
    config = Config.from_environ(BASE, "node1")
    signal = SignalConfig(("otlp",), "grpc")
    assert config.node_name == "node1"
    assert config.interfaces.matches("eth0")
    assert not config.interfaces.matches("lo")
    assert config.uplinks is None
    assert config.hook == "tc"
    assert config.vips_file == Path("/etc/vips.yaml")
    assert (config.record_ratio, config.record_rate, config.span_ratio) == (1.0, 1000, 1.0)
    assert config.queue_bytes == 33_554_432
    assert config.listen == ("127.0.0.1", 9465)
    assert config.log_level == "info"
    assert config.pin_path == Path("/sys/fs/bpf/otel-lb-hop")
    assert (config.metrics, config.logs, config.traces) == (signal, signal, signal)
    assert (config.metric_export_interval_ms, config.metric_export_timeout_ms) == (60000, 30000)
    assert config.temporality == "cumulative"
    assert config.metric_attributes == MetricAttributes(zone=False, destination_zone=False, destination_node=True)
    assert config.metric_series == 20_000
    assert config.sdk_disabled is False
    assert config.unknown == ()


@pytest.mark.parametrize("blank", ["", "  ", "\n"])
def test_blank_is_unset(blank: str) -> None:
    """A variable that is empty or blank counts as not set."""
    others = [name for name in NAMES if name not in BASE]
    assert read(**dict.fromkeys(others, blank)) == Config.from_environ(BASE, "node1")


def test_equal_configs() -> None:
    """The same environment gives an equal value, so a reload can tell that nothing changed."""
    assert own("INTERFACES", "eth*,/en.*/") == own("INTERFACES", "eth*,/en.*/")


@pytest.mark.parametrize(
    ("text", "meant", "not_meant"),
    [
        ("eth0", ["eth0"], ["eth1", "eth01", "lo"]),
        ("eth*", ["eth", "eth0", "eth0.100"], ["veth0", "lo"]),
        ("eth0, ens?", ["eth0", "ens3"], ["ens33", "eth1"]),
        ("eth[!0]", ["eth1"], ["eth0"]),
        ("/en.*|bond[0-9]/", ["enp1s0", "bond0"], ["bond10", "xen0"]),
        ("/eth[0-9]{1,2}/,wg0", ["eth1", "eth12", "wg0"], ["eth123"]),
        ("!cali*", ["eth0", "cilium_host"], ["cali123", "lo"]),
        ("eth*, !eth9", ["eth0"], ["eth9", "wlan0"]),
        ("! /veth.*/ ", ["eth0"], ["veth0", "lo"]),
        ("*", ["eth0"], ["lo"]),
        ("/.*/", ["eth0"], ["lo"]),
        ("lo,eth0", ["lo", "eth0"], ["eth1"]),
        ("*,lo,!lo", ["eth0"], ["lo"]),
        ("fifteen-bytes-x", ["fifteen-bytes-x"], ["fifteen-bytes"]),
        ("a.b", ["a.b"], ["axb"]),
    ],
)
def test_interfaces(text: str, meant: list[str], not_meant: list[str]) -> None:
    """Names, globs, regexes and exclusions pick the interfaces that they say, for both settings."""
    for matcher in (own("INTERFACES", text).interfaces, own("UPLINKS", text).uplinks):
        assert matcher is not None
        assert [name for name in meant + not_meant if matcher.matches(name)] == meant


@pytest.mark.parametrize(
    ("text", "detail"),
    [
        ("eth0,,eth1", "an item is empty"),
        ("eth0,", "an item is empty"),
        ("!", "an item is empty"),
        ("!!eth0", "'!!eth0' cannot be an interface"),
        ("sixteen-bytes-xx", "'sixteen-bytes-xx' is longer than 15 bytes"),
        ("éééééééé", "'éééééééé' is longer than 15 bytes"),
        ("eth 0", "'eth 0' cannot be an interface"),
        ("eth0:1", "'eth0:1' cannot be an interface"),
        ("a/b", "'a/b' cannot be an interface"),
        ("/eth", "'/eth' is not /regex/"),
        ("//", "'//' is not /regex/"),
        ("/", "'/' is not /regex/"),
        ("/eth[/", "'/eth[/': unterminated character set at position 3"),
        ("/a{1,99999999999}/", "'/a{1,99999999999}/': the repetition number is too large"),
    ],
)
@pytest.mark.parametrize("name", ["OTEL_LB_HOP_INTERFACES", "OTEL_LB_HOP_UPLINKS"])
def test_interfaces_refused(name: str, text: str, detail: str) -> None:
    """A bad item is refused with the item and what is wrong with it."""
    (problem,) = refused(BASE | {name: text})
    assert (problem.name, problem.read) == (name, text)
    assert problem.accepted.endswith(f"({detail})")


@pytest.mark.parametrize(
    ("text", "listen"),
    [
        ("127.0.0.1:9465", ("127.0.0.1", 9465)),
        ("0.0.0.0:0", ("0.0.0.0", 0)),
        ("localhost:65535", ("localhost", 65535)),
        ("LocalHost:80", ("localhost", 80)),
        ("[::1]:9465", ("::1", 9465)),
        ("[::]:9465", ("::", 9465)),
        ("off", None),
        ("OFF", None),
    ],
)
def test_listen(text: str, listen: tuple[str, int] | None) -> None:
    """An address of either family, localhost or off says where to listen."""
    assert own("LISTEN", text).listen == listen


@pytest.mark.parametrize(
    ("name", "texts", "values"),
    [
        ("RECORD_RATIO", ["0", "1", "0.25", ".5", "1.", "1e-3"], [0.0, 1.0, 0.25, 0.5, 1.0, 0.001]),
        ("RECORD_RATE", ["0", "10000000", "007"], [0, 10_000_000, 7]),
        ("QUEUE_BYTES", ["8388608", "8589934592"], [8_388_608, 8_589_934_592]),
        ("LOG_LEVEL", ["debug", "INFO", "Warning", "error"], ["debug", "info", "warning", "error"]),
        ("NODE_NAME", ["node-7.lan", " n "], ["node-7.lan", "n"]),
        ("VIPS_FILE", ["vips.yaml", "/a b/c"], [Path("vips.yaml"), Path("/a b/c")]),
        ("HOOK", ["tc", "XDP", "xdp-Generic"], ["tc", "xdp", "xdp-generic"]),
        ("CONNTRACK", ["auto", "On", "off"], ["auto", "on", "off"]),
        ("PIN_PATH", ["off", "OFF", "/a/b", "/off"], [None, None, Path("/a/b"), Path("/off")]),
        ("EXTERNAL_IPS", ["true", "False"], [True, False]),
        ("POD_NAME", ["otel-lb-hop-x7k2p"], ["otel-lb-hop-x7k2p"]),
        ("POD_NAMESPACE", ["monitoring"], ["monitoring"]),
        ("POD_UID", ["0b9e"], ["0b9e"]),
    ],
)
def test_own_settings(name: str, texts: list[str], values: list[object]) -> None:
    """Each accepted text of our own settings gives its value."""
    assert [getattr(own(name, text), name.lower()) for text in texts] == values


@pytest.mark.parametrize(
    ("sampler", "argument", "ratio"),
    [
        ("always_on", "0.5", 1.0),
        ("always_off", "0.5", 0.0),
        ("traceidratio", "0.5", 0.5),
        ("traceidratio", "", 1.0),
        ("parentbased_always_on", "0.5", 1.0),
        ("parentbased_always_off", "0.5", 0.0),
        ("parentbased_traceidratio", "0.25", 0.25),
        ("", "0.25", 1.0),
    ],
)
def test_sampler(sampler: str, argument: str, ratio: float) -> None:
    """The standard sampler's names and argument say the share of spans."""
    assert read(OTEL_TRACES_SAMPLER=sampler, OTEL_TRACES_SAMPLER_ARG=argument).span_ratio == ratio


@pytest.mark.parametrize(
    ("name", "texts"),
    [
        ("OTEL_LB_HOP_NODE_NAME", ["two words", "n" * 254, "nöde"]),
        (
            "OTEL_LB_HOP_RECORD_RATIO",
            ["nan", "inf", "-inf", "1.01", "-0.1", "1e999", "half", "0,5", "1_0", ".", "\u0660"],
        ),
        ("OTEL_LB_HOP_RECORD_RATE", ["-1", "10000001", "1.5", "1e3", "many", "1_000", "\u0663", "9" * 5000]),
        ("OTEL_LB_HOP_QUEUE_BYTES", ["8388607", "8589934593", "32MiB"]),
        (
            "OTEL_LB_HOP_LISTEN",
            [
                "9465",
                ":9465",
                "127.0.0.1",
                "127.0.0.1:",
                "127.0.0.1:65536",
                "127.0.0.1:-1",
                "::1:9465",
                "[::1]",
                "[127.0.0.1]:80",
                "[localhost]:80",
                "[fe80::1%eth0]:80",
                "example.org:80",
                "300.0.0.1:80",
                "none",
            ],
        ),
        ("OTEL_LB_HOP_LOG_LEVEL", ["trace", "warn", "20"]),
        ("OTEL_LB_HOP_KUBERNETES", ["true", "in-cluster"]),
        ("OTEL_LB_HOP_POLICY", ["Cluster,Local", "none"]),
        ("OTEL_LB_HOP_EXTERNAL_IPS", ["yes", "1"]),
        ("OTEL_LB_HOP_HOOK", ["tcx", "xdpgeneric", "xdp,tc"]),
        ("OTEL_LB_HOP_CONNTRACK", ["true", "always"]),
        ("OTEL_LB_HOP_PIN_PATH", ["on", "bpf/otel-lb-hop", "./x", "none"]),
        ("OTEL_LB_HOP_POD_NAME", ["two words"]),
        ("OTEL_METRICS_EXPORTER", ["otlp,none", "none,otlp", "otlp,", "a b", "none,none", "/"]),
        ("OTEL_LOGS_EXPORTER", ["otlp,None"]),
        ("OTEL_TRACES_EXPORTER", [","]),
        ("OTEL_EXPORTER_OTLP_PROTOCOL", ["http/json", "http", "GRPC"]),
        ("OTEL_EXPORTER_OTLP_METRICS_PROTOCOL", ["http/json"]),
        ("OTEL_EXPORTER_OTLP_LOGS_PROTOCOL", ["http/json"]),
        ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", ["http/json"]),
        ("OTEL_METRIC_EXPORT_INTERVAL", ["99", "0", "60s", "1000.5", "2147483648"]),
        ("OTEL_METRIC_EXPORT_TIMEOUT", ["0", "-1", "x"]),
        (
            "OTEL_LB_HOP_METRIC_ATTRIBUTES",
            ["zone", "cloud.availability_zone,", "destination.k8s.node.name", "-cloud.availability_zone", ","],
        ),
        ("OTEL_LB_HOP_METRIC_SERIES", ["99", "1000001", "-1", "many"]),
        ("OTEL_EXPORTER_OTLP_METRICS_TEMPORALITY_PREFERENCE", ["deltas", "low memory", "1"]),
        ("OTEL_TRACES_SAMPLER", ["on", "parentbased", "jaeger_remote", "TraceIdRatio"]),
        ("OTEL_TRACES_SAMPLER_ARG", ["1.1", "endpoint=x"]),
    ],
)
def test_refused(name: str, texts: list[str]) -> None:
    """Each bad text is one problem that names the variable, what was read and what is accepted."""
    accepted = next(setting.accepted for setting in (*SETTINGS, *STANDARD) if setting.name == name)
    for text in texts:
        (problem,) = refused(BASE | {name: text})
        assert (problem.name, problem.read) == (name, text)
        assert problem.accepted.startswith(accepted)


def test_metric_attributes() -> None:
    """Each item stands for itself, in any order."""
    assert own("METRIC_ATTRIBUTES", "cloud.availability_zone").metric_attributes == MetricAttributes(zone=True)
    text = " -destination.k8s.node.name , destination.cloud.availability_zone"
    assert own("METRIC_ATTRIBUTES", text).metric_attributes == MetricAttributes(
        zone=False, destination_zone=True, destination_node=False
    )


def test_temporality() -> None:
    """As the specification has it, in upper or lower case."""
    name = "OTEL_EXPORTER_OTLP_METRICS_TEMPORALITY_PREFERENCE"
    assert [
        Config.from_environ(BASE | {name: text}, "node1").temporality for text in ("Cumulative", "DELTA", "lowMemory")
    ] == ["cumulative", "delta", "lowmemory"]


def test_policy() -> None:
    """The policies to watch are a set."""
    assert [own("POLICY", text).policies for text in ("all", "Cluster", "local")] == [
        {Policy.CLUSTER, Policy.LOCAL},
        {Policy.CLUSTER},
        {Policy.LOCAL},
    ]


@pytest.mark.parametrize(
    ("environ", "api"),
    [
        ({}, None),
        ({"KUBECONFIG": " "}, None),
        ({"KUBECONFIG": "/a:/b"}, ApiConfig("/a:/b")),
        ({"KUBERNETES_SERVICE_HOST": "10.96.0.1"}, ApiConfig(None)),
        ({"KUBERNETES_SERVICE_HOST": "10.96.0.1", "KUBECONFIG": "/a"}, ApiConfig("/a")),
        ({"KUBERNETES_SERVICE_HOST": "10.96.0.1", "OTEL_LB_HOP_KUBERNETES": "off"}, None),
        ({"KUBECONFIG": "/a", "OTEL_LB_HOP_KUBERNETES": "Off"}, None),
        ({"OTEL_LB_HOP_KUBERNETES": "on"}, ApiConfig("~/.kube/config")),
        ({"OTEL_LB_HOP_KUBERNETES": "on", "KUBERNETES_SERVICE_HOST": "10.96.0.1"}, ApiConfig(None)),
    ],
)
def test_api_server(environ: dict[str, str], api: ApiConfig | None) -> None:
    """KUBECONFIG comes before the way of a pod; the home directory's file counts only when asked for."""
    assert read(**environ).api == api


def test_no_source() -> None:
    """Without a VIP file and an API server there is nothing to watch, and the message names both ways."""
    for environ in ({}, {"KUBECONFIG": "/a", "OTEL_LB_HOP_KUBERNETES": "off"}):
        (problem,) = refused(environ)
        assert (problem.name, problem.read) == ("OTEL_LB_HOP_VIPS_FILE", "")
        assert "KUBECONFIG" in problem.accepted
    assert not refused({"KUBECONFIG": "/a"})


def test_bad_hostname() -> None:
    """A host name that cannot be a node name asks for the node's name to be set."""
    for hostname in ("", "my node"):
        with pytest.raises(ConfigError, match="OTEL_LB_HOP_NODE_NAME"):
            Config.from_environ(BASE, hostname)


def test_all_problems_together() -> None:
    """Every bad setting is reported at once, each once."""
    free = {"OTEL_SDK_DISABLED", "OTEL_LB_HOP_INTERFACES", "OTEL_LB_HOP_UPLINKS", "OTEL_LB_HOP_PIN_PATH"}
    bad = dict.fromkeys((name for name in NAMES if name not in BASE and name not in free), "/ /")
    assert sorted(problem.name for problem in refused(BASE | bad)) == sorted(bad)


@pytest.mark.parametrize(
    ("text", "exporters"),
    [
        ("otlp", ("otlp",)),
        ("none", ()),
        ("None", ()),
        ("console, otlp", ("console", "otlp")),
        ("otlp,otlp", ("otlp",)),
        ("my_plugin.v2-x", ("my_plugin.v2-x",)),
    ],
)
def test_exporters(text: str, exporters: tuple[str, ...]) -> None:
    """Each signal has its own list of exporters, and `none` is the empty list."""
    for signal in ("metrics", "logs", "traces"):
        config = read(**{f"OTEL_{signal.upper()}_EXPORTER": text})
        got = {name: getattr(config, name).exporters for name in ("metrics", "logs", "traces")}
        assert got == dict.fromkeys(got, ("otlp",)) | {signal: exporters}


def test_protocol() -> None:
    """A signal's own protocol wins over the one of all signals."""
    config = read(OTEL_EXPORTER_OTLP_PROTOCOL="http/protobuf", OTEL_EXPORTER_OTLP_LOGS_PROTOCOL="grpc")
    assert [config.metrics.protocol, config.logs.protocol, config.traces.protocol] == [
        "http/protobuf",
        "grpc",
        "http/protobuf",
    ]


@pytest.mark.parametrize(("text", "disabled"), [("true", True), ("TRUE", True), ("1", False), ("no", False)])
def test_sdk_disabled(text: str, disabled: bool) -> None:  # noqa: FBT001
    """Only `true` in any case disables, as the specification says; nothing else is an error."""
    assert read(OTEL_SDK_DISABLED=text).sdk_disabled is disabled


def test_unknown() -> None:
    """A variable of ours that is not a setting is told, other people's and Kubernetes' own are not."""
    injected = [
        "SERVICE_HOST",
        "SERVICE_PORT",
        "SERVICE_PORT_HTTP",
        "PORT",
        "PORT_9465_TCP",
        "PORT_9465_TCP_ADDR",
        "PORT_9465_TCP_PORT",
        "PORT_9465_TCP_PROTO",
    ]
    strange = ["HOOKS", "LISTENS", "PORTS", ""]
    environ = {PREFIX + name: "x" for name in injected + strange} | {"OTEL_EXPORTER_OTLP_ENDPOINT": "x", "HOME": "/"}
    assert read(**environ).unknown == tuple(sorted(PREFIX + name for name in strange))


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("INTERFACE", "INTERFACES"),
        ("VIP_FILE", "VIPS_FILE"),
        ("LOGLEVEL", "LOG_LEVEL"),
        ("RECORDS_RATIO", "RECORD_RATIO"),
        ("ZZZ", None),
    ],
)
def test_closest_setting(name: str, near: str | None) -> None:
    """A misspelt name leads to the setting that was meant."""
    assert closest_setting(PREFIX + name) == (near and PREFIX + near)


def test_table() -> None:
    """Each setting is told once, fully, and its default is accepted by its own parser."""
    assert len(set(NAMES)) == len(NAMES)
    for setting in (*SETTINGS, *STANDARD):
        assert setting.accepted
        assert re.fullmatch(r"[A-Z].*\.", setting.meaning)
        if setting.default:
            setting.parse(setting.default)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@given(st.dictionaries(st.sampled_from(NAMES), st.text(max_size=40)), st.text(max_size=20))
def test_nothing_but_config_error(environ: dict[str, str], hostname: str) -> None:
    """Whatever the environment holds, it is a Config or a ConfigError whose problems are all settings."""
    problems = refused(environ, hostname)
    assert {problem.name for problem in problems} <= set(NAMES)
    if not problems:
        Config.from_environ(environ, hostname).interfaces.matches("eth0")


@pytest.mark.parametrize(
    ("environ", "path"),
    [
        ({}, Path("/sys/fs/bpf/otel-lb-hop")),
        ({"OTEL_LB_HOP_PIN_PATH": ""}, Path("/sys/fs/bpf/otel-lb-hop")),
        ({"OTEL_LB_HOP_PIN_PATH": " /run/bpf/x "}, Path("/run/bpf/x")),
        ({"OTEL_LB_HOP_PIN_PATH": "off"}, None),
        ({"OTEL_LB_HOP_PIN_PATH": "off", "OTEL_LB_HOP_LISTEN": "here", "OTEL_LB_HOP_RECORD_RATIO": "7"}, None),
    ],
)
def test_pin_path_alone(environ: dict[str, str], path: Path | None) -> None:
    """Where agents pin is read without all else: without a VIP file, and with other settings that are wrong."""
    assert pin_path_of(environ) == path


def test_pin_path_alone_is_refused() -> None:
    """A path that is none is told as it would be together with the others."""
    with pytest.raises(ConfigError) as caught:
        pin_path_of({"OTEL_LB_HOP_PIN_PATH": "here"})
    assert caught.value.problems == (
        Problem("OTEL_LB_HOP_PIN_PATH", "here", "an absolute path on a bpffs, or off"),
    )  # fmt: skip
