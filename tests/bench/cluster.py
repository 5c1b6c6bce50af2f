"""What a large cluster costs: 5,000 Services of 5 endpoints each in a real API server, real agents that follow it.

Nothing serves the VIPs, and most nodes exist by name alone: what is measured is what agents read and keep.
"""

from __future__ import annotations

import ctypes
import json
import os
import statistics
import struct
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING, Self

import grpc

from otel_lb_hop.core.layout import BACKEND_KEY, VIP_KEY, VIP_VALUE, pack_port
from otel_lb_hop.kernel import bpf
from otel_lb_hop.model import Transport, pack_address
from tests.bench.measure import QUIET, SENDING, Row, cpu_seconds, peak_rss_mib
from tests.cluster import objects
from tests.cluster.control_plane import ADMIN_TOKEN, AGENT, ControlPlane
from tests.demo.dataplane import make_peers
from tests.lab import Lab
from tests.lab.agent import ROOT, STOP_SECONDS, Agent
from tests.lab.layout import zone_name
from tests.lab.waiting import wait_for

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.cluster.api import Object, Session
    from tests.lab import Host, Node

FIRST, ALL, ENDPOINTS = 1_000, 5_000, 5
NODES, ZONES = 100, 3
PORT, TARGET = 80, 8080
WRITERS = 4
TIMES = 3
CHANGES = 20
IDLE_SECONDS = 10.0
EXPORT_SECONDS = 5
LOOK_SECONDS = 0.0002
NOTICE_SECONDS = 10.0
MAP_GET_FD_BY_ID = 14


def cluster_costs() -> Iterator[Row]:
    """Measure everything; where there can be no API server, say so and measure nothing."""
    if reason := make_peers():
        print(f"no rows with an API server: {reason}", file=sys.stderr)
        return
    with Lab(nodes=2) as lab, ControlPlane(lab) as plane:
        node = lab.nodes[0]
        plane.apply(*map(objects.node, lab.nodes))
        _write(plane, range(FIRST))
        kubeconfig = plane.agent_settings()
        settings = kubeconfig | {"OTEL_METRIC_EXPORT_INTERVAL": "60000"}
        yield from _start(node, settings | QUIET)
        took = _write(plane, range(FIRST, ALL))
        yield Row(f"  time to write {ALL - FIRST:,} Services and as many slices", took, "s")
        yield from _lists(node, kubeconfig["KUBECONFIG"])
        yield from _quiet_agent(plane, node, settings | QUIET)
        yield from _sending_agent(lab, kubeconfig | SENDING)


def _start(node: Node, settings: dict[str, str]) -> Iterator[Row]:
    """Start agents one after the other, each until /readyz says that it is ready and watches every VIP port.

    Most of it is the compile, which takes a core for a second and a half.
    """
    seconds = []
    for _ in range(TIMES):
        with _agent(node, settings, FIRST) as agent:
            seconds.append(time.monotonic() - agent.spawned)
    middle = statistics.median(seconds)
    yield Row(f"ready with {FIRST:,} Services", middle, "s", "<= 4", middle <= 4)


def _lists(node: Node, kubeconfig: str) -> Iterator[Row]:
    """Read everything in a process of its own, in turns by the agent's source and by the typed client."""
    figures: dict[str, list[float]] = {"ours": [], "typed": []}
    for _ in range(TIMES):
        for way, seconds in figures.items():
            argv = ["env", "-C", str(ROOT), sys.executable, "-m", "tests.bench.lists", way, kubeconfig]
            used, read = json.loads(node.run(argv, timeout=120).stdout)
            assert read >= 2 * ALL, f"{way} has read {read} objects"
            seconds.append(used)
    ours, typed = (statistics.median(seconds) for seconds in figures.values())
    what = f"LIST of {ALL:,} Services and slices of {ENDPOINTS} endpoints"
    yield Row(f"{what}: CPU", ours, "s", "<= 0.6", ours <= 0.6)
    yield Row("  typed client / ours", typed / ours, "", ">= 4", typed >= 4 * ours)


def _quiet_agent(plane: ControlPlane, node: Node, settings: dict[str, str]) -> Iterator[Row]:
    """Look at an agent without exporters: its memory, its calm, how soon it follows."""
    with _agent(node, settings, ALL) as agent:
        time.sleep(2)
        yield _memory(agent, "no exporter")
        requests, before = len(plane.audit(AGENT)), cpu_seconds(agent.process.pid)
        time.sleep(IDLE_SECONDS)
        idle = (cpu_seconds(agent.process.pid) - before) / IDLE_SECONDS * 100
        yield Row(f"CPU idle with {ALL:,} Services", idle, "% of a core", "<= 0.2", idle <= 0.2)
        made = len(plane.audit(AGENT)) - requests
        yield Row(f"  requests in {IDLE_SECONDS:.0f} s", made, "", "<= 1", made <= 1)
        seconds = sorted(_changes(plane, agent.process.pid))
        middle, worst = statistics.median(seconds) * 1e3, seconds[-1] * 1e3
        yield Row("one endpoint change is in the kernel's table, worst", worst, "ms", "<= 100", worst <= 100)
        yield Row(f"  median of {CHANGES}", middle, "ms")


def _sending_agent(lab: Lab, settings: dict[str, str]) -> Iterator[Row]:
    """Look at an agent that exports everything by OTLP/gRPC, more often than by default."""
    every = {"OTEL_METRIC_EXPORT_INTERVAL": str(EXPORT_SECONDS * 1_000)}
    with _Collector(lab.mgmt) as collector, _agent(lab.nodes[0], settings | every, ALL) as agent:
        pid = agent.process.pid
        time.sleep(1.5 * EXPORT_SECONDS)
        before = cpu_seconds(pid)
        time.sleep(2 * EXPORT_SECONDS)
        yield Row("  one export of their metrics: CPU", (cpu_seconds(pid) - before) / 2, "s")
        yield _memory(agent, "OTLP/gRPC")
        yield Row(
            "  messages that a Collector took (of 4 MiB at most)", collector.taken, "", ">= 1", collector.taken > 0
        )
        began = agent.terminate()
        agent.process.wait(60)
        took = time.monotonic() - began
        yield Row("  ended after", took, "s", "<= 5", took <= STOP_SECONDS)


class _Collector(grpc.GenericRpcHandler):  # type: ignore[misc] # grpc has no types
    """Takes everything at port 4317 of a host, but no message that is larger than gRPC takes if not told otherwise."""

    def __init__(self, host: Host) -> None:
        self.taken = 0
        self._server = grpc.server(ThreadPoolExecutor(1), [self])
        host.in_netns(lambda: self._server.add_insecure_port(f"{host.address4}:4317"))

    def __enter__(self) -> Self:
        self._server.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.stop(None)

    def service(self, _: object) -> grpc.RpcMethodHandler:
        return grpc.unary_unary_rpc_method_handler(self._take)

    def _take(self, _: bytes, __: object) -> bytes:
        self.taken += 1
        return b""


def _memory(agent: Agent, exporter: str) -> Row:
    memory = peak_rss_mib(agent.process.pid)
    return Row(f"RSS with {ALL:,} Services, {exporter}, peak", memory, "MiB", "<= 128", memory <= 128)


@contextmanager
def _agent(node: Node, settings: dict[str, str], services: int) -> Iterator[Agent]:
    """Run an agent; on entry it is ready and watches so many VIP ports."""
    agent = Agent(node, None, settings)

    def ready() -> bool:
        assert agent.process.poll() is None, f"the agent ended with {agent.process.returncode}:\n{agent.stderr}"
        status, content = agent.readyz()
        return status == HTTPStatus.OK and content["parts"]["topology"]["detail"]["vip_ports"] == services

    try:
        wait_for(f"an agent with {services} VIP ports", ready, 60)
        yield agent
    finally:
        agent.kill()


def _changes(plane: ControlPlane, pid: int) -> Iterator[float]:
    """Add an endpoint to one Service after the other; seconds from the API server's answer until a packet finds it.

    That is when the agent's map of backends has the key that the program would look up.
    """
    with ExitStack() as stack:
        maps = {name: stack.enter_context(closing(_OpenMap(pid, name))) for name in ("vip_ports", "backends")}
        session = stack.enter_context(plane.api.session(ADMIN_TOKEN))
        for turn in range(CHANGES):
            number = turn * ALL // CHANGES
            vip = maps["vip_ports"].get(VIP_KEY.pack(pack_address(_vip(number)), pack_port(PORT), Transport.TCP))
            assert vip is not None
            address = f"10.102.0.{turn + 1}"
            key = BACKEND_KEY.pack(VIP_VALUE.unpack(vip)[0], pack_address(address), pack_port(TARGET))
            assert maps["backends"].get(key) is None
            _, changed = _service(number, extra=address)
            session.apply(changed)
            answered = time.perf_counter()
            while maps["backends"].get(key) is None:
                assert time.perf_counter() < answered + NOTICE_SECONDS, "the agent does not notice"
                time.sleep(LOOK_SECONDS)
            yield time.perf_counter() - answered


class _OpenMap(bpf.Map):
    """A map of another process, found by its name among that one's descriptors and opened by its id."""

    def __init__(self, pid: int, name: str) -> None:
        for fdinfo in Path(f"/proc/{pid}/fdinfo").iterdir():
            fields = dict(line.split(":", 1) for line in fdinfo.read_text().splitlines())
            if "map_id" not in fields:
                continue
            fd = bpf._bpf(MAP_GET_FD_BY_ID, struct.pack("=I", int(fields["map_id"])))
            info = ctypes.create_string_buffer(40)  # struct bpf_map_info up to its name
            bpf._bpf(bpf._OBJ_GET_INFO_BY_FD, struct.pack("=IIQ", fd, len(info), ctypes.addressof(info)))
            if info.raw[24:40].rstrip(b"\0").decode() == name:
                super().__init__(fd, int(fields["key_size"]), int(fields["value_size"]))
                return
            os.close(fd)
        raise AssertionError(f"process {pid} has no map {name}")

    def close(self) -> None:
        os.close(self.fd)


def _write(plane: ControlPlane, numbers: range) -> float:
    """Write Services with their slices, several at a time; answers the seconds."""

    def write(part: range) -> None:
        with plane.api.session(ADMIN_TOKEN) as session:
            for number in part:
                _write_one(session, number)

    began = time.monotonic()
    with ThreadPoolExecutor(WRITERS) as pool:
        list(pool.map(write, [numbers[first::WRITERS] for first in range(WRITERS)]))
    return time.monotonic() - began


def _write_one(session: Session, number: int) -> None:
    for content in _service(number):
        session.apply(content)


def _service(number: int, extra: str | None = None) -> tuple[Object, Object]:
    """Write a Service and its slice as large as they are in a cluster: by Helm, with what controllers add."""
    name = f"service-{number:04}"
    ports = [objects.port(PORT, target=TARGET)]
    # There are fewer node ports than Services here.
    service = objects.service(name, ports, [_vip(number)], selector={"app": name}, allocateLoadBalancerNodePorts=False)
    labels = {"app": name, "app.kubernetes.io/instance": name, "app.kubernetes.io/managed-by": "Helm"}
    notes = {"meta.helm.sh/release-name": name, "meta.helm.sh/release-namespace": "default"}
    service["metadata"] |= {"labels": labels, "annotations": notes}
    first = number * ENDPOINTS
    addresses = [f"10.101.{each >> 8}.{each & 255}" for each in range(first, first + ENDPOINTS)]
    endpoints = [
        _endpoint(name, each, first + place) for place, each in enumerate([*addresses, *filter(None, [extra])])
    ]
    endpoint_slice = objects.endpoint_slice(name, ports, endpoints)
    by = {"endpointslice.kubernetes.io/managed-by": "endpointslice-controller.k8s.io"}
    changed = {"endpoints.kubernetes.io/last-change-trigger-time": "2026-01-01T00:00:00Z"}
    metadata = endpoint_slice["metadata"]
    metadata |= {"labels": metadata["labels"] | labels | by, "annotations": changed}
    return service, endpoint_slice


def _vip(number: int) -> str:
    return f"10.50.{number >> 8}.{number & 255}"


def _endpoint(service: str, address: str, number: int) -> Object:
    pod = f"{service}-6d5f8c7b94-{number:05x}"
    uid = f"{number:08x}-0000-4000-8000-000000000000"
    return {
        "addresses": [address],
        "conditions": {"ready": True, "serving": True, "terminating": False},
        "nodeName": f"node{number % NODES + 1}",
        "zone": zone_name(number % ZONES + 1),
        "targetRef": {"kind": "Pod", "name": pod, "namespace": "default", "uid": uid},
    }


if __name__ == "__main__":
    for each in cluster_costs():
        print(f"{each.what}: {each.figure:.4g} {each.unit} {each.aim} {'' if each.good else 'MISSED'}", flush=True)
