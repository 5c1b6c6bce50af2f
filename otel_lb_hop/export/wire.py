"""Protobuf by hand, as much of it as OTLP needs: fields, attributes, and the envelope that all three signals share.

Encoding: https://protobuf.dev/programming-guides/encoding/; messages: opentelemetry-proto 1.x. Field numbers stand
beside the functions that write them; tests hold every message to what the official classes read.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

VARINT, FIXED64, DELIMITED, FIXED32 = 0, 1, 2, 5
"""Wire types."""

_ONE_BYTE = 0x80
_MASK64 = (1 << 64) - 1


def varint(number: int) -> bytes:
    """Write an integer; a negative one as int64 does, in two's complement of 64 bits."""
    if 0 <= number < _ONE_BYTE:
        return bytes((number,))
    number &= _MASK64
    out = bytearray()
    while number >= _ONE_BYTE:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    out.append(number)
    return bytes(out)


def tag(field: int, wire_type: int) -> bytes:
    """Write what stands before a field's value."""
    return varint(field << 3 | wire_type)


def delimited(field: int, body: bytes) -> bytes:
    """Write a string, bytes or an embedded message."""
    return tag(field, DELIMITED) + varint(len(body)) + body


def text(field: int, value: str) -> bytes:
    """Write a string; what cannot be UTF-8 (a lone surrogate) becomes a question mark."""
    return delimited(field, value.encode("utf-8", "replace"))


def fixed64(field: int, value: int) -> bytes:
    """Write an unsigned 64-bit integer of fixed width, as times are."""
    return tag(field, FIXED64) + struct.pack("<Q", value)


def attribute(field: int, name: str, value: str | bool | float) -> bytes:  # noqa: FBT001 - it is the value
    """Write a KeyValue: key 1, value 2; the value an AnyValue: string 1, bool 2, int 3, double 4."""
    if isinstance(value, str):
        any_value = text(1, value)
    elif isinstance(value, bool):
        any_value = tag(2, VARINT) + varint(value)
    elif isinstance(value, int):
        any_value = tag(3, VARINT) + varint(value)
    else:
        any_value = tag(4, FIXED64) + struct.pack("<d", value)
    return delimited(field, text(1, name) + delimited(2, any_value))


def attributes(field: int, pairs: Mapping[str, str | int | float | bool]) -> bytes:
    """Write attributes as a repeated field."""
    return b"".join(attribute(field, name, value) for name, value in pairs.items())


class Envelope:
    """Who speaks: resource and scope, around the items of one request.

    Export{Logs,Trace,Metrics}ServiceRequest, Resource{Logs,Spans,Metrics} and Scope{Logs,Spans,Metrics} have the same
    field numbers: request 1 = Resource*; Resource*: resource 1, Scope* 2, schema_url 3; Scope*: scope 1, items 2,
    schema_url 3.
    """

    def __init__(
        self,
        resource: Mapping[str, str | int | float | bool],
        scope_name: str,
        scope_version: str,
        schema_url: str,
    ) -> None:
        self._resource = delimited(1, attributes(1, resource))
        self._scope = delimited(1, text(1, scope_name) + text(2, scope_version))
        self._schema_url = text(3, schema_url)

    def wrap(self, items: Sequence[bytes]) -> bytes:
        """Make a request around items, each already written as field 2 of Scope*."""
        scoped_bytes = len(self._scope) + sum(map(len, items)) + len(self._schema_url)
        scoped_head = tag(2, DELIMITED) + varint(scoped_bytes)
        body_bytes = len(self._resource) + len(scoped_head) + scoped_bytes + len(self._schema_url)
        head = tag(1, DELIMITED) + varint(body_bytes)
        return b"".join((head, self._resource, scoped_head, self._scope, *items, self._schema_url, self._schema_url))
