"""The answer to a LIST, taken apart while it comes in. Pure: chunks of bytes in, items out one by one.

With `resourceVersion=0` the API server leaves `limit` out of account and answers with everything in one document, 20 MB
and more. Here it never exists as a whole, neither as text nor as objects.
"""

from __future__ import annotations

import codecs
import json
import re
from enum import Enum, auto
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from otel_lb_hop.cluster.failure import Cause, ClusterError

if TYPE_CHECKING:
    from collections.abc import Iterator

MAX_ITEM_CHARACTERS: Final = 8 * 2**20
"""More than any object that etcd takes (1.5 MiB by default)."""
BATCH_BYTES: Final = 2**16
"""Smaller pieces, such as TLS records, are put together first: the end of each cuts an item that is read twice."""

_skip_space = re.compile("[ \t\n\r]*").match
_decode = json.JSONDecoder().raw_decode


class ListMeta(NamedTuple):
    """What a list says of itself: its version, and the token for its next page (empty when it is complete)."""

    resource_version: str
    continue_token: str


class _Expect(Enum):
    """What comes next in the document."""

    DOCUMENT = auto()
    KEY = auto()
    VALUE = auto()
    END_OF_VALUE = auto()
    ITEM = auto()
    END_OF_ITEM = auto()
    NOTHING = auto()


class ListDecoder:
    """Reads one document. Every method raises ClusterError for what is not a list of the API."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._chunks: list[bytes] = []
        self._waiting_bytes = 0
        self._text = ""
        self._enough = 0
        self._expect = _Expect.DOCUMENT
        self._key = ""
        self._fields: dict[str, Any] = {}

    def feed(self, chunk: bytes) -> Iterator[dict[str, Any]]:
        """Take what came in and give the items that are complete, perhaps later than they could be.

        One by one: an object tree that is gone before the next one comes costs the garbage collector nothing.
        """
        self._chunks.append(chunk)
        self._waiting_bytes += len(chunk)
        # An item that was not complete is tried again when there is twice as much of it: large ones cost no more.
        if self._waiting_bytes >= BATCH_BYTES and self._waiting_bytes + len(self._text) >= self._enough:
            self._decode_chunks(final=False)
            yield from self._items()

    def finish(self) -> Iterator[dict[str, Any]]:
        """Give the last items, when all of the answer has come in."""
        self._decode_chunks(final=True)
        yield from self._items()
        if self._expect is not _Expect.NOTHING:
            raise ClusterError("the answer stopped in the middle of a list", Cause.BROKEN)

    def meta(self) -> ListMeta:
        """Answer what the list says of itself, when it is finished."""
        metadata = self._fields.get("metadata")
        if "items" not in self._fields or not isinstance(metadata, dict) or not metadata.get("resourceVersion"):
            raise _garbled("no list")
        return ListMeta(str(metadata["resourceVersion"]), str(metadata.get("continue") or ""))

    def _decode_chunks(self, *, final: bool) -> None:
        try:
            self._text += self._decoder.decode(b"".join(self._chunks), final)
        except UnicodeDecodeError as error:
            raise _garbled("no UTF-8") from error
        self._chunks.clear()
        self._waiting_bytes = 0

    def _items(self) -> Iterator[dict[str, Any]]:
        """Go as far as the text reaches and keep the rest of it."""
        text = self._text
        done = 0
        try:
            while (at := _skip_space(text, done).end()) < len(text):  # type: ignore[union-attr]  # it matches always
                if self._expect is _Expect.ITEM and text[at] != "]":
                    item, done = _decode(text, at)
                    if not isinstance(item, dict):
                        raise _garbled("an item that is no object")
                    self._expect = _Expect.END_OF_ITEM
                    yield item
                else:
                    done = self._step(text, at)
        except RecursionError as error:
            raise _garbled("too deep") from error
        except (ValueError, IndexError) as error:
            # Whether this is the end of the text so far or nonsense shows only when there is more.
            if len(text) - done > MAX_ITEM_CHARACTERS:
                raise _garbled("no JSON, or an object too large") from error
        self._text = text[done:]
        self._enough = 2 * len(self._text)

    def _step(self, text: str, at: int) -> int:
        """Read what is not an item and answer where it ends; ValueError or IndexError if the text ends before."""
        character = text[at]
        match self._expect, character:
            case (_Expect.DOCUMENT, "{") | (_Expect.END_OF_VALUE, ","):
                self._expect = _Expect.KEY
            case (_Expect.VALUE, "[") if self._key == "items":
                self._fields["items"] = None
                self._expect = _Expect.ITEM
            case _Expect.END_OF_ITEM, ",":
                self._expect = _Expect.ITEM
            case (_Expect.END_OF_ITEM | _Expect.ITEM, "]"):
                self._expect = _Expect.END_OF_VALUE
            case (_Expect.END_OF_VALUE | _Expect.KEY, "}"):
                self._expect = _Expect.NOTHING
            case (_Expect.KEY | _Expect.VALUE, _):
                return self._member(text, at)
            case _:
                raise _garbled(f"{character!r} where the list should go on")
        return at + 1

    def _member(self, text: str, at: int) -> int:
        value, end = _decode(text, at)
        end = _skip_space(text, end).end()  # type: ignore[union-attr]  # it matches always
        follower = text[end]  # without it a number may be cut
        if self._expect is _Expect.VALUE:
            self._fields[self._key] = value
            self._expect = _Expect.END_OF_VALUE
            return end
        if not isinstance(value, str) or follower != ":":
            raise _garbled("a member without name")
        self._key = value
        self._expect = _Expect.VALUE
        return end + 1


def _garbled(what: str) -> ClusterError:
    return ClusterError(f"the answer is not what the API promises: {what}", Cause.GARBLED)
