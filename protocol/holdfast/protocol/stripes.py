"""Which chunks form a stripe, who holds its parity, and where a chunk lies.

Covers the stripe map of one group: a pure function of (n, m, chunks per member). Knows no node index, address or byte.

Stripe s of a group of n members has its m parity chunks on the members (s + j) mod n, j < m; the other k = n - m
members give their next data chunk, in member order. So load and memory are even and nobody is "the parity node".
Members whose images are shorter give nothing to the late stripes: an absent chunk is a chunk of zeros, never sent or
stored.
"""

from bisect import bisect_right
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
        held = _parity_cycles(self, member)
        for cycle in range(max((count for _, count in held), default=0)):
            for residue, count in held:
                if cycle < count:
                    yield cycle * self.member_count + residue

    def parity_index(self, stripe: int, member: int) -> int:
        """Where `member` keeps its parity chunk of `stripe`, counted in chunks from the start of its parity."""
        cycle, place = divmod(stripe, self.member_count)
        held = _parity_cycles(self, member)
        if not any(residue == place and cycle < count for residue, count in held):
            raise KeyError(f"member {member} holds no parity of stripe {stripe}")
        return sum(min(count, cycle + (residue < place)) for residue, count in held)

    def parity_stripe(self, parity_index: int, member: int) -> int:
        """The stripe of the parity chunk that `member` keeps at `parity_index`."""
        held = _parity_cycles(self, member)
        if not 0 <= parity_index < self.parity_chunk_count(member):
            raise IndexError(
                f"member {member} holds {self.parity_chunk_count(member)} parity chunks, not {parity_index}"
            )

        def before(cycle: int) -> int:
            return sum(min(count, cycle) for _, count in held)

        cycle = bisect_right(range(max(count for _, count in held) + 1), parity_index, key=before) - 1
        real = [residue for residue, count in held if cycle < count]
        return cycle * self.member_count + real[parity_index - before(cycle)]

    def parity_chunk_count(self, member: int) -> int:
        """Chunks of parity for which `member` needs room."""
        return sum(count for _, count in _parity_cycles(self, member))


@lru_cache(maxsize=256)
def _parity_cycles(stripes: StripeMap, member: int) -> tuple[tuple[int, int], ...]:
    """The residues (stripe mod n) where a member holds parity, each with the number of its stripes that have data.

    A member that gives its `place`-th chunk of every cycle to a residue has a chunk there in the first
    ceil((chunks - place) / k) cycles, so the stripes with data are the first ones of each residue: what follows is
    arithmetic, however many stripes there are.
    """
    data, parity = _residues(stripes.member_count, stripes.parity_count)
    k = stripes.data_count

    def cycles(residue: int) -> int:
        givers = [(count, places.index(residue)) for count, places in zip(stripes.chunk_counts, data, strict=True)
                  if residue in places]  # fmt: skip
        return max(-(-max(count - place, 0) // k) for count, place in givers)

    return tuple((residue, cycles(residue)) for residue in parity[member])
