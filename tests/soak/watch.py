"""What an agent's process uses and says, looked at once a second from outside."""

from __future__ import annotations

import contextlib
import os
import re
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Self

from tests.bench.measure import rss_mib
from tests.soak.verdict import Holding, Sample

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tests.lab.agent import Agent
    from tests.soak.seats import Seat

LOOK_SECONDS = 1.0
_ID = re.compile(r"^(map|prog|link)_id:\t(\d+)$", re.MULTILINE)


class _Process(NamedTuple):
    cpu_seconds: float
    threads: int


def holding(pid: int) -> Holding:
    """Count what a process holds."""
    descriptors, ids = 0, set()
    for path in Path(f"/proc/{pid}/fdinfo").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed since it was listed
            ids |= {*_ID.findall(path.read_text())}
            descriptors += 1
    counts = [sum(kind == wanted for kind, _ in ids) for wanted in ("map", "prog", "link")]
    return Holding(descriptors, _process(pid).threads, *counts)


def look(agent: Agent, since: float) -> Sample:
    """Take one sample; OSError if the process has gone."""
    pid = agent.process.pid
    readiness = agent.readyz()
    parts = readiness.content.get("parts", {})
    return Sample(
        time.monotonic() - since,
        rss_mib(pid),
        _process(pid).cpu_seconds,
        holding(pid),
        readiness.status,
        tuple(sorted(name for name, part in parts.items() if not part["healthy"])),
        str(parts.get("ledger", {}).get("detail", "")) if not parts.get("ledger", {}).get("healthy", True) else "",
    )


class Watch:
    """Samples the agents of all seats while inside; `samples` by the node's name."""

    def __init__(self, seats: Sequence[Seat]) -> None:
        self._seats = seats
        self._enough = threading.Event()
        self.began = time.monotonic()
        self.samples: dict[str, list[Sample]] = {seat.node.name: [] for seat in seats}

    def __enter__(self) -> Self:
        self._thread = threading.Thread(target=self._run, name="watch")
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._enough.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._enough.wait(LOOK_SECONDS):
            for seat in self._seats:
                agent = seat.ready
                if agent is None:
                    continue
                with contextlib.suppress(OSError):
                    sample = look(agent, self.began)
                    if seat.ready is agent:  # else it was killed while it was looked at
                        self.samples[seat.node.name].append(sample)


def _process(pid: int) -> _Process:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return _Process((int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK"), int(fields[17]))
