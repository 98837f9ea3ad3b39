"""One thread's way from the host's memory to GPUs, on streams of its own."""

from collections.abc import Iterable, Sequence

import torch
from holdfast.client.tensor_bytes import ByteArray


class Ferry:
    """Enqueues copies to GPUs. For one thread at a time.

    Args:
        devices: The GPUs; none: nothing is set up.
        source: The bytes from which all is copied. A GPU takes them by itself, at full speed, if they are registered.
    """

    def __init__(self, devices: Sequence[torch.device], source: torch.Tensor) -> None:
        self._source = source
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        for device in devices:
            stream = self._streams[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # torch's
            stream.wait_stream(torch.cuda.current_stream(device))  # whoever uses the tensors now goes first

    def take(self, device: torch.device, parts: Iterable[tuple[torch.Tensor | ByteArray, int, int]]) -> None:
        """Have parts of the source copied.

        Args:
            device: The GPU to which all of them go.
            parts: Each a tensor of bytes on `device`, and from where to where in the source its bytes lie.
        """
        with torch.cuda.device(device), torch.cuda.stream(self._streams[device]):
            for target, start, end in parts:
                assert isinstance(target, torch.Tensor)
                target.copy_(self._source[start:end], non_blocking=True)

    def wait(self) -> None:
        """Until all that was taken has arrived."""
        for stream in self._streams.values():
            stream.synchronize()
