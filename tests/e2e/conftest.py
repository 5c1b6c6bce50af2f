"""The lab that the tests of one file share, and the proof that they leave nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.lab import Lab, reaper
from tests.lab.waiting import wait_for

if TYPE_CHECKING:
    from collections.abc import Iterator

TARGET_PORT = 8080


def strangers(built: Lab) -> set[int]:
    """List the processes in the lab that are no servers of its pods."""
    inside = {*reaper.lab_processes(reaper.lab_namespaces(built.name))}
    return inside - {*reaper.lab_processes([pod.netns for pod in built.pods])}


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    """Build two nodes in two zones with a serving pod each; nothing of it is left afterwards."""
    with Lab() as built:
        for pod in built.pods:
            pod.serve(TARGET_PORT)
        yield built
        # A compile child whose agent was killed ends by itself, once it finds out.
        wait_for("no process that a test has left behind", lambda: strangers(built) == set())
    assert reaper.lab_namespaces(built.name) == []
