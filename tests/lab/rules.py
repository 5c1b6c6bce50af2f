"""nftables rules that translate as kube-proxy does, as text for one `nft -f -` per node. Pure.

External traffic: policy Cluster takes any ready backend and hides the client (mark 0x4000, masquerade); policy
Local takes a backend of this node and keeps the client's address, or drops in silence. A call from a pod or from
the node itself takes any backend whatever the policy. A VIP port without a ready backend is rejected.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from otel_lb_hop.model import Policy, VipPort, format_address, is_ipv4

if TYPE_CHECKING:
    from collections.abc import Sequence

    from otel_lb_hop.model import Backend

MASQUERADE_MARK = 0x4000
_MARK = f"meta mark set meta mark or {MASQUERADE_MARK:#x}"
_POD_PORTS = '"vpod*"'


def ruleset(node: str, vip_ports: Sequence[VipPort]) -> str:
    """Everything `node` needs to serve these VIP ports; loading it replaces what an earlier one brought."""
    served: list[tuple[VipPort, str]] = []
    unserved: list[tuple[VipPort, str]] = []
    chains: list[str] = []
    for number, vip_port in enumerate(vip_ports):
        ready = [backend for backend in vip_port.backends if backend.ready]
        if not ready:
            unserved.append((vip_port, "goto rejected"))
            continue
        local = [backend for backend in ready if backend.node == node]
        if vip_port.policy is Policy.LOCAL and not local:
            unserved.append((vip_port, "drop"))
        served.append((vip_port, f"vip{number}"))
        chains += _vip_chains(f"vip{number}", vip_port, ready, local)
    lookups = [("calls", [(v, f"goto {chain}-in") for v, chain in served])]
    lookups += [("node-calls", [(v, f"goto {chain}-node") for v, chain in served]), ("unserved", unserved)]
    maps = [_map(f"{name}{family}", entries, family) for name, entries in lookups for family in (4, 6)]
    table = "\n".join([*maps, *chains, _HOOKS])
    return f"table inet vips\ndelete table inet vips\ntable inet vips {{\n{table}\n}}\n"


def _vip_chains(chain: str, vip_port: VipPort, ready: Sequence[Backend], local: Sequence[Backend]) -> list[str]:
    """Chains of one VIP port: -in for what arrives, -node for the node's own calls, one per backend."""
    if vip_port.policy is Policy.CLUSTER:
        entry = [_MARK, f"goto {chain}-all"]
    else:
        entry = [f"iifname {_POD_PORTS} goto {chain}-all", *([f"goto {chain}-local"] if local else [])]
    numbers = {backend: number for number, backend in enumerate(ready)}
    chains = [
        _chain(f"{chain}-in", entry),
        _chain(f"{chain}-node", [_MARK, f"goto {chain}-all"]),
        _chain(f"{chain}-all", [_pick(chain, list(numbers.values()))]),
    ]
    if local and vip_port.policy is Policy.LOCAL:
        chains.append(_chain(f"{chain}-local", [_pick(chain, [numbers[backend] for backend in local])]))
    for backend, number in numbers.items():
        chains.append(_chain(f"{chain}-to{number}", _translate(vip_port, backend)))
    return chains


def _pick(chain: str, numbers: Sequence[int]) -> str:
    choices = ", ".join(f"{index} : goto {chain}-to{number}" for index, number in enumerate(numbers))
    return f"numgen random mod {len(numbers)} vmap {{ {choices} }}"


def _translate(vip_port: VipPort, backend: Backend) -> list[str]:
    if is_ipv4(backend.address) != is_ipv4(vip_port.address):
        raise ValueError(f"{vip_port.service}: VIP and backend are of different address families")
    address = format_address(backend.address)
    family, target = ("ip", address) if is_ipv4(backend.address) else ("ip6", f"[{address}]")
    transport = vip_port.transport.name.lower()
    # A pod that reaches itself through the VIP must see another source, or it would answer itself directly.
    return [f"{family} saddr {address} {_MARK}", f"meta l4proto {transport} dnat {family} to {target}:{backend.port}"]


def _chain(name: str, lines: Sequence[str]) -> str:
    return f"chain {name} {{\n  " + "\n  ".join(lines) + "\n}"


def _map(name: str, entries: Sequence[tuple[VipPort, str]], family: int) -> str:
    elements = ",\n  ".join(
        f"{format_address(v.address)} . {v.transport.name.lower()} . {v.port} : {verdict}"
        for v, verdict in entries
        if is_ipv4(v.address) == (family == 4)
    )
    kind = f"type ipv{family}_addr . inet_proto . inet_service : verdict;"
    return f"map {name} {{\n  {kind}\n" + (f"  elements = {{ {elements} }}\n" if elements else "") + "}"


def _look_up(name: str) -> str:
    return f"ip daddr . meta l4proto . th dport vmap @{name}4\n  ip6 daddr . meta l4proto . th dport vmap @{name}6"


_HOOKS = f"""chain rejected {{
  reject with icmpx type port-unreachable
}}
chain prerouting {{
  type nat hook prerouting priority dstnat; policy accept;
  {_look_up("calls")}
}}
chain output {{
  type nat hook output priority -100; policy accept;
  {_look_up("node-calls")}
}}
chain postrouting {{
  type nat hook postrouting priority srcnat; policy accept;
  meta mark and {MASQUERADE_MARK:#x} == 0 return
  meta mark set meta mark xor {MASQUERADE_MARK:#x}
  masquerade random,fully-random
}}
chain unserved-forward {{
  type filter hook forward priority filter; policy accept;
  {_look_up("unserved")}
}}
chain unserved-output {{
  type filter hook output priority filter; policy accept;
  {_look_up("unserved")}
}}
chain unserved-input {{
  type filter hook input priority filter; policy accept;
  {_look_up("unserved")}
}}"""
