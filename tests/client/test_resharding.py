"""A Snapshotter's state in another layout: every byte in its place, and what has no place by rule."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from fake_ranks import Cut, as_rank, cut
from holdfast.client.errors import NotRecoverableError
from holdfast.client.resharding import reshard_into
from holdfast.client.rng import capture_rng, restore_rng
from holdfast.client.state_errors import RestoreMismatchError
from holdfast.protocol.ids import SnapshotId
from memory_shards import Numbers, Source, reader_of, staged
from torch import nn
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard
from torch.nn.parallel import DistributedDataParallel

SNAPSHOT = SnapshotId(1, 7)
WHOLE = {"w": torch.arange(6 * 10, dtype=torch.float32).view(6, 10), "b": torch.arange(5, dtype=torch.bfloat16)}
MOMENTS = {name: (value * 2 + 1).float() for name, value in WHOLE.items()}


class Position:
    """A data loader's place."""

    def __init__(self, position: int = 0, order: torch.Tensor | None = None) -> None:
        self.position, self.order = position, order if order is not None else torch.zeros(0)

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position, "order": self.order}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.position, self.order = state["position"], state["order"]


def state_of(layout: Cut, *, rank: int, blank: bool = False, prefix: str = "") -> dict[str, Any]:
    """A rank's state: trained, or as a fresh process makes it."""
    model: nn.Module = nn.Module()
    for name, part in layout.state(WHOLE, blank=blank).items():
        model.register_parameter(name, nn.Parameter(part))
    model.register_buffer("seen", torch.zeros(2) if blank else torch.full((2,), float(rank)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.5 if blank else 0.1)
    if not blank:
        moments = layout.state(MOMENTS)
        for name, parameter in model.named_parameters():
            moment = moments[name]
            optimizer.state[parameter] = {"step": torch.tensor(9.0), "exp_avg": moment, "exp_avg_sq": moment * 3}
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=2 if not blank else 7)
    if prefix:
        outer = nn.Module()
        outer.add_module(prefix, model)
        model = outer
    data = Position() if blank else Position(rank + 10, torch.arange(rank + 1))
    return {"model": model, "optimizer": optimizer, "scheduler": scheduler, "data": data}


def shards_of(layout: Cut, *, pooled: bool = False, **options: Any) -> list[bytes]:
    shards = []
    before = capture_rng()
    for rank in range(layout.world_size):
        with as_rank(rank, layout.world_size):
            torch.manual_seed(rank)
            ranks = Numbers(rank, layout.world_size) if pooled else None
            shards.append(staged(state_of(layout, rank=rank, **options), ranks))
    restore_rng(before)
    return shards


def local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


def check(live: Mapping[str, Any], layout: Cut) -> None:
    expected, moments = layout.state(WHOLE), layout.state(MOMENTS)
    for name, parameter in live["model"].named_parameters():
        bare = name.removeprefix("module.")
        assert torch.equal(local(parameter.data), local(expected[bare]))
        slots = live["optimizer"].state[parameter]
        assert torch.equal(local(slots["exp_avg"]), local(moments[bare]))
        assert slots["exp_avg"].dtype is torch.float32
        assert torch.equal(local(slots["exp_avg_sq"]), local(moments[bare] * 3))
        assert slots["step"].item() == 9.0
    assert live["optimizer"].param_groups[0]["lr"] == 0.1
    assert live["scheduler"].step_size == 2


@pytest.mark.parametrize(
    ("before", "after", "prefix"),
    [
        (cut(4), cut(2), ""),
        (cut(2), cut(3), ""),
        (cut(2, 2, by=(Replicate(), Shard(1))), cut(4, by=(Replicate(),)), ""),
        (cut(2, by=(Replicate(),)), cut(3), "module"),
        (cut(2, 2, by=(_StridedShard(0, split_factor=2), Shard(0))), cut(2, by=(Shard(1),)), ""),
    ],
    ids=str,
)
@pytest.mark.parametrize("pooled", [False, True], ids=["whole", "pooled"])
def test_a_state_is_put_into_another_layout(before: Cut, after: Cut, prefix: str, *, pooled: bool) -> None:
    shards = shards_of(before, prefix=prefix, pooled=pooled)
    for rank in range(after.world_size):
        with as_rank(rank, after.world_size):
            live = state_of(after, rank=rank, blank=True)
            parameters = list(live["model"].parameters())
            generator = capture_rng()
            try:
                told = reshard_into(
                    live, reader_of(Source(shards)), snapshot=SNAPSHOT, role=rank, world_size=after.world_size
                )
                drawn = torch.rand(3)
            finally:
                restore_rng(generator)
            check(live, after)
            assert all(one is other for one, other in zip(parameters, live["model"].parameters(), strict=True))
            owner = rank if rank < before.world_size else rank % before.world_size
            assert live["model"].seen.tolist() == [float(owner)] * 2  # no shard: its own rank's, else another's
            same_world = before.world_size == after.world_size
            assert live["data"].position == (rank + 10 if same_world else 10)
            assert torch.equal(live["data"].order, torch.arange(rank + 1 if same_world else 1))
            if rank < before.world_size:
                assert torch.equal(drawn, torch.rand(3, generator=torch.Generator().manual_seed(rank)))
            assert any("data" in text and "rank 0" in text for text in told) is not same_world
            assert any("seeded anew" in text for text in told) is (rank >= before.world_size)


def test_replicas_that_differed_when_they_were_staged_are_refused_or_told() -> None:
    """Read into another world, where every rank gets the same of them."""
    shards = []
    for rank in range(2):
        with as_rank(rank, 2):
            torch.manual_seed(1)
            model = DistributedDataParallel(nn.Linear(30, 20))
            with torch.no_grad():
                model.module.weight += rank
            shards.append(staged({"model": model}, Numbers(rank, 2)))
    options = {"snapshot": SNAPSHOT, "role": 0, "world_size": 1}
    live = {"model": nn.Linear(30, 20)}
    with pytest.raises(NotRecoverableError, match=r"model/module\.weight was not equal on all replicas"):
        reshard_into(live, reader_of(Source(shards)), **options)
    told = reshard_into(live, reader_of(Source(shards)), **options, lenient=True)
    assert any("model/module.weight was not equal" in text for text in told)


def test_new_ranks_get_generators_of_their_own_the_same_each_time() -> None:
    shards = shards_of(cut(1))
    drawn = []
    for rank in (1, 2, 1):
        with as_rank(rank, 3):
            generator = capture_rng()
            reshard_into(
                state_of(cut(3), rank=rank, blank=True),
                reader_of(Source(shards)),
                snapshot=SNAPSHOT,
                role=rank,
                world_size=3,
            )
            drawn.append(torch.rand(4))
            restore_rng(generator)
    assert torch.equal(drawn[0], drawn[2])
    assert not torch.equal(drawn[0], drawn[1])


def test_a_state_that_does_not_fit_is_refused_whole() -> None:
    shards = shards_of(cut(2))

    def refused(change: str) -> str:
        with as_rank(0, 3):
            live = state_of(cut(3), rank=0, blank=True)
            model, optimizer = live["model"], live["optimizer"]
            match change:
                case "name":
                    live["other"] = live.pop("data")
                case "shape":
                    model.w = nn.Parameter(torch.zeros(6, 11))
                case "dtype":
                    model.w = nn.Parameter(model.w.double())
                case "missing":
                    del model.b
                case "more":
                    model.register_buffer("more", torch.zeros(1))
                case "groups":
                    optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1))]})
                case "order":
                    parameters = list(model.parameters())[::-1]
                    live["optimizer"] = torch.optim.AdamW(parameters, lr=0.5)
            before = {name: local(tensor.data).clone() for name, tensor in model.named_parameters()}
            with pytest.raises(RestoreMismatchError) as error:
                reshard_into(live, reader_of(Source(shards)), snapshot=SNAPSHOT, role=0, world_size=3)
            assert all(torch.equal(local(p.data), before[name]) for name, p in model.named_parameters())
            assert not optimizer.state
            return str(error.value)

    assert "data: only in the snapshot; other: not in the snapshot" in refused("name")
    assert "model/w: float32 [6, 10] in the snapshot, float32 [6, 11] live" in refused("shape")
    assert "model/w: float32 [6, 10] in the snapshot, float64 [6, 10] live" in refused("dtype")
    assert "model/b: only in the snapshot" in refused("missing")
    assert "model/more: not in the snapshot" in refused("more")
    assert "optimizer/param_groups: [2] parameters per group in the shard, [2, 1] live" in refused("groups")
    assert "parameter 0 is 'w' in the snapshot, 'b' live" in refused("order")
