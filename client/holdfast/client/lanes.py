"""From live tensors into a shard's memory: planned once, then a handful of calls per snapshot.

Each device has a lane. Tensors that are small for it are gathered into one buffer on their own device first and leave
it as one copy: thousands of small copies cost more than all bytes together (a GPU's bus needs about 1 MiB a copy; the
interpreter about a microsecond a call). The others are copied straight from the trainer's memory.

A lane's work on one snapshot is a `Passage`. `HostLane` copies at once, in the thread that calls; a GPU's lane
(`cuda_lane`) only enqueues. Not here: which tensors are copied when, and where they lie (`shard`).
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from holdfast.client.manifest import align
from holdfast.client.tensor_bytes import ByteArray, copy_all, copy_out

HOST_SMALL_BYTES = 8 << 10
HOST_PACK_BYTES_MAX = 256 << 10  # packed at a time: its second copy comes out of the processor's cache
DEVICE_SMALL_BYTES = 1 << 20  # below, a copy over the bus does not reach its full speed


def small_bytes(device: torch.device) -> int:
    """Tensors of fewer bytes are packed on their device."""
    return HOST_SMALL_BYTES if device.type == "cpu" else DEVICE_SMALL_BYTES


@dataclass(frozen=True, slots=True)
class Piece:
    """One tensor of a lane and its place.

    Attributes:
        local: The tensor whose memory this rank holds.
        raw: The same memory as uint8, one dimension; None where its elements do not lie in C order.
        offset: Where its bytes go, counted from the payload's start.
    """

    local: torch.Tensor
    raw: torch.Tensor | None
    offset: int
    size_bytes: int

    @property
    def end(self) -> int:
        """Behind the last byte, gap to the next boundary included."""
        return self.offset + align(self.size_bytes)


def piece(local: torch.Tensor, offset: int, size_bytes: int) -> Piece:
    """`local` and its place; no byte is copied."""
    in_order = local.is_contiguous() and not local.is_conj() and not local.is_neg()
    raw = local.detach().reshape(-1).view(torch.uint8) if in_order else None
    return Piece(local, raw, offset, size_bytes)


class Pack:
    """Small tensors of one device and the buffer there in which they lie as they will in the shard.

    The buffer is made once: a snapshot costs `gather` and one copy of `buffer` to `start`.

    Args:
        pieces: One behind the other, none without bytes.
        device: Where they are.
        buffer: To use instead of one of its own; zero it before `gather`.
    """

    def __init__(self, pieces: Sequence[Piece], device: torch.device, buffer: torch.Tensor | None = None) -> None:
        self.start, self.end = pieces[0].offset, pieces[-1].end
        size_bytes = self.end - self.start
        own = torch.zeros(size_bytes, dtype=torch.uint8, device=device) if buffer is None else buffer[:size_bytes]
        self.buffer = own
        self.has_gaps = any(each.size_bytes != align(each.size_bytes) for each in pieces)
        self._groups: dict[torch.dtype, tuple[list[torch.Tensor], list[torch.Tensor]]] = {}
        for each in pieces:
            assert each.raw is not None
            begin = each.offset - self.start
            place, raw = self.buffer[begin : begin + each.size_bytes], each.raw
            if device.type != "cpu" and each.size_bytes % 4 == 0 and raw.data_ptr() % 4 == 0:
                # a kernel that moves words is about four times faster than one that moves bytes
                place, raw = place.view(torch.int32), raw.view(torch.int32)
            places, raws = self._groups.setdefault(raw.dtype, ([], []))
            places.append(place)
            raws.append(raw)

    def gather(self) -> None:
        """Copy the tensors into the buffer, in the current stream's order; without the interpreter lock."""
        for places, raws in self._groups.values():
            torch._foreach_copy_(places, raws)  # the only way to copy lists; optimizers use it, too


class Passage(Protocol):
    """One snapshot's way through a lane. Each method is called once, `hold_updates` as often as one likes."""

    def start(self, payload: ByteArray) -> None:
        """Bring the bytes on their way into `payload`. Staging thread."""

    def hold_updates(self) -> None:
        """What the training thread has the device do from now on happens after the copy. After `start`."""

    def finished(self) -> bool:
        """Whether every byte is in the payload. After `start`."""


class Lane(Protocol):
    """What copies one device's tensors."""

    def depart(self) -> Passage:
        """Begin with a snapshot of the state as it is now. Training thread."""


class HostLane:
    """Tensors in the host's own memory."""

    def __init__(self, pieces: Iterable[Piece]) -> None:
        small: list[Piece] = []
        self._odd: list[Piece] = []
        self._large: list[tuple[ByteArray, int, int, int]] = []
        for each in pieces:
            if each.raw is None:
                self._odd.append(each)
            elif each.size_bytes < HOST_SMALL_BYTES:
                small.append(each)
            else:
                raw: ByteArray = each.raw.numpy()
                self._large.append((raw, each.offset, each.offset + each.size_bytes, each.end))
        buffer = torch.empty(HOST_PACK_BYTES_MAX if small else 0, dtype=torch.uint8)
        self._packs = [Pack(group, torch.device("cpu"), buffer) for group in _groups(small)]

    def depart(self) -> "HostLane":
        """Nothing to prepare: a lane is its own passage."""
        return self

    def start(self, payload: ByteArray) -> None:
        """Copy everything now."""
        for pack in self._packs:
            if pack.has_gaps:
                pack.buffer.zero_()
            pack.gather()
            np.copyto(payload[pack.start : pack.end], pack.buffer.numpy())
        copy_all([(payload[start:end], raw) for raw, start, end, _ in self._large])
        for _, _, end, gap_end in self._large:
            if end < gap_end:
                payload[end:gap_end] = 0  # what an earlier snapshot left
        for each in self._odd:
            end = each.offset + each.size_bytes
            copy_out(each.local, None, payload[each.offset : end])
            payload[end : each.end] = 0

    def hold_updates(self) -> None:
        """Everything was copied in `start`."""

    def finished(self) -> bool:
        """It is, once `start` has returned."""
        return True


def _groups(pieces: Sequence[Piece]) -> list[list[Piece]]:
    """Neighbours together, as many as fit the cache."""
    found: list[list[Piece]] = []
    for each in pieces:
        if found and found[-1][-1].end == each.offset and each.end - found[-1][0].offset <= HOST_PACK_BYTES_MAX:
            found[-1].append(each)
        else:
            found.append([each])
    return found
