"""What passes between a shipper and whatever takes its records: chunks one way, replies the other."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

REFUSED = "refused"
"""The reason for a loss that the other side decided."""


class Chunk(NamedTuple):
    """Items that are queued, kept and lost together.

    `group` is what they share beside the signal (OTLP: the `Envelope`); chunks of two groups never go in one request.
    """

    group: Any
    payload: Any
    items: int
    """Log records, spans or data points."""
    size_bytes: int


class Reply(NamedTuple):
    """What became of one attempt to send."""

    taken: bool
    rejected: int = 0
    """Of what was taken: items that the other side says it did not keep (OTLP partial success)."""
    retry: bool = False
    """Not taken, but the same may be taken later."""
    retry_after_seconds: float | None = None
    """How long the other side wants to be left alone."""
    detail: str = ""
    """What it said, for a person; also with partial success, where it may be a warning and nothing rejected."""
    too_large: bool = False
    """Not taken, because the request is larger than the other side allows: fewer chunks at once may be taken."""
    reason: str = REFUSED
    """Neither taken nor to be tried again: the word under which the ledger counts the loss."""


class Sink(Protocol):
    """Where the chunks of one signal go: an OTLP endpoint or an exporter of the SDK.

    `send` is called from one thread at a time and raises nothing that it can name in a reply. `close` may be called
    from another thread while `send` hangs; it returns soon, and makes the call return soon if the sink can.
    """

    name: str
    """The exporter's, as the settings name it."""
    place: str
    """Where that is, for the log; may be empty."""

    def send(self, chunks: list[Chunk], timeout_seconds: float | None = None) -> Reply:
        """Make one attempt; never longer than `timeout_seconds` or the sink's own limit, whichever is less."""

    def close(self) -> None:
        """Let go of connections. Nothing is sent any more."""
