"""The wires to the daemon: a Unix socket for arrival, memory and life signs, ZeroMQ for messages; or ZeroMQ alone.

The client's one user of zmq.

Covers connecting, sending, receiving with a bound on every wait, and mapping the memory that the daemon hands over. All
methods on one thread. The connection's end raises LinkLostError wherever it is noticed.
"""

import contextlib
import ctypes
import math
import mmap
import os
import select
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from pathlib import Path
from time import monotonic

import zmq
from holdfast.client.errors import DaemonUnreachableError
from holdfast.client.session import Session
from holdfast.protocol import frames, limits, messages
from holdfast.protocol.cadence import Cadence
from zmq.utils.monitor import recv_monitor_message

Poller = zmq.Poller
Place = tuple[str, int, int]  # job, slot, generation: one piece of memory

_HELLO_S = limits.CLIENT_HELLO_S
_MADV_POPULATE_WRITE = 23  # Linux 5.14; not named by the mmap module of Python 3.11
_TCP_OPTIONS = {
    zmq.LINGER: 0, zmq.HEARTBEAT_IVL: 1000, zmq.HEARTBEAT_TIMEOUT: 3000, zmq.TCP_MAXRT: 3000, zmq.HANDSHAKE_IVL: 5000,
    zmq.CONNECT_TIMEOUT: 2000, zmq.RECONNECT_IVL: -1,
    zmq.MAXMSGSIZE: max(limits.CONTROL_FRAME_BYTES_MAX, limits.REMOTE_PIECE_BYTES_MAX) + (64 << 10),
}  # fmt: skip
_libc = ctypes.CDLL(None)  # mmap's own madvise would hold the interpreter lock meanwhile


class LinkLostError(DaemonUnreachableError):
    """The daemon closed the connection or died."""


@dataclass(frozen=True, slots=True)
class WireKeys:
    """CURVE keys of a connection over the network, Z85: our own pair, and the public key that the node must have."""

    public: bytes
    secret: bytes
    server: bytes


class WireState(Enum):
    """How far a connection over the network has come. The last two are final: it never connects again by itself."""

    CONNECTING = auto()
    UP = auto()
    NOT_LISTED = auto()  # the node does not list our key
    REFUSED = auto()  # the handshake failed for another reason: another key than expected, or one side has none
    ENDED = auto()


class Wire:
    """One ZeroMQ connection over the network. What is lost with it is not sent again: a new one is another connection.

    Heartbeats end it within seconds where the other side is silent.
    """

    def __init__(self, endpoint: str, keys: WireKeys | None) -> None:
        self.state = WireState.CONNECTING
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context(io_threads=1)
        self._dealer = self._context.socket(zmq.DEALER)
        for option, value in _TCP_OPTIONS.items():
            self._dealer.setsockopt(option, value)
        self._dealer.setsockopt(zmq.IPV6, int("[" in endpoint))
        if keys is not None:
            self._dealer.setsockopt(zmq.CURVE_PUBLICKEY, keys.public)
            self._dealer.setsockopt(zmq.CURVE_SECRETKEY, keys.secret)
            self._dealer.setsockopt(zmq.CURVE_SERVERKEY, keys.server)
        self._monitor = self._dealer.get_monitor_socket()
        self._dealer.connect(endpoint)

    def register(self, poller: zmq.Poller) -> None:
        """Add what is read to a poller."""
        poller.register(self._dealer, zmq.POLLIN)
        poller.register(self._monitor, zmq.POLLIN)

    def wait(self, timeout_s: float) -> None:
        """Until something has come, or become of the connection."""
        poller = zmq.Poller()
        self.register(poller)
        poller.poll(math.ceil(max(timeout_s, 0.0) * 1000))

    def look(self) -> WireState:
        """Take in what has become of the connection."""
        while self._monitor.poll(0):
            event = int(recv_monitor_message(self._monitor)["event"])
            if self.state not in (WireState.CONNECTING, WireState.UP):
                continue
            if event == zmq.Event.HANDSHAKE_SUCCEEDED:
                self.state = WireState.UP
            elif event == zmq.Event.HANDSHAKE_FAILED_AUTH:
                self.state = WireState.NOT_LISTED
            elif event in (zmq.Event.HANDSHAKE_FAILED_PROTOCOL, zmq.Event.HANDSHAKE_FAILED_NO_DETAIL):
                self.state = WireState.REFUSED
            elif event in (zmq.Event.DISCONNECTED, zmq.Event.CLOSED, zmq.Event.CONNECT_RETRIED):
                self.state = WireState.ENDED
        return self.state

    def send(self, parts: Sequence[bytes | memoryview]) -> bool:
        """Send without copying: what is sent must not change until its answer is here. False: there is no room."""
        try:
            self._dealer.send_multipart(parts, zmq.DONTWAIT, copy=False)
        except zmq.Again:
            return False
        return True

    def receive(self) -> list[memoryview] | None:
        """The frames of one message as libzmq holds them, None if there is none."""
        try:
            return [frame.buffer for frame in self._dealer.recv_multipart(zmq.DONTWAIT, copy=False)]
        except zmq.Again:
            return None

    def close(self) -> None:
        """Close at once; what is still queued is lost."""
        self._dealer.disable_monitor()
        self._monitor.close(0)
        self._dealer.close(0)
        self._context.destroy(linger=0)


class Link:
    """One connection to a daemon of this host, whose memory is mapped."""

    transport = "shared memory"
    path: Path | str  # whom messages of errors name

    def __init__(self, path: Path, *, wake_fd: int, cadences: Mapping[int, tuple[Cadence, ...]] | None = None) -> None:
        """Connect and wait for the welcome, at most a few seconds. `cadences`: what a daemon here has announced before.

        A `pump` that waits returns when `wake_fd` is readable.

        Raises:
            DaemonUnreachableError: nobody listens there, or nobody answers.
        """
        self.path = path
        self._door = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._door.settimeout(_HELLO_S)
        try:
            self._door.connect(str(path))
            welcome = frames.decode_door(self._door.recv(limits.TEXT_CHARS_MAX * 2))
        except (OSError, frames.FrameRefusedError) as error:
            self._door.close()
            raise DaemonUnreachableError(
                f"no daemon answers on {path} ({error}); start one with 'holdfast daemon', or set HOLDFAST_SOCKET"
            ) from error
        if not isinstance(welcome, messages.Welcome):
            self._door.close()
            raise DaemonUnreachableError(
                f"expected a welcome from the daemon on {path}, found {type(welcome).__name__}"
            )
        self._door.setblocking(False)
        self.session = Session(welcome, cadences=dict(cadences or {}))
        self._maps: dict[tuple[str, int], tuple[int, mmap.mmap]] = {}
        self._populated: dict[tuple[str, int], int] = {}  # the generation
        self._wake_fd = wake_fd
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context(io_threads=1)
        self._dealer = self._context.socket(zmq.DEALER)
        self._dealer.setsockopt(zmq.ROUTING_ID, welcome.token.encode())
        self._dealer.setsockopt(zmq.LINGER, 0)
        self._dealer.setsockopt(zmq.MAXMSGSIZE, limits.CONTROL_FRAME_BYTES_MAX)
        self._dealer.connect(welcome.endpoint)

    def register(self, poller: zmq.Poller) -> None:
        """Add what is read to a poller."""
        poller.register(self._dealer, zmq.POLLIN)
        poller.register(self._door.fileno(), zmq.POLLIN)
        poller.register(self._wake_fd, zmq.POLLIN)

    def send(self, message: messages.ClientMessage) -> None:
        """Send a message to the daemon."""
        try:
            self._dealer.send(frames.encode(message), zmq.DONTWAIT)
        except zmq.Again as error:
            raise LinkLostError(f"the daemon on {self.path} takes no messages") from error

    def pump(self, timeout_s: float) -> None:
        """Take what has come, waiting for the first of it at most `timeout_s`."""
        poller = zmq.Poller()
        self.register(poller)
        poller.poll(math.ceil(max(timeout_s, 0.0) * 1000))
        self.take()

    def take(self) -> None:
        """Take what has come, without waiting. Memory first: a grant may speak of it."""
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._wake_fd)
        while self._take_memory():
            pass
        while True:
            try:
                frame = self._dealer.recv(zmq.DONTWAIT)
            except zmq.Again:
                return
            try:
                self.session.receive(frames.decode_daemon(frame))
            except frames.FrameRefusedError as error:
                raise LinkLostError(f"the daemon on {self.path} says what can't be read: {error}") from error

    def until(self, done: Callable[[], bool], *, deadline_s: float) -> bool:
        """Pump until `done()` or the deadline (monotonic seconds). Returns whether it is done."""
        while not done():
            left_s = deadline_s - monotonic()
            if left_s <= 0:
                return False
            self.pump(left_s)
        return True

    def _take_memory(self) -> bool:
        if not select.select([self._door], [], [], 0)[0]:
            return False
        try:
            frame, descriptors, _, _ = socket.recv_fds(self._door, limits.TEXT_CHARS_MAX * 2, 1)
        except OSError as error:
            raise LinkLostError(f"the connection to the daemon on {self.path} broke: {error}") from error
        if not frame:
            raise LinkLostError(f"the daemon on {self.path} has gone")
        try:
            given = frames.decode_door(frame)
            if isinstance(given, messages.MemoryGiven) and descriptors:
                self._map(given, descriptors[0])
        except (frames.FrameRefusedError, ValueError) as error:  # or memory that is smaller than it is said to be
            raise LinkLostError(f"the daemon on {self.path} gives what can't be taken: {error}") from error
        finally:
            for descriptor in descriptors:
                os.close(descriptor)
        return True

    def _map(self, given: messages.MemoryGiven, descriptor: int) -> None:
        known = self._maps.get((given.job, given.slot))
        if known is not None and known[0] == given.generation:
            return
        self._maps[given.job, given.slot] = (given.generation, mmap.mmap(descriptor, given.data_bytes))

    def populate(self, job: str) -> None:
        """Fill our page table for all slots of a job, once, so that the first snapshot into each is no slower.

        The pages exist: the daemon has populated them. On an older kernel the first copy pays for the faults.
        """
        for key, (generation, mapping) in self._maps.items():
            if key[0] == job and self._populated.get(key) != generation:
                self._populated[key] = generation
                populate(mapping, 0, len(mapping))

    def ship(self, place: Place, start: int, end: int, *, wanted: Callable[[], bool]) -> None:
        """See to it that the daemon has these bytes of the image, while they are `wanted`. Here it has."""

    def bring(self, place: Place, start: int, end: int) -> None:
        """See to it that these bytes of the image are here as the daemon has them. Here they are."""

    def memory(self, job: str, slot: int, generation: int) -> memoryview | None:
        """The mapped image of a slot, None if that generation is not here (yet)."""
        known = self._maps.get((job, slot))
        return memoryview(known[1]) if known is not None and known[0] == generation else None

    def mapped(self, job: str) -> dict[tuple[int, int], memoryview]:
        """All images of a job's slots that are mapped now, by slot and generation."""
        return {
            (slot, generation): memoryview(mapping)
            for (owner, slot), (generation, mapping) in self._maps.items()
            if owner == job
        }

    def close(self) -> None:
        """Close everything. Mappings go with the last view of them."""
        self._maps.clear()
        self._dealer.close(0)
        self._context.destroy(linger=0)
        self._door.close()


def populate(mapping: mmap.mmap, start: int, end: int) -> None:
    """Fill our page table for bytes of a mapping, without the interpreter lock."""
    start -= start % mmap.PAGESIZE
    address = ctypes.addressof(ctypes.c_char.from_buffer(mapping)) + start
    _libc.madvise(ctypes.c_void_p(address), ctypes.c_size_t(end - start), _MADV_POPULATE_WRITE)
