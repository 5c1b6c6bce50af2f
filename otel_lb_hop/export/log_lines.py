"""The agent's own log as OTLP log records, in a scope of their own beside those of connections."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from otel_lb_hop import semconv
from otel_lb_hop.export import wire
from otel_lb_hop.export.delivery import Chunk

if TYPE_CHECKING:
    from collections.abc import Sequence

LONGEST_TEXT = 16_384
"""Characters of a line or a stack trace that are kept."""
_SEVERITIES = {10: (5, "DEBUG"), 20: (9, "INFO"), 30: (13, "WARN"), 40: (17, "ERROR"), 50: (21, "FATAL")}
"""The levels of Python's logging as OTLP's severities (logs data model, appendix B)."""


class LogLine(NamedTuple):
    """One line of the agent's log. `level` is logging's."""

    time_ns: int
    level: int
    function: str
    text: str
    exception: tuple[str, str, str] | None
    """Type, message and stack trace."""


def encode_lines(lines: Sequence[LogLine], envelope: wire.Envelope) -> list[Chunk]:
    """Make a chunk of lines, none of no lines."""
    if not lines:
        return []
    body = b"".join(wire.delimited(2, _log_record(line)) for line in lines)
    return [Chunk(envelope, body, len(lines), len(body))]


def _log_record(line: LogLine) -> bytes:
    attributes = {semconv.CODE_FUNCTION_NAME: line.function}
    if line.exception:
        names = semconv.EXCEPTION_TYPE, semconv.EXCEPTION_MESSAGE, semconv.EXCEPTION_STACKTRACE
        attributes |= {name: text[:LONGEST_TEXT] for name, text in zip(names, line.exception, strict=True)}
    number, word = _SEVERITIES[max(10, min(50, line.level // 10 * 10))]
    return b"".join(
        (
            wire.fixed64(1, line.time_ns),
            wire.fixed64(11, line.time_ns),
            wire.tag(2, wire.VARINT) + wire.varint(number),
            wire.text(3, word),
            wire.delimited(5, wire.text(1, line.text[:LONGEST_TEXT])),
            wire.attributes(6, attributes),
        )
    )
