"""The worker's side of the keeper's channel, and the ledger in held memory.

Covers which descriptors the keeper holds for us and how a successor finds them. The worker has the same descriptors,
so it can bring a killed keeper back.
"""

import contextlib
import fcntl
import logging
import mmap
import os
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Sequence

from holdfast.coding import chunk_digest
from holdfast.daemon.keeper import HELD_COUNT_MAX
from holdfast.protocol import limits

log = logging.getLogger(__name__)

_MESSAGE_BYTES_MAX = 512
_HANDOVER_S = 10.0  # a keeper sends what it holds at once; longer means that it is stuck
_COPY_HEADER = struct.Struct("<QQQ")  # sequence, payload bytes, xxh3_64 of the payload
_COPY_BYTES = _COPY_HEADER.size + limits.LEDGER_BYTES
_SEALS = 0x0001 | 0x0002 | 0x0004  # F_SEAL_SEAL | F_SEAL_SHRINK | F_SEAL_GROW
_F_ADD_SEALS = 1033


def make_sealed(name: str, size_bytes: int) -> int:
    """A new memfd of fixed size. A mapping of it can't be truncated under a reader, so nobody gets SIGBUS."""
    descriptor = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(descriptor, size_bytes)
        fcntl.fcntl(descriptor, _F_ADD_SEALS, _SEALS)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


class KeeperLink:
    """The channel to the keeper. Thread-safe: memory is made on one thread and freed on another."""

    def __init__(self, channel_fd: int | None, worker_arguments: Sequence[str]) -> None:
        self._worker_arguments = list(worker_arguments)
        self._lock = threading.Lock()
        self._held: dict[str, int] = {}
        self._channel = None if channel_fd is None else socket.socket(fileno=channel_fd)
        if self._channel is not None:
            self._receive_held()

    @property
    def held(self) -> dict[str, int]:
        """Name -> descriptor of everything that is held."""
        return dict(self._held)

    def fileno(self) -> int:
        """For polling: readable means that the keeper is gone, since it never speaks after `start`."""
        return -1 if self._channel is None else self._channel.fileno()

    def close(self) -> None:
        """Leave the conversation; the keeper goes on holding."""
        if self._channel is not None:
            self._channel.close()
            self._channel = None

    def _receive_held(self) -> None:
        """Take over what the keeper holds. What is not understood is left: it may be of another version."""
        assert self._channel is not None
        self._channel.settimeout(_HANDOVER_S)
        for _ in range(HELD_COUNT_MAX + 1):
            message, descriptors, _, _ = socket.recv_fds(self._channel, _MESSAGE_BYTES_MAX, 1)
            verb, _, name = message.decode(errors="replace").partition(" ")
            if verb == "have" and descriptors and name not in self._held:
                self._held[name] = descriptors[0]
                continue
            for descriptor in descriptors:
                os.close(descriptor)
            if verb in {"start", ""}:  # or the keeper is gone: the loop will bring it back
                break
            log.warning("expected 'have NAME' with a descriptor, or 'start', found %r: left", message[:64])
        self._channel.settimeout(None)

    def hold(self, name: str, descriptor: int) -> None:
        """Have the keeper keep a descriptor under a name; this process keeps it as well."""
        with self._lock:
            self._held[name] = descriptor
            self._say(f"hold {name}", [descriptor])

    def drop(self, name: str) -> None:
        """Let a descriptor go, here and at the keeper. Unknown names are ignored."""
        with self._lock:
            descriptor = self._held.pop(name, None)
            if descriptor is not None:
                os.close(descriptor)
                self._say(f"drop {name}", [])

    def rename(self, name: str, new_name: str) -> None:
        """Hold what is held under one name under another one, which is free."""
        with self._lock:
            descriptor = self._held.pop(name)
            self._held[new_name] = descriptor
            self._say(f"hold {new_name}", [descriptor])
            self._say(f"drop {name}", [])

    def say_ended(self, exit_code: int) -> None:
        """Tell the keeper that this worker stops on purpose: one that it adopted leaves it no exit code."""
        with self._lock:
            self._say(f"ended {exit_code}", [])

    def say_ready(self, *, grace_s: int = 0) -> None:
        """Tell the keeper that this worker has taken up its memory and listens, and how much longer a stop may take."""
        with self._lock:
            if grace_s:
                self._say(f"grace {grace_s}", [])
            self._say("ready", [])

    def say_alive(self) -> None:
        """Tell the keeper that the loop turns; it replaces a worker that has been silent for long."""
        with self._lock:
            if self._channel is not None:
                # A keeper that does not read is not waited for: the loop must not hang on its watchman.
                with contextlib.suppress(OSError):
                    self._channel.send(b"alive", socket.MSG_DONTWAIT)

    def _say(self, text: str, descriptors: list[int]) -> None:
        if self._channel is None:
            return
        try:
            socket.send_fds(self._channel, [text.encode()], descriptors)
        except OSError as error:
            log.warning("the keeper does not listen (%s); it will be brought back", error)

    def revive(self) -> None:
        """Start a new keeper for this living worker and hand it everything."""
        with self._lock:
            if self._channel is None:
                return
            self._channel.close()
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            command = [sys.executable, "-m", "holdfast.daemon.keeper", "--adopt", str(os.getpid())]
            subprocess.Popen(
                [*command, "--channel", str(theirs.fileno()), "--", *self._worker_arguments],
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )
            theirs.close()
            self._channel = ours
            for name, descriptor in self._held.items():
                self._say(f"hold {name}", [descriptor])
            self._say("ready", [])
        log.warning("the keeper was gone; a new one holds %d pieces of memory", len(self._held))


class LedgerMemory:
    """Two checksummed copies in held memory, written in turn: a death while writing leaves the other copy whole."""

    NAME = "ledger"

    def __init__(self, link: KeeperLink, name: str = NAME) -> None:
        self.name = name
        descriptor = link.held.get(name)
        if descriptor is None:
            descriptor = make_sealed("holdfast-ledger", 2 * _COPY_BYTES)
            link.hold(name, descriptor)
        self._map = mmap.mmap(descriptor, 2 * _COPY_BYTES)
        self._sequence = max((sequence for sequence, _ in self._copies()), default=0)

    def rename(self, link: KeeperLink, name: str) -> None:
        """Have it held under another name."""
        link.rename(self.name, name)
        self.name = name

    def _copies(self) -> list[tuple[int, bytes]]:
        found = []
        for start in (0, _COPY_BYTES):
            sequence, payload_bytes, digest = _COPY_HEADER.unpack_from(self._map, start)
            if sequence == 0 or payload_bytes > limits.LEDGER_BYTES:
                continue
            body = start + _COPY_HEADER.size
            payload = self._map[body : body + payload_bytes]
            if chunk_digest(payload) == digest:
                found.append((sequence, payload))
        return found

    def read(self) -> bytes | None:
        """The newest copy that is whole; None in new memory."""
        copies = self._copies()
        return max(copies)[1] if copies else None

    def write(self, payload: bytes) -> None:
        """Replace the older copy."""
        if len(payload) > limits.LEDGER_BYTES:
            raise ValueError(f"the ledger takes {len(payload)} bytes, the limit is {limits.LEDGER_BYTES}")
        self._sequence += 1
        start = (self._sequence % 2) * _COPY_BYTES
        body = start + _COPY_HEADER.size
        _COPY_HEADER.pack_into(self._map, start, 0, 0, 0)
        self._map[body : body + len(payload)] = payload
        _COPY_HEADER.pack_into(self._map, start, self._sequence, len(payload), chunk_digest(payload))
