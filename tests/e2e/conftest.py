"""The lab that the tests of one file share, and the proof that they leave nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.lab import Lab, reaper

if TYPE_CHECKING:
    from collections.abc import Iterator

TARGET_PORT = 8080


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    """Build two nodes in two zones with a serving pod each; nothing of it is left afterwards."""
    with Lab() as built:
        for pod in built.pods:
            pod.serve(TARGET_PORT)
        yield built
        inside = {*reaper.lab_processes(reaper.lab_namespaces(built.name))}
        servers = {*reaper.lab_processes([pod.netns for pod in built.pods])}
        assert inside == servers, "a test has left a process behind"
    assert reaper.lab_namespaces(built.name) == []
