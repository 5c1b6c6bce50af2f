"""Inside the guest: `python -m tests.kernels.guest RESULTS FILE...` loads modules and runs these tests.

RESULTS gets junit.xml, and pytest.txt with what pytest said.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.kernel.requirements import HAS_TCX

MODULES = [
    # Interfaces, and what hangs on them. Automatic loading does not find them all in a guest.
    *("veth", "bridge", "tun", "dummy", "8021q", "ipip", "wireguard", "sch_ingress", "sch_netem", "cls_bpf", "cls_u32"),
    # Netfilter: the lab's rules, and kube-proxy's.
    *("nf_tables", "nft_ct", "nft_nat", "nft_chain_nat", "nft_masq", "nft_numgen", "nft_reject_inet", "nft_compat"),
    *("nf_conntrack_netlink", "xt_MASQUERADE", "xt_mark", "xt_statistic", "xt_nat", "xt_comment", "xt_conntrack"),
    *("xt_addrtype", "xt_set", "ip_set_hash_ip", "ip_set_hash_ipport", "ip_set_hash_ipportip", "ip_set_hash_ipportnet"),
    *("ip_set_hash_net", "ip_set_bitmap_port", "ipt_REJECT", "ip6t_REJECT", "ip_vs", "ip_vs_rr", "sctp"),
]


def main(results: str, *tests: str) -> int:
    """Load what is needed and run the tests."""
    for module in MODULES:
        subprocess.run(["modprobe", module], check=False)
    subprocess.run(["mount", "-t", "bpf", "bpf", "/sys/fs/bpf"], check=False)
    with (Path(results) / "pytest.txt").open("w") as said:
        done = subprocess.run(
            pytest_command(Path(results), *tests), stdin=subprocess.DEVNULL, stdout=said, stderr=said, check=False
        )
    return done.returncode


def pytest_command(results: Path, *tests: str) -> list[str]:
    """Say how the tests are run, here and there: one after another, without a trace in the tree."""
    options = ["-p", "no:cacheprovider", "-p", "no:xdist", "--color=no", "--tb=short", "--durations=15"]
    # Nothing is too slow here; the whole guest has a limit.
    options += ["-o", "timeout=0", f"--junitxml={results / 'junit.xml'}"]
    options += [] if HAS_TCX else ["-m", "not tcx"]
    return [sys.executable, "-m", "pytest", *options, *tests]


if __name__ == "__main__":
    os.chdir(Path(__file__).parents[2])
    sys.exit(main(*sys.argv[1:]))
