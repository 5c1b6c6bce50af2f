"""What a VIP file means, and what is said of each wrong one."""

from __future__ import annotations

import json
import time

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from otel_lb_hop.cluster import static_file
from otel_lb_hop.cluster.static_file import decode, parse
from otel_lb_hop.errors import ConfigError, Problem
from otel_lb_hop.model import Backend, Cluster, Node, Policy, Transport, VipPort, pack_address

FULL = """\
nodes:
  - {name: node1, zone: zone-a, region: lab}
  - {name: node2}
services:
  - name: default/web
    externalTrafficPolicy: Local
    vips: [10.0.10.0, "fd00:10::1"]
    ports:
      - {port: 80, protocol: TCP, targetPort: 8080}
      - {port: 53, protocol: UDP}
    backends:
      - {address: 10.100.1.2, node: node1, pod: web-1, ready: true}
      - {address: 10.100.2.2, node: node2, zone: zone-b, pod: other/web-2, ready: false, port: 9090}
      - {address: "fd00:100::2"}
"""

# A service on one line each, so that a case says only what is wrong with it.
OK_PORTS = "ports: [{port: 80}]"
HEAD = f"name: a/b, vips: [10.0.0.1], {OK_PORTS}"


def services(*items: str) -> str:
    """Write a file of these services, the first on line 2."""
    return "services:\n" + "".join(f"- {{{item}}}\n" for item in items)


def problems(text: str) -> tuple[Problem, ...]:
    """Give the problems that reading this text ends with."""
    with pytest.raises(ConfigError) as caught:
        parse(text)
    return caught.value.problems


def survives(raw: str | bytes) -> bool:
    """Whether this ends as it may: in a Cluster, or in a ConfigError with problems of the file."""
    try:
        return isinstance(parse(raw if isinstance(raw, str) else decode(raw)), Cluster)
    except ConfigError as error:
        return bool(error.problems) and all(problem.name.startswith("VIP file") for problem in error.problems)


def test_full_file() -> None:
    """Every VIP and port becomes a VipPort with the backends of its family, ports, zones and pods filled in."""
    v4_tcp = (
        Backend(pack_address("10.100.1.2"), 8080, "node1", "zone-a", "default", "web-1", ready=True),
        Backend(pack_address("10.100.2.2"), 9090, "node2", "zone-b", "other", "web-2", ready=False),
    )
    v4_udp = (
        Backend(pack_address("10.100.1.2"), 53, "node1", "zone-a", "default", "web-1", ready=True),
        Backend(pack_address("10.100.2.2"), 9090, "node2", "zone-b", "other", "web-2", ready=False),
    )
    v6_tcp, v6_udp = ((Backend(pack_address("fd00:100::2"), port),) for port in (8080, 53))
    v4, v6 = pack_address("10.0.10.0"), pack_address("fd00:10::1")
    web = ("default", "web", Policy.LOCAL)
    assert parse(FULL) == Cluster(
        vip_ports=(
            VipPort(v4, 80, Transport.TCP, *web, v4_tcp),
            VipPort(v4, 53, Transport.UDP, *web, v4_udp),
            VipPort(v6, 80, Transport.TCP, *web, v6_tcp),
            VipPort(v6, 53, Transport.UDP, *web, v6_udp),
        ),
        nodes=(Node("node1", "zone-a", "lab"), Node("node2")),
    )


def test_defaults() -> None:
    """Policy Cluster, TCP, no backends; a target port that is not written is the port itself."""
    (web,) = parse(services(HEAD)).vip_ports
    assert web == VipPort(pack_address("10.0.0.1"), 80, Transport.TCP, "a", "b", Policy.CLUSTER, ())
    (web,) = parse(services(HEAD + ", backends: [{address: 10.1.0.1}]")).vip_ports
    assert web.backends == (Backend(pack_address("10.1.0.1"), 80),)


def test_json() -> None:
    """The same content as JSON, on one line or many, gives the same cluster."""
    tree = yaml.safe_load(FULL)
    assert parse(json.dumps(tree)) == parse(json.dumps(tree, indent="\t")) == parse(FULL)


@pytest.mark.parametrize(
    "text",
    [
        "services: []",
        "\ufeffservices: []",
        "---\nservices: []\n...\n",
        "# nothing here\nservices: []",
        "services: []\nnodes:",
        "nodes: null\nservices: []",
    ],
)
def test_no_services(text: str) -> None:
    """A file may hold no services, and a null optional key counts as not written."""
    assert parse(text) == Cluster()


def test_anchors() -> None:
    """Anchors and aliases stand for what they name."""
    text = "services:\n- {name: a/b, vips: [&v 10.0.0.1], ports: &p [{port: 80}]}\n"
    text += "- {name: a/c, vips: [10.0.0.2], ports: *p, backends: [{address: *v}]}\n"
    first, second = parse(text).vip_ports
    assert (first.port, second.port) == (80, 80)
    assert second.backends[0].address == first.address


@pytest.mark.parametrize(
    "items",
    [
        [HEAD, "name: a/b, vips: [10.0.0.1], ports: [{port: 80, protocol: UDP}, {port: 81}]"],
        [HEAD, f"name: a/c, vips: [10.0.0.2], {OK_PORTS}"],
        [HEAD + ", backends: [{address: 10.1.0.1, port: 1}, {address: 10.1.0.1, port: 2}, {address: 10.1.0.1}]"],
        ["name: a/b, vips: [10.0.0.1], ports: [{port: 1}, {port: 1, protocol: UDP}], backends: [{address: 10.1.0.1}]"],
        [f"name: a/b, vips: [1:2:3:4:5:6:7:8], {OK_PORTS}"],  # YAML 1.1 takes it for a number in base 60
    ],
)
def test_near_misses(items: list[str]) -> None:
    """Near misses of the rules on duplicates are accepted, and so is an address that YAML takes for a number."""
    assert parse(services(*items)).vip_ports


PORT_PATH = "services[0].ports[0].port"
PLACES = [
    # (text, line, path, read, part of what is accepted)
    ("[]", 1, "", "a list", "a mapping with the keys nodes, services"),
    ("hello", 1, "", "hello", "a mapping"),
    ("nodes: []", 1, "", "no services", "services"),
    ("services:", 1, "", "no services", "services"),
    ("services: {}", 1, "services", "a mapping", "a list"),
    ("services: [1]", 1, "services[0]", "1", "a mapping"),
    ("services: []\nextra: 1", 2, "", "key extra", "the keys nodes, services"),
    ("services: []\n? [a]\n: 1", 2, "", "key a list", "the keys nodes, services"),
    ("services: []\nservices: []", 2, "", "key services again", "each key once"),
    ("nodes:\n- {zone: a}\nservices: []", 2, "nodes[0]", "no name", "name"),
    ("nodes:\n- {name: a}\n- {name: a}\nservices: []", 3, "nodes[1].name", "a", "each node once"),
    ("nodes: [{name: [a]}]\nservices: []", 1, "nodes[0].name", "a list", "text"),
    ("nodes: [{name: 1}]\nservices: []", 1, "nodes[0].name", "1", "in quotes"),
    ("nodes: [{name: a, zone: no}]\nservices: []", 1, "nodes[0].zone", "no", "in quotes"),
    ("nodes: [{name: a b}]\nservices: []", 1, "nodes[0].name", "a b", "without spaces"),
    (services(f"vips: [10.0.0.1], {OK_PORTS}"), 2, "services[0]", "no name", "name"),
    (services(f"name: web, vips: [10.0.0.1], {OK_PORTS}"), 2, "services[0].name", "web", "namespace/name"),
    (services(f"name: a/b/c, vips: [10.0.0.1], {OK_PORTS}"), 2, "services[0].name", "a/b/c", "namespace/name"),
    (services(f"name: A/b, vips: [10.0.0.1], {OK_PORTS}"), 2, "services[0].name", "A/b", "namespace/name"),
    (services(HEAD + ", policy: Local"), 2, "services[0]", "key policy", "externalTrafficPolicy"),
    (
        services(HEAD + ", externalTrafficPolicy: local"),
        2,
        "services[0].externalTrafficPolicy",
        "local",
        "Cluster or Local",
    ),
    (services(f"name: a/b, {OK_PORTS}"), 2, "services[0]", "no vips", "vips"),
    (services(f"name: a/b, vips: [], {OK_PORTS}"), 2, "services[0].vips", "an empty list", "1 or more"),
    (services(f"name: a/b, vips: 10.0.0.1, {OK_PORTS}"), 2, "services[0].vips", "10.0.0.1", "a list"),
    *(
        (services(f"name: a/b, vips: ['{vip}'], {OK_PORTS}"), 2, "services[0].vips[0]", vip, accepted)
        for vip, accepted in [
            ("", "an IPv4 or IPv6 address"),
            ("10.0.0", "an IPv4 or IPv6 address"),
            ("10.0.0.256", "an IPv4 or IPv6 address"),
            ("010.0.0.1", "an IPv4 or IPv6 address"),
            ("10.0.0.0/24", "an IPv4 or IPv6 address"),
            ("web.example.org", "an IPv4 or IPv6 address"),
            ("fe80::1%eth0", "an IPv4 or IPv6 address"),
            ("0.0.0.0", "unspecified"),
            ("::", "unspecified"),
            ("224.0.0.1", "multicast"),
            ("239.255.255.255", "multicast"),
            ("255.255.255.255", "broadcast"),
            ("ff02::1", "multicast"),
            ("::ffff:10.0.0.1", "in its own form"),
            ("::ffff:a00:1", "in its own form"),
        ]
    ),
    (services("name: a/b, vips: [10.0.0.1], ports: []"), 2, "services[0].ports", "an empty list", "1 or more"),
    (services("name: a/b, vips: [10.0.0.1], ports: [{}]"), 2, "services[0].ports[0]", "no port", "port"),
    *(
        (
            services(f"name: a/b, vips: [10.0.0.1], ports: [{{port: {port}}}]"),
            2,
            "services[0].ports[0].port",
            read,
            "1 to",
        )
        for port, read in [
            ("0", "0"),
            ("65536", "65536"),
            ("99999", "99999"),
            ("-1", "-1"),
            ("80.0", "80.0"),
            ("0x50", "0x50"),
            ("0120", "0120"),
            ("1:20", "1:20"),
            ('"80"', "80"),
            ("true", "true"),
            ("http", "http"),
            ("[80]", "a list"),
            ("9" * 100, "9" * 80 + "..."),
        ]
    ),
    (
        services("name: a/b, vips: [10.0.0.1], ports: [{port: 1, protocol: tcp}, {port: 1}]"),
        2,
        "services[0].ports[0].protocol",
        "tcp",
        "TCP or UDP or SCTP",
    ),
    (
        services("name: a/b, vips: [10.0.0.1], ports: [{port: 1, targetPort: http}]"),
        2,
        "services[0].ports[0].targetPort",
        "http",
        "1 to",
    ),
    *(
        (services(f"{HEAD}, backends: [{{{backend}}}]"), 2, f"services[0].backends[0]{path}", read, accepted)
        for backend, path, read, accepted in [
            ("node: a", "", "no address", "address"),
            ("address: 0.0.0.0", ".address", "0.0.0.0", "unspecified"),
            ("address: 10.1.0.1, ready: yes", ".ready", "yes", "true or false"),
            ("address: 10.1.0.1, ready: True", ".ready", "True", "true or false"),
            ("address: 10.1.0.1, ready: 'true'", ".ready", "true", "without quotes"),
            ("address: 10.1.0.1, port: 0", ".port", "0", "1 to"),
            ("address: 10.1.0.1, port: 0}, {address: 10.1.0.1", ".port", "0", "1 to"),
            ("address: 10.1.0.1, pod: a/b/c", ".pod", "a/b/c", "pod or namespace/pod"),
            ("address: 10.1.0.1, targetPort: 1", "", "key targetPort", "address, port, node, zone, pod, ready"),
        ]
    ),
    (
        services(HEAD + ", backends: [{address: 10.1.0.1}, {address: 10.1.0.1, port: 80}]"),
        2,
        "services[0].backends[1]",
        "10.1.0.1 again",
        "first services[0].backends[0] on line 2",
    ),
    (
        services(HEAD, f"name: a/c, vips: [10.0.0.9, 10.0.0.1], {OK_PORTS}"),
        3,
        "services[1].vips[1]",
        "10.0.0.1 TCP 80 of services[1].ports[0]",
        "first services[0].vips[0] with services[0].ports[0] on line 2",
    ),
    (
        services("name: a/b, vips: [10.0.0.1, 10.0.0.1], ports: [{port: 80}]"),
        2,
        "services[0].vips[1]",
        "10.0.0.1 TCP 80 of services[0].ports[0]",
        "first services[0].vips[0]",
    ),
]


@pytest.mark.parametrize(("text", "line", "path", "read", "accepted"), PLACES)
def test_wrong_place(text: str, line: int, path: str, read: str, accepted: str) -> None:
    """One wrong thing is one problem that names line, path, what was read and what is accepted."""
    (problem,) = problems(text)
    assert problem.name == f"VIP file line {line}" + (f": {path}" if path else "")
    assert problem.read == read
    assert accepted in problem.accepted


@pytest.mark.parametrize(
    ("text", "line", "read"),
    [
        ("", 1, "an empty file"),
        ("  \n\n", 1, "an empty file"),
        ("# only a comment\n", 1, "an empty file"),
        ("---\n", 1, "an empty file"),
        ("null", 1, "an empty file"),
        ("services: []\n---\nservices: []\n", 2, "another document"),
        ("services: []\nnodes: [\n", 3, "did not find expected node content"),
        ("services: []\n\tnodes: []\n", 2, "found character that cannot start any token"),
        ("services: []\nnodes: 'a", 2, "found unexpected end of stream"),
        ("%YAML 9.0\n---\nservices: []\n", 1, "found incompatible YAML document"),
        ("services: *none", 1, "*none"),
        ("services: &loop [*loop]", 1, "*loop"),
        ("services:\n- &loop {name: a/b, vips: [*loop]}", 2, "*loop"),
        ("services: !!python/object:os.system []", 1, "tag tag:yaml.org,2002:python/object:os.system"),
        ("services: []\nnodes: !!str 1", 2, "tag tag:yaml.org,2002:str"),
        ("services: []\n\0", 2, "character U+0000"),
        ("services:\n - \x1b[31m", 2, "character U+001B"),
        ("services: []\n# \ud800", 2, "character U+D800"),
        ("[" * 100_000, 1, "deeper nesting"),
        ("- " * 100_000, 1, "deeper nesting"),
        ("{a: " * 1_000_000, 1, "deeper nesting"),
        ("# " + "x" * static_file.MAX_BYTES, 1, f"{static_file.MAX_BYTES + 2} bytes"),
        ("é" * (static_file.MAX_BYTES // 2 + 1), 1, f"{static_file.MAX_BYTES + 2} bytes"),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_not_readable(text: str, line: int, read: str) -> None:
    """A text that is no YAML document of ours is one problem with its line and the parser's words."""
    (problem,) = problems(text)
    assert problem.name == f"VIP file line {line}"
    assert problem.read.startswith(read)


def test_all_problems_together() -> None:
    """All wrong places of a file are told at once, with the name the caller gave to the file."""
    text = services("name: x, vips: [1.2.3], ports: [{port: 0}], backends: [{address: y, ready: 1}]", "nome: z")
    with pytest.raises(ConfigError) as caught:
        parse("nodes: 1\n" + text, "/etc/vips.yaml")
    assert [problem.name.partition(" line ")[2] for problem in caught.value.problems] == [
        "1: nodes",
        "3: services[0].name",
        "3: services[0].vips[0]",
        "3: services[0].ports[0].port",
        "3: services[0].backends[0].address",
        "3: services[0].backends[0].ready",
        "4: services[1]",
        "4: services[1]",
        "4: services[1]",
        "4: services[1]",
    ]
    assert str(caught.value).startswith("/etc/vips.yaml line 1: nodes: read '1', accepted: a list")


def test_too_many_problems() -> None:
    """A file that is wrong everywhere gives a bounded message that says it is not complete."""
    found = problems("services:\n" + "- 1\n" * 5000)
    assert len(found) == static_file.MAX_PROBLEMS + 1
    assert found[-1].read == "too many problems"


@pytest.mark.parametrize(
    ("text", "read"),
    [
        (
            "a: &a [1,1,1,1,1,1,1,1,1,1]\n"
            + "".join(f"{chr(98 + i)}: &{chr(98 + i)} [{','.join(['*' + chr(97 + i)] * 10)}]\n" for i in range(9)),
            "more values",
        ),
        (
            services(
                f"name: a/b, vips: [{','.join(f'10.0.{i >> 8}.{i & 255}' for i in range(1, 1100))}], "
                f"ports: [{','.join(f'{{port: {i}}}' for i in range(1, 1100))}]"
            ),
            "more entries",
        ),
    ],
    ids=["billion laughs", "product"],
)
def test_small_file_that_grows(text: str, read: str) -> None:
    """A small file cannot grow beyond the bounds by aliases or by multiplying VIPs with ports."""
    assert problems(text)[-1].read == read


def test_pure_python_loader(monkeypatch: pytest.MonkeyPatch) -> None:
    """A PyYAML without libyaml reads the same and gives up on the same texts."""
    expected = parse(FULL)
    monkeypatch.setattr(static_file, "_LOADER", yaml.SafeLoader)
    assert parse(FULL) == expected
    for text in ("[" * 10_000, "a: [", "services: []\n---\n", "services: &a [*a]", "a: \x85\ufeff: b"):
        assert problems(text)


@pytest.mark.parametrize(
    ("raw", "line", "read"),
    [
        (b"services:\n- \xff\n", 2, "byte 0xff"),
        ("services: []".encode("utf-16"), 1, "byte 0xff"),
        (b"\xe2\x82", 1, "byte 0xe2"),
        (b" " * (static_file.MAX_BYTES + 1), 1, f"{static_file.MAX_BYTES + 1} bytes"),
    ],
    ids=["latin-1", "utf-16", "cut", "too big"],
)
def test_not_decodable(raw: bytes, line: int, read: str) -> None:
    """Bytes that are not UTF-8, or too many, are a problem with its line."""
    with pytest.raises(ConfigError) as caught:
        decode(raw, "f")
    (problem,) = caught.value.problems
    assert (problem.name, problem.read) == (f"f line {line}", read)


def test_decodable() -> None:
    """UTF-8 with or without a byte order mark is text."""
    assert decode(b"\xef\xbb\xbfa: \xc3\xa9") == decode(b"a: \xc3\xa9") == "a: é"


YAML_BITS = st.text(alphabet=st.sampled_from("abn01:.,-[]{}&*!|>'\"%@`#?~ \t\n\\/\x00\x85\ud800\ufeffé"), max_size=60)


@given(st.text() | YAML_BITS)
def test_random_text(text: str) -> None:
    """No text at all makes anything but a Cluster or a ConfigError."""
    assert survives(text)


@given(st.binary() | st.binary().map(lambda tail: FULL.encode() + tail))
def test_random_bytes(raw: bytes) -> None:
    """No bytes at all make anything but a text or a ConfigError."""
    assert survives(raw)


@given(st.lists(st.tuples(st.integers(0, len(FULL)), st.integers(0, 30), YAML_BITS | st.text(max_size=5)), max_size=4))
@example([(0, 0, "&a ")])
def test_mutated_file(cuts: list[tuple[int, int, str]]) -> None:
    """A valid file with parts cut out and others put in never makes anything but a Cluster or a ConfigError."""
    text = FULL
    for start, length, new in cuts:
        text = text[:start] + new + text[start + length :]
    assert survives(text)


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(["10.0.0.1", "a/b"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["nodes", "services", "name", "vips", "ports", "backends", "port", "address", "pod", "x"]),
            inner,
            max_size=5,
        )
    ),
    max_leaves=20,
)


@given(st.dictionaries(st.sampled_from(["nodes", "services"]), VALUES))
def test_random_structure(tree: dict[str, object]) -> None:
    """No structure that YAML can hold makes anything but a Cluster or a ConfigError."""
    assert survives(yaml.safe_dump(tree))


def test_many_services() -> None:
    """The time for 1,000 services with dual stack, two ports and four backends is within the agent's start."""
    made = {
        "services": [
            {
                "name": f"ns/svc-{i}",
                "vips": [f"10.0.{i >> 8}.{i & 255}", f"fd00:10::{i + 1:x}"],
                "ports": [{"port": 80, "targetPort": 8080}, {"port": 443, "targetPort": 8443}],
                "backends": [{"address": f"10.{b}.{i >> 8}.{i & 255}", "node": f"node{b}"} for b in range(1, 5)],
            }
            for i in range(1000)
        ],
    }
    text = json.dumps(made)
    start = time.process_time()
    assert len(parse(text).vip_ports) == 4000
    assert time.process_time() - start < 5  # measured 0.4; the margin is for slow and traced runs
