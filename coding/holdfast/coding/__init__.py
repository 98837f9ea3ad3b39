"""Bytes and algebra: Reed-Solomon over GF(2^8), engines that compute it, digests of chunks.

Knows counts, positions and byte lengths; no node, time, network or file. This is the front door:
what is not listed here may change.
"""

from holdfast.coding.digest import DIGEST_BYTES, RunningDigest, chunk_digest
from holdfast.coding.engines import Engine, engine_names, select_engine, why_not_native
from holdfast.coding.errors import (
    BufferMismatchError,
    CodingError,
    EngineUnavailableError,
    NotEnoughShardsError,
)
from holdfast.coding.fingerprint import FINGERPRINT_BYTES, parity_fingerprints, scaled_fingerprint
from holdfast.coding.matrix import decode_matrix, parity_matrix
from holdfast.coding.operands import Buffer
from holdfast.coding.params import MAX_CODE_LENGTH, CodeParams
from holdfast.coding.syndrome import Disagreement, find_disagreement

__all__ = [
    "DIGEST_BYTES",
    "FINGERPRINT_BYTES",
    "MAX_CODE_LENGTH",
    "Buffer",
    "BufferMismatchError",
    "CodeParams",
    "CodingError",
    "Disagreement",
    "Engine",
    "EngineUnavailableError",
    "NotEnoughShardsError",
    "RunningDigest",
    "chunk_digest",
    "decode_matrix",
    "engine_names",
    "find_disagreement",
    "parity_fingerprints",
    "parity_matrix",
    "scaled_fingerprint",
    "select_engine",
    "why_not_native",
]
