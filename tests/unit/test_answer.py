"""What servers answer, against the official classes that write it."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
from google.protobuf.duration_pb2 import Duration
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import (  # noqa: TID251 - the official classes
    ExportMetricsPartialSuccess,
    ExportMetricsServiceResponse,
)

from otel_lb_hop.export.answer import (
    DETAIL_CHARACTERS,
    one_line,
    partial_success,
    retry_after_seconds,
    retry_info_seconds,
    status_message,
    status_retry_seconds,
)

# Packages without types.
RetryInfo: Any = importlib.import_module("google.rpc.error_details_pb2").RetryInfo
DebugInfo: Any = importlib.import_module("google.rpc.error_details_pb2").DebugInfo
Status: Any = importlib.import_module("google.rpc.status_pb2").Status

NOW_SECONDS = 784_111_777.0  # Sun, 06 Nov 1994 08:49:37 GMT


@given(st.integers(0, 2**63 - 1), st.text(st.characters(codec="utf-8"), max_size=100))
def test_partial_success_is_read_as_it_was_written(rejected: int, message: str) -> None:
    """Any count, any message."""
    written = ExportMetricsServiceResponse(
        partial_success=ExportMetricsPartialSuccess(rejected_data_points=rejected, error_message=message)
    )
    assert partial_success(written.SerializeToString()) == (rejected, one_line(message))


@given(st.binary(max_size=200))
def test_garbage_is_told_by_a_value_error_alone(body: bytes) -> None:
    """Nothing else may come out, or the thread that sends ends."""
    try:
        rejected, message = partial_success(body)
    except ValueError:
        return
    assert 0 <= rejected < 1 << 63
    assert len(message) <= DETAIL_CHARACTERS


@given(st.binary(max_size=200))
def test_garbage_is_no_status(body: bytes) -> None:
    """All three answer whatever comes."""
    assert len(status_message(body)) <= DETAIL_CHARACTERS
    assert (status_retry_seconds(body) or 0) >= 0
    assert (retry_info_seconds(body) or 0) >= 0


def test_fields_of_later_versions_are_passed_over() -> None:
    """All wire types there are, around the field that counts."""
    later = b"\x18\x96\x01" + b"\x21" + bytes(8) + b"\x2a\x02ab" + b"\x35" + bytes(4)
    assert partial_success(later + b"\x0a\x06" + b"\x18\x01" + b"\x08\x05" + b"\x10\x07" + later) == (5, "")


@pytest.mark.parametrize("body", [b"\x0a", b"\x0a\x05ab", b"\x0b", b"\x09\x00", b"\xff" * 20, b"\x0a\x02\x08\x80"])
def test_what_is_cut_or_unknown_is_a_value_error(body: bytes) -> None:
    """Not a wrong number."""
    with pytest.raises(ValueError, match=r"cut short|wire type|no end"):
        partial_success(body)


def test_the_delay_among_the_details_of_a_status() -> None:
    """Wherever it stands."""
    status = Status(code=8, message="busy")
    assert status_retry_seconds(status.SerializeToString()) is None
    status.details.add().Pack(DebugInfo(detail="stack"))
    assert status_retry_seconds(status.SerializeToString()) is None
    status.details.add().Pack(RetryInfo(retry_delay=Duration(seconds=3, nanos=500_000_000)))
    assert status_retry_seconds(status.SerializeToString()) == 3.5
    assert status_message(status.SerializeToString()) == "busy"


@pytest.mark.parametrize(
    ("delay", "seconds"),
    [(Duration(), 0.0), (Duration(nanos=1_000_000), 0.001), (Duration(seconds=-3), 0.0), (Duration(seconds=60), 60.0)],
)
def test_delays(delay: Duration, seconds: float) -> None:
    """None below zero."""
    assert retry_info_seconds(RetryInfo(retry_delay=delay).SerializeToString()) == seconds


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        (None, None),
        ("", None),
        ("120", 120.0),
        ("0", 0.0),
        ("1.5", 1.5),
        ("-3", 0.0),
        ("nan", None),
        ("inf", None),
        ("soon", None),
        ("Sun, 06 Nov 1994 08:50:37 GMT", 60.0),
        ("Sunday, 06-Nov-94 08:50:37 GMT", 60.0),
        ("Sun, 06 Nov 1994 08:50:37 -0000", 60.0),
        ("Sun, 06 Nov 1994 08:49:37 GMT", 0.0),
        ("Sat, 05 Nov 1994 08:49:37 GMT", 0.0),
        ("Sun, 99 Nov 1994 08:49:37 GMT", None),
    ],
)
def test_retry_after(value: str | None, seconds: float | None) -> None:
    """Seconds and dates."""
    assert retry_after_seconds(value, None, NOW_SECONDS) == seconds


@pytest.mark.parametrize(
    ("date", "seconds"),
    [("Sun, 06 Nov 1994 08:50:00 GMT", 37.0), ("Sun, 06 Nov 1994 08:51:00 GMT", 0.0), ("", 60.0), ("today", 60.0)],
)
def test_a_date_is_counted_from_the_date_of_the_answer(date: str, seconds: float) -> None:
    """Whatever the clock here says, unless the answer says nothing."""
    assert retry_after_seconds("Sun, 06 Nov 1994 08:50:37 GMT", date, NOW_SECONDS) == seconds
    assert retry_after_seconds("7", date, NOW_SECONDS) == 7.0


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("  a\r\n\tb\x00c\x1b[31m ", "a b c [31m"),
        ("x" * 300, "x" * 300),
        ("x" * 301, "x" * 299 + "…"),
        ("x" * 100_000, "x" * 299 + "…"),
    ],
)
def test_one_line(text: str, line: str) -> None:
    """Short, and nothing that a terminal would obey."""
    assert one_line(text) == line
