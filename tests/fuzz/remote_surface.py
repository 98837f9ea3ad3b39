"""What a trainer over the network says to the gate: headers, words and bytes, and what it must not reach with them.

The gate is the real one, without its thread; what it may write for the trainer is fenced by bytes that must stay.
"""

import random
import socket
import tempfile
from pathlib import Path

import msgspec
import zmq
from fuzz.local_surfaces import timed
from fuzz.mutation import Maker, Mutator
from fuzz.prey import Prey
from fuzz.surface import Surface
from holdfast.coding import chunk_digest
from holdfast.daemon.shell import network
from holdfast.daemon.shell.permits import OPEN_COUNT_MAX, Permits
from holdfast.daemon.shell.remote import RemoteGate, Stay, _header
from holdfast.protocol import frames, messages, remote_messages
from holdfast.protocol.ids import SnapshotId

SLOT_BYTES, START, END = 4096, 1024, 3072  # of the image: a neighbour's bytes, the trainer's own, a neighbour's
FENCE = 0xA5
JOB, GENERATION = "gpt", 7
WRITTEN, READ = SnapshotId(1, 5), SnapshotId(1, 4)


class Gate(Surface):
    """One trainer that was let in; a new one whenever it is refused."""

    def __init__(self, draw: random.Random, prey: Prey) -> None:
        super().__init__("trainers over the network", draw)
        self.spoil, self.maker = Mutator(draw), Maker(draw, {})
        self.folder = tempfile.TemporaryDirectory(prefix="hf-gate")
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port = probe.getsockname()[1]
        self.gate = RemoteGate(f"127.0.0.1:{port}", None, None, Path(self.folder.name) / "door", threads=1)
        names = {kind.__name__ for kind in messages.ClientMessage.__args__}
        self.words = [frame for kind, found in prey.samples.items() if kind in names for frame in found]
        self.other: socket.socket | None = None  # the daemon's end of the trainer's door
        self._let_in()

    def _let_in(self) -> None:
        if not self.gate._stays:  # a connection takes libzmq a while to close: the same one is used again
            self._let_go()
            door, self.other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            door.setblocking(False)
            words = network.gate_words(self.gate._context, f"ipc://{self.folder.name}/words", "token")
            self.stay = Stay(b"trainer", "fuzz", door, words)
            self.gate._stays[self.stay.identity] = self.stay
            for one in (door.fileno(), words):
                self.gate._poller.register(one, network.READABLE)
        self.image = bytearray([FENCE]) * SLOT_BYTES
        self.stay.permits = Permits()
        self.stay.maps[JOB, 0] = self.stay.maps[JOB, 1] = (GENERATION, memoryview(self.image))
        for told in (
            messages.PlanAccepted(JOB, 1, 0, START, END - START),
            messages.Granted(JOB, WRITTEN, 0, GENERATION),
            messages.ShardOpened(JOB, READ, 0, 1, GENERATION, START, END - START),
        ):
            self.stay.permits.told(told)

    def _let_go(self) -> None:
        self.gate._end_all("")
        if self.other is not None:
            self.other.close()

    def make(self) -> bytes:
        """The frames of one message, as a list in msgpack."""
        draw = self.draw
        match draw.randrange(4):
            case 0:
                header, body = frames.encode(remote_messages.Said()), draw.choice(self.words)
                parts = [header, self.spoil.frame(body, self.words) if draw.random() < 0.5 else body]
            case 1:
                start, length = draw.randrange(SLOT_BYTES), draw.choice((1, 64, 1024, SLOT_BYTES))
                body = draw.randbytes(length)
                digest = frames.pack_digests((chunk_digest(body),)) if draw.random() < 0.9 else bytes(8)
                parts = [frames.encode(remote_messages.Put(1, JOB, draw.randrange(2), GENERATION, start, digest)), body]
            case 2:
                start, length = draw.randrange(SLOT_BYTES), draw.choice((1, 64, 1024, SLOT_BYTES))
                parts = [frames.encode(remote_messages.Get(1, JOB, draw.randrange(2), GENERATION, start, length))]
            case _:
                kind = draw.choice(remote_messages.TrainerMessage.__args__)
                parts = [msgspec.msgpack.encode(self.maker.make(kind)), *([b"x"] * draw.randrange(3))]
        if draw.random() < 0.3:
            spoilt = draw.randrange(len(parts))
            parts[spoilt] = self.spoil.cut(parts[spoilt], parts)
        return msgspec.msgpack.encode(parts)

    def feed(self, made: bytes) -> str:
        parts = [zmq.Frame(b"trainer"), *(zmq.Frame(part) for part in msgspec.msgpack.decode(made, type=list[bytes]))]
        ended = ""
        with timed(self):
            try:
                self.gate._obey(self.stay, _header(parts), parts)
            except frames.FrameRefusedError as refusal:
                ended = refusal.code
        fences = self.image[:START] + self.image[END:]
        assert fences.count(FENCE) == len(fences), "another rank's bytes were written"
        assert len(self.stay.permits.writing) <= OPEN_COUNT_MAX
        if ended or self.stay.identity not in self.gate._stays or not self.stay.permits.writing:
            self._let_in()
        return ended

    def close(self) -> None:
        self._let_go()
        self.gate.stop()
        self.folder.cleanup()
