"""The way to a daemon whose memory can't be mapped here: words and bytes over one ZeroMQ connection to its gate.

The same conversation as over `Link`. What stands for the mapped image is memory of this process, of which only the
rank's own bytes are ever touched; `ship` sends them to the daemon before the seal, `bring` fetches what was opened.
"""

import contextlib
import mmap
import os
import select
import socket
from collections.abc import Callable, Iterator, Mapping
from time import monotonic

import numpy as np
from holdfast.client.addresses import split_network
from holdfast.client.errors import DaemonUnreachableError, RefusedError
from holdfast.client.link import Link, LinkLostError, Place, Poller, Wire, WireKeys, WireState, populate
from holdfast.client.own_keys import VARIABLE, wire_keys
from holdfast.client.session import Session
from holdfast.coding import chunk_digest
from holdfast.protocol import frames, limits, messages, remote_messages
from holdfast.protocol.cadence import Cadence
from holdfast.protocol.exit_codes import ExitCode

_MAP_NORESERVE = 0x4000  # of Linux; not named by the mmap module of Python 3.11
_ADDRESSES_COUNT_MAX = 4  # of one name that are tried
_SAID = frames.encode(remote_messages.Said())
_MALFORMED = "says what can't be read"


class RemoteLink(Link):
    """One connection to a daemon over the network."""

    transport = "zeromq"

    def __init__(
        self, address: str, *, wake_fd: int, cadences: Mapping[int, tuple[Cadence, ...]] | None = None
    ) -> None:
        """Connect and wait for the welcome, at most a few seconds. See `Link`.

        Raises:
            DaemonUnreachableError: nobody listens there, or nobody answers.
            RefusedError: this trainer's key, or the node's, is not the one that is listed (exit code 5).
        """
        self.path, self._wake_fd = address, wake_fd
        self._given: dict[tuple[str, int], tuple[int, int]] = {}  # (job, slot) -> generation, bytes of the image
        self._landings: dict[tuple[str, int], mmap.mmap] = {}
        self._populated_bytes: dict[tuple[str, int], tuple[int, int]] = {}
        self._mapped_count = 0
        self._numbers = 0
        self._putting: set[int] = set()
        self._getting: dict[int, memoryview] = {}  # where the bytes go
        self._moved_count = 0  # answers to either, ever
        deadline_s = monotonic() + limits.CLIENT_HELLO_S
        self._wire = self._connected(deadline_s)
        welcome: list[messages.Welcome] = []
        self._welcomed: Callable[[messages.Welcome], None] = welcome.append
        try:
            self._wire.send([frames.encode(remote_messages.Arrive())])
            while not welcome:  # what wakes us is left alone: another thread may be who listens to it by now
                if monotonic() >= deadline_s:
                    raise DaemonUnreachableError(f"the daemon on {self.path} did not welcome this trainer in time")
                self._wire.wait(deadline_s - monotonic())
                self._receive()
            self.session = Session(welcome[0], cadences=dict(cadences or {}))
        except BaseException:
            self._wire.close()
            raise

    def _connected(self, deadline_s: float) -> Wire:
        node, host, port = split_network(str(self.path))
        state = WireState.ENDED
        for endpoint in _endpoints(host, port):
            for keys in wire_keys(node, host):
                wire = Wire(endpoint, keys)
                state = _settled(wire, deadline_s)
                if state is WireState.UP:
                    return wire
                wire.close()
                if state is WireState.NOT_LISTED:
                    raise self._not_listed(keys)
        if state is WireState.REFUSED:
            raise RefusedError(
                f"the daemon on {self.path} and this trainer refuse each other: expected the key that ${VARIABLE} "
                "lists for that node, or keys on neither side. Name the node (tcp://NODE@HOST:PORT), set the variable, "
                "or copy the *.key files again",
                exit_code=ExitCode.WRONG_CLUSTER,
            )
        raise DaemonUnreachableError(
            f"no daemon answers on {self.path}; expected one with trainers.address set in its config. See 'holdfast "
            "status' on the node, and whether a firewall is between"
        )

    def _not_listed(self, keys: WireKeys | None) -> RefusedError:
        key = keys.public.decode() if keys is not None else "none"
        return RefusedError(
            f"the daemon on {self.path} does not list this trainer's key ({key}). Copy its *.key file to the folder "
            "trainers of keys_dir on the node; no restart is needed",
            exit_code=ExitCode.WRONG_CLUSTER,
        )

    def register(self, poller: Poller) -> None:
        """Add what is read to a poller."""
        self._wire.register(poller)
        poller.register(self._wake_fd, select.POLLIN)

    def send(self, message: messages.ClientMessage) -> None:
        """Send a message to the daemon."""
        self._send(_SAID, frames.encode(message))

    def _send(self, *parts: bytes | memoryview) -> None:
        if not self._wire.send(parts):
            raise LinkLostError(f"the daemon on {self.path} takes no messages, or the connection has ended")

    def take(self) -> None:
        """Take what has come, without waiting."""
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._wake_fd)
        self._receive()

    def _receive(self) -> None:
        while (parts := self._wire.receive()) is not None:
            try:
                self._heard(frames.decode_gate(bytes(parts[0])), parts[1:])
            except (frames.FrameRefusedError, ValueError) as error:
                raise LinkLostError(f"the daemon on {self.path} {_MALFORMED}: {error}") from error
        if self._wire.look() is not WireState.UP:
            raise LinkLostError(f"the connection to the daemon on {self.path} has ended")

    def _heard(self, header: remote_messages.GateMessage, bodies: list[memoryview]) -> None:
        has_body = isinstance(header, remote_messages.Handed | remote_messages.Told | remote_messages.Got)
        if len(bodies) != has_body:
            raise ValueError(f"{type(header).__name__} came with {len(bodies)} bodies")
        match header:
            case remote_messages.Told():
                self.session.receive(frames.decode_daemon(bytes(bodies[0])))
            case remote_messages.Handed():
                self._handed(frames.decode_door(bytes(bodies[0])))
            case remote_messages.PutDone(number):
                self._putting.remove(number)
                self._moved_count += 1
            case remote_messages.Got(number, digest):
                target = self._getting.pop(number)
                if len(bodies[0]) != len(target) or _digest(bodies[0]) != digest:
                    raise ValueError(f"{len(bodies[0])} bytes that fail their digest, or not the {len(target)} wanted")
                np.copyto(np.frombuffer(target, dtype=np.uint8), np.frombuffer(bodies[0], dtype=np.uint8))
                self._moved_count += 1
            case remote_messages.Beat():
                pass  # ZeroMQ's heartbeats tell whether the other side lives
            case remote_messages.Gone(text):
                raise LinkLostError(f"the daemon on {self.path} let this trainer go: {text}")

    def _handed(self, message: messages.DoorMessage) -> None:
        match message:
            case messages.Welcome():
                self._welcomed(message)
            case messages.MemoryGiven(job, slot, generation, data_bytes):
                self._given[job, slot] = generation, data_bytes

    # --- bytes ---

    def ship(self, place: Place, start: int, end: int, *, wanted: Callable[[], bool]) -> None:
        """Send bytes of the image, and wait until the daemon has them; the rest is left out once they aren't wanted.

        Raises:
            LinkLostError: nothing was taken for REMOTE_PATIENCE_S.
        """
        image = self._landing(place)
        pieces = _pieces(start, end)
        piece = next(pieces, None)
        while piece is not None or self._putting:
            if not wanted():
                piece = None
            while piece is not None and len(self._putting) < limits.REMOTE_CREDITS:
                self._numbers += 1
                body = image[piece[0] : piece[1]]
                self._send(frames.encode(remote_messages.Put(self._numbers, *place, piece[0], _digest(body))), body)
                self._putting.add(self._numbers)
                piece = next(pieces, None)
            if self._putting:
                self._await_moved(f"takes no bytes of {place[0]}")

    def bring(self, place: Place, start: int, end: int) -> None:
        """Fetch bytes of the image.

        Raises:
            LinkLostError: nothing came for REMOTE_PATIENCE_S.
        """
        image = self._landing(place)
        pieces = _pieces(start, end)
        piece = next(pieces, None)
        while piece is not None or self._getting:
            while piece is not None and len(self._getting) < limits.REMOTE_CREDITS:
                self._numbers += 1
                length_bytes = piece[1] - piece[0]
                self._send(frames.encode(remote_messages.Get(self._numbers, *place, piece[0], length_bytes)))
                self._getting[self._numbers] = image[piece[0] : piece[1]]
                piece = next(pieces, None)
            self._await_moved(f"sends no bytes of {place[0]}")

    def _await_moved(self, what: str) -> None:
        before = self._moved_count
        deadline_s = monotonic() + limits.REMOTE_PATIENCE_S
        if not self.until(lambda: self._moved_count > before, deadline_s=deadline_s):
            raise LinkLostError(f"the daemon on {self.path} {what} for {limits.REMOTE_PATIENCE_S} s")

    # --- memory that stands for the image ---

    def _landing(self, place: Place) -> memoryview:
        view = self.memory(*place)
        assert view is not None, "who moves bytes has waited for their memory"
        return view

    def memory(self, job: str, slot: int, generation: int) -> memoryview | None:
        """Memory like the image of a slot, None if that generation was not given (yet).

        All slots of a job's snapshots share it: a rank stages, or reads, one at a time.
        """
        given = self._given.get((job, slot))
        if given is None or given[0] != generation:
            return None
        key = _shared(job, slot)
        known = self._landings.get(key)
        if known is None or len(known) < given[1]:
            flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
            self._landings[key] = known = mmap.mmap(-1, max(given[1], mmap.PAGESIZE), flags=flags)
            with contextlib.suppress(OSError):  # a kernel without huge pages: others work as well
                known.madvise(mmap.MADV_HUGEPAGE)
            self._mapped_count += 1
            self._populated_bytes.pop(key, None)
        return memoryview(known)[: given[1]]

    def _own_bytes(self, job: str) -> tuple[int, int] | None:
        """From where to where this rank's bytes lie in the image, None while that is not known."""
        session = self.session
        if session.accepted is not None and session.accepted.job == job:
            return session.accepted.offset_bytes, session.accepted.offset_bytes + session.accepted.shard_bytes
        if session.opened is not None and session.opened.job == job:
            return session.opened.bytes_read
        return None

    def populate(self, job: str) -> None:
        """Have memory for this rank's own bytes."""
        key, own = _shared(job, 0), self._own_bytes(job)
        landing = self._landings.get(key)
        if landing is not None and own is not None and own[1] <= len(landing) and own != self._populated_bytes.get(key):
            self._populated_bytes[key] = own
            populate(landing, *own)

    def mapped(self, job: str) -> dict[tuple[int, int], memoryview]:
        """This rank's own bytes, under a key that changes with them and with their memory."""
        own, landing = self._own_bytes(job), self._landings.get(_shared(job, 0))
        if landing is None or own is None or own[1] > len(landing) or own[0] == own[1]:
            return {}
        start = own[0] - own[0] % mmap.PAGESIZE
        return {(-self._mapped_count, own[0]): memoryview(landing)[start : own[1]]}

    def close(self) -> None:
        """Close everything. Memory goes with the last view of it."""
        self._landings.clear()
        self._wire.close()


def _shared(job: str, slot: int) -> tuple[str, int]:
    """What the memory for a slot is kept under; beyond a job's slots it is lent for ranges, each for itself."""
    return (job, 0) if slot < limits.SLOTS_COUNT_MAX else (job, slot)


def _pieces(start: int, end: int) -> Iterator[tuple[int, int]]:
    step = limits.REMOTE_PIECE_BYTES_MAX
    return ((at, min(at + step, end)) for at in range(start, end, step))


def _digest(payload: memoryview) -> bytes:
    return frames.pack_digests((chunk_digest(payload),))


def _endpoints(host: str, port: int) -> list[str]:
    """Where a host is, as ZeroMQ wants it; empty if its name is not known."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError:
        return []
    hosts = dict.fromkeys(str(place[0]) for *_, place in found)
    return [f"tcp://[{one}]:{port}" if ":" in one else f"tcp://{one}:{port}" for one in hosts][:_ADDRESSES_COUNT_MAX]


def _settled(wire: Wire, deadline_s: float) -> WireState:
    """What becomes of a connection, at the latest by the deadline."""
    while wire.look() is WireState.CONNECTING and monotonic() < deadline_s:
        wire.wait(deadline_s - monotonic())
    return wire.state
