"""Modules under FSDP1: each rank stages its own cut alone, and gets it back where it fits; else it is told why not."""

from typing import Any

import pytest
import torch
from fake_ranks import as_rank
from holdfast.client.catalogue import catalogue_of, read_heads, require
from holdfast.client.flat_parameters import flat_state, is_cut, is_flat
from holdfast.client.resharding import reshard_into
from holdfast.client.shard import ShardLayout
from holdfast.client.state_errors import RestoreMismatchError, StateError, TornSnapshotError
from holdfast.client.state_hash import hash_state
from holdfast.protocol.ids import SnapshotId
from memory_shards import MemoryShards, Source, reader_of, staged
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy

CUT = ["2.flat (rank 1 of 2)", "3.num_batches_tracked", "3.running_mean", "3.running_var", "flat (rank 1 of 2)"]


def wrap(module: nn.Module, **options: Any) -> FullyShardedDataParallel:
    return FullyShardedDataParallel(module, **{"use_orig_params": True, "device_id": torch.device("cpu"), **options})


def state_of(*, seed: int, steps: int, **options: Any) -> dict[str, Any]:
    """A rank's state; what other ranks would send is left to chance, which is no matter here."""
    torch.manual_seed(seed)
    inner = wrap(nn.Linear(5, 3), **options)
    model = wrap(nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), inner, nn.BatchNorm1d(3)), **options)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for _ in range(steps):
        model(torch.randn(4, 4)).pow(2).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return {"model": model, "optimizer": optimizer}


def shards_of(world_size: int, **options: Any) -> tuple[list[bytes], list[str]]:
    shards, hashes = [], []
    for rank in range(world_size):
        with as_rank(rank, world_size):
            state = state_of(seed=rank, steps=2, **options)
            shards.append(staged(state))
            hashes.append(hash_state(state))
    return shards, hashes


def test_what_is_staged_is_this_ranks_cut_and_is_never_gathered(monkeypatch: pytest.MonkeyPatch) -> None:
    with as_rank(1, 2):
        state = state_of(seed=1, steps=1)
        monkeypatch.setattr(FullyShardedDataParallel, "state_dict", None)  # it would wait for rank 0
        found = flat_state(state["model"])
        assert sorted(found) == CUT
        flat = found["flat (rank 1 of 2)"]
        assert isinstance(flat, torch.Tensor)
        assert flat.data_ptr() == state["model"]._handle.flat_param.data_ptr()
        layout = ShardLayout.build(state)
        lazy = {entry.path[1] for entry in layout._entries.values() if entry.lazy}
        assert {"2.flat (rank 1 of 2)", "flat (rank 1 of 2)"} < lazy
        assert "3.running_mean" not in lazy
        capture = layout.capture()
        state["optimizer"].step()
        with pytest.raises(TornSnapshotError, match="a step began"):
            capture.write(memoryview(bytearray(layout.shard_bytes)))


@pytest.mark.parametrize("original", [True, False], ids=["original parameters", "flat parameters"])
def test_ranks_on_other_nodes_get_their_own_cuts(*, original: bool) -> None:
    shards, hashes = shards_of(2, use_orig_params=original)
    for rank in range(2):
        with as_rank(rank, 2):
            live = state_of(seed=7, steps=0, use_orig_params=original)
            reshard_into(live, reader_of(Source(shards)), snapshot=SnapshotId(1, 7), role=rank, world_size=2)
            assert hash_state(live) == hashes[rank]
    assert hashes[0] != hashes[1]


def test_another_number_of_ranks_is_told_that_it_can_not_have_them() -> None:
    shards, _ = shards_of(2)
    with as_rank(0, 3):
        live = state_of(seed=7, steps=0)
        before = hash_state(live)
        with pytest.raises(RestoreMismatchError, match=r"flat \(rank 0 of 2\): only in the snapshot"):
            reshard_into(live, reader_of(Source(shards)), snapshot=SnapshotId(1, 7), role=0, world_size=3)
        assert hash_state(live) == before


def test_a_reader_learns_that_an_optimizers_parts_are_each_ranks_own() -> None:
    found = catalogue_of(read_heads(MemoryShards(shards_of(2)[0])))
    with pytest.raises(RestoreMismatchError, match="FSDP1 keeps another part of it on each rank"):
        require(found, "optimizer.state.0.exp_avg")
    assert require(found, "model.flat (rank 0 of 2)").shape != ()
    assert require(found, "optimizer.state.0.step").shape == ()


@pytest.mark.filterwarnings("ignore:The `NO_SHARD` sharding strategy is deprecated:FutureWarning")
def test_what_is_not_cut_has_one_name_for_all() -> None:
    with as_rank(1, 2):
        model = state_of(seed=1, steps=1, sharding_strategy=ShardingStrategy.NO_SHARD)["model"]
        assert "flat (rank 0 of 1)" in flat_state(model)
    assert not is_cut("flat (rank 0 of 1)")
    assert not is_cut("weight")
    assert not is_flat(nn.Linear(1, 1))


def test_left_out_parameters_are_there_and_extra_state_is_refused() -> None:
    class Extra(nn.Linear):
        def get_extra_state(self) -> object:
            return {"a": 1}

    with as_rank(0, 2):
        alone = nn.Linear(2, 2)
        found = flat_state(wrap(nn.Sequential(nn.Linear(2, 2), alone), ignored_modules=[alone]))
        assert found["1.weight"] is alone.weight
        with pytest.raises(StateError, match="extra state under FSDP1"):
            flat_state(wrap(nn.Sequential(Extra(2, 2))))
