"""The pins: names in a bpffs under which maps, programs and links outlive the agent.

    PIN_PATH/                 locked (flock) by the agent that counts
        GENERATION/           what one load made; complete once it has `notes`
            NAME              a map
            program_NAME
            link_IFINDEX_PROGRAM

The kernel frees what has neither a name nor a process that holds it: to unlink is to take off.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import re
import secrets
import stat
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from otel_lb_hop.core.layout import LAYOUT_VERSION
from otel_lb_hop.core.pinned import NOTE_BYTES, STATE, State, unpack_state
from otel_lb_hop.errors import KernelError, WireError
from otel_lb_hop.kernel import bpf

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

log = logging.getLogger(__name__)

NOTES = "notes"
NOTES_SHAPE = bpf.MapShape(bpf.ARRAY, 4, NOTE_BYTES, 3)
_PROGRAM, _LINK = "program_", "link_"
_BESIDE = "_new"
_GENERATION = re.compile(r"v[0-9]+_[0-9a-f]{8}")
_MOUNTS = Path("/proc/self/mountinfo")


class Pins:
    """The folder of one generation."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def pin_map(self, name: str, fd: int) -> None:
        """Keep a map, in place of another of that name."""
        self._pin(name, fd)

    def open_map(self, name: str) -> int:
        """Open a map."""
        return bpf.open_pinned(self._folder / name)

    def pin_program(self, name: str, fd: int) -> None:
        """Keep a program, in place of another of that name."""
        self._pin(_PROGRAM + name, fd)

    def unpin_map(self, name: str) -> None:
        """Let a map go; one that is not there is no error."""
        (self._folder / name).unlink(missing_ok=True)

    def unpin_maps_except(self, prefix: str, kept: Iterable[str]) -> None:
        """Let all maps of names that begin so go but these."""
        self._unpin_except(prefix, set(kept))

    def unpin_programs_except(self, kept: Iterable[str]) -> None:
        """Let all programs go but these."""
        self._unpin_except(_PROGRAM, {_PROGRAM + name for name in kept})

    def _unpin_except(self, prefix: str, names: set[str]) -> None:
        for path in self._folder.iterdir():
            if path.name.startswith(prefix) and path.name not in names:
                path.unlink()

    def open_program(self, name: str) -> int:
        """Open a program."""
        return bpf.open_pinned(self._folder / (_PROGRAM + name))

    def obtain_link(self, ifindex: int, program: str, program_fd: int) -> int | None:
        """Open the link of that program on an interface, made to run exactly this one; None if there is none alive."""
        path = self._link(ifindex, program)
        try:
            fd = bpf.open_pinned(path)
        except FileNotFoundError:
            return None
        try:
            joined = bpf.link_info(fd)
            if joined.ifindex == ifindex:
                if joined.program_id != bpf.program_id(program_fd):
                    bpf.update_link(fd, program_fd)
                return fd
        except OSError:
            os.close(fd)
            raise
        os.close(fd)
        path.unlink()
        return None

    def pin_link(self, ifindex: int, program: str, fd: int) -> None:
        """Keep a link, of which none is pinned; whoever is killed before it is leaves none attached."""
        bpf.pin(fd, self._link(ifindex, program))

    def unpin_link(self, ifindex: int, program: str) -> None:
        """Let a link go; one that is not there is no error."""
        self._link(ifindex, program).unlink(missing_ok=True)

    def unpin_links_except(self, kept: Iterable[tuple[int, str]], undecided: Collection[int]) -> None:
        """Let all links go but these, each an interface and a program, and all those of the interfaces undecided."""
        names = {self._link(ifindex, program).name for ifindex, program in kept}
        prefixes = tuple(f"{_LINK}{ifindex}_" for ifindex in undecided)
        for path in self._folder.iterdir():
            if path.name.startswith(_LINK) and path.name not in names and not path.name.startswith(prefixes or "\0"):
                path.unlink()

    def _link(self, ifindex: int, program: str) -> Path:
        return self._folder / f"{_LINK}{ifindex}_{program}"

    def _pin(self, name: str, fd: int) -> None:
        """Give it a name in one step: there is no moment at which neither it nor what had the name before is pinned."""
        beside = self._folder / f"{name}{_BESIDE}"
        beside.unlink(missing_ok=True)
        bpf.pin(fd, beside)
        beside.rename(self._folder / name)


class PinFolder:
    """PIN_PATH, locked: whoever has it is the only agent that counts here."""

    def __init__(self, path: Path, lock_fd: int) -> None:
        self.path = path
        self._lock_fd = lock_fd

    def find(self) -> tuple[Pins, State] | None:
        """Find the youngest complete generation; one that cannot be read is told in the log and left alone."""
        found = []
        for folder in self._generations():
            try:
                fd = bpf.open_pinned(folder / NOTES)
            except FileNotFoundError:
                continue  # an agent was killed while it made it
            except OSError as error:
                log.warning("%s cannot be opened: %s", folder, error)
                continue
            try:
                found.append((_read_state(fd), folder))
            except WireError as error:
                log.warning("%s: %s", folder, error)
            finally:
                os.close(fd)
        if not found:
            return None
        state, folder = max(found, key=lambda each: each[0].created_ns)
        return Pins(folder), state

    def make(self) -> Pins:
        """Make the folder of a new generation."""
        folder = self.path / f"v{LAYOUT_VERSION}_{secrets.token_hex(4)}"
        folder.mkdir(mode=0o700)
        return Pins(folder)

    def remove_except(self, kept: Pins | None) -> int:
        """Take off all generations but this one; answers how many there were."""
        gone = [folder for folder in self._generations() if not kept or folder != kept._folder]  # noqa: SLF001 - of this module
        for folder in gone:
            # Links first, that nothing counts any more; then the notes, without which nobody takes the rest for whole.
            for path in sorted(
                folder.iterdir(), key=lambda path: (not path.name.startswith(_LINK), path.name != NOTES)
            ):
                path.unlink()
            folder.rmdir()
        return len(gone)

    def remove(self) -> None:
        """Take off everything, the folder too unless it has something of others or is where the bpffs is mounted."""
        self.remove_except(None)
        try:
            self.path.rmdir()
        except OSError as error:
            if error.errno not in {errno.ENOTEMPTY, errno.EBUSY}:
                raise
        os.close(self._lock_fd)

    def _generations(self) -> list[Path]:
        return [path for path in self.path.iterdir() if _GENERATION.fullmatch(path.name) and path.is_dir()]


def _read_state(fd: int) -> State:
    """Read the state from notes; raises WireError if they are another version's."""
    if bpf.map_shape(fd) != NOTES_SHAPE:
        raise WireError("the notes there are of another version")
    return unpack_state(bpf.Map(fd, 4, NOTE_BYTES).get(STATE) or b"")


class Pinning(NamedTuple):
    """Where to pin, or, if that was asked for and cannot be, why not."""

    folder: PinFolder | None
    problem: str | None


def claim(path: Path | None) -> Pinning:
    """Make and lock the folder of pins, if one is wanted; raises KernelError if another agent has it."""
    if path is None:
        return Pinning(None, None)
    filesystem = _filesystem_of(path)
    if filesystem != "bpf":
        return Pinning(
            None,
            f"{path} is on {filesystem} and not on a bpffs; mount one (mount -t bpf bpf {path.parent}; in a pod a "
            f"hostPath volume of {path.parent}), or set OTEL_LB_HOP_PIN_PATH to off",
        )
    try:
        path.mkdir(mode=0o700, exist_ok=True)
        problem = _problem_of(path)
    except OSError as error:
        problem = f"{path} cannot be made: {error.strerror}"
    return Pinning(None, problem) if problem else Pinning(_lock(path), None)


def leave(path: Path) -> str | None:
    """Take off what agents on this node pinned: it would count beside one that pins nothing. Answers what to say of it.

    Pins of another network namespace are another node's.
    """
    try:
        folder = reclaim(path)
        found = folder.find() if folder else None
        if not folder or not found or found[1].netns != own_netns():
            return None
        folder.remove()
    except (KernelError, OSError) as error:
        return f"{path} has programs that count beside this agent, which pins nothing: {error}"
    return f"{path}: what was pinned there is taken off, it would count on beside this agent"


def _problem_of(path: Path) -> str | None:
    """Say why nothing may be pinned in a folder that is there: only its owner may do anything with it."""
    if path.is_mount():
        return f"{path} is where a bpffs is mounted, name a folder in it"
    status = path.stat(follow_symlinks=False)
    if status.st_uid != os.geteuid() or not stat.S_ISDIR(status.st_mode):
        return f"{path} belongs to user {status.st_uid}, who could take it away"
    if not os.access(path, os.W_OK | os.X_OK):
        return f"{path} is not writable"
    path.chmod(0o700)
    return None


def reclaim(path: Path) -> PinFolder | None:
    """Lock the folder of pins if there is one; raises KernelError if an agent has it."""
    return _lock(path) if path.is_dir() and _filesystem_of(path) == "bpf" else None


def _lock(path: Path) -> PinFolder:
    """Lock a folder of pins that is there; raises KernelError if an agent has it."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(fd)
        raise KernelError(
            f"another agent counts here, it holds {path}: stop that one first. Two would count every connection twice"
        ) from error
    return PinFolder(path, fd)


def own_netns() -> int:
    """Name the network namespace of this process by its inode."""
    return Path("/proc/self/ns/net").stat().st_ino


def _filesystem_of(path: Path) -> str:
    """Name the type of the filesystem that a path, there or not, is on (proc_pid_mountinfo(5))."""
    path = Path(os.path.realpath(path))
    depth, kind = -1, "no filesystem"
    for line in _MOUNTS.read_bytes().splitlines():
        mount, _, source = line.partition(b" - ")
        # Space, tab and newline in a path are written in octal.
        name = re.sub(rb"\\([0-7]{3})", lambda octal: bytes([int(octal[1], 8)]), mount.split()[4])
        point = Path(os.fsdecode(name))
        if path.is_relative_to(point) and len(point.parts) >= depth:
            depth, kind = len(point.parts), source.split()[0].decode()
    return kind
