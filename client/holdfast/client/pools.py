"""What several ranks have alike, laid end to end and cut into one share per rank: each byte is copied and held once.

Covers where in a pool each tensor lies, which part of it is copied here, and which lines of the others' shares this
rank keeps as witnesses. All ranks of a pool come to the same cut without asking each other, since they lay out the same
tensors in the same order; that they do is compared when they plan (`replicas`).
"""

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from holdfast.client.lanes import Piece
from holdfast.client.manifest import ALIGN_BYTES, Pool, Witness, align, share_of

WITNESSES_MAX = 256  # lines: 16 KiB, packed into a copy that is made anyway
WITNESSES_MIN = 16
LINES_PER_WITNESS = 64  # in small pools: witnesses are a small part of what is staged there, too
_STEP = 0x9E3779B1  # the golden ratio in 32 bits: spreads lines over a tensor as evenly as over small ones


@dataclass(frozen=True, slots=True)
class Pools:
    """The pools of a plan and this rank's witnesses, by pool and place."""

    pools: tuple[Pool, ...] = ()
    witnesses: tuple[Witness, ...] = ()

    def parts_of(self, whole: Piece, number: int) -> tuple[Piece, tuple[Piece, ...]]:
        """What is copied of a tensor that lies in a pool: the part in this rank's share, and its witnesses.

        Args:
            whole: the tensor, whose elements lie in C order; its offset counts from the pool's start.
            number: the pool's.
        """
        pool = self.pools[number]
        start, stop = pool.share
        part = _cut(whole, start, stop, pool.offset)
        first = bisect_left(self.witnesses, (number, whole.offset), key=lambda each: (each.pool, each.start))
        found = []
        for each in self.witnesses[first:]:
            if each.pool != number or each.start >= whole.offset + whole.size_bytes:
                break
            found.append(_cut(whole, each.start, each.start + each.size_bytes, each.offset))
        return part, tuple(found)


NO_POOLS = Pools()


@dataclass(slots=True)
class _Open:
    """A pool that is being filled."""

    kind: int
    roles: tuple[int, ...]
    held: list[tuple[int, int]] = field(default_factory=list)  # place and bytes of each tensor
    size_bytes: int = 0
    offset: int = 0


class Laying:
    """Pools being laid out. Tensors are added kind by kind and set by set, in the order that all ranks share."""

    def __init__(self, role: int) -> None:
        self._role = role
        self._open: list[_Open] = []
        self._witnesses: list[Witness] = []

    def add(self, kind: int, roles: tuple[int, ...], size_bytes: int) -> tuple[int, int]:
        """Lay a tensor behind the others of its kind and roles; returns the pool's number and the place in it."""
        if not self._open or (self._open[-1].kind, self._open[-1].roles) != (kind, roles):
            self._open.append(_Open(kind, roles))
        pool = self._open[-1]
        place = pool.size_bytes
        pool.held.append((place, size_bytes))
        pool.size_bytes += align(size_bytes)
        return len(self._open) - 1, place

    def settle(self, kind: int, offset: int) -> int:
        """Give this rank's shares of one kind their places in the payload, from `offset` on; returns their end."""
        for pool in self._open:
            if pool.kind == kind:
                pool.offset = offset
                start, stop = self._share(pool)
                offset += stop - start
        return offset

    def settle_witnesses(self, offset: int) -> int:
        """Choose witnesses of all pools and give them their places, once everything was added; returns their end."""
        lines = sum(pool.size_bytes for pool in self._open) // ALIGN_BYTES
        count = min(WITNESSES_MAX, max(WITNESSES_MIN, lines // LINES_PER_WITNESS))
        tensors = [(number, *held) for number, pool in enumerate(self._open) for held in pool.held]
        for number, start, size_bytes in _lines(tensors, count):
            low, high = self._share(self._open[number])
            if not low <= start < high:  # what lies here is no witness against others
                self._witnesses.append(Witness(number, start, size_bytes, offset))
                offset += ALIGN_BYTES
        return offset

    def pools(self) -> Pools:
        """What was laid out."""
        pools = tuple(
            Pool(each.roles, each.roles.index(self._role), each.size_bytes, each.offset) for each in self._open
        )
        return Pools(pools, tuple(self._witnesses))

    def _share(self, pool: _Open) -> tuple[int, int]:
        return share_of(pool.size_bytes, len(pool.roles), pool.roles.index(self._role))


def _lines(tensors: Sequence[tuple[int, int, int]], count: int) -> Iterator[tuple[int, int, int]]:
    """About `count` lines, spread over tensors (pool, place, bytes) and in them: pool, start and bytes, ascending."""
    if not tensors:
        return
    chosen = tensors if len(tensors) <= count else [tensors[index * len(tensors) // count] for index in range(count)]
    each = max(1, count // len(chosen))
    for index, (number, place, size_bytes) in enumerate(chosen):
        lines = align(size_bytes) // ALIGN_BYTES
        picked = {((index * each + turn) * _STEP % (1 << 32)) * lines >> 32 for turn in range(each)}
        for line in sorted(picked):
            start = line * ALIGN_BYTES
            yield number, place + start, min(ALIGN_BYTES, size_bytes - start)


def _cut(whole: Piece, start: int, stop: int, offset: int) -> Piece:
    """What of a tensor lies between two places of its pool; `offset` is where the first of them lies in the payload."""
    assert whole.raw is not None
    low, high = max(start, whole.offset), min(stop, whole.offset + whole.size_bytes)
    part = whole.raw[max(low - whole.offset, 0) : max(high - whole.offset, 0)] if low < high else whole.raw[:0]
    return Piece(part, part, offset + max(low - start, 0) if low < high else offset, max(high - low, 0))
