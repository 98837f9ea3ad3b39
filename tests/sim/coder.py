"""The coding thread of a simulated worker: one queue, one order at a time, real bytes.

Products are looked up in `bytes.translate` tables and sums are one big XOR: for chunks of a few dozen bytes that is
faster than any engine, and it checks the engines' matrices with arithmetic of its own.
"""

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import msgspec
from holdfast.coding import CodeParams, chunk_digest, decode_matrix, parity_matrix, scaled_fingerprint
from holdfast.coding.field import multiples_of
from holdfast.coding.fingerprint import naive_fingerprint
from holdfast.daemon.core import actions, events
from holdfast.daemon.core.memory import ChunkKey, Memory

from sim.resting import drilled, repaired, scrubbed

if TYPE_CHECKING:
    from sim.machine import Worker

CODING_ORDERS = (
    actions.DigestChunks,
    actions.EncodeParity,
    actions.VerifyChunks,
    actions.ServeChunk,
    actions.ScrubChunks,
    actions.RepairChunk,
    actions.AddToSum,
    actions.StoreSum,
    actions.DrillStripe,
)


@dataclass(slots=True)
class Held:
    """A slot's memory, as the keeper holds it: it outlives workers and trainers."""

    data: bytearray
    parity: bytearray
    digests: list[int]

    @property
    def held_bytes(self) -> int:
        """What it counts against the budget."""
        return len(self.data) + len(self.parity) + 8 * len(self.digests)


def combine(coefficients: Sequence[int], chunks: Sequence[bytes | bytearray | memoryview], size: int) -> bytes:
    """The sum of products over GF(2^8): bytes of one chunk."""
    total = 0
    for coefficient, chunk in zip(coefficients, chunks, strict=True):
        total ^= int.from_bytes(bytes(chunk).translate(multiples_of(coefficient)), "little")
    return total.to_bytes(size, "little")


def vouched(factors: Sequence[int], chunks: Sequence[bytes]) -> bytes:
    """The linear fingerprint of a sum."""
    terms = [scaled_fingerprint(naive_fingerprint(c), factor) for factor, c in zip(factors, chunks, strict=True)]
    return combine([1] * len(terms), terms, len(terms[0]))


@cache
def parity_row(params: CodeParams, row: int) -> tuple[int, ...]:
    """The coefficients of one parity row, by data position."""
    return tuple(int(value) for value in parity_matrix(params)[row])


@cache
def decode_rows(params: CodeParams, available: tuple[int, ...], wanted: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    """Coefficients that make the wanted chunks from the available ones: a row for each, in order."""
    found = decode_matrix(params, available=available, wanted=wanted)
    return tuple(tuple(int(value) for value in row) for row in found)


class Coder:
    """One coding thread: it takes its inputs when it starts an order, and its result shows when it ends."""

    def __init__(self, worker: "Worker", params: CodeParams) -> None:
        self.worker, self.params, self.world = worker, params, worker.world
        self.orders: deque[actions.Action] = deque()
        self.busy = False

    def order(self, action: actions.Action) -> None:
        """Queue one piece of work."""
        self.orders.append(action)
        self._next()

    @property
    def idle(self) -> bool:
        """Whether nothing is queued or under way."""
        return not self.busy and not self.orders

    def _next(self) -> None:
        if self.busy or not self.orders or self.worker.dead:
            return
        self.busy = True
        finish = self._begin(self.orders.popleft())

        def end() -> None:
            self.busy = False
            if self.worker.dead:
                return
            event = finish()
            if event is not None:
                self.worker.put(event, 0.001)
            self._next()

        self.world.after(self.world.between(0.0001, self.worker.machine.coding_s_max), end)

    def chunk(self, data: bytearray, chunk: int) -> memoryview:
        """A chunk's place."""
        size = self.worker.machine.config.chunk_bytes
        return memoryview(data)[chunk * size : (chunk + 1) * size]

    def _begin(self, action: actions.Action) -> Callable[[], events.Event | None]:
        if isinstance(action, actions.AddToSum):
            return lambda: self._add_to_sum(action)
        if isinstance(action, actions.StoreSum):
            return lambda: self._store_sum(action)
        memory = getattr(action, "memory", None)
        assert isinstance(memory, Memory)
        held = self.worker.machine.held.get(memory)
        match action:
            case actions.ServeChunk():
                return lambda: self._serve(action, held)
            case actions.RepairChunk() if held is None or any(
                key not in self.worker.frames for _, key in action.sources
            ):
                return lambda: events.ChunkNotRepaired(memory, action.number)
            case _ if held is None:
                return lambda: None
            case actions.DigestChunks(_, snapshot, first, count):
                digests = tuple(chunk_digest(self.chunk(held.data, chunk)) for chunk in range(first, first + count))
                return lambda: events.ChunksDigested(memory, snapshot, first, digests)
            case actions.VerifyChunks(_, ticket, first, expected, kind):
                resting = held.data if kind == "data" else held.parity
                bad = tuple(
                    chunk
                    for chunk, digest in enumerate(expected, start=first)
                    if chunk_digest(self.chunk(resting, chunk)) != digest
                )
                return lambda: events.ChunksVerified(memory, ticket, bad)
            case actions.ScrubChunks():
                return lambda: scrubbed(action, held.data, held.parity, self.worker.machine.config.chunk_bytes)
            case actions.EncodeParity() | actions.RepairChunk() | actions.DrillStripe():
                payloads = {position: self.worker.frames.get(key) for position, key in action.sources}
                if any(payload is None for payload in payloads.values()):
                    return lambda: None
                sources = {position: payload for position, payload in payloads.items() if payload is not None}
                if isinstance(action, actions.EncodeParity):
                    return lambda: self._encode(action, held, sources)
                if isinstance(action, actions.DrillStripe):
                    return lambda: self._drill(action, held, sources)
                return lambda: self._repair(action, held, sources)
            case _:
                raise AssertionError(action)

    def _serve(self, action: actions.ServeChunk, held: Held | None) -> events.Event | None:
        if held is not None:
            source = memoryview(held.data if action.header.kind == "data" else held.parity)
            chunk = source[action.offset_bytes : action.offset_bytes + self.worker.machine.config.chunk_bytes]
            if chunk_digest(chunk) == action.digest:
                self.worker.send_chunk(action.node, action.header, chunk)
                return None
        return events.ChunkNotServed(action.node, action.header)

    def _own(self, term: actions.OwnTerm) -> bytes | None:
        held = self.worker.machine.held.get(term.memory)
        chunk = bytes(self.chunk(held.data if term.kind == "data" else held.parity, term.chunk)) if held else b""
        return chunk if held and chunk_digest(chunk) == term.digest else None

    def _take(self, key: ChunkKey | None) -> tuple[list[bytes], bool]:
        """The sum so far as a list of one, of none where the sum begins; and whether it is missing."""
        frame = None if key is None else self.worker.frames.pop(key, None)
        return ([] if frame is None else [frame]), key is not None and frame is None

    def _add_to_sum(self, action: actions.AddToSum) -> events.Event | None:
        terms = (action.own, *action.more)
        own, gathered = [self._own(term) for term in terms], [self._take(key) for _, key in action.incoming]
        found = [chunk for chunk in own if chunk is not None]
        if len(found) < len(terms) or any(missing for _, missing in gathered):
            return events.SumNotAdded(action.header, "a chunk is gone or bad")
        factors = [*(term.factor for term in terms), *(factor for factor, _ in action.incoming)]
        total = combine(factors, [*found, *(frame for frames, _ in gathered for frame in frames)], len(found[0]))
        header = msgspec.structs.replace(action.header, digest=chunk_digest(total))
        self.worker.send_chunk(action.node, header, memoryview(total))
        told = [action.witness, *(term.factor for term in action.more)]
        return events.SumAdded(action.header, vouched(told, found)) if action.witness else None

    def _store_sum(self, action: actions.StoreSum) -> events.Event:
        held = self.worker.machine.held.get(action.memory)
        (incoming, missing), own = self._take(action.incoming), [self._own(term) for term in action.own]
        found = [chunk for chunk in own if chunk is not None]
        if held is None or missing or len(found) < len(own):
            return events.SumNotStored(action.memory, action.number, "a chunk is gone or bad")
        place = self.chunk(held.data if action.kind == "data" else held.parity, action.chunk)
        factors = [*(1 for _ in incoming), *(term.factor for term in action.own)]
        place[:] = combine(factors, [*incoming, *found], len(place))
        own_factors = [term.factor for term in action.own]
        fingerprint = vouched([1, *own_factors], [bytes(place), *found]) if action.witness else b""
        return events.SumStored(action.memory, action.number, chunk_digest(place), fingerprint)

    def _drop(self, sources: tuple[tuple[int, object], ...]) -> None:
        for _, key in sources:
            self.worker.frames.pop(key, None)  # type: ignore[call-overload]  # keys of any kind are looked up

    def _encode(self, action: actions.EncodeParity, held: Held, sources: Mapping[int, bytes]) -> events.Event:
        place, row = self.chunk(held.parity, action.parity_index), parity_row(self.params, action.row)
        place[:] = combine([row[position] for position in sources], list(sources.values()), len(place))
        self._drop(action.sources)
        return events.ParityEncoded(action.memory, action.snapshot, action.stripe, chunk_digest(place))

    def _drill(self, action: actions.DrillStripe, held: Held, sources: dict[int, bytes]) -> events.Event:
        self._drop(action.sources)
        return drilled(action, held.data, held.parity, self.params, sources)

    def _repair(self, action: actions.RepairChunk, held: Held, sources: dict[int, bytes]) -> events.Event:
        self._drop(action.sources)
        return repaired(action, held.data, held.parity, self.params, sources)
