"""The engine of our own C kernel: one pass at memory speed, on the best instruction set there is.

The kernel is in ``_native_kernels.c`` and ``_native_level.h``, its door in ``_native.c``. It is
built when the package is installed with a C compiler at hand, and left out otherwise.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from holdfast.coding.errors import EngineUnavailableError
from holdfast.coding.operands import Buffer

try:
    import holdfast.coding._native as _native  # noqa: PLR0402 - so its error names the module
except ImportError as missing:
    _WHY_MISSING = str(missing)
    _BUILT = False
else:
    _WHY_MISSING = ""
    _BUILT = True

# How the kernel stores and fetches when the caller leaves it to the kernel.
_AUTO = -1


def native_levels() -> tuple[str, ...]:
    """Instruction sets of the kernel that this processor runs, best first; empty if not built."""
    return tuple(name for name, usable in _native.levels() if usable) if _BUILT else ()


class NativeEngine:
    """Products in C without the GIL; a call costs about 1.5 microseconds besides the bytes.

    Args:
        level: The instruction set to use, one of ``native_levels()``; None takes the best.
            Named ones serve tests and measurements.
        stream: Store results past the caches (non-temporal); None decides by size.
        fetch: Ask for each source's next bytes a little before they are used, instead of leaving it
            to the processor; None decides by size.

    Raises:
        EngineUnavailableError: The extension was not built, or the processor lacks the level.
    """

    name = "native"

    def __init__(
        self,
        level: str | None = None,
        *,
        stream: bool | None = None,
        fetch: bool | None = None,
    ) -> None:
        if not _BUILT:
            raise EngineUnavailableError(
                f"the native engine is not built here ({_WHY_MISSING}); install a C compiler and "
                "reinstall holdfast, or use another engine"
            )
        usable = native_levels()
        if level is not None and level not in usable:
            raise EngineUnavailableError(
                f"the native engine has no usable level {level!r}; usable on this processor: "
                f"{', '.join(usable)}. Name one of them or none"
            )
        self.level = usable[0] if level is None else level
        self.detail = self.level
        self._level_index = [name for name, _ in _native.levels()].index(self.level)
        self._stream = _AUTO if stream is None else int(stream)
        self._fetch = _AUTO if fetch is None else int(fetch)

    def matmul(
        self,
        coefficients: npt.NDArray[np.uint8],
        sources: Sequence[Buffer],
        destinations: Sequence[Buffer],
        *,
        accumulate: bool = False,
    ) -> None:
        """See ``holdfast.coding.engines.Engine.matmul``. The checks are made in C."""
        _native.matmul(
            coefficients,
            sources,
            destinations,
            accumulate,
            self._level_index,
            self._stream,
            self._fetch,
        )

    def fingerprint(self, chunk: Buffer) -> bytes:
        """See ``holdfast.coding.engines.Engine.fingerprint``."""
        return _native.fingerprint(chunk, self._level_index)
