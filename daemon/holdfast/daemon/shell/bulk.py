"""The bulk plane: chunks to and from peers, as one header frame and one payload frame each, on a thread of its own.

Covers sending, in mode `digest` straight from the arena, and receiving, checking and keeping payloads until the core
lets go of them. The sockets are `shell.network`'s, the seals of mode `sealed` are `shell.sealing`'s; what goes when,
and what a chunk means, is the core's.
"""

import logging
import os
import queue
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from holdfast.coding import chunk_digest
from holdfast.daemon.core import events
from holdfast.daemon.core.memory import ChunkKey
from holdfast.daemon.core.protect import key_of
from holdfast.daemon.shell import network
from holdfast.protocol import frames, limits, messages
from holdfast.protocol.config import ClusterConfig
from holdfast.protocol.exit_codes import ExitCode, OperatorError

if TYPE_CHECKING:
    from holdfast.daemon.shell.sealing import Sealing  # needs a package that not everybody installs

log = logging.getLogger(__name__)

_HWM_FRAMES = 2 * limits.CHUNK_CREDITS * limits.JOB_COUNT_MAX + limits.SUMS_HELD_COUNT_MAX
_PEER_LOOK_MS = 20  # between two looks for the bulk port, or the key, of a peer that has not said it yet
_FRAMES_HELD_MAX = 4096  # received chunks that wait for their stripe; credits keep it far below
_TURN_FRAMES_MAX = 256  # frames taken per turn, so that sending is not starved


@dataclass(frozen=True, slots=True)
class Outgoing:
    """A chunk on its way to a peer."""

    node: int
    header: messages.ChunkHeader
    payload: memoryview


class BulkPlane:
    """Chunks to and from peers, on a thread of its own.

    Received payloads are kept by key until `drop`, in mode `digest` in libzmq's buffers: nothing is copied on arrival.
    """

    def __init__(
        self,
        config: ClusterConfig,
        node: int,
        context: network.Context,
        report: Callable[[events.Event], None],
        sealing: "Sealing | None" = None,
    ) -> None:
        self._config, self._context, self._report, self._sealing = config, context, report, sealing
        self._payload_bytes = config.chunk_bytes if sealing is None else config.chunk_bytes + sealing.added_bytes
        network.allow_sockets(context, len(config.nodes))
        self._pull, self.port = network.bulk_pull(context, config.nodes[node].host, frame_bytes_max=self._payload_bytes)
        self._push: dict[int, tuple[tuple[str, int], network.Socket]] = {}
        self._places: dict[int, tuple[str, int]] = {}
        self._waiting: dict[int, deque[Outgoing]] = {}
        self._orders: queue.SimpleQueue[Outgoing | None] = queue.SimpleQueue()
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._held: dict[ChunkKey, memoryview] = {}
        self._thread = threading.Thread(target=self._run, name="bulk", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def peer_port(self, node: int, port: int, address: str | None = None) -> None:
        """A peer's bulk port, as its heartbeat says; a new one means a new worker there.

        Args:
            node: the peer.
            port: where it receives chunks.
            address: where it is, if the config's name does not say so.
        """
        self._places[node] = (address or self._config.nodes[node].host, port)

    def send(self, outgoing: Outgoing) -> None:
        """Queue a chunk. Callable from any thread; credits bound how many are queued."""
        self._orders.put(outgoing)
        os.eventfd_write(self._wake, 1)

    def payload(self, key: ChunkKey) -> memoryview | None:
        """The bytes of a received chunk, valid while the caller holds the view."""
        return self._held.get(key)

    def drop(self, keys: tuple[ChunkKey, ...]) -> None:
        """Release received chunks."""
        for key in keys:
            self._held.pop(key, None)

    def _run(self) -> None:
        poller = network.Poller()
        poller.register(self._pull, network.READABLE)
        poller.register(self._wake, network.READABLE)
        while True:
            full = [
                self._push[node][1]
                for node, waiting in self._waiting.items()
                if waiting and node in self._push and self._is_ready(node)
            ]
            for socket in full:
                poller.register(socket, network.WRITABLE)
            ready = dict(poller.poll(_PEER_LOOK_MS if any(self._waiting.values()) else 1000))
            for socket in full:
                poller.unregister(socket)
            if self._wake in ready:
                os.eventfd_read(self._wake)
            while not self._orders.empty():
                order = self._orders.get()
                if order is None:
                    self._close()
                    return
                self._waiting.setdefault(order.node, deque()).append(order)
                del order  # it holds the arena's memory, which must be free when the core says so
            for node, waiting in self._waiting.items():
                self._send_waiting(node, waiting)
            if self._pull in ready:
                self._receive()

    def _send_waiting(self, node: int, waiting: deque[Outgoing]) -> None:
        if len(waiting) > _HWM_FRAMES:  # a peer that is away; the core sends again what still matters
            waiting.clear()
        socket = self._socket_to(node)
        while waiting and socket is not None and network.has_room(socket):
            if not network.try_send(socket, self._frames_of(waiting[0])):
                return
            waiting.popleft()

    def _frames_of(self, outgoing: Outgoing) -> Sequence[bytes | memoryview]:
        header = frames.encode(outgoing.header)
        if self._sealing is None:
            return [header, outgoing.payload]
        return self._sealing.seal(outgoing.node, header, outgoing.payload)

    def _is_ready(self, node: int) -> bool:
        """Whether a node could read what is sent to it now."""
        return self._sealing is None or self._sealing.is_ready(node)

    def _socket_to(self, node: int) -> network.Socket | None:
        place = self._places.get(node)
        if place is None or not self._is_ready(node):
            return None
        known = self._push.get(node)
        if known is not None and known[0] == place:
            return known[1]
        if known is not None:
            known[1].close(0)
        socket = network.bulk_push(self._context, *place)
        self._push[node] = (place, socket)
        return socket

    def _receive(self) -> None:
        for _ in range(_TURN_FRAMES_MAX):
            parts = network.try_receive(self._pull)
            if parts is None:
                return
            self._accept(parts)

    def _accept(self, parts: list[network.Frame]) -> None:
        try:
            header, payload = self._open(parts)
        except frames.FrameRefusedError as refusal:
            self._report(events.PeerRefused(None, refusal.code, f"on the bulk plane: {refusal.text}", by_us=True))
            return
        key = key_of(header)
        if len(self._held) >= _FRAMES_HELD_MAX:
            log.warning("chunk %s dropped: %d received chunks wait already", key, len(self._held))
            return
        digest = chunk_digest(payload)
        self._held.setdefault(key, payload)
        self._report(events.ChunkArrived(header, digest))

    def _open(self, parts: list[network.Frame]) -> tuple[messages.ChunkHeader, memoryview]:
        """The header and payload of a message. Raises FrameRefusedError."""
        if len(parts) != 2 or len(parts[1]) != self._payload_bytes:
            sizes = [len(part) for part in parts][:8]
            raise frames.FrameRefusedError(
                "malformed", f"expected a header and {self._payload_bytes} bytes, found frames of {sizes} bytes"
            )
        if self._sealing is None:
            return self._header(parts[0].bytes), parts[1].buffer
        opening = self._sealing.open_first(parts[0].bytes)
        header = self._header(opening.header)
        if header.sender != opening.node:
            text = f"node index {opening.node} sealed a chunk that says it is from node index {header.sender}"
            raise frames.FrameRefusedError("node", text)
        return header, memoryview(self._sealing.open_second(opening, parts[1].buffer))

    def _header(self, frame: bytes) -> messages.ChunkHeader:
        return frames.decode_header(frame, cluster=self._config.cluster_name, epoch=self._config.epoch)

    def _close(self) -> None:
        self._pull.close(0)
        for _, socket in self._push.values():
            socket.close(0)
        os.close(self._wake)

    def stop(self) -> None:
        """End the thread and close its sockets."""
        self._orders.put(None)
        os.eventfd_write(self._wake, 1)
        self._thread.join(timeout=5.0)


def sealing_of(config: ClusterConfig, node: int) -> "Sealing | None":
    """What seals chunks, None in bulk mode `digest`.

    Raises:
        OperatorError: what it needs is not installed (exit code 2).
    """
    if config.bulk_mode == "digest":
        return None
    try:
        from holdfast.daemon.shell.sealing import Sealing  # noqa: PLC0415  # not everybody installs what it needs
    except ImportError as error:
        raise OperatorError(
            ExitCode.USAGE,
            f"security.bulk: expected the package cryptography for mode {config.bulk_mode!r}, found none ({error}). "
            "Install it with 'pip install holdfast[sealed]', or set bulk = \"digest\" on all nodes",
        ) from error
    return Sealing(config, node)
