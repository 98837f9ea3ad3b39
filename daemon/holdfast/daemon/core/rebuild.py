"""Bringing back what this node lost of a committed snapshot, stripe by stripe, from k chunks each.

Covers one rebuild of one job on one node: which chunks are asked from whom, what happens when a source is silent, dead
or wrong, and when the snapshot is whole again. The same machine repairs single chunks that fail their digest at rest.

Every rebuilt data chunk must have the digest that its owner announced before the loss. A rebuilt parity chunk is
encoded from data chunks that passed theirs, so nothing wrong can enter it.
"""

from collections import deque
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Literal

from holdfast.daemon.core.actions import DropFrames, RebuildStripe
from holdfast.daemon.core.job import Job
from holdfast.daemon.core.memory import ChunkKey, Memory
from holdfast.daemon.core.peers import Peers
from holdfast.daemon.core.protect import key_of
from holdfast.daemon.core.slot import Phase, Slot
from holdfast.protocol import limits, messages
from holdfast.protocol.frames import unpack_digests
from holdfast.protocol.ids import SnapshotId


class RebuildState(Enum):
    """Where a rebuild stands."""

    IDLE = auto()
    MEMORY = auto()  # waiting for memory
    DIGESTS = auto()  # waiting for the survivors' digest tables
    STRIPES = auto()  # chunks flow
    DONE = auto()
    FAILED = auto()


_WORDS: dict[RebuildState, Literal["", "running", "done", "failed"]] = {
    RebuildState.IDLE: "",
    RebuildState.MEMORY: "running",
    RebuildState.DIGESTS: "running",
    RebuildState.STRIPES: "running",
    RebuildState.DONE: "done",
    RebuildState.FAILED: "failed",
}


@dataclass(slots=True)
class StripeWork:
    """One stripe in flight."""

    sources: dict[int, tuple[int, str, int]]  # position -> (node, kind, chunk)
    zero_positions: tuple[int, ...]
    missing: tuple[tuple[int, int], ...]
    wanted_position: int
    kind: str
    chunk: int  # own chunk index: data chunk, or parity index
    deadline_ns: int
    arrived: set[int] = field(default_factory=set)
    computing: bool = False


@dataclass(slots=True)
class Rebuild:
    """The rebuild of one job on this node; at most one at a time."""

    job: Job
    peers: Peers
    state: RebuildState = RebuildState.IDLE
    slot: Slot | None = None
    snapshot: SnapshotId | None = None
    todo: deque[int] = field(default_factory=deque)
    work: dict[int, StripeWork] = field(default_factory=dict)
    excluded: set[tuple[int, int]] = field(default_factory=set)  # (stripe, node) that failed us
    retries: dict[int, int] = field(default_factory=dict)  # stripe -> how often all sources were tried anew
    total_chunks: int = 0
    done_chunks: int = 0
    received_bytes: int = 0
    started_ns: int = 0
    ended_ns: int = 0
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

    # --- start ---

    def start(self) -> str:
        """Begin if something is lost. Returns why not, or an empty text."""
        job = self.job
        if self.running:
            return ""
        if job.lost_bytes == 0 or job.committed is None or job.committed_layout_id is None:
            return "nothing is lost here"
        self.snapshot, self.started_ns, self.ended_ns, self.problem = (
            job.committed,
            job.ctx.now_ns,
            0,
            "",
        )
        self.todo.clear()
        self.work.clear()
        self.excluded.clear()
        self.received_bytes = self.done_chunks = self.total_chunks = 0
        self.retries.clear()
        self.slot = None
        self.state = RebuildState.MEMORY
        job.ctx.log(f"job {job.name}: rebuilding {self.snapshot}, {job.lost_bytes} bytes lost here")
        self._want_slot()
        return self.problem

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
                free = slot.phase is phase and not slot.writing
                if free and slot.geometry and slot.geometry.layout.layout_id == layout_id:
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
        """The slot has memory: claim it and ask for the digests."""
        slot = self.slot
        if self.state is not RebuildState.MEMORY or slot is None or slot.memory(self.job.name) != memory:
            return
        if slot.phase is not Phase.EMPTY or self.snapshot is None:
            return
        slot.claim(Phase.REBUILDING, self.snapshot)
        self.state = RebuildState.DIGESTS
        self._ask_digests()

    def repair(self, slot: Slot, chunks: tuple[int, ...]) -> str:
        """Rebuild single data chunks of a complete snapshot that fail their digest at rest."""
        if self.running:
            return "a rebuild is running; try again when it is done"
        assert slot.geometry is not None
        stripes = slot.geometry.stripes(slot.node)
        me = slot.geometry.group_of(slot.node).index(slot.node)
        self.slot, self.snapshot, self.started_ns, self.problem = (
            slot,
            slot.snapshot,
            self.job.ctx.now_ns,
            "",
        )
        self.work.clear()
        self.excluded.clear()
        self.todo = deque(stripes.stripe_of(me, chunk) for chunk in chunks)
        self.total_chunks, self.done_chunks, self.received_bytes = len(self.todo), 0, 0
        self.state = RebuildState.STRIPES
        self._pump()
        return self.problem

    # --- digests ---

    def _survivors(self) -> list[int]:
        group = self.job.ctx.group
        reports = self.peers.reports(self.job.name)
        return [node for node in group if node in reports and self.snapshot in reports[node].held]

    def _ask_digests(self) -> None:
        assert self.snapshot is not None
        survivors = self._survivors()
        self.ask_digests_ns = self.job.ctx.seconds(limits.PEER_DEADLINE_S)
        for node in survivors:  # any one would do; all answer the same, and one of them may be dying
            self.job.ctx.tell(node, messages.WantDigests(self.job.name, self.snapshot))

    def announced(self, said: messages.DigestsAnnounced) -> None:
        """A survivor sent part of the group's digest table."""
        slot = self.slot
        if (
            self.state is not RebuildState.DIGESTS
            or slot is None
            or slot.geometry is None
            or said.snapshot != self.snapshot
        ):
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
        assert slot.geometry is not None
        group_size = len(slot.geometry.group_of(slot.node))
        enough = len(self._survivors()) >= slot.geometry.stripes(slot.node).data_count or self.peers.settled
        if enough and all(digest is not None for digest in slot.digests[: slot.digest_index(group_size, 0)]):
            self._begin_stripes(slot)

    def _begin_stripes(self, slot: Slot) -> None:
        assert slot.geometry is not None
        stripes = slot.geometry.stripes(slot.node)
        me = slot.geometry.group_of(slot.node).index(slot.node)
        own = {stripes.stripe_of(me, chunk) for chunk in range(stripes.chunk_counts[me])}
        self.todo = deque(sorted(own | (set(stripes.parity_stripes(me)) if stripes.parity_count else set())))
        self.total_chunks = len(self.todo)
        self.state = RebuildState.STRIPES
        self._pump()

    # --- stripes ---

    def _pump(self) -> None:
        while self.state is RebuildState.STRIPES and self.todo and len(self.work) < limits.REBUILD_STRIPES_OPEN_MAX:
            stripe = self.todo.popleft()
            self._plan(stripe)
        if self.state is RebuildState.STRIPES and not self.todo and not self.work:
            self._finish()

    def _plan(self, stripe: int) -> None:
        slot = self.slot
        assert slot is not None
        assert slot.geometry is not None
        stripes = slot.geometry.stripes(slot.node)
        group = slot.geometry.group_of(slot.node)
        me = group.index(slot.node)
        alive = self._survivors()
        survivors = [group.index(n) for n in alive if (stripe, n) not in self.excluded]
        if len(survivors) < stripes.data_count <= len(alive) and self._may_retry(stripe):
            survivors = [group.index(n) for n in alive]  # one bad or late frame is no reason to give all up
        data = stripes.data_members(stripe)
        real = {position: (member, chunk) for position, member, chunk in stripes.contributions(stripe)}
        zeros = tuple(p for p in range(stripes.data_count) if p not in real)
        sources: dict[int, tuple[int, str, int]] = {
            p: (group[member], "data", chunk) for p, (member, chunk) in real.items() if member in survivors
        }
        for row, member in enumerate(stripes.parity_members(stripe)):
            if len(sources) + len(zeros) < stripes.data_count and member in survivors:
                sources[stripes.data_count + row] = (
                    group[member],
                    "parity",
                    stripes.parity_index(stripe, member),
                )
        if len(sources) + len(zeros) < stripes.data_count:
            lost = sorted(self.job.ctx.name_of(n) for n in group if n not in self._survivors())
            self._fail(
                f"stripe {stripe} needs {stripes.data_count} of its {stripes.member_count} chunks, found "
                f"{len(sources) + len(zeros)}; lost or silent: {', '.join(lost)}; parity covers {stripes.parity_count}"
            )
            return
        is_data = me in data
        missing = tuple((p, self._digest_of(slot, *real[p])) for p in sorted(real) if p not in sources)
        self.work[stripe] = StripeWork(
            sources=sources,
            zero_positions=zeros,
            missing=missing,
            wanted_position=data.index(me)
            if is_data
            else stripes.data_count + stripes.parity_members(stripe).index(me),
            kind="data" if is_data else "parity",
            chunk=real[data.index(me)][1] if is_data else stripes.parity_index(stripe, me),
            deadline_ns=self.job.ctx.seconds(limits.CHUNK_DEADLINE_S),
        )
        assert self.snapshot is not None
        for node, kind, chunk in sources.values():
            assert kind in {"data", "parity"}
            self.job.ctx.tell(
                node,
                messages.ReadChunk(self.job.name, self.snapshot, "data" if kind == "data" else "parity", chunk),
            )

    def _may_retry(self, stripe: int) -> bool:
        self.excluded = {(s, node) for s, node in self.excluded if s != stripe}
        self.retries[stripe] = self.retries.get(stripe, 0) + 1
        return self.retries[stripe] < limits.CHUNK_RETRIES_MAX

    def _digest_of(self, slot: Slot, member: int, chunk: int) -> int:
        digest = slot.digests[slot.digest_index(member, chunk)]
        assert digest is not None
        return digest

    def arrived(self, header: messages.ChunkHeader, digest: int, *, chunk_bytes: int) -> None:
        """A survivor's chunk came."""
        found = self._expecting(header.node, header.kind, header.chunk)
        slot = self.slot
        if self._is_kept(header):
            return  # asked twice and sent twice: the shell kept the first frame, and it is needed
        if found is None or slot is None or header.snapshot != self.snapshot:
            self.job.ctx.emit(DropFrames((key_of(header),)))
            return
        stripe, position = found
        work = self.work[stripe]
        self.received_bytes += chunk_bytes
        if header.kind == "data":
            assert slot.geometry is not None
            member = slot.geometry.group_of(slot.node).index(header.node)
            if self._digest_of(slot, member, header.chunk) != digest:
                self.job.digest_failures += 1
                self._replan(stripe, header.node, "sent a chunk that fails its digest")
                return
        work.arrived.add(position)
        if work.arrived == set(work.sources) and not work.computing:
            work.computing, work.deadline_ns = True, self.job.ctx.seconds(limits.CHUNK_DEADLINE_S)
            self.job.ctx.emit(self._rebuild_action(slot, stripe, work))

    def _rebuild_action(self, slot: Slot, stripe: int, work: StripeWork) -> RebuildStripe:
        assert self.snapshot is not None
        return RebuildStripe(
            memory=slot.memory(self.job.name),
            snapshot=self.snapshot,
            stripe=stripe,
            sources=tuple((position, self._key(*source)) for position, source in sorted(work.sources.items())),
            zero_positions=work.zero_positions,
            missing=work.missing,
            wanted_position=work.wanted_position,
            kind="data" if work.kind == "data" else "parity",
            chunk=work.chunk,
        )

    def _key(self, node: int, kind: str, chunk: int) -> ChunkKey:
        assert self.snapshot is not None
        return ChunkKey(
            self.job.name,
            self.snapshot.attempt,
            self.snapshot.step,
            node,
            kind,
            chunk,
            reading=True,
        )

    def _expecting(self, node: int, kind: str, chunk: int) -> tuple[int, int] | None:
        for stripe, work in self.work.items():
            for position, source in work.sources.items():
                if source == (node, kind, chunk) and position not in work.arrived:
                    return stripe, position
        return None

    def _is_kept(self, header: messages.ChunkHeader) -> bool:
        source = (header.node, header.kind, header.chunk)
        works = self.work.values() if header.snapshot == self.snapshot else ()
        return any(work.sources[position] == source for work in works for position in work.arrived)

    def rebuilt(self, memory: Memory, stripe: int, digest: int, bad_positions: tuple[int, ...]) -> None:
        """A lost chunk was computed."""
        slot, work = self.slot, self.work.get(stripe)
        if slot is None or work is None or memory != slot.memory(self.job.name):
            return
        if bad_positions:
            suspect = next((source for source in work.sources.values() if source[1] == "parity"), None)
            if suspect is None:
                self._fail(f"stripe {stripe}: the code word does not give the digests that were announced")
                return
            self.job.digest_failures += 1
            self._replan(stripe, suspect[0], "sent parity that does not fit its stripe")
            return
        del self.work[stripe]
        self.done_chunks += 1
        if work.kind == "parity":
            self.job.set_digests(slot, slot.parity_digest_index(work.chunk), (digest,))
        self._pump()

    def unavailable(self, node: int, said: messages.ChunkUnavailable) -> None:
        """A survivor can't give a chunk: take others."""
        found = self._expecting(node, said.kind, said.chunk)
        if found is not None and said.snapshot == self.snapshot:
            self._replan(found[0], node, said.reason)

    def _replan(self, stripe: int, node: int, reason: str) -> None:
        self.job.ctx.log(
            f"job {self.job.name}: stripe {stripe} is rebuilt without node {self.job.ctx.name_of(node)}: {reason}",
            "warning",
        )
        self.excluded.add((stripe, node))
        self._abandon(stripe)
        self._plan(stripe)
        self._pump()

    def _abandon(self, stripe: int) -> None:
        work = self.work.pop(stripe)
        self.job.ctx.emit(DropFrames(tuple(self._key(*source) for source in work.sources.values())))

    # --- time and ends ---

    def tick(self) -> None:
        """Deadlines, and sources that died."""
        now_ns = self.job.ctx.now_ns
        if self.state is RebuildState.MEMORY:
            if self.slot is None:
                self._want_slot()
            elif self.slot.phase is Phase.ABSENT:
                self._fail("the kernel gave no memory for it")
        if self.state is RebuildState.DIGESTS:
            if not self._survivors() and self.peers.settled:
                self._fail("no live node of the group holds this snapshot")
            else:
                if now_ns >= self.ask_digests_ns:
                    self._ask_digests()
                if self.slot is not None:
                    self._begin_if_ready(self.slot)
        for stripe, work in list(self.work.items()):
            silent = [
                source[0]
                for position, source in work.sources.items()
                if position not in work.arrived and (now_ns >= work.deadline_ns or not self.peers.alive(source[0]))
            ]
            if stripe not in self.work or self.state is not RebuildState.STRIPES:
                continue
            if silent:
                self._replan(stripe, silent[0], "is silent")
            elif now_ns >= work.deadline_ns:  # a frame was dropped between its arrival and our hearing of it
                self._abandon(stripe)
                self._plan(stripe)

    def cancel(self, reason: str) -> None:
        """The snapshot is no longer worth rebuilding: a newer one is committed, or the attempt is over."""
        if self.running:
            self._fail(reason)

    def _finish(self) -> None:
        slot, job = self.slot, self.job
        assert slot is not None
        if slot.phase is Phase.REBUILDING and self.snapshot != job.committed:
            self._fail("a newer snapshot is committed")
            return
        if slot.phase is Phase.REBUILDING:
            slot.move(Phase.COMMITTED)
        self.state, self.ended_ns = RebuildState.DONE, job.ctx.now_ns
        job.check()
        seconds = (self.ended_ns - self.started_ns) / 1e9
        job.ctx.log(f"job {job.name}: {self.snapshot} is whole again: {self.done_chunks} chunks in {seconds:.3f} s")
        job.ensure_memory()
        job.grant_waiting()

    def _fail(self, problem: str) -> str:
        self.state, self.ended_ns = RebuildState.FAILED, self.job.ctx.now_ns
        self.problem = self.problem or problem
        computing = any(work.computing for work in self.work.values())
        keys = tuple(self._key(*source) for work in self.work.values() for source in work.sources.values())
        self.job.ctx.emit(DropFrames(keys))
        self.work.clear()
        self.todo.clear()
        if self.slot is not None:
            self.slot.reserved = False
            if self.slot.phase is Phase.REBUILDING:
                self.slot.clear()
                if computing:  # the engine may still write into this memory: nobody else gets it
                    self.job.free(self.slot)
            self.job.ensure_memory()
        self.job.ctx.log(f"job {self.job.name}: rebuild of {self.snapshot} failed: {problem}", "error")
        return self.problem
