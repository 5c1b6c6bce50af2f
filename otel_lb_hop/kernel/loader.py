"""Gets programs and maps: those that an agent before this one pinned, or new ones from the compile child.

What of the pinned is taken over depends on what has changed since: nothing, then all of it, without a compiler; the
programs, then new ones are made for the same maps; the layout, then nothing.
"""

from __future__ import annotations

import hashlib
import json
import logging
import mmap
import os
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from otel_lb_hop.core import layout
from otel_lb_hop.core.pinned import NAME_BYTES, NOTE_BYTES, STATE, State, pack_state
from otel_lb_hop.errors import KernelError
from otel_lb_hop.kernel import bpf
from otel_lb_hop.kernel.bpf import Map
from otel_lb_hop.kernel.compiler import MAX_FDS, MAX_MESSAGE
from otel_lb_hop.kernel.pins import NOTES, NOTES_SHAPE, own_netns
from otel_lb_hop.kernel.privileges import is_guarded, kernel_version

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from otel_lb_hop.kernel.pins import PinFolder, Pinning, Pins

log = logging.getLogger(__name__)

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
XDP_PROGRAMS = {"lbh_xdp": "xdp"}
"""One more, where uplinks are to be watched by XDP: it would cost every other start its compile time."""
XDP_GUARDED_SINCE = (5, 18)
"""It then takes bpf_xdp_load_bytes()."""


class Sizes(NamedTuple):
    """Upper limits of the maps; memory follows what is used, except for the handshake table and the ring."""

    vip_ports: int = 16_384
    backends: int = 262_144
    hops: int = 65_536
    places: int = 16_384
    datagram_flows: int = 8_192
    """Of about 130 bytes each, taken from the kernel's memory at once."""
    told_flows: int = 16_384
    """The same."""
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
            "LBH_MAX_TOLD_FLOWS": self.told_flows,
            "LBH_TABLE_BUCKETS": self.table_buckets,
            "LBH_RING_PAGES": self.ring_pages,
        }


@dataclass(frozen=True, slots=True)
class Loaded:
    """The programs' descriptors and the maps: alive as long as this process holds them, or as they are pinned."""

    programs: dict[str, int]
    vip_ports: Map
    backends: Map
    vip_stats: Map
    hop_stats: Map
    places: Map
    uplinks: Map
    settings: Map
    events: Map
    told_flows: Map
    names: Map
    """By row id: whose counters a row holds (core/pinned.py)."""
    notes: Map
    """State, journal and mark (core/pinned.py)."""
    records_fd: int
    sizes: Sizes
    state: State
    pins: Pins | None
    """None if nothing is pinned."""
    inherited: bool
    """Whether the maps are those of an agent before this one."""
    previous_records_fd: int | None
    """Of a ring of another size, which the programs before filled: to be read to its end, then `retire_ring`."""
    compile_seconds: float
    """0: nothing was compiled."""


SMALLEST_RING_PAGES = 16
LARGEST_RING_PAGES = 4_096


def ring_pages(records_per_second: int) -> int:
    """Choose a ring that holds the records of three seconds: the bursts that the rate allows, and what comes behind."""
    wanted = 3 * records_per_second * layout.RING_STRIDE // mmap.PAGESIZE
    return min(max(SMALLEST_RING_PAGES, 1 << wanted.bit_length()), LARGEST_RING_PAGES)


_NAMES = "names"
_RING = "records"
_MAPS = (
    "vip_ports", "backends", "vip_stats", "hop_stats", "places", "uplinks", "settings", "events", _RING,
    "datagram_flows", "told_flows", "early_data", "recent", "handshake_tags", "handshakes", "record_due_ns",
    "sweep_cursor",
)  # fmt: skip
"""The programs' maps."""


def bpf_folder() -> Path:
    """Find the C sources: in the installed package, or beside it in a checkout."""
    package = Path(__file__).resolve().parent.parent
    for folder in (package / "bpf", package.parent / "bpf"):
        if (folder / "lb_hop.c").exists():
            return folder
    raise KernelError(f"the BPF sources are not in {package / 'bpf'}: the installation is not complete")


def _explain(error: str, output: str, *, guarded: bool = False) -> str:
    """Say what a failed compile means for an operator; the child's own words stand behind it.

    `guarded`: the child had no CAP_PERFMON.
    """
    last = output.strip().splitlines()[-1:] or [""]
    if "Operation not permitted" in error + output:
        # Of the capabilities it was sure before.
        hint = "loading BPF programs was refused: by a seccomp profile, a security module, or in a user namespace"
    elif guarded and "Failed to load BPF program" in error:
        hint = "CAP_PERFMON is missing, without it this kernel's verifier does not accept the programs"
    elif "bcc cannot be imported" in error:
        hint = "bcc is missing"
    elif "Function not implemented" in error + output:
        hint = "this kernel has no bpf(2): it needs CONFIG_BPF_SYSCALL and CONFIG_NET_CLS_BPF"
    else:
        hint = "compiling or loading the BPF programs failed"
    return f"{hint}: {error} {last[0]}".strip()


def _sources(folder: Path) -> list[Path]:
    return [folder / "lb_hop.c", *sorted(folder.glob("*.h")), *sorted((folder / "include").rglob("*.h"))]


def _digest(*parts: bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8) + part)
    return digest.hexdigest()


def _layout(sizes: Sizes) -> str:
    """Name what the maps hold. The ring is none of it: it can be exchanged."""
    shapes = (
        layout.LAYOUT_VERSION, sizes._replace(ring_pages=0), _MAPS, NAME_BYTES, NOTE_BYTES, layout.RING_STRIDE,
        layout.VIP_STATS_WORDS, layout.HOP_STATS_WORDS, layout.VIP_KEY.size, layout.BACKEND_KEY.size,
        layout.SETTINGS.size,
    )  # fmt: skip
    return _digest(repr(shapes).encode())


class _Recipe(NamedTuple):
    """What to make: programs and the type of each, and the defines of the source but for the secrets."""

    programs: dict[str, str]
    defines: dict[str, int]

    @property
    def build(self) -> str:
        """Name what comes of it."""
        sources = [path.read_bytes() for path in _sources(bpf_folder())]
        return _digest(repr((sorted(self.programs.items()), sorted(self.defines.items()))).encode(), *sources)


def _recipe(sizes: Sizes, *, xdp: bool) -> _Recipe:
    defines = sizes.defines()
    if kernel_version() < (5, 12):
        defines["LBH_NO_COMPARE_EXCHANGE"] = 1
    if is_guarded():
        defines["LBH_GUARDED"] = 1
    if xdp and is_guarded() and kernel_version() < XDP_GUARDED_SINCE:
        log.warning("uplinks stay with tc: without CAP_PERFMON, XDP needs Linux 5.18")
        xdp = False
    if xdp:
        defines["LBH_XDP"] = 1
    return _Recipe(PROGRAMS | XDP_PROGRAMS if xdp else PROGRAMS, defines)


_CHILD = """
import runpy, sys
ours = sys.argv.pop(1)
if ours not in sys.path:
    sys.path.insert(0, ours)
runpy.run_module("otel_lb_hop.kernel.compiler", run_name="__main__", alter_sys=True)
"""
"""What `python -m` does, but with -P: nothing is imported from the working directory, which may be anybody's."""


def _ask_child(request: dict[str, Any], given: Mapping[str, int]) -> tuple[dict[str, Any], dict[str, int]]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    # A verifier's log is longer than a pipe: the child must not wait for somebody to read it.
    with ours, theirs, os.fdopen(os.memfd_create("compiler"), "w+b") as told:
        argv = [sys.executable, "-P", "-c", _CHILD, str(Path(__file__).resolve().parents[2]), str(theirs.fileno())]
        # A session of its own: a Ctrl-C at the terminal is the agent's to handle.
        with subprocess.Popen(
            argv,
            pass_fds=[theirs.fileno()],
            stdout=told,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        ) as child:
            theirs.close()
            ours.settimeout(COMPILE_SECONDS)
            try:
                socket.send_fds(ours, [json.dumps(request).encode()], list(given.values()))
                message, fds, _, _ = socket.recv_fds(ours, MAX_MESSAGE, MAX_FDS)
            except (TimeoutError, ConnectionError):
                child.kill()
                message, fds = b"", []
            child.wait()
            told.seek(0)
            output = told.read().decode(errors="replace")
    # A fatal error inside LLVM ends the child without an answer.
    answer = json.loads(message) if message else {"error": f"the compile child ended with {child.returncode}"}
    if "error" in answer:
        for fd in fds:
            os.close(fd)
        raise KernelError(_explain(answer["error"], output, guarded=is_guarded()))
    if "other_shape" in answer:
        raise _OtherError("the maps that are pinned have other shapes")
    return answer, dict(zip([*answer["programs"], *answer["maps"]], fds, strict=True))


def _request(recipe: _Recipe, secrets: tuple[int, int], given: Iterable[str]) -> dict[str, Any]:
    """Write what the child is asked (kernel/compiler.py)."""
    folder = bpf_folder()
    multiplier, addend = secrets
    return {
        "source": str(folder / "lb_hop.c"),
        "includes": [str(folder)],
        "headers": str(folder / "include"),
        "defines": recipe.defines | {"LBH_HASH_MULTIPLIER": f"{multiplier}ull", "LBH_HASH_ADDEND": f"{addend}ull"},
        "programs": recipe.programs,
        "maps": _MAPS,
        "given": list(given),
    }


def _compile(recipe: _Recipe, secrets: tuple[int, int], given: Mapping[str, int]) -> tuple[dict[str, int], float]:
    """Compile and load for the maps given and new ones; answers the descriptors by name and the seconds it took.

    Raises _OtherError if a map is not as the source wants it.
    """
    answer, fds = _ask_child(_request(recipe, secrets, given), given)
    return fds, answer["seconds"]


def load(
    sizes: Sizes | None = None, folder: PinFolder | None = None, *, xdp: bool = False, node_name: str = ""
) -> Loaded:
    """Take over what is pinned in the folder, or load anew; raises KernelError with what to do about it.

    Without a folder, or where the kernel lets nothing be pinned there, all ends with this process. `xdp`: whether the
    program for XDP is wanted too.
    """
    sizes = sizes or Sizes()
    recipe = _recipe(sizes, xdp=xdp)
    if not folder:
        return _load_anew(sizes, recipe, node_name, None)
    if (found := folder.find()) is not None:
        pins, state = found
        if state.netns != own_netns():
            raise KernelError(
                f"{folder.path} has the counters of another network namespace: give each node a place of its own by "
                "OTEL_LB_HOP_PIN_PATH, or, if that one is gone, run otel-lb-hop uninstall"
            )
        try:
            return _take_over(sizes, recipe, node_name, pins, state)
        except _OtherError as error:
            log.warning("%s: all series begin anew, with a new start time", error)
    try:
        pins = folder.make()
    except OSError as error:
        log.warning("%s takes no pins: %s", folder.path, error)
        return _load_anew(sizes, recipe, node_name, None)
    return _load_anew(sizes, recipe, node_name, pins)


class _OtherError(Exception):
    """What is pinned is not what this agent could go on with; the message says why."""


def _load_anew(sizes: Sizes, recipe: _Recipe, node_name: str, pins: Pins | None) -> Loaded:
    secrets = int.from_bytes(os.urandom(8)), int.from_bytes(os.urandom(8))
    fds, seconds = _compile(recipe, secrets, {})
    names = bpf.create_map(bpf.MapShape(bpf.HASH, 4, NAME_BYTES, sizes.vip_ports + sizes.hops), _NAMES)
    notes = bpf.create_map(NOTES_SHAPE, NOTES)
    state = State(_layout(sizes), recipe.build, secrets, time.time_ns(), own_netns(), node_name, _RING, "", 0)
    notes.put(STATE, pack_state(state))
    if pins:
        for name in _MAPS:
            pins.pin_map(name, fds[name])
        for name in recipe.programs:
            pins.pin_program(name, fds[name])
        pins.pin_map(_NAMES, names.fd)
        pins.pin_map(NOTES, notes.fd)  # last: with it the generation is complete
    return _loaded(fds | {_NAMES: names.fd, NOTES: notes.fd}, sizes, state, pins, compile_seconds=seconds)


def _take_over(sizes: Sizes, recipe: _Recipe, node_name: str, pins: Pins, state: State) -> Loaded:
    """Go on with what is pinned; raises _OtherError if that cannot be."""
    if state.layout != _layout(sizes):
        raise _OtherError("the layout of the counters has changed")
    if state.node_name != node_name:
        raise _OtherError(f"the node was called {state.node_name} before, now {node_name}")
    try:
        fds = {name: pins.open_map(name) for name in (*_MAPS, _NAMES, NOTES) if name != _RING}
        fds[_RING] = pins.open_map(state.ring)
        # An agent may have been killed before it wrote down that it made another.
        pins.unpin_maps_except(_RING, (state.ring, state.previous_ring))
        previous = pins.open_map(state.previous_ring) if state.previous_ring else None
        if state.build == recipe.build:
            fds |= {name: pins.open_program(name) for name in recipe.programs}
            return _loaded(fds, sizes, state, pins, inherited=True, previous=previous, compile_seconds=0.0)
    except FileNotFoundError as error:
        raise _OtherError(f"what is pinned is not whole, {error.filename or 'a part'} is missing") from error
    log.info("the programs have changed: new ones go on with the same counters")
    given = {name: fds[name] for name in _MAPS}
    # One at a time: a ring that is still to be read keeps its successor.
    new_ring = previous is None and bpf.map_shape(fds[_RING]).entries != sizes.ring_pages * mmap.PAGESIZE
    if new_ring:
        del given[_RING]
    made, seconds = _compile(recipe, state.hash_secrets, given)
    notes = Map(fds[NOTES], 4, NOTE_BYTES)
    # Until all are there nobody takes the pinned programs for these.
    notes.put(STATE, pack_state(state._replace(build="")))
    for name in recipe.programs:
        pins.pin_program(name, made[name])
    pins.unpin_programs_except(recipe.programs)
    if new_ring:
        previous = fds.pop(_RING)
        name = f"{_RING}_{os.urandom(4).hex()}"
        pins.pin_map(name, made[_RING])
        state = state._replace(ring=name, previous_ring=state.ring)
    state = state._replace(build=recipe.build)
    notes.put(STATE, pack_state(state))
    for name in made.keys() & fds.keys():
        os.close(fds[name])  # the child has sent another descriptor of it
    return _loaded(fds | made, sizes, state, pins, inherited=True, previous=previous, compile_seconds=seconds)


def retire_ring(loaded: Loaded, records: int) -> None:
    """Let the previous ring go, which was read to its end; `records` went through it and those before it."""
    if loaded.pins:
        state = loaded.state._replace(previous_ring="", earlier_records=records)
        loaded.notes.put(STATE, pack_state(state))
        loaded.pins.unpin_map(loaded.state.previous_ring)
    if loaded.previous_records_fd is not None:
        os.close(loaded.previous_records_fd)


def _loaded(
    fds: Mapping[str, int],
    sizes: Sizes,
    state: State,
    pins: Pins | None,
    *,
    inherited: bool = False,
    previous: int | None = None,
    compile_seconds: float,
) -> Loaded:
    return Loaded(
        programs={name: fd for name, fd in fds.items() if name in PROGRAMS | XDP_PROGRAMS},
        vip_ports=Map(fds["vip_ports"], layout.VIP_KEY.size, layout.VIP_VALUE.size),
        backends=Map(fds["backends"], layout.BACKEND_KEY.size, 4),
        vip_stats=Map(fds["vip_stats"], 4, layout.VIP_STATS_WORDS * 8, per_cpu=True),
        hop_stats=Map(fds["hop_stats"], 4, layout.HOP_STATS_WORDS * 8, per_cpu=True),
        places=Map(fds["places"], layout.PREFIX.size, layout.PLACE.size),
        uplinks=Map(fds["uplinks"], 4, layout.UPLINKS.size),
        settings=Map(fds["settings"], 4, layout.SETTINGS.size),
        events=Map(fds["events"], 4, 8, per_cpu=True),
        told_flows=Map(fds["told_flows"], layout.FLOW_BYTES, layout.TOLD_BYTES),
        names=Map(fds[_NAMES], 4, NAME_BYTES),
        notes=Map(fds[NOTES], 4, NOTE_BYTES),
        records_fd=fds[_RING],
        sizes=sizes,
        state=state,
        pins=pins,
        inherited=inherited,
        previous_records_fd=previous,
        compile_seconds=compile_seconds,
    )


class Loading(NamedTuple):
    """A load under way: where it pins, and what comes of it, Loaded or KernelError."""

    pinning: Pinning
    loaded: Future[Loaded]


def begin_loading(sizes: Sizes, pinning: Pinning, node_name: str, *, xdp: bool) -> Loading:
    """Load in the background; that ends with the process."""
    future: Future[Loaded] = Future()

    def work() -> None:
        try:
            future.set_result(load(sizes, pinning.folder, xdp=xdp, node_name=node_name))
        except BaseException as error:  # noqa: BLE001 - whatever it is, whoever waits has to hear of it
            future.set_exception(error)

    threading.Thread(target=work, name="load", daemon=True).start()
    return Loading(pinning, future)
