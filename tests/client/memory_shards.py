"""A snapshot in this process's memory, for tests of what reads one: shards by role, and what was read of them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from holdfast.client.dcp_reader import HoldfastReader
from holdfast.client.errors import SupersededError
from holdfast.client.ranges import Committed
from holdfast.client.shard import ShardLayout
from holdfast.protocol.ids import SnapshotId
from holdfast.protocol.layout import Layout, ShardPlace


@dataclass(frozen=True)
class Numbers:
    """A rank of a job in which every rank of the default group takes part, and who else."""

    rank: int
    world_size: int

    def role_of(self, global_rank: int) -> int | None:
        return global_rank if global_rank < self.world_size else None


def staged(state: Mapping[str, object], ranks: Numbers | None = None) -> bytes:
    """One rank's shard of a state; of what others have alike only its share, if `ranks` tells who they are."""
    layout = ShardLayout.build(state, ranks=ranks)
    shard = bytearray(layout.shard_bytes)
    layout.capture().write(memoryview(shard))
    return bytes(shard)


@dataclass
class MemoryShards:
    """Shards by role; each on a node of its own."""

    shards: Sequence[bytes]
    ranges: list[tuple[int, int, int]] = field(default_factory=list)  # (role, offset, length) of every read

    @property
    def layout(self) -> Layout:
        return Layout(tuple(ShardPlace(role, len(shard)) for role, shard in enumerate(self.shards)), 0, 1)

    def read_into(self, role: int, offset_bytes: int, target: memoryview, /) -> None:
        raw = target.cast("B")
        assert 0 <= offset_bytes <= offset_bytes + raw.nbytes <= len(self.shards[role])
        raw[:] = self.shards[role][offset_bytes : offset_bytes + raw.nbytes]
        self.ranges.append((role, offset_bytes, raw.nbytes))


@dataclass
class Source(MemoryShards):
    """A committed snapshot in memory; `newer` appears once that many ranges were read."""

    snapshot: SnapshotId = field(default_factory=lambda: SnapshotId(1, 7))
    superseded_after: int | None = None
    closed: bool = False

    def committed(self) -> Committed | None:
        return Committed(1, self.snapshot, self.layout) if self.shards else None

    def read_into(self, role: int, offset_bytes: int, target: memoryview, /) -> None:
        if self.superseded_after is not None and len(self.ranges) >= self.superseded_after:
            raise SupersededError("gone", newest=SnapshotId(1, 9))
        super().read_into(role, offset_bytes, target)

    def close(self) -> None:
        self.closed = True


def reader_of(*sources: Source, **options: Any) -> HoldfastReader:
    reader = HoldfastReader(job="x", **options)
    left = iter(sources)
    reader._connect = lambda: next(left)
    return reader
