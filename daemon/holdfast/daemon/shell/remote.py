"""The gate: trainers that can't map this node's memory come in over the network, and it is their hands here.

Covers one thread. For each trainer that is let in it is a client of the daemon's own Unix socket: it gets the memory
that the trainer would get, carries words both ways as they are, and moves bytes between messages and memory. Its end of
that socket closes when the trainer has gone, after the last write, so the rest of the daemon sees no difference to a
trainer of this host. What may be touched is `permits`'; the sockets are `network`'s.
"""

import logging
import mmap
import os
import queue
import socket
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import numpy as np
from holdfast.coding import chunk_digest
from holdfast.daemon.core.memory import Memory
from holdfast.daemon.shell import network
from holdfast.daemon.shell.keys import Keys, trainer_keys
from holdfast.daemon.shell.network import Change
from holdfast.daemon.shell.permits import Permits, Place
from holdfast.protocol import frames, limits, messages, remote_messages
from holdfast.protocol.config import ClusterConfig
from holdfast.protocol.settings import split_address
from holdfast.protocol.trace import AskTrace

log = logging.getLogger(__name__)

_TURN_FRAMES_MAX = 64  # taken from one socket per turn: so many pieces delay a beat by less than a tenth of a second
_REREAD_S = 2.0  # between two looks into the folder of keys: strangers who knock cost no more than that
_STUMBLE_S = 1.0  # after an error of this file, so that one which comes again and again does not fill the log
_DOOR_FRAME_BYTES_MAX = 2 * limits.TEXT_CHARS_MAX
_COMMANDS = messages.AskStatus | messages.AskRecover | messages.AskDrill | messages.AskForget | AskTrace
_BEAT = frames.encode(remote_messages.Beat())
_TOLD = frames.encode(remote_messages.Told())
_HANDED = frames.encode(remote_messages.Handed())


@dataclass(slots=True)
class Stay:
    """One trainer that was let in.

    Attributes:
        identity: of its connection, as ZeroMQ numbers it.
        where: whom the log names.
        door: our end of the daemon's Unix socket.
        words: our end of its messages, once the daemon has said hello.
        maps: (job, slot) -> the generation, and the whole image; None once the daemon has freed it.
    """

    identity: bytes
    where: str
    door: socket.socket
    words: network.Socket | None = None
    permits: Permits = field(default_factory=Permits)
    maps: dict[tuple[str, int], tuple[int, memoryview | None]] = field(default_factory=dict)


class RemoteGate:
    """Trainers over the network, on a thread of its own."""

    def __init__(self, address: str, keys: Keys | None, keys_dir: str | None, door: Path, *, threads: int) -> None:
        """Listen; `start` lets somebody in. Raises OperatorError where the address can't be had."""
        self.address, self._door, self._keys_dir = address, door, keys_dir
        host, self.port = split_address(address)
        self._context = network.Context(io_threads=threads)  # they encrypt: one carries less than a GB/s
        self._zap = network.zap_socket(self._context) if keys is not None else None
        self._router = network.gate_router(self._context, host, self.port, keys)
        self._monitor = network.gate_monitor(self._router)
        self._stays: dict[bytes, Stay] = {}
        self._listed: dict[bytes, str] = {}
        self._reread_s = self._beat_s = 0.0
        self._said_s: dict[str, float] = {}
        self._freed: queue.SimpleQueue[Memory] = queue.SimpleQueue()
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._stopping = threading.Event()
        self._poller = network.Poller()
        for readable in (self._router, self._monitor, self._zap, self._wake):
            if readable is not None:
                self._poller.register(readable, network.READABLE)
        self._thread = threading.Thread(target=self._run, name="remote", daemon=True)

    @classmethod
    def of(cls, config: ClusterConfig, keys: Keys | None, door: Path, *, threads: int) -> "RemoteGate | None":
        """The gate that a config asks for, None if it asks for none."""
        if config.trainers_address is None:
            return None
        gate = cls(config.trainers_address, keys, config.keys_dir, door, threads=threads)
        listed = "anybody of this host" if keys is None else f"{len(gate.listed())} keys listed"
        log.info("trainers may come in over the network on %s (%s)", config.trainers_address, listed)
        return gate

    def start(self) -> None:
        """Start the thread; the daemon's Unix socket is there by then."""
        self._thread.start()

    def free(self, memory: Memory) -> None:
        """The daemon gives memory back to the machine: no mapping of it stays here. Any thread."""
        self._freed.put(memory)
        os.eventfd_write(self._wake, 1)

    def stop(self) -> None:
        """Let everybody go and end the thread."""
        self._stopping.set()
        os.eventfd_write(self._wake, 1)
        if self._thread.ident is None:  # never started
            self._close()
        else:
            self._thread.join(timeout=5.0)

    def listed(self) -> dict[bytes, str]:
        """Whose keys are let in, as the folder has them now or had them a moment ago."""
        if time.monotonic() >= self._reread_s and self._keys_dir is not None:
            self._reread_s = time.monotonic() + _REREAD_S
            self._listed = trainer_keys(Path(self._keys_dir))
        return self._listed

    # --- the thread ---

    def _run(self) -> None:
        while not self._stopping.is_set():
            try:
                self._turn()
            except Exception:  # the shell's edge: a fault here must not take the node's other trainers along
                log.exception("the gate for trainers over the network stumbled: all of them attach again")
                self._end_all("the gate stumbled; the daemon's log says why")
                self._stopping.wait(_STUMBLE_S)
        self._end_all("the daemon stops")
        self._close()

    def _close(self) -> None:
        self._router.disable_monitor()
        for one in (self._monitor, self._router, self._zap):
            if one is not None:
                one.close(0)
        self._context.destroy(linger=0)
        os.close(self._wake)

    def _turn(self) -> None:
        ready = {found for found, _ in self._poller.poll(int(limits.REMOTE_BEAT_S * 1000))}
        if self._wake in ready:
            os.eventfd_read(self._wake)
            self._let_go()
        if self._zap is not None and self._zap in ready:
            network.answer_zap(self._zap, lambda key: self.listed().get(key), self._refused)
        if self._monitor in ready:
            self._beat_s = 0.0  # somebody may have gone: who can't be sent a beat
            if self._knocked():
                self._say("a connection failed its handshake: no ZeroMQ, no key, or not with this node's key")
        for _ in range(_TURN_FRAMES_MAX if self._router in ready else 0):
            parts = network.try_receive(self._router)
            if parts is None:
                break
            self._heard(parts)
        for stay in list(self._stays.values()):
            if stay.door.fileno() in ready:
                self._from_door(stay)
            if stay.words is not None and stay.words in ready:
                self._from_daemon(stay, stay.words)
        if time.monotonic() >= self._beat_s:
            self._beat_s = time.monotonic() + limits.REMOTE_BEAT_S
            for stay in list(self._stays.values()):
                self._send(stay, _BEAT)

    def _knocked(self) -> bool:
        """Whether a handshake failed since the last look."""
        found = False
        for _ in range(_TURN_FRAMES_MAX):
            change = network.next_change(self._monitor)
            if change is None:
                break
            found |= change is not Change.DISCONNECTED
        return found

    def _let_go(self) -> None:
        while not self._freed.empty():
            memory = self._freed.get()
            for stay in self._stays.values():
                if stay.maps.get((memory.job, memory.slot), (-1, None))[0] == memory.generation:
                    stay.maps[memory.job, memory.slot] = (memory.generation, None)

    # --- from trainers ---

    def _heard(self, parts: list[network.Frame]) -> None:
        identity, stay = parts[0].bytes, self._stays.get(parts[0].bytes)
        try:
            header = _header(parts)
            if stay is None and isinstance(header, remote_messages.Arrive):
                self._arrived(identity, parts[1])
            elif stay is None:
                gone = remote_messages.Gone("this connection is not known here, or not any more: attach again")
                network.send_or_gone(self._router, [identity, frames.encode(gone)])
            else:
                self._obey(stay, header, parts)
        except frames.FrameRefusedError as refusal:
            if stay is None:
                self._say(f"a message of somebody who is not known here is refused: {refusal}")
            else:
                self._end(stay, f"a message is refused: {refusal}")

    def _arrived(self, identity: bytes, frame: network.Frame) -> None:
        if len(self._stays) >= limits.REMOTE_CLIENT_COUNT_MAX:
            gone = remote_messages.Gone(
                f"{limits.REMOTE_CLIENT_COUNT_MAX} trainers over the network are the limit here"
            )
            network.send_or_gone(self._router, [identity, frames.encode(gone)])
            return
        door = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
        try:
            door.connect(str(self._door))
        except OSError as error:
            door.close()
            gone = remote_messages.Gone(f"the daemon takes nobody now: {error}")
            network.send_or_gone(self._router, [identity, frames.encode(gone)])
            return
        stay = Stay(identity, network.whose(frame), door)
        self._stays[identity] = stay
        self._poller.register(door.fileno(), network.READABLE)
        log.info("trainer %s comes in over the network", stay.where)

    def _obey(self, stay: Stay, header: remote_messages.TrainerMessage, parts: list[network.Frame]) -> None:
        match header:
            case remote_messages.Arrive():
                raise frames.FrameRefusedError("malformed", "it has arrived already")
            case remote_messages.Said():
                frame = parts[2].bytes
                said = frames.decode_client(frame)
                if isinstance(said, _COMMANDS):
                    text = f"{type(said).__name__} is for the command line on the node, not for trainers elsewhere"
                    raise frames.FrameRefusedError("unknown", text)
                stay.permits.said(said)
                if stay.words is None or not network.try_send(stay.words, [frame]):
                    self._end(stay, "the daemon takes no messages")
            case remote_messages.Put(number, job, slot, generation, offset_bytes, digest):
                payload = parts[2].buffer
                end = offset_bytes + len(payload)
                if not stay.permits.may_write((job, slot, generation), offset_bytes, end):
                    raise frames.FrameRefusedError("malformed", f"{_bytes(header)} are not this trainer's to write now")
                if digest != _digest(payload):
                    raise frames.FrameRefusedError("digest", f"{_bytes(header)} fail their digest on arrival")
                image = self._image(stay, (job, slot, generation), end)
                if image is not None:
                    target = np.frombuffer(image[offset_bytes:end], dtype=np.uint8)
                    np.copyto(target, np.frombuffer(payload, dtype=np.uint8))
                self._send(stay, frames.encode(remote_messages.PutDone(number)))
            case remote_messages.Get(number, job, slot, generation, offset_bytes, length_bytes):
                end = offset_bytes + length_bytes
                if not stay.permits.may_read((job, slot, generation), offset_bytes, end):
                    raise frames.FrameRefusedError("malformed", f"{_bytes(header)} are not lent to this trainer now")
                image = self._image(stay, (job, slot, generation), end)
                if image is None:
                    raise frames.FrameRefusedError("malformed", f"{_bytes(header)} were freed")
                piece = image[offset_bytes:end]
                self._send(stay, frames.encode(remote_messages.Got(number, _digest(piece))), piece)

    def _image(self, stay: Stay, place: Place, end: int) -> memoryview | None:
        """The memory of a permitted place, None if it is nobody's any more: what is written there counts for nothing.

        Raises:
            FrameRefusedError: the daemon has not given it.
        """
        job, slot, generation = place
        if stay.maps.get((job, slot), (-1, None))[0] != generation:
            self._from_door(stay)  # the grant may have overtaken the descriptor
        found, image = stay.maps.get((job, slot), (-1, None))
        if stay.identity not in self._stays:  # that was its end
            raise frames.FrameRefusedError("malformed", "this trainer has gone")
        if found != generation or (image is not None and end > len(image)):
            raise frames.FrameRefusedError("malformed", f"slot {slot} generation {generation} of job {job} is not here")
        return image

    # --- from the daemon ---

    def _from_door(self, stay: Stay) -> None:
        while stay.identity in self._stays:
            try:
                frame, descriptors, _, _ = socket.recv_fds(stay.door, _DOOR_FRAME_BYTES_MAX, 1)
            except BlockingIOError:
                return
            except OSError as error:
                self._end(stay, f"the daemon let this trainer go: {error}")
                return
            try:
                if not frame:
                    self._end(stay, "the daemon let this trainer go; its log says why")
                    return
                self._handed(stay, frames.decode_door(frame), descriptors)
            finally:
                for descriptor in descriptors:
                    os.close(descriptor)

    def _handed(self, stay: Stay, message: messages.DoorMessage, descriptors: Sequence[int]) -> None:
        match message:
            case messages.Welcome(token=token, endpoint=endpoint):
                stay.words = network.gate_words(self._context, endpoint, token)
                self._poller.register(stay.words, network.READABLE)
                told: messages.DoorMessage = msgspec.structs.replace(message, token="", endpoint="")
            case messages.MemoryGiven(job, slot, generation, data_bytes):
                image = memoryview(mmap.mmap(descriptors[0], data_bytes))
                stay.maps[job, slot] = (generation, image)
                told = message
        self._send(stay, _HANDED, frames.encode(told))

    def _from_daemon(self, stay: Stay, words: network.Socket) -> None:
        for _ in range(_TURN_FRAMES_MAX):
            parts = network.try_receive(words)
            if parts is None or stay.identity not in self._stays:
                return
            frame = parts[0].bytes
            stay.permits.told(frames.decode_daemon(frame))
            self._send(stay, _TOLD, frame)

    # --- endings ---

    def _send(self, stay: Stay, *parts: bytes | memoryview) -> None:
        if not network.send_or_gone(self._router, [stay.identity, *parts]):
            self._end(stay, "")

    def _end(self, stay: Stay, why: str) -> None:
        """One trainer's stay is over. Nothing is written for it any more, and then the daemon hears of it."""
        if self._stays.pop(stay.identity, None) is None:
            return
        log.info("trainer %s over the network has gone%s", stay.where, f": {why}" if why else "")
        if why:
            gone = remote_messages.Gone(why[: limits.TEXT_CHARS_MAX])
            network.send_or_gone(self._router, [stay.identity, frames.encode(gone)])
        self._poller.unregister(stay.door.fileno())
        if stay.words is not None:
            self._poller.unregister(stay.words)
            stay.words.close(0)
        stay.door.close()

    def _end_all(self, why: str) -> None:
        for stay in list(self._stays.values()):
            self._end(stay, why)

    def _refused(self, key: str, address: str) -> None:
        self._say(f"key {key!r}, from {address}, is not in {self._keys_dir}: a trainer is not let in")

    def _say(self, text: str) -> None:
        """A line of the log on strangers, each kind at most once in a while."""
        kind, now_s = text[:40], time.monotonic()
        if now_s >= self._said_s.get(kind, 0.0):
            self._said_s = {other: until for other, until in self._said_s.items() if until > now_s}
            self._said_s[kind] = now_s + limits.REFUSAL_PAUSE_S
            log.warning("trainers.address: %s", text)


def _header(parts: list[network.Frame]) -> remote_messages.TrainerMessage:
    """What a message is, if it has as many frames as it should."""
    if not 2 <= len(parts) <= 3:
        raise frames.FrameRefusedError("malformed", f"expected 1 or 2 frames, found {len(parts) - 1}")
    header = frames.decode_trainer(parts[1].bytes)
    has_body = isinstance(header, remote_messages.Said | remote_messages.Put)
    if has_body != (len(parts) == 3):
        raise frames.FrameRefusedError("malformed", f"{type(header).__name__} came with {len(parts) - 2} bodies")
    if isinstance(header, remote_messages.Put) and not 0 < len(parts[2]) <= limits.REMOTE_PIECE_BYTES_MAX:
        text = f"expected 1 to {limits.REMOTE_PIECE_BYTES_MAX} bytes at once, found {len(parts[2])}"
        raise frames.FrameRefusedError("oversized", text)
    return header


def _digest(payload: memoryview) -> bytes:
    return frames.pack_digests((chunk_digest(payload),))


def _bytes(header: remote_messages.Put | remote_messages.Get) -> str:
    return f"bytes from {header.offset_bytes} of slot {header.slot}, generation {header.generation}, job {header.job}"
