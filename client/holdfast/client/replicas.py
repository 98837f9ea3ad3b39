"""Which tensors of a rank's state are equal on other ranks, too, because torch promises it; and whether they are now.

A wrong guess would give a rank another one's bytes at a restore, so what is taken for a replica needs a promise:

  * a DTensor's ``Replicate`` placements;
  * parameters of a module in `DistributedDataParallel` that DDP does not ignore, unless a communication hook is
    registered that is not known to give every rank the same gradients;
  * the state that one of torch's own optimizers keeps for such a parameter: counts, and tensors of its shape.

Buffers, random generators, plain tensors and other optimizers' state are each rank's own. Beside the promise, the
ranks compare digests when they plan (`claims`), and witnesses at a restore (`pooling`). See docs/adr/0022.
"""

import hashlib
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import torch
from holdfast.client.flatten import Flat
from holdfast.client.manifest import Manifest, TensorEntry, show_path
from holdfast.client.sharding import as_dtensor, local_of
from holdfast.client.tensor_bytes import raw_bytes
from holdfast.client.walk import MemoryKey, memory_key
from holdfast.coding import chunk_digest
from torch.nn.parallel import DistributedDataParallel

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor

Roles = tuple[int, ...]  # ascending
Claim = tuple[str, str, int]  # what, a digest of it, and how many ranks must say the same
LAYOUT = "the order of replicas"  # the claim about where tensors lie; the others bear the state's names
_TORCHS_OWN = "torch.optim."
_EQUAL_GRADIENTS = "torch.distributed.algorithms.ddp_comm_hooks.default_hooks"
_EQUAL_HOOKS = ("allreduce_hook", "fp16_compress_hook", "bf16_compress_hook")  # its wrappers may hold any hook


class Numbering(Protocol):
    """Who one is in the job, and who the others are. `holdfast.client.ranks.Ranks` is one."""

    rank: int

    def role_of(self, global_rank: int) -> int | None:
        """The job's number for a rank of the default process group; None if it does not take part."""


@dataclass(frozen=True, slots=True)
class Replicas:
    """This rank's role, and for memory that others have alike: all roles that do, ascending, this one among them."""

    role: int = 0
    roles_of: Mapping[MemoryKey, Roles] = field(default_factory=dict)

    def of(self, key: MemoryKey, tensor: torch.Tensor) -> Roles:
        """Who has a tensor alike; empty where nobody does, or where its bytes can't be cut as they lie."""
        roles = self.roles_of.get(key, ())
        return roles if roles and can_be_cut(tensor) else ()


ALONE = Replicas()


def find_replicas(
    state: Mapping[str, object], flats: Mapping[str, Flat], ranks: Numbering, wrapper: torch.nn.Module | None = None
) -> Replicas:
    """Look at a state for what torch promises to be equal on several ranks. Nothing is communicated.

    Args:
        state: names to what is staged.
        flats: the same, taken apart.
        ranks: who takes part.
        wrapper: the DDP module around what the state holds without it, if there is one.
    """
    found: dict[MemoryKey, Roles] = {}
    for item in (*state.values(), wrapper):
        if isinstance(item, torch.nn.Module):
            for part in item.modules():
                if isinstance(part, DistributedDataParallel):
                    found.update(_of_ddp(part, ranks))
    for item in state.values():
        if isinstance(item, torch.optim.Optimizer) and type(item).__module__.startswith(_TORCHS_OWN):
            found.update(_of_optimizer(item, found))
    meshes: dict[tuple[int, tuple[bool, ...]], Roles] = {}
    for flat in flats.values():
        for leaf in flat.leaves:
            dtensor = as_dtensor(leaf.tensor)
            if dtensor is not None and (roles := _of_dtensor(dtensor, ranks, meshes)):
                found[memory_key(leaf.tensor)] = roles
    return Replicas(ranks.rank, found)


def can_be_cut(tensor: torch.Tensor) -> bool:
    """Whether any run of its bytes, as a shard has them, lies in one piece in memory here."""
    local = local_of(tensor)
    return local.is_contiguous() and not local.is_conj() and not local.is_neg() and local.numel() > 0


def claims(entries: Iterable[tuple[TensorEntry, torch.Tensor]], manifest: Manifest) -> tuple[Claim, ...]:
    """What this rank believes its replicas to have, for `contested`: the order and, by name, the bytes as they are now.

    Args:
        entries: those that lie in a pool, and their local tensors.
        manifest: with the pools.
    """
    by_name: dict[tuple[int, str], list[tuple[TensorEntry, torch.Tensor]]] = {}
    for entry, local in entries:
        assert entry.pool is not None
        by_name.setdefault((entry.pool, str(entry.path[0])), []).append((entry, local))
    found = list(layout_claims(manifest))
    for (number, name), pairs in sorted(by_name.items(), key=lambda item: item[0]):
        roles = manifest.pools[number].roles
        marks = _marks([local for _, local in pairs])
        told = "".join(f"{show_path(entry.path)} {mark};" for (entry, _), mark in zip(pairs, marks, strict=True))
        found.append((name, _digest(f"{roles} {told}"), len(roles)))
    return tuple(found)


def layout_claims(manifest: Manifest) -> tuple[Claim, ...]:
    """One claim per pool about what lies where in it."""
    found = []
    for number, pool in enumerate(manifest.pools):
        inside = sorted((entry for entry in manifest.tensors if entry.pool == number), key=lambda e: (e.offset, e.path))
        told = "".join(f"{show_path(e.path)} {e.dtype} {e.shape} {e.stride} {e.offset};" for e in inside)
        found.append((LAYOUT, _digest(f"{pool.roles} {pool.size_bytes} {told}"), len(pool.roles)))
    return tuple(found)


def contested(by_rank: Sequence[Sequence[Claim]]) -> list[str]:
    """What is not the same on all the ranks that it should be equal on; every rank comes to the same answer.

    Who takes part in a claim is in its digest, and a rank makes only claims that it takes part in: so as many equal
    ones as there are ranks in it are all of them.
    """
    tally = Counter(claim for claims_of_rank in by_rank for claim in claims_of_rank)
    return sorted({claim[0] for claim, count in tally.items() if count != claim[2]})


def _of_ddp(module: DistributedDataParallel, ranks: Numbering) -> Iterator[tuple[MemoryKey, Roles]]:
    """Parameters that this DDP keeps equal."""
    hooks = [hook for hook, _ in module._comm_hooks]  # noqa: SLF001  # no public way tells
    if not all(_gives_equal_gradients(hook) for hook in hooks):
        return
    members = torch.distributed.get_process_group_ranks(module.process_group)
    roles = _roles(members, ranks)
    if not roles:
        return
    for name, parameter in module.module.named_parameters():
        if name not in module.parameters_to_ignore and as_dtensor(parameter) is None:
            yield memory_key(parameter), roles


def _gives_equal_gradients(hook: object) -> bool:
    known = sys.modules.get(_EQUAL_GRADIENTS)
    return any(hook is getattr(known, name, None) for name in _EQUAL_HOOKS)


def _of_optimizer(
    optimizer: torch.optim.Optimizer, parameters: Mapping[MemoryKey, Roles]
) -> Iterator[tuple[MemoryKey, Roles]]:
    for parameter, slot in list(optimizer.state.items()):
        roles = parameters.get(memory_key(parameter))
        if roles is None or type(slot) is not dict:
            continue
        for value in slot.values():
            plain = isinstance(value, torch.Tensor) and as_dtensor(value) is None
            if plain and (value.shape == parameter.shape or value.dim() == 0):
                yield memory_key(value), roles


def _of_dtensor(dtensor: "DTensor", ranks: Numbering, known: dict[tuple[int, tuple[bool, ...]], Roles]) -> Roles:
    """The roles that hold the same part of it; empty if nobody else does."""
    if any(placement.is_partial() for placement in dtensor.placements):
        return ()
    replicated = tuple(placement.is_replicate() for placement in dtensor.placements)
    if not any(replicated):
        return ()
    key = (id(dtensor.device_mesh), replicated)
    if key not in known:
        known[key] = _roles(_line_of(dtensor.device_mesh, replicated), ranks)
    return known[key]


def _line_of(mesh: "DeviceMesh", free: Sequence[bool]) -> list[int]:
    """The ranks of a mesh that differ from this one in the free dimensions alone."""
    here = mesh.get_coordinate()
    if here is None:
        return []
    line = mesh.mesh[tuple(slice(None) if is_free else at for is_free, at in zip(free, here, strict=True))]
    return [int(rank) for rank in line.flatten().tolist()]


def _roles(members: Iterable[int], ranks: Numbering) -> Roles:
    """Their roles, ascending; empty if there is only one, or one of them is not in the job."""
    roles = [ranks.role_of(member) for member in members]
    known = sorted({role for role in roles if role is not None})
    return tuple(known) if len(known) == len(roles) > 1 and ranks.rank in known else ()


def _marks(tensors: Sequence[torch.Tensor]) -> list[int]:
    """A number for each tensor's bytes. On a GPU a sum of words: equal bytes give equal ones, and nothing is moved."""
    found: dict[int, int] = {}
    sums: list[tuple[int, torch.Tensor]] = []
    for index, tensor in enumerate(tensors):
        raw = raw_bytes(tensor)
        if raw is not None:
            found[index] = chunk_digest(raw.data)
            continue
        words = tensor.detach().reshape(-1).view(torch.uint8)
        words = words.view(torch.int32) if len(words) % 4 == 0 and words.data_ptr() % 4 == 0 else words
        sums.append((index, words.sum(dtype=torch.int64)))
    for device in {total.device for _, total in sums}:
        mine = [(index, total) for index, total in sums if total.device == device]
        found.update(zip([index for index, _ in mine], torch.stack([t for _, t in mine]).tolist(), strict=True))
    return [found[index] for index in range(len(tensors))]


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:32]
