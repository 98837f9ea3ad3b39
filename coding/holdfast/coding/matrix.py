"""Which coefficients make parity, and which bring lost chunks back. No chunk is touched here.

The code is systematic Reed-Solomon in its classical, generator-polynomial form: parity is what is
left of data(x) * x^m after division by g(x) = (x - 1)(x - a)...(x - a^(m-1)), a = 2, highest power
first. That is byte for byte what the package ``reedsolo`` computes (prim 0x11d, generator 2,
fcr 0), so a program that nobody here wrote can check and rebuild what the fast engines made.
For m = 1 it is plain XOR.

Any k of the n chunks suffice (the code is MDS): g has m consecutive powers of a generator of order
255 as roots, so by the BCH bound the distance is m + 1 for every n <= 255. The familiar shortcut
of writing Vandermonde rows under an identity matrix has no such guarantee and fails in practice
(ISA-L issues 10, 13, 26, 46); here a singular choice is refused, never returned.
"""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import numpy.typing as npt
from holdfast.coding.errors import CodingError, NotEnoughShardsError
from holdfast.coding.field import GENERATOR, inverse, multiply, power, product_table
from holdfast.coding.params import CodeParams

Matrix = npt.NDArray[np.uint8]

# A daemon meets few codes, but one erasure pattern per rotation of its group's stripes.
CACHED_CODES_COUNT = 64
CACHED_PATTERNS_COUNT = 1024


@lru_cache(maxsize=CACHED_CODES_COUNT)
def parity_matrix(params: CodeParams) -> Matrix:
    """Coefficients that make parity: shape (m, k), uint8, read-only, shared by all callers.

    Column i holds the coefficients of x^(k-1-i+m) mod g(x), highest power first. The last column
    is g without its leading 1; each one before it is the next times x, reduced by g.
    """
    matrix = np.zeros((params.parity_count, params.data_count), dtype=np.uint8)
    if params.parity_count > 0:
        tail = _generator_polynomial(params.parity_count)[1:]
        remainder = tail
        for column in reversed(range(params.data_count)):
            matrix[:, column] = remainder
            carry, shifted = remainder[0], [*remainder[1:], 0]
            remainder = [low ^ multiply(carry, g) for low, g in zip(shifted, tail, strict=True)]
    matrix.flags.writeable = False
    return matrix


def decode_matrix(params: CodeParams, *, available: Sequence[int], wanted: Sequence[int]) -> Matrix:
    """Coefficients that make the ``wanted`` chunks from the ``available`` ones.

    Args:
        params: The code.
        available: Exactly k distinct positions, in the order of the matrix's columns. Positions
            0..k-1 are data, k..k+m-1 parity.
        wanted: Positions to compute, data or parity, in the order of the matrix's rows.

    Returns:
        Shape (len(wanted), k), uint8, read-only, cached.

    Raises:
        NotEnoughShardsError: Fewer than k positions, or they do not determine the wanted ones.
        CodingError: A position out of range or twice, or more than k available.
    """
    return _decode_matrix(params, tuple(available), tuple(wanted))


def matrix_product(left: Matrix, right: Matrix) -> Matrix:
    """Product of two matrices over GF(2^8); shapes (a, b) and (b, c) give (a, c)."""
    products = product_table()[left[:, :, None], right[None, :, :]]
    product: Matrix = np.bitwise_xor.reduce(products, axis=1, dtype=np.uint8)
    return product


def inverse_matrix(matrix: Matrix) -> Matrix:
    """Inverse of a square matrix over GF(2^8), by Gauss-Jordan elimination.

    Raises:
        NotEnoughShardsError: The matrix is singular.
    """
    size = matrix.shape[0]
    table = product_table()
    work = np.concatenate([matrix, np.eye(size, dtype=np.uint8)], axis=1)
    for column in range(size):
        candidates = np.flatnonzero(work[column:, column])
        if candidates.size == 0:
            raise NotEnoughShardsError(
                f"the {size} x {size} system for the lost chunks is singular at column {column}: "
                "these chunks do not determine them; choose other available positions"
            )
        pivot = column + int(candidates[0])
        work[[column, pivot]] = work[[pivot, column]]
        work[column] = table[inverse(int(work[column, column]))][work[column]]
        factors = work[:, column].copy()
        factors[column] = 0  # every row but the pivot's own
        work ^= table[factors[:, None], work[column][None, :]]
    return work[:, size:]


def _generator_polynomial(parity_count: int) -> list[int]:
    """g(x) = product of (x - a^i) for i < m; m + 1 coefficients, highest power first."""
    polynomial = [1]
    for exponent in range(parity_count):
        root = power(GENERATOR, exponent)
        shifted = [*polynomial, 0]
        for index, coefficient in enumerate(polynomial):
            shifted[index + 1] ^= multiply(coefficient, root)
        polynomial = shifted
    return polynomial


@lru_cache(maxsize=CACHED_PATTERNS_COUNT)
def _decode_matrix(params: CodeParams, available: tuple[int, ...], wanted: tuple[int, ...]) -> Matrix:
    _check_positions(params, available, wanted)
    matrix = matrix_product(_generator_rows(params, wanted), _data_from(params, available))
    matrix.flags.writeable = False
    return matrix


def _generator_rows(params: CodeParams, positions: tuple[int, ...]) -> Matrix:
    """How each position is made from the k data chunks: unit rows for data, parity rows else."""
    rows = np.zeros((len(positions), params.data_count), dtype=np.uint8)
    for row, position in enumerate(positions):
        if position < params.data_count:
            rows[row, position] = 1
        else:
            rows[row] = parity_matrix(params)[position - params.data_count]
    return rows


def _data_from(params: CodeParams, available: tuple[int, ...]) -> Matrix:
    """How each of the k data chunks is made from the available chunks; shape (k, k).

    Only the lost data is unknown, so the system is no larger than the number of parity chunks
    used: parity rows r over lost data = parity ^ (parity rows r over present data) * present data.
    """
    k = params.data_count
    present = [position for position in available if position < k]
    parity_rows = [position - k for position in available if position >= k]
    lost = sorted(set(range(k)) - set(present))
    rows = np.zeros((k, k), dtype=np.uint8)
    column_of = {position: column for column, position in enumerate(available)}
    for position in present:
        rows[position, column_of[position]] = 1
    if lost:
        parity = parity_matrix(params)[parity_rows]
        solver = inverse_matrix(parity[:, lost])
        rows[np.ix_(lost, [column_of[k + row] for row in parity_rows])] = solver
        present_columns = [column_of[position] for position in present]
        rows[np.ix_(lost, present_columns)] = matrix_product(solver, parity[:, present])
    return rows


def _check_positions(params: CodeParams, available: tuple[int, ...], wanted: tuple[int, ...]) -> None:
    k, n = params.data_count, params.total_count
    for name, positions in (("available", available), ("wanted", wanted)):
        outside = [position for position in positions if not 0 <= position < n]
        if outside:
            raise CodingError(
                f"{name} positions must be in 0..{n - 1} for k = {k}, m = {params.parity_count}, "
                f"got {outside}; positions 0..{k - 1} are data, the rest parity"
            )
        if len(set(positions)) != len(positions):
            raise CodingError(f"{name} positions must be distinct, got {list(positions)}")
    if len(available) < k:
        raise NotEnoughShardsError(
            f"k = {k} chunks are needed to rebuild, {len(available)} are available "
            f"({list(available)}); {k - len(available)} more are needed, or an older snapshot"
        )
    if len(available) > k:
        raise CodingError(
            f"exactly k = {k} available positions make a decode matrix, got {len(available)}; "
            "choose which k chunks to read"
        )
