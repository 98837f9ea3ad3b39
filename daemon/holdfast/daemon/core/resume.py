"""What the ledger says, and how a restarted worker takes up what its predecessor held.

Covers the way to and from `LedgerRecord`. When it is written is `Node`'s business, where it lies the shell's.
"""

from collections.abc import Callable, Mapping

from holdfast.daemon.core.held_estate import HeldEstate, part_sizes
from holdfast.daemon.core.job import Job
from holdfast.daemon.core.ledger import EstateRecord, JobRecord, LedgerRecord, SlotRecord
from holdfast.daemon.core.memory import Memory, Sizes, sizes_of
from holdfast.daemon.core.peers import Peers
from holdfast.daemon.core.registry import JobParts, Registry
from holdfast.daemon.core.slot import Phase, Slot
from holdfast.daemon.core.transfer import Transfer
from holdfast.protocol.ids import SnapshotId
from holdfast.protocol.layout import Geometry, Layout
from msgspec import UNSET, UnsetType


def state(registry: Registry, peers: Peers) -> tuple[object, ...]:
    """All that a record is made of, by which a change is noticed: compared after every event, so no record is made."""
    return registry.ctx.incarnation, peers.incarnations, [_job_state(parts.job) for parts in registry]


def record(registry: Registry, peers: Peers) -> LedgerRecord:
    """What the ledger must say now."""
    return LedgerRecord(
        cluster=registry.ctx.config.cluster_name,
        epoch=registry.ctx.config.epoch,
        node=registry.ctx.node,
        incarnation=registry.ctx.incarnation,
        worker_session=registry.ctx.worker_session,
        jobs=tuple(_job_record(parts.job) for parts in registry),
        incarnations=peers.incarnations,
    )


def resume(registry: Registry, held: LedgerRecord, digests: Mapping[Memory, list[int]]) -> None:
    """Take up what a predecessor held. `digests` are the tables read back from held memory.

    What was in flight is given up: frames that the predecessor had acknowledged as received are gone.
    """
    for job_record in held.jobs:
        parts = registry.obtain(job_record.name)
        assert parts is not None
        job = parts.job
        job.attempt, job.closed = job_record.attempt, job_record.closed
        job.layouts.known = {layout.layout_id: layout for layout in job_record.layouts}
        job.current, job.planned = (
            job_record.current_layout_id,
            job_record.current_layout_id is not None,
        )
        job.committed, job.committed_layout_id = (
            job_record.committed,
            job_record.committed_layout_id,
        )
        job.given_up = list(job_record.given_up)
        if not isinstance(job_record.estates, UnsetType):
            _resume_estates(parts, job_record.estates, digests)
        lost: list[SnapshotId] = []
        for slot, slot_record in zip(job.slots, job_record.slots, strict=False):
            _resume_slot(parts, slot, slot_record, digests, lost)
        for snapshot in lost:
            job.give_up_snapshot(snapshot, "the daemon's worker restarted while it was in flight")


def _resume_slot(
    parts: JobParts,
    slot: Slot,
    record: SlotRecord,
    digests: Mapping[Memory, list[int]],
    lost: list[SnapshotId],
) -> None:
    job = parts.job
    slot.generation = record.generation
    memory = slot.memory(job.name)
    if record.phase in {"staging", "sealed"} and record.snapshot is not None:
        lost.append(record.snapshot)
    if record.layout_id is None or memory not in digests:
        return
    slot.geometry = job.geometry(record.layout_id)
    slot.phase = Phase.EMPTY
    job.arena.reserve(memory, slot.sizes.total_bytes)
    if record.phase in {"protected", "committed"} and record.snapshot is not None:
        slot.phase, slot.snapshot = Phase(record.phase), record.snapshot
        slot.digests = list(digests[memory])
        if slot.phase is Phase.PROTECTED:
            slot.transfer = Transfer(slot.geometry, slot.node)
            slot.transfer.resume(digests[memory])
    elif record.phase == "rebuilding" and record.snapshot is not None and record.snapshot == job.committed:
        slot.phase, slot.snapshot = Phase.REBUILDING, record.snapshot
        slot.digests = [digest or None for digest in digests[memory]]
        parts.rebuild.resume(slot)


def _resume_estates(parts: JobParts, records: tuple[EstateRecord, ...], digests: Mapping[Memory, list[int]]) -> None:
    """What is whole of absent nodes' chunks stays so; a part that was being computed is computed anew."""
    job = parts.job
    for record in records:
        memory = Memory(job.name, record.slot, record.generation)
        parts.reprotect.generation = max(parts.reprotect.generation, record.generation)
        sizes = None
        if record.layout_id in job.layouts.known:
            sizes = part_sizes(job.geometry(record.layout_id), job.ctx.node, record.absent)
        if sizes is None or (memory not in digests and sizes.digest_count):
            continue
        table = tuple(digests.get(memory, ()))
        job.estates.append(HeldEstate(record.snapshot, record.absent, record.layout_id, memory, table))
        if sizes.digest_count:
            job.arena.reserve(memory, sizes.total_bytes)


def held_pieces(record: LedgerRecord, geometry: Callable[[Layout], Geometry]) -> dict[Memory, Sizes]:
    """Every piece of memory that a record calls held, and its size."""
    found: dict[Memory, Sizes] = {}
    for job in record.jobs:
        layouts = {layout.layout_id: layout for layout in job.layouts}
        for index, slot in enumerate(job.slots):
            if slot.layout_id in layouts and slot.phase not in {"absent", "allocating"}:
                sizes = sizes_of(geometry(layouts[slot.layout_id]), record.node)
                found[Memory(job.name, index, slot.generation)] = sizes
        for estate in () if isinstance(job.estates, UnsetType) else job.estates:
            if estate.layout_id in layouts:
                part = part_sizes(geometry(layouts[estate.layout_id]), record.node, estate.absent)
                if part is not None and part.digest_count:
                    found[Memory(job.name, estate.slot, estate.generation)] = part
    return found


def _job_state(job: Job) -> tuple[object, ...]:
    """What `_job_record` tells, in its order."""
    return (
        job.name,
        job.attempt,
        job.current if job.planned else None,
        tuple(job.layouts.known),
        job.committed,
        job.committed_layout_id,
        tuple(job.given_up),
        [(slot.generation, slot.phase, slot.snapshot, slot.layout_id) for slot in job.slots],
        job.closed,
        [(held.memory, held.snapshot, held.absent) for held in job.estates],
    )


def _job_record(job: Job) -> JobRecord:
    return JobRecord(
        name=job.name,
        attempt=job.attempt,
        current_layout_id=job.current if job.planned else None,
        layouts=tuple(job.layouts.known.values()),
        committed=job.committed,
        committed_layout_id=job.committed_layout_id,
        given_up=tuple(job.given_up),
        slots=tuple(
            SlotRecord(
                generation=slot.generation,
                phase=slot.phase.value,
                snapshot=slot.snapshot,
                layout_id=slot.layout_id,
            )
            for slot in job.slots
        ),
        closed=job.closed,
        estates=tuple(
            EstateRecord(held.memory.slot, held.memory.generation, held.snapshot, held.layout_id, held.absent)
            for held in job.estates
        )
        or UNSET,
    )
