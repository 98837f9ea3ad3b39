"""Durable copies: when a job's committed snapshot is copied out of memory into a directory, and by which node.

Covers the decision only: a process that the shell starts reads the snapshot through this node's daemon, like any other
reader, and writes it. The collector's node has copies made, one at a time. What fails is tried again, later each time,
and stops nothing: it costs a copy, and is said. What a collector knows travels with heartbeats, so that its successor
goes on from there.
"""

from dataclasses import dataclass, field

from holdfast.daemon.core.actions import CopyDurably
from holdfast.daemon.core.context import Context
from holdfast.daemon.core.job import Job
from holdfast.daemon.core.peers import Peers
from holdfast.protocol import limits
from holdfast.protocol.health import DurableReport
from holdfast.protocol.ids import SnapshotId


@dataclass(slots=True)
class Copies:
    """What is known of one job's copies."""

    copied: SnapshotId | None = None
    copied_ns: int = 0
    seconds: float = 0.0
    size_bytes: int = 0
    failures: int = 0  # in a row
    failed_ns: int = 0
    retry_ns: int = 0
    problem: str = ""


@dataclass(slots=True)
class Durable:
    """The copies of all jobs, as this node knows or makes them."""

    ctx: Context
    peers: Peers
    table: dict[str, Copies] = field(default_factory=dict)
    running: str = ""  # the job that is being copied now
    stop_ns: int | None = None  # when this node was asked to stop

    def report(self, job: str) -> DurableReport:
        """What heartbeats say of a job's copies."""
        known = self.table.get(job)
        if known is None:
            return DurableReport()
        return DurableReport(
            copied=known.copied,
            age_s=(self.ctx.now_ns - known.copied_ns) / 1e9 if known.copied is not None else 0.0,
            seconds=known.seconds,
            size_bytes=known.size_bytes,
            failures=known.failures,
            problem=known.problem,
            running=self.running == job,
        )

    def tick(self, jobs: list[Job]) -> None:
        """Time passes: have a copy made if one is due."""
        if self.ctx.config.durable_dir is None:
            return
        self.table = {job.name: self.table.get(job.name, Copies()) for job in jobs}
        for job in jobs:
            self._hear(job.name)
        if self.running or self.peers.collector != self.ctx.node or not self.peers.settled:
            return
        due = [job for job in jobs if self._is_due(job)]
        if due:
            self._start(min(due, key=lambda job: (self.table[job.name].copied_ns, job.name)))

    def copied(self, job: str, snapshot: SnapshotId, *, size_bytes: int, seconds: float) -> None:
        """A copy is whole."""
        self.running = ""
        self.table[job] = Copies(snapshot, self.ctx.now_ns, seconds, size_bytes)
        where = self.ctx.config.durable_dir
        self.ctx.log(f"job {job}: {snapshot} is copied to {where}: {size_bytes} bytes in {seconds:.1f} s")

    def failed(self, job: str, reason: str) -> None:
        """A copy was not made; what an earlier one left is untouched."""
        self.running = ""
        known = self.table.setdefault(job, Copies())
        pause_s = min(limits.COPY_RETRY_S * 2 ** min(known.failures, 16), limits.COPY_RETRY_S_MAX)
        known.failures += 1
        known.failed_ns, known.retry_ns = self.ctx.now_ns, self.ctx.seconds(pause_s)
        known.problem = reason[: limits.TEXT_CHARS_MAX]
        self.ctx.log(f"job {job}: no durable copy: {reason}; trying again in {pause_s:.0f} s", "warning")

    # --- the end ---

    def stop(self) -> None:
        """This node was asked to stop: what is committed and not copied yet is due now."""
        if self.stop_ns is None:
            self.stop_ns = self.ctx.now_ns

    def holds_up(self, jobs: list[Job]) -> bool:
        """Whether a stop waits: for a copy that is made here, or that the collector makes from what this node holds."""
        config = self.ctx.config
        if config.durable_dir is None or self.stop_ns is None or not config.durable_grace_s:
            return False
        if self.ctx.now_ns >= self.stop_ns + int(config.durable_grace_s * 1e9):
            return False
        if self.peers.collector == self.ctx.node:
            since_ns = self.ctx.now_ns - int(limits.HEARTBEAT_S * 1e9)  # the others are to hear that it is made
            heard = all(known.copied_ns < max(since_ns, self.stop_ns) for known in self.table.values())
            return bool(self.running) or not heard or any(self._is_due(job) for job in jobs)
        left = [job for job in jobs if job.committed not in {None, self.table.get(job.name, Copies()).copied}]
        copying = any(report.durable.running for job in left for report in self.peers.reports(job.name).values())
        lingers = self.ctx.now_ns < self.stop_ns + int(limits.COPY_LINGER_S * 1e9)
        return bool(left) and (copying or lingers)

    # --- decisions ---

    def _hear(self, job: str) -> None:
        """Take over what another node knows of newer copies."""
        known = self.table[job]
        for report in self.peers.reports(job).values():
            told = report.durable
            if told.copied is not None and (known.copied is None or told.copied > known.copied):
                known.copied, known.seconds, known.size_bytes = told.copied, told.seconds, told.size_bytes
                known.copied_ns = self.ctx.now_ns - int(min(told.age_s, limits.AGE_S_MAX) * 1e9)

    def _is_due(self, job: Job) -> bool:
        config, known = self.ctx.config, self.table.get(job.name, Copies())
        if job.committed is None or job.committed == known.copied or self.ctx.now_ns < known.retry_ns:
            return False
        if self.stop_ns is not None:
            return known.failed_ns < self.stop_ns  # one try: a directory that can't be written holds up no stop
        by_time, by_steps = config.durable_every_s, config.durable_every_steps
        if known.copied is None:
            return bool(by_time or by_steps)
        due = bool(by_time) and self.ctx.now_ns >= known.copied_ns + int(by_time * 1e9)
        return due or (bool(by_steps) and abs(job.committed.step - known.copied.step) >= by_steps)

    def _start(self, job: Job) -> None:
        assert self.ctx.config.durable_dir is not None
        self.running = job.name
        self.ctx.emit(CopyDurably(job.name, self.ctx.config.durable_dir, self.ctx.config.durable_keep))
