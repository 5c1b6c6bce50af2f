"""What can go wrong with a request to the API server, told apart as far as the next request depends on it."""

from __future__ import annotations

from enum import Enum, auto

from otel_lb_hop.errors import LbHopError


class Cause(Enum):
    """Why a request failed."""

    UNREACHABLE = auto()
    """No connection came about: configuration, name, network, TLS."""
    UNAUTHORIZED = auto()
    """401: the credentials are not, or no longer, good."""
    EXPIRED = auto()
    """410: the resource version or the continue token is too old."""
    AHEAD = auto()
    """The server knows no such resource version, as after a restored backup."""
    REFUSED = auto()
    """Any other answer that is not 200."""
    GARBLED = auto()
    """An answer that is not what the API promises: something of it may be lost."""
    BROKEN = auto()
    """No answer in time, or one that stopped in the middle."""


class ClusterError(LbHopError):
    """A request to the API server failed; never leaves the room, its text does.

    `retry_after_seconds` is the least time that the server asked to be left alone.
    """

    def __init__(self, message: str, cause: Cause, retry_after_seconds: float = 0.0) -> None:
        super().__init__(message)
        self.cause = cause
        self.retry_after_seconds = retry_after_seconds
