"""torch's planner on one side, shards in memory on the other: any layout is read into any other.

Every rank of every world is played in this process: a fake process group says who it is, and tensors are cut from
known global ones.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from fake_ranks import Cut, as_rank, cut
from holdfast.client.catalogue import HEAD_GUESS_BYTES
from holdfast.client.dcp_archive import safe_archive, step_of
from holdfast.client.dcp_reader import HoldfastReader
from holdfast.client.errors import NotRecoverableError
from holdfast.client.state_errors import StateError
from holdfast.protocol.ids import SnapshotId
from memory_shards import Source, reader_of, staged
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict_from_keys
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

pytestmark = pytest.mark.filterwarnings(r"ignore:torch\.distributed is .*, assuming the intent")


TENSORS = {
    "even": torch.arange(12 * 8, dtype=torch.float32).view(12, 8),
    "odd": torch.arange(7 * 5, dtype=torch.int64).view(7, 5) + 1,
    "few": torch.arange(2, dtype=torch.bfloat16) + 1,
    "scalar": torch.tensor(3.5, dtype=torch.float64),
    "empty": torch.zeros(0, 4),
    "half": (torch.arange(24) % 7).to(torch.float8_e4m3fn).view(2, 3, 4),
}
FSDP_TP = (_StridedShard(0, split_factor=2), Shard(0))


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (cut(4), cut(2)),
        (cut(4), cut(3)),
        (cut(4), cut(6)),
        (cut(1), cut(4)),
        (cut(4), cut(1)),
        (cut(2, 2, by=(Replicate(), Shard(1))), cut(4, by=(Replicate(),))),  # TP 2 x DP 2 -> DP 4
        (cut(2, 2, by=FSDP_TP), cut(3, by=(Shard(1),))),
        (cut(3, by=(Shard(1),)), cut(2, 2, by=FSDP_TP)),
        (cut(2, 2, by=(Shard(0), Shard(1))), cut(2, 3, by=(Shard(1), Shard(0)))),
    ],
    ids=str,
)
def test_every_layout_is_read_into_every_other(before: Cut, after: Cut) -> None:
    shards = []
    for rank in range(before.world_size):
        with as_rank(rank, before.world_size):
            shards.append(staged(before.state(TENSORS)))
    for rank in range(after.world_size):
        with as_rank(rank, after.world_size):
            expected, live = after.state(TENSORS), after.state(TENSORS, blank=True)
            locals_before = {name: tensor._local_tensor for name, tensor in live.items()}
            source = Source(shards)
            reader = reader_of(source)
            dcp.load(live, storage_reader=reader, no_dist=True)
            for name in TENSORS:
                found = live[name]._local_tensor
                assert found is locals_before[name]
                assert torch.equal(as_bytes(found), as_bytes(expected[name]._local_tensor)), (rank, name)
            assert reader.step == 7
            assert source.closed


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(torch.uint8) if tensor.dim() else tensor


def test_ranges_are_read_and_not_whole_shards() -> None:
    whole = {"w": torch.arange(1 << 20, dtype=torch.float32).view(1024, 1024)}
    shards = []
    for rank in range(2):
        with as_rank(rank, 2):
            shards.append(staged(cut(2).state(whole)))
    with as_rank(3, 8):
        live = cut(8).state(whole, blank=True)
        source = Source(shards)
        dcp.load(live, storage_reader=reader_of(source), no_dist=True)
    read_bytes = sum(length for _, _, length in source.ranges)
    assert (4 << 20) // 8 <= read_bytes <= (4 << 20) // 8 + 2 * HEAD_GUESS_BYTES


def test_many_small_tensors_are_few_reads() -> None:
    whole = {f"t{number}": torch.full((3, 5), float(number)) for number in range(400)}
    shards = []
    for rank in range(2):
        with as_rank(rank, 2):
            shards.append(staged(cut(2).state(whole)))
    source = Source(shards)
    live = {name: torch.zeros(3, 5) for name in whole}
    dcp.load(live, storage_reader=reader_of(source))
    assert all(torch.equal(live[name], whole[name]) for name in whole)
    assert len(source.ranges) <= 2 * 3  # at most two for a head, one for all parts


def trained(make: Callable[[], nn.Module]) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(3)
    model = make()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.rand(5, 4)).square().sum().backward()
        optimizer.step()
    return model, optimizer


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))


class Wrapped(nn.Module):
    """A module under the name that DDP gives it."""

    def __init__(self) -> None:
        super().__init__()
        self.module = network()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.module(x)
        return found


@pytest.mark.parametrize(("saved", "live"), [(network, network), (Wrapped, network)])
@pytest.mark.parametrize("flatten", [False, True])
def test_torchs_own_state_dicts_find_modules_and_optimizers(
    saved: Callable[[], nn.Module], live: Callable[[], nn.Module], *, flatten: bool
) -> None:
    """By parameter names, though the Snapshotter staged numbers, and though one of the two is wrapped."""
    model, optimizer = trained(saved)
    shard = staged({"model": model, "optimizer": optimizer})
    fresh = live()
    fresh_optimizer = torch.optim.AdamW(fresh.parameters(), lr=0.5)
    options = dcp.state_dict.StateDictOptions(flatten_optimizer_state_dict=flatten)
    states = get_state_dict(fresh, fresh_optimizer, options=options)
    tree = dict(zip(("model", "optimizer"), states, strict=True))
    dcp.load(tree, storage_reader=reader_of(Source([shard])))
    set_state_dict(
        fresh, fresh_optimizer, model_state_dict=tree["model"], optim_state_dict=tree["optimizer"], options=options
    )
    for one, other in zip(model.state_dict().values(), fresh.state_dict().values(), strict=True):
        assert torch.equal(one, other)
    assert fresh_optimizer.param_groups[0]["lr"] == 0.01
    for one, other in zip(optimizer.state.values(), fresh_optimizer.state.values(), strict=True):
        assert all(torch.equal(one[key], other[key]) for key in one)


def test_a_wrapped_module_finds_what_was_staged_without_the_wrapper() -> None:
    model, _ = trained(network)
    live = Wrapped().state_dict()
    dcp.load({"model": live}, storage_reader=reader_of(Source([staged({"model": model})])))
    assert all(torch.equal(live[f"module.{name}"], value) for name, value in model.state_dict().items())


class Data:
    """Plain values of every kind that a state may hold."""

    def __init__(self, position: int = 0) -> None:
        self.tree = {"position": position, "deep": [{"a": 1}, torch.ones(2)], "pair": (torch.arange(3), "b")}

    def state_dict(self) -> dict[str, Any]:
        return dict(self.tree)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.tree = state


def test_plain_values_come_from_the_lowest_rank_that_has_them() -> None:
    shards = [staged({"data": Data(position=rank + 5)}) for rank in range(2)]
    live = Data()
    live.tree["pair"] = (torch.zeros(3), "")
    live.tree["deep"] = [{"a": 0}, torch.zeros(2)]
    dcp.load({"data": live}, storage_reader=reader_of(Source(shards)))
    assert live.tree["position"] == 5
    assert torch.equal(live.tree["deep"][1], torch.ones(2))
    assert live.tree["deep"][0] == {"a": 1}
    assert torch.equal(live.tree["pair"][0], torch.arange(3))


def test_a_whole_snapshot_is_read_without_knowing_what_is_in_it() -> None:
    model, optimizer = trained(network)
    shard = staged({"model": model, "optimizer": optimizer, "data": Data(4)})
    found = _load_state_dict_from_keys(storage_reader=reader_of(Source([shard])))
    assert torch.equal(found["model"]["0.weight"], model.state_dict()["0.weight"])
    assert found["data"]["position"] == 4


def message_of(error: pytest.ExceptionInfo[BaseException]) -> str:
    seen, found = error.value, ""
    while seen is not None:
        found += str(seen)
        seen = seen.__cause__ or seen.__context__  # type: ignore[assignment]  # the loop ends there
    return found


def test_what_cannot_be_read_is_said() -> None:
    with as_rank(0, 2):
        mesh = init_device_mesh("cpu", (2,))
        partial = {"sum": DTensor.from_local(torch.ones(2), mesh, [Partial()], run_check=False), "good": torch.ones(1)}
        half = staged(cut(2).state({"w": torch.ones(4)}))
        shard = staged(partial)
    with pytest.raises(BaseException) as error:  # noqa: PT011  # torch's own is a BaseException
        dcp.load({"sum": torch.zeros(2)}, storage_reader=reader_of(Source([shard])))
    assert "sum: was staged as a partial sum" in message_of(error)
    dcp.load({"good": torch.zeros(1)}, storage_reader=reader_of(Source([shard])))
    with pytest.raises(BaseException) as error:  # noqa: PT011
        dcp.load({"w": torch.zeros(4)}, storage_reader=reader_of(Source([half])))
    assert "w: expected 4 elements over all ranks, found 2" in message_of(error)
    with pytest.raises(BaseException, match="Missing key"):
        dcp.load({"other": torch.zeros(4)}, storage_reader=reader_of(Source([half])))


def test_a_step_that_is_freed_meanwhile_names_the_newer_one() -> None:
    shard = staged({"w": torch.ones(4)})
    source = Source([shard], superseded_after=1)
    live = {"w": torch.zeros(4)}
    with pytest.raises(BaseException) as error:  # noqa: PT011
        dcp.load(live, storage_reader=reader_of(source))
    assert "step 7" in message_of(error)
    assert "step 9" in message_of(error)
    assert "load again" in message_of(error)
    assert source.closed


def test_all_ranks_read_what_the_newest_of_them_found() -> None:
    old, new = (staged({"w": torch.full((4,), value)}) for value in (1.0, 2.0))
    first, second = Source([old]), Source([new], snapshot=SnapshotId(1, 8))
    reader = reader_of(first, second)
    metadata = reader.read_metadata()
    live = {"w": torch.zeros(4)}
    planner = dcp.DefaultLoadPlanner()
    planner.set_up_planner(live, metadata, True)
    plan = reader.prepare_local_plan(planner.create_local_plan())
    other = dcp.LoadPlan([], storage_data=(1, 8))  # another rank, a little later
    plans = reader.prepare_global_plan([plan, other])
    assert [one.storage_data for one in plans] == [(1, 8)] * 2
    reader.read_data(plans[0], planner).wait()
    assert torch.equal(live["w"], torch.full((4,), 2.0))
    assert reader.step == 8


def test_only_the_newest_step_can_be_asked_for() -> None:
    shard = staged({"w": torch.ones(4)})
    dcp.load({"w": torch.zeros(4)}, storage_reader=reader_of(Source([shard])), checkpoint_id="run/step-7")
    with pytest.raises(BaseException) as error:  # noqa: PT011
        dcp.load({"w": torch.zeros(4)}, storage_reader=reader_of(Source([shard])), checkpoint_id="run/step-6")
    assert "expected step 6" in message_of(error)
    with pytest.raises(NotRecoverableError, match="nothing of job 'x' is committed"):
        reader_of(Source([])).read_metadata()
    assert step_of("runs/2/step_00012/") == 12
    with pytest.raises(ValueError, match="expected a step's number"):
        step_of("latest")
    with pytest.raises(ValueError, match="job: expected"):
        HoldfastReader(job="no spaces")


def test_nothing_foreign_is_unpickled() -> None:
    from holdfast.client.flatten import save_objects  # noqa: PLC0415 - used here alone

    archive = save_objects({"s": StateError("x")})
    with pytest.raises(StateError, match="beyond torch's safe list"):
        safe_archive("s", archive, allow_pickle=False)
    assert safe_archive("s", archive, allow_pickle=True) is archive
