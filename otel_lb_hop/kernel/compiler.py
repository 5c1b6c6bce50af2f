"""The compile child: `python -m otel_lb_hop.kernel.compiler SOCKET_FD`, the only code that imports bcc.

bcc with LLVM costs over 100 MiB, so a short-lived process compiles and loads, hands the descriptors of programs
and maps over its socket (SCM_RIGHTS) and exits. Request and answer are one JSON object each:
{"source": path, "includes": [path], "defines": {name: value}, "programs": {name: type}, "maps": [name],
"given": [name]} with a descriptor for each map that is given, to be used in place of a new one of that name
→ {"programs": [name], "maps": [name]} with as many descriptors in that order, {"other_shape": true} if a map that was
given is not as the source wants it, or {"error": text}.
"""

from __future__ import annotations

import ctypes
import json
import os
import platform
import shutil
import signal
import socket
import struct
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from otel_lb_hop.kernel import bpf
from otel_lb_hop.kernel.privileges import least_for_child

MAX_MESSAGE = 1 << 16
MAX_FDS = 64
_FOLDERS = ("/dev/shm", "/run")  # noqa: S108 - after those of tempfile.gettempdir
"""A container with a read-only root has the first at least."""

_ARCH_OF = {"x86_64": "x86", "aarch64": "arm64", "riscv64": "riscv", "ppc64le": "powerpc", "s390x": "s390"}
_UAPI = Path("/usr/include")


def make_header_tree(stubs: Path, tree: Path) -> None:
    """Build what bcc takes as kernel source: our stub headers and links to the C library's UAPI headers.

    No header of the running kernel is needed (Debian: linux-libc-dev has the UAPI headers).
    """
    if not (_UAPI / "linux/bpf.h").exists():
        raise FileNotFoundError(f"{_UAPI}/linux/bpf.h is missing: install linux-libc-dev (Debian) or kernel-headers")
    machine = platform.machine()
    shutil.copytree(stubs, tree / "include")
    uapi = tree / "include/uapi"
    arch_uapi = tree / f"arch/{_ARCH_OF.get(machine, machine)}/include/uapi"
    uapi.mkdir()
    arch_uapi.mkdir(parents=True)
    (uapi / "linux").symlink_to(_UAPI / "linux")
    (uapi / "asm-generic").symlink_to(_UAPI / "asm-generic")
    multiarch = _UAPI / f"{machine}-linux-gnu/asm"
    (arch_uapi / "asm").symlink_to(multiarch if multiarch.exists() else _UAPI / "asm")


_LOAD_ADDRESS = 0x18
"""BPF_LD | BPF_IMM | BPF_DW: takes two instructions' room."""
_OF_A_MAP = 1
"""BPF_PSEUDO_MAP_FD: the constant is a map's descriptor."""


def exchange_maps(code: ctypes.Array[ctypes.c_char], new_fds: dict[int, int]) -> None:
    """Let instructions (struct bpf_insn, linux/bpf.h) use other maps than those they were compiled for."""
    for at in range(0, len(code), 8):
        opcode, registers, _, fd = struct.unpack_from("=BBhi", code, at)
        # The second half of a constant has the opcode 0.
        if opcode == _LOAD_ADDRESS and registers >> 4 == _OF_A_MAP and fd in new_fds:
            struct.pack_into("=i", code, at + 4, new_fds[fd])


def writable_folder() -> str:
    """Find where a temporary folder can be made; raises FileNotFoundError that says what to mount."""
    try:
        return tempfile.gettempdir()  # TMPDIR, /tmp and the like, each tried by writing
    except FileNotFoundError:
        for folder in _FOLDERS:
            if os.access(folder, os.W_OK | os.X_OK):
                return folder
    text = (
        "no folder can be written, and the headers for the compiler are put together in one for a moment: mount a tmpfs"
        " (Kubernetes: an emptyDir) on /tmp, or name a folder in TMPDIR"
    )
    raise FileNotFoundError(text)


def _is_alike(wanted: bpf.MapShape, there: bpf.MapShape) -> bool:
    """Whether the programs can use a map in place of one: a ring buffer may have another size."""
    return wanted == there or wanted.kind == there.kind == bpf.RING


def compile_and_load(request: dict[str, Any], given: dict[str, int]) -> tuple[dict[str, Any], list[int]]:
    """Compile the source, load its programs on the maps given, and name the descriptors in the order of the answer."""
    started = time.monotonic()
    try:
        from bcc import BPF, lib  # noqa: PLC0415 - bcc lives in this function only
    except ImportError as error:
        text = (
            f"the Python package bcc cannot be imported ({error}): install python3-bpfcc (Debian) for {sys.executable}"
        )
        raise RuntimeError(text) from error
    flags = [f"-I{path}" for path in request["includes"]]
    flags += [f"-D{name}={value}" for name, value in request["defines"].items()]
    module = BPF(src_file=request["source"], cflags=flags)
    new_fds = {int(module[name].map_fd): fd for name, fd in given.items()}
    if any(not _is_alike(bpf.map_shape(new), bpf.map_shape(fd)) for new, fd in new_fds.items()):
        return {"other_shape": True}, []
    for name in request["programs"] if given else ():
        # bcc keeps the instructions in memory of its own until they are loaded.
        size = lib.bpf_function_size(module.module, name.encode())
        start = lib.bpf_function_start(module.module, name.encode())
        exchange_maps((ctypes.c_char * size).from_address(start), new_fds)
    types = {"tc": BPF.SCHED_CLS, "socket_filter": BPF.SOCKET_FILTER, "xdp": BPF.XDP}
    programs = [module.load_func(name, types[kind]).fd for name, kind in request["programs"].items()]
    maps = [given[name] if name in given else int(module[name].map_fd) for name in request["maps"]]
    answer = {
        "programs": list(request["programs"]),
        "maps": request["maps"],
        "seconds": round(time.monotonic() - started, 3),
    }
    return answer, programs + maps


def serve(channel: socket.socket) -> None:
    """Answer one request on the channel; an error becomes an answer that tells it."""
    message, given_fds, _, _ = socket.recv_fds(channel, MAX_MESSAGE, MAX_FDS)
    request = json.loads(message)
    given = dict(zip(request["given"], given_fds, strict=True))
    fds: list[int] = []
    try:
        with tempfile.TemporaryDirectory(prefix="otel-lb-hop-", dir=writable_folder()) as folder:
            tree = Path(folder) / "headers"
            make_header_tree(Path(request["headers"]), tree)
            os.environ["BCC_KERNEL_SOURCE"] = str(tree)
            answer, fds = compile_and_load(request, given)
    except Exception as error:  # noqa: BLE001 - whatever bcc raises, the parent has to hear of it
        answer = {"error": f"{type(error).__name__}: {error}"}
    socket.send_fds(channel, [json.dumps(answer).encode()], fds)


def die_with_parent() -> None:
    """Ask the kernel to end this process with the one that started it (prctl(2), PR_SET_PDEATHSIG)."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)


if __name__ == "__main__":
    least_for_child()
    die_with_parent()
    serve(socket.socket(fileno=int(sys.argv[1])))
