"""The exchange of one snapshot's chunks between one node and its group: what goes out, came in, is missing.

Pure bookkeeping of one node and one snapshot. Outgoing: every own data chunk goes to each parity holder of its stripe,
in stripe order, within a window of credits per peer. Incoming: contributions to the parity that this node holds, each
accepted once and only if its digest is the one its owner announced on the control plane.

Chunks are sent in stripe order and a holder acknowledges a stripe's contributions when the stripe is encoded; so the
lowest incomplete stripe of a holder is always next in line at each of its senders, and the window can't deadlock.
"""

from collections import deque
from dataclasses import dataclass, field
from enum import Enum, auto

from holdfast.daemon.core.memory import ChunkKey
from holdfast.protocol import limits
from holdfast.protocol.ids import SnapshotId
from holdfast.protocol.layout import Geometry


class Arrival(Enum):
    """What becomes of a contribution that arrived."""

    KEPT = auto()  # verified or waiting for its announcement; the frame stays
    DUPLICATE = auto()  # already kept or encoded: drop this frame, acknowledge if encoded
    STRAY = auto()  # not a contribution to parity that we hold: drop
    BAD = auto()  # fails its digest: drop, ask again


@dataclass(slots=True)
class Transfer:
    """The state of one snapshot's exchange on one node.

    Attributes:
        geometry: the layout's sizes and stripes.
        node: this node.
    """

    geometry: Geometry
    node: int
    group: tuple[int, ...] = field(init=False)
    me: int = field(init=False)
    own_digests: list[int | None] = field(init=False)
    announced: dict[int, list[int | None]] = field(init=False)  # member -> digests of its chunks
    arrived: dict[int, dict[int, int]] = field(default_factory=dict)  # stripe -> member -> digest found
    encoding: set[int] = field(default_factory=set)
    unencoded: set[int] = field(init=False)  # stripes whose parity is not complete
    ready: set[int] = field(default_factory=set)  # peers that have room
    waiting: dict[int, deque[int]] = field(init=False)  # peer -> own chunks to send, in stripe order
    unacknowledged: dict[int, dict[int, int]] = field(init=False)  # peer -> chunk -> deadline_ns
    rejections: dict[tuple[int, int], int] = field(default_factory=dict)  # (peer, chunk) -> wrong digests
    unknown_count: int = field(init=False)  # digests of the group's data that are not known yet, own ones included
    digested_count: int = 0  # own chunks with a digest; they are digested in order
    moved_count: int = 0  # raised by every step forward; what stands still for too long is given up

    def __post_init__(self) -> None:
        self.group = self.geometry.group_of(self.node)
        self.me = self.group.index(self.node)
        stripes = self.geometry.stripes(self.node)
        self.announced = {
            member: [None] * count for member, count in enumerate(stripes.chunk_counts) if member != self.me
        }
        self.own_digests = [None] * stripes.chunk_counts[self.me]
        self.unencoded = set(stripes.parity_stripes(self.me)) if stripes.parity_count else set()
        self.unknown_count = sum(stripes.chunk_counts)
        peers = [node for node in self.group if node != self.node]
        self.waiting = {node: deque() for node in peers}
        self.unacknowledged = {node: {} for node in peers}

    # --- outgoing ---

    def digested(self, first_chunk: int, digests: tuple[int, ...]) -> None:
        """Own chunks have their digests: queue them for the holders of their stripes' parity."""
        stripes = self.geometry.stripes(self.node)
        for chunk, digest in enumerate(digests, start=first_chunk):
            if self.own_digests[chunk] is not None:
                continue
            self.own_digests[chunk] = digest
            self.unknown_count -= 1
            self.digested_count += 1
            self.moved_count += 1
            for member in stripes.parity_members(stripes.stripe_of(self.me, chunk)):
                self.waiting[self.group[member]].append(chunk)

    def send_again(self, peer: int) -> None:
        """Queue everything for a peer anew, in stripe order."""
        if peer not in self.waiting:
            return
        member, stripes = self.group.index(peer), self.geometry.stripes(self.node)
        self.unacknowledged[peer].clear()
        self.waiting[peer] = deque(
            chunk
            for chunk in range(self.digested_count)
            if member in stripes.parity_members(stripes.stripe_of(self.me, chunk))
        )

    def next_sends(self, now_ns: int) -> list[tuple[int, int]]:
        """(peer, chunk) pairs that the credits allow now; they count as sent."""
        sends = []
        for peer in sorted(self.ready):
            queue, unacknowledged = self.waiting[peer], self.unacknowledged[peer]
            while queue and len(unacknowledged) < limits.CHUNK_CREDITS:
                chunk = queue.popleft()
                unacknowledged[chunk] = now_ns + int(limits.CHUNK_DEADLINE_S * 1e9)
                sends.append((peer, chunk))
        return sends

    def acknowledged(self, peer: int, chunk: int, *, ok: bool) -> bool:
        """A reply for one chunk. Returns False when it was rejected too often and the snapshot should be given up."""
        if self.unacknowledged.get(peer, {}).pop(chunk, None) is None:
            return True  # late or repeated
        if ok:
            self.moved_count += 1
            return True
        self.waiting[peer].appendleft(chunk)
        self.rejections[peer, chunk] = self.rejections.get((peer, chunk), 0) + 1
        return self.rejections[peer, chunk] < limits.CHUNK_RETRIES_MAX

    def expire(self, now_ns: int) -> list[int]:
        """Queue overdue chunks again, since the connection may have lost them; returns the peers that are late."""
        late = []
        for peer, unacknowledged in self.unacknowledged.items():
            for chunk in sorted((c for c, due_ns in unacknowledged.items() if due_ns <= now_ns), reverse=True):
                del unacknowledged[chunk]
                self.waiting[peer].appendleft(chunk)
                late.append(peer)
        return sorted(set(late))

    def resume(self, table: list[int]) -> None:
        """Take up the exchange of a snapshot whose fact a predecessor stated: others may still need our chunks.

        Args:
            table: all data digests of the group, in member order.
        """
        start = 0
        for member, count in enumerate(self.geometry.stripes(self.node).chunk_counts):
            digests = table[start : start + count]
            start += count
            if member == self.me:
                self.digested(0, tuple(digests))
            else:
                self.announce(member, 0, list(digests))
        self.unencoded.clear()

    def kept_keys(self, job: str, snapshot: SnapshotId) -> tuple[ChunkKey, ...]:
        """The names of all received frames that are kept for this exchange."""
        stripes = self.geometry.stripes(self.node)
        keys = []
        for stripe, members in self.arrived.items():
            for member in members:
                chunk = stripes.chunk_at(stripe, member)
                assert chunk is not None
                node = self.group[member]
                keys.append(ChunkKey(job, snapshot.attempt, snapshot.step, node, "data", chunk, reading=False))
        return tuple(keys)

    # --- incoming ---

    def announce(self, member: int, first_chunk: int, digests: list[int]) -> list[tuple[int, int]]:
        """Record announced digests. Returns the (member, chunk) of kept contributions that turn out to be wrong."""
        table = self.announced.get(member)
        if table is None or first_chunk + len(digests) > len(table):
            return []
        stripes = self.geometry.stripes(self.node)
        wrong = []
        for chunk, digest in enumerate(digests, start=first_chunk):
            if table[chunk] is None:
                self.unknown_count -= 1
                self.moved_count += 1
            table[chunk] = digest
            stripe = stripes.stripe_of(member, chunk)
            found = self.arrived.get(stripe, {}).get(member)
            if found is not None and found != digest and stripe not in self.encoding:
                del self.arrived[stripe][member]
                wrong.append((member, chunk))
        return wrong

    def arrive(self, member: int, chunk: int, digest: int) -> Arrival:
        """A contribution came. A chunk arriving twice counts once."""
        table = self.announced.get(member)
        if table is None or not 0 <= chunk < len(table):
            return Arrival.STRAY
        stripes = self.geometry.stripes(self.node)
        stripe = stripes.stripe_of(member, chunk)
        if self.me not in stripes.parity_members(stripe):
            return Arrival.STRAY
        if stripe not in self.unencoded or member in self.arrived.get(stripe, {}):
            return Arrival.DUPLICATE
        expected = table[chunk]
        if expected is not None and expected != digest:
            return Arrival.BAD
        self.arrived.setdefault(stripe, {})[member] = digest
        self.moved_count += 1
        return Arrival.KEPT

    def is_encoded(self, member: int, chunk: int) -> bool:
        """Whether a contribution is already part of finished parity."""
        return self.geometry.stripes(self.node).stripe_of(member, chunk) not in self.unencoded

    def encodable(self, stripe: int) -> bool:
        """Whether all contributions of a stripe are here and verified."""
        if stripe not in self.unencoded or stripe in self.encoding:
            return False
        arrived = self.arrived.get(stripe, {})
        return all(
            member in arrived and self.announced[member][chunk] == arrived[member]
            for _, member, chunk in self.geometry.stripes(self.node).contributions(stripe)
        )

    def encoded(self, stripe: int) -> None:
        """The parity chunk of a stripe is complete."""
        self.unencoded.discard(stripe)
        self.moved_count += 1
        self.encoding.discard(stripe)
        self.arrived.pop(stripe, None)

    @property
    def complete(self) -> bool:
        """Own digests known, every digest of the group known, every parity chunk complete."""
        return not self.unencoded and self.unknown_count == 0

    def check(self) -> None:
        """Assert that the counts say what the tables say."""
        tables = [self.own_digests, *self.announced.values()]
        assert self.unknown_count == sum(table.count(None) for table in tables)
        assert self.digested_count == len(self.own_digests) - self.own_digests.count(None)

    def silent_nodes(self) -> list[int]:
        """The nodes of the group whose digests are not all known."""
        return sorted(self.group[member] for member, table in self.announced.items() if any(d is None for d in table))

    def missing_text(self) -> str:
        """What is still missing, for the operator."""
        silent = self.silent_nodes()
        unready = sorted(set(self.waiting) - self.ready)
        return (
            f"{len(self.unencoded)} parity chunks incomplete; no digests yet from nodes {silent}; "
            f"no room yet on nodes {unready}"
        )
