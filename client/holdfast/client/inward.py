"""From a shard's memory into live tensors: no second copy of the state, few calls for many small tensors.

The way back of `lanes`. Tensors on a GPU are copied by it, all at once; small ones that lie side by side in the shard
go over the bus as one copy and are spread on the device.
"""

import warnings
from collections.abc import Sequence

import numpy as np
import torch
from holdfast.client.lanes import DEVICE_SMALL_BYTES
from holdfast.client.manifest import TensorEntry, align
from holdfast.client.tensor_bytes import ByteArray, copy_all, copy_in, raw_bytes

RUN_BYTES_MAX = 256 << 20  # of small tensors in one copy: so much memory of the GPU is needed for a moment
Pair = tuple[TensorEntry, torch.Tensor]


def copy_all_in(pairs: Sequence[Pair], payload: ByteArray) -> None:
    """Overwrite each tensor with its entry's bytes. Returns when all devices are done.

    Args:
        pairs: Entries and the local tensors that they fill.
        payload: The shard's tensors; may be read-only. A GPU copies from it at full speed if it is registered.
    """
    by_device: dict[torch.device, list[Pair]] = {}
    for pair in pairs:
        if pair[0].size_bytes:
            by_device.setdefault(pair[1].device, []).append(pair)
    host = by_device.pop(torch.device("cpu"), [])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of read-only memory, once; it is only read here
        source = torch.from_numpy(payload) if by_device else torch.empty(0)
    kept = [_enqueue(mine, source) for mine in by_device.values()]
    _copy_on_host(host, payload)
    for device in by_device:
        torch.cuda.current_stream(device).synchronize()
    kept.clear()


def _copy_on_host(pairs: Sequence[Pair], payload: ByteArray) -> None:
    straight: list[tuple[ByteArray, ByteArray]] = []
    copied: list[Pair] = []
    for entry, tensor in pairs:
        piece = payload[entry.offset : entry.offset + entry.size_bytes]
        raw = raw_bytes(tensor)
        if raw is None:
            copy_in(piece, tensor)
        else:
            straight.append((raw, piece))
            copied.append((entry, tensor))
    copy_all(straight)
    _count(copied)  # numpy wrote behind autograd's back


def runs(pairs: Sequence[Pair]) -> list[list[Pair]]:
    """Pairs in the order of their places: small ones that lie side by side together, every other one alone."""
    found: list[list[Pair]] = []
    end = -1
    for pair in sorted(pairs, key=lambda pair: pair[0].offset):
        entry, tensor = pair
        small = entry.size_bytes < DEVICE_SMALL_BYTES and tensor.is_contiguous()
        if small and found and entry.offset == end and end - found[-1][0][0].offset < RUN_BYTES_MAX:
            found[-1].append(pair)
        else:
            found.append([pair])
        end = entry.offset + align(entry.size_bytes) if small else -1
    return found


def _enqueue(pairs: Sequence[Pair], source: torch.Tensor) -> list[torch.Tensor]:
    """Have one GPU copy; returns what must live until it has."""
    device = pairs[0][1].device
    kept: list[torch.Tensor] = []
    with torch.cuda.device(device):
        for run in runs(pairs):
            first, last = run[0][0], run[-1][0]
            piece = source[first.offset : last.offset + last.size_bytes]
            if len(run) == 1 and run[0][1].is_contiguous():
                _as_bytes(run[0][1]).copy_(piece, non_blocking=True)
                _count(run)
                continue
            buffer = piece.to(device, non_blocking=True)
            kept.append(buffer)
            places = [buffer[entry.offset - first.offset :][: entry.size_bytes] for entry, _ in run]
            if len(run) == 1:
                tensor = run[0][1].detach()
                tensor.copy_(buffer.view(tensor.dtype).view(tensor.shape))
                continue
            torch._foreach_copy_([_as_bytes(tensor) for _, tensor in run], places)
            _count(run)
    return kept


def _as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().reshape(-1).view(torch.uint8)


def _count(run: Sequence[Pair]) -> None:
    """Whoever watches the version counters must hear of it."""
    torch.autograd.graph.increment_version([tensor for _, tensor in run if not tensor.is_inference()])


def gpu_of(tensors: Sequence[torch.Tensor]) -> torch.device | None:
    """The first GPU that any of these lies on."""
    return next((tensor.device for tensor in tensors if tensor.device.type == "cuda"), None)


def as_payload(payload: memoryview) -> ByteArray:
    """A shard's tensors as bytes, not copied."""
    return np.frombuffer(payload, dtype=np.uint8)
