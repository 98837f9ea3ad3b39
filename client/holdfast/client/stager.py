"""The background thread of a rank: owns the link to the daemon, copies shards into the arena, listens for commits.

Covers everything that waits for the daemon, so that the training thread never does but in the named places (`restore`,
`wait`, `close`, and `before_update` while bytes are being copied). A daemon that goes away is met again by itself.
"""

import contextlib
import logging
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from time import monotonic
from typing import TypeVar

import torch
from holdfast.client.addresses import Address, connect
from holdfast.client.capture import Capture
from holdfast.client.cuda_lane import RegisteredMemory
from holdfast.client.errors import DaemonUnreachableError, RefusedError, SnapshotSkippedError
from holdfast.client.link import Link, LinkLostError
from holdfast.client.meeting import Meeting
from holdfast.client.session import ProtocolMismatchError, RankPlan
from holdfast.client.state_errors import ShardError
from holdfast.protocol import limits, messages
from holdfast.protocol.cadence import Cadence
from holdfast.protocol.ids import SnapshotId
from torch.utils.hooks import RemovableHandle

log = logging.getLogger("holdfast")

T = TypeVar("T")
_IDLE_S = 0.2  # how long the thread waits for messages before it looks for new work; new work wakes it at once
_REATTACH_S = 0.5  # between two tries to meet a daemon that went away
_SEAL_S = 5.0  # a seal is answered by progress at once; longer means that the daemon hangs, and its deadline will tell


@dataclass(slots=True)
class Standing:
    """Where this rank's snapshots stand; written by the thread, read by anybody."""

    attached: bool = False
    transport: str = ""  # how bytes travel to the daemon that was met last
    sealed_step: int | None = None
    protected_step: int | None = None
    committed: SnapshotId | None = None
    given_up: SnapshotId | None = None
    given_up_reason: str = ""
    problem: str = ""  # why protection is not working now; empty while it works


@dataclass(frozen=True, slots=True)
class Marks:
    """How far the staging of one snapshot has come, for those who wait for it."""

    granted: "Future[float]" = field(default_factory=Future)  # when the slot was there, by `monotonic`
    copied: "Future[bool]" = field(default_factory=Future)  # nothing live is read any more; whether bytes are yet to go
    started: "Future[None]" = field(default_factory=Future)  # the host has done its part of the copy, or never will


class Stager:
    """One thread, one link."""

    def __init__(self, path: Address, *, max_stall_s: float) -> None:
        self._path, self._max_stall_s = path, max_stall_s
        self._link: Link | None = None
        self._plan: RankPlan | None = None
        self._cadences: dict[int, tuple[Cadence, ...]] = {}  # by attempt, as the last daemon left them
        self._gpu: torch.device | None = None
        self._registered: dict[tuple[int, int], RegisteredMemory] = {}  # by slot and generation
        self._tasks: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._wake_lock = threading.Lock()  # so that nobody writes to the descriptor once the thread has closed it
        self._stopping = self._ended = False
        self._retry_s = 0.0
        self._meeting: Meeting | None = None
        self.standing = Standing()
        self.changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="holdfast-stager", daemon=True)
        self._thread.start()

    # --- for the training thread ---

    def submit(self, work: Callable[[], T]) -> "Future[T]":
        """Have `work` run on the thread; its result or error is in the future."""
        future: Future[T] = Future()

        def task() -> None:
            try:
                future.set_result(work())
            except BaseException as error:  # noqa: BLE001  # handed to whoever waits for the future
                future.set_exception(error)

        self._put(task)
        return future

    def _put(self, task: Callable[[], None]) -> None:
        self._tasks.put(task)
        with self._wake_lock:
            if not self._ended:
                os.eventfd_write(self._wake_fd, 1)

    def stop(self, *, timeout_s: float) -> None:
        """End the thread and close the link."""
        self._stopping = True
        self._put(lambda: None)
        self._thread.join(timeout_s)

    def drop(self, hooks: list[RemovableHandle]) -> None:
        """Nobody closed the Snapshotter and it is gone: end, wait for nothing. Any thread, this one's own too."""
        for hook in hooks:
            hook.remove()
        with contextlib.suppress(RuntimeError):  # a thread can't join itself
            self.stop(timeout_s=0.0)

    def cadences(self, attempt: int) -> tuple[Cadence, ...]:
        """What was announced for the plans of an attempt. It holds while no daemon is attached: others follow it."""
        link = self._link
        return (link.session.cadences if link is not None else self._cadences).get(attempt, ())

    # --- the thread ---

    def _run(self) -> None:
        while not self._stopping:
            try:
                self._tasks.get_nowait()()
                self._note_progress()  # which came while it worked: there may be work all the time
                continue
            except Empty:
                pass
            self._listen()
        self._drop_meeting()
        self._let_go()
        with self._wake_lock:
            self._ended = True
            os.close(self._wake_fd)

    def _listen(self) -> None:
        if self._link is None:
            if self._plan is not None and monotonic() >= self._retry_s:
                self._meet_again()
            if self._link is None:
                with contextlib.suppress(Empty):
                    self._tasks.put(self._tasks.get(timeout=_IDLE_S))
                return
        try:
            self._link.pump(_IDLE_S)
            self._note_progress()
        except LinkLostError as error:
            self._lost(error)

    def _let_go(self) -> None:
        """Close the link and give up its memory. Nothing writes into it: this thread has waited for all copies."""
        if self._link is not None:
            self._cadences = self._link.session.cadences
            self._link.close()
            self._link = None
        while self._registered:
            self._registered.popitem()[1].close()

    def _lost(self, error: Exception) -> None:
        if self._link is not None:  # else steps that find no link would put the next try off for ever
            self._retry_s = monotonic() + _REATTACH_S
        self._let_go()
        with self.changed:
            self.standing.attached, self.standing.problem = False, str(error)
            self.changed.notify_all()

    def _meet_again(self) -> None:
        try:
            self._meeting = self._meeting or Meeting(self._connect)
            link = self._meeting.outcome()
            if link is None:
                return
            self._meeting = None
            self._attached(link)
            assert self._plan is not None
            self.say_plan(self._plan, deadline_s=monotonic() + limits.ALLOCATE_DEADLINE_S)
        except (DaemonUnreachableError, RefusedError) as error:
            self._meeting = None
            self._retry_s = monotonic() + _REATTACH_S
            self._lost(error)

    def _note_progress(self) -> None:
        progress = self._link.session.progress if self._link is not None else None
        if progress is None:
            return
        attempt = self._plan.attempt if self._plan is not None else None

        def step(snapshot: SnapshotId | None) -> int | None:
            return snapshot.step if snapshot is not None and snapshot.attempt == attempt else None

        with self.changed:
            standing = self.standing
            standing.sealed_step = _newer(standing.sealed_step, step(progress.sealed))
            standing.protected_step = _newer(standing.protected_step, step(progress.protected))
            standing.committed = progress.committed
            standing.given_up, standing.given_up_reason = progress.given_up, progress.reason
            self.changed.notify_all()

    # --- work, on the thread ---

    def attach(self) -> messages.Welcome:
        """Connect, if not connected."""
        return (self._link or self._attached(self._connect())).session.welcome

    def _connect(self) -> Link:
        try:
            return connect(self._path, wake_fd=self._wake_fd, cadences=self._cadences)
        except ProtocolMismatchError as error:
            raise RefusedError(str(error), exit_code=5) from error

    def _drop_meeting(self) -> None:
        if self._meeting is not None:
            self._meeting.drop()
            self._meeting = None

    def _attached(self, link: Link) -> Link:
        self._drop_meeting()
        self._link = link
        with self.changed:
            self.standing.attached, self.standing.problem, self.standing.transport = True, "", link.transport
        return link

    def attach_within(self, seconds: float) -> messages.Welcome:
        """Connect; a daemon that is just being started or restarted is waited for."""
        deadline_s = monotonic() + seconds
        while True:
            try:
                return self.attach()
            except DaemonUnreachableError:
                if monotonic() >= deadline_s or self._stopping:
                    raise
                threading.Event().wait(min(0.1, max(0.0, deadline_s - monotonic())))

    @property
    def link(self) -> Link:
        """The live link; LinkLostError if there is none."""
        if self._link is None:
            raise LinkLostError(self.standing.problem or f"not attached to the daemon on {self._path}")
        return self._link

    def ask_restore(self, job: str, *, begin_fresh: bool, deadline_s: float) -> messages.RestoreAnswer:
        """Ask the cluster what to restore; begins a new attempt. Repeats the question if the answer is lost."""
        session = self.link.session
        while True:
            session.ask("AskRestore")
            self.link.send(messages.AskRestore(job, begin_fresh))
            again_s = min(deadline_s, monotonic() + 2 * limits.HEAR_ALL_S + limits.JOIN_S)
            self._until(lambda: session.restore_answer is not None or "AskRestore" in session.denied, again_s)
            if session.restore_answer is not None:
                return session.restore_answer
            if monotonic() >= deadline_s:
                raise DaemonUnreachableError(
                    f"the daemon on {self._path} did not learn from the cluster what to restore; see 'holdfast status'"
                )

    def open_shard(self, request: messages.OpenShard, *, patience_s: float) -> tuple[messages.ShardOpened, memoryview]:
        """Have the shard verified or its digests told, rebuilt if needed, and its slot's memory mapped.

        `patience_s` bounds the wait for progress.
        """
        while True:
            session = self.link.session
            session.ask("OpenShard")
            self.link.send(request)
            if not self._await_shard(patience_s):
                raise DaemonUnreachableError(f"no progress on the shard of role {request.role} for {patience_s} s")
            denied = session.denied.get("OpenShard")
            if denied is not None and denied.retry:
                threading.Event().wait(0.2)
                patience_s -= 0.2
                if patience_s > 0:
                    continue
            if denied is not None:
                raise RefusedError(denied.text, exit_code=denied.exit_code, retry=denied.retry)
            opened = session.opened
            assert opened is not None
            view = self._mapped(opened.job, opened.slot, opened.generation)
            self.link.bring((opened.job, opened.slot, opened.generation), *opened.bytes_read)
            return opened, view.toreadonly()

    def _await_shard(self, patience_s: float) -> bool:
        session = self.link.session
        seen, deadline_s = "", monotonic() + patience_s

        def moved() -> bool:
            return session.opened is not None or "OpenShard" in session.denied or session.pending_text != seen

        while session.opened is None and "OpenShard" not in session.denied:
            self._until(moved, deadline_s)
            if session.pending_text != seen:
                seen, deadline_s = session.pending_text, monotonic() + patience_s
            elif monotonic() >= deadline_s:
                return False
        return True

    def close_shard(self, opened: messages.ShardOpened) -> None:
        """The shard was copied out."""
        self.link.send(messages.CloseShard(opened.job, opened.snapshot, opened.role))

    def say_plan(self, plan: RankPlan, *, deadline_s: float) -> None:
        """Tell the daemon this rank's place; returns when memory is ready."""
        session = self.link.session
        while True:
            session.ask("Plan")
            self.link.send(messages.Plan(plan.job, plan.attempt, plan.role, plan.layout, plan.epoch))
            self._until(lambda: session.accepted is not None or "Plan" in session.denied, deadline_s)
            if session.accepted is not None:
                self._plan, session.plan = plan, plan
                self._register(self.link, plan.job)
                with self.changed:
                    self.standing.problem = ""
                return
            denied = session.denied.get("Plan")
            if denied is not None and denied.retry and monotonic() < deadline_s and not self._stopping:
                threading.Event().wait(0.2)
                continue
            if denied is not None:
                raise RefusedError(denied.text, exit_code=denied.exit_code, retry=denied.retry)
            raise DaemonUnreachableError(f"the daemon on {self._path} did not make memory ready in time")

    def stage(
        self,
        snapshot: SnapshotId,
        capture: Capture,
        deadline_s: float,
        marks: Marks | None = None,
        *,
        stall_ns: int | None = None,
    ) -> None:
        """Get a slot, copy the shard into it, seal.

        Args:
            snapshot: its name.
            capture: the shard.
            deadline_s: until when a slot is waited for.
            marks: set on the way.
            stall_ns: how long training was held up since the last snapshot, for the daemon's histogram.

        Raises:
            SnapshotSkippedError: the snapshot is skipped; the text says why.
        """
        plan, marks = self._plan, marks or Marks()
        try:
            link = self.link
            session = link.session
            if plan is None or session.accepted is None or session.plan is not plan:
                raise LinkLostError(self.standing.problem or "the plan is not accepted yet")
            held_ns = 0
            if link.transport != Link.transport:  # this thread was busy with sending the one before
                held_ns = max(0, int((monotonic() - deadline_s + self._max_stall_s) * 1e9))
            link.send(messages.Begin(plan.job, snapshot, plan.role, stall_ns, held_ns))
            self._stage(link, plan, snapshot, capture, deadline_s, marks)
        except LinkLostError as error:
            self._lost(error)
            raise SnapshotSkippedError(f"{snapshot} is skipped: {error}") from error
        finally:
            if not marks.started.done():
                marks.started.set_result(None)
            if not marks.copied.done():
                marks.copied.set_result(False)

    def _stage(  # one snapshot's whole story
        self,
        link: Link,
        plan: RankPlan,
        snapshot: SnapshotId,
        capture: Capture,
        deadline_s: float,
        marks: Marks,
    ) -> None:
        session = link.session

        def answered() -> bool:
            return snapshot in session.granted or snapshot in session.refused

        if not link.until(answered, deadline_s=deadline_s):
            what = (
                "no slot was free" if link.transport == Link.transport else "no slot was free, or no room on the way,"
            )
            self._skip(link, plan, snapshot, f"{what} within {self._max_stall_s} s")
        if snapshot not in session.granted:
            raise SnapshotSkippedError(f"{snapshot} is skipped: {session.refused[snapshot]}")
        granted = session.granted[snapshot]
        assert session.accepted is not None
        view = self._memory(plan.job, granted.slot, granted.generation)
        start = session.accepted.offset_bytes
        marks.granted.set_result(monotonic())
        problem = _copy(capture, view[start : start + session.accepted.shard_bytes], marks.started)
        if problem:
            self._skip(link, plan, snapshot, problem)
        if link.transport != Link.transport:
            marks.copied.set_result(True)
        place = (plan.job, granted.slot, granted.generation)
        end = start + session.accepted.shard_bytes
        link.ship(place, start, end, wanted=lambda: snapshot not in session.refused)
        link.send(messages.Seal(plan.job, snapshot, plan.role))
        with self.changed:
            self.standing.sealed_step = _newer(self.standing.sealed_step, snapshot.step)
            self.changed.notify_all()

    def _skip(self, link: Link, plan: RankPlan, snapshot: SnapshotId, reason: str) -> None:
        link.send(messages.Skip(plan.job, snapshot, plan.role, reason[: limits.TEXT_CHARS_MAX]))
        raise SnapshotSkippedError(f"{snapshot} is skipped: {reason}")

    def leave(self, *, stall_ns: int | None = None) -> None:
        """Say goodbye, and what `stage` could not tell any more."""
        if self._plan is not None and self._link is not None:
            self._link.send(messages.Leave(self._plan.job, self._plan.role, stall_ns))
            self._plan = None

    def _memory(self, job: str, slot: int, generation: int) -> memoryview:
        view = self._mapped(job, slot, generation)
        self._register(self.link, job)
        return view

    def _mapped(self, job: str, slot: int, generation: int) -> memoryview:
        deadline_s = monotonic() + _SEAL_S
        link = self.link
        if not link.until(lambda: link.memory(job, slot, generation) is not None, deadline_s=deadline_s):
            raise LinkLostError(f"the daemon on {self._path} named memory that it did not hand over")
        view = link.memory(job, slot, generation)
        assert view is not None
        return view

    def use_gpu(self, gpu: torch.device | None) -> None:
        """Have memory registered with CUDA, so that `gpu` copies to and from it by itself. None: no GPU takes part."""
        self._gpu = gpu

    def _register(self, link: Link, job: str) -> None:
        """Make ready what was mapped since the last look: once per attach, not per snapshot."""
        if self._gpu is None:
            link.populate(job)
            return
        mapped = link.mapped(job)
        for key in [key for key in self._registered if key not in mapped]:
            self._registered.pop(key).close()
        for key, memory in mapped.items():
            if key not in self._registered:
                self._registered[key] = registered = RegisteredMemory(memory, self._gpu)
                if registered.problem:
                    log.warning("%s", registered.problem)

    def _until(self, done: Callable[[], bool], deadline_s: float) -> bool:
        try:
            return self.link.until(done, deadline_s=deadline_s)
        except LinkLostError as error:
            self._lost(error)
            raise


def _copy(capture: Capture, target: memoryview, started: "Future[None]") -> str:
    """Copy a capture into its memory; returns why that failed, or nothing. Afterwards nobody writes there."""
    try:
        capture.start(target)
        started.set_result(None)
        capture.finish()
    except ShardError as error:
        return str(error)
    except Exception as error:  # noqa: BLE001  # a GPU out of memory, say: it must cost this snapshot, never the run
        return f"{type(error).__name__}: {error}"
    finally:
        capture.settle()
    return ""


def _newer(known: int | None, told: int | None) -> int | None:
    return told if known is None or (told is not None and told > known) else known
