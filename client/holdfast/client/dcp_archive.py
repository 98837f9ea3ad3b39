"""Plain values on their way through ``torch.distributed.checkpoint``, which pickles them: what may pass.

Also how a checkpoint's id names a step.
"""

import io
import os
import re

import torch
from holdfast.client.flatten import save_objects
from holdfast.client.state_errors import StateError

CheckpointId = str | os.PathLike[str] | None
_LAST_NUMBER = re.compile(r"(\d+)\D*$")


def check_archive(name: str, archive: bytes, *, allow_pickle: bool) -> object:
    """What is in an archive of ``torch.save``.

    Raises:
        StateError: it holds objects that only an unrestricted ``torch.load`` reads.
    """
    try:
        return torch.load(io.BytesIO(archive), weights_only=not allow_pickle)
    except Exception as error:
        raise StateError(
            f"{name}: holds objects beyond torch's safe list ({error}); store plain values, name the class to "
            "torch.serialization.add_safe_globals, or give allow_pickle=True"
        ) from error


def safe_archive(name: str, archive: bytes, *, allow_pickle: bool) -> bytes:
    """The archive written anew from what was read of it, so that a planner unpickles nothing that came from elsewhere.

    Raises:
        StateError: it holds objects that only an unrestricted ``torch.load`` reads.
    """
    return archive if allow_pickle else save_objects(check_archive(name, archive, allow_pickle=False))


def step_of(checkpoint_id: str | os.PathLike[str]) -> int:
    """The step that a checkpoint's id names: its last number."""
    match = _LAST_NUMBER.search(os.fspath(checkpoint_id))
    if match is None:
        raise ValueError(f"checkpoint_id: expected a step's number at the end, as in 'step-100', found {checkpoint_id}")
    return int(match[1])


def names_step(checkpoint_id: str | os.PathLike[str]) -> bool:
    """Whether `step_of` would find one."""
    return _LAST_NUMBER.search(os.fspath(checkpoint_id)) is not None
