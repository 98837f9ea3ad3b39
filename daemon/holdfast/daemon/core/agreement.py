"""Do the data and parity of a stripe agree? The members of a group compare fingerprints instead of chunks.

Covers one job on one node: as the first parity holder of a stripe it asks all members for the fingerprints of their
chunks (256 bytes each), a window of stripes at a time, spread over the scrub's period; and it answers when another
asks.

A chunk is read and digested before its fingerprint is told, so here only what digests can't show is left: parity that
was wrong when its digest was taken, or a digest that rotted together with its chunk. Data that has the digest its owner
announced is right, by definition; so parity that disagrees is encoded anew from data that passed. With m >= 2 the
syndrome may name a data chunk instead (`find_disagreement`): its holder then compares it with the asking node's copy
of the digest, which is older than any damage to the holder's own.
"""

from dataclasses import dataclass, field

from holdfast.coding import CodeParams, Disagreement, find_disagreement
from holdfast.daemon.core.actions import ScrubChunks
from holdfast.daemon.core.health import Resting
from holdfast.daemon.core.job import Job
from holdfast.daemon.core.memory import Memory
from holdfast.daemon.core.peers import Peers
from holdfast.daemon.core.repair import Repair
from holdfast.daemon.core.scrub import Pacing, Scrub, interval_of
from holdfast.daemon.core.slot import Slot
from holdfast.protocol import limits
from holdfast.protocol.health import FINGERPRINT_BYTES, ChunkSuspected, FingerprintsGiven, WantFingerprints
from holdfast.protocol.ids import SnapshotId

_ZERO = bytes(FINGERPRINT_BYTES)  # of a chunk that does not exist: zeros


@dataclass(slots=True)
class Window:
    """The stripes that are being compared now."""

    stripes: tuple[int, ...]
    waits_for: set[int]  # members that have not answered
    found: dict[tuple[int, int], bytes]  # (stripe, member) -> fingerprint
    deadline_ns: int


@dataclass(slots=True)
class Agreement:
    """The comparing of one job's stripes, as the one who asks and as one who is asked."""

    job: Job
    peers: Peers
    repair: Repair
    scrub: Scrub
    compares: tuple[Memory, SnapshotId] | None = None
    stripes: tuple[int, ...] = ()  # those whose first parity holder is this node
    pacing: Pacing = field(default_factory=Pacing)
    window: Window | None = None
    asked: dict[int, tuple[int | None, tuple[int, ...], tuple[tuple[Resting, int], ...]]] = field(default_factory=dict)
    next_ticket: int = -1  # counts down: no ticket is also one of the scrub's

    # --- asking ---

    def tick(self) -> None:
        """Time passes: begin a pass, ask for the next window, give up waiting."""
        slot, interval_ns, now_ns = self.repair.slot(), interval_of(self.job), self.job.ctx.now_ns
        if slot is None or slot.snapshot is None or slot.geometry is None or interval_ns == 0:
            self.compares, self.window = None, None
            self.asked.clear()
            return
        compares = slot.memory(self.job.name), slot.snapshot
        if compares != self.compares:
            self.compares, self.window, self.stripes = compares, None, _first_held(slot)
            self.asked.clear()
            self.pacing = Pacing(now_ns)
        elif self.pacing.done >= len(self.stripes) and now_ns >= self.pacing.started_ns + interval_ns:
            self.pacing = Pacing(now_ns)
        if self.window is not None and now_ns >= self.window.deadline_ns:
            self._end_window()
        due = self.pacing.due(len(self.stripes), interval_ns=interval_ns, now_ns=now_ns)
        if self.window is None and due > 0:
            self._ask(slot, min(due, limits.AGREEMENT_STRIPES_MAX))

    def _ask(self, slot: Slot, count: int) -> None:
        """Ask all members; whoever is away is not waited for, and its stripes are compared another time."""
        assert slot.geometry is not None
        assert slot.snapshot is not None
        stripes = self.stripes[self.pacing.done : self.pacing.done + count]
        group, reports = slot.geometry.group_of(slot.node), self.peers.reports(self.job.name)
        if any(node not in reports or slot.snapshot not in reports[node].held for node in group if node != slot.node):
            return  # the group is not whole, which the status shows; nothing can be compared
        self.window = Window(stripes, set(range(len(group))), {}, self.job.ctx.seconds(limits.CHUNK_DEADLINE_S))
        for node in group:
            self.job.ctx.tell(node, WantFingerprints(self.job.name, slot.snapshot, stripes))
        self._read(slot, None, stripes)

    def given(self, node: int, said: FingerprintsGiven) -> None:
        """A member's fingerprints."""
        slot = self.repair.slot()
        if slot is None or slot.geometry is None or said.snapshot != slot.snapshot:
            return
        group = slot.geometry.group_of(slot.node)
        if node in group and len(said.fingerprints) == FINGERPRINT_BYTES * len(said.stripes):
            cut = range(0, len(said.fingerprints), FINGERPRINT_BYTES)
            prints = tuple(said.fingerprints[i : i + FINGERPRINT_BYTES] for i in cut)
            self._collect(slot, group.index(node), dict(zip(said.stripes, prints, strict=True)))

    def _collect(self, slot: Slot, member: int, prints: dict[int, bytes]) -> None:
        window = self.window
        if window is None or member not in window.waits_for or not set(prints) <= set(window.stripes):
            return  # of a window that is over
        window.waits_for.discard(member)
        window.found |= {(stripe, member): print_ for stripe, print_ in prints.items()}
        if not window.waits_for:
            for stripe in window.stripes:
                self._compare(slot, stripe, window.found)
            self._end_window()

    def _end_window(self) -> None:
        assert self.window is not None
        self.pacing.done += len(self.window.stripes)
        self.window = None

    def _compare(self, slot: Slot, stripe: int, found: dict[tuple[int, int], bytes]) -> None:
        assert slot.geometry is not None
        stripes = slot.geometry.stripes(slot.node)
        real = {position: member for position, member, _ in stripes.contributions(stripe)}
        members = [*(real.get(p) for p in range(stripes.data_count)), *stripes.parity_members(stripe)]
        prints = [_ZERO if member is None else found.get((stripe, member)) for member in members]
        if any(print_ is None for print_ in prints):
            return  # a chunk fails its digest, and is being repaired
        params = CodeParams(stripes.data_count, stripes.parity_count)
        wrong = find_disagreement(params, [print_ for print_ in prints if print_ is not None])
        if wrong is not None:
            self._disagrees(slot, stripe, wrong)

    def _disagrees(self, slot: Slot, stripe: int, wrong: Disagreement) -> None:
        """All digests are right, and parity is not that of the data."""
        assert slot.geometry is not None
        assert slot.snapshot is not None
        job, stripes, group = self.job, slot.geometry.stripes(slot.node), slot.geometry.group_of(slot.node)
        job.health.disagreeing_stripes += 1
        suspects: list[tuple[int, Resting, int]] = []
        named = {position: (member, chunk) for position, member, chunk in stripes.contributions(stripe)}
        if wrong.position in named:
            member, chunk = named[wrong.position]
            suspects.append((group[member], Resting("data", chunk), slot.data_digest(member, chunk)))
        else:
            for row in wrong.rows:
                member = stripes.parity_members(stripe)[row]
                suspects.append((group[member], Resting("parity", stripes.parity_index(stripe, member)), 0))
        names = ", ".join(f"{chunk.kind} chunk {chunk.chunk} of {job.ctx.name_of(node)}" for node, chunk, _ in suspects)
        job.ctx.log(f"job {job.name}: stripe {stripe} of {slot.snapshot} disagrees with its parity: {names}", "error")
        for node, suspect, digest in suspects:
            if node == slot.node:
                self._suspected(suspect, digest)
            else:
                job.ctx.tell(node, ChunkSuspected(job.name, slot.snapshot, suspect.kind, suspect.chunk, digest))

    # --- being asked ---

    def wanted(self, node: int, said: WantFingerprints) -> None:
        """Another member compares stripes."""
        slot = self.repair.slot()
        if slot is None or slot.snapshot != said.snapshot or slot.geometry is None:
            return
        if node in slot.geometry.group_of(slot.node):
            count = slot.geometry.stripes(slot.node).stripe_count
            self._read(slot, node, tuple(stripe for stripe in said.stripes if stripe < count))

    def _read(self, slot: Slot, asker: int | None, stripes: tuple[int, ...]) -> None:
        """Have the own chunks of these stripes read; a later question of the same node replaces an earlier one."""
        assert slot.snapshot is not None
        self.asked = {ticket: entry for ticket, entry in self.asked.items() if entry[0] != asker}
        found: list[tuple[int, Resting, int]] = []
        for stripe in stripes:
            held = _own_chunk(slot, stripe)
            digest = slot.digests[slot.resting_index(held.kind, held.chunk)] if held is not None else None
            if held is not None and digest is not None:
                found.append((stripe, held, digest))
        batch = tuple((held, digest) for _, held, digest in found)
        ticket, self.next_ticket = self.next_ticket, self.next_ticket - 1
        self.asked[ticket] = asker, tuple(stripe for stripe, _, _ in found), batch
        self.job.ctx.emit(ScrubChunks(slot.memory(self.job.name), slot.snapshot, ticket, batch, fingerprints=True))

    def read(self, ticket: int, bad: tuple[Resting, ...], fingerprints: tuple[bytes, ...]) -> None:
        """Own chunks were read for a comparison."""
        if ticket not in self.asked:
            return  # the same node has asked for other stripes meanwhile
        asker, stripes, batch = self.asked.pop(ticket)
        slot = self.repair.slot()
        if slot is None or slot.snapshot is None or slot.geometry is None:
            return
        for wanted, digest in batch:
            if wanted in bad:
                self.scrub.found_bad(wanted, digest)
        prints = {stripe: print_ for stripe, print_ in zip(stripes, fingerprints, strict=True) if print_}
        if asker is None:
            self._collect(slot, slot.geometry.group_of(slot.node).index(slot.node), prints)
        else:
            told = FingerprintsGiven(self.job.name, slot.snapshot, tuple(prints), b"".join(prints.values()))
            self.job.ctx.tell(asker, told)

    def suspected(self, said: ChunkSuspected) -> None:
        """A member found that a chunk of ours disagrees with its stripe."""
        slot = self.repair.slot()
        if slot is None or said.snapshot != slot.snapshot or slot.geometry is None:
            return
        held = slot.sizes.data_bytes if said.kind == "data" else slot.sizes.parity_bytes
        if said.chunk < held // slot.geometry.chunk_bytes:
            self._suspected(Resting(said.kind, said.chunk), said.digest)

    def _suspected(self, suspect: Resting, digest: int) -> None:
        self.repair.want(suspect, digest if suspect.kind == "data" else None)


def _first_held(slot: Slot) -> tuple[int, ...]:
    """The stripes whose first parity chunk this node holds, in order; none without parity."""
    assert slot.geometry is not None
    stripes, me = slot.geometry.stripes(slot.node), slot.geometry.group_of(slot.node).index(slot.node)
    if stripes.parity_count == 0:
        return ()
    return tuple(stripe for stripe in stripes.parity_stripes(me) if stripes.parity_members(stripe)[0] == me)


def _own_chunk(slot: Slot, stripe: int) -> Resting | None:
    """The chunk that this node holds of a stripe; None if it has none there."""
    assert slot.geometry is not None
    stripes, me = slot.geometry.stripes(slot.node), slot.geometry.group_of(slot.node).index(slot.node)
    if me in stripes.parity_members(stripe):
        return Resting("parity", stripes.parity_index(stripe, me)) if stripes.contributions(stripe) else None
    chunk = stripes.chunk_at(stripe, me)
    return None if chunk is None else Resting("data", chunk)
