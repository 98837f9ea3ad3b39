"""Reading any bytes of a committed snapshot from any node, also those of nodes that are missing.

Covers what clients of this node read: memory for it within the budget, which chunks, and the answer. How a chunk is had
is in `fetch`. A read pins nothing: a snapshot that was released meanwhile is answered with the one that took its place.
"""

from dataclasses import dataclass, field

from holdfast.daemon.core.actions import Allocate, Free, GiveMemory
from holdfast.daemon.core.arena import Arena
from holdfast.daemon.core.context import Context
from holdfast.daemon.core.fetch import Fetch
from holdfast.daemon.core.held_estate import HeldEstate
from holdfast.daemon.core.memory import READ_SLOTS_FROM, Memory, Sizes
from holdfast.daemon.core.mixing import Goal
from holdfast.daemon.core.offers import Offers
from holdfast.daemon.core.peers import Peers
from holdfast.daemon.core.pursuits import Pursuits
from holdfast.daemon.core.registry import Registry
from holdfast.daemon.core.slot import COMPLETE, Slot
from holdfast.protocol import limits, messages
from holdfast.protocol.exit_codes import ExitCode
from holdfast.protocol.frames import unpack_digests
from holdfast.protocol.ids import SnapshotId
from holdfast.protocol.layout import Geometry, Layout

ASK_DIGESTS_S = 1.0  # a question for digests, or its answer, may be lost
VERDICT_S = 1.0  # two heartbeats: by then a newer commit is known that made the others let go
READ_S = 60.0  # a read that has not ended by then is denied; trying again may help
TABLES_KEPT = 16  # digest tables of groups, kept for the next read

Place = tuple[str, SnapshotId, tuple[int, ...]]  # of a digest table: job, snapshot, group


@dataclass(slots=True)
class Window:
    """Memory lent to a client for one read at a time."""

    memory: Memory
    size_bytes: int
    client: int
    ready: bool = False
    used: bool = True
    dropped: bool = False  # it goes as soon as it is there: what is being made can't be freed


@dataclass(slots=True)
class Range:
    """One read."""

    client: int
    wish: messages.ReadRange
    started_ns: int
    deadline_ns: int
    hearing: bool = False  # nodes that have said nothing since the start were asked to
    layout: Layout | None = None
    asking: bool = False  # the collector, for the layout
    window: Window | None = None
    fetch: Fetch | None = None
    left: int = 0  # chunks not here yet
    ask_digests_ns: int = 0
    problem: str = ""  # why it can't be had; told when it is sure that the snapshot was not just released
    verdict_ns: int = 0
    answered: bool = False


@dataclass(slots=True)
class Ranges:
    """All reads of this node's clients."""

    ctx: Context
    arena: Arena
    peers: Peers
    registry: Registry
    offers: Offers
    pursuits: Pursuits
    open: dict[tuple[int, int], Range] = field(default_factory=dict)  # (client, request)
    windows: list[Window] = field(default_factory=list)
    layouts: dict[tuple[str, SnapshotId], Layout] = field(default_factory=dict)
    tables: dict[Place, list[int | None]] = field(default_factory=dict)
    newest: dict[str, SnapshotId] = field(default_factory=dict)  # job -> the newest commit that the collector told
    generations: int = field(init=False)

    def __post_init__(self) -> None:
        self.generations = self.ctx.generations_from

    # --- what clients say ---

    def read(self, client: int, wish: messages.ReadRange) -> None:
        """A client wants bytes."""
        mine = [key for key in self.open if key[0] == client]
        if (client, wish.request) in self.open or len(mine) >= limits.RANGES_PER_CLIENT_COUNT_MAX:
            text = f"{len(mine)} reads are open here, {limits.RANGES_PER_CLIENT_COUNT_MAX} at once are the limit, each "
            self._deny(client, wish, ExitCode.USAGE, text + "under a number of its own; send CloseRange first")
        elif len(self.open) >= limits.RANGE_COUNT_MAX:
            text = f"{limits.RANGE_COUNT_MAX} reads of this node's clients are under way, which is the limit"
            self._deny(client, wish, ExitCode.OVER_BUDGET, text, retry=True)
        else:
            found = Range(client, wish, self.ctx.now_ns, self.ctx.seconds(READ_S))
            self.open[client, wish.request] = found
            self._advance(found)

    def close(self, client: int, request: int) -> None:
        """The client has what it wanted, or wants it no more."""
        found = self.open.pop((client, request), None)
        if found is not None:
            self._end(found)

    def client_gone(self, client: int) -> None:
        """A client's process ended: nobody looks into its windows any more."""
        for key in [key for key in self.open if key[0] == client]:
            self._end(self.open.pop(key))
        for window in [window for window in self.windows if window.client == client]:
            self._drop(window)

    def _end(self, found: Range) -> None:
        if found.fetch is not None:
            found.fetch.stop()
            if found.window is not None and self.ctx.is_written(found.window.memory):
                self._drop(found.window)
        if found.window is not None:
            found.window.used = False

    def _drop(self, window: Window) -> None:
        window.dropped = True
        if window in self.windows and window.ready:
            self.windows.remove(window)
            self.arena.release(window.memory)
            self.ctx.emit(Free(window.memory))

    # --- one step after the other ---

    def _advance(self, found: Range) -> None:
        if found.answered or found.problem or self.open.get((found.client, found.wish.request)) is not found:
            return
        if found.layout is None and not self._find_layout(found):
            return
        if found.window is None and not self._find_window(found):
            return
        assert found.window is not None
        if found.fetch is None and found.window.ready:
            self._begin(found)

    def _find_layout(self, found: Range) -> bool:
        wish = found.wish
        key = (wish.job, wish.snapshot)
        parts = self.registry.get(wish.job)
        slot = parts.job.slot_of(wish.snapshot) if parts is not None else None
        layout = self.layouts.get(key)
        if layout is None and slot is not None and slot.phase in COMPLETE and slot.geometry is not None:
            layout = self._remember(key, slot.geometry.layout)
        if layout is None:
            if not found.asking:
                found.asking = True
                self.offers.ask(wish.job, lambda given: self._told(found, given))
            return False
        if wish.role >= len(layout.shards):
            text = f"role {wish.role}: the snapshot has roles 0 to {len(layout.shards) - 1}"
            self._refuse(found, ExitCode.USAGE, text)
            return False
        owner, shard_bytes = layout.shards[wish.role].node, layout.shards[wish.role].shard_bytes
        if problem := self._beyond(layout, owner):
            self._refuse(found, ExitCode.USAGE, problem)
            return False
        if wish.offset_bytes + wish.length_bytes > shard_bytes:
            text = (
                f"bytes {wish.offset_bytes} to {wish.offset_bytes + wish.length_bytes} of role {wish.role}: its shard"
            )
            self._refuse(found, ExitCode.USAGE, f"{text} has {shard_bytes}")
            return False
        found.layout = layout
        return True

    def _beyond(self, layout: Layout, owner: int) -> str:
        """Why a layout that another node told can't be one of this cluster; empty if it can."""
        node_count = len(self.ctx.config.nodes)
        if owner >= node_count:
            return f"the layout that the collector told names node {owner}, this cluster has {node_count}"
        group = self.ctx.placement.groups[self.ctx.placement.group_of(owner)]
        count = layout.group_chunks(group, self.ctx.config.chunk_bytes)
        too_many = f"the layout gives a group {count} chunks, {limits.GROUP_CHUNKS_MAX} are the limit"
        return too_many if count > limits.GROUP_CHUNKS_MAX else ""

    def _told(self, found: Range, given: messages.CommittedGiven | None) -> None:
        """The collector says what is committed: the layout, or that something newer is."""
        found.asking = False
        wish = found.wish
        if given is not None and given.snapshot is not None:
            self.learn(given)
        if found.layout is not None or self.open.get((found.client, wish.request)) is not found:
            return
        if (wish.job, wish.snapshot) in self.layouts:
            self._advance(found)
        elif given is None:
            self._refuse(found, ExitCode.UNREACHABLE, "no collector answers; see 'holdfast status'", retry=True)
        else:
            what = given.snapshot or given.problem or "nothing"
            found.problem = f"{wish.snapshot} of job {wish.job} is not what is committed ({what})"
            self._give_verdict(found)

    def learn(self, given: messages.CommittedGiven) -> None:
        """Remember what the collector told, also when somebody else asked."""
        if given.snapshot is not None and given.layout is not None:
            self._remember((given.job, given.snapshot), given.layout)
            self.newest[given.job] = given.snapshot

    def _remember(self, key: tuple[str, SnapshotId], layout: Layout) -> Layout:
        while key not in self.layouts and len(self.layouts) >= limits.LAYOUTS_KEPT * limits.JOB_COUNT_MAX:
            self.layouts.pop(next(iter(self.layouts)))
        self.layouts[key] = layout
        return layout

    def _geometry(self, layout: Layout) -> Geometry:
        return Geometry(
            layout=layout,
            placement=self.ctx.placement,
            parity_count=self.ctx.config.parity,
            chunk_bytes=self.ctx.config.chunk_bytes,
        )

    # --- memory ---

    def _find_window(self, found: Range) -> bool:
        assert found.layout is not None
        first, last = self._chunks(found)
        needed_bytes = (last - first) * self.ctx.config.chunk_bytes
        idle = [window for window in self.windows if window.ready and not window.used]
        fits = [window for window in idle if window.client == found.client and window.size_bytes >= needed_bytes]
        if fits:
            found.window = min(fits, key=lambda window: window.size_bytes)
            found.window.used = True
            return True
        for window in idle:  # too small, or another client's that reads nothing now
            mine = window.client == found.client
            if mine or self.arena.refusal(needed_bytes, free_bytes=self.ctx.free_bytes) is not None:
                self._drop(window)
        if refusal := self.arena.refusal(needed_bytes, free_bytes=self.ctx.free_bytes):
            self._refuse(
                found, ExitCode.OVER_BUDGET, f"memory budget, for this read: {refusal}", retry=bool(self.windows)
            )
            return False
        used = {window.memory.slot for window in self.windows}
        self.generations += 1
        slot = next(slot for slot in range(READ_SLOTS_FROM, READ_SLOTS_FROM + len(used) + 1) if slot not in used)
        found.window = Window(Memory(found.wish.job, slot, self.generations), needed_bytes, found.client)
        self.windows.append(found.window)
        self.arena.reserve(found.window.memory, needed_bytes)
        self.ctx.emit(Allocate(found.window.memory, Sizes(needed_bytes, 0, 0)))
        return True

    def memory_ready(self, memory: Memory) -> None:
        """A window's memory exists."""
        for window in [window for window in self.windows if window.memory == memory]:
            window.ready = True
            if window.dropped:
                self._drop(window)
                return
            self.ctx.emit(GiveMemory(window.client, memory, window.size_bytes))
        for found in list(self.open.values()):
            if found.window is not None and found.window.memory == memory:
                self._advance(found)

    def memory_failed(self, memory: Memory, reason: str) -> None:
        """The kernel gave none."""
        for window in [window for window in self.windows if window.memory == memory]:
            self.windows.remove(window)
            self.arena.release(memory)
        for found in list(self.open.values()):
            if found.window is not None and found.window.memory == memory:
                found.window = None
                self._refuse(found, ExitCode.OVER_BUDGET, f"the kernel gave no memory: {reason}", retry=True)

    # --- chunks ---

    def _chunks(self, found: Range) -> tuple[int, int]:
        """The first chunk of the owner's image that is needed, and the one after the last."""
        assert found.layout is not None
        start = found.layout.offset_of(found.wish.role) + found.wish.offset_bytes
        end = start + found.wish.length_bytes
        chunk_bytes = self.ctx.config.chunk_bytes
        return start // chunk_bytes, -(-end // chunk_bytes)

    def _begin(self, found: Range) -> None:
        assert found.layout is not None
        assert found.window is not None
        geometry = self._geometry(found.layout)
        owner = found.layout.shards[found.wish.role].node
        group = geometry.group_of(owner)
        for node in group:
            self.peers.dial(node)
        found.fetch = Fetch(
            ctx=self.ctx,
            peers=self.peers,
            pursuits=self.pursuits,
            job=found.wish.job,
            snapshot=found.wish.snapshot,
            geometry=geometry,
            group=group,
            own_slot=lambda: self._slot(found),
            digests=self._table(found, geometry, group),
            done=lambda goal, digest: self._got(found),
            failed=lambda problem: self._lost(found, problem),
            own_estates=lambda: self._own_estates(found),
        )
        self._want(found, found.fetch)

    def _slot(self, found: Range) -> Slot | None:
        parts = self.registry.get(found.wish.job)
        return parts.job.slot_of(found.wish.snapshot) if parts is not None else None

    def _own_estates(self, found: Range) -> list[HeldEstate]:
        parts = self.registry.get(found.wish.job)
        return parts.job.estates if parts is not None else []

    def _table(self, found: Range, geometry: Geometry, group: tuple[int, ...]) -> list[int | None]:
        slot = self._slot(found)
        if self.ctx.node in group and slot is not None and slot.phase in COMPLETE:
            return list(slot.digests)
        key = (found.wish.job, found.wish.snapshot, group)
        if key not in self.tables:
            while len(self.tables) >= TABLES_KEPT:
                self.tables.pop(next(iter(self.tables)))
            self.tables[key] = [None] * sum(geometry.stripes(group[0]).chunk_counts)
        return self.tables[key]

    def _want(self, found: Range, fetch: Fetch) -> None:
        """Ask for the chunks, once their digests are known and whoever may hold them was heard."""
        assert found.layout is not None
        assert found.window is not None
        stripes = fetch.geometry.stripes(fetch.group[0])
        owner = found.layout.shards[found.wish.role].node
        member = fetch.group.index(owner)
        first, last = self._chunks(found)
        if owner not in fetch.survivors() and not (fetch.heard_enough() and self._heard_since(found, fetch)):
            return
        start = sum(stripes.chunk_counts[:member])
        if any(digest is None for digest in fetch.digests[start + first : start + last]):
            self._ask_digests(found, fetch)
            return
        goals = []
        for chunk in range(first, last):
            stripe = stripes.stripe_of(member, chunk)
            position = stripes.data_members(stripe).index(member)
            goals.append(Goal(stripe, position, found.window.memory, "data", chunk - first))
        found.left = len(goals)
        fetch.want(goals)

    def _heard_since(self, found: Range, fetch: Fetch) -> bool:
        """Whether all live nodes of a group have said what they hold since the read began; asks the others to."""
        missing = set(fetch.group) - set(fetch.survivors()) - {self.ctx.node}
        stale = [n for n in missing if self.peers.alive(n) and self.peers.table[n].heartbeat_ns < found.started_ns]
        if stale and not found.hearing:
            found.hearing = True
            for node in stale:
                self.ctx.tell(node, messages.ReportWanted(self.ctx.new_request()))
        return not stale

    def heard(self) -> None:
        """Somebody said what it holds: reads that wait for that go on."""
        for found in list(self.open.values()):
            if found.fetch is not None and not found.left and not found.answered and not found.problem:
                self._want(found, found.fetch)

    def _ask_digests(self, found: Range, fetch: Fetch) -> None:
        if self.ctx.now_ns < found.ask_digests_ns:
            return
        found.ask_digests_ns = self.ctx.seconds(ASK_DIGESTS_S)
        survivors = [node for node in fetch.survivors() if node != self.ctx.node]
        if not survivors:
            names = ", ".join(self.ctx.name_of(node) for node in fetch.group)
            self._lost(found, f"none of the nodes of its group holds it: {names}")
            return
        # Any one would do; the next one is asked if this one says nothing.
        node = survivors[(self.ctx.now_ns // int(ASK_DIGESTS_S * 1e9)) % len(survivors)]
        self.ctx.tell(node, messages.WantDigests(found.wish.job, found.wish.snapshot))

    def announced(self, said: messages.DigestsAnnounced) -> None:
        """A member of some group sent part of its digest table."""
        for (job, snapshot, group), table in self.tables.items():
            if (job, snapshot) != (said.job, said.snapshot) or said.node not in group:
                continue
            layout = self.layouts.get((job, snapshot))
            if layout is None:
                continue
            counts = self._geometry(layout).stripes(group[0]).chunk_counts
            member, digests = group.index(said.node), unpack_digests(said.digests)
            if said.first_chunk + len(digests) <= counts[member]:
                start = sum(counts[:member]) + said.first_chunk
                table[start : start + len(digests)] = digests
        self.heard()

    def _got(self, found: Range) -> None:
        found.left -= 1
        if found.left or found.window is None or found.layout is None:
            return
        found.answered = True
        start = found.layout.offset_of(found.wish.role) + found.wish.offset_bytes
        memory = found.window.memory
        ready = messages.RangeReady(
            request=found.wish.request,
            job=found.wish.job,
            slot=memory.slot,
            generation=memory.generation,
            offset_bytes=start % self.ctx.config.chunk_bytes,
            length_bytes=found.wish.length_bytes,
        )
        self.ctx.reply(found.client, ready)

    # --- what can't be had ---

    def _lost(self, found: Range, problem: str) -> None:
        """It can't be had now: perhaps because it was released, which the collector knows."""
        found.problem = problem
        found.verdict_ns = self.ctx.seconds(VERDICT_S)
        found.asking = True
        self.offers.ask(found.wish.job, lambda given: self._told(found, given))

    def _give_verdict(self, found: Range) -> None:
        wish = found.wish
        known = [report.committed for report in self.peers.reports(wish.job).values() if report.committed]
        parts = self.registry.get(wish.job)
        if parts is not None and parts.job.committed is not None:
            known.append(parts.job.committed)
        if wish.job in self.newest:
            known.append(self.newest[wish.job])
        newer = max((snapshot for snapshot in known if snapshot > wish.snapshot), default=None)
        if newer is not None:
            text = f"{wish.snapshot} was released: it is superseded by {newer}"
            self._refuse(found, ExitCode.NOT_RECOVERABLE, text, superseded_by=newer)
        elif self.ctx.now_ns >= found.verdict_ns and not found.asking:
            text = f"{wish.snapshot} of job {wish.job}, role {wish.role}: {found.problem}"
            self._refuse(found, ExitCode.NOT_RECOVERABLE, text, retry=not self.peers.settled)

    def _refuse(
        self,
        found: Range,
        code: ExitCode,
        text: str,
        *,
        retry: bool = False,
        superseded_by: SnapshotId | None = None,
    ) -> None:
        if self.open.pop((found.client, found.wish.request), None) is not None:
            self._end(found)
            self._deny(found.client, found.wish, code, text, retry=retry, superseded_by=superseded_by)

    def _deny(
        self,
        client: int,
        wish: messages.ReadRange,
        code: ExitCode,
        text: str,
        *,
        retry: bool = False,
        superseded_by: SnapshotId | None = None,
    ) -> None:
        text = text[: limits.TEXT_CHARS_MAX]
        self.ctx.reply(client, messages.RangeDenied(wish.request, code, text, retry, superseded_by))

    def tick(self) -> None:
        """Deadlines, and reads that wait for something."""
        for found in list(self.open.values()):
            if found.answered:
                continue
            if found.problem:
                self._give_verdict(found)
            elif self.ctx.now_ns >= found.deadline_ns:
                text = f"it took longer than {READ_S} s; {found.left} chunks were still missing"
                self._refuse(found, ExitCode.UNREACHABLE, text, retry=True)
            elif found.fetch is None:
                self._advance(found)
            elif not found.left:
                self._want(found, found.fetch)
            else:
                found.fetch.tick()

    def check(self) -> None:
        """Assert: a window serves one read at a time, and a read that is answered waits for nothing."""
        used = [id(found.window) for found in self.open.values() if found.window is not None]
        assert len(used) == len(set(used))
        assert set(used) >= {id(window) for window in self.windows if window.used and not window.dropped}
        assert all(found.left == 0 for found in self.open.values() if found.answered)
