"""A restore's way to what lies in pools: ranks that have the same give each other their shares, over the job's fabric.

Covers one exchange per pool, block by block so that its memory is bounded, and the comparison with this rank's
witnesses. That all ranks of a pool are there and mean the same is agreed before (`replicas.layout_claims`).
"""

import warnings
from bisect import bisect_right
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from itertools import groupby
from typing import Protocol

import torch
from holdfast.client.manifest import ALIGN_BYTES, Manifest, TensorEntry, share_of
from holdfast.client.replicas import layout_claims
from holdfast.client.tensor_bytes import ByteArray
from holdfast.client.witnesses import strangers

GATHER_BYTES = 64 << 20  # of all replicas' blocks in one exchange: so much memory is needed for a moment
BLOCK_BYTES_MIN = 256 << 10  # of one replica: with hundreds of them, smaller blocks would cost more calls than bytes

assert GATHER_BYTES % ALIGN_BYTES == BLOCK_BYTES_MIN % ALIGN_BYTES == 0


class Gatherer(Protocol):
    """Some ranks that give each other bytes."""

    @property
    def device(self) -> torch.device:
        """Where the bytes must lie."""

    def gather(self, parts: Sequence[torch.Tensor], index: int, /) -> None:
        """Fill the parts of the others, in the order of roles; the one at `index` is this rank's. A collective."""


class Fabric(Protocol):
    """The job's ranks. `holdfast.client.ranks.Ranks` is one."""

    def gathering(self, roles: Sequence[int], /) -> AbstractContextManager[Gatherer]:
        """A way for these to give each other bytes. A collective among them."""


@dataclass(slots=True)
class _Place:
    """A tensor of a pool: where it begins and ends there, and its memory as bytes."""

    start: int
    end: int
    entry: TensorEntry
    local: torch.Tensor
    raw: torch.Tensor


@dataclass(slots=True)
class Pooling:
    """One rank's shard and live state, and what it lacks.

    Args:
        manifest: the shard's.
        payload: the shard's tensors, verified; may be read-only.
        pairs: entries and the local tensors that they fill; those of no pool are left alone.
    """

    manifest: Manifest
    payload: ByteArray
    pairs: Sequence[tuple[TensorEntry, torch.Tensor]]
    _places: list[list[_Place]] = field(init=False)

    def __post_init__(self) -> None:
        self._places = [[] for _ in self.manifest.pools]
        for entry, local in self.pairs:
            if entry.pool is not None:
                end = entry.offset + entry.size_bytes
                self._places[entry.pool].append(_Place(entry.offset, end, entry, local, _bytes_for(local)))
        for places in self._places:
            places.sort(key=lambda place: (place.start, place.end))

    def exchange(self, fabric: Fabric) -> None:
        """Fill every tensor that lies in a pool. A collective among all ranks that have one."""
        digests = [digest for _, digest, _ in layout_claims(self.manifest)]
        pools = self.manifest.pools
        # A rank may share one pool with these and another with those: all enter them in the same order.
        order = sorted(range(len(pools)), key=lambda number: (pools[number].roles, digests[number]))
        for roles, numbers in groupby(order, key=lambda number: pools[number].roles):
            with fabric.gathering(roles) as gatherer:
                for number in numbers:
                    self._fill(number, gatherer)
        for place in (place for places in self._places for place in places):
            if place.raw.data_ptr() != place.local.data_ptr():
                place.local.detach().copy_(place.raw.view(place.local.dtype).view(place.local.shape))
            if not place.local.is_inference():
                torch.autograd.graph.increment_version(place.local)  # written behind its back
        for device in {place.local.device for places in self._places for place in places}:
            if device.type == "cuda":
                torch.cuda.current_stream(device).synchronize()

    def strangers(self) -> list[str]:
        """Which tensors, now filled, are not what this rank's witnesses saw of them; by path."""
        filled = [(place.entry, place.raw) for places in self._places for place in places]
        return strangers(self.manifest, lambda offset, size: self.payload[offset : offset + size], filled)

    def _fill(self, number: int, gatherer: Gatherer) -> None:
        pool, places = self.manifest.pools[number], self._places[number]
        ends = [place.end for place in places]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of read-only memory, once; it is only read here
            own = torch.from_numpy(self.payload[pool.offset : pool.offset + pool.share_bytes])
        shares = [share_of(pool.size_bytes, len(pool.roles), index) for index in range(len(pool.roles))]
        longest = max(stop - start for start, stop in shares)
        step = max(BLOCK_BYTES_MIN, GATHER_BYTES // len(shares) // ALIGN_BYTES * ALIGN_BYTES)
        buffers = torch.zeros(len(shares), min(step, longest), dtype=torch.uint8, device=gatherer.device)
        for begin in range(0, longest, step):
            blocks = [buffer[: longest - begin] for buffer in buffers]
            part = own[begin : begin + step]
            blocks[pool.index][: len(part)] = part
            gatherer.gather(blocks, pool.index)
            for (start, stop), block in zip(shares, blocks, strict=True):
                _land(places, ends, block[: max(0, stop - start - begin)], start + begin)


def _land(places: Sequence[_Place], ends: Sequence[int], block: torch.Tensor, start: int) -> None:
    """Copy what a block of a pool holds of each tensor to where it belongs."""
    stop = start + len(block)
    targets, sources = [], []
    for place in places[bisect_right(ends, start) :]:
        if place.start >= stop:
            break
        low, high = max(place.start, start), min(place.end, stop)
        targets.append(place.raw[low - place.start : high - place.start])
        sources.append(block[low - start : high - start])
    if targets:
        torch._foreach_copy_(targets, sources)


def _bytes_for(local: torch.Tensor) -> torch.Tensor:
    """A tensor's own memory as bytes; new memory where its elements do not lie in C order."""
    if local.is_contiguous() and not local.is_conj() and not local.is_neg():
        return local.detach().reshape(-1).view(torch.uint8)
    return torch.empty(local.numel() * local.itemsize, dtype=torch.uint8, device=local.device)
