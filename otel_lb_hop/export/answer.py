"""What an OTLP server answers: partial success, status with RetryInfo, Retry-After. Bytes and texts in, values out.

Read by hand, since the official classes cost megabytes for a few fields. Whatever a server sends is somebody else's
bytes: what cannot be read raises ValueError or is left out, and no text gets longer than `DETAIL_CHARACTERS`.
"""

from __future__ import annotations

import math
from datetime import UTC
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Final

from otel_lb_hop.export.wire import DELIMITED, FIXED32, FIXED64, VARINT

if TYPE_CHECKING:
    from collections.abc import Iterator

DETAIL_CHARACTERS: Final = 300

_MAX_VARINT_BYTES = 10
_INT64_SIGN = 1 << 63
_FIXED_BYTES = {FIXED64: 8, FIXED32: 4}


def one_line(text: str) -> str:
    """Make a short line of what a server said; what cannot be printed becomes a blank."""
    line = " ".join("".join(sign if sign.isprintable() else " " for sign in text[: 2 * DETAIL_CHARACTERS]).split())
    return line if len(line) <= DETAIL_CHARACTERS else line[: DETAIL_CHARACTERS - 1] + "…"


def partial_success(body: bytes) -> tuple[int, str]:
    """Read Export{Logs,Trace,Metrics}ServiceResponse: how many items were rejected, and the message.

    Field 1 is partial_success: rejected_* 1, error_message 2, the same for all three. Raises ValueError.
    """
    rejected, message = 0, ""
    for part in _delimited(body, 1):
        for number, value in _fields(part):
            if number == 1 and isinstance(value, int):
                rejected = value
            elif number == 2 and isinstance(value, bytes):  # noqa: PLR2004 - a field number
                message = value.decode("utf-8", "replace")
    return (0 if rejected >= _INT64_SIGN else rejected), one_line(message)


def status_message(body: bytes) -> str:
    """Read the message of a google.rpc.Status, field 2; empty if it is none."""
    try:
        messages = _delimited(body, 2)
    except ValueError:
        return ""
    return one_line(messages[-1].decode("utf-8", "replace")) if messages else ""


def status_retry_seconds(body: bytes) -> float | None:
    """Find RetryInfo among the details of a google.rpc.Status; None if there is none.

    Status: details 3; Any: type_url 1, value 2.
    """
    try:
        for detail in _delimited(body, 3):
            if any(url.endswith(b"/google.rpc.RetryInfo") for url in _delimited(detail, 1)):
                return retry_info_seconds(b"".join(_delimited(detail, 2)))
    except ValueError:
        return None
    return None


def retry_info_seconds(body: bytes) -> float | None:
    """Read a google.rpc.RetryInfo: retry_delay 1, a Duration: seconds 1, nanos 2. None if it is none."""
    try:
        delay = dict(_fields(b"".join(_delimited(body, 1))))
    except ValueError:
        return None
    seconds, nanos = delay.get(1, 0), delay.get(2, 0)
    if not (isinstance(seconds, int) and isinstance(nanos, int)) or max(seconds, nanos) >= _INT64_SIGN:
        return 0.0  # a delay below zero
    return seconds + nanos / 1e9


def retry_after_seconds(value: str | None, date: str | None, now_seconds: float) -> float | None:
    """Read Retry-After, seconds or an HTTP date (RFC 9110 10.2.3); None if neither.

    A date is counted from the answer's own `date`, so that clocks need not agree; without one from `now_seconds` of the
    epoch.
    """
    if not value:
        return None
    try:
        seconds = float(value)
    except ValueError:
        moment = _moment_seconds(value)
        if moment is None:
            return None
        sent = _moment_seconds(date or "")
        seconds = moment - (now_seconds if sent is None else sent)
    return max(0.0, seconds) if math.isfinite(seconds) else None


def _moment_seconds(date: str) -> float | None:
    """Read an HTTP date as seconds of the epoch."""
    try:
        moment = parsedate_to_datetime(date)
        return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
    except (ValueError, OverflowError):
        return None


def _delimited(body: bytes, wanted: int) -> list[bytes]:
    return [value for number, value in _fields(body) if number == wanted and isinstance(value, bytes)]


def _fields(body: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Take a message apart; raises ValueError where it is none."""
    at = 0
    while at < len(body):
        key, at = _varint(body, at)
        wire_type = key & 7
        if wire_type == VARINT:
            number, at = _varint(body, at)
            yield key >> 3, number
            continue
        if wire_type == DELIMITED:
            length, at = _varint(body, at)
        elif wire_type in _FIXED_BYTES:
            length = _FIXED_BYTES[wire_type]
        else:
            raise ValueError(f"wire type {wire_type}")
        if at + length > len(body):
            raise ValueError("cut short")
        yield key >> 3, body[at : at + length]
        at += length


def _varint(body: bytes, at: int) -> tuple[int, int]:
    number = 0
    for index, byte in enumerate(body[at : at + _MAX_VARINT_BYTES]):
        number |= (byte & 0x7F) << 7 * index
        if byte < 0x80:  # noqa: PLR2004 - the bit that says more is coming
            return number & (1 << 64) - 1, at + index + 1
    raise ValueError("no end of a number")
