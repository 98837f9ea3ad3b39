"""The digest that follows a chunk for life: XXH3-64, seed 0, from the package ``xxhash``.

At memory speed on one core, equal on all machines whatever their byte order, and the GIL is
released. It finds accidents, not adversaries. It is not linear; see ``fingerprint`` for that.
"""

import xxhash
from holdfast.coding.operands import Buffer, bytes_of

DIGEST_BYTES = 8  # of the digest itself, where it is stored or sent


def chunk_digest(chunk: Buffer) -> int:
    """Digest of a C-contiguous buffer of any length: an unsigned 64-bit number.

    Raises:
        BufferMismatchError: Not a buffer, or not contiguous.
    """
    return xxhash.xxh3_64_intdigest(bytes_of(chunk, "chunk").data)


class RunningDigest:
    """The digest of what comes piece by piece: that of all pieces in one."""

    def __init__(self) -> None:
        self._hash = xxhash.xxh3_64()

    def add(self, piece: Buffer) -> None:
        """Take in the next piece.

        Raises:
            BufferMismatchError: Not a buffer, or not contiguous.
        """
        self._hash.update(bytes_of(piece, "piece").data)

    @property
    def value(self) -> int:
        """The digest of all that was added so far: an unsigned 64-bit number."""
        return self._hash.intdigest()
