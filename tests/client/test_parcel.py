"""What torch's save planner gives the ranks of a world, as shards, and back by its load planner in other worlds.

The cases are those of torch's own tests for storage back ends, as far as they concern one: sharded and plain tensors,
replicas, plain values, other plans and orders of keys at loading, partial loads.
"""

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from fake_ranks import as_rank, cut
from holdfast.client.manifest import parse_shard
from holdfast.client.parcel import Parcel
from holdfast.client.state_errors import StateError
from memory_shards import Source, reader_of
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.planner import SavePlan
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict_from_keys
from torch.distributed.tensor import Replicate, Shard

pytestmark = pytest.mark.filterwarnings(r"ignore:torch\.distributed is .*, assuming the intent")

MakeState = Callable[[int], dict[str, Any]]  # of a rank
WHOLE = {"w": torch.arange(7 * 6, dtype=torch.float32).view(7, 6), "v": torch.arange(3, dtype=torch.int32)}


def saved(make: MakeState, world_size: int = 1, **options: Any) -> list[bytes]:
    """Every rank's shard of one `dcp.save`."""
    planners, plans = [], []
    for rank in range(world_size):
        with as_rank(rank, world_size):
            planner = DefaultSavePlanner()
            planner.set_up_planner(make(rank), is_coordinator=rank == 0)
            plans.append(planner.create_local_plan())
            planners.append(planner)
    final, _ = planners[0].create_global_plan(plans)
    pairs = zip(final, planners, strict=True)
    return [shard_of(plan, planner, rank, **options) for rank, (plan, planner) in enumerate(pairs)]


def shard_of(plan: SavePlan, planner: DefaultSavePlanner, rank: int, *, allow_pickle: bool = False) -> bytes:
    parcel = Parcel(planner.finish_plan(plan), planner, rank=rank, allow_pickle=allow_pickle)
    shard = bytearray(b"\xee" * parcel.shard_bytes)  # what an earlier snapshot left
    parcel.write(memoryview(shard))
    parsed = parse_shard(memoryview(shard))
    assert b"\xee" * 8 not in bytes(shard)
    assert sum(entry.size_bytes for entry in parsed.manifest.tensors) <= sum(parcel.sizes)
    assert len(parcel.sizes) == len(plan.items)
    return bytes(shard)


def test_sharded_tensors_come_back_in_other_worlds() -> None:
    shards = saved(lambda _: cut(4).state(WHOLE), 4)
    for after in (cut(1), cut(3), cut(2, 2, by=(Shard(1), Shard(0))), cut(2, by=(Replicate(),))):
        for rank in range(after.world_size):
            with as_rank(rank, after.world_size):
                live = after.state(WHOLE, blank=True)
                dcp.load(live, storage_reader=reader_of(Source(shards)), no_dist=True)
                for name, wanted in after.state(WHOLE).items():
                    assert torch.equal(live[name]._local_tensor, wanted._local_tensor)


def test_replicas_are_written_once() -> None:
    whole = torch.arange(1 << 16, dtype=torch.float32)
    shards = saved(lambda _: {"plain": whole, **cut(2, by=(Replicate(),)).state({"d": whole})}, 2)
    assert sum(map(len, shards)) < 2 * whole.nbytes + (256 << 10)
    live = {"plain": torch.zeros_like(whole), "d": torch.zeros_like(whole)}  # a DTensor comes back as a plain tensor
    dcp.load(live, storage_reader=reader_of(Source(shards)))
    assert all(torch.equal(tensor, whole) for tensor in live.values())


def state_of_all_kinds(_: int = 0) -> dict[str, Any]:
    return {
        "dtypes": {
            str(dtype): torch.ones(2, 3).to(dtype)
            for dtype in (torch.bool, torch.int8, torch.uint64, torch.float16, torch.bfloat16, torch.float8_e5m2)
        },
        "complex": torch.tensor([1 + 2j]).conj(),
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 3),
        "turned": torch.arange(6.0).view(2, 3).t(),
        "list": [torch.ones(1), {"deep": torch.zeros(2)}, 3],
        "plain": {"step": 5, "name": "x", "none": None, "pair": (1, 2.5), "bytes": b"\x00\x01"},
        "ordered": OrderedDict(a=1),
        "parameter": torch.nn.Parameter(torch.ones(2)),
    }


def test_every_kind_of_value_comes_back() -> None:
    expected = state_of_all_kinds()
    shards = saved(state_of_all_kinds)
    live = state_of_all_kinds()
    for tensor in _tensors(live):
        tensor.detach().zero_()
    live["plain"] = dict.fromkeys(live["plain"])
    live["list"][2], live["ordered"] = 0, OrderedDict(a=0)
    dcp.load(live, storage_reader=reader_of(Source(shards)))
    found = _load_state_dict_from_keys(storage_reader=reader_of(Source(shards)))
    for one, other, third in zip(_tensors(expected), _tensors(live), _tensors(found), strict=True):
        assert torch.equal(
            one.float() if one.is_floating_point() else one, other.float() if one.is_floating_point() else other
        )
        assert one.dtype is other.dtype is third.dtype
    assert live["plain"] == expected["plain"] == found["plain"]
    assert live["list"][2] == 3
    assert live["ordered"]["a"] == 1


def _tensors(tree: Any) -> list[torch.Tensor]:
    if isinstance(tree, torch.Tensor):
        return [tree]
    parts = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else ()
    return [tensor for part in parts for tensor in _tensors(part)]


def test_keys_may_be_fewer_and_in_another_order_and_missing_ones_are_named() -> None:
    shards = saved(lambda _: {"a": torch.ones(1), "b": torch.full((2,), 2.0)})
    live = {"b": torch.zeros(2)}
    dcp.load(live, storage_reader=reader_of(Source(shards)))
    assert live["b"].tolist() == [2.0, 2.0]
    live = {"c": torch.zeros(1), "a": torch.zeros(1)}
    with pytest.raises(BaseException, match="Missing key in checkpoint state_dict: c"):
        dcp.load(live, storage_reader=reader_of(Source(shards)))
    planner = DefaultLoadPlanner(allow_partial_load=True)
    dcp.load(live, storage_reader=reader_of(Source(shards)), planner=planner)
    assert live["a"].item() == 1.0
    with pytest.raises(BaseException, match="Size mismatch"):
        dcp.load({"a": torch.zeros(3)}, storage_reader=reader_of(Source(shards)))


def test_a_planner_may_give_a_rank_many_parts_of_a_tensor() -> None:
    """Two ranks' plans, written by one."""
    both, planners = [], []
    for rank in range(2):
        with as_rank(rank, 2):
            planner = DefaultSavePlanner(flatten_state_dict=False)
            planner.set_up_planner(cut(2).state(WHOLE))
            both += planner.create_local_plan().items
            planners.append(planner)

    class Both(DefaultSavePlanner):
        def resolve_data(self, item: Any) -> Any:
            first = item.index.offset[0] == 0
            return planners[0 if first else 1].resolve_data(item)

    shards = [shard_of(SavePlan(both), Both(), 0)]
    live = {name: torch.zeros_like(tensor) for name, tensor in WHOLE.items()}
    dcp.load(live, storage_reader=reader_of(Source(shards)))
    assert all(torch.equal(live[name], WHOLE[name]) for name in WHOLE)


def test_what_would_not_be_readable_is_refused_when_it_is_written() -> None:
    with pytest.raises(StateError, match="thing: holds objects beyond torch's safe list"):
        saved(lambda _: {"thing": StateError("x")})
    shards = saved(lambda _: {"thing": StateError("x")}, allow_pickle=True)
    live: dict[str, Any] = {"thing": None}
    dcp.load(live, storage_reader=reader_of(Source(shards), allow_pickle=True))
    assert str(live["thing"]) == "x"
    with pytest.raises(StateError, match="sparse"):
        saved(lambda _: {"thing": torch.ones(2, 2).to_sparse()})
