"""A committed step as a directory that ``torch.distributed.checkpoint`` reads, with no Holdfast installed.

Run as ``python -m holdfast.client.export`` by `holdfast export`, which must not import torch. Bytes are read through
any node's daemon, also while nodes are missing: all at once where that fits in an eighth of the free memory, else
tensor by tensor, so that at most one is in memory at a time. Names are those that ``dcp.save`` of the same state gives.
The directory is written aside, synced and renamed: whole or not there.

Random generators and what else each rank has of its own under one name are not part of such a checkpoint: of plain
values that differ between ranks, the lowest rank's is written.
"""

import argparse
import io
import json
import os
import shutil
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from holdfast.client.catalogue import Catalogue, ShardBytes, catalogue_of, read_heads, require
from holdfast.client.errors import HoldfastError, NotRecoverableError, RefusedError, SupersededError
from holdfast.client.fetched import Fetched, fetched
from holdfast.client.object_checkpoints import ObjectWriter
from holdfast.client.objects import ObjectFolder, Objects, is_url
from holdfast.client.ranges import RangeReader
from holdfast.client.reading import read_box, whole_object
from holdfast.client.state_errors import ShardError
from holdfast.client.witnesses import acceptance, unequal
from holdfast.protocol.exit_codes import ExitCode, OperatorError
from torch.distributed.checkpoint._nested_dict import unflatten_state_dict
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.planner import WriteItem, WriteItemType
from torch.distributed.checkpoint.state_dict_saver import save

SUPERSEDED_TRIES_MAX = 5  # a newer step was committed while one was read: that one is freed, so the newer one is taken
UNEQUAL_NAMED = 5  # tensors named in the note whose replicas differed
NOTE = "holdfast.json"  # beside torch's files, which its reader does not look at


@dataclass(frozen=True, slots=True)
class Exported:
    """What was written."""

    job: str
    step: int
    attempt: int
    directory: str
    size_bytes: int
    seconds: float


def export(*, job: str, to: Path | str, step: int | None = None, socket: Path | None = None) -> Exported:
    """Write the newest committed step of a job.

    Args:
        job: its name.
        to: the directory to make, or the URL of a place in an object store; it must not exist, or be empty.
        step: the step that it must be; None: whatever is newest.
        socket: of any node's daemon.

    Raises:
        OperatorError: `to` is taken or can't be written.
        HoldfastError: nothing is committed, another step is, or its bytes can't be had.
        ShardError: the state is one that only its own layout can read; the text says why.
    """
    if isinstance(to, str) and is_url(to):
        return _export_objects(to, job=job, step=step, socket=socket)
    to = Path(to)
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise OperatorError(ExitCode.USAGE, f"--to: expected a new or empty directory, {to} is taken; name another one")
    aside = to.with_name(f".{to.name}.{os.getpid()}.part")
    started_s = time.monotonic()
    try:
        to.parent.mkdir(parents=True, exist_ok=True)
        with RangeReader(job=job, socket=socket) as source:
            found_step, attempt = write_newest(source, aside, job=job, step=step)
        sync_directory(aside)
        aside.rename(to)
        sync_directory(to.parent)
    except OSError as error:
        raise OperatorError(ExitCode.USAGE, f"{to} can't be written: {error}; free room or name another one") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    size_bytes = sum(path.stat().st_size for path in to.rglob("*") if path.is_file())
    return Exported(job, found_step, attempt, str(to), size_bytes, time.monotonic() - started_s)


def _export_objects(url: str, *, job: str, step: int | None, socket: Path | None) -> Exported:
    """The same into an object store, where torch's table comes last: without it nobody reads the rest."""
    started_s = time.monotonic()
    try:
        folder = ObjectFolder(Objects(url), "")
        if folder.files():
            raise OperatorError(ExitCode.USAGE, f"--to: expected no object there yet, {url} is taken; name another one")
        with clean_on_failure(folder), RangeReader(job=job, socket=socket) as source:
            found_step, attempt = write_newest(source, folder, job=job, step=step)
    except OSError as error:
        raise OperatorError(ExitCode.USAGE, f"{url} can't be written: {error}") from error
    size_bytes = sum(size for _, size in folder.written.values())
    return Exported(job, found_step, attempt, url, size_bytes, time.monotonic() - started_s)


@contextmanager
def clean_on_failure(folder: ObjectFolder) -> Iterator[None]:
    """Remove what was written if it does not become whole; where even that fails, what is left is not whole either."""
    try:
        yield
    except BaseException:
        with suppress(OSError):
            folder.clear()
        raise


def write_newest(source: RangeReader, aside: Path | ObjectFolder, *, job: str, step: int | None) -> tuple[int, int]:
    """Write what is committed now; begin anew with the newer one if it is superseded meanwhile."""
    for tries_left in reversed(range(SUPERSEDED_TRIES_MAX)):
        committed = source.committed()
        if committed is None:
            raise NotRecoverableError(f"job {job}: nothing is committed; is --job right? 'holdfast status' lists jobs")
        snapshot = committed.snapshot
        if step is not None and snapshot.step != step:
            raise NotRecoverableError(
                f"job {job}: expected step {step}, found step {snapshot.step} committed: memory holds only the newest"
            )
        try:
            write_checkpoint(
                fetched(source), aside, note={"job": job, "step": snapshot.step, "attempt": snapshot.attempt}
            )
        except SupersededError:
            if isinstance(aside, Path):
                shutil.rmtree(aside, ignore_errors=True)
            else:
                aside.clear()
            if not tries_left:
                raise
        else:
            return snapshot.step, snapshot.attempt
    raise AssertionError("the last try returns or raises")


def write_checkpoint(source: ShardBytes, directory: Path | ObjectFolder, *, note: dict[str, Any]) -> None:
    """Write all that a snapshot holds into a new directory, or as new objects.

    Args:
        source: the snapshot's bytes.
        directory: is made.
        note: what to say of it in `NOTE`.

    Raises:
        ShardError: a tensor can't be put together from its parts.
        HoldfastError: bytes can't be had.
        OSError: the directory can't be written.
    """
    heads = read_heads(source)
    found = catalogue_of(heads)
    if isinstance(source, Fetched) and (differed := unequal(heads, source.read)):
        warnings.warn(f"holdfast: {acceptance(differed)}", RuntimeWarning, stacklevel=2)
        note = {**note, "unequal_replicas": differed[:UNEQUAL_NAMED]}
    flat: dict[str, Any] = {name: _shape_only(found, name) for name in found.tensors}
    flat |= {name: _Later(name) for name in (*found.objects, *found.archives)}
    paths = {name: found.paths.get(name, (name,)) for name in flat}
    state = unflatten_state_dict(flat, paths)
    writer = (
        FileSystemWriter(directory, thread_count=1, sync_files=True)
        if isinstance(directory, Path)
        else ObjectWriter(directory)
    )
    try:
        save(state, storage_writer=writer, planner=_Reading(source, found), no_dist=True)
    except CheckpointException as error:  # torch's wrapping of what went wrong on a rank
        for cause in error.failures.values():
            if isinstance(cause[0], HoldfastError | ShardError | OSError):
                raise cause[0] from error
        raise
    text = json.dumps({"schema": "holdfast.export/1", **note}) + "\n"
    if not isinstance(directory, Path):
        directory.put(NOTE, text.encode())
        return
    with (directory / NOTE).open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


@dataclass(frozen=True, slots=True)
class _Later:
    """Stands for a plain value until it is written."""

    name: str


def _shape_only(found: Catalogue, name: str) -> torch.Tensor:
    tensor = require(found, name)
    return torch.empty(tensor.shape, dtype=getattr(torch, tensor.dtype), device="meta")


class _Reading(DefaultSavePlanner):
    """Torch's own planner, which gets the bytes of a tensor when they are about to be written."""

    def __init__(self, source: ShardBytes, found: Catalogue) -> None:
        super().__init__()
        self._source, self._found = source, found

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor | io.BytesIO:
        """The whole tensor or the bytes of the plain value that an item of the plan names."""
        name = write_item.index.fqn
        if write_item.type is not WriteItemType.BYTE_IO:
            return self._tensor(name)
        if name in self._found.archives:
            return io.BytesIO(self._found.archives[name])
        written = io.BytesIO()
        torch.save(whole_object(self._source, self._found, self._found.objects[name]), written)
        return written

    def _tensor(self, name: str) -> torch.Tensor:
        saved = require(self._found, name)
        whole = torch.empty(saved.shape, dtype=getattr(torch, saved.dtype))
        for offset, piece in saved.pieces.items():
            part = whole
            for dim, (at, length) in enumerate(zip(offset, piece.shape, strict=True)):
                part = part.narrow(dim, at, length)
            read_box(self._source, piece, part, dtype=saved.dtype, start=(0,) * whole.dim(), role=0)
        return whole


def sync_directory(directory: Path) -> None:
    """Make the names in a directory survive a loss of power."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def main() -> int:
    """Entry point of `holdfast export`."""
    parser = argparse.ArgumentParser(prog="holdfast.client.export")
    parser.add_argument("--job", required=True)
    parser.add_argument("--to", required=True)
    parser.add_argument("--socket", type=Path)
    parser.add_argument("--step", type=int)
    arguments = parser.parse_args()
    return told(lambda: export(job=arguments.job, to=arguments.to, step=arguments.step, socket=arguments.socket))


def told(work: Callable[[], Exported]) -> int:
    """Do it: one JSON object on stdout, or a sentence on stderr and the exit code of `holdfast export`."""
    try:
        done = work()
    except OperatorError as error:
        code, text = error.exit_code, str(error)
    except NotRecoverableError as error:
        code, text = ExitCode.NOT_RECOVERABLE, str(error)
    except RefusedError as error:
        code, text = ExitCode(error.exit_code or ExitCode.UNREACHABLE), str(error)
    except SupersededError as error:
        code = ExitCode.NOT_RECOVERABLE
        text = f"{error}; steps are committed faster than one is read: raise `every`, or export between two runs"
    except ShardError as error:
        code, text = ExitCode.NOT_RECOVERABLE, str(error)
    except HoldfastError as error:
        code, text = ExitCode.UNREACHABLE, str(error)
    else:
        sys.stdout.write(json.dumps(asdict(done)) + "\n")
        return int(ExitCode.DONE)
    sys.stderr.write(f"holdfast: {text}\n")
    return int(code)


if __name__ == "__main__":
    sys.exit(main())
