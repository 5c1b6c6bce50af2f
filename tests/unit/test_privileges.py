"""Which capabilities are asked for on which kernel, and what is said when one is missing."""

from __future__ import annotations

import platform
import resource
import subprocess
import sys

import pytest

from otel_lb_hop.errors import KernelError
from otel_lb_hop.kernel.privileges import Capability, Holding, choose, kernel_version, lift_memory_limit, needs

NET_ADMIN, SYS_ADMIN, PERFMON, BPF = 1 << 12, 1 << 21, 1 << 38, 1 << 39
STATUS = """\
Name:\tpython
Uid:\t0\t0\t0\t0
CapInh:\t0000000000000001
CapPrm:\t000000c000001000
CapEff:\t0000008000001000
CapBnd:\t000001ffffffffff
CapAmb:\t0000000000000002
NoNewPrivs:\t1
"""
LOWER = """
import resource
resource.setrlimit(resource.RLIMIT_MEMLOCK, (65536, 65536))
from otel_lb_hop.kernel import privileges
privileges._limit(frozenset())
privileges.lift_memory_limit((5, 11))
try:
    privileges.lift_memory_limit((5, 10))
except privileges.KernelError as error:
    print(error)
"""


def holding(permitted: int, bounding: int = 0) -> Holding:
    """Make one with these permitted."""
    return Holding(permitted, permitted, 0, bounding, 0)


def test_status() -> None:
    """The five sets are read from the text of proc(5)."""
    assert Holding.read(STATUS) == (0xC000001000, 0x8000001000, 1, 0x1FFFFFFFFFF, 2)


@pytest.mark.parametrize("last", [39, 40, 63])
def test_needs(last: int) -> None:
    """A kernel that has CAP_BPF, by its own number or backported, is asked for two."""
    assert [str(capability) for capability in needs(last)] == ["CAP_BPF", "CAP_NET_ADMIN"]


@pytest.mark.parametrize("last", [36, 37, 38])
def test_needs_of_an_old_kernel(last: int) -> None:
    """One that has no CAP_BPF is asked for CAP_SYS_ADMIN, and it is said why."""
    with pytest.raises(KernelError) as caught:
        choose(needs(last), holding(NET_ADMIN), 0)
    assert str(caught.value) == (
        "CAP_SYS_ADMIN is missing, it is needed to load BPF programs and to read their maps: this kernel has no"
        " CAP_BPF, which came with Linux 5.8"
    )
    assert choose(needs(last), holding(NET_ADMIN | SYS_ADMIN), 0) == {Capability.NET_ADMIN, Capability.SYS_ADMIN}


@pytest.mark.parametrize(
    ("held", "chosen"),
    [
        (BPF | NET_ADMIN, {39, 12}),
        ((1 << 41) - 1, {39, 12}),
        (SYS_ADMIN | NET_ADMIN, {21, 12}),
    ],
)
def test_choose(held: int, chosen: set[int]) -> None:
    """The narrow one is taken where it is held; CAP_SYS_ADMIN stands for it, and never for CAP_NET_ADMIN."""
    assert choose(needs(40), holding(held), 0) == chosen


@pytest.mark.parametrize(
    ("held", "bounding", "user", "missing", "hint"),
    [
        (BPF | PERFMON, 0, 0, ["CAP_NET_ADMIN"], False),
        (SYS_ADMIN, (1 << 41) - 1, 0, ["CAP_NET_ADMIN"], False),
        (NET_ADMIN, NET_ADMIN, 1000, ["CAP_BPF"], False),
        (0, BPF | PERFMON, 1000, ["CAP_BPF", "CAP_NET_ADMIN"], False),
        (0, BPF | NET_ADMIN, 1000, ["CAP_BPF", "CAP_NET_ADMIN"], True),
    ],
)
def test_missing(held: int, bounding: int, user: int, missing: list[str], hint: bool) -> None:  # noqa: FBT001
    """Each one that is missing is named; and if only the user stands in the way, that."""
    with pytest.raises(KernelError) as caught:
        choose(needs(40), holding(held, bounding), user)
    told = str(caught.value)
    assert [part.split()[0] for part in told.split("; ")] == missing
    assert ("user 1000 does not hold it" in told) is hint


@pytest.mark.parametrize(("release", "version"), [("5.10.0-27-amd64", (5, 10)), ("6.18", (6, 18)), ("strange", (0, 0))])
def test_kernel_version(release: str, version: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Two numbers, or zeros: older than anything."""
    monkeypatch.setattr(platform, "release", lambda: release)
    assert kernel_version() == version


def test_locked_memory() -> None:
    """Linux before 5.11 counts maps as locked memory: who may not lift the limit is told; later ones do not care."""
    done = subprocess.run([sys.executable, "-c", LOWER], check=True, capture_output=True, text=True)
    assert done.stdout == (
        "CAP_SYS_RESOURCE is missing, it is needed to lift the limit of locked memory (65536 bytes), in which Linux"
        " 5.10 counts BPF maps; with RLIMIT_MEMLOCK unlimited, or with Linux 5.11 and later, it is not needed\n"
    )


def test_locked_memory_of_this_process() -> None:
    """A kernel that does not count leaves the limit as it is."""
    before = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    lift_memory_limit((6, 1))
    assert resource.getrlimit(resource.RLIMIT_MEMLOCK) == before
