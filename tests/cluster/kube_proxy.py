"""kube-proxy on a node of the lab."""

from __future__ import annotations

import enum
import ipaddress
import json
from typing import TYPE_CHECKING

from tests.peers import build

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from tests.lab import Node

POD_CIDRS = "10.100.0.0/16,fd00:100::/32"


class Mode(enum.Enum):
    """How kube-proxy writes its rules."""

    IPTABLES = "iptables"
    NFTABLES = "nftables"
    IPVS = "ipvs"


ALWAYS = (Mode.IPTABLES, Mode.NFTABLES)
"""Those that every kernel can do; for IPVS see tests/kernels."""
DUMPS = {
    Mode.IPTABLES: (["iptables-save", "-t", "nat"], ["ip6tables-save", "-t", "nat"]),
    Mode.NFTABLES: (["nft", "list", "table", "ip", "kube-proxy"], ["nft", "list", "table", "ip6", "kube-proxy"]),
    Mode.IPVS: (["cat", "/proc/net/ip_vs"],),
}


class KubeProxy:
    """A running kube-proxy; its rules stay when it is stopped, as those of a real one do."""

    def __init__(self, node: Node, mode: Mode, kubeconfig: Path, folder: Path) -> None:
        self.node = node
        self.mode = mode
        self._log = folder / f"kube-proxy-{node.name}.log"
        config = folder / f"kube-proxy-{node.name}.json"
        config.write_text(json.dumps(_config(node, mode, kubeconfig)), encoding="utf-8")
        with self._log.open("a") as log:
            self._process = node.popen(
                [str(build.build("kubernetes") / "kube-proxy"), f"--config={config}"], stdout=log, stderr=log
            )

    def has(self, texts: Iterable[str]) -> bool:
        """Whether its rules of both families together have all these texts."""
        code = self._process.poll()
        assert code is None, f"kube-proxy of {self.node.name} ended with {code}:\n{self._log.read_text()[-2000:]}"
        if self.mode is Mode.IPVS:
            texts = [_in_ipvs(text) for text in texts]
        rules = "".join(self.node.run(dump, check=False).stdout for dump in DUMPS[self.mode])
        return all(text in rules for text in texts)

    def stop(self) -> None:
        """End it."""
        self._process.kill()
        self._process.wait()


def _in_ipvs(text: str) -> str:
    """Write an address as /proc/net/ip_vs does."""
    address = ipaddress.ip_address(text)
    return f"[{address.exploded}]" if address.version == 6 else address.packed.hex().upper()


def _config(node: Node, mode: Mode, kubeconfig: Path) -> dict[str, object]:
    # A change is written at once: the default gathers changes for a second.
    quick = {"minSyncPeriod": "1ms"}
    return {
        "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
        "kind": "KubeProxyConfiguration",
        "mode": mode.value,
        "hostnameOverride": node.name,
        "clientConnection": {"kubeconfig": str(kubeconfig)},
        "clusterCIDR": POD_CIDRS,
        "iptables": quick,
        "nftables": quick,
        "ipvs": quick,
        # These are settings of the whole machine.
        "conntrack": {"maxPerCore": 0, "tcpEstablishedTimeout": "0s", "tcpCloseWaitTimeout": "0s"},
        "oomScoreAdj": 0,
        "healthzBindAddress": "127.0.0.1:10256",
        "metricsBindAddress": "127.0.0.1:10249",
    }
