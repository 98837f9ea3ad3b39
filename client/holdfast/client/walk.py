"""Walking a live state again and again, cheaply.

The first look at a module asks its ``state_dict()``; later looks only verify that every parameter
and buffer is still the same object in the same memory, which costs a tenth. Anything that differs,
and anything that is no plain module, is asked again.

What this cannot notice: a module whose ``state_dict`` hooks begin to name other tensors while its
parameters and buffers stay the same objects.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from holdfast.client.flatten import Flat, Leaf, Rules, flatten, state_of
from holdfast.client.sharding import local_of

MemoryKey = tuple[int, tuple[int, ...], tuple[int, ...], torch.dtype, torch.device]
_Slots = Mapping[str, torch.Tensor | None]


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
class Owner:
    """Where a module keeps one tensor, and what was there at the last look."""

    slots: _Slots
    key: str
    tensor: torch.Tensor | None
    data_ptr: int
    element_count: int

    def unchanged(self) -> bool:
        """Whether the same tensor is still there, in the same memory."""
        tensor = self.slots.get(self.key)
        if tensor is not self.tensor:
            return False
        if tensor is None:
            return True
        local = local_of(tensor)
        return local.data_ptr() == self.data_ptr and local.numel() == self.element_count


@dataclass(slots=True)
class ModuleWatch:
    """Tells whether a module's ``state_dict()`` would still give what it gave."""

    flat: Flat
    owners: list[Owner]
    containers: list[Mapping[str, object]]
    member_count: int

    @classmethod
    def of(cls, module: torch.nn.Module, flat: Flat) -> "ModuleWatch | None":
        """A watch, or None where the state holds anything but the module's own tensors."""
        owners: list[Owner] = []
        containers: list[Mapping[str, object]] = []
        for part in module.modules():
            # torch's own names for these: there is no public way to look without building a dict
            for slots in (part._parameters, part._buffers):  # noqa: SLF001
                owners += [_owner(slots, key) for key in slots]
            containers += [part._parameters, part._buffers, part._modules]  # noqa: SLF001
        owned = {memory_key(owner.tensor) for owner in owners if owner.tensor is not None}
        if flat.objects is not None or any(memory_key(leaf.tensor) not in owned for leaf in flat.leaves):
            return None
        return cls(flat, owners, containers, sum(map(len, containers)))

    def unchanged(self) -> bool:
        """Whether the last state still holds."""
        return sum(map(len, self.containers)) == self.member_count and all(owner.unchanged() for owner in self.owners)


@dataclass(slots=True)
class StateWalker:
    """Looks at a rank's whole state; remembers what lets the next look be cheap."""

    state: Mapping[str, object]
    rules: Rules
    watches: dict[str, ModuleWatch] = field(default_factory=dict)

    def walk(self) -> dict[str, Flat]:
        """The state taken apart, by name, in the mapping's order. No tensor is copied.

        Raises:
            StateError: something in the state cannot be staged.
        """
        return {name: self._look(name, item) for name, item in self.state.items()}

    def lazy_keys(self, flats: Mapping[str, Flat]) -> set[MemoryKey]:
        """The memory that only an optimizer's step changes: parameters and optimizer state."""
        keys: set[MemoryKey] = set()
        for name, item in self.state.items():
            if isinstance(item, torch.nn.Module):
                keys.update(map(memory_key, item.parameters()))
            elif isinstance(item, torch.optim.Optimizer):
                keys.update(memory_key(leaf.tensor) for leaf in flats[name].leaves if _is_slot(leaf))
        return keys

    def _look(self, name: str, item: object) -> Flat:
        watch = self.watches.get(name)
        if watch is not None and watch.unchanged():
            return watch.flat
        flat = flatten(name, state_of(name, item), self.rules)
        self.watches.pop(name, None)
        if isinstance(item, torch.nn.Module):
            fresh = ModuleWatch.of(item, flat)
            if fresh is not None:
                self.watches[name] = fresh
        return flat


def _owner(slots: _Slots, key: str) -> Owner:
    tensor = slots[key]
    if tensor is None:
        return Owner(slots, key, None, 0, 0)
    local = local_of(tensor)
    return Owner(slots, key, tensor, local.data_ptr(), local.numel())


def _is_slot(leaf: Leaf) -> bool:
    """Whether a leaf is per-parameter state; an optimizer's groups may hold tensors, too."""
    return len(leaf.path) > 1 and leaf.path[1] == "state"
