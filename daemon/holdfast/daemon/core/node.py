"""One node's brain: every event enters by `Node.handle`, every decision leaves as an action.

Covers dispatch, the order of effects, and what concerns all jobs at once (heartbeats, the ledger, forgetting). Digests
go to held memory first, then the ledger is written, before anything else that an event causes: so the ledger never
calls complete what lacks a digest, and a stated fact is never newer than what a restarted worker knows.
"""

from collections.abc import Mapping

from holdfast.daemon.core import events
from holdfast.daemon.core import resume as ledger_side
from holdfast.daemon.core.actions import Action, DropFrames, Free, StoreDigests, WriteLedger
from holdfast.daemon.core.arena import Arena
from holdfast.daemon.core.asks import Asks
from holdfast.daemon.core.client_side import ClientSide
from holdfast.daemon.core.collector import Collector
from holdfast.daemon.core.context import Context
from holdfast.daemon.core.durable import Durable
from holdfast.daemon.core.ledger import LedgerRecord
from holdfast.daemon.core.memory import ESTATE_SLOTS_FROM, READ_SLOTS_FROM, Memory
from holdfast.daemon.core.offers import Offers
from holdfast.daemon.core.peer_side import PeerSide
from holdfast.daemon.core.peers import Peers
from holdfast.daemon.core.protect import key_of
from holdfast.daemon.core.pursuits import Pursuits
from holdfast.daemon.core.ranges import Ranges
from holdfast.daemon.core.record import Records
from holdfast.daemon.core.registry import JobParts, Registry
from holdfast.daemon.core.restoring import Restoring
from holdfast.daemon.core.slot import Phase
from holdfast.daemon.core.sums import Sums
from holdfast.daemon.core.trace import Trace
from holdfast.daemon.core.trace_asks import TraceAsks
from holdfast.protocol import limits, messages


class Node:
    """The daemon of one node, without its hands."""

    def __init__(self, ctx: Context, *, started_ns: int, arena: Arena | None = None) -> None:
        """A core of one epoch. `arena`: the budget that it shares with that of another epoch in the same process."""
        ctx.now_ns = started_ns
        self.ctx = ctx
        self.arena = arena or Arena(ctx.budget_bytes)
        self.peers = Peers(ctx, started_ns)
        self.collector = Collector(ctx, self.peers)
        self.pursuits = Pursuits(ctx)
        self.durable = Durable(ctx, self.peers)
        self.registry = Registry(ctx, self.arena, self.peers, self.collector, self.pursuits, self.durable)
        self.records = Records(ctx, self.peers, self.registry)
        self.restoring = Restoring(ctx, self.peers, self.registry, self.collector, self.records)
        self.asks = Asks(ctx, self.peers, self.registry)
        self.sums = Sums(ctx, self.registry)
        self.offers = Offers(ctx, self.peers, self.registry, self.collector)
        self.ranges = Ranges(ctx, self.arena, self.peers, self.registry, self.offers, self.pursuits)
        self.trace = Trace(started_ns)
        self.trace_asks = TraceAsks(ctx, self.peers, self.trace)
        self.peer_side = PeerSide(
            ctx,
            self.peers,
            self.registry,
            self.collector,
            self.restoring,
            self.asks,
            self.sums,
            self.pursuits,
            self.offers,
            self.ranges,
            self.trace_asks,
        )
        self.client_side = ClientSide(
            ctx, self.registry, self.collector, self.restoring, self.asks, self.offers, self.ranges, self.trace_asks
        )
        self.clients: set[int] = set()
        self.heartbeat_ns = 0
        self.written: tuple[object, ...] | None = None

    # --- the one door ---

    def start(self) -> list[Action]:
        """The first actions of a worker's life."""
        self.peers.start()
        return self.flush()

    @property
    def jobs(self) -> dict[str, JobParts]:
        """The jobs by name, for tests and the status."""
        return self.registry.table

    def status(self) -> dict[str, object]:
        """The cluster as this node sees it."""
        return self.registry.status()

    def may_commit(self) -> bool:
        """Whether a snapshot is whole on this node and its fate open: a clean stop waits a moment for it."""
        open_phases = {Phase.SEALED, Phase.PROTECTED}
        return any(slot.phase in open_phases for parts in self.registry for slot in parts.job.slots)

    def stop(self) -> None:
        """This node was asked to stop for good."""
        self.durable.stop()

    def is_copying(self) -> bool:
        """Whether a clean stop waits for a durable copy."""
        return self.durable.holds_up([parts.job for parts in self.registry])

    def resume(self, held: LedgerRecord, digests: Mapping[Memory, list[int]]) -> None:
        """Take up what a predecessor held; before `start`."""
        ledger_side.resume(self.registry, held, digests)
        self.peers.resume(held.incarnations)

    def handle(self, event: events.Event, now_ns: int) -> list[Action]:
        """Apply one event at time `now_ns`; return what the shell must now do, in order."""
        assert now_ns >= self.ctx.now_ns, "the clock is monotonic"
        stood_still_ns, self.ctx.now_ns = now_ns - self.ctx.now_ns, now_ns
        if stood_still_ns > int(limits.OWN_STALL_S * 1e9):
            # It was this process that heard nothing, not the others that said nothing: what they said waits in sockets.
            self.peers.excuse(stood_still_ns)
            self.collector.excuse(stood_still_ns)
        self.trace.saw(event, now_ns)
        match event:
            case events.TimePassed():
                self._tick(event)
            case events.PeerSaid():
                self.peer_side.said(event)
            case events.PeerRefused():
                self.peer_side.refused(event)
            case events.ClientArrived(client):
                self.clients.add(client)
            case events.ClientGone(client):
                self._client_gone(client)
            case events.ClientSaid(client, message):
                if client in self.clients:
                    self.client_side.said(client, message)
            case events.DurablyCopied(job, snapshot, size_bytes, seconds):
                self.durable.copied(job, snapshot, size_bytes=size_bytes, seconds=seconds)
                self.ctx.tell_all(self.registry.heartbeat())  # who stops waits for this
            case events.CopyFailed(job, reason):
                self.durable.failed(job, reason)
            case events.ChunksScrubbed() | events.ChunkRepaired() | events.StripeDrilled():
                if isinstance(event, events.ChunkRepaired):
                    self._written(event.memory, event.number)
                if (parts := self.registry.owner(event.memory, event.snapshot)) is not None:
                    parts.healing.done(event)
            case _:
                self._work_done(event)
        return self.flush()

    def flush(self) -> list[Action]:
        """What was decided since the last look, in order."""
        actions, self.ctx.actions = self._ordered(), []
        for action in actions:
            self.trace.did(action)
        return actions

    def _ordered(self) -> list[Action]:
        state = ledger_side.state(self.registry, self.peers)
        if state == self.written:
            return self.ctx.actions
        self.written = state
        # The ledger must never call a snapshot complete whose digest table is not, so the table goes first.
        tables = [action for action in self.ctx.actions if isinstance(action, StoreDigests)]
        others = [action for action in self.ctx.actions if not isinstance(action, StoreDigests)]
        return [*tables, WriteLedger(ledger_side.record(self.registry, self.peers)), *others]

    def check(self) -> None:
        """Assert every invariant; tests and the simulator call this after each event."""
        for machine in (self.arena, self.peers, self.collector, self.restoring, self.sums, self.pursuits):
            machine.check()
        self.offers.check()
        self.ranges.check()
        for parts in self.registry:
            parts.check()

    # --- time ---

    def _tick(self, event: events.TimePassed) -> None:
        self.ctx.free_bytes = event.free_bytes
        for node in self.peers.silence():
            self.peer_side.flight_lost(node, restarted=False)
        for parts in self.registry:
            parts.protect.tick()
            if parts.rebuild.is_outdated:
                parts.rebuild.cancel("another snapshot is committed, or it has another layout")
            parts.rebuild.tick()
            parts.reprotect.tick()
            parts.shards.tick()
            parts.healing.tick()
            self.collector.consider(parts.job)
            self.collector.consider_cadence(parts.job)
        self.records.tick()
        self.restoring.tick()
        self.asks.tick()
        self.trace_asks.tick()
        self.sums.tick()
        self.offers.tick()
        self.ranges.tick()
        self.registry.evict_closed()
        self.durable.tick([parts.job for parts in self.registry])
        if self.ctx.now_ns >= self.heartbeat_ns:
            self.heartbeat_ns = self.ctx.seconds(limits.HEARTBEAT_S)
            self.ctx.tell_all(self.registry.heartbeat())

    def _client_gone(self, client: int) -> None:
        self.clients.discard(client)
        self.restoring.client_gone(client)
        self.asks.client_gone(client)
        self.trace_asks.client_gone(client)
        self.offers.client_gone(client)
        self.ranges.client_gone(client)
        for parts in self.registry:
            parts.job.client_gone(client)
            parts.shards.client_gone(client)

    # --- what the shell's threads finished ---

    def _work_done(self, event: events.Event) -> None:
        match event:
            case events.MemoryReady() | events.MemoryFailed():
                self._memory_made(event)
            case events.ChunksDigested(memory, snapshot, first_chunk, digests):
                if (parts := self.registry.owner(memory, snapshot)) is not None:
                    parts.protect.digested(memory, first_chunk, digests)
                    self.collector.consider(parts.job)
            case events.ParityEncoded(memory, snapshot, stripe, digest):
                if (parts := self.registry.owner(memory, snapshot)) is not None:
                    parts.protect.encoded(memory, stripe, digest)
                    self.collector.consider(parts.job)
            case events.ChunksVerified(memory, ticket, bad):
                if (parts := self.registry.owner(memory)) is not None:
                    parts.shards.verified(memory, ticket, bad)
                    parts.rebuild.verified(ticket, bad)
            case events.ChunkArrived(header, digest):
                self._chunk_arrived(header, digest)
            case events.ChunkNotServed(node, header):
                assert header.kind != "sum"
                text = "it fails its digest at rest"
                said = messages.ChunkUnavailable(header.job, header.snapshot, header.kind, header.chunk, text)
                self.ctx.tell(node, said)
                if (parts := self.registry.get(header.job)) is not None:
                    parts.healing.scrub.not_served(header)
            case _:
                self._sum_done(event)

    def _memory_made(self, event: events.MemoryReady | events.MemoryFailed) -> None:
        memory, known = event.memory, self.registry.get(event.memory.job)
        reason = event.reason if isinstance(event, events.MemoryFailed) else None
        if ESTATE_SLOTS_FROM <= memory.slot < READ_SLOTS_FROM:
            if known is not None:
                known.reprotect.memory_made(memory, reason)
            elif reason is None:  # the job was forgotten meanwhile
                self.ctx.emit(Free(memory))
            return
        parts = self.registry.owner(memory)
        if reason is None:
            self.ranges.memory_ready(memory)
            if parts is not None:
                parts.job.memory_ready(memory)
                parts.rebuild.memory_ready(memory)
        else:
            self.ranges.memory_failed(memory, reason)
            if parts is not None:
                parts.job.memory_failed(memory, reason)

    def _sum_done(self, event: events.Event) -> None:
        match event:
            case events.SumAdded(header, fingerprint):
                self.sums.added(header, fingerprint)
            case events.SumNotAdded(header, reason):
                self.sums.not_added(header, reason)
            case events.SumStored(memory, number, digest, fingerprint):
                self._written(memory, number)
                self.pursuits.stored(number, digest, fingerprint)
            case events.SumNotStored(memory, number, reason):
                self._written(memory, number)
                self.pursuits.not_stored(number, reason)
            case events.ChunkNotRepaired(memory, number):
                self._written(memory, number)
            case _:
                raise AssertionError(f"no rule for {type(event).__name__}")

    def _written(self, memory: Memory, number: int) -> None:
        self.ctx.stores.pop(number, None)
        if (parts := self.registry.owner(memory)) is not None:
            parts.job.grant_waiting()  # its slot may have waited for this alone

    def _chunk_arrived(self, header: messages.ChunkHeader, digest: int) -> None:
        parts = self.registry.get(header.job)
        if header.kind == "sum" and header.sender < len(self.ctx.config.nodes):
            if header.node == self.ctx.node:
                self.pursuits.arrived(header, digest)
            else:
                self.sums.arrived(header, digest)
        elif parts is None or header.sender >= len(self.ctx.config.nodes):
            self.ctx.emit(DropFrames((key_of(header),)))
        elif header.reading and parts.healing.expects(header):
            parts.healing.arrived(header, digest)
        elif header.reading:
            self.ctx.emit(DropFrames((key_of(header),)))  # nobody waits for it any more
        else:
            parts.protect.arrived(header, digest)
