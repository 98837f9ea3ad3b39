"""One slot: room for one snapshot on this node, and the life of what is in it.

This file owns the phases and their changes; `Job` decides when. Phases move

    ABSENT -> ALLOCATING -> EMPTY -> STAGING -> SEALED -> PROTECTED -> COMMITTED -> EMPTY
                            EMPTY -> REBUILDING -> COMMITTED
    and from STAGING, SEALED, PROTECTED or REBUILDING back to EMPTY when a snapshot is given up.

Invariants, asserted by `check`:
  * a snapshot is named exactly in the phases that hold one;
  * SEALED and later: every local role has sealed;
  * PROTECTED and COMMITTED: every digest of the group's data is known, and every parity chunk is complete.
"""

from dataclasses import dataclass, field
from enum import Enum

from holdfast.daemon.core.memory import Memory, Sizes, sizes_of
from holdfast.daemon.core.transfer import Transfer
from holdfast.protocol.ids import SnapshotId
from holdfast.protocol.layout import Geometry


class Phase(Enum):
    """Life of one slot; the values are the ledger's words."""

    ABSENT = "absent"  # no memory
    ALLOCATING = "allocating"  # the shell is making memory
    EMPTY = "empty"  # memory, and nothing in it that counts
    STAGING = "staging"  # ranks write into it; peers may send parity contributions
    SEALED = "sealed"  # all local shards are whole; protection goes on
    PROTECTED = "protected"  # the fact is stated: kept until a newer commit or a counter-fact
    COMMITTED = "committed"  # may be restored
    REBUILDING = "rebuilding"  # being filled from the survivors' chunks

    __hash__ = object.__hash__  # members are single objects; Enum's own hashes the name, in Python, at every look-up


COMPLETE = frozenset({Phase.PROTECTED, Phase.COMMITTED})
IN_FLIGHT = frozenset({Phase.STAGING, Phase.SEALED})
_NEXT: dict[Phase, frozenset[Phase]] = {
    Phase.ABSENT: frozenset({Phase.ALLOCATING}),
    Phase.ALLOCATING: frozenset({Phase.EMPTY, Phase.ABSENT}),
    Phase.EMPTY: frozenset({Phase.STAGING, Phase.REBUILDING, Phase.ABSENT}),
    Phase.STAGING: frozenset({Phase.SEALED, Phase.EMPTY}),
    Phase.SEALED: frozenset({Phase.PROTECTED, Phase.EMPTY}),
    Phase.PROTECTED: frozenset({Phase.COMMITTED, Phase.EMPTY}),
    Phase.COMMITTED: frozenset({Phase.EMPTY}),
    Phase.REBUILDING: frozenset({Phase.COMMITTED, Phase.EMPTY}),
}


@dataclass(slots=True)
class Slot:
    """Room for one snapshot of one job on this node."""

    index: int
    node: int
    phase: Phase = Phase.ABSENT
    generation: int = 0
    geometry: Geometry | None = None
    snapshot: SnapshotId | None = None
    sealed_roles: set[int] = field(default_factory=set)
    writing: set[int] = field(default_factory=set)  # clients that may still write into this memory; outlives a snapshot
    transfer: Transfer | None = None
    digests: list[int | None] = field(default_factory=list)  # by Geometry: group's data, then own parity
    reserved: bool = False  # a rebuild waits for its memory: neither for staging nor for another layout
    sealed_ns: int = 0
    ask_digests_ns: int = 0  # when to ask for announcements that have not come
    deadline_ns: int = 0
    moved_count: int = 0  # of the transfer, when the deadline was last put off

    def memory(self, job: str) -> Memory:
        """The name of this slot's memory."""
        return Memory(job, self.index, self.generation)

    @property
    def sizes(self) -> Sizes:
        """The sizes of this slot's memory; asking an ABSENT slot is an error."""
        assert self.geometry is not None
        return sizes_of(self.geometry, self.node)

    @property
    def layout_id(self) -> int | None:
        """The layout for which its memory is sized; None without memory."""
        return None if self.geometry is None else self.geometry.layout.layout_id

    @property
    def roles(self) -> tuple[int, ...]:
        """The roles whose shards make up this node's image here; asking an ABSENT slot is an error."""
        assert self.geometry is not None
        return self.geometry.layout.roles_on(self.node)

    def move(self, phase: Phase) -> None:
        """Change the phase; an illegal change is a bug and raises."""
        assert phase in _NEXT[self.phase], f"slot {self.index}: {self.phase.name} -> {phase.name} is no legal step"
        self.phase = phase
        if phase is Phase.COMMITTED:
            self.transfer = (
                None  # every participant has stated its fact: nobody needs a chunk of it for parity any more
            )

    def claim(self, phase: Phase, snapshot: SnapshotId) -> None:
        """Take an EMPTY slot for a snapshot."""
        assert not self.writing, f"clients {self.writing} may still write into slot {self.index}"
        self.move(phase)
        self.snapshot, self.reserved = snapshot, False
        self.sealed_roles = set()
        self.digests = [None] * self.sizes.digest_count

    def clear(self) -> None:
        """Forget the snapshot; the memory stays."""
        self.move(Phase.EMPTY)
        self.snapshot = None
        self.transfer = None
        self.sealed_roles = set()
        self.digests = []

    def digest_index(self, member: int, chunk: int) -> int:
        """Where the digest of a member's data chunk stands in the table."""
        assert self.geometry is not None
        return sum(self.geometry.stripes(self.node).chunk_counts[:member]) + chunk

    def parity_digest_index(self, parity_index: int) -> int:
        """Where the digest of an own parity chunk stands in the table."""
        assert self.geometry is not None
        return sum(self.geometry.stripes(self.node).chunk_counts) + parity_index

    def data_digest(self, member: int, chunk: int) -> int:
        """The digest of a member's data chunk; asking for one that is not known is an error."""
        digest = self.digests[self.digest_index(member, chunk)]
        assert digest is not None
        return digest

    def resting_index(self, kind: str, chunk: int) -> int:
        """Where the digest of a chunk that this node itself holds stands in the table."""
        if kind == "parity":
            return self.parity_digest_index(chunk)
        assert self.geometry is not None
        return self.digest_index(self.geometry.group_of(self.node).index(self.node), chunk)

    def check(self) -> None:
        """Assert the invariants named at the top of this file."""
        holds = self.phase not in {Phase.ABSENT, Phase.ALLOCATING, Phase.EMPTY}
        assert holds == (self.snapshot is not None), (self.phase, self.snapshot)
        exchanging = self.phase in IN_FLIGHT or self.phase is Phase.PROTECTED
        assert exchanging or self.transfer is None, self.phase
        if self.transfer is not None:
            self.transfer.check()
        if self.phase in COMPLETE:
            assert self.geometry is not None
            assert None not in self.digests[: sum(self.geometry.stripes(self.node).chunk_counts)]
