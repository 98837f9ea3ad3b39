"""Bringing back what this node lost of a committed snapshot: its image and its parity, chunk by chunk.

Covers one rebuild of one job on one node: when it starts, the memory for it, what is done already, and when the
snapshot is whole again. How a chunk is had, and that it is right, is in `fetch`. It starts by itself as soon as enough
survivors were met; chunks that a rank waits for come first. What is done outlives the worker: the slot's digest table
says what each chunk must be, so a successor reads the memory again and goes on with the rest.

The same machine repairs single chunks of a whole snapshot that fail their digest at rest.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Literal

from holdfast.daemon.core.actions import StoreDigests, VerifyChunks
from holdfast.daemon.core.collector import more_losses
from holdfast.daemon.core.fetch import Fetch
from holdfast.daemon.core.job import Job
from holdfast.daemon.core.memory import Memory
from holdfast.daemon.core.mixing import Goal
from holdfast.daemon.core.peers import Peers
from holdfast.daemon.core.pursuits import Pursuits
from holdfast.daemon.core.slot import Phase, Slot
from holdfast.protocol import limits, messages
from holdfast.protocol.frames import unpack_digests
from holdfast.protocol.ids import SnapshotId

Kind = Literal["data", "parity"]
Chunk = tuple[Kind, int]  # a chunk of this node's memory
FIRST_TICKET = 1 << 32  # beyond those of ranks that open their shards


class RebuildState(Enum):
    """Where a rebuild stands."""

    IDLE = auto()
    MEMORY = auto()  # waiting for memory
    VERIFY = auto()  # a predecessor began it: what it had done is read again
    DIGESTS = auto()  # waiting for the survivors' digest tables
    CHUNKS = auto()  # chunks flow
    DONE = auto()
    FAILED = auto()  # what is done is kept; it goes on when enough survivors are back


_WORDS: dict[RebuildState, Literal["", "running", "done", "failed"]] = {
    RebuildState.IDLE: "",
    RebuildState.MEMORY: "running",
    RebuildState.VERIFY: "running",
    RebuildState.DIGESTS: "running",
    RebuildState.CHUNKS: "running",
    RebuildState.DONE: "done",
    RebuildState.FAILED: "failed",
}


@dataclass(slots=True)
class Rebuild:
    """The rebuild of one job on this node; at most one at a time."""

    job: Job
    peers: Peers
    pursuits: Pursuits
    state: RebuildState = RebuildState.IDLE
    slot: Slot | None = None
    snapshot: SnapshotId | None = None
    fetch: Fetch | None = None
    done: set[Chunk] = field(default_factory=set)
    served: Callable[[], None] = lambda: None  # called when all is there that ranks wait for
    urgent: set[int] = field(default_factory=set)  # data chunks that ranks wait for
    unverified: deque[tuple[Kind, int, int]] = field(default_factory=deque)  # kind, first chunk, count
    ticket: int = FIRST_TICKET
    total_chunks: int = 0
    received_bytes: int = 0
    started_ns: int = 0
    ended_ns: int = 0
    retry_ns: int = 0
    problem: str = ""
    ask_digests_ns: int = 0

    @property
    def word(self) -> Literal["", "running", "done", "failed"]:
        """The state as heartbeat and status show it."""
        return _WORDS[self.state]

    @property
    def running(self) -> bool:
        """Whether a rebuild is under way."""
        return self.word == "running"

    @property
    def is_outdated(self) -> bool:
        """Whether the slot is not what this node lacks of the newest commit."""
        slot, job = self.slot, self.job
        if slot is None:
            return False
        known = job.committed_layout_id is not None
        return self.snapshot != job.committed or (known and slot.layout_id != job.committed_layout_id)

    @property
    def done_chunks(self) -> int:
        """Chunks that are in their place and right."""
        return len(self.done)

    @property
    def seconds(self) -> float:
        """How long it has taken so far, or took."""
        end_ns = self.job.ctx.now_ns if self.running else self.ended_ns
        return max(end_ns - self.started_ns, 0) / 1e9 if self.started_ns else 0.0

    # --- start ---

    def start(self) -> str:
        """Begin if something is lost, or go on. Returns why not, or an empty text."""
        job = self.job
        if self.running:
            return ""
        if job.lost_bytes == 0 or job.committed is None or job.committed_layout_id is None:
            return "nothing is lost here"
        self.problem = ""
        if self._holds_part():
            self.state, self.ended_ns = RebuildState.DIGESTS, 0
            self._ask_digests()
            return ""
        self.snapshot, self.started_ns, self.ended_ns = job.committed, job.ctx.now_ns, 0
        self.done.clear()
        self.received_bytes = self.total_chunks = 0
        self.slot = None
        self.state = RebuildState.MEMORY
        job.ctx.log(f"job {job.name}: rebuilding {self.snapshot}, {job.lost_bytes} bytes lost here")
        self._want_slot()
        return self.problem

    def _holds_part(self) -> bool:
        slot = self.slot
        return slot is not None and slot.phase is Phase.REBUILDING and slot.snapshot == self.job.committed

    def _start_by_itself(self) -> None:
        job = self.job
        if self.running or job.ctx.now_ns < self.retry_ns or job.lost_bytes == 0 or job.committed_layout_id is None:
            return
        geometry = job.geometry(job.committed_layout_id)
        self.snapshot = job.committed
        assert self.snapshot is not None
        if len(self._survivors()) >= geometry.stripes(job.ctx.node).data_count:
            self.start()
        elif self.peers.settled:  # what absent nodes left may make up for it
            reports, group = self.peers.reports(job.name), job.ctx.group
            lost = [node for node in group if node not in self._survivors()]
            if more_losses(self.snapshot, geometry, reports, group, lost) >= 0:
                self.start()

    def _want_slot(self) -> None:
        """Take a slot; if all hold a snapshot in flight, wait until one ends."""
        self.slot = self._take_slot()
        if self.problem:
            self._fail(self.problem)
        elif self.slot is not None:
            self.slot.reserved = True
            self.memory_ready(self.slot.memory(self.job.name))

    def _take_slot(self) -> Slot | None:
        job = self.job
        layout_id = job.committed_layout_id
        assert layout_id is not None
        for phase in (Phase.EMPTY, Phase.ALLOCATING):
            for slot in job.slots:
                if slot.phase is phase and not job.is_in_use(slot) and slot.layout_id == layout_id:
                    return slot
        self.problem = ""
        for slot in job.slots:
            if slot.phase not in {Phase.ABSENT, Phase.EMPTY}:
                continue
            self.problem = job.allocate(slot, job.geometry(layout_id)) or ""
            if not self.problem:
                return slot
        return None

    def memory_ready(self, memory: Memory) -> None:
        """The slot has memory: forget what its digest table says, and ask for the digests.

        The slot is claimed only at a later event. A ledger is written before everything else that an event causes: a
        successor that finds a slot being rebuilt must never find an older snapshot's digests in its table.
        """
        slot = self.slot
        if self.state is not RebuildState.MEMORY or slot is None or slot.memory(self.job.name) != memory:
            return
        if slot.phase is not Phase.EMPTY or slot.writing or self.snapshot is None:
            return
        self.job.ctx.emit(StoreDigests(memory, 0, (0,) * slot.sizes.digest_count))
        self.state = RebuildState.DIGESTS
        self._ask_digests()

    def resume(self, slot: Slot) -> None:
        """Go on with what a predecessor began: `slot` is being rebuilt, its known digests are in its table."""
        self.slot, self.snapshot, self.started_ns = slot, slot.snapshot, self.job.ctx.now_ns
        self.state = RebuildState.VERIFY
        for kind, count in self._own_chunks(slot).items():
            for first in range(0, count, limits.DIGEST_BATCH_CHUNKS):
                self.unverified.append((kind, first, min(limits.DIGEST_BATCH_CHUNKS, count - first)))
        self._verify_next()

    def _own_chunks(self, slot: Slot) -> dict[Kind, int]:
        assert slot.geometry is not None
        sizes, chunk_bytes = slot.sizes, slot.geometry.chunk_bytes
        return {"data": sizes.data_bytes // chunk_bytes, "parity": sizes.parity_bytes // chunk_bytes}

    def _verify_next(self) -> None:
        slot = self.slot
        assert slot is not None
        if not self.unverified:
            self.state = RebuildState.DIGESTS
            self.ask_digests_ns = 0  # asked at the next tick: nobody is met yet
            self.job.ctx.log(f"job {self.job.name}: {self.done_chunks} chunks of {self.snapshot} were rebuilt already")
            return
        kind, first, count = self.unverified[0]
        start = slot.resting_index(kind, first)
        digests = tuple(digest or 0 for digest in slot.digests[start : start + count])
        self.ticket += 1
        self.job.ctx.emit(VerifyChunks(slot.memory(self.job.name), self.ticket, first, digests, kind))

    def verified(self, ticket: int, bad: tuple[int, ...]) -> None:
        """Chunks that a predecessor may have rebuilt were read."""
        slot = self.slot
        if self.state is not RebuildState.VERIFY or ticket != self.ticket or slot is None:
            return
        kind, first, count = self.unverified.popleft()
        for chunk in range(first, first + count):
            if chunk not in bad and slot.digests[slot.resting_index(kind, chunk)]:
                self.done.add((kind, chunk))
        self._verify_next()

    def repair(self, slot: Slot, chunks: tuple[int, ...]) -> str:
        """Rebuild single data chunks that fail their digest at rest; returns why not, or an empty text."""
        if self.running and slot is not self.slot:
            return "a rebuild is running; try again when it is done"
        if not self.running:
            self.slot, self.snapshot, self.started_ns, self.problem = slot, slot.snapshot, self.job.ctx.now_ns, ""
            self.done = {("data", chunk) for chunk in range(self._own_chunks(slot)["data"])}
            self.done |= {("parity", chunk) for chunk in range(self._own_chunks(slot)["parity"])}
            self.fetch = None
        self.done -= {("data", chunk) for chunk in chunks}
        self.urgent |= set(chunks)
        if self.fetch is None:
            self._begin(slot)
        else:
            self.fetch.want(self._goals(slot, chunks=set(chunks)))
        return self.problem

    # --- digests ---

    def _survivors(self) -> list[int]:
        reports = self.peers.reports(self.job.name)
        return [node for node in self.job.ctx.group if node in reports and self.snapshot in reports[node].held]

    def _ask_digests(self) -> None:
        assert self.snapshot is not None
        self.ask_digests_ns = self.job.ctx.seconds(limits.PEER_DEADLINE_S)
        for node in self._survivors():  # any one would do; all answer the same, and one of them may be dying
            self.job.ctx.tell(node, messages.WantDigests(self.job.name, self.snapshot))

    def announced(self, said: messages.DigestsAnnounced) -> None:
        """A survivor sent part of the group's digest table."""
        slot = self.slot
        if self.state is not RebuildState.DIGESTS or slot is None or said.snapshot != self.snapshot:
            return
        if slot.phase is Phase.EMPTY and slot.layout_id == self.job.committed_layout_id and not slot.writing:
            slot.claim(Phase.REBUILDING, said.snapshot)
        if slot.phase is not Phase.REBUILDING or slot.geometry is None:
            return
        group = slot.geometry.group_of(slot.node)
        digests = tuple(unpack_digests(said.digests))
        if said.node not in group:
            return
        member = group.index(said.node)
        if said.first_chunk + len(digests) > slot.geometry.stripes(slot.node).chunk_counts[member]:
            return
        self.job.set_digests(slot, slot.digest_index(member, said.first_chunk), digests)
        self._begin_if_ready(slot)

    def _begin_if_ready(self, slot: Slot) -> None:
        """Begin once all digests are known and enough survivors were met.

        A fresh worker meets them one by one: who was not heard yet is not lost, until it has had its time.
        """
        if slot.phase is not Phase.REBUILDING:
            return
        assert slot.geometry is not None
        enough = len(self._survivors()) >= slot.geometry.stripes(slot.node).data_count or self.peers.settled
        if enough and all(digest is not None for digest in slot.digests[: slot.parity_digest_index(0)]):
            self._begin(slot)

    # --- chunks ---

    def _begin(self, slot: Slot) -> None:
        assert slot.geometry is not None
        assert slot.snapshot is not None
        self.total_chunks = sum(self._own_chunks(slot).values())
        self.state = RebuildState.CHUNKS
        self.fetch = Fetch(
            ctx=self.job.ctx,
            peers=self.peers,
            pursuits=self.pursuits,
            job=self.job.name,
            snapshot=slot.snapshot,
            geometry=slot.geometry,
            group=slot.geometry.group_of(slot.node),
            own_slot=lambda: None,  # its chunk of a stripe is the one that is wanted
            digests=slot.digests,
            done=self._got,
            failed=self._fail,
            received_bytes=self.received_bytes,
            own_estates=lambda: self.job.estates,
        )
        self.fetch.want(self._goals(slot))
        self._finish_if_whole()

    def _goals(self, slot: Slot, *, chunks: set[int] | None = None) -> list[Goal]:
        """What is missing, in stripe order; chunks that ranks wait for first. `chunks`: only these data chunks."""
        assert slot.geometry is not None
        stripes = slot.geometry.stripes(slot.node)
        me = slot.geometry.group_of(slot.node).index(slot.node)
        memory = slot.memory(self.job.name)
        goals = []
        for chunk in range(stripes.chunk_counts[me]):
            if ("data", chunk) not in self.done and (chunks is None or chunk in chunks):
                stripe = stripes.stripe_of(me, chunk)
                goals.append(Goal(stripe, stripes.data_members(stripe).index(me), memory, "data", chunk))
        for stripe in stripes.parity_stripes(me) if stripes.parity_count and chunks is None else ():
            place = stripes.parity_index(stripe, me)
            if ("parity", place) not in self.done:
                row = stripes.parity_members(stripe).index(me)
                goals.append(Goal(stripe, stripes.data_count + row, memory, "parity", place))
        return sorted(goals, key=lambda goal: (not self._is_urgent(goal), goal.stripe))

    def _is_urgent(self, goal: Goal) -> bool:
        return goal.kind == "data" and goal.chunk in self.urgent

    def hurry(self, first: int, count: int) -> None:
        """A rank waits for these data chunks."""
        self.urgent |= {chunk for chunk in range(first, first + count) if ("data", chunk) not in self.done}
        if self.fetch is not None:
            self.fetch.hurry(self._is_urgent)

    def has(self, slot: Slot, first: int, count: int) -> bool:
        """Whether these data chunks are in the slot that is being rebuilt."""
        return slot is self.slot and all(("data", chunk) in self.done for chunk in range(first, first + count))

    def _got(self, goal: Goal, digest: int) -> None:
        slot = self.slot
        assert slot is not None
        if goal.kind == "parity":
            self.job.set_digests(slot, slot.parity_digest_index(goal.chunk), (digest,))
        self.done.add((goal.kind, goal.chunk))
        if self._is_urgent(goal):
            self.urgent.discard(goal.chunk)
            if not self.urgent:
                self.served()
        self._finish_if_whole()

    def _finish_if_whole(self) -> None:
        if self.state is RebuildState.CHUNKS and self.done_chunks == self.total_chunks:
            self._finish()

    # --- time and ends ---

    def tick(self) -> None:
        """Deadlines, and what begins by itself."""
        self._start_by_itself()
        if self.state is RebuildState.MEMORY:
            if self.slot is None:
                self._want_slot()
            elif self.slot.phase is Phase.ABSENT:
                self._fail("the kernel gave no memory for it")
            else:
                self.memory_ready(self.slot.memory(self.job.name))
        if self.state is RebuildState.DIGESTS:
            if not self._survivors() and self.peers.settled:
                self._fail("no live node of the group holds this snapshot")
            else:
                if self.job.ctx.now_ns >= self.ask_digests_ns:
                    self._ask_digests()
                if self.slot is not None:
                    self._begin_if_ready(self.slot)
        if self.state is RebuildState.CHUNKS and self.fetch is not None:
            self.fetch.tick()
            self._count()

    def _count(self) -> None:
        if self.fetch is not None:
            self.received_bytes = self.fetch.received_bytes
            self.job.digest_failures += self.fetch.failures
            self.fetch.failures = 0

    def check(self) -> None:
        """Assert: each state has what it works with, and nothing of another."""
        assert (self.fetch is not None) == (self.state is RebuildState.CHUNKS), self.state
        assert not self.unverified or self.state is RebuildState.VERIFY, self.state
        if self.state in {RebuildState.VERIFY, RebuildState.CHUNKS}:
            assert self.slot is not None, self.state
        if self.state in {RebuildState.IDLE, RebuildState.DONE}:
            assert self.slot is None, self.state
        if self.slot is not None and self.slot.snapshot is not None:
            assert self.slot.snapshot == self.snapshot, (self.slot.snapshot, self.snapshot)

    def cancel(self, reason: str) -> None:
        """The snapshot is no longer worth rebuilding: a newer one is committed, or the attempt is over."""
        slot = self.slot
        if self.running or (slot is not None and slot.phase is Phase.REBUILDING):
            self._fail(reason)
            self.slot = None
            if slot is not None and slot.phase is Phase.REBUILDING:
                slot.clear()
            self.retry_ns = 0
            self.job.ensure_memory()
            self.job.grant_waiting()

    def _end_fetch(self) -> None:
        self._count()
        if self.fetch is not None:
            self.fetch.stop()
        self.fetch = None
        self.urgent.clear()
        self.unverified.clear()

    def _finish(self) -> None:
        slot, job = self.slot, self.job
        assert slot is not None
        if slot.phase is Phase.REBUILDING and self.snapshot != job.committed:
            self.cancel("a newer snapshot is committed")
            return
        self._end_fetch()
        if slot.phase is Phase.REBUILDING:
            slot.move(Phase.COMMITTED)
        self.state, self.ended_ns = RebuildState.DONE, job.ctx.now_ns
        job.check()
        job.ctx.log(
            f"job {job.name}: {self.snapshot} is whole again: {self.done_chunks} chunks in {self.seconds:.3f} s, "
            f"{self.received_bytes} bytes received"
        )
        self.slot = None
        job.ensure_memory()
        job.grant_waiting()

    def _fail(self, problem: str) -> None:
        self._end_fetch()
        self.state, self.ended_ns = RebuildState.FAILED, self.job.ctx.now_ns
        self.retry_ns = self.job.ctx.seconds(limits.REBUILD_RETRY_S)
        self.problem = self.problem or problem
        if self.slot is not None and self.slot.phase is not Phase.REBUILDING:
            self.slot.reserved = False
            self.slot = None
        self.job.ensure_memory()
        self.job.ctx.log(f"job {self.job.name}: rebuild of {self.snapshot} failed: {problem}", "error")
