"""Ranks give each other what each staged a part of, in any pools, onto any memory; a stranger's bytes are seen."""

import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from fake_ranks import as_rank, cut
from holdfast.client import pooling as pooling_module
from holdfast.client.inward import as_payload
from holdfast.client.pooling import Pooling
from holdfast.client.restore import Restoring, restore_into
from holdfast.client.sharding import local_of
from holdfast.client.state_errors import RestoreMismatchError
from memory_shards import Numbers, staged
from torch import nn
from torch.distributed.tensor import Replicate, Shard

MEET_S = 20.0


class Meeting:
    """Ranks of one process, each a thread, that give each other bytes."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.sets: dict[tuple[int, ...], tuple[threading.Barrier, dict[int, torch.Tensor]]] = {}
        self.longest = 0

    def of(self, rank: int) -> "Fabric":
        return Fabric(self, rank)


class Fabric:
    def __init__(self, meeting: Meeting, rank: int) -> None:
        self.meeting, self.rank = meeting, rank
        self.device = torch.device("cpu")
        self.roles: tuple[int, ...] = ()

    @contextmanager
    def gathering(self, roles: Sequence[int]) -> Iterator["Fabric"]:
        self.roles = tuple(roles)
        yield self

    def gather(self, parts: Sequence[torch.Tensor], index: int) -> None:
        mine = parts[index]
        with self.meeting.lock:
            barrier, given = self.meeting.sets.setdefault(self.roles, (threading.Barrier(len(self.roles)), {}))
            self.meeting.longest = max(self.meeting.longest, len(mine))
        given[self.rank] = mine
        barrier.wait(MEET_S)
        found = [given[role].clone() for role in self.roles]
        barrier.wait(MEET_S)
        assert len({len(one) for one in found}) == 1
        for part, one in zip(parts, found, strict=True):
            part.copy_(one)


def content(name: str, whole: torch.Tensor) -> torch.Tensor:
    return torch.arange(whole.numel(), dtype=torch.float32).view(whole.shape) * (len(name) + 1)


WHOLE = {
    name: torch.zeros(shape) for name, shape in {"w": (40, 50), "bias": (7,), "one": (1,), "wide": (3, 4000)}.items()
}
TENSORS = {name: content(name, whole) for name, whole in WHOLE.items()}


def state_of(layout: Any, *, blank: bool) -> dict[str, Any]:
    model = nn.Module()
    for name, part in layout.state(TENSORS, blank=blank).items():
        model.register_parameter(name, nn.Parameter(part))
    return {"model": model}


def bring_back(layout: Any, shards: list[bytes], change: Callable[[int, nn.Module], None] | None = None) -> list[Any]:
    """Restore each rank's shard into a blank state; what is live then and what the witnesses say, by rank."""
    meeting = Meeting()
    begun = []
    for rank in range(layout.world_size):
        with as_rank(rank, layout.world_size):
            state = state_of(layout, blank=True)
            if change is not None:
                change(rank, state["model"])
            restoring = Restoring.begin(state, memoryview(shards[rank]), allow_pickle=False, checks=None)
            restoring.copy()
            begun.append((state, restoring))

    def finish(rank: int) -> list[str]:
        parsed = begun[rank][1].parsed
        found = Pooling(parsed.manifest, as_payload(parsed.payload), begun[rank][1].pairs())
        found.exchange(meeting.of(rank))
        return found.strangers()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the filters belong to the process, and `exchange` sets them in each thread
        with ThreadPoolExecutor(layout.world_size) as threads:
            strangers = list(threads.map(finish, range(layout.world_size)))
    return [(state, told) for (state, _), told in zip(begun, strangers, strict=True)]


def shards_of(layout: Any, spoil: Callable[[int, nn.Module], None] | None = None) -> list[bytes]:
    shards = []
    for rank in range(layout.world_size):
        with as_rank(rank, layout.world_size):
            state = state_of(layout, blank=False)
            if spoil is not None:
                spoil(rank, state["model"])
            shards.append(staged(state, Numbers(rank, layout.world_size)))
    return shards


LAYOUTS = [
    cut(2, by=(Replicate(),)),
    cut(5, by=(Replicate(),)),
    cut(2, 2, by=(Replicate(), Shard(0))),
    cut(2, 3, by=(Shard(1), Replicate())),
    cut(2, 2, by=(Replicate(), Replicate())),
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_every_rank_has_all_again(layout: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pooling_module, "GATHER_BYTES", 1024 * layout.world_size)
    monkeypatch.setattr(pooling_module, "BLOCK_BYTES_MIN", 1024)  # many blocks, none of them at a tensor's border
    whole = shards_of(cut(1))
    shards = shards_of(layout)
    if Shard(0) not in layout.placements and Shard(1) not in layout.placements:
        assert sum(map(len, shards)) < len(whole[0]) + 66_000 * layout.world_size  # the rest is room for plain objects
    for rank, (state, strangers) in enumerate(bring_back(layout, shards)):
        assert strangers == []
        with as_rank(rank, layout.world_size):
            expected = layout.state(TENSORS)
        for name, parameter in state["model"].named_parameters():
            assert torch.equal(local_of(parameter.data), local_of(expected[name])), name


def test_live_memory_may_lie_otherwise() -> None:
    layout = cut(2, by=(Replicate(),))

    def turn(_: int, model: nn.Module) -> None:
        local = local_of(model.w)
        local.data = local.data.t().contiguous().t()

    for state, strangers in bring_back(layout, shards_of(layout), turn):
        assert strangers == []
        assert not local_of(state["model"].w).is_contiguous()
        assert torch.equal(local_of(state["model"].w.data), TENSORS["w"])


def test_what_was_not_equal_is_told_by_who_had_it_otherwise() -> None:
    layout = cut(3, by=(Replicate(),))

    def spoil(rank: int, model: nn.Module) -> None:
        if rank == 1:
            local_of(model.wide.data).add_(1)

    found = bring_back(layout, shards_of(layout, spoil))
    assert found[1][1] == ["model/wide"]  # it sees that the others' shares are not as it had them
    assert ["model/wide"] in [found[0][1], found[2][1]]  # and they that its share is not
    assert all(told in ([], ["model/wide"]) for _, told in found)


def test_a_part_alone_is_no_state() -> None:
    layout = cut(2, by=(Replicate(),))
    shards = shards_of(layout)
    with as_rank(0, 2), pytest.raises(RestoreMismatchError, match="lie with other ranks"):
        restore_into(state_of(layout, blank=True), memoryview(shards[0]))
