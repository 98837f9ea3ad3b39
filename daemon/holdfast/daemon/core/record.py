"""What is written down of a recovery: losses, the step chosen and why not a newer one, phases, digests.

Covers when a record begins and what is added to it. A job's restart begins one on every node; a rebuild adds its phase
to the record of its attempt, or begins one if an operator asked for it. Every addition is written at once: the file is
true whenever somebody looks. Nothing here decides anything.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from holdfast.coding import chunk_digest
from holdfast.daemon.core.actions import WriteRecord
from holdfast.daemon.core.collector import lost_by_group
from holdfast.daemon.core.context import Context
from holdfast.daemon.core.job import Job
from holdfast.daemon.core.peers import Peers
from holdfast.daemon.core.registry import JobParts, Registry
from holdfast.daemon.core.slot import COMPLETE
from holdfast.protocol import limits
from holdfast.protocol.frames import pack_digests
from holdfast.protocol.ids import SnapshotId
from holdfast.protocol.recovery import PhaseRecord, RecoveryRecord, StepRecord
from msgspec import structs


@dataclass(slots=True)
class Records:
    """The newest record of each job, and which rebuilds it tells of already."""

    ctx: Context
    peers: Peers
    registry: Registry
    newest: dict[str, tuple[str, RecoveryRecord]] = field(default_factory=dict)  # job -> (file name, record)
    told: dict[str, int] = field(default_factory=dict)  # job -> end of the rebuild that was told last

    def decided(
        self, parts: JobParts, snapshot: SnapshotId, *, heard: bool, refused: Sequence[str], heard_s: float
    ) -> None:
        """A job begins an attempt with a snapshot that was committed. Hearing it twice changes nothing.

        Args:
            parts: the job.
            snapshot: the choice.
            heard: whether this node collects: it has just heard all live nodes, so it knows the losses.
            refused: newer snapshots, and why not.
            heard_s: how long hearing all took.
        """
        known = self.newest.get(parts.job.name)
        if known is None or known[1].attempt < parts.job.attempt:
            phase = PhaseRecord("decide", "done", max(heard_s, 0.0))
            self._write(self._begin(parts.job, snapshot, refused, heard=heard), phase)

    def tick(self) -> None:
        """Look for rebuilds that ended, and for an image that is whole again."""
        for parts in self.registry:
            job, rebuild = parts.job, parts.rebuild
            ended = rebuild.word in {"done", "failed"} and rebuild.ended_ns != self.told.get(job.name, 0)
            if ended and rebuild.ended_ns and rebuild.snapshot is not None:
                self.told[job.name] = rebuild.ended_ns
                phase = PhaseRecord(
                    name="rebuild",
                    outcome="done" if rebuild.word == "done" else rebuild.problem[: limits.TEXT_CHARS_MAX],
                    seconds=max(rebuild.ended_ns - rebuild.started_ns, 0) / 1e9,
                    received_bytes=rebuild.received_bytes,
                    lost_bytes=rebuild.total_chunks * self.ctx.config.chunk_bytes,
                )
                self._write(self._record_of(job, rebuild.snapshot), phase)

    def _record_of(self, job: Job, snapshot: SnapshotId) -> tuple[str, RecoveryRecord]:
        known = self.newest.get(job.name)
        if known is not None and known[1].chosen == StepRecord(snapshot.step, snapshot.attempt):
            return known
        return self._begin(job, snapshot, (), heard=False, own_lost=True)

    def _begin(
        self, job: Job, snapshot: SnapshotId, refused: Sequence[str], *, heard: bool, own_lost: bool = False
    ) -> tuple[str, RecoveryRecord]:
        ctx = self.ctx
        own_lost = own_lost or job.lost_bytes > 0
        lost = [ctx.node] if own_lost else []
        if heard and job.committed == snapshot and job.committed_layout_id in job.layouts.known:
            assert job.committed_layout_id is not None
            geometry = job.geometry(job.committed_layout_id)
            by_group = lost_by_group(snapshot, geometry, self.peers.reports(job.name))
            lost += [node for nodes in by_group.values() for node in nodes if node != ctx.node]
        record = RecoveryRecord(
            cluster=ctx.config.cluster_name,
            epoch=ctx.config.epoch,
            node=ctx.name_of(ctx.node),
            job=job.name,
            attempt=job.attempt,
            chosen=StepRecord(snapshot.step, snapshot.attempt),
            lost_nodes=tuple(ctx.name_of(node) for node in sorted(lost)),
            refused=tuple(text[: limits.TEXT_CHARS_MAX] for text in refused),
            phases=(),
            digest_before=None if own_lost else image_digest(job, snapshot),
            digest_after=None,
        )
        name = f"recovery-{record.node}-{job.name}-{job.attempt}-{snapshot.step}.json"
        return name, record

    def _write(self, known: tuple[str, RecoveryRecord], phase: PhaseRecord) -> None:
        name, record = known
        parts = self.registry.get(record.job)
        snapshot = SnapshotId(record.chosen.attempt, record.chosen.step)
        record = structs.replace(
            record,
            phases=(*record.phases, phase)[-limits.RECORD_PHASES_KEPT :],
            digest_after=image_digest(parts.job, snapshot) if parts is not None else None,
        )
        self.newest[record.job] = name, record
        self.ctx.recovery_record = f"{self.ctx.state_dir}/{name}" if self.ctx.state_dir else name
        self.ctx.emit(WriteRecord(name, record))


def image_digest(job: Job, snapshot: SnapshotId) -> str | None:
    """A digest over the digests of this node's data chunks; None if the snapshot is not whole here."""
    slot = job.slot_of(snapshot)
    if slot is None or slot.phase not in COMPLETE or slot.geometry is None:
        return None
    me = slot.geometry.group_of(slot.node).index(slot.node)
    count = slot.geometry.stripes(slot.node).chunk_counts[me]
    return f"{chunk_digest(pack_digests([slot.data_digest(me, chunk) for chunk in range(count)])):016x}"
