"""What a Snapshotter is given: whether it can be used, and whether it is all there yet."""

from collections.abc import Mapping
from typing import Any

import torch
from holdfast.protocol.ids import JOB_NAME
from torch.nn.parallel import DistributedDataParallel


def is_settled(state: Mapping[str, object]) -> bool:
    """Whether all tensors exist that a snapshot will hold: torch's optimizers make their state at their first step."""
    return all(item.state for item in state.values() if isinstance(item, torch.optim.Optimizer))


def replicated_by(wrapper: object) -> Any:  # noqa: ANN401  # what `Snapshotter` takes
    """What to give as `replicated` where `state` holds the module inside of `wrapper`, which may be no wrapper."""
    return wrapper if _has_ddp(wrapper) else "auto"


def check_arguments(job: str, every: int, on_error: str, stage: str, replicated: object) -> None:
    """Refuse what can't be meant.

    Raises:
        ValueError: with what was expected and found.
    """
    if not JOB_NAME.fullmatch(job):
        raise ValueError(f"job: expected letters, digits, '.', '_' and '-' (at most 64), found {job!r}")
    if every < 1:
        raise ValueError(f"every: expected at least 1, found {every}")
    if on_error not in {"warn", "raise"}:
        raise ValueError(f'on_error: expected "warn" or "raise", found {on_error!r}')
    if stage not in {"lazy", "blocking"}:
        raise ValueError(f'stage: expected "lazy" or "blocking", found {stage!r}')
    if not _has_ddp(replicated) and replicated not in ("auto", "none"):
        raise ValueError(f'replicated: expected "auto", "none" or a DDP module, found {replicated!r:.80}')


def _has_ddp(item: object) -> bool:
    parts = item.modules() if isinstance(item, torch.nn.Module) else ()
    return any(isinstance(part, DistributedDataParallel) for part in parts)
