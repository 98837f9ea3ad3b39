"""The drill: proof on live data that a committed snapshot survives any m losses, without touching it.

Covers one job on one node: which stripes and losses are sampled, fetching all chunks of a stripe as a rebuild would,
and what was proven when. The rebuilding itself is the shell's (`DrillStripe`): as if the sampled members were lost, by
the engine and, in sampled columns, by a library that nobody here wrote. Every node drills stripes of its own, so
together they sample all. A member that is away counts as lost in every pattern, so what is proven is what is left.

Samples come from a digest of (worker session, drill, number): different in every drill, and the same in every replay.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import combinations
from math import comb

from holdfast.coding import chunk_digest
from holdfast.daemon.core.actions import DrillStripe, DropFrames
from holdfast.daemon.core.health import Resting
from holdfast.daemon.core.job import Job
from holdfast.daemon.core.memory import ChunkKey
from holdfast.daemon.core.peers import Peers
from holdfast.daemon.core.protect import key_of
from holdfast.daemon.core.repair import Repair
from holdfast.daemon.core.slot import Slot
from holdfast.protocol import limits, messages
from holdfast.protocol.health import DrillReport
from holdfast.protocol.ids import SnapshotId
from msgspec import structs


@dataclass(slots=True)
class Fetching:
    """One sampled stripe on its way."""

    stripe: int
    sources: dict[int, tuple[int, Resting]]  # position -> (node, its chunk)
    own: tuple[int, Resting]  # position, and the chunk of this node
    absent: tuple[int, ...]  # positions whose members are away
    started_ns: int
    deadline_ns: int
    arrived: set[int] = field(default_factory=set)
    computing: bool = False


@dataclass(slots=True)
class Drill:
    """The drills of one job on this node. One stripe at a time."""

    job: Job
    peers: Peers
    repair: Repair
    report: DrillReport = field(default_factory=DrillReport)  # of the last drill that ended
    ended_ns: int = 0
    snapshot: SnapshotId | None = None  # that is being drilled
    todo: list[int] = field(default_factory=list)
    work: Fetching | None = None
    next_ns: int = 0  # when the next periodic drill begins; 0: not set yet
    postponed: tuple[int, int] | None = None  # (stripes, when) of a drill that waits for members
    stripes: int = 0  # of the running drill, proven so far, as all that follows
    patterns: int = 0
    columns: int = 0
    rebuilt_bytes: int = 0
    spent_ns: int = 0
    failures: int = 0
    absent: int = 0  # members that are away: lost already
    problem: str = ""

    @property
    def running(self) -> bool:
        """Whether a drill is under way."""
        return self.snapshot is not None

    def shown(self) -> DrillReport:
        """What heartbeats say of it."""
        age_s = (self.job.ctx.now_ns - self.ended_ns) / 1e9 if self.report.drills else 0.0
        return structs.replace(self.report, age_s=age_s, running=self.running)

    def check(self) -> None:
        """Assert: stripes are worked on only in a drill, and only what was asked for has come."""
        assert self.running or (self.work is None and not self.todo)
        assert self.work is None or self.work.arrived <= self.work.sources.keys()

    # --- begin and end ---

    def start(self, stripe_count: int, *, patient: bool = True) -> None:
        """Begin a drill, unless one is under way.

        Args:
            stripe_count: stripes to sample.
            patient: whether members that live and have not said yet that they hold the snapshot get the time to.
        """
        slot = self.repair.slot()
        if self.running or slot is None or slot.snapshot is None or slot.geometry is None:
            return
        late = [node for node in self._away(slot) if self.peers.alive(node)]
        if late and patient:
            self.postponed = stripe_count, self.job.ctx.seconds(limits.HEARTBEAT_S * 3)
            return
        self.postponed = None
        self.snapshot, self.problem = slot.snapshot, ""
        self.stripes = self.patterns = self.columns = self.rebuilt_bytes = self.spent_ns = self.failures = 0
        self.absent = len(self._away(slot))
        stripes = slot.geometry.stripes(slot.node)
        if stripes.parity_count == 0:
            self._end("parity is 0: no loss of a node is survived")
            return
        me = slot.geometry.group_of(slot.node).index(slot.node)
        candidates = [s for s in stripes.parity_stripes(me) if stripes.parity_members(s)[0] == me]
        if stripe_count < len(candidates):
            candidates = [candidates[self._draw(f"stripe {i}") % len(candidates)] for i in range(stripe_count)]
        self.todo = list(dict.fromkeys(candidates))
        self._next()

    def _away(self, slot: Slot) -> list[int]:
        """Members of the group that should hold some of the snapshot and don't, or are silent."""
        assert slot.geometry is not None
        reports, geometry = self.peers.reports(self.job.name), slot.geometry
        return [
            node
            for node in geometry.group_of(slot.node)
            if node != slot.node
            and geometry.data_bytes(node) + geometry.parity_bytes(node) > 0
            and (node not in reports or slot.snapshot not in reports[node].held)
        ]

    def _draw(self, what: str) -> int:
        ctx = self.job.ctx
        return chunk_digest(f"{ctx.node} {ctx.worker_session} {self.report.drills} {what}".encode())

    def _end(self, problem: str = "") -> None:
        self._abandon()
        self.problem = self.problem or problem
        if self.problem:
            self.job.ctx.log(f"job {self.job.name}: drill of {self.snapshot}: {self.problem}", "warning")
        proven = self.stripes > 0 and not self.failures and not self.problem
        last = self.report
        self.report = DrillReport(
            drills=last.drills + 1,
            proven=self.snapshot if proven else None,
            survives=max(self.job.ctx.config.parity - self.absent, 0) if proven else 0,
            stripes=self.stripes,
            patterns=self.patterns,
            columns=self.columns,
            failures=self.failures,
            rebuild_bytes_per_s=int(self.rebuilt_bytes * 1e9 / self.spent_ns) if self.spent_ns else 0,
            problem=self.problem[: limits.TEXT_CHARS_MAX],
            drilled=self.snapshot,
        )
        self.ended_ns, self.snapshot = self.job.ctx.now_ns, None
        self.todo.clear()

    def tick(self) -> None:
        """Deadlines, and the periodic drill."""
        ctx = self.job.ctx
        slot = self.repair.slot()
        if self.running and (slot is None or slot.snapshot != self.snapshot):
            self._superseded()
        if self.work is not None and ctx.now_ns >= self.work.deadline_ns:
            late = {self.work.sources[p][0] for p in set(self.work.sources) - self.work.arrived}
            names = ", ".join(ctx.name_of(node) for node in sorted(late)) or "this node's own work"
            self._end(f"stripe {self.work.stripe}: nothing within {limits.CHUNK_DEADLINE_S} s from {names}")
        if self.postponed is not None and ctx.now_ns >= self.postponed[1]:
            self.start(self.postponed[0], patient=False)
        period_ns = int(ctx.config.drill_period_s * 1e9)
        if slot is not None and period_ns:
            if self.next_ns == 0:  # the first one soon: nobody believes what was never proven
                self.next_ns = ctx.now_ns + min(period_ns, int(limits.DRILL_FIRST_S * 1e9))
            elif ctx.now_ns >= self.next_ns and not self.running:
                self.next_ns = ctx.now_ns + period_ns
                self.start(limits.DRILL_STRIPES)

    def _superseded(self) -> None:
        """A newer snapshot was committed in the middle: what was proven until then counts, and it counts for that."""
        if self.stripes or self.failures:
            self._end()
        else:  # nothing was proven: try again at once with the newer one
            self._abandon()
            self.snapshot, self.next_ns = None, min(self.next_ns, self.job.ctx.now_ns)
            self.todo.clear()

    # --- one stripe ---

    def _next(self) -> None:
        slot = self.repair.slot()
        if not self.running:
            return
        if slot is None or slot.snapshot != self.snapshot:
            self._superseded()
        elif not self.todo:
            self._end("" if self.stripes or self.failures else "this node holds no stripe to sample")
        else:
            self._fetch(slot, self.todo.pop(0))

    def _fetch(self, slot: Slot, stripe: int) -> None:
        assert slot.geometry is not None
        assert slot.snapshot is not None
        job, stripes, group = self.job, slot.geometry.stripes(slot.node), slot.geometry.group_of(slot.node)
        reports = self.peers.reports(job.name)
        chunks = {position: (group[member], Resting("data", chunk)) for position, member, chunk in
                  stripes.contributions(stripe)}  # fmt: skip
        for row, member in enumerate(stripes.parity_members(stripe)):
            held = Resting("parity", stripes.parity_index(stripe, member))
            chunks[stripes.data_count + row] = group[member], held
        absent = tuple(
            position
            for position, (node, _) in sorted(chunks.items())
            if node != slot.node and (node not in reports or slot.snapshot not in reports[node].held)
        )
        away = ", ".join(job.ctx.name_of(chunks[position][0]) for position in absent)
        if len(absent) > stripes.parity_count:
            self.failures += 1
            self._end(f"{away} are away: more than the {stripes.parity_count} that parity covers")
            return
        own = stripes.data_count
        assert chunks[own][0] == slot.node
        sources = {p: chunk for p, chunk in chunks.items() if p != own and p not in absent}
        self.work = Fetching(
            stripe, sources, (own, chunks[own][1]), absent, job.ctx.now_ns, job.ctx.seconds(limits.CHUNK_DEADLINE_S)
        )
        for node, source in sources.values():
            job.ctx.tell(node, messages.ReadChunk(job.name, slot.snapshot, source.kind, source.chunk))
        self._drill_if_whole(slot)

    def expects(self, header: messages.ChunkHeader) -> bool:
        """Whether a chunk that came is one that the drill waits for."""
        return header.snapshot == self.snapshot and self._position(header) is not None

    def _position(
        self, header: messages.ChunkHeader | messages.ChunkUnavailable, node: int | None = None
    ) -> int | None:
        work = self.work
        if work is None or header.kind not in {"data", "parity"}:
            return None
        holder = header.node if isinstance(header, messages.ChunkHeader) else node
        for position, (source, chunk) in work.sources.items():
            if (source, chunk.kind, chunk.chunk) == (holder, header.kind, header.chunk):
                return position if position not in work.arrived else None
        return None

    def arrived(self, header: messages.ChunkHeader, digest: int) -> None:
        """A member's chunk came; `expects` was asked before."""
        slot, work, position = self.repair.slot(), self.work, self._position(header)
        if slot is None or slot.geometry is None or work is None or position is None or slot.snapshot != self.snapshot:
            self.job.ctx.emit(DropFrames((key_of(header),)))
            return
        member = slot.geometry.group_of(slot.node).index(header.node)
        if header.kind == "data" and slot.data_digest(member, header.chunk) != digest:
            self.job.digest_failures += 1
            self.failures += 1
            self._end(f"data chunk {header.chunk} of {self.job.ctx.name_of(header.node)} fails its digest")
            return
        work.arrived.add(position)
        self._drill_if_whole(slot)

    def unavailable(self, node: int, said: messages.ChunkUnavailable) -> None:
        """A member can't give its chunk."""
        if said.snapshot == self.snapshot and self._position(said, node) is not None:
            self.failures += 1
            name = self.job.ctx.name_of(node)
            self._end(f"{said.kind} chunk {said.chunk} of {name} can't be had: {said.reason}")

    def _drill_if_whole(self, slot: Slot) -> None:
        work = self.work
        if work is None or work.computing or work.arrived != set(work.sources):
            return
        assert slot.geometry is not None
        assert slot.snapshot is not None
        stripes = slot.geometry.stripes(slot.node)
        real = {position: (member, chunk) for position, member, chunk in stripes.contributions(work.stripe)}
        own_digest = slot.digests[slot.resting_index(work.own[1].kind, work.own[1].chunk)]
        if own_digest is None:
            self._end("this node does not know the digest of its own parity")
            return
        work.computing, work.deadline_ns = True, self.job.ctx.seconds(limits.CHUNK_DEADLINE_S)
        chunk_bytes = slot.geometry.chunk_bytes
        self.job.ctx.emit(
            DrillStripe(
                memory=slot.memory(self.job.name),
                snapshot=slot.snapshot,
                stripe=work.stripe,
                sources=tuple((p, self._key(*source)) for p, source in sorted(work.sources.items())),
                own=(*work.own, own_digest),
                zero_positions=tuple(p for p in range(stripes.data_count) if p not in real),
                digests=tuple((p, slot.data_digest(*place)) for p, place in sorted(real.items())),
                patterns=self._patterns(work, stripes.member_count, stripes.parity_count),
                columns=tuple(
                    self._draw(f"column {work.stripe} {i}") % chunk_bytes for i in range(limits.DRILL_COLUMNS)
                ),
            )
        )

    def _patterns(self, work: Fetching, total: int, parity: int) -> tuple[tuple[int, ...], ...]:
        """Sampled sets of m lost positions, each with those that are absent anyway."""
        others = [position for position in range(total) if position not in work.absent]
        size = parity - len(work.absent)
        if comb(len(others), size) <= limits.DRILL_PATTERNS:
            chosen: Sequence[tuple[int, ...]] = list(combinations(others, size))
        else:
            drawn = [self._sample(others, size, f"{work.stripe} {i}") for i in range(limits.DRILL_PATTERNS)]
            chosen = list(dict.fromkeys(drawn))
        return tuple(tuple(sorted((*work.absent, *pattern))) for pattern in chosen)

    def _sample(self, positions: list[int], size: int, what: str) -> tuple[int, ...]:
        ranked = sorted(positions, key=lambda position: self._draw(f"pattern {what} {position}"))
        return tuple(sorted(ranked[:size]))

    def drilled(self, stripe: int, wrong: tuple[str, ...], *, coded_ns: int, pattern_count: int) -> None:
        """A stripe was rebuilt as if members were lost; `wrong` says what did not come out right."""
        work, job = self.work, self.job
        if work is None or work.stripe != stripe or not self.running:
            return
        self.work = None
        if wrong:
            self.failures += 1
            self._end(f"stripe {stripe}: {wrong[0]}")
            return
        self.stripes += 1
        self.patterns += pattern_count
        self.columns += pattern_count * limits.DRILL_COLUMNS
        self.rebuilt_bytes += job.ctx.config.parity * job.ctx.config.chunk_bytes
        fetched_ns = max(job.ctx.now_ns - work.started_ns - coded_ns, 0)
        self.spent_ns += fetched_ns + coded_ns // max(pattern_count, 1)
        self._next()

    def _abandon(self) -> None:
        work, self.work = self.work, None
        if work is not None:
            self.job.ctx.emit(DropFrames(tuple(self._key(*source) for source in work.sources.values())))

    def _key(self, node: int, source: Resting) -> ChunkKey:
        assert self.snapshot is not None
        attempt, step = self.snapshot.attempt, self.snapshot.step
        return ChunkKey(self.job.name, attempt, step, node, source.kind, source.chunk, reading=True)
