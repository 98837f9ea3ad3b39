"""Tries to get chunks that are under way, by number: who hears what of them.

Covers one try, and the table of all on this node. What a try is made of, and what comes of it, is in `fetch`.
"""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from holdfast.daemon.core.actions import DropFrames, OwnTerm
from holdfast.daemon.core.context import Context
from holdfast.daemon.core.mixing import Goal, Term
from holdfast.daemon.core.terms import key_of_sum
from holdfast.protocol import messages

if TYPE_CHECKING:
    from holdfast.daemon.core.fetch import Fetch


@dataclass(slots=True)
class Pursuit:
    """One try to get one chunk."""

    numbers: tuple[int, ...]  # of the sum, then of what the last term's node gathers from the others, in their order
    goal: Goal
    terms: tuple[Term, ...]  # the last one's node gathers the others' chunks and sends the sum
    own: tuple[OwnTerm, ...]
    digest: int | None  # that it must have; None for parity
    deadline_ns: int
    storing: bool = False
    fingerprint: bytes | None = None  # of the stored result, for parity
    found_digest: int = 0
    witnesses: dict[int, bytes] = field(default_factory=dict)  # node -> fingerprint of its term

    @property
    def number(self) -> int:
        """Of the sum."""
        return self.numbers[0]


@dataclass(slots=True)
class Pursuits:
    """All tries under way on this node, by the numbers of the sum and of what is gathered for it."""

    ctx: Context
    table: dict[int, Pursuit] = field(default_factory=dict)
    owners: dict[int, "Fetch"] = field(default_factory=dict)

    def watch(self, pursuit: Pursuit, owner: "Fetch") -> None:
        """A try begins."""
        for number in pursuit.numbers:
            self.table[number], self.owners[number] = pursuit, owner

    def forget(self, pursuit: Pursuit) -> None:
        """A try ended."""
        for number in pursuit.numbers:
            self.table.pop(number, None)
            self.owners.pop(number, None)

    def arrived(self, header: messages.ChunkHeader, digest: int) -> None:
        """A sum that this node wanted is here."""
        pursuit = self.table.get(header.chunk)
        if pursuit is None or pursuit.number != header.chunk:
            self.ctx.emit(DropFrames((key_of_sum(header),)))
        else:
            self.owners[header.chunk].arrived(pursuit, header, digest)

    def stored(self, number: int, digest: int, fingerprint: bytes) -> None:
        """A sum is in its place."""
        if (pursuit := self.table.get(number)) is not None:
            self.owners[number].stored(pursuit, digest, fingerprint)

    def not_stored(self, number: int, reason: str) -> None:
        """A sum could not be put in its place."""
        if (pursuit := self.table.get(number)) is not None:
            self.owners[number].not_stored(pursuit, reason)

    def part_failed(self, node: int, said: messages.SumFailed) -> None:
        """Another node can't do its part."""
        if (pursuit := self.table.get(said.number)) is not None:
            self.owners[said.number].part_failed(pursuit, node, said)

    def witnessed(self, node: int, said: messages.SumWitness) -> None:
        """Another node vouches for its part."""
        if (pursuit := self.table.get(said.number)) is not None:
            self.owners[said.number].witnessed(pursuit, node, said.fingerprint)

    def check(self) -> None:
        """Assert: every number leads to a try that its owner knows, and nothing is under way for who has ended."""
        assert self.table.keys() == self.owners.keys()
        for number, pursuit in self.table.items():
            owner = self.owners[number]
            assert number in pursuit.numbers, number
            assert owner.open.get(pursuit.number) is pursuit, number
            assert not owner.ended, number
