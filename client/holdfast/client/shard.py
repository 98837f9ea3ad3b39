"""A rank's state as one shard: where everything lies, and what is copied when.

``ShardLayout.capture`` runs in the training thread: it copies at once what may change before the
next optimizer step, into private memory that holds the shard's beginning exactly as it will be
written. The rest is copied behind its back (``capture``), straight from the trainer's memory.

Not here: when to do it, and where the target memory comes from.
"""

import io
from collections import Counter
from collections.abc import Callable, Mapping

import numpy as np
import torch
from holdfast.client.capture import Capture, Copies
from holdfast.client.flatten import Flat, Leaf, Rules, check_tensor, save_objects
from holdfast.client.manifest import (
    OBJECTS_BYTES_MAX,
    Manifest,
    digest_of,
    encode_manifest,
    plan_header,
    show_path,
    version_of,
)
from holdfast.client.names import parameter_names
from holdfast.client.places import Kind, Source, entry_of, find_places, lanes_of, source_of, told
from holdfast.client.replicas import ALONE, Claim, Numbering, Replicas, can_be_cut, claims, find_replicas
from holdfast.client.rng import capture_rng
from holdfast.client.signs import Signs
from holdfast.client.state_errors import LayoutChangedError, StateError
from holdfast.client.tensor_bytes import ByteArray, copy_out
from holdfast.client.updates import counter_of
from holdfast.client.walk import StateWalker, memory_key

OBJECTS_CAPACITY_BYTES_MIN = 32 << 10  # room for a loader's and a scheduler's growth
HEADS_KEPT = 2  # one being written while the next is captured


class ShardLayout:
    """Where each tensor of this rank's state lies in its shard.

    Built once per plan. Keeps the state's tensors alive until they are replaced.

    Attributes:
        shard_bytes: Length of every shard of this layout; a multiple of 64.
        digest: SHA-256 of the manifest: layouts with equal digests are interchangeable.
        manifest: The encoded manifest (see ``holdfast.client.manifest``).
        devices: The GPUs that tensors lie on.
    """

    shard_bytes: int
    digest: str
    manifest: bytes
    devices: tuple[torch.device, ...]

    def __init__(self, walker: StateWalker, flats: Mapping[str, Flat], replicas: Replicas) -> None:
        """Use ``build``."""
        self._walker = walker
        self._flats = dict(flats)
        places = find_places(flats, walker.lazy_keys(flats), replicas)
        self._sources, self._pools = places.sources, places.pools
        self._source_of = {entry.path: index for entry, index in places.placed}
        self._entries = {entry.path: entry for entry, _ in places.placed}
        self._meshes = places.meshes
        self._sharers = Counter(self._source_of.values())
        self._head_end = places.head_end
        objects = self._save_objects()
        _check_readable(objects, walker.rules)
        record = Manifest(
            version=version_of(places.pools.pools),
            names=tuple(flats),
            tensors=tuple(self._entries.values()),
            meshes=tuple(seen.mesh for seen in places.meshes),
            payload_bytes=places.payload_bytes,
            objects_capacity_bytes=_capacity(len(objects)),
            parameters=parameter_names(walker.state),
            pools=places.pools.pools,
            witnesses=places.pools.witnesses,
        )
        self._record = record
        self.manifest = encode_manifest(record)
        self.digest = digest_of(self.manifest)
        self._header = plan_header(
            len(self.manifest), record.objects_capacity_bytes, places.payload_bytes, version=record.version
        )
        self.shard_bytes = self._header.shard_bytes
        self._heads: list[ByteArray] = []
        self._changed: LayoutChangedError | None = None
        self._counters = {
            name: counter_of(item) for name, item in walker.state.items() if isinstance(item, torch.optim.Optimizer)
        }
        self._at_once: list[int] = []
        self._copies = self._plan_copies()
        self.devices = tuple({source.local.device for source in self._sources if source.local.device.type == "cuda"})

    @classmethod
    def build(
        cls,
        state: Mapping[str, object],
        *,
        allow_pickle: bool = False,
        ranks: Numbering | None = None,
        wrapper: torch.nn.Module | None = None,
    ) -> "ShardLayout":
        """Walk ``state`` and give every tensor a place. No tensor is copied.

        Args:
            state: Names to tensors or to objects with ``state_dict`` and ``load_state_dict``.
            allow_pickle: Admit objects that only an unrestricted ``torch.load`` reads back.
            ranks: Of the job: what several of them have alike is cut into shares. They must compare their ``claims``
                before they use such a layout. None: this rank stages everything that it has.
            wrapper: The DDP module around what `state` holds without it, if there is one.

        Raises:
            StateError: something cannot be staged; the text names its path.
        """
        for name in state:
            if not isinstance(name, str):
                raise StateError(f"{name!r}: expected a string as the name of a part of the state")
        walker = StateWalker(dict(state), Rules(allow_pickle=allow_pickle))
        flats = walker.walk()
        return cls(walker, flats, ALONE if ranks is None else find_replicas(state, flats, ranks, wrapper))

    def claims(self) -> tuple[Claim, ...]:
        """What other ranks must have as this one has it now; empty where nothing is cut. Reads all of it."""
        pooled = [(entry, self._sources[self._source_of[path]].local) for path, entry in self._entries.items()]
        return claims([pair for pair in pooled if pair[0].pool is not None], self._record)

    def capture(self) -> Capture:
        """Copy what may change before the next optimizer step; note the rest.

        Call it from the training thread, after the optimizer's step.

        Raises:
            LayoutChangedError: a tensor appeared, disappeared, or has another shape, dtype or
                sharding, or at the last copy the plain objects outgrew their room: build a new layout.
            StateError: something new in the state cannot be staged.
        """
        self._look_again()
        objects, rng = {name: flat.objects for name, flat in self._flats.items()}, capture_rng()
        head = self._heads.pop() if self._heads else self._new_head()
        payload = head[self._header.payload_offset :]
        for index in self._at_once:
            each = self._sources[index].piece
            raw: ByteArray | None = None
            if each.raw is not None and each.local.device.type == "cpu":
                raw = each.raw.numpy()
            copy_out(each.local, raw, payload[each.offset : each.offset + each.size_bytes])
        return Capture(self._copies, self._header, head, self._serializer(objects, rng), self._give_back)

    def _serializer(self, objects: dict[str, object], rng: dict[str, object]) -> Callable[[], bytes]:
        """Writing thousands of parameter numbers takes milliseconds: the staging thread's, unless a value may change.

        The walk has copied all containers; what they hold is immutable but for bytearrays and classes of the user's.
        """
        if not self._walker.rules.mutable_count:
            return lambda: save_objects({"objects": objects, "rng": rng})
        saved = save_objects({"objects": objects, "rng": rng})
        return lambda: saved

    def _plan_copies(self) -> Copies:
        self._at_once = [index for index, source in enumerate(self._sources) if source.kind is Kind.HEAD]
        host, devices = lanes_of(self._sources)
        gathered = {id(piece) for lane in devices for piece in lane.gathered}
        lazies = [source for source in self._sources if source.kind.lazy and not _is_safe(source, gathered)]
        signs = Signs(
            [show_path(source.path) for source in lazies],
            [source.tensor for source in lazies],
            [source.local for source in lazies],
            self._counters,
        )
        return Copies(host, devices, signs, self._walker.reshaped, sum(source.piece.size_bytes for source in lazies))

    def _look_again(self) -> None:
        if self._changed is None:
            self._refresh(self._walker.walk())
            return
        # The last copy found what no look in the training thread is long enough to see.
        changed, self._changed = self._changed, None
        self._walker.forget()
        self._refresh(self._walker.walk())  # names the tensor, if it was one
        raise changed

    def _refresh(self, flats: Mapping[str, Flat]) -> None:
        """Follow tensors that moved to other memory; refuse whatever changes the manifest."""
        moved: list[int] = []
        for name, flat in flats.items():
            known = self._flats[name]
            self._flats[name] = flat
            if flat.leaves is known.leaves:
                continue  # a watched module or optimizer: its tensors were verified
            _check_same_paths(known, flat)
            moved += [self._source_of[leaf.path] for leaf in flat.leaves if self._follow(leaf)]
        if any(self._sharers[index] > 1 for index in moved):
            self._check_sharing()
        if any(self._sources[index].kind is not Kind.HEAD for index in moved):
            self._copies = self._plan_copies()

    def _follow(self, leaf: Leaf) -> bool:
        """Take the tensor that is now at a path for the one seen before; whether it moved."""
        index = self._source_of[leaf.path]
        source = self._sources[index]
        if source.still(leaf.tensor):
            return False
        entry = self._entries[leaf.path]
        check_tensor(leaf.path, leaf.tensor)
        found = entry_of(leaf, entry.offset, lazy=entry.lazy, meshes=self._meshes, pool=entry.pool)
        if found != entry:
            raise LayoutChangedError(
                f"{show_path(leaf.path)}: expected {told(entry)}, found {told(found)}: build a new layout"
            )
        if entry.pool is not None and not can_be_cut(leaf.tensor):
            raise LayoutChangedError(f"{show_path(leaf.path)}: no longer lies in C order: build a new layout")
        if leaf.tensor.device != source.tensor.device:
            raise LayoutChangedError(
                f"{show_path(leaf.path)}: moved from {source.tensor.device} to {leaf.tensor.device}: build a new layout"
            )
        if source.path == leaf.path:
            self._sources[index] = source_of(leaf, entry, source.kind, self._pools)
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

    def _save_objects(self) -> bytes:
        objects = {name: flat.objects for name, flat in self._flats.items()}
        return save_objects({"objects": objects, "rng": capture_rng()})

    def _new_head(self) -> ByteArray:
        head = np.zeros(self._header.payload_offset + self._head_end, dtype=np.uint8)
        start = self._header.manifest_offset
        head[start : start + len(self.manifest)] = np.frombuffer(self.manifest, dtype=np.uint8)
        return head

    def _give_back(self, head: ByteArray, changed: LayoutChangedError | None) -> None:
        self._changed = changed
        if len(self._heads) < HEADS_KEPT:
            self._heads.append(head)


def _is_safe(source: Source, gathered: set[int]) -> bool:
    """Whether a GPU has copied all that this rank copies of a tensor by the time a capture is made."""
    pieces = (each for each in (source.piece, *source.witnesses) if each.size_bytes)
    return source.local.is_cuda and all(id(each) in gathered for each in pieces)


def _check_same_paths(known: Flat, found: Flat) -> None:
    before = {leaf.path for leaf in known.leaves}
    after = {leaf.path for leaf in found.leaves}
    for path in (leaf.path for leaf in found.leaves if leaf.path not in before):
        raise LayoutChangedError(f"{show_path(path)}: a new tensor: build a new layout")
    for path in (leaf.path for leaf in known.leaves if leaf.path not in after):
        raise LayoutChangedError(f"{show_path(path)}: the tensor is gone: build a new layout")


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
