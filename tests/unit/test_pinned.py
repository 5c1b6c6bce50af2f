"""What an agent leaves to the next one: bytes that stay readable, and names that fit."""

from __future__ import annotations

import struct
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from otel_lb_hop.core.layout import HOP_STATS_WORDS
from otel_lb_hop.core.pinned import (
    JOURNAL,
    MARK,
    NAME_BYTES,
    NOTE_BYTES,
    STATE,
    Journal,
    Mark,
    State,
    pack_journal,
    pack_mark,
    pack_name,
    pack_state,
    unpack_journal,
    unpack_mark,
    unpack_name,
    unpack_state,
)
from otel_lb_hop.core.topology import HopRow, Name, VipRow
from otel_lb_hop.errors import WireError
from otel_lb_hop.model import Hop, Policy, Transport, pack_address

WEB = VipRow("default", "web", pack_address("10.0.10.0"), 80, Transport.TCP, Policy.CLUSTER)
LARGEST_ID = 2**32 - 1
LARGEST_TIME = 2**63 - 1
IDS = st.integers(0, LARGEST_ID)
COUNTS = st.integers(0, 2**64 - 1)
TEXTS = st.text(max_size=20)
"""Any text: names come from files and API servers."""
VIP_ROWS = st.builds(
    VipRow,
    TEXTS,
    TEXTS,
    st.binary(min_size=16, max_size=16),
    st.integers(0, 65_535),
    st.sampled_from(Transport),
    st.sampled_from(Policy),
)
HOP_ROWS = st.builds(HopRow, IDS, st.sampled_from(Hop), st.none() | TEXTS, st.none() | st.booleans())
STATES = st.builds(
    State,
    TEXTS,
    TEXTS,
    st.tuples(COUNTS, COUNTS),
    st.integers(0, LARGEST_TIME),
    IDS,
    TEXTS,
    TEXTS,
    TEXTS,
    st.integers(0, LARGEST_TIME),
)
JOURNALS = st.builds(
    Journal,
    COUNTS,
    COUNTS,
    IDS,
    IDS,
    st.booleans(),
    IDS,
    st.binary(min_size=8 * HOP_STATS_WORDS, max_size=8 * HOP_STATS_WORDS),
)


def in_a_map(raw: bytes, size: int) -> bytes:
    """Fill it up with zeros, as a map's value is."""
    assert len(raw) <= size
    return raw.ljust(size, b"\0")


def test_indexes_of_the_notes() -> None:
    """Another agent looks for them in the same places."""
    assert [int.from_bytes(key, sys.byteorder) for key in (STATE, JOURNAL, MARK)] == [0, 1, 2]


@given(VIP_ROWS | HOP_ROWS, st.integers(0, LARGEST_TIME))
def test_names_come_back(row: VipRow | HopRow, created_ns: int) -> None:
    """Whatever a row's identity is made of, it is read as it was written."""
    name = Name(row, created_ns)
    assert unpack_name(in_a_map(pack_name(name), NAME_BYTES)) == name


@pytest.mark.parametrize(
    ("row", "raw"),
    [
        (WEB, b'[7,"default","web","00000000000000000000ffff0a000a00",80,6,"Cluster"]'),
        (HopRow(1, Hop.AVOIDABLE, "node2", zone_crossed=True), b'[7,1,"avoidable","node2",true]'),
        (HopRow(1, Hop.REQUIRED, "node2", None), b'[7,1,"required","node2",null]'),
        (HopRow(1, Hop.REQUIRED, None, None), b'[7,1,"required",null,null]'),
    ],
)
def test_names_as_bytes(row: VipRow | HopRow, raw: bytes) -> None:
    """These bytes are in the kernels of nodes: an agent of any version has to read them."""
    assert pack_name(Name(row, 7)) == raw
    assert unpack_name(raw) == Name(row, 7)


def test_longest_names_of_kubernetes_fit() -> None:
    """A label has 63 characters and a node's name 253, all of them ASCII; ids and times are as long as can be."""
    label, subdomain = "n" * 63, "d" * 253
    longest = max(Policy, key=lambda policy: len(policy.value))
    address = pack_address("ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff")
    vip = Name(VipRow(label, label, address, 65_535, Transport.SCTP, longest), LARGEST_TIME)
    hop = Name(HopRow(LARGEST_ID, Hop.AVOIDABLE, subdomain, zone_crossed=False), LARGEST_TIME)
    for name in (vip, hop):
        raw = pack_name(name)
        assert len(raw) <= NAME_BYTES == 440
        assert unpack_name(raw) == name
    # The VIP file lets a namespace and a Service's name be as long as a node's: those do not fit, and it is said.
    with pytest.raises(WireError, match=r"the name of a row has \d+ bytes, 440 can be kept"):
        pack_name(Name(WEB._replace(namespace=subdomain, service=subdomain), 1))


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"\0" * NAME_BYTES,
        b"[",
        b"\xff\xfe",
        b"7",
        b"{}",
        b"[]",
        b"[7]",
        b'[7,"default"]',
        b"[7,1]",
        b'[7,1,"sideways","node2",true]',
        b'[7,"default","web","0a",80,6,"Sometimes"]',
        b'[7,"default","web","zz",80,6,"Cluster"]',
        b'[7,"default","web","0a",80,99,"Cluster"]',
        b'[7,"default","web",7,80,6,"Cluster"]',
        b'["x",1,"required",null,null]',
        b'[7,1,"required",null,null,null]',
    ],
)
def test_garbage_is_no_name(raw: bytes) -> None:
    """What cannot be read is a WireError, never another exception and never a guess."""
    with pytest.raises(WireError, match="a note that an agent left cannot be read"):
        unpack_name(raw)


@given(st.binary(max_size=40))
def test_any_bytes_are_a_name_or_a_wire_error(raw: bytes) -> None:
    """Nothing that a map may hold ends in another exception."""
    for unpack in (unpack_name, unpack_state):
        try:
            unpack(raw)
        except WireError:
            continue


@given(STATES)
def test_states_come_back(state: State) -> None:
    """A state is read as it was written, secrets of 64 bits too."""
    raw = pack_state(state)
    assert unpack_state(raw.ljust(NOTE_BYTES, b"\0")) == state


def test_the_longest_state_fits() -> None:
    """Digests of 64 characters and numbers of 64 bits leave room."""
    largest = 2**64 - 1
    state = State("a" * 64, "b" * 64, (largest, largest), largest, largest, "n" * 253, "r" * 16, "r" * 16, largest)
    assert len(pack_state(state)) <= NOTE_BYTES


@pytest.mark.parametrize(
    "raw", [b"", b"\0" * NOTE_BYTES, b"[1]", b"{}", b'{"layout": "a", "build": "b", "hash_secrets": [1]}', b"null"]
)
def test_garbage_is_no_state(raw: bytes) -> None:
    """A generation whose state cannot be read is told by a WireError."""
    with pytest.raises(WireError):
        unpack_state(raw)


@given(JOURNALS)
def test_journals_come_back(journal: Journal) -> None:
    """A journal fits into a note and is read as it was written."""
    assert unpack_journal(in_a_map(pack_journal(journal), NOTE_BYTES)) == journal


def test_journal_as_bytes() -> None:
    """Two totals, three ids, what kind of row goes, and from byte 32 on the row that another becomes."""
    merged = struct.pack(f"={HOP_STATS_WORDS}Q", *range(HOP_STATS_WORDS))
    raw = pack_journal(Journal(1, 2, 3, 4, True, 5, merged))  # noqa: FBT003 - in the order of the fields
    assert raw == struct.pack("=QQIIIBxxx", 1, 2, 3, 4, 5, 1) + merged
    assert len(raw) == 32 + 8 * 54


def test_an_empty_note_is_a_journal_in_which_nothing_stands() -> None:
    """Before the first row was forgotten the note is zeros."""
    assert unpack_journal(bytes(NOTE_BYTES)) == Journal(0, 0)


@given(COUNTS, st.booleans())
def test_marks_come_back(settled: int, hears: bool) -> None:  # noqa: FBT001
    """A mark is read as it was written."""
    assert unpack_mark(in_a_map(pack_mark(Mark(settled, hears)), NOTE_BYTES)) == Mark(settled, hears)


def test_mark_as_bytes() -> None:
    """A number of 64 bits and one byte; before the first mark nothing was settled and nobody heard."""
    assert pack_mark(Mark(258, hears_conntrack=True)) == struct.pack("=QB", 258, 1)
    assert unpack_mark(bytes(NOTE_BYTES)) == Mark(0, hears_conntrack=False)
