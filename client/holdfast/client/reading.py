"""Copying parts of staged tensors into live ones, by byte ranges of the shards that hold them.

A model has thousands of small tensors, and each read is a question to a daemon: what lies close together is read at
once. Large parts go straight into the live tensor's memory where that is possible.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from itertools import pairwise
from typing import NamedTuple

import torch
from holdfast.client.catalogue import Catalogue, ShardBytes
from holdfast.client.manifest import ALIGN_BYTES, ITEM_BYTES, TensorEntry
from holdfast.client.pieces import GAP_BYTES_MIN, SPAN_BYTES_MAX, Numbers, Piece, Read, Span, reads
from holdfast.client.tensor_bytes import raw_bytes


class Wish(NamedTuple):
    """One contiguous read of one role's shard, and the live tensor that it fills.

    Attributes:
        part: a local tensor of shape ``read.lengths``, any device, dtype and strides; overwritten in place.
        dtype: of the bytes. Another dtype of ``part`` is converted.
        spans: where the bytes lie, if not all in that role's shard.
    """

    role: int
    offset_bytes: int
    read: Read
    part: torch.Tensor
    dtype: str
    spans: tuple[Span, ...] = ()

    @property
    def end_bytes(self) -> int:
        """Where the read ends in the shard."""
        return self.offset_bytes + self.read.length_bytes


def wishes(piece: Piece, target: torch.Tensor, *, dtype: str, start: Numbers, role: int) -> Iterator[Wish]:
    """What has to be read to fill ``target`` with the box of its shape that begins at ``start`` of the piece.

    Args:
        piece: what is held, and by whom.
        target: a local tensor.
        dtype: of the piece.
        start: in elements of the piece.
        role: who reads: replicas are read from the nearest one.
    """
    for read in reads(piece.shape, start, tuple(target.shape), item_bytes=ITEM_BYTES[dtype]):
        part = target.detach()
        for dim, (at, length) in enumerate(zip(read.start, read.lengths, strict=True)):
            part = part.narrow(dim, at, length)
        for one, into in _bounded(read, part, dtype):
            first, *others = piece.spans(role, one.offset_bytes, one.length_bytes)
            yield Wish(first.role, first.offset_bytes, one, into, dtype, (first, *others) if others else ())


def fulfil(source: ShardBytes, wanted: Iterable[Wish]) -> None:
    """Read everything that is wished.

    Raises:
        HoldfastError: bytes can't be had. Some live tensors may be overwritten then.
    """
    wanted = list(wanted)
    for wish in (wish for wish in wanted if wish.spans):
        _read_spans(source, wish)
    whole = [wish for wish in wanted if not wish.spans]
    for group in _groups(sorted(whole, key=lambda wish: (wish.role, wish.offset_bytes))):
        straight = _direct(group[0].read, group[0].part, group[0].dtype) if len(group) == 1 else None
        if straight is not None:
            source.read_into(group[0].role, group[0].offset_bytes, straight)
        else:
            _read_group(source, group)
    for wish in wanted:
        if not wish.part.is_inference():
            torch.autograd.graph.increment_version(wish.part)  # its memory may have been written behind its back


def _groups(wanted: list[Wish]) -> Iterator[list[Wish]]:
    """Wishes that are read at once; in the order of roles and bytes."""
    group = wanted[:1]
    for before, wish in pairwise(wanted):
        near = wish.role == before.role and wish.offset_bytes - before.end_bytes < GAP_BYTES_MIN
        if near and wish.end_bytes - group[0].offset_bytes <= SPAN_BYTES_MAX:
            group.append(wish)
        else:
            yield group
            group = [wish]
    if group:
        yield group


def _read_group(source: ShardBytes, group: list[Wish]) -> None:
    # From a boundary on, so that every part of the buffer is aligned as its dtype wants it.
    start = group[0].offset_bytes // ALIGN_BYTES * ALIGN_BYTES
    buffer = bytearray(max(wish.end_bytes for wish in group) - start)
    source.read_into(group[0].role, start, memoryview(buffer))
    staged = torch.frombuffer(buffer, dtype=torch.uint8)
    for wish in group:
        raw = staged[wish.offset_bytes - start : wish.end_bytes - start].view(getattr(torch, wish.dtype))
        wish.part.copy_(raw.as_strided(wish.read.lengths, wish.read.strides, raw.storage_offset()))


def _read_spans(source: ShardBytes, wish: Wish) -> None:
    """Fulfil a wish whose bytes several roles hold together."""
    read = wish.read
    straight = _direct(read, wish.part, wish.dtype)
    buffer = memoryview(bytearray(read.length_bytes)) if straight is None else straight.cast("B")
    for span in wish.spans:
        source.read_into(
            span.role, span.offset_bytes, buffer[span.start - read.offset_bytes :][: span.stop - span.start]
        )
    if straight is None:
        raw = torch.frombuffer(buffer, dtype=getattr(torch, wish.dtype))
        wish.part.copy_(raw.as_strided(read.lengths, read.strides))


def read_box(  # a box of a piece, whose it is, and where it goes
    source: ShardBytes, piece: Piece, target: torch.Tensor, *, dtype: str, start: Numbers, role: int
) -> None:
    """Fill ``target`` with the box of its shape that begins at ``start`` of the piece: `wishes`, fulfilled at once."""
    fulfil(source, wishes(piece, target, dtype=dtype, start=start, role=role))


def read_entry(source: ShardBytes, role: int, payload_offset: int, entry: TensorEntry) -> torch.Tensor:
    """A rank's own part of a tensor as a new tensor on the CPU; it must hold the part alone."""
    assert entry.pool is None
    tensor = torch.empty(entry.shape, dtype=getattr(torch, entry.dtype))
    piece = Piece((0,) * tensor.dim(), entry.shape, (role,), (payload_offset + entry.offset,))
    read_box(source, piece, tensor, dtype=entry.dtype, start=(0,) * tensor.dim(), role=role)
    return tensor


def whole_object(source: ShardBytes, found: Catalogue, value: object) -> object:
    """``value`` with the bytes of the tensors inside it, which a catalogue leaves out."""
    if isinstance(value, torch.Tensor):
        if id(value) not in found.inner:
            return value
        role, entry = found.inner[id(value)]
        return read_entry(source, role, found.heads[role].header.payload_offset, entry)
    if isinstance(value, Mapping):
        return type(value)({key: whole_object(source, found, part) for key, part in value.items()})  # type: ignore[call-arg]  # a kind of dict
    if type(value) in (list, tuple):
        return type(value)(whole_object(source, found, part) for part in value)  # type: ignore[call-arg,attr-defined]  # just looked up
    return value


def _bounded(read: Read, part: torch.Tensor, dtype: str) -> list[tuple[Read, torch.Tensor]]:
    """A solid read that can't go straight into memory, in parts that fit a buffer."""
    solid_bytes = read.length_bytes
    if _direct(read, part, dtype) is not None or not read.is_solid() or solid_bytes <= SPAN_BYTES_MAX:
        return [(read, part)]
    dim = next(dim for dim, length in enumerate(read.lengths) if length > 1)
    slice_bytes = math.prod(read.lengths[dim + 1 :]) * ITEM_BYTES[dtype]
    step = max(1, SPAN_BYTES_MAX // slice_bytes)
    parts: list[tuple[Read, torch.Tensor]] = []
    for index in range(0, read.lengths[dim], step):
        count = min(step, read.lengths[dim] - index)
        lengths = (*read.lengths[:dim], count, *read.lengths[dim + 1 :])
        smaller = Read(read.offset_bytes + index * slice_bytes, count * slice_bytes, read.start, lengths, read.strides)
        parts += _bounded(smaller, part.narrow(dim, index, count), dtype)
    return parts


def _direct(read: Read, part: torch.Tensor, dtype: str) -> "memoryview | None":
    """The live tensor's own memory where the bytes can be read straight into it."""
    if not read.is_solid() or part.dtype is not getattr(torch, dtype):
        return None
    raw = raw_bytes(part)
    return None if raw is None else raw.data
