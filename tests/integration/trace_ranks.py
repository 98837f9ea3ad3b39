"""What the ranks do whose snapshots are traced; each is a fork of a process that has torch (`worlds`)."""

import torch
from holdfast.client import Snapshotter

ELEMENTS = 100_000


def train(rank: int, world_size: int, sockets: list[str], first: int, steps: int) -> int | None:
    """Restore, then stage steps and wait for the last one; what was restored."""
    state = {"s": torch.full((ELEMENTS,), rank)}
    with Snapshotter(state, job="gpt", socket=sockets[rank], on_error="raise") as snapshotter:
        restored = snapshotter.restore()
        for step in range(first, first + steps):
            snapshotter.step(step)
        if steps:
            snapshotter.wait(timeout_s=20)
    return restored
