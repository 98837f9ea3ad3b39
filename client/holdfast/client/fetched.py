"""All shards of a snapshot in this process's memory, read in one go.

Reading a snapshot holds nothing in the daemons: it is gone once a newer one is committed. Writing takes longer than
reading, so what fits in a part of the memory that is free is read first and written then.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from holdfast.protocol.layout import Layout

SHARE_OF_FREE = 8  # at most one part in so many: training and the daemon's budget come first
MEMINFO = Path("/proc/meminfo")


class ShardBytes(Protocol):
    """Any byte range of any role's shard of one snapshot."""

    @property
    def layout(self) -> Layout:
        """The snapshot's layout."""

    def read_into(self, role: int, offset_bytes: int, target: memoryview, /) -> None:
        """Fill `target` with the bytes from `offset_bytes` of the role's shard on."""


@dataclass(frozen=True, slots=True)
class Fetched:
    """A snapshot that was read; also a `ShardBytes`."""

    layout: Layout
    shards: tuple[bytearray, ...]

    def read_into(self, role: int, offset_bytes: int, target: memoryview, /) -> None:
        """Fill `target` with the bytes from `offset_bytes` of the role's shard on."""
        raw = memoryview(target).cast("B")
        raw[:] = self.shards[role][offset_bytes : offset_bytes + raw.nbytes]

    def read(self, role: int, offset_bytes: int, length_bytes: int) -> bytes:
        """Bytes of the role's shard."""
        return bytes(self.shards[role][offset_bytes : offset_bytes + length_bytes])


def fetched(source: ShardBytes, *, room_bytes: int | None = None) -> ShardBytes:
    """The snapshot in memory, or `source` itself where it does not fit into `room_bytes` (default: a share of free)."""
    layout = source.layout
    room_bytes = free_bytes() // SHARE_OF_FREE if room_bytes is None else room_bytes
    if sum(place.shard_bytes for place in layout.shards) > room_bytes:
        return source
    shards = tuple(bytearray(place.shard_bytes) for place in layout.shards)
    for role, shard in enumerate(shards):
        if shard:
            source.read_into(role, 0, memoryview(shard))
    return Fetched(layout, shards)


def free_bytes() -> int:
    """Memory that can be had without swapping; 0 where the kernel does not say."""
    try:
        lines = MEMINFO.read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:")), 0)
