"""The wires to the daemon: a Unix socket for arrival, memory and life signs, ZeroMQ for messages.

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
from collections.abc import Callable, Mapping
from pathlib import Path
from time import monotonic

import zmq
from holdfast.client.errors import DaemonUnreachableError
from holdfast.client.session import Session
from holdfast.protocol import frames, limits, messages
from holdfast.protocol.cadence import Cadence

_HELLO_S = limits.CLIENT_HELLO_S
_MADV_POPULATE_WRITE = 23  # Linux 5.14; not named by the mmap module of Python 3.11
_libc = ctypes.CDLL(None)  # mmap's own madvise would hold the interpreter lock meanwhile


class LinkLostError(DaemonUnreachableError):
    """The daemon closed the connection or died."""


def socket_path(given: str | os.PathLike[str] | None, *, local_rank: int) -> Path:
    """Where the daemon's socket is: as given, $HOLDFAST_SOCKET, /run/holdfast, $XDG_RUNTIME_DIR/holdfast.

    The value may list several sockets, separated by commas: ranks of one host then use them in turn, by local rank.
    That is how one torchrun drives several nodes on one machine.
    """
    listed = os.fspath(given) if given is not None else os.environ.get("HOLDFAST_SOCKET", "")
    if listed:
        paths = [path for path in listed.split(",") if path]
        return Path(paths[local_rank % len(paths)])
    system = Path("/run/holdfast/holdfast.sock")
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    if system.exists() or not runtime:
        return system
    return Path(runtime) / "holdfast" / "holdfast.sock"


class Link:
    """One connection to a daemon."""

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
                address = ctypes.addressof(ctypes.c_char.from_buffer(mapping))
                _libc.madvise(ctypes.c_void_p(address), ctypes.c_size_t(len(mapping)), _MADV_POPULATE_WRITE)

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
