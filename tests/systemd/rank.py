"""A training process of one step: restores what is committed, checks it, commits one step more."""

import json
import sys

import torch
from holdfast.client import Snapshotter

state = {"s": torch.zeros(100_000, dtype=torch.int64)}
snapshotter = Snapshotter(state, job="gpt", socket=sys.argv[1], on_error="raise")
restored = snapshotter.restore()
assert restored is None or bool((state["s"] == restored).all())
step = 1 if restored is None else restored + 1
snapshotter.before_update()
state["s"].fill_(step)
snapshotter.step(step)
snapshotter.wait(timeout_s=30)
snapshotter.close()
sys.stdout.write(json.dumps({"restored": restored, "committed": step}))
