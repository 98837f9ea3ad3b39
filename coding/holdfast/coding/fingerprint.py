"""A fingerprint that parity inherits: do data and parity of a stripe agree, without moving them?

A chunk is cut into blocks of 256 bytes, the last one padded with zeros; its fingerprint is the sum
over b of 2^b * block b in GF(2^8), byte by byte. That is linear, as the code is: the fingerprint of
a parity chunk equals the parity of the data chunks' fingerprints, so the members of a group compare
256 bytes each instead of chunks. (Hendricks, Ganger, Reiter, "Verifying distributed erasure-coded
data", PODC 2007.) Zeros appended to a chunk do not change it.

It finds accidents, not adversaries, and is no replacement for the digest: 2 has order 255, so
changes that are equal and 65280 bytes apart cancel out.
"""

from collections.abc import Sequence
from functools import cache

import numpy as np
from holdfast.coding.errors import CodingError
from holdfast.coding.field import ELEMENT_COUNT, GENERATOR, add, multiples_of, power, product_table
from holdfast.coding.matrix import parity_matrix
from holdfast.coding.operands import Buffer, Bytes, bytes_of
from holdfast.coding.params import CodeParams

FINGERPRINT_BYTES = 256

# After this many blocks the factors 2^b start again.
PERIOD_BLOCKS = ELEMENT_COUNT - 1


def naive_fingerprint(chunk: Buffer) -> bytes:
    """The definition, from the last block to the first: total = 2 * total + block."""
    content = bytes_of(chunk, "chunk").tobytes()
    content += bytes(-len(content) % FINGERPRINT_BYTES)
    total = bytes(FINGERPRINT_BYTES)
    for start in range(len(content) - FINGERPRINT_BYTES, -1, -FINGERPRINT_BYTES):
        block = content[start : start + FINGERPRINT_BYTES]
        total = add(total.translate(multiples_of(GENERATOR)), block)
    return total


def numpy_fingerprint(chunk: Buffer) -> bytes:
    """The same by folding: blocks one period apart have the same factor and are XORed first."""
    content = bytes_of(chunk, "chunk")
    period_bytes = PERIOD_BLOCKS * FINGERPRINT_BYTES
    whole_bytes = content.size - content.size % period_bytes
    folded: Bytes = np.bitwise_xor.reduce(content[:whole_bytes].reshape(-1, period_bytes), axis=0, dtype=np.uint8)
    folded[: content.size - whole_bytes] ^= content[whole_bytes:]
    products = product_table()[_factors()[:, None], folded.reshape(PERIOD_BLOCKS, -1)]
    return bytes(np.bitwise_xor.reduce(products, axis=0, dtype=np.uint8))


def parity_fingerprints(params: CodeParams, data_fingerprints: Sequence[bytes]) -> tuple[bytes, ...]:
    """What the m parity chunks' fingerprints must be, given those of the k data chunks, in order.

    Raises:
        CodingError: Not k fingerprints, or one of another length than 256 bytes.
    """
    sizes = {len(fingerprint) for fingerprint in data_fingerprints} - {FINGERPRINT_BYTES}
    if len(data_fingerprints) != params.data_count or sizes:
        raise CodingError(
            f"expected {params.data_count} fingerprints of {FINGERPRINT_BYTES} bytes, got "
            f"{len(data_fingerprints)} and lengths {sorted(map(len, data_fingerprints))}"
        )
    results = []
    for row in parity_matrix(params).tolist():
        total = bytes(FINGERPRINT_BYTES)
        for coefficient, fingerprint in zip(row, data_fingerprints, strict=True):
            total = add(total, fingerprint.translate(multiples_of(coefficient)))
        results.append(total)
    return tuple(results)


def scaled_fingerprint(fingerprint: bytes, factor: int) -> bytes:
    """The fingerprint of ``factor`` times a chunk, from that of the chunk: 256 bytes; ``factor`` is 0 to 255."""
    return fingerprint.translate(multiples_of(factor))


@cache
def _factors() -> Bytes:
    """2^b for the blocks b of one period."""
    return np.array([power(GENERATOR, block) for block in range(PERIOD_BLOCKS)], dtype=np.uint8)
