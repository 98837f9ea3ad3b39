"""What a snapshot of every step costs training: stall, host time, copy speed; and what others take for the same state.

    python bench/step_overhead.py [--device cuda|cpu] [--mib 12000] [--small 10000] [--pairs 6] [--others-mib 2000]

Real training (a stack of linear layers with AdamW) against a real daemon on this machine (one node, parity 0: what the
client costs, not the network). Blocks of steps with and without snapshots alternate; figures are medians of paired
blocks. Prints the machine, then JSON lines; `goal` is what the design wants, `met` says whether this run reached it.

On the CPU a step is a pause of three copies (figures of training itself would be noise on few cores), and a second
run has nothing to hide behind.
"""

import argparse
import contextlib
import io
import shutil
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from holdfast.cli.cluster import create
from holdfast.client import Snapshotter
from references import MIB, WarmCopy, machine, say, timed
from torch import nn

WARM_UP_STEPS = 3
BLOCK_STEPS = 6


def main() -> int:
    """Run all measurements that fit the device."""
    parser = argparse.ArgumentParser(description="what snapshots cost training, as JSON lines")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cuda", "cpu"])
    parser.add_argument("--mib", type=int, default=12_288 if torch.cuda.is_available() else 192, help="state, MiB")
    parser.add_argument("--small", type=int, default=10_000, help="tensors of 16 KiB in the second case; 0: none")
    parser.add_argument("--others-mib", type=int, default=2048 if torch.cuda.is_available() else 96)
    parser.add_argument("--pairs", type=int, default=6)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    if arguments.device == "cpu":
        torch.set_num_threads(1)
    say({**machine(), "device": torch.cuda.get_device_name() if arguments.device == "cuda" else "cpu"})
    with daemon(memory_share=0.7 if arguments.device == "cpu" else 3.0) as socket:
        cases: list[tuple[str, Callable[[], None]]] = []
        if arguments.device == "cuda":
            cases.append(("large", lambda: gpu_case("large", Large(arguments.mib), socket, arguments.pairs)))
            if arguments.small:
                cases.append(("small", lambda: gpu_case("small", Small(arguments.small), socket, arguments.pairs)))
        else:
            cases.append(("large", lambda: cpu_case("large", arguments.mib, None, socket, arguments.pairs)))
            if arguments.small:
                cases.append(("small", lambda: cpu_case("small", 0, arguments.small, socket, arguments.pairs)))
        cases.append(("others", lambda: others(arguments.others_mib, arguments.device, socket)))
        if arguments.device == "cuda":
            cases.append(("hidden", lambda: hidden(arguments.others_mib, socket)))
        for name, case in cases:
            try:
                case()
            except Exception as error:  # noqa: BLE001  # the other cases still tell something
                say({"what": name, "failed": f"{type(error).__name__}: {error}"})
            if arguments.device == "cuda":
                torch.cuda.empty_cache()
    return 0


@contextlib.contextmanager
def daemon(*, memory_share: float) -> Iterator[str]:
    """One node's daemon; its socket. The share may exceed 1 where a virtual machine's memory grows as it is used."""
    with tempfile.TemporaryDirectory(prefix="hfb") as folder:
        cluster = create(
            Path(folder), node_count=1, parity=0, group_size=1, memory_share=memory_share, chunk_bytes=4 * MIB
        )
        with cluster:
            cluster.start(cluster.nodes)
            cluster.wait_up()
            yield str(cluster.nodes["n0"].socket)


class Large:
    """Linear layers of 2048 x 8192 in float32 with AdamW: 192 MiB of state each, and about a second of work a step."""

    def __init__(self, mib: int) -> None:
        blocks = max(1, mib // 384)
        layers = [layer for _ in range(blocks) for layer in (nn.Linear(2048, 8192), nn.GELU(), nn.Linear(8192, 2048))]
        self.model = nn.Sequential(*layers).cuda()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)
        self.batch = torch.randn(65_536, 2048, device="cuda")
        self.passes = 1

    def state(self) -> dict[str, object]:
        """What is protected."""
        return {"model": self.model, "optimizer": self.optimizer}

    def step(self) -> None:
        """Forward, backward, update."""
        self.optimizer.zero_grad(set_to_none=False)
        for _ in range(self.passes):
            with torch.autocast("cuda", dtype=torch.bfloat16):
                found = self.batch
                for index in range(0, len(self.model), 3):
                    found = torch.utils.checkpoint.checkpoint(  # keeps activations small
                        self.model[index : index + 3], found, use_reentrant=False
                    )
            found.float().square().mean().backward()
        self.optimizer.step()


class Small:
    """Many tensors of 16 KiB with SGD, beside matrix products that take as long as a step."""

    def __init__(self, count: int) -> None:
        self.model = nn.ParameterList([torch.randn(4096, device="cuda") for _ in range(count)])
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-4, foreach=True)
        for parameter in self.model:
            parameter.grad = torch.randn_like(parameter)
        self.matrix = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)

    def state(self) -> dict[str, object]:
        """What is protected."""
        return {"model": self.model, "optimizer": self.optimizer}

    def step(self) -> None:
        """Work, then the update."""
        for _ in range(150):
            torch.mm(self.matrix, self.matrix)
        self.optimizer.step()


def bytes_of(run: Large | Small) -> int:
    """Bytes of the state's tensors."""
    tensors = list(run.model.parameters())
    for held in run.optimizer.state.values():
        tensors += [value for value in held.values() if isinstance(value, torch.Tensor)]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def gpu_case(name: str, run: Large | Small, socket: str, pairs: int) -> None:
    """Paired blocks of steps, then the copy alone beside a plain one of the same bytes."""
    snapshotter = Snapshotter(run.state(), job=name, socket=socket, on_error="raise", max_stall_s=60.0)
    for _ in range(WARM_UP_STEPS):
        run.step()
    torch.cuda.synchronize()
    first_s = timed(lambda: snapshotter.step(0))
    snapshotter.wait(timeout_s=120)
    step, staged = 1, 0
    blocks: dict[bool, list[float]] = {True: [], False: []}
    host_s: list[float] = []
    hold_s: list[float] = []
    parts: list[dict[str, float]] = []
    for pair in range(pairs):
        for protect in (True, False) if pair % 2 else (False, True):
            snapshotter.wait(timeout_s=120)
            run.step()
            torch.cuda.synchronize()
            started_s = time.monotonic()
            for _ in range(BLOCK_STEPS):
                run.step()
                if protect:
                    host_s.append(timed(lambda: snapshotter.step(step)))  # noqa: B023  # called here and now
                    parts.append(snapshotter.stats()["stall_parts_s"]["last"])
                    staged += snapshotter.stats()["staged_step"] == step
                    step += 1
            torch.cuda.synchronize()
            blocks[protect].append((time.monotonic() - started_s) / BLOCK_STEPS)
            hold_s.append(snapshotter.stats()["stall_s"]["last"])
    snapshotter.wait(timeout_s=120)
    with_s, without_s = blocks[True], blocks[False]
    overhead = statistics.median([a / b for a, b in zip(with_s, without_s, strict=True)])
    common = {
        "case": name, "state_bytes": bytes_of(run), "pairs": pairs, "skipped": snapshotter.stats()["skipped"],
        "steps": step - 1, "staged": staged,  # fewer where protection is slower than training
    }  # fmt: skip
    say({
        "what": "step time with a snapshot every step", "ratio": overhead, "goal": 1.01, "met": overhead <= 1.01,
        "with_s": statistics.median(with_s), "without_s": statistics.median(without_s), "all_with_s": with_s,
        "all_without_s": without_s, "first_s": first_s, **common,
    })  # fmt: skip
    median_s = statistics.median(host_s)
    say({
        "what": "host time in step()", "seconds": median_s, "min_s": min(host_s), "max_s": max(host_s),
        "parts_s": {part: statistics.median(each[part] for each in parts) for part in parts[0]},
        "with_holding_updates_s": statistics.median(hold_s), "goal_s": 0.001, "met": median_s <= 0.001, **common,
    })  # fmt: skip
    snapshotter.close()
    # A job of its own: the cadence of the one before may have widened, and then most steps would stage nothing.
    with Snapshotter(run.state(), job=f"{name}-alone", socket=socket, on_error="raise", max_stall_s=60.0) as alone:
        copy_alone(name, run, alone, common)


def copy_alone(name: str, run: Large | Small, snapshotter: Snapshotter, common: dict[str, object]) -> None:
    """The copy with nothing beside it, and one plain copy of as many bytes into pinned memory."""
    size = bytes_of(run)
    source = torch.zeros(min(size, 4 << 30), dtype=torch.uint8, device="cuda")
    target = torch.empty(source.numel(), dtype=torch.uint8, pin_memory=True)
    ours, plain, host, commit = [], [], [], []
    snapshotter.step(0)
    snapshotter.wait(timeout_s=120)
    for step in range(1, 6):
        torch.cuda.synchronize()
        plain.append(timed(lambda: (target.copy_(source, non_blocking=True), torch.cuda.synchronize())))
        started_s = time.monotonic()
        snapshotter.step(step)
        assert snapshotter.stats()["staged_step"] == step, "a step that is not staged measures nothing"
        host.append(time.monotonic() - started_s)
        snapshotter.before_update()
        torch.cuda.synchronize()
        ours.append(time.monotonic() - started_s)
        snapshotter.wait(timeout_s=120)
        commit.append(time.monotonic() - started_s)
    rate, reference = size / statistics.median(ours), source.numel() / statistics.median(plain)
    goal = 0.9 if name == "large" else 0.5
    say({
        "what": "device to host, conversation with the daemon included", "ratio": rate / reference, "goal": goal,
        "met": rate / reference >= goal, "gb_per_s": rate / 1e9, "plain_gb_per_s": reference / 1e9,
        "seconds": statistics.median(ours), "commit_s": statistics.median(commit), "host_s": statistics.median(host),
        **common,
    })  # fmt: skip


def cpu_case(name: str, mib: int, small: int | None, socket: str, pairs: int) -> None:
    """Stall beside one memcpy of the state, with steps to hide behind and without, and the staging's CPU time."""
    run = cpu_state(mib, small)
    size = sum(tensor.numel() * tensor.element_size() for tensor in run.values())
    model = nn.ParameterDict({key: nn.Parameter(tensor) for key, tensor in run.items()})
    copy = WarmCopy(size)
    copy.seconds()
    snapshotter = Snapshotter({"model": model}, job=name, socket=socket, on_error="raise")
    snapshotter.restore()
    stalls: dict[str, list[float]] = {"hidden": [], "bare": []}
    copies, cpu, host = [], [], []
    for step in range(2 * pairs):
        copy_s = copy.seconds()
        copies.append(copy_s)
        kind = "bare" if step < pairs else "hidden"
        cpu_started_s = time.process_time()
        started_s = time.monotonic()
        snapshotter.step(step)
        host.append(time.monotonic() - started_s)
        stall_s = host[-1]
        time.sleep(3 * copy_s if kind == "hidden" else 0.0)
        stall_s += timed(snapshotter.before_update)
        cpu.append(time.process_time() - cpu_started_s)
        stalls[kind].append(stall_s)
        snapshotter.wait(timeout_s=60)
    copy_s = statistics.median(copies)
    common = {"case": name, "state_bytes": size, "tensors": len(run), "memcpy_s": copy_s, "rounds": pairs}
    for what, kind, goal, pick in (
        ("stall, nothing to hide behind", "bare", 1.15, statistics.median),
        ("stall, nothing to hide behind, worst and first", "bare", 1.15, max),
        ("stall, steps of 3 copies", "hidden", 0.1, statistics.median),
    ):
        found = pick(stalls[kind])
        say({"what": what, "ratio": found / copy_s, "goal": goal, "met": found / copy_s <= goal,
             "seconds": found, "all_s": stalls[kind], **common})  # fmt: skip
    spent = statistics.median(cpu)
    say({"what": "CPU time of staging", "ratio": spent / copy_s, "goal": 1.2, "met": spent / copy_s <= 1.2,
         "seconds": spent, "host_s": statistics.median(host), **common})  # fmt: skip
    snapshotter.close()


def cpu_state(mib: int, small: int | None) -> dict[str, torch.Tensor]:
    """Tensors of 4 MiB, or many of 16 KiB."""
    if small is not None:
        return {f"t{index}": torch.randn(4096) for index in range(small)}
    return {f"t{index}": torch.randn(1 << 20) for index in range(max(1, mib // 4))}


def others(mib: int, device: str, socket: str) -> None:
    """How long torch's own ways hold up training for the same state, and how long until the state is safe there."""
    tensors = {f"t{index}": torch.randn(16 << 18, device=device) for index in range(max(1, mib // 16))}
    size = sum(tensor.numel() * 4 for tensor in tensors.values())
    wait = torch.cuda.synchronize if device == "cuda" else (lambda: None)
    folder = Path(tempfile.mkdtemp(prefix="hfo", dir="/dev/shm"))  # tmpfs is the point
    model = nn.ParameterDict({key: nn.Parameter(tensor) for key, tensor in tensors.items()})
    ours_s, total_s = [], []
    with Snapshotter({"model": model}, job="others", socket=socket, on_error="raise") as snapshotter:
        for step in range(4):
            wait()
            started_s = time.monotonic()
            snapshotter.step(step)
            snapshotter.before_update()
            if device == "cuda":
                wait()  # as if the device had nothing else to do: the worst case
            ours_s.append(time.monotonic() - started_s)
            snapshotter.wait(timeout_s=60)
            total_s.append(time.monotonic() - started_s)
    stall_s = statistics.median(ours_s[1:])
    say({"what": "others", "way": "holdfast, nothing to hide behind", "stall_s": stall_s,
         "total_s": statistics.median(total_s[1:]), "state_bytes": size})  # fmt: skip
    try:
        for way, run in ways(tensors, folder).items():
            try:
                stall, total = run()
                say({"what": "others", "way": way, "stall_s": stall, "total_s": total, "state_bytes": size,
                     "stall_ratio_to_ours": stall / stall_s})  # fmt: skip
            except Exception as error:  # noqa: BLE001  # a way that this torch lacks
                say({"what": "others", "way": way, "failed": f"{type(error).__name__}: {error}"[:300]})
            for each in folder.iterdir():
                shutil.rmtree(each, ignore_errors=True)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def ways(tensors: dict[str, torch.Tensor], folder: Path) -> dict[str, Callable[[], tuple[float, float]]]:
    """Each returns seconds of stall and in total."""

    def save() -> tuple[float, float]:
        seconds = timed(lambda: torch.save(tensors, folder / "state.pt"))
        (folder / "state.pt").unlink()
        return seconds, seconds

    def dcp_save() -> tuple[float, float]:
        with contextlib.redirect_stdout(io.StringIO()):
            seconds = timed(lambda: dcp.save(tensors, checkpoint_id=str(folder / "dcp"), no_dist=True))
        return seconds, seconds

    def dcp_async() -> tuple[float, float]:
        if not torch.distributed.is_initialized():
            torch.distributed.init_process_group("cpu:gloo", init_method=f"file://{folder}-meet", rank=0, world_size=1)
        dcp.async_save(tensors, checkpoint_id=str(folder / "warm")).result()
        started_s = time.monotonic()
        future = dcp.async_save(tensors, checkpoint_id=str(folder / "async"))
        stall_s = time.monotonic() - started_s
        future.result()
        return stall_s, time.monotonic() - started_s

    return {"torch.save to tmpfs": save, "dcp.save to tmpfs": dcp_save, "dcp.async_save (thread) to tmpfs": dcp_async}


HIDDEN_ROUNDS = 7


def hidden(mib: int, socket: str) -> None:
    """What a step of about three copies loses to a checkpoint at its beginning: ours, and that of dcp.async_save."""
    tensors = {f"t{index}": torch.randn(16 << 18, device="cuda") for index in range(max(1, mib // 16))}
    size = sum(tensor.numel() * 4 for tensor in tensors.values())
    folder = Path(tempfile.mkdtemp(prefix="hfo", dir="/dev/shm"))  # tmpfs is the point
    matrix = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    products = max(1, round(3 * size / 50e9 / 0.0014))  # a product takes about 1.4 ms, a copy is about 50 GB/s

    def step(begin: Callable[[int], Callable[[], object]], number: int) -> float:
        """Seconds of a step that begins a checkpoint; `begin` returns what waits for its end."""
        for _ in range(2 * products):
            torch.mm(matrix, matrix)  # the clocks are those of training
        torch.cuda.synchronize()
        started_s = time.monotonic()
        wait = begin(number)
        for _ in range(products):
            torch.mm(matrix, matrix)
        model["t0"].grad = model["t0"].detach()
        optimizer.step()
        torch.cuda.synchronize()
        seconds = time.monotonic() - started_s
        wait()
        return seconds

    def ours(number: int) -> Callable[[], object]:
        snapshotter.step(number)
        return lambda: snapshotter.wait(timeout_s=60)

    def theirs(number: int) -> Callable[[], object]:
        del number
        return dcp.async_save({**model}, checkpoint_id=str(folder / "hidden")).result

    model = nn.ParameterDict({key: nn.Parameter(tensor) for key, tensor in tensors.items()})
    optimizer = torch.optim.SGD([model["t0"]], lr=0.0)
    found: dict[str, list[float]] = {"alone": [], "ours": [], "theirs": []}
    try:
        with Snapshotter(
            {"model": model, "o": optimizer}, job="hidden", socket=socket, on_error="raise"
        ) as snapshotter:
            for number in range(HIDDEN_ROUNDS):
                found["alone"].append(step(lambda _: lambda: None, number))
                found["ours"].append(step(ours, number))
                found["theirs"].append(step(theirs, number))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    alone_s, ours_s, theirs_s = (statistics.median(seconds[1:]) for seconds in found.values())
    lost_s = max(ours_s - alone_s, 1e-6)
    say({
        "what": "a step of three copies loses to a checkpoint", "step_s": alone_s, "ours_s": ours_s - alone_s,
        "dcp_async_save_s": theirs_s - alone_s, "ratio": (theirs_s - alone_s) / lost_s, "goal": 10,
        "met": theirs_s - alone_s >= 10 * lost_s, "all_s": {way: seconds[1:] for way, seconds in found.items()},
        "state_bytes": size, "rounds": HIDDEN_ROUNDS - 1,
    })  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
