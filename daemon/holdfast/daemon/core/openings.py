"""Who waits for a slot, and who gets it: ranks that want to stage their next step, peers that have sealed one already.

Covers the way from a wish to an open slot. What becomes of the snapshot in it is in `Job` and `Protect`.
"""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from holdfast.daemon.core.pace import Pace
from holdfast.daemon.core.slot import Phase, Slot
from holdfast.daemon.core.transfer import Transfer
from holdfast.protocol import limits, messages
from holdfast.protocol.exit_codes import ExitCode
from holdfast.protocol.ids import SnapshotId

if TYPE_CHECKING:  # a job has its openings, and they are nothing without their job
    from holdfast.daemon.core.job import Job


@dataclass(slots=True)
class Openings:
    """The wishes of one job on one node."""

    job: "Job"
    begins: dict[int, messages.Begin] = field(default_factory=dict)  # role -> begin that waits for a slot
    begun: dict[int, SnapshotId] = field(default_factory=dict)  # role -> the newest that it began in this attempt
    wanted: set[SnapshotId] = field(default_factory=set)  # peers have sealed these; a slot is owed
    pace: Pace = field(default_factory=Pace)

    def clear(self) -> None:
        """Another attempt begins: nobody waits any more."""
        self.begins.clear()
        self.begun.clear()
        self.wanted.clear()
        self.pace = Pace()

    def rank_gone(self, role: int) -> None:
        """A rank ended: it waits no longer."""
        self.begins.pop(role, None)

    def committed(self, snapshot: SnapshotId) -> None:
        """Nothing that is not newer than a commit is worth a slot."""
        self.pace.committed(snapshot, self.job.ctx.now_ns)
        self.begins = {role: begin for role, begin in self.begins.items() if begin.snapshot > snapshot}
        self.wanted = {wanted for wanted in self.wanted if wanted > snapshot}

    def given_up(self, snapshot: SnapshotId, text: str) -> None:
        """Tell the ranks that waited for it."""
        self.wanted.discard(snapshot)
        for role, begin in list(self.begins.items()):
            if begin.snapshot == snapshot:
                del self.begins[role]
                self._deny(self.job.roles[role], snapshot, text)

    def _deny(self, client: int, snapshot: SnapshotId, text: str, *, code: ExitCode = ExitCode.DONE) -> None:
        denied = messages.Denied("Begin", self.job.name, code, text, snapshot=snapshot)
        self.job.ctx.reply(client, denied)

    def begin(self, client: int, begin: messages.Begin) -> None:
        """A rank wants a slot for its next step; it is granted now or as soon as one is free."""
        job, snapshot = self.job, begin.snapshot
        job.wrote(client)
        if snapshot.attempt != job.attempt or job.roles.get(begin.role) != client:
            text = f"no plan of attempt {snapshot.attempt} for role {begin.role} is in force here"
            self._deny(client, snapshot, text, code=ExitCode.USAGE)
            return
        if snapshot in job.given_up or (job.committed and snapshot <= job.committed):
            self._deny(client, snapshot, f"{snapshot} is no longer open: {job.given_up_reason}")
            return
        self._give_up_before(begin)
        self.begun[begin.role] = snapshot
        if away := self._away():
            text = f"nothing can commit while {away} of this group are down"
            self._deny(client, snapshot, text)
            job.give_up_snapshot(snapshot, text)
            return
        self.pace.begun(begin.role, snapshot.step, max(0, job.ctx.now_ns - begin.held_ns))
        self.begins[begin.role] = begin
        self.grant()

    def _give_up_before(self, begin: messages.Begin) -> None:
        """A rank that begins a step will never seal an older one; it may have skipped that unheard."""
        reason = f"rank {begin.role} went on to step {begin.snapshot.step}"
        for slot in self.job.slots:
            owed = slot.phase is Phase.STAGING and begin.role not in slot.sealed_roles
            if owed and slot.snapshot is not None and slot.snapshot < begin.snapshot:
                self.job.give_up(slot, reason)
        for snapshot in [wanted for wanted in self.wanted if wanted < begin.snapshot]:
            self.job.give_up_snapshot(snapshot, reason)

    def _away(self) -> str:
        """Names of this group's members known to be down; staging now would only wait for its deadline."""
        ctx = self.job.ctx
        return ", ".join(ctx.name_of(node) for node in ctx.group if node in ctx.down)

    def want(self, snapshot: SnapshotId) -> None:
        """A peer has sealed this snapshot: open a slot for its contributions as soon as one is free."""
        job = self.job
        if snapshot.attempt != job.attempt or snapshot in job.given_up or job.slot_of(snapshot):
            return
        if job.committed is not None and snapshot <= job.committed:
            return
        if len(job.given_up) == limits.GIVEN_UP_KEPT and snapshot < min(job.given_up):
            # It may be one that was given up and forgotten since: what was denied once must never be stated.
            job.give_up_snapshot(snapshot, "it is older than all that this node remembers to have given up")
            return
        ahead = next((role for role, begun in self.begun.items() if begun > snapshot), None)
        if ahead is not None:  # it was skipped while this daemon was away, and is first heard of now
            job.give_up_snapshot(snapshot, f"rank {ahead} went on to step {self.begun[ahead].step}")
            return
        self.wanted.add(snapshot)
        if len(self.wanted) > limits.SLOTS_COUNT_MAX:
            self.wanted.remove(max(self.wanted))  # the oldest get their slots first; the others are heard of again
        self.grant()
        if job.no_memory and snapshot in self.wanted:  # better the ranks hear it than that they wait
            job.give_up_snapshot(snapshot, f"memory budget of node {job.ctx.name_of(job.ctx.node)}: {job.no_memory}")

    def grant(self) -> None:
        """Open slots for what waits, oldest snapshot first, and grant them to the ranks that asked."""
        job = self.job
        self._give_up_what_came_before()
        for snapshot in sorted(self.wanted | {begin.snapshot for begin in self.begins.values()}):
            slot = job.slot_of(snapshot) or self._open(snapshot)
            if slot is None:
                continue
            self.wanted.discard(snapshot)
            for role, begin in list(self.begins.items()):
                if begin.snapshot == snapshot and slot.phase is Phase.STAGING:
                    del self.begins[role]
                    slot.writing.add(job.roles[role])
                    self.pace.granted(role, snapshot, job.ctx.now_ns)
                    granted = messages.Granted(job.name, snapshot, slot.index, slot.generation)
                    job.ctx.reply(job.roles[role], granted)

    def _give_up_what_came_before(self) -> None:
        """What peers sealed before this node knew of it, and can't become whole here or must not.

        Under a plan that this node has left, it would be given a slot of other sizes. And what an earlier holder of
        this node's place may have given up must not be stated in its name: who heard that has let it go.
        """
        layout = self.job.layout if self.job.planned else None
        if layout is None:
            return
        for snapshot in sorted(self.wanted):
            if snapshot not in self.wanted:
                continue
            if snapshot.step < layout.first_step:
                self.job.give_up_snapshot(snapshot, f"it was begun before the plan of step {layout.first_step}")
            elif not layout.roles_on(self.job.ctx.node) and self.job.may_be_stated(snapshot):
                self.wanted.discard(snapshot)
                self.job.give_up_snapshot(snapshot, "it was begun before this node took its place")

    def _open(self, snapshot: SnapshotId) -> Slot | None:
        job = self.job
        geometry = None if job.current is None else job.geometry(job.current)
        if geometry is None or not job.planned:
            return None
        local = geometry.layout.roles_on(job.ctx.node)
        # A process of an earlier attempt, or one that has not come back since this worker started, may still be writing
        # into memory that it mapped; its slot must not be given to a new snapshot under its hands.
        if set(local) - set(job.roles) or any(attempt < job.attempt for attempt in job.writers.values()):
            return None
        empty = [slot for slot in job.slots if slot.phase is Phase.EMPTY and slot.layout_id == job.current]
        slot = next((slot for slot in empty if not job.is_in_use(slot) and not slot.reserved), None)
        if slot is None:
            return None
        slot.claim(Phase.STAGING, snapshot)
        slot.transfer = Transfer(geometry, job.ctx.node)
        slot.deadline_ns = job.ctx.seconds(limits.PROTECT_STALL_S)
        job.ctx.tell_group(messages.SnapshotOpened(job.name, snapshot))
        return slot
