"""How a change of tensors during their copy is noticed, at about 0.1 microseconds a tensor.

Three signs: autograd's version counters, the address of each tensor's memory, and the count of steps that optimizers
began (`updates`). Each is looked at when a snapshot begins and when its copy has ended. A parameter that is given other
memory meanwhile (``parameter.data = ...``) tears nothing: the copy holds the old memory, as it was at the step.

What no sign tells: changes that go around autograd and leave the memory where it is, which are writes through
``tensor.data`` or ``tensor.numpy()``, by a kernel or library of the user's own, or by another process into shared
memory. Whoever does that calls ``snapshotter.before_update()`` first, or stages with ``stage="blocking"``.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from holdfast.client.sharding import as_dtensor
from holdfast.client.updates import UpdateCounter
from holdfast.client.whereabouts import Whereabouts

# Torch's documented counter has no public name. `__get__` itself, since a lambda would cost three times as much.
_VERSION = torch.Tensor._version.__get__  # type: ignore[attr-defined]  # noqa: SLF001


@dataclass(frozen=True, slots=True)
class Noted:
    """The signs at one moment."""

    versions: list[int]
    begun_counts: list[int]


class Signs:
    """The signs of a fixed list of tensors and optimizers.

    Args:
        names: What people call each tensor.
        tensors: As the state gave them; a DTensor's own counter and its local part's both count.
        local: The part of each that has memory here.
        counters: By optimizer's name.
    """

    def __init__(
        self,
        names: Sequence[str],
        tensors: Sequence[torch.Tensor],
        local: Sequence[torch.Tensor],
        counters: Mapping[str, UpdateCounter],
    ) -> None:
        self._names, self._counters = names, counters
        self._counted: list[torch.Tensor] = list(tensors)
        self._owner = list(range(len(tensors)))
        for index, tensor in enumerate(tensors):
            if as_dtensor(tensor) is not None:
                self._counted.append(local[index])
                self._owner.append(index)
        self._whereabouts = Whereabouts(local)

    def now(self) -> Noted:
        """The signs as they stand."""
        return Noted(list(map(_VERSION, self._counted)), [each.begun_count for each in self._counters.values()])

    def changed_since(self, noted: Noted) -> list[str]:
        """Names of what changed; empty where no sign tells of a change."""
        now, moved = self.now(), self._whereabouts.moved()
        if now == noted and not moved:
            return []
        versions = zip(self._owner, noted.versions, now.versions, strict=True)
        changed = moved | {owner for owner, before, after in versions if before != after}
        begun = zip(self._counters, noted.begun_counts, now.begun_counts, strict=True)
        return [self._names[index] for index in sorted(changed)] + [
            f"{name} (a step began)" for name, before, after in begun if before != after
        ]
