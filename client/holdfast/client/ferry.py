"""One thread's way from the host's memory to GPUs: page-locked buffers, one filled while the other is on the bus."""

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from holdfast.client.tensor_bytes import ByteArray

_BUFFERS = 2  # one is filled while the other leaves


class Ferry:
    """Copies blocks to GPUs, on streams of its own. For one thread at a time.

    Args:
        devices: The GPUs; none: nothing is set up.
        block_bytes: The largest block.
    """

    def __init__(self, devices: Sequence[torch.device], block_bytes: int) -> None:
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        for device in devices:
            stream = self._streams[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # torch's
            stream.wait_stream(torch.cuda.current_stream(device))  # whoever uses the tensors now goes first
        count = _BUFFERS if devices else 0
        self._buffers = [torch.empty(2 * block_bytes, dtype=torch.uint8, pin_memory=True) for _ in range(count)]
        self._leaving: list[torch.cuda.Stream | None] = [None] * count
        self._turn = 0

    def take(
        self, device: torch.device, block: ByteArray, parts: Iterable[tuple[torch.Tensor | ByteArray, int, int]]
    ) -> None:
        """Have parts of a block copied.

        Args:
            device: The GPU to which all of them go.
            block: May be reused once this returns.
            parts: Each a tensor of bytes on `device`, and from where to where in the block its bytes lie.
        """
        self._turn = (self._turn + 1) % _BUFFERS
        before = self._leaving[self._turn]
        if before is not None:
            before.synchronize()
        buffer, stream = self._buffers[self._turn][: len(block)], self._streams[device]
        np.copyto(buffer.numpy(), block)
        with torch.cuda.device(device), torch.cuda.stream(stream):
            for target, start, end in parts:
                assert isinstance(target, torch.Tensor)
                target.copy_(buffer[start:end], non_blocking=True)
        self._leaving[self._turn] = stream

    def wait(self) -> None:
        """Until all that was taken has arrived."""
        for stream in self._streams.values():
            stream.synchronize()
