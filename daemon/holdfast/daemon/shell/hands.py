"""The hands of one epoch's core: its peers, chunks, coding threads and ledger. A worker has one such, or two.

Covers making them and carrying out the actions that are about one epoch. What both epochs share is the worker's:
memory, clients, the port, files of records, and the log.
"""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from holdfast.coding import CodeParams, Engine
from holdfast.daemon.core import actions, events
from holdfast.daemon.core.arena import Arena
from holdfast.daemon.core.context import Context
from holdfast.daemon.core.ledger import LedgerRecord, encode_ledger
from holdfast.daemon.core.memory import Memory
from holdfast.daemon.core.node import Node
from holdfast.daemon.core.resume import held_pieces
from holdfast.daemon.shell import network
from holdfast.daemon.shell.arena import ArenaMemory
from holdfast.daemon.shell.bulk import BulkPlane, Outgoing, sealing_of
from holdfast.daemon.shell.coder import Coder, coding_threads
from holdfast.daemon.shell.control import Circle
from holdfast.daemon.shell.copying import Copier
from holdfast.daemon.shell.keeping import KeeperLink, LedgerMemory
from holdfast.daemon.shell.metrics import Meters
from holdfast.daemon.shell.network import Poller
from holdfast.daemon.shell.scrubber import Scrubber
from holdfast.daemon.shell.taking_up import Place
from holdfast.protocol import limits, messages
from holdfast.protocol.config import config_digest
from holdfast.protocol.layout import Geometry, Layout

log = logging.getLogger("holdfast")


@dataclass(frozen=True, slots=True)
class Shared:
    """What the hands of all epochs use together."""

    link: KeeperLink
    arena: ArenaMemory
    zmq_context: network.Context
    bulk_context: network.Context
    meters: Meters
    engine: Engine
    socket: Path
    state_dir: Path
    put: Callable[[int, events.Event], None]  # (epoch, event), from any thread
    session: int  # of this worker
    budget: Arena
    free_bytes: int


class Hands:
    """One epoch in this process. `node` is its core."""

    def __init__(self, place: Place, shared: Shared) -> None:
        config, node = place.config, place.node
        self.config, self.shared, self.epoch = config, shared, config.epoch
        sealing = sealing_of(config, node)
        self.circle = Circle(config, node, place.keys, shared.zmq_context, sealing)
        self.bulk = BulkPlane(config, node, shared.bulk_context, self._put, sealing)
        self.ledger = LedgerMemory(shared.link, place.ledger)
        self.placement = config.placement()
        group = self.placement.groups[self.placement.group_of(node)]
        params = CodeParams(len(group) - config.parity, config.parity)
        self.coder = Coder(
            engine=shared.engine,
            chunk_bytes=config.chunk_bytes,
            params=params,
            arena=shared.arena,
            bulk=self.bulk,
            report=self._put,
            threads=coding_threads(),
        )
        self.coder.worked = shared.meters.worked
        self.scrubber = Scrubber(
            config, engine=shared.engine, params=params, arena=shared.arena, bulk=self.bulk, report=self._put
        )
        self.copier = Copier(shared.socket, config.nodes[node].name, self._put)
        now_ns = time.monotonic_ns()
        self.context = Context(
            config=config,
            config_digest=config_digest(config),
            placement=self.placement,
            node=node,
            incarnation=place.record.incarnation if place.record else time.time_ns() // 1_000_000,
            worker_session=shared.session,
            wall_ms_at_zero=(time.time_ns() - now_ns) // 1_000_000,
            budget_bytes=shared.budget.budget_bytes,
            engine=shared.engine.name,
            bulk_port=self.bulk.port,
            free_bytes=shared.free_bytes,
            state_dir=str(shared.state_dir),
        )
        self.node = Node(self.context, started_ns=now_ns, arena=shared.budget)
        self.circle.takes = self.node.peers.takes
        if place.record is not None:
            self._resume(place.record)

    def _put(self, event: events.Event) -> None:
        self.shared.put(self.epoch, event)

    def _resume(self, record: LedgerRecord) -> None:
        arena, tables = self.shared.arena, dict[Memory, list[int]]()
        for memory, sizes in held_pieces(record, self._geometry).items():
            if arena.is_held(memory, sizes):
                arena.map(memory, sizes)
                mapped = arena.get(memory)
                assert mapped is not None
                tables[memory] = [int(digest) for digest in mapped.digests]
        self.node.resume(record, tables)
        session, count = self.context.worker_session, len(tables)
        log.info("worker session %d takes up %d pieces of memory of epoch %d", session, count, self.epoch)

    def _geometry(self, layout: Layout) -> Geometry:
        return Geometry(
            layout=layout,
            placement=self.placement,
            parity_count=self.config.parity,
            chunk_bytes=self.config.chunk_bytes,
        )

    def start(self) -> None:
        """Begin to exchange chunks."""
        self.circle.incarnation = self.context.incarnation
        self.bulk.start()

    def heard(self, event: events.Event) -> None:
        """What must be known here before the core hears of it."""
        if isinstance(event, events.PeerSaid) and isinstance(event.message, messages.Heartbeat):
            address = self.circle.names.of(event.node)
            if address is not None and self.node.peers.takes(event.node, event.incarnation):
                self.bulk.peer_port(event.node, event.message.bulk_port, address)

    def do(self, action: actions.Action, poller: Poller) -> bool:
        """Carry out an action that is about this epoch; False if it is not."""
        if self.coder.order(action) or self.scrubber.order(action):
            return True
        match action:
            case actions.SendPeer(node, message):
                self.circle.incarnation = self.context.incarnation
                self.circle.send_peer(node, message)
            case actions.SendChunk(node, memory, header):
                slot = self.shared.arena.get(memory)
                if slot is not None:
                    start = header.chunk * self.config.chunk_bytes
                    chunk = slot.data[start : start + self.config.chunk_bytes]
                    self.bulk.send(Outgoing(node, header, chunk))
            case actions.StoreDigests(memory, first, digests):
                slot = self.shared.arena.get(memory)
                if slot is not None:
                    slot.digests[first : first + len(digests)] = digests
            case actions.DropFrames(keys):
                self.bulk.drop(keys)
            case actions.CopyDurably():
                self.copier.order(action)
            case actions.WriteLedger(record):
                self.ledger.write(encode_ledger(record))
                protect_s = {name: parts.job.protect_s for name, parts in self.node.jobs.items()}
                self.shared.meters.wrote(record, protect_s)
            case actions.DialPeer(node):
                self.circle.dial(node, poller)
            case _:
                return False
        return True

    def close(self) -> None:
        """End its threads; what the keeper holds stays held."""
        self.coder.stop()
        self.scrubber.stop()
        self.copier.stop()
        self.bulk.stop()


def nodes_of(hands: list[Hands]) -> int:
    """How many nodes may connect, those of two epochs counted twice."""
    return min(sum(len(one.config.nodes) for one in hands), 2 * limits.NODE_COUNT_MAX)
