"""Putting a snapshot into a live state of another layout: another world size, other shardings, ranks on other nodes.

Every rank reads by itself the byte ranges that its live tensors need; nothing is communicated. What restore.py does for
one's own shard, in the same order: compare, make what is missing, fill, hand the whole to each ``load_state_dict``, set
the random generators last. Tensors are matched by the names that torch's checkpoints use, sharded ones by their place
in the global tensor.

What is no tensor has no such place. If the world size is as it was, each rank gets its own back; else every rank gets
role 0's, and a rank's random generators are its own role's, or, where there was no such role, seeded from role 0's and
the rank's number: not what they would have been, but the same in every such restore, and different on each rank.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from holdfast.client.catalogue import Catalogue, SavedTensor
from holdfast.client.dcp_reader import HoldfastReader
from holdfast.client.errors import NotRecoverableError
from holdfast.client.flatten import Flat, Rules, check_tensor, dtype_name, flatten, state_of, unflatten
from holdfast.client.manifest import Path, TensorEntry, show_path
from holdfast.client.names import canonical_names, parameter_names
from holdfast.client.reading import read_entry
from holdfast.client.restore import group_problems, load_item, mismatch_text
from holdfast.client.rng import restore_rng, seeded_rng
from holdfast.client.sharding import as_dtensor
from holdfast.client.state_errors import RestoreMismatchError
from holdfast.client.witnesses import acceptance, read_witnesses, refusal, strangers
from holdfast.protocol.ids import SnapshotId
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import Metadata


def reshard_into(  # who reads what, and as whom
    state: Mapping[str, object],
    reader: HoldfastReader,
    *,
    snapshot: SnapshotId,
    role: int,
    world_size: int,
    lenient: bool = False,
) -> list[str]:
    """Put the snapshot that `reader` finds into ``state``, and random generators with it.

    Args:
        state: what the Snapshotter was given, built anew.
        reader: of the job; it is used up.
        snapshot: that must be the newest committed one: all ranks restore it.
        role: of this rank in its new world.
        world_size: of that world.
        lenient: whether replicas that differed when they were staged are told instead of refused.

    Returns:
        What was not brought back as it was, as sentences; empty if everything was.

    Raises:
        RestoreMismatchError: the live state does not fit the snapshot. Nothing live was changed.
        HoldfastError: bytes can't be had, or replicas differed; live tensors may be changed then.
    """
    metadata = reader.read_metadata()
    try:
        if reader.snapshot != snapshot:
            raise NotRecoverableError(
                f"expected {snapshot} to be restored, {reader.snapshot} is committed: start again"
            )
        found, source = reader.opened()
        own = role if world_size == len(found.heads) else 0
        plan = _Plan(state, found, own, world_size == len(found.heads))
        plan.make()
        if plan.problems:
            raise RestoreMismatchError(mismatch_text(plan.problems))
        payload_offset = found.heads[own].header.payload_offset
        for path, entry in plan.alone.items():
            plan.tensors[path] = read_entry(source, own, payload_offset, entry)
        witnesses = read_witnesses(source, own, found.heads[own])
        _fill(reader, metadata, plan.targets, role=role)
    finally:
        reader.close()
    told = []
    if differed := strangers(found.heads[own].manifest, witnesses, plan.pooled()):
        if not lenient:
            raise NotRecoverableError(refusal(differed, own))
        told.append(acceptance(differed))
    for name, item in state.items():
        load_item(item, plan.tree(name))
    restore_rng(_generators(found.rng, role))
    return told + _told(found, role=role, world_size=world_size)


@dataclass(slots=True)
class _Plan:
    """What is read into which live tensor.

    Attributes:
        own: the role whose own things are this rank's: what is no tensor, and tensors that are neither a module's nor
            an optimizer's nor sharded.
        same_world: whether there are as many ranks as there were.
        targets: by flat live name: the live or new tensor that is filled from all ranks' pieces.
        alone: by path: what is read whole from role ``own``.
        tensors: by path: all of them, once they are there.
        problems: what keeps the snapshot from being put into this state.
    """

    state: Mapping[str, object]
    found: Catalogue
    own: int
    same_world: bool
    flats: dict[str, Flat] = field(default_factory=dict)
    targets: dict[str, torch.Tensor] = field(default_factory=dict)
    alone: dict[Path, TensorEntry] = field(default_factory=dict)
    tensors: dict[Path, torch.Tensor] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def make(self) -> None:
        """Look at everything; nothing is read or changed."""
        saved, live = self.found.heads[self.own].manifest.names, set(self.state)
        if self.found.is_dcp:
            self.problems.append("dcp.save wrote this snapshot: read it with dcp.load and HoldfastReader")
            return
        self.problems += [f"{name}: only in the snapshot" for name in sorted(set(saved) - live)]
        self.problems += [f"{name}: not in the snapshot" for name in sorted(live - set(saved))]
        if self.problems:
            return
        rules = Rules(allow_pickle=True)
        for name, item in self.state.items():
            self.flats[name] = flatten(name, state_of(name, item), rules)
            if isinstance(item, torch.nn.Module | torch.Tensor):
                self._module(name)
            elif isinstance(item, torch.optim.Optimizer):
                self._optimizer(name, item)
            else:
                self._other(name)

    def pooled(self) -> list[tuple[TensorEntry, torch.Tensor]]:
        """What lies in pools and is whole and as it was on this rank, too: its bytes, flat."""
        found = []
        live = {self.found.resolve(flat): tensor for flat, tensor in self.targets.items()}
        for entry in self.found.heads[self.own].manifest.tensors:
            tensor = live.get(_flat_name(entry.path))
            if entry.pool is None or entry.sharding is not None or tensor is None:
                continue
            plain = as_dtensor(tensor) is None and tensor.is_contiguous()
            if plain and dtype_name(tensor.dtype) == entry.dtype:
                found.append((entry, tensor.detach().reshape(-1).view(torch.uint8)))
        return found

    def tree(self, name: str) -> object:
        """What ``load_state_dict`` gets."""
        objects = self.found.trees[self.own][name]
        tensors = {path: tensor for path, tensor in self.tensors.items() if path[0] == name}
        if not isinstance(self.state[name], torch.nn.Module):
            return unflatten(objects, tensors, name)
        # A module's state is flat, and its names may have another wrapper's prefix here than in the snapshot.
        tree: dict[object, object] = {path[1]: tensor for path, tensor in tensors.items()}
        saved = canonical_names(objects) if isinstance(objects, dict) else {}
        extra = {canonical: objects[key] for key, canonical in saved.items() if objects[key] is not None}
        live = self.flats[name].objects
        for key, canonical in canonical_names(live if isinstance(live, dict) else ()).items():
            if canonical in extra and key not in tree:
                tree[key] = extra[canonical]
        return tree

    def _module(self, name: str) -> None:
        """A module or a bare tensor: the live tensors are all there is."""
        seen = set()
        for leaf in self.flats[name].leaves:
            flat = _flat_name(leaf.path)
            seen.add(self.found.resolve(flat))
            self._target(flat, leaf.path, leaf.tensor)
        for entry in self._entries(name):
            if _flat_name(entry.path) not in seen:
                self.problems.append(f"{show_path(entry.path)}: only in the snapshot")

    def _target(self, flat: str, path: Path, tensor: torch.Tensor) -> None:
        known = self.found.tensors.get(self.found.resolve(flat) or "")
        if known is None:
            self.problems.append(f"{show_path(path)}: not in the snapshot")
            return
        check_tensor(path, tensor)
        expected, found = f"{known.dtype} {list(known.shape)}", f"{dtype_name(tensor.dtype)} {list(tensor.shape)}"
        if known.problem:
            self.problems.append(known.problem)
        elif expected != found:
            self.problems.append(f"{show_path(path)}: {expected} in the snapshot, {found} live")
        self.targets[flat] = self.tensors[path] = tensor

    def _optimizer(self, name: str, optimizer: torch.optim.Optimizer) -> None:
        self.problems += group_problems(name, self.flats[name].objects, self.found.trees[self.own][name])
        saved = self.found.heads[self.own].manifest.parameters.get(name)
        live = parameter_names(self.state).get(name)
        if saved is not None and live is not None and saved != live:
            where = next((i for i, pair in enumerate(zip(saved, live, strict=False)) if len(set(pair)) > 1), 0)
            self.problems.append(
                f"{name}: parameter {where} is {saved[where]!r} in the snapshot, {live[where]!r} live: give the "
                "optimizer its parameters in the same order"
            )
        if self.problems:
            return
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        there = {leaf.path: leaf.tensor for leaf in self.flats[name].leaves}
        for entry in self._entries(name):
            flat = _flat_name(entry.path)
            known = self.found.tensors[flat]
            if known.problem and entry.sharding is None and entry.pool is None and self.same_world:
                self.alone[entry.path] = entry
                continue
            tensor = there.get(entry.path)
            if tensor is None or (dtype_name(tensor.dtype), tuple(tensor.shape)) != (known.dtype, known.shape):
                tensor = _like_parameter(entry, known, parameters)
            if tensor is None:
                self.problems.append(
                    f"{show_path(entry.path)}: {known.dtype} {list(known.shape)} is sharded and like no parameter, so "
                    "its new place is not known: take a step before restore(), so that it is there"
                )
            else:
                self._target(flat, entry.path, tensor)

    def _other(self, name: str) -> None:
        there = {leaf.path: leaf.tensor for leaf in self.flats[name].leaves}
        for entry in self._entries(name):
            if entry.sharding is None:
                self.alone[entry.path] = entry
            elif entry.path in there:
                self._target(_flat_name(entry.path), entry.path, there[entry.path])
            else:
                self.problems.append(
                    f"{show_path(entry.path)}: is sharded, and not there to tell how it is sharded now"
                )

    def _entries(self, name: str) -> list[TensorEntry]:
        return [entry for entry in self.found.heads[self.own].manifest.tensors if entry.path[0] == name]


def _flat_name(path: Path) -> str:
    return ".".join(map(str, path))


def _like_parameter(entry: TensorEntry, known: SavedTensor, parameters: list[torch.Tensor]) -> torch.Tensor | None:
    """A new tensor for an optimizer's state: laid out as its parameter is, plain where it was plain."""
    dtype = getattr(torch, known.dtype)
    index = entry.path[2] if len(entry.path) > 2 and entry.path[1] == "state" else None
    if isinstance(index, int) and index < len(parameters) and tuple(parameters[index].shape) == known.shape:
        return torch.empty_like(parameters[index], dtype=dtype, requires_grad=False)
    return None if known.sharded else torch.empty(known.shape, dtype=dtype)


def _fill(reader: HoldfastReader, metadata: Metadata, targets: dict[str, torch.Tensor], *, role: int) -> None:
    """Have torch plan which pieces each target needs, and read them."""
    reader.set_up_storage_reader(metadata, True, rank=role)
    planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    planner.set_up_planner(targets, metadata, is_coordinator=True)
    plans = reader.prepare_global_plan([reader.prepare_local_plan(planner.create_local_plan())])
    reader.read_data(plans[0], planner).wait()


def _generators(saved: list[dict[str, Any]], role: int) -> Mapping[str, object]:
    """A rank's random generators: its role's, or seeded from role 0's and its number."""
    if role < len(saved):
        return saved[role]
    torch_state = saved[0]["torch"].numpy().tobytes()
    seed = int.from_bytes(hashlib.sha256(torch_state + role.to_bytes(8, "little")).digest()[:4], "little")
    return seeded_rng(seed)


def _told(found: Catalogue, *, role: int, world_size: int) -> list[str]:
    before = len(found.heads)
    if before == world_size:
        return []
    told = []
    first = found.trees[0]
    differ = [name for name in first if any(tree.get(name) != first[name] for tree in found.trees[1:])]
    if differ:
        told.append(
            f"{', '.join(differ)}: what is no tensor differed between the {before} ranks; all now have rank 0's"
        )
    if role >= before:
        told.append(f"this rank's random generators are seeded anew: the snapshot has {before} ranks")
    return told
