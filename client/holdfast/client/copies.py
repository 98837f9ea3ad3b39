"""Durable copies of a job in a directory: their names, which one is newest, what is left over and goes.

Covers folders and names only. A copy is ``ROOT/JOB/copy-NUMBER-step-STEP``: it got that name when it was whole. Numbers
grow from copy to copy, so they tell the order also where a job's steps began anew. What begins with a dot is not whole.
Each copy has a list of its files' sizes and digests, since torch reads a file with a flipped bit without a word.
"""

import mmap
import re
import shutil
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from holdfast.coding import chunk_digest

NAME = re.compile(r"copy-(\d{1,18})-step-(\d{1,18})")
METADATA = ".metadata"  # torch writes it last
DIGESTS = "holdfast.digests"  # a line per file: digest, bytes, name
LEFT_OVER_S = 2 * 3600.0  # what nobody has added a file to for so long is being written by nobody any more


@dataclass(frozen=True, slots=True, order=True)
class Copy:
    """One whole copy."""

    number: int
    step: int
    path: Path

    @property
    def place(self) -> str:
        """Where it is."""
        return str(self.path)


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


def write_digests(directory: Path) -> Path:
    """List the files of a checkpoint with what is in them. Returns the list's path."""
    names = sorted(path.name for path in directory.iterdir() if path.is_file() and path.name != DIGESTS)
    found = ((name, _digest(directory / name), (directory / name).stat().st_size) for name in names)
    (directory / DIGESTS).write_text(digest_lines(found), encoding="utf-8")
    return directory / DIGESTS


def digest_lines(files: Iterable[tuple[str, int, int]]) -> str:
    """The list of a checkpoint's files, of (name, digest, bytes)."""
    return "".join(f"{digest:016x} {size_bytes} {name}\n" for name, digest, size_bytes in sorted(files))


def damage(directory: Path, *, part: int = 0, parts: int = 1) -> str:
    """What is wrong with a copy: a file that is gone, or not what was written. Empty if nothing is.

    Args:
        directory: the copy. One of before there were lists passes.
        part: which share of its files to read, of `parts`: ranks read a copy together.
        parts: shares.
    """
    listed = directory / DIGESTS
    try:
        lines = listed.read_text(encoding="utf-8").splitlines() if listed.exists() else []
        for line in lines[part::parts]:
            digest, size_bytes, name = line.split(" ", 2)
            found_bytes = (directory / name).stat().st_size
            if found_bytes != int(size_bytes):
                return f"{name}: expected {size_bytes} bytes, found {found_bytes}"
            found = f"{_digest(directory / name):016x}"
            if found != digest:
                return f"{name}: expected digest {digest}, found {found}"
    except (OSError, ValueError) as error:
        return str(error)
    return ""


def _digest(path: Path) -> int:
    if path.stat().st_size == 0:
        return chunk_digest(b"")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return chunk_digest(content)
