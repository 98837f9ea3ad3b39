"""The engine of Intel's ISA-L, where that library is present, through ctypes.

The package pyeclib (extra ``isal``) carries a recent ISA-L as a separate shared library; a system's
own libisal serves as well. ISA-L brings the arithmetic only: matrices are ours, because the one of
its ``gf_gen_rs_matrix`` does not survive all erasures. Its tables differ from one processor to the
next (ISA-L issues 334, 391), so they never leave this object.
"""

import ctypes
import importlib.metadata
from collections.abc import Sequence
from functools import cache, lru_cache

import numpy as np
import numpy.typing as npt
from holdfast.coding.errors import EngineUnavailableError
from holdfast.coding.numpy_engine import NumpyEngine
from holdfast.coding.operands import Buffer, address_of, check_operands

# ISA-L counts bytes in a C int; longer chunks are done in parts.
PART_BYTES = 1 << 30

# Per coefficient, as ISA-L's header demands.
TABLE_BYTES = 32
CACHED_TABLES_COUNT = 256

SYSTEM_LIBRARY = "libisal.so.2"


class IsalEngine:
    """Products by ``ec_encode_data``; the GIL is released, but a call costs some 20 microseconds.

    Raises:
        EngineUnavailableError: No ISA-L library was found.
    """

    name = "isal"

    def __init__(self) -> None:
        self._library, self.detail = _load()
        self._tables = lru_cache(maxsize=CACHED_TABLES_COUNT)(self._make_tables)

    def matmul(
        self,
        coefficients: npt.NDArray[np.uint8],
        sources: Sequence[Buffer],
        destinations: Sequence[Buffer],
        *,
        accumulate: bool = False,
    ) -> None:
        """See ``holdfast.coding.engines.Engine.matmul``."""
        operands = check_operands(coefficients, sources, destinations)
        rows, columns = operands.coefficients.shape
        if columns == 0 and not accumulate:
            for destination in operands.destinations:
                destination.fill(0)
        if rows == 0 or columns == 0:
            return
        tables = self._tables(operands.coefficients.tobytes(), rows, columns)
        source_addresses = [address_of(view) for view in operands.sources]
        destination_addresses = [address_of(view) for view in operands.destinations]
        for start in range(0, operands.chunk_bytes, PART_BYTES):
            part_bytes = min(PART_BYTES, operands.chunk_bytes - start)
            inputs = (ctypes.c_void_p * columns)(*[at + start for at in source_addresses])
            outputs = (ctypes.c_void_p * rows)(*[at + start for at in destination_addresses])
            if not accumulate:
                self._library.ec_encode_data(part_bytes, columns, rows, tables, inputs, outputs)
                continue
            for column in range(columns):
                self._library.ec_encode_data_update(part_bytes, columns, rows, column, tables, inputs[column], outputs)

    def fingerprint(self, chunk: Buffer) -> bytes:
        """See ``holdfast.coding.engines.Engine.fingerprint``. ISA-L has none: numpy's."""
        return NumpyEngine().fingerprint(chunk)

    def _make_tables(self, coefficients: bytes, rows: int, columns: int) -> ctypes.Array[ctypes.c_char]:
        tables = ctypes.create_string_buffer(TABLE_BYTES * rows * columns)
        self._library.ec_init_tables(columns, rows, coefficients, tables)
        return tables


@cache
def _load() -> tuple[ctypes.CDLL, str]:
    """The library and what to call it in reports. An installed pyeclib wins: it is the newest."""
    tried = []
    for path in [*_bundled_paths(), SYSTEM_LIBRARY]:
        try:
            library = ctypes.CDLL(path)
            _declare(library)
        except (OSError, AttributeError) as error:
            tried.append(f"{path}: {error}")
        else:
            return library, f"ISA-L from {path}"
    raise EngineUnavailableError(
        f"ISA-L was not found (tried {'; '.join(tried)}); "
        "install it with pip install 'holdfast[isal]', or use another engine"
    )


def _bundled_paths() -> list[str]:
    try:
        files = importlib.metadata.files("pyeclib") or []
    except importlib.metadata.PackageNotFoundError:
        return []
    return [str(f.locate()) for f in files if f.name.startswith("libisal") and ".so" in f.name]


def _declare(library: ctypes.CDLL) -> None:
    number, pointer = ctypes.c_int, ctypes.c_void_p
    library.ec_init_tables.argtypes = [number, number, ctypes.c_char_p, pointer]
    library.ec_encode_data.argtypes = [number, number, number, pointer, pointer, pointer]
    library.ec_encode_data_update.argtypes = [number] * 4 + [pointer] * 3
    for function in (library.ec_init_tables, library.ec_encode_data, library.ec_encode_data_update):
        function.restype = None
