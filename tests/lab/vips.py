"""VIP ports written as the static file the agent reads (OTEL_LB_HOP_VIPS_FILE). Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import yaml

from otel_lb_hop.model import Backend, Node, VipPort, format_address, is_ipv4

if TYPE_CHECKING:
    from collections.abc import Iterable


def vips_file(nodes: Iterable[Node], vip_ports: Iterable[VipPort]) -> str:
    """One entry per Service: its VIP ports of both families share VIPs, ports and backends."""
    services: dict[tuple[str, str], list[VipPort]] = {}
    for vip_port in vip_ports:
        services.setdefault((vip_port.namespace, vip_port.service), []).append(vip_port)
    document = {
        "nodes": [{"name": node.name, "zone": node.zone, "region": node.region} for node in nodes],
        "services": [_service(f"{namespace}/{name}", ports) for (namespace, name), ports in services.items()],
    }
    return yaml.safe_dump(document, sort_keys=False, width=200)


def _service(name: str, vip_ports: list[VipPort]) -> dict[str, Any]:
    policies = {vip_port.policy.value for vip_port in vip_ports}
    if len(policies) > 1:
        raise ValueError(f"{name}: a Service has one externalTrafficPolicy, not {sorted(policies)}")
    backends = _once(backend for vip_port in vip_ports for backend in vip_port.backends)
    ports = [
        {"port": v.port, "protocol": v.transport.name, "targetPort": v.backends[0].port if v.backends else v.port}
        for v in vip_ports
        # The port of a VIP without a backend of its family is told by the VIP that has one.
        if v.backends or not any(o.backends for o in vip_ports if (o.port, o.transport) == (v.port, v.transport))
    ]
    return {
        "name": name,
        "externalTrafficPolicy": policies.pop(),
        "vips": list(dict.fromkeys(format_address(vip_port.address) for vip_port in vip_ports)),
        "ports": [port for number, port in enumerate(ports) if port not in ports[:number]],
        "backends": _backends(name, vip_ports, backends),
    }


def _backends(name: str, vip_ports: list[VipPort], backends: list[Backend]) -> list[dict[str, Any]]:
    """List each backend once, with its port where that is not the Service port's targetPort."""
    entries: dict[bytes, dict[str, Any]] = {}
    for backend in backends:
        entry: dict[str, Any] = {"address": format_address(backend.address), "node": backend.node, "zone": backend.zone}
        if backend.pod:
            entry["pod"] = f"{backend.pod_namespace}/{backend.pod}"
        entries.setdefault(backend.address, entry | {"ready": backend.ready})
    for vip_port in vip_ports:
        listed = {address for address in entries if is_ipv4(address) == is_ipv4(vip_port.address)}
        if listed != {backend.address for backend in vip_port.backends}:
            raise ValueError(f"{name}: the file cannot say that ports of one Service have different backends")
        for backend in vip_port.backends:
            if backend.port != vip_port.backends[0].port:
                entries[backend.address]["port"] = backend.port
    if len({vip_port.port for vip_port in vip_ports}) > 1 and any("port" in entry for entry in entries.values()):
        raise ValueError(f"{name}: the file cannot say several ports of a Service and a port of a backend at once")
    return list(entries.values())


def _once(backends: Iterable[Backend]) -> list[Backend]:
    return list(dict.fromkeys(backends))
