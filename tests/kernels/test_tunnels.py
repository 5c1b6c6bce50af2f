"""Devices without an Ethernet header, as uplink and as the way to the pods: ipip and wireguard."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import pytest

from tests.lab.requirements import needs_lab

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.kernels.scene import Scene
    from tests.lab import Host

pytestmark = [pytest.mark.root, pytest.mark.kernels, needs_lab]

KINDS = pytest.mark.parametrize("kind", ["ipip", "wireguard"])
PORT = "51820"


@contextlib.contextmanager
def tunnel(kind: str, ends: tuple[Host, Host], outer: tuple[str, str], inner: tuple[str, str]) -> Iterator[None]:
    """Join two hosts by a tunnel named tun0 between their outer addresses, for the length of a block."""
    add = ["ip", "link", "add", "tun0", "type", kind]
    try:
        if kind == "ipip":
            for number, host in enumerate(ends):
                host.run([*add, "local", outer[number], "remote", outer[1 - number]])
        else:
            keys = [host.run(["wg", "genkey"]).stdout for host in ends]
            public = [ends[0].run(["wg", "pubkey"], text=key).stdout.strip() for key in keys]
            for number, host in enumerate(ends):
                host.run(add)
                peer = ["peer", public[1 - number], "endpoint", f"{outer[1 - number]}:{PORT}"]
                own = ["listen-port", PORT, "private-key", "/dev/stdin"]
                host.run(["wg", "set", "tun0", *own, *peer, "allowed-ips", "0.0.0.0/0"], text=keys[number])
        for host, address in zip(ends, inner, strict=True):
            host.run(["ip", "addr", "add", f"{address}/30", "dev", "tun0"])
            host.run(["ip", "link", "set", "tun0", "up"])
        yield
    finally:
        for host in ends:
            host.run(["ip", "link", "del", "tun0"], check=False)


@KINDS
def test_uplink(scene: Scene, kind: str) -> None:
    """23 connections that come in by a tunnel, and are answered by it, are 23 from outside."""
    router, node = scene.lab.router, scene.node
    with tunnel(kind, (router, node), ("172.19.1.1", "172.19.1.2"), ("10.77.2.1", "10.77.2.2")):
        node.run(["ip", "route", "replace", "default", "via", "10.77.2.1"])
        scene.route(kind, "10.77.2.2")
        scene.hooked("tun0", uplink=True)
        try:
            scene.deliver(kind, "tun0")
        finally:
            node.run(["ip", "route", "replace", "default", "via", "172.19.1.1"])


@KINDS
def test_pod_network(scene: Scene, kind: str) -> None:
    """23 connections to a pod behind a tunnel: the translated packet is seen as it enters the tunnel."""
    node, other = scene.lab.nodes
    with tunnel(kind, (node, other), (node.address4, other.address4), ("10.77.3.1", "10.77.3.2")):
        node.run(["ip", "route", "replace", "10.100.2.0/24", "via", "10.77.3.2"])
        scene.route(f"{kind}-pods", node.uplink4)
        scene.hooked("tun0")
        try:
            records = scene.deliver(f"{kind}-pods", "net0")
        finally:
            node.run(["ip", "route", "replace", "10.100.2.0/24", "via", other.address4])
    assert {(each.attributes["lb_hop.hop"], each.attributes["source.address"]) for each in records} == {
        ("required", "10.77.3.1")
    }
