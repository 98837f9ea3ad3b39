"""A shard whose reader compares digests itself, chunk by chunk, just before it copies: each byte is read once.

Covers which chunks lie under which bytes of a shard, and whether they are what was committed.
"""

from dataclasses import dataclass

from holdfast.client.state_errors import RottenShardError
from holdfast.client.tensor_bytes import ByteArray
from holdfast.coding import chunk_digest
from holdfast.protocol.frames import unpack_digests
from holdfast.protocol.messages import ShardOpened


@dataclass(frozen=True, slots=True)
class Checks:
    """The chunks that a shard touches.

    Attributes:
        image: The slot's memory: this node's image, whole chunks.
        offset_bytes: Where the shard begins in it.
        first_chunk: The number of the chunk in which it begins.
        digests: Of that chunk and those after it, to the shard's last.
    """

    image: memoryview
    offset_bytes: int
    chunk_bytes: int
    first_chunk: int
    digests: list[int]

    @classmethod
    def of(cls, image: memoryview, opened: ShardOpened) -> "Checks | None":
        """What is to be compared; None where the daemon has done it."""
        if not opened.digests:
            return None
        digests = unpack_digests(opened.digests)
        return cls(image, opened.offset_bytes, opened.chunk_bytes, opened.first_chunk, digests)

    def check(self, start: int, end: int) -> None:
        """Compare every chunk under the shard's bytes from `start` to `end`. Any thread; the interpreter lock is free.

        Raises:
            RottenShardError: a chunk is not what was committed.
        """
        low, high = self.span(start, end)
        self.check_copy(self.image[low:high], low)

    def span(self, start: int, end: int) -> tuple[int, int]:
        """From where to where in the image the chunks lie that are under the shard's bytes from `start` to `end`."""
        low = (self.offset_bytes + start) // self.chunk_bytes * self.chunk_bytes
        return low, -(-(self.offset_bytes + end) // self.chunk_bytes) * self.chunk_bytes

    def check_copy(self, copy: memoryview | ByteArray, low: int) -> None:
        """Compare whole chunks copied from the image, from `low` on. Any thread; the interpreter lock is free.

        Raises:
            RottenShardError: as ``check``.
        """
        for begin in range(0, copy.nbytes, self.chunk_bytes):
            chunk = (low + begin) // self.chunk_bytes
            if chunk_digest(copy[begin : begin + self.chunk_bytes]) != self.digests[chunk - self.first_chunk]:
                raise RottenShardError(f"chunk {chunk} of this node's image fails its digest")

    def cuts(self, start: int, end: int, step_bytes: int) -> list[int]:
        """Places in the shard from `start` to `end`, about `step_bytes` apart, between which whole chunks lie."""
        step = max(1, step_bytes // self.chunk_bytes) * self.chunk_bytes
        first = (self.offset_bytes + start) // step + 1
        inner = range(first * step - self.offset_bytes, end, step)
        return [start, *inner, end]
