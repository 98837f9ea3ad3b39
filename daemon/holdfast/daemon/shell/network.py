"""ZeroMQ: the control plane, the trainers' messages, and the sockets of chunks. The one daemon file that imports zmq.

Covers sockets, keys and framing. Every frame is checked here (size, form, cluster, epoch, and that the key belongs to
the node that it claims) before the core hears of it; what fails is refused by name and never raises further.

Control: each node sends on a DEALER of its own to each peer's ROUTER, under CURVE; a ROUTER answers on the same
connection only to refuse. Trainers: a ROUTER on an ipc endpoint; a message counts only under a token that the Unix
socket handed out. All on the loop's thread. The sockets of the bulk plane are made here and run in `shell.bulk`.
"""

import contextlib
import logging
import time
from collections.abc import Callable, Container, Sequence
from typing import TYPE_CHECKING

import zmq
import zmq.utils.z85
from holdfast.daemon.core import events
from holdfast.daemon.shell.keys import Keys, reread
from holdfast.daemon.shell.names import Names
from holdfast.protocol import frames, limits, messages
from holdfast.protocol.config import ClusterConfig, config_digest
from holdfast.protocol.exit_codes import ExitCode, OperatorError
from zmq.utils.monitor import recv_monitor_message

if TYPE_CHECKING:
    from holdfast.daemon.shell.sealing import Sealing  # needs a package that not everybody installs

Context = zmq.Context[zmq.Socket[bytes]]
Frame = zmq.Frame
Poller = zmq.Poller
Socket = zmq.Socket[bytes]
READABLE, WRITABLE = zmq.POLLIN, zmq.POLLOUT
log = logging.getLogger(__name__)

_ZAP_DOMAIN = b"holdfast"
_SOCKETS_PER_NODE_COUNT = 3  # one to send on, and the two ends of its monitor
_SOCKETS_OF_ITS_OWN_COUNT = 64  # a dozen are used
_HWM_FRAMES = 1024  # control messages queued per peer; beyond it they are dropped and repaired by heartbeats
_TURN_FRAMES_MAX = 256  # frames taken from one socket per turn, so that none starves the others
_SLACK_BYTES = 64 << 10
_AWAY_S = 3.0  # a node not heard for so long may have moved: its name is looked up again
_REREAD_S = 2.0  # between two looks into the keys folder: strangers who knock cost no more than that
_TCP_OPTIONS = {
    zmq.LINGER: 0, zmq.IPV6: 1, zmq.HEARTBEAT_IVL: 1000, zmq.HEARTBEAT_TIMEOUT: 3000, zmq.TCP_MAXRT: 3000,
    zmq.HANDSHAKE_IVL: 5000, zmq.CONNECT_TIMEOUT: 2000, zmq.RECONNECT_IVL: 100, zmq.RECONNECT_IVL_MAX: 1000,
}  # fmt: skip
_HANDSHAKE_FAILED = (
    zmq.Event.HANDSHAKE_FAILED_AUTH | zmq.Event.HANDSHAKE_FAILED_PROTOCOL | zmq.Event.HANDSHAKE_FAILED_NO_DETAIL
)
_TOLD_OF_DEALERS = _HANDSHAKE_FAILED | zmq.Event.HANDSHAKE_SUCCEEDED | zmq.Event.DISCONNECTED


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


class ControlPlane:
    """Messages with peers and trainers. All methods on the loop's thread."""

    def __init__(
        self,
        config: ClusterConfig,
        node: int,
        keys: Keys | None,
        context: Context,
        sealing: "Sealing | None" = None,
    ) -> None:
        self._config, self._node, self._keys, self._context = config, node, keys, context
        allow_sockets(context, len(config.nodes))
        self._sealing = sealing
        self._digest = config_digest(config)
        self.incarnation = 0
        self.takes: Callable[[int, int], bool] = lambda _node, _incarnation: True  # whose word on sealing counts
        self.names = Names([peer.host for peer in config.nodes])
        self._wanted: set[int] = set()  # nodes to be talked to that have names
        self._heard_s: dict[int, float] = {}
        self._dialled: dict[int, str] = {}  # where each dealer connects to
        self._connected: set[int] = set()  # nodes whose dealer has a connection
        self._dealers: dict[int, zmq.Socket[bytes]] = {}
        self._monitors: dict[zmq.Socket[bytes], int] = {}
        self._poller: zmq.Poller | None = None
        self._reread_s = 0.0  # when the keys folder may be looked into again
        self._key_attempts: dict[int, int] = {}  # node -> handshakes that failed for its key, while two are listed
        self._zap = context.socket(zmq.REP) if keys else None
        if self._zap is not None:
            self._zap.bind("inproc://zeromq.zap.01")
        self._router = self._listen()
        self._knocks = self._router.get_monitor_socket(_HANDSHAKE_FAILED)
        self._clients = context.socket(zmq.ROUTER)
        self._clients.setsockopt(zmq.LINGER, 0)
        self._clients.setsockopt(zmq.MAXMSGSIZE, limits.CONTROL_FRAME_BYTES_MAX)
        self._clients.setsockopt(zmq.ROUTER_HANDOVER, 1)

    def _listen(self) -> zmq.Socket[bytes]:
        router = self._context.socket(zmq.ROUTER)
        _set_tcp(router)
        router.setsockopt(zmq.MAXMSGSIZE, limits.CONTROL_FRAME_BYTES_MAX + _SLACK_BYTES)
        router.setsockopt(zmq.RCVHWM, _HWM_FRAMES)
        if self._keys is not None:
            router.setsockopt(zmq.CURVE_SERVER, 1)
            router.setsockopt(zmq.CURVE_SECRETKEY, self._keys.secret)
            router.setsockopt(zmq.ZAP_DOMAIN, _ZAP_DOMAIN)
            router.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)
        mine = self._config.nodes[self._node]
        try:
            router.bind(_endpoint(mine.host, mine.port))
        except zmq.ZMQError as error:
            raise OperatorError(
                ExitCode.USAGE,
                f"can't listen on {mine.address} (node {mine.name}): {error}. Is another daemon or program using it?",
            ) from error
        return router

    def bind_clients(self, endpoint: str) -> None:
        """Listen for trainers and commands."""
        self._clients.bind(endpoint)

    def register(self, poller: zmq.Poller) -> None:
        """Add what is read to a poller."""
        self._poller = poller
        for socket in [
            self._router,
            self._clients,
            self._zap,
            self._knocks,
            *self._dealers.values(),
            *self._monitors,
        ]:
            if socket is not None and socket not in poller:
                poller.register(socket, zmq.POLLIN)

    def dial(self, node: int, poller: zmq.Poller) -> None:
        """Connect to a node's control socket, as soon as it is known where that is."""
        address = self.names.of(node)
        if address != self._config.nodes[node].host:
            self._wanted.add(node)
        if address is None:
            self.names.look(node)
        if node in self._dealers or address is None:
            return
        dealer = self._context.socket(zmq.DEALER)
        _set_tcp(dealer)
        dealer.setsockopt(zmq.SNDHWM, _HWM_FRAMES)
        dealer.setsockopt(zmq.MAXMSGSIZE, limits.CONTROL_FRAME_BYTES_MAX)
        dealer.setsockopt(
            zmq.IMMEDIATE, 1
        )  # no queue for a peer that is away: a stale fact is worth less than a fresh one
        if self._keys is not None:
            dealer.setsockopt(zmq.CURVE_PUBLICKEY, self._keys.public)
            dealer.setsockopt(zmq.CURVE_SECRETKEY, self._keys.secret)
            dealer.setsockopt(zmq.CURVE_SERVERKEY, self._keys.of(node, self._key_attempts.get(node, 0)))
        self._monitors[dealer.get_monitor_socket(_TOLD_OF_DEALERS)] = node
        dealer.connect(_endpoint(address, self._config.nodes[node].port))
        self._dealers[node], self._dialled[node] = dealer, address
        self.register(poller)

    def redial(self) -> None:
        """Dial those again whose key is being rotated and did not have the one that was tried, and who moved.

        Once per tick. A node may be heard and yet not be where it is dialled: its replacement dials us, and a name
        server that told of it late gave us the address of who was there before.
        """
        for node in self._wanted:
            if node not in self._connected or time.monotonic() > self._heard_s.get(node, 0.0) + _AWAY_S:
                self.names.look(node)
            if node in self._dealers and self.names.of(node) != self._dialled[node]:
                self._hang_up(node, next(monitor for monitor, whose in self._monitors.items() if whose == node))
        for node in (self._key_attempts.keys() | self._wanted) - self._dealers.keys():
            if self._poller is not None:
                self.dial(node, self._poller)

    def send_peer(self, node: int, message: messages.PeerMessage) -> None:
        """Send to a dialled node; dropped if it is not connected or its queue is full."""
        try:
            frame = frames.encode_peer(
                message,
                cluster=self._config.cluster_name,
                epoch=self._config.epoch,
                node=self._node,
                incarnation=self.incarnation,
                config=self._digest,
                bulk=frames.AS_THEY_ARE if self._sealing is None else self._sealing.offer(node),
            )
        except ValueError as error:  # the status of thousands of nodes: better unsaid than the end of this process
            log.error("a message to node %d is not sent: %s", node, error)
            return
        dealer = self._dealers.get(node)
        if dealer is not None:
            try:
                dealer.send(frame, zmq.DONTWAIT)
            except zmq.Again:
                log.debug("message %s to node %d dropped: not connected", type(message).__name__, node)

    def send_client(self, token: bytes, message: messages.DaemonMessage) -> None:
        """Send to a trainer or command; dropped if it is gone."""
        try:
            self._clients.send_multipart([token, frames.encode(message)], zmq.DONTWAIT)
        except ValueError as error:  # as above
            log.error("a message to a client is not sent: %s", error)
        except (zmq.Again, zmq.ZMQError) as error:
            log.debug("message %s to a client dropped: %s", type(message).__name__, error)

    def receive(self, clients: dict[bytes, int], ready: Container[object]) -> list[events.Event]:
        """Take what has come on the sockets in `ready`, bounded per turn. `clients`: token -> number."""
        found: list[events.Event] = []
        if self._zap is not None and self._zap in ready:
            self._answer_zap(self._zap, found)
        for frame_parts in _drain_frames(self._router) if self._router in ready else ():
            self._from_peer(frame_parts, found)
        for parts in _drain(self._clients) if self._clients in ready else ():
            client = clients.get(parts[0])
            if client is not None and len(parts) == 2:
                try:
                    found.append(events.ClientSaid(client, frames.decode_client(parts[1])))
                except frames.FrameRefusedError as refusal:
                    denied = messages.Denied(
                        "",
                        "",
                        ExitCode.USAGE,
                        f"message refused: {refusal}"[: limits.TEXT_CHARS_MAX],
                    )
                    self.send_client(parts[0], denied)
        for node, dealer in self._dealers.items():
            for parts in _drain(dealer) if dealer in ready else ():
                self._refused_by_peer(node, parts, found)
        while self._knocks in ready and self._knocks.poll(0):
            recv_monitor_message(self._knocks)
            text = "handshake: a connection failed its handshake: no ZeroMQ, or a key that is not listed on both sides"
            found.append(events.PeerRefused(None, "key", text, by_us=True))
        for monitor, node in list(self._monitors.items()):
            while monitor in ready and monitor.poll(0):
                self._connection_changed(node, monitor, int(recv_monitor_message(monitor)["event"]), found)
                if node not in self._dealers:
                    break
        return found

    def _connection_changed(self, node: int, monitor: zmq.Socket[bytes], event: int, found: list[events.Event]) -> None:
        match event:
            case zmq.Event.HANDSHAKE_SUCCEEDED:
                self._connected.add(node)
            case zmq.Event.DISCONNECTED:
                self._connected.discard(node)
            case _:
                self._handshake_failed(node, monitor, event, found)

    def _handshake_failed(self, node: int, monitor: zmq.Socket[bytes], event: int, found: list[events.Event]) -> None:
        """A node that we dialled and we do not know each other: whose key is it?"""
        text = "it does not list our key, or not any more"
        if event != zmq.Event.HANDSHAKE_FAILED_AUTH:
            text = "its CURVE handshake failed: expected the key that we list for it, or it uses no keys"
            self._reread_keys()
            if self._keys and self._keys.several(node):
                self._key_attempts[node] = self._key_attempts.get(node, 0) + 1
                self._hang_up(node, monitor)
        found.append(events.PeerRefused(node, "key", f"{text}; compare the keys folders of both", by_us=False))

    def _reread_keys(self) -> None:
        """Somebody and we do not know each other's keys: perhaps a key was replaced meanwhile."""
        if self._keys is not None and time.monotonic() >= self._reread_s:
            self._reread_s = time.monotonic() + _REREAD_S
            self._keys = reread(self._keys, self._config)

    def _hang_up(self, node: int, monitor: zmq.Socket[bytes]) -> None:
        """Close the connection to a node, to dial it with another key, or elsewhere, at the next tick."""
        dealer = self._dealers.pop(node)
        self._connected.discard(node)
        del self._monitors[monitor]
        dealer.disable_monitor()
        for socket in (dealer, monitor):
            if self._poller is not None and socket in self._poller:
                self._poller.unregister(socket)
            socket.close(0)

    def _from_peer(self, parts: list[zmq.Frame], found: list[events.Event]) -> None:
        identity, body = parts[0].bytes, parts[1:]
        try:
            if len(body) != 1:
                raise frames.FrameRefusedError("malformed", f"expected 1 frame, found {len(body)}")
            envelope, message = frames.decode_peer(
                body[0].bytes,
                cluster=self._config.cluster_name,
                epoch=self._config.epoch,
                config=self._digest,
                bulk_mode=self._config.bulk_mode,
            )
            self._check_sender(envelope.node, body[0])
            if self._sealing is not None and self.takes(envelope.node, envelope.incarnation):
                self._sealing.heard(envelope.node, envelope.incarnation, envelope.bulk)
        except frames.FrameRefusedError as refusal:
            found.append(events.PeerRefused(None, refusal.code, f"{refusal}", by_us=True))
            self._refuse(identity, refusal)
            return
        self._heard_s[envelope.node] = time.monotonic()
        found.append(events.PeerSaid(envelope.node, envelope.incarnation, message))

    def _check_sender(self, node: int, frame: zmq.Frame) -> None:
        """A frame must come from another node of this cluster, and under that node's own key."""
        if node >= len(self._config.nodes) or node == self._node:
            raise frames.FrameRefusedError("node", f"node index {node} is not another node of this cluster")
        if self._keys is not None:
            holder = frame.get("User-Id")  # what `_answer_zap` said of the connection's key
            if holder != str(node):
                raise frames.FrameRefusedError("key", f"expected the key of node {node}, found that of node {holder}")

    def _refuse(self, identity: bytes, refusal: frames.FrameRefusedError) -> None:
        name = self._config.nodes[self._node].name
        text = f"node {name} of cluster {self._config.cluster_name!r}: {refusal.text}"[: limits.TEXT_CHARS_MAX]
        answer = messages.Refused(code=refusal.code, text=text)  # type: ignore[arg-type]  # frames uses the same codes
        frame = frames.encode(answer)
        try:
            self._router.send_multipart([identity, frame], zmq.DONTWAIT)
        except (zmq.Again, zmq.ZMQError):
            log.debug("refusal not delivered")

    def _refused_by_peer(self, node: int, parts: list[bytes], found: list[events.Event]) -> None:
        try:
            refusal = frames.decode_refusal(parts[0])
        except frames.FrameRefusedError:
            return
        found.append(events.PeerRefused(node, refusal.code, refusal.text, by_us=False, incarnation=refusal.incarnation))

    def _answer_zap(self, zap: zmq.Socket[bytes], found: list[events.Event]) -> None:
        assert self._keys is not None
        for _ in range(_TURN_FRAMES_MAX):
            try:
                parts = zap.recv_multipart(zmq.DONTWAIT)
            except zmq.Again:
                return
            version, request = parts[0], parts[1]
            address = parts[3].decode(errors="replace")
            key = zmq.utils.z85.encode(parts[6]) if len(parts) > 6 and len(parts[6]) == 32 else b""
            if key not in self._keys.nodes:
                self._reread_keys()
            node = self._keys.nodes.get(key)
            if node is None:
                text = f"key: {key.decode()!r}, from {address}, is not in {self._config.keys_dir}"
                found.append(events.PeerRefused(None, "key", text, by_us=True))
                zap.send_multipart([version, request, b"400", b"key not listed", b"", b""])
            else:
                zap.send_multipart([version, request, b"200", b"OK", str(node).encode(), b""])

    def close(self) -> None:
        """Close every socket."""
        for monitor in (self._knocks, *self._monitors):
            monitor.close(0)
        self._router.disable_monitor()
        for dealer in self._dealers.values():
            dealer.disable_monitor()
            dealer.close(0)
        for socket in (self._router, self._clients, self._zap):
            if socket is not None:
                socket.close(0)


def _drain(socket: zmq.Socket[bytes]) -> list[list[bytes]]:
    found: list[list[bytes]] = []
    while len(found) < _TURN_FRAMES_MAX:
        try:
            found.append(socket.recv_multipart(zmq.DONTWAIT))
        except zmq.Again:
            break
    return found


def _drain_frames(socket: zmq.Socket[bytes]) -> list[list[zmq.Frame]]:
    """Like `_drain`, with what ZeroMQ knows of the connection beside each frame."""
    found: list[list[zmq.Frame]] = []
    while len(found) < _TURN_FRAMES_MAX:
        try:
            found.append(socket.recv_multipart(zmq.DONTWAIT, copy=False))
        except zmq.Again:
            break
    return found
