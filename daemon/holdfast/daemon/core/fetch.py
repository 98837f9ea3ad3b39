"""Getting chunks of a committed snapshot from wherever they are: whole from who holds them, else as sums of k others.

Covers the side that wants. A chunk whose holder is there comes from it. Any other is a sum over k chunks of its
stripe, each times a factor (systematic Reed-Solomon): one of their holders gathers the others' chunks, adds all up in
one pass, and one chunk arrives here whatever k is. Another holder gathers with each stripe, so that all links carry
the same; as many chunks travel as along a chain of partial sums, and each is touched half as often.

A data chunk must have the digest that its owner announced. A parity chunk must have the linear fingerprint that its
terms' holders, who checked each its own chunk, vouch for on the control plane. What fails is asked for in another way.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from holdfast.coding import CodeParams, decode_matrix
from holdfast.daemon.core.actions import DropFrames, OwnTerm, StoreSum
from holdfast.daemon.core.context import Context
from holdfast.daemon.core.held_estate import HeldEstate
from holdfast.daemon.core.memory import ChunkKey
from holdfast.daemon.core.mixing import Goal, KnownEstate, Mixer, Orders, Term, gathered, known_estates, part_of
from holdfast.daemon.core.peers import Peers
from holdfast.daemon.core.pursuits import Pursuit, Pursuits
from holdfast.daemon.core.slot import COMPLETE, Slot
from holdfast.daemon.core.terms import key_of_sum, own_term
from holdfast.protocol import limits, messages
from holdfast.protocol.estate_messages import MixPart
from holdfast.protocol.ids import SnapshotId
from holdfast.protocol.layout import Geometry

NO_FINGERPRINT = bytes(256)


@dataclass(slots=True)
class Fetch:
    """The chunks that somebody here wants of one snapshot and one group.

    Attributes:
        slot: this node's own slot of the snapshot, if it is of this group and whole; None else.
        digests: of the group's data chunks, in member order, None where unknown; the owner of this object fills it.
        done: called with each chunk that is where it should be and right, and its digest.
        failed: called once, when a chunk can't be had; nothing is under way any more then.
        own_estates: what this node holds of what absent nodes left.
    """

    ctx: Context
    peers: Peers
    pursuits: Pursuits
    job: str
    snapshot: SnapshotId
    geometry: Geometry
    group: tuple[int, ...]
    own_slot: Callable[[], Slot | None]
    digests: list[int | None]
    done: Callable[[Goal, int], None]
    failed: Callable[[str], None]
    own_estates: Callable[[], Sequence[HeldEstate]] = tuple
    todo: deque[Goal] = field(default_factory=deque)
    open: dict[int, Pursuit] = field(default_factory=dict)
    excluded: dict[int, set[int]] = field(default_factory=dict)  # stripe -> nodes that failed us there
    tries: dict[int, int] = field(default_factory=dict)  # stripe -> plans that came to nothing
    suspects: dict[int, int] = field(default_factory=dict)  # node -> until when it is avoided
    wrongs: dict[int, int] = field(default_factory=dict)  # node -> wrong sums in which it was, since its last right one
    received_bytes: int = 0
    failures: int = 0  # chunks that were damaged or wrong
    ended: bool = False
    allowed: float = limits.SUMS_FIRST_CHUNKS  # chunks under way; halved when sums come too late, then raised slowly
    eased_ns: int = 0  # until when another late one says nothing new: it was asked for before the last halving

    # --- what is wanted ---

    def want(self, goals: Sequence[Goal]) -> None:
        """Ask for more chunks, after those that are asked for already."""
        self.todo.extend(goals)
        self.pump()

    def hurry(self, wanted: Callable[[Goal], bool]) -> None:
        """Take some of the chunks that are still to be asked for before the others."""
        self.todo = deque(sorted(self.todo, key=lambda goal: not wanted(goal)))

    def pump(self) -> None:
        """Ask for as much as may be under way. Orders are batched: one message per node, not one per chunk."""
        window = self.window
        if self.ended or len(self.open) > window - min(window // 4, len(self.todo)):
            return
        orders: Orders = {}
        while self.todo and len(self.open) < window and not self.ended:
            self._plan(self.todo.popleft(), orders)
        self._order(orders)

    @property
    def window(self) -> int:
        """How many chunks may be under way: each holder gathers one at least, within a bound in bytes.

        Fewer at first, and where survivors are too busy to be in time: asking again for what is late would keep them
        busier still.
        """
        by_bytes = limits.SUMS_OPEN_BYTES // self.geometry.chunk_bytes
        most = max(limits.SUM_CHUNKS_MIN, min(limits.SUM_CHUNKS_MAX, max(by_bytes, len(self.group))))
        return min(most, int(self.allowed))

    def _ease(self) -> None:
        if self.ctx.now_ns >= self.eased_ns:
            self.allowed = max(self.window / 2, 1.0)
            self.eased_ns = self.ctx.seconds(limits.SUM_PATIENCE_S)

    def survivors(self) -> list[int]:
        """The nodes of the group that hold the snapshot, as far as is known here."""
        reports = self.peers.reports(self.job)
        held = [node for node in self.group if node in reports and self.snapshot in reports[node].held]
        return sorted([*held, self.ctx.node]) if self._own_slot() is not None else held

    def heard_enough(self) -> bool:
        """Whether who is not heard now has had the time to speak: only then it counts as lost."""
        return all(self.peers.had_time(node) for node in self.group)

    def _own_slot(self) -> Slot | None:
        slot = self.own_slot() if self.ctx.node in self.group else None
        return slot if slot is not None and slot.phase in COMPLETE and slot.snapshot == self.snapshot else None

    # --- plans ---

    def _plan(self, goal: Goal, orders: Orders) -> None:
        found = self._sources(goal)
        if found is None:
            if not self.ended:
                self._fail(self._missing_text(goal))
            return
        terms, own = found
        numbers = tuple(self.ctx.new_sum() for _ in range(max(len(terms), 1)))
        deadline_ns = self.ctx.seconds(limits.SUM_PATIENCE_WANTED_S)
        pursuit = Pursuit(numbers, goal, terms, own, self._digest_of(goal), deadline_ns)
        self.open[pursuit.number] = pursuit
        self.pursuits.watch(pursuit, self)
        if not terms:
            self._store(pursuit, None)
            return
        *others, last = terms
        wants_witness = pursuit.digest is None
        gathers = tuple(gathered(term, number) for number, term in zip(numbers[1:], others, strict=True))
        for number, term in zip(numbers[1:], others, strict=True):
            self._put(orders, term, part_of(term, number, last.node, None, witness=wants_witness))
        self._put(orders, last, part_of(last, pursuit.number, self.ctx.node, gathers, witness=wants_witness))

    @staticmethod
    def _put(orders: Orders, term: Term, part: messages.SumPart | MixPart) -> None:
        orders.setdefault((term.node, term.absent if isinstance(part, MixPart) else None), []).append(part)

    def _order(self, orders: Orders) -> None:
        for (node, absent), parts in orders.items():
            for first in range(0, len(parts), limits.SUMS_PER_MESSAGE_COUNT_MAX):
                some = parts[first : first + limits.SUMS_PER_MESSAGE_COUNT_MAX]
                if absent is None:
                    plain = tuple(part for part in some if isinstance(part, messages.SumPart))
                    self.ctx.tell(node, messages.SumsWanted(self.job, self.snapshot, plain))
                else:
                    mixed = tuple(part for part in some if isinstance(part, MixPart))
                    self.ctx.tell(node, messages.MixesWanted(self.job, self.snapshot, absent, mixed))

    def _sources(self, goal: Goal) -> tuple[tuple[Term, ...], tuple[OwnTerm, ...]] | None:
        """From whom a chunk can be had, and how; None if it can't."""
        stripes = self.geometry.stripes(self.group[0])
        data = stripes.data_members(goal.stripe)
        members = [*data, *stripes.parity_members(goal.stripe)]
        real = {position for position, _, _ in stripes.contributions(goal.stripe)}
        zeros = [position for position in range(len(data)) if position not in real]
        live = set(self.survivors())
        excluded = self.excluded.get(goal.stripe, set())
        if goal.mix:
            return self._mixed(goal, live, excluded)
        needed = stripes.data_count - len(zeros)
        for avoided in (excluded, set[int]()):  # one bad or late frame is no reason to give all up
            able = [p for p, m in enumerate(members) if p not in zeros and self.group[m] in live - avoided]
            if goal.position in able:
                return self._terms(goal, {goal.position: 1}, members)
            if len(able) >= needed:
                chosen = self._choose(goal, able, needed, members)
                available = sorted([*chosen, *zeros])
                params = CodeParams(stripes.data_count, stripes.parity_count)
                row = decode_matrix(params, available=available, wanted=[goal.position])[0].tolist()
                factors = {p: factor for p, factor in zip(available, row, strict=True) if p in chosen and factor}
                return self._terms(goal, factors, members)
            self.excluded.pop(goal.stripe, None)
        return self._mixed(goal, live, excluded)

    def known_estates(self) -> list[KnownEstate]:
        """What absent nodes of the group left, and who holds it now."""
        return known_estates(
            self.peers.reports(self.job),
            (self.ctx.node, self.own_estates()),
            snapshot=self.snapshot,
            geometry=self.geometry,
            group=self.group,
        )

    def _mixed(
        self, goal: Goal, live: set[int], excluded: set[int]
    ) -> tuple[tuple[Term, ...], tuple[OwnTerm, ...]] | None:
        """The same for a sum of several chunks, and for a chunk that only an estate makes up for."""
        estates = self.known_estates()
        if not goal.mix and not estates:
            return None
        mixer = Mixer(
            node=self.ctx.node,
            geometry=self.geometry,
            group=self.group,
            estates=estates,
            job=self.job,
            own_slot=self._own_slot(),
            own_estates=[held for held in self.own_estates() if held.snapshot == self.snapshot],
            suspects={node for node, until_ns in self.suspects.items() if until_ns > self.ctx.now_ns},
        )
        return mixer.sources(goal, live - excluded) or mixer.sources(goal, live)

    def _choose(self, goal: Goal, able: list[int], needed: int, members: list[int]) -> list[int]:
        """Which of the chunks that would do: own ones first, suspects last, the others in turn."""
        turn = goal.stripe // len(self.group)
        now_ns = self.ctx.now_ns

        def rank(place: int) -> tuple[bool, bool, int]:
            node = self.group[members[able[place]]]
            return node != self.ctx.node, self.suspects.get(node, 0) > now_ns, (place + turn) % len(able)

        return [able[place] for place in sorted(range(len(able)), key=rank)[:needed]]

    def _terms(
        self, goal: Goal, factors: dict[int, int], members: list[int]
    ) -> tuple[tuple[Term, ...], tuple[OwnTerm, ...]]:
        stripes = self.geometry.stripes(self.group[0])
        terms: list[Term] = []
        own: list[OwnTerm] = []
        for position, factor in factors.items():
            member = members[position]
            node = self.group[member]
            kind: Literal["data", "parity"] = "data" if position < stripes.data_count else "parity"
            chunk = stripes.chunk_at(goal.stripe, member) if kind == "data" else None
            place = chunk if chunk is not None else stripes.parity_index(goal.stripe, member)
            if node != self.ctx.node:
                terms.append(Term(node, kind, place, factor))
            elif (slot := self._own_slot()) is not None:
                term = own_term(slot, self.job, kind=kind, chunk=place, factor=factor)
                assert term is not None, "a whole slot has all its digests"
                own.append(term)
        turn = goal.stripe % max(len(terms), 1)
        return (*terms[turn:], *terms[:turn]), tuple(own)

    def _digest_of(self, goal: Goal) -> int | None:
        stripes = self.geometry.stripes(self.group[0])
        if goal.mix or goal.position >= stripes.data_count:
            return None
        member = stripes.data_members(goal.stripe)[goal.position]
        chunk = stripes.chunk_at(goal.stripe, member)
        assert chunk is not None
        digest = self.digests[sum(stripes.chunk_counts[:member]) + chunk]
        assert digest is not None, "nothing is asked for before its digest is known"
        return digest

    def _missing_text(self, goal: Goal) -> str:
        stripes = self.geometry.stripes(self.group[0])
        live = self.survivors()
        lost = [self.ctx.name_of(node) for node in self.group if node not in live]
        return (
            f"stripe {goal.stripe} needs {stripes.data_count} of its {stripes.member_count} chunks; lost or silent: "
            f"{', '.join(lost) or 'none'}; parity covers {stripes.parity_count}"
        )

    # --- what comes ---

    def arrived(self, pursuit: Pursuit, header: messages.ChunkHeader, digest: int) -> None:
        """The sum is here."""
        key = key_of_sum(header)
        if pursuit.storing:
            return  # sent twice: the frame that came first is in use
        if not pursuit.terms or header.sender != pursuit.terms[-1].node or header.snapshot != self.snapshot:
            self.ctx.emit(DropFrames((key,)))
            return
        self.received_bytes += self.geometry.chunk_bytes
        if header.digest != digest:
            self.failures += 1
            self.ctx.emit(DropFrames((key,)))
            self._again(pursuit, None, "it was damaged on its way here")
            return
        self._store(pursuit, key)

    def _store(self, pursuit: Pursuit, incoming: ChunkKey | None) -> None:
        pursuit.storing = True
        goal = pursuit.goal
        self.ctx.stores[pursuit.number] = goal.memory
        self.ctx.emit(
            StoreSum(
                memory=goal.memory,
                number=pursuit.number,
                kind=goal.kind,
                chunk=goal.chunk,
                incoming=incoming,
                own=pursuit.own,
                witness=pursuit.digest is None,
            )
        )

    def stored(self, pursuit: Pursuit, digest: int, fingerprint: bytes) -> None:
        """The chunk is in its place: is it right?"""
        if pursuit.digest is None:
            pursuit.fingerprint, pursuit.found_digest = fingerprint, digest
            self._judge(pursuit)
        elif pursuit.digest == digest:
            self._succeed(pursuit, digest)
        else:
            self._wrong(pursuit, "the chunk that came of it fails its digest")

    def witnessed(self, pursuit: Pursuit, node: int, fingerprint: bytes) -> None:
        """A holder vouches for its term."""
        pursuit.witnesses[node] = fingerprint
        self._judge(pursuit)

    def _judge(self, pursuit: Pursuit) -> None:
        if pursuit.fingerprint is None or set(pursuit.witnesses) != {term.node for term in pursuit.terms}:
            return
        total = int.from_bytes(NO_FINGERPRINT, "little")
        for fingerprint in pursuit.witnesses.values():
            total ^= int.from_bytes(fingerprint, "little")
        if total.to_bytes(len(NO_FINGERPRINT), "little") == pursuit.fingerprint:
            self._succeed(pursuit, pursuit.found_digest)
        else:
            self._wrong(pursuit, "the parity that came of it does not have its terms' fingerprint")

    def _succeed(self, pursuit: Pursuit, digest: int) -> None:
        self._close(pursuit)
        for term in pursuit.terms:
            self.wrongs.pop(term.node, None)
        self.excluded.pop(pursuit.goal.stripe, None)
        self.tries.pop(pursuit.goal.stripe, None)
        step = 1 / self.allowed if self.eased_ns else 1
        self.allowed = min(self.allowed + step, limits.SUM_CHUNKS_MAX)
        self.done(pursuit.goal, digest)
        self.pump()

    # --- what goes wrong ---

    def _wrong(self, pursuit: Pursuit, reason: str) -> None:
        """All terms were sound where they rest, and the sum is not: who was in most such sums is the first suspect."""
        self.failures += 1
        for term in pursuit.terms:
            self.wrongs[term.node] = self.wrongs.get(term.node, 0) + 1
        ranked = sorted(pursuit.terms, key=lambda term: (self.wrongs[term.node], term.kind == "parity"))
        self._again(pursuit, ranked[-1].node if ranked else None, reason)

    def part_failed(self, pursuit: Pursuit, node: int, said: messages.SumFailed) -> None:
        """A holder can't do its part, or waits in vain for another's chunk."""
        holders = [term.node for term in pursuit.terms]
        if pursuit.storing or node not in holders:
            return
        blamed = node
        if said.waits_for is not None:
            blamed = said.waits_for if said.waits_for in holders else node
            self.suspects[blamed] = self.ctx.seconds(limits.SUSPECT_S)
            self._ease()
        damaged = said.waits_for is None and "damaged" in said.reason
        self._again(pursuit, None if damaged else blamed, said.reason)

    def not_stored(self, pursuit: Pursuit, reason: str) -> None:
        """An own chunk is bad, or the frame is gone."""
        self.failures += 1
        self._again(pursuit, self.ctx.node if pursuit.own else None, reason)

    def _again(self, pursuit: Pursuit, avoid: int | None, reason: str) -> None:
        """Plan a chunk anew, without one node if there are others."""
        self._close(pursuit)
        if self.ended:
            return
        stripe = pursuit.goal.stripe
        who = "" if avoid is None else f" without node {self.ctx.name_of(avoid)}"
        self.ctx.log(f"job {self.job}: a chunk of stripe {stripe} is asked for again{who}: {reason}", "warning")
        if avoid is not None:
            self.excluded.setdefault(stripe, set()).add(avoid)
        self.tries[stripe] = self.tries.get(stripe, 0) + 1
        if self.tries[stripe] >= limits.SUM_TRIES_COUNT_MAX:
            self._fail(f"stripe {stripe} was tried {self.tries[stripe]} times, at last: {reason}")
            return
        self.todo.appendleft(pursuit.goal)
        self.pump()

    def tick(self) -> None:
        """Nodes that went away, and chunks that don't come."""
        if not self.open:
            self.pump()
            return
        live = set(self.survivors())
        for pursuit in list(self.open.values()):
            if self.ended:
                return
            gone = [term.node for term in pursuit.terms if term.node not in live]
            if pursuit.number not in self.open or (pursuit.storing and pursuit.fingerprint is None):
                continue  # the shell ends what is being stored, whatever happens
            if gone and not pursuit.storing:
                self._again(pursuit, gone[0], f"{self.ctx.name_of(gone[0])} is silent or has let it go")
            elif self.ctx.now_ns >= pursuit.deadline_ns and pursuit.storing:
                self._again(pursuit, None, "not all witnesses of its parity were heard")
            elif self.ctx.now_ns >= pursuit.deadline_ns:
                last = pursuit.terms[-1].node
                self.suspects[last] = self.ctx.seconds(limits.SUSPECT_S)
                self._ease()
                self._again(pursuit, last, f"nothing came from {self.ctx.name_of(last)}")

    def _close(self, pursuit: Pursuit) -> None:
        self.open.pop(pursuit.number, None)
        self.pursuits.forget(pursuit)

    def stop(self) -> None:
        """Nobody wants any of it any more. Frames that still come are dropped."""
        self.ended = True
        self.todo.clear()
        for pursuit in list(self.open.values()):
            self._close(pursuit)

    def _fail(self, problem: str) -> None:
        if not self.ended:
            self.stop()
            self.failed(problem)
