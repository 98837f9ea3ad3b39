"""What an engine does, which ones run here, and how one is chosen. Never silently another one.

An engine is stateless and may be used from several threads at once.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt
from holdfast.coding.errors import EngineUnavailableError
from holdfast.coding.isal import IsalEngine
from holdfast.coding.naive import NaiveEngine
from holdfast.coding.native import NativeEngine
from holdfast.coding.numpy_engine import NumpyEngine
from holdfast.coding.operands import Buffer


class Engine(Protocol):
    """Products over GF(2^8) of whole chunks: encode, rebuild, partial sums and delta updates."""

    @property
    def name(self) -> str:
        """The name that ``select_engine`` knows it by."""
        ...

    @property
    def detail(self) -> str:
        """What is behind it here: instruction set, library or version. For reports."""
        ...

    def matmul(
        self,
        coefficients: npt.NDArray[np.uint8],
        sources: Sequence[Buffer],
        destinations: Sequence[Buffer],
        *,
        accumulate: bool = False,
    ) -> None:
        """Compute destinations[r] (^)= sum over c of coefficients[r, c] * sources[c].

        Args:
            coefficients: Shape (len(destinations), len(sources)), uint8.
            sources: C-contiguous buffers of one length (0 bytes and up), any alignment, only read.
            destinations: Writable buffers of the same length that share no byte with each other or
                with a source. The caller owns all memory; nothing is kept after the return.
            accumulate: Add to what the destinations hold; otherwise it is overwritten, unread.

        Raises:
            BufferMismatchError: Wrong counts, lengths that differ, read-only or overlapping
                outputs. Nothing has been written then.
        """
        ...

    def fingerprint(self, chunk: Buffer) -> bytes:
        """The chunk's linear fingerprint, 256 bytes; see ``holdfast.coding.fingerprint``.

        Equal for all engines. A parity chunk's fingerprint is the same combination of its data
        chunks' fingerprints as the parity is of the data.

        Raises:
            BufferMismatchError: Not a buffer, or not contiguous.
        """
        ...


# Best first: the order in which an engine is chosen when none is named.
_MAKERS: dict[str, Callable[[], Engine]] = {
    "native": NativeEngine,
    "isal": IsalEngine,
    "numpy": NumpyEngine,
    "naive": NaiveEngine,
}


def engine_names() -> tuple[str, ...]:
    """The engines that can run here, best first."""
    return tuple(name for name in _MAKERS if _try_make(name) is not None)


def select_engine(name: str | None = None) -> Engine:
    """The engine of that name, or the best one that runs here.

    Raises:
        EngineUnavailableError: The name is unknown, or that engine cannot run here, and why.
    """
    if name is None:
        return next(engine for engine in map(_try_make, _MAKERS) if engine is not None)
    if name not in _MAKERS:
        raise EngineUnavailableError(
            f"unknown coding engine {name!r}; known: {', '.join(_MAKERS)}; usable here: "
            f"{', '.join(engine_names())}. Correct the name or leave it out"
        )
    try:
        return _MAKERS[name]()
    except EngineUnavailableError as error:
        raise EngineUnavailableError(f"{error}; usable here: {', '.join(engine_names())}") from error


def why_not_native() -> str:
    """Why the native engine doesn't run here, empty if it does: for who was given another one without asking."""
    try:
        NativeEngine()
    except EngineUnavailableError as error:
        return str(error)
    return ""


def _try_make(name: str) -> Engine | None:
    try:
        return _MAKERS[name]()
    except EngineUnavailableError:
        return None
