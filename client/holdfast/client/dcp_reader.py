"""A `StorageReader` of ``torch.distributed.checkpoint``: torch plans who needs which part, this reads those bytes.

Covers snapshots that a Snapshotter staged and those that `HoldfastWriter` wrote. What a snapshot holds is in
`catalogue`, how a part is read in `reading`.
"""

import io
import os
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any, Protocol, Self, TypeGuard, cast

import torch
import torch.distributed as dist
from holdfast.client.addresses import daemon_address
from holdfast.client.catalogue import Catalogue, ShardBytes, catalogue_of, read_heads, require
from holdfast.client.dcp_archive import CheckpointId, names_step, safe_archive, step_of
from holdfast.client.errors import NotRecoverableError, SupersededError
from holdfast.client.flatten import save_objects
from holdfast.client.ranges import Committed, RangeReader
from holdfast.client.reading import Wish, fulfil, whole_object, wishes
from holdfast.client.state_errors import RestoreMismatchError
from holdfast.protocol.ids import JOB_NAME, SnapshotId
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.storage import StorageReader
from torch.futures import Future

LOOKS_MAX = 5  # at snapshots that were freed while they were looked at


class Ranges(ShardBytes, Protocol):
    """What `RangeReader` offers, as far as it is used here."""

    def committed(self) -> Committed | None:
        """The newest committed snapshot, which is read from then on; None if there is none."""

    def close(self) -> None:
        """Let go of the daemon."""


class HoldfastReader(StorageReader):
    """Reads the newest committed snapshot of a job, for ``dcp.load``.

        dcp.load(state, storage_reader=HoldfastReader(job="tiny-gpt"))

    The state may be laid out over any number of ranks, in any way: each rank reads the byte ranges that it needs, its
    own node's from memory that the daemon holds, others' through it, also while nodes are missing. Reading begins no
    attempt and stops nothing: a training job may go on. It may also commit newer snapshots; then the one being read is
    freed, the read fails with the newer step's number, and `dcp.load` can be called again.

    Names are those of ``torch.distributed.checkpoint.state_dict.get_state_dict``: an optimizer's state is found both by
    parameter names and by numbers, and prefixes that DDP and ``torch.compile`` add don't matter. The names at the top
    must be those that the Snapshotter was given. Random generators are not among them (`Snapshotter.restore` brings
    them back). Of plain values that differ between ranks, the lowest rank's is read.

    Args:
        job: the job's name.
        socket: the daemon's Unix socket, as for `Snapshotter`.
        timeout_s: the longest wait for one answer of the daemon.
        allow_pickle: whether plain objects beyond torch's safe list may be read.

    Attributes:
        step: the step that was read last, None before.
    """

    def __init__(
        self,
        *,
        job: str,
        socket: str | os.PathLike[str] | None = None,
        timeout_s: float = 60.0,
        allow_pickle: bool = False,
    ) -> None:
        if not JOB_NAME.fullmatch(job):
            raise ValueError(f"job: expected letters, digits, '.', '_' and '-' (at most 64), found {job!r}")
        self._job, self._allow_pickle = job, allow_pickle
        path = daemon_address(socket, local_rank=int(os.environ.get("LOCAL_RANK", "0")))
        self._connect: Callable[[], Ranges] = lambda: RangeReader(job=job, socket=path, timeout_s=timeout_s)
        self._source: Ranges | None = None
        self._snapshot: SnapshotId | None = None
        self._found: Catalogue | None = None
        self._wanted_step: int | None = None
        self._rank = 0
        self.step: int | None = None

    # --- what torch calls, in this order ---

    def reset(self, checkpoint_id: CheckpointId = None) -> None:
        """Begin another load; a ``checkpoint_id`` names the step that must be the newest committed one."""
        self.close()
        self._wanted_step = None if checkpoint_id is None else step_of(checkpoint_id)

    # torch takes a parameter called kwargs for the promise of metadata of each rank's own, which would let some ranks
    # go on alone when one fails.
    def read_metadata(self, *_args: object, **_options: object) -> Metadata:
        """Find the newest committed snapshot and learn what it holds.

        Raises:
            NotRecoverableError: nothing is committed, or it can't be read.
            DaemonUnreachableError: no daemon answers.
            MalformedShardError: what was staged contradicts itself.
        """
        self._rank = dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
        found = self._open()
        names: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {
            name: _tensor_metadata(found, name) for name, tensor in found.tensors.items() if not tensor.problem
        }
        names.update((name, BytesStorageMetadata()) for name in [*found.objects, *found.archives])
        return Metadata(_Names(found, names), planner_data={name: found.paths.get(name, (name,)) for name in names})

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *_args: object, **kwargs: object) -> None:  # noqa: FBT001  # torch's
        """Learn this rank's number in the group that loads."""
        del metadata, is_coordinator
        rank = kwargs.get("rank")
        self._rank = rank if isinstance(rank, int) else self._rank

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """Tell the coordinator which snapshot this rank has found."""
        assert self._snapshot is not None
        plan.storage_data = (self._snapshot.attempt, self._snapshot.step)
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """On the coordinator: all ranks read the newest snapshot that any of them has found."""
        newest = max(plan.storage_data for plan in plans)
        for plan in plans:
            plan.storage_data = newest
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Read everything that the plan names. Blocking: the future is done when it is returned."""
        chosen = SnapshotId(*plan.storage_data)
        try:
            if self._source is None or self._snapshot != chosen:
                self._open()  # another rank found a newer one meanwhile
            if self._snapshot != chosen:
                raise NotRecoverableError(
                    f"the ranks agreed to read {chosen} of job {self._job!r}, and {self._snapshot} is what is "
                    "committed now: load again"
                )
            self._read_all(plan.items, planner)
        except SupersededError as error:
            raise NotRecoverableError(
                f"{chosen} of job {self._job!r} was freed while it was read: {error.newest} is committed now; load "
                "again, or pause the training that commits so fast"
            ) from error
        finally:
            self.close()
        self.step = chosen.step
        done: Future[None] = Future()
        done.set_result(None)
        return done

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Whether a step can be made out in it."""
        return names_step(checkpoint_id)

    # --- beside that ---

    def close(self) -> None:
        """Let go of the daemon. Called at the end of each load."""
        if self._source is not None:
            self._source.close()
        self._source = self._found = None

    def opened(self) -> tuple[Catalogue, ShardBytes]:
        """What `read_metadata` found, and where its bytes come from; until `close`."""
        assert self._found is not None
        assert self._source is not None
        return self._found, self._source

    @property
    def snapshot(self) -> SnapshotId | None:
        """What was found last."""
        return self._snapshot

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _open(self) -> Catalogue:
        self.close()
        source = self._connect()
        try:
            self._found = self._look(source)
        except Exception:
            source.close()
            raise
        self._source = source
        return self._found

    def _look(self, source: Ranges) -> Catalogue:
        """Find the newest snapshot and read its heads, again if a newer one is committed meanwhile."""
        for attempts_left in reversed(range(LOOKS_MAX)):
            committed = source.committed()
            if committed is None:
                raise NotRecoverableError(f"nothing of job {self._job!r} is committed; see 'holdfast status'")
            if self._wanted_step not in {None, committed.snapshot.step}:
                raise NotRecoverableError(
                    f"expected step {self._wanted_step} of job {self._job!r}, the newest committed one is "
                    f"{committed.snapshot.step}: only that is held"
                )
            try:
                found = catalogue_of(read_heads(source), allow_pickle=self._allow_pickle)
            except SupersededError as error:
                if not attempts_left:
                    raise NotRecoverableError(
                        f"job {self._job!r} commits faster than its snapshots' descriptions can be read; "
                        f"{error.newest} is the newest: load again, or pause the training"
                    ) from error
                continue
            self._snapshot = committed.snapshot
            return found
        raise AssertionError("the last look returns or raises")

    def _read_all(self, items: list[ReadItem], planner: LoadPlanner) -> None:
        assert self._source is not None
        wanted: list[Wish] = []
        targets: list[tuple[ReadItem, torch.Tensor]] = []
        for item in items:
            if item.type is LoadItemType.BYTE_IO:
                archive = self._archive(self._known(item), _live_value(planner, item.dest_index.fqn))
                planner.load_bytes(item, io.BytesIO(archive))
                continue
            target = planner.resolve_tensor(item)
            wanted += self._wishes(item, target)
            targets.append((item, target))
        fulfil(self._source, wanted)
        for item, target in targets:
            planner.commit_tensor(item, target)

    def _wishes(self, item: ReadItem, target: torch.Tensor) -> Iterator[Wish]:
        assert self._found is not None
        name = self._known(item)
        tensor = require(self._found, name)
        piece = tensor.pieces.get(tuple(item.storage_index.offset or ()))
        if piece is None:
            raise RestoreMismatchError(
                f"{name}: {self._snapshot} has no part at {item.storage_index.offset}: load again"
            )
        return wishes(piece, target, dtype=tensor.dtype, start=tuple(item.storage_offsets), role=self._rank)

    def _known(self, item: ReadItem) -> str:
        assert self._found is not None
        name = self._found.resolve(item.storage_index.fqn)
        if name is None:
            raise RestoreMismatchError(f"{item.storage_index.fqn}: not in {self._snapshot}: load again")
        return name

    def _archive(self, name: str, live: object) -> bytes:
        """A plain value as the archive that planners expect; whatever they do with it, it was made here."""
        assert self._found is not None
        if name in self._found.archives:
            return safe_archive(name, self._found.archives[name], allow_pickle=self._allow_pickle)
        assert self._source is not None
        value = whole_object(self._source, self._found, self._found.objects[name])
        if _is_strings(live) and isinstance(value, list):
            value = _parameter_names(self._found, name, value)
        return save_objects(value)


class _Names(dict[str, TensorStorageMetadata | BytesStorageMetadata]):
    """What the snapshot holds, by its own names; asked for other names of the same things, it answers, too."""

    def __init__(self, found: Catalogue, names: dict[str, TensorStorageMetadata | BytesStorageMetadata]) -> None:
        super().__init__(names)
        self._found = found

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and self._found.resolve(name) is not None

    def __missing__(self, name: str) -> TensorStorageMetadata | BytesStorageMetadata:
        known = self._found.resolve(name)
        if known is None:
            raise KeyError(name)
        if known in self._found.tensors:
            require(self._found, known)  # says why it can't be read
        return self[known]


def _tensor_metadata(found: Catalogue, name: str) -> TensorStorageMetadata:
    tensor = found.tensors[name]
    chunks = [ChunkStorageMetadata(torch.Size(p.offset), torch.Size(p.shape)) for p in tensor.pieces.values()]
    return TensorStorageMetadata(TensorProperties(dtype=getattr(torch, tensor.dtype)), torch.Size(tensor.shape), chunks)


def _live_value(planner: LoadPlanner, name: str) -> object:
    return cast("dict[str, object]", getattr(planner, "state_dict", {})).get(name)


def _is_strings(value: object) -> TypeGuard[list[str]]:
    return isinstance(value, list) and bool(value) and all(isinstance(one, str) for one in value)


def _parameter_names(found: Catalogue, name: str, numbers: list[Any]) -> list[Any]:
    """Parameters of an optimizer's group by name, as the state that asks has them, instead of by number."""
    names = next(_names_of(found, name), ())
    known = all(isinstance(number, int) and number < len(names) and names[number] for number in numbers)
    return [names[number] for number in numbers] if known else numbers


def _names_of(found: Catalogue, name: str) -> Iterator[tuple[str, ...]]:
    for head in found.heads:
        for top, names in head.manifest.parameters.items():
            if name.startswith(f"{top}.param_groups."):
                yield names
