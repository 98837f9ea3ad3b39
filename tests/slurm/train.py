"""A small job for the Slurm test: three ranks under torchrun, each step recorded with a digest of the state."""

import json
import os
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from holdfast.client import Snapshotter
from holdfast.client.state_hash import hash_state
from torch import nn

folder, steps = Path(sys.argv[1]), int(sys.argv[2])
torch.set_num_threads(1)
dist.init_process_group("gloo")
rank = dist.get_rank()
torch.manual_seed(7 + rank)
model = nn.Sequential(nn.Linear(48, 301), nn.Dropout(0.2), nn.Linear(301, 48))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
state = {"model": model, "optimizer": optimizer}


def record(**fields: object) -> None:
    about = {"pid": os.getpid(), "host": os.environ["SLURMD_NODENAME"]}
    with (folder / f"rank-{rank}.jsonl").open("a") as stream:
        stream.write(json.dumps({**about, **fields}) + "\n")


snapshotter = Snapshotter(state, job="slurm")
start = snapshotter.restore()
record(event="start", step=start)
for step in range(0 if start is None else start + 1, steps):
    loss = model(torch.randn(16, 48)).square().mean()
    optimizer.zero_grad()
    loss.backward()
    total = loss.detach().clone()
    dist.all_reduce(total)
    optimizer.step()
    snapshotter.step(step)
    record(event="step", step=step, sha256=hash_state(state), committed=snapshotter.stats()["committed_step"])
    time.sleep(0.1)  # the rest of a step's work
snapshotter.close()
record(event="end", step=steps - 1)
dist.destroy_process_group()
