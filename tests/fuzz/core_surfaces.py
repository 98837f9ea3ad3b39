"""What a node hears from peers, from strangers on the bulk plane, and from its clients: decoders and the whole core."""

import random
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

import msgspec
from fuzz.mutation import NUMBERS, Maker, Mutator
from fuzz.prey import NODES, VICTIM, Prey
from fuzz.surface import Surface
from holdfast.daemon.core import events
from holdfast.daemon.core.protect import key_of
from holdfast.protocol import frames, limits, messages

T = TypeVar("T")
JOBS = ("a", "a", "a", "b", "b", "new", "new2")
FRAMES_HELD_MAX = 4096  # as in the shell
LARGE_SHARE = 0.01  # of lists that are as long as a frame takes
ODD_SHARE = 0.02  # of numbers that mean nothing, or begin another life of a job
WRECKERS = frozenset({"RestoreAsked", "RestoreDecided", "JobForgotten", "AskForget", "AskRestore", "ReportWanted"})
WRECKERS_SHARE = 0.1  # of those whose turn it is: where a job ends all the time, nothing is ever protected
MADE_SHARE = 0.6  # of inputs are made by type; the others are recorded frames, spoiled


class Sense:
    """Values that mean something to the prey now: names, numbers and layouts that it knows."""

    def __init__(self, draw: random.Random, prey: Prey) -> None:
        self.draw, self.prey, self.spoil = draw, prey, Mutator(draw)
        node = self.a_node
        self.pools: dict[str, Callable[[], object]] = {
            "job": lambda: draw.choice(JOBS),
            "attempt": self.attempt,
            "snapshot": self.snapshot,
            "committed": lambda: draw.choice([None, self.snapshot()]),
            "staged": lambda: draw.choice([None, self.snapshot()]),
            "held": self.snapshots,
            "open": self.snapshots,
            "roles": lambda: list(range(draw.choice((0, 1, 4, 30_000)) if draw.random() < LARGE_SHARE else 2)),
            "given_up": lambda: [self.snapshot() for _ in range(draw.choice((0, 0, 0, 1, 3)))],
            "node": node,
            "source": lambda: draw.choice([None, node()]),
            "target": node,
            "sender": node,
            "role": lambda: draw.choice((0, 1, 2, 3, 4, 32767)),
            "chunk": lambda: draw.choice((0, 1, 2, 3, 5, 8, 1 << 32, 1 << 62)),
            "first_chunk": lambda: draw.choice((0, 0, 1, 4, 1 << 62)),
            "number": self.number,
            "request": self.number,
            "layout": self.layout,
            "layout_id": self.layout_id,
            "committed_layout_id": self.layout_id,
            "cluster": lambda: "sim",
            "epoch": lambda: prey.cluster.config.epoch,
            "incarnation": lambda: prey.node.peers.incarnation_of(draw.randrange(NODES)),
            "config_digest": lambda: prey.node.ctx.config_digest,
            "worker_session": lambda: draw.choice((1, 1, 1, 2, 3)),
            "length_bytes": lambda: draw.choice((1, 64, 300, 1 << 20, limits.READ_RANGE_BYTES_MAX)),
            "offset_bytes": lambda: draw.choice((0, 0, 1, 63, 64, 299, 1 << 40)),
        }

    def a_node(self) -> int:
        """A node of the cluster, mostly."""
        return self.draw.randrange(NODES) if self.draw.random() < 0.95 else self.draw.choice((NODES, 4095))

    def attempt(self) -> int:
        """An attempt of a job, or one beside it."""
        known = [parts.job.attempt for parts in self.prey.node.registry] or [0]
        if self.draw.random() < ODD_SHARE:
            return self.draw.choice((*NUMBERS[:-4], known[0] + 1))
        return max(self.draw.choice(known) - (self.draw.random() < ODD_SHARE), 0)

    def snapshot(self) -> list[int]:
        """A snapshot that is held or open, or one beside it."""
        slots = [slot.snapshot for parts in self.prey.node.registry for slot in parts.job.slots if slot.snapshot]
        slots += [parts.job.committed for parts in self.prey.node.registry if parts.job.committed]
        if not slots or self.draw.random() < 0.1:
            return [self.attempt(), self.draw.choice(NUMBERS)]
        one = self.draw.choice(slots)
        return [one.attempt, one.step + self.draw.choice((-1, 0, 0, 0, 0, 1))]

    def snapshots(self) -> list[list[int]]:
        """Some of them, rarely as many as a frame takes."""
        if self.draw.random() < LARGE_SHARE:
            attempt, step = self.snapshot()
            return [[attempt, step % (1 << 40) + more] for more in range(self.draw.choice((100, 10_000, 100_000)))]
        return [self.snapshot() for _ in range(self.draw.randrange(3))]

    def number(self) -> int:
        """A question's or a sum's number: one that is open, mostly."""
        node = self.prey.node
        known = [*node.asks.waiting, *node.offers.asked, *node.restoring.asking, 1, 2]
        return self.draw.choice(known) if self.draw.random() < 0.8 else self.draw.choice(NUMBERS[:-3])

    def layout(self) -> object:
        """A layout that the prey knows, every other time spoiled."""
        known = [layout for parts in self.prey.node.registry for layout in parts.job.layouts.known.values()]
        if not known:
            return {"shards": [[0, 64]], "first_step": 0, "every": 1}
        plain = msgspec.to_builtins(self.draw.choice(known))
        if self.draw.random() < LARGE_SHARE:
            count, size = self.draw.choice((1000, 30_000, 60_000)), self.draw.choice((0, 1, 64, 1 << 20, 1 << 40))
            plain["shards"] = [[self.draw.randrange(NODES), size] for _ in range(count)]
        plain["version"] = plain["version"] + self.draw.choice((0, 0, 1, 1, 5))
        return self.spoil.rewrite(plain) if self.draw.random() < 0.5 else plain

    def layout_id(self) -> object:
        """The id of a layout that the prey knows, or of none."""
        known = [layout_id for parts in self.prey.node.registry for layout_id in parts.job.layouts.known]
        return self.draw.choice([*known, None, 7])


class CoreSurface(Surface):
    """Frames of one kind of sender, to a prey that others feed as well."""

    def __init__(self, name: str, draw: random.Random, prey: Prey, kinds: tuple[type[msgspec.Struct], ...]) -> None:
        super().__init__(name, draw)
        self.prey, self.kinds = prey, kinds
        self.sense, self.spoil = Sense(draw, prey), Mutator(draw)
        self.maker = Maker(draw, self.sense.pools)
        self.recorded = self._recorded()
        self.every_frame = [frame for found in self.recorded.values() for frame in found]

    def _recorded(self) -> dict[str, list[bytes]]:
        names = {kind.__name__ for kind in self.kinds}
        return {kind: found for kind, found in self.prey.samples.items() if kind.removeprefix("peer ") in names}

    def enveloped(self, body: object) -> object:
        """What goes over the wire for a message."""
        return body

    def _turn(self, kinds: Sequence[T], name_of: Callable[[T], str]) -> T:
        kind = self.draw.choice(kinds)
        if name_of(kind) in WRECKERS and self.draw.random() > WRECKERS_SHARE:
            return self._turn(kinds, name_of)
        return kind

    def make(self) -> bytes:
        if self.draw.random() > MADE_SHARE:
            kind = self._turn(sorted(self.recorded), lambda kind: kind.removeprefix("peer "))
            return self.spoil.frame(self.draw.choice(self.recorded[kind]), self.every_frame)
        body = self.maker.make(self._turn(self.kinds, lambda kind: kind.__name__))
        if self.draw.random() < 0.2:
            body = self.spoil.rewrite(body)
        try:
            return msgspec.msgpack.encode(self.enveloped(body))
        except (OverflowError, UnicodeError):
            return self.spoil.cut(self.draw.choice(self.every_frame), self.every_frame)

    def feed(self, made: bytes) -> str:
        started_s = time.thread_time()
        try:
            event = self.heard(made)
        except frames.FrameRefusedError as refusal:
            self.spent_s = time.thread_time() - started_s
            return refusal.code
        if event is None:
            self.spent_s = time.thread_time() - started_s
            return "node"
        self.prey.happens(event, started_s=started_s)
        self.spent_s = self.prey.spent_s
        self.prey.passes()
        return ""

    def heard(self, made: bytes) -> events.Event | None:
        """The event that the shell makes of a frame; None: refused there, by its sender."""
        raise NotImplementedError


class Peers(CoreSurface):
    """The control plane."""

    def __init__(self, draw: random.Random, prey: Prey) -> None:
        super().__init__("control frames", draw, prey, messages.PeerMessage.__args__)

    def enveloped(self, body: object) -> object:
        ctx, node = self.prey.node.ctx, self.draw.choice((1, 1, 2, 2, 3))
        known = self.prey.node.peers.incarnation_of(node)
        return {
            "version": limits.PROTOCOL_VERSION,
            "cluster": ctx.config.cluster_name,
            "epoch": ctx.config.epoch,
            "node": node,
            "incarnation": known if self.draw.random() < 0.98 else known + self.draw.choice((-1, 1)),
            "body": body,
            "config": ctx.config_digest,
        }

    def heard(self, made: bytes) -> events.Event | None:
        ctx = self.prey.node.ctx
        envelope, message = frames.decode_peer(
            made, cluster=ctx.config.cluster_name, epoch=ctx.config.epoch, config=ctx.config_digest
        )
        if envelope.node >= NODES or envelope.node == VICTIM:
            return None
        return events.PeerSaid(envelope.node, envelope.incarnation, message)


class Bulk(CoreSurface):
    """Headers of chunks; the chunk beside it has the digest that somebody announced, every other time."""

    def __init__(self, draw: random.Random, prey: Prey) -> None:
        super().__init__("bulk frames", draw, prey, (messages.ChunkHeader,))

    def heard(self, made: bytes) -> events.Event | None:
        ctx = self.prey.node.ctx
        header = frames.decode_header(made, cluster=ctx.config.cluster_name, epoch=ctx.config.epoch)
        slots = [slot for parts in self.prey.node.registry for slot in parts.job.slots]
        known = [digest for slot in slots for digest in slot.digests if digest]
        good = known and self.draw.random() < 0.5
        held = self.prey.worker.frames
        if len(held) < FRAMES_HELD_MAX:  # what the shell takes
            held.setdefault(key_of(header), self.draw.randbytes(ctx.config.chunk_bytes))
        return events.ChunkArrived(header, self.draw.choice(known) if good else self.draw.randrange(1 << 64))


class Clients(CoreSurface):
    """Messages over the Unix socket's ZeroMQ endpoint."""

    def __init__(self, draw: random.Random, prey: Prey) -> None:
        super().__init__("client messages", draw, prey, messages.ClientMessage.__args__)

    def heard(self, made: bytes) -> events.Event | None:
        message = frames.decode_client(made)
        clients = [*self.prey.clients, *self.prey.worker.clients]
        return events.ClientSaid(self.draw.choice(clients), message)
