"""Training ranks in processes of their own that do the same thing at the same time, one per node.

Rank 0 is not special: the main process only gives orders and collects what each rank measured.
"""

import multiprocessing as mp
import statistics
import time
import warnings
from collections.abc import Sequence
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Self

import torch
from holdfast.client import Snapshotter
from references import MIB, WAIT_S, WarmCopy, raw_tcp, timed

HIDE_COPIES = 3  # a step is at least so many copies long where there is something to hide behind
PARAMETER_BYTES = 2 * MIB


class Rank:
    """One rank: a model and its optimizer, of which two thirds are the optimizer's moments."""

    def __init__(self, socket: str, state_bytes: int, parity: int) -> None:
        torch.set_num_threads(1)
        torch.manual_seed(torch.distributed.get_rank())
        count = max(1, state_bytes // (3 * PARAMETER_BYTES))
        self.model = torch.nn.ParameterList([torch.randn(PARAMETER_BYTES // 4) for _ in range(count)])
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3)
        for parameter in self.model:
            parameter.grad = torch.randn_like(parameter)
        self.optimizer.step()
        self.socket = socket
        self.bytes = 3 * count * PARAMETER_BYTES
        self.wire_bytes = parity * self.bytes
        self.copy = WarmCopy(self.bytes)
        self.snapshotter: Snapshotter | None = None

    def tensors(self) -> list[torch.Tensor]:
        """All large tensors of the state."""
        moments = [
            moment for entry in self.optimizer.state.values() for moment in (entry["exp_avg"], entry["exp_avg_sq"])
        ]
        return [parameter.data for parameter in self.model] + moments

    def attach(self) -> float:
        """A new Snapshotter, and the restore of what there is."""
        state = {"model": self.model, "optimizer": self.optimizer}
        return timed(lambda: self._attach(state))

    def _attach(self, state: dict[str, object]) -> None:
        self.snapshotter = Snapshotter(state, job="bench", socket=self.socket, on_error="raise")
        self.snapshotter.restore()

    def reference(self) -> tuple[float, float]:
        """Seconds of one memcpy of the state, and of the snapshot's traffic through raw TCP."""
        return self.copy.seconds(), raw_tcp(self.wire_bytes)

    def step(self, step: int, hide_s: float) -> tuple[float, float]:
        """Stage a step and change the state: how long training was held up, and how long the commit took."""
        assert self.snapshotter is not None
        started_s = time.monotonic()
        self.snapshotter.step(step)
        stall_s = time.monotonic() - started_s
        time.sleep(hide_s)  # forward and backward of the next step
        stall_s += timed(self.snapshotter.before_update)
        self.snapshotter.wait(timeout_s=WAIT_S)
        return stall_s, time.monotonic() - started_s

    def restore(self) -> tuple[float, float]:
        """A memcpy beside a restore from the own node's memory into a state that was overwritten."""
        wanted = [tensor.clone() for tensor in self.tensors()]
        for tensor in self.tensors():
            tensor.zero_()
        copy_s, restore_s = self.copy.seconds(), self.attach()
        assert all(torch.equal(*pair) for pair in zip(self.tensors(), wanted, strict=True)), "restored bytes differ"
        self.close()
        return copy_s, restore_s

    def close(self) -> None:
        """Wait for the last commit and leave."""
        assert self.snapshotter is not None
        self.snapshotter.close()


def follow(rank: int, world: int, meet: str, orders: Connection, setup: tuple[str, int, int]) -> None:
    """The life of a rank's process: wait for orders, begin together with the others, report."""
    warnings.simplefilter("ignore")
    torch.distributed.init_process_group("gloo", init_method=f"file://{meet}", rank=rank, world_size=world)
    working = Rank(*setup)
    while True:
        name, arguments = orders.recv()
        if name == "end":
            return
        try:
            torch.distributed.barrier()
            orders.send(getattr(working, name)(*arguments))
        except Exception as error:  # noqa: BLE001  # told to the main process
            orders.send(error)


class Ranks:
    """All ranks. `with` ends them."""

    def __init__(self, sockets: Sequence[Path], folder: Path, *, state_bytes: int, parity: int) -> None:
        spawn = mp.get_context("spawn")
        world = len(sockets)
        self._orders: list[Connection] = []
        self._processes: list[BaseProcess] = []
        for rank, socket in enumerate(sockets):
            ours, theirs = spawn.Pipe()
            arguments = (rank, world, str(folder / "meet"), theirs, (str(socket), state_bytes, parity))
            process = spawn.Process(target=follow, args=arguments, daemon=True)
            process.start()
            self._orders.append(ours)
            self._processes.append(process)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            process.kill()
            process.join(WAIT_S)

    def all_do(self, name: str, *arguments: object) -> list[Any]:
        """Have every rank do something at the same time; what each answers, by rank."""
        for orders in self._orders:
            orders.send((name, arguments))
        answers = []
        for orders in self._orders:
            if not orders.poll(WAIT_S):
                raise TimeoutError(f"a rank did not answer {name} within {WAIT_S} s")
            answers.append(orders.recv())
        for answer in answers:
            if isinstance(answer, Exception):
                raise answer
        return answers

    def rounds(self, count: int, first_step: int, *, hide: bool) -> dict[str, list[float]]:
        """Rounds of reference and step in turn. Commit and wire count as long as the slowest rank's."""
        found: dict[str, list[float]] = {"stall": [], "copy": [], "commit": [], "wire": []}
        for step in range(first_step, first_step + count):
            references = self.all_do("reference")
            copies = [copy for copy, _ in references]
            steps = self.all_do("step", step, HIDE_COPIES * statistics.median(copies) if hide else 0.0)
            found["copy"] += copies
            found["stall"] += [stall for stall, _ in steps]
            found["commit"].append(max(commit for _, commit in steps))
            found["wire"].append(max(wire for _, wire in references))
        return found
