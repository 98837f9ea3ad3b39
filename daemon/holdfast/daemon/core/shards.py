"""Giving a rank its shard of a committed snapshot back: verified first or by the rank, rebuilt first if it was lost.

Covers OpenShard and CloseShard of one job on one node. The snapshot can't be released under a restoring rank: a newer
commit needs a sealed shard of every role, and a role stages only after its restore.
"""

from dataclasses import dataclass, field

from holdfast.daemon.core.actions import GiveMemory, VerifyChunks
from holdfast.daemon.core.job import Job
from holdfast.daemon.core.memory import Memory
from holdfast.daemon.core.rebuild import Rebuild, RebuildState
from holdfast.daemon.core.slot import COMPLETE, Slot
from holdfast.protocol import limits, messages
from holdfast.protocol.exit_codes import ExitCode
from holdfast.protocol.frames import pack_digests
from holdfast.protocol.layout import Layout


@dataclass(slots=True)
class Opening:
    """One rank's wish to read its shard."""

    client: int
    request: messages.OpenShard
    repaired: bool = False


@dataclass(slots=True)
class Shards:
    """The ranks of one job that want to read."""

    job: Job
    rebuild: Rebuild
    verifying: dict[int, Opening] = field(default_factory=dict)  # ticket -> opening
    pending: list[Opening] = field(default_factory=list)  # wait for a rebuild
    next_ticket: int = 1

    def __post_init__(self) -> None:
        self.rebuild.served = self.tick

    def open(self, client: int, request: messages.OpenShard) -> None:
        """A rank wants its shard."""
        job = self.job
        if request.attempt > job.attempt:
            job.begin_attempt(request.attempt, request.snapshot)
        if request.attempt < job.attempt or request.snapshot != job.committed:
            text = f"{request.snapshot} is not what attempt {job.attempt} restores here ({job.committed})"
            self._deny(client, text, code=ExitCode.NOT_RECOVERABLE)
            return
        layout = job.layouts.get(job.committed_layout_id)
        if layout is None:
            self._deny(
                client,
                "this node doesn't know the snapshot's layout yet",
                code=ExitCode.UNREACHABLE,
                retry=True,
            )
            return
        if request.role >= len(layout.shards) or layout.shards[request.role].node != job.ctx.node:
            where = (
                f"on node {job.ctx.name_of(layout.shards[request.role].node)}"
                if request.role < len(layout.shards)
                else f"nowhere: the snapshot has {len(layout.shards)} ranks"
            )
            text = (
                f"the shard of role {request.role} lies {where}, this rank runs on {job.ctx.name_of(job.ctx.node)}; "
                "start each rank on the node of its role in the snapshot"
            )
            self._deny(client, text, code=ExitCode.NOT_RECOVERABLE)
            return
        self._advance(Opening(client, request))

    def _advance(self, opening: Opening) -> None:
        slot = self.job.slot_of(opening.request.snapshot)
        if slot is not None and (slot.phase in COMPLETE or self._is_there(slot, opening)):
            count = self._chunks(self._layout_of(slot), opening.request.role)[1]
            if opening.request.verify or count > limits.SHARD_DIGESTS_COUNT_MAX:
                self._verify(slot, opening)
            else:
                self._give(slot, opening, self._digests(slot, opening))
            return
        problem = self.rebuild.start()
        if problem:
            self._deny(
                opening.client,
                f"{opening.request.snapshot}: {problem}",
                code=ExitCode.NOT_RECOVERABLE,
            )
            return
        layout = self.job.layouts.get(self.job.committed_layout_id)
        assert layout is not None, "open has looked"
        self.rebuild.hurry(*self._chunks(layout, opening.request.role))
        self.pending.append(opening)
        self._tell_pending(opening)

    def _is_there(self, slot: Slot, opening: Opening) -> bool:
        """Whether a shard is whole in a slot that is still being rebuilt."""
        return self.rebuild.has(slot, *self._chunks(self._layout_of(slot), opening.request.role))

    @staticmethod
    def _layout_of(slot: Slot) -> Layout:
        assert slot.geometry is not None
        return slot.geometry.layout

    def _tell_pending(self, opening: Opening) -> None:
        text = f"rebuilding: {self.rebuild.done_chunks} of {self.rebuild.total_chunks} chunks"
        request = opening.request
        self.job.ctx.reply(
            opening.client,
            messages.ShardPending(self.job.name, request.snapshot, request.role, text),
        )

    def _verify(self, slot: Slot, opening: Opening) -> None:
        first, _ = self._chunks(self._layout_of(slot), opening.request.role)
        ticket, self.next_ticket = self.next_ticket, self.next_ticket + 1
        self.verifying[ticket] = opening
        self.job.ctx.emit(VerifyChunks(slot.memory(self.job.name), ticket, first, self._digests(slot, opening)))

    def _digests(self, slot: Slot, opening: Opening) -> tuple[int, ...]:
        """Of the chunks that a shard touches."""
        assert slot.geometry is not None
        first, count = self._chunks(slot.geometry.layout, opening.request.role)
        start = slot.digest_index(slot.geometry.group_of(slot.node).index(slot.node), first)
        digests = tuple(digest for digest in slot.digests[start : start + count] if digest is not None)
        assert len(digests) == count
        return digests

    def _chunks(self, layout: Layout, role: int) -> tuple[int, int]:
        """The first chunk of a role's shard in the node's image, and how many there are."""
        chunk_bytes = self.job.ctx.config.chunk_bytes
        start = layout.offset_of(role)
        end = start + layout.shards[role].shard_bytes
        first = start // chunk_bytes
        return first, -(-end // chunk_bytes) - first

    def verified(self, memory: Memory, ticket: int, bad: tuple[int, ...]) -> None:
        """The shard's chunks were read and compared."""
        opening = self.verifying.pop(ticket, None)
        slot = self.job.find(memory)
        if opening is None or slot is None or slot.snapshot != opening.request.snapshot or slot.geometry is None:
            return
        if not bad:
            self._give(slot, opening)
            return
        self.job.digest_failures += len(bad)
        self.job.ctx.log(
            f"job {self.job.name}: chunks {bad} of {slot.snapshot} fail their digest at rest",
            "error",
        )
        problem = "chunks fail their digest again after repair" if opening.repaired else self.rebuild.repair(slot, bad)
        if problem:
            text = f"{len(bad)} chunks of {slot.snapshot} fail their digest and can't be repaired: {problem}"
            self._deny(opening.client, text, code=ExitCode.BAD_DIGEST)
            return
        opening.repaired = True
        self.pending.append(opening)

    def _give(self, slot: Slot, opening: Opening, digests: tuple[int, ...] = ()) -> None:
        assert slot.geometry is not None
        assert slot.snapshot is not None
        role, layout = opening.request.role, slot.geometry.layout
        self.job.ctx.emit(GiveMemory(opening.client, slot.memory(self.job.name), slot.sizes.data_bytes))
        self.job.ctx.reply(
            opening.client,
            messages.ShardOpened(
                job=self.job.name,
                snapshot=slot.snapshot,
                role=role,
                slot=slot.index,
                generation=slot.generation,
                offset_bytes=layout.offset_of(role),
                shard_bytes=layout.shards[role].shard_bytes,
                chunk_bytes=self.job.ctx.config.chunk_bytes,
                first_chunk=self._chunks(layout, role)[0],
                digests=pack_digests(digests),
            ),
        )

    def tick(self) -> None:
        """Serve those whose rebuild ended; tell the others how far it is."""
        waiting, self.pending = self.pending, []
        for opening in waiting:
            slot = self.job.slot_of(opening.request.snapshot)
            if self.rebuild.running and not (slot is not None and self._is_there(slot, opening)):
                self.pending.append(opening)
                self._tell_pending(opening)
            elif self.rebuild.running:
                self._advance(opening)
            elif self.rebuild.state is RebuildState.FAILED:
                text = f"{opening.request.snapshot} can't be rebuilt here: {self.rebuild.problem}"
                self._deny(opening.client, text, code=ExitCode.NOT_RECOVERABLE)
            else:
                self._advance(opening)

    def client_gone(self, client: int) -> None:
        """Forget the wishes of a process that ended."""
        self.pending = [opening for opening in self.pending if opening.client != client]
        self.verifying = {t: opening for t, opening in self.verifying.items() if opening.client != client}

    def _deny(self, client: int, text: str, *, code: ExitCode, retry: bool = False) -> None:
        self.job.ctx.reply(client, messages.Denied("OpenShard", self.job.name, code, text, retry=retry))
