"""Kernels of the distribution, and virtme-ng to boot them, in the cache outside the tree; downloaded once.

Debian replaces its kernels every few weeks: where the pinned one has gone, the newest of its series is taken. The
-cloud ones will not do: they lack 9p, by which a guest sees this machine's files.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

from tests.peers import build

VIRTME = "virtme-ng==1.42"
SYSTEM_PYTHON = "/usr/bin/python3"
"""A virtual environment of the cache must not depend on that of a tree."""


class FetchError(Exception):
    """A kernel or virtme-ng could not be had; says why."""


class Series(NamedTuple):
    """Kernels of one series, and the package that is taken while there is one."""

    name: str
    package: str


SERIES = (Series("6.1", "linux-image-6.1.0-56-amd64"), Series("6.12", "linux-image-6.12.117+deb12-amd64"))


class Kernel(NamedTuple):
    """An unpacked kernel."""

    series: str
    version: str
    """As `uname -r` says it there."""
    image: Path


def kernel(series: Series) -> Kernel:
    """Answer the kernel of a series; downloads what the cache lacks."""
    place = _place(series.package)
    if not place.exists():
        package = _available(series)
        place = _place(package)
        with build.locked(place.parent):
            if not place.exists():
                _download(package, place)
    (image,) = place.glob("boot/vmlinuz-*")
    return Kernel(series.name, image.name.removeprefix("vmlinuz-"), image)


def virtme() -> Path:
    """Answer the folder of virtme-ng's programs; installs it once."""
    place = build.cache() / "kernels" / VIRTME.replace("==", "-")
    done = place / "done"
    if not done.exists():
        with build.locked(place.parent):
            if not done.exists():
                shutil.rmtree(place, ignore_errors=True)
                _run(SYSTEM_PYTHON, "-m", "venv", str(place))
                _run(str(place / "bin/pip"), "install", "--quiet", "--disable-pip-version-check", VIRTME)
                done.touch()
    return place / "bin"


def _place(package: str) -> Path:
    return build.cache() / "kernels" / package


def _available(series: Series) -> str:
    """Find the pinned package, or the newest of its series, among those that apt knows."""
    pattern = rf"linux-image-{re.escape(series.name)}\.[0-9][^ ]*[0-9]-amd64"
    listed = re.findall(rf"^({pattern}) - ", _run("apt-cache", "search", "--names-only", f"^{pattern}$"), re.MULTILINE)
    if series.package in listed:
        return series.package
    if not listed:
        raise FetchError(f"apt knows no kernel {series.name} for amd64; after `apt-get update` it may")
    return str(max(listed, key=_numbers))


def _numbers(package: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", package)]


def _download(package: str, place: Path) -> None:
    with tempfile.TemporaryDirectory(prefix="draft-", dir=place.parent) as name:
        draft = Path(name)
        _run("apt-get", "download", package, folder=draft)
        (archive,) = draft.glob("*.deb")
        _run("dpkg", "-x", str(archive), str(draft / "root"))
        (image,) = draft.glob("root/boot/vmlinuz-*")
        _run("depmod", "-b", str(draft / "root"), image.name.removeprefix("vmlinuz-"))
        (draft / "root").rename(place)


def _run(*words: str, folder: Path | None = None) -> str:
    try:
        done = subprocess.run(words, cwd=folder, capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise FetchError(f"{words[0]} is not here; the kernels are Debian's") from error
    if done.returncode:
        raise FetchError(f"{' '.join(words)} ended with {done.returncode}:\n{done.stderr.strip()}")
    return done.stdout
