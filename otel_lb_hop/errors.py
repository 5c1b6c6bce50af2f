"""The errors of otel-lb-hop. Caught in `cli` and `agent` only; each message says what an operator can do.

LbHopError
├── ConfigError    the environment or the VIP file is wrong: every problem at once, exit code 2
├── KernelError    compiling, loading or attaching failed: exit code 1
├── WireError      bytes from the kernel are not what the layout says: counted, never fatal
└── ClusterError   a request to the API server failed (cluster/failure.py): told on /readyz, tried again
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable


class LbHopError(Exception):
    """Base of all errors that this project raises on purpose."""


class Problem(NamedTuple):
    """One wrong setting or one wrong place of a file: where, what was read, what is accepted."""

    name: str
    read: str
    accepted: str

    def __str__(self) -> str:
        return f"{self.name}: read {self.read!r}, accepted: {self.accepted}"


class ConfigError(LbHopError):
    """All that is wrong with the settings or with the VIP file, told together."""

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(str(problem) for problem in self.problems))


class KernelError(LbHopError):
    """The kernel, or bcc on the way to it, refused; the message says what to do about it."""


class WireError(LbHopError):
    """Bytes do not have the shape that `core.layout` promises."""
