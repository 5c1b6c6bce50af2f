"""What serves the demo's VIPs: an API server and kube-proxies where they can be built, else the lab's own rules."""

from __future__ import annotations

import contextlib
import sys
from typing import TYPE_CHECKING, NamedTuple

from tests.cluster.control_plane import ControlPlane
from tests.cluster.kube_proxy import Mode
from tests.demo import scenario
from tests.lab.requirements import PROGRAMS, lacking
from tests.peers import build

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.lab import Lab

PEER = "kubernetes"


class Known(NamedTuple):
    """How agents get to know the VIPs: in words, by a file, by settings."""

    source: str
    vips: Path | None
    settings: dict[str, str]


def make_peers() -> str | None:
    """Build kube-apiserver and kube-proxy unless they are there; answers in one line why a cluster cannot be had."""
    if reason := lacking((*PROGRAMS, "etcd", "openssl")):
        return reason
    go = build.find_go(PEER)
    if isinstance(go, str):
        return go
    if not build.cached(PEER, go).exists():
        print("kube-apiserver and kube-proxy are built from source, once: next time they are there", file=sys.stderr)
    try:
        build.build(PEER)
    except build.PeerError as error:
        return f"they could not be built: {str(error).splitlines()[-1]}"
    return None


def serve_by_lab(lab: Lab) -> Known:
    """Let the lab's own rules translate, as kube-proxy's would."""
    lab.apply(list(scenario.vip_ports(lab)))
    return Known("a file", lab.vips_path, {})


@contextlib.contextmanager
def serve_by_cluster(lab: Lab) -> Iterator[Known]:
    """Run an API server with the Services, and kube-proxy on every node; agents have the rights of deploy/rbac.yaml."""
    with ControlPlane(lab) as plane:
        plane.apply(*scenario.cluster_objects(lab))
        lab.announce({vip: lab.nodes for service in scenario.SERVICES for vip in service.vips})
        with plane.kube_proxies(lab.nodes, Mode.NFTABLES):
            yield Known("the API server", None, plane.agent_settings())
