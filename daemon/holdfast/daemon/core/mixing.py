"""From whom a chunk can be had that none holds and too few share: with what absent nodes left, as one sum.

Covers the plan of such a sum: which chunks of which nodes, each with its factor. What is asked for, and what comes of
it, is in `fetch`; the algebra in `holdfast.protocol.estates`.
"""

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Literal

from holdfast.daemon.core.actions import OwnTerm
from holdfast.daemon.core.held_estate import HeldEstate, estate_in
from holdfast.daemon.core.memory import Memory
from holdfast.daemon.core.slot import Slot
from holdfast.daemon.core.terms import own_term
from holdfast.protocol import limits
from holdfast.protocol.estate_messages import MixChunk, MixPart, SumTerm
from holdfast.protocol.estates import Estate, Kind, Rank, Recipe, There, Wanted, mix
from holdfast.protocol.ids import SnapshotId
from holdfast.protocol.layout import Geometry
from holdfast.protocol.messages import JobReport, SumPart
from msgspec import UnsetType


@dataclass(frozen=True, slots=True)
class Goal:
    """A chunk that is wanted, and where it goes."""

    stripe: int
    position: int  # in the code word: 0..k-1 data, k..n-1 parity
    memory: Memory
    kind: Literal["data", "parity"]  # the piece of memory
    chunk: int  # where in it, in chunks
    mix: tuple[Wanted, ...] = ()  # not that chunk of the code word, but this sum of several; of a stripe only the first


@dataclass(frozen=True, slots=True)
class Term:
    """A chunk of another node, and its factor; and what else of that node enters the same sum."""

    node: int
    kind: Kind
    chunk: int
    factor: int
    more: tuple[MixChunk, ...] = ()
    absent: tuple[int, ...] = ()  # whose estate chunks of one are of

    @property
    def chunks(self) -> tuple[MixChunk, ...]:
        """All of them."""
        return (MixChunk(self.kind, self.chunk, self.factor), *self.more)


Orders = dict[tuple[int, tuple[int, ...] | None], list[SumPart | MixPart]]  # (node, whose estate; None: plain parts)


def gathered(term: Term, number: int) -> SumTerm:
    """What the node that adds up gathers from another: a chunk as it lies, or a mix that is multiplied already."""
    is_mixed = term.more or term.kind == "estate"
    return SumTerm(number, term.node, 1 if is_mixed else term.factor)


def part_of(
    term: Term, number: int, target: int, gathers: tuple[SumTerm, ...] | None, *, witness: bool
) -> SumPart | MixPart:
    """The order for one node's part in a sum; `gathers`: it adds up these and its own, None: it only sends its own."""
    if term.more or term.kind == "estate":
        return MixPart(number, term.chunks, target, gathers or (), witness)
    factor = 1 if gathers is None else term.factor  # who adds up multiplies, all at once
    return SumPart(number, term.kind, term.chunk, factor, target, gathers or (), term.factor if witness else 0)


@dataclass(frozen=True, slots=True)
class KnownEstate:
    """An estate of a group, and which nodes hold their part of it."""

    absent: tuple[int, ...]
    estate: Estate
    holders: frozenset[int]


def known_estates(
    reports: Mapping[int, JobReport],
    own: tuple[int, Sequence[HeldEstate]],
    *,
    snapshot: SnapshotId,
    geometry: Geometry,
    group: tuple[int, ...],
) -> list[KnownEstate]:
    """The estates of a snapshot's group, by what its live nodes say; those that more of them hold first.

    Args:
        reports: of the live nodes.
        own: this node, and what it holds itself.
        snapshot: whose estates.
        geometry: its sizes and stripes.
        group: which group of it.
    """
    holders: dict[tuple[int, ...], set[int]] = {}
    for node in group:
        report = reports.get(node)
        if report is None or isinstance(report.estate, UnsetType) or report.estate.snapshot != snapshot:
            continue
        for absent in report.estate.held:
            holders.setdefault(absent, set()).add(node)
    for held in own[1]:
        if held.snapshot == snapshot and own[0] in group:
            holders.setdefault(held.absent, set()).add(own[0])
    found = []
    for absent, nodes in holders.items():
        estate = estate_in(geometry, group, absent)
        if estate is not None and not nodes & set(absent):
            found.append(KnownEstate(absent, estate, frozenset(nodes)))
    return sorted(found, key=lambda known: (-len(known.holders), known.absent))


@dataclass(frozen=True, slots=True)
class Mixer:
    """Plans sums for one group of one snapshot, from what is there now."""

    node: int
    geometry: Geometry
    group: tuple[int, ...]
    estates: Sequence[KnownEstate]
    job: str
    own_slot: Slot | None
    own_estates: Sequence[HeldEstate]
    suspects: AbstractSet[int]

    def sources(self, goal: Goal, live: AbstractSet[int]) -> tuple[tuple[Term, ...], tuple[OwnTerm, ...]] | None:
        """What to ask of which of the live nodes; None if it can't be had of them."""
        stripes = self.geometry.stripes(self.group[0])
        members = {member for member, node in enumerate(self.group) if node in live}
        wanted = goal.mix or (Wanted(goal.stripe, goal.position, 1),)
        for known in (None, *self.estates):
            present = {self.group.index(node) for node in known.holders & live} if known is not None else set()
            estate = known.estate if known is not None else None
            recipe = mix(stripes, wanted, There(members, estate, present, self._rank))
            if recipe:
                return self._terms(goal, recipe, known.absent if known is not None else ())
        return None

    def _rank(self, stripe: int, member: int) -> Rank:
        node = self.group[member]
        turn = stripe // len(self.group)
        return node != self.node, node in self.suspects, (member + turn) % len(self.group)

    def _terms(
        self, goal: Goal, recipe: Recipe, absent: tuple[int, ...]
    ) -> tuple[tuple[Term, ...], tuple[OwnTerm, ...]] | None:
        by_node: dict[int, list[MixChunk]] = {}
        own: list[OwnTerm] = []
        for (member, kind, chunk), factor in sorted(recipe.items()):
            node = self.group[member]
            if node != self.node:
                by_node.setdefault(node, []).append(MixChunk(kind, chunk, factor))
                continue
            term = self._own(kind, chunk, factor, absent)
            if term is None:
                return None
            own.append(term)
        if max([len(own), len(by_node), *map(len, by_node.values())]) > limits.MIX_CHUNKS_MAX:
            return None  # a group of so many nodes; no engine adds up so many chunks in one pass
        terms = [Term(node, c[0].kind, c[0].chunk, c[0].factor, tuple(c[1:]), absent) for node, c in by_node.items()]
        turn = goal.stripe % max(len(terms), 1)
        return (*terms[turn:], *terms[:turn]), tuple(own)

    def _own(self, kind: Kind, chunk: int, factor: int, absent: tuple[int, ...]) -> OwnTerm | None:
        if kind == "estate":
            held = next((estate for estate in self.own_estates if estate.absent == absent), None)
            return held.own_term(chunk, factor) if held is not None else None
        return own_term(self.own_slot, self.job, kind=kind, chunk=chunk, factor=factor) if self.own_slot else None
