"""Reading what rests again and again, so that a bit that flips is found before it is needed.

Covers one job on one node: when which of its own chunks of the committed snapshot, data and parity, are read and
compared with their digests, and whom the findings go to. A pass is spread evenly over the period, so each chunk is
read once per period; less often where the bandwidth that was allowed is too little: then `scrub_s` is longer.
The digest table in held memory is written anew at the beginning of each pass. What digests can't show is `agreement`'s.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

from holdfast.daemon.core.actions import ScrubChunks, StoreDigests
from holdfast.daemon.core.health import Resting
from holdfast.daemon.core.job import Job
from holdfast.daemon.core.memory import Memory
from holdfast.daemon.core.repair import Repair
from holdfast.daemon.core.slot import Slot
from holdfast.protocol import limits
from holdfast.protocol.ids import SnapshotId
from holdfast.protocol.messages import ChunkHeader

PASS_SHARE = 0.9  # of the period, so that a chunk is read again in time also when its turn comes a little later


@dataclass(slots=True)
class Pacing:
    """Spreads a number of pieces of work evenly over an interval."""

    started_ns: int = 0
    done: int = 0

    def due(self, total: int, *, interval_ns: int, now_ns: int) -> int:
        """How many pieces should be done by now and are not."""
        elapsed_ns = now_ns - self.started_ns
        return min(total, total * elapsed_ns // interval_ns + 1) - self.done


@dataclass(slots=True)
class Scrub:
    """The reading of one job's own chunks."""

    job: Job
    repair: Repair
    reads: tuple[Memory, SnapshotId] | None = None  # what the pass reads
    pacing: Pacing = field(default_factory=Pacing)
    passing: bool = False
    ordered: tuple[int, tuple[tuple[Resting, int], ...]] | None = None  # (ticket, batch) that is being read
    next_ticket: int = 1
    not_before_ns: int = 0  # the bandwidth allows no more until then

    def tick(self) -> None:
        """Time passes: begin a pass, order what is due."""
        slot, interval_ns = self.repair.slot(), interval_of(self.job)
        if slot is None or slot.snapshot is None or interval_ns == 0:
            self.reads, self.passing, self.ordered = None, False, None
            return
        reads = slot.memory(self.job.name), slot.snapshot
        if reads != self.reads:
            self.reads, self.ordered = reads, None
            self._begin(slot)
        elif not self.passing and self.job.ctx.now_ns >= self.pacing.started_ns + interval_ns:
            self._begin(slot)
        self._order(slot)

    def _begin(self, slot: Slot) -> None:
        digests = tuple(digest for digest in slot.digests if digest is not None)
        self.pacing, self.passing = Pacing(self.job.ctx.now_ns), len(digests) == len(slot.digests) > 0
        if self.passing:
            self.job.ctx.emit(StoreDigests(slot.memory(self.job.name), 0, digests))

    def _order(self, slot: Slot) -> None:
        ctx = self.job.ctx
        if not self.passing or self.ordered is not None or ctx.now_ns < self.not_before_ns:
            return
        total = chunk_count(slot)
        due = self.pacing.due(total, interval_ns=interval_of(self.job), now_ns=ctx.now_ns)
        if due <= 0:
            return
        first = self.pacing.done
        indices = range(first, min(first + min(due, limits.SCRUB_BATCH_CHUNKS), total))
        batch = tuple((wanted, _digest_of(slot, wanted)) for wanted in map(_place(slot), indices))
        ticket, self.next_ticket = self.next_ticket, self.next_ticket + 1
        self.ordered = ticket, batch
        self.not_before_ns = ctx.now_ns + len(batch) * ctx.config.chunk_bytes * 10**9 // ctx.config.scrub_bytes_per_s
        assert slot.snapshot is not None
        ctx.emit(ScrubChunks(slot.memory(self.job.name), slot.snapshot, ticket, batch, fingerprints=False))

    def scrubbed(self, ticket: int, bad: tuple[Resting, ...]) -> bool:
        """A batch was read. Returns whether it was one of these."""
        if self.ordered is None or self.ordered[0] != ticket:
            return False
        batch, self.ordered = self.ordered[1], None
        slot, health = self.repair.slot(), self.job.health
        if slot is None:
            return True
        for wanted, digest in batch:
            if wanted in bad:
                self.found_bad(wanted, digest)
            else:
                self.repair.right(wanted)
        self.pacing.done += len(batch)
        if self.pacing.done >= chunk_count(slot):
            self.passing = False
            health.scrub_passes += 1
            health.scrub_ended_ns = self.job.ctx.now_ns
            health.scrub_s = (self.job.ctx.now_ns - self.pacing.started_ns) / 1e9
        self._order(slot)
        return True

    def found_bad(self, wanted: Resting, digest: int) -> None:
        """A chunk fails its digest: count it, say it, have it repaired."""
        job = self.job
        if wanted not in job.health.damaged:
            job.digest_failures += 1
            job.ctx.log(
                f"job {job.name}: {wanted.kind} chunk {wanted.chunk} of {self.repair.snapshot} fails its digest "
                "at rest",
                "error",
            )
        self.repair.want(wanted, digest)

    def not_served(self, header: ChunkHeader) -> None:
        """A peer wanted a chunk, and it fails its digest."""
        slot = self.repair.slot()
        if slot is not None and header.snapshot == self.repair.snapshot and header.kind in {"data", "parity"}:
            wanted = Resting("data" if header.kind == "data" else "parity", header.chunk)
            self.found_bad(wanted, _digest_of(slot, wanted))


def interval_of(job: Job) -> int:
    """Nanoseconds from the beginning of a pass to that of the next; 0: nothing is read."""
    return int(job.ctx.config.scrub_period_s * PASS_SHARE * 1e9)


def chunk_count(slot: Slot) -> int:
    """Chunks that this node holds in a slot: data, then parity."""
    assert slot.geometry is not None
    return (slot.sizes.data_bytes + slot.sizes.parity_bytes) // slot.geometry.chunk_bytes


def _place(slot: Slot) -> Callable[[int], Resting]:
    """From an index over all own chunks to the chunk."""
    assert slot.geometry is not None
    data_count = slot.sizes.data_bytes // slot.geometry.chunk_bytes
    return lambda index: Resting("data", index) if index < data_count else Resting("parity", index - data_count)


def _digest_of(slot: Slot, wanted: Resting) -> int:
    digest = slot.digests[slot.resting_index(wanted.kind, wanted.chunk)]
    assert digest is not None
    return digest
