"""What each rank of test_ranks.py does: it trains a few steps from where memory says, and tells what it had and has."""

import os
import time
from typing import Any

import torch
import torch.distributed as dist
from holdfast.client import Snapshotter

ELEMENTS = 16 << 10  # 64 KiB of state per rank


def state_at(rank: int, step: int) -> torch.Tensor:
    """What a rank has after a step: a function of both, so that nobody need be asked what was right."""
    return torch.arange(ELEMENTS, dtype=torch.float32) * (rank + 1) + step


def train(rank: int, world_size: int, sockets: list[str], steps: int) -> dict[str, Any]:
    """Restore, train up to `steps`, and wait until the last step is committed."""
    torch.set_num_threads(1)
    tensor = torch.zeros(ELEMENTS)
    ranks_per_node = world_size // len(sockets)
    told: dict[str, Any] = {"pid": os.getpid()}
    begun_s = time.monotonic()
    options = {"job": "many", "socket": sockets[rank // ranks_per_node], "on_error": "raise", "max_stall_s": 60.0}
    with Snapshotter({"weights": tensor}, **options) as snapshotter:
        start = snapshotter.restore()
        told |= {"restored": start, "restore_s": time.monotonic() - begun_s}
        told["right"] = start is None or torch.equal(tensor, state_at(rank, start))
        dist.barrier()
        begun_s = time.monotonic()
        for step in range(0 if start is None else start + 1, steps):
            tensor.copy_(state_at(rank, step))
            snapshotter.step(step)
            snapshotter.wait(timeout_s=60)
        told["steps_s"] = time.monotonic() - begun_s
    return told
