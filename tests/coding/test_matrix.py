"""Matrices against reedsolo, against brute force over all erasures, and refusals."""

import itertools
import math

import numpy as np
import pytest
import reedsolo
from holdfast.coding import (
    CodeParams,
    CodingError,
    NotEnoughShardsError,
    decode_matrix,
    parity_matrix,
)
from holdfast.coding.field import product_table
from holdfast.coding.matrix import Matrix, inverse_matrix, matrix_product
from hypothesis import given, settings
from hypothesis import strategies as st


def generator_matrix(params: CodeParams) -> Matrix:
    identity = np.eye(params.data_count, dtype=np.uint8)
    return np.concatenate([identity, parity_matrix(params)])


@st.composite
def codes(draw: st.DrawFn, largest: int = 255) -> CodeParams:
    total = draw(st.integers(2, largest))
    parity = draw(st.integers(1, min(total - 1, 16)))
    return CodeParams(total - parity, parity)


@given(codes())
@settings(max_examples=25, deadline=None)
def test_each_column_is_what_reedsolo_gives_for_a_unit_message(params: CodeParams) -> None:
    k, m = params.data_count, params.parity_count
    codec = reedsolo.RSCodec(m, nsize=k + m, fcr=0, generator=2, prim=0x11D)
    for column in {0, k // 2, k - 1}:
        message = bytearray(k)
        message[column] = 1
        assert bytes(parity_matrix(params)[:, column]) == bytes(codec.encode(message))[k:]


def test_one_parity_is_plain_xor() -> None:
    for k in (1, 2, 7, 254):
        assert (parity_matrix(CodeParams(k, 1)) == 1).all()


def test_no_parity_gives_an_empty_matrix() -> None:
    assert parity_matrix(CodeParams(3, 0)).shape == (0, 3)


def test_matrices_are_shared_and_cannot_be_written() -> None:
    params = CodeParams(4, 2)
    assert parity_matrix(params) is parity_matrix(params)
    assert not parity_matrix(params).flags.writeable
    assert not decode_matrix(params, available=[2, 3, 4, 5], wanted=[0]).flags.writeable


def small_codes() -> list[CodeParams]:
    return [CodeParams(k, m) for k in range(1, 7) for m in range(4)]


@pytest.mark.parametrize("params", small_codes(), ids=lambda p: f"{p.data_count}+{p.parity_count}")
def test_every_choice_of_k_chunks_gives_back_all(params: CodeParams) -> None:
    generator = generator_matrix(params)
    everything = range(params.total_count)
    for available in itertools.combinations(everything, params.data_count):
        matrix = decode_matrix(params, available=available, wanted=everything)
        np.testing.assert_array_equal(matrix_product(matrix, generator[list(available)]), generator)


def test_the_order_of_available_and_wanted_positions_is_the_callers() -> None:
    params = CodeParams(3, 2)
    generator = generator_matrix(params)
    for available in itertools.permutations(range(5), 3):
        for wanted in itertools.permutations(sorted(set(range(5)) - set(available))):
            matrix = decode_matrix(params, available=available, wanted=wanted)
            np.testing.assert_array_equal(matrix_product(matrix, generator[list(available)]), generator[list(wanted)])


@given(codes(), st.data())
@settings(max_examples=40, deadline=None)
def test_wide_codes_give_back_all(params: CodeParams, data: st.DataObject) -> None:
    n, k = params.total_count, params.data_count
    available = data.draw(st.permutations(range(n)))[:k]
    lost = sorted(set(range(n)) - set(available))
    generator = generator_matrix(params)
    matrix = decode_matrix(params, available=available, wanted=lost)
    np.testing.assert_array_equal(matrix_product(matrix, generator[available]), generator[lost])


@pytest.mark.parametrize(("k", "m"), [(16, 4), (10, 4), (40, 3), (100, 2), (6, 6)])
def test_no_square_part_of_the_parity_matrix_is_singular(k: int, m: int) -> None:
    """MDS, exhaustively: ISA-L's usual matrix fails this at 32+4 and 5+6."""
    matrix = parity_matrix(CodeParams(k, m))
    checked = 0
    for size in range(1, m + 1):
        for rows in itertools.combinations(range(m), size):
            columns = np.array(list(itertools.combinations(range(k), size)))
            parts = matrix[list(rows)][:, columns].transpose(1, 0, 2)
            assert not (determinants(parts) == 0).any()
            checked += len(columns)
    assert checked == math.comb(k + m, m) - 1


def determinants(parts: Matrix) -> Matrix:
    """Of a stack of square matrices, by expansion along the first row (sign does not matter)."""
    if parts.shape[1] == 1:
        return parts[:, 0, 0]
    total = np.zeros(len(parts), dtype=np.uint8)
    for column in range(parts.shape[2]):
        minor = determinants(np.delete(parts[:, 1:, :], column, axis=2))
        total ^= product_table()[parts[:, 0, column], minor]
    return total


def test_a_singular_system_is_refused_not_returned() -> None:
    with pytest.raises(NotEnoughShardsError, match="singular at column 1"):
        inverse_matrix(np.array([[1, 2], [1, 2]], dtype=np.uint8))


def test_too_few_chunks_are_refused_with_the_numbers() -> None:
    with pytest.raises(NotEnoughShardsError, match=r"k = 4 chunks are needed.*2 are available"):
        decode_matrix(CodeParams(4, 2), available=[0, 5], wanted=[1])


@pytest.mark.parametrize(
    ("available", "wanted", "message"),
    [
        ([0, 1, 2, 3, 4], [5], "exactly k = 4"),
        ([0, 1, 2, 2], [5], "available positions must be distinct"),
        ([0, 1, 2, 6], [5], r"available positions must be in 0..5.*\[6\]"),
        ([0, 1, 2, -1], [5], r"available positions must be in 0..5.*\[-1\]"),
        ([0, 1, 2, 3], [7], r"wanted positions must be in 0..5.*\[7\]"),
        ([0, 1, 2, 3], [5, 5], "wanted positions must be distinct"),
    ],
)
def test_positions_that_make_no_sense_are_refused(available: list[int], wanted: list[int], message: str) -> None:
    with pytest.raises(CodingError, match=message):
        decode_matrix(CodeParams(4, 2), available=available, wanted=wanted)
