"""The cluster that the tests of one file share, and the proof that it leaves nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.cluster import objects
from tests.cluster.control_plane import ControlPlane
from tests.lab import Lab, reaper

if TYPE_CHECKING:
    from collections.abc import Iterator

TARGET_PORT = 8080


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    """Build two nodes in two zones with a pod each, which serves TCP and UDP; nothing of it is left afterwards."""
    with Lab() as built:
        for pod in built.pods:
            pod.serve(TARGET_PORT)
            pod.serve_udp(TARGET_PORT)
        servers = {*reaper.lab_processes([pod.netns for pod in built.pods])}
        yield built
        inside = {*reaper.lab_processes(reaper.lab_namespaces(built.name))}
        assert inside == servers, "a test has left a process behind"
    assert reaper.lab_namespaces(built.name) == []
    assert not built.directory.exists()


@pytest.fixture(scope="module")
def plane(lab: Lab) -> Iterator[ControlPlane]:
    """Run an API server that knows the lab's nodes."""
    with ControlPlane(lab) as running:
        running.apply(*map(objects.node, lab.nodes))
        yield running
