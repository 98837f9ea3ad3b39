"""The oracle itself, against products written out by hand: nothing else vouches for it."""

import numpy as np
from holdfast.coding.field import multiply
from holdfast.coding.naive import NaiveEngine

MATRIX = np.array([[1, 2], [3, 255], [0, 0]], dtype=np.uint8)
LEFT, RIGHT = bytes(range(256)), bytes(reversed(range(256)))


def test_each_byte_is_the_sum_of_products() -> None:
    results = [bytearray(256) for _ in range(3)]
    NaiveEngine().matmul(MATRIX, [LEFT, RIGHT], results)
    for row, result in zip(MATRIX.tolist(), results, strict=True):
        for a, b, total in zip(LEFT, RIGHT, result, strict=True):
            assert total == multiply(row[0], a) ^ multiply(row[1], b)


def test_accumulate_adds_and_otherwise_what_was_there_does_not_matter() -> None:
    fresh = [bytearray(256) for _ in range(3)]
    dirty = [bytearray(b"\xa5" * 256) for _ in range(3)]
    added = [bytearray(b"\xa5" * 256) for _ in range(3)]
    NaiveEngine().matmul(MATRIX, [LEFT, RIGHT], fresh)
    NaiveEngine().matmul(MATRIX, [LEFT, RIGHT], dirty)
    NaiveEngine().matmul(MATRIX, [LEFT, RIGHT], added, accumulate=True)
    assert dirty == fresh
    for sum_, plain in zip(added, fresh, strict=True):
        assert bytes(byte ^ 0xA5 for byte in sum_) == plain


def test_no_source_means_zero() -> None:
    result = bytearray(b"\xff" * 5)
    NaiveEngine().matmul(np.zeros((1, 0), dtype=np.uint8), [], [result])
    assert result == bytes(5)
