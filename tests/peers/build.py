"""Builds the peers: `python -m tests.peers.build otelcol` prints the path of the program.

Each folder here that holds a go.mod is a Go module that pins a real program: its own main package, or those that
tools.go imports. A file `ldflags` holds what the linker is told beside `-s -w`. A peer is built once and kept in
XDG_CACHE_HOME (default ~/.cache) under a name that changes with the module's files and with the Go version. Two
builds at once wait for each other, and a peer is in its place whole or not at all.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator

MODULES = Path(__file__).parent
PROGRESS_SECONDS = 10.0
LAST_LINES = 20

Version = tuple[int, ...]


class PeerError(Exception):
    """A peer could not be built; the message ends with what Go said."""


class Go(NamedTuple):
    """A Go toolchain that is new enough: the program and its version, as `go env GOVERSION` writes it."""

    program: Path
    version: str


def peers() -> list[str]:
    """Name every peer that can be built."""
    return sorted(path.parent.name for path in MODULES.glob("*/go.mod"))


def cached(peer: str, go: Go) -> Path:
    """Say where the program of a peer, or the folder of its programs, is or will be once it is built."""
    digest = hashlib.sha256(go.version.encode())
    for path in sorted((MODULES / peer).iterdir()):
        content = path.read_bytes()
        digest.update(f"\n{path.name} {len(content)}\n".encode() + content)
    return cache() / "peers" / digest.hexdigest()[:16] / peer


def cache() -> Path:
    """Say where what is built or fetched once is kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "otel-lb-hop"


def find_go(peer: str) -> Go | str:
    """Find a Go on PATH that can build this peer, or answer what is lacking, as a reason to skip."""
    needed = re.search(r"^go ([0-9.]+)$", (MODULES / peer / "go.mod").read_text(encoding="utf-8"), re.MULTILINE)
    if needed is None:
        raise PeerError(f"{peer}/go.mod names no Go version")
    old = []
    for folder in os.get_exec_path():
        program = shutil.which("go", path=folder)
        if program and (version := _version(Path(program))):
            if _numbers(version) >= _numbers(needed[1]):
                return Go(Path(program), version)
            old.append(f"{program} is {version}")
    found = f"only {', '.join(old)}" if old else "no Go"
    return f"the peer {peer} is built with Go {needed[1]} or newer; on PATH there is {found}"


def build(peer: str) -> Path:
    """Answer the program of a peer, or the folder of its programs; builds what the cache lacks, raises PeerError."""
    go = find_go(peer)
    if isinstance(go, str):
        raise PeerError(go)
    place = cached(peer, go)
    if not place.exists():
        with locked(place.parent):
            if not place.exists():  # who had the lock before may have built it
                _build(peer, go, place)
    return place


def programs(peer: str) -> list[Path]:
    """Answer every program of a peer, as `build` does."""
    place = build(peer)
    return sorted(place.iterdir()) if place.is_dir() else [place]


def _build(peer: str, go: Go, place: Path) -> None:
    with tempfile.TemporaryDirectory(prefix="draft-", dir=place.parent) as draft:
        _run_go(peer, go, Path(draft) / peer)
        (Path(draft) / peer).rename(place)
    _say(f"{peer} is in {place}")


def _run_go(peer: str, go: Go, output: Path) -> None:
    packages = _imports(MODULES / peer / "tools.go")
    # Of several programs Go makes a folder, if the name ends with a slash.
    target, sources = (f"{output}/", packages) if packages else (str(output), ["."])
    flags = f"-ldflags=-s -w {_linker_flags(MODULES / peer / 'ldflags')}".rstrip()
    command = [str(go.program), "build", "-v", "-trimpath", flags, "-o", target, *sources]
    environment = {**_go_environment(), "CGO_ENABLED": "0"}
    started = said = time.monotonic()
    _say(f"building {peer} with {go.version}; with cold caches this takes minutes")
    last: deque[str] = deque(maxlen=LAST_LINES)
    with subprocess.Popen(
        command,
        cwd=MODULES / peer,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        assert process.stdout is not None
        for lines, line in enumerate(process.stdout, start=1):
            last.append(line)
            if (now := time.monotonic()) >= said + PROGRESS_SECONDS:
                said = now
                _say(f"{peer}: {lines} modules and packages, {now - started:.0f} s; {line.strip()}")
    if process.returncode:
        raise PeerError(f"{' '.join(command)} ended with {process.returncode}:\n{''.join(last)}")
    _say(f"{peer}: Go took {time.monotonic() - started:.0f} s")


def _imports(tools: Path) -> list[str]:
    """List the packages that tools.go pins by importing them; none where there is no such file."""
    return re.findall(r'^\s*_ "(.+)"$', tools.read_text(encoding="utf-8"), re.MULTILINE) if tools.exists() else []


def _linker_flags(file: Path) -> str:
    return file.read_text(encoding="utf-8").strip() if file.exists() else ""


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a folder of the cache, made if need be; whoever comes second waits, and is told so."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _say(f"another process works in {folder}; waiting for it")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _go_environment() -> dict[str, str]:
    """Ask for the Go that is installed: none is to be downloaded because a go.mod names a newer one."""
    return {**os.environ, "GOTOOLCHAIN": "local", "GOWORK": "off", "GOFLAGS": ""}


def _version(program: Path) -> str | None:
    command = [str(program), "version"]
    done = subprocess.run(command, env=_go_environment(), capture_output=True, text=True, check=False)
    found = re.search(r"go version (go\S+)", done.stdout)
    return found[1] if found else None


def _numbers(version: str) -> Version:
    """Make `go1.26.8` or `1.25.0` comparable; a release candidate counts as its release."""
    return tuple(int(number) for number in re.findall(r"\d+", version.partition("rc")[0]))


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main(words: list[str]) -> int:
    """Build the named peers and print their paths."""
    if not words or not set(words) <= set(peers()):
        _say(f"usage: python -m tests.peers.build PEER...; the peers are {', '.join(peers())}")
        return 2
    try:
        for peer in words:
            print(*programs(peer), sep="\n")
    except PeerError as error:
        _say(str(error))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
