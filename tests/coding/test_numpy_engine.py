"""What is this engine's own: its blocks. Correctness is in test_engines, beside the others."""

import numpy as np
import pytest
from holdfast.coding.naive import NaiveEngine
from holdfast.coding.numpy_engine import BLOCK_BYTES, NumpyEngine


@pytest.mark.parametrize("size", [BLOCK_BYTES - 1, BLOCK_BYTES, 2 * BLOCK_BYTES + 1])
@pytest.mark.parametrize("accumulate", [False, True])
def test_results_do_not_depend_on_where_a_block_ends(size: int, *, accumulate: bool) -> None:
    rng = np.random.default_rng(size)
    matrix = np.array([[1, 1, 1], [0, 0, 0], [7, 0, 142]], dtype=np.uint8)
    sources = [rng.bytes(size) for _ in range(3)]
    expected = [bytearray(rng.bytes(size)) for _ in range(3)]
    results = [bytearray(part) for part in expected]
    NaiveEngine().matmul(matrix, sources, expected, accumulate=accumulate)
    NumpyEngine().matmul(matrix, sources, results, accumulate=accumulate)
    assert results == expected
