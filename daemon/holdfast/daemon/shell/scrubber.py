"""Reading, repairing and drilling with resting chunks, on a thread that steps back for everything else.

Covers carrying out `ScrubChunks`, `RepairChunk` and `DrillStripe`. The thread has the lowest priority that the kernel
gives, and pauses after each order so that it uses no more than its share of one core: training and protection come
first.
"""

import logging
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from holdfast.coding import CodeParams, Engine, chunk_digest, decode_matrix, parity_matrix
from holdfast.daemon.core import actions, events
from holdfast.daemon.core.health import Resting
from holdfast.daemon.shell.arena import ArenaMemory, SlotMemory
from holdfast.daemon.shell.bulk import BulkPlane
from holdfast.daemon.shell.drilling import drill
from holdfast.protocol.config import ClusterConfig
from holdfast.protocol.exit_codes import ExitCode

log = logging.getLogger(__name__)

_NICENESS = 19
_PAUSE_S_MAX = 1.0  # after one order: bounds how long a stop waits, and how far one slow read throws a pass back


class Scrubber:
    """One thread."""

    def __init__(
        self,
        config: ClusterConfig,
        *,
        engine: Engine,
        params: CodeParams,
        arena: ArenaMemory,
        bulk: BulkPlane,
        report: Callable[[events.Event], None],
    ) -> None:
        self._engine, self._chunk_bytes, self._params = engine, config.chunk_bytes, params
        self._arena, self._bulk, self._report = arena, bulk, report
        self._pause_per_s = 100 / config.scrub_cpu_percent - 1
        self._stopping = threading.Event()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="scrub", initializer=_step_back)

    def order(self, action: actions.Action) -> bool:
        """Queue the work of an action; False if it is none of ours. The core orders one batch after the other."""
        match action:
            case actions.ScrubChunks() | actions.RepairChunk() | actions.DrillStripe():
                self._thread.submit(self._guarded, action)
            case _:
                return False
        return True

    def stop(self) -> None:
        """Let the running work end and take no more."""
        self._stopping.set()
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _guarded(self, action: actions.ScrubChunks | actions.RepairChunk | actions.DrillStripe) -> None:
        try:
            if isinstance(action, actions.RepairChunk):
                self._repair(action)
                return
            started_ns = time.thread_time_ns()
            if isinstance(action, actions.DrillStripe):
                self._drill(action)
            else:
                self._scrub(action)
            worked_s = (time.thread_time_ns() - started_ns) / 1e9
            self._stopping.wait(min(_PAUSE_S_MAX, worked_s * self._pause_per_s))
        except Exception:  # the edge of this thread: a bug here must be seen
            log.exception("bug: %s failed; the worker ends, its keeper starts another on the same memory", action)
            logging.shutdown()
            os._exit(ExitCode.BUG)

    def _scrub(self, action: actions.ScrubChunks) -> None:
        slot = self._arena.get(action.memory)
        if slot is None:
            return
        bad: list[Resting] = []
        fingerprints: list[bytes] = []
        for wanted, digest in action.chunks:
            chunk = self._chunk(slot, wanted.kind, wanted.chunk)
            right = chunk_digest(chunk) == digest
            if not right:
                bad.append(wanted)
            if action.fingerprints:
                fingerprints.append(self._engine.fingerprint(chunk) if right else b"")
        found = events.ChunksScrubbed(action.memory, action.snapshot, action.ticket, tuple(bad), tuple(fingerprints))
        self._report(found)

    def _drill(self, action: actions.DrillStripe) -> None:
        slot = self._arena.get(action.memory)
        payloads = [self._bulk.payload(key) for _, key in action.sources]
        chunks = {p: payload for (p, _), payload in zip(action.sources, payloads, strict=True) if payload is not None}
        if slot is None or len(chunks) < len(payloads):
            return
        position, own, digest = action.own
        chunks[position] = memoryview(bytes(self._chunk(slot, own.kind, own.chunk)))  # it may be given up meanwhile
        found = drill(self._engine, self._params, action, chunks, own_good=chunk_digest(chunks[position]) == digest)
        self._bulk.drop(tuple(key for _, key in action.sources))
        wrong, coded_ns = found
        self._report(
            events.StripeDrilled(
                action.memory, action.snapshot, action.stripe, wrong, coded_ns, pattern_count=len(action.patterns)
            )
        )

    def _chunk(self, slot: SlotMemory, kind: str, chunk: int) -> memoryview:
        source = slot.data if kind == "data" else slot.parity
        return source[chunk * self._chunk_bytes : (chunk + 1) * self._chunk_bytes]

    def _repair(self, action: actions.RepairChunk) -> None:
        slot = self._arena.get(action.memory)
        payloads = [self._bulk.payload(key) for _, key in action.sources]
        sources = {p: payload for (p, _), payload in zip(action.sources, payloads, strict=True) if payload is not None}
        if slot is None or len(sources) < len(payloads):
            # Freed or dropped meanwhile; the core asks again when it has waited long enough.
            self._report(events.ChunkNotRepaired(action.memory, action.number))
            return
        place = self._chunk(slot, action.kind, action.chunk)
        repaired = recompute(self._engine, self._params, action, sources, self._chunk_bytes)
        good = repaired is not None
        changed = repaired is not None and repaired != place
        if repaired is not None and changed:
            place[:] = repaired
        self._bulk.drop(tuple(key for _, key in action.sources))
        wanted = Resting(action.kind, action.chunk)
        self._report(
            events.ChunkRepaired(
                action.memory, action.snapshot, wanted, chunk_digest(place), good, changed, action.number
            )
        )


def recompute(
    engine: Engine,
    params: CodeParams,
    action: actions.RepairChunk,
    sources: dict[int, memoryview],
    chunk_bytes: int,
) -> bytearray | None:
    """The chunk that a repair wants, from its sources by position; None if something does not have its digest."""
    found: dict[int, memoryview | bytearray] = dict(sources)
    available = sorted([*sources, *action.zero_positions])
    lacking = [position for position, _ in action.missing]
    if lacking:
        rows = decode_matrix(params, available=available, wanted=lacking)
        columns = [i for i, position in enumerate(available) if position in found]
        outputs = [bytearray(chunk_bytes) for _ in lacking]
        factors = np.ascontiguousarray(rows[:, columns])
        engine.matmul(factors, [found[available[i]] for i in columns], outputs)
        found |= dict(zip(lacking, outputs, strict=True))
    if any(chunk_digest(found[position]) != digest for position, digest in action.missing):
        return None
    if action.kind == "data":
        made = found[action.wanted_position]
        assert isinstance(made, bytearray)
        return made
    parity = bytearray(chunk_bytes)
    data = [position for position in sorted(found) if position < params.data_count]
    row = parity_matrix(params)[action.wanted_position - params.data_count, data].reshape(1, -1)
    engine.matmul(row, [found[position] for position in data], [parity])
    return parity if action.digest in {None, chunk_digest(parity)} else None


def _step_back() -> None:
    """Give the calling thread the lowest priority; on Linux niceness is a thread's own."""
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)
