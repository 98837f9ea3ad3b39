"""Bringing back single chunks that rot at rest: data or parity of the committed snapshot, from their stripe.

Covers one job on one node; one stripe at a time. The chunks of k other members are asked for as in a rebuild; what they
give is computed aside and written only if it is right: a chunk that has a digest must get it back, and parity without a
trusted digest is encoded from data that passed theirs. So a failed try never makes anything worse. What can't be
repaired now stays `damaged`, is shown in the status, and is tried again.
"""

from dataclasses import dataclass, field

from holdfast.daemon.core.actions import DropFrames, RepairChunk
from holdfast.daemon.core.health import Resting
from holdfast.daemon.core.job import Job
from holdfast.daemon.core.memory import ChunkKey, Memory
from holdfast.daemon.core.peers import Peers
from holdfast.daemon.core.protect import key_of
from holdfast.daemon.core.slot import Phase, Slot
from holdfast.protocol import limits, messages
from holdfast.protocol.ids import SnapshotId


@dataclass(slots=True)
class RepairWork:
    """The chunk that is being repaired, and where the chunks come from that make it."""

    wanted: Resting
    digest: int | None
    sources: dict[int, tuple[int, Resting]]  # position -> (node, its chunk)
    zero_positions: tuple[int, ...]
    missing: tuple[tuple[int, int], ...]  # (data position that no source gives, digest that it must have)
    wanted_position: int
    stripe: int
    deadline_ns: int
    arrived: set[int] = field(default_factory=set)


@dataclass(slots=True)
class Repair:
    """The damaged chunks of one job on this node. At most one is worked on."""

    job: Job
    peers: Peers
    memory: Memory | None = None  # where all of what follows lies
    snapshot: SnapshotId | None = None
    todo: dict[Resting, int | None] = field(default_factory=dict)  # -> digest that it must get; None: encode it anew
    work: RepairWork | None = None
    excluded: set[int] = field(default_factory=set)  # nodes that failed us for the chunk in work
    retry_ns: dict[Resting, tuple[int, int | None]] = field(default_factory=dict)  # -> (when, digest)

    def slot(self) -> Slot | None:
        """The slot of the committed snapshot, if this node holds it whole. Forgets what concerned another one."""
        job = self.job
        slot = job.slot_of(job.committed) if job.committed is not None else None
        if slot is None or slot.phase is not Phase.COMMITTED or slot.geometry is None:
            slot = None
        memory = slot.memory(job.name) if slot is not None else None
        if (memory, job.committed) != (self.memory, self.snapshot):
            self._abandon()
            self.todo.clear()
            self.retry_ns.clear()
            job.health.damaged.clear()
            self.memory, self.snapshot = memory, job.committed
        return slot

    def want(self, wanted: Resting, digest: int | None) -> None:
        """A chunk is wrong. `digest`: what it must get; None for parity whose own digest is not to be trusted."""
        if self.slot() is None or wanted in self.todo or (self.work is not None and self.work.wanted == wanted):
            return
        self.job.health.damaged.add(wanted)
        if wanted in self.retry_ns:
            return  # it waits for its next try: members that can't repair theirs either would ask each other for ever
        self.todo[wanted] = digest
        self._next()

    def right(self, wanted: Resting) -> None:
        """A chunk was read again and is as it should be: another repair, or a restore, has brought it back."""
        if self.work is None or self.work.wanted != wanted:
            self.job.health.damaged.discard(wanted)
            self.retry_ns.pop(wanted, None)
            self.todo.pop(wanted, None)

    def _next(self) -> None:
        slot = self.slot()
        while slot is not None and self.work is None and self.todo:
            wanted, digest = next(iter(self.todo.items()))
            del self.todo[wanted]
            self.excluded.clear()
            self._plan(slot, wanted, digest)

    def _plan(self, slot: Slot, wanted: Resting, digest: int | None) -> None:
        """Ask k members for their chunks of the stripe: all data that can be had, then parity."""
        assert slot.geometry is not None
        assert slot.snapshot is not None
        job = self.job
        stripes, group = slot.geometry.stripes(slot.node), slot.geometry.group_of(slot.node)
        me = group.index(slot.node)
        stripe = stripe_of(slot, wanted)
        reports = self.peers.reports(job.name)
        helpers = {n for n in group if n in reports and slot.snapshot in reports[n].held and n not in self.excluded}
        real = {position: (member, chunk) for position, member, chunk in stripes.contributions(stripe)}
        zeros = tuple(p for p in range(stripes.data_count) if p not in real)
        sources = {
            p: (group[member], Resting("data", chunk))
            for p, (member, chunk) in real.items()
            if group[member] in helpers
        }
        for row, member in enumerate(stripes.parity_members(stripe)):
            if len(sources) + len(zeros) < stripes.data_count and group[member] in helpers:
                parity = Resting("parity", stripes.parity_index(stripe, member))
                sources[stripes.data_count + row] = (group[member], parity)
        if len(sources) + len(zeros) < stripes.data_count:
            self._later(wanted, digest, f"{len(sources) + len(zeros)} of the {stripes.data_count} chunks it is made of "
                        f"can be had; parity covers {stripes.parity_count}")  # fmt: skip
            return
        data = stripes.data_members(stripe)
        is_data = wanted.kind == "data"
        self.work = RepairWork(
            wanted=wanted,
            digest=digest,
            sources=sources,
            zero_positions=zeros,
            missing=tuple(
                (p, digest if is_data and member == me and digest is not None else slot.data_digest(member, chunk))
                for p, (member, chunk) in sorted(real.items())
                if p not in sources
            ),
            wanted_position=data.index(me)
            if is_data
            else stripes.data_count + stripes.parity_members(stripe).index(me),
            stripe=stripe,
            deadline_ns=job.ctx.seconds(limits.CHUNK_DEADLINE_S),
        )
        for node, source in sources.values():
            job.ctx.tell(node, messages.ReadChunk(job.name, slot.snapshot, source.kind, source.chunk))
        self._compute_if_whole(slot)

    # --- what comes ---

    def expects(self, header: messages.ChunkHeader) -> bool:
        """Whether a chunk that came is one that a repair waits for."""
        if header.kind == "sum":
            return False
        return self._position(header.node, Resting(header.kind, header.chunk), header.snapshot) is not None

    def _position(self, node: int, source: Resting, snapshot: SnapshotId) -> int | None:
        work = self.work
        if work is None or snapshot != self.snapshot:
            return None
        found = (position for position, wanted in work.sources.items() if wanted == (node, source))
        return next((position for position in found if position not in work.arrived), None)

    def arrived(self, header: messages.ChunkHeader, digest: int) -> None:
        """A member's chunk came; `expects` was asked before."""
        assert header.kind != "sum"
        position = self._position(header.node, Resting(header.kind, header.chunk), header.snapshot)
        slot, work = self.slot(), self.work
        if slot is None or slot.geometry is None or work is None or position is None:
            self.job.ctx.emit(DropFrames((key_of(header),)))
            return
        if header.kind == "data":
            member = slot.geometry.group_of(slot.node).index(header.node)
            if slot.data_digest(member, header.chunk) != digest:
                self.job.digest_failures += 1
                self._without(slot, header.node, "sent a chunk that fails its digest")
                return
        work.arrived.add(position)
        self._compute_if_whole(slot)

    def _compute_if_whole(self, slot: Slot) -> None:
        work = self.work
        if work is None or work.arrived != set(work.sources) or slot.snapshot is None:
            return
        ctx, memory, number = self.job.ctx, slot.memory(self.job.name), self.job.ctx.new_sum()
        work.deadline_ns = ctx.seconds(limits.CHUNK_DEADLINE_S)
        ctx.stores[number] = memory
        ctx.emit(
            RepairChunk(
                memory=memory,
                snapshot=slot.snapshot,
                stripe=work.stripe,
                sources=tuple((p, self._key(*source)) for p, source in sorted(work.sources.items())),
                zero_positions=work.zero_positions,
                missing=work.missing,
                wanted_position=work.wanted_position,
                kind=work.wanted.kind,
                chunk=work.wanted.chunk,
                digest=work.digest,
                number=number,
            )
        )

    def unavailable(self, node: int, said: messages.ChunkUnavailable) -> None:
        """A member can't give its chunk: take others."""
        slot = self.slot()
        if slot is not None and self._position(node, Resting(said.kind, said.chunk), said.snapshot) is not None:
            self._without(slot, node, said.reason)

    def repaired(self, wanted: Resting, digest: int, *, good: bool, changed: bool) -> None:
        """A chunk was computed; `good`: it is right, and was written if what lay there differed (`changed`)."""
        slot, work, job = self.slot(), self.work, self.job
        if slot is None or work is None or work.wanted != wanted:
            return
        if not good:
            parity = sorted(p for p, (_, source) in work.sources.items() if source.kind == "parity")
            if not parity:
                self.work = None
                self._later(wanted, work.digest, "its stripe's data does not give its digest")
                self._next()
                return
            self._without(slot, work.sources[parity[0]][0], "sent parity that does not fit its stripe")
            return
        self.work = None
        job.health.damaged.discard(wanted)
        known = slot.digests[slot.resting_index(wanted.kind, wanted.chunk)]
        if digest != known:
            job.set_digests(slot, slot.resting_index(wanted.kind, wanted.chunk), (digest,))
        if changed or digest != known:
            job.health.repaired_chunks += 1
            job.ctx.log(
                f"job {job.name}: {wanted.kind} chunk {wanted.chunk} of {slot.snapshot} is repaired from its stripe",
                "warning",
            )
        self._next()

    # --- what does not come ---

    def tick(self) -> None:
        """Deadlines, members that died, and what waits for another try."""
        slot, now_ns = self.slot(), self.job.ctx.now_ns
        if slot is None:
            return
        work = self.work
        if work is not None:
            late = now_ns >= work.deadline_ns
            awaited = [node for position, (node, _) in work.sources.items() if position not in work.arrived]
            silent = [node for node in awaited if late or not self.peers.alive(node)]
            if silent:
                self._without(slot, silent[0], "is silent")
            elif late:  # a frame was dropped between its arrival and our hearing of it
                self._abandon()
                self.todo[work.wanted] = work.digest
        for wanted, (due_ns, digest) in list(self.retry_ns.items()):
            if now_ns >= due_ns:
                del self.retry_ns[wanted]
                self.todo[wanted] = digest
        self._next()

    def check(self) -> None:
        """Assert: what is to be repaired is shown as damaged, and waits in one place only."""
        waiting = [*self.todo, *self.retry_ns, *([] if self.work is None else [self.work.wanted])]
        assert len(waiting) == len(set(waiting)), waiting
        assert self.job.health.damaged >= set(waiting)
        assert self.work is None or self.work.arrived <= self.work.sources.keys()

    def _without(self, slot: Slot, node: int, reason: str) -> None:
        work = self.work
        assert work is not None
        self.job.ctx.log(
            f"job {self.job.name}: stripe {work.stripe} is repaired without {self.job.ctx.name_of(node)}: {reason}",
            "warning",
        )
        self._abandon()
        self.excluded.add(node)
        self._plan(slot, work.wanted, work.digest)
        self._next()

    def _abandon(self) -> None:
        work, self.work = self.work, None
        if work is not None:
            self.job.ctx.emit(DropFrames(tuple(self._key(*source) for source in work.sources.values())))

    def _later(self, wanted: Resting, digest: int | None, problem: str) -> None:
        job = self.job
        job.ctx.log(
            f"job {job.name}: {wanted.kind} chunk {wanted.chunk} of {self.snapshot} is damaged and can't be repaired "
            f"now: {problem}; tried again in {limits.REPAIR_RETRY_S} s",
            "error",
        )
        self.retry_ns[wanted] = job.ctx.seconds(limits.REPAIR_RETRY_S), digest

    def _key(self, node: int, source: Resting) -> ChunkKey:
        assert self.snapshot is not None
        attempt, step = self.snapshot.attempt, self.snapshot.step
        return ChunkKey(self.job.name, attempt, step, node, source.kind, source.chunk, reading=True)


def stripe_of(slot: Slot, wanted: Resting) -> int:
    """The stripe to which a chunk that this node holds belongs."""
    assert slot.geometry is not None
    stripes = slot.geometry.stripes(slot.node)
    me = slot.geometry.group_of(slot.node).index(slot.node)
    if wanted.kind == "data":
        return stripes.stripe_of(me, wanted.chunk)
    return stripes.parity_stripe(wanted.chunk, me)
