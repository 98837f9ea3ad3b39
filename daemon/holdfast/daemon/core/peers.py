"""Who is alive, under which incarnation, and who collects.

Covers what this node believes of the others from what it heard. A peer's death is a fact here, never an exception. The
collector is the lowest live node this node knows; two collectors at once do no harm, because facts never become untrue.
"""

from dataclasses import dataclass, field

from holdfast.daemon.core.actions import DialPeer
from holdfast.daemon.core.context import Context
from holdfast.protocol import limits
from holdfast.protocol.messages import Heartbeat, JobReport


@dataclass(slots=True)
class Peer:
    """What is known of one other node."""

    node: int
    incarnation: int = 0
    since_ns: int = 0  # when the incarnation was first heard; 0: by a predecessor of this worker
    worker_session: int = 0
    heard_ns: int | None = None  # None: never, or not since it was declared down
    knocked_ns: int | None = None  # its first word since it was declared down; a last one, until another follows
    heartbeat: Heartbeat | None = None
    heartbeat_ns: int = 0
    refused: str = ""  # why it, or we, refused the other; empty if not
    denied_ns: int | None = None  # when it last said that another holds this node's slot
    behind: bool = False  # it is of another epoch, or was when it was heard last
    restarts: int = 0
    dialled_ns: int | None = None  # since when this node talks to it

    def report(self, job: str) -> JobReport | None:
        """What it last said of a job; what it said counts also while it is down, as history, so ask `alive` first."""
        if self.heartbeat is None:
            return None
        return next((report for report in self.heartbeat.jobs if report.job == job), None)


@dataclass(slots=True)
class Peers:
    """All other nodes as seen from here."""

    ctx: Context
    started_ns: int
    table: dict[int, Peer] = field(init=False)
    incarnations: tuple[int, ...] = field(init=False)  # by node, as in the table; 0: not heard yet, or this node

    def __post_init__(self) -> None:
        self.incarnations = (0,) * len(self.ctx.config.nodes)
        self.table = {node: Peer(node) for node in range(len(self.ctx.config.nodes)) if node != self.ctx.node}

    def resume(self, incarnations: tuple[int, ...]) -> None:
        """Take up which incarnations a predecessor had heard: an older holder of a slot isn't believed again."""
        for node, incarnation in enumerate(incarnations):
            if node in self.table:
                self.table[node].incarnation = max(incarnation, 0)
        self.incarnations = tuple(
            self.table[n].incarnation if n in self.table else 0 for n in range(len(self.incarnations))
        )

    def start(self) -> None:
        """Dial the group; the collector's candidates follow as time shows who is silent."""
        for node in self.ctx.group:
            self.dial(node)
        self._dial_candidates()

    def dial(self, node: int) -> None:
        """Talk to a node from now on; harmless if it is done already."""
        if node != self.ctx.node and node not in self.ctx.dialled:
            self.ctx.dialled.add(node)
            self.table[node].dialled_ns = self.ctx.now_ns
            self.ctx.emit(DialPeer(node))

    def _dial_candidates(self) -> None:
        # Dial 0, 1, 2, ... up to the first that is alive or might still answer: a node talks to its group and its
        # collector only.
        for node in range(self.ctx.node):
            self.dial(node)
            if not self._joined or self.alive(node):
                return

    def alive(self, node: int) -> bool:
        """Whether a node was heard within the deadline. This node is alive to itself."""
        return node == self.ctx.node or self.table[node].heard_ns is not None

    def incarnation_of(self, node: int) -> int:
        """The incarnation under which a node was last heard."""
        return self.ctx.incarnation if node == self.ctx.node else self.table[node].incarnation

    def had_time(self, node: int) -> bool:
        """Whether a node was heard, or has had its time to speak since it was dialled."""
        if self.alive(node):
            return True
        dialled_ns = self.table[node].dialled_ns
        return dialled_ns is not None and self.ctx.now_ns >= dialled_ns + int(limits.JOIN_S * 1e9)

    @property
    def settled(self) -> bool:
        """Whether every node has said what it holds, or has had its time to since this worker started."""
        return self._joined or self.all_heard

    @property
    def _joined(self) -> bool:
        return self.ctx.now_ns >= self.started_ns + int(limits.JOIN_S * 1e9)

    @property
    def all_heard(self) -> bool:
        """Whether every node is alive and has said what it holds."""
        return all(peer.heard_ns is not None and peer.heartbeat is not None for peer in self.table.values())

    def unheard(self) -> set[int]:
        """Nodes of which nothing can be said: they have not told yet what they hold, or tell it to others only.

        A node that went down is known to be down. One that never spoke is, once its time is over, if it talks to this
        node at all: everybody does so with the collector.
        """
        expected: set[int] = set()
        if self._joined:
            expected = set(self.table) if self.collector == self.ctx.node else set(self.ctx.group)
        silent = {node for node, peer in self.table.items() if peer.heartbeat is None and not peer.refused}
        return silent - self.ctx.down - expected

    @property
    def collector(self) -> int:
        """The lowest live node."""
        return next(node for node in range(self.ctx.node + 1) if self.alive(node))

    def live(self) -> list[int]:
        """All live nodes, this one included, in order."""
        return [node for node in range(len(self.ctx.config.nodes)) if self.alive(node)]

    @property
    def denied(self) -> bool:
        """Whether a live node has just said that another, which it hears, holds this node's slot."""
        limit_ns = self.ctx.now_ns - int(limits.PEER_DEADLINE_S * 1e9)
        return any((peer.denied_ns or 0) > limit_ns and self.alive(peer.node) for peer in self.table.values())

    def takes(self, node: int, incarnation: int) -> bool:
        """Whether a node's slot is that incarnation's, as far as is known here, or falls to it with its next word.

        A lower one than the one known is an old holder of the slot coming back. A higher one is a replacement, and the
        slot is free for it once the present holder is silent: of two machines that live, the one that is counted on
        keeps its place, since what it holds would be lost with it. Whichever it is, what all others who hear the node
        call it by counts for more than what this node, which may just have begun, has heard first.
        """
        peer = self.table[node]
        if peer.incarnation in {incarnation, 0}:
            return True
        if self._called_by_others(node) == {incarnation}:
            return True
        if incarnation < peer.incarnation:
            return False
        return not self.alive(node) and (node in self.ctx.down or self._heard_for_long)

    def _called_by_others(self, node: int) -> set[int]:
        """The incarnations under which other live nodes now hear a node."""
        beats = [peer.heartbeat for peer in self.table.values() if peer.heartbeat and self.alive(peer.node)]
        told = [view for beat in beats for view in beat.views if view.node == node]
        return {view.incarnation for view in told if view.alive}

    @property
    def _heard_for_long(self) -> bool:
        # Whoever was alive to a predecessor of this worker would have been heard by now.
        return self.ctx.now_ns >= self.started_ns + int(limits.PEER_DEADLINE_S * 1e9)

    def heard(self, node: int, incarnation: int, message: Heartbeat | None) -> tuple[bool, bool]:
        """Something came from a node. Returns (accepted, its earlier in-flight work is gone).

        What a process that was declared down says may be its last words, read late: it counts as alive again only once
        it goes on speaking.
        """
        peer = self.table[node]
        if not self.takes(node, incarnation):
            return False, False
        was_alive = peer.heard_ns is not None
        reborn = incarnation != peer.incarnation
        lost_flight = reborn and peer.incarnation != 0
        if reborn:
            peer.incarnation, peer.heartbeat, peer.worker_session = incarnation, None, 0
            peer.since_ns = self.ctx.now_ns
            self.incarnations = (*self.incarnations[:node], incarnation, *self.incarnations[node + 1 :])
        if message is not None:
            lost_flight = lost_flight or (0 < peer.worker_session < message.worker_session)
            if peer.worker_session not in {0, message.worker_session}:
                peer.restarts += 1
            peer.worker_session, peer.heartbeat, peer.heartbeat_ns = (
                message.worker_session,
                message,
                self.ctx.now_ns,
            )
            peer.refused, peer.behind = "", False
        self.dial(node)
        if node in self.ctx.down and not lost_flight and not self._speaks_on(peer):
            return True, False
        peer.heard_ns, peer.knocked_ns = self.ctx.now_ns, None
        self.ctx.down.discard(node)
        if not was_alive:
            self.ctx.log(f"node {self.ctx.name_of(node)} is up (incarnation {incarnation})")
        return True, lost_flight

    def _speaks_on(self, peer: Peer) -> bool:
        """Whether this word of a node that is down came well after another: what lay in sockets comes at once."""
        now_ns = self.ctx.now_ns
        if peer.knocked_ns is None or now_ns - peer.knocked_ns > int(limits.PEER_DEADLINE_S * 1e9):
            peer.knocked_ns = now_ns
        return now_ns - peer.knocked_ns >= int(limits.LAST_WORDS_S * 1e9)

    def excuse(self, nanoseconds: int) -> None:
        """This node stood still for so long: nobody was silent in that time."""
        for peer in self.table.values():
            if peer.heard_ns is not None:
                peer.heard_ns = min(self.ctx.now_ns, peer.heard_ns + nanoseconds)

    def silence(self) -> list[int]:
        """Declare nodes down that were not heard within the deadline; returns those that went down just now."""
        limit_ns = self.ctx.now_ns - int(limits.PEER_DEADLINE_S * 1e9)
        down = [peer for peer in self.table.values() if peer.heard_ns is not None and peer.heard_ns < limit_ns]
        for peer in down:
            peer.heard_ns = None
            self.ctx.down.add(peer.node)
            self.ctx.log(
                f"node {self.ctx.name_of(peer.node)} is down: nothing heard for {limits.PEER_DEADLINE_S} s",
                "warning",
            )
        self._dial_candidates()
        return [peer.node for peer in down]

    def reports(self, job: str) -> dict[int, JobReport]:
        """What every other live node last said of a job."""
        found = {node: self.table[node].report(job) for node in self.table if self.alive(node)}
        return {node: report for node, report in found.items() if report is not None}

    def check(self) -> None:
        """Assert: who is down is not alive, what is heard has a holder, and both tables of incarnations agree."""
        for node, peer in self.table.items():
            assert peer.heard_ns is None or node not in self.ctx.down, node
            assert peer.incarnation > 0 or (peer.heard_ns is None and peer.heartbeat is None), node
            assert peer.incarnation == self.incarnations[node], node
