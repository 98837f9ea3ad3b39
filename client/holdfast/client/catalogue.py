"""What a whole snapshot holds, over all ranks: every tensor with its pieces, every plain object, and by which names.

Made from the heads of all shards (header, manifest, plain objects), read through any `ShardBytes`. Names are those that
``torch.distributed.checkpoint`` gives when it flattens a state: the keys joined by dots. Other names for the same
thing (of wrapped modules, of an optimizer's state by its parameters' names) are understood.

Not here: copying bytes anywhere (`reading`), and torch's planners (`dcp_reader`).
"""

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from holdfast.client.flat_parameters import is_cut
from holdfast.client.flatten import unflatten
from holdfast.client.manifest import (
    HEADER_BYTES,
    ITEM_BYTES,
    Header,
    Manifest,
    Path,
    TensorEntry,
    parse_header,
    parse_manifest,
    show_path,
)
from holdfast.client.names import DDP_PREFIX, bare_name, canonical_names
from holdfast.client.pieces import Piece, Span
from holdfast.client.state_errors import MalformedShardError, RestoreMismatchError
from holdfast.protocol.layout import Layout
from torch.distributed.checkpoint._nested_dict import flatten_state_dict

HEAD_GUESS_BYTES = 64 << 10  # header, manifest and objects of a small rank: one read instead of three
DCP_NAME = "torch.distributed.checkpoint"  # the one name in the manifest of a shard that torch's planner laid out


class ShardBytes(Protocol):
    """Any byte range of any role's shard of one snapshot. `holdfast.client.ranges.RangeReader` is one."""

    @property
    def layout(self) -> Layout:
        """The snapshot's layout."""

    def read_into(self, role: int, offset_bytes: int, target: memoryview, /) -> None:
        """Fill `target` with the bytes from `offset_bytes` of the role's shard on."""


class Head(NamedTuple):
    """What one shard says of itself. ``objects`` is an archive of ``torch.save``."""

    header: Header
    manifest: Manifest
    objects: bytes


@dataclass(slots=True)
class SavedTensor:
    """A tensor of the snapshot, whoever holds it."""

    dtype: str
    shape: tuple[int, ...]  # global
    sharded: bool
    pieces: dict[tuple[int, ...], Piece] = field(default_factory=dict)  # by offset
    problem: str = ""  # why it can't be read by another layout


@dataclass(slots=True)
class Catalogue:
    """All of one snapshot.

    Attributes:
        heads: by role.
        tensors: by flat name.
        objects: plain values by flat name, of the lowest role that has them. A tensor inside one (of a tuple) is a
            placeholder: its entry is in ``inner``.
        paths: for each flat name, the keys that it was made of.
        aliases: other names for flat names.
        trees: by role: the plain objects by the state's names, as ``unflatten`` takes them.
        rng: by role: the random generators' states.
    """

    heads: Sequence[Head]
    tensors: dict[str, SavedTensor] = field(default_factory=dict)
    objects: dict[str, object] = field(default_factory=dict)
    archives: dict[str, bytes] = field(default_factory=dict)  # what torch's own planner wrote as bytes
    paths: dict[str, tuple[str | int, ...]] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)
    trees: list[dict[str, Any]] = field(default_factory=list)
    rng: list[dict[str, Any]] = field(default_factory=list)
    inner: dict[int, tuple[int, TensorEntry]] = field(default_factory=dict)  # id of a placeholder -> (role, entry)

    def resolve(self, name: str) -> str | None:
        """The flat name in the snapshot of what a live state calls ``name``; None if there is no such thing."""
        bare = bare_name(name)
        for candidate in (name, bare, bare.replace(f".{DDP_PREFIX}.", ".", 1)):
            known = self.aliases.get(candidate, candidate)
            if known in self.tensors or known in self.objects or known in self.archives:
                return known
        return None

    @property
    def is_dcp(self) -> bool:
        """Whether ``dcp.save`` wrote this snapshot, not a Snapshotter."""
        return self.heads[0].manifest.names == (DCP_NAME,)


def read_heads(source: ShardBytes) -> list[Head]:
    """Read what every shard of the snapshot says of itself.

    Raises:
        MalformedShardError: a shard is not one.
        HoldfastError: bytes can't be had.
    """
    return [read_head(source, role) for role in range(len(source.layout.shards))]


def catalogue_of(heads: Sequence[Head], *, allow_pickle: bool = False) -> Catalogue:
    """Put together what the ranks hold.

    Raises:
        MalformedShardError: heads contradict each other or themselves.
    """
    found = Catalogue(heads)
    for role, head in enumerate(heads):
        objects, rng = load_objects(role, head, allow_pickle=allow_pickle)
        found.trees.append(objects)
        found.rng.append(rng)
        if head.manifest.names == (DCP_NAME,):
            _add_dcp(found, role, head, objects)
        else:
            _add_state(found, role, head, objects)
    if any(is_cut(name) for name in found.tensors):
        _keep_by_rank(found)
    for name, tensor in found.tensors.items():
        tensor.problem = tensor.problem or _gap(name, tensor)
    for head in heads:
        _add_aliases(found, head.manifest)
    return found


def read_head(source: ShardBytes, role: int) -> Head:
    """Read what one role's shard says of itself. Raises as `read_heads` does."""
    shard_bytes = source.layout.shards[role].shard_bytes
    guess = bytearray(min(shard_bytes, HEAD_GUESS_BYTES))
    source.read_into(role, 0, memoryview(guess))
    header = parse_header(memoryview(guess), shard_bytes=shard_bytes)
    objects_end = header.objects_offset + header.objects_bytes
    if objects_end > len(guess):
        rest = bytearray(objects_end - len(guess))
        source.read_into(role, len(guess), memoryview(rest))
        guess += rest
    assert header.manifest_offset == HEADER_BYTES
    view = memoryview(guess)
    manifest = parse_manifest(view[HEADER_BYTES : HEADER_BYTES + header.manifest_bytes], header)
    return Head(header, manifest, bytes(view[header.objects_offset : objects_end]))


def load_objects(role: int, head: Head, *, allow_pickle: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """One shard's plain objects by the state's names, and its random generators' states.

    Raises:
        MalformedShardError: they can't be read.
    """
    try:
        record = torch.load(io.BytesIO(head.objects), weights_only=not allow_pickle)
        objects, rng = record["objects"], record["rng"]
    except Exception as error:
        raise MalformedShardError(f"role {role}: the shard's plain objects cannot be read: {error}") from error
    if not isinstance(objects, dict) or tuple(objects) != head.manifest.names or not isinstance(rng, dict):
        raise MalformedShardError(f"role {role}: the shard's plain objects are not what its manifest names")
    return objects, rng


def _add_state(found: Catalogue, role: int, head: Head, objects: Mapping[str, object]) -> None:
    """Add what a Snapshotter staged for one role, under the names that flattening the whole state gives."""
    placeholders: dict[Path, torch.Tensor] = {}
    entries: dict[int, TensorEntry] = {}
    for entry in head.manifest.tensors:
        placeholder = torch.empty(0, device="meta")
        placeholders[entry.path] = placeholder
        entries[id(placeholder)] = entry
    trees = {name: unflatten(objects[name], placeholders, name) for name in head.manifest.names}
    try:
        flat, paths = flatten_state_dict(trees)
    except ValueError as error:  # "a.b" beside {"a": {"b": ...}}: torch has one name for both
        raise RestoreMismatchError(f"role {role}: {error}: another layout can't read this state") from error
    for name, value in flat.items():
        if isinstance(value, torch.Tensor) and id(value) in entries:
            _add_entry(found, name, role, head, entries[id(value)])
        elif name not in found.objects:
            found.objects[name] = value
            for inside in _tensors_in(value):
                if id(inside) in entries:
                    found.inner[id(inside)] = (role, entries[id(inside)])
        found.paths.setdefault(name, tuple(paths[name]))


def _add_dcp(found: Catalogue, role: int, head: Head, objects: Mapping[str, Any]) -> None:
    """Add what torch's planner gave one rank to write. A path is (DCP_NAME, flat name, offset as text)."""
    for entry in head.manifest.tensors:
        if len(entry.path) != 3 or not isinstance(entry.path[1], str) or entry.sharding is None:
            raise MalformedShardError(f"role {role}: {show_path(entry.path)} is no piece that dcp.save writes")
        _add_entry(found, entry.path[1], role, head, entry)
    for name, archive in objects[DCP_NAME]["archives"].items():
        found.archives.setdefault(name, archive)
    for name, path in (objects[DCP_NAME]["paths"] or {}).items():
        found.paths.setdefault(name, tuple(path))


def _add_entry(found: Catalogue, name: str, role: int, head: Head, entry: TensorEntry) -> None:
    sharding = entry.sharding
    shape = entry.shape if sharding is None else sharding.global_shape
    offset = (0,) * len(shape) if sharding is None else sharding.global_offset
    known = found.tensors.get(name)
    if known is None:
        known = found.tensors[name] = SavedTensor(entry.dtype, shape, sharded=sharding is not None)
    if (known.dtype, known.shape) != (entry.dtype, shape):
        if sharding is not None or known.sharded:
            known.problem = (
                f"{name}: {known.dtype} {list(known.shape)} on one rank, {entry.dtype} {list(shape)} on rank {role}"
            )
        return  # a tensor of each rank's own: the lowest role's is the one that others see
    if sharding is not None and any(text.startswith("partial") for text in sharding.placements):
        known.problem = f"{name}: was staged as a partial sum ({', '.join(sharding.placements)}); reduce it first"
    if math.prod(entry.shape) == 0 and math.prod(shape) > 0:
        return  # this rank holds nothing of it
    piece = known.pieces.get(offset)
    if piece is None:
        piece = known.pieces[offset] = Piece(offset, entry.shape, (), ())
    if entry.pool is not None and piece.shape == entry.shape:
        known.pieces[offset] = piece.with_span(head.manifest.pools[entry.pool].roles, _held(role, head, entry))
        return
    start_bytes = head.header.payload_offset + entry.offset
    if piece.shape != entry.shape:
        known.problem = f"{name}: rank {role} holds {list(entry.shape)} at {list(offset)}, another {list(piece.shape)}"
    elif role not in piece.roles:
        known.pieces[offset] = piece._replace(roles=(*piece.roles, role), start_bytes=(*piece.start_bytes, start_bytes))


def _held(role: int, head: Head, entry: TensorEntry) -> Span | None:
    """What of an entry lies in the role's share of its pool; None if nothing does."""
    assert entry.pool is not None
    pool = head.manifest.pools[entry.pool]
    start, stop = pool.share
    low, high = max(start, entry.offset), min(stop, entry.offset + entry.size_bytes)
    if low >= high:
        return None
    return Span(low - entry.offset, high - entry.offset, role, head.header.payload_offset + pool.offset + low - start)


def _keep_by_rank(found: Catalogue) -> None:
    """Say of FSDP1's optimizers that what has the same name on several ranks is each rank's own."""
    tops = {top for head in found.heads for top in head.manifest.parameters}
    for name, tensor in found.tensors.items():
        if found.paths.get(name, ("",))[0] in tops and tensor.shape and not tensor.sharded:
            tensor.problem = (
                f"{name}: FSDP1 keeps another part of it on each rank, so only the {len(found.heads)} ranks that there "
                "were can read it; use FSDP2 where that may change"
            )


def _gap(name: str, tensor: SavedTensor) -> str:
    for piece in tensor.pieces.values():
        for cut in piece.cuts:
            if missing_bytes := cut.missing_bytes(piece.element_count() * ITEM_BYTES[tensor.dtype]):
                return (
                    f"{name}: roles {list(cut.roles)} were to hold it together, {missing_bytes} bytes are not held once"
                )
    held, expected = sum(piece.element_count() for piece in tensor.pieces.values()), math.prod(tensor.shape)
    return "" if held == expected else f"{name}: expected {expected} elements over all ranks, found {held}"


def _add_aliases(found: Catalogue, manifest: Manifest) -> None:
    for top in manifest.names:
        inside = [name for name in found.paths if name.startswith(f"{top}.")]
        for rest, canonical in canonical_names([name.removeprefix(f"{top}.") for name in inside]).items():
            if rest != canonical:
                found.aliases.setdefault(f"{top}.{canonical}", f"{top}.{rest}")
        if top in manifest.parameters:
            _add_optimizer_aliases(found, top, inside, manifest.parameters[top])


def _add_optimizer_aliases(found: Catalogue, top: str, inside: Sequence[str], parameters: Sequence[str]) -> None:
    """``optimizer.state.0.exp_avg`` is also ``optimizer.state.head.weight.exp_avg``; likewise of groups."""
    for name in inside:
        path = found.paths[name]
        if len(path) == 4 and path[1] == "state" and str(path[2]).isdecimal():
            index = int(path[2])
            if index < len(parameters) and parameters[index]:
                found.aliases.setdefault(f"{top}.state.{parameters[index]}.{path[3]}", name)
        elif len(path) == 4 and path[1] == "param_groups":
            for index in _numbers(found.objects.get(f"{top}.param_groups.{path[2]}.params")):
                if index < len(parameters) and parameters[index]:
                    found.aliases.setdefault(f"{top}.param_groups.{parameters[index]}.{path[3]}", name)


def _numbers(value: object) -> list[int]:
    return [number for number in value if isinstance(number, int)] if isinstance(value, list) else []


def _tensors_in(value: object) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
    return [tensor for part in parts for tensor in _tensors_in(part)]


def require(found: Catalogue, name: str) -> SavedTensor:
    """The tensor of a flat name.

    Raises:
        RestoreMismatchError: it can't be read by another layout; the text says why.
    """
    tensor = found.tensors[name]
    if tensor.problem:
        raise RestoreMismatchError(tensor.problem)
    return tensor
