"""How long a restored rank waits: a snapshot from the own node's memory back into the live state, by phase.

    python bench/restore.py [--device cuda|cpu] [--mib 4096] [--rounds 5] [--small 10000]

One real daemon, parity 0, as after the crash of a trainer. Each round makes a new Snapshotter over a state that was
overwritten. `ratio` compares everything after the attach (asking, verifying, copying, agreeing) with one copy of the
state: a memcpy on the CPU, a copy from pinned memory to a GPU. Prints the machine, then JSON lines.
"""

import argparse
import statistics
import sys
import time
import warnings

import torch
from holdfast.client import Snapshotter
from references import MIB, WarmCopy, machine, say, timed
from step_overhead import daemon
from torch import nn

GOAL = 1.25


def main() -> int:
    """Run both cases."""
    parser = argparse.ArgumentParser(description="seconds of a restore by phase, as JSON lines")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cuda", "cpu"])
    parser.add_argument("--mib", type=int, default=8192 if torch.cuda.is_available() else 512)
    parser.add_argument("--small", type=int, default=10_000, help="tensors of 16 KiB in the second case; 0: none")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    device = arguments.device
    if device == "cpu":
        torch.set_num_threads(1)
    say({**machine(), "device": torch.cuda.get_device_name() if device == "cuda" else "cpu"})
    with daemon(memory_share=0.7 if device == "cpu" else 3.0) as socket:
        measure("large", large(arguments.mib, device), socket, arguments.rounds)
        if arguments.small:
            small = {f"t{index}": torch.randn(4096, device=device) for index in range(arguments.small)}
            measure("small", small, socket, arguments.rounds)
    return 0


def large(mib: int, device: str) -> dict[str, torch.Tensor]:
    """Tensors of 16 MiB."""
    return {f"t{index}": torch.randn(4 * MIB, device=device) for index in range(max(1, mib // 16))}


def measure(name: str, tensors: dict[str, torch.Tensor], socket: str, rounds: int) -> None:
    """Stage once, then restore again and again."""
    model = nn.ParameterDict({key: nn.Parameter(tensor) for key, tensor in tensors.items()})
    size = sum(parameter.numel() * parameter.element_size() for parameter in model.values())
    on_gpu = next(iter(model.values())).is_cuda
    with Snapshotter({"model": model}, job=name, socket=socket, on_error="raise") as snapshotter:
        snapshotter.step(0)
        snapshotter.wait(timeout_s=120)
    sums = [parameter.detach().double().sum().item() for parameter in model.values()]
    whole, phases, attach, copies = [], [], [], []
    host_copy = WarmCopy(size) if not on_gpu else None
    for _ in range(rounds):
        with torch.no_grad():
            for parameter in model.values():
                parameter.zero_()
        copies.append(host_copy.seconds() if host_copy is not None else pinned_copy(size))
        started_s = time.monotonic()
        snapshotter = Snapshotter({"model": model}, job=name, socket=socket, on_error="raise")
        snapshotter._attach()  # noqa: SLF001  # what is measured apart
        attach.append(time.monotonic() - started_s)
        whole.append(timed(snapshotter.restore))
        phases.append(snapshotter.stats()["restore_s"])
        snapshotter.close()
    found = [parameter.detach().double().sum().item() for parameter in model.values()]
    assert found == sums, "restored bytes differ"
    median_s, copy_s = statistics.median(whole), statistics.median(copies)
    laps = {phase: statistics.median([each[phase] for each in phases]) for phase in phases[0]}
    say({
        "what": "restore from the own node after attach", "case": name, "ratio": median_s / copy_s, "goal": GOAL,
        "met": median_s / copy_s <= GOAL, "seconds": median_s, "min_s": min(whole), "max_s": max(whole),
        "copy_reference_s": copy_s, "attach_s": statistics.median(attach), "phases_s": laps,
        "copy_phase_ratio": laps["copy"] / copy_s, "state_bytes": size, "tensors": len(model), "rounds": rounds,
    })  # fmt: skip


def pinned_copy(size: int) -> float:
    """Seconds that so many bytes take from pinned memory to the GPU, by the rate of at most 2 GiB of them."""
    part = min(size, 2 << 30)
    source = torch.zeros(part, dtype=torch.uint8, pin_memory=True)
    target = torch.empty(part, dtype=torch.uint8, device="cuda")
    torch.cuda.synchronize()
    seconds = timed(lambda: (target.copy_(source, non_blocking=True), torch.cuda.synchronize()))
    return seconds * size / part


if __name__ == "__main__":
    sys.exit(main())
