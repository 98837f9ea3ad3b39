"""How many data and parity chunks a stripe has. Says nothing about which node holds them."""

from dataclasses import dataclass

from holdfast.coding.errors import CodingError

# The code's chunks are told apart by distinct non-zero elements of GF(2^8), of which there are 255.
MAX_CODE_LENGTH = 255


@dataclass(frozen=True, slots=True)
class CodeParams:
    """The shape of a systematic code: k data chunks, m parity chunks, n = k + m.

    Positions 0..k-1 of a code word are data, k..n-1 parity. Any k of the n chunks give back all.

    Raises:
        CodingError: k < 1, m < 0 or k + m > 255.
    """

    data_count: int
    parity_count: int

    def __post_init__(self) -> None:
        if self.data_count < 1:
            raise CodingError(f"a code needs at least 1 data chunk, got k = {self.data_count}; raise k")
        if self.parity_count < 0:
            raise CodingError(f"a code needs at least 0 parity chunks, got m = {self.parity_count}; raise m")
        if self.total_count > MAX_CODE_LENGTH:
            raise CodingError(
                f"k + m must be at most {MAX_CODE_LENGTH} in GF(2^8), got "
                f"{self.data_count} + {self.parity_count} = {self.total_count}; use smaller groups"
            )

    @property
    def total_count(self) -> int:
        """Chunks of one stripe, n = k + m."""
        return self.data_count + self.parity_count
