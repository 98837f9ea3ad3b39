"""One wrong chunk is found and, with m >= 2, named; what can't be told apart is not guessed."""

import numpy as np
import pytest
from holdfast.coding import CodeParams, CodingError, parity_matrix, select_engine
from holdfast.coding.syndrome import Disagreement, find_disagreement
from hypothesis import given, settings
from hypothesis import strategies as st

ENGINE = select_engine("numpy")
CHUNK_BYTES = 1000  # no multiple of a fingerprint's block


def stripe(params: CodeParams, seed: int) -> list[bytearray]:
    data = np.random.default_rng(seed).integers(0, 256, (params.data_count, CHUNK_BYTES), dtype=np.uint8)
    parity = [bytearray(CHUNK_BYTES) for _ in range(params.parity_count)]
    if parity:
        ENGINE.matmul(parity_matrix(params), list(data), parity)
    return [*(bytearray(row.tobytes()) for row in data), *parity]


def found(params: CodeParams, chunks: list[bytearray]) -> Disagreement | None:
    return find_disagreement(params, [ENGINE.fingerprint(chunk) for chunk in chunks])


CODES = st.tuples(st.integers(1, 8), st.integers(1, 4)).map(lambda km: CodeParams(*km))


@settings(deadline=None)
@given(params=CODES, seed=st.integers(0, 9), data=st.data())
def test_any_one_changed_chunk_is_found_and_named_where_the_code_allows(
    params: CodeParams, seed: int, data: st.DataObject
) -> None:
    chunks = stripe(params, seed)
    assert found(params, chunks) is None
    position = data.draw(st.integers(0, params.total_count - 1))
    chunks[position][data.draw(st.integers(0, CHUNK_BYTES - 1))] ^= data.draw(st.integers(1, 255))
    seen = found(params, chunks)
    assert seen is not None
    if params.parity_count >= 2:
        assert seen.position == position
    else:  # any chunk of the stripe explains one row
        assert seen.position is None
    k = params.data_count
    assert seen.rows == (tuple(range(params.parity_count)) if position < k else (position - k,))


def test_two_changed_parity_chunks_are_told_by_their_rows() -> None:
    params = CodeParams(4, 3)
    chunks = stripe(params, 1)
    chunks[4][7] ^= 1
    chunks[6][9] ^= 1
    assert found(params, chunks) == Disagreement((0, 2), None)


def test_what_is_no_stripe_is_refused_with_the_numbers() -> None:
    with pytest.raises(CodingError, match=r"expected 3 fingerprints of 256 bytes, got 2"):
        find_disagreement(CodeParams(2, 1), [bytes(256)] * 2)
    with pytest.raises(CodingError, match=r"lengths \[5, 256, 256\]"):
        find_disagreement(CodeParams(2, 1), [bytes(256), bytes(256), bytes(5)])
