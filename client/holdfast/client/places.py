"""Where each tensor of a state lies in its shard, and which copy brings it there.

The order within the payload is by kind, so that what is copied together lies together: first what the training thread
copies at once (the shard's head), then what a device gathers at once, then small tensors that are packed, device by
device, and last the large ones. Within a kind, behind this rank's own tensors, come its shares of the pools: what other
ranks have alike, of which each copies a part. Not here: any copy.
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
from holdfast.client.pools import NO_POOLS, Laying, Pools
from holdfast.client.replicas import ALONE, Replicas
from holdfast.client.sharding import SeenMesh, describe, local_of
from holdfast.client.state_errors import StateError
from holdfast.client.walk import MemoryKey, memory_key


class Kind(IntEnum):
    """Which copy makes a place, in the order in which they lie."""

    HEAD = 0  # by the training thread, at once
    DEVICE_AT_ONCE = 1  # by the device, at once: small tensors that forward may change
    PACKED = 2  # until the next update, gathered on its device first, or at once where that is a matter of microseconds
    STRAIGHT = 3  # until the next update, from where it lies

    @property
    def lazy(self) -> bool:
        """Whether it is copied after the training thread has gone on."""
        return self in {Kind.PACKED, Kind.STRAIGHT}


@dataclass(frozen=True, slots=True)
class Source:
    """One place of the payload and the live tensor that fills it.

    ``tensor`` is what the state gave (its version counter is looked at), ``local`` the part with memory here, of
    ``size_bytes``. ``piece`` is what is copied of it: all, or what lies in this rank's share of a pool, which may be
    nothing; ``witnesses`` are lines of what others copy.
    """

    path: Path
    tensor: torch.Tensor
    local: torch.Tensor
    size_bytes: int
    piece: Piece
    witnesses: tuple[Piece, ...]
    data_ptr: int
    kind: Kind

    def still(self, tensor: torch.Tensor) -> bool:
        """Whether ``tensor`` is what was seen before, in the same memory."""
        local = self.local
        return (
            tensor is self.tensor
            and local_of(tensor) is local
            and local.data_ptr() == self.data_ptr
            and local.numel() * local.itemsize == self.size_bytes
        )


@dataclass(frozen=True, slots=True)
class Places:
    """All places of a payload: sources, and for every entry of the manifest the index of its source."""

    sources: list[Source]
    placed: list[tuple[TensorEntry, int]]
    meshes: list[SeenMesh]
    head_end: int  # where the places of kind HEAD end
    payload_bytes: int
    pools: Pools


def find_places(flats: Mapping[str, Flat], lazy_keys: set[MemoryKey], replicas: Replicas = ALONE) -> Places:
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
    roles = [
        replicas.of(key, leaf.tensor) if kind.lazy else () for key, leaf, kind in zip(keys, leaves, kinds, strict=True)
    ]
    order = sorted(range(len(leaves)), key=lambda at: (kinds[at], roles[at], str(keys[at][-1])))
    meshes: list[SeenMesh] = []
    entries = {at: entry_of(leaves[at], 0, lazy=kinds[at].lazy, meshes=meshes) for at in order}
    firsts: dict[MemoryKey, int] = {}
    same = {at: firsts.setdefault(keys[at], at) if entries[at].size_bytes else at for at in order}
    distinct = [at for at in order if same[at] == at]
    laying = Laying(replicas.role)
    pooled = {at: laying.add(kinds[at], roles[at], entries[at].size_bytes) for at in distinct if roles[at]}
    offset = head_end = 0
    own: dict[int, int] = {}
    for kind in Kind:
        for at in (at for at in distinct if kinds[at] is kind and at not in pooled):
            own[at] = offset
            offset += align(entries[at].size_bytes)
        head_end = offset if kind is Kind.HEAD else head_end
        offset = laying.settle(kind, offset)
        if kind is Kind.PACKED:
            offset = laying.settle_witnesses(offset)
    pools = laying.pools()
    index_of = {at: index for index, at in enumerate(distinct)}
    placed: list[tuple[TensorEntry, int]] = []
    for at in range(len(leaves)):
        number, place = pooled.get(same[at], (None, own.get(same[at], 0)))
        entry = msgspec.structs.replace(entries[at], offset=place, pool=number)
        placed.append((entry, index_of[same[at]]))
    sources = [source_of(leaves[at], placed[at][0], kinds[at], pools) for at in distinct]
    return Places(sources, placed, meshes, head_end, offset, pools)


def entry_of(leaf: Leaf, offset: int, *, lazy: bool, meshes: list[SeenMesh], pool: int | None = None) -> TensorEntry:
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
        pool=pool,
    )


def source_of(leaf: Leaf, entry: TensorEntry, kind: Kind, pools: Pools = NO_POOLS) -> Source:
    """The live tensor that fills an entry's place."""
    local = local_of(leaf.tensor)
    whole = piece(local, entry.offset, entry.size_bytes)
    part, witnesses = (whole, ()) if entry.pool is None else pools.parts_of(whole, entry.pool)
    return Source(leaf.path, leaf.tensor, local, entry.size_bytes, part, witnesses, local.data_ptr(), kind)


def lanes_of(sources: list[Source]) -> tuple[HostLane | None, list[CudaLane]]:
    """What copies all but the head: the host's lane, and one of each other device."""
    by_device: dict[torch.device, tuple[list[Piece], list[Piece]]] = {}
    for source in sources:
        pieces = [each for each in (source.piece, *source.witnesses) if each.size_bytes]
        if source.kind is not Kind.HEAD and pieces:
            later, at_once = by_device.setdefault(source.local.device, ([], []))
            (later if source.kind.lazy else at_once).extend(pieces)
    for later, _ in by_device.values():
        later.sort(key=lambda each: each.offset)  # shares and witnesses lie among the others
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
