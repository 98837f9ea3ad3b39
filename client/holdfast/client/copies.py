"""Durable copies of a job in a directory: their names, which one is newest, what is left over and goes.

Covers folders and names only. A copy is ``ROOT/JOB/copy-NUMBER-step-STEP``: it got that name when it was whole. Numbers
grow from copy to copy, so they tell the order also where a job's steps began anew. What begins with a dot is not whole.
"""

import re
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from holdfast.protocol.messages import RestoreAnswer

NAME = re.compile(r"copy-(\d{1,18})-step-(\d{1,18})")
METADATA = ".metadata"  # torch writes it last
LEFT_OVER_S = 2 * 3600.0  # what nobody has added a file to for so long is being written by nobody any more


@dataclass(frozen=True, slots=True, order=True)
class Copy:
    """One whole copy."""

    number: int
    step: int
    path: Path


def copies(root: Path, job: str) -> list[Copy]:
    """The whole copies of a job, the oldest first.

    Raises:
        OSError: the directory is there and can't be read.
    """
    folder = root / job
    if not folder.is_dir():
        return []
    found = []
    for path in folder.iterdir():
        named = NAME.fullmatch(path.name)
        if named is not None and (path / METADATA).is_file():
            found.append(Copy(int(named[1]), int(named[2]), path))
    return sorted(found)


def place(root: Path, job: str, *, step: int) -> Path:
    """Where the next copy goes."""
    number = max((copy.number for copy in copies(root, job)), default=0) + 1
    return root / job / f"copy-{number:06d}-step-{step}"


def aside(root: Path, job: str, *, node: str) -> Path:
    """Where a node writes what is not whole yet; an earlier try of the same node is removed."""
    path = root / job / f".{node}.part"
    shutil.rmtree(path, ignore_errors=True)
    return path


def thin(root: Path, job: str, *, keep: int) -> None:
    """Remove all but the newest copies, and what dead writers left. A copy loses its name before its content."""
    folder = root / job
    for copy in copies(root, job)[:-keep]:
        copy.path.rename(folder / f".{copy.path.name}.old")
    now_s = time.time()  # noqa: TID251  # compared with the times of files
    for path in folder.glob(".*"):
        if path.suffix == ".old" or (path.suffix == ".part" and now_s - path.stat().st_mtime > LEFT_OVER_S):
            shutil.rmtree(path, ignore_errors=True)


def choose(answer: RestoreAnswer) -> Copy | None:
    """The copy to begin from, if memory has nothing that can be restored, or what it has was tried too often.

    Raises:
        OSError: the directory can't be read.
    """
    if not answer.durable_dir:
        return None
    found = copies(Path(answer.durable_dir), answer.job)
    if answer.snapshot is not None and not answer.problem:
        found = [copy for copy in found if copy.step < answer.snapshot.step] if answer.use_older else []
    return found[-1] if found else None
