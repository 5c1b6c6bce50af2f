"""Starts the compile child and takes over the programs and maps that it loaded."""

from __future__ import annotations

import json
import mmap
import os
import platform
import re
import socket
import subprocess
import sys
import threading
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from otel_lb_hop.core import layout
from otel_lb_hop.errors import KernelError
from otel_lb_hop.kernel.bpf import Map
from otel_lb_hop.kernel.compiler import MAX_MESSAGE

COMPILE_SECONDS = 300
"""Longer is a hang. It takes a second where the CPU is quick, and a minute under emulation."""
PROGRAMS = {
    "lbh_ingress": "tc",
    "lbh_egress": "tc",
    "lbh_ingress_l3": "tc",
    "lbh_egress_l3": "tc",
    "lbh_sweep": "tc",
    "lbh_datagram": "tc",
    "lbh_datagram_l3": "tc",
    "lbh_conntrack": "socket_filter",
}
"""The programs and the type of each."""


class Sizes(NamedTuple):
    """Upper limits of the maps; memory follows what is used, except for the handshake table and the ring."""

    vip_ports: int = 16_384
    backends: int = 262_144
    hops: int = 65_536
    places: int = 16_384
    datagram_flows: int = 8_192
    """Of about 130 bytes each, taken from the kernel's memory at once."""
    table_buckets: int = 4_096
    """Of 8 handshakes and 1,088 bytes each: 32,768 handshakes."""
    ring_pages: int = 64
    """A power of two; its memory is mapped twice into the process, and counts as its own."""

    def defines(self) -> dict[str, int]:
        """Name them as the C source does."""
        return {
            "LBH_MAX_VIP_PORTS": self.vip_ports,
            "LBH_MAX_BACKENDS": self.backends,
            "LBH_MAX_HOPS": self.hops,
            "LBH_MAX_PLACES": self.places,
            "LBH_MAX_DATAGRAM_FLOWS": self.datagram_flows,
            "LBH_TABLE_BUCKETS": self.table_buckets,
            "LBH_RING_PAGES": self.ring_pages,
        }


@dataclass(frozen=True, slots=True)
class Loaded:
    """The programs' descriptors and the maps, alive as long as this process holds them."""

    programs: dict[str, int]
    vip_ports: Map
    backends: Map
    vip_stats: Map
    hop_stats: Map
    places: Map
    uplinks: Map
    settings: Map
    events: Map
    records_fd: int
    sizes: Sizes
    compile_seconds: float


SMALLEST_RING_PAGES = 16
LARGEST_RING_PAGES = 4_096


def ring_pages(records_per_second: int) -> int:
    """Choose a ring that holds the records of three seconds: the bursts that the rate allows, and what comes behind."""
    wanted = 3 * records_per_second * layout.RING_STRIDE // mmap.PAGESIZE
    return min(max(SMALLEST_RING_PAGES, 1 << wanted.bit_length()), LARGEST_RING_PAGES)


_MAPS = ("vip_ports", "backends", "vip_stats", "hop_stats", "places", "uplinks", "settings", "events", "records")


def bpf_folder() -> Path:
    """Find the C sources: in the installed package, or beside it in a checkout."""
    package = Path(__file__).resolve().parent.parent
    for folder in (package / "bpf", package.parent / "bpf"):
        if (folder / "lb_hop.c").exists():
            return folder
    raise KernelError(f"the BPF sources are not in {package / 'bpf'}: the installation is not complete")


def _kernel_version() -> tuple[int, int]:
    match = re.match(r"(\d+)\.(\d+)", platform.release())
    return (int(match[1]), int(match[2])) if match else (0, 0)


def _explain(error: str, output: str) -> str:
    """Say what a failed compile means for an operator; the child's own words stand behind it."""
    last = output.strip().splitlines()[-1:] or [""]
    if "Operation not permitted" in error + output or (os.geteuid() != 0 and "Failed to load" in error + output):
        hint = "loading BPF programs was refused: run as root or with CAP_BPF and CAP_NET_ADMIN"
    elif "bcc cannot be imported" in error:
        hint = "bcc is missing"
    elif "Function not implemented" in error + output:
        hint = "this kernel has no bpf(2): it needs CONFIG_BPF_SYSCALL and CONFIG_NET_CLS_BPF"
    else:
        hint = "compiling or loading the BPF programs failed"
    return f"{hint}: {error} {last[0]}".strip()


def _request(sizes: Sizes) -> dict[str, Any]:
    folder = bpf_folder()
    # The secret by which the handshake table is hashed.
    secrets = {f"LBH_HASH_{name}": f"{int.from_bytes(os.urandom(8))}ull" for name in ("MULTIPLIER", "ADDEND")}
    defines: dict[str, int | str] = {**sizes.defines(), **secrets}
    if _kernel_version() < (5, 12):
        defines["LBH_NO_COMPARE_EXCHANGE"] = 1
    return {
        "source": str(folder / "lb_hop.c"),
        "includes": [str(folder)],
        "headers": str(folder / "include"),
        "defines": defines,
        "programs": PROGRAMS,
        "maps": _MAPS,
    }


def _ask_child(request: dict[str, Any]) -> tuple[dict[str, Any], list[int]]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        argv = [sys.executable, "-m", "otel_lb_hop.kernel.compiler", str(theirs.fileno())]
        # A session of its own: a Ctrl-C at the terminal is the agent's to handle.
        with subprocess.Popen(
            argv,
            pass_fds=[theirs.fileno()],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        ) as child:
            theirs.close()
            ours.settimeout(COMPILE_SECONDS)
            ours.send(json.dumps(request).encode())
            try:
                message, fds, _, _ = socket.recv_fds(ours, MAX_MESSAGE, len(PROGRAMS) + len(_MAPS))
            except TimeoutError:
                child.kill()
                message, fds = b"", []
            output, _ = child.communicate()
    # A fatal error inside LLVM ends the child without an answer.
    answer = json.loads(message) if message else {"error": f"the compile child ended with {child.returncode}"}
    if "error" in answer:
        for fd in fds:
            os.close(fd)
        raise KernelError(_explain(answer["error"], output))
    return answer, fds


def load(sizes: Sizes | None = None) -> Loaded:
    """Compile and load the programs in a child process; raises KernelError with what to do about it."""
    sizes = sizes or Sizes()
    answer, fds = _ask_child(_request(sizes))
    fd_of = dict(zip([*answer["programs"], *answer["maps"]], fds, strict=True))
    return Loaded(
        programs={name: fd_of[name] for name in PROGRAMS},
        vip_ports=Map(fd_of["vip_ports"], layout.VIP_KEY.size, layout.VIP_VALUE.size),
        backends=Map(fd_of["backends"], layout.BACKEND_KEY.size, 4),
        vip_stats=Map(fd_of["vip_stats"], 4, layout.VIP_STATS_WORDS * 8, per_cpu=True),
        hop_stats=Map(fd_of["hop_stats"], 4, layout.HOP_STATS_WORDS * 8, per_cpu=True),
        places=Map(fd_of["places"], layout.PREFIX.size, layout.PLACE.size),
        uplinks=Map(fd_of["uplinks"], 4, layout.UPLINKS.size),
        settings=Map(fd_of["settings"], 4, layout.SETTINGS.size),
        events=Map(fd_of["events"], 4, 8, per_cpu=True),
        records_fd=fd_of["records"],
        sizes=sizes,
        compile_seconds=answer["seconds"],
    )


def begin_loading(sizes: Sizes) -> Future[Loaded]:
    """Load in the background; the result, or KernelError, is in the future. It ends with the process."""
    future: Future[Loaded] = Future()

    def work() -> None:
        try:
            future.set_result(load(sizes))
        except BaseException as error:  # noqa: BLE001 - whatever it is, whoever waits has to hear of it
            future.set_exception(error)

    threading.Thread(target=work, name="load", daemon=True).start()
    return future
