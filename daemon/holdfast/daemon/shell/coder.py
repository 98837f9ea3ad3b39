"""Work on bytes, off the loop's thread: digests, parity, rebuilding, verifying, and populating memory.

Covers carrying out actions that touch many bytes; each ends in an event. Threads of their own code, and one makes
memory, so that a job that attaches never delays the protection of another. Work on memory that was freed meanwhile does
nothing.
"""

import logging
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import msgspec
import numpy as np
from holdfast.coding import FINGERPRINT_BYTES, CodeParams, Engine, chunk_digest, parity_matrix, scaled_fingerprint
from holdfast.daemon.core import actions, events
from holdfast.daemon.core.memory import ChunkKey
from holdfast.daemon.shell.arena import ArenaMemory
from holdfast.daemon.shell.bulk import BulkPlane, Outgoing
from holdfast.protocol.exit_codes import ExitCode

log = logging.getLogger(__name__)

A = TypeVar("A", bound=actions.Action)


CODING_THREADS_MAX = 4  # digests and parity at 10 GB/s each: four of them feed the fastest network there is
CORES_PER_CODING_THREAD = 4  # training comes first


def coding_threads() -> int:
    """How many threads may code on this machine: a quarter of the cores that this process may use, at least one."""
    return max(1, min(CODING_THREADS_MAX, len(os.sched_getaffinity(0)) // CORES_PER_CODING_THREAD))


class Coder:
    """The coding threads and the engine.

    Orders for the same place in memory, data chunk or parity chunk, go to the same thread and so keep their order. Long
    reads (digests, verifying) are cut into parts, one for each thread.
    """

    def __init__(  # noqa: PLR0913  # all but the engine and its code are what it works between
        self,
        *,
        engine: Engine,
        chunk_bytes: int,
        params: CodeParams,
        arena: ArenaMemory,
        bulk: BulkPlane,
        report: Callable[[events.Event], None],
        threads: int = 1,
    ) -> None:
        self._engine, self._chunk_bytes, self._params = engine, chunk_bytes, params
        self._arena, self._bulk, self._report = arena, bulk, report
        self.worked: Callable[[actions.Action, float], None] = lambda _action, _seconds: None  # who wants to know
        self._coding = [ThreadPoolExecutor(max_workers=1, thread_name_prefix=f"coder-{n}") for n in range(threads)]
        # With one thread all work queues up behind each other; with more, a long read must not hold up parity.
        self._reading = ThreadPoolExecutor(max_workers=1, thread_name_prefix="read") if threads > 1 else self._coding[0]
        self._parts = ThreadPoolExecutor(max_workers=threads, thread_name_prefix="part")
        self._making = ThreadPoolExecutor(max_workers=1, thread_name_prefix="memory")

    def order(self, action: actions.Action) -> bool:
        """Queue the work of an action; False if it is none of ours. The core's credits bound what is queued."""
        match action:
            case actions.Allocate():
                self._run(self._making, self._allocate, action)
            case actions.DigestChunks():
                self._run(self._reading, self._digest, action)
            case actions.VerifyChunks():
                self._run(self._reading, self._verify, action)
            case actions.EncodeParity():
                self._run(self._thread_of(action.parity_index), self._encode, action)
            case actions.ServeChunk():
                self._run(self._thread_of(action.header.chunk), self._serve, action)
            case actions.AddToSum():
                self._run(self._thread_of(action.header.chunk), self._add, action)
            case actions.StoreSum():
                self._run(self._thread_of(action.chunk), self._store, action)
            case _:
                return False
        return True

    def _thread_of(self, chunk: int) -> ThreadPoolExecutor:
        return self._coding[chunk % len(self._coding)]

    def _run(self, pool: ThreadPoolExecutor, work: Callable[[A], None], action: A) -> None:
        pool.submit(self._guarded, work, action)

    def _guarded(self, work: Callable[[A], None], action: A) -> None:
        started_s = time.monotonic()
        try:
            work(action)
            self.worked(action, time.monotonic() - started_s)
        except Exception:  # the edge of this thread: a bug here must be seen, and must not leave a snapshot waiting
            log.exception("bug: %s failed; the worker ends, its keeper starts another on the same memory", action)
            logging.shutdown()
            os._exit(ExitCode.BUG)

    def stop(self) -> None:
        """Let the running work end and take no more."""
        for pool in (self._reading, *self._coding, self._parts):
            pool.shutdown(wait=True, cancel_futures=True)
        self._making.shutdown(wait=True, cancel_futures=True)

    def _allocate(self, action: actions.Allocate) -> None:
        try:
            self._arena.make(action.memory, action.sizes)
        except OSError as error:
            self._report(events.MemoryFailed(action.memory, str(error)))
        else:
            self._report(events.MemoryReady(action.memory))

    def _chunk(self, data: memoryview, chunk: int) -> memoryview:
        return data[chunk * self._chunk_bytes : (chunk + 1) * self._chunk_bytes]

    def _digest(self, action: actions.DigestChunks) -> None:
        slot = self._arena.get(action.memory)
        if slot is None:
            return
        digests = self._digests(slot.data, range(action.first_chunk, action.first_chunk + action.count))
        self._report(events.ChunksDigested(action.memory, action.snapshot, action.first_chunk, digests))

    def _encode(self, action: actions.EncodeParity) -> None:
        slot = self._arena.get(action.memory)
        payloads = [self._bulk.payload(key) for _, key in action.sources]
        sources = [payload for payload in payloads if payload is not None]
        if slot is None or len(sources) < len(payloads):
            return  # freed or dropped meanwhile; the snapshot is gone, or the sender sends again
        parity = self._chunk(slot.parity, action.parity_index)
        columns = [position for position, _ in action.sources]
        row = parity_matrix(self._params)[action.row : action.row + 1, columns]
        self._engine.matmul(row, sources, [parity])
        self._bulk.drop(tuple(key for _, key in action.sources))
        self._report(events.ParityEncoded(action.memory, action.snapshot, action.stripe, chunk_digest(parity)))

    def _verify(self, action: actions.VerifyChunks) -> None:
        slot = self._arena.get(action.memory)
        if slot is None:
            return
        source = slot.data if action.kind == "data" else slot.parity
        chunks = range(action.first_chunk, action.first_chunk + len(action.digests))
        found = zip(chunks, action.digests, self._digests(source, chunks), strict=True)
        bad = tuple(chunk for chunk, digest, read in found if digest != read)
        self._report(events.ChunksVerified(action.memory, action.ticket, bad))

    def _digests(self, data: memoryview, chunks: range) -> tuple[int, ...]:
        """The digests of consecutive chunks, read by all threads at once."""

        def part(some: range) -> list[int]:
            return [chunk_digest(self._chunk(data, chunk)) for chunk in some]

        count = len(self._coding)
        if count == 1:
            return tuple(part(chunks))
        share = -(-len(chunks) // count)
        parts = self._parts.map(part, [chunks[start : start + share] for start in range(0, len(chunks), share or 1)])
        return tuple(digest for found in parts for digest in found)

    def _own(self, term: actions.OwnTerm) -> memoryview | None:
        """A chunk at rest, None if it is gone or fails its digest."""
        slot = self._arena.get(term.memory)
        if slot is None:
            return None
        chunk = self._chunk(slot.data if term.kind == "data" else slot.parity, term.chunk)
        return chunk if chunk_digest(chunk) == term.digest else None

    def _add(self, action: actions.AddToSum) -> None:
        terms = (action.own, *action.more)
        own = [chunk for term in terms if (chunk := self._own(term)) is not None]
        incoming = [(factor, self._bulk.payload(key)) for factor, key in action.incoming]
        keys = tuple(key for _, key in action.incoming)
        if len(own) < len(terms) or any(payload is None for _, payload in incoming):
            lacks = len(own) < len(terms)
            reason = "its chunk fails its digest at rest, or is gone" if lacks else "what was gathered is gone"
            self._bulk.drop(keys)
            self._report(events.SumNotAdded(action.header, reason))
            return
        if not incoming and len(own) == 1 and action.own.factor == 1:
            total, digest = own[0], action.own.digest
        else:
            total = np.empty(self._chunk_bytes, dtype=np.uint8).data
            self._combine([*incoming, *((term.factor, c) for term, c in zip(terms, own, strict=True))], total)
            digest = chunk_digest(total)
        incoming.clear()
        self._bulk.drop(keys)
        header = msgspec.structs.replace(action.header, digest=digest)
        self._bulk.send(Outgoing(action.node, header, total))
        if action.witness:
            factors = [action.witness, *(term.factor for term in action.more)]
            self._report(events.SumAdded(action.header, self._vouched(list(zip(factors, own, strict=True)))))

    def _vouched(self, terms: Sequence[tuple[int, memoryview]]) -> bytes:
        """The fingerprint of a sum: fingerprints are linear, so it is the sum of its terms' fingerprints."""
        total = 0
        for factor, chunk in terms:
            total ^= int.from_bytes(scaled_fingerprint(self._engine.fingerprint(chunk), factor), "little")
        return total.to_bytes(FINGERPRINT_BYTES, "little")

    def _store(self, action: actions.StoreSum) -> None:
        slot = self._arena.get(action.memory)
        own = [(term.factor, self._own(term)) for term in action.own]
        incoming = None if action.incoming is None else self._bulk.payload(action.incoming)
        if slot is None or any(chunk is None for _, chunk in own) or (incoming is None and action.incoming is not None):
            reason = "the memory, the frame or an own chunk is gone, or fails its digest at rest"
            self._drop_frame(action.incoming)
            self._report(events.SumNotStored(action.memory, action.number, reason))
            return
        place = self._chunk(slot.data if action.kind == "data" else slot.parity, action.chunk)
        self._combine([(1, incoming), *own], place)
        self._drop_frame(action.incoming)
        there = [(factor, chunk) for factor, chunk in own if chunk is not None]
        fingerprint = self._vouched([(1, place), *there]) if action.witness else b""
        self._report(events.SumStored(action.memory, action.number, chunk_digest(place), fingerprint))

    def _combine(self, terms: Sequence[tuple[int, memoryview | None]], place: memoryview) -> None:
        """Write the sum of factor times chunk over all that are there."""
        found = [(factor, chunk) for factor, chunk in terms if chunk is not None]
        if len(found) == 1 and found[0][0] == 1:
            place[:] = found[0][1]
            return
        row = np.array([[factor for factor, _ in found]], dtype=np.uint8)
        self._engine.matmul(row, [chunk for _, chunk in found], [place])

    def _drop_frame(self, key: ChunkKey | None) -> None:
        if key is not None:
            self._bulk.drop((key,))

    def _serve(self, action: actions.ServeChunk) -> None:
        slot = self._arena.get(action.memory)
        if slot is None:
            self._report(events.ChunkNotServed(action.node, action.header))
            return
        source = slot.data if action.header.kind == "data" else slot.parity
        chunk = source[action.offset_bytes : action.offset_bytes + self._chunk_bytes]
        if chunk_digest(chunk) != action.digest:
            self._report(events.ChunkNotServed(action.node, action.header))
            return
        self._bulk.send(Outgoing(action.node, action.header, chunk))
