"""Objects of the Kubernetes API, as they come in JSON, made into the values of `model`. Pure; nothing here raises.

Only the needed fields are read, with the API's own defaults where they are absent. An object of the wrong shape gives
no value, a part that can be left out is left out, and both are told in words. What a field means for traffic is what
kube-proxy takes it for (kubernetes v1.36, pkg/proxy).
"""

from __future__ import annotations

import sys
from enum import Enum
from typing import TYPE_CHECKING, Any, NamedTuple

from otel_lb_hop.model import (
    Backend,
    EndpointSlice,
    Node,
    Policy,
    Service,
    ServicePort,
    SlicePort,
    Transport,
    pack_address,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

Key = tuple[str, str]
"""(namespace, name); the namespace of a node is empty."""

_TRANSPORTS = {transport.name: transport for transport in Transport}
_ZONE_LABELS = ("topology.kubernetes.io/zone", "failure-domain.beta.kubernetes.io/zone")
_REGION_LABELS = ("topology.kubernetes.io/region", "failure-domain.beta.kubernetes.io/region")
_NODE_ADDRESSES = {"InternalIP", "ExternalIP"}
_MAX_PORT = 65535
_SHOWN = 80


class Kind(Enum):
    """What is read of the cluster; the value is its path in the API."""

    SERVICES = "/api/v1/services"
    ENDPOINT_SLICES = "/apis/discovery.k8s.io/v1/endpointslices"
    NODES = "/api/v1/nodes"

    @property
    def resource(self) -> str:
        """Its name as people and RBAC rules write it."""
        return str(self.value).rpartition("/")[2]


class Change(NamedTuple):
    """One object as it is from now on; None is for one that is gone or not needed any more."""

    kind: Kind
    key: Key
    value: Service | EndpointSlice | Node | None


class Read(NamedTuple):
    """What became of one object: no key if it has no name, no value if nothing of it is needed or can be read."""

    key: Key | None
    value: Service | EndpointSlice | Node | None = None
    problems: tuple[str, ...] = ()


class _Endpoint(NamedTuple):
    """What is the same for an endpoint at every port of its slice."""

    address: bytes
    node: str | None
    zone: str | None
    pod_namespace: str | None
    pod: str | None
    ready: bool
    serving: bool


class _ShapeError(Exception):
    """A field is not of the type that the API gives it."""

    def __init__(self, field: str, read: object) -> None:
        super().__init__(f"{field}: read {_shown(read)}")


def read(kind: Kind, raw: object) -> Read:
    """Make the value of one object."""
    key: Key | None = None
    value: Service | EndpointSlice | Node | None = None
    problems: list[str] = []
    try:
        checked = _checked(raw, kind.resource)
        metadata = _mapping(checked, "metadata")
        key = _key(metadata)
        value = _READERS[kind](key, metadata, checked, problems)
    except _ShapeError as error:
        problems.append(str(error))
    return Read(key, value, tuple(problems))


def _key(metadata: dict[str, Any]) -> Key:
    name = _text(metadata, "name")
    if not name:
        raise _ShapeError("metadata.name", name)
    return _word(metadata, "namespace") or "", name


def _service(key: Key, _: dict[str, Any], raw: dict[str, Any], problems: list[str]) -> Service | None:
    spec = _mapping(raw, "spec")
    kind = _text(spec, "type")
    external = _list(spec, "externalIPs")
    if kind == "ExternalName" or not (external or kind == "LoadBalancer"):
        return None
    # kube-proxy leaves headless Services alone altogether (util/utils.go, ShouldSkipService).
    reason = "the Service is headless" if _text(spec, "clusterIP") == "None" else None
    vips: dict[bytes, None] = {}
    external_ips: dict[bytes, None] = {}
    skipped: dict[tuple[str, str], None] = {}
    if kind == "LoadBalancer":
        for ingress in _list(_mapping(_mapping(raw, "status"), "loadBalancer"), "ingress"):
            _add_ingress(_checked(ingress, "status.loadBalancer.ingress"), reason, vips, skipped)
    for text in external:
        _add_address(text, reason, external_ips, skipped)
    if not (vips or external_ips or skipped):
        return None
    return Service(
        *key,
        Policy.LOCAL if _text(spec, "externalTrafficPolicy") == "Local" else Policy.CLUSTER,
        tuple(vips),
        tuple(_service_ports(_list(spec, "ports"), problems)),
        tuple(address for address in external_ips if address not in vips),
        tuple(skipped),
    )


def _add_ingress(
    ingress: dict[str, Any], reason: str | None, vips: dict[bytes, None], skipped: dict[tuple[str, str], None]
) -> None:
    address, mode, hostname = ingress.get("ip"), ingress.get("ipMode"), ingress.get("hostname")
    if not address:
        if hostname:
            skipped[_shown(hostname), "a host name, not an address"] = None
        return
    if mode is not None and mode != "VIP":  # util/utils.go, IsVIPMode; KEP-1860
        reason = f"ipMode {_shown(mode)}: packets reach the nodes with another destination"
    _add_address(address, reason, vips, skipped)


def _add_address(
    text: object, reason: str | None, addresses: dict[bytes, None], skipped: dict[tuple[str, str], None]
) -> None:
    address = _address(text)
    if address is None:
        skipped[_shown(text), "not an IPv4 or IPv6 address"] = None
    elif reason is not None:
        skipped[_shown(text), reason] = None
    else:
        addresses[address] = None


def _service_ports(ports: list[Any], problems: list[str]) -> Iterator[ServicePort]:
    for raw in ports:
        try:
            port = _checked(raw, "port")
            number, transport = _number(port), _transport(port)
            if number and transport:
                yield ServicePort(_text(port, "name") or "", number, transport)
        except _ShapeError as error:
            problems.append(f"spec.ports: {error}")


def _slice(key: Key, metadata: dict[str, Any], raw: dict[str, Any], problems: list[str]) -> EndpointSlice | None:
    service = _text(_mapping(metadata, "labels"), "kubernetes.io/service-name")
    if not service or _text(raw, "addressType") not in {"IPv4", "IPv6"}:
        return None
    endpoints: list[_Endpoint] = []
    for endpoint in _list(raw, "endpoints"):
        try:
            endpoints.append(_endpoint(key[0], _checked(endpoint, "endpoint")))
        except _ShapeError as error:
            problems.append(f"endpoints: {error}")
    return EndpointSlice(*key, service, tuple(_slice_ports(_list(raw, "ports"), endpoints, problems)))


def _slice_ports(ports: list[Any], endpoints: list[_Endpoint], problems: list[str]) -> Iterator[SlicePort]:
    for raw in ports:
        try:
            port = _checked(raw, "port")
            number, transport = _number(port), _transport(port)
            # A port without a number stands for all ports; kube-proxy passes it over (endpointslicecache.go).
            if number and transport:
                backends = tuple([Backend(endpoint[0], number, *endpoint[1:]) for endpoint in endpoints])
                yield SlicePort(_text(port, "name") or "", transport, backends)
        except _ShapeError as error:
            problems.append(f"ports: {error}")


def _endpoint(namespace: str, raw: dict[str, Any]) -> _Endpoint:
    """Read an endpoint as endpointslicecache.go (addEndpoints) does: its first address, absent conditions as good."""
    addresses = _list(raw, "addresses")
    if not addresses:
        raise _ShapeError("addresses", addresses)
    address = _known_address(addresses[0])
    conditions = _mapping(raw, "conditions")
    ready = conditions.get("ready") is not False
    serving = not ready and conditions.get("serving") is not False and conditions.get("terminating") is True
    target = _mapping(raw, "targetRef")
    pod = pod_namespace = None
    if target.get("kind") == "Pod":
        pod = _text(target, "name")
        pod_namespace = _word(target, "namespace") or namespace
    return _Endpoint(address, _word(raw, "nodeName"), _word(raw, "zone"), pod_namespace, pod, ready, serving)


def _node(key: Key, metadata: dict[str, Any], raw: dict[str, Any], problems: list[str]) -> Node:
    labels = _mapping(metadata, "labels")
    addresses: dict[bytes, None] = {}
    for entry in _list(_mapping(raw, "status"), "addresses"):
        try:
            if _text(_checked(entry, "entry"), "type") in _NODE_ADDRESSES:
                addresses[_known_address(entry.get("address"))] = None
        except _ShapeError as error:
            problems.append(f"status.addresses: {error}")
    return Node(
        key[1], _first(labels, _ZONE_LABELS), _first(labels, _REGION_LABELS), _text(metadata, "uid"), tuple(addresses)
    )


def _first(labels: dict[str, Any], names: tuple[str, ...]) -> str | None:
    return next((word for name in names if (word := _word(labels, name))), None)


def _number(port: dict[str, Any]) -> int | None:
    number = port.get("port")
    if number is None or number == 0:
        return None
    if type(number) is not int or not 0 < number <= _MAX_PORT:
        raise _ShapeError("port", number)
    return number


def _transport(port: dict[str, Any]) -> Transport | None:
    return _TRANSPORTS.get(_text(port, "protocol") or "TCP")


def _address(text: object) -> bytes | None:
    try:
        return pack_address(text) if isinstance(text, str) else None
    except ValueError:
        return None


def _known_address(text: object) -> bytes:
    address = _address(text)
    if address is None:
        raise _ShapeError("address", text)
    return address


def _checked(raw: object, field: str) -> dict[str, Any]:
    if isinstance(raw, dict):
        return raw
    raise _ShapeError(field, raw)


def _mapping(parent: dict[str, Any], field: str) -> dict[str, Any]:
    value = parent.get(field)
    if isinstance(value, dict):
        return value
    if value is None:
        return {}
    raise _ShapeError(field, value)


def _list(parent: dict[str, Any], field: str) -> list[Any]:
    value = parent.get(field)
    if isinstance(value, list):
        return value
    if value is None:
        return []
    raise _ShapeError(field, value)


def _text(parent: dict[str, Any], field: str) -> str | None:
    """Read a name; all names of the API are ASCII, and what else JSON can hold might not even be written as UTF-8."""
    value = parent.get(field)
    if value is None or (isinstance(value, str) and value.isascii()):
        return value
    raise _ShapeError(field, value)


def _word(parent: dict[str, Any], field: str) -> str | None:
    """Read a name that many objects share, so that it is held once."""
    value = _text(parent, field)
    return sys.intern(value) if value else None


def _shown(value: object) -> str:
    if isinstance(value, (dict, list)):  # may be as large as an answer
        return "an object" if isinstance(value, dict) else "a list"
    text = value if isinstance(value, str) else repr(value)
    return ascii(text[:_SHOWN])[1:-1]


_READERS = {Kind.SERVICES: _service, Kind.ENDPOINT_SLICES: _slice, Kind.NODES: _node}
