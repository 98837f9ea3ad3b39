"""Worlds of ranks with a gloo process group, started fast: torch is imported once, each rank is a fork of that.

Covers starting, bounding and ending them. What a rank does is a function of a module that can be imported.
"""

import multiprocessing
import os
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch.distributed as dist

WORLD_S = 90.0  # a world's whole life; takes a tenth of it on idle cores
PRELOADED = ["torch.distributed.fsdp", "torch.distributed.checkpoint.state_dict", "holdfast.client.dcp", "worlds"]

Work = Callable[..., Any]  # (rank, world_size, *arguments) -> something that pickles


def run_world(work: Work, world_size: int, meet: Path, *arguments: object, seconds: float = WORLD_S) -> list[Any]:
    """Run `work` on every rank of a world; what each returned. Fails with the text of whoever failed."""
    with _environment(OMP_NUM_THREADS="1", GLOO_SOCKET_IFNAME="lo"):
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        pipes, processes = [], []
        for rank in range(world_size):
            mine, theirs = context.Pipe(duplex=False)
            process = context.Process(target=_rank, args=(theirs, work, rank, world_size, meet, arguments), daemon=True)
            process.start()
            theirs.close()
            pipes.append(mine)
            processes.append(process)
    try:
        answers = []
        for rank, pipe in enumerate(pipes):
            assert pipe.poll(seconds), f"rank {rank} gave no answer within {seconds} s"
            answers.append(pipe.recv())
        for rank, (text, _) in enumerate(answers):
            assert not text, f"rank {rank}: {text}"
        return [result for _, result in answers]
    finally:
        for process in processes:
            process.kill()
            process.join()
        for pipe in pipes:
            pipe.close()


def _rank(pipe: Connection, work: Work, rank: int, world_size: int, meet: Path, arguments: tuple[object, ...]) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    try:
        dist.init_process_group(
            "gloo", init_method=f"file://{meet}", rank=rank, world_size=world_size, timeout=timedelta(seconds=60)
        )
        pipe.send(("", work(rank, world_size, *arguments)))
        dist.barrier()  # nobody's end is a failure of another's last collective
    except BaseException:  # noqa: BLE001  # told to the test
        pipe.send((traceback.format_exc(), None))


@contextmanager
def _environment(**variables: str) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
