"""A nested state as a list of tensors and a tree of what is no tensor, and back.

A dict whose descendants are all tensors is left out of the tree (None stands for it): the tensors'
paths say what it was, so a model of thousands of tensors costs the tree nothing. Every other tensor
leaves a None in its place.

What may be in a state is what ``torch.load(weights_only=True)`` gives back; anything else is
refused with its path, now, while the job can still be corrected, instead of at the restore that
would have needed it.
"""

import io
import math
from collections import Counter, OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from holdfast.client.flat_parameters import flat_state, is_flat
from holdfast.client.manifest import (
    ITEM_BYTES,
    Path,
    PathKey,
    show_path,
)
from holdfast.client.sharding import as_dtensor
from holdfast.client.state_errors import MalformedShardError, StateError
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

DEPTH_MAX = 64  # nesting of a state; far below Python's recursion limit, and a cycle ends here

_PLAIN = {
    type(None),
    bool,
    int,
    float,
    complex,
    str,
    bytes,
    bytearray,
    torch.dtype,
    torch.device,
    torch.Size,
}
_DICTS = {dict, OrderedDict, Counter}
_KEYS = (str, int, float, bool, type(None))

_Trie = dict[PathKey, "_Trie | torch.Tensor"]


@runtime_checkable
class Stateful(Protocol):
    """What can tell its state and take it back: modules, optimizers, schedulers, data loaders."""

    def state_dict(self) -> dict[str, object]:
        """The state, nested."""

    def load_state_dict(self, state_dict: dict[str, object], /) -> object:
        """Take the state back."""


class Leaf(NamedTuple):
    """One tensor of a state and its path in the tree; a DTensor stays one."""

    path: Path
    tensor: torch.Tensor


class Flat(NamedTuple):
    """A state taken apart: its tensors in the order of the walk, and everything else."""

    leaves: list[Leaf]
    objects: object


@dataclass(slots=True)
class Rules:
    """What is admitted. Each type that only a trial can judge is tried once.

    ``mutable_count`` grows with every plain value that its owner could change in place.
    """

    allow_pickle: bool = False
    mutable_count: int = 0
    verdicts: dict[type, bool] = field(default_factory=dict)

    def admits(self, value: object) -> bool:
        """Whether ``value`` survives being written and read again."""
        kind = type(value)
        self.mutable_count += 1
        if kind not in self.verdicts:
            self.verdicts[kind] = _survives(value, allow_pickle=self.allow_pickle)
        return self.verdicts[kind]


def state_of(name: str, item: object) -> object:
    """The tree that stands for one entry of the caller's mapping.

    Raises:
        StateError: ``item`` is neither a tensor nor something with ``state_dict`` and
        ``load_state_dict``.
    """
    if isinstance(item, torch.Tensor):
        return item
    if is_flat(item):
        assert isinstance(item, torch.nn.Module)
        return flat_state(item)
    if isinstance(item, Stateful) and not isinstance(item, type):
        return item.state_dict()
    raise StateError(
        f"{name}: expected a tensor or an object with state_dict() and load_state_dict(), found "
        f"{type(item).__name__}: wrap it in a class that has both"
    )


def flatten(name: str, tree: object, rules: Rules) -> Flat:
    """Take ``tree`` apart. No tensor is copied; containers are new, their plain leaves are shared.

    Raises:
        StateError: something in it cannot be staged; the text names its path.
    """
    leaves: list[Leaf] = []
    objects, _ = _walk((name,), tree, leaves, rules)
    return Flat(leaves, objects)


def unflatten(objects: object, tensors: Mapping[Path, torch.Tensor], name: str) -> object:
    """Put a state together again from ``objects`` and all tensors whose path begins with ``name``.

    Raises:
        MalformedShardError: the tensors' paths do not fit the objects.
    """
    mine = {path: tensor for path, tensor in tensors.items() if path[0] == name}
    bare = mine.get((name,))
    if bare is not None:
        if len(mine) > 1 or objects is not None:
            raise MalformedShardError(f"{name}: is a tensor and a container at once")
        return bare
    trie: _Trie = {}
    for path, tensor in mine.items():
        _plant(trie, path, tensor)
    return _merge((name,), objects, trie) if trie else objects


def check_tensor(path: Path, tensor: torch.Tensor) -> None:
    """Refuse tensors that have no plain bytes of their own.

    Raises:
        StateError: with the path and what to do instead.
    """
    where = show_path(path)
    if as_dtensor(tensor) is None and is_traceable_wrapper_subclass(tensor):
        raise StateError(f"{where}: a {type(tensor).__name__} has no plain bytes: unwrap it in state_dict()")
    if tensor.is_quantized:
        raise StateError(
            f"{where}: a quantised tensor ({tensor.dtype}): give int_repr(), scale and zero point in state_dict()"
        )
    if tensor.layout != torch.strided:
        raise StateError(f"{where}: expected a dense tensor, found {tensor.layout}: convert it in state_dict()")
    if tensor.device.type == "meta":
        raise StateError(f"{where}: is on the meta device and has no bytes yet: materialise it first")
    if dtype_name(tensor.dtype) not in ITEM_BYTES:
        raise StateError(f"{where}: {tensor.dtype} is not one of the dtypes that can be staged: {sorted(ITEM_BYTES)}")


def dtype_name(dtype: torch.dtype) -> str:
    """``torch.float32`` as ``float32``."""
    return str(dtype).removeprefix("torch.")


def save_objects(objects: object) -> bytes:
    """The archive that ``torch.save`` makes of ``objects``."""
    buffer = io.BytesIO()
    torch.save(objects, buffer)
    return buffer.getvalue()


def _walk(path: Path, node: object, leaves: list[Leaf], rules: Rules) -> tuple[object, bool]:
    """What remains of ``node`` without its tensors, and whether it was nothing but tensors."""
    kind = type(node)
    if kind in _PLAIN:
        if kind is bytearray:
            rules.mutable_count += 1
        return node, False
    if isinstance(node, torch.Tensor):
        leaves.append(Leaf(path, node))
        return None, True
    if len(path) > DEPTH_MAX:
        raise StateError(f"{show_path(path[:8])}/...: nested deeper than {DEPTH_MAX}, or contains itself")
    if kind in _DICTS:
        return _walk_dict(path, node, leaves, rules)  # type: ignore[arg-type]  # its type was just looked up
    if kind in (list, tuple):
        return _walk_sequence(path, node, leaves, rules), False  # type: ignore[arg-type]  # as above
    if not rules.admits(node):
        raise StateError(
            f"{show_path(path)}: a {kind.__module__}.{kind.__qualname__} would not be readable at "
            f"restore, where "
            "nothing is unpickled: let state_dict() give numbers, strings, lists, dicts or "
            "tensors instead, or name "
            "the class to torch.serialization.add_safe_globals"
        )
    return node, False


def _walk_dict(path: Path, node: dict[PathKey, object], leaves: list[Leaf], rules: Rules) -> tuple[object, bool]:
    rest: dict[PathKey, object] = {}
    only_tensors = bool(node)
    for key, value in node.items():
        if isinstance(value, torch.Tensor):  # by far the most: worth a way of its own
            _check_key(path, key)
            leaves.append(Leaf((*path, key), value))
            rest[key] = None
            continue
        before = len(leaves)
        remains, tensors = _walk((*path, key), value, leaves, rules)
        if len(leaves) > before:
            _check_key(path, key)
        elif not isinstance(key, _KEYS) and not rules.admits(key):
            raise StateError(f"{show_path(path)}: the key {key!r} would not be readable at restore")
        rest[key] = remains
        only_tensors = only_tensors and tensors
    if only_tensors:
        return None, True
    return (rest if type(node) is dict else type(node)(rest)), False


def _walk_sequence(path: Path, node: list[object] | tuple[object, ...], leaves: list[Leaf], rules: Rules) -> object:
    rest = [_walk((*path, index), value, leaves, rules)[0] for index, value in enumerate(node)]
    return rest if isinstance(node, list) else tuple(rest)


def _check_key(path: Path, key: object) -> None:
    if type(key) is str:
        return
    number_is_odd = isinstance(key, float) and not math.isfinite(key)
    too_large = type(key) is int and not -(1 << 63) <= key < 1 << 63
    if type(key) not in _KEYS or number_is_odd or too_large:
        raise StateError(
            f"{show_path(path)}: a tensor lies under the key {key!r} of type "
            f"{type(key).__name__}; expected a string "
            "or a number: rename it in state_dict()"
        )


def _survives(value: object, *, allow_pickle: bool) -> bool:
    try:
        torch.load(io.BytesIO(save_objects(value)), weights_only=not allow_pickle)
    except Exception:  # noqa: BLE001 - whatever a foreign class raises here, the verdict is the same
        return False
    return True


def _plant(trie: _Trie, path: Path, tensor: torch.Tensor) -> None:
    branch = trie
    for key in path[1:-1]:
        child = branch.setdefault(key, {})
        if isinstance(child, torch.Tensor):
            raise MalformedShardError(f"{show_path(path)}: lies inside another tensor")
        branch = child
    if path[-1] in branch:
        raise MalformedShardError(f"{show_path(path)}: is a tensor and a container at once")
    branch[path[-1]] = tensor


def _merge(path: Path, objects: object, node: "_Trie | torch.Tensor") -> object:
    """``objects`` with the tensors of ``node`` in their places; new containers, shared leaves."""
    if isinstance(node, torch.Tensor):
        if objects is not None:
            raise MalformedShardError(f"{show_path(path)}: expected room for a tensor, found {type(objects).__name__}")
        return node
    if objects is None:  # a dict of nothing but tensors
        return {key: _merge((*path, key), None, child) for key, child in node.items()}
    if isinstance(objects, dict):
        places: dict[PathKey, object] = dict(objects)
    elif isinstance(objects, list | tuple):
        places = dict(enumerate(objects))
    else:
        raise MalformedShardError(f"{show_path(path)}: expected a container, found {type(objects).__name__}")
    for key, child in node.items():
        if key not in places:
            raise MalformedShardError(f"{show_path((*path, key))}: a tensor that the objects have no room for")
        places[key] = _merge((*path, key), places[key], child)
    if isinstance(objects, dict):
        merged = objects.copy()  # keeps the kind of dict and the order of its keys
        merged.update(places)
        return merged
    return type(objects)(places.values())
