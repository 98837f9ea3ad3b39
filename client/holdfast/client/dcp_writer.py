"""A `StorageWriter` of ``torch.distributed.checkpoint``: each rank's write items become its shard of one snapshot.

Covers what torch calls, and how the ranks agree on where their shards lie. A rank's bytes are a `Parcel`; to get a slot
and to seal it is the work of the `Stager`, as for every other snapshot.
"""

import os
from dataclasses import dataclass, field
from time import monotonic
from typing import Any, cast

import msgspec
import torch.distributed as dist
from holdfast.client.addresses import Address, daemon_address
from holdfast.client.agreement import Places, places_of, shard_places
from holdfast.client.capture import Capture
from holdfast.client.dcp_archive import CheckpointId, names_step, step_of
from holdfast.client.errors import (
    CommitTimeoutError,
    HoldfastError,
    NotRecoverableError,
    RanksDisagreeError,
    SnapshotSkippedError,
)
from holdfast.client.parcel import Parcel
from holdfast.client.ranks import Ranks
from holdfast.client.session import RankPlan
from holdfast.client.stager import Stager
from holdfast.protocol import limits
from holdfast.protocol.ids import JOB_NAME, SnapshotId
from holdfast.protocol.layout import Layout
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import StorageWriter, WriteResult
from torch.futures import Future

ATTACH_S = 10.0  # a daemon that is just being started or restarted is waited for
ASK_S = 60.0  # the cluster's answer which attempt begins; it hears all nodes within seconds
SLOT_S = 60.0  # a slot is free once the snapshot before the last is committed


class HoldfastWriter(StorageWriter):
    """Writes what ``dcp.save`` and ``dcp.async_save`` give into the memory of the job's nodes, protected by parity.

        writer = HoldfastWriter(job="tiny-gpt-dcp")
        dcp.save(state, storage_writer=writer)                      # returns when the snapshot is committed
        dcp.save(state, checkpoint_id="step-100", storage_writer=writer)

    A save is one snapshot: committed for all ranks or for none, and readable by `HoldfastReader` in any other layout.
    The newest one is kept. Its step is the last number of ``checkpoint_id``, else one more than the last. Keep one
    writer for all saves: it stays attached, and a save of the same sizes needs no new memory. A job of a Snapshotter
    must have another name.

    All ranks save together. ``use_collectives=False`` and ``no_dist=True`` on more than one rank are refused.

    Args:
        job: the job's name.
        socket: the daemon's Unix socket, as for `Snapshotter`.
        process_group: the one that is given to ``dcp.save``.
        commit_timeout_s: how long a save waits for its commit.
        allow_pickle: whether objects beyond torch's safe list may be written; the reader needs it, too.
    """

    def __init__(
        self,
        *,
        job: str,
        socket: str | os.PathLike[str] | None = None,
        process_group: dist.ProcessGroup | None = None,
        commit_timeout_s: float = 120.0,
        allow_pickle: bool = False,
    ) -> None:
        if not JOB_NAME.fullmatch(job):
            raise ValueError(f"job: expected letters, digits, '.', '_' and '-' (at most 64), found {job!r}")
        self._job, self._socket, self._group = job, socket, process_group
        self._commit_timeout_s, self._allow_pickle = commit_timeout_s, allow_pickle
        self._checkpoint_id: CheckpointId = None
        self._snapshot: SnapshotId | None = None

    # --- what torch calls, in this order ---

    def reset(self, checkpoint_id: CheckpointId = None) -> None:
        """Begin another save."""
        if checkpoint_id is not None:
            step_of(checkpoint_id)
        self._checkpoint_id = checkpoint_id

    def storage_meta(self) -> StorageMeta | None:
        """The checkpoint's id."""
        return StorageMeta(checkpoint_id=self._checkpoint_id)

    def set_up_storage_writer(self, is_coordinator: bool, *_args: object, **kwargs: object) -> None:  # noqa: FBT001  # torch's
        """Refuse what would leave out ranks."""
        ranks = Ranks(self._group)
        if ranks.world_size > 1 and kwargs.get("use_collectives") is False:
            raise HoldfastError("use_collectives=False: expected all ranks to save one snapshot together; leave it out")
        if kwargs.get("rank", ranks.rank) != ranks.rank:
            raise HoldfastError(
                f"torch saves as rank {kwargs['rank']}, this is rank {ranks.rank} of {ranks.world_size}: give "
                "HoldfastWriter the process_group that dcp.save is given, and no no_dist=True"
            )

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Nothing to add."""
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """On the coordinator: all ranks must be there."""
        world_size = Ranks(self._group).world_size
        if len(plans) != world_size:
            raise HoldfastError(
                f"expected the plans of {world_size} ranks, found {len(plans)}: give HoldfastWriter the process_group "
                "that dcp.save is given, and no no_dist=True"
            )
        return plans

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Stage this rank's part and seal it. Blocking: the future is done when it is returned.

        Raises:
            HoldfastError: nothing is staged; the text says why, with the daemon's own words.
            StateError: an item can't be written.
        """
        line = _line_of(self._job, self._socket, Ranks(self._group))
        step = None if self._checkpoint_id is None else step_of(self._checkpoint_id)
        self._checkpoint_id = None  # torch says a new one only if there is one
        parcel: Parcel | None = None
        failure: Exception | None = None
        try:
            parcel = Parcel(plan, planner, rank=line.ranks.rank, allow_pickle=self._allow_pickle)
        except Exception as error:  # noqa: BLE001  # the other ranks must hear of it; raised again below
            failure = error
        try:
            self._snapshot = line.stage(parcel, step=step, problem="" if failure is None else str(failure))
        except HoldfastError as error:
            raise (failure or error) from error
        assert parcel is not None
        results = [
            WriteResult(item.index, size, storage_data=line.ranks.rank)
            for item, size in zip(plan.items, parcel.sizes, strict=True)
        ]
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """On the coordinator: return once the snapshot is committed.

        Raises:
            CommitTimeoutError: it isn't in time.
            SnapshotSkippedError: it was given up and can't commit any more.
        """
        del metadata, results
        assert self._snapshot is not None
        line = _line_of(self._job, self._socket, Ranks(self._group))
        line.wait(self._snapshot, timeout_s=self._commit_timeout_s)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Whether a step can be made out in it."""
        return names_step(checkpoint_id)

    # --- beside that ---

    def close(self) -> None:
        """Let go of the daemon; the last snapshot stays held. A later save attaches again."""
        line = _lines.pop((self._job, str(self._socket)), None)
        if line is not None:
            line.close()


class _Offer(msgspec.Struct):
    """What one rank tells the others before it stages."""

    job: str
    places: Places = ()
    shard_bytes: int = 0
    attempt: int = 0
    epoch: int = 0  # in which the attempt began
    step: int = 0
    version: int = 0
    planned: bool = False  # its daemon has accepted the last plan
    problem: str = ""


@dataclass(slots=True)
class _Line:
    """This process's line to the daemon for one job, kept over all saves and writers of that job."""

    job: str
    path: Address
    ranks: Ranks
    stager: Stager = field(init=False)
    plan: RankPlan | None = None
    last_step: int = -1

    def __post_init__(self) -> None:
        self.stager = Stager(self.path, max_stall_s=SLOT_S)

    def stage(self, parcel: Parcel | None, *, step: int | None, problem: str) -> SnapshotId:
        """Agree with the other ranks and stage. A collective; every rank of a failed agreement raises."""
        offers = self._exchange(self._offer(parcel, step=step, problem=problem))
        lead = offers[0]
        shards, away = shard_places([(offer.places, offer.shard_bytes) for offer in offers], lead.epoch)
        if away:
            raise HoldfastError(away)
        known = self.plan
        same = known is not None and known.layout.shards == shards and known.attempt == lead.attempt
        if not same or not all(offer.planned for offer in offers):
            layout = Layout(shards, first_step=0, every=1, version=1 + max(offer.version for offer in offers))
            self._agree(RankPlan(self.job, lead.attempt, self.ranks.rank, layout, lead.epoch))
        snapshot = SnapshotId(lead.attempt, lead.step)
        self.last_step = lead.step
        capture = cast("Capture", parcel)  # it has what the staging thread asks of one
        self.stager.submit(lambda: self.stager.stage(snapshot, capture, monotonic() + SLOT_S)).result()
        return snapshot

    def _offer(self, parcel: Parcel | None, *, step: int | None, problem: str) -> _Offer:
        offer = _Offer(self.job, problem=problem)
        if parcel is None:
            return offer
        offer.shard_bytes = parcel.shard_bytes
        try:
            offer.places = places_of(self.stager.submit(lambda: self.stager.attach_within(ATTACH_S)).result())
            offer.planned = self.plan is not None and self.stager.standing.attached
            offer.version = 0 if self.plan is None else self.plan.layout.version
            if self.ranks.rank == 0:
                offer.step = self.last_step + 1 if step is None else step
                offer.attempt, offer.epoch = self._attempt(offer.step)
        except HoldfastError as error:
            offer.problem = str(error)
        return offer

    def _attempt(self, step: int) -> tuple[int, int]:
        """The attempt under which a step can be staged, and its epoch: steps only go forward within one."""
        if self.plan is not None and step > self.last_step:
            return self.plan.attempt, self.plan.epoch
        deadline_s = monotonic() + ASK_S
        answer = self.stager.submit(
            lambda: self.stager.ask_restore(self.job, begin_fresh=True, deadline_s=deadline_s)
        ).result()
        if answer.problem:
            raise NotRecoverableError(f"{answer.problem}; to give it up: holdfast forget {self.job}")
        return answer.attempt, answer.epoch

    def _agree(self, plan: RankPlan) -> None:
        offer = _Offer(self.job)
        try:
            deadline_s = monotonic() + limits.ALLOCATE_DEADLINE_S
            self.stager.submit(lambda: self.stager.say_plan(plan, deadline_s=deadline_s)).result()
        except HoldfastError as error:
            offer.problem = str(error)
        self.plan = None
        self._exchange(offer)
        self.plan = plan

    def _exchange(self, offer: _Offer) -> list[_Offer]:
        offer.problem = offer.problem[: limits.TEXT_CHARS_MAX]
        offers = [
            msgspec.msgpack.decode(raw, type=_Offer) for raw in self.ranks.exchange(msgspec.msgpack.encode(offer))
        ]
        others = sorted({other.job for other in offers} - {self.job})
        if others:
            raise RanksDisagreeError(f"rank {self.ranks.rank} saves for job {self.job!r}, others for {others}")
        problems = [f"rank {rank}: {other.problem}" for rank, other in enumerate(offers) if other.problem]
        if problems:
            raise HoldfastError("; ".join(problems[:4]))
        return offers

    def wait(self, snapshot: SnapshotId, *, timeout_s: float) -> None:
        """Block until a snapshot is committed."""
        stager, deadline_s = self.stager, monotonic() + timeout_s
        with stager.changed:
            while stager.standing.committed is None or stager.standing.committed < snapshot:
                if stager.standing.given_up == snapshot:
                    raise SnapshotSkippedError(f"{snapshot} can't commit: {stager.standing.given_up_reason}")
                left_s = deadline_s - monotonic()
                if left_s <= 0:
                    why = stager.standing.problem or f"newest committed: {stager.standing.committed}"
                    raise CommitTimeoutError(f"{snapshot} is not committed after {timeout_s} s ({why})")
                stager.changed.wait(left_s)

    def close(self) -> None:
        """Say goodbye."""
        if self.stager.standing.attached:
            self.stager.submit(self.stager.leave).result()
        self.stager.stop(timeout_s=ATTACH_S)


# By (job, socket). Of the process, not of a writer: torch's process mode makes a new writer for every save.
_lines: dict[tuple[str, str], _Line] = {}


def _line_of(job: str, socket: Any, ranks: Ranks) -> _Line:  # noqa: ANN401  # a path or None
    key = (job, str(socket))
    line = _lines.get(key)
    if line is None:
        line = _lines[key] = _Line(job, daemon_address(socket, local_rank=ranks.local_rank), ranks)
    line.ranks = ranks
    return line
