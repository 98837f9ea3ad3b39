"""The public names of the room: what is not in this list may change."""

import holdfast.coding


def test_the_list_of_public_names_is_a_promise() -> None:
    assert sorted(holdfast.coding.__all__) == [
        "Buffer",
        "BufferMismatchError",
        "CodeParams",
        "CodingError",
        "DIGEST_BYTES",
        "Disagreement",
        "Engine",
        "EngineUnavailableError",
        "FINGERPRINT_BYTES",
        "MAX_CODE_LENGTH",
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
