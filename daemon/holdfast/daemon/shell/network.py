"""ZeroMQ: all sockets of a daemon. The one daemon file that imports zmq.

Covers making sockets with their limits, heartbeats and keys, and sending and receiving without waiting. What is said
over them is `shell.control`'s (peers, trainers and commands), `shell.bulk`'s (chunks) and `shell.remote`'s (trainers
over the network). Every function leaves a socket with the thread that calls it.
"""

import contextlib
from collections.abc import Callable, Sequence
from enum import Enum, auto

import zmq
import zmq.utils.z85
from holdfast.daemon.shell.keys import Keys
from holdfast.protocol import limits
from holdfast.protocol.exit_codes import ExitCode, OperatorError
from zmq.utils.monitor import recv_monitor_message

Context = zmq.Context[zmq.Socket[bytes]]
Frame = zmq.Frame
Poller = zmq.Poller
Socket = zmq.Socket[bytes]
READABLE, WRITABLE = zmq.POLLIN, zmq.POLLOUT

_ZAP_DOMAIN = b"holdfast"
_SOCKETS_PER_NODE_COUNT = 3  # one to send on, and the two ends of its monitor
_SOCKETS_OF_ITS_OWN_COUNT = 64  # a dozen are used
_HWM_FRAMES = 1024  # control messages queued per peer; beyond it they are dropped and repaired by heartbeats
_TURN_FRAMES_MAX = 256  # frames taken from one socket per turn, so that none starves the others
_SLACK_BYTES = 64 << 10
_TCP_OPTIONS = {
    zmq.LINGER: 0, zmq.IPV6: 1, zmq.HEARTBEAT_IVL: 1000, zmq.HEARTBEAT_TIMEOUT: 3000, zmq.TCP_MAXRT: 3000,
    zmq.HANDSHAKE_IVL: 5000, zmq.CONNECT_TIMEOUT: 2000, zmq.RECONNECT_IVL: 100, zmq.RECONNECT_IVL_MAX: 1000,
}  # fmt: skip
_HANDSHAKE_FAILED = (
    zmq.Event.HANDSHAKE_FAILED_AUTH | zmq.Event.HANDSHAKE_FAILED_PROTOCOL | zmq.Event.HANDSHAKE_FAILED_NO_DETAIL
)
_TOLD_OF_DEALERS = _HANDSHAKE_FAILED | zmq.Event.HANDSHAKE_SUCCEEDED | zmq.Event.DISCONNECTED


class Change(Enum):
    """What became of a connection."""

    CONNECTED = auto()
    DISCONNECTED = auto()
    NOT_LISTED = auto()  # the other side does not list our key
    REFUSED = auto()  # the handshake failed for another reason


def public_key_of(secret: bytes) -> bytes:
    """The public CURVE key of a secret one (Z85); nobody's where the secret is not one."""
    with contextlib.suppress(ValueError, zmq.ZMQError):
        return zmq.curve_public(secret)
    return b""


def allow_sockets(context: Context, node_count: int) -> None:
    """Let a context have sockets for all nodes; before its first socket. Libzmq's own limit ends at 340 nodes."""
    wanted = _SOCKETS_OF_ITS_OWN_COUNT + _SOCKETS_PER_NODE_COUNT * node_count
    context.set(zmq.MAX_SOCKETS, max(wanted, context.get(zmq.MAX_SOCKETS)))


def _set_tcp(socket: zmq.Socket[bytes]) -> None:
    for option, value in _TCP_OPTIONS.items():
        socket.setsockopt(option, value)


def _endpoint(host: str, port: int) -> str:
    return f"tcp://[{host}]:{port}" if ":" in host else f"tcp://{host}:{port}"


def _listen(router: Socket, host: str, port: int, keys: Keys | None, problem: str) -> None:
    """Bind to an address under CURVE, if there are keys. Raises OperatorError (exit code 2), which `problem` begins."""
    if keys is not None:
        router.setsockopt(zmq.CURVE_SERVER, 1)
        router.setsockopt(zmq.CURVE_SECRETKEY, keys.secret)
        router.setsockopt(zmq.ZAP_DOMAIN, _ZAP_DOMAIN)
        router.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)  # else a server without an authenticator admits any key
    try:
        router.bind(_endpoint(host, port))
    except zmq.ZMQError as error:
        text = f"{problem}: {error}. Is another daemon or program using it?"
        raise OperatorError(ExitCode.USAGE, text) from error


def control_router(context: Context, host: str, port: int, keys: Keys | None, *, who: str) -> tuple[Socket, Socket]:
    """A socket that peers reach, and its monitor: readable when a handshake failed. `who` is for the error."""
    router = context.socket(zmq.ROUTER)
    _set_tcp(router)
    router.setsockopt(zmq.MAXMSGSIZE, limits.CONTROL_FRAME_BYTES_MAX + _SLACK_BYTES)
    router.setsockopt(zmq.RCVHWM, _HWM_FRAMES)
    _listen(router, host, port, keys, f"can't listen on {who}")
    return router, router.get_monitor_socket(_HANDSHAKE_FAILED)


def control_dealer(
    context: Context, host: str, port: int, keys: Keys | None, server: bytes | None
) -> tuple[Socket, Socket]:
    """A socket that sends to a peer, whose key must be `server`, and its monitor, for `next_change`."""
    dealer = context.socket(zmq.DEALER)
    _set_tcp(dealer)
    dealer.setsockopt(zmq.SNDHWM, _HWM_FRAMES)
    dealer.setsockopt(zmq.MAXMSGSIZE, limits.CONTROL_FRAME_BYTES_MAX)
    dealer.setsockopt(zmq.IMMEDIATE, 1)  # no queue for who is away: a stale fact is worth less than a fresh one
    if keys is not None and server is not None:
        dealer.setsockopt(zmq.CURVE_PUBLICKEY, keys.public)
        dealer.setsockopt(zmq.CURVE_SECRETKEY, keys.secret)
        dealer.setsockopt(zmq.CURVE_SERVERKEY, server)
    monitor = dealer.get_monitor_socket(_TOLD_OF_DEALERS)
    dealer.connect(_endpoint(host, port))
    return dealer, monitor


def clients_router(context: Context) -> Socket:
    """A socket for trainers and commands of this host, not bound yet."""
    router = context.socket(zmq.ROUTER)
    router.setsockopt(zmq.LINGER, 0)
    router.setsockopt(zmq.MAXMSGSIZE, limits.CONTROL_FRAME_BYTES_MAX)
    router.setsockopt(zmq.ROUTER_HANDOVER, 1)
    return router


def next_change(monitor: Socket) -> Change | None:
    """What a monitor has to tell next; None: nothing now."""
    if not monitor.poll(0):
        return None
    match int(recv_monitor_message(monitor)["event"]):
        case zmq.Event.HANDSHAKE_SUCCEEDED:
            return Change.CONNECTED
        case zmq.Event.DISCONNECTED:
            return Change.DISCONNECTED
        case zmq.Event.HANDSHAKE_FAILED_AUTH:
            return Change.NOT_LISTED
        case _:
            return Change.REFUSED


def bulk_pull(context: Context, host: str, *, frame_bytes_max: int) -> tuple[Socket, int]:
    """A socket that receives chunks on a free port of `host`, and the port."""
    pull = context.socket(zmq.PULL)
    _set_tcp(pull)
    pull.setsockopt(zmq.RCVHWM, limits.CHUNK_CREDITS)
    pull.setsockopt(zmq.MAXMSGSIZE, frame_bytes_max + _SLACK_BYTES)
    pull.bind(_endpoint(host, 0).replace(":0", ":*"))
    return pull, int(pull.getsockopt_string(zmq.LAST_ENDPOINT).rpartition(":")[2])


def bulk_push(context: Context, host: str, port: int) -> Socket:
    """A socket that sends chunks to a peer; it queues nothing for one that is away."""
    push = context.socket(zmq.PUSH)
    _set_tcp(push)
    push.setsockopt(zmq.SNDHWM, limits.CHUNK_CREDITS)
    push.setsockopt(zmq.IMMEDIATE, 1)
    push.connect(_endpoint(host, port))
    return push


def has_room(socket: Socket) -> bool:
    """Whether a message would be taken now."""
    return bool(int(socket.getsockopt(zmq.EVENTS)) & zmq.POLLOUT)


def try_send(socket: Socket, parts: Sequence[bytes | bytearray | memoryview]) -> bool:
    """Send frames without copying them; False if the socket has no room now."""
    try:
        socket.send_multipart(parts, zmq.DONTWAIT, copy=False)
    except zmq.Again:
        return False
    return True


def try_receive(socket: Socket) -> list[Frame] | None:
    """The frames of one message as libzmq holds them, None if there is none."""
    try:
        return socket.recv_multipart(zmq.DONTWAIT, copy=False)
    except zmq.Again:
        return None


def gate_router(context: Context, host: str, port: int, keys: Keys | None) -> Socket:
    """A socket that trainers reach over the network; each connection has an identity of its own."""
    router = context.socket(zmq.ROUTER)
    _set_tcp(router)
    router.setsockopt(zmq.MAXMSGSIZE, limits.REMOTE_PIECE_BYTES_MAX + _SLACK_BYTES)
    router.setsockopt(zmq.RCVHWM, 2 * limits.REMOTE_CREDITS)
    router.setsockopt(zmq.SNDHWM, _TURN_FRAMES_MAX)
    router.setsockopt(zmq.ROUTER_MANDATORY, 1)
    _listen(router, host, port, keys, f"trainers.address: can't listen on {host} port {port}")
    return router


def gate_monitor(router: Socket) -> Socket:
    """Readable when a connection of the gate's ended or failed its handshake."""
    return router.get_monitor_socket(_HANDSHAKE_FAILED | zmq.Event.DISCONNECTED)


def gate_words(context: Context, endpoint: str, token: str) -> Socket:
    """A socket as any client's of this host, for a trainer over the network."""
    dealer = context.socket(zmq.DEALER)
    dealer.setsockopt(zmq.LINGER, 0)
    dealer.setsockopt(zmq.ROUTING_ID, token.encode())
    dealer.setsockopt(zmq.MAXMSGSIZE, limits.CONTROL_FRAME_BYTES_MAX)
    dealer.connect(endpoint)
    return dealer


def zap_socket(context: Context) -> Socket:
    """Where libzmq asks about each key that wants to come in, for all CURVE servers of a context."""
    zap = context.socket(zmq.REP)
    zap.bind("inproc://zeromq.zap.01")
    return zap


def answer_zap(zap: Socket, user_of: Callable[[bytes], str | None], refused: Callable[[str, str], None]) -> None:
    """Let those in whose key has a user; tell of the others (key, address). Bounded per turn."""
    for _ in range(_TURN_FRAMES_MAX):
        try:
            parts = zap.recv_multipart(zmq.DONTWAIT)
        except zmq.Again:
            return
        version, request = parts[0], parts[1]
        key = zmq.utils.z85.encode(parts[6]) if len(parts) > 6 and len(parts[6]) == 32 else b""
        user = user_of(key)
        if user is None:
            refused(key.decode(), parts[3].decode(errors="replace"))
            zap.send_multipart([version, request, b"400", b"key not listed", b"", b""])
        else:
            zap.send_multipart([version, request, b"200", b"OK", user.encode(), b""])


def key_user(frame: Frame) -> str:
    """Whose key the connection has that a frame came over, as `answer_zap` was told."""
    return str(frame.get("User-Id"))


def whose(frame: Frame) -> str:
    """The key's user and the address of the connection that a frame came over, as far as they are known."""
    found = []
    for name in ("User-Id", "Peer-Address"):
        with contextlib.suppress(zmq.ZMQError, KeyError):
            found.append(str(frame.get(name)))
    return " at ".join(word for word in found if word)


def send_or_gone(router: Socket, parts: Sequence[bytes | bytearray | memoryview]) -> bool:
    """Send to whom the first frame names, without copying; False: its connection has gone, or it takes no more."""
    try:
        router.send_multipart(parts, zmq.DONTWAIT, copy=False)
    except (zmq.Again, zmq.ZMQError):
        return False
    return True


def drain(socket: Socket) -> list[list[bytes]]:
    """All messages that are there, bounded per turn."""
    found: list[list[bytes]] = []
    while len(found) < _TURN_FRAMES_MAX:
        try:
            found.append(socket.recv_multipart(zmq.DONTWAIT))
        except zmq.Again:
            break
    return found


def drain_frames(socket: Socket) -> list[list[Frame]]:
    """Like `drain`, with what ZeroMQ knows of the connection beside each frame."""
    found: list[list[Frame]] = []
    while len(found) < _TURN_FRAMES_MAX:
        try:
            found.append(socket.recv_multipart(zmq.DONTWAIT, copy=False))
        except zmq.Again:
            break
    return found
