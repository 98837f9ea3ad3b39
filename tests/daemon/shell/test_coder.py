"""The coding threads give the same results however many they are, and orders for one place keep their order."""

from collections.abc import Iterator
from queue import SimpleQueue
from typing import cast

import numpy as np
import pytest
from holdfast.coding import CodeParams, chunk_digest, parity_matrix, select_engine
from holdfast.coding.field import add, multiples_of
from holdfast.coding.fingerprint import naive_fingerprint
from holdfast.daemon.core import actions, events
from holdfast.daemon.core.memory import ChunkKey, Memory, Sizes
from holdfast.daemon.shell.arena import ArenaMemory, SlotMemory
from holdfast.daemon.shell.bulk import BulkPlane, Outgoing
from holdfast.daemon.shell.coder import Coder
from holdfast.daemon.shell.keeping import KeeperLink
from holdfast.protocol import messages
from holdfast.protocol.ids import SnapshotId

CHUNK_BYTES, CHUNKS, PARITY_CHUNKS = 4096, 37, 5
MEMORY = Memory("gpt", 0, 1)
SNAPSHOT = SnapshotId(1, 7)
PARAMS = CodeParams(2, 1)
WAIT_S = 20.0


class Frames:
    """Received frames, as the bulk plane keeps them."""

    def __init__(self) -> None:
        self.kept: dict[ChunkKey, memoryview] = {}
        self.sent: list[Outgoing] = []

    def payload(self, key: ChunkKey) -> memoryview | None:
        return self.kept.get(key)

    def send(self, out: Outgoing) -> None:
        self.sent.append(out)

    def drop(self, keys: tuple[ChunkKey, ...]) -> None:
        for key in keys:
            self.kept.pop(key, None)


class Bench:
    """A coder with memory full of noise, and what it reported."""

    def __init__(self, threads: int) -> None:
        self.frames, self.reported = Frames(), SimpleQueue[events.Event]()
        self.arena = ArenaMemory(KeeperLink(None, []))
        sizes = Sizes(CHUNKS * CHUNK_BYTES, PARITY_CHUNKS * CHUNK_BYTES, digest_count=CHUNKS)
        self.arena.make(MEMORY, sizes)
        slot = self.arena.get(MEMORY)
        assert slot is not None
        self.slot: SlotMemory = slot
        self.slot.data[:] = np.random.default_rng(1).bytes(sizes.data_bytes)
        self.coder = Coder(
            engine=select_engine(None),
            chunk_bytes=CHUNK_BYTES,
            params=PARAMS,
            arena=self.arena,
            bulk=cast("BulkPlane", self.frames),
            report=self.reported.put,
            threads=threads,
        )

    def chunk(self, index: int) -> memoryview:
        return self.slot.data[index * CHUNK_BYTES : (index + 1) * CHUNK_BYTES]

    def key(self, step: int, node: int, chunk: int) -> ChunkKey:
        return ChunkKey("gpt", 1, step, node, "data", chunk, reading=False)


@pytest.fixture(params=[1, 4])
def bench(request: pytest.FixtureRequest) -> Iterator[Bench]:
    made = Bench(request.param)
    yield made
    made.coder.stop()
    made.arena.free(MEMORY)


@pytest.mark.parametrize(("first", "count"), [(0, CHUNKS), (3, 1), (5, 30), (0, 0)])
def test_digests_come_in_order_and_whole(bench: Bench, first: int, count: int) -> None:
    bench.coder.order(actions.DigestChunks(MEMORY, SNAPSHOT, first, count))
    wanted = tuple(chunk_digest(bench.chunk(index)) for index in range(first, first + count))
    assert bench.reported.get(timeout=WAIT_S) == events.ChunksDigested(MEMORY, SNAPSHOT, first, wanted)


def test_verifying_names_the_chunks_that_differ(bench: Bench) -> None:
    digests = [chunk_digest(bench.chunk(index)) for index in range(2, CHUNKS)]
    for index in (2, 11, CHUNKS - 1):
        bench.chunk(index)[0] ^= 1
    bench.coder.order(actions.VerifyChunks(MEMORY, 9, 2, tuple(digests)))
    assert bench.reported.get(timeout=WAIT_S) == events.ChunksVerified(MEMORY, 9, (2, 11, CHUNKS - 1))


def test_the_newest_order_for_a_place_in_memory_is_the_last_to_write_there(bench: Bench) -> None:
    rounds = 40
    for step in range(rounds):
        for parity in range(PARITY_CHUNKS):
            keys = [bench.key(step, node, parity) for node in (0, 1)]
            for node, key in enumerate(keys):
                bench.frames.kept[key] = memoryview(bytes([step + node + parity + 1]) * CHUNK_BYTES)
            sources = tuple(enumerate(keys))
            bench.coder.order(actions.EncodeParity(MEMORY, SnapshotId(1, step), parity, 0, parity, sources))
    found = [bench.reported.get(timeout=WAIT_S) for _ in range(rounds * PARITY_CHUNKS)]
    assert all(isinstance(event, events.ParityEncoded) for event in found)
    row = parity_matrix(PARAMS)[:1]
    for parity in range(PARITY_CHUNKS):
        last = [bytes([rounds - 1 + node + parity + 1]) * CHUNK_BYTES for node in (0, 1)]
        wanted = bytearray(CHUNK_BYTES)
        select_engine("numpy").matmul(row, last, [wanted])
        assert bench.slot.parity[parity * CHUNK_BYTES : (parity + 1) * CHUNK_BYTES] == wanted
    assert not bench.frames.kept


def test_several_own_chunks_enter_one_sum_and_are_vouched_for_together(bench: Bench) -> None:
    factors = {3: 1, 9: 77, 20: 200}
    own = [
        actions.OwnTerm(MEMORY, "data", chunk, chunk_digest(bench.chunk(chunk)), factor)
        for chunk, factor in factors.items()
    ]
    incoming = np.random.default_rng(2).bytes(CHUNK_BYTES)
    key = ChunkKey("gpt", 1, 7, 5, "sum", 40, reading=True)
    header = messages.ChunkHeader("lab", 1, 0, 1, "gpt", SNAPSHOT, 5, "sum", 40, reading=True)
    mine = bytes(CHUNK_BYTES)
    for chunk, factor in factors.items():
        mine = add(mine, bytes(bench.chunk(chunk)).translate(multiples_of(factor)))
    bench.frames.kept[key] = memoryview(incoming)
    gathered = ((5, key),)
    bench.coder.order(actions.AddToSum(6, header, own[0], gathered, witness=own[0].factor, more=tuple(own[1:])))
    assert bench.reported.get(timeout=WAIT_S) == events.SumAdded(header, naive_fingerprint(mine))
    assert bytes(bench.frames.sent[0].payload) == add(mine, incoming.translate(multiples_of(5)))
    assert bench.frames.kept == {}

    bench.frames.kept[key] = memoryview(incoming)  # whoever wants it knows what the others vouched for, not its own
    bench.coder.order(actions.StoreSum(MEMORY, 40, "parity", 1, key, tuple(own), witness=True))
    stored = events.SumStored(MEMORY, 40, chunk_digest(add(mine, incoming)), naive_fingerprint(incoming))
    assert bench.reported.get(timeout=WAIT_S) == stored

    bench.chunk(20)[0] ^= 1
    bench.coder.order(actions.AddToSum(6, header, own[0], (), witness=1, more=tuple(own[1:])))
    failed = bench.reported.get(timeout=WAIT_S)
    assert isinstance(failed, events.SumNotAdded)
    assert "fails its digest" in failed.reason
