"""The values that travel between the rooms. Frozen, comparable, free of I/O.

An address is 16 bytes in network order, an IPv4 address mapped into IPv6 (RFC 4291, 2.5.5.2), so that one
path serves both families. A port is an int in host order.
"""

from __future__ import annotations

import socket
from dataclasses import dataclass
from enum import IntEnum, StrEnum
from typing import NamedTuple

MAPPED_PREFIX = bytes(10) + b"\xff\xff"


class Transport(IntEnum):
    """Transport protocols of a Service port, by their IANA protocol number."""

    TCP = 6
    UDP = 17
    SCTP = 132


class Policy(StrEnum):
    """`spec.externalTrafficPolicy` of a Service."""

    CLUSTER = "Cluster"
    LOCAL = "Local"


class Hop(StrEnum):
    """Whether the connection left this node for its backend, and whether it had to."""

    NONE = "none"
    AVOIDABLE = "avoidable"
    REQUIRED = "required"
    UNKNOWN = "unknown"


class Origin(StrEnum):
    """Where a connection began: outside (it came in by an uplink) or inside the cluster."""

    EXTERNAL = "external"
    INTERNAL = "internal"


class Outcome(StrEnum):
    """What became of a connection on its intermediate node."""

    FORWARDED = "forwarded"
    NO_ENDPOINTS = "no_endpoints"
    NO_LOCAL_ENDPOINTS = "no_local_endpoints"
    DROPPED = "dropped"


class Failure(StrEnum):
    """`error.type` of a forwarded connection whose handshake failed."""

    REFUSED = "refused"
    TIMEOUT = "timeout"


@dataclass(frozen=True, slots=True)
class Backend:
    """One endpoint of a VIP port: the pod address and port that traffic is translated to.

    `node` is None for an endpoint that names no node; `zone` is its node's zone, None when not known. `serving`
    marks one that is terminating but still serving: kube-proxy falls back to those when none is ready.
    """

    address: bytes
    port: int
    node: str | None = None
    zone: str | None = None
    pod_namespace: str | None = None
    pod: str | None = None
    ready: bool = True
    serving: bool = False


@dataclass(frozen=True, slots=True)
class VipPort:
    """One Service port as a client sees it: (VIP, transport, port), the Service behind it, its backends.

    While the endpoints are not known, which is something else than that there are none, `endpoints_known` is False.
    """

    address: bytes
    port: int
    transport: Transport
    namespace: str
    service: str
    policy: Policy = Policy.CLUSTER
    backends: tuple[Backend, ...] = ()
    endpoints_known: bool = True


@dataclass(frozen=True, slots=True)
class Node:
    """A node of the cluster, the zone and region it says it is in, and its addresses (status.addresses)."""

    name: str
    zone: str | None = None
    region: str | None = None
    uid: str | None = None
    addresses: tuple[bytes, ...] = ()


@dataclass(frozen=True, slots=True)
class ServicePort:
    """One of `spec.ports` of a Service; the name is empty for the only port of a Service that names none."""

    name: str
    port: int
    transport: Transport


@dataclass(frozen=True, slots=True)
class Service:
    """What is needed of a Service that clients outside may reach.

    `vips` are the addresses that its load balancer gave it; `skipped` are (what was read, why it is none) for the
    others, such as a load balancer that is known by its host name only.
    """

    namespace: str
    name: str
    policy: Policy
    vips: tuple[bytes, ...]
    ports: tuple[ServicePort, ...]
    external_ips: tuple[bytes, ...] = ()
    skipped: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class SlicePort:
    """One of `ports` of an EndpointSlice, and every endpoint of the slice at that port."""

    name: str
    transport: Transport
    backends: tuple[Backend, ...]


@dataclass(frozen=True, slots=True)
class EndpointSlice:
    """What is needed of an EndpointSlice; `service` is the name of the Service it belongs to."""

    namespace: str
    name: str
    service: str
    ports: tuple[SlicePort, ...]


class Skipped(NamedTuple):
    """Something that looks like a VIP port but is not watched: what of which Service, and why."""

    namespace: str
    service: str
    what: str
    reason: str

    def __str__(self) -> str:
        return f"{self.namespace}/{self.service} {self.what}: {self.reason}"


@dataclass(frozen=True, slots=True)
class Cluster:
    """The whole content of a VIP file: every VIP port and every node it names."""

    vip_ports: tuple[VipPort, ...] = ()
    nodes: tuple[Node, ...] = ()


def pack_address(text: str) -> bytes:
    """Make the 16 bytes of an address from its text form; raises ValueError for anything else."""
    try:
        if ":" in text:
            return socket.inet_pton(socket.AF_INET6, text)
        return MAPPED_PREFIX + socket.inet_pton(socket.AF_INET, text)
    except OSError as error:
        raise ValueError(f"not an IPv4 or IPv6 address: {text!r}") from error


def is_ipv4(address: bytes) -> bool:
    """Whether these 16 bytes hold a mapped IPv4 address."""
    return address[:12] == MAPPED_PREFIX


def format_address(address: bytes) -> str:
    """Write 16 bytes as people do; `inet_ntop` because it costs a tenth of `ipaddress`."""
    if address[:12] == MAPPED_PREFIX:
        return socket.inet_ntop(socket.AF_INET, address[12:])
    return socket.inet_ntop(socket.AF_INET6, address)
