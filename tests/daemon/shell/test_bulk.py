"""The bulk plane over real sockets, with somebody in the middle who repeats, changes, halves and makes up chunks."""

import queue
import socket
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import zmq
from holdfast.coding import chunk_digest
from holdfast.daemon.core import events
from holdfast.daemon.core.protect import key_of
from holdfast.daemon.shell.bulk import BulkPlane, Outgoing
from holdfast.daemon.shell.sealing import TAG_BYTES, Sealing
from holdfast.protocol import frames, messages
from holdfast.protocol.config import ClusterConfig, NodeConfig
from holdfast.protocol.ids import SnapshotId

DEADLINE_S = 20.0
CHUNK_BYTES = 64 << 10
GREETING = b"\xff" + bytes(8) + b"\x7f" + b"\x03\x00" + b"NULL".ljust(20, b"\0") + b"\0" + bytes(31)
READY = b"\x05READY\x0bSocket-Type\x00\x00\x00\x04PUSH"
CONFIG = ClusterConfig(
    cluster_name="lab",
    nodes=tuple(NodeConfig(name=name, host="127.0.0.1", port=7400 + i, domain=name) for i, name in enumerate("abc")),
    parity=1,
    chunk_bytes=CHUNK_BYTES,
    keys_dir="/keys",
)


class Side:
    """One node's bulk plane, and what it told its core."""

    def __init__(self, mode: str, node: int) -> None:
        config = replace(CONFIG, bulk_mode=mode)
        self.node = node
        self.told: queue.SimpleQueue[events.Event] = queue.SimpleQueue()
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.sealing = Sealing(config, node) if mode == "sealed" else None
        self.plane = BulkPlane(config, node, self.context, self.told.put, self.sealing)
        self.plane.start()

    def close(self) -> None:
        self.plane.stop()
        self.context.destroy(linger=0)

    def send(self, target: int, chunk: int) -> bytes:
        payload = bytes([chunk]) * CHUNK_BYTES
        self.plane.send(Outgoing(target, header(self.node, chunk), memoryview(payload)))
        return payload

    def arrived(self) -> tuple[messages.ChunkHeader, bytes]:
        event = self.told.get(timeout=DEADLINE_S)
        assert isinstance(event, events.ChunkArrived), event
        payload = self.plane.payload(key_of(event.header))
        assert payload is not None
        assert chunk_digest(payload) == event.digest
        return event.header, bytes(payload)

    def refused(self) -> events.PeerRefused:
        event = self.told.get(timeout=DEADLINE_S)
        assert isinstance(event, events.PeerRefused), event
        assert event.by_us
        assert event.text.startswith("on the bulk plane: ")
        return event


class Middle:
    """Somebody between two nodes: what the first sends goes no further unless it is passed on."""

    def __init__(self, port: int) -> None:
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.ear, self.mouth = self.context.socket(zmq.PULL), self.context.socket(zmq.PUSH)
        for one in (self.ear, self.mouth):
            one.setsockopt(zmq.LINGER, 0)
            one.setsockopt(zmq.SNDHWM, 4)  # what waits here would count as the receiver's memory
            one.setsockopt(zmq.RCVTIMEO, int(DEADLINE_S * 1000))
            one.setsockopt(zmq.SNDTIMEO, int(DEADLINE_S * 1000))
        self.port = self.ear.bind_to_random_port("tcp://127.0.0.1")
        self.mouth.connect(f"tcp://127.0.0.1:{port}")

    def hear(self) -> list[bytes]:
        return self.ear.recv_multipart()

    def say(self, parts: list[bytes]) -> None:
        self.mouth.send_multipart(parts)

    def close(self) -> None:
        self.context.destroy(linger=0)


def header(node: int, chunk: int) -> messages.ChunkHeader:
    return messages.ChunkHeader("lab", 1, node, 1, "gpt", SnapshotId(1, 1), node, "data", chunk, reading=False)


@contextmanager
def sides(mode: str) -> Iterator[tuple[Side, Side]]:
    a, b = Side(mode, 0), Side(mode, 1)
    try:
        for _ in range(2):
            for me, other in ((a, b), (b, a)):
                if me.sealing is not None and other.sealing is not None:
                    me.sealing.heard(other.node, other.sealing.offer(me.node))
        a.plane.peer_port(1, b.plane.port)
        b.plane.peer_port(0, a.plane.port)
        yield a, b
    finally:
        a.close()
        b.close()


@pytest.fixture
def sealed() -> Iterator[tuple[Side, Side, Middle]]:
    """Two sides that seal, with somebody in the middle of the way from the first to the second."""
    with sides("sealed") as (a, b):
        middle = Middle(b.plane.port)
        a.plane.peer_port(1, middle.port)
        try:
            yield a, b, middle
        finally:
            middle.close()


def flipped(parts: list[bytes], part: int, offset: int) -> list[bytes]:
    changed = bytearray(parts[part])
    changed[offset] ^= 1
    return [*parts[:part], bytes(changed), *parts[part + 1 :]]


@pytest.mark.parametrize("mode", ["digest", "sealed"])
def test_chunks_go_both_ways_in_order_and_are_let_go(mode: str) -> None:
    with sides(mode) as (a, b):
        sent = [a.send(1, chunk) for chunk in range(40)]
        back = b.send(0, 7)
        assert [b.arrived() for _ in sent] == [(header(0, chunk), payload) for chunk, payload in enumerate(sent)]
        assert a.arrived() == (header(1, 7), back)
        assert len(b.plane._held) == 40
        b.plane.drop(tuple(key_of(header(0, chunk)) for chunk in range(40)))
        assert not b.plane._held


def test_nothing_is_sealed_for_a_peer_that_has_not_said_its_key() -> None:
    """It waits as for a port: what is sent too early would only be refused."""
    a, b = Side("sealed", 0), Side("sealed", 1)
    assert a.sealing is not None
    assert b.sealing is not None
    try:
        a.plane.peer_port(1, b.plane.port)
        payload = a.send(1, 3)
        b.sealing.heard(0, a.sealing.offer(1))
        a.sealing.heard(1, b.sealing.offer(0))
        assert b.arrived() == (header(0, 3), payload)
    finally:
        a.close()
        b.close()


def test_whoever_listens_sees_no_byte_of_a_chunk(sealed: tuple[Side, Side, Middle]) -> None:
    a, b, middle = sealed
    payload = a.send(1, 200)
    seen = middle.hear()
    assert len(seen[1]) == CHUNK_BYTES + TAG_BYTES
    assert not any(payload[:8] in part or b"gpt" in part for part in seen)
    middle.say(seen)
    assert b.arrived() == (header(0, 200), payload)


def test_a_replayed_chunk_gets_nothing(sealed: tuple[Side, Side, Middle]) -> None:
    a, b, middle = sealed
    first, _ = a.send(1, 1), a.send(1, 2)
    one, two = middle.hear(), middle.hear()
    middle.say(one)
    middle.say(one)
    assert b.arrived() == (header(0, 1), first)
    assert b.refused().code == "replayed"
    middle.say(two)
    b.arrived()
    middle.say(one)
    again = b.refused()
    assert again.code == "replayed"
    assert "replayed or out of order" in again.text
    assert len(b.plane._held) == 2


@pytest.mark.parametrize(
    ("part", "offset", "code"),
    [
        (0, 5, "forged"),  # the count
        (0, 12, "key"),  # which key
        (0, 30, "forged"),  # the header
        (0, -1, "forged"),
        (1, 0, "changed"),
        (1, CHUNK_BYTES // 2, "changed"),
        (1, -1, "changed"),
    ],
)
def test_a_bit_flipped_on_the_way_gets_nothing(
    sealed: tuple[Side, Side, Middle], part: int, offset: int, code: str
) -> None:
    a, b, middle = sealed
    a.send(1, 1)
    payload = a.send(1, 2)
    middle.say(flipped(middle.hear(), part, offset))
    assert b.refused().code == code
    assert not b.plane._held
    middle.say(middle.hear())
    assert b.arrived() == (header(0, 2), payload)


def test_half_a_frame_gets_nothing(sealed: tuple[Side, Side, Middle]) -> None:
    a, b, middle = sealed
    payload = a.send(1, 1)
    whole = middle.hear()
    for parts in ([whole[0], whole[1][: CHUNK_BYTES // 2]], [whole[0][:25], whole[1]], whole[:1], whole[1:], [b""]):
        middle.say(parts)
        assert b.refused().code in {"malformed", "forged"}, [len(part) for part in parts]
    middle.say(whole)  # none of those has used its count up
    assert b.arrived() == (header(0, 1), payload)


def test_the_payload_of_another_chunk_gets_nothing(sealed: tuple[Side, Side, Middle]) -> None:
    a, b, middle = sealed
    a.send(1, 1)
    a.send(1, 2)
    one, two = middle.hear(), middle.hear()
    middle.say([one[0], two[1]])
    assert b.refused().code == "changed"


def test_chunks_as_they_are_and_those_of_strangers_get_nothing(sealed: tuple[Side, Side, Middle]) -> None:
    a, b, middle = sealed
    plain = [frames.encode(header(0, 1)), bytes(CHUNK_BYTES)]
    stranger = Sealing(CONFIG, 0)
    assert b.sealing is not None
    stranger.heard(1, frames.BulkOffer("sealed", b.sealing.public, stranger.public))
    for parts, code in (
        (plain, "malformed"),
        ([plain[0], bytes(CHUNK_BYTES + TAG_BYTES)], "malformed"),
        (stranger.seal(1, plain[0], plain[1]), "key"),
    ):
        middle.say(parts)
        assert b.refused().code == code
    payload = a.send(1, 5)
    middle.say(middle.hear())
    assert b.arrived() == (header(0, 5), payload)


def test_a_node_seals_for_itself_only(sealed: tuple[Side, Side, Middle]) -> None:
    """A listed node, with a key that was agreed, that says in a header to be another."""
    a, b, middle = sealed
    assert a.sealing is not None
    middle.say(a.sealing.seal(1, frames.encode(header(2, 1)), bytes(CHUNK_BYTES)))
    lied = b.refused()
    assert lied.code == "node"
    assert "node index 0 sealed a chunk that says it is from node index 2" in lied.text


def test_a_restarted_peer_is_sealed_for_anew(sealed: tuple[Side, Side, Middle]) -> None:
    """What waits for a worker that ended goes to its successor, under the successor's key."""
    a, _, _ = sealed
    successor = Side("sealed", 1)
    assert a.sealing is not None
    assert successor.sealing is not None
    try:
        a.plane.peer_port(1, successor.plane.port)
        a.sealing.heard(1, successor.sealing.offer(0))
        payload = a.send(1, 9)
        successor.sealing.heard(0, a.sealing.offer(1))
        a.sealing.heard(1, successor.sealing.offer(0))
        assert successor.arrived() == (header(0, 9), payload)
    finally:
        successor.close()


def resident_bytes() -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


@pytest.mark.parametrize("mode", ["digest", "sealed"])
def test_a_flood_of_strangers_costs_bounded_memory(mode: str) -> None:
    with sides(mode) as (a, b):
        flood = Middle(b.plane.port)
        halves = [half_a_frame(b.plane.port) for _ in range(50)]
        before_bytes = resident_bytes()
        refused = 0
        try:
            for number in range(2000):
                flood.say([frames.encode(header(2, number))[:-1], bytes(CHUNK_BYTES)])
                refused += drained(b.told)
            waits(lambda: drained(b.told) + refused, "refusals")
            assert resident_bytes() - before_bytes < 32 << 20
            payload = a.send(1, 5)
            while not isinstance(event := b.told.get(timeout=DEADLINE_S), events.ChunkArrived):
                pass
            assert event.header == header(0, 5)
            assert b.plane.payload(key_of(event.header)) == payload
            assert len(b.plane._held) == 1
        finally:
            flood.close()
            for half in halves:
                half.close()


def drained(told: queue.SimpleQueue[events.Event]) -> int:
    count = 0
    while not told.empty():
        event = told.get()
        assert isinstance(event, events.PeerRefused), event
        count += 1
    return count


def waits(look: Callable[[], int], what: str) -> None:
    deadline_s = time.monotonic() + DEADLINE_S
    while not look():
        assert time.monotonic() < deadline_s, what
        time.sleep(0.01)


def half_a_frame(port: int) -> socket.socket:
    """A connection that says it will send a chunk, and stops in the middle."""
    raw = socket.create_connection(("127.0.0.1", port), timeout=5)
    ready = bytes([0x04, len(READY)]) + READY
    raw.sendall(GREETING + ready + b"\x02" + struct.pack(">Q", CHUNK_BYTES) + bytes(1000))
    return raw
