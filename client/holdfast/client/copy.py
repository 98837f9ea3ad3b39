"""One durable copy of a job: run by the daemon as ``python -m holdfast.client.copy``, since it must not import torch.

Covers writing the newest committed step aside, giving it its name once it is synced, and removing the oldest copies.
"""

import argparse
import ctypes
import os
import shutil
import signal
import sys
import time
from pathlib import Path

from holdfast.client import object_copies
from holdfast.client.copies import aside, place, thin, write_digests
from holdfast.client.export import Exported, clean_on_failure, sync_directory, told, write_newest
from holdfast.client.objects import is_url
from holdfast.client.ranges import RangeReader
from holdfast.protocol.exit_codes import ExitCode, OperatorError

_SET_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of linux/prctl.h


def copy(*, job: str, root: Path | str, keep: int, node: str, socket: Path | None = None) -> Exported:
    """Copy the newest committed step of a job.

    Args:
        job: its name.
        root: the directory of all durable copies, or the URL of a place in an object store.
        keep: how many copies of this job stay.
        node: who writes; two nodes that write at once don't meet.
        socket: of any node's daemon.

    Raises:
        OperatorError: the directory can't be written; what was there stays.
        HoldfastError: nothing is committed, or its bytes can't be had.
        ShardError: the state is one that only its own layout can read.
    """
    if isinstance(root, str) and is_url(root):
        return _copy_to_objects(job=job, place=root, keep=keep, node=node, socket=socket)
    root = Path(root)
    started_s = time.monotonic()
    part: Path | None = None
    try:
        (root / job).mkdir(parents=True, exist_ok=True)
        part = aside(root, job, node=node)
        with RangeReader(job=job, socket=socket) as source:
            step, attempt = write_newest(source, part, job=job, step=None)
        with write_digests(part).open("rb") as listed:
            os.fsync(listed.fileno())
        sync_directory(part)
        to = place(root, job, step=step)
        part.rename(to)
        sync_directory(to.parent)
        thin(root, job, keep=keep)
        size_bytes = sum(path.stat().st_size for path in to.rglob("*") if path.is_file())
    except OSError as error:
        raise OperatorError(
            ExitCode.USAGE, f"{root} can't be written: {error}; free room there or set durable.dir to another place"
        ) from error
    finally:
        if part is not None:
            shutil.rmtree(part, ignore_errors=True)
    return Exported(job, step, attempt, str(to), size_bytes, time.monotonic() - started_s)


def _copy_to_objects(*, job: str, place: str, keep: int, node: str, socket: Path | None) -> Exported:
    started_s = time.monotonic()
    try:
        with RangeReader(job=job, socket=socket) as source:
            folder = object_copies.next_folder(place, job, node=node)
            with clean_on_failure(folder):
                step, attempt = write_newest(source, folder, job=job, step=None)
                size_bytes = object_copies.finish(folder, step=step)
        object_copies.thin(place, job, keep=keep)
    except OSError as error:
        raise OperatorError(
            ExitCode.USAGE,
            f"{place} can't be written: {error}; give the daemons credentials and an endpoint for it in their "
            "environment, or set durable.dir to another place",
        ) from error
    return Exported(job, step, attempt, str(folder), size_bytes, time.monotonic() - started_s)


def main() -> int:
    """Entry point."""
    ctypes.CDLL(None).prctl(_SET_DEATH_SIGNAL, signal.SIGKILL)  # the daemon that wants the copy is gone: so is this
    parser = argparse.ArgumentParser(prog="holdfast.client.copy")
    parser.add_argument("--job", required=True)
    parser.add_argument("--root", required=True)
    parser.add_argument("--keep", type=int, required=True)
    parser.add_argument("--node", required=True)
    parser.add_argument("--socket", type=Path, required=True)
    wanted = parser.parse_args()
    return told(
        lambda: copy(job=wanted.job, root=wanted.root, keep=wanted.keep, node=wanted.node, socket=wanted.socket)
    )


if __name__ == "__main__":
    sys.exit(main())
