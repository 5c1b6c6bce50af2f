"""bpf(2) by hand: the few commands the agent needs once the programs are loaded, on file descriptors.

A map's descriptor is enough to read and write it, so the main process needs no bcc and no libbpf. Attribute
layouts: union bpf_attr in include/uapi/linux/bpf.h. Every function raises OSError as the kernel reports it.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import struct
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_NR_BPF = {"x86_64": 321, "aarch64": 280, "riscv64": 280, "ppc64le": 361, "s390x": 351}.get(platform.machine())
_libc = ctypes.CDLL(None, use_errno=True)

_MAP_CREATE = 0
_MAP_LOOKUP_ELEM = 1
_MAP_UPDATE_ELEM = 2
_MAP_DELETE_ELEM = 3
_MAP_GET_NEXT_KEY = 4
_OBJ_PIN = 6
_OBJ_GET = 7
_PROG_TEST_RUN = 10
_OBJ_GET_INFO_BY_FD = 15
_PROG_QUERY = 16
_MAP_LOOKUP_BATCH = 24
_LINK_CREATE = 28
_LINK_UPDATE = 29
_LINK_DETACH = 34
HASH, ARRAY, RING = 1, 2, 27
"""BPF_MAP_TYPE_HASH, BPF_MAP_TYPE_ARRAY, BPF_MAP_TYPE_RINGBUF."""
_F_NO_PREALLOC = 1
_NO_COMMAND = 0x7FFF_FFFF

BPF_ANY = 0
BPF_F_BEFORE = 1 << 3
BPF_TCX_INGRESS = 46
BPF_TCX_EGRESS = 47
BPF_XDP = 37
XDP_FLAGS_SKB_MODE = 1 << 1
XDP_FLAGS_DRV_MODE = 1 << 2

_MOST_ON_A_HOOK = 64
"""BPF_MPROG_MAX."""
_ATTRIBUTES_SIZE = 128
_BATCH_BYTES = 1 << 17
_BATCH_ENTRIES = 16
"""At least: a bucket of a hash map hardly ever has more."""
_SHORTEST_PACKET = 14
"""BPF_PROG_TEST_RUN wants an Ethernet header at least (net/bpf/test_run.c)."""


def _call(command: int, attributes: ctypes.Array[ctypes.c_char]) -> int:
    if _NR_BPF is None:
        raise OSError(errno.ENOSYS, f"bpf(2): no system call number known for {platform.machine()}")
    result = int(_libc.syscall(_NR_BPF, command, attributes, len(attributes)))
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result


def _bpf(command: int, attributes: bytes) -> int:
    return _call(command, ctypes.create_string_buffer(attributes, _ATTRIBUTES_SIZE))


def _address(buffer: ctypes.Array[ctypes.c_char] | None) -> int:
    return ctypes.addressof(buffer) if buffer is not None else 0


def _cut(data: bytes, size: int, count: int) -> list[bytes]:
    return [data[start : start + size] for start in range(0, count * size, size)]


def possible_cpus() -> int:
    """How many copies a per-CPU value has: the possible CPUs, not those online."""
    with open("/sys/devices/system/cpu/possible", encoding="ascii") as file:  # noqa: PTH123 - one line of sysfs
        last = file.read().strip().split(",")[-1].split("-")[-1]
    return int(last) + 1


class Map:
    """A BPF map by its descriptor. Keys and values are bytes; a per-CPU value is its copies one after another."""

    def __init__(self, fd: int, key_size: int, value_size: int, *, per_cpu: bool = False) -> None:
        self.fd = fd
        self.key_size = key_size
        self.value_size = (value_size + 7 & ~7) * possible_cpus() if per_cpu else value_size
        self._key = ctypes.create_string_buffer(key_size)
        self._value = ctypes.create_string_buffer(self.value_size)

    def _element(self, command: int, key: bytes, flags: int = BPF_ANY) -> None:
        if len(key) != self.key_size:
            raise ValueError(f"a key has {len(key)} bytes, the map wants {self.key_size}")
        self._key.raw = key
        # The kernel refuses a delete with a value.
        value = 0 if command == _MAP_DELETE_ELEM else _address(self._value)
        _bpf(command, struct.pack("=IxxxxQQQ", self.fd, _address(self._key), value, flags))

    def get(self, key: bytes) -> bytes | None:
        """Read one value; None if the map has no such key."""
        try:
            self._element(_MAP_LOOKUP_ELEM, key)
        except FileNotFoundError:
            return None
        return self._value.raw

    def put(self, key: bytes, value: bytes) -> None:
        """Write one value, new or not. For a per-CPU map a value of zeros may be given as b""."""
        self._value.raw = value.ljust(self.value_size, b"\0")
        self._element(_MAP_UPDATE_ELEM, key)

    def delete(self, key: bytes) -> None:
        """Remove one key; one that is not there is no error."""
        try:
            self._element(_MAP_DELETE_ELEM, key)
        except FileNotFoundError:
            return

    def keys(self) -> Iterator[bytes]:
        """Walk over all keys; those that come or go meanwhile may be missed."""
        key: bytes | None = None
        following = ctypes.create_string_buffer(self.key_size)
        while True:
            at = 0
            if key is not None:
                self._key.raw = key
                at = _address(self._key)
            try:
                _bpf(_MAP_GET_NEXT_KEY, struct.pack("=IxxxxQQQ", self.fd, at, _address(following), 0))
            except FileNotFoundError:
                return
            key = following.raw
            yield key

    def items(self, room: int = 0) -> Iterator[tuple[bytes, bytes]]:
        """Read all entries of a hash map, at most `room` by one call, if not told otherwise about 256 KiB of them.

        The kernel reads bucket by bucket, each whole and under its lock, and an entry never changes its bucket
        (__htab_map_lookup_and_delete_batch in kernel/bpf/hashtab.c): what is there throughout comes exactly once, what
        comes or goes meanwhile once or not at all. Linux 5.6 and later.
        """
        room = room or max(_BATCH_ENTRIES, _BATCH_BYTES // self.value_size)
        cursor, following = (ctypes.create_string_buffer(max(4, self.key_size)) for _ in range(2))
        keys, values = (ctypes.create_string_buffer(room * size) for size in (self.key_size, self.value_size))
        at = 0
        more = True
        while more:
            batch = struct.pack(
                "=QQQQIIQQ", at, _address(following), _address(keys), _address(values), room, self.fd, 0, 0
            )
            attributes = ctypes.create_string_buffer(batch, _ATTRIBUTES_SIZE)
            try:
                _call(_MAP_LOOKUP_BATCH, attributes)
            except OSError as error:
                if error.errno == errno.ENOSPC:  # the next bucket alone has more
                    room *= 2
                    keys, values = (ctypes.create_string_buffer(2 * len(each)) for each in (keys, values))
                    continue
                if error.errno != errno.ENOENT:
                    raise
                more = False  # what came with it are the last
            (count,) = struct.unpack_from("=I", attributes, 32)
            yield from zip(_cut(keys.raw, self.key_size, count), _cut(values.raw, self.value_size, count), strict=True)
            cursor, following = following, cursor
            at = _address(cursor)


def run_program(fd: int, packet: bytes = b"", repeat: int = 1, context: bytes = b"") -> tuple[int, bytes, int]:
    """Run a program on a packet by BPF_PROG_TEST_RUN.

    Returns (return value, the packet afterwards, average duration in ns). `context` is the struct __sk_buff or struct
    xdp_md that the program is given; its settable fields (ifindex, ...) are taken over.
    """
    data = ctypes.create_string_buffer(packet.ljust(_SHORTEST_PACKET, b"\0"))
    size = len(data) - 1
    out = ctypes.create_string_buffer(size + 256)
    skb = ctypes.create_string_buffer(context, len(context)) if context else None
    attributes = ctypes.create_string_buffer(
        struct.pack(
            "=IIIIQQIIIIQQ",
            fd, 0, size, len(out), _address(data), _address(out), repeat, 0, len(context), 0, _address(skb), 0,
        ),
        _ATTRIBUTES_SIZE,
    )  # fmt: skip
    while True:
        try:
            _call(_PROG_TEST_RUN, attributes)
            break
        except InterruptedError:
            continue  # a signal came between two repeats; what the program did so far it did
    _, result, _, out_size = struct.unpack_from("=IIII", attributes)
    (duration,) = struct.unpack_from("=I", attributes, 36)
    return result, out.raw[:out_size], duration


def refusal() -> int:
    """Tell the errno of a command that does not exist: EINVAL for whoever may call bpf(2) at all."""
    try:
        _bpf(_NO_COMMAND, b"")
    except OSError as error:
        return error.errno or 0
    return 0


def attach_tcx(fd: int, ifindex: int, attach_type: int) -> int:
    """Attach a tc program by a tcx link, before all others; returns the link's descriptor (Linux 6.6 and later)."""
    return _bpf(_LINK_CREATE, struct.pack("=IIIIIxxxxQ", fd, ifindex, attach_type, BPF_F_BEFORE, 0, 0))


def attach_xdp(fd: int, ifindex: int, mode: int) -> int:
    """Attach an XDP program by a link, in one of the modes XDP_FLAGS_*; returns its descriptor (Linux 5.9 or later)."""
    return _bpf(_LINK_CREATE, struct.pack("=IIII", fd, ifindex, BPF_XDP, mode))


def create_map(shape: MapShape, name: str) -> Map:
    """Make a map: a hash, whose entries take memory when they come, or an array."""
    flags = _F_NO_PREALLOC if shape.kind == HASH else 0
    attributes = struct.pack("=IIIIIII15sx", *shape, flags, 0, 0, name.encode("ascii"))
    return Map(_bpf(_MAP_CREATE, attributes), shape.key_size, shape.value_size)


def pin(fd: int, path: Path) -> None:
    """Give a program, map or link a name in a bpffs; it then lives as long as the name."""
    name = ctypes.create_string_buffer(os.fsencode(path))
    _bpf(_OBJ_PIN, struct.pack("=QI", _address(name), fd))


def open_pinned(path: Path) -> int:
    """Open what is pinned there; answers its descriptor."""
    name = ctypes.create_string_buffer(os.fsencode(path))
    try:
        return _bpf(_OBJ_GET, struct.pack("=QI", _address(name), 0))
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


class LinkInfo(NamedTuple):
    """What a link joins (struct bpf_link_info)."""

    link_id: int
    program_id: int
    ifindex: int
    """0 once the interface was deleted. One that moved to another namespace keeps it, and the link."""


def _info(fd: int) -> ctypes.Array[ctypes.c_char]:
    info = ctypes.create_string_buffer(256)
    _bpf(_OBJ_GET_INFO_BY_FD, struct.pack("=IIQ", fd, len(info), _address(info)))
    return info


def link_info(fd: int) -> LinkInfo:
    """Tell what a link of an interface joins."""
    _, link_id, program_id, ifindex = struct.unpack_from("=IIIxxxxI", _info(fd))
    return LinkInfo(link_id, program_id, ifindex)


class Running(NamedTuple):
    """One program on a hook."""

    program_id: int
    link_id: int
    """0 if it was attached without a link."""


def tcx_programs(ifindex: int, attach_type: int) -> list[Running]:
    """List what is on a tcx hook of an interface of the calling thread's namespace, in the order it runs."""
    program_ids, link_ids = (ctypes.create_string_buffer(4 * _MOST_ON_A_HOOK) for _ in range(2))
    addresses = _address(program_ids), _MOST_ON_A_HOOK, 0, _address(link_ids)
    attributes = ctypes.create_string_buffer(
        struct.pack("=IIIIQIxxxxQQ", ifindex, attach_type, 0, 0, *addresses), _ATTRIBUTES_SIZE
    )
    _call(_PROG_QUERY, attributes)
    (count,) = struct.unpack_from("=I", attributes, 24)
    ids = (struct.unpack_from(f"={count}I", each) for each in (program_ids, link_ids))
    return [Running(*each) for each in zip(*ids, strict=True)]


def program_id(fd: int) -> int:
    """Tell the id of a program (struct bpf_prog_info)."""
    _, number = struct.unpack_from("=II", _info(fd))
    return int(number)


class MapShape(NamedTuple):
    """What a map is (struct bpf_map_info)."""

    kind: int
    key_size: int
    value_size: int
    entries: int
    """How many it can hold; of a ring buffer its bytes."""


def map_shape(fd: int) -> MapShape:
    """Tell the shape of a map."""
    kind, _, *sizes = struct.unpack_from("=IIIII", _info(fd))
    return MapShape(kind, *sizes)


def update_link(fd: int, program_fd: int) -> None:
    """Put another program in a link's place; no packet passes between the two."""
    _bpf(_LINK_UPDATE, struct.pack("=IIII", fd, program_fd, 0, 0))


def detach_link(fd: int) -> None:
    """Take a link's program off, whoever else holds the link; one whose interface has gone is no error (Linux 5.9)."""
    _bpf(_LINK_DETACH, struct.pack("=I", fd))
