"""FSDP2 under torchrun: train on some ranks, come back on more or fewer, with every byte in its new place.

holdfast local --nodes 3 --parity 1        # in another terminal; copy its export line here
torchrun --nproc-per-node 4 examples/fsdp2_reshard.py --steps 20
torchrun --nproc-per-node 2 examples/fsdp2_reshard.py --steps 40              # restore() reshards by itself
torchrun --nproc-per-node 3 examples/fsdp2_reshard.py --load-first            # torch's own way before it: dcp.load
"""

import argparse

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from holdfast.client import Snapshotter
from holdfast.client.dcp import HoldfastReader
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor


def build() -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 64), nn.GELU(), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 1))
    for layer in model:
        if isinstance(layer, nn.Linear):
            fully_shard(layer)
    fully_shard(model)
    return model, torch.optim.AdamW(model.parameters(), lr=3e-3)


def whole_sum(model: nn.Module, optimizer: torch.optim.Optimizer) -> float:
    """One number of all parameters and moments, the same however they are laid out."""
    tensors = list(model.parameters())
    tensors += [slots["exp_avg_sq"] for slots in optimizer.state.values()]
    return sum(t.full_tensor().double().sum().item() for t in tensors if isinstance(t, DTensor))


def load(model: nn.Module, optimizer: torch.optim.Optimizer, job: str) -> int | None:
    """What any program can do with a snapshot, also while the job trains on: no Snapshotter, no attempt, no restore."""
    model_state, optimizer_state = get_state_dict(model, optimizer)
    state = {"model": model_state, "optimizer": optimizer_state}  # the names that the Snapshotter was given
    reader = HoldfastReader(job=job)
    dcp.load(state, storage_reader=reader)
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    return reader.step


def train(model: nn.Module, optimizer: torch.optim.Optimizer, job: str, steps: int) -> None:
    snapshotter = Snapshotter({"model": model, "optimizer": optimizer}, job=job)
    start = snapshotter.restore()
    if dist.get_rank() == 0:
        if start is None:
            print("starting anew")
        else:
            print(f"restored step {start}")
    if start is not None:
        report("restored", model, optimizer)
    for step in range(0 if start is None else start + 1, steps):
        generator = torch.Generator().manual_seed(1000 * step + dist.get_rank())
        x = torch.rand(32, 8, generator=generator)
        loss = nn.functional.mse_loss(model(x), x.sum(dim=1, keepdim=True).sin())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        snapshotter.step(step)
    report("trained", model, optimizer)
    snapshotter.close()


def report(what: str, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    total = whole_sum(model, optimizer)
    if dist.get_rank() == 0:
        print(f"{what} on {dist.get_world_size()} ranks, sum {total:.9f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--job", default="fsdp2-reshard")
    parser.add_argument("--load-first", action="store_true")
    arguments = parser.parse_args()
    dist.init_process_group("gloo")
    model, optimizer = build()
    if arguments.load_first:
        step = load(model, optimizer, arguments.job)
        report(f"loaded step {step}", model, optimizer)
        model, optimizer = build()
    train(model, optimizer, arguments.job, arguments.steps)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
