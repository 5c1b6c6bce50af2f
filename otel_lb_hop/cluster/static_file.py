"""The VIP file: text of YAML or JSON in, a `Cluster` out, or a `ConfigError` that names every wrong place by line.

Owns the file's schema (the tables below) and its bounds. No I/O: whoever reads the file and watches it hands the
text in. Whatever the text, nothing but ConfigError is raised, and time and memory are bounded.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from itertools import product
from typing import TYPE_CHECKING, Final, NamedTuple, NoReturn, TypeVar

import yaml
from yaml.resolver import Resolver

from otel_lb_hop.errors import ConfigError, Problem
from otel_lb_hop.model import Backend, Cluster, Node, Policy, Transport, VipPort, format_address, is_ipv4, pack_address

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

T = TypeVar("T")

MAX_BYTES: Final = 8 * 2**20
MAX_DEPTH: Final = 32  # the schema needs 5
MAX_NODES: Final = 2_000_000  # an alias counts as if written out; 5,000 Services of 4 backends need 320,000
MAX_ENTRIES: Final = 1_000_000  # VIPs x ports x backends, over all Services
MAX_PROBLEMS: Final = 1_000
MAX_PORT: Final = 65535

# A PyYAML built without libyaml reads the same, only slower.
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_resolve: Callable[..., str] = Resolver().resolve
_STR = Resolver.DEFAULT_SCALAR_TAG
_UNREADABLE = re.compile("[^\t\n\r\x20-\x7e\x85\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_INTEGER = re.compile("[1-9][0-9]{0,4}")
_LABEL = "[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?"
_SHOWN = 80

# Each mapping of the file: key -> whether it is required.
_FILE = {"nodes": False, "services": True}
_NODE = {"name": True, "zone": False, "region": False}
_SERVICE = {"name": True, "externalTrafficPolicy": False, "vips": True, "ports": True, "backends": False}
_PORT = {"port": True, "protocol": False, "targetPort": False}
_BACKEND = {"address": True, "port": False, "node": False, "zone": False, "pod": False, "ready": False}

_POLICIES = {policy.value: policy for policy in Policy}
_TRANSPORTS = {transport.name: transport for transport in Transport}
_FLAGS = {"true": True, "false": False}


class _Form(NamedTuple):
    """What a text must look like, for the machine and for people."""

    regex: re.Pattern[str]
    accepted: str


_NAME = _Form(re.compile("[!-~]{1,253}"), "1 to 253 printable ASCII characters without spaces")
_SERVICE_NAME = _Form(re.compile(f"{_LABEL}/{_LABEL}"), "namespace/name, both Kubernetes names")
_POD_NAME = _Form(re.compile(f"({_LABEL}/)?[a-z0-9]([-.a-z0-9]{{0,251}}[a-z0-9])?"), "pod or namespace/pod")


@dataclass(slots=True, eq=False)
class _Tree:
    """One YAML node; the children of a mapping are key, value, key, value and so on."""

    line: int
    kind: str
    value: str = ""
    plain: bool = False
    children: list[_Tree] = field(default_factory=list)
    size: int = 1

    def shown(self) -> str:
        """Say what was read here, as a message tells it."""
        if self.kind != "a value":
            return self.kind
        return self.value if len(self.value) <= _SHOWN else self.value[:_SHOWN] + "..."


class _Place(NamedTuple):
    """A node and the path by which the reader came to it."""

    tree: _Tree
    path: str


class _Port(NamedTuple):
    place: _Place
    port: int
    transport: Transport
    target: int


class _Service(NamedTuple):
    place: _Place
    namespace: str
    name: str
    policy: Policy
    vips: list[tuple[_Place, bytes]]
    ports: list[_Port]
    backends: list[tuple[_Place, Backend]]  # port 0 stands for the target port


_CHILDLESS: list[_Tree] = []  # one for all values, which are most of a tree: a fifth of its memory


@dataclass(slots=True)
class _Report:
    """The problems found so far; it gives up, with ConfigError, when there are too many to be of use."""

    source: str
    problems: list[Problem] = field(default_factory=list)
    entries: int = 0

    def add(self, place: _Place, accepted: str, read: str | None = None) -> None:
        """Note a problem at a place; `read` when it is not simply what the place holds."""
        name = f"{self.source} line {place.tree.line}" + (f": {place.path}" if place.path else "")
        self.problems.append(Problem(name, place.tree.shown() if read is None else read, accepted))
        if len(self.problems) >= MAX_PROBLEMS:
            self.problems.append(Problem(self.source, "too many problems", f"fewer than {MAX_PROBLEMS}; rest not read"))
            raise ConfigError(self.problems)

    def stop(self, line: int, read: str, accepted: str) -> NoReturn:
        """Note a problem after which nothing more can be read."""
        raise ConfigError([*self.problems, Problem(f"{self.source} line {line}", read, accepted)])


def decode(raw: bytes, source: str = "VIP file") -> str:
    """Make the file's text from its bytes; ConfigError if they are too many or not UTF-8 (a BOM is dropped)."""
    report = _Report(source)
    if len(raw) > MAX_BYTES:
        report.stop(1, f"{len(raw)} bytes", f"at most {MAX_BYTES} bytes")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        bad = f"byte 0x{error.object[error.start]:02x}"
        report.stop(error.object.count(b"\n", 0, error.start) + 1, bad, "text in UTF-8")


def parse(text: str, source: str = "VIP file") -> Cluster:
    """Read the whole file: one VipPort per VIP and port, with the backends of the VIP's own address family."""
    report = _Report(source)
    _check_text(report, text)
    try:
        root = _compose(report, text)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        report.stop(mark.line + 1 if mark else 1, error.problem or "broken YAML", "YAML or JSON")
    except yaml.YAMLError as error:
        report.stop(1, str(error), "YAML or JSON")
    fields = _fields(report, _Place(root, ""), _FILE)
    nodes = _nodes(report, fields.get("nodes"))
    zones = {node.name: node.zone for node in nodes}
    services = [_service(report, place, zones) for place in _items(report, fields.get("services"))]
    vip_ports = _vip_ports(report, services)
    if report.problems:
        raise ConfigError(report.problems)
    return Cluster(vip_ports, nodes)


def _check_text(report: _Report, text: str) -> None:
    size = len(text.encode("utf-8", "surrogatepass"))
    if size > MAX_BYTES:
        report.stop(1, f"{size} bytes", f"at most {MAX_BYTES} bytes")
    if bad := _UNREADABLE.search(text):
        report.stop(text.count("\n", 0, bad.start()) + 1, f"character U+{ord(bad[0]):04X}", "printable text in UTF-8")


def _compose(report: _Report, text: str) -> _Tree:
    """Build the tree from parser events; `yaml.compose` recurses in C, and deep nesting overruns its stack."""
    top = _Tree(1, "a stream")
    stack: list[_Tree] = [top]
    anchors: dict[str, _Tree] = {}
    for event in yaml.parse(text, Loader=_LOADER):
        if isinstance(event, yaml.NodeEvent):
            _grow(report, event, stack, anchors)
        elif isinstance(event, yaml.CollectionEndEvent):
            closed = stack.pop()
            stack[-1].size += closed.size
        elif isinstance(event, yaml.DocumentStartEvent) and top.children:
            report.stop(_line(event), "another document", "one document")
    if not top.children or _is_null(top.children[0]):
        report.stop(1, "an empty file", "a mapping with services")
    return top.children[0]


def _grow(report: _Report, event: yaml.NodeEvent, stack: list[_Tree], anchors: dict[str, _Tree]) -> None:
    tree = anchors.get(event.anchor or "") if isinstance(event, yaml.AliasEvent) else _tree(report, event)
    if tree is None or tree in stack:
        report.stop(_line(event), f"*{event.anchor}", "an alias of an anchor that is complete before it")
    if event.anchor:
        anchors[event.anchor] = tree
    stack[-1].children.append(tree)
    if isinstance(event, yaml.CollectionStartEvent):
        stack.append(tree)
    else:
        stack[-1].size += tree.size
    if len(stack) > MAX_DEPTH:
        report.stop(_line(event), "deeper nesting", f"at most {MAX_DEPTH} levels")
    if stack[-1].size > MAX_NODES:
        report.stop(_line(event), "more values", f"at most {MAX_NODES} values, aliases written out")


def _tree(report: _Report, event: yaml.NodeEvent) -> _Tree:
    if isinstance(event, (yaml.ScalarEvent, yaml.CollectionStartEvent)) and event.tag:
        report.stop(_line(event), f"tag {event.tag}", "no tags; text that looks like something else in quotes")
    if isinstance(event, yaml.ScalarEvent):
        return _Tree(_line(event), "a value", event.value, event.implicit[0], _CHILDLESS)
    return _Tree(_line(event), "a mapping" if isinstance(event, yaml.MappingStartEvent) else "a list")


def _line(event: yaml.Event) -> int:
    return event.start_mark.line + 1 if event.start_mark else 1


def _is_null(tree: _Tree) -> bool:
    return tree.plain and tree.value in {"", "~", "null", "Null", "NULL"}


def _fields(report: _Report, place: _Place, keys: Mapping[str, bool]) -> dict[str, _Place]:
    """Take a mapping apart by key; a null value counts as not written."""
    tree, path = place
    accepted = "the keys " + ", ".join(keys)
    if tree.kind != "a mapping":
        report.add(place, f"a mapping with {accepted}")
        return {}
    seen: dict[str, _Place] = {}
    for key, value in zip(tree.children[::2], tree.children[1::2], strict=True):
        name = key.value
        if key.kind != "a value" or name not in keys:
            report.add(_Place(key, path), accepted, f"key {key.shown()}")
        elif name in seen:
            report.add(_Place(key, path), "each key once", f"key {name} again")
        else:
            seen[name] = _Place(value, f"{path}.{name}" if path else name)
    found = {name: item for name, item in seen.items() if not _is_null(item.tree)}
    for name, required in keys.items():
        if required and name not in found:
            report.add(place, f"a mapping with the key {name}", f"no {name}")
    return found


def _items(report: _Report, place: _Place | None, least: int = 0) -> list[_Place]:
    if place is None:
        return []
    tree, path = place
    if tree.kind != "a list" or len(tree.children) < least:
        report.add(place, f"a list of {least} or more", "an empty list" if tree.kind == "a list" else None)
        return []
    return [_Place(child, f"{path}[{index}]") for index, child in enumerate(tree.children)]


def _text(report: _Report, place: _Place | None, form: _Form) -> str | None:
    if place is None:
        return None
    tree = place.tree
    if tree.kind != "a value" or (tree.plain and _resolve(yaml.ScalarNode, tree.value, (True, False)) != _STR):
        report.add(place, f"{form.accepted}, as text (in quotes if it looks like a number, date or truth value)")
        return None
    if not form.regex.fullmatch(tree.value):
        report.add(place, form.accepted)
        return None
    return tree.value


def _choice(report: _Report, place: _Place | None, choices: Mapping[str, T], default: T) -> T:
    if place is None:
        return default
    tree = place.tree
    if tree.kind != "a value" or tree.value not in choices or (choices is _FLAGS and not tree.plain):
        report.add(place, " or ".join(choices) + (", without quotes" if choices is _FLAGS else ""))
        return default
    return choices[tree.value]


def _port(report: _Report, place: _Place | None, default: int = 0) -> int:
    if place is None:
        return default
    tree = place.tree
    if not (tree.plain and _INTEGER.fullmatch(tree.value) and int(tree.value) <= MAX_PORT):
        report.add(place, f"1 to {MAX_PORT}, a decimal number without quotes")
        return default
    return int(tree.value)


def _address(report: _Report, place: _Place | None) -> bytes | None:
    if place is None:
        return None
    text = place.tree.value
    try:
        address = pack_address(text)
    except ValueError:
        report.add(place, "an IPv4 or IPv6 address")
        return None
    if ":" in text and is_ipv4(address):
        report.add(place, "an IPv4 address in its own form, like 10.0.0.1")
    elif not any(address[12:] if is_ipv4(address) else address):
        report.add(place, "an address that is not the unspecified one")
    elif _is_group(address):
        report.add(place, "an address that is not multicast or broadcast")
    else:
        return address
    return None


def _is_group(address: bytes) -> bool:
    """Whether it is an IPv6 (RFC 4291, 2.7) or IPv4 (RFC 5771) multicast address, or the IPv4 broadcast address."""
    if is_ipv4(address):
        return address[12] & 0xF0 == 0xE0 or address[12:] == b"\xff" * 4  # noqa: PLR2004
    return address[0] == 0xFF  # noqa: PLR2004


def _nodes(report: _Report, place: _Place | None) -> tuple[Node, ...]:
    nodes: dict[str, Node] = {}
    for item in _items(report, place):
        fields = _fields(report, item, _NODE)
        name, zone, region = (_text(report, fields.get(key), _NAME) for key in _NODE)
        if name in nodes:
            report.add(fields["name"], "each node once")
        elif name:
            nodes[name] = Node(name, zone, region)
    return tuple(nodes.values())


def _service(report: _Report, place: _Place, zones: Mapping[str, str | None]) -> _Service:
    fields = _fields(report, place, _SERVICE)
    namespace, _, name = (_text(report, fields.get("name"), _SERVICE_NAME) or "").partition("/")
    policy = _choice(report, fields.get("externalTrafficPolicy"), _POLICIES, Policy.CLUSTER)
    vips = [(item, _address(report, item)) for item in _items(report, fields.get("vips"), 1)]
    ports = [port for item in _items(report, fields.get("ports"), 1) if (port := _service_port(report, item))]
    backends = [
        (item, backend)
        for item in _items(report, fields.get("backends"))
        if (backend := _backend(report, item, namespace, zones))
    ]
    report.entries += len(vips) * len(ports) * max(1, len(backends))
    if report.entries > MAX_ENTRIES:
        report.stop(place.tree.line, "more entries", f"at most {MAX_ENTRIES} VIPs x ports x backends")
    _check_backends(report, ports, backends)
    good_vips = [(item, address) for item, address in vips if address]
    return _Service(place, namespace, name, policy, good_vips, ports, backends)


def _service_port(report: _Report, place: _Place) -> _Port | None:
    known = len(report.problems)
    fields = _fields(report, place, _PORT)
    port = _port(report, fields.get("port"))
    transport = _choice(report, fields.get("protocol"), _TRANSPORTS, Transport.TCP)
    target = _port(report, fields.get("targetPort"), port)
    # Half of a port or backend would only make up duplicates that are not in the file.
    return None if len(report.problems) > known else _Port(place, port, transport, target)


def _backend(report: _Report, place: _Place, namespace: str, zones: Mapping[str, str | None]) -> Backend | None:
    known = len(report.problems)
    fields = _fields(report, place, _BACKEND)
    address = _address(report, fields.get("address"))
    port = _port(report, fields.get("port"))
    node = _text(report, fields.get("node"), _NAME)
    zone = _text(report, fields.get("zone"), _NAME) or zones.get(node or "")
    pod = _text(report, fields.get("pod"), _POD_NAME)
    ready = _choice(report, fields.get("ready"), _FLAGS, default=True)
    if address is None or len(report.problems) > known:
        return None
    if pod is None:
        return Backend(address, port, node, zone, ready=ready)
    pod_namespace, _, pod_name = pod.rpartition("/")
    return Backend(address, port, node, zone, pod_namespace or namespace, pod_name, ready)


def _check_backends(report: _Report, ports: list[_Port], backends: list[tuple[_Place, Backend]]) -> None:
    targets = {port.target for port in ports}
    seen: dict[tuple[bytes, int], _Place] = {}
    for place, backend in backends:
        keys = [(backend.address, port) for port in ({backend.port} if backend.port else targets)]
        first = next((seen[key] for key in keys if key in seen), None)
        if first:
            accepted = f"each address and port once in a service, first {first.path} on line {first.tree.line}"
            report.add(place, accepted, f"{format_address(backend.address)} again")
        seen |= dict.fromkeys(keys, place)


def _vip_ports(report: _Report, services: list[_Service]) -> tuple[VipPort, ...]:
    claims: dict[tuple[bytes, int, Transport], str] = {}
    made: list[VipPort] = []
    for service in services:
        shared: dict[tuple[bool, int], tuple[Backend, ...]] = {}
        for (place, address), port in product(service.vips, service.ports):
            where = f"{place.path} with {port.place.path} on line {port.place.tree.line}"
            first = claims.setdefault((address, port.port, port.transport), where)
            if first is not where:
                read = f"{format_address(address)} {port.transport.name} {port.port} of {port.place.path}"
                report.add(place, f"each VIP, protocol and port once, first {first}", read)
                continue
            key = is_ipv4(address), port.target
            if key not in shared:
                shared[key] = _targets(service, *key)
            made.append(
                VipPort(
                    address, port.port, port.transport, service.namespace, service.name, service.policy, shared[key]
                )
            )
    return tuple(made)


def _targets(service: _Service, ipv4: bool, port: int) -> tuple[Backend, ...]:  # noqa: FBT001
    return tuple(
        backend if backend.port else replace(backend, port=port)
        for _, backend in service.backends
        if is_ipv4(backend.address) == ipv4
    )
