"""A job of very many small tensors: what attaching, planning, a step and a restore take, by number of tensors.

    python bench/tensors.py [--counts 10000 100000] [--elements 64]

Two real daemons, parity 1, one rank without a process group, parameters of 256 bytes. Seconds by the clock and of the
rank's own processor; where other programs take the cores, the latter is what a quiet machine would come near. `per` is
microseconds of processor per tensor: it must not grow with the number of tensors. Prints the machine, then JSON lines.
"""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
from holdfast.client import Snapshotter
from references import machine, say
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "integration"))
from local_cluster import LocalCluster

WAIT_S = 120.0
Done = TypeVar("Done")


class Laps:
    """Seconds of the phases of one size."""

    def __init__(self) -> None:
        self.wall_s: dict[str, float] = {}
        self.cpu_s: dict[str, float] = {}

    def lap(self, name: str, work: Callable[[], Done]) -> Done:
        """Do it, and remember how long it took."""
        wall_s, cpu_s = time.perf_counter(), time.process_time()
        result = work()
        self.wall_s[name] = round(time.perf_counter() - wall_s, 3)
        self.cpu_s[name] = round(time.process_time() - cpu_s, 3)
        return result


def model_of(count: int, elements: int, fill: float) -> nn.ParameterDict:
    """So many parameters, whose names are like those of layers."""
    names = (f"layer_{index // 10}_weight_{index % 10}" for index in range(count))
    return nn.ParameterDict({name: nn.Parameter(torch.full((elements,), fill + at)) for at, name in enumerate(names)})


def measure(count: int, elements: int) -> None:
    """One size, from attaching to the first step after a restore."""
    laps = Laps()
    with LocalCluster(nodes=2, parity=1, budget="2GiB", chunk_bytes="1MiB") as cluster:
        cluster.start()

        def snapshotter_of(model: nn.Module) -> Snapshotter:
            return Snapshotter({"model": model}, job="many", socket=cluster.socket(0), on_error="raise")

        model = model_of(count, elements, 1.0)
        with snapshotter_of(model) as snapshotter:
            laps.lap("attach and plan", snapshotter.restore)
            laps.lap("first step", lambda: snapshotter.step(0))
            laps.lap("first commit", lambda: snapshotter.wait(timeout_s=WAIT_S))
            for step in (1, 2):
                laps.lap("step", lambda step=step: snapshotter.step(step))
                laps.lap("commit", lambda: snapshotter.wait(timeout_s=WAIT_S))
        other = model_of(count, elements, -1.0)
        with snapshotter_of(other) as snapshotter:
            assert laps.lap("restore", snapshotter.restore) == 2
        assert all(torch.equal(model[name], other[name]) for name in model)
        say({
            "what": "many tensors", "tensors": count, "bytes_each": 4 * elements, "wall_s": laps.wall_s,
            "rank_cpu_s": laps.cpu_s,
            "per": {name: round(seconds * 1e6 / count, 1) for name, seconds in laps.cpu_s.items()},
        })  # fmt: skip


def main() -> int:
    """Run all sizes."""
    parser = argparse.ArgumentParser(description="what very many tensors cost, as JSON lines")
    parser.add_argument("--counts", type=int, nargs="+", default=[10_000, 100_000])
    parser.add_argument("--elements", type=int, default=64, help="of float32 in each tensor")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    say(machine())
    for count in arguments.counts:
        measure(count, arguments.elements)
    return 0


if __name__ == "__main__":
    sys.exit(main())
