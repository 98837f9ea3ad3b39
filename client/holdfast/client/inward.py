"""From a shard's memory into live tensors: no second copy of the state, few calls for many small tensors.

The way back of `lanes`. The payload is walked once, by all cores that this rank may use, in blocks of whole chunks: a
block's digests are compared, and, while its bytes are in the processor's cache, they go where they belong. What belongs
to a GPU is on its way there (`ferry`) while the next blocks are read; small tensors that lie side by side arrive as one
and are spread on the device.
"""

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise

import numpy as np
import torch
from holdfast.client.checks import Checks
from holdfast.client.ferry import FILLERS_MAX, PLACE_BYTES, POPULATING_COUNT, Ferry, Part, populate
from holdfast.client.lanes import DEVICE_SMALL_BYTES
from holdfast.client.manifest import TensorEntry, align
from holdfast.client.moves import Moves
from holdfast.client.tensor_bytes import ByteArray, copy_in, cores_of_rank, raw_bytes

RUN_BYTES_MAX = 256 << 20  # of small tensors in one copy: so much memory of the GPU is needed for a moment
HOST_BLOCK_BYTES = 1 << 20  # digested and copied out of the processor's cache
THREADS_MAX = 16  # memory is the limit
Pair = tuple[TensorEntry, torch.Tensor]
Block = tuple[int, int]  # from where to where in the payload
Landed = tuple[ByteArray | torch.Tensor, int, int]  # some of a landing's target, and from where to where its bytes lie


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
        payload: The shard's tensors; may be read-only.
        checks: Compares the chunks under them; None: that was done before.
        start: Where the payload begins in the shard.

    Raises:
        RottenShardError: a chunk fails its digest. Some tensors are overwritten already.
    """
    plan = _plan(pairs)
    step_bytes = PLACE_BYTES if plan.devices else HOST_BLOCK_BYTES
    if checks is None:
        cuts = [*range(0, len(payload), step_bytes), len(payload)]
    else:
        cuts = [cut - start for cut in checks.cuts(start, start + len(payload), step_bytes)]
    blocks = list(pairwise(cuts))
    if plan.devices:
        _walk_to_devices(plan, payload, blocks, checks, start)
    else:
        _walk(plan, payload, blocks, checks, start)
    for finish in plan.after:
        finish()
    for device in plan.devices:
        torch.cuda.current_stream(device).synchronize()
    # Bytes were written behind autograd's back, and whoever watches the version counters must hear of it.
    torch.autograd.graph.increment_version([tensor for tensor in plan.counted if not tensor.is_inference()])


def _walk(plan: Plan, payload: ByteArray, blocks: list[Block], checks: Checks | None, start: int) -> None:
    """Check each block and copy what lies in it, on all cores of this rank."""
    host = _by_block(plan.host, blocks)

    def work(share: range) -> None:
        for index in share:
            begin, end = blocks[index]
            if checks is not None:
                checks.check(start + begin, start + end)
            for target, low, high in _parts(host[index], begin, end):
                assert isinstance(target, np.ndarray)
                np.copyto(target, payload[low:high])

    threads = _threads(blocks)
    if threads == 1:
        work(range(len(blocks)))
        return
    with ThreadPoolExecutor(max_workers=threads, thread_name_prefix="holdfast-restore") as pool:
        for done in [pool.submit(work, range(first, len(blocks), threads)) for first in range(threads)]:
            done.result()


def _walk_to_devices(plan: Plan, payload: ByteArray, blocks: list[Block], checks: Checks | None, start: int) -> None:
    """Copy each block into the ferry, check the copy, and send it on; this thread alone speaks to the devices."""
    host = _by_block(plan.host, blocks)
    devices = _by_block([landing for landings in plan.devices.values() for landing in landings], blocks)
    source, base = payload, 0  # where the payload begins in the source
    if checks is not None:
        source, base = as_payload(checks.image), checks.offset_bytes + start
    threads = min(FILLERS_MAX, _threads(blocks))
    place_bytes = max(PLACE_BYTES, checks.chunk_bytes if checks is not None else 0)
    ferry = Ferry(list(plan.devices), fillers=threads, place_bytes=place_bytes)

    def bring(index: int) -> bool:
        begin, end = blocks[index]
        low, high = (begin, end) if checks is None else checks.span(start + begin, start + end)
        taken = ferry.take(source[low:high])
        if taken is None:
            return False
        place, copy = taken
        if checks is not None:
            checks.check_copy(copy, low)
        for target, first, last in _parts(host[index], begin, end):
            assert isinstance(target, np.ndarray)
            np.copyto(target, copy[base + first - low : base + last - low])
        parts = []
        for target, first, last in _parts(devices[index], begin, end):
            assert isinstance(target, torch.Tensor)
            parts.append(Part(target, base + first - low, base + last - low))
        ferry.send(place, parts)
        return True

    def work(share: range) -> None:
        try:
            all(map(bring, share))
        except BaseException as error:  # noqa: BLE001  # raised again by the thread that waits
            ferry.fail(error)

    with ThreadPoolExecutor(threads + POPULATING_COUNT, thread_name_prefix="holdfast-restore") as pool:
        for index in range(POPULATING_COUNT):
            pool.submit(populate, source[base : base + payload.nbytes], index)
        for first in range(threads):
            pool.submit(work, range(first, len(blocks), threads))
        ferry.sail(len(blocks))


def _threads(blocks: Sequence[Block]) -> int:
    return min(THREADS_MAX, cores_of_rank(), len(blocks)) or 1


def _by_block(landings: Iterable[Landing], blocks: Sequence[Block]) -> list[list[Landing]]:
    """For each block, the landings of which some bytes lie in it."""
    ends = [end for _, end in blocks]
    found: list[list[Landing]] = [[] for _ in blocks]
    for landing in landings:
        index = bisect_right(ends, landing.start)
        while index < len(blocks) and blocks[index][0] < landing.end:
            found[index].append(landing)
            index += 1
    return found


def _parts(landings: Iterable[Landing], begin: int, end: int) -> Iterator[Landed]:
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
    if len(run) == 1 and _in_order(tensor):
        return Landing(start, size_bytes, _as_bytes(tensor))
    buffer = torch.empty(size_bytes, dtype=torch.uint8, device=device)
    if len(run) == 1:
        local = tensor.detach()
        plan.after.append(lambda: local.copy_(buffer.view(local.dtype).view(local.shape)))
    else:
        plan.after.append(partial(_spread, run, buffer))
    return Landing(start, size_bytes, buffer)


def _spread(run: Sequence[Pair], buffer: torch.Tensor) -> None:
    """Small tensors have arrived side by side: each to its place, in the current stream's order."""
    start = run[0][0].offset
    with torch.cuda.device(buffer.device):
        moves = Moves.of(
            [buffer.data_ptr() + entry.offset - start for entry, _ in run],
            [tensor.data_ptr() for _, tensor in run],
            [entry.size_bytes for entry, _ in run],
            buffer.device,
        )
        if moves is None or not moves.launch():
            places = [buffer[entry.offset - start :][: entry.size_bytes] for entry, _ in run]
            torch._foreach_copy_([_as_bytes(tensor) for _, tensor in run], places)  # as in `lanes`


def runs(pairs: Sequence[Pair]) -> list[list[Pair]]:
    """Pairs in the order of their places: small ones that lie side by side together, every other one alone."""
    found: list[list[Pair]] = []
    end = -1
    for pair in sorted(pairs, key=lambda pair: pair[0].offset):
        entry, tensor = pair
        small = entry.size_bytes < DEVICE_SMALL_BYTES and _in_order(tensor)
        if small and found and entry.offset == end and end - found[-1][0][0].offset < RUN_BYTES_MAX:
            found[-1].append(pair)
        else:
            found.append([pair])
        end = entry.offset + align(entry.size_bytes) if small else -1
    return found


def _in_order(tensor: torch.Tensor) -> bool:
    """Whether its memory is its bytes."""
    return tensor.is_contiguous() and not tensor.is_conj() and not tensor.is_neg()


def _as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().reshape(-1).view(torch.uint8)


def as_payload(payload: memoryview) -> ByteArray:
    """A shard's tensors as bytes, not copied."""
    return np.frombuffer(payload, dtype=np.uint8)
