"""What is this engine's own: finding the library, parts of long chunks, and other matrices."""

import importlib.metadata

import holdfast.coding.isal
import numpy as np
import pytest
from holdfast.coding import EngineUnavailableError, engine_names
from holdfast.coding.isal import IsalEngine
from holdfast.coding.naive import NaiveEngine

present = pytest.mark.skipif("isal" not in engine_names(), reason="no ISA-L on this machine")


@present
def test_the_library_of_an_installed_pyeclib_is_found() -> None:
    assert IsalEngine().detail.startswith("ISA-L from ")


@present
@pytest.mark.parametrize("accumulate", [False, True])
def test_long_chunks_are_done_in_parts(monkeypatch: pytest.MonkeyPatch, *, accumulate: bool) -> None:
    monkeypatch.setattr(holdfast.coding.isal, "PART_BYTES", 1000)
    rng = np.random.default_rng(1)
    matrix = rng.integers(0, 256, (3, 4), dtype=np.uint8)
    sources = [rng.bytes(2345) for _ in range(4)]
    results = [bytearray(rng.bytes(2345)) for _ in range(3)]
    expected = [bytearray(result) for result in results]
    NaiveEngine().matmul(matrix, sources, expected, accumulate=accumulate)
    IsalEngine().matmul(matrix, sources, results, accumulate=accumulate)
    assert results == expected


def test_where_no_library_is_the_error_says_how_to_get_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "files", missing)
    monkeypatch.setattr(holdfast.coding.isal, "SYSTEM_LIBRARY", "libnone.so.9")
    holdfast.coding.isal._load.cache_clear()
    with pytest.raises(EngineUnavailableError, match=r"tried libnone.so.9.*pip install 'holdfast"):
        IsalEngine()
    assert "isal" not in engine_names()
    holdfast.coding.isal._load.cache_clear()
