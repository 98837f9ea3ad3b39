"""The jobs of one node, and the machines that work on each.

Covers making, finding, forgetting and evicting jobs. What a job is and does is in `Job`.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

from holdfast.daemon.core import report
from holdfast.daemon.core.actions import Free
from holdfast.daemon.core.arena import Arena
from holdfast.daemon.core.collector import Collector
from holdfast.daemon.core.context import Context
from holdfast.daemon.core.durable import Durable
from holdfast.daemon.core.healing import Healing
from holdfast.daemon.core.job import Job, Pause
from holdfast.daemon.core.memory import Memory, sizes_of
from holdfast.daemon.core.peers import Peers
from holdfast.daemon.core.protect import Protect
from holdfast.daemon.core.pursuits import Pursuits
from holdfast.daemon.core.rebuild import Rebuild
from holdfast.daemon.core.reprotect import Reprotect
from holdfast.daemon.core.shards import Shards
from holdfast.daemon.core.slot import IN_FLIGHT, Phase, Slot
from holdfast.protocol import limits, messages
from holdfast.protocol.ids import SnapshotId
from msgspec import structs


@dataclass(slots=True)
class JobParts:
    """A job and the machines that work on it."""

    job: Job
    protect: Protect
    rebuild: Rebuild
    shards: Shards
    healing: Healing
    reprotect: Reprotect

    def check(self) -> None:
        """Assert the invariants of each."""
        for machine in (self.job, self.rebuild, self.healing.repair, self.healing.drill, self.reprotect):
            machine.check()


@dataclass(slots=True)
class Registry:
    """All jobs that this node knows."""

    ctx: Context
    arena: Arena
    peers: Peers
    collector: Collector
    pursuits: Pursuits
    durable: Durable
    table: dict[str, JobParts] = field(default_factory=dict)
    forgotten: dict[str, int] = field(default_factory=dict)  # job -> its attempt when it was forgotten here

    def __iter__(self) -> Iterator[JobParts]:
        return iter(list(self.table.values()))

    def get(self, name: str) -> JobParts | None:
        """A job by name, None if it is not known here."""
        return self.table.get(name)

    def owner(self, memory: Memory, snapshot: SnapshotId | None = None) -> JobParts | None:
        """The job whose slot still has this memory, and this snapshot in it if one is given; else None.

        Work that was ordered for a snapshot may end when the slot holds the next one already.
        """
        parts = self.table.get(memory.job)
        slot = parts.job.find(memory) if parts is not None else None
        return parts if slot is not None and snapshot in {None, slot.snapshot} else None

    def heartbeat(self, asked: str | None = None, pause: Pause | None = None) -> messages.Heartbeat:
        """What this node says of itself; to who wants to know what job `asked` restores, also that it was forgotten.

        Else the job's next attempt might get a number that this node takes for one of those that are over.
        """
        reports = [
            structs.replace(
                report.job_report(parts.job, parts.rebuild, parts.healing.drill.shown()),
                durable=self.durable.report(parts.job.name),
            )
            for parts in self
        ]
        if asked is not None and asked in self.forgotten and asked not in self.table:
            over = self.forgotten[asked]
            told = messages.JobReport(asked, over, None, 0, None, None, held=(), open=(), paused=True)
            reports.append(structs.replace(told, paused_for=() if pause is None else (pause,)))
        return report.heartbeat(self.ctx, self.arena, self.peers, reports)

    def status(self) -> dict[str, object]:
        """The cluster as this node sees it."""
        jobs = {name: parts.job for name, parts in self.table.items()}
        return report.status(self.ctx, self.peers, self.heartbeat(), jobs)

    def told_status(self) -> dict[str, object]:
        """The same, as far as it fits a frame."""
        return report.fitting(self.status())

    def pause_commits(self, name: str | None, pause: Pause) -> None:
        """What this node reports of a job from now on must hold until this question is decided."""
        if name is not None and name in self.table:
            job = self.table[name].job
            job.pause_ns = self.ctx.seconds(limits.COMMIT_PAUSE_S)
            job.paused_for = [*(p for p in job.paused_for if p != pause), pause][-limits.PAUSES_KEPT_COUNT :]

    def resume_commits(self, name: str, pause: Pause) -> None:
        """It was decided that nothing can be restored: what is in flight may still commit, but for other questions."""
        if name in self.table:
            job = self.table[name].job
            job.paused_for = [p for p in job.paused_for if pause[1] and p != pause]  # 0: said by an earlier version
            if not job.paused_for:
                job.pause_ns = 0

    def is_forgotten(self, name: str, attempt: int) -> bool:
        """Whether somebody still speaks of an attempt that was forgotten here, together with the job."""
        return name not in self.table and attempt <= self.forgotten.get(name, 0)

    def obtain(self, name: str) -> JobParts | None:
        """A job by name, created when it is new and there is room for one more."""
        if name not in self.table:
            if len(self.table) >= limits.JOB_COUNT_MAX:
                self.ctx.log(f"job {name} refused: {limits.JOB_COUNT_MAX} jobs are the limit", "error")
                return None
            slots = [
                Slot(index, self.ctx.node, generation=self.ctx.generations_from)
                for index in range(self.ctx.config.slots)
            ]
            job = Job(self.ctx, self.arena, name, slots, touched_ns=self.ctx.now_ns)
            rebuild = Rebuild(job, self.peers, self.pursuits)
            reprotect = Reprotect(job, self.peers, self.pursuits)
            healing = Healing(job, self.peers)
            self.table[name] = JobParts(job, Protect(job), rebuild, Shards(job, rebuild), healing, reprotect)
        return self.table[name]

    def forget(self, name: str) -> bool:
        """Free all that a job holds on this node."""
        parts = self.table.pop(name, None)
        if parts is None:
            return False
        parts.rebuild.cancel("the job was forgotten")
        parts.reprotect.forget()
        self.forgotten.pop(name, None)  # the newest at the end
        self.forgotten[name] = parts.job.attempt
        if len(self.forgotten) > limits.FORGOTTEN_KEPT:
            del self.forgotten[next(iter(self.forgotten))]
        for slot in parts.job.slots:
            if slot.phase is not Phase.ABSENT:
                self.arena.release(slot.memory(name))
                self.ctx.emit(Free(slot.memory(name)))
        self.collector.forget(name)
        self.ctx.log(f"job {name}: forgotten, its memory is free")
        return True

    def evict_closed(self) -> None:
        """Forget jobs that closed, or lost all their ranks, long ago."""
        limit_ns = self.ctx.now_ns - int(self.ctx.config.closed_job_s * 1e9)
        for name, parts in list(self.table.items()):
            idle = not parts.job.writers and not any(s.phase in IN_FLIGHT for s in parts.job.slots)
            if idle and parts.job.touched_ns < limit_ns:
                self.forget(name)

    def make_room(self, job: Job, plan: messages.Plan) -> None:
        """Closed jobs give way when a new one needs their memory; the longest closed goes first."""
        geometry = job.geometry(job.learn_layout(plan.layout))
        needed = sizes_of(geometry, self.ctx.node).total_bytes * sum(s.phase is Phase.ABSENT for s in job.slots)
        if needed > self.arena.budget_bytes:
            return  # nobody's going would be enough
        if self.arena.refusal(needed, free_bytes=self.ctx.free_bytes) is not None:
            for parts in self:
                parts.reprotect.give_way()
        closed = sorted(
            (parts.job.touched_ns, name) for name, parts in self.table.items() if parts.job.closed and name != job.name
        )
        for _, name in closed:
            if self.arena.refusal(needed, free_bytes=self.ctx.free_bytes) is None:
                return
            self.ctx.log(f"job {name} is closed and gives way to job {job.name}", "warning")
            self.forget(name)
