"""From sealed to protected: digests, chunks out to the parity holders, parity from those that come in, the fact.

Covers the exchange of one job's open snapshots on one node. What may be sent when is in `Transfer`; which slot is open
is in `Job`.
"""

from dataclasses import dataclass

from holdfast.daemon.core.actions import DigestChunks, DropFrames, EncodeParity, SendChunk
from holdfast.daemon.core.job import Job
from holdfast.daemon.core.memory import ChunkKey, Memory
from holdfast.daemon.core.slot import COMPLETE, IN_FLIGHT, Phase, Slot
from holdfast.daemon.core.transfer import Arrival, Transfer
from holdfast.protocol import limits, messages
from holdfast.protocol.frames import pack_digests, unpack_digests
from holdfast.protocol.ids import SnapshotId


def key_of(header: messages.ChunkHeader) -> ChunkKey:
    """The name under which the shell keeps the frame that came with a header."""
    return ChunkKey(
        job=header.job,
        attempt=header.snapshot.attempt,
        step=header.snapshot.step,
        node=header.node,
        kind=header.kind,
        chunk=header.chunk,
        reading=header.reading,
    )


@dataclass(slots=True)
class Protect:
    """Drives the open snapshots of one job towards their fact."""

    job: Job

    # --- from the ranks ---

    def seal(self, client: int, seal: messages.Seal) -> None:
        """A rank's shard is whole; with the last one the image is sealed and digesting begins."""
        job = self.job
        job.wrote(client)
        slot = job.slot_of(seal.snapshot)
        if slot is None or slot.phase is not Phase.STAGING or job.roles.get(seal.role) != client:
            job.tell_progress(client)
            job.grant_waiting()
            return
        slot.sealed_roles.add(seal.role)
        self.advance(slot)

    def advance(self, slot: Slot) -> None:
        """Take every step that the state of an open slot allows."""
        job, ctx = self.job, self.job.ctx
        assert slot.transfer is not None
        if slot.phase is Phase.STAGING and slot.sealed_roles >= set(slot.roles):
            slot.move(Phase.SEALED)
            slot.sealed_ns, slot.ask_digests_ns = ctx.now_ns, ctx.seconds(limits.PEER_DEADLINE_S)
            job.tell_progress()
            self._digest_next(slot)
        self._send(slot)
        for stripe in sorted(slot.transfer.arrived):
            self._encode_if_whole(slot, stripe)
        if slot.phase is Phase.SEALED and slot.transfer.complete:
            self._state_fact(slot)

    def _digest_next(self, slot: Slot) -> None:
        assert slot.transfer is not None
        assert slot.snapshot is not None
        first, total = slot.transfer.digested_count, len(slot.transfer.own_digests)
        if first < total:
            count = min(limits.DIGEST_BATCH_CHUNKS, total - first)
            self.job.ctx.emit(DigestChunks(slot.memory(self.job.name), slot.snapshot, first, count))

    def _send(self, slot: Slot) -> None:
        assert slot.transfer is not None
        for node, chunk in slot.transfer.next_sends(self.job.ctx.now_ns):
            self.job.ctx.emit(SendChunk(node, slot.memory(self.job.name), self._header(slot, chunk)))

    def _header(self, slot: Slot, chunk: int) -> messages.ChunkHeader:
        ctx = self.job.ctx
        assert slot.snapshot is not None
        return messages.ChunkHeader(
            cluster=ctx.config.cluster_name,
            epoch=ctx.config.epoch,
            sender=ctx.node,
            incarnation=ctx.incarnation,
            job=self.job.name,
            snapshot=slot.snapshot,
            node=ctx.node,
            kind="data",
            chunk=chunk,
            reading=False,
        )

    def _state_fact(self, slot: Slot) -> None:
        job = self.job
        assert slot.snapshot is not None
        slot.move(Phase.PROTECTED)  # the exchange goes on: others still need our chunks for their parity
        job.check()
        job.tell_progress()
        job.ctx.tell_all(messages.NodeProtected(job.name, slot.snapshot, job.ctx.node))

    # --- from the shell's threads ---

    def digested(self, memory: Memory, first_chunk: int, digests: tuple[int, ...]) -> None:
        """Own chunks were digested: announce the digests to the group, then send the chunks."""
        slot = self.job.find(memory)
        if slot is None or slot.phase is not Phase.SEALED or slot.transfer is None or slot.snapshot is None:
            return
        slot.transfer.digested(first_chunk, digests)
        self.job.set_digests(slot, slot.digest_index(slot.transfer.me, first_chunk), digests)
        self.job.ctx.tell_group(
            messages.DigestsAnnounced(
                self.job.name, slot.snapshot, self.job.ctx.node, first_chunk, pack_digests(digests)
            )
        )
        self._digest_next(slot)
        self.advance(slot)

    def encoded(self, memory: Memory, stripe: int, digest: int) -> None:
        """A parity chunk is complete: its contributions are acknowledged, which lets their senders go on."""
        slot = self.job.find(memory)
        if slot is None or slot.transfer is None or slot.geometry is None or stripe not in slot.transfer.unencoded:
            return
        stripes = slot.geometry.stripes(slot.node)
        slot.transfer.encoded(stripe)
        index = slot.parity_digest_index(stripes.parity_index(stripe, slot.transfer.me))
        self.job.set_digests(slot, index, (digest,))
        for _, member, chunk in stripes.contributions(stripe):
            self._answer(slot, slot.transfer.group[member], chunk, ok=True)
        self.advance(slot)

    def _answer(self, slot: Slot, node: int, chunk: int, *, ok: bool) -> None:
        assert slot.snapshot is not None
        self.job.ctx.tell(node, messages.ChunkReply(self.job.name, slot.snapshot, chunk, ok))

    # --- from the peers ---

    def announced(self, said: messages.DigestsAnnounced) -> None:
        """A member announced digests of its chunks."""
        slot = self.job.slot_of(said.snapshot)
        if slot is None:
            self.job.openings.want(said.snapshot)
            slot = self.job.slot_of(said.snapshot)
        if slot is None or slot.transfer is None or said.node not in slot.transfer.waiting:
            return  # nothing is open, or the digests are our own or of another group
        digests = unpack_digests(said.digests)
        member = slot.transfer.group.index(said.node)
        table = slot.transfer.announced.get(member)
        if table is None or said.first_chunk + len(digests) > len(table):
            self.job.ctx.log(
                f"job {self.job.name}: node {said.node} announced digests {said.first_chunk}+{len(digests)} "
                f"beyond its {0 if table is None else len(table)} chunks; ignored",
                "warning",
            )
            return
        wrong = slot.transfer.announce(member, said.first_chunk, digests)
        self.job.set_digests(slot, slot.digest_index(member, said.first_chunk), tuple(digests))
        for wrong_member, chunk in wrong:
            self._reject(slot, slot.transfer.group[wrong_member], chunk)
        self.advance(slot)

    def arrived(self, header: messages.ChunkHeader, digest: int) -> None:
        """A contribution to parity came on the bulk plane."""
        slot = self.job.slot_of(header.snapshot)
        key = key_of(header)
        if slot is None or slot.transfer is None or header.sender != header.node:
            self.job.ctx.emit(DropFrames((key,)))
            if slot is not None and slot.phase in COMPLETE and header.kind == "data":
                self._answer(slot, header.sender, header.chunk, ok=True)  # our acknowledgement was lost
            return
        group = slot.transfer.group
        member = group.index(header.node) if header.node in group else -1
        arrival = (
            Arrival.STRAY if member < 0 or header.kind != "data" else slot.transfer.arrive(member, header.chunk, digest)
        )
        match arrival:
            case Arrival.KEPT:
                assert slot.geometry is not None
                self._encode_if_whole(slot, slot.geometry.stripes(slot.node).stripe_of(member, header.chunk))
            case Arrival.DUPLICATE:
                if slot.transfer.is_encoded(member, header.chunk):
                    self.job.ctx.emit(DropFrames((key,)))
                    self._answer(slot, header.sender, header.chunk, ok=True)
                else:  # its first frame may have been dropped with a bad one, and the encoding have found nothing
                    assert slot.geometry is not None
                    stripe = slot.geometry.stripes(slot.node).stripe_of(member, header.chunk)
                    slot.transfer.encoding.discard(stripe)
                    self._encode_if_whole(slot, stripe)
            case Arrival.BAD:
                self._reject(slot, header.node, header.chunk)
            case Arrival.STRAY:
                self.job.ctx.emit(DropFrames((key,)))

    def _reject(self, slot: Slot, node: int, chunk: int) -> None:
        snapshot = slot.snapshot
        assert snapshot is not None
        self.job.digest_failures += 1
        self.job.ctx.log(
            f"job {self.job.name}: chunk {chunk} of node {self.job.ctx.name_of(node)} for {snapshot} arrived with a "
            "wrong digest; asked for it again",
            "warning",
        )
        key = ChunkKey(self.job.name, snapshot.attempt, snapshot.step, node, "data", chunk, reading=False)
        self.job.ctx.emit(DropFrames((key,)))
        self._answer(slot, node, chunk, ok=False)

    def _encode_if_whole(self, slot: Slot, stripe: int) -> None:
        transfer, snapshot = slot.transfer, slot.snapshot
        assert transfer is not None
        assert snapshot is not None
        if not transfer.encodable(stripe):
            return
        transfer.encoding.add(stripe)
        stripes = transfer.geometry.stripes(slot.node)
        sources = tuple(
            (
                position,
                ChunkKey(
                    self.job.name,
                    snapshot.attempt,
                    snapshot.step,
                    transfer.group[member],
                    "data",
                    chunk,
                    reading=False,
                ),
            )
            for position, member, chunk in stripes.contributions(stripe)
        )
        self.job.ctx.emit(
            EncodeParity(
                memory=slot.memory(self.job.name),
                snapshot=snapshot,
                stripe=stripe,
                row=stripes.parity_members(stripe).index(transfer.me),
                parity_index=stripes.parity_index(stripe, transfer.me),
                sources=sources,
            )
        )

    def replied(self, node: int, reply: messages.ChunkReply) -> None:
        """A holder acknowledged a chunk of ours or wants it again."""
        slot = self.job.slot_of(reply.snapshot)
        if slot is None or slot.transfer is None:
            return
        if slot.transfer.acknowledged(node, reply.chunk, ok=reply.ok):
            self._send(slot)
        elif slot.phase in IN_FLIGHT:
            name = self.job.ctx.name_of(node)
            self.job.give_up(
                slot,
                f"chunk {reply.chunk} failed its digest at node {name} {limits.CHUNK_RETRIES_MAX} times",
            )

    def peer_opened(self, node: int, snapshot: SnapshotId) -> None:
        """A holder has room."""
        slot = self.job.slot_of(snapshot)
        if slot is None:
            self.job.openings.want(snapshot)
            slot = self.job.slot_of(snapshot)
        if slot is None or slot.transfer is None or node not in slot.transfer.waiting:
            return  # no slot is free yet, or the node is of another group: it takes no chunks of ours
        if node not in slot.transfer.ready:
            slot.transfer.ready.add(node)
            self._announce_to(slot, node)
            self.advance(slot)

    def _announce_to(self, slot: Slot, node: int) -> None:
        """Say all known own digests to one peer, again: it has just come back, or seems to have missed something."""
        assert slot.transfer is not None
        assert slot.snapshot is not None
        known = [digest for digest in slot.transfer.own_digests if digest is not None]
        for first in range(0, len(known), limits.DIGESTS_PER_MESSAGE_MAX):
            packed = pack_digests(known[first : first + limits.DIGESTS_PER_MESSAGE_MAX])
            said = messages.DigestsAnnounced(self.job.name, slot.snapshot, self.job.ctx.node, first, packed)
            self.job.ctx.tell(node, said)

    def peer_lost_flight(self, node: int, *, restarted: bool) -> None:
        """What was in flight to a peer is gone; nothing more is sent until it says that it has room.

        A peer that restarted may have lost what it acknowledged, too: it gets everything again, and acknowledges at
        once what it still has.
        """
        for slot in self.job.slots:
            if slot.transfer is not None:
                slot.transfer.ready.discard(node)
                if restarted:
                    slot.transfer.send_again(node)

    def tick(self) -> None:
        """Deadlines."""
        self.job.tick()
        for slot in self.job.slots:
            if slot.transfer is not None:
                self._check_deadlines(slot, slot.transfer)

    def _check_deadlines(self, slot: Slot, transfer: Transfer) -> None:
        now_ns = self.job.ctx.now_ns
        if transfer.moved_count != slot.moved_count:
            slot.moved_count, slot.deadline_ns = transfer.moved_count, self.job.ctx.seconds(limits.PROTECT_STALL_S)
        if slot.phase in IN_FLIGHT and now_ns >= slot.deadline_ns:
            text = f"no progress for {limits.PROTECT_STALL_S} s: {transfer.missing_text()}"
            self.job.give_up(slot, text)
            return
        for node in transfer.expire(now_ns):
            self._announce_to(slot, node)
        self._send(slot)
        if slot.phase is Phase.STAGING:
            self.advance(slot)
        elif slot.phase is Phase.SEALED and slot.snapshot is not None and now_ns >= slot.ask_digests_ns:
            # An announcement may be lost while no chunk is late that would make its sender repeat it.
            slot.ask_digests_ns = self.job.ctx.seconds(limits.PEER_DEADLINE_S)
            for node in transfer.silent_nodes():
                self.job.ctx.tell(node, messages.WantDigests(self.job.name, slot.snapshot))
