"""The fingerprint: its definition, linearity, agreement of all engines, and what it catches."""

import numpy as np
import pytest
from holdfast.coding import (
    FINGERPRINT_BYTES,
    BufferMismatchError,
    CodeParams,
    CodingError,
    Engine,
    parity_fingerprints,
    parity_matrix,
    scaled_fingerprint,
    select_engine,
)
from holdfast.coding.field import multiples_of, multiply, power
from holdfast.coding.fingerprint import naive_fingerprint, numpy_fingerprint
from hypothesis import given, settings
from hypothesis import strategies as st

LENGTHS = [0, 1, 31, 63, 64, 65, 255, 256, 257, 1023, 65279, 65280, 65281, 130559, 130817]


def random_bytes(seed: int, size: int) -> bytes:
    return np.random.default_rng(seed).bytes(size)


def test_it_is_the_weighted_sum_of_blocks() -> None:
    chunk = random_bytes(1, 3 * 256 + 5)
    padded = chunk + bytes(251)
    for lane in (0, 4, 5, 255):
        expected = 0
        for block in range(4):
            expected ^= multiply(power(2, block), padded[256 * block + lane])
        assert naive_fingerprint(chunk)[lane] == expected


@pytest.mark.parametrize("size", LENGTHS)
def test_all_engines_agree_at_every_length(engine: Engine, size: int) -> None:
    chunk = random_bytes(size, size + 7)[7:]
    result = engine.fingerprint(chunk)
    assert len(result) == FINGERPRINT_BYTES
    assert result == naive_fingerprint(chunk) == select_engine("naive").fingerprint(chunk)


def test_unaligned_chunks_are_read_where_they_are(engine: Engine) -> None:
    whole = memoryview(random_bytes(3, 1200))
    for offset in range(33):
        part = whole[offset : offset + 1100]
        assert engine.fingerprint(part) == naive_fingerprint(part)


@given(st.integers(1, 12), st.integers(1, 5), st.integers(0, 3000), st.integers(0, 2**32 - 1))
@settings(max_examples=40, deadline=None)
def test_parity_inherits_it(k: int, m: int, chunk_bytes: int, seed: int) -> None:
    params = CodeParams(k, m)
    data = [random_bytes(seed + i, chunk_bytes) for i in range(k)]
    parity = [bytearray(chunk_bytes) for _ in range(m)]
    select_engine().matmul(parity_matrix(params), data, parity)
    expected = parity_fingerprints(params, [numpy_fingerprint(chunk) for chunk in data])
    assert tuple(numpy_fingerprint(chunk) for chunk in parity) == expected


@given(st.integers(0, 69_999), st.integers(1, 255))
@settings(max_examples=30, deadline=None)
def test_no_change_of_one_byte_goes_unseen(position: int, change: int) -> None:
    chunk = bytearray(random_bytes(5, 70_000))
    before = numpy_fingerprint(chunk)
    chunk[position] ^= change
    assert numpy_fingerprint(chunk) != before


def test_zeros_at_the_end_do_not_change_it() -> None:
    chunk = random_bytes(6, 1000)
    assert numpy_fingerprint(chunk + bytes(9000)) == numpy_fingerprint(chunk)
    assert numpy_fingerprint(b"") == bytes(FINGERPRINT_BYTES)


def test_fingerprints_that_do_not_fit_the_code_are_refused() -> None:
    with pytest.raises(CodingError, match="expected 4 fingerprints of 256 bytes, got 3"):
        parity_fingerprints(CodeParams(4, 2), [bytes(256)] * 3)
    with pytest.raises(CodingError, match=r"lengths \[255, 256\]"):
        parity_fingerprints(CodeParams(2, 2), [bytes(256), bytes(255)])


def test_what_is_no_flat_buffer_is_refused(engine: Engine) -> None:
    with pytest.raises(BufferMismatchError, match="contiguous"):
        engine.fingerprint(np.zeros(8, dtype=np.uint8)[::2])
    with pytest.raises(BufferMismatchError, match="buffer of bytes"):
        engine.fingerprint(7)  # type: ignore[arg-type]  # what an untyped caller might do


@given(chunk=st.binary(max_size=2000), factor=st.integers(0, 255))
def test_the_fingerprint_of_a_multiple_is_the_multiple_of_the_fingerprint(chunk: bytes, factor: int) -> None:
    multiple = chunk.translate(multiples_of(factor))
    assert naive_fingerprint(multiple) == scaled_fingerprint(naive_fingerprint(chunk), factor)
