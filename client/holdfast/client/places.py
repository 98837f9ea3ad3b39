"""Where each tensor of a state lies in its shard, and which copy brings it there.

The order within the payload is by kind, so that what is copied together lies together: first what the training thread
copies at once (the shard's head), then what a device gathers at once, then small tensors that are packed, device by
device, and last the large ones. Not here: any copy.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum

import msgspec
import torch
from holdfast.client.cuda_lane import CudaLane
from holdfast.client.flatten import Flat, Leaf, check_tensor, dtype_name
from holdfast.client.lanes import HostLane, Piece, piece, small_bytes
from holdfast.client.manifest import ITEM_BYTES, TENSOR_COUNT_MAX, Path, TensorEntry, align, is_dense
from holdfast.client.sharding import SeenMesh, describe, local_of
from holdfast.client.state_errors import StateError
from holdfast.client.walk import MemoryKey, memory_key


class Kind(IntEnum):
    """Which copy makes a place, in the order in which they lie."""

    HEAD = 0  # by the training thread, at once
    DEVICE_AT_ONCE = 1  # by the device, at once: small tensors that forward may change
    PACKED = 2  # until the next update, gathered on its device first
    STRAIGHT = 3  # until the next update, from where it lies

    @property
    def lazy(self) -> bool:
        """Whether it is copied after the training thread has gone on."""
        return self in {Kind.PACKED, Kind.STRAIGHT}


@dataclass(frozen=True, slots=True)
class Source:
    """One place of the payload and the live tensor that fills it.

    ``tensor`` is what the state gave (its version counter is looked at), ``piece`` the part with memory here.
    """

    path: Path
    tensor: torch.Tensor
    piece: Piece
    data_ptr: int
    kind: Kind

    def still(self, tensor: torch.Tensor) -> bool:
        """Whether ``tensor`` is what was seen before, in the same memory."""
        local = self.piece.local
        return (
            tensor is self.tensor
            and local_of(tensor) is local
            and local.data_ptr() == self.data_ptr
            and local.numel() * local.itemsize == self.piece.size_bytes
        )


@dataclass(frozen=True, slots=True)
class Places:
    """All places of a payload: sources, and for every entry of the manifest the index of its source."""

    sources: list[Source]
    placed: list[tuple[TensorEntry, int]]
    meshes: list[SeenMesh]
    head_end: int  # where the places of kind HEAD end
    payload_bytes: int


def find_places(flats: Mapping[str, Flat], lazy_keys: set[MemoryKey]) -> Places:
    """Give every distinct view of memory a place.

    Raises:
        StateError: there are too many tensors, or one that can't be staged.
    """
    leaves = [leaf for flat in flats.values() for leaf in flat.leaves]
    if len(leaves) > TENSOR_COUNT_MAX:
        raise StateError(f"{len(leaves)} tensors, at most {TENSOR_COUNT_MAX} fit a shard")
    for leaf in leaves:
        check_tensor(leaf.path, leaf.tensor)
    keys = [memory_key(leaf.tensor) for leaf in leaves]
    kinds = [_kind(leaf.tensor, key in lazy_keys) for key, leaf in zip(keys, leaves, strict=True)]
    meshes: list[SeenMesh] = []
    sources: list[Source] = []
    index_of: dict[MemoryKey, int] = {}
    entries: list[tuple[TensorEntry, int] | None] = [None] * len(leaves)
    offset = head_end = 0
    for position in sorted(range(len(leaves)), key=lambda at: (kinds[at], str(keys[at][-1]))):
        leaf, kind = leaves[position], kinds[position]
        entry = entry_of(leaf, offset, lazy=kind.lazy, meshes=meshes)
        index = index_of.get(keys[position]) if entry.size_bytes else None
        if index is None:
            index = len(sources)
            index_of[keys[position]] = index
            sources.append(source_of(leaf, entry, kind))
            offset += align(entry.size_bytes)
        head_end = offset if kind is Kind.HEAD else head_end
        entries[position] = (msgspec.structs.replace(entry, offset=sources[index].piece.offset), index)
    return Places(sources, [entry for entry in entries if entry is not None], meshes, head_end, offset)


def entry_of(leaf: Leaf, offset: int, *, lazy: bool, meshes: list[SeenMesh]) -> TensorEntry:
    """A tensor as the manifest tells it; its mesh is added to ``meshes`` if it is new."""
    local = local_of(leaf.tensor)
    dtype = dtype_name(local.dtype)
    in_order = local.is_contiguous()  # nearly all are, and looking closer costs each tensor as much as all else here
    dense = not in_order and is_dense(tuple(local.shape), tuple(local.stride()))
    return TensorEntry(
        path=leaf.path,
        dtype=dtype,
        shape=tuple(local.shape),
        stride=tuple(local.stride()) if dense else None,
        offset=offset,
        size_bytes=math.prod(local.shape) * ITEM_BYTES[dtype],
        lazy=lazy,
        sharding=describe(leaf.tensor, meshes),
    )


def source_of(leaf: Leaf, entry: TensorEntry, kind: Kind) -> Source:
    """The live tensor that fills an entry's place."""
    local = local_of(leaf.tensor)
    return Source(leaf.path, leaf.tensor, piece(local, entry.offset, entry.size_bytes), local.data_ptr(), kind)


def lanes_of(sources: list[Source]) -> tuple[HostLane | None, list[CudaLane]]:
    """What copies all but the head: the host's lane, and one of each other device."""
    by_device: dict[torch.device, tuple[list[Piece], list[Piece]]] = {}
    for source in sources:
        if source.kind is not Kind.HEAD and source.piece.size_bytes:
            later, at_once = by_device.setdefault(source.piece.local.device, ([], []))
            (later if source.kind.lazy else at_once).append(source.piece)
    host = by_device.pop(torch.device("cpu"), None)
    devices = [CudaLane(later, at_once, device) for device, (later, at_once) in by_device.items()]
    return None if host is None else HostLane(host[0]), devices


def told(entry: TensorEntry) -> str:
    """What of an entry a person needs to see that two differ."""
    text = f"{entry.dtype} {list(entry.shape)}"
    if entry.stride is not None:
        text += f" in stride {list(entry.stride)}"
    if entry.sharding is not None:
        placements = ", ".join(entry.sharding.placements)
        text += f" of {list(entry.sharding.global_shape)} ({placements})"
    return text


def _kind(tensor: torch.Tensor, lazy: bool) -> Kind:  # noqa: FBT001  # two facts, told apart by their types
    local = local_of(tensor)
    in_order = local.is_contiguous() and not local.is_conj() and not local.is_neg()
    small = in_order and local.numel() * local.itemsize < small_bytes(local.device)
    if lazy and not tensor.is_inference():
        return Kind.PACKED if small else Kind.STRAIGHT
    on_gpu = local.device.type == "cuda"
    return Kind.DEVICE_AT_ONCE if small and on_gpu else Kind.HEAD
