"""A tensor's memory as plain bytes, and copies between it and a shard.

Bytes are always the elements in C order. Large copies run without the interpreter lock.
"""

import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt
import torch

ByteArray = npt.NDArray[np.uint8]
THREADS_MAX = 4  # more gain little: memory is the limit
SPREAD_BYTES_MIN = 32 << 20  # below, starting threads costs more than they save
BLOCK_BYTES = 8 << 20  # what one thread copies at a time


def copy_all(pairs: Sequence[tuple[ByteArray, ByteArray]]) -> None:
    """Copy each second array over the first of the same size; large sums on several threads where cores are spare."""
    threads = threads_to_copy()
    if threads == 1 or sum(target.nbytes for target, _ in pairs) < SPREAD_BYTES_MIN:
        for target, source in pairs:
            np.copyto(target, source)
        return
    with ThreadPoolExecutor(max_workers=threads, thread_name_prefix="holdfast-copy") as pool:
        for _ in pool.map(lambda pair: np.copyto(*pair), list(_blocks(pairs))):
            pass


def threads_to_copy() -> int:
    """At most half of this process's share of the cores: training needs the others."""
    return max(1, min(THREADS_MAX, cores_of_rank() // 2))


def cores_of_rank() -> int:
    """This process's share of the cores that it may use; at least one."""
    ranks = max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    return max(1, len(os.sched_getaffinity(0)) // ranks)


def _blocks(pairs: Sequence[tuple[ByteArray, ByteArray]]) -> Iterable[tuple[ByteArray, ByteArray]]:
    for target, source in pairs:
        for start in range(0, target.nbytes, BLOCK_BYTES):
            yield target[start : start + BLOCK_BYTES], source[start : start + BLOCK_BYTES]


def raw_bytes(tensor: torch.Tensor) -> ByteArray | None:
    """The tensor's own memory as bytes, not copied; None where that is not C order on the CPU.

    The array keeps the memory alive. ``tensor`` is a local tensor, not a DTensor.
    """
    in_order = tensor.is_contiguous() and not tensor.is_conj() and not tensor.is_neg()
    if tensor.device.type != "cpu" or not in_order:
        return None
    array: ByteArray = tensor.detach().reshape(-1).view(torch.uint8).numpy()
    return array


def copy_out(tensor: torch.Tensor, raw: ByteArray | None, target: ByteArray) -> None:
    """Copy a tensor into ``target``, which has exactly its bytes and a 16-byte aligned start.

    ``raw`` is what ``raw_bytes(tensor)`` gave before; torch copies what it could not give. From a
    CUDA device that is a synchronous copy in the current stream's order.
    """
    if raw is not None:
        np.copyto(target, raw)
    elif target.size:
        torch.from_numpy(target).view(tensor.dtype).view(tensor.shape).copy_(tensor.detach())


def copy_in(source: ByteArray, tensor: torch.Tensor) -> None:
    """Copy a shard's bytes over a live tensor, in place. ``source`` may be read-only."""
    raw = raw_bytes(tensor)
    if raw is not None:
        np.copyto(raw, source)
    else:
        staged = torch.empty(tensor.shape, dtype=tensor.dtype)
        copy_in(source, staged)
        tensor.detach().copy_(staged)
    if not tensor.is_inference():
        # numpy wrote behind autograd's back: whoever watches the version counter must hear of it
        torch.autograd.graph.increment_version(tensor)


def content(tensor: torch.Tensor) -> ByteArray:
    """The tensor's bytes in C order; its own memory where possible, else a copy."""
    raw = raw_bytes(tensor)
    if raw is None:
        raw = raw_bytes(tensor.detach().resolve_conj().resolve_neg().cpu().contiguous())
        assert raw is not None
    return raw
