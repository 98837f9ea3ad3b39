"""Blocks of the host's memory on their way to GPUs, through a small ring that CUDA has registered.

A GPU takes bytes by itself, at full speed, from registered memory only, and registering a whole slot takes several
times as long as copying it. So several threads fill the ring's places, and one alone speaks to CUDA: many that did
would wait for each other. The digest is that of the copy: what arrives is what was compared, and the slot's memory is
read once.
"""

import ctypes
import logging
import mmap
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from queue import Empty, SimpleQueue

import numpy as np
import torch
from holdfast.client.cuda_lane import RegisteredMemory
from holdfast.client.tensor_bytes import ByteArray

log = logging.getLogger("holdfast")

PLACE_BYTES = 16 << 20  # the bus is at full speed, and threads seldom meet at the interpreter's lock
FILLERS_MAX = 8  # more wait for the interpreter's lock, and for memory
AFLOAT_COUNT = 2  # places that GPUs empty while every filler has one
POPULATING_COUNT = 4  # threads that fill page tables: sixteen took four times as long as four
_POPULATE_BYTES = 32 << 20  # at a time, so that those who come after find all of it done
_MADV_HUGEPAGE = 14  # registering takes time per page
_MADV_POPULATE_READ = 22  # Linux 5.14; an older kernel refuses, and each page costs a fault as it is read
_libc = ctypes.CDLL(None)  # mmap's own madvise would hold the interpreter lock meanwhile


@dataclass(frozen=True, slots=True)
class Part:
    """Some bytes of a place and where they go: a tensor of as many bytes on a GPU."""

    target: torch.Tensor
    start: int
    end: int


class Ferry:
    """Places that threads fill (`take`, `send`, `fail`) and one thread empties (`sail`).

    Args:
        devices: The GPUs.
        fillers: How many threads fill places.
        place_bytes: How much fits one.
    """

    def __init__(self, devices: Sequence[torch.device], *, fillers: int, place_bytes: int) -> None:
        self._devices, self._fillers = devices, fillers
        count = fillers + AFLOAT_COUNT
        self._memory = mmap.mmap(-1, count * place_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._memory.madvise(_MADV_HUGEPAGE)
        self._places: ByteArray = np.frombuffer(self._memory, dtype=np.uint8).reshape(count, place_bytes)
        self._free: SimpleQueue[int | None] = SimpleQueue()
        self._full: SimpleQueue[tuple[int, list[Part]] | BaseException] = SimpleQueue()
        for place in range(count):
            self._free.put(place)

    def take(self, source: ByteArray) -> tuple[int, ByteArray] | None:
        """Wait for a free place and copy `source` into it: the place and the copy; None: it is over. Any thread."""
        place = self._free.get()
        if place is None:
            return None
        copy: ByteArray = self._places[place, : source.nbytes]
        np.copyto(copy, source)
        return place, copy

    def send(self, place: int, parts: list[Part]) -> None:
        """Have parts of a place copied to GPUs; it is free again then. Any thread."""
        self._full.put((place, parts))

    def fail(self, error: BaseException) -> None:
        """What `sail` raises. Any thread."""
        self._full.put(error)

    def sail(self, count: int) -> None:
        """Bring what lies in so many full places where it belongs. Returns when all is there; raises what a filler did.

        Whatever the devices' current streams have to do goes first.
        """
        streams = {device: _stream_after_current(device) for device in self._devices}
        registered = RegisteredMemory(memoryview(self._memory), self._devices[0])
        if registered.problem:
            log.warning("%s", registered.problem)
        afloat: deque[tuple[int, list[torch.cuda.Event]]] = deque()
        try:
            for _ in range(count):
                place, parts = self._next(afloat)
                afloat.append((place, self._embark(place, parts, streams)))
        finally:
            for stream in streams.values():
                stream.synchronize()
            registered.close()
            for _ in range(self._fillers):
                self._free.put(None)

    def _next(self, afloat: deque[tuple[int, list[torch.cuda.Event]]]) -> tuple[int, list[Part]]:
        """The next full place; meanwhile those that were emptied become free."""
        while True:
            try:
                found = self._full.get(block=not afloat)
            except Empty:
                place, arrived = afloat.popleft()
                for event in arrived:
                    event.synchronize()
                self._free.put(place)
                continue
            if isinstance(found, BaseException):
                raise found
            return found

    def _embark(
        self, place: int, parts: Iterable[Part], streams: dict[torch.device, torch.cuda.Stream]
    ) -> list[torch.cuda.Event]:
        source = torch.from_numpy(self._places[place])
        used: dict[torch.device, torch.cuda.Stream] = {}
        for part in parts:
            device = part.target.device
            used[device] = streams[device]
            with torch.cuda.device(device), torch.cuda.stream(streams[device]):
                part.target.copy_(source[part.start : part.end], non_blocking=True)
        return [stream.record_event() for stream in used.values()]


def _stream_after_current(device: torch.device) -> torch.cuda.Stream:
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # torch's
    stream.wait_stream(torch.cuda.current_stream(device))  # whoever uses the tensors now goes first
    return stream


def populate(source: ByteArray, index: int) -> None:
    """Fill this process's page table for one thread's share of memory, of `POPULATING_COUNT`, ahead of who reads it."""
    for start in range(index * _POPULATE_BYTES, source.nbytes, POPULATING_COUNT * _POPULATE_BYTES):
        address = (source.ctypes.data + start) & -mmap.PAGESIZE
        size_bytes = min(_POPULATE_BYTES, source.nbytes - start)
        _libc.madvise(ctypes.c_void_p(address), ctypes.c_size_t(size_bytes), _MADV_POPULATE_READ)
