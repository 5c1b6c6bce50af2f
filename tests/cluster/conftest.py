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
def lab(request: pytest.FixtureRequest) -> Iterator[Lab]:
    """Build nodes, each in a zone, with pods that serve TCP and UDP; nothing of it is left afterwards.

    It has two nodes with a pod each, unless a file gives `lab` other (nodes, pods of each) as its parameter.
    """
    with Lab(*getattr(request, "param", ())) as built:
        for pod in built.pods:
            pod.serve(TARGET_PORT)
            pod.serve_udp(TARGET_PORT)
        yield built
        inside = {*reaper.lab_processes(reaper.lab_namespaces(built.name))}
        servers = {*reaper.lab_processes([pod.netns for pod in built.pods])}
        assert inside == servers, "a test has left a process behind"
    assert reaper.lab_namespaces(built.name) == []
    assert not built.directory.exists()


@pytest.fixture(scope="module")
def plane(lab: Lab) -> Iterator[ControlPlane]:
    """Run an API server that knows the lab's nodes."""
    with ControlPlane(lab) as running:
        running.apply(*map(objects.node, lab.nodes))
        yield running
