"""From a shard's memory into live tensors: no second copy of the state, few calls for many small tensors.

The way back of `lanes`. The payload is walked once, by all cores that this rank may use, in blocks of whole chunks: a
block's digests are compared, and then, while its bytes are in the processor's cache, they go where they belong. A GPU
fetches what belongs to it by itself, while the next blocks are read; small tensors that lie side by side arrive there
as one and are spread on the device.
"""

import warnings
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from queue import SimpleQueue

import numpy as np
import torch
from holdfast.client.checks import Checks
from holdfast.client.ferry import Ferry
from holdfast.client.lanes import DEVICE_SMALL_BYTES
from holdfast.client.manifest import TensorEntry, align
from holdfast.client.tensor_bytes import ByteArray, copy_in, cores_of_rank, raw_bytes

RUN_BYTES_MAX = 256 << 20  # of small tensors in one copy: so much memory of the GPU is needed for a moment
HOST_BLOCK_BYTES = 1 << 20  # digested and copied out of the processor's cache
DEVICE_BLOCK_BYTES = 8 << 20  # the bus is at full speed
THREADS_MAX = 16  # memory is the limit
Pair = tuple[TensorEntry, torch.Tensor]
Part = tuple[ByteArray | torch.Tensor, int, int]  # of a landing; from where to where in the payload


@dataclass(slots=True)
class Landing:
    """Where some bytes of the payload go: an array of bytes in the host's memory, or a tensor of bytes on a GPU."""

    start: int
    size_bytes: int
    target: ByteArray | torch.Tensor

    @property
    def end(self) -> int:
        """Behind its last byte."""
        return self.start + self.size_bytes


@dataclass(slots=True)
class Plan:
    """What is to be done, block by block, and once all blocks are through."""

    host: list[Landing] = field(default_factory=list)
    devices: dict[torch.device, list[Landing]] = field(default_factory=dict)
    after: list[Callable[[], object]] = field(default_factory=list)
    counted: list[torch.Tensor] = field(default_factory=list)


def copy_all_in(pairs: Sequence[Pair], payload: ByteArray, checks: Checks | None = None, start: int = 0) -> None:
    """Overwrite each tensor with its entry's bytes. Returns when all devices are done.

    Args:
        pairs: Entries and the local tensors that they fill.
        payload: The shard's tensors; may be read-only. A GPU copies from it at full speed if it is registered.
        checks: Compares the chunks under them; None: that was done before.
        start: Where the payload begins in the shard.

    Raises:
        RottenShardError: a chunk fails its digest. Some tensors are overwritten already.
    """
    plan = _plan(pairs)
    step_bytes = DEVICE_BLOCK_BYTES if plan.devices else HOST_BLOCK_BYTES
    if checks is None:
        cuts = [*range(0, len(payload), step_bytes), len(payload)]
    else:
        cuts = [cut - start for cut in checks.cuts(start, start + len(payload), step_bytes)]

    def check(begin: int, end: int) -> None:
        if checks is not None:
            checks.check(start + begin, start + end)

    _walk(plan, payload, list(pairwise(cuts)), check)
    for finish in plan.after:
        finish()
    for device in plan.devices:
        torch.cuda.current_stream(device).synchronize()
    # Bytes were written behind autograd's back, and whoever watches the version counters must hear of it.
    torch.autograd.graph.increment_version([tensor for tensor in plan.counted if not tensor.is_inference()])


def _walk(plan: Plan, payload: ByteArray, blocks: list[tuple[int, int]], check: Callable[[int, int], None]) -> None:
    """Check each block and copy what lies in it, on all cores of this rank."""
    host = _by_block(plan.host, blocks)
    devices = {device: _by_block(landings, blocks) for device, landings in plan.devices.items()}
    threads = min(THREADS_MAX, cores_of_rank(), len(blocks)) or 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of read-only memory, once; it is only read here
        source = torch.from_numpy(payload) if devices else torch.empty(0)
    ferries: SimpleQueue[Ferry] = SimpleQueue()
    for _ in range(threads):
        ferries.put(Ferry(list(devices), source))

    def work(share: range) -> None:
        ferry = ferries.get()
        for index in share:
            begin, end = blocks[index]
            check(begin, end)
            for target, low, high in _parts(host[index], begin, end):
                assert isinstance(target, np.ndarray)
                np.copyto(target, payload[low:high])
            for device, by_block in devices.items():
                if by_block[index]:
                    ferry.take(device, _parts(by_block[index], begin, end))
        ferry.wait()

    if threads == 1:
        work(range(len(blocks)))
        return
    with ThreadPoolExecutor(max_workers=threads, thread_name_prefix="holdfast-restore") as pool:
        for done in [pool.submit(work, range(first, len(blocks), threads)) for first in range(threads)]:
            done.result()


def _by_block(landings: Iterable[Landing], blocks: Sequence[tuple[int, int]]) -> list[list[Landing]]:
    """For each block, the landings of which some bytes lie in it."""
    ends = [end for _, end in blocks]
    found: list[list[Landing]] = [[] for _ in blocks]
    for landing in landings:
        index = bisect_right(ends, landing.start)
        while index < len(blocks) and blocks[index][0] < landing.end:
            found[index].append(landing)
            index += 1
    return found


def _parts(landings: Iterable[Landing], begin: int, end: int) -> Iterator[Part]:
    """What of each landing lies between two places."""
    for landing in landings:
        low, high = max(begin, landing.start), min(end, landing.end)
        yield landing.target[low - landing.start : high - landing.start], low, high


def _plan(pairs: Sequence[Pair]) -> Plan:
    plan = Plan()
    by_device: dict[torch.device, list[Pair]] = {}
    for pair in pairs:
        if pair[0].size_bytes:
            by_device.setdefault(pair[1].device, []).append(pair)
    for entry, tensor in by_device.pop(torch.device("cpu"), []):
        raw = raw_bytes(tensor)
        if raw is None:
            raw = np.empty(entry.size_bytes, np.uint8)
            plan.after.append(partial(copy_in, raw, tensor))
        else:
            plan.counted.append(tensor)
        plan.host.append(Landing(entry.offset, entry.size_bytes, raw))
    for device, mine in by_device.items():
        plan.devices[device] = [_landing(run, device, plan) for run in runs(mine)]
    return plan


def _landing(run: Sequence[Pair], device: torch.device, plan: Plan) -> Landing:
    """Where a run arrives on a GPU: in its one tensor, or in a buffer from which it is spread."""
    (first, tensor), (last, _) = run[0], run[-1]
    start, size_bytes = first.offset, last.offset + last.size_bytes - first.offset
    plan.counted.extend(tensor for _, tensor in run)
    if len(run) == 1 and tensor.is_contiguous():
        return Landing(start, size_bytes, _as_bytes(tensor))
    buffer = torch.empty(size_bytes, dtype=torch.uint8, device=device)
    if len(run) == 1:
        local = tensor.detach()
        plan.after.append(lambda: local.copy_(buffer.view(local.dtype).view(local.shape)))
    else:
        places = [buffer[entry.offset - start :][: entry.size_bytes] for entry, _ in run]
        plan.after.append(partial(torch._foreach_copy_, [_as_bytes(tensor) for _, tensor in run], places))
    return Landing(start, size_bytes, buffer)


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


def _as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().reshape(-1).view(torch.uint8)


def as_payload(payload: memoryview) -> ByteArray:
    """A shard's tensors as bytes, not copied."""
    return np.frombuffer(payload, dtype=np.uint8)
