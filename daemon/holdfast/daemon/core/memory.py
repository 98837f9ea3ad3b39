"""The name of a piece of arena memory, and the order of what lies in it.

Covers names and offsets; the shell owns the bytes. A slot has two pieces: `data` (this node's image, shared with its
trainers) and `guard` (this node's parity chunks, then a table of digests), which leaves the daemon never.
"""

from dataclasses import dataclass
from typing import NamedTuple

from holdfast.protocol.layout import Geometry

ESTATE_SLOTS_FROM = 1 << 19  # "slots" from here on hold what absent nodes left, all of it in their guard
GENERATION_BITS = 31  # of the generations that one epoch may use up; with the epoch above them they still fit a count
READ_SLOTS_FROM = 1 << 20  # "slots" from here on are no slots of a snapshot, but memory lent to readers


class Memory(NamedTuple):
    """One slot's memory. A slot whose size changes gets new memory under the next generation."""

    job: str
    slot: int
    generation: int

    def __str__(self) -> str:
        return f"{self.job}/{self.slot}/{self.generation}"


class ChunkKey(NamedTuple):
    """Names a received frame that the shell keeps."""

    job: str
    attempt: int
    step: int
    node: int
    kind: str
    chunk: int
    reading: bool


@dataclass(frozen=True, slots=True)
class Sizes:
    """Bytes of one slot on one node."""

    data_bytes: int
    parity_bytes: int
    digest_count: int

    @property
    def guard_bytes(self) -> int:
        """Parity chunks, then the digest table: 8 bytes each."""
        return self.parity_bytes + 8 * self.digest_count

    @property
    def total_bytes(self) -> int:
        """What one slot counts against the budget."""
        return self.data_bytes + self.guard_bytes


def sizes_of(geometry: Geometry, node: int) -> Sizes:
    """The sizes of one slot of `node`."""
    return Sizes(
        data_bytes=geometry.data_bytes(node),
        parity_bytes=geometry.parity_bytes(node),
        digest_count=geometry.digest_count(node),
    )
