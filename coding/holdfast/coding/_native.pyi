"""Types of the C extension. ``holdfast.coding.native`` is what to use."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from holdfast.coding.operands import Buffer

def matmul(
    coefficients: npt.NDArray[np.uint8],
    sources: Sequence[Buffer],
    destinations: Sequence[Buffer],
    accumulate: bool,
    level: int,
    stream: int,
    fetch: int,
    /,
) -> None: ...
def fingerprint(chunk: Buffer, level: int, /) -> bytes: ...
def levels() -> tuple[tuple[str, bool], ...]: ...
