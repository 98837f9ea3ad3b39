"""This node's part in the sums that others want: its chunk, times a factor, and what it gathers for it, sent on.

Covers one part of a sum. Who wants which chunk, from whom and with which factors is in `fetch`, on the node that wants
it. A part waits for what it gathers, and never for ever: who waits in vain says for whom.

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
from holdfast.protocol.estate_messages import MixChunk, MixPart
from holdfast.protocol.ids import SnapshotId

SumKey = tuple[int, int]  # (who wants it, its number)


@dataclass(slots=True)
class Part:
    """One part that this node owes."""

    job: str
    snapshot: SnapshotId
    order: messages.SumPart | MixPart
    deadline_ns: int
    absent: tuple[int, ...] = ()  # whose estate chunks of one are of
    came: dict[int, ChunkKey] = field(default_factory=dict)  # number -> frame, of what is gathered

    @property
    def missing(self) -> messages.SumTerm | None:
        """The first of what is gathered that has not come."""
        return next((term for term in self.order.gathers if term.number not in self.came), None)


def _chunks(order: messages.SumPart | MixPart) -> tuple[MixChunk, ...]:
    """The chunks that an order is about."""
    return order.chunks if isinstance(order, MixPart) else (MixChunk(order.kind, order.chunk, order.factor),)


@dataclass(slots=True)
class Sums:
    """All parts that this node owes to others."""

    ctx: Context
    registry: Registry
    owed: dict[SumKey, Part] = field(default_factory=dict)  # that gather
    awaited: dict[SumKey, SumKey] = field(default_factory=dict)  # what is gathered -> the part that gathers it
    early: dict[SumKey, tuple[messages.ChunkHeader, int, int]] = field(default_factory=dict)  # header, digest, until

    def wanted(self, node: int, said: messages.SumsWanted | messages.MixesWanted) -> None:
        """A node wants this one to take part in sums."""
        absent = said.absent if isinstance(said, messages.MixesWanted) else ()
        for order in said.parts:
            key = (node, order.number)
            if key in self.owed:
                continue  # heard twice
            if len(self.owed) >= limits.SUMS_HELD_COUNT_MAX or order.target >= len(self.ctx.config.nodes):
                self._fail(node, said.job, order.number, "it takes part in too many sums, or the target is no node")
                continue
            part = Part(said.job, said.snapshot, order, self.ctx.seconds(limits.SUM_PATIENCE_S), absent)
            if not order.gathers:
                self._add(node, part)
                continue
            frames = [(node, term.number) for term in order.gathers]
            if len(set(frames)) < len(frames) or not self.awaited.keys().isdisjoint(frames):
                self._fail(node, said.job, order.number, "what it is to gather has numbers that are taken")
                continue
            self.owed[key] = part
            self.awaited.update(dict.fromkeys(frames, key))
            for frame in frames:
                if frame in self.early:
                    header, digest, _ = self.early.pop(frame)
                    self.arrived(header, digest)

    def arrived(self, header: messages.ChunkHeader, digest: int) -> None:
        """A chunk came that a part gathers, or will once we hear of it."""
        key = (header.node, header.chunk)
        owner = self.awaited.get(key)
        frame = key_of_sum(header)
        if owner is None:
            if len(self.early) < limits.SUMS_HELD_COUNT_MAX:
                self.early[key] = (header, digest, self.ctx.seconds(limits.SUM_PATIENCE_S))
            else:
                self.ctx.emit(DropFrames((frame,)))
            return
        part = self.owed[owner]
        sender = next(term.node for term in part.order.gathers if term.number == header.chunk)
        if sender != header.sender or part.snapshot != header.snapshot or part.job != header.job:
            self.ctx.emit(DropFrames((frame,)))
            return
        part.came[header.chunk] = frame
        if header.digest != digest:
            self._drop(owner)
            name = self.ctx.name_of(header.sender)
            self._fail(header.node, part.job, part.order.number, f"what {name} sent was damaged on its way")
        elif part.missing is None:
            self._end(owner)
            self._add(header.node, part)

    def _end(self, owner: SumKey) -> Part:
        """A part waits for nothing any more."""
        part = self.owed.pop(owner)
        for term in part.order.gathers:
            self.awaited.pop((owner[0], term.number), None)
        return part

    def _drop(self, owner: SumKey) -> None:
        """Nothing comes of a part."""
        part = self._end(owner)
        if part.came:
            self.ctx.emit(DropFrames(tuple(part.came.values())))

    def _add(self, node: int, part: Part) -> None:
        order = part.order
        chunks = _chunks(order)
        found = [self._own_term(part, chunk) for chunk in chunks]
        own = [term for term in found if term is not None]
        if len(own) < len(chunks):
            if part.came:
                self.ctx.emit(DropFrames(tuple(part.came.values())))
            lacking = chunks[found.index(None)]
            text = f"{lacking.kind} chunk {lacking.chunk} of {part.snapshot} is not held there"
            self._fail(node, part.job, order.number, text)
            return
        header = sum_header(self.ctx, part.job, part.snapshot, wanter=node, number=order.number)
        incoming = tuple((term.factor, part.came[term.number]) for term in order.gathers)
        witness = own[0].factor if order.witness and isinstance(order, MixPart) else int(order.witness)
        self.ctx.emit(AddToSum(order.target, header, own[0], incoming, witness, tuple(own[1:])))

    def _own_term(self, part: Part, wanted: MixChunk) -> OwnTerm | None:
        parts = self.registry.get(part.job)
        if parts is None:
            return None
        if wanted.kind == "estate":
            held = parts.job.estate_of(part.snapshot, part.absent)
            return held.own_term(wanted.chunk, wanted.factor) if held is not None else None
        slot = parts.job.slot_of(part.snapshot)
        if slot is None or slot.phase not in COMPLETE or slot.geometry is None:
            return None
        return own_term(slot, part.job, kind=wanted.kind, chunk=wanted.chunk, factor=wanted.factor)

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
            self._drop(key)

    def tick(self) -> None:
        """Parts that waited in vain, and frames that nobody announced."""
        for key, part in list(self.owed.items()):
            if self.ctx.now_ns >= part.deadline_ns:
                term = part.missing
                assert term is not None, "what has all is sent at once"
                self._drop(key)
                self._fail(key[0], part.job, part.order.number, "nothing came", waits_for=term.node)
        for key, (header, _, until_ns) in list(self.early.items()):
            if self.ctx.now_ns >= until_ns:
                del self.early[key]
                self.ctx.emit(DropFrames((key_of_sum(header),)))

    def check(self) -> None:
        """Assert: what is gathered belongs to a part that is owed, all of it, and a part that has all is not owed."""
        frames = {(key[0], term.number): key for key, part in self.owed.items() for term in part.order.gathers}
        assert self.awaited == frames
        assert all(part.missing is not None for part in self.owed.values())
        assert len(self.early) <= limits.SUMS_HELD_COUNT_MAX
