"""One GPU's lane: device to host on a side stream, straight into memory that CUDA has registered.

Nothing here blocks: the device waits for the device. Small tensors are gathered on the stream that trains, before
anything later on it, so nothing can tear them; the large ones follow on the side stream, and the training stream waits
for it before the next update. Gathering is one launch of a kernel that goes by addresses (`moves`): the walk that
comes before each snapshot, in the same thread, has just seen that all memory is where it was when the lane was planned.
"""

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from holdfast.client.lanes import DEVICE_SMALL_BYTES, Pack, Piece
from holdfast.client.moves import Moves
from holdfast.client.state_errors import StateError, TornSnapshotError
from holdfast.client.tensor_bytes import ByteArray
from holdfast.client.whereabouts import Whereabouts

_PORTABLE = 1  # cudaHostRegisterPortable: page-locked for every device's context


class DevicePack:
    """Small tensors of one GPU and the buffer there in which they lie as they will in the shard.

    Args:
        pieces: One behind the other, none without bytes, each with its `raw`.
        device: The GPU.
    """

    def __init__(self, pieces: Sequence[Piece], device: torch.device) -> None:
        self._pieces, self._device = pieces, device
        self.start, self.end = pieces[0].offset, pieces[-1].end
        self.buffer = torch.zeros(self.end - self.start, dtype=torch.uint8, device=device)  # gaps stay zero
        self._moves = Moves.of(
            [_raw(each).data_ptr() for each in pieces],
            [self.buffer.data_ptr() + each.offset - self.start for each in pieces],
            [each.size_bytes for each in pieces],
            device,
        )
        self._slow: Pack | None = None

    @property
    def is_quick(self) -> bool:
        """Whether gathering is one launch."""
        return self._moves is not None

    def gather(self) -> None:
        """Copy the tensors into the buffer, in the current stream's order. All must lie where they lay at first."""
        if self._moves is None or not self._moves.launch():
            self._slow = self._slow or Pack(self._pieces, self._device, self.buffer)
            self._slow.gather()


class CudaLane:
    """Tensors on one GPU. Holds one buffer on it for those under 1 MiB.

    Args:
        pieces: What only an update changes, small ones first, each group one behind the other.
        at_once: Small tensors that forward may change, one behind the other.
        device: The GPU, with its index.

    Raises:
        StateError: a tensor has no memory.

    Attributes:
        gathered: Those of `pieces` that `depart` copies: what is done to them afterwards can't tear them.
    """

    def __init__(self, pieces: Iterable[Piece], at_once: Sequence[Piece], device: torch.device) -> None:
        self.device = device
        self.side: torch.cuda.Stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # torch's
        small: list[Piece] = []
        self.straight: list[Piece] = []
        pieces = list(pieces)
        _check_memory([*at_once, *pieces])
        for each in pieces:
            # A small piece that lies apart is a large tensor's share: the buffer would have to span what lies between.
            beside = not small or small[-1].end == each.offset
            packed = each.raw is not None and each.size_bytes < DEVICE_SMALL_BYTES and beside
            (small if packed else self.straight).append(each)
        self.eager = DevicePack(at_once, device) if at_once else None
        self.pack = DevicePack(small, device) if small else None
        # Without the kernel, gathering thousands takes the host milliseconds: then it is the staging thread's.
        self.gathered: Sequence[Piece] = small if self.pack is not None and self.pack.is_quick else ()
        late = [*self.straight, *([] if self.gathered else small)]
        self._late = Whereabouts([each.raw for each in late if each.raw is not None])
        # The buffers were just zeroed on the current stream; the side stream must not overtake that.
        self.side.wait_stream(torch.cuda.current_stream(device))

    def depart(self) -> "CudaPassage":
        """Gather what may change next, and mark the moment on the training stream."""
        with torch.cuda.device(self.device):
            current = torch.cuda.current_stream(self.device)
            current.wait_stream(self.side)  # the last passage has left the buffers
            if self.eager is not None:
                self.eager.gather()
            if self.pack is not None and self.gathered:
                self.pack.gather()
            marked = _event()
            marked.record(current)
        return CudaPassage(self, marked)

    def look(self) -> None:
        """Whether what is copied after `depart` is where it was.

        Raises:
            TornSnapshotError: it is not.
        """
        if moved := self._late.moved():
            raise TornSnapshotError(
                f"the memory of {len(moved)} tensors was given back or replaced before it was copied: call "
                "snapshotter.before_update() before changing where parameters or optimizer state lie"
            )


class CudaPassage:
    """One snapshot of a `CudaLane`."""

    def __init__(self, lane: CudaLane, marked: torch.cuda.Event) -> None:
        self._lane, self._marked = lane, marked
        self._done = _event()

    def start(self, payload: ByteArray) -> None:
        """Enqueue all copies. `payload` must be registered for them to be asynchronous.

        Raises:
            TornSnapshotError: a tensor's memory was given back or replaced since the lane was planned.
        """
        lane = self._lane
        with torch.cuda.device(lane.device), torch.cuda.stream(lane.side):
            lane.side.wait_event(self._marked)
            try:
                self._enqueue(torch.from_numpy(payload))
            finally:
                self._done.record(lane.side)
        for each in lane.straight:
            payload[each.offset + each.size_bytes : each.end] = 0  # what an earlier snapshot left

    def _enqueue(self, target: torch.Tensor) -> None:
        lane = self._lane
        lane.look()
        if lane.pack is not None and not lane.gathered:
            lane.pack.gather()
        for pack in (lane.eager, lane.pack):
            if pack is not None:
                target[pack.start : pack.end].copy_(pack.buffer, non_blocking=True)
        for each in lane.straight:
            place = target[each.offset : each.offset + each.size_bytes]
            if each.raw is not None:
                place.copy_(each.raw, non_blocking=True)
            else:
                local = each.local.detach()
                place.view(local.dtype).view(local.shape).copy_(local, non_blocking=True)

    def hold_updates(self) -> None:
        """The current stream waits on the device; the host does not."""
        device = self._lane.device
        with torch.cuda.device(device):
            torch.cuda.current_stream(device).wait_event(self._done)

    def finished(self) -> bool:
        """Whether the last byte has arrived."""
        return bool(self._done.query())  # type: ignore[no-untyped-call]  # torch's


class RegisteredMemory:
    """Mapped memory that CUDA copies to and from at full speed, without the host. Keeps the mapping until `close`."""

    def __init__(self, memory: memoryview, device: torch.device) -> None:
        """Register `memory` (writable, page aligned). `problem` says why copies will be slower, if it failed."""
        self._view = np.frombuffer(memory, dtype=np.uint8)
        self._device, self._address = device, self._view.ctypes.data
        self.problem = ""
        code = self._call("cudaHostRegister", self._address, memory.nbytes, _PORTABLE)
        if code != 0:
            self.problem = f"CUDA could not register {memory.nbytes} bytes (error {code}): copies are slower"
            self._address = 0

    def close(self) -> None:
        """Unregister, once no copy is under way."""
        if self._address:
            self._call("cudaHostUnregister", self._address)
            self._address = 0
        self._view = np.empty(0, dtype=np.uint8)

    def _call(self, name: str, *arguments: int) -> int:
        # with a device of ours current, so that no context is made on another GPU
        with torch.cuda.device(self._device):
            runtime = torch.cuda.cudart()  # type: ignore[no-untyped-call]  # torch's
            return int(getattr(runtime, name)(*arguments))


def _event() -> torch.cuda.Event:
    return torch.cuda.Event()  # type: ignore[no-untyped-call]  # torch's


def _raw(piece: Piece) -> torch.Tensor:
    assert piece.raw is not None
    return piece.raw


def _check_memory(pieces: Iterable[Piece]) -> None:
    """A kernel that went to an address where nothing is would end the training process."""
    for each in pieces:
        if each.local.untyped_storage().data_ptr() == 0:
            raise StateError(
                f"a tensor of {each.size_bytes} bytes on {each.local.device} has no memory, its storage was resized to "
                "nothing: give it back its memory before snapshotter.step(), or leave it out of the state"
            )
