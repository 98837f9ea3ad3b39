"""Putting a durable copy back into a live state, as `restore.py` does it with memory: the last of the fallbacks.

Any rank reads from the directory what its live tensors need, whatever world size and sharding wrote it; nothing is
communicated. As in all such checkpoints, random generators are not in it, and of plain values that differed between
ranks every rank gets the lowest one's. Like any torch checkpoint, the directory's own table is unpickled by torch: it
is to be writable by the job and its daemons alone.
"""

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from holdfast.client.flatten import Rules, dtype_name, flatten, state_of
from holdfast.client.names import canonical_names
from holdfast.client.object_checkpoints import ObjectReader
from holdfast.client.object_copies import folder_of
from holdfast.client.objects import is_url
from holdfast.client.restore import load_item, mismatch_text
from holdfast.client.state_errors import MalformedShardError, RestoreMismatchError
from torch.distributed.checkpoint._nested_dict import unflatten_state_dict
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import ReadItem


def load_copy(state: Mapping[str, object], directory: Path | str, *, allow_pickle: bool = False) -> None:
    """Put a copy into ``state``.

    Args:
        state: what the Snapshotter was given, built anew.
        directory: the copy; a text may be a URL.
        allow_pickle: read plain objects without restriction.

    Raises:
        RestoreMismatchError: the live state does not fit; nothing live was changed.
        MalformedShardError: a file of it can't be read; live tensors may be changed then.
    """
    try:
        remote = isinstance(directory, str) and is_url(directory)
        reader = ObjectReader(folder_of(str(directory))) if remote else FileSystemReader(directory)
        metadata = reader.read_metadata()
    except Exception as error:
        raise MalformedShardError(f"the durable copy {directory} can't be read: {error}") from error
    plan = _Plan(state, metadata)
    if plan.problems:
        raise RestoreMismatchError(mismatch_text(plan.problems))
    try:
        _fill(reader, metadata, plan.targets, allow_pickle=allow_pickle)
    except Exception as error:
        raise MalformedShardError(f"the durable copy {directory} can't be read: {error}") from error
    nested = unflatten_state_dict(plan.targets, {name: plan.paths[name] for name in plan.targets})
    for name, item in state.items():
        tree = nested.get(name, {})
        if isinstance(item, torch.nn.Module):
            flat = {name_of: plan.targets[saved] for name_of, saved in plan.keys[name].items()}
            load_item(item, flat)
        else:
            live = state_of(name, item)
            load_item(item, _like(tree, live, optimizer=isinstance(item, torch.optim.Optimizer)))


class _Plan:
    """What is read into what.

    Attributes:
        targets: by the name in the copy: the live or new tensor that is filled, None for a plain value.
        paths: by the same name: the keys that it was made of.
        keys: by module: its own key for each thing of it that is in the copy.
        problems: what keeps the copy from being put into this state.
    """

    def __init__(self, state: Mapping[str, object], metadata: Metadata) -> None:
        self.saved, self.paths = metadata.state_dict_metadata, dict(metadata.planner_data)
        self.targets: dict[str, Any] = {}
        self.keys: dict[str, dict[str, str]] = {}
        self.problems = [
            f"{n}: only in the copy" for n in sorted({str(p[0]) for p in self.paths.values()} - set(state))
        ]
        for name, item in state.items():
            here = {saved: path for saved, path in self.paths.items() if path[0] == name and saved in self.saved}
            leaves = flatten(name, state_of(name, item), Rules(allow_pickle=True)).leaves
            live = {".".join(map(str, leaf.path)): leaf.tensor for leaf in leaves}
            if isinstance(item, torch.nn.Module):
                self._module(name, item, here)
            else:
                strict = isinstance(item, torch.Tensor)
                self.problems += [f"{missing}: not in the copy" for missing in live if strict and missing not in here]
                for saved in here:
                    self._target(saved, live.get(saved), item, strict=strict)

    def _module(self, name: str, module: torch.nn.Module, here: Mapping[str, tuple[object, ...]]) -> None:
        """Names of wrapped modules are compared without what the wrappers added."""
        live = state_of(name, module)
        assert isinstance(live, dict)
        inner = {".".join(map(str, path[1:])): saved for saved, path in here.items()}
        saved_of = {canonical: inner[key] for key, canonical in canonical_names(inner).items()}
        key_of = {canonical: key for key, canonical in canonical_names(live).items()}
        self.problems += [f"{name}.{one}: only in the copy" for one in sorted(saved_of.keys() - key_of.keys())]
        self.problems += [
            f"{name}.{one}: not in the copy"
            for one in sorted(key_of.keys() - saved_of.keys())
            if isinstance(live[key_of[one]], torch.Tensor)
        ]
        self.keys[name] = {key_of[one]: saved for one, saved in saved_of.items() if one in key_of}
        for key, saved in self.keys[name].items():
            value = live[key]
            self._target(saved, value if isinstance(value, torch.Tensor) else None, module, strict=True)

    def _target(self, saved: str, live: torch.Tensor | None, item: object, *, strict: bool) -> None:
        meta = self.saved[saved]
        if not isinstance(meta, TensorStorageMetadata):
            self.targets[saved] = None
            return
        dtype = meta.properties.dtype
        if live is not None and live.dtype == dtype and live.shape == meta.size:
            self.targets[saved] = live
        elif strict or live is not None:
            found = f"{dtype_name(live.dtype)} {list(live.shape)}" if live is not None else "no tensor"
            self.problems.append(f"{saved}: {dtype_name(dtype)} {list(meta.size)} in the copy, {found} live")
        else:
            self.targets[saved] = _new(self.paths[saved], meta, item)


def _new(path: tuple[object, ...], meta: TensorStorageMetadata, item: object) -> torch.Tensor:
    """A tensor that is not there yet: an optimizer's state lies as its parameter does."""
    if isinstance(item, torch.optim.Optimizer) and len(path) > 2 and path[1] == "state" and str(path[2]).isdecimal():
        parameters = [parameter for group in item.param_groups for parameter in group["params"]]
        index = int(str(path[2]))
        if index < len(parameters) and parameters[index].shape == meta.size:
            return torch.empty_like(parameters[index], dtype=meta.properties.dtype, requires_grad=False)
    return torch.empty(meta.size, dtype=meta.properties.dtype)


class _Planner(DefaultLoadPlanner):
    """Torch's own planner, which unpickles plain values within torch's safe list."""

    def __init__(self, *, allow_pickle: bool) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._allow_pickle = allow_pickle

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Take in a plain value."""
        self.state_dict[read_item.dest_index.fqn] = torch.load(value, weights_only=not self._allow_pickle)


def _fill(reader: FileSystemReader, metadata: Metadata, targets: dict[str, Any], *, allow_pickle: bool) -> None:
    planner = _Planner(allow_pickle=allow_pickle)
    planner.set_up_planner(targets, metadata, is_coordinator=True)
    reader.set_up_storage_reader(metadata, is_coordinator=True)
    plans = reader.prepare_global_plan([reader.prepare_local_plan(planner.create_local_plan())])
    reader.read_data(plans[0], planner).wait()
    targets.update(planner.state_dict)


def _like(saved: object, live: object, *, optimizer: bool = False) -> object:
    """A nested state with keys as the live one has them: torch's checkpoints make texts of numbers."""
    if not isinstance(saved, dict):
        return saved
    known: dict[str, Any] = {str(key): key for key in live} if isinstance(live, Mapping) else {}
    below = live if isinstance(live, Mapping) else {}
    made = {known.get(key, key): _like(value, below.get(known.get(key, key))) for key, value in saved.items()}
    if optimizer:
        state = made.get("state", {})
        assert isinstance(state, dict)
        made["state"] = {int(key) if str(key).isdecimal() else key: value for key, value in state.items()}
    return type(live)(made) if isinstance(live, dict) and type(live) is not dict else made
