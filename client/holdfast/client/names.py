"""One name for one parameter, however its module is wrapped and whatever its optimizer calls it.

Wrappers put themselves into names (``module.`` of DDP, ``_orig_mod.`` of ``torch.compile``), and an optimizer's own
``state_dict`` numbers its parameters. A snapshot that is to be read by a job of another layout needs names that none of
this changes: those that ``torch.distributed.checkpoint.state_dict`` gives, without importing it.
"""

from collections.abc import Iterable, Mapping

import torch

WRAPPERS = frozenset({"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"})
DDP_PREFIX = "module"


def bare_name(dotted: str) -> str:
    """A dotted name without the components that wrappers added; DDP's is not among them (see `ddp_wrapped`)."""
    parts = dotted.split(".")
    return dotted if WRAPPERS.isdisjoint(parts) else ".".join(part for part in parts if part not in WRAPPERS)


def ddp_wrapped(names: Iterable[str]) -> bool:
    """Whether all names of one part of a state begin as DDP makes them, so that ``module.`` says nothing."""
    seen = False
    for name in names:
        seen = True
        if not name.startswith(DDP_PREFIX + "."):
            return False
    return seen


def canonical_names(names: Iterable[str]) -> dict[str, str]:
    """For each name of one part of a state: the name without any wrapper.

    Example: ``module._orig_mod.head.weight`` of a compiled module in DDP becomes ``head.weight``.
    """
    bare = {name: bare_name(name) for name in names}
    while ddp_wrapped(bare.values()):
        bare = {name: canonical.removeprefix(DDP_PREFIX + ".") for name, canonical in bare.items()}
    return bare


def parameter_names(state: Mapping[str, object]) -> dict[str, tuple[str, ...]]:
    """For each optimizer of a state: the names of its parameters, in the order in which its state numbers them.

    A parameter that no module of the state holds has the empty name. Optimizers without any named parameter are left
    out.
    """
    name_of: dict[int, str] = {}
    for item in state.values():
        if isinstance(item, torch.nn.Module):
            named = {name: parameter for name, parameter in item.named_parameters() if parameter is not None}
            for name, canonical in canonical_names(named).items():
                name_of.setdefault(id(named[name]), canonical)
    found: dict[str, tuple[str, ...]] = {}
    for name, item in state.items():
        if isinstance(item, torch.optim.Optimizer):
            ids = list(dict.fromkeys(id(parameter) for group in item.param_groups for parameter in group["params"]))
            names = tuple(name_of.get(one, "") for one in ids)
            if any(names):
                found[name] = names
    return found
