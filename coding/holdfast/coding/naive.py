"""The oracle: the product as its definition says it, in plain Python. About 10 MB/s.

Every fast engine is tested against this one. It shares no arithmetic with them beyond ``field``.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from holdfast.coding.field import add, multiples_of
from holdfast.coding.fingerprint import naive_fingerprint
from holdfast.coding.operands import Buffer, check_operands


class NaiveEngine:
    """One byte string per row: destination r = sum over c of coefficient[r, c] * source c."""

    name = "naive"
    detail = "pure Python"

    def matmul(
        self,
        coefficients: npt.NDArray[np.uint8],
        sources: Sequence[Buffer],
        destinations: Sequence[Buffer],
        *,
        accumulate: bool = False,
    ) -> None:
        """See ``holdfast.coding.engines.Engine.matmul``. Holds the GIL; copies its arguments."""
        operands = check_operands(coefficients, sources, destinations)
        inputs = [source.tobytes() for source in operands.sources]
        for row, destination in zip(operands.coefficients.tolist(), operands.destinations, strict=True):
            total = destination.tobytes() if accumulate else bytes(operands.chunk_bytes)
            for coefficient, source in zip(row, inputs, strict=True):
                total = add(total, source.translate(multiples_of(coefficient)))
            destination[:] = np.frombuffer(total, dtype=np.uint8)

    def fingerprint(self, chunk: Buffer) -> bytes:
        """See ``holdfast.coding.engines.Engine.fingerprint``."""
        return naive_fingerprint(chunk)
