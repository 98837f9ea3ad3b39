"""Walking a live state again and again, cheaply.

The first look at a module or an optimizer asks its ``state_dict()``; later looks only verify that every
tensor is still the same object in the same memory, which costs a fiftieth. Anything that differs,
and anything that is neither a plain module nor one of torch's plain optimizers, is asked again.

What this cannot notice: a module whose ``state_dict`` hooks begin to name other tensors while its
parameters and buffers stay the same objects, and a name that changes while its tensor stays.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from operator import attrgetter, is_
from typing import Any

import torch
from holdfast.client.flat_parameters import flat_tensors, is_flat
from holdfast.client.flatten import Flat, Leaf, Rules, flatten, state_of
from holdfast.client.sharding import as_dtensor, local_of
from holdfast.client.whereabouts import Whereabouts

MemoryKey = tuple[int, tuple[int, ...], tuple[int, ...], torch.dtype, torch.device]
_Slots = dict[str, Any]
_PART = attrgetter("_local_tensor")  # as in sharding.local_of


def memory_key(tensor: torch.Tensor) -> MemoryKey:
    """What makes two tensors one: the same view of the same memory."""
    local = local_of(tensor)
    return (
        local.data_ptr(),
        tuple(local.shape),
        tuple(local.stride()),
        local.dtype,
        local.device,
    )


@dataclass(slots=True)
class MemoryWatch:
    """Tells whether tensors still lie where they lay.

    Everything here runs for every tensor at every snapshot in the training thread, so each check is one `map` over
    functions written in C: about 0.1 microseconds a tensor, where a loop in Python takes one.
    """

    wrapped: list[torch.Tensor]  # DTensors
    parts: list[torch.Tensor]  # their local parts
    local: list[torch.Tensor]  # of all tensors
    whereabouts: Whereabouts
    shapes: tuple[list[int], list[tuple[int, ...]]]

    @classmethod
    def of(cls, tensors: Iterable[torch.Tensor]) -> "MemoryWatch":
        """Remember where these lie now."""
        tensors = list(tensors)
        wrapped = [tensor for tensor in tensors if as_dtensor(tensor) is not None]
        local = [local_of(tensor) for tensor in tensors]
        return cls(wrapped, [local_of(tensor) for tensor in wrapped], local, Whereabouts(local), _shapes_of(local))

    def unchanged(self) -> bool:
        """Whether they lie there still."""
        return all(map(is_, map(_PART, self.wrapped), self.parts)) and self.whereabouts.unchanged()

    def reshaped(self) -> bool:
        """Whether one has another shape in the same memory, which is rare and costs three times as much to see."""
        return _shapes_of(self.local) != self.shapes


def _shapes_of(local: Iterable[torch.Tensor]) -> tuple[list[int], list[tuple[int, ...]]]:
    """Counts of elements, and strides: together they tell shapes apart, and asking for shapes costs ten times more."""
    local = list(local)
    return list(map(torch.Tensor.numel, local)), list(map(torch.Tensor.stride, local))


@dataclass(slots=True)
class ModuleWatch:
    """Tells whether a module's ``state_dict()`` would still give what it gave."""

    flat: Flat
    containers: list[_Slots]
    members: list[object]  # what the containers hold: parameters, buffers, modules, None
    memory: MemoryWatch
    buffers: list[torch.Tensor]  # may be resized in place; what autograd watches may not
    shapes: list[torch.Size]

    @classmethod
    def of(cls, module: torch.nn.Module, flat: Flat) -> "ModuleWatch | None":
        """A watch, or None where the state holds anything but the module's own tensors."""
        containers: list[_Slots] = []
        buffers: list[torch.Tensor] = []
        for part in module.modules():
            # torch's own names for these: there is no public way to look without building a dict
            containers += [part._parameters, part._buffers, part._modules]  # noqa: SLF001
            buffers += [local_of(buffer) for buffer in part._buffers.values() if buffer is not None]  # noqa: SLF001
        members = _members(containers)
        tensors = [member for member in members if isinstance(member, torch.Tensor)]
        owned = set(map(memory_key, tensors))
        if flat.objects is not None or any(memory_key(leaf.tensor) not in owned for leaf in flat.leaves):
            return None
        return cls(flat, containers, members, MemoryWatch.of(tensors), buffers, [buffer.shape for buffer in buffers])

    def look(self) -> Flat | None:
        """The state as it was, None if it is no longer so."""
        return self.flat if self._unchanged() else None

    def _unchanged(self) -> bool:
        return (
            _same(_members(self.containers), self.members)
            and [buffer.shape for buffer in self.buffers] == self.shapes
            and self.memory.unchanged()
        )


@dataclass(slots=True)
class OptimizerWatch:
    """Gives what an optimizer's ``state_dict()`` would give, without asking it while its tensors stay the same.

    The groups (learning rates and the like) are looked at anew each time.
    """

    optimizer: torch.optim.Optimizer
    rules: Rules
    leaves: list[Leaf]
    state: object  # what of the state is no tensor: nothing, or empty containers
    numbers: list[object]  # of the parameters, by group, as state_dict() gives them
    parameters: list[torch.Tensor]  # of all groups
    owners: list[torch.Tensor]  # the parameters that have state
    slots: list[dict[str, torch.Tensor]]
    tensors: list[torch.Tensor]
    memory: MemoryWatch

    @classmethod
    def of(cls, optimizer: torch.optim.Optimizer, flat: Flat, rules: Rules) -> "OptimizerWatch | None":
        """A watch, or None where the state is of a kind of its own, or plain values are among it."""
        known = type(optimizer).state_dict is torch.optim.Optimizer.state_dict and "state_dict" not in vars(optimizer)
        # Hooks may give anything; torch keeps them under these names alone.
        hooked = optimizer._optimizer_state_dict_pre_hooks or optimizer._optimizer_state_dict_post_hooks  # noqa: SLF001
        slots = list(optimizer.state.values())
        if not known or hooked or not all(type(slot) is dict for slot in slots):
            return None
        tensors = list(chain.from_iterable(map(dict.values, slots)))
        state_leaves = all(leaf.path[1] == "state" for leaf in flat.leaves)
        if len(tensors) != len(flat.leaves) or not state_leaves or not isinstance(flat.objects, dict):
            return None  # a tensor among the groups, or something plain or nested among the state
        groups = flat.objects["param_groups"]
        numbers = [group["params"] for group in groups]
        owners = list(optimizer.state)
        memory = MemoryWatch.of(tensors)
        state = flat.objects["state"]
        parameters = _parameters(optimizer)
        return cls(optimizer, rules, flat.leaves, state, numbers, parameters, owners, slots, tensors, memory)

    def look(self) -> Flat | None:
        """The state as it is, None if it must be asked for."""
        if not self._unchanged():
            return None
        groups = [{k: v for k, v in group.items() if k != "params"} for group in self.optimizer.param_groups]
        found = flatten("groups", groups, self.rules)
        if found.leaves or not isinstance(found.objects, list):
            return None
        for group, numbers in zip(found.objects, self.numbers, strict=True):
            group["params"] = numbers  # thousands, always the same: not worth a walk
        return Flat(self.leaves, {"state": self.state, "param_groups": found.objects})

    def _unchanged(self) -> bool:
        held = self.optimizer.state
        return (
            len(self.optimizer.param_groups) == len(self.numbers)
            and _same(_parameters(self.optimizer), self.parameters)
            and _same(list(held), self.owners)
            and _same(list(held.values()), self.slots)
            and _same(list(chain.from_iterable(map(dict.values, self.slots))), self.tensors)
            and self.memory.unchanged()
        )


@dataclass(slots=True)
class StateWalker:
    """Looks at a rank's whole state; remembers what lets the next look be cheap."""

    state: Mapping[str, object]
    rules: Rules
    watches: dict[str, ModuleWatch | OptimizerWatch] = field(default_factory=dict)

    def walk(self) -> dict[str, Flat]:
        """The state taken apart, by name, in the mapping's order. No tensor is copied.

        Raises:
            StateError: something in the state cannot be staged.
        """
        self.rules.mutable_count = 0
        return {name: self._look(name, item) for name, item in self.state.items()}

    def lazy_keys(self, flats: Mapping[str, Flat]) -> set[MemoryKey]:
        """The memory that only an optimizer's step changes: parameters and optimizer state."""
        keys: set[MemoryKey] = set()
        for name, item in self.state.items():
            if isinstance(item, torch.nn.Module):
                keys.update(map(memory_key, flat_tensors(item) if is_flat(item) else item.parameters()))
            elif isinstance(item, torch.optim.Optimizer):
                keys.update(memory_key(leaf.tensor) for leaf in flats[name].leaves if _is_slot(leaf))
        return keys

    def forget(self) -> None:
        """Ask everything again at the next look."""
        self.watches.clear()

    def reshaped(self) -> bool:
        """Whether a look would miss a change: another shape in the same memory. Any thread."""
        return any(watch.memory.reshaped() for watch in list(self.watches.values()))

    def _look(self, name: str, item: object) -> Flat:
        watch = self.watches.get(name)
        found = watch.look() if watch is not None else None
        if found is not None:
            return found
        flat = flatten(name, state_of(name, item), self.rules)
        self.watches.pop(name, None)
        fresh: ModuleWatch | OptimizerWatch | None = None
        if isinstance(item, torch.nn.Module):
            fresh = ModuleWatch.of(item, flat)
        elif isinstance(item, torch.optim.Optimizer):
            fresh = OptimizerWatch.of(item, flat, self.rules)
        if fresh is not None:
            self.watches[name] = fresh
        return flat


def _members(containers: list[_Slots]) -> list[object]:
    return list(chain.from_iterable(map(dict.values, containers)))


def _parameters(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    return list(chain.from_iterable(group["params"] for group in optimizer.param_groups))


def _same(found: Sequence[object], known: Sequence[object]) -> bool:
    """Whether these are the same objects in the same order; tensors are never compared by content."""
    return len(found) == len(known) and all(map(is_, found, known))


def _is_slot(leaf: Leaf) -> bool:
    """Whether a leaf is per-parameter state; an optimizer's groups may hold tensors, too."""
    return len(leaf.path) > 1 and leaf.path[1] == "state"
