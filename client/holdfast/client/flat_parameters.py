"""Modules under FSDP1 (`FullyShardedDataParallel`): each unit's parameters are one flat tensor, cut over the ranks.

Their own ``state_dict()`` gathers the whole model on every rank. A snapshot must not: it would wait for the other ranks
in the training loop, where a rank that stages a step alone would wait for ever. So what is staged is this rank's cut
of each flat tensor, by a name that says whose it is, what FSDP1 left out, and buffers. It fits the same cutting only.
"""

import re
import sys
from typing import Any

import torch
from holdfast.client.names import bare_name
from holdfast.client.state_errors import StateError

_CUT = re.compile(r" \(rank \d+ of (\d+)\)$")


def is_flat(item: object) -> bool:
    """Whether FSDP1 manages an item, or a part of it."""
    module = sys.modules.get("torch.distributed.fsdp.fully_sharded_data_parallel")
    if module is None or not isinstance(item, torch.nn.Module):
        return False
    return any(isinstance(part, module.FullyShardedDataParallel) for part in item.modules())


def is_cut(name: str) -> bool:
    """Whether a name says that there are other ranks' cuts beside this one."""
    found = _CUT.search(name)
    return found is not None and int(found[1]) > 1


def flat_state(module: torch.nn.Module) -> dict[str, object]:
    """What stands for a module's ``state_dict()``. All tensors are the live ones; nothing is communicated.

    Raises:
        StateError: a part of it has state that is no tensor.
    """
    found: dict[str, object] = {}
    managed: set[int] = set()
    for name, part in module.named_modules():
        if type(part).get_extra_state is not torch.nn.Module.get_extra_state:
            raise StateError(f"{name or 'the module'}: extra state under FSDP1 can't be staged: use FSDP2")
        handle = _handle(part)
        if handle is not None:
            flat = handle.flat_param
            managed |= {id(flat), *map(id, flat._params or ())}  # noqa: SLF001  # the originals, where they are kept
            rank, count = (handle.rank, handle.world_size) if handle.uses_sharded_strategy else (0, 1)
            where = bare_name(name)
            found[f"{where}{'.' if where else ''}flat (rank {rank} of {count})"] = _cut(flat)
    for name, parameter in module.named_parameters():
        if id(parameter) not in managed:
            found[bare_name(name)] = parameter
    found.update(_buffers(module))
    return found


def flat_tensors(module: torch.nn.Module) -> list[torch.Tensor]:
    """Those of its tensors that only an optimizer's step changes."""
    buffers = set(_buffers(module))
    return [
        value for name, value in flat_state(module).items() if name not in buffers and isinstance(value, torch.Tensor)
    ]


def _handle(part: torch.nn.Module) -> Any:  # noqa: ANN401  # torch's, of a private class
    module = sys.modules["torch.distributed.fsdp.fully_sharded_data_parallel"]
    return part._handle if isinstance(part, module.FullyShardedDataParallel) else None  # noqa: SLF001


def _cut(flat: Any) -> torch.Tensor:  # noqa: ANN401  # as above
    """This rank's memory, which stays where it is while the parameters show the gathered ones."""
    kept: torch.Tensor | None = getattr(flat, "_local_shard", None)  # from the first forward on
    return flat.data if kept is None else kept


def _buffers(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {
        bare_name(f"{prefix}{'.' if prefix else ''}{name}"): buffer
        for prefix, part in module.named_modules()
        for name, buffer in part._buffers.items()  # noqa: SLF001  # no public way tells which are saved
        if buffer is not None and name not in part._non_persistent_buffers_set  # noqa: SLF001
    }
