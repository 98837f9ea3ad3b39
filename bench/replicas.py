"""What replicas cost: bytes that each rank of a DDP job stages, with its replicas cut over the ranks and without.

    python bench/replicas.py [--mib 64] [--ranks 2 4] [--steps 5]

All ranks on one real daemon, parity 0, gloo. `state_mib` is one replica: parameters and AdamW's moments. `stall_s` is
the median that a step was held up, `restore_s` the mean over ranks of a restore by phase. Prints the machine, then JSON
lines; times of ranks that share a few cores say little, bytes do not depend on that.
"""

import argparse
import multiprocessing as mp
import statistics
import sys
import tempfile
import warnings
from multiprocessing.connection import Connection
from pathlib import Path

import torch
import torch.distributed as dist
from holdfast.client import Snapshotter
from holdfast.client.state_hash import hash_state
from references import MIB, machine, say
from step_overhead import daemon
from torch import nn
from torch.nn.parallel import DistributedDataParallel

WAIT_S = 120.0


def main() -> int:
    """Measure each world with and without."""
    parser = argparse.ArgumentParser(description="bytes that ranks of a DDP job stage, as JSON lines")
    parser.add_argument("--mib", type=int, default=64, help="of one replica's state")
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--steps", type=int, default=5)
    arguments = parser.parse_args()
    say(machine())
    with daemon(memory_share=0.5) as socket:
        for count in arguments.ranks:
            for replicated in ("none", "auto"):
                measure(socket, count, replicated, mib=arguments.mib, steps=arguments.steps)
    return 0


def measure(socket: str, count: int, replicated: str, *, mib: int, steps: int) -> None:
    """One job: train, come back, compare."""
    context = mp.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        pipes, ranks = [], []
        for rank in range(count):
            mine, theirs = context.Pipe(duplex=False)
            work = (theirs, socket, str(Path(folder) / "meet"), (rank, count), replicated, (mib, steps))
            ranks.append(context.Process(target=run_rank, args=work, daemon=True))
            ranks[-1].start()
            pipes.append(mine)
        found = [pipe.recv() for pipe in pipes]
        for process in ranks:
            process.join()
    phases = sorted(set().union(*(one["restore_s"] for one in found)))
    restore_s = {name: statistics.mean(one["restore_s"].get(name, 0.0) for one in found) for name in phases}
    say(
        {
            "what": "replicas", "ranks": count, "replicated": replicated, "state_mib": found[0]["state_bytes"] / MIB,
            "staged_mib_by_rank": [round(one["staged_bytes"] / MIB, 3) for one in found],
            "staged_of_state": max(one["staged_bytes"] for one in found) / found[0]["state_bytes"],
            "stall_s": statistics.median(stall for one in found for stall in one["stalls"]),
            "restore_s": {name: round(seconds, 4) for name, seconds in restore_s.items()},
        }
    )  # fmt: skip


def run_rank(
    pipe: Connection, socket: str, meet: str, place: tuple[int, int], replicated: str, size: tuple[int, int]
) -> None:
    """Stage some steps of a state of some MiB (`size`), overwrite everything, restore."""
    (rank, count), (mib, steps) = place, size
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", init_method=f"file://{meet}", rank=rank, world_size=count)
    torch.manual_seed(1)
    layers = max(1, mib // 12)
    model = DistributedDataParallel(nn.Sequential(*(nn.Linear(1024, 1024) for _ in range(layers))))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    state = {"model": model, "optimizer": optimizer}
    stalls = []

    def made() -> Snapshotter:
        job = f"{replicated}-{count}"
        return Snapshotter(state, job=job, socket=socket, on_error="raise", replicated=replicated)  # type: ignore[arg-type]  # as main says it

    with made() as snapshotter:
        snapshotter.restore()
        for step in range(steps):
            optimizer.zero_grad()
            model(torch.randn(4, 1024)).square().mean().backward()
            optimizer.step()
            snapshotter.step(step)
            snapshotter.before_update()
            stalls.append(snapshotter.stats()["stall_s"]["last"])
            snapshotter.wait(timeout_s=WAIT_S)
        staged_bytes = snapshotter.stats()["staged_bytes"]
    before = hash_state(state)
    tensors = [*model.parameters(), *(value for slot in optimizer.state.values() for value in slot.values())]
    with torch.no_grad():
        for tensor in tensors:
            tensor.zero_()
    with made() as snapshotter:
        assert snapshotter.restore() == steps - 1
        assert hash_state(state) == before, "restored bytes differ"
        restore_s = snapshotter.stats()["restore_s"]
    size_bytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    pipe.send({"state_bytes": size_bytes, "staged_bytes": staged_bytes, "stalls": stalls, "restore_s": restore_s})
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
