"""Refusals, the same for every engine: with the numbers, whole, and before anything is written."""

import numpy as np
import pytest
from holdfast.coding import Buffer, BufferMismatchError, Engine
from holdfast.coding.naive import NaiveEngine

ONES = np.ones((1, 2), dtype=np.uint8)
POOL = bytearray(64)


def pool(start: int, stop: int) -> memoryview:
    return memoryview(POOL)[start:stop]


BAD: dict[str, tuple[object, list[object], list[object], str]] = {
    "lengths of sources": (ONES, [b"abc", b"ab"], [bytearray(3)], r"source 1 has 2"),
    "length of result": (ONES, [b"abc", b"abc"], [bytearray(4)], r"destination 0 has 4"),
    "read-only result": (ONES, [b"abc", b"abc"], [b"abc"], r"destination 0 \(3 bytes\) is read-o"),
    "too few sources": (ONES, [b"abc"], [bytearray(3)], r"need 1 destinations and 2 sources.* 1$"),
    "too many results": (ONES, [b"a", b"a"], [bytearray(1), bytearray(1)], r"got 2 and 2"),
    "coefficient type": (np.ones((1, 2)), [b"a", b"a"], [bytearray(1)], "array of uint8, got 2"),
    "signed coefficients": (ONES.view(np.int8), [b"a", b"a"], [bytearray(1)], "array of uint8"),
    "coefficient shape": (ONES[0], [b"a", b"a"], [bytearray(1)], "2-dimensional.*got 1 dim"),
    "no buffer": (ONES, [b"a", 5], [bytearray(1)], "source 1 must be a buffer of bytes, got .*int"),
    "text": (ONES, ["a", b"a"], [bytearray(1)], "source 0 must be a buffer of bytes, got .*str"),
    "strided source": (
        ONES,
        [memoryview(b"abcd")[::2], b"ab"],
        [bytearray(2)],
        "source 0 must be C",
    ),
    "strided result": (ONES, [b"ab", b"ab"], [pool(0, 4)[::2]], "destination 0 must be C-contig"),
    "result is a source": (ONES, [pool(0, 8), b"12345678"], [pool(0, 8)], "overlaps.* in 8 of 8"),
    "result begins in a source": (ONES, [pool(0, 8), b"12345678"], [pool(7, 15)], "in 1 of 8"),
    "source begins in a result": (ONES, [b"12345678", pool(7, 15)], [pool(0, 8)], "in 1 of 8"),
    "results overlap": (
        np.ones((2, 1), dtype=np.uint8),
        [b"12345678"],
        [pool(0, 8), pool(4, 12)],
        "destination 1 overlaps destination 0 in 4 of 8|destination 0 overlaps destination 1",
    ),
    "wider than the field": (
        np.ones((1, 256), dtype=np.uint8),
        [b"a"] * 256,
        [bytearray(1)],
        "at most 255 sources",
    ),
}


@pytest.fixture(params=["oracle", "engine"])
def any_engine(request: pytest.FixtureRequest, engine: Engine) -> Engine:
    return engine if request.param == "engine" else NaiveEngine()


@pytest.mark.parametrize("case", BAD)
def test_what_does_not_fit_is_refused_before_anything_is_written(any_engine: Engine, case: str) -> None:
    coefficients, sources, destinations, message = BAD[case]
    POOL[:] = bytes(range(64))
    before = [bytes(memoryview(buffer)) for buffer in destinations]  # type: ignore[arg-type]  # as below
    with pytest.raises(BufferMismatchError, match=message):
        any_engine.matmul(coefficients, sources, destinations)  # type: ignore[arg-type]  # wrong on purpose
    assert [bytes(memoryview(buffer)) for buffer in destinations] == before  # type: ignore[arg-type]
    assert bytes(range(64)) == POOL


def test_neighbours_and_overlapping_sources_are_fine(engine: Engine) -> None:
    POOL[:] = bytes(range(64))
    sources: list[Buffer] = [pool(0, 8), pool(4, 12)]
    engine.matmul(ONES, sources, [pool(12, 20)])
    assert POOL[12:20] == bytes(a ^ (a + 4) for a in range(8))


def test_coefficients_may_have_any_strides(engine: Engine) -> None:
    wide = np.arange(12, dtype=np.uint8).reshape(3, 4)
    for matrix in (wide[:2, 1:3], wide[::2, ::3], wide.T[:2, :2], wide[::-1][:2, [3, 1]]):
        result, right = [bytearray(3), bytearray(3)], [bytearray(3), bytearray(3)]
        engine.matmul(matrix, [b"abc", b"def"], result)
        NaiveEngine().matmul(matrix.copy(order="C"), [b"abc", b"def"], right)
        assert result == right
