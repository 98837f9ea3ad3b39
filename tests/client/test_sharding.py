"""DTensors in words and back, in a world of one."""

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from holdfast.client.sharding import SeenMesh, as_dtensor, describe, distribute, local_of, version_of
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard


@pytest.fixture(scope="module")
def mesh() -> Iterator[DeviceMesh]:
    store = dist.HashStore()  # type: ignore[attr-defined]  # public, but not listed
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield init_device_mesh("cpu", (1, 1), mesh_dim_names=("a", "b"))
    dist.destroy_process_group()


@pytest.mark.parametrize(
    ("placements", "texts"),
    [
        ([Shard(0), Replicate()], ("shard:0", "replicate")),
        ([_StridedShard(0, split_factor=2), Shard(1)], ("strided_shard:0:2", "shard:1")),
        ([Replicate(), Partial("max")], ("replicate", "partial:max")),
    ],
)
def test_a_dtensor_is_built_again_from_its_description(
    mesh: DeviceMesh, placements: list[Placement], texts: tuple[str, ...]
) -> None:
    local = torch.arange(6.0).view(3, 2)
    tensor = DTensor.from_local(local, mesh, placements, run_check=False)
    seen: list[SeenMesh] = []
    sharding = describe(tensor, seen)
    assert sharding is not None
    assert sharding.placements == texts
    assert sharding.global_shape == (3, 2)
    assert (seen[0].mesh.shape, seen[0].mesh.dim_names, seen[0].mesh.ranks) == ((1, 1), ("a", "b"), (0,))
    again = as_dtensor(distribute(local, sharding, seen[0].device_mesh))
    assert again is not None
    assert again.placements == tensor.placements
    assert (again.shape, again.stride()) == (tensor.shape, tensor.stride())
    assert local_of(again).data_ptr() == local.data_ptr()


def test_a_mesh_is_described_once(mesh: DeviceMesh) -> None:
    equal = init_device_mesh("cpu", (1, 1), mesh_dim_names=("a", "b"))
    seen: list[SeenMesh] = []
    for each in (mesh, mesh, equal):
        describe(DTensor.from_local(torch.ones(2), each, [Replicate(), Replicate()]), seen)
    assert len(seen) == 1


def test_an_ordinary_tensor_is_itself() -> None:
    tensor = torch.ones(2)
    assert as_dtensor(tensor) is None
    assert describe(tensor, []) is None
    assert local_of(tensor) is tensor


def test_changes_count_on_the_wrapper_and_on_the_local_part(mesh: DeviceMesh) -> None:
    tensor = DTensor.from_local(torch.ones(2), mesh, [Replicate(), Replicate()], run_check=False)
    before = version_of(tensor)
    tensor.add_(1)
    assert version_of(tensor) > before
    before = version_of(tensor)
    local_of(tensor).add_(1)
    assert version_of(tensor) > before
