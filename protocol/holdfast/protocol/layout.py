"""Who stages how much: the layout of one job over the nodes, agreed once per plan.

Covers sizes and places derived from the table of shards. Knows nothing of what is inside a shard.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated

import msgspec
from holdfast.coding import chunk_digest
from holdfast.protocol import limits
from holdfast.protocol.fields import Count, Every, NodeNumber
from holdfast.protocol.placement import Placement
from holdfast.protocol.stripes import StripeMap
from msgspec import Meta


class ShardPlace(msgspec.Struct, frozen=True, array_like=True):
    """The node on which a role stages, and the size of its shard."""

    node: NodeNumber
    shard_bytes: Count


class Layout(msgspec.Struct, frozen=True, dict=True):
    """One job's shards by role, and its cadence.

    Attributes:
        shards: index is the role.
        first_step: the first step that is staged.
        every: steps between two snapshots.
        version: counts the plans of one attempt, from 1; a later plan replaces an earlier one.
    """

    shards: Annotated[tuple[ShardPlace, ...], Meta(max_length=limits.WORLD_SIZE_MAX)]
    first_step: Count
    every: Every
    version: Count = 1

    @cached_property
    def layout_id(self) -> int:
        """A digest of the shards: two layouts with the same id have the same images.

        The cadence is left out: it may differ from attempt to attempt while the memory stays as it is.
        """
        return chunk_digest(msgspec.msgpack.encode(self.shards))

    def roles_on(self, node: int) -> tuple[int, ...]:
        """Roles that stage on `node`, in image order."""
        return self._by_node.get(node, ((), 0))[0]

    def offset_of(self, role: int) -> int:
        """Where the shard of `role` begins in its node's image, in bytes."""
        return sum(self.shards[other].shard_bytes for other in self.roles_on(self.shards[role].node) if other < role)

    def image_bytes(self, node: int) -> int:
        """Bytes of all shards of `node`, without the padding to whole chunks."""
        return self._by_node.get(node, ((), 0))[1]

    @cached_property
    def _by_node(self) -> dict[int, tuple[tuple[int, ...], int]]:
        """Node -> its roles and the bytes of their shards: one pass over all shards, however many nodes ask."""
        roles: dict[int, list[int]] = {}
        for role, place in enumerate(self.shards):
            roles.setdefault(place.node, []).append(role)
        return {
            node: (tuple(mine), sum(self.shards[role].shard_bytes for role in mine)) for node, mine in roles.items()
        }

    def chunk_count(self, node: int, chunk_bytes: int) -> int:
        """Whole chunks of the node's image."""
        return -(-self.image_bytes(node) // chunk_bytes)

    def group_chunks(self, group: Iterable[int], chunk_bytes: int) -> int:
        """Data chunks of all members of a group."""
        return sum(self.chunk_count(node, chunk_bytes) for node in group)

    def is_due(self, step: int) -> bool:
        """Whether the agreed cadence stages `step`."""
        return step >= self.first_step and (step - self.first_step) % self.every == 0


@dataclass(frozen=True)
class Geometry:
    """Sizes and stripes that follow from (layout, placement, code): the same on every node that computes them."""

    layout: Layout
    placement: Placement
    parity_count: int
    chunk_bytes: int

    def group_of(self, node: int) -> tuple[int, ...]:
        """The nodes of the group of `node`, in member order."""
        return self.placement.groups[self.placement.group_of(node)]

    def stripes(self, node: int) -> StripeMap:
        """The stripe map of the group of `node`."""
        return self._stripe_maps[self.placement.group_of(node)]

    @cached_property
    def _stripe_maps(self) -> tuple[StripeMap, ...]:
        return tuple(
            StripeMap(
                parity_count=self.parity_count,
                chunk_counts=tuple(self.layout.chunk_count(node, self.chunk_bytes) for node in group),
            )
            for group in self.placement.groups
        )

    @cached_property
    def participants(self) -> frozenset[int]:
        """Nodes whose fact a commit needs: all members of every group that holds a byte of this job."""
        return frozenset(
            node
            for group, stripes in zip(self.placement.groups, self._stripe_maps, strict=True)
            if any(stripes.chunk_counts)
            for node in group
        )

    def data_bytes(self, node: int) -> int:
        """Memory of the node's image in one slot, padded to whole chunks."""
        return self.layout.chunk_count(node, self.chunk_bytes) * self.chunk_bytes

    def parity_bytes(self, node: int) -> int:
        """Memory of the node's parity in one slot."""
        group = self.group_of(node)
        return self.stripes(node).parity_chunk_count(group.index(node)) * self.chunk_bytes

    def digest_count(self, node: int) -> int:
        """Digests kept with one slot: every data chunk of the group and this node's parity chunks."""
        return sum(self.stripes(node).chunk_counts) + self.parity_bytes(node) // self.chunk_bytes
