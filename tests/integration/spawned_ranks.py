"""One rank of a world that `torch.multiprocessing` spawns, for test_spawn.py: trains, restores, looks what is left."""

import json
import threading
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from holdfast.client import Snapshotter
from holdfast.client.state_hash import hash_state
from torch import nn

WORLD_SIZE = 2


def train(rank: int, folder: str, sockets: list[str], steps: int, fail_at: int) -> None:
    """Train from where memory says up to `steps`; rank 1 raises once `fail_at` is committed."""
    torch.set_num_threads(1)
    store = f"file://{folder}/{steps}-{fail_at}.store"
    dist.init_process_group("gloo", store, rank=rank, world_size=WORLD_SIZE, timeout=timedelta(seconds=60))
    torch.manual_seed(rank)
    model = nn.Linear(32, 8)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    state = {"model": model, "optimizer": optimizer}
    told: dict[str, object] = {"restored": None}
    try:
        with Snapshotter(state, job="spawned", socket=sockets[rank], on_error="raise") as snapshotter:
            start = snapshotter.restore()
            told |= {"restored": start, "restored_hash": hash_state(state)}
            for step in range(0 if start is None else start + 1, steps):
                model(torch.randn(4, 32)).pow(2).sum().backward()
                optimizer.step()
                snapshotter.step(step)
                if step == fail_at:
                    snapshotter.wait(step, timeout_s=60)
                    told["failed_hash"] = hash_state(state)
                    dist.barrier()
                    raise ArithmeticError("as a loss that is no number")
        told["hash"] = hash_state(state)
    finally:
        told["threads"] = [thread.name for thread in threading.enumerate() if "holdfast" in thread.name]
        told["maps"] = sum("memfd:holdfast" in line for line in Path("/proc/self/maps").read_text().splitlines())
        (Path(folder) / f"told-{steps}-{fail_at}-{rank}").write_text(json.dumps(told))
        dist.barrier()  # who ends with an exception has the others ended, whose words must be written by then
        dist.destroy_process_group()
