"""Copying a part of a staged tensor into a live one, by byte ranges of the shards that hold it."""

import math
from collections.abc import Mapping

import torch
from holdfast.client.catalogue import Catalogue, ShardBytes
from holdfast.client.manifest import ITEM_BYTES, TensorEntry
from holdfast.client.pieces import SPAN_BYTES_MAX, Numbers, Piece, Read, reads
from holdfast.client.tensor_bytes import raw_bytes


def read_box(  # a box of a piece, whose it is, and where it goes
    source: ShardBytes, piece: Piece, target: torch.Tensor, *, dtype: str, start: Numbers, role: int
) -> None:
    """Fill ``target`` with the box of its shape that begins at ``start`` of the piece.

    Args:
        source: where bytes come from.
        piece: what is held, and by whom.
        target: a local tensor, any device, dtype and strides; overwritten in place. Another dtype is converted.
        dtype: of the piece.
        start: in elements of the piece.
        role: who reads: replicas are read from the nearest one.

    Raises:
        HoldfastError: bytes can't be had. A part of ``target`` may be overwritten then.
    """
    holder, first_byte = piece.nearest(role)
    for read in reads(piece.shape, start, tuple(target.shape), item_bytes=ITEM_BYTES[dtype]):
        part = target.detach()
        for dim, (at, length) in enumerate(zip(read.start, read.lengths, strict=True)):
            part = part.narrow(dim, at, length)
        for one, into in _bounded(read, part, dtype):
            _read(source, holder, first_byte, one, into, dtype)
    if target.numel() and not target.is_inference():
        torch.autograd.graph.increment_version(target)  # bytes may have been written behind autograd's back


def read_entry(source: ShardBytes, role: int, payload_offset: int, entry: TensorEntry) -> torch.Tensor:
    """A rank's own part of a tensor as a new tensor on the CPU."""
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


def _read(source: ShardBytes, role: int, first_byte: int, read: Read, part: torch.Tensor, dtype: str) -> None:
    straight = _direct(read, part, dtype)
    if straight is not None:
        source.read_into(role, first_byte + read.offset_bytes, straight)
        return
    buffer = bytearray(read.length_bytes)
    source.read_into(role, first_byte + read.offset_bytes, memoryview(buffer))
    staged = torch.frombuffer(buffer, dtype=torch.uint8).view(getattr(torch, dtype))
    part.copy_(staged.as_strided(read.lengths, read.strides))
