"""Which chunk of a stripe is wrong, seen from the fingerprints of all its chunks alone. No chunk is touched here.

The syndrome of a stripe is, row by row, the parity's fingerprint minus what the data's fingerprints say it must be:
zero for a code word. A change E of one data chunk i shows in every row as P[row, i] * E, so the ratio of the rows names
i; a change of one parity chunk shows in its own row alone. One wrong chunk can be told from another only with
m >= 2: with one row every chunk of the stripe explains it equally well. Two wrong chunks may look like one other chunk
where m = 2; whoever acts on a located position must prove it (a data chunk by its digest).
"""

from collections.abc import Sequence
from dataclasses import dataclass

from holdfast.coding.errors import CodingError
from holdfast.coding.field import add, inverse, multiples_of
from holdfast.coding.fingerprint import FINGERPRINT_BYTES, parity_fingerprints
from holdfast.coding.matrix import parity_matrix
from holdfast.coding.params import CodeParams

_ZERO = bytes(FINGERPRINT_BYTES)


@dataclass(frozen=True, slots=True)
class Disagreement:
    """A stripe whose parity is not that of its data.

    Attributes:
        rows: the parity rows, 0..m-1, that do not fit the data as it is.
        position: the one chunk whose change explains everything (0..k-1 data, k..k+m-1 parity); None if no single
            chunk does, or several do.
    """

    rows: tuple[int, ...]
    position: int | None


def find_disagreement(params: CodeParams, fingerprints: Sequence[bytes]) -> Disagreement | None:
    """What is wrong with a stripe; None if its data and parity agree.

    Args:
        params: The code.
        fingerprints: Of all k + m chunks in code-word order, 256 bytes each; a chunk of zeros has a fingerprint of
            zeros.

    Raises:
        CodingError: Not k + m fingerprints, or one of another length.
    """
    k = params.data_count
    sizes = {len(fingerprint) for fingerprint in fingerprints} - {FINGERPRINT_BYTES}
    if len(fingerprints) != params.total_count or sizes:
        raise CodingError(
            f"expected {params.total_count} fingerprints of {FINGERPRINT_BYTES} bytes, got "
            f"{len(fingerprints)} and lengths {sorted(map(len, fingerprints))}"
        )
    expected = parity_fingerprints(params, fingerprints[:k])
    syndrome = [add(found, wanted) for found, wanted in zip(fingerprints[k:], expected, strict=True)]
    rows = tuple(row for row, value in enumerate(syndrome) if value != _ZERO)
    if not rows:
        return None
    explanations = [k + rows[0]] if len(rows) == 1 else []
    explanations += [position for position in range(k) if _explains(params, syndrome, position)]
    return Disagreement(rows, explanations[0] if len(explanations) == 1 else None)


def _explains(params: CodeParams, syndrome: Sequence[bytes], position: int) -> bool:
    """Whether a change of this data chunk alone gives the syndrome."""
    column = parity_matrix(params)[:, position].tolist()
    change = syndrome[0].translate(multiples_of(inverse(column[0])))
    return all(change.translate(multiples_of(factor)) == value for factor, value in zip(column, syndrome, strict=True))
