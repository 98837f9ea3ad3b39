"""A rank's state as one shard: where everything lies, and the two copies that fill it.

``ShardLayout.capture`` runs in the training thread: it copies at once what may change before the
next optimizer step, into private memory that holds the shard's beginning exactly as it will be
written. ``Capture.write`` runs in a background thread: one copy for that beginning, then one copy
per parameter and optimizer tensor straight from the trainer's memory.

Not here: when to do it, and where the target memory comes from.
"""

import io
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import msgspec
import numpy as np
import torch
from holdfast.client.flatten import Flat, Leaf, Rules, check_tensor, dtype_name, save_objects
from holdfast.client.manifest import (
    FORMAT_VERSION,
    ITEM_BYTES,
    OBJECTS_BYTES_MAX,
    TENSOR_COUNT_MAX,
    Header,
    Manifest,
    Path,
    TensorEntry,
    align,
    digest_of,
    encode_manifest,
    is_dense,
    plan_header,
    show_path,
)
from holdfast.client.names import parameter_names
from holdfast.client.rng import capture_rng
from holdfast.client.sharding import SeenMesh, describe, local_of, version_of
from holdfast.client.state_errors import LayoutChangedError, StateError, TornSnapshotError
from holdfast.client.tensor_bytes import ByteArray, copy_out, raw_bytes
from holdfast.client.updates import UpdateCounter, counter_of
from holdfast.client.walk import MemoryKey, StateWalker, memory_key

OBJECTS_CAPACITY_BYTES_MIN = 32 << 10  # room for a loader's and a scheduler's growth
HEADS_KEPT = 2  # one being written while the next is captured


@dataclass(frozen=True, slots=True)
class _Source:
    """One place of the payload and the live tensor that fills it.

    ``tensor`` is what the state gave (its version counter is looked at), ``local`` the part with
    memory here. ``raw`` is that memory as bytes, None where only torch can read it.
    """

    path: Path
    tensor: torch.Tensor
    local: torch.Tensor
    raw: ByteArray | None
    data_ptr: int
    element_count: int
    offset: int
    size_bytes: int
    lazy: bool

    def still(self, tensor: torch.Tensor) -> bool:
        """Whether ``tensor`` is what was seen before, in the same memory."""
        return (
            tensor is self.tensor
            and self.local.data_ptr() == self.data_ptr
            and self.local.numel() == self.element_count
        )


class ShardLayout:
    """Where each tensor of this rank's state lies in its shard.

    Built once per plan. Keeps the state's tensors alive until they are replaced.

    Attributes:
        shard_bytes: Length of every shard of this layout; a multiple of 64.
        digest: SHA-256 of the manifest: layouts with equal digests are interchangeable.
        manifest: The encoded manifest (see ``holdfast.client.manifest``).
    """

    shard_bytes: int
    digest: str
    manifest: bytes

    def __init__(self, walker: StateWalker, flats: Mapping[str, Flat]) -> None:
        """Use ``build``."""
        self._walker = walker
        self._flats = dict(flats)
        self._sources, described = _place(flats, walker.lazy_keys(flats))
        self._source_of = {entry.path: index for entry, index in described.placed}
        self._entries = {entry.path: entry for entry, _ in described.placed}
        self._meshes = described.meshes
        self._sharers = Counter(self._source_of.values())
        lazies = [source.offset for source in self._sources if source.lazy]
        ends = [source.offset + align(source.size_bytes) for source in self._sources]
        payload_bytes = max(ends, default=0)
        self._eager_end = min(lazies, default=payload_bytes)
        objects = self._objects_bytes()
        _check_readable(objects, walker.rules)
        record = Manifest(
            version=FORMAT_VERSION,
            names=tuple(flats),
            tensors=tuple(self._entries.values()),
            meshes=tuple(seen.mesh for seen in described.meshes),
            payload_bytes=payload_bytes,
            objects_capacity_bytes=_capacity(len(objects)),
            parameters=parameter_names(walker.state),
        )
        self.manifest = encode_manifest(record)
        self.digest = digest_of(self.manifest)
        self._header = plan_header(len(self.manifest), record.objects_capacity_bytes, payload_bytes)
        self.shard_bytes = self._header.shard_bytes
        self._heads: list[ByteArray] = []
        self._counters = {
            name: counter_of(item) for name, item in walker.state.items() if isinstance(item, torch.optim.Optimizer)
        }

    @classmethod
    def build(cls, state: Mapping[str, object], *, allow_pickle: bool = False) -> "ShardLayout":
        """Walk ``state`` and give every tensor a place. No tensor is copied.

        Args:
            state: Names to tensors or to objects with ``state_dict`` and ``load_state_dict``.
            allow_pickle: Admit objects that only an unrestricted ``torch.load`` reads back.

        Raises:
            StateError: something cannot be staged; the text names its path.
        """
        for name in state:
            if not isinstance(name, str):
                raise StateError(f"{name!r}: expected a string as the name of a part of the state")
        walker = StateWalker(dict(state), Rules(allow_pickle=allow_pickle))
        return cls(walker, walker.walk())

    def capture(self) -> "Capture":
        """Copy what may change before the next optimizer step; note the rest.

        Call it from the training thread, after the optimizer's step.

        Raises:
            LayoutChangedError: a tensor appeared, disappeared, or has another shape, dtype or
                sharding, or the plain objects outgrew their room: build a new layout.
            StateError: something new in the state cannot be staged.
        """
        self._refresh(self._walker.walk())
        objects = self._objects_bytes()
        header = self._header._replace(objects_bytes=len(objects))
        if header.objects_bytes > header.objects_capacity_bytes:
            raise LayoutChangedError(
                f"the plain objects grew to {header.objects_bytes} bytes, this layout has room for "
                f"{header.objects_capacity_bytes}: build a new layout"
            )
        head = self._heads.pop() if self._heads else self._new_head()
        self._fill_head(head, header, objects)
        lazies = [source for source in self._sources if source.lazy]
        return Capture(
            self,
            head,
            [(source, version_of(source.tensor)) for source in lazies],
            [(name, counter, counter.begun_count) for name, counter in self._counters.items()],
        )

    def _refresh(self, flats: Mapping[str, Flat]) -> None:
        """Follow tensors that moved to other memory; refuse whatever changes the manifest."""
        moved: list[int] = []
        for name, flat in flats.items():
            known = self._flats[name]
            if flat is known:
                continue  # a watched module: its tensors were verified
            _check_same_paths(known, flat)
            moved += [self._source_of[leaf.path] for leaf in flat.leaves if self._follow(leaf)]
            self._flats[name] = flat
        if any(self._sharers[index] > 1 for index in moved):
            self._check_sharing()

    def _follow(self, leaf: Leaf) -> bool:
        """Take the tensor that is now at a path for the one seen before; whether it moved."""
        index = self._source_of[leaf.path]
        source = self._sources[index]
        if source.still(leaf.tensor):
            return False
        entry = self._entries[leaf.path]
        check_tensor(leaf.path, leaf.tensor)
        found = _entry(leaf, entry.offset, lazy=entry.lazy, meshes=self._meshes)
        if found != entry:
            raise LayoutChangedError(
                f"{show_path(leaf.path)}: expected {_told(entry)}, found {_told(found)}: build a new layout"
            )
        if source.path == leaf.path:
            self._sources[index] = _source(leaf, entry)
        return True

    def _check_sharing(self) -> None:
        """Tensors that share a place must still be one; looked at only when one of them moved."""
        for leaf in (leaf for flat in self._flats.values() for leaf in flat.leaves):
            source = self._sources[self._source_of[leaf.path]]
            if source.size_bytes and memory_key(leaf.tensor) != memory_key(source.tensor):
                raise LayoutChangedError(
                    f"{show_path(leaf.path)}: no longer shares its memory with "
                    f"{show_path(source.path)}: build a new layout"
                )

    def _objects_bytes(self) -> bytes:
        objects = {name: flat.objects for name, flat in self._flats.items()}
        return save_objects({"objects": objects, "rng": capture_rng()})

    def _new_head(self) -> ByteArray:
        head = np.zeros(self._header.payload_offset + self._eager_end, dtype=np.uint8)
        start = self._header.manifest_offset
        head[start : start + len(self.manifest)] = np.frombuffer(self.manifest, dtype=np.uint8)
        return head

    def _fill_head(self, head: ByteArray, header: Header, objects: bytes) -> None:
        packed = header.pack()
        head[: len(packed)] = np.frombuffer(packed, dtype=np.uint8)
        start, end = header.objects_offset, header.objects_offset + len(objects)
        head[start:end] = np.frombuffer(objects, dtype=np.uint8)
        head[end : header.payload_offset] = 0  # an earlier, longer archive's end
        payload = head[header.payload_offset :]
        for source in self._sources:
            if not source.lazy:
                _copy(source, payload)

    def _give_back(self, head: ByteArray) -> None:
        if len(self._heads) < HEADS_KEPT:
            self._heads.append(head)


class Capture:
    """One snapshot of a rank, half copied: ``write`` brings all of it into a shard's memory.

    Attributes:
        lazy_bytes: What ``write`` reads from the trainer's live tensors.
        eager_bytes: What was copied at once, plain objects included.
    """

    __slots__ = ("_head", "_layout", "_lazies", "_updates", "eager_bytes", "lazy_bytes")

    def __init__(
        self,
        layout: ShardLayout,
        head: ByteArray,
        lazies: Sequence[tuple[_Source, int]],
        updates: Sequence[tuple[str, UpdateCounter, int]],
    ) -> None:
        """Use ``ShardLayout.capture``."""
        self._layout = layout
        self._head: ByteArray | None = head
        self._lazies = lazies
        self._updates = updates
        self.lazy_bytes = sum(source.size_bytes for source, _ in lazies)
        self.eager_bytes = head.nbytes

    def write(self, target: memoryview) -> None:
        """Write the whole shard, once. The interpreter lock is free during the large copies.

        Args:
            target: Writable contiguous memory of exactly ``shard_bytes``; every byte of it is
                overwritten, no reference to it is kept.

        Raises:
            StateError: the target is of another size or read-only, or this was written before.
            TornSnapshotError: a tensor was changed in place or an optimizer's step began since the
                capture; the target holds a mixture and must be discarded.
        """
        expected_bytes = self._layout.shard_bytes
        if target.nbytes != expected_bytes or target.readonly or not target.c_contiguous:
            raise StateError(
                f"expected {expected_bytes} bytes of writable contiguous memory, found "
                f"{target.nbytes}{' read-only' if target.readonly else ''}"
            )
        if self._head is None:
            raise StateError("this capture was written before: capture again")
        head, self._head = self._head, None
        self._copy(head, target)
        self._layout._give_back(head)  # noqa: SLF001 - the two classes of this file are one thing
        lazies, self._lazies = self._lazies, ()
        changed = [show_path(source.path) for source, version in lazies if version_of(source.tensor) != version]
        # Its own sign, since not every optimizer's kernels count versions (see updates.py).
        changed += [f"{name} (a step began)" for name, counter, count in self._updates if counter.begun_count != count]
        if changed:
            raise TornSnapshotError(
                f"{changed[0]}: changed while it was copied, {len(changed)} in all: call "
                "snapshotter.before_update() before changing parameters or optimizer state"
            )

    def _copy(self, head: ByteArray, target: memoryview) -> None:
        shard = np.frombuffer(target, dtype=np.uint8)
        np.copyto(shard[: head.nbytes], head)
        payload = shard[self._layout._header.payload_offset :]  # noqa: SLF001 - as above
        for source, _ in self._lazies:
            _copy(source, payload)
            end = source.offset + align(source.size_bytes)
            payload[source.offset + source.size_bytes : end] = 0  # what an earlier snapshot left


@dataclass(frozen=True, slots=True)
class _Placed:
    """Entries with the index of the source that fills each, and the meshes they name."""

    placed: list[tuple[TensorEntry, int]]
    meshes: list[SeenMesh]


def _place(flats: Mapping[str, Flat], lazy_keys: set[MemoryKey]) -> tuple[list[_Source], _Placed]:
    """Give every distinct view of memory a place: first what is copied at once, then the rest."""
    leaves = [leaf for flat in flats.values() for leaf in flat.leaves]
    if len(leaves) > TENSOR_COUNT_MAX:
        raise StateError(f"{len(leaves)} tensors, at most {TENSOR_COUNT_MAX} fit a shard")
    for leaf in leaves:
        check_tensor(leaf.path, leaf.tensor)
    keys = [memory_key(leaf.tensor) for leaf in leaves]
    lazies = [key in lazy_keys and not leaf.tensor.is_inference() for key, leaf in zip(keys, leaves, strict=True)]
    meshes: list[SeenMesh] = []
    sources: list[_Source] = []
    index_of: dict[MemoryKey, int] = {}
    entries: list[tuple[TensorEntry, int] | None] = [None] * len(leaves)
    offset = 0
    for lazy in (False, True):
        for position, leaf in enumerate(leaves):
            if lazies[position] is not lazy:
                continue
            entry = _entry(leaf, offset, lazy=lazy, meshes=meshes)
            index = index_of.get(keys[position]) if entry.size_bytes else None
            if index is None:
                index = len(sources)
                index_of[keys[position]] = index
                sources.append(_source(leaf, entry))
                offset += align(entry.size_bytes)
            entries[position] = (
                msgspec.structs.replace(entry, offset=sources[index].offset),
                index,
            )
    return sources, _Placed([entry for entry in entries if entry is not None], meshes)


def _entry(leaf: Leaf, offset: int, *, lazy: bool, meshes: list[SeenMesh]) -> TensorEntry:
    local = local_of(leaf.tensor)
    dtype = dtype_name(local.dtype)
    dense = is_dense(tuple(local.shape), tuple(local.stride()))
    return TensorEntry(
        path=leaf.path,
        dtype=dtype,
        shape=tuple(local.shape),
        stride=tuple(local.stride()) if dense and not local.is_contiguous() else None,
        offset=offset,
        size_bytes=math.prod(local.shape) * ITEM_BYTES[dtype],
        lazy=lazy,
        sharding=describe(leaf.tensor, meshes),
    )


def _source(leaf: Leaf, entry: TensorEntry) -> _Source:
    local = local_of(leaf.tensor)
    return _Source(
        path=leaf.path,
        tensor=leaf.tensor,
        local=local,
        raw=raw_bytes(local),
        data_ptr=local.data_ptr(),
        element_count=local.numel(),
        offset=entry.offset,
        size_bytes=entry.size_bytes,
        lazy=entry.lazy,
    )


def _copy(source: _Source, payload: ByteArray) -> None:
    target = payload[source.offset : source.offset + source.size_bytes]
    copy_out(source.local, source.raw, target)


def _check_same_paths(known: Flat, found: Flat) -> None:
    before = {leaf.path for leaf in known.leaves}
    after = {leaf.path for leaf in found.leaves}
    for path in (leaf.path for leaf in found.leaves if leaf.path not in before):
        raise LayoutChangedError(f"{show_path(path)}: a new tensor: build a new layout")
    for path in (leaf.path for leaf in known.leaves if leaf.path not in after):
        raise LayoutChangedError(f"{show_path(path)}: the tensor is gone: build a new layout")


def _told(entry: TensorEntry) -> str:
    """What of an entry a person needs to see that two differ."""
    text = f"{entry.dtype} {list(entry.shape)}"
    if entry.stride is not None:
        text += f" in stride {list(entry.stride)}"
    if entry.sharding is not None:
        placements = ", ".join(entry.sharding.placements)
        text += f" of {list(entry.sharding.global_shape)} ({placements})"
    return text


def _capacity(objects_bytes: int) -> int:
    """Room for objects that may grow: a power of two, so that small changes keep the layout."""
    wanted_bytes = max(OBJECTS_CAPACITY_BYTES_MIN, objects_bytes + objects_bytes // 2)
    capacity_bytes = 1 << (wanted_bytes - 1).bit_length()
    if capacity_bytes > OBJECTS_BYTES_MAX:
        raise StateError(
            f"the plain objects take {objects_bytes} bytes, at most {OBJECTS_BYTES_MAX // 2} are "
            "admitted: keep large data in tensors"
        )
    return capacity_bytes


def _check_readable(objects: bytes, rules: Rules) -> None:
    """Read the archive as a restore will; the walk admitted each type, this admits the whole."""
    try:
        torch.load(io.BytesIO(objects), weights_only=not rules.allow_pickle)
    except Exception as error:
        raise StateError(f"the plain objects would not be readable at restore: {error}") from error
