"""One job on one node: its attempt, layout, ranks, memory, and which snapshots are open, committed or given up.

Covers everything but the bytes' journey (`protect`, `rebuild`) and the cluster-wide decisions (`collector`). One
instance per job name; state changes of slots go through `Slot.move`.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

from holdfast.daemon.core.actions import Allocate, DropFrames, Free, GiveMemory, StoreDigests
from holdfast.daemon.core.arena import Arena
from holdfast.daemon.core.context import Context
from holdfast.daemon.core.health import Health
from holdfast.daemon.core.held_estate import HeldEstate
from holdfast.daemon.core.layouts import Layouts
from holdfast.daemon.core.memory import Memory
from holdfast.daemon.core.openings import Openings
from holdfast.daemon.core.plans import refusal
from holdfast.daemon.core.slot import COMPLETE, IN_FLIGHT, Phase, Slot
from holdfast.protocol import limits, messages
from holdfast.protocol.cadence import Cadence, PaceReport, remembered
from holdfast.protocol.estate_messages import EstateReport
from holdfast.protocol.exit_codes import ExitCode
from holdfast.protocol.ids import SnapshotId
from holdfast.protocol.layout import Geometry, Layout
from msgspec import UNSET, UnsetType

Pause = tuple[int, int]  # a question what to restore: the collector, and its number of it


@dataclass(slots=True)
class Job:
    """What one node believes and holds of one job."""

    ctx: Context
    arena: Arena
    name: str
    slots: list[Slot]
    attempt: int = 0
    layouts: Layouts = field(init=False)
    current: int | None = None  # layout_id of the newest plan
    planned: bool = False  # a plan of this attempt is known
    committed: SnapshotId | None = None
    committed_layout_id: int | None = None
    given_up: list[SnapshotId] = field(default_factory=list)
    given_up_reason: str = ""
    roles: dict[int, int] = field(default_factory=dict)  # role -> client, planned in this attempt
    writers: dict[int, int] = field(default_factory=dict)  # client -> attempt in which it planned: may write into slots
    planning: dict[int, messages.Plan] = field(default_factory=dict)  # client -> plan that waits for memory
    openings: Openings = field(init=False)
    cadences: tuple[Cadence, ...] = ()  # announced for the newest plan
    left_roles: set[int] = field(default_factory=set)
    joined_ns: int | None = None  # when the attempt was heard of that had begun before; None: heard its beginning
    doubtful: dict[SnapshotId, str] = field(default_factory=dict)  # denied as soon as it is certain that they may be
    pause_ns: int = 0  # until then nothing is committed: the collector is deciding what to restore
    paused_for: list[Pause] = field(default_factory=list)  # the questions on which it decides
    closed: bool = False
    lean: bool = False  # an epoch before holds its snapshot in place of a slot here: one is enough until a commit
    no_memory: str = ""  # why the newest layout has less than all its slots here; empty if it has them
    touched_ns: int = 0
    protect_s: float = 0.0
    digest_failures: int = 0
    health: Health = field(default_factory=Health)
    estates: list[HeldEstate] = field(default_factory=list)  # whole here; of the committed snapshot, or soon freed
    give_way: Callable[[], bool] = lambda: False  # free what a plan may have instead; whether there was any
    estate_report: EstateReport | UnsetType = UNSET  # what heartbeats say of them

    def __post_init__(self) -> None:
        self.layouts, self.openings = Layouts(self.ctx), Openings(self)

    # --- layouts ---

    def geometry(self, layout_id: int) -> Geometry:
        """Sizes and stripes of a known layout."""
        return self.layouts.geometry(layout_id)

    @property
    def layout(self) -> Layout | None:
        """The newest plan's layout."""
        return self.layouts.get(self.current)

    def learn_layout(self, layout: Layout) -> int:
        """Remember a layout; those neither current nor held may be forgotten. Returns its id."""
        held = {slot.layout_id for slot in self.slots}
        return self.layouts.learn(layout, needed={self.current, self.committed_layout_id, *held})

    def adopt_plan(self, attempt: int, layout: Layout) -> bool:
        """Take a plan if it is newer than the one known. Returns whether it was."""
        known = self.layout
        if attempt != self.attempt or (known and known.version >= layout.version and self.planned):
            return False  # a later attempt begins with what was decided to be restored, never with a plan alone
        self.layouts.renew(layout)
        self.current = self.learn_layout(layout)
        self.planned, self.cadences = True, ()
        for slot in self.slots:
            if slot.phase in IN_FLIGHT and slot.layout_id != self.current:
                self.give_up(slot, "the job's layout changed")
        self.ensure_memory()
        return True

    @property
    def every(self) -> int:
        """Steps between two snapshots, now or as soon as what is announced begins; 0 without a plan."""
        planned = self.layout.every if self.layout is not None else 0
        return self.cadences[-1].every if self.cadences else planned

    def pace_report(self) -> PaceReport:
        """What this node tells of the job's pace."""
        pace, begun = self.openings.pace, max(self.openings.begun.values(), default=None)
        return PaceReport(begun, pace.step_s, pace.cycle_s, pace.waited_s, self.cadences)

    def adopt_cadence(self, attempt: int, cadence: Cadence) -> None:
        """Take an announced cadence if it is newer than the one known, and tell the ranks."""
        known = self.layout
        if attempt != self.attempt or known is None or not self.planned or cadence.version != known.version:
            return
        if self.cadences and cadence.from_step <= self.cadences[-1].from_step:
            return
        self.cadences = remembered(self.cadences, cadence)
        for client in self.writers:
            self.ctx.reply(client, messages.CadenceAnnounced(self.name, attempt, cadence))

    # --- attempts ---

    def begin_attempt(self, attempt: int, chosen: SnapshotId | None, *, late: bool = False) -> None:
        """A job's next life: only the chosen snapshot of earlier attempts counts from now on.

        Where none was chosen, those who chose knew of no commit. This node may not have been heard, and keeps its own
        until there is a newer one.

        `late`: it began before this node heard of it, so an earlier holder of the node's place may have taken part.
        """
        if attempt <= self.attempt:
            return
        chosen = chosen or self.committed
        self.attempt = attempt
        self.joined_ns = self.ctx.now_ns if late else None
        self.doubtful.clear()
        self.pause_ns = 0
        self.paused_for.clear()
        self.planned = False
        self.roles.clear()
        self.left_roles.clear()
        self.openings.clear()
        self.cadences = ()
        self.given_up.clear()
        self.closed = False
        self.touched_ns = self.ctx.now_ns
        for slot in self.slots:
            if slot.snapshot is None or slot.phase is Phase.REBUILDING:
                continue
            if slot.snapshot == chosen and slot.phase in COMPLETE:
                if slot.phase is Phase.PROTECTED:
                    slot.move(Phase.COMMITTED)
            else:
                self.release(slot)
        self._set_committed(chosen)
        self.ctx.log(f"job {self.name}: attempt {attempt} begins from {chosen or 'nothing'}")

    def _set_committed(self, snapshot: SnapshotId | None) -> None:
        if snapshot == self.committed:
            return
        self.committed = snapshot
        held = self.slot_of(snapshot) if snapshot else None
        if held is not None and held.layout_id is not None:
            self.committed_layout_id = held.layout_id
        elif snapshot is not None and snapshot.attempt == self.attempt:
            # One of an earlier plan has another: the others' heartbeats tell which.
            of_this_plan = self.layout is not None and snapshot.step >= self.layout.first_step
            self.committed_layout_id = self.current if of_this_plan else None
        elif snapshot is None:
            self.committed_layout_id = None

    # --- memory ---

    def ensure_memory(self) -> None:
        """Give every slot that holds nothing memory for the newest layout, or refuse the plans that wait for it."""
        if self.current is None:
            return
        geometry = self.geometry(self.current)
        for slot in self.slots:
            if slot.phase not in {Phase.ABSENT, Phase.EMPTY} or slot.reserved:
                continue
            if slot.phase is Phase.EMPTY and slot.layout_id == self.current:
                slot.geometry = geometry
                continue
            if refusal := self.allocate(slot, geometry):
                if not self.lean or all(slot.phase is Phase.ABSENT for slot in self.slots):
                    self._refuse_plans(refusal)
                    return
                break
        self.no_memory = ""
        self._accept_plans()

    def allocate(self, slot: Slot, geometry: Geometry) -> str | None:
        """Book and order memory for a slot that holds nothing; returns the refusal, if any."""
        if slot.phase is Phase.EMPTY:
            self.free(slot)
        slot.geometry = geometry
        if slot.sizes.total_bytes == 0:
            slot.geometry = None
            return None  # this node holds nothing of the job
        refusal = self.arena.refusal(slot.sizes.total_bytes, free_bytes=self.ctx.free_bytes)
        if refusal and self.give_way():
            refusal = self.arena.refusal(slot.sizes.total_bytes, free_bytes=self.ctx.free_bytes)
        if refusal:
            slot.geometry = None
            return refusal
        slot.generation += 1
        slot.move(Phase.ALLOCATING)
        self.arena.reserve(slot.memory(self.name), slot.sizes.total_bytes)
        self.ctx.emit(Allocate(slot.memory(self.name), slot.sizes, geometry.layout))
        return None

    def writers_of(self, layout: Layout) -> list[tuple[int | None, int, int]]:
        """(client, first byte, bytes) of this node's shards of a layout; None where the rank has not planned yet."""
        clients = self.roles | {plan.role: client for client, plan in self.planning.items()}
        roles = layout.roles_on(self.ctx.node)
        return [(clients.get(role), layout.offset_of(role), layout.shards[role].shard_bytes) for role in roles]

    def free(self, slot: Slot) -> None:
        """Give an EMPTY slot's memory back."""
        slot.move(Phase.ABSENT)
        slot.geometry = None
        slot.writing.clear()  # whoever still writes does so into memory that is nobody's any more
        self.arena.release(slot.memory(self.name))
        self.ctx.emit(Free(slot.memory(self.name)))

    def memory_ready(self, memory: Memory) -> None:
        """A slot's memory exists now."""
        slot = self.find(memory)
        if slot is None or slot.phase is not Phase.ALLOCATING:
            return
        slot.move(Phase.EMPTY)
        for client in self.writers:
            self.ctx.emit(GiveMemory(client, memory, slot.sizes.data_bytes))
        self.ensure_memory()
        self.grant_waiting()

    def memory_failed(self, memory: Memory, reason: str) -> None:
        """The kernel refused."""
        slot = self.find(memory)
        if slot is None or slot.phase is not Phase.ALLOCATING:
            return
        self.arena.release(memory)
        slot.move(Phase.ABSENT)
        slot.geometry = None
        self._refuse_plans(f"the kernel gave no memory: {reason}")

    def find(self, memory: Memory) -> Slot | None:
        """The slot to which a piece of memory belongs; None if it was replaced meanwhile."""
        slot = self.slots[memory.slot] if memory.slot < len(self.slots) else None
        return slot if slot is not None and slot.generation == memory.generation else None

    def _refuse_plans(self, text: str) -> None:
        if text != self.no_memory:
            self.ctx.log(f"job {self.name}: memory budget: {text}", "error")
        self.no_memory = text
        for client in list(self.planning):
            del self.planning[client]
            self.writers.pop(client, None)
            denied = messages.Denied("Plan", self.name, ExitCode.OVER_BUDGET, f"memory budget: {text}")
            self.ctx.reply(client, denied)

    def _accept_plans(self) -> None:
        if any(slot.phase is Phase.ALLOCATING for slot in self.slots):
            return
        for client, plan in list(self.planning.items()):
            del self.planning[client]
            layout = self.layout
            assert layout is not None
            if plan.role not in layout.roles_on(self.ctx.node):
                text = f"role {plan.role} is not on this node in the layout that another rank planned meanwhile"
                self.writers.pop(client, None)
                self.ctx.reply(client, messages.Denied("Plan", self.name, ExitCode.USAGE, text))
                continue
            self.roles[plan.role] = client
            self.left_roles.discard(plan.role)
            self.ctx.reply(
                client,
                messages.PlanAccepted(
                    job=self.name,
                    attempt=plan.attempt,
                    role=plan.role,
                    offset_bytes=layout.offset_of(plan.role),
                    shard_bytes=layout.shards[plan.role].shard_bytes,
                ),
            )
            self.tell_progress(client)
            for cadence in self.cadences:
                self.ctx.reply(client, messages.CadenceAnnounced(self.name, plan.attempt, cadence))
        self.grant_waiting()

    # --- ranks ---

    def plan(self, client: int, plan: messages.Plan) -> None:
        """A rank takes its place."""
        refused = refusal(
            plan,
            attempt=self.attempt,
            node=self.ctx.node,
            node_count=len(self.ctx.config.nodes),
            group_chunks=plan.layout.group_chunks(self.ctx.group, self.ctx.config.chunk_bytes),
            held_by_another=self.roles.get(plan.role, client) != client,
        )
        if refused is not None:
            denied = messages.Denied("Plan", self.name, ExitCode.USAGE, refused.text, retry=refused.retry)
            self.ctx.reply(client, denied)
            return
        fresh = client not in self.writers
        self.writers[client] = plan.attempt
        self.planning[client] = plan
        self.closed = False
        self.touched_ns = self.ctx.now_ns
        if fresh:
            self.give_memory(client)
        if self.adopt_plan(plan.attempt, plan.layout):
            self.ctx.tell_all(messages.LayoutAnnounced(self.name, plan.attempt, plan.layout, current=True))
        else:
            self.ensure_memory()

    def give_memory(self, client: int) -> None:
        """Hand a client all of the job's memory on this node."""
        for slot in self.slots:
            if slot.phase not in {Phase.ABSENT, Phase.ALLOCATING}:
                self.ctx.emit(GiveMemory(client, slot.memory(self.name), slot.sizes.data_bytes))

    def is_in_use(self, slot: Slot) -> bool:
        """Whether somebody may still write into an empty slot: a rank, or the shell for a rebuild that has ended."""
        return bool(slot.writing) or self.ctx.is_written(slot.memory(self.name))

    def wrote(self, client: int) -> None:
        """A rank sealed, skipped or went on: it copies one shard at a time, so it writes into no slot any more.

        Until then a slot that was given up under its hands must not be given to another snapshot.
        """
        for slot in self.slots:
            slot.writing.discard(client)

    def client_gone(self, client: int) -> None:
        """A client's process closed its connection or died."""
        self.wrote(client)
        self.planning.pop(client, None)
        self.writers.pop(client, None)
        self.touched_ns = self.ctx.now_ns
        for role in [role for role, holder in self.roles.items() if holder == client]:
            del self.roles[role]
            self.openings.rank_gone(role)
            for slot in self.slots:
                if slot.phase is Phase.STAGING and role not in slot.sealed_roles and role in slot.roles:
                    self.give_up(slot, f"rank {role} ended while it staged")
        self.grant_waiting()

    def leave(self, role: int) -> None:
        """A rank said goodbye; with the last one of this node the job is closed here."""
        self.left_roles.add(role)
        layout = self.layout
        if layout is not None and self.left_roles >= set(layout.roles_on(self.ctx.node)):
            self.closed = True
            self.touched_ns = self.ctx.now_ns

    # --- snapshots ---

    def slot_of(self, snapshot: SnapshotId) -> Slot | None:
        """The slot that holds a snapshot, in whatever phase."""
        return next((slot for slot in self.slots if slot.snapshot == snapshot), None)

    def estate_of(self, snapshot: SnapshotId, absent: tuple[int, ...]) -> HeldEstate | None:
        """This node's part of what some nodes left of a snapshot, if it is whole here."""
        return next((e for e in self.estates if (e.snapshot, e.absent) == (snapshot, absent)), None)

    def grant_waiting(self) -> None:
        """Something changed that may let a waiting snapshot open."""
        self.openings.grant()

    def commit(self, snapshot: SnapshotId) -> None:
        """All facts were seen by somebody: keep this snapshot, free what is older."""
        if (self.committed is not None and snapshot <= self.committed) or self.ctx.now_ns < self.pause_ns:
            return
        slot = self.slot_of(snapshot)
        if slot is not None and slot.phase in IN_FLIGHT:
            self.release(slot)  # an earlier holder of this node's place stated the fact: here it is lost, not in flight
        if slot is not None and slot.phase is Phase.PROTECTED:
            slot.move(Phase.COMMITTED)
            self.protect_s = (self.ctx.now_ns - slot.sealed_ns) / 1e9
        self._set_committed(snapshot)
        for other in self.slots:
            if other.snapshot is not None and other.snapshot < snapshot and other.phase is not Phase.REBUILDING:
                self.release(other)  # a rebuild ends its own slot: its orders may still be under way
        self.openings.committed(snapshot)
        self.tell_progress()
        self.ensure_memory()
        self.grant_waiting()

    def release(self, slot: Slot) -> None:
        """Forget what a slot holds; contributions that its peers still send will be answered as stray."""
        if slot.transfer is not None and slot.snapshot is not None:
            self.ctx.emit(DropFrames(slot.transfer.kept_keys(self.name, slot.snapshot)))
        slot.clear()

    def give_up(self, slot: Slot, reason: str) -> None:
        """This node will never state its fact for the snapshot in `slot`."""
        assert slot.snapshot is not None
        assert slot.phase in IN_FLIGHT, "a stated fact is never taken back"
        self.give_up_snapshot(slot.snapshot, reason)

    def give_up_snapshot(self, snapshot: SnapshotId, reason: str) -> None:
        """State the counter-fact, and forget the snapshot here. Ignored for one whose fact is stated."""
        slot = self.slot_of(snapshot)
        if snapshot.attempt != self.attempt or snapshot in self.given_up:
            return
        if slot is not None and slot.phase in COMPLETE:
            return
        if self.may_be_stated(snapshot):
            self.doubtful.setdefault(snapshot, reason)
            return
        self.ctx.tell_all(messages.NodeGaveUp(self.name, snapshot, self.ctx.node, reason[: limits.TEXT_CHARS_MAX]))
        self.ctx.log(f"job {self.name}: {snapshot} given up: {reason}", "warning")
        self._forget_snapshot(snapshot, reason)

    def may_be_stated(self, snapshot: SnapshotId) -> bool:
        """Whether an earlier holder of this node's place may have stated the fact, and somebody have committed on it.

        Its facts count no more for who hears of this one; who committed before says so within a few heartbeats. What
        a rank begins here was not sealed before.
        """
        if self.joined_ns is None or snapshot in self.openings.begun.values():
            return False
        return self.ctx.now_ns < self.joined_ns + int(limits.DENY_AFTER_S * 1e9)

    def tick(self) -> None:
        """Deny what was in doubt and is not any more."""
        for snapshot, reason in list(self.doubtful.items()):
            if not self.may_be_stated(snapshot):
                del self.doubtful[snapshot]
                if self.committed is None or snapshot > self.committed:
                    self.give_up_snapshot(snapshot, reason)

    def peer_gave_up(self, snapshot: SnapshotId, reason: str) -> None:
        """A participant will never state its fact: the snapshot can't commit, so even a stated fact may be let go."""
        if snapshot.attempt != self.attempt or snapshot in self.given_up:
            return
        if self.committed is not None and snapshot <= self.committed:
            return
        self._forget_snapshot(snapshot, reason)

    def _forget_snapshot(self, snapshot: SnapshotId, reason: str) -> None:
        self.given_up = sorted([*self.given_up, snapshot])[-limits.GIVEN_UP_KEPT :]
        self.given_up_reason = reason
        slot = self.slot_of(snapshot)
        if slot is not None and slot.phase is not Phase.REBUILDING:
            self.release(slot)
        self.openings.given_up(snapshot, f"{snapshot} is given up: {reason}")
        self.tell_progress()
        self.ensure_memory()
        self.grant_waiting()

    def set_digests(self, slot: Slot, first: int, digests: tuple[int, ...]) -> None:
        """Record digests of a slot, in the core and in held memory."""
        slot.digests[first : first + len(digests)] = digests
        self.ctx.emit(StoreDigests(slot.memory(self.name), first, digests))

    def newest(self, phases: frozenset[Phase]) -> SnapshotId | None:
        """The newest snapshot in one of these phases."""
        return max(
            (s.snapshot for s in self.slots if s.snapshot is not None and s.phase in phases),
            default=None,
        )

    def tell_progress(self, client: int | None = None) -> None:
        """Tell one client, or all ranks of the job here, where its snapshots stand."""
        progress = messages.Progress(
            job=self.name,
            sealed=self.newest(frozenset({Phase.SEALED}) | COMPLETE),
            protected=self.newest(COMPLETE),
            committed=self.committed,
            given_up=max(self.given_up, default=None),
            reason=self.given_up_reason,
        )
        for target in [client] if client is not None else self.writers:
            self.ctx.reply(target, progress)

    @property
    def lost_bytes(self) -> int:
        """Bytes of the committed snapshot that this node should hold and does not."""
        if self.committed is None or self.committed_layout_id is None or not self.layouts.get(self.committed_layout_id):
            return 0
        slot = self.slot_of(self.committed)
        if slot is not None and slot.phase in COMPLETE:
            return 0
        geometry = self.geometry(self.committed_layout_id)
        return geometry.data_bytes(self.ctx.node) + geometry.parity_bytes(self.ctx.node)

    def check(self) -> None:
        """Assert the invariants of the slots, and that no two hold the same snapshot."""
        held = [slot.snapshot for slot in self.slots if slot.snapshot is not None]
        assert len(held) == len(set(held)), held
        for slot in self.slots:
            slot.check()
