"""What the ranks of test_replicas.py do: train alike under DDP or HSDP, stage their shares, come back and compare."""

import warnings
from typing import Any

import torch
import torch.distributed as dist
from holdfast.client import Snapshotter
from holdfast.client.state_hash import hash_state
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

STEPS = 3
COMMIT_S = 30.0


class Net(nn.Module):
    """Uneven sizes, a parameter smaller than the number of replicas, a tied one, and buffers of each rank's own."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Linear(37, width)
        self.norm = nn.BatchNorm1d(width)
        self.second = nn.Linear(width, 37)
        self.last = nn.Linear(37, 5, bias=False)
        self.tied = self.last.weight
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.last(self.second(torch.tanh(self.norm(self.first(inputs))))) * self.scale
        return out


def _whole(value: torch.Tensor) -> list[float]:
    whole = value.full_tensor() if isinstance(value, DTensor) else value
    return [float(number) for number in whole.flatten().tolist()]


class Run:
    """A training of one mode."""

    def __init__(self, mode: str, rank: int, world_size: int, *, width: int = 211, seed: int = 3) -> None:
        torch.manual_seed(seed)
        net = Net(width)
        self.model: nn.Module = net
        match mode:
            case "ddp":
                self.model = DistributedDataParallel(net)
            case "hsdp":
                mesh = init_device_mesh("cpu", (2, world_size // 2), mesh_dim_names=("replicate", "shard"))
                for layer in (net.first, net.second):
                    fully_shard(layer, mesh=mesh)
                fully_shard(net, mesh=mesh)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.01, foreach=False)
        self.rank, self.count = rank, 0

    def state(self) -> dict[str, Any]:
        return {"model": self.model, "optimizer": self.optimizer}

    def whole(self) -> dict[str, list[float]]:
        """All parameters, gathered, by the names that they have without any wrapper."""
        return {name.removeprefix("module."): _whole(value) for name, value in self.model.named_parameters()}

    def train(self) -> None:
        """A step on data of this rank's own, of which the gradients are averaged."""
        generator = torch.Generator().manual_seed(100 * self.rank + self.count)
        self.optimizer.zero_grad()
        self.model(torch.rand(8, 37, generator=generator)).square().mean().backward()
        self.optimizer.step()
        self.count += 1


def train_and_stage(
    rank: int, world_size: int, mode: str, sockets: str, jobs: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Train one job after the other, each with a snapshot of every step; what became of each."""
    return [_train(rank, world_size, mode, sockets, **job) for job in jobs]


def _train(  # one job
    rank: int, world_size: int, mode: str, sockets: str, *, job: str = "replicas", width: int = 211,
    drift_at: int = STEPS, replicated: Any = "auto",
) -> dict[str, Any]:  # fmt: skip
    """From `drift_at` on, every rank changes its parameters by itself."""
    run = Run(mode, rank, world_size, width=width)
    state = run.state()
    if replicated == "inner":
        replicated, state["model"] = state["model"], state["model"].module
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with Snapshotter(state, job=job, socket=sockets, on_error="raise", replicated=replicated) as snapshotter:
            snapshotter.restore()
            for step in range(STEPS):
                run.train()
                if step >= drift_at:
                    with torch.no_grad():
                        for parameter in run.model.parameters():
                            parameter.add_(0.001 * rank)
                snapshotter.step(step)
                snapshotter.wait(timeout_s=COMMIT_S)
            staged_bytes = snapshotter.stats()["staged_bytes"]
    dist.barrier()
    return {"staged_bytes": staged_bytes, "hash": hash_state(run.state()), "said": _said(caught)}


def come_back(rank: int, world_size: int, mode: str, sockets: str, tries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Restore into a fresh state and train a step, once for each of these options; what became of each."""
    return [_come_back(rank, world_size, mode, sockets, options) for options in tries]


def _come_back(rank: int, world_size: int, mode: str, sockets: str, options: dict[str, Any]) -> dict[str, Any]:
    run = Run(mode, rank, world_size, seed=99)
    told: dict[str, Any] = {"fresh": hash_state(run.state()), "error": ""}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with Snapshotter(run.state(), job="replicas", socket=sockets, on_error="raise", **options) as snapshotter:
            try:
                told["step"] = snapshotter.restore()
            except Exception as error:  # noqa: BLE001  # told to the test
                told["error"] = f"{type(error).__name__}: {error}"
            told["phases"] = sorted(snapshotter.stats()["restore_s"])
    told |= {"hash": hash_state(run.state()), "said": _said(caught), "whole": run.whole()}
    if not told["error"]:
        run.train()
        told["next"] = run.whole()
    dist.barrier()
    return told


def _said(caught: list[warnings.WarningMessage]) -> list[str]:
    return [str(warning.message) for warning in caught if "holdfast" in str(warning.message)]
