"""Boxes of pieces are covered by few reads, each element once."""

import math
from typing import Any

import numpy as np
import pytest
from holdfast.client import pieces
from holdfast.client.pieces import Piece, Read, reads
from hypothesis import given
from hypothesis import strategies as st


@st.composite
def boxes(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    shape = draw(st.lists(st.integers(0, 7), max_size=4).map(tuple))
    start = tuple(draw(st.integers(0, size)) for size in shape)
    lengths = tuple(draw(st.integers(0, size - s)) for size, s in zip(shape, start, strict=True))
    return shape, start, lengths


def assembled(shape: Any, start: Any, lengths: Any, dtype: str = "<i4") -> tuple[np.ndarray[Any, Any], list[Read]]:
    piece = np.arange(math.prod(shape), dtype=dtype).reshape(shape)
    raw = piece.tobytes()
    out = np.full(lengths, -1, dtype=dtype)
    found = list(reads(shape, start, lengths, item_bytes=piece.itemsize))
    for one in found:
        read = np.frombuffer(raw[one.offset_bytes : one.offset_bytes + one.length_bytes], dtype=dtype)
        assert read.nbytes == one.length_bytes
        part = np.lib.stride_tricks.as_strided(read, one.lengths, [step * read.itemsize for step in one.strides])
        where = tuple(slice(s, s + n) for s, n in zip(one.start, one.lengths, strict=True))
        assert (out[where] == -1).all(), "an element twice"
        out[where] = part
        assert one.is_solid() == (part.size * part.itemsize == one.length_bytes)
    expected = piece[tuple(slice(s, s + n) for s, n in zip(start, lengths, strict=True))]
    assert (out == expected).all()
    return out, found


@given(boxes(), st.integers(1, 64), st.integers(1, 256))
def test_reads_make_up_the_box(box: Any, gap_bytes: int, span_bytes: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pieces, "GAP_BYTES_MIN", gap_bytes)
        patch.setattr(pieces, "SPAN_BYTES_MAX", span_bytes)
        _, found = assembled(*box)
    for one in found:
        assert one.is_solid() or one.length_bytes <= max(span_bytes, 4)


def test_rows_are_one_read_and_nothing_beside_them() -> None:
    _, found = assembled((100, 30), (25, 0), (50, 30))
    assert [(one.offset_bytes, one.length_bytes) for one in found] == [(25 * 120, 50 * 120)]


def test_narrow_columns_are_read_with_what_lies_between_and_wide_gaps_are_not() -> None:
    assert len(assembled((64, 64), (0, 32), (64, 32))[1]) == 1
    wide = pieces.GAP_BYTES_MIN // 4
    _, found = assembled((3, 2 * wide), (0, wide), (3, wide))
    assert [one.length_bytes for one in found] == [4 * wide] * 3


def test_what_is_read_at_once_is_bounded() -> None:
    columns = pieces.GAP_BYTES_MIN // 8
    rows = 4 * pieces.SPAN_BYTES_MAX // (4 * columns)
    found = list(reads((rows, columns), (0, 1), (rows, columns - 1), item_bytes=4))
    assert 4 <= len(found) <= 6
    assert max(one.length_bytes for one in found) <= pieces.SPAN_BYTES_MAX


def test_a_replica_is_read_from_oneself_else_spread() -> None:
    piece = Piece((0,), (4,), roles=(1, 3), start_bytes=(64, 128))
    assert [piece.nearest(role) for role in range(4)] == [(1, 64), (1, 64), (1, 64), (3, 128)]
    assert piece.nearest(5) == (3, 128)
