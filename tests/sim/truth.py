"""What really happened in a simulated cluster, noted beside the cores, and the promises held against it.

The checkers keep their own books: which bytes each rank staged, which node stated or denied which fact. They read a
core's state only to see what it claims, never to learn what is true.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from holdfast.coding import CodeParams, chunk_digest
from holdfast.daemon.core import actions
from holdfast.daemon.core.slot import COMPLETE, Phase, Slot
from holdfast.protocol import messages
from holdfast.protocol.ids import SnapshotId
from holdfast.protocol.layout import Geometry, Layout

from sim.coder import Held, combine, parity_row
from sim.estates import EstateBooks
from sim.machine import Machine, Worker
from sim.promises import BrokenPromiseError, JobSnapshot, promise

__all__ = ["BrokenPromiseError", "JobSnapshot", "Truth", "promise"]


@dataclass(slots=True)
class Truth:
    """The books of one cluster."""

    machines: list[Machine]
    staged: dict[JobSnapshot, dict[int, bytes]] = field(default_factory=dict)  # bytes by role, when sealed
    layouts: dict[JobSnapshot, Layout] = field(default_factory=dict)
    owners: dict[tuple[str, int], int] = field(default_factory=dict)  # (job, attempt) -> life of the job
    stated: dict[JobSnapshot, set[int]] = field(default_factory=dict)  # who ever stated its fact
    stated_now: dict[JobSnapshot, set[int]] = field(default_factory=dict)  # the same, with the memory still there
    denied: dict[JobSnapshot, set[int]] = field(default_factory=dict)  # who stated the counter-fact
    denied_now: dict[JobSnapshot, set[int]] = field(default_factory=dict)  # the same, by the memory that is still there
    let_go: dict[JobSnapshot, set[int]] = field(default_factory=dict)  # who dropped what it had stated, as it may
    chosen: dict[tuple[str, int], SnapshotId | None] = field(default_factory=dict)  # (job, attempt) -> the answer
    forgotten: set[str] = field(default_factory=set)
    rotten: dict[JobSnapshot, set[int]] = field(default_factory=dict)  # where resting bytes were changed
    beyond: set[JobSnapshot] = field(default_factory=set)  # more was lost than parity covers
    rescued: set[JobSnapshot] = field(default_factory=set)  # restored without all facts: whole on those that were left
    offered: dict[str, SnapshotId] = field(default_factory=dict)  # job -> what it was told last to restore
    estates: "EstateBooks" = field(init=False)
    is_superseded: Callable[[str, SnapshotId], bool] = lambda _job, _snapshot: False  # by a commit of a later epoch
    _phases: dict[tuple[int, str, int], Phase] = field(default_factory=dict)  # of every slot, after its last event
    _held: dict[int, set[JobSnapshot]] = field(default_factory=dict)  # node -> what it held after its last event
    _committed: dict[tuple[int, str], SnapshotId | None] = field(default_factory=dict)
    _pieces: dict[int, int] = field(default_factory=dict)  # node -> pieces of memory after its last event
    _seen: dict[int, list[object]] = field(default_factory=dict)  # node -> its claims after its last event

    def __post_init__(self) -> None:
        self.estates = EstateBooks(self)

    # --- notes ---

    def stage(self, job: str, snapshot: SnapshotId, role: int, *, layout: Layout, shard: bytes) -> None:
        """A rank has sealed its shard."""
        self.layouts[job, snapshot] = layout
        shards = self.staged.setdefault((job, snapshot), {})
        promise(role not in shards, f"role {role} staged {snapshot} of {job} twice: an attempt number was used twice")
        shards[role] = shard

    def begin_attempt(self, job: str, attempt: int, life: int) -> None:
        """A life of a job begins its attempt."""
        owner = self.owners.setdefault((job, attempt), life)
        if owner == life:
            return
        # The number is given again only when all who knew it are gone: nothing of the first life may count then.
        earlier = {key for key in self.layouts if key[0] == job and key[1].attempt == attempt}
        left = {node for node, held in self._held.items() if held & earlier}
        promise(
            not left, f"attempt {attempt} of {job} is given again, and nodes {left} hold snapshots of its first life"
        )
        self.owners[job, attempt] = life
        books = (self.layouts, self.staged, self.stated, self.stated_now, self.denied, self.denied_now, self.let_go)
        for book in books:
            for key in earlier & set(book):
                del book[key]
        self.rescued -= earlier

    def lost(self, node: int) -> None:
        """A machine's memory is gone."""
        self._held.pop(node, None)
        self._seen.pop(node, None)
        self.estates.lost(node)
        for nodes in [*self.stated_now.values(), *self.denied_now.values()]:
            nodes.discard(node)
        for key in [key for key in self._committed if key[0] == node]:
            del self._committed[key]
        self._phases = {key: phase for key, phase in self._phases.items() if key[0] != node}

    def forget(self, job: str) -> None:
        """An operator lets a job go, or nobody is left who knows of it: its next life begins at nothing."""
        self.forgotten.add(job)
        self.offered.pop(job, None)
        for chosen in [key for key in self.chosen if key[0] == job]:
            del self.chosen[chosen]

    # --- what must be true of a snapshot ---

    def geometry(self, key: JobSnapshot) -> Geometry:
        """The geometry under which the ranks staged."""
        return self.machines[0].geometry(self.layouts[key])

    def is_committed(self, key: JobSnapshot) -> bool:
        """Whether all participants have stated their fact."""
        return key in self.layouts and self.geometry(key).participants <= self.stated.get(key, set())

    def is_finished(self, key: JobSnapshot) -> bool:
        """Whether every rank that has a byte has sealed its shard."""
        roles = {role for role, shard in enumerate(self.layouts[key].shards) if shard.shard_bytes}
        return roles <= set(self.staged.get(key, {}))

    def image(self, key: JobSnapshot, node: int) -> bytes:
        """What a node's image must be, padding included."""
        layout, geometry = self.layouts[key], self.geometry(key)
        shards = self.staged.get(key, {})
        unstaged = {role: b"?" if layout.shards[role].shard_bytes else b"" for role in layout.roles_on(node)}
        image = b"".join(shards.get(role, unstaged[role]) for role in layout.roles_on(node))
        return image.ljust(geometry.data_bytes(node), b"\0")

    def parity(self, key: JobSnapshot, node: int) -> bytes:
        """What a node's parity must be."""
        geometry = self.geometry(key)
        stripes, group = geometry.stripes(node), geometry.group_of(node)
        me, size = group.index(node), geometry.chunk_bytes
        images = [self.image(key, member) for member in group]
        parity = bytearray(geometry.parity_bytes(node))
        params = CodeParams(stripes.data_count, stripes.parity_count)
        for stripe in stripes.parity_stripes(me):
            chunks = [b""] * stripes.data_count  # absent chunks are zeros
            for position, member, chunk in stripes.contributions(stripe):
                chunks[position] = images[member][chunk * size : (chunk + 1) * size]
            row = parity_row(params, stripes.parity_members(stripe).index(me))
            start = stripes.parity_index(stripe, me) * size
            parity[start : start + size] = combine(row, chunks, size)
        return bytes(parity)

    # --- after every event ---

    def observe(self, worker: Worker, decided: Iterable[actions.Action]) -> None:
        """Hold a node's claims against the books."""
        machine = worker.machine
        node = machine.node
        where = machine.name
        for action in decided:
            if isinstance(action, actions.SendPeer) and isinstance(action.message, messages.NodeGaveUp):
                said = action.message
                if said.node == node:
                    self._observe_denial(node, (said.job, said.snapshot))
        if self._pieces.get(node) != len(machine.held):
            self._pieces[node] = len(machine.held)
            self._observe_memory(machine)
        claims = self._claims(worker)
        if self._seen.get(node) == claims:
            return
        self._seen[node] = claims
        held: set[JobSnapshot] = set()
        for name, parts in worker.node.jobs.items():
            job = parts.job
            for snapshot in job.given_up:
                if not self.denied.get((name, snapshot)):
                    self._observe_denial(node, (name, snapshot))  # it can't have heard of it
            for slot in job.slots:
                rebuilt = self._phases.get((node, name, slot.index)) is Phase.REBUILDING
                self._phases[node, name, slot.index] = slot.phase
                if slot.phase in COMPLETE and slot.snapshot is not None:
                    key = (name, slot.snapshot)
                    held.add(key)
                    if key not in self._held.get(node, set()):
                        self._observe_complete(worker, key, slot, rebuilt=rebuilt)
            self._observe_commit(node, name, job.committed, job.attempt)
            chosen = self.chosen.get((name, job.attempt), job.committed)
            # Where nothing was chosen, whoever was not heard may keep what it knows to be committed.
            pinned = (
                chosen is None or job.committed == chosen or (job.committed and job.committed.attempt == job.attempt)
            )
            promise(pinned, f"{where}: attempt {job.attempt} of {name} restores {chosen}, not {job.committed}")
        for name, snapshot in self._held.get(node, set()) - held:
            known = worker.node.jobs.get(name)
            if known is None:
                gone = name in self.forgotten or self.is_superseded(name, snapshot)
                promise(gone, f"{where} forgot job {name} unasked")
                self.stated_now.get((name, snapshot), set()).discard(node)
                continue
            newer = known.job.committed is not None and known.job.committed > snapshot
            over = known.job.attempt > snapshot.attempt and known.job.committed != snapshot
            denied = self.denied.get((name, snapshot), set()) - self.stated_now.get((name, snapshot), set())
            knowers = [n for (n, j), committed in self._committed.items() if j == name and committed == snapshot]
            promise(newer or over or not knowers, f"{where} let {snapshot} of {name} go; {knowers} call it committed")
            if not newer:
                self.let_go.setdefault((name, snapshot), set()).add(node)
            promise(newer or over or denied, f"{where} let {snapshot} of {name} go, whose fact it had stated")
        self._held[node] = held
        self.estates.observe(worker)

    def overhear(self, worker: Worker) -> None:
        """Note what a node's former holder has given up, who may still be believed: it never states that any more."""
        for name, parts in worker.node.jobs.items():
            for snapshot in parts.job.given_up:
                self.denied.setdefault((name, snapshot), set()).add(worker.machine.node)

    def _claims(self, worker: Worker) -> list[object]:
        """All that `observe` looks at in a core; while it stays the same there is nothing to be held against it."""
        claims: list[object] = [worker, len(self.chosen)]
        for name, parts in worker.node.jobs.items():
            job = parts.job
            claims += [name, job.attempt, job.committed, tuple(job.given_up)]
            for slot in job.slots:
                claims += [slot.phase, slot.snapshot]
            claims += [(estate.snapshot, estate.absent) for estate in job.estates]
        return claims

    @staticmethod
    def _observe_memory(machine: Machine) -> None:
        reserved, budget = machine.held_bytes, machine.budget_bytes
        promise(reserved <= budget, f"{machine.name} holds {reserved} bytes of a budget of {budget}")

    def _observe_denial(self, node: int, key: JobSnapshot) -> None:
        self.denied.setdefault(key, set()).add(node)
        self.denied_now.setdefault(key, set()).add(node)
        doomed = self.denied[key] - self.stated_now.get(key, set())  # by one that never stated it, or lost it since
        promise(
            doomed or node not in self.stated_now.get(key, set()),
            f"node {node} denies {key[1]} of {key[0]}, whose fact it had stated",
        )

    def _observe_commit(self, node: int, name: str, committed: SnapshotId | None, attempt: int) -> None:
        if committed is None or self._committed.get((node, name)) == committed:
            return
        self._committed[node, name] = committed
        key = (name, committed)
        missing = self.geometry(key).participants - self.stated.get(key, set()) if key in self.layouts else {"all"}
        if missing and committed.attempt < attempt and key in self.layouts and key not in self.rescued:
            # An attempt began from what nobody knew to be committed: it must be whole, and to be had.
            promise(self.is_finished(key), f"node {node} restores {committed} of {name}, which some rank never sealed")
            self.check_recoverable(name, committed)
            self.rescued.add(key)
        missing -= self.geometry(key).participants if key in self.rescued else set()
        promise(not missing, f"node {node} calls {committed} of {name} committed; no fact yet from {sorted(missing)}")
        begun = max((a for j, a in self.owners if j == name), default=0)
        # A node that was cut off may complete an attempt that the others have left: it will hear so.
        workers = [machine.worker for machine in self.machines if machine.worker is not None]
        left = max(worker.node.jobs[name].job.attempt for worker in workers if name in worker.node.jobs)
        if committed.attempt == attempt == max(begun, left):
            gone = self.let_go.get(key, set())
            promise(not gone, f"node {node} calls {committed} of {name} committed; nodes {gone} had let it go")

    def _observe_complete(self, worker: Worker, key: JobSnapshot, slot: Slot, *, rebuilt: bool) -> None:
        node, (name, snapshot) = worker.machine.node, key
        if rebuilt:
            self.stated_now.setdefault(key, set()).add(node)
        else:
            self.stated.setdefault(key, set()).add(node)
            self.stated_now.setdefault(key, set()).add(node)
            denied = self.denied_now.get(key, set())
            promise(node not in denied, f"node {node} states the fact of {snapshot} of {name}, which it had denied")
        self.check_bytes(worker, key, slot)

    def check_bytes(self, worker: Worker, key: JobSnapshot, slot: Slot) -> None:
        """What a node calls complete has the staged bytes, the right parity, and their digests."""
        node, (name, snapshot) = worker.machine.node, key
        promise(key in self.layouts, f"node {node} holds {snapshot} of {name}, which no rank has staged")
        geometry = self.geometry(key)
        held = worker.machine.held.get(slot.memory(name), Held(bytearray(), bytearray(), []))
        what = f"of {snapshot} of {name} on node {node}"
        if node not in self.rotten.get(key, set()):
            promise(held.data == self.image(key, node), f"the image {what} is not what its ranks staged")
            promise(held.parity == self.parity(key, node), f"the parity {what} does not belong to the data")
        size = geometry.chunk_bytes
        images = [self.image(key, member) for member in geometry.group_of(node)]
        digests = [chunk_digest(image[i : i + size]) for image in images for i in range(0, len(image), size)]
        promise(slot.digests[: len(digests)] == digests, f"the digests {what} are not those of the data")

    def check_at_rest(self) -> None:
        """The same for everything that is held anywhere, when the cluster is at rest; and the tables in memory."""
        for machine in self.machines:
            worker = machine.worker
            for name, parts in worker.node.jobs.items() if worker is not None else ():
                for slot in parts.job.slots:
                    if worker is not None and slot.phase in COMPLETE and slot.snapshot is not None:
                        self.check_bytes(worker, (name, slot.snapshot), slot)
                        table = machine.held[slot.memory(name)].digests if slot.sizes.total_bytes else []
                        known = [digest or 0 for digest in slot.digests]
                        promise(table == known, f"node {machine.node}: the digest table in memory is not the core's")

    # --- what a job is told ---

    def check_offer(self, job: str, snapshot: SnapshotId) -> None:
        """Nothing is offered that was neither committed nor found whole by a restore."""
        good = self.is_committed((job, snapshot)) or (job, snapshot) in self.rescued
        promise(good, f"{snapshot} of {job} is offered and was never committed")

    def check_forward(self, job: str, snapshot: SnapshotId | None) -> None:
        """Offered steps never go back, while losses stay within what parity covers."""
        last = self.offered.get(job)
        if last is not None and (job, last) not in self.beyond:
            promise(snapshot is not None and snapshot >= last, f"{job} was offered {last}, and now {snapshot}")
        if snapshot is not None:
            self.offered[job] = snapshot

    def holds(self, node: int, job: str, snapshot: SnapshotId) -> bool:
        """Whether a node holds its part of a snapshot."""
        return (job, snapshot) in self._held.get(node, set())

    def check_recoverable(self, job: str, snapshot: SnapshotId) -> None:
        """What is offered is held by enough nodes, those whose worker is away but whose memory is not included."""
        key = (job, snapshot)
        geometry = self.geometry(key)
        lost = {
            node
            for node in range(len(self.machines))
            if geometry.data_bytes(node) + geometry.parity_bytes(node) and key not in self._held.get(node, set())
        }
        for group in geometry.placement.groups:
            gone = lost & set(group)
            survives = self.estates.more_losses(key, group, gone) >= 0
            promise(survives, f"{snapshot} of {job} is offered, and nodes {sorted(gone)} lack it")

    def known_commits(self, job: str) -> dict[int, SnapshotId]:
        """What each live node knows to be committed."""
        found = {}
        for machine in self.machines:
            parts = machine.worker.node.jobs.get(job) if machine.worker is not None else None
            if parts is not None and parts.job.committed is not None:
                found[machine.node] = parts.job.committed
        return found

    def newest_protected(self, job: str) -> SnapshotId | None:
        """The newest snapshot that some node has protected."""
        return max((s for held in self._held.values() for name, s in held if name == job), default=None)

    def check_restored(self, job: str, snapshot: SnapshotId, role: int, shard: bytes) -> None:
        """Restored bytes equal staged bytes."""
        if self.layouts[job, snapshot].shards[role].shard_bytes == 0:
            return  # a group without a byte takes no part: its ranks may have sealed nothing
        staged = self.staged[job, snapshot].get(role)
        promise(shard == staged, f"role {role} of {job} got bytes of {snapshot} that it never staged")
