"""When a node stays away and nobody takes its place: the others of its group make up for what it held.

Covers one job on one node: which absent nodes' estate it should keep a part of, computing that part, and when it may
go. What an estate is, is in `holdfast.protocol.estates`; who reads it in `mixing`.

An estate is beside what protects the snapshot already, never in its place, and its bytes follow from the snapshot
alone. So nothing has to be agreed: nodes that disagree about who is away compute parts of different estates, all of
them right, and tolerance is back when all heirs of one have said that they hold their part. A part goes when a newer
snapshot is committed, when all whose chunks it has are whole again, when a wider estate is whole, or when a rank's plan
needs the memory.
"""

from dataclasses import dataclass, field

from holdfast.daemon.core.actions import Allocate, Free, StoreDigests
from holdfast.daemon.core.fetch import Fetch
from holdfast.daemon.core.held_estate import HeldEstate, estate_in, part_sizes
from holdfast.daemon.core.job import Job
from holdfast.daemon.core.memory import ESTATE_SLOTS_FROM, Memory
from holdfast.daemon.core.mixing import Goal, KnownEstate, known_estates
from holdfast.daemon.core.peers import Peers
from holdfast.daemon.core.pursuits import Pursuits
from holdfast.daemon.core.slot import COMPLETE, Slot
from holdfast.protocol import limits
from holdfast.protocol.estate_messages import EstateReport
from holdfast.protocol.estates import Estate, further_losses
from holdfast.protocol.ids import SnapshotId
from holdfast.protocol.layout import Geometry
from msgspec import UNSET, UnsetType

Absent = tuple[int, ...]


def _order(estate: HeldEstate | KnownEstate) -> tuple[int, Absent]:
    """Wider ones come later."""
    return len(estate.absent), estate.absent


@dataclass(slots=True)
class Building:
    """A part that is being computed."""

    snapshot: SnapshotId
    absent: Absent
    layout_id: int
    memory: Memory
    digests: list[int | None]
    ready: bool = False  # its memory is there
    fetch: Fetch | None = None


@dataclass(slots=True)
class Reprotect:
    """The estates of one job on this node."""

    job: Job
    peers: Peers
    pursuits: Pursuits
    building: Building | None = None
    silent_from_ns: dict[int, int] = field(default_factory=dict)  # member of the group -> since when it is not heard
    retry_ns: int = 0
    problem: str = ""
    generation: int = 0
    orphans: set[Memory] = field(default_factory=set)  # they go as soon as they are there: what is made can't be freed

    def __post_init__(self) -> None:
        self.job.give_way = self.give_way

    # --- what should be ---

    def tick(self) -> None:
        """Time passed, and others may have said something."""
        after_s = self.job.ctx.config.reprotect_after_s
        if not after_s and not self.job.estates:
            return
        self._watch()
        self._let_go(off=not after_s)
        wanted = self._wanted() if after_s else None
        building = self.building
        if building is not None and (wanted != building.absent or building.snapshot != self.job.committed):
            self._drop_building("it is not needed any more")
        if wanted is not None and self.building is None and self.job.ctx.now_ns >= self.retry_ns:
            self._build(wanted)
        if self.building is not None and self.building.fetch is not None:
            self.building.fetch.tick()
        if wanted is None:
            self.problem = ""
        self._report()

    def _watch(self) -> None:
        for node in self.job.ctx.group:
            if self.peers.alive(node):
                self.silent_from_ns.pop(node, None)
            else:
                self.silent_from_ns.setdefault(node, self.job.ctx.now_ns)

    def _slot(self) -> Slot | None:
        """The committed snapshot, whole on this node."""
        job = self.job
        slot = job.slot_of(job.committed) if job.committed is not None else None
        return slot if slot is not None and slot.phase in COMPLETE and slot.geometry is not None else None

    def _wanted(self) -> Absent | None:
        """Whose estate this node should now compute its part of; None if it should compute nothing."""
        slot = self._slot()
        if slot is None or slot.geometry is None:
            return None
        geometry, group = slot.geometry, slot.geometry.group_of(slot.node)
        lost = {node for node in group if node != slot.node and not self._holds(node, slot)}
        owing = {node for node in lost if geometry.data_bytes(node) + geometry.parity_bytes(node) > 0}
        away = {node for node in owing if node in self.silent_from_ns}
        candidates = [absent for absent in self._told(slot) if set(absent) <= away and self._had_time(absent)]
        limit_ns = self.job.ctx.now_ns - int(self.job.ctx.config.reprotect_after_s * 1e9)
        if owing and all(self.silent_from_ns.get(node, limit_ns + 1) <= limit_ns for node in owing):
            candidates.append(tuple(sorted(owing)))  # else somebody may just be restarting, or is being rebuilt
        known = self._known(slot)
        held = {estate.absent for estate in self.job.estates if estate.snapshot == slot.snapshot}
        for absent in sorted(candidates, key=lambda absent: (-len(absent), absent)):
            estate = estate_in(geometry, group, absent)
            if absent not in held and estate is not None and self._gains(estate, owing, known, geometry):
                return absent
        return None

    def _holds(self, node: int, slot: Slot) -> bool:
        report = self.peers.reports(self.job.name).get(node)
        return report is not None and slot.snapshot in report.held

    def _had_time(self, absent: Absent) -> bool:
        return all(self.peers.had_time(node) for node in absent)

    def _told(self, slot: Slot) -> set[Absent]:
        """Whose estates others of the group hold or compute."""
        found: set[Absent] = set()
        for node, report in self.peers.reports(self.job.name).items():
            told = report.estate
            if node in self.job.ctx.group and not isinstance(told, UnsetType) and told.snapshot == slot.snapshot:
                found |= {*told.held, told.building}
        return {absent for absent in found if absent and slot.node not in absent}

    def _known(self, slot: Slot) -> list[KnownEstate]:
        assert slot.geometry is not None
        assert slot.snapshot is not None
        return known_estates(
            self.peers.reports(self.job.name),
            (slot.node, self.job.estates),
            snapshot=slot.snapshot,
            geometry=slot.geometry,
            group=slot.geometry.group_of(slot.node),
        )

    def _gains(self, estate: Estate, lost: set[int], known: list[KnownEstate], geometry: Geometry) -> bool:
        """Whether more losses would be survived with it than now."""
        group = geometry.group_of(self.job.ctx.node)
        members = {group.index(node) for node in lost}
        estates = [(k.estate, frozenset(group.index(node) for node in k.holders)) for k in known]
        now = further_losses(estate.stripes, members, estates)
        return further_losses(estate.stripes, members, [*estates, (estate, frozenset(estate.heirs))]) > now

    # --- what is held ---

    def _let_go(self, *, off: bool) -> None:
        job, slot = self.job, self._slot()
        if job.ctx.now_ns < job.pause_ns:
            return  # what this node reports must hold until it is decided what the job restores
        known = self._known(slot) if slot is not None else []
        whole = {k.absent for k in known if len(k.holders) == len(k.estate.heirs)}
        for held in list(job.estates):
            if held.snapshot != job.committed or off:
                self._free(held)
            elif slot is not None and all(self._holds(node, slot) for node in held.absent):
                self._free(held)
                names = ", ".join(job.ctx.name_of(node) for node in held.absent)
                job.ctx.log(f"job {job.name}: {names} whole again: what was kept for it is freed")
            elif any(set(held.absent) < set(absent) for absent in whole):
                self._free(held)

    def _drop_useless(self, slot: Slot) -> bool:
        """Free a part that was computed while its node seemed to be away, and that helps nobody. Whether there was one.

        What it is weighed against comes before it in one order that all nodes have: so no two nodes drop parts of two
        estates, each because of the other.
        """
        assert slot.geometry is not None
        group, known = slot.geometry.group_of(slot.node), self._known(slot)
        lost = {group.index(node) for node in group if node != slot.node and not self._holds(node, slot)}
        stripes = slot.geometry.stripes(slot.node)

        def survived(some: list[KnownEstate]) -> int:
            estates = [(k.estate, frozenset(group.index(node) for node in k.holders)) for k in some]
            return further_losses(stripes, lost, estates)

        for held in sorted(self.job.estates, key=_order, reverse=True):
            before = [other for other in known if _order(other) < _order(held)]
            if any(self._holds(node, slot) for node in held.absent) and survived(before) >= survived(known):
                self._free(held)
                return True
        return False

    def _free(self, held: HeldEstate) -> None:
        self.job.estates.remove(held)
        if held.digests:
            self.job.arena.release(held.memory)
            self.job.ctx.emit(Free(held.memory))

    def give_way(self) -> bool:
        """A rank's plan needs memory: it goes first. Returns whether there was something to give."""
        had = bool(self.job.estates) or self.building is not None
        for held in list(self.job.estates):
            self._free(held)
        self._drop_building("a rank's plan needs the memory")
        self.retry_ns = self.job.ctx.seconds(limits.REBUILD_RETRY_S)
        return had

    def forget(self) -> None:
        """The job is forgotten here: what is still being made is freed by the node when it is there."""
        self.give_way()
        for memory in self.orphans:
            self.job.arena.release(memory)
        self.job.estate_report = UNSET

    # --- what is computed ---

    def _build(self, absent: Absent) -> None:
        job, slot = self.job, self._slot()
        assert slot is not None
        assert slot.geometry is not None
        assert slot.snapshot is not None
        assert slot.layout_id is not None
        sizes = part_sizes(slot.geometry, slot.node, absent)
        if sizes is None:
            return
        if len(job.estates) >= limits.ESTATES_HELD_COUNT_MAX and not self._drop_useless(slot):
            return
        names = ", ".join(job.ctx.name_of(node) for node in absent)
        if refusal := job.arena.refusal(sizes.total_bytes, free_bytes=job.ctx.free_bytes):
            self.retry_ns = job.ctx.seconds(limits.REBUILD_RETRY_S)
            self._say(f"no memory to make up for {names}: {refusal}")
            return
        self.generation = max(self.generation, job.ctx.generations_from) + 1
        memory = Memory(job.name, ESTATE_SLOTS_FROM, self.generation)
        self.building = Building(slot.snapshot, absent, slot.layout_id, memory, [None] * sizes.digest_count)
        job.ctx.log(f"job {job.name}: {names} away: making up for it, {sizes.total_bytes} bytes here")
        if not sizes.total_bytes:
            self._finish()
            return
        job.arena.reserve(memory, sizes.total_bytes)
        job.ctx.emit(Allocate(memory, sizes))

    def memory_made(self, memory: Memory, failure: str | None) -> None:
        """Memory of a part is there; `failure`: the kernel gave none, and why."""
        building = self.building
        if building is None or building.memory != memory:
            if memory in self.orphans:
                self.orphans.discard(memory)
                self.job.arena.release(memory)
            if failure is None:
                self.job.ctx.emit(Free(memory))
            return
        slot = self._slot()
        if failure is not None:
            self.building = None
            self.job.arena.release(memory)
            self.retry_ns = self.job.ctx.seconds(limits.REBUILD_RETRY_S)
            self._say(f"no memory to make up for absent nodes: {failure}")
            return
        building.ready = True
        if slot is None or slot.snapshot != building.snapshot:
            self._drop_building("the snapshot is not whole here")
        else:
            self._begin(building, slot)

    def _begin(self, building: Building, slot: Slot) -> None:
        assert slot.geometry is not None
        job, geometry = self.job, slot.geometry
        group = geometry.group_of(slot.node)
        estate = estate_in(geometry, group, building.absent)
        assert estate is not None
        building.fetch = Fetch(
            ctx=job.ctx,
            peers=self.peers,
            pursuits=self.pursuits,
            job=job.name,
            snapshot=building.snapshot,
            geometry=geometry,
            group=group,
            own_slot=lambda: job.slot_of(building.snapshot),
            digests=slot.digests,
            done=lambda goal, digest: self._got(building, goal, digest),
            failed=lambda problem: self._failed(building, problem),
            own_estates=lambda: job.estates,
        )
        me, goals = group.index(slot.node), []
        for chunk in range(len(building.digests)):
            recipe = estate.recipe(me, chunk)
            first = recipe[0]
            mix = recipe if len(recipe) > 1 or first.factor != 1 else ()
            goals.append(Goal(first.stripe, first.position, building.memory, "parity", chunk, mix))
        building.fetch.want(sorted(goals, key=lambda goal: goal.stripe))

    def _got(self, building: Building, goal: Goal, digest: int) -> None:
        building.digests[goal.chunk] = digest
        self.job.ctx.emit(StoreDigests(building.memory, goal.chunk, (digest,)))
        if building is self.building and None not in building.digests:
            self._finish()

    def _finish(self) -> None:
        building, job = self.building, self.job
        assert building is not None
        if building.fetch is not None:
            building.fetch.stop()
        self.building, self.problem = None, ""
        digests = tuple(digest for digest in building.digests if digest is not None)
        held = HeldEstate(building.snapshot, building.absent, building.layout_id, building.memory, digests)
        job.estates.append(held)
        names = ", ".join(job.ctx.name_of(node) for node in building.absent)
        job.ctx.log(f"job {job.name}: made up for {names} here: {len(digests)} chunks of {building.snapshot}")
        self._report()

    def _failed(self, building: Building, problem: str) -> None:
        if building is self.building:
            self._drop_building(problem)
            self.retry_ns = self.job.ctx.seconds(limits.REBUILD_RETRY_S)
            self._say(f"can't make up for absent nodes: {problem}")

    def _drop_building(self, reason: str) -> None:
        building, self.building = self.building, None
        if building is None:
            return
        self.job.ctx.log(f"job {self.job.name}: making up for absent nodes ends: {reason}")
        if building.fetch is not None:
            building.fetch.stop()
        if building.ready:
            self.job.arena.release(building.memory)
            self.job.ctx.emit(Free(building.memory))
        else:
            self.orphans.add(building.memory)

    # --- what is said ---

    def _say(self, problem: str) -> None:
        if problem != self.problem:
            self.job.ctx.log(f"job {self.job.name}: {problem}", "warning")
        self.problem = problem

    def _report(self) -> None:
        job, building = self.job, self.building
        snapshot = job.committed
        held = tuple(sorted(estate.absent for estate in job.estates if estate.snapshot == snapshot))
        if snapshot is None or not (held or building or self.problem):
            job.estate_report = UNSET
            return
        done = len(building.digests) - building.digests.count(None) if building is not None else 0
        job.estate_report = EstateReport(
            snapshot=snapshot,
            held=held,
            building=building.absent if building is not None else (),
            done_chunks=done,
            total_chunks=len(building.digests) if building is not None else 0,
            problem=self.problem[: limits.TEXT_CHARS_MAX],
        )

    def check(self) -> None:
        """Assert: one part for each estate, within the limit, and memory of a part is booked while it is wanted."""
        held = [(estate.snapshot, estate.absent) for estate in self.job.estates]
        assert len(held) == len(set(held)) <= limits.ESTATES_HELD_COUNT_MAX, held
        building = self.building
        if building is not None:
            assert building.memory not in self.orphans
            assert building.fetch is None or building.ready
            assert (building.snapshot, building.absent) not in held
