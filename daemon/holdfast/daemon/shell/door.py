"""The Unix socket: where trainers and commands arrive, get their memory as descriptors, and are known to be alive.

Covers the listening socket, the start lock, and one connection per client. The connection carries frames only from the
daemon to the client; its end tells each side that the other is gone, and comes after the last thread of a killed
process has ended.
"""

import fcntl
import grp
import logging
import os
import secrets
import socket
import struct
from dataclasses import dataclass
from pathlib import Path

from holdfast.protocol import frames, limits, messages
from holdfast.protocol.exit_codes import ExitCode, OperatorError
from msgspec import structs

log = logging.getLogger(__name__)

_CREDENTIALS = struct.Struct("iII")  # pid, uid, gid
_IPC_PATH_BYTES_MAX = 107  # sun_path of Linux
_SO_PEERGROUPS = 59  # Linux: the supplementary groups of who connected, as 32-bit numbers
_GROUPS_BYTES_MAX = 1024  # the most that Python asks for: 256 groups; of somebody in more only the primary one counts


@dataclass(slots=True)
class Arrived:
    """One connected client."""

    number: int
    connection: socket.socket
    token: bytes
    pid: int


class Door:
    """The Unix socket of one daemon."""

    def __init__(self, path: Path, *, group: str | None = None) -> None:
        self.path = path
        self.group_id = None if group is None else _group_id(group)
        self.endpoint = f"ipc://{path}.zmq"
        if len(f"{path}.zmq".encode()) > _IPC_PATH_BYTES_MAX:
            raise OperatorError(
                ExitCode.USAGE,
                f"the socket's path {path} is too long: {len(str(path)) + 4} bytes with its suffix, the kernel allows "
                f"{_IPC_PATH_BYTES_MAX}. Choose a shorter folder with --socket or HOLDFAST_SOCKET",
            )
        try:
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700 if group is None else 0o750)
            self._lock = self._take_lock()
            path.unlink(missing_ok=True)  # left by a killed predecessor; the lock says that it is dead
            self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
            self._listener.bind(str(path))
            self.share(path)
            self._listener.listen(limits.CLIENT_COUNT_MAX)
        except OSError as error:
            raise OperatorError(
                ExitCode.USAGE,
                f"no socket can be made at {path}: {error}. Choose a folder that this user may write to, with --socket "
                "or HOLDFAST_SOCKET",
            ) from error
        self._next = 1
        self.clients: dict[int, Arrived] = {}
        self.tokens: dict[bytes, int] = {}

    def _take_lock(self) -> int:
        lock_path = self.path.with_name(self.path.name + ".lock")
        descriptor = os.open(lock_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(descriptor, 32).decode().strip()
            os.close(descriptor)
            raise OperatorError(
                ExitCode.USAGE,
                f"a daemon is already running on {self.path} (process {holder or 'unknown'} holds {lock_path}). "
                "Stop it first, or give this one another --socket",
            ) from None
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, str(os.getpid()).encode(), 0)
        return descriptor

    def share(self, path: Path) -> None:
        """Let those connect to a socket who may: this user, and the configured group."""
        if self.group_id is not None:
            os.chown(path, -1, self.group_id)
        path.chmod(0o600 if self.group_id is None else 0o660)

    def fileno(self) -> int:
        """The listener, for polling."""
        return self._listener.fileno()

    def accept(self, welcome: messages.Welcome) -> Arrived | None:
        """Let one client in: as this daemon's user, as root, or of the configured group. None: nobody, or refused."""
        try:
            connection, _ = self._listener.accept()
        except BlockingIOError:
            return None
        except OSError as error:  # it left before it was let in, or this process has no descriptor left
            log.warning("a client could not be let in: %s", error)
            return None
        connection.setblocking(False)
        raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        pid, uid, gid = _CREDENTIALS.unpack(raw)
        allowed = uid in {0, os.geteuid()} or (self.group_id is not None and self.group_id in _groups(connection, gid))
        if not allowed or len(self.clients) >= limits.CLIENT_COUNT_MAX:
            log.warning(
                "process %d of user %d refused: expected user %d, root or a member of daemon.socket_group (%s), and at "
                "most %d clients (%d now)",
                pid, uid, os.geteuid(), self.group_id, limits.CLIENT_COUNT_MAX, len(self.clients),
            )  # fmt: skip
            connection.close()
            return None
        arrived = Arrived(self._next, connection, secrets.token_hex(16).encode(), pid)
        self._next += 1
        told = structs.replace(welcome, token=arrived.token.decode())
        try:
            connection.send(frames.encode(told))
        except OSError:
            connection.close()
            return None
        self.clients[arrived.number] = arrived
        self.tokens[arrived.token] = arrived.number
        return arrived

    def give(self, client: int, message: messages.MemoryGiven, descriptor: int) -> bool:
        """Send a descriptor. Returns False if the client doesn't take it, which ends its connection."""
        arrived = self.clients.get(client)
        if arrived is None:
            return True
        try:
            socket.send_fds(arrived.connection, [frames.encode(message)], [descriptor])
        except OSError as error:
            log.warning("client %d (process %d) does not take its memory: %s", client, arrived.pid, error)
            return False
        return True

    def ended(self, client: int) -> bool:
        """Whether a connection is at its end. What a client says here is ignored: its messages go elsewhere."""
        arrived = self.clients.get(client)
        if arrived is None:
            return True
        try:
            return arrived.connection.recv(1) == b""
        except BlockingIOError:
            return False
        except OSError:
            return True

    def close_client(self, client: int) -> None:
        """End one connection."""
        arrived = self.clients.pop(client, None)
        if arrived is not None:
            self.tokens.pop(arrived.token, None)
            arrived.connection.close()

    def close(self) -> None:
        """End all connections and give the path back."""
        for client in list(self.clients):
            self.close_client(client)
        self._listener.close()
        self.path.unlink(missing_ok=True)
        Path(f"{self.path}.zmq").unlink(missing_ok=True)
        os.close(self._lock)


def _group_id(name: str) -> int:
    try:
        return grp.getgrnam(name).gr_gid
    except KeyError:
        raise OperatorError(
            ExitCode.USAGE,
            f"daemon.socket_group: expected a group of this host, found {name!r}; make it with 'groupadd --system "
            f"{name}', or leave the setting out",
        ) from None


def _groups(connection: socket.socket, gid: int) -> set[int]:
    """All groups of the process at the other end, as they were when it connected."""
    try:
        raw = connection.getsockopt(socket.SOL_SOCKET, _SO_PEERGROUPS, _GROUPS_BYTES_MAX)
    except OSError:  # an older kernel, or too many groups: the primary one still counts
        return {gid}
    return {gid, *(number for (number,) in struct.iter_unpack("=I", raw[: len(raw) // 4 * 4]))}
