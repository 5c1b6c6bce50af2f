"""The VIP file on disk: when it is read, and when not."""

from __future__ import annotations

import os
import threading
import time
from typing import TYPE_CHECKING

import pytest

from otel_lb_hop.cluster.file_source import FileSource, FileWatcher
from otel_lb_hop.errors import ConfigError, Problem

if TYPE_CHECKING:
    from pathlib import Path


def content(port: int) -> str:
    """Write a file with one Service on this port."""
    return f"services:\n- {{name: a/b, vips: [10.0.0.1], ports: [{{port: {port}}}]}}\n"


def write(path: Path, text: str, mtime: int) -> None:
    """Write a file with a modification time, so that no test depends on the clock's steps."""
    path.write_text(text)
    os.utime(path, (mtime, mtime))


def port_of(source: FileSource) -> int | None:
    """Poll; gives the only Service's port, or None if nothing changed."""
    cluster = source.poll()
    return cluster.vip_ports[0].port if cluster else None


def problems_of(source: FileSource) -> tuple[Problem, ...]:
    """Poll what cannot be read."""
    with pytest.raises(ConfigError) as caught:
        source.poll()
    return caught.value.problems


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Name a file."""
    return tmp_path / "vips.yaml"


def test_unchanged(path: Path) -> None:
    """The file is told once, and then not until it changes."""
    write(path, content(80), 1)
    source = FileSource(path)
    assert [port_of(source) for _ in range(3)] == [80, None, None]


@pytest.mark.parametrize(
    ("text", "mtime"),
    [(content(81), 2), (content(81), 1_000_000_000), (content(8080), 1)],
)
def test_changed_in_place(path: Path, text: str, mtime: int) -> None:
    """A later time or another size is a change."""
    write(path, content(80), 1)
    source = FileSource(path)
    source.poll()
    write(path, text, mtime)
    assert port_of(source) is not None
    assert port_of(source) is None


def test_replaced(path: Path) -> None:
    """A file that is moved over it is a change even with the same size and time."""
    write(path, content(80), 1)
    source = FileSource(path)
    source.poll()
    write(path.with_suffix(".new"), content(81), 1)
    path.with_suffix(".new").rename(path)
    assert port_of(source) == 81


def test_touched(path: Path) -> None:
    """A new time with the old content is told again: to look is to read."""
    write(path, content(80), 1)
    source = FileSource(path)
    source.poll()
    os.utime(path, (2, 2))
    assert port_of(source) == 80


def test_config_map(tmp_path: Path) -> None:
    """A ConfigMap volume's swap of its ..data link is seen, forth and back, though the path's own link stays."""
    for name, port in (("..2026_01", 80), ("..2026_02", 81)):
        (tmp_path / name).mkdir()
        write(tmp_path / name / "vips.yaml", content(port), 1)
    (tmp_path / "vips.yaml").symlink_to("..data/vips.yaml")
    source = FileSource(tmp_path / "vips.yaml")
    seen = []
    for target in ("..2026_01", "..2026_01", "..2026_02", "..2026_01"):
        (tmp_path / "..data_tmp").symlink_to(target)
        (tmp_path / "..data_tmp").rename(tmp_path / "..data")
        seen += [port_of(source), port_of(source)]
    assert seen == [80, None, None, None, 81, None, 80, None]


def test_missing(path: Path) -> None:
    """A file that is not there is told at each call, with its path, and read as soon as it is there."""
    source = FileSource(path)
    for _ in range(2):
        assert problems_of(source) == (Problem(str(path), "No such file or directory", "a readable VIP file"),)
    write(path, content(80), 1)
    assert port_of(source) == 80


def test_folder(tmp_path: Path) -> None:
    """A folder is no file, and the message says so."""
    (problem,) = problems_of(FileSource(tmp_path))
    assert (problem.name, problem.read) == (str(tmp_path), "Is a directory")


def test_link_to_itself(path: Path) -> None:
    """Whatever keeps the file from being opened is told in the system's words."""
    path.symlink_to(path)
    assert [problem.read for problem in problems_of(FileSource(path))] == ["Too many levels of symbolic links"]


def test_away_and_back(path: Path) -> None:
    """A file that comes back as it was is told again, so that the failure in between is over."""
    write(path, content(80), 1)
    source = FileSource(path)
    assert port_of(source) == 80
    aside = path.rename(path.with_suffix(".aside"))
    assert problems_of(source)
    aside.rename(path)
    assert port_of(source) == 80


def test_wrong_then_right(path: Path) -> None:
    """A wrong file is told once and not read again until it changes; then all is well."""
    write(path, content(0), 1)
    source = FileSource(path)
    (problem,) = problems_of(source)
    assert problem.name == f"{path} line 2: services[0].ports[0].port"
    assert problem.read == "0"
    assert source.poll() is None
    write(path, content(80), 2)
    assert port_of(source) == 80


def test_right_then_wrong_then_right(path: Path) -> None:
    """After a wrong version the same right one as before is told anew."""
    write(path, content(80), 1)
    source = FileSource(path)
    assert port_of(source) == 80
    write(path, "services: [", 2)
    assert problems_of(source)
    write(path, content(80), 3)
    assert port_of(source) == 80


def test_not_text(path: Path) -> None:
    """Bytes that are no UTF-8 are told with the file's path and the line."""
    path.write_bytes(b"services:\n\xff")
    assert problems_of(FileSource(path)) == (Problem(f"{path} line 2", "byte 0xff", "text in UTF-8"),)


def test_a_fifo_is_told_and_not_waited_for(tmp_path: Path) -> None:
    """What is no regular file is a problem at once, not a wait for a writer."""
    path = tmp_path / "vips.yaml"
    os.mkfifo(path)
    with pytest.raises(ConfigError, match="not a regular file"):
        FileSource(path).poll()


def test_watcher(path: Path) -> None:
    """The newest content is told once and wakes the loop; an error stays until the file is good again."""
    woken: list[None] = []
    write(path, content(80), 1)
    watcher = FileWatcher(FileSource(path), lambda: woken.append(None))
    watcher.read()
    write(path, content(81), 2)
    watcher.read()
    taken = watcher.take()
    assert taken is not None
    assert [vip_port.port for vip_port in taken.vip_ports] == [81]
    assert watcher.take() is None
    assert (len(woken), watcher.error) == (2, None)
    confirmed_ns = watcher.confirmed_ns
    write(path, "services: []\nwrong: 1\n", 3)
    with pytest.raises(ConfigError):
        watcher.read()
    watcher.read()  # not read again, and as wrong as before
    assert "wrong" in str(watcher.error)
    assert (watcher.take(), watcher.confirmed_ns) == (None, confirmed_ns)
    path.unlink()
    with pytest.raises(ConfigError):
        watcher.read()
    assert "No such file" in str(watcher.error)
    write(path, content(81), 2)
    watcher.read()
    assert watcher.error is None
    assert watcher.take() == taken
    assert watcher.confirmed_ns > confirmed_ns


def test_watcher_thread(path: Path) -> None:
    """Started, it sees changes by itself, survives a bad file, and ends when closed."""
    woken = threading.Event()
    write(path, content(80), 1)
    watcher = FileWatcher(FileSource(path), woken.set, poll_seconds=0.01)
    watcher.start()
    assert woken.wait(10)
    woken.clear()
    write(path, "[", 2)
    while watcher.error is None:
        time.sleep(0.01)
    write(path, content(81), 3)
    assert woken.wait(10)
    watcher.close()
    assert watcher.error is None
