"""What absent members of a group left, in a smaller code over the members that are there: the map and the algebra.

Covers which chunks an estate has, which member keeps which, and as what sum of which chunks any chunk can be had. Pure:
a function of the group's stripe map and the absent members. Knows no node index, address or byte.

Let A be the absent members of a group of n = k + m, and the heirs the h = n - |A| others. The chunks that A held, data
and parity, one after the other, are dealt to the heirs in turn, and protected by a systematic Reed-Solomon code with
min(m, h - 1) parity chunks over the heirs: a stripe map of its own, `inner`. What the heirs hold for the group stays as
it is. While enough heirs are there, every chunk of A can be had from the estate, so the group's own stripes lack only
what was lost besides.
"""

from collections.abc import Callable, Iterable, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Literal, NamedTuple

from holdfast.coding import CodeParams, decode_matrix, parity_matrix
from holdfast.coding.field import multiples_of
from holdfast.protocol.stripes import StripeMap

Kind = Literal["data", "parity", "estate"]  # the last: a chunk of an estate, counted from the start of a heir's part


class Source(NamedTuple):
    """A chunk that a member holds."""

    member: int
    kind: Kind
    chunk: int


class Wanted(NamedTuple):
    """A chunk of the group's code word, and its factor in a sum."""

    stripe: int
    position: int  # 0..k-1 data, k..n-1 parity
    factor: int


Recipe = dict[Source, int]  # a sum: factor in GF(2^8) by chunk, none of them 0


@dataclass(frozen=True)
class Estate:
    """The estate of some members of one group.

    Attributes:
        stripes: the stripe map of the group.
        absent: the members whose chunks it holds, in order.
    """

    stripes: StripeMap
    absent: tuple[int, ...]

    @cached_property
    def heirs(self) -> tuple[int, ...]:
        """The members that hold it, in order; the index here is their member number in `inner`."""
        return tuple(member for member in range(self.stripes.member_count) if member not in self.absent)

    @property
    def parity_count(self) -> int:
        """Heirs that can be lost before a chunk of it is."""
        return max(min(self.stripes.parity_count, len(self.heirs) - 1), 0)

    @cached_property
    def left_count(self) -> int:
        """Chunks that the absent members held."""
        return sum(data + parity for _, data, parity in self._counts)

    @cached_property
    def _counts(self) -> tuple[tuple[int, int, int], ...]:
        """(member, data chunks, parity chunks) of each absent member."""
        return tuple((m, self.stripes.chunk_counts[m], self.stripes.parity_chunk_count(m)) for m in self.absent)

    @cached_property
    def inner(self) -> StripeMap:
        """The stripes of the estate: its members are the heirs."""
        count = len(self.heirs)
        dealt = (max(self.left_count - heir, 0) for heir in range(count))
        return StripeMap(self.parity_count, tuple(-(-left // count) for left in dealt))

    def chunk_count(self, member: int) -> int:
        """Chunks that a heir keeps: first those that were dealt to it, then its parity."""
        heir = self.heirs.index(member)
        return self.inner.chunk_counts[heir] + self.inner.parity_chunk_count(heir)

    def wanted(self, index: int) -> tuple[int, int]:
        """Stripe and position, in the group's code, of the chunk with this number among those that were left."""
        for member, data_count, parity_count in self._counts:
            if index < data_count:
                stripe = self.stripes.stripe_of(member, index)
                return stripe, self.stripes.data_members(stripe).index(member)
            index -= data_count
            if index < parity_count:
                stripe = self.stripes.parity_stripe(index, member)
                return stripe, self.stripes.data_count + self.stripes.parity_members(stripe).index(member)
            index -= parity_count
        raise IndexError(f"an estate of {self.left_count} chunks has no such chunk")

    def index_of(self, stripe: int, member: int) -> int:
        """The number, among those that were left, of the chunk that an absent member held of a stripe of the group."""
        first = 0
        for other, data_count, parity_count in self._counts:
            if other == member:
                chunk = self.stripes.chunk_at(stripe, member)
                return first + (data_count + self.stripes.parity_index(stripe, member) if chunk is None else chunk)
            first += data_count + parity_count
        raise ValueError(f"member {member} left nothing to this estate of {self.absent}")

    def recipe(self, member: int, chunk: int) -> tuple[Wanted, ...]:
        """A chunk of a heir's part, as a sum of chunks of the group's code words."""
        heir, count = self.heirs.index(member), len(self.heirs)
        if chunk < self.inner.chunk_counts[heir]:
            return (Wanted(*self.wanted(chunk * count + heir), 1),)
        stripe = self.inner.parity_stripe(chunk - self.inner.chunk_counts[heir], heir)
        row = _parity_row(self.inner.data_count, self.parity_count, self.inner.parity_members(stripe).index(heir))
        return tuple(
            Wanted(*self.wanted(dealt * count + other), row[position])
            for position, other, dealt in self.inner.contributions(stripe)
        )

    def find(self, stripe: int, member: int, present: AbstractSet[int]) -> Recipe | None:
        """A chunk that an absent member held, as a sum of chunks of the estate at `present` heirs; None if it can't."""
        dealt, heir = divmod(self.index_of(stripe, member), len(self.heirs))
        if self.heirs[heir] in present:
            return {Source(self.heirs[heir], "estate", dealt): 1}
        inner = self.inner
        row = inner.stripe_of(heir, dealt)
        data = inner.data_members(row)
        members = (*data, *inner.parity_members(row))
        real = {position for position, _, _ in inner.contributions(row)}
        zeros = [position for position in range(len(data)) if position not in real]
        able = [p for p, other in enumerate(members) if p not in zeros and self.heirs[other] in present]
        if len(able) < len(real):
            return None
        factors = _factors(inner, able[: len(real)], zeros, data.index(heir))
        found: Recipe = {}
        for position, factor in factors.items():
            other = members[position]
            place = inner.chunk_at(row, other) if position < len(data) else None
            if place is None:
                place = inner.chunk_counts[other] + inner.parity_index(row, other)
            found[Source(self.heirs[other], "estate", place)] = factor
        return found


@lru_cache(maxsize=64)
def estate_of(stripes: StripeMap, absent: tuple[int, ...]) -> Estate:
    """The estate of `absent`; the same object each time, since it keeps what it has computed."""
    assert absent == tuple(sorted(set(absent)))
    return Estate(stripes, absent)


@lru_cache(maxsize=256)
def _parity_row(data_count: int, parity_count: int, row: int) -> tuple[int, ...]:
    return tuple(int(factor) for factor in parity_matrix(CodeParams(data_count, parity_count))[row])


def _factors(stripes: StripeMap, chosen: Iterable[int], zeros: Iterable[int], position: int) -> dict[int, int]:
    """With which factors the chosen chunks of a code word make the one at `position`."""
    chosen = set(chosen)
    available = sorted(chosen | set(zeros))
    params = CodeParams(stripes.data_count, stripes.parity_count)
    row = decode_matrix(params, available=available, wanted=[position])[0].tolist()
    return {place: factor for place, factor in zip(available, row, strict=True) if place in chosen and factor}


Rank = tuple[bool, bool, int]


def _in_order(stripe: int, member: int) -> Rank:
    del stripe
    return False, False, member


@dataclass(frozen=True, slots=True)
class There:
    """What of a group is there.

    Attributes:
        live: members that hold what is theirs.
        estate: of members that are not there, or None.
        present: heirs that hold their part of it.
        rank: orders the members of a stripe, those that are asked first at the front.
    """

    live: AbstractSet[int]
    estate: Estate | None = None
    present: AbstractSet[int] = frozenset()
    rank: Callable[[int, int], Rank] = _in_order


def mix(stripes: StripeMap, wanted: Sequence[Wanted], there: There) -> Recipe | None:
    """How a sum of chunks of the group's code words can be had of what is there; None if it can't."""
    total: Recipe = {}
    for stripe, position, factor in wanted:
        found = _find(stripes, stripe, position, there)
        if found is None:
            return None
        _add(total, found, factor)
    return total


def _add(total: Recipe, found: Recipe, factor: int) -> None:
    for source, other in found.items():
        total[source] = total.get(source, 0) ^ multiples_of(factor)[other]
        if total[source] == 0:
            del total[source]


def _find(stripes: StripeMap, stripe: int, position: int, there: There) -> Recipe | None:
    data = stripes.data_members(stripe)
    members = (*data, *stripes.parity_members(stripe))
    real = {place for place, _, _ in stripes.contributions(stripe)}
    zeros = [place for place in range(len(data)) if place not in real]

    def held(place: int) -> Recipe:
        chunk = stripes.chunk_at(stripe, members[place]) if place < len(data) else None
        kind: Kind = "data" if chunk is not None else "parity"
        return {
            Source(members[place], kind, stripes.parity_index(stripe, members[place]) if chunk is None else chunk): 1
        }

    able = [place for place, member in enumerate(members) if place not in zeros and member in there.live]
    if position in able:
        return held(position)
    able.sort(key=lambda place: there.rank(stripe, members[place]))
    needed = len(real)
    recipes = {place: held(place) for place in able[:needed]}
    if len(recipes) < needed and there.estate is not None:
        for place, member in enumerate(members):
            if len(recipes) == needed or place in zeros or member in there.live or member not in there.estate.absent:
                continue
            if (found := there.estate.find(stripe, member, there.present)) is not None:
                if place == position:
                    return found
                recipes[place] = found
    if len(recipes) < needed:
        return None
    total: Recipe = {}
    for place, factor in _factors(stripes, recipes, zeros, position).items():
        _add(total, recipes[place], factor)
    return total


def further_losses(
    stripes: StripeMap, lost: AbstractSet[int], estates: Iterable[tuple[Estate, AbstractSet[int]]]
) -> int:
    """How many more members can be lost, whichever they are; below 0: too many are lost already.

    Args:
        stripes: the stripe map of the group.
        lost: members that lack what they should hold.
        estates: each with the heirs that hold their part of it.
    """
    best = stripes.parity_count - len(lost)
    for estate, present in estates:
        lacking = len(set(estate.heirs) - present)
        best = max(best, min(estate.parity_count - lacking, stripes.parity_count - len(set(lost) - set(estate.absent))))
    return best
