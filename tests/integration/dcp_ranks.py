"""What the ranks of test_dcp.py do: train under FSDP2, snapshot and save; come back in another layout and compare."""

import hashlib
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from holdfast.client import Snapshotter
from holdfast.client.dcp import HoldfastReader, HoldfastWriter
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

STEPS = 3
FIRST_SAVE = 5
COMMIT_S = 30.0


class Position:
    """Where the data is."""

    def __init__(self) -> None:
        self.position = 0

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.position = state["position"]


class Run:
    """A small training in one of several layouts; built alike everywhere."""

    def __init__(self, mode: str, world_size: int) -> None:
        torch.manual_seed(11)
        bare = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 7), nn.Linear(7, 3))
        self.model: nn.Module = bare
        match mode:
            case "fsdp":
                for layer in bare:
                    fully_shard(layer)
                fully_shard(bare)
            case "ddp":
                self.model = DistributedDataParallel(bare)
            case "tp":  # beside data parallelism: shards over both dimensions of the mesh
                mesh = init_device_mesh("cpu", (world_size // 2, 2), mesh_dim_names=("dp", "tp"))
                parallelize_module(bare, mesh["tp"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
                fully_shard(bare, mesh=mesh["dp"])
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.01, foreach=False)
        self.scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, step_size=2)
        self.data = Position()

    def state(self) -> dict[str, Any]:
        return {"model": self.model, "optimizer": self.optimizer, "scheduler": self.scheduler, "data": self.data}

    def train(self) -> None:
        generator = torch.Generator().manual_seed(self.data.position)
        self.optimizer.zero_grad()
        self.model(torch.rand(4, 6, generator=generator)).square().sum().backward()
        self.optimizer.step()
        self.scheduler.step()
        self.data.position += 1

    def digest(self) -> str:
        """Of all parameters and optimizer state, gathered whole: the same in every layout."""
        found = hashlib.sha256()
        states = get_state_dict(self.model, self.optimizer, options=StateDictOptions(full_state_dict=False))
        for state in (states[0], states[1]["state"]):
            for name, value in sorted(_flat(state)):
                whole = value.full_tensor() if isinstance(value, DTensor) else value
                found.update(name.encode() + whole.detach().contiguous().numpy().tobytes())
        return found.hexdigest()


def _flat(tree: dict[str, Any], prefix: str = "") -> list[tuple[str, torch.Tensor]]:
    found: list[tuple[str, torch.Tensor]] = []
    for key, value in tree.items():
        found += _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else [(prefix + key, value)]
    return found


def train_and_save(rank: int, world_size: int, mode: str, job: str, sockets: str) -> dict[str, Any]:
    """Train, with a snapshot of every step under job `job`, then `dcp.save` and `dcp.async_save` under `job`-dcp."""
    run = Run(mode, world_size)
    with Snapshotter(run.state(), job=job, socket=sockets, on_error="raise") as snapshotter:
        assert snapshotter.restore() is None
        for step in range(STEPS):
            run.train()
            if step == STEPS - 1:
                run.data.position += rank  # so that it differs between ranks
            snapshotter.step(step)
            snapshotter.wait(timeout_s=COMMIT_S)
    model, optimizer = get_state_dict(run.model, run.optimizer)
    tree = {"model": model, "optimizer": optimizer, "note": {"step": STEPS}}
    writer = HoldfastWriter(job=f"{job}-dcp", socket=sockets)
    dcp.save(tree, storage_writer=writer, checkpoint_id=f"first/{FIRST_SAVE}")
    dcp.async_save(tree, storage_writer=writer).result()  # type: ignore[union-attr]  # a future without an async stager
    writer.close()
    return {"digest": run.digest(), "position": run.data.position}


def restore_elsewhere(  # everything of one world
    rank: int, world_size: int, mode: str, job: str, sockets: str, go_on: bool
) -> dict[str, Any]:
    """Come back in layout `mode`: by `dcp.load` of the snapshot and of what was saved, and by `Snapshotter.restore`."""
    del rank
    run = Run(mode, world_size)
    found: dict[str, Any] = {"fresh": run.digest()}
    for name in (job, f"{job}-dcp"):
        model, optimizer = get_state_dict(run.model, run.optimizer)
        tree: dict[str, Any] = {"model": model, "optimizer": optimizer}
        if name != job:
            tree["note"] = {"step": 0}
        reader = HoldfastReader(job=name, socket=sockets)
        dcp.load(tree, storage_reader=reader)
        set_state_dict(run.model, run.optimizer, model_state_dict=tree["model"], optim_state_dict=tree["optimizer"])
        found[name] = (reader.step, run.digest(), tree.get("note"))
        for tensor in run.model.parameters():
            nn.init.zeros_(tensor)
    run = Run(mode, world_size)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with Snapshotter(run.state(), job=job, socket=sockets, on_error="raise") as snapshotter:
            step = snapshotter.restore()
            found["restored"] = (step, run.digest(), run.data.position, run.scheduler.last_epoch)
            if go_on:
                run.train()
                snapshotter.step(STEPS)
                snapshotter.wait(timeout_s=COMMIT_S)
                found["went on to"] = snapshotter.stats()["committed_step"]
    found["said"] = [str(warning.message) for warning in caught if "holdfast" in str(warning.message)]
    return found


def sockets_of(paths: list[Path]) -> str:
    """As HOLDFAST_SOCKET lists them."""
    return ",".join(map(str, paths))
