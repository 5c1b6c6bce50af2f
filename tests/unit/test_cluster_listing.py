"""The answer to a LIST, decoded piece by piece."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from otel_lb_hop.cluster import listing
from otel_lb_hop.cluster.failure import Cause, ClusterError
from otel_lb_hop.cluster.listing import ListDecoder, ListMeta

ITEMS = [
    {"metadata": {"name": "web", "labels": {"a": '"items":[{', "b": "zürich €"}}, "spec": {"ports": [{"port": 80}]}},
    {"metadata": {"name": "\U0001f600\\"}},
    {},
    {"n": 1.5, "m": -12, "t": [True, None, []]},
]
WHOLE = (
    '{"kind":"ServiceList","apiVersion":"v1","metadata":{"resourceVersion":"4711","continue":"tök"},"items":['
    + ",".join(json.dumps(item, ensure_ascii=False, separators=(",", ":")) for item in ITEMS)
    + "]}\n"
).encode()


def decode(*chunks: bytes) -> tuple[list[dict[str, Any]], ListMeta]:
    """Decode a whole answer that comes in these pieces."""
    decoder = ListDecoder()
    items = [item for chunk in chunks for item in decoder.feed(chunk)]
    items += decoder.finish()
    return items, decoder.meta()


def cause_of(*chunks: bytes) -> Cause:
    """Decode what is no list."""
    with pytest.raises(ClusterError) as caught:
        decode(*chunks)
    return caught.value.cause


@pytest.fixture(params=[1, 40, 2**16])
def _batches(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put pieces together to this size, so that small documents are cut as well."""
    monkeypatch.setattr(listing, "BATCH_BYTES", request.param)


@pytest.mark.usefixtures("_batches")
def test_whole() -> None:
    """Items in order and what the list says of itself."""
    assert decode(WHOLE) == (ITEMS, ListMeta("4711", "tök"))


@pytest.mark.usefixtures("_batches")
def test_byte_by_byte() -> None:
    """Also a character may be cut."""
    assert decode(*(WHOLE[at : at + 1] for at in range(len(WHOLE)))) == (ITEMS, ListMeta("4711", "tök"))


@given(st.lists(st.integers(0, len(WHOLE)), max_size=12), st.sampled_from([1, 7, 64]))
def test_any_split(cuts: list[int], batch: int) -> None:
    """Wherever the pieces end, the items are the same."""
    borders = [0, *sorted(cuts), len(WHOLE)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(listing, "BATCH_BYTES", batch)
        pieces = [WHOLE[begin:end] for begin, end in itertools.pairwise(borders)]
        assert decode(*pieces) == (ITEMS, ListMeta("4711", "tök"))


@pytest.mark.usefixtures("_batches")
def test_truncated_anywhere() -> None:
    """A list that stops at any byte, but for the last line break, is never taken for a whole one."""
    assert {cause_of(WHOLE[:at]) for at in range(len(WHOLE) - 1)} <= {Cause.BROKEN, Cause.GARBLED}
    assert decode(WHOLE[:-1]) == (ITEMS, ListMeta("4711", "tök"))


def test_items_come_before_the_end() -> None:
    """The memory for a list is that of one piece, so items are given as soon as a piece has come in."""
    decoder = ListDecoder()
    item = b'{"a":"' + b"x" * 1000 + b'"},'
    assert [len(list(decoder.feed(b'{"items":[' + item * 100))), len(list(decoder.feed(item * 100)))] == [100, 100]


@pytest.mark.parametrize(
    ("document", "items", "meta"),
    [
        ('{"items":[{"a":1}],"metadata":{"resourceVersion":"5"}}', [{"a": 1}], ListMeta("5", "")),
        ('{"items":null,"metadata":{"resourceVersion":"5","continue":null}}', [], ListMeta("5", "")),
        ('{"items":[],"metadata":{"resourceVersion":"5","continue":""}}', [], ListMeta("5", "")),
        (
            ' { "metadata" : {"resourceVersion":"5"} ,\n"x": 12 , "items" : [ {} , {} ] } \r\n',
            [{}, {}],
            ListMeta("5", ""),
        ),
        ('{"x":{"items":[{"a":1}]},"items":[{}],"metadata":{"resourceVersion":"5"}}', [{}], ListMeta("5", "")),
    ],
)
@pytest.mark.usefixtures("_batches")
def test_shapes(document: str, items: list[object], meta: ListMeta) -> None:
    """Members in any order, space anywhere, items at the top only."""
    raw = document.encode()
    assert decode(*(raw[at : at + 1] for at in range(len(raw)))) == (items, meta)


@pytest.mark.parametrize(
    "document",
    [
        b"{}",
        b'{"kind":"Status","metadata":{}}',
        b'{"items":[]}',
        b'{"metadata":{"resourceVersion":"5"}}',
        b'{"items":[],"metadata":{"resourceVersion":""}}',
        b'{"items":[],"metadata":[]}',
        b'{"items":[1],"metadata":{"resourceVersion":"5"}}',
        b'{"items":[[]],"metadata":{"resourceVersion":"5"}}',
        b"[]",
        b"<html>502 Bad Gateway</html>",
        b'{"items":[{} {}]}',
        b'{"items":[]}{',
        b'{"items" []}',
        b"{5:[]}",
        b'{"items":[{"a":"\xff"}],"metadata":{"resourceVersion":"5"}}',
        b'{"a":' + b"[" * 100_000,
        b'{"items":[{"a":' + b"[" * 100_000,
    ],
)
@pytest.mark.usefixtures("_batches")
def test_no_list(document: bytes) -> None:
    """What is none is never taken for an empty one, which would be the end of all that is known."""
    assert cause_of(document) is Cause.GARBLED


@pytest.mark.parametrize("document", [b"", b"{", b'{"items":[{]}', b'{"a":1' + b"0" * 5000])
def test_maybe_not_all(document: bytes) -> None:
    """What might go on is a list that stopped."""
    assert cause_of(document) is Cause.BROKEN


def test_an_endless_item(monkeypatch: pytest.MonkeyPatch) -> None:
    """An item that does not end is given up at a size that no object has."""
    monkeypatch.setattr(listing, "MAX_ITEM_CHARACTERS", 2**20)
    decoder = ListDecoder()
    pieces = iter([b'{"items":[{"a":"', *[b"x" * 2**16] * 100])
    with pytest.raises(ClusterError, match="too large"):
        list(itertools.chain.from_iterable(map(decoder.feed, pieces)))
    assert len(list(pieces)) >= 60


def test_a_large_item_costs_no_more_than_its_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """While an item is incomplete it is tried again only when there is twice as much of it."""
    tried: list[int] = []
    plain = listing._decode

    def decode_and_note(text: str, at: int) -> Any:  # noqa: ANN401 - as the decoder's
        tried.append(len(text))
        return plain(text, at)

    monkeypatch.setattr(listing, "_decode", decode_and_note)
    large = b'{"metadata":{"resourceVersion":"5"},"items":[{"a":"' + b"x" * 4 * 2**20 + b'"}]}'
    items, _ = decode(*(large[at : at + 2**14] for at in range(0, len(large), 2**14)))
    assert len(items) == 1
    assert sum(tried) < 4 * len(large)


@given(st.binary() | st.text().map(str.encode))
def test_no_bytes_raise_anything_else(raw: bytes) -> None:
    """Nonsense of any kind is one of our errors."""
    with pytest.raises(ClusterError):
        decode(raw)
