"""Throws arguments of every kind at the C functions, through Python, and compares what they return.

    python tests/coding/fuzz_native.py --cases 3000 --seed 1 [--extension PATH]

Ends with "ok" and exit code 0; a crash of the process is the finding. ``--extension`` loads another
build of the extension, such as one with sanitizers (see test_native.py).
"""

import argparse
import importlib.util
import random
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from holdfast.coding.errors import CodingError
from holdfast.coding.naive import NaiveEngine

POOL_BYTES = 4096
ACCEPTABLE = (CodingError, TypeError, OverflowError, ValueError)
NAIVE = NaiveEngine()


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("holdfast.coding._native", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def any_buffer(rng: random.Random, size: int, pool: bytearray) -> object:
    """Mostly a buffer of ``size`` bytes, sometimes what nobody should pass."""
    start = rng.randrange(POOL_BYTES - 2 * size - 2)
    odd: list[object] = [
        None,
        5,
        "text",
        [1, 2],
        bytes(size),
        bytes(size + 1),
        memoryview(pool)[start : start + 2 * size : 2],
        memoryview(pool)[start : start + size][::-1],
        np.zeros((size, 2), dtype=np.uint8)[:, 0],
        np.zeros(size, dtype=np.float32),
        np.array(7),
        np.array([None] * size),
        range(size),
    ]
    if rng.random() < 0.08:
        return rng.choice(odd)
    if rng.random() < 0.3:
        return memoryview(pool)[start : start + size]
    return bytearray(rng.randbytes(size))


def any_matrix(rng: random.Random, rows: int, columns: int) -> object:
    good = np.frombuffer(rng.randbytes(rows * columns), dtype=np.uint8).reshape(rows, columns)
    odd: list[object] = [
        None,
        b"abc",
        good.astype(np.float64),
        good.astype(np.int8),
        good.reshape(-1),
        good[None],
        np.zeros((300, 2), dtype=np.uint8),
        np.zeros((rows, columns + 1), dtype=np.uint8),
        np.array(3, dtype=np.uint8),
    ]
    even = [good, good.T.copy().T, np.repeat(good, 2, axis=1)[:, ::2], good.data]
    return rng.choice(odd) if rng.random() < 0.1 else rng.choice(even)


def any_flags(rng: random.Random, native: ModuleType) -> list[object]:
    usable = [index for index, (_, runs) in enumerate(native.levels()) if runs]
    level: object = rng.choice(usable)
    if rng.random() < 0.05:
        level = rng.choice([-1, 99, 2**70, None, "avx2", *range(len(native.levels()))])
    flags: list[object] = [rng.choice([True, False, 0, 1]), level]
    return flags + [rng.choice([-1, 0, 1, 2, -1, 0, 1, 2, 2**31, None]) for _ in range(2)]


def one_call(rng: random.Random, native: ModuleType, pool: bytearray) -> bool:
    """True if the arguments were accepted; the result is right then."""
    columns, rows = rng.randrange(6), rng.randrange(6)
    size = rng.choice([0, 1, 15, 16, 33, 64, 100, 500])
    arguments: list[Any] = [
        any_matrix(rng, rows, columns),
        [any_buffer(rng, size, pool) for _ in range(columns)],
        [any_buffer(rng, size, pool) for _ in range(rows)],
        *any_flags(rng, native),
    ]
    if rng.random() < 0.03:
        arguments[rng.choice([1, 2])] = rng.choice([None, 7, b"abc", {"a": 1}])
    if rng.random() < 0.02:
        arguments = arguments[: rng.randrange(7)]
    try:
        before = [memoryview(part).tobytes() for part in arguments[2]]
        sources = [memoryview(part).tobytes() for part in arguments[1]]
    except (TypeError, ValueError, IndexError):
        before, sources = [], []
    try:
        native.matmul(*arguments)
    except ACCEPTABLE:
        return False
    expected = [bytearray(part) for part in before]
    NAIVE.matmul(np.asarray(arguments[0]), sources, expected, accumulate=bool(arguments[3]))
    assert [memoryview(part).tobytes() for part in arguments[2]] == [bytes(part) for part in expected]
    return True


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--extension", type=Path)
    options = parser.parse_args()
    if options.extension:
        native = load(options.extension)
    else:
        from holdfast.coding import _native as native  # noqa: PLC0415 - may not be built
    rng = random.Random(options.seed)
    pool = bytearray(rng.randbytes(POOL_BYTES))
    accepted = sum(one_call(rng, native, pool) for _ in range(options.cases))
    for _ in range(options.cases // 10):
        try:
            native.fingerprint(any_buffer(rng, 300, pool), rng.choice([*range(-1, 8), None]))
        except ACCEPTABLE:
            continue
    assert options.cases / 5 < accepted < options.cases
    print(f"ok, {accepted} of {options.cases} calls accepted")
    return 0


if __name__ == "__main__":
    sys.exit(main())
