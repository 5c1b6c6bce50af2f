"""What the kernel at hand can do of that which not every kernel can: found out by doing it, in a namespace."""

from __future__ import annotations

import shutil
import subprocess

_VETH = "ip link add x0 type veth peer name x1; ip link set x0 up; "
PROBES = {
    "ipip": "ip link add x0 type ipip local 192.0.2.1 remote 192.0.2.2",
    "ipvs": "ip link add x0 type dummy; test -e /proc/sys/net/ipv4/vs/conntrack",
    "netem": _VETH + "tc qdisc add dev x0 root netem delay 1ms",
    "qinq": _VETH + "ip link add link x0 name x0.1 type vlan proto 802.1ad id 1",
    "sctp": "python3 -c 'import socket; socket.socket(socket.AF_INET, socket.SOCK_STREAM, 132)'",
    "vlan": _VETH + "ip link add link x0 name x0.1 type vlan id 1",
    "wireguard": "ip link add x0 type wireguard; wg show x0",
}

NEEDED = {
    "test_delay.py": ("netem",),
    "test_ipvs.py": ("ipvs",),
    "test_sctp.py": ("sctp",),
    "test_tunnels.py": ("ipip", "wireguard"),
    "test_vlans.py": ("vlan", "qinq"),
}
"""What the tests of a file need."""


def lacking() -> dict[str, list[str]]:
    """Name the files that this kernel (or this user) cannot run, each with what is lacking."""
    has = {name: _works(probe) for name, probe in PROBES.items()}
    found = {file: [name for name in names if not has[name]] for file, names in NEEDED.items()}
    return {file: names for file, names in found.items() if names}


def _works(probe: str) -> bool:
    if shutil.which("unshare") is None:
        return False
    done = subprocess.run(["unshare", "--net", "sh", "-ec", probe], capture_output=True, check=False)
    return done.returncode == 0
