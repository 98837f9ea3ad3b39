"""Which chunks form a stripe, who holds its parity, and where a chunk lies.

Covers the stripe map of one group: a pure function of (n, m, chunks per member). Knows no node index, address or byte.

Stripe s of a group of n members has its m parity chunks on the members (s + j) mod n, j < m; the other k = n - m
members give their next data chunk, in member order. So load and memory are even and nobody is "the parity node".
Members whose images are shorter give nothing to the late stripes: an absent chunk is a chunk of zeros, never sent or
stored.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, lru_cache


@cache
def _residues(member_count: int, parity_count: int) -> tuple[tuple[tuple[int, ...], ...], ...]:
    """For each member: the residues (stripe mod n) where it gives data, and those where it holds parity."""
    data: list[tuple[int, ...]] = []
    parity: list[tuple[int, ...]] = []
    for member in range(member_count):
        is_data = [(member - t) % member_count >= parity_count for t in range(member_count)]
        data.append(tuple(t for t in range(member_count) if is_data[t]))
        parity.append(tuple(t for t in range(member_count) if not is_data[t]))
    return tuple(data), tuple(parity)


@dataclass(frozen=True, slots=True)
class StripeMap:
    """The stripes of one group for one layout.

    Attributes:
        parity_count: m, chunks of parity per stripe; at least 0 and less than the number of members.
        chunk_counts: data chunks of each member's image, in member order; its length is n.
    """

    parity_count: int
    chunk_counts: tuple[int, ...]

    def __post_init__(self) -> None:
        if not 0 <= self.parity_count < len(self.chunk_counts):
            raise ValueError(
                f"parity {self.parity_count} needs at least {self.parity_count + 1} members in a group, "
                f"found {len(self.chunk_counts)}"
            )
        assert all(count >= 0 for count in self.chunk_counts)

    @property
    def member_count(self) -> int:
        """N: members of the group."""
        return len(self.chunk_counts)

    @property
    def data_count(self) -> int:
        """K: data chunks per stripe."""
        return len(self.chunk_counts) - self.parity_count

    @property
    def stripe_count(self) -> int:
        """Stripes until every member's last chunk has found its place."""
        return max((self.stripe_of(p, c - 1) + 1 for p, c in enumerate(self.chunk_counts) if c), default=0)

    def stripe_of(self, member: int, chunk: int) -> int:
        """The stripe to which data chunk `chunk` of `member` belongs."""
        data, _ = _residues(self.member_count, self.parity_count)
        cycle, place = divmod(chunk, self.data_count)
        return cycle * self.member_count + data[member][place]

    def chunk_at(self, stripe: int, member: int) -> int | None:
        """The data chunk that `member` gives to `stripe`; None if it holds parity there or has no chunk left."""
        cycle, residue = divmod(stripe, self.member_count)
        if (member - residue) % self.member_count < self.parity_count:
            return None
        data, _ = _residues(self.member_count, self.parity_count)
        chunk = cycle * self.data_count + data[member].index(residue)
        return chunk if chunk < self.chunk_counts[member] else None

    def data_members(self, stripe: int) -> tuple[int, ...]:
        """The k members that give data to `stripe`, in code-word order (position 0..k-1), absent chunks included."""
        residue = stripe % self.member_count
        return tuple(p for p in range(self.member_count) if (p - residue) % self.member_count >= self.parity_count)

    def parity_members(self, stripe: int) -> tuple[int, ...]:
        """The m members that hold parity of `stripe`, in row order j = 0..m-1."""
        return tuple((stripe + j) % self.member_count for j in range(self.parity_count))

    def contributions(self, stripe: int) -> tuple[tuple[int, int, int], ...]:
        """(position, member, chunk) of every data chunk that really exists in `stripe`."""
        found = []
        for position, member in enumerate(self.data_members(stripe)):
            chunk = self.chunk_at(stripe, member)
            if chunk is not None:
                found.append((position, member, chunk))
        return tuple(found)

    def parity_stripes(self, member: int) -> Iterator[int]:
        """The stripes whose parity `member` holds, in order; stripes without any real chunk are left out."""
        return iter(_parity_places(self, member))

    def parity_index(self, stripe: int, member: int) -> int:
        """Where `member` keeps its parity chunk of `stripe`, counted in chunks from the start of its parity."""
        return _parity_places(self, member)[stripe]

    def parity_stripe(self, parity_index: int, member: int) -> int:
        """The stripe of the parity chunk that `member` keeps at `parity_index`."""
        return _parity_stripes(self, member)[parity_index]

    def parity_chunk_count(self, member: int) -> int:
        """Chunks of parity for which `member` needs room."""
        return len(_parity_places(self, member))


@lru_cache(maxsize=64)
def _parity_places(stripes: StripeMap, member: int) -> dict[int, int]:
    """The stripes whose parity a member holds, in order, and where; stripes without any real chunk take no room.

    Computed once per layout: a hundred thousand stripes take a while, and every snapshot asks.
    """
    _, parity = _residues(stripes.member_count, stripes.parity_count)
    count = stripes.stripe_count
    candidates = (
        cycle * stripes.member_count + residue
        for cycle in range(-(-count // stripes.member_count))
        for residue in parity[member]
    )
    real = (stripe for stripe in candidates if stripe < count and stripes.contributions(stripe))
    return {stripe: index for index, stripe in enumerate(real)}


@lru_cache(maxsize=64)
def _parity_stripes(stripes: StripeMap, member: int) -> tuple[int, ...]:
    """The stripes whose parity a member holds, by the index at which it keeps them."""
    return tuple(_parity_places(stripes, member))
