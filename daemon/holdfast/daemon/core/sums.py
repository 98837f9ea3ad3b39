"""This node's part in the sums that others want: its chunk, times a factor, added to what comes and sent on.

Covers one link of the chain. Who wants which chunk, from whom and with which factors is in `fetch`, on the node that
wants it. A part waits for the sum so far, and never for ever: who waits in vain says for whom.

A frame counts only under a number that its wanter announced on the control plane, from the node that it named, and
undamaged; anything else is dropped.
"""

from dataclasses import dataclass, field

from holdfast.daemon.core.actions import AddToSum, DropFrames, OwnTerm
from holdfast.daemon.core.context import Context
from holdfast.daemon.core.memory import ChunkKey
from holdfast.daemon.core.registry import Registry
from holdfast.daemon.core.slot import COMPLETE
from holdfast.daemon.core.terms import key_of_sum, own_term, sum_header
from holdfast.protocol import limits, messages
from holdfast.protocol.ids import SnapshotId

SumKey = tuple[int, int]  # (who wants it, its number)


@dataclass(slots=True)
class Part:
    """One part that this node owes."""

    job: str
    snapshot: SnapshotId
    order: messages.SumPart
    deadline_ns: int


@dataclass(slots=True)
class Sums:
    """All parts that this node owes to others."""

    ctx: Context
    registry: Registry
    owed: dict[SumKey, Part] = field(default_factory=dict)  # that wait for their source
    early: dict[SumKey, tuple[messages.ChunkHeader, int, int]] = field(default_factory=dict)  # header, digest, until

    def wanted(self, node: int, said: messages.SumsWanted) -> None:
        """A node wants this one to take part in sums."""
        for order in said.parts:
            key = (node, order.number)
            if key in self.owed:
                continue  # heard twice
            if len(self.owed) >= limits.SUMS_HELD_COUNT_MAX or order.target >= len(self.ctx.config.nodes):
                self._fail(node, said.job, order.number, "it takes part in too many sums, or the target is no node")
                continue
            part = Part(said.job, said.snapshot, order, 0)
            if order.source is None:
                self._add(node, part, None)
                continue
            patience_s = limits.SUM_PATIENCE_S + order.place * limits.SUM_PATIENCE_STEP_S
            part.deadline_ns = self.ctx.seconds(patience_s)
            self.owed[key] = part
            if key in self.early:
                header, digest, _ = self.early.pop(key)
                self.arrived(header, digest)

    def arrived(self, header: messages.ChunkHeader, digest: int) -> None:
        """A sum so far came, for a part of ours or before we heard of it."""
        key = (header.node, header.chunk)
        part = self.owed.get(key)
        frame = key_of_sum(header)
        if part is None:
            if len(self.early) < limits.SUMS_HELD_COUNT_MAX:
                self.early[key] = (header, digest, self.ctx.seconds(limits.SUM_PATIENCE_S))
            else:
                self.ctx.emit(DropFrames((frame,)))
            return
        if part.order.source != header.sender or part.snapshot != header.snapshot or part.job != header.job:
            self.ctx.emit(DropFrames((frame,)))
            return
        del self.owed[key]
        if header.digest != digest:
            self.ctx.emit(DropFrames((frame,)))
            name = self.ctx.name_of(header.sender)
            self._fail(header.node, part.job, header.chunk, f"what {name} sent was damaged on its way")
            return
        self._add(header.node, part, frame)

    def _add(self, node: int, part: Part, incoming: ChunkKey | None) -> None:
        own = self._own_term(part)
        if own is None:
            if incoming is not None:
                self.ctx.emit(DropFrames((incoming,)))
            text = f"{part.order.kind} chunk {part.order.chunk} of {part.snapshot} is not held there"
            self._fail(node, part.job, part.order.number, text)
            return
        header = sum_header(self.ctx, part.job, part.snapshot, wanter=node, number=part.order.number)
        self.ctx.emit(AddToSum(part.order.target, header, own, incoming, part.order.witness))

    def _own_term(self, part: Part) -> OwnTerm | None:
        parts = self.registry.get(part.job)
        slot = parts.job.slot_of(part.snapshot) if parts is not None else None
        if slot is None or slot.phase not in COMPLETE or slot.geometry is None:
            return None
        return own_term(slot, part.job, kind=part.order.kind, chunk=part.order.chunk, factor=part.order.factor)

    def added(self, header: messages.ChunkHeader, fingerprint: bytes) -> None:
        """Our chunk is in a sum: be its witness."""
        self.ctx.tell(header.node, messages.SumWitness(header.job, header.chunk, fingerprint))

    def not_added(self, header: messages.ChunkHeader, reason: str) -> None:
        """Our chunk can't be had."""
        self._fail(header.node, header.job, header.chunk, reason)

    def _fail(self, node: int, job: str, number: int, reason: str, waits_for: int | None = None) -> None:
        self.ctx.tell(node, messages.SumFailed(job, number, reason[: limits.TEXT_CHARS_MAX], waits_for))

    def wanter_lost(self, node: int) -> None:
        """A node that wanted sums is gone or came back as another process: it waits for none of them."""
        for key in [key for key in self.owed if key[0] == node]:
            del self.owed[key]

    def tick(self) -> None:
        """Parts that waited in vain, and frames that nobody announced."""
        for (node, number), part in list(self.owed.items()):
            if self.ctx.now_ns >= part.deadline_ns:
                del self.owed[node, number]
                self._fail(node, part.job, number, "nothing came", waits_for=part.order.source)
        for key, (header, _, until_ns) in list(self.early.items()):
            if self.ctx.now_ns >= until_ns:
                del self.early[key]
                self.ctx.emit(DropFrames((key_of_sum(header),)))
