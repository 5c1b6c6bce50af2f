"""The laboratory as a whole: what it is made of, and its Services."""

from __future__ import annotations

import json
import os
import re
import secrets
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Self

from otel_lb_hop.model import Backend, Policy, Transport, VipPort, format_address, is_ipv4, pack_address
from otel_lb_hop.model import Node as ModelNode
from tests.lab import layout, reaper
from tests.lab.host import POD_NAMESPACE, Connection, Host, Node, Pod
from tests.lab.netns import write_sysctls
from tests.lab.rules import ruleset
from tests.lab.vips import vips_file

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping, Sequence
    from types import TracebackType

# Marks the router's VIP routes, so that those of an earlier `apply` can be told from the others.
VIP_ROUTES = "proto 77"


class LabError(Exception):
    """The laboratory could not be built, changed or removed; says which command failed and how."""


class Lab:
    """A laboratory, built on entry and removed on exit; `name` (letters and digits) makes its namespaces unique.

    Every node has a zone of its own, or those that `zones` gives them in their order.
    """

    def __init__(
        self, nodes: int = 2, pods_per_node: int = 1, name: str | None = None, *, zones: Sequence[str] = ()
    ) -> None:
        self.name = name or secrets.token_hex(4)
        if not re.fullmatch(r"[a-z0-9]{1,20}", self.name):
            raise LabError(f"the name of a lab is 1 to 20 lower-case letters and digits, not {name!r}")
        if not (1 <= nodes <= layout.MAX_NODES and 0 <= pods_per_node <= layout.MAX_PODS):
            raise LabError(f"a lab has 1-{layout.MAX_NODES} nodes with 0-{layout.MAX_PODS} pods each")
        self.plan = layout.Plan(self.name, nodes, pods_per_node)
        self.directory = reaper.work_directory(self.name)
        self.client = self._host("client", layout.CLIENT_ADDRESSES)
        self.router = self._host("router", layout.ROUTER_ADDRESSES)
        self.mgmt = self._host("mgmt", layout.mgmt_addresses(0))
        zones = zones or [layout.zone_name(number) for number in self.plan.node_numbers]
        self.nodes = [self._node(number, zone) for number, zone in zip(self.plan.node_numbers, zones, strict=True)]
        self.pods = [pod for node in self.nodes for pod in node.pods]
        self._janitor: subprocess.Popen[bytes] | None = None

    @classmethod
    def attach(cls, name: str) -> Self:
        """Return a lab that is up already, to use it; its owner stays its owner."""
        try:
            state = json.loads(reaper.state_file(name).read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise LabError(f"there is no lab {name!r}") from error
        return cls(state["nodes"], state["pods_per_node"], name)

    def __enter__(self) -> Self:
        self.up()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.down()

    def up(self, *, outlive: bool = False) -> None:
        """Build it, after removing what dead owners have left; with `outlive` it stays when this process ends."""
        reaper.STATE_DIRECTORY.mkdir(parents=True, exist_ok=True)
        reaper.remove_stale_labs()
        self._claim(None if outlive else os.getpid())
        try:
            if not outlive:
                self._janitor = _start_janitor(self.name)
            self._build()
        except BaseException:
            self.down()
            raise

    def down(self) -> None:
        """Remove it with every process inside; raises LabError when something is left."""
        left = reaper.remove_lab(self.name)
        if self._janitor is not None:
            self._janitor.communicate(reaper.DISMISSED)
            self._janitor = None
        if left:
            raise LabError(f"lab {self.name} has left behind: {', '.join(left)}")

    def vip_port(
        self,
        vip: str,
        port: int,
        *,
        service: str = "web",
        namespace: str = POD_NAMESPACE,
        policy: Policy = Policy.CLUSTER,
        transport: Transport = Transport.TCP,
        backends: Iterable[Pod | Backend] = (),
        target_port: int | None = None,
    ) -> VipPort:
        """Describe one port of a Service; a pod as backend is reached at `target_port` (default: `port`)."""
        values = tuple(b.backend(vip, target_port or port) if isinstance(b, Pod) else b for b in backends)
        return VipPort(pack_address(vip), port, transport, namespace, service, policy, values)

    def apply(self, vip_ports: Sequence[VipPort], *, announce: Mapping[str, Collection[Node]] | None = None) -> None:
        """Make these the Services of the lab, replacing all earlier ones.

        Every node announces every VIP to the router unless `announce` names the nodes of that VIP.
        """
        announced = {pack_address(vip): nodes for vip, nodes in (announce or {}).items()}
        routes = {v.address: announced.get(v.address, self.nodes) for v in vip_ports}
        with ThreadPoolExecutor(len(self.nodes)) as pool:
            list(pool.map(lambda node: node.run(["nft", "-f", "-"], text=ruleset(node.name, vip_ports)), self.nodes))
        self.announce({format_address(vip): nodes for vip, nodes in routes.items()})
        self.vips_path.write_text(self.vips_file(vip_ports), encoding="utf-8")

    def announce(self, vips: Mapping[str, Collection[Node]]) -> None:
        """Let these nodes, and no others, announce these VIPs to the router, replacing all earlier announcements."""
        packed = {pack_address(vip): nodes for vip, nodes in vips.items()}
        for family in (4, 6):
            self._announce(family, {vip: nodes for vip, nodes in packed.items() if is_ipv4(vip) == (family == 4)})

    @property
    def vips_path(self) -> Path:
        """File that holds `vips_file` of what was applied last."""
        return self.directory / "vips.yaml"

    def vips_file(self, vip_ports: Iterable[VipPort]) -> str:
        """YAML text for the agent's OTEL_LB_HOP_VIPS_FILE: the lab's nodes and these Services."""
        return vips_file([ModelNode(node.name, node.zone, layout.REGION) for node in self.nodes], vip_ports)

    def connect(
        self,
        vip: str,
        port: int,
        count: int = 1,
        *,
        concurrency: int = 8,
        reset: bool = True,
        timeout: float = 3.0,
    ) -> list[Connection]:
        """Make TCP connections from the client, as `Host.connect`."""
        return self.client.connect(vip, port, count, concurrency=concurrency, reset=reset, timeout=timeout)

    def _announce(self, family: int, announced: Mapping[bytes, Collection[Node]]) -> None:
        """Give the router these VIP routes of one family, spread over the nodes; never without a route that stays."""
        ip = ["ip", f"-{family}"]
        wanted = {format_address(vip): nodes for vip, nodes in announced.items() if nodes}
        present = json.loads(self.router.run([*ip, "-json", "route", "show", *VIP_ROUTES.split()]).stdout or "[]")
        lines = [f"route del {vip} {VIP_ROUTES}" for vip in {route["dst"] for route in present} - wanted.keys()]
        for vip, nodes in wanted.items():
            hops = " ".join(f"nexthop via {node.uplink4 if family == 4 else node.uplink6}" for node in nodes)
            lines.append(f"route replace {vip} {VIP_ROUTES} {hops}")
        self.router.run([*ip, "-batch", "-"], text="\n".join(lines) + "\n")

    def _host(self, name: str, addresses: tuple[str, str]) -> Host:
        return Host(name, self.plan.netns(name), *addresses, self.directory)

    def _node(self, number: int, zone: str) -> Node:
        name, pods = f"node{number}", []
        for pod in self.plan.pod_numbers:
            pod_name = layout.pod_name(number, pod)
            addresses = layout.pod_addresses(number, pod)
            pods.append(Pod(pod_name, self.plan.netns(pod_name), *addresses, self.directory, name, zone))
        fabric, uplink, mgmt = (
            layout.fabric_addresses(number),
            layout.uplink_addresses(number),
            layout.mgmt_addresses(number),
        )
        own = frozenset({*fabric, *uplink, *mgmt, *layout.pod_addresses(number, 0)})
        return Node(name, self.plan.netns(name), *fabric, self.directory, zone, tuple(pods), *uplink, *mgmt, own)

    def _claim(self, owner: int | None) -> None:
        """Write the state file before anything else exists, and all at once: others may look at any time."""
        state = {
            "owner_pid": owner,
            "owner_start": None if owner is None else reaper.start_time(owner),
            "nodes": self.plan.nodes,
            "pods_per_node": self.plan.pods_per_node,
        }
        draft = reaper.STATE_DIRECTORY / f".{self.name}.{os.getpid()}"
        draft.write_text(json.dumps(state), encoding="utf-8")
        try:
            reaper.state_file(self.name).hardlink_to(draft)
        except FileExistsError as error:
            raise LabError(f"a lab {self.name!r} is up already") from error
        finally:
            draft.unlink()

    def _build(self) -> None:
        plan = self.plan
        self.directory.mkdir()
        _ip([], [f"netns add {plan.netns(host)}" for host in plan.hosts])
        for host in plan.hosts:
            write_sysctls(plan.netns(host), layout.sysctls(host))
            write_sysctls(plan.netns(host), layout.SYSCTLS_OF_SOME_KERNELS, skip_missing=True)
        _ip([], layout.link_commands(plan))
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            commands = layout.host_commands(plan)
            list(pool.map(lambda host: _ip(["-n", plan.netns(host)], commands[host]), commands))


def _ip(options: list[str], lines: list[str]) -> None:
    text = "\n".join(lines) + "\n"
    done = subprocess.run(["ip", *options, "-batch", "-"], input=text, text=True, capture_output=True, check=False)
    if done.returncode:
        raise LabError(f"ip {' '.join(options)}: {done.stderr.strip()}")


def _start_janitor(name: str) -> subprocess.Popen[bytes]:
    argv = [sys.executable, "-I", "-S", str(Path(reaper.__file__)), name, str(os.getpid())]
    return subprocess.Popen(
        argv, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
