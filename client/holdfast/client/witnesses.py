"""Whether what came back is what each rank had: bytes that a rank kept of what others staged, against what they staged.

Replicas are taken to be equal on torch's word. Here is where it would be found out that they were not.
"""

from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

import numpy as np
import torch
from holdfast.client.manifest import Header, Manifest, TensorEntry, show_path
from holdfast.client.replicas import layout_claims
from holdfast.client.tensor_bytes import ByteArray

PATHS_SHOWN = 1


class ShardBytes(Protocol):
    """Any byte range of any role's shard."""

    def read_into(self, role: int, offset_bytes: int, target: memoryview, /) -> None:
        """Fill `target` with the bytes from `offset_bytes` of the role's shard on."""


class Head(Protocol):
    """What a shard says of itself."""

    @property
    def header(self) -> Header:
        """Where its parts lie."""

    @property
    def manifest(self) -> Manifest:
        """What lies there."""


def strangers(
    manifest: Manifest, seen: Callable[[int, int], ByteArray], filled: Iterable[tuple[TensorEntry, torch.Tensor]]
) -> list[str]:
    """Which tensors are not what a shard's witnesses saw of them; by path.

    Args:
        manifest: the shard's.
        seen: bytes of its payload, by place and length.
        filled: entries that lie in pools, and all their bytes in C order, flat, on any device; others are not judged.
    """
    by_pool: list[list[tuple[int, TensorEntry, torch.Tensor]]] = [[] for _ in manifest.pools]
    for entry, raw in filled:
        assert entry.pool is not None
        by_pool[entry.pool].append((entry.offset, entry, raw))
    for places in by_pool:
        places.sort(key=lambda place: place[0])
    starts = [[place[0] for place in places] for places in by_pool]
    found = []
    for witness in manifest.witnesses:
        index = bisect_right(starts[witness.pool], witness.start) - 1
        if index < 0:
            continue
        offset, entry, raw = by_pool[witness.pool][index]
        now = raw[witness.start - offset :][: witness.size_bytes].cpu().numpy()
        if len(now) == witness.size_bytes and not np.array_equal(now, seen(witness.offset, witness.size_bytes)):
            found.append(show_path(entry.path))
    return list(dict.fromkeys(found))


def unequal(heads: Sequence[Head], seen: Callable[[int, int, int], bytes]) -> list[str]:
    """Which tensors of a whole snapshot were not equal on all their replicas; by path. For one in memory: many reads.

    Args:
        heads: by role.
        seen: bytes of a shard, by role, place and length.
    """
    holders: dict[tuple[str, int], int] = {}  # by what a pool is, and role: its number there
    claims = [layout_claims(head.manifest) for head in heads]
    for role, (head, mine) in enumerate(zip(heads, claims, strict=True)):
        holders.update({(mine[number][1], role): number for number in range(len(head.manifest.pools))})
    found = []
    for role, (head, mine) in enumerate(zip(heads, claims, strict=True)):
        pooled = [(entry.pool, entry.offset, entry) for entry in head.manifest.tensors if entry.pool is not None]
        pooled.sort(key=lambda each: each[:2])
        for witness in head.manifest.witnesses:
            for other in head.manifest.pools[witness.pool].roles:
                number = holders.get((mine[witness.pool][1], other)) if other < len(heads) else None
                if number is None:
                    continue
                start, stop = heads[other].manifest.pools[number].share
                if not start <= witness.start < stop:
                    continue
                place = heads[other].header.payload_offset + heads[other].manifest.pools[number].offset
                theirs = seen(other, place + witness.start - start, witness.size_bytes)
                if theirs != seen(role, head.header.payload_offset + witness.offset, witness.size_bytes):
                    at = bisect_right(pooled, (witness.pool, witness.start), key=lambda each: each[:2]) - 1
                    found.append(show_path(pooled[at][2].path))
    return list(dict.fromkeys(found))


def read_witnesses(source: ShardBytes, role: int, head: Head) -> Callable[[int, int], ByteArray]:
    """The witnesses of a role's shard in one read, for `strangers`.

    Raises:
        HoldfastError: bytes can't be had.
    """
    ends = [witness.offset + witness.size_bytes for witness in head.manifest.witnesses]
    first = min((witness.offset for witness in head.manifest.witnesses), default=0)
    raw = bytearray(max(ends, default=0) - first)
    if raw:
        source.read_into(role, head.header.payload_offset + first, memoryview(raw))
    lines = np.frombuffer(raw, dtype=np.uint8)
    return lambda offset, size: lines[offset - first : offset - first + size]


def refusal(paths: Sequence[str], role: int) -> str:
    """What is said where a restore ends because of strangers."""
    return (
        f"{_named(paths)} was not equal on all replicas when the snapshot was staged, though DDP or a Replicate "
        f"placement promises it: what rank {role} had is not what was stored. The live state is overwritten: build it "
        'anew. Begin from a durable copy made before, or make the Snapshotter with replicated="none": it accepts this '
        "snapshot as the replicas gave it, and has each rank stage its own from then on"
    )


def acceptance(paths: Sequence[str]) -> str:
    """What is said where it goes on in spite of them."""
    return (
        f"{_named(paths)} was not equal on all replicas when the snapshot was staged: what is read are the parts "
        "that each of them staged, which no rank had as a whole"
    )


def _named(paths: Sequence[str]) -> str:
    more = len(paths) - PATHS_SHOWN
    return ", ".join(paths[:PATHS_SHOWN]) + (f" (and {more} more)" if more > 0 else "")
