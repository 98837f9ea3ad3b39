"""One stripe rebuilt as if members were lost, by the engine and by an independent witness, and compared. Pure.

The witness is `reedsolo`, a small library in plain Python that nobody here wrote. The code is byte-identical to what it
computes, so it can rebuild any column of a stripe (one byte of each chunk) from what survives. It takes a fraction of
a millisecond per column, so it rebuilds sampled ones; the engine rebuilds the chunks whole.
"""

import time
from collections.abc import Mapping

import numpy as np
import reedsolo
from holdfast.coding import CodeParams, Engine, chunk_digest, decode_matrix
from holdfast.daemon.core import actions


def drill(
    engine: Engine,
    params: CodeParams,
    action: actions.DrillStripe,
    chunks: Mapping[int, memoryview],
    *,
    own_good: bool,
) -> tuple[tuple[str, ...], int]:
    """Lose and rebuild.

    Args:
        engine: what a real rebuild would use.
        params: the code.
        action: patterns, columns and the digests that data must have.
        chunks: the chunks that are there, by position; only read.
        own_good: whether this node's own chunk has its digest.

    Returns:
        What did not come out right, for people; and the nanoseconds that the engine took for all patterns.
    """
    wrong: list[str] = []
    if not own_good:
        wrong.append("this node's own chunk fails its digest")
    digests = dict(action.digests)
    size = len(next(iter(chunks.values())))
    zero = memoryview(bytes(size))
    whole = {**chunks, **dict.fromkeys(action.zero_positions, zero)}
    coded_ns = 0
    for pattern in action.patterns:
        started_ns = time.perf_counter_ns()
        rebuilt = _rebuild(engine, params, whole, pattern, size)
        coded_ns += time.perf_counter_ns() - started_ns
        lost = ", ".join(map(str, pattern))
        for position, made in rebuilt.items():
            right = made == whole[position] if position in whole else chunk_digest(made) == digests.get(position)
            if not right and (position in whole or position in digests):
                wrong.append(f"with positions {lost} lost, position {position} is not rebuilt as it was")
        for column in action.columns:
            if (text := _witness(params, {**rebuilt, **whole}, pattern, column)) is not None:
                wrong.append(f"with positions {lost} lost, the witness says of column {column}: {text}")
                break
    return tuple(wrong), coded_ns


def _rebuild(
    engine: Engine, params: CodeParams, whole: Mapping[int, memoryview], pattern: tuple[int, ...], size: int
) -> dict[int, bytearray]:
    """The chunks at the lost positions, from k that are left."""
    left = [position for position in sorted(whole) if position not in pattern][: params.data_count]
    outputs = {position: bytearray(size) for position in pattern}
    rows = decode_matrix(params, available=left, wanted=list(pattern))
    engine.matmul(np.ascontiguousarray(rows), [whole[position] for position in left], list(outputs.values()))
    return outputs


def _witness(
    params: CodeParams, whole: Mapping[int, memoryview | bytearray], pattern: tuple[int, ...], column: int
) -> str | None:
    """What the witness finds wrong with one column, from the positions that are left alone; None if nothing."""
    codec = reedsolo.RSCodec(params.parity_count)  # its defaults: polynomial 0x11d, generator 2, first root 0
    true = bytes(whole[position][column] for position in range(params.total_count))
    received = bytearray(true)
    for position in pattern:
        received[position] = 0
    try:
        _, found, _ = codec.decode(received, erase_pos=list(pattern))
    except reedsolo.ReedSolomonError as error:
        return str(error)
    return None if bytes(found) == true else f"expected {true.hex()}, found {bytes(found).hex()}"
