"""Only what torch promises to be equal is taken for a replica, and only while all ranks say the same of it."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from fake_ranks import as_rank, cut
from holdfast.client.flatten import Rules
from holdfast.client.replicas import LAYOUT, contested, find_replicas
from holdfast.client.shard import ShardLayout
from holdfast.client.walk import StateWalker, memory_key
from memory_shards import Numbers
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.distributed.tensor import Partial, Replicate, Shard
from torch.nn.parallel import DistributedDataParallel


def taken(state: Mapping[str, Any], ranks: Numbers, wrapper: nn.Module | None = None) -> dict[str, tuple[int, ...]]:
    """Paths that are taken for replicas, and of whom."""
    flats = StateWalker(dict(state), Rules()).walk()
    found = find_replicas(state, flats, ranks, wrapper)
    paths = {
        leaf.path: found.of(memory_key(leaf.tensor), leaf.tensor) for flat in flats.values() for leaf in flat.leaves
    }
    return {"/".join(map(str, path)): roles for path, roles in paths.items() if roles}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)
        self.norm = nn.BatchNorm1d(2)
        self.conv = nn.Parameter(torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.norm(self.linear(inputs)) * self.conv.sum()
        return out


def stepped(model: nn.Module, kind: type[torch.optim.Optimizer] = torch.optim.AdamW) -> torch.optim.Optimizer:
    optimizer = kind(model.parameters(), lr=0.1)  # type: ignore[call-arg]  # all have it
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return optimizer


class Foreign(torch.optim.AdamW):
    """Somebody's own: it may keep what it likes."""


def test_parameters_under_ddp_and_their_state_in_torchs_optimizers_are_and_nothing_else() -> None:
    with as_rank(1, 3):
        model = DistributedDataParallel(Net())
        optimizer = stepped(model)
        optimizer.state[model.module.linear.bias]["mine"] = torch.ones(5)  # neither its shape nor a count
        found = taken({"model": model, "optimizer": optimizer, "plain": torch.ones(3)}, Numbers(1, 3))
        assert set(found.values()) == {(0, 1, 2)}
        expected = {f"model/module.{name}" for name in ("linear.weight", "linear.bias", "norm.weight", "norm.bias")}
        numbers = {name: number for number, (name, _) in enumerate(model.module.named_parameters())}
        for name, number in numbers.items():
            slots = ("step",) if name == "conv" else ("step", "exp_avg", "exp_avg_sq")  # conv is not in C order
            expected |= {f"optimizer/state/{number}/{slot}" for slot in slots}
        assert set(found) == expected

        assert not any(
            path.startswith("other")
            for path in taken({"model": model, "other": stepped(model, Foreign)}, Numbers(1, 3))
        )
        assert taken({"model": model.module, "optimizer": optimizer}, Numbers(1, 3)) == {}  # nothing tells
        inner = taken({"model": model.module, "optimizer": optimizer}, Numbers(1, 3), model)
        assert {path.replace("model/", "model/module.") for path in inner} == expected
        assert taken({"model": model}, Numbers(1, 2)) == {}  # a rank of DDP is not in the job


def test_what_ddp_does_not_keep_equal_is_not() -> None:
    with as_rank(0, 2):
        net = Net()
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(net, ["linear.weight"])
        assert "model/module.linear.weight" not in taken({"model": DistributedDataParallel(net)}, Numbers(0, 2))

        equal = DistributedDataParallel(Net())
        equal.register_comm_hook(None, default_hooks.fp16_compress_hook)
        assert "model/module.linear.weight" in taken({"model": equal}, Numbers(0, 2))

        def mine(_: object, bucket: Any) -> Any:
            return bucket

        for hook in (mine, default_hooks.fp16_compress_wrapper(default_hooks.allreduce_hook)):
            odd = DistributedDataParallel(Net())
            odd._comm_hooks.append((hook, None))
            assert taken({"model": odd}, Numbers(0, 2)) == {}


@pytest.mark.parametrize(
    ("layout", "rank", "roles"),
    [
        (cut(2, 2, by=(Replicate(), Shard(0))), 1, (1, 3)),
        (cut(2, 3, by=(Shard(0), Replicate())), 4, (3, 4, 5)),
        (cut(2, 2, by=(Replicate(), Replicate())), 2, (0, 1, 2, 3)),
        (cut(4), 2, ()),
        (cut(2, 2, by=(Replicate(), Partial())), 0, ()),
        (cut(1, 2, by=(Replicate(), Shard(0))), 0, ()),
    ],
    ids=str,
)
def test_a_dtensor_is_replicated_where_its_placements_say_so(layout: Any, rank: int, roles: tuple[int, ...]) -> None:
    with as_rank(rank, layout.world_size):
        model = nn.Module()
        model.register_parameter("w", nn.Parameter(layout.state({"w": torch.ones(6, 4)})["w"]))
        found = taken({"model": model}, Numbers(rank, layout.world_size))
        assert found == ({"model/w": roles} if roles else {})


def test_ranks_agree_only_if_all_of_a_claim_make_it() -> None:
    by_rank = []
    for rank in range(3):
        with as_rank(rank, 3):
            torch.manual_seed(4)
            model = DistributedDataParallel(Net())
            optimizer = stepped(model)
            state = {"model": model, "optimizer": optimizer}
            same = ShardLayout.build(state, ranks=Numbers(rank, 3)).claims()
            optimizer.state[model.module.linear.bias]["exp_avg"][0] += 2.0**-20 * rank
            drifted = ShardLayout.build(state, ranks=Numbers(rank, 3)).claims()
            del optimizer.state[model.module.norm.bias]["exp_avg"]
            other = ShardLayout.build(state, ranks=Numbers(rank, 3)).claims()
            by_rank.append((same, drifted, other, ShardLayout.build(state).claims()))
    same, drifted, other, whole = ([rank[index] for rank in by_rank] for index in range(4))
    assert contested(same) == []
    assert contested(drifted) == ["optimizer"]
    assert contested([*other[:2], same[2]]) == ["optimizer", LAYOUT]
    assert contested([*same[:2], whole[2]]) == ["model", "optimizer", LAYOUT]
    assert contested(whole) == []
