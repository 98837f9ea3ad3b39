"""Rules of the core, each broken in one place. A simulation that lets one of these pass would prove nothing.

A mutation is applied with pytest's monkeypatch and holds for one test.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import msgspec
import pytest
from holdfast.daemon.core import actions, collector, fetch, mixing, reprotect, resume
from holdfast.daemon.core.collector import Collector
from holdfast.daemon.core.context import Context
from holdfast.daemon.core.epochs import Epochs
from holdfast.daemon.core.fetch import Fetch
from holdfast.daemon.core.job import Job
from holdfast.daemon.core.ledger import LedgerRecord
from holdfast.daemon.core.memory import Memory
from holdfast.daemon.core.node import Node
from holdfast.daemon.core.peers import Peers
from holdfast.daemon.core.protect import Protect
from holdfast.daemon.core.pursuits import Pursuit, Pursuits
from holdfast.daemon.core.registry import JobParts, Registry
from holdfast.daemon.core.reprotect import Reprotect
from holdfast.daemon.core.slot import Phase, Slot
from holdfast.daemon.core.sums import Sums
from holdfast.daemon.core.transfer import Arrival, Transfer
from holdfast.protocol import frames, messages
from holdfast.protocol.ids import SnapshotId
from holdfast.protocol.messages import JobReport, PeerMessage

from sim.machine import Worker

Mutation = Callable[[pytest.MonkeyPatch], None]


def commit_on_one_fact_less(patch: pytest.MonkeyPatch) -> None:
    """N-1 facts are enough."""
    consider = Collector.consider

    def eager(self: Collector, job: Job) -> None:
        if job.planned and job.current is not None:
            participants = job.geometry(job.current).participants
            for nodes in self.facts.get(job.name, {}).values():
                if len(participants - nodes - {self.ctx.node}) == 1:
                    nodes |= participants
        consider(self, job)

    patch.setattr(Collector, "consider", eager)


def release_before_commit(patch: pytest.MonkeyPatch) -> None:
    """The older snapshot goes when the newer one is protected here, not when it is committed."""
    state_fact = Protect._state_fact

    def hasty(self: Protect, slot: Slot) -> None:
        state_fact(self, slot)
        for other in self.job.slots:
            if other.phase is Phase.COMMITTED:
                self.job.release(other)

    patch.setattr(Protect, "_state_fact", hasty)


def skip_the_digest_at_arrival(patch: pytest.MonkeyPatch) -> None:
    """A chunk is taken for what was announced."""
    arrive = Transfer.arrive

    def trusting(self: Transfer, member: int, chunk: int, digest: int) -> Arrival:
        table = self.announced.get(member, [])
        expected = table[chunk] if chunk < len(table) else None
        return arrive(self, member, chunk, digest if expected is None else expected)

    patch.setattr(Transfer, "arrive", trusting)


def take_work_for_another_snapshot(patch: pytest.MonkeyPatch) -> None:
    """The result of work counts for whatever lies in the slot when it ends."""
    owner = Registry.owner

    def careless(self: Registry, memory: Memory, snapshot: SnapshotId | None = None) -> JobParts | None:
        del snapshot
        return owner(self, memory)

    patch.setattr(Registry, "owner", careless)


def forget_a_stated_fact(patch: pytest.MonkeyPatch) -> None:
    """A restarted worker takes a protected snapshot for one in flight."""
    original = resume.resume

    def forgetful(registry: Registry, held: LedgerRecord, digests: Mapping[Memory, list[int]]) -> None:
        jobs = tuple(
            msgspec.structs.replace(
                job,
                slots=tuple(
                    msgspec.structs.replace(slot, phase="sealed") if slot.phase == "protected" else slot
                    for slot in job.slots
                ),
            )
            for job in held.jobs
        )
        original(registry, msgspec.structs.replace(held, jobs=jobs), digests)

    patch.setattr(resume, "resume", forgetful)


def write_the_ledger_last(patch: pytest.MonkeyPatch) -> None:
    """A fact is told before the ledger knows it."""
    flush = Node.flush

    def late(self: Node) -> list[actions.Action]:
        decided = flush(self)
        ledgers = [action for action in decided if isinstance(action, actions.WriteLedger)]
        return [action for action in decided if not isinstance(action, actions.WriteLedger)] + list(ledgers)

    patch.setattr(Node, "flush", late)


def trust_what_was_rebuilt(patch: pytest.MonkeyPatch) -> None:
    """Chunks that were damaged on their way into a rebuild are kept."""
    stored, arrived, passed = Fetch.stored, Pursuits.arrived, Sums.arrived

    def trusting(self: Fetch, pursuit: Pursuit, digest: int, fingerprint: bytes) -> None:
        pursuit.digest = digest
        stored(self, pursuit, digest, fingerprint)

    def take(self: Pursuits, header: messages.ChunkHeader, digest: int) -> None:
        arrived(self, msgspec.structs.replace(header, digest=digest), digest)

    def pass_on(self: Sums, header: messages.ChunkHeader, digest: int) -> None:
        passed(self, msgspec.structs.replace(header, digest=digest), digest)

    patch.setattr(Fetch, "stored", trusting)
    patch.setattr(Pursuits, "arrived", take)
    patch.setattr(Sums, "arrived", pass_on)


def deny_what_was_stated(patch: pytest.MonkeyPatch) -> None:
    """A snapshot is given up whatever was said of it."""
    give_up = Job.give_up_snapshot

    def fickle(self: Job, snapshot: SnapshotId, reason: str) -> None:
        slot = self.slot_of(snapshot)
        if slot is not None and slot.phase is Phase.PROTECTED and snapshot.attempt == self.attempt:
            self._forget_snapshot(snapshot, reason)
            return
        give_up(self, snapshot, reason)

    def impatient(self: Protect) -> None:
        tick(self)
        for slot in self.job.slots:
            if slot.phase is Phase.PROTECTED and slot.snapshot is not None:
                if self.job.ctx.now_ns > slot.sealed_ns + 3 * 10**9:
                    self.job.give_up_snapshot(slot.snapshot, "nobody commits it")

    tick = Protect.tick
    patch.setattr(Job, "give_up_snapshot", fickle)
    patch.setattr(Protect, "tick", impatient)


def seal_without_one_role(patch: pytest.MonkeyPatch) -> None:
    """An image is sealed when all ranks but one have sealed."""
    seal = Protect.seal

    def early(self: Protect, client: int, said: messages.Seal) -> None:
        slot = self.job.slot_of(said.snapshot)
        if slot is not None and slot.phase is Phase.STAGING and slot.geometry is not None:
            slot.sealed_roles |= set(slot.geometry.layout.roles_on(slot.node)[1:])
        seal(self, client, said)

    patch.setattr(Protect, "seal", early)


def count_a_duplicate_twice(patch: pytest.MonkeyPatch) -> None:
    """A stripe is whole when as many chunks came as it has, whichever they were; those that lack count as zeros."""
    arrive, encodable, encode_if_whole = Transfer.arrive, Transfer.encodable, Protect._encode_if_whole
    counts: dict[tuple[int, int], int] = {}

    def counting(self: Transfer, member: int, chunk: int, digest: int) -> Arrival:
        found = arrive(self, member, chunk, digest)
        if found in {Arrival.KEPT, Arrival.DUPLICATE}:
            stripe = self.geometry.stripes(self.node).stripe_of(member, chunk)
            counts[id(self), stripe] = counts.get((id(self), stripe), 0) + 1
        return found

    def counted(self: Transfer, stripe: int) -> bool:
        expected = len(self.geometry.stripes(self.node).contributions(stripe))
        is_open = stripe in self.unencoded and stripe not in self.encoding
        return encodable(self, stripe) or (is_open and counts.get((id(self), stripe), 0) >= expected)

    def with_what_is_there(self: Protect, slot: Slot, stripe: int) -> None:
        assert slot.transfer is not None
        arrived = {slot.transfer.group[member] for member in slot.transfer.arrived.get(stripe, {})}
        out = self.job.ctx.actions
        before = len(out)
        encode_if_whole(self, slot, stripe)
        for index in range(before, len(out)):
            action = out[index]
            if isinstance(action, actions.EncodeParity):
                there = tuple((position, key) for position, key in action.sources if key.node in arrived)
                out[index] = replace(action, sources=there)

    patch.setattr(Transfer, "arrive", counting)
    patch.setattr(Transfer, "encodable", counted)
    patch.setattr(Protect, "_encode_if_whole", with_what_is_there)


def accept_an_old_epoch(patch: pytest.MonkeyPatch) -> None:
    """Whatever epoch a frame is of, it is taken for one of this."""
    decode = frames.decode_peer

    def lenient(frame: bytes, *, cluster: str, epoch: int, config: str = "") -> tuple[frames.Envelope, PeerMessage]:
        envelope = msgspec.msgpack.decode(frame, type=frames.Envelope)
        found, message = decode(frame, cluster=cluster, epoch=envelope.epoch, config=envelope.config)
        if isinstance(message, messages.Heartbeat):
            message = msgspec.structs.replace(message, config_digest=config)
        return found, message

    patch.setattr(frames, "decode_peer", lenient)


def accept_an_old_incarnation(patch: pytest.MonkeyPatch) -> None:
    """A machine that was replaced is believed when it comes back."""
    heard = Peers.heard

    def trusting(self: Peers, node: int, incarnation: int, message: messages.Heartbeat | None) -> tuple[bool, bool]:
        self.table[node].incarnation = min(self.table[node].incarnation, incarnation)
        return heard(self, node, incarnation, message)

    patch.setattr(Peers, "heard", trusting)
    patch.setattr(Peers, "takes", lambda *_: True)


def replace_a_live_node(patch: pytest.MonkeyPatch) -> None:
    """Whoever comes with a higher incarnation takes the slot, though its holder is alive."""

    def newest(self: Peers, node: int, incarnation: int) -> bool:
        return incarnation >= self.table[node].incarnation

    patch.setattr(Peers, "takes", newest)


def write_the_digests_last(patch: pytest.MonkeyPatch) -> None:
    """The ledger calls a snapshot complete before the table of its digests is."""
    flush = Node.flush

    def late(self: Node) -> list[actions.Action]:
        decided = flush(self)
        tables = [action for action in decided if isinstance(action, actions.StoreDigests)]
        return [action for action in decided if not isinstance(action, actions.StoreDigests)] + list(tables)

    patch.setattr(Node, "flush", late)


def believe_what_was_forgotten(patch: pytest.MonkeyPatch) -> None:
    """A job that an operator let go is learnt again from a heartbeat that was on its way."""
    patch.setattr(Registry, "is_forgotten", lambda *_: False)


def doubt_no_unheard_commit(patch: pytest.MonkeyPatch) -> None:
    """What a node that is not heard may have committed, since all others have protected it, is passed over."""
    patch.setattr(collector, "_held_by_all", lambda *_: False)


def give_a_slot_that_is_still_written(patch: pytest.MonkeyPatch) -> None:
    """The chunks of a rebuild that failed land in what is staged there next."""
    patch.setattr(Context, "is_written", lambda *_: False)


def believe_any_pause(patch: pytest.MonkeyPatch) -> None:
    """A node that waits for the decision on an earlier question is taken to wait for this one, too."""

    def unheard(self: Collector, node: int, query: collector.Query) -> bool:
        peer = self.peers.table[node]
        if not self.peers.alive(node):
            return False
        report = peer.report(query.job)
        return peer.heartbeat_ns < query.started_ns or (report is not None and not report.paused)

    patch.setattr(Collector, "_is_unheard", unheard)


def answer_a_dead_ranks_question(patch: pytest.MonkeyPatch) -> None:
    """A question of an earlier life, late at a collector that is slow, begins an attempt although a later one lives."""
    patch.setattr(Collector, "answered_elsewhere", lambda *_: None)


def free_the_estate_before_the_next_is_whole(patch: pytest.MonkeyPatch) -> None:
    """What is kept of absent nodes goes as soon as the estate of more of them is begun."""
    build = Reprotect._build

    def hasty(self: Reprotect, absent: tuple[int, ...]) -> None:
        for held in list(self.job.estates):
            self._free(held)
        build(self, absent)

    patch.setattr(Reprotect, "_build", hasty)


def free_the_estate_when_its_nodes_are_heard(patch: pytest.MonkeyPatch) -> None:
    """A node that was cut off, or its replacement, is taken for whole as soon as it speaks."""
    let_go = Reprotect._let_go

    def hasty(self: Reprotect, *, off: bool) -> None:
        let_go(self, off=off)
        for held in list(self.job.estates):
            if all(self.peers.alive(node) for node in held.absent):
                self._free(held)

    patch.setattr(Reprotect, "_let_go", hasty)


def count_parts_of_another_estate(patch: pytest.MonkeyPatch) -> None:
    """Whoever keeps anything of absent nodes keeps a part of every estate that is spoken of."""
    known = mixing.known_estates

    def careless(reports: Mapping[int, JobReport], *rest: Any, **named: Any) -> list[mixing.KnownEstate]:
        found = known(reports, *rest, **named)
        everybody = frozenset(node for estate in found for node in estate.holders)
        return [replace(estate, holders=everybody - set(estate.absent)) for estate in found]

    for module in (collector, fetch, reprotect):
        patch.setattr(module, "known_estates", careless)


def tell_of_a_part_that_is_computed(patch: pytest.MonkeyPatch) -> None:
    """A part counts from its first chunk on."""
    report = Reprotect._report

    def early(self: Reprotect) -> None:
        report(self)
        told = self.job.estate_report
        if isinstance(told, messages.EstateReport) and told.building:
            self.job.estate_report = msgspec.structs.replace(told, held=tuple(sorted({*told.held, told.building})))

    patch.setattr(Reprotect, "_report", early)


def mix_without_what_absent_nodes_left(patch: pytest.MonkeyPatch) -> None:
    """Estates are kept and counted, and nobody reads them."""
    patch.setattr(fetch.Fetch, "known_estates", lambda _: [])


def believe_a_part_of_a_sum(patch: pytest.MonkeyPatch) -> None:
    """Of several chunks of one node only the first is vouched for, and only that is added."""
    do = Worker._do

    def first(self: Worker, action: actions.Action) -> None:
        do(self, replace(action, more=()) if isinstance(action, actions.AddToSum) else action)

    patch.setattr(Worker, "_do", first)


# Each mutation with a run that catches it: profile and seed.
def look_at_the_epoch_in_force_only(patch: pytest.MonkeyPatch) -> None:
    """What the epoch before has committed is not what a job restores."""
    choose = Epochs._choose

    def forgetful(self: Epochs, client: int, question: Any, old: Any, new: Any, earlier: Node | None) -> None:
        choose(self, client, question, msgspec.structs.replace(old, snapshot=None, layout=None), new, earlier)

    patch.setattr(Epochs, "_choose", forgetful)


def end_the_epoch_before_with_a_plan(patch: pytest.MonkeyPatch) -> None:
    """The epoch before lets a job go when it plans in the epoch in force, before it has committed there."""
    let_go = Epochs._let_go

    def early(self: Epochs, earlier: Node) -> None:
        for name in list(earlier.jobs):
            new = self.current.jobs.get(name)
            if new is not None and new.job.planned:
                earlier.registry.forget(name)
        let_go(self, earlier)

    patch.setattr(Epochs, "_let_go", early)


CAUGHT_BY: tuple[tuple[Mutation, str, int], ...] = (
    (commit_on_one_fact_less, "losses", 0),
    (release_before_commit, "losses", 0),
    (skip_the_digest_at_arrival, "losses", 0),
    (take_work_for_another_snapshot, "everything", 4),
    (forget_a_stated_fact, "crashes", 1),
    (trust_what_was_rebuilt, "losses", 0),
    (deny_what_was_stated, "crashes", 1),
    (count_a_duplicate_twice, "everything", 0),
    (seal_without_one_role, "losses", 1),
    (accept_an_old_epoch, "few", 3),
    (write_the_ledger_last, "few", 3),
    (accept_an_old_incarnation, "strays", 0),
    (replace_a_live_node, "few", 10000126),
    (write_the_digests_last, "crashes", 1),
    (believe_what_was_forgotten, "beyond", 13),
    (free_the_estate_before_the_next_is_whole, "long", 2),
    (free_the_estate_when_its_nodes_are_heard, "long", 0),
    (count_parts_of_another_estate, "long", 2),
    (tell_of_a_part_that_is_computed, "long", 4),
    (mix_without_what_absent_nodes_left, "long", 1),
    (believe_a_part_of_a_sum, "long", 0),
    (answer_a_dead_ranks_question, "restarts", 9500090),
    (believe_any_pause, "restarts", 12002591),
    (give_a_slot_that_is_still_written, "strays", 18000247),
    (doubt_no_unheard_commit, "few", 13000423),
    (look_at_the_epoch_in_force_only, "growth", 1),
    (end_the_epoch_before_with_a_plan, "growth", 1),
)
