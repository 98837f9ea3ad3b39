"""A user's training script: the lines that protection takes, and a record of what happened for the test.

Run under torchrun as ``user_script.py FOLDER JOB STEPS DIE_AFTER``: in its first life every rank is killed after the
snapshot of step DIE_AFTER has committed.
"""

import json
import os
import signal
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from holdfast.client import Snapshotter
from holdfast.client.state_hash import hash_state
from torch import nn

folder, job, steps, die_after = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
torch.set_num_threads(1)
dist.init_process_group("gloo")
rank = dist.get_rank()
torch.manual_seed(7 + rank)
model = nn.parallel.DistributedDataParallel(nn.Sequential(nn.Linear(48, 301), nn.Dropout(0.2), nn.Linear(301, 48)))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
state = {"model": model, "optimizer": optimizer}


def record(**fields: object) -> None:
    with (folder / f"{job}-{rank}.jsonl").open("a") as stream:
        stream.write(json.dumps(fields) + "\n")


snapshotter = Snapshotter(state, job=job, on_error="raise")
start = snapshotter.restore()
record(event="start", restored=start, sha256=None if start is None else hash_state(state))
for step in range(0 if start is None else start + 1, steps):
    loss = model(torch.randn(16, 48)).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    snapshotter.step(step)
    record(event="step", step=step, loss=loss.item().hex(), sha256=hash_state(state))
    if start is None and step == die_after:
        snapshotter.wait()
        os.kill(os.getpid(), signal.SIGKILL)
snapshotter.close()
record(event="end", stats=snapshotter.stats())
dist.destroy_process_group()
