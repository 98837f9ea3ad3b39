"""Rules of the core, each broken in one place. A simulation that lets one of these pass would prove nothing.

A mutation is applied with pytest's monkeypatch and holds for one test.
"""

from collections.abc import Callable, Mapping

import msgspec
import pytest
from holdfast.daemon.core import actions, resume
from holdfast.daemon.core.collector import Collector
from holdfast.daemon.core.fetch import Fetch, Pursuit, Pursuits
from holdfast.daemon.core.job import Job
from holdfast.daemon.core.ledger import LedgerRecord
from holdfast.daemon.core.memory import Memory
from holdfast.daemon.core.node import Node
from holdfast.daemon.core.protect import Protect
from holdfast.daemon.core.registry import JobParts, Registry
from holdfast.daemon.core.slot import Phase, Slot
from holdfast.daemon.core.sums import Sums
from holdfast.daemon.core.transfer import Arrival, Transfer
from holdfast.protocol import messages
from holdfast.protocol.ids import SnapshotId

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
    flush = Node._flush

    def late(self: Node) -> list[actions.Action]:
        decided = flush(self)
        ledgers = [action for action in decided if isinstance(action, actions.WriteLedger)]
        return [action for action in decided if not isinstance(action, actions.WriteLedger)] + list(ledgers)

    patch.setattr(Node, "_flush", late)


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


# Each mutation with a run that catches it: profile and seed.
CAUGHT_BY: tuple[tuple[Mutation, str, int], ...] = (
    (commit_on_one_fact_less, "everything", 0),
    (release_before_commit, "everything", 0),
    (skip_the_digest_at_arrival, "everything", 4),
    (take_work_for_another_snapshot, "restarts", 8),
    (forget_a_stated_fact, "crashes", 4),
    (write_the_ledger_last, "restarts", 13),
    (trust_what_was_rebuilt, "losses", 4),
    (deny_what_was_stated, "everything", 3),
    (seal_without_one_role, "restarts", 1),
)
