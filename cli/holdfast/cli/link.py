"""The command line's one use of ZeroMQ: a short conversation with a daemon, and new keys."""

import socket
import struct
import time
from collections.abc import Sequence
from os import environ
from pathlib import Path
from typing import Any, TypeVar

import zmq
from holdfast.protocol import frames, limits, messages
from holdfast.protocol.exit_codes import ExitCode, OperatorError
from holdfast.protocol.trace import AskTrace, TraceAnswer

ANSWER_S = 5.0  # a daemon answers within milliseconds, the collector within a heartbeat; longer means that it hangs
HEARD_S = 2 * limits.JOIN_S  # by then a fresh collector has heard every node that lives
LOOK_S = 0.2  # between two looks at the status
TRACES_AT_ONCE = 16  # nodes asked for what they remember: a megabyte each at most waits in the daemon's queue
_CREDENTIALS = struct.Struct("iII")  # pid, uid, gid

T = TypeVar(
    "T", messages.StatusAnswer, messages.RecoverAnswer, messages.ForgetAnswer, messages.DrillAnswer, TraceAnswer
)


def new_keypair() -> tuple[str, str]:
    """A fresh CURVE key pair: public and secret, 40 characters of Z85 each."""
    public, secret = zmq.curve_keypair()
    return public.decode("ascii"), secret.decode("ascii")


def default_socket() -> Path:
    """The daemon's socket if none is named: the first of $HOLDFAST_SOCKET, then the usual places."""
    listed = [path for path in environ.get("HOLDFAST_SOCKET", "").split(",") if path]
    if listed:
        return Path(listed[0])
    system = Path("/run/holdfast/holdfast.sock")
    runtime = environ.get("XDG_RUNTIME_DIR")
    return system if system.exists() or not runtime else Path(runtime) / "holdfast" / "holdfast.sock"


class Daemon:
    """A conversation with the daemon on one socket. Use as a context manager."""

    def __init__(self, path: Path) -> None:
        """Connect. Raises OperatorError (daemon unreachable) if nobody answers."""
        self.path = path
        self._door = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._door.settimeout(ANSWER_S)
        try:
            self._door.connect(str(path))
            welcome = frames.decode_door(self._door.recv(2 * limits.TEXT_CHARS_MAX))
        except (OSError, frames.FrameRefusedError) as error:
            self._door.close()
            raise OperatorError(
                ExitCode.UNREACHABLE,
                f"no daemon answers on {path}: {error}; start one with 'holdfast daemon', or name its socket with "
                "--socket or HOLDFAST_SOCKET",
            ) from error
        assert isinstance(welcome, messages.Welcome)
        if welcome.protocol != limits.PROTOCOL_VERSION:
            self._door.close()
            raise OperatorError(
                ExitCode.WRONG_CLUSTER,
                f"expected protocol version {limits.PROTOCOL_VERSION}, the daemon on {path} speaks {welcome.protocol}; "
                "use the holdfast command of the same version",
            )
        self.welcome = welcome
        self._request = 1
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context(io_threads=1)
        self._dealer = self._context.socket(zmq.DEALER)
        self._dealer.setsockopt(zmq.ROUTING_ID, welcome.token.encode())
        self._dealer.setsockopt(zmq.LINGER, 0)
        self._dealer.setsockopt(zmq.MAXMSGSIZE, limits.CONTROL_FRAME_BYTES_MAX)
        self._dealer.connect(welcome.endpoint)

    def __enter__(self) -> "Daemon":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def pid(self) -> int:
        """The worker's process; 0 if it is in a container that this command can't look into."""
        raw = self._door.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        pid, _, _ = _CREDENTIALS.unpack(raw)
        return int(pid)

    def close(self) -> None:
        """End the conversation."""
        self._dealer.close(0)
        self._context.destroy(linger=0)
        self._door.close()

    def status(self) -> dict[str, Any]:
        """The cluster's status, schema "holdfast.status/1"."""
        return self._ask(messages.AskStatus(), messages.StatusAnswer).status

    def complete_status(self) -> dict[str, Any]:
        """The status as soon as every node was heard; after HEARD_S as it is then, its `complete` still false."""
        deadline_s = time.monotonic() + HEARD_S
        while not (status := self.status())["complete"] and time.monotonic() < deadline_s:
            time.sleep(LOOK_S)
        return status

    def recover(self, node: str | None = None) -> messages.RecoverAnswer:
        """Start the rebuild of one node, or of all that lost something."""
        return self._ask(messages.AskRecover(node), messages.RecoverAnswer)

    def drill(self, stripes: int) -> str:
        """Have all nodes drill; the status shows what comes of it."""
        return self._ask(messages.AskDrill(stripes), messages.DrillAnswer).text

    def forget(self, job: str) -> bool:
        """Free all that a job holds. Returns whether the daemon knew the job."""
        return self._ask(messages.AskForget(job), messages.ForgetAnswer).found

    def traces(self, nodes: Sequence[int], newest: int) -> list[TraceAnswer]:
        """What each of these nodes remembers of its newest snapshots; the daemon answers for those that don't."""
        found: list[TraceAnswer] = []
        for start in range(0, len(nodes), TRACES_AT_ONCE):
            open_requests = {self._request + index: node for index, node in enumerate(nodes[start:][:TRACES_AT_ONCE])}
            self._request += len(open_requests)
            for request, node in open_requests.items():
                self._dealer.send(frames.encode(AskTrace(request, node, newest)))
            while open_requests:
                answer = self._answer(TraceAnswer)
                if open_requests.pop(answer.request, None) is not None:
                    found.append(answer)
        return found

    def _ask(self, question: messages.ClientMessage, kind: type[T]) -> T:
        self._dealer.send(frames.encode(question))
        return self._answer(kind)

    def _answer(self, kind: type[T]) -> T:
        deadline_s = time.monotonic() + ANSWER_S
        while (left_s := deadline_s - time.monotonic()) > 0:
            if not self._dealer.poll(int(left_s * 1000) + 1):
                continue
            try:
                answer = frames.decode_daemon(self._dealer.recv())
            except frames.FrameRefusedError as error:
                text = f"the daemon on {self.path} says what can't be read: {error}; use the holdfast of its version"
                raise OperatorError(ExitCode.UNREACHABLE, text) from error
            if isinstance(answer, messages.Denied):
                raise OperatorError(ExitCode(answer.exit_code), answer.text)
            if isinstance(answer, kind):
                return answer
        raise OperatorError(
            ExitCode.UNREACHABLE,
            f"the daemon on {self.path} did not answer within {ANSWER_S} s; look at its log, or restart its worker",
        )
