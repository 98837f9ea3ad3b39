"""One GPU's lane: device to host on a side stream, straight into memory that CUDA has registered.

The only file of this room that speaks to CUDA about streams, events and registered memory. Nothing here blocks: the
device waits for the device. What changes in forward (`at_once`) is gathered on the stream that trains, before anything
later on it; the rest follows on the side stream, and the training stream waits for it before the next update.
"""

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from holdfast.client.lanes import DEVICE_SMALL_BYTES, Pack, Piece
from holdfast.client.tensor_bytes import ByteArray

_PORTABLE = 1  # cudaHostRegisterPortable: page-locked for every device's context


class CudaLane:
    """Tensors on one GPU. Holds one buffer on it for those under 1 MiB.

    Args:
        pieces: What only an update changes, small ones first, each group one behind the other.
        at_once: Small tensors that forward may change, one behind the other.
        device: The GPU, with its index.
    """

    def __init__(self, pieces: Iterable[Piece], at_once: Sequence[Piece], device: torch.device) -> None:
        self.device = device
        self.side: torch.cuda.Stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # torch's
        small: list[Piece] = []
        self.straight: list[Piece] = []
        for each in pieces:
            # A small piece that lies apart is a large tensor's share: the buffer would have to span what lies between.
            beside = not small or small[-1].end == each.offset
            packed = each.raw is not None and each.size_bytes < DEVICE_SMALL_BYTES and beside
            (small if packed else self.straight).append(each)
        self.pack = Pack(small, device) if small else None
        self.eager = Pack(at_once, device) if at_once else None
        # The buffers were just zeroed on the current stream; the side stream must not overtake that.
        self.side.wait_stream(torch.cuda.current_stream(device))

    def depart(self) -> "CudaPassage":
        """Gather what may change next, and mark the moment on the training stream."""
        with torch.cuda.device(self.device):
            if self.eager is not None:
                self.eager.gather()
            marked = _event()
            marked.record(torch.cuda.current_stream(self.device))
        return CudaPassage(self, marked)


class CudaPassage:
    """One snapshot of a `CudaLane`."""

    def __init__(self, lane: CudaLane, marked: torch.cuda.Event) -> None:
        self._lane, self._marked = lane, marked
        self._done = _event()

    def start(self, payload: ByteArray) -> None:
        """Enqueue all copies. `payload` must be registered for them to be asynchronous."""
        lane = self._lane
        target = torch.from_numpy(payload)
        with torch.cuda.device(lane.device), torch.cuda.stream(lane.side):
            lane.side.wait_event(self._marked)
            if lane.pack is not None:
                lane.pack.gather()
            for pack in (lane.eager, lane.pack):
                if pack is not None:
                    target[pack.start : pack.end].copy_(pack.buffer, non_blocking=True)
            for each in lane.straight:
                end = each.offset + each.size_bytes
                place = target[each.offset : end]
                if each.raw is not None:
                    place.copy_(each.raw, non_blocking=True)
                else:
                    local = each.local.detach()
                    place.view(local.dtype).view(local.shape).copy_(local, non_blocking=True)
                if end < each.end:
                    payload[end : each.end] = 0
            self._done.record(lane.side)

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
