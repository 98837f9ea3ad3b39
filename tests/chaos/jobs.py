"""Jobs whose ranks train in processes of their own, on bytes that follow from (job, step, rank), until told otherwise.

`Job` is the side that tells and compares; `live` is a rank, forked from a process that has imported torch once. A rank
takes steps in lockstep with the others of its job and writes down, where its death does not reach, what it was told is
committed: the truth that a restore is held against.
"""

import contextlib
import ctypes
import gc
import itertools
import mmap
import multiprocessing
import os
import signal
import time
import traceback
import warnings
import zlib
from dataclasses import dataclass, field
from datetime import timedelta
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from holdfast.client import Snapshotter
from holdfast.client.errors import HoldfastError, NotRecoverableError
from local_cluster import until

_LIBC = ctypes.CDLL(None)
PRELOADED = ["torch.distributed", "holdfast.client", "jobs"]
SIZE = 100_000  # int64 elements per rank: 13 chunks of 64 KiB
OWED_S = 90.0  # for a commit or a restore after a fault; two busy cores
ANSWER_S = 150.0  # a rank's answer to a restore, which itself has patience for as long as a rebuild makes progress
MAX_STALL_S = 5.0
_PACE_S = 0.02  # of a step, beside what it costs
_WORLD_S = 60.0  # of a collective
_WORDS = 5  # of each rank on the board: those below
_COMMITTED, _STEP, _HELD, _STALLED_US, _REFUSED = range(_WORDS)


def write_content(state: torch.Tensor, job: str, step: int, rank: int) -> torch.Tensor:
    """Make `state` what one rank of a job has at one step. In place: no temporary to take for a leak."""
    torch.arange(state.numel(), out=state)
    return state.mul_(step + 1).add_(zlib.crc32(job.encode()) + rank * 1_000_003)


@dataclass(frozen=True)
class Place:
    """What a rank is told about itself."""

    job: str
    rank: int
    world: int
    socket: Path
    board: Path
    size: int


class Board:
    """Words that a job's ranks write and the telling side reads. Word 0: odd while ranks shall hold still."""

    def __init__(self, path: Path, world: int) -> None:
        size = 8 * (1 + _WORDS * world)
        with path.open("a+b") as file:
            file.truncate(size)
            self.words = memoryview(mmap.mmap(file.fileno(), size)).cast("q")

    def get(self, rank: int, what: int) -> int:
        return self.words[1 + rank * _WORDS + what]

    def put(self, rank: int, what: int, value: int) -> None:
        self.words[1 + rank * _WORDS + what] = value


@dataclass
class Job:
    """One job: rank i runs on node `nodes[i]`.

    `lasting` ranks are never killed: their process begins each life with a new Snapshotter, so leaks add up in it.
    """

    name: str
    nodes: tuple[int, ...]
    folder: Path
    sockets: list[Path]
    lasting: bool = False
    size: int = SIZE
    committed: int = -1  # what the last restore gave; what was committed since is on the board
    killed: bool = False  # whether a rank of this life was killed, so that the others may fail
    pipes: list[Connection] = field(default_factory=list)
    processes: list[BaseProcess] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.board = Board(self.folder / f"{self.name}.board", len(self.nodes))
        self.lives = itertools.count()
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(PRELOADED)
        self.forget_truth()

    # --- life ---

    def begin(self) -> list[tuple[Any, ...]]:
        """Ranks begin a new life with a restore; what each answers."""
        if not (self.lasting and self.processes):
            self.end()
            for rank, node in enumerate(self.nodes):
                mine, theirs = self.context.Pipe()
                place = Place(self.name, rank, len(self.nodes), self.sockets[node],
                              self.folder / f"{self.name}.board", self.size)  # fmt: skip
                process = self.context.Process(target=live, args=(theirs, place), daemon=True)
                process.start()
                theirs.close()
                self.pipes.append(mine)
                self.processes.append(process)
        self.killed = False
        meet = self.folder / f"{self.name}.meet{next(self.lives)}"
        for pipe in self.pipes:
            while pipe.poll():  # what it said at the end of its last life
                pipe.recv()
            pipe.send(str(meet))
        self.board.words[0] += self.board.words[0] % 2
        answers = []
        for rank, pipe in enumerate(self.pipes):
            assert pipe.poll(ANSWER_S), f"rank {rank} of {self.name} answers to no restore within {ANSWER_S} s"
            answers.append(pipe.recv())
        return answers

    def rest(self) -> None:
        """Lasting ranks let go of everything and wait for a new life."""
        for pipe in self.pipes:
            pipe.send("")
            assert pipe.poll(ANSWER_S), f"a rank of {self.name} does not rest"
            assert (said := pipe.recv()) == ("rests",), f"a rank of {self.name} does not rest: {said}"

    def end(self) -> None:
        """All ranks are killed."""
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()
            process.close()
        for pipe in self.pipes:
            pipe.close()
        self.processes, self.pipes = [], []

    def kill(self, rank: int) -> None:
        """SIGKILL to one rank."""
        self.killed = True
        self.processes[rank].kill()

    @contextlib.contextmanager
    def frozen(self, rank: int) -> Any:
        """SIGSTOP to one rank for a while."""
        pid = self.processes[rank].pid
        assert pid is not None
        os.kill(pid, signal.SIGSTOP)
        try:
            yield
        finally:
            os.kill(pid, signal.SIGCONT)

    def hold(self) -> None:
        """All ranks hold still after a commit, until they begin a new life: nothing is in flight."""
        self.board.words[0] += 1
        wanted = self.board.words[0]
        until(lambda: all(self.board.get(rank, _HELD) == wanted for rank in range(len(self.nodes))),
              f"ranks of {self.name} hold still", seconds=OWED_S)  # fmt: skip

    # --- truth ---

    def told_committed(self) -> int:
        """The newest step that any rank was ever told is committed, or the last restored one."""
        return max(self.committed, *(self.board.get(rank, _COMMITTED) for rank in range(len(self.nodes))))

    def step(self) -> int:
        """The step that the slowest rank has taken."""
        return min(self.board.get(rank, _STEP) for rank in range(len(self.nodes)))

    def refused(self) -> bool:
        """Whether a rank trains without protection."""
        return any(self.board.get(rank, _REFUSED) for rank in range(len(self.nodes)))

    def longest_stall_s(self) -> float:
        """The longest that a call held up a rank."""
        return max(self.board.get(rank, _STALLED_US) for rank in range(len(self.nodes))) / 1e6

    def forget_truth(self) -> None:
        """Nothing is committed."""
        self.committed = -1
        for rank in range(len(self.nodes)):
            self.board.put(rank, _COMMITTED, -1)

    def commits(self) -> None:
        """Wait until every rank was told of a commit newer than the restore."""
        since = self.told_committed()

        def look() -> bool:
            self.complain()
            return all(self.board.get(rank, _COMMITTED) > since for rank in range(len(self.nodes)))

        until(look, f"a commit of {self.name} after step {since}", seconds=OWED_S)

    def complain(self) -> None:
        """Fails if a rank's training ended though nobody killed one: a fault must not reach training."""
        for rank, pipe in enumerate(self.pipes):
            if not self.killed and pipe.poll():
                raise AssertionError(f"training of rank {rank} of {self.name} ended: {pipe.recv()}")

    def pids(self) -> dict[int, int]:
        """Rank -> process."""
        return {rank: process.pid for rank, process in enumerate(self.processes) if process.pid is not None}


# --- a rank ---


def live(pipe: Connection, place: Place) -> None:
    """A rank's process: one life after the other, each begun by a word."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", RuntimeWarning)  # that snapshots are skipped under faults is said, and fine
    board = Board(place.board, place.world)
    while True:
        gc.collect()
        _LIBC.malloc_trim(
            0
        )  # what the allocator keeps though nobody uses it, 40 MiB after some hundred steps, is no leak
        try:
            meet = pipe.recv()
        except EOFError:
            return
        try:
            if meet:
                _life(pipe, place, board, meet)
            else:
                pipe.send(("rests",))
        except Exception:  # noqa: BLE001  # told, and judged there
            pipe.send(("ended", traceback.format_exc()[-2000:]))


def _life(pipe: Connection, place: Place, board: Board, meet: str) -> None:
    if place.world > 1:
        os.environ.update(WORLD_SIZE=str(place.world), RANK=str(place.rank), GLOO_SOCKET_IFNAME="lo")
        dist.init_process_group("gloo", init_method=f"file://{meet}", rank=place.rank, world_size=place.world,
                                timeout=timedelta(seconds=_WORLD_S))  # fmt: skip
    state = torch.full((place.size,), -1, dtype=torch.int64)
    spare = torch.empty_like(state)
    snapshotter = Snapshotter({"state": state}, job=place.job, socket=place.socket, max_stall_s=MAX_STALL_S)
    try:
        try:
            found = snapshotter.restore()
        except NotRecoverableError as error:
            pipe.send(("lost", str(error)))
            return
        except HoldfastError as error:
            pipe.send(("failed", f"{type(error).__name__}: {error}"))
            return
        same = found is None or torch.equal(state, write_content(spare, place.job, found, place.rank))
        pipe.send(("restored", found, same))
        _train(snapshotter, pipe, place, board, state, first=0 if found is None else found + 1)
    finally:
        with contextlib.suppress(HoldfastError):
            snapshotter.__exit__(ValueError, ValueError("killed"), None)  # without a word, as a killed process


def _train(
    snapshotter: Snapshotter, pipe: Connection, place: Place, board: Board, state: torch.Tensor, *, first: int
) -> None:
    for step in itertools.count(first):
        held = torch.tensor(board.words[0])
        if place.world > 1:  # what the ranks of a real job do at each step; and all hold still at the same one
            dist.all_reduce(held, dist.ReduceOp.MAX)
        if pipe.poll():
            return
        if held.item() % 2:
            with contextlib.suppress(HoldfastError):
                snapshotter.wait(timeout_s=MAX_STALL_S)
            board.put(place.rank, _HELD, int(held.item()))
            while board.words[0] == held.item() and not pipe.poll():
                time.sleep(_PACE_S)
        started_s = time.monotonic()
        snapshotter.before_update()
        write_content(state, place.job, step, place.rank)
        snapshotter.step(step)
        stalled_us = int((time.monotonic() - started_s) * 1e6)
        stats = snapshotter.stats()
        committed = stats["committed_step"]
        board.put(place.rank, _STEP, step)
        board.put(place.rank, _STALLED_US, max(stalled_us, board.get(place.rank, _STALLED_US)))
        board.put(
            place.rank, _COMMITTED, max(-1 if committed is None else committed, board.get(place.rank, _COMMITTED))
        )
        board.put(place.rank, _REFUSED, stats["staged_step"] is None)
        time.sleep(_PACE_S)
