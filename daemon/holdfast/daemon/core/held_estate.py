"""This node's part of what absent nodes left of a snapshot, whole and in held memory.

Covers the record and its use as a term of a sum. How it comes about and when it goes is in `reprotect`.
"""

from dataclasses import dataclass

from holdfast.daemon.core.actions import OwnTerm
from holdfast.daemon.core.memory import Memory, Sizes
from holdfast.protocol.estates import Estate, estate_of
from holdfast.protocol.ids import SnapshotId
from holdfast.protocol.layout import Geometry


@dataclass(frozen=True, slots=True)
class HeldEstate:
    """One part.

    Attributes:
        snapshot: whose chunks they are.
        absent: the nodes that held them.
        layout_id: of the snapshot.
        memory: where they are, counted in chunks from the start of its guard.
        digests: of every chunk.
    """

    snapshot: SnapshotId
    absent: tuple[int, ...]
    layout_id: int
    memory: Memory
    digests: tuple[int, ...]

    def own_term(self, chunk: int, factor: int) -> OwnTerm | None:
        """A chunk of it as a term of a sum; None if there is no such chunk."""
        if chunk >= len(self.digests):
            return None
        return OwnTerm(self.memory, "parity", chunk, self.digests[chunk], factor)


def estate_in(geometry: Geometry, group: tuple[int, ...], absent: tuple[int, ...]) -> Estate | None:
    """The estate of some nodes of a group; None if they are not all of it, or nobody would be left."""
    if not absent or not set(absent) < set(group):
        return None
    return estate_of(geometry.stripes(group[0]), tuple(sorted(group.index(node) for node in absent)))


def part_sizes(geometry: Geometry, node: int, absent: tuple[int, ...]) -> Sizes | None:
    """The memory of a node's part; None if it has none."""
    group = geometry.group_of(node)
    estate = estate_in(geometry, group, absent)
    if estate is None or node in absent:
        return None
    count = estate.chunk_count(group.index(node))
    return Sizes(data_bytes=0, parity_bytes=count * geometry.chunk_bytes, digest_count=count)
