"""A laboratory with an agent on its first node, shared by all files; files that this kernel cannot run are left out.

Under `make test-kernels` in a guest all are collected, so that what is lacking there is a failure.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from tests.kernels import features
from tests.kernels.scene import Scene, services_of
from tests.lab import Lab, reaper

if TYPE_CHECKING:
    from collections.abc import Iterator

_LACKING = {} if os.environ.get("WITH_EVERY_KERNEL_TEST") else features.lacking()
collect_ignore = sorted(_LACKING)


def pytest_report_header() -> list[str]:
    """Say what is left out."""
    return [f"tests/kernels: without {file}: no {', '.join(names)}" for file, names in sorted(_LACKING.items())]


@pytest.fixture(scope="session")
def lab() -> Iterator[Lab]:
    """Build two nodes with a pod each, nothing of which is left afterwards."""
    with Lab() as built:
        yield built
    assert reaper.lab_namespaces(built.name) == []


@pytest.fixture(scope="session")
def scene(lab: Lab) -> Iterator[Scene]:
    """Run an agent on node1, which takes all the traffic in; what it told adds up at the end."""
    lab.apply(list(services_of(lab).values()), announce={v: [] for v in (f"10.0.70.{n}" for n in range(1, 10))})
    with Scene(lab) as running:
        yield running
