"""Which bytes of which shard make a part of a tensor that many ranks staged together. Pure arithmetic.

A *piece* is what one rank holds of a global tensor: a box, stored in C order. A *box* is what somebody wants of it.
Its bytes are seldom contiguous; `reads` covers them with few reads, each bounded, leaving out what lies between only
where that is large enough to be worth another read.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

GAP_BYTES_MIN = 256 << 10  # what a read costs beside its bytes, in bytes: a smaller gap is read and thrown away
SPAN_BYTES_MAX = 16 << 20  # memory for one read of bytes that are not contiguous

assert GAP_BYTES_MIN < SPAN_BYTES_MAX

Numbers = tuple[int, ...]


class Span(NamedTuple):
    """A run of a piece's bytes and where it lies."""

    start: int  # from the piece's first byte
    stop: int
    role: int
    offset_bytes: int  # in the role's shard


class Cut(NamedTuple):
    """A piece that several roles hold together, each a part of its bytes."""

    roles: Numbers  # who has the piece in its live state; some may hold nothing of it
    spans: tuple[Span, ...]  # ascending, one behind the other once all heads were read

    def missing_bytes(self, size_bytes: int) -> int:
        """How many of the piece's bytes nobody holds, or two do."""
        ends = [0, *(span.stop for span in self.spans)]
        gaps = sum(abs(span.start - end) for span, end in zip(self.spans, ends, strict=False))
        return gaps + abs(size_bytes - ends[-1])


class Piece(NamedTuple):
    """One rank's part of a global tensor; ``offset`` and ``shape`` are in elements of the global tensor."""

    offset: Numbers
    shape: Numbers
    roles: Numbers  # who holds this very part, in ascending order; replicas are equal
    start_bytes: Numbers  # for each of them: where the part begins in its shard
    cuts: tuple[Cut, ...] = ()  # who holds it together

    def element_count(self) -> int:
        """Elements of the piece."""
        return math.prod(self.shape)

    def nearest(self, role: int) -> tuple[int, int]:
        """(role, first byte in its shard) of the holder that `role` should read from: itself, else spread evenly."""
        index = self.roles.index(role) if role in self.roles else role % len(self.roles)
        return self.roles[index], self.start_bytes[index]

    def spans(self, role: int, start: int, length_bytes: int) -> list[Span]:
        """Where a run of the piece's bytes lies, for a reader of this role: its own cut goes first."""
        own = next((cut for cut in self.cuts if role in cut.roles), None)
        if self.roles and (own is None or role in self.roles):
            holder, first_byte = self.nearest(role)
            return [Span(start, start + length_bytes, holder, first_byte + start)]
        cut = own or self.cuts[role % len(self.cuts)]
        found = []
        for span in cut.spans:
            low, high = max(start, span.start), min(start + length_bytes, span.stop)
            if low < high:
                found.append(Span(low, high, span.role, span.offset_bytes + low - span.start))
        return found

    def with_span(self, roles: Numbers, span: Span | None) -> "Piece":
        """This piece, of which one more role of a cut has told what it holds; None: nothing."""
        known = next((cut for cut in self.cuts if cut.roles == roles), None)
        if known is None:
            return self._replace(cuts=(*self.cuts, Cut(roles, () if span is None else (span,))))
        if span is None:
            return self
        others = tuple(cut for cut in self.cuts if cut.roles != roles)
        return self._replace(cuts=(*others, Cut(roles, tuple(sorted((*known.spans, span))))))


class Read(NamedTuple):
    """One contiguous read of a piece, and the part of the wanted box that lies in it.

    Attributes:
        offset_bytes: from the piece's first byte.
        length_bytes: of the read.
        start: where the part begins in the box, in elements.
        lengths: the part's shape, in elements.
        strides: of the part within the bytes read, in elements.
    """

    offset_bytes: int
    length_bytes: int
    start: Numbers
    lengths: Numbers
    strides: Numbers

    def is_solid(self) -> bool:
        """Whether the part is all that is read, in C order."""
        return self.strides == _c_strides(self.lengths) or math.prod(self.lengths) <= 1


def reads(shape: Numbers, start: Numbers, lengths: Numbers, *, item_bytes: int) -> Iterator[Read]:
    """Cover a box of a piece with reads.

    Args:
        shape: the piece's shape.
        start: where the box begins in the piece.
        lengths: the box's shape; the box lies within the piece.
        item_bytes: bytes of one element.

    Yields:
        Reads whose parts make up the box, each element once. A read that is not solid is at most SPAN_BYTES_MAX long.
    """
    assert len(shape) == len(start) == len(lengths)
    assert all(s >= 0 and s + n <= size for s, n, size in zip(start, lengths, shape, strict=True))
    if math.prod(lengths) == 0:
        return
    strides = _c_strides(shape)
    first = sum(s * step for s, step in zip(start, strides, strict=True))
    yield from _cover(first, (0,) * len(shape), lengths, strides, item_bytes)


def _cover(first: int, at: Numbers, lengths: Numbers, strides: Numbers, item_bytes: int) -> Iterator[Read]:
    span = _span(lengths, strides)
    if span == math.prod(lengths):
        # Lengths of 1 leave their stride open; the tight one says that nothing lies between.
        yield Read(first * item_bytes, span * item_bytes, at, lengths, _c_strides(lengths))
        return
    dim = next(dim for dim, length in enumerate(lengths) if length > 1)
    slice_span = _span((1, *lengths[dim + 1 :]), (0, *strides[dim + 1 :]))
    gap_bytes = (strides[dim] - slice_span) * item_bytes
    if gap_bytes >= GAP_BYTES_MIN:
        step = 1
    elif span * item_bytes > SPAN_BYTES_MAX:
        step = max(1, SPAN_BYTES_MAX // (strides[dim] * item_bytes))
    else:
        yield Read(first * item_bytes, span * item_bytes, at, lengths, strides)
        return
    for index in range(0, lengths[dim], step):
        count = min(step, lengths[dim] - index)
        yield from _cover(
            first + index * strides[dim],
            (*at[:dim], at[dim] + index, *at[dim + 1 :]),
            (*lengths[:dim], count, *lengths[dim + 1 :]),
            strides,
            item_bytes,
        )


def _span(lengths: Numbers, strides: Numbers) -> int:
    """Elements from the first to the last of a box, both included."""
    return 1 + sum((length - 1) * stride for length, stride in zip(lengths, strides, strict=True))


def _c_strides(shape: Numbers) -> Numbers:
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))
