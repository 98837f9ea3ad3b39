"""Putting a shard back into a live state, bit for bit, or refusing it before anything was changed.

In order: read and check the shard, compare it with the live state, make what is missing (a fresh
optimizer has no state yet), copy over what is there, hand the whole to each ``load_state_dict``,
and set the random generators last, since all before may have used them.
"""

import io
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from holdfast.client.checks import Checks
from holdfast.client.flat_parameters import is_flat
from holdfast.client.flatten import (
    Flat,
    Rules,
    Stateful,
    check_tensor,
    dtype_name,
    flatten,
    state_of,
    unflatten,
)
from holdfast.client.inward import as_payload, copy_all_in
from holdfast.client.manifest import (
    Mesh,
    ParsedShard,
    Path,
    Sharding,
    TensorEntry,
    parse_shard,
    show_path,
)
from holdfast.client.rng import restore_rng
from holdfast.client.sharding import SeenMesh, describe, distribute, local_of
from holdfast.client.state_errors import MalformedShardError, RestoreMismatchError
from holdfast.client.state_hash import hash_state
from holdfast.client.walk import MemoryKey, memory_key

__all__ = ["hash_state", "restore_into"]

PROBLEMS_SHOWN = 5  # differences named in an error; a whole foreign model has thousands


def gpu_of(state: Mapping[str, object]) -> torch.device | None:
    """The first GPU on which a parameter lies; a look that costs nothing, and so not at all that could hold one."""
    for item in state.values():
        found: Iterable[torch.Tensor] = ()
        if isinstance(item, torch.nn.Module):
            found = item.parameters()
        elif isinstance(item, torch.optim.Optimizer):
            found = (parameter for group in item.param_groups for parameter in group["params"])
        for tensor in found:
            if tensor.device.type == "cuda":
                return tensor.device
    return None


def restore_into(
    state: Mapping[str, object], shard: memoryview, *, allow_pickle: bool = False, checks: Checks | None = None
) -> None:
    """Put every byte of ``shard`` back into ``state``, and the random generators with it.

    Tensors that are there are overwritten in place, so whoever holds them sees the new content;
    others are made. A DTensor is made on the mesh that the live state uses, so nothing is
    communicated. No tensor aliases ``shard`` afterwards.

    Args:
        state: What ``ShardLayout.build`` was given, built anew the same way.
        shard: Memory of exactly one shard; may be read-only.
        allow_pickle: Read plain objects without restriction. Only for shards that this job wrote.
        checks: Compares the chunks under the shard, each just before it is used; None: that was done before.

    Raises:
        RottenShardError: a chunk fails its digest. Tensors may be overwritten in part: restore again.
        MalformedShardError: these bytes are no shard, or contradict themselves.
        RestoreMismatchError: names, dtypes, shapes, shardings or meshes differ from the live ones.
            Nothing live was changed, as with the errors above and below.
        StateError: the live state itself cannot be put back into.
    """
    restoring = Restoring.begin(state, shard, allow_pickle=allow_pickle, checks=checks)
    if restoring.parsed.manifest.pools:
        raise RestoreMismatchError(
            "parts of this shard lie with other ranks: restore it with Snapshotter.restore() or HoldfastReader"
        )
    restoring.copy()
    restoring.finish()


@dataclass(slots=True)
class Restoring:
    """A shard on its way into a live state that it fits: `begin`, `copy`, what lies with other ranks, `finish`.

    Attributes:
        tensors: by path: what each entry is copied into.
        trees: by name: what is handed to each part of the state.
    """

    state: Mapping[str, object]
    parsed: ParsedShard
    tensors: dict[Path, torch.Tensor]
    trees: dict[str, object]
    rng: dict[str, object]
    checks: Checks | None

    @classmethod
    def begin(
        cls, state: Mapping[str, object], shard: memoryview, *, allow_pickle: bool, checks: Checks | None
    ) -> "Restoring":
        """Compare; nothing live is changed. Arguments and errors as of `restore_into`."""
        parsed = _parse(shard, checks)
        objects, rng = _read_objects(parsed, allow_pickle=allow_pickle)
        live = _Live.look(state)
        problems = live.compare(parsed, objects)
        if problems:
            raise RestoreMismatchError(mismatch_text(problems))
        tensors = live.targets(parsed)
        trees = {name: unflatten(objects[name], tensors, name) for name in state}
        problems = [text for name in state for text in _key_problems(name, state[name], trees[name])]
        if problems:
            raise RestoreMismatchError(mismatch_text(problems))
        return cls(state, parsed, tensors, trees, rng, checks)

    def pairs(self) -> list[tuple[TensorEntry, torch.Tensor]]:
        """All entries and the local tensors that they fill."""
        return [(entry, local_of(self.tensors[entry.path])) for entry in self.parsed.manifest.tensors]

    def copy(self) -> None:
        """Check every chunk of the shard; copy the tensors that lie here whole."""
        whole = [pair for pair in self.pairs() if pair[0].pool is None]
        copy_all_in(whole, as_payload(self.parsed.payload), self.checks, self.parsed.header.payload_offset)

    def finish(self) -> None:
        """Every tensor has its bytes: hand all to whom it belongs."""
        for name, item in self.state.items():
            load_item(item, self.trees[name])
        restore_rng(self.rng)


def _parse(shard: memoryview, checks: Checks | None) -> ParsedShard:
    """What the shard says of itself, once the chunks that say it are checked."""
    if checks is None:
        return parse_shard(shard)
    try:
        parsed = parse_shard(shard)  # it trusts nothing
    except MalformedShardError:
        checks.check(0, len(shard))  # so that is what is wrong
        raise
    checks.check(0, parsed.header.payload_offset)
    return parsed


@dataclass(slots=True)
class _Live:
    """The live state before the restore: its tensors by path, and the meshes they lie on."""

    state: Mapping[str, object]
    flats: dict[str, Flat]
    tensors: dict[Path, torch.Tensor]
    shardings: dict[Path, Sharding | None]
    meshes: list[SeenMesh]
    mesh_of: dict[Mesh, SeenMesh] = field(default_factory=dict)
    parameters: dict[str, list[torch.Tensor]] = field(default_factory=dict)  # of each optimizer, as it numbers them

    @classmethod
    def look(cls, state: Mapping[str, object]) -> "_Live":
        flats = {name: flatten(name, state_of(name, item), Rules(allow_pickle=True)) for name, item in state.items()}
        tensors = {leaf.path: leaf.tensor for flat in flats.values() for leaf in flat.leaves}
        for path, tensor in tensors.items():
            check_tensor(path, tensor)
        meshes: list[SeenMesh] = []
        shardings = {path: describe(tensor, meshes) for path, tensor in tensors.items()}
        live = cls(state, flats, tensors, shardings, meshes)
        live.mesh_of = {seen.mesh: seen for seen in meshes}
        live.parameters = {
            name: [parameter for group in item.param_groups for parameter in group["params"]]
            for name, item in state.items()
            if isinstance(item, torch.optim.Optimizer)
        }
        return live

    def compare(self, parsed: ParsedShard, objects: Mapping[str, object]) -> list[str]:
        """What keeps this shard from being put into this state; empty if nothing does."""
        saved_names, names = set(parsed.manifest.names), set(self.state)
        problems = [f"{name}: only in the shard" for name in sorted(saved_names - names)]
        problems += [f"{name}: not in the shard" for name in sorted(names - saved_names)]
        if problems:
            return problems
        saved = {entry.path: entry for entry in parsed.manifest.tensors}
        for entry in saved.values():
            problems += self._entry_problems(entry, parsed)
        for path in self.tensors:
            if path not in saved and _is_strict(self.state[str(path[0])]):
                problems.append(f"{show_path(path)}: not in the shard")
        for name, item in self.state.items():
            if isinstance(item, torch.optim.Optimizer):
                problems += group_problems(name, self.flats[name].objects, objects[name])
        return problems + self._sharing_problems(saved)

    def targets(self, parsed: ParsedShard) -> dict[Path, torch.Tensor]:
        """What each entry is copied into, by path."""
        try:
            return {entry.path: self._target(entry, parsed) for entry in parsed.manifest.tensors}
        except (RuntimeError, ValueError, TypeError) as error:
            # A well-formed description of a tensor that torch cannot make, e.g. 2**60 columns.
            raise MalformedShardError(f"the shard describes an impossible tensor: {error}") from error

    def _target(self, entry: TensorEntry, parsed: ParsedShard) -> torch.Tensor:
        """The live tensor that an entry is copied into, or a new one if there is none that fits."""
        tensor = self.tensors.get(entry.path)
        if tensor is not None and not self._tensor_problems(entry, parsed):
            return tensor
        dtype = getattr(torch, entry.dtype)
        if entry.sharding is None:
            return _empty(entry, dtype, self._device_of(entry))
        device_mesh = self.mesh_of[parsed.manifest.meshes[entry.sharding.mesh_index]].device_mesh
        local = _empty(entry, dtype, device_mesh.device_type)
        return distribute(local, entry.sharding, device_mesh)

    def _device_of(self, entry: TensorEntry) -> torch.device:
        """Where a fresh optimizer will want a tensor of its state: beside the parameter, so that it is copied once."""
        name, *rest = entry.path
        parameters = self.parameters.get(str(name), [])
        if len(rest) == 3 and rest[0] == "state" and isinstance(rest[1], int) and rest[1] in range(len(parameters)):
            # Counts of steps are moved, or left on the CPU, by the optimizer itself.
            return torch.device("cpu") if rest[2] == "step" else parameters[rest[1]].device
        return torch.device("cpu")

    def _entry_problems(self, entry: TensorEntry, parsed: ParsedShard) -> list[str]:
        item = self.state[str(entry.path[0])]
        strict = _is_strict(item)
        if entry.path in self.tensors:
            problems = self._tensor_problems(entry, parsed)
            if problems and (strict or isinstance(item, torch.optim.Optimizer)):
                return problems
        elif strict:
            return [f"{show_path(entry.path)}: only in the shard"]
        if entry.sharding is not None:
            mesh = parsed.manifest.meshes[entry.sharding.mesh_index]
            if mesh not in self.mesh_of:
                return [f"{show_path(entry.path)}: no live tensor lies on a mesh {mesh.shape}"]
        return []

    def _tensor_problems(self, entry: TensorEntry, parsed: ParsedShard) -> list[str]:
        local = local_of(self.tensors[entry.path])
        found = f"{dtype_name(local.dtype)} {list(local.shape)}"
        found += self._sharding_text(self.shardings[entry.path], [seen.mesh for seen in self.meshes])
        saved = f"{entry.dtype} {list(entry.shape)}"
        saved += self._sharding_text(entry.sharding, parsed.manifest.meshes)
        if saved == found:
            return []
        return [f"{show_path(entry.path)}: {saved} in the shard, {found} live"]

    @staticmethod
    def _sharding_text(sharding: Sharding | None, meshes: "tuple[Mesh, ...] | list[Mesh]") -> str:
        """A text that two shardings share exactly if they are the same."""
        if sharding is None:
            return ""
        mesh = meshes[sharding.mesh_index]
        return (
            f" at {list(sharding.global_offset)} of {list(sharding.global_shape)} "
            f"({', '.join(sharding.placements)}) on {mesh.device_type} mesh {list(mesh.shape)} "
            f"{mesh.dim_names or ''} of {len(mesh.ranks)} ranks"
        )

    def _sharing_problems(self, saved: Mapping[Path, TensorEntry]) -> list[str]:
        """Live tensors that are one must not be asked to hold two contents."""
        problems: list[str] = []
        first: dict[MemoryKey, TensorEntry] = {}
        for path, entry in saved.items():
            if path in self.tensors and entry.size_bytes:
                known = first.setdefault(memory_key(self.tensors[path]), entry)
                if (known.pool, known.offset) != (entry.pool, entry.offset):
                    paths = f"{show_path(path)} and {show_path(known.path)}"
                    problems.append(f"{paths}: share memory live, not in the shard")
        return problems


def _read_objects(parsed: ParsedShard, *, allow_pickle: bool) -> tuple[dict[str, object], dict[str, object]]:
    """The plain objects by name, and the generators' states."""
    try:
        record = torch.load(io.BytesIO(parsed.objects), weights_only=not allow_pickle)
    except Exception as error:
        raise MalformedShardError(f"the shard's plain objects cannot be read: {error}") from error
    parts = (record.get("objects"), record.get("rng")) if isinstance(record, dict) else (None, None)
    objects, rng = parts
    if not isinstance(objects, dict) or not isinstance(rng, dict):
        raise MalformedShardError("the shard's plain objects are not what capture writes")
    if tuple(objects) != parsed.manifest.names:
        raise MalformedShardError(f"the manifest names {parsed.manifest.names}, the plain objects {tuple(objects)}")
    return objects, rng


def _is_strict(item: object) -> bool:
    """Whether the live tensors are all there is: what else may make and drop tensors as it runs."""
    return isinstance(item, torch.nn.Module | torch.Tensor)


def group_problems(name: str, live: object, saved: object) -> list[str]:
    """How an optimizer's groups differ from the live ones."""
    expected, found = _group_sizes(saved), _group_sizes(live)
    if expected == found:
        return []
    return [f"{name}/param_groups: {expected} parameters per group in the shard, {found} live"]


def _group_sizes(tree: object) -> list[int] | None:
    groups = tree.get("param_groups") if isinstance(tree, dict) else None
    if not isinstance(groups, list) or not all(isinstance(group, dict) for group in groups):
        return None  # an optimizer with a state of its own kind
    return [len(group.get("params", ())) for group in groups]


def _key_problems(name: str, item: object, tree: object) -> list[str]:
    """A module refuses unknown keys only after it loaded the others, so this looks first."""
    if not isinstance(item, torch.nn.Module):
        return []
    there = state_of(name, item)
    saved, live = set(tree if isinstance(tree, dict) else ()), set(there if isinstance(there, dict) else ())
    return [f"{name}/{key}: only on one side" for key in sorted(saved ^ live, key=str)]


def mismatch_text(problems: list[str]) -> str:
    """What is said when a snapshot does not fit."""
    shown = "; ".join(problems[:PROBLEMS_SHOWN])
    more = len(problems) - PROBLEMS_SHOWN
    rest = f"; and {more} more" if more > 0 else ""
    return (
        f"the shard does not fit the live state: {shown}{rest}. Nothing was changed: build the "
        "state as the run did that wrote it"
    )


def _empty(entry: TensorEntry, dtype: torch.dtype, device: str | torch.device) -> torch.Tensor:
    if entry.stride is not None:
        return torch.empty_strided(entry.shape, entry.stride, dtype=dtype, device=device)
    return torch.empty(entry.shape, dtype=dtype, device=device)


def load_item(item: object, tree: object) -> None:
    """Hand one part of a state back to whom it belongs; tensors that are there are already filled."""
    if isinstance(item, torch.Tensor) or is_flat(item):
        return  # its bytes are in place
    assert isinstance(item, Stateful)
    assert isinstance(tree, dict)
    if isinstance(item, torch.nn.Module):
        # The live dict, because it carries the modules' versions beside its items. Its tensors are
        # the live ones and already filled: torch copies each onto itself, which it skips.
        whole = item.state_dict()
        whole.update(tree)
        item.load_state_dict(whole)
        return
    item.load_state_dict(tree)
    if isinstance(item, torch.optim.Optimizer):
        _keep_dtypes(item, tree)


def _keep_dtypes(optimizer: torch.optim.Optimizer, tree: Mapping[str, object]) -> None:
    """Undo what torch's optimizers do on loading: cast state to the parameter's dtype."""
    slots = tree.get("state")
    if not isinstance(slots, dict):
        return
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for index, parameter in enumerate(parameters):
        for key, saved in slots.get(index, {}).items():
            loaded = optimizer.state[parameter].get(key)
            if isinstance(loaded, torch.Tensor) and loaded.dtype != saved.dtype:
                optimizer.state[parameter][key] = saved.to(device=loaded.device)
