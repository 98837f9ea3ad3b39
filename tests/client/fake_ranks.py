"""Ranks of any world played in this process: a fake process group says who one is, tensors are cut from known ones."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.testing._internal.distributed.fake_pg import FakeStore


@contextmanager
def as_rank(rank: int, world_size: int) -> Iterator[None]:
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        yield
    finally:
        dist.destroy_process_group()


@dataclass(frozen=True)
class Cut:
    """A way to lay tensors over ranks."""

    mesh: tuple[int, ...]
    placements: tuple[Placement, ...]

    @property
    def world_size(self) -> int:
        return math.prod(self.mesh)

    def state(self, tensors: Mapping[str, torch.Tensor], *, blank: bool = False) -> dict[str, torch.Tensor]:
        """The calling rank's part, or room for it."""
        # torch remembers meshes by what they are; that who one is has changed is not part of it.
        names = tuple(f"dim {dim} of rank {dist.get_rank()}" for dim in range(len(self.mesh)))
        mesh = init_device_mesh("cpu", self.mesh, mesh_dim_names=names)
        found = {}
        for name, whole in tensors.items():
            placements = [p if getattr(p, "dim", 0) < whole.dim() else Replicate() for p in self.placements]
            shape, offset = compute_local_shape_and_global_offset(whole.shape, mesh, placements)
            local = whole[tuple(slice(o, o + n) for o, n in zip(offset, shape, strict=True))].clone()
            if blank:
                local = torch.zeros_like(local)
            found[name] = DTensor.from_local(
                local, mesh, placements, run_check=False, shape=whole.shape, stride=whole.stride()
            )
        return found


def cut(*mesh: int, by: tuple[Placement, ...] = (Shard(0),)) -> Cut:
    return Cut(mesh, by)
