"""What ranks of a world do that stage one step and leave: a tensor whose content is a function of the rank."""

import torch
from holdfast.client import Snapshotter
from local_cluster import DEADLINE_S

SIZE = 100_000  # int64 elements: 0.8 MB, 13 chunks of 64 KiB


def content(rank: int) -> torch.Tensor:
    """What a rank staged."""
    return torch.arange(SIZE + 1000 * rank) * 3 + rank


def stage_step(rank: int, _world_size: int, sockets: list[str]) -> int | None:
    """Stage step 0 on the rank's node and wait until it is committed; returns the step restored before."""
    snapshotter = Snapshotter({"state": content(rank)}, job="long", socket=sockets[rank], on_error="raise")
    restored = snapshotter.restore()
    snapshotter.step(0)
    snapshotter.wait(timeout_s=2 * DEADLINE_S)
    snapshotter.close()
    return restored
