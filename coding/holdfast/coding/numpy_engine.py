"""The engine that is always there: numpy, block by block. Correct, far from memory speed.

A coefficient is a sum of powers of x, so a row's sum is evaluated like a number in binary (Horner):
for bit 7 down to 0, double the accumulator in the field and add all sources whose coefficient has
that bit. Every step is one numpy call over a block that stays in the L1 and L2 caches, on bytes,
which numpy vectorises; no tables. A row of ones (XOR parity) costs one pass and no doubling.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from holdfast.coding.field import POLYNOMIAL
from holdfast.coding.fingerprint import numpy_fingerprint
from holdfast.coding.operands import Buffer, Bytes, check_operands

# A block of all sources and a few of scratch should fit the L2 cache (512 KiB and more), while a
# numpy call, about half a microsecond, should be short beside the work on one block.
BLOCK_BYTES = 32 * 1024

REDUCTION = np.uint8(POLYNOMIAL & 0xFF)
HIGHEST_BIT = 7


class NumpyEngine:
    """Products by bit-sliced Horner evaluation over cache-sized blocks."""

    name = "numpy"
    detail = f"numpy {np.__version__}"

    def matmul(
        self,
        coefficients: npt.NDArray[np.uint8],
        sources: Sequence[Buffer],
        destinations: Sequence[Buffer],
        *,
        accumulate: bool = False,
    ) -> None:
        """See ``holdfast.coding.engines.Engine.matmul``. numpy releases the GIL within a block."""
        operands = check_operands(coefficients, sources, destinations)
        plans = [_terms_by_bit(row) for row in operands.coefficients.tolist()]
        block_bytes = min(BLOCK_BYTES, operands.chunk_bytes)
        total, carry = np.empty((2, block_bytes), dtype=np.uint8)
        for start in range(0, operands.chunk_bytes, BLOCK_BYTES):
            blocks = [source[start : start + BLOCK_BYTES] for source in operands.sources]
            for plan, destination in zip(plans, operands.destinations, strict=True):
                target = destination[start : start + BLOCK_BYTES]
                part = total[: target.size]
                _evaluate(plan, blocks, part, carry[: target.size])
                if accumulate:
                    np.bitwise_xor(target, part, out=target)
                else:
                    target[:] = part

    def fingerprint(self, chunk: Buffer) -> bytes:
        """See ``holdfast.coding.engines.Engine.fingerprint``."""
        return numpy_fingerprint(chunk)


def _terms_by_bit(row: list[int]) -> list[list[int]]:
    """For bit 7 down to 0: the columns whose coefficient has it; leading empty bits left out."""
    highest = max((coefficient.bit_length() - 1 for coefficient in row), default=-1)
    assert highest <= HIGHEST_BIT
    return [
        [column for column, coefficient in enumerate(row) if coefficient >> bit & 1] for bit in range(highest, -1, -1)
    ]


def _evaluate(plan: list[list[int]], blocks: list[Bytes], total: Bytes, carry: Bytes) -> None:
    """Fill ``total`` with the row's sum over ``blocks``; ``carry`` is scratch of the same size."""
    if not plan:
        total.fill(0)
        return
    first, *rest = plan
    total[:] = blocks[first[0]]
    for column in first[1:]:
        np.bitwise_xor(total, blocks[column], out=total)
    for columns in rest:
        _double(total, carry)
        for column in columns:
            np.bitwise_xor(total, blocks[column], out=total)


def _double(total: Bytes, carry: Bytes) -> None:
    """Multiply every byte by x in place: shift, and XOR 0x1d where the highest bit fell out."""
    np.less(total.view(np.int8), 0, out=carry.view(np.bool_))
    np.multiply(carry, REDUCTION, out=carry)
    np.add(total, total, out=total)
    np.bitwise_xor(total, carry, out=total)
