"""One rank of a small world, run by test_restore.py: trains and saves, or restores and goes on.

Prints one JSON object. Both halves train under FSDP2 and under DDP, in one process group, since
starting a process costs more than the training.
"""

import json
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from holdfast.client.restore import hash_state, restore_into
from holdfast.client.shard import ShardLayout
from holdfast.client.state_errors import RestoreMismatchError
from holdfast.client.tiny_gpt import Options, Training
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

MODES = ("fsdp", "ddp")
SAVED_STEP, LAST_STEP = 2, 5
WORLD_SIZE = 2


class Odd:
    """A module that does not divide evenly: rank 1 holds an empty part of its bias and less "
    "weight."""

    def __init__(self) -> None:
        torch.manual_seed(7)
        self.module = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 1))
        fully_shard(self.module)
        self.optimizer = torch.optim.SGD(self.module.parameters(), lr=0.1, momentum=0.9)

    def step(self) -> None:
        self.module(torch.ones(2, 4)).sum().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


class Flat:
    """Modules under FSDP1, one inside the other: each unit's parameters are one flat tensor, cut over the ranks."""

    def __init__(self) -> None:
        torch.manual_seed(8)
        options: dict[str, Any] = {"use_orig_params": True, "device_id": torch.device("cpu")}
        inner = FullyShardedDataParallel(nn.Linear(5, 3), **options)
        whole = nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), inner, nn.BatchNorm1d(3))
        self.module = FullyShardedDataParallel(whole, **options)
        self.optimizer = torch.optim.AdamW(self.module.parameters(), lr=0.1)

    def step(self) -> None:
        self.module(torch.randn(4, 4)).pow(2).sum().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


class Run:
    """A training of one mode with everything that has to survive."""

    def __init__(self, mode: str, rank: int, folder: Path) -> None:
        options = Options(
            steps=LAST_STEP + 1,
            events=folder / "events",
            mode=mode,
            layers=2,
            width=32,
            context=16,
            warm_up_steps=4,
        )
        self.odd = Odd()
        self.flat = Flat()
        self.training = Training(options, rank=rank, world_size=WORLD_SIZE)
        self.state = {
            **self.training.state(),
            "odd": self.odd.module,
            "odd optimizer": self.odd.optimizer,
            "flat": self.flat.module,
            "flat optimizer": self.flat.optimizer,
        }
        self.losses: list[str] = []

    def step(self) -> None:
        self.losses.append(self.training.step().hex())
        self.odd.step()
        self.flat.step()


def save(folder: Path, rank: int, mode: str) -> dict[str, object]:
    run = Run(mode, rank, folder)
    saved_hash = ""
    layout: ShardLayout | None = None
    for step in range(LAST_STEP + 1):
        run.step()
        layout = layout or ShardLayout.build(run.state)
        shard = bytearray(layout.shard_bytes)
        capture = layout.capture()
        capture.write(memoryview(shard))
        if step == SAVED_STEP:
            (folder / f"{mode}-{rank}").write_bytes(shard)
            saved_hash = hash_state(run.state)
    return {
        "saved": saved_hash,
        "final": hash_state(run.state),
        "losses": run.losses[SAVED_STEP + 1 :],
        "lazy_bytes": capture.lazy_bytes,
    }


def restore(folder: Path, rank: int, mode: str) -> dict[str, object]:
    run = Run(mode, rank, folder)
    refused = ""
    if mode == "fsdp":
        before = hash_state(run.state)
        foreign = (folder / f"{mode}-{1 - rank}").read_bytes()
        try:
            restore_into(run.state, memoryview(foreign))
        except RestoreMismatchError as error:
            refused = str(error)
        assert hash_state(run.state) == before
    restore_into(run.state, memoryview((folder / f"{mode}-{rank}").read_bytes()))
    saved_hash = hash_state(run.state)
    for _ in range(SAVED_STEP + 1, LAST_STEP + 1):
        run.step()
    return {
        "saved": saved_hash,
        "final": hash_state(run.state),
        "losses": run.losses,
        "refused": refused,
    }


def torn(rank: int, folder: Path) -> bool:
    """Whether an optimizer's step on DTensors is noticed by a capture in flight."""
    run = Run("fsdp", rank, folder)
    run.step()
    layout = ShardLayout.build({"model": run.training.model, "optimizer": run.training.optimizer})
    capture = layout.capture()
    run.step()
    try:
        capture.write(memoryview(bytearray(layout.shard_bytes)))
    except Exception as error:  # noqa: BLE001 - reported by name
        return type(error).__name__ == "TornSnapshotError"
    return False


def main() -> None:
    half, folder, rank = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/{half}.store",
        rank=rank,
        world_size=WORLD_SIZE,
        timeout=timedelta(seconds=60),
    )
    work = save if half == "save" else restore
    result: dict[str, object] = {mode: work(folder, rank, mode) for mode in MODES}
    if half == "save":
        result["torn"] = torn(rank, folder)
    print(json.dumps(result))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
