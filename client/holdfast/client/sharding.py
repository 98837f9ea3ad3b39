"""A distributed tensor in words: how a DTensor is described, and built again.

The only file of this room that knows ``torch.distributed.tensor``. It is imported lazily: a process
that never made a DTensor does not pay for the import.
"""

import sys
from typing import TYPE_CHECKING, NamedTuple, cast

import torch
from holdfast.client.manifest import Mesh, Sharding

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor, Placement


_ORDINARY = {torch.Tensor, torch.nn.Parameter}


class SeenMesh(NamedTuple):
    """A mesh's description beside a live mesh of that description."""

    mesh: Mesh
    device_mesh: "DeviceMesh"


def as_dtensor(tensor: torch.Tensor) -> "DTensor | None":
    """``tensor`` as a DTensor, or None if it is an ordinary tensor."""
    if type(tensor) in _ORDINARY:
        return None  # decided without a look at the modules: this is asked for every tensor, always
    module = sys.modules.get("torch.distributed.tensor")
    if module is None or not isinstance(tensor, module.DTensor):
        return None
    return cast("DTensor", tensor)


def local_of(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor whose memory this rank holds: a DTensor's local part, else the tensor itself.

    ``to_local()`` would give a fresh view at ten times the cost, and views hide which object is
    meant; this runs for every tensor at every snapshot.
    """
    dtensor = as_dtensor(tensor)
    return tensor if dtensor is None else dtensor._local_tensor  # noqa: SLF001 - see above


def version_of(tensor: torch.Tensor) -> int:
    """A number that grows with every in-place change that autograd can see.

    Changes of a DTensor count on the wrapper when they were made through it (an optimizer's), and
    on the local part when they were made there. What goes around autograd (``tensor.data``, another
    library writing to the memory) counts nowhere and cannot be noticed; nor do
    ``foreach`` and ``fused`` optimizers on DTensors, for which steps are counted (updates.py).
    """
    dtensor = as_dtensor(tensor)
    if dtensor is None:
        return tensor._version  # noqa: SLF001 - torch's documented counter has no public name
    return dtensor._version + dtensor._local_tensor._version  # noqa: SLF001 - as above


def describe(tensor: torch.Tensor, seen: list[SeenMesh]) -> Sharding | None:
    """How ``tensor`` is sharded, None if it is not; its mesh is added to ``seen`` if it is new."""
    dtensor = as_dtensor(tensor)
    if dtensor is None:
        return None
    return Sharding(
        global_shape=tuple(dtensor.shape),
        global_offset=_global_offset(dtensor),
        placements=tuple(_placement_text(placement) for placement in dtensor.placements),
        mesh_index=_mesh_index(dtensor.device_mesh, seen),
    )


def distribute(local: torch.Tensor, sharding: Sharding, device_mesh: "DeviceMesh") -> torch.Tensor:
    """A DTensor around ``local``, as ``sharding`` describes it, on a live mesh.

    ``local`` is kept, not copied. Nothing is communicated.
    """
    from torch.distributed.tensor import DTensor  # noqa: PLC0415 - see the file's docstring

    # A meta tensor computes the stride that the global tensor has when it is in C order.
    stride = torch.empty(sharding.global_shape, device="meta").stride()
    return DTensor.from_local(
        local,
        device_mesh,
        [_placement(text) for text in sharding.placements],
        run_check=False,
        shape=torch.Size(sharding.global_shape),
        stride=stride,
    )


def _mesh_index(device_mesh: "DeviceMesh", seen: list[SeenMesh]) -> int:
    for index, known in enumerate(seen):
        if known.device_mesh is device_mesh:
            return index
    names = device_mesh.mesh_dim_names
    mesh = Mesh(
        device_type=device_mesh.device_type,
        shape=tuple(device_mesh.mesh.shape),
        dim_names=None if names is None else tuple(names),
        ranks=tuple(device_mesh.mesh.flatten().tolist()),
    )
    for index, known in enumerate(seen):
        if known.mesh == mesh:
            return index
    seen.append(SeenMesh(mesh, device_mesh))
    return len(seen) - 1


def _global_offset(dtensor: "DTensor") -> tuple[int, ...]:
    from torch.distributed.tensor._utils import (  # noqa: PLC0415 - see the file's docstring
        compute_local_shape_and_global_offset,
    )

    _, offset = compute_local_shape_and_global_offset(dtensor.shape, dtensor.device_mesh, dtensor.placements)
    if len(offset) != dtensor.dim():  # no place in this mesh, or a scalar
        return (0,) * dtensor.dim()
    return tuple(int(start) for start in offset)


def _placement_text(placement: "Placement") -> str:
    factor = getattr(placement, "split_factor", None)
    if factor is not None:
        return f"strided_shard:{placement.dim}:{factor}"  # type: ignore[attr-defined]  # a strided shard has both
    if placement.is_shard():
        return f"shard:{placement.dim}"  # type: ignore[attr-defined]  # a shard has it
    if placement.is_replicate():
        return "replicate"
    return f"partial:{placement.reduce_op}"  # type: ignore[attr-defined]  # the only kind left


def _placement(text: str) -> "Placement":
    from torch.distributed.tensor import Partial, Replicate, Shard  # noqa: PLC0415 - see the file's docstring
    from torch.distributed.tensor.placement_types import _StridedShard  # noqa: PLC0415 - FSDP2 beside TP

    kind, _, rest = text.partition(":")
    if kind == "replicate":
        return Replicate()
    if kind == "shard":
        return Shard(int(rest))
    if kind == "strided_shard":
        dim, _, factor = rest.partition(":")
        return _StridedShard(int(dim), split_factor=int(factor))
    return Partial(rest)
