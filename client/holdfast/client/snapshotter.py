"""The step hook: what a training loop calls. See `Snapshotter`.

Covers the training thread's side: who the ranks are, which steps are staged, how long training may be held up, and
what a fault does to it (it costs protection, loudly, and never the run). What waits for the daemon is in `Stager`, how
training waits for copies in `underway`; what a rank's state is, as bytes, is in `shard` and `restore`.
"""

import contextlib
import logging
import os
import warnings
import weakref
from collections.abc import Iterable, Mapping
from concurrent.futures import TimeoutError as FutureTimeoutError
from concurrent.futures import wait as wait_for
from time import monotonic
from types import TracebackType
from typing import Any, Literal, Self

import torch
import torch.distributed as dist
from holdfast.client.addresses import daemon_address
from holdfast.client.agreement import Part, Proposal, disagreement, exchange, places_of, shard_places
from holdfast.client.arguments import check_arguments, is_settled
from holdfast.client.capture import Capture
from holdfast.client.elsewhere import Elsewhere
from holdfast.client.errors import (
    CommitTimeoutError,
    DaemonUnreachableError,
    HoldfastError,
    NotRecoverableError,
    SnapshotSkippedError,
)
from holdfast.client.laps import Laps
from holdfast.client.own_shard import OwnShard
from holdfast.client.ranks import Ranks
from holdfast.client.replicas import Claim, contested
from holdfast.client.session import RankPlan
from holdfast.client.shard import ShardLayout
from holdfast.client.stager import Marks, Stager
from holdfast.client.stalls import Stalls
from holdfast.client.state_errors import LayoutChangedError, RestoreMismatchError, ShardError
from holdfast.client.underway import Staging, Underway
from holdfast.client.updates import before_updates, weakly
from holdfast.protocol import limits, messages
from holdfast.protocol.cadence import is_due
from holdfast.protocol.ids import SnapshotId
from holdfast.protocol.layout import Layout

log = logging.getLogger("holdfast")

ASK_PATIENCE_S = 60.0  # the cluster's answer what to restore; it hears all nodes within seconds
PLAN_RETRY_STEPS = 50  # steps without protection before the ranks try again to agree on a plan
CLOSE_WAIT_S = 60.0  # for the last snapshot to commit
_MESSAGES_MAX = 1 << 20  # bytes of one rank's part in an exchange


class Snapshotter:
    """Keeps a job's state safe in the memory of its nodes, and brings it back.

    Args:
        state: names to anything with `state_dict`/`load_state_dict`, or to a tensor. Held by reference; its bytes are
            read between `step()` and the next update.
        job: the job's name: letters, digits, '.', '_' and '-', at most 64. Jobs of one cluster don't see each other.
        every: steps between two snapshots, equal on all ranks.
        socket: the daemon's Unix socket; default $HOLDFAST_SOCKET, /run/holdfast/holdfast.sock, then
            $XDG_RUNTIME_DIR/holdfast/holdfast.sock. Where none can be reached: "tcp://host:port", its trainers.address.
            A comma-separated list gives each local rank its own.
        process_group: the ranks of the job; default the default group, or this process alone.
        max_stall_s: the longest that one call holds up training.
        on_error: "warn": a fault costs protection and is said once; "raise": it is raised at the next call (for tests).
        stage: "lazy": parameters and optimizer state are copied in the background until the next update; "blocking":
            `step()` returns when all bytes are copied.
        allow_pickle: whether plain objects beyond torch's safe list may be restored.
        replicated: "auto": of what torch promises to be equal on several ranks (parameters under DDP, their state in
            torch's own optimizers, `Replicate` placements of DTensors), each stages a part, and `restore` has them
            exchange the parts; the DDP module, where `state` holds only what is in it: the same; "none": every rank
            stages all it has. Equal on all ranks.

    `restore`, the first `step` and a `step` after a change of layout are collectives: all ranks call them together.
    `restore` also has memory made for the snapshots to come where the state is complete by then; where the optimizer
    has yet to make its first step, the first `step` has to wait for that.
    """

    def __init__(  # noqa: PLR0913  # the public surface; all but the state are keywords
        self,
        state: Mapping[str, object],
        *,
        job: str,
        every: int = 1,
        socket: str | os.PathLike[str] | None = None,
        process_group: dist.ProcessGroup | None = None,
        max_stall_s: float = 10.0,
        on_error: Literal["warn", "raise"] = "warn",
        stage: Literal["lazy", "blocking"] = "lazy",
        allow_pickle: bool = False,
        replicated: Literal["auto", "none"] | torch.nn.Module = "auto",
    ) -> None:
        check_arguments(job, every, on_error, stage, replicated)
        self._state, self._job, self._every = state, job, every
        self._max_stall_s, self._strict, self._blocking = max_stall_s, on_error == "raise", stage == "blocking"
        self._allow_pickle, self._cut = allow_pickle, replicated != "none"
        self._wrapper = replicated if isinstance(replicated, torch.nn.Module) else None
        self._ranks = Ranks(process_group)
        self._path = daemon_address(socket, local_rank=self._ranks.local_rank)
        self._stager = Stager(self._path, max_stall_s=max_stall_s)
        self._patience_s = max_stall_s
        self._attempt: int | None = None
        self._layout: ShardLayout | None = None
        self._plan: RankPlan | None = None
        self._proposal: Proposal | None = None  # what the first step will accept
        self._epoch = self._next_plan_step = self._versions = 0
        self._stalls = Stalls()
        self._underway = Underway(self._stalls, max_stall_s=max_stall_s)
        self._staged: SnapshotId | None = None
        self._skipped = self._staged_bytes = 0
        self._restore_s: dict[str, float] = {}
        self._said: set[str] = set()
        self._closed = self._began = False
        self._hooks = [
            before_updates(item, weakly(self.before_update))
            for item in state.values()
            if isinstance(item, torch.optim.Optimizer)
        ]
        self._dropped = weakref.finalize(self, self._stager.drop, self._hooks)
        self._dropped.atexit = False

    # --- restore ---

    def restore(self) -> int | None:
        """Bring the newest committed snapshot back into the live state. A collective.

        Where memory holds none that can be had, the newest durable copy takes its place, if the cluster makes any.

        Returns:
            The step restored, or None: nothing is committed yet, or no daemon runs anywhere (said once).

        Raises:
            NotRecoverableError: something is committed, and it, or a part of it, can't be restored.
            RestoreMismatchError: the live state does not fit the snapshot; nothing live was changed.

        The world size, the sharding and the nodes on which ranks run may differ from those of the snapshot: then each
        rank reads the parts that it needs from all of them. What is no tensor comes back as it was while the world size
        is the same; else every rank gets rank 0's, and random generators of ranks that were not there are seeded anew.
        """
        self._restore_s = {}
        clock = Laps(self._restore_s)
        mine = self._ask(begin_fresh=False)
        parts = exchange(self._ranks, mine, "restore")
        clock.lap("ask")
        lead = parts[0]
        problems = [f"rank {rank}: {part.problem}" for rank, part in enumerate(parts) if part.problem]
        if lead.copies:
            return self._restore_copy(lead, clock)
        if lead.fatal:
            raise NotRecoverableError(lead.problem)
        if lead.snapshot is None:
            self._attempt, self._epoch = lead.attempt or None, lead.epoch
            if self._attempt is not None and all(part.settled for part in parts):
                self._plan_early(0, wait=True)
            if problems:
                self._fault(DaemonUnreachableError("training runs on, unprotected: " + "; ".join(problems[:4])))
            return None
        if problems:
            raise NotRecoverableError(
                f"{lead.snapshot} is committed, but not every rank can reach its daemon: " + "; ".join(problems[:4])
            )
        self._attempt, self._epoch = lead.attempt, lead.epoch
        here = lead.lies_here(self._ranks.rank, self._ranks.world_size, mine.places)
        own = OwnShard(self._state, self._job, self._ranks, self._stager, clock, self._allow_pickle)
        failure = own.bring(lead.snapshot, lead.held_attempt, lead.held_epoch) if here else None
        if not here or isinstance(failure, RestoreMismatchError):  # nothing was changed; it may fit in another layout
            failure = self._elsewhere().restore(lead.snapshot, say=self._say)
            clock.lap("ranges")
        claims = self._restored(str(lead.snapshot), failure, own.claims())
        if any(claims):  # some have only a part of what they share with others, and all know it
            if contested(claims):  # not all of them are here: a node changed, or a live state
                own.drop()
                failure = self._elsewhere().restore(lead.snapshot, say=self._say) if claims[self._ranks.rank] else None
                clock.lap("ranges")
            else:
                failure = own.complete(lenient=not self._cut, say=self._say)
            self._restored(str(lead.snapshot), failure, ())
        clock.lap("agree")
        self._plan_early(lead.snapshot.step + 1)
        return lead.snapshot.step

    def _elsewhere(self) -> Elsewhere:
        pickled, lenient = self._allow_pickle, not self._cut
        return Elsewhere(self._state, self._job, self._path, self._ranks, allow_pickle=pickled, lenient=lenient)

    def _restore_copy(self, lead: Part, clock: Laps) -> int:
        """Memory has nothing to begin from, or what it has was tried too often: begin from a durable copy."""
        self._attempt, self._epoch = lead.attempt or None, lead.epoch
        elsewhere = self._elsewhere()
        copy, step = elsewhere.restore_copies(lead.copies, say=self._say)
        clock.lap("durable")
        self._plan_early(step + 1)
        why = lead.problem or (f"{lead.snapshot} was tried too often" if lead.snapshot else "memory holds nothing")
        self._say(f"restored from the durable copy of step {step} in {copy}, without random generators: {why}")
        return step

    def _restored(self, what: str, failure: Exception | None, claims: tuple[Claim, ...]) -> list[tuple[Claim, ...]]:
        """Agree that every rank has what it can have by itself; what each lacks, by rank. A collective."""
        mine = Part(self._job, problem=str(failure) if failure else "", claims=claims)
        done = exchange(self._ranks, mine, "done")
        if failure is not None:
            raise failure
        failed = [f"rank {rank}: {part.problem}" for rank, part in enumerate(done) if part.problem]
        if failed:
            raise NotRecoverableError(f"{what} could not be restored on every rank: " + "; ".join(failed[:4]))
        return [part.claims for part in done]

    def _ask(self, *, begin_fresh: bool) -> Part:
        """Attach; role 0 also asks the cluster what to restore."""
        part = Part(self._job, settled=is_settled(self._state))
        try:
            welcome = self._attach()
            part.places = places_of(welcome)
            if self._ranks.rank == 0:
                deadline_s = monotonic() + ASK_PATIENCE_S
                answer = self._stager.submit(
                    lambda: self._stager.ask_restore(self._job, begin_fresh=begin_fresh, deadline_s=deadline_s)
                ).result()
                part.take(answer)
                if answer.warning:
                    self._say(answer.warning)
                if not begin_fresh and (text := part.offer(answer)):
                    self._say(text)
        except HoldfastError as error:
            part.problem = str(error)
        return part

    def _attach(self) -> messages.Welcome:
        """Meet the daemon. One that is just being started or restarted is waited for, but only once."""
        patience_s, self._patience_s = self._patience_s, 0.0
        welcome = self._stager.submit(lambda: self._stager.attach_within(patience_s)).result()
        self._patience_s = self._max_stall_s
        return welcome

    # --- staging ---

    def step(self, step: int) -> None:
        """Tell that `step` is done: its snapshot is staged in the background. Call it after the scheduler's step."""
        self._stalls.begin(step=True)
        try:
            self._step(step)
        finally:
            self._stalls.end()

    def _step(self, step: int) -> None:
        if self._closed:
            raise HoldfastError("this Snapshotter is closed; make a new one")
        self._tell(self._underway.let_change())
        self._tell(self._underway.make_room())
        if self._plan is None and not self._make_plan(step):
            return
        assert self._plan is not None
        first, self._began = not self._began, True
        due = is_due(step, self._plan.layout, self._stager.cadences(self._plan.attempt))
        if not due and not (first and not self._plan.layout.is_due(step) and self._make_plan(step)):
            return  # the first step of all is always due: a plan made at the restore could not know its number
        with self._stalls.part("capture"):
            capture = self._capture(step)
        if capture is None:
            return
        if self._attempt is None:
            return
        with self._stalls.part("enqueue"):
            self._stage(step, capture)
        if self._blocking:
            self._tell(self._underway.end_all())

    def _stage(self, step: int, capture: Capture) -> None:
        """Hand a snapshot to the staging thread."""
        plan, layout = self._plan, self._layout
        assert plan is not None
        assert layout is not None
        snapshot = SnapshotId(plan.attempt, step)
        deadline_s = monotonic() + self._max_stall_s
        self._staged, self._staged_bytes = snapshot, layout.shard_bytes
        marks, stall_ns = Marks(), int(self._stalls.take_untold_s() * 1e9)
        ended = self._stager.submit(lambda: self._stager.stage(snapshot, capture, deadline_s, marks, stall_ns=stall_ns))
        self._underway.add(Staging(snapshot, capture, marks, ended))

    def _capture(self, step: int) -> Capture | None:
        assert self._layout is not None
        try:
            return self._layout.capture()
        except LayoutChangedError as error:
            # Every rank walks the same kind of model, so a change is seen by all of them at the same step; a rank that
            # alone sees one would wait in the exchange, which the process group's own timeout bounds.
            self._say(f"the state's layout changed ({error}); a new plan is made")
            if not self._make_plan(step):
                return None
            return self._layout.capture()
        except ShardError as error:
            self._tell([error])
            return None

    def before_update(self) -> None:
        """Returns when the state may change again. The optimizers' step pre-hook calls it."""
        self._stalls.begin(step=False)
        try:
            self._tell(self._underway.let_change())
        finally:
            self._stalls.end()

    # --- the plan ---

    def _make_plan(self, step: int) -> bool:
        """Agree with the other ranks on who stages what, from `step` on. A collective; tells whether it worked."""
        if step < self._next_plan_step:
            return False
        with self._stalls.part("plan"):
            proposal, self._proposal = self._proposal or self._propose(step), None
            return proposal is not None and self._accept(step, proposal)

    def _propose(self, step: int) -> Proposal | None:
        """Agree on a plan, and have the daemons make memory for it; None if that failed, and it was said why."""
        part = Part(self._job) if self._attempt is not None else self._ask(begin_fresh=True)
        part.every, part.step, part.version = self._every, step, self._versions + 1
        layout = self._lay_out(part, cut=self._cut)
        parts = exchange(self._ranks, part, "plan")
        problem = disagreement(parts)
        if not problem and (unequal := contested([p.claims for p in parts])):
            self._say(f"{', '.join(unequal)}: not equal on all replicas, so each of them stages everything")
            layout = self._lay_out(part, cut=False)
            parts = exchange(self._ranks, part, "plan")
            problem = disagreement(parts)
        if self._attempt is None:
            self._attempt, self._epoch = parts[0].attempt or None, parts[0].epoch
        places, away = shard_places([(p.places, p.shard_bytes) for p in parts], self._epoch)
        problem = problem or away
        if problem or self._attempt is None or layout is None:
            self._unprotected(step, problem or "no attempt was begun")
            return None
        self._versions = max(p.version for p in parts)
        agreed = Layout(
            shards=places,
            first_step=max(p.step for p in parts),
            every=self._every,
            version=self._versions,
        )
        plan = RankPlan(self._job, self._attempt, self._ranks.rank, agreed, self._epoch)
        deadline_s = monotonic() + limits.ALLOCATE_DEADLINE_S
        return Proposal(plan, layout, self._stager.submit(lambda: self._stager.say_plan(plan, deadline_s=deadline_s)))

    def _lay_out(self, part: Part, *, cut: bool) -> ShardLayout | None:
        """This rank's layout, which `part` tells the others; None, and why in `part`, if there is none."""
        try:
            ranks, wrapper = (self._ranks, self._wrapper) if cut else (None, None)
            layout = ShardLayout.build(self._state, allow_pickle=self._allow_pickle, ranks=ranks, wrapper=wrapper)
            self._stager.use_gpu(layout.devices[0] if layout.devices else None)
            part.places, part.shard_bytes = places_of(self._attach()), layout.shard_bytes
            part.claims = layout.claims()
        except (HoldfastError, ShardError) as error:
            part.problem = part.problem or str(error)
            return None
        return layout

    def _accept(self, step: int, proposal: Proposal) -> bool:
        """Wait until all ranks have their memory."""
        failure = ""
        try:
            proposal.ready.result()
        except HoldfastError as error:
            failure = str(error)
        accepted = exchange(self._ranks, Part(self._job, problem=failure), "done")
        if problem := disagreement(accepted):
            self._unprotected(step, problem)
            return False
        self._plan, self._layout = proposal.plan, proposal.layout
        return True

    def _plan_early(self, step: int, *, wait: bool = False) -> None:
        """Have memory made now or while training begins. The first `step` needs it, and asks again if it is refused."""
        with contextlib.suppress(DaemonUnreachableError):
            self._proposal = self._propose(step)
        if wait and self._proposal is not None:
            wait_for([self._proposal.ready])
        self._next_plan_step = 0

    def _unprotected(self, step: int, problem: str) -> None:
        self._plan = None
        self._next_plan_step = step + PLAN_RETRY_STEPS
        self._fault(DaemonUnreachableError(f"training runs on, unprotected: {problem}"))

    # --- what users ask ---

    def wait(self, step: int | None = None, *, timeout_s: float = 60.0) -> None:
        """Block until `step` (default: the last one staged) is committed.

        Raises:
            CommitTimeoutError: it isn't within `timeout_s`.
            SnapshotSkippedError: it was skipped or given up and can't commit any more.
        """
        self._tell(self._underway.end_all())
        wanted = self._staged if step is None else SnapshotId(self._attempt or 0, step)
        if wanted is None:
            return
        deadline_s = monotonic() + timeout_s
        stager = self._stager
        with stager.changed:
            while stager.standing.committed is None or stager.standing.committed < wanted:
                given_up = stager.standing.given_up
                if given_up == wanted:
                    raise SnapshotSkippedError(f"{wanted} can't commit: {stager.standing.given_up_reason}")
                left_s = deadline_s - monotonic()
                if left_s <= 0:
                    why = stager.standing.problem or f"newest committed: {stager.standing.committed}"
                    raise CommitTimeoutError(f"{wanted} is not committed after {timeout_s} s ({why})")
                stager.changed.wait(left_s)

    def stats(self) -> dict[str, Any]:
        """Where this rank's snapshots stand.

        Keys: `staged_step`, `sealed_step`, `protected_step`, `committed_step` (steps or None), `stall_s` (`last` and
        `total` seconds that training was held up), `stall_parts_s` (the same by what it waited for: `slot`, the staging
        thread and the daemon's room; `copy`, a snapshot under way; `plan`, the ranks' agreement and its memory;
        `capture`, the look at the state and what is copied at once; `enqueue`, the hand-over to the staging thread;
        `other`, the rest: they add up to `stall_s`), `staged_bytes` (of one snapshot of this rank), `skipped` (count),
        `restore_s` (seconds of the last restore by phase: `ask` the cluster, `open` the shard, which verifies or
        rebuilds it, `copy` it into the live state, `gather` what lies with replicas, `agree` with the other ranks;
        empty before), `attached`, `transport` (of bytes to the daemon: "shared memory" or "zeromq"; empty before),
        `problem` (why protection does not work now, or empty).
        """
        standing = self._stager.standing
        return {
            "staged_step": self._staged.step if self._staged is not None else None,
            "sealed_step": standing.sealed_step,
            "protected_step": standing.protected_step,
            "committed_step": standing.committed.step if standing.committed is not None else None,
            "stall_s": {"last": self._stalls.last_s, "total": self._stalls.total_s},
            "stall_parts_s": self._stalls.parts(),
            "staged_bytes": self._staged_bytes,
            "skipped": self._skipped,
            "restore_s": dict(self._restore_s),
            "attached": standing.attached,
            "transport": standing.transport,
            "problem": standing.problem,
        }

    def close(self) -> None:
        """Wait for the last snapshot to commit, then let go of the daemon. Safe to call twice."""
        if self._closed:
            return
        try:
            if self._stager.standing.attached:
                self.wait(timeout_s=CLOSE_WAIT_S)
        except HoldfastError as error:
            self._fault(error)
        finally:
            self._release()

    def _release(self) -> None:
        self._closed = True
        self._dropped.detach()
        for hook in self._hooks:
            hook.remove()
        stall_ns = int(self._stalls.take_untold_s() * 1e9)
        with contextlib.suppress(HoldfastError, FutureTimeoutError):  # the daemon sees the connection end anyway
            self._stager.submit(lambda: self._stager.leave(stall_ns=stall_ns)).result(timeout=1.0)
        self._stager.stop(timeout_s=self._max_stall_s)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
        elif not self._closed:
            self._release()  # an exception in the loop: don't hold it up for a commit

    # --- faults ---

    def _tell(self, skipped: Iterable[Exception]) -> None:
        """Snapshots came to nothing: count them, and tell why."""
        errors = list(skipped)
        self._skipped += len(errors)
        for error in errors:
            self._fault(error)

    def _fault(self, error: Exception) -> None:
        if self._strict:
            raise error
        self._say(str(error))

    def _say(self, text: str) -> None:
        """Say a fault once per kind of text; numbers (steps, seconds) don't make a new kind."""
        kind = "".join(character for character in text if not character.isdigit())
        if kind not in self._said and len(self._said) < 64:
            self._said.add(kind)
            warnings.warn(f"holdfast: rank {self._ranks.rank}: {text}", RuntimeWarning, stacklevel=4)
