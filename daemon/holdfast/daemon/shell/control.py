"""The control plane: what this daemon and its peers, trainers and commands tell each other.

Every frame is checked here (size, form, cluster, epoch, and that the key belongs to the node that it claims) before the
core hears of it; what fails is refused by name and never raises further.

Each node sends on a DEALER of its own to each peer's ROUTER, under CURVE; a ROUTER answers on the same connection only
to refuse. Trainers and commands: a ROUTER on an ipc endpoint; a message counts only under a token that the Unix socket
handed out. All on the loop's thread. The sockets are `shell.network`'s.
"""

import logging
import time
from collections.abc import Callable, Container
from typing import TYPE_CHECKING

from holdfast.daemon.core import events
from holdfast.daemon.shell import network
from holdfast.daemon.shell.keys import Keys, reread
from holdfast.daemon.shell.names import Names
from holdfast.daemon.shell.network import READABLE, Change, Context, Frame, Poller, Socket
from holdfast.protocol import frames, limits, messages
from holdfast.protocol.config import ClusterConfig, config_digest
from holdfast.protocol.exit_codes import ExitCode

if TYPE_CHECKING:
    from holdfast.daemon.shell.sealing import Sealing  # needs a package that not everybody installs

log = logging.getLogger(__name__)

_AWAY_S = 3.0  # a node not heard for so long may have moved: its name is looked up again
_REREAD_S = 2.0  # between two looks into the keys folder: strangers who knock cost no more than that


class Circle:
    """The nodes of one epoch: who they are, and a connection of our own to each that we talk to."""

    def __init__(
        self,
        config: ClusterConfig,
        node: int,
        keys: Keys | None,
        context: Context,
        sealing: "Sealing | None" = None,
    ) -> None:
        self.config, self.node, self.keys, self._context = config, node, keys, context
        network.allow_sockets(context, len(config.nodes))
        self._sealing = sealing
        self._digest = config_digest(config)
        self.incarnation = 0
        self.takes: Callable[[int, int], bool] = lambda _node, _incarnation: True  # whose word on sealing counts
        self.names = Names([peer.host for peer in config.nodes])
        self._wanted: set[int] = set()  # nodes to be talked to that have names
        self._heard_s: dict[int, float] = {}
        self._dialled: dict[int, str] = {}  # where each dealer connects to
        self._connected: set[int] = set()  # nodes whose dealer has a connection
        self._dealers: dict[int, Socket] = {}
        self._monitors: dict[Socket, int] = {}
        self._poller: Poller | None = None
        self._reread_s = 0.0  # when the keys folder may be looked into again
        self._key_attempts: dict[int, int] = {}  # node -> handshakes that failed for its key, while two are listed

    def register(self, poller: Poller) -> None:
        """Add what is read to a poller."""
        self._poller = poller
        for socket in [*self._dealers.values(), *self._monitors]:
            if socket not in poller:
                poller.register(socket, READABLE)

    def dial(self, node: int, poller: Poller) -> None:
        """Connect to a node's control socket, as soon as it is known where that is."""
        address = self.names.of(node)
        if address != self.config.nodes[node].host:
            self._wanted.add(node)
        if address is None:
            self.names.look(node)
        if node in self._dealers or address is None:
            return
        server = self.keys.of(node, self._key_attempts.get(node, 0)) if self.keys is not None else None
        port = self.config.nodes[node].port
        dealer, monitor = network.control_dealer(self._context, address, port, self.keys, server)
        self._monitors[monitor] = node
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
                cluster=self.config.cluster_name,
                epoch=self.config.epoch,
                node=self.node,
                incarnation=self.incarnation,
                config=self._digest,
                bulk=frames.AS_THEY_ARE if self._sealing is None else self._sealing.offer(node),
            )
        except ValueError as error:  # the status of thousands of nodes: better unsaid than the end of this process
            log.error("a message to node %d is not sent: %s", node, error)
            return
        dealer = self._dealers.get(node)
        if dealer is not None and not network.try_send(dealer, [frame]):
            log.debug("message %s to node %d dropped: not connected", type(message).__name__, node)

    def receive(self, ready: Container[object]) -> list[events.Event]:
        """What those whom we dialled say against us."""
        found: list[events.Event] = []
        for node, dealer in self._dealers.items():
            for parts in network.drain(dealer) if dealer in ready else ():
                self._refused_by_peer(node, parts, found)
        for monitor, node in list(self._monitors.items()):
            while monitor in ready and node in self._dealers and (change := network.next_change(monitor)) is not None:
                self._connection_changed(node, monitor, change, found)
        return found

    def hear(self, envelope: frames.Envelope, frame: Frame) -> events.PeerSaid:
        """What a node of this epoch says. Raises FrameRefusedError."""
        message = frames.check_peer(
            envelope,
            cluster=self.config.cluster_name,
            epoch=self.config.epoch,
            config=self._digest,
            bulk_mode=self.config.bulk_mode,
        )
        self._check_sender(envelope.node, frame)
        if self._sealing is not None and self.takes(envelope.node, envelope.incarnation):
            self._sealing.heard(envelope.node, envelope.bulk)
        self._heard_s[envelope.node] = time.monotonic()
        return events.PeerSaid(envelope.node, envelope.incarnation, message)

    def holder(self, key: bytes) -> str | None:
        """The name of the node whose public key this is; the keys folder is looked into again for one not known."""
        if self.keys is None:
            return None
        if key not in self.keys.nodes:
            self._reread_keys()
        node = self.keys.nodes.get(key)
        return None if node is None else self.config.nodes[node].name

    def _connection_changed(self, node: int, monitor: Socket, change: Change, found: list[events.Event]) -> None:
        match change:
            case Change.CONNECTED:
                self._connected.add(node)
            case Change.DISCONNECTED:
                self._connected.discard(node)
            case Change.NOT_LISTED | Change.REFUSED:
                self._handshake_failed(node, monitor, change, found)

    def _handshake_failed(self, node: int, monitor: Socket, change: Change, found: list[events.Event]) -> None:
        """A node that we dialled and we do not know each other: whose key is it?"""
        text = "it does not list our key, or not any more"
        if change is not Change.NOT_LISTED:
            text = "its CURVE handshake failed: expected the key that we list for it, or it uses no keys"
            self._reread_keys()
            if self.keys and self.keys.several(node):
                self._key_attempts[node] = self._key_attempts.get(node, 0) + 1
                self._hang_up(node, monitor)
        found.append(events.PeerRefused(node, "key", f"{text}; compare the keys folders of both", by_us=False))

    def _reread_keys(self) -> None:
        """Somebody and we do not know each other's keys: perhaps a key was replaced meanwhile."""
        if self.keys is not None and time.monotonic() >= self._reread_s:
            self._reread_s = time.monotonic() + _REREAD_S
            self.keys = reread(self.keys, self.config)

    def _hang_up(self, node: int, monitor: Socket) -> None:
        """Close the connection to a node, to dial it with another key, or elsewhere, at the next tick."""
        dealer = self._dealers.pop(node)
        self._connected.discard(node)
        del self._monitors[monitor]
        dealer.disable_monitor()
        for socket in (dealer, monitor):
            if self._poller is not None and socket in self._poller:
                self._poller.unregister(socket)
            socket.close(0)

    def _check_sender(self, node: int, frame: Frame) -> None:
        """A frame must come from another node of this cluster, and under that node's own key."""
        if node >= len(self.config.nodes) or node == self.node:
            raise frames.FrameRefusedError("node", f"node index {node} is not another node of this cluster")
        if self.keys is not None:
            holder, name = network.key_user(frame), self.config.nodes[node].name
            if holder != name:
                raise frames.FrameRefusedError("key", f"expected the key of node {name}, found that of node {holder}")

    def _refused_by_peer(self, node: int, parts: list[bytes], found: list[events.Event]) -> None:
        try:
            refusal = frames.decode_refusal(parts[0])
        except frames.FrameRefusedError:
            return
        found.append(events.PeerRefused(node, refusal.code, refusal.text, by_us=False, incarnation=refusal.incarnation))

    def close(self) -> None:
        """Hang up everywhere."""
        for monitor, node in list(self._monitors.items()):
            self._hang_up(node, monitor)


Heard = tuple[Circle | None, events.Event]  # which epoch it is about; None: that in force, or all


class ControlPlane:
    """Messages with peers and trainers: one port for all epochs. All methods on the loop's thread."""

    def __init__(self, circle: Circle, context: Context) -> None:
        """Listen as a node of the epoch in force."""
        self.circle, self.circles = circle, [circle]
        network.allow_sockets(context, len(circle.config.nodes))
        self._zap = network.zap_socket(context) if circle.keys else None
        mine = circle.config.nodes[circle.node]
        who = f"{mine.address} (node {mine.name})"
        self._router, self._knocks = network.control_router(context, mine.host, mine.port, circle.keys, who=who)
        self._clients = network.clients_router(context)

    def bind_clients(self, endpoint: str) -> None:
        """Listen for trainers and commands."""
        self._clients.bind(endpoint)

    def register(self, poller: Poller) -> None:
        """Add what is read to a poller."""
        for socket in [self._router, self._clients, self._zap, self._knocks]:
            if socket is not None and socket not in poller:
                poller.register(socket, READABLE)
        for circle in self.circles:
            circle.register(poller)

    def leave(self, circle: Circle) -> None:
        """An epoch is over: frames that name it are refused from now on."""
        self.circles.remove(circle)
        circle.close()

    def send_client(self, token: bytes, message: messages.DaemonMessage) -> None:
        """Send to a trainer or command; dropped if it is gone."""
        try:
            frame = frames.encode(message)
        except ValueError as error:  # as in `send_peer`
            log.error("a message to a client is not sent: %s", error)
            return
        if not network.send_or_gone(self._clients, [token, frame]):
            log.debug("message %s to a client dropped", type(message).__name__)

    def receive(self, clients: dict[bytes, int], ready: Container[object]) -> list[Heard]:
        """Take what has come on the sockets in `ready`, bounded per turn. `clients`: token -> number."""
        found: list[Heard] = []
        if self._zap is not None and self._zap in ready:
            self._answer_zap(self._zap, found)
        for frame_parts in network.drain_frames(self._router) if self._router in ready else ():
            self._from_peer(frame_parts, found)
        for parts in network.drain(self._clients) if self._clients in ready else ():
            client = clients.get(parts[0])
            if client is not None and len(parts) == 2:
                try:
                    found.append((None, events.ClientSaid(client, frames.decode_client(parts[1]))))
                except frames.FrameRefusedError as refusal:
                    text = f"message refused: {refusal}"[: limits.TEXT_CHARS_MAX]
                    self.send_client(parts[0], messages.Denied("", "", ExitCode.USAGE, text))
        while self._knocks in ready and network.next_change(self._knocks) is not None:
            text = "handshake: a connection failed its handshake: no ZeroMQ, or a key that is not listed on both sides"
            found.append((None, events.PeerRefused(None, "key", text, by_us=True)))
        for circle in self.circles:
            found += [(circle, event) for event in circle.receive(ready)]
        return found

    def _from_peer(self, parts: list[Frame], found: list[Heard]) -> None:
        identity, body = parts[0].bytes, parts[1:]
        try:
            if len(body) != 1:
                raise frames.FrameRefusedError("malformed", f"expected 1 frame, found {len(body)}")
            envelope = frames.decode_envelope(body[0].bytes)
            circle = next((one for one in self.circles if one.config.epoch == envelope.epoch), self.circle)
            found.append((circle, circle.hear(envelope, body[0])))
        except frames.FrameRefusedError as refusal:
            found.append((None, events.PeerRefused(None, refusal.code, f"{refusal}", by_us=True)))
            self._refuse(identity, refusal)

    def _refuse(self, identity: bytes, refusal: frames.FrameRefusedError) -> None:
        config = self.circle.config
        name = config.nodes[self.circle.node].name
        text = f"node {name} of cluster {config.cluster_name!r}: {refusal.text}"[: limits.TEXT_CHARS_MAX]
        answer = messages.Refused(code=refusal.code, text=text)  # type: ignore[arg-type]  # frames uses the same codes
        frame = frames.encode(answer)
        if not network.send_or_gone(self._router, [identity, frame]):
            log.debug("refusal not delivered")

    def _answer_zap(self, zap: Socket, found: list[Heard]) -> None:
        def holder_of(key: bytes) -> str | None:
            return next((name for one in self.circles if (name := one.holder(key)) is not None), None)

        def refused(key: str, address: str) -> None:
            text = f"key: {key!r}, from {address}, is not in {self.circle.config.keys_dir}"
            found.append((None, events.PeerRefused(None, "key", text, by_us=True)))

        network.answer_zap(zap, holder_of, refused)

    def close(self) -> None:
        """Close every socket."""
        self._knocks.close(0)
        self._router.disable_monitor()
        for circle in self.circles:
            circle.close()
        for socket in (self._router, self._clients, self._zap):
            if socket is not None:
                socket.close(0)
