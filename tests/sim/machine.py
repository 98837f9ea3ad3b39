"""One simulated machine: the memory that its keeper holds, and the worker that carries out a real core's actions.

The hands do what the daemon's shell does, in the same order: the ledger at once, coding in one queue, allocation in
another, chunks read when they leave, received frames kept by key until dropped. The bytes are real.
"""

from collections.abc import Callable

from holdfast.coding import CodeParams, chunk_digest
from holdfast.daemon.core import actions, events
from holdfast.daemon.core.arena import Arena
from holdfast.daemon.core.context import Context
from holdfast.daemon.core.ledger import decode_ledger, encode_ledger
from holdfast.daemon.core.memory import ChunkKey, Memory, Sizes
from holdfast.daemon.core.node import Node
from holdfast.daemon.core.protect import key_of
from holdfast.daemon.core.resume import held_pieces
from holdfast.protocol import frames, messages
from holdfast.protocol.config import ClusterConfig, config_digest
from holdfast.protocol.layout import Geometry, Layout
from holdfast.protocol.placement import Placement
from holdfast.protocol.recovery import RecoveryRecord

from sim.coder import CODING_ORDERS, Coder, Held
from sim.household import Household
from sim.network import Network
from sim.world import World

TICK_S = 0.25
CHECK_EVERY_EVENTS = 4  # a broken invariant stays broken; looking at every event would take a quarter of all time
NODE_BYTES_FREE = 1 << 40


class Client:
    """The daemon's end of one trainer's connection: what it says arrives in order until the worker or process ends."""

    def __init__(self, number: int, hear: Callable[[messages.DaemonMessage], None], gone: Callable[[], None]) -> None:
        self.number, self.hear, self.gone = number, hear, gone
        self.maps: dict[tuple[str, int], tuple[int, bytearray]] = {}
        self.closed = False
        self.last_ns = 0  # both directions keep order
        self.last_reply_ns = 0


class Machine:
    """One slot of the cluster: a machine, later perhaps its replacement."""

    def __init__(
        self,
        world: World,
        network: Network,
        config: ClusterConfig,
        placement: Placement,
        *,
        node: int,
        budget_bytes: int,
        coding_s_max: float,
    ) -> None:
        self.world, self.network, self.config, self.placement = world, network, config, placement
        self.node, self.budget_bytes, self.coding_s_max = node, budget_bytes, coding_s_max
        self.booted_ns = 0
        self.held: dict[Memory, Held] = {}
        self.ledger: bytes | None = None
        self.incarnation = 0
        self.records: dict[str, RecoveryRecord] = {}  # files, by name
        self.worker: Worker | None = None
        self.machines: list[Machine] = []
        self.after_event: Callable[[Worker, events.Event | None, list[actions.Action]], None] = lambda *_: None
        self.clock_offset_ns = world.random.randrange(10**12)
        self.next_port = 1
        self.refuse_memory = False  # the kernel gives none for a while
        self.free_bytes = NODE_BYTES_FREE
        self.passenger: Machine | None = None  # the same host in the epoch before, served by the same process
        self.host: Machine | None = None  # the other way round, from when this host has taken up the next epoch
        self.changes = False  # its epoch began while another one was in force
        self.is_over = False  # the epoch of this machine is over on its host, its memory is free

    @property
    def front(self) -> "Machine":
        """Whose worker clients of this host talk to."""
        return self if self.host is None else self.host

    @property
    def is_behind(self) -> bool:
        """Whether this host still serves the epoch before only."""
        before = self.passenger
        return before is not None and before.host is None and before.worker is not None

    @property
    def name(self) -> str:
        """The name in the config."""
        return self.config.nodes[self.node].name

    def boot(self) -> None:
        """A worker starts: with what the keeper holds, or on an empty machine."""
        if self.host is not None:
            if self.host.worker is None:
                self.host.boot()
            return
        assert self.worker is None
        worker = self.make_worker(Arena(self.budget_bytes))
        if self.changes:
            passenger = None
            if self.passenger is not None and self.passenger.ledger is not None:
                passenger = self.passenger.make_worker(worker.node.arena)
            worker.household = Household(worker, passenger)
        worker.start()
        self.world.after(self.world.between(0, TICK_S), worker.tick)

    def make_worker(self, arena: Arena) -> "Worker":
        """A worker's core and hands, that takes up what the keeper holds."""
        record = decode_ledger(self.ledger) if self.ledger is not None else None
        if record is None:
            lag = self.world.random.choice([0, 0, 0, 5_000_000])  # a replacement's wall clock may be behind
            self.incarnation = 10_000_000 + int(self.world.now_s * 1000) - lag
        self.next_port += 1
        ctx = Context(
            config=self.config,
            config_digest=config_digest(self.config),
            placement=self.placement,
            node=self.node,
            incarnation=record.incarnation if record else self.incarnation,
            worker_session=record.worker_session + 1 if record else 1,
            wall_ms_at_zero=1_000_000 - self.clock_offset_ns // 1_000_000,
            budget_bytes=self.budget_bytes,
            engine="simulated",
            bulk_port=self.next_port,
            free_bytes=self.free_bytes,
        )
        worker = Worker(self, Node(ctx, started_ns=self.clock_ns, arena=arena))
        if record is not None:
            tables: dict[Memory, list[int]] = {}
            for memory, sizes in held_pieces(record, self.geometry).items():
                if memory in self.held:
                    assert sizes.digest_count == len(self.held[memory].digests)
                    tables[memory] = list(self.held[memory].digests)
            worker.node.resume(record, tables)
            self.held = {memory: held for memory, held in self.held.items() if memory in tables}  # drop_strays
        self.worker, self.booted_ns = worker, self.world.now_ns
        self.world.note(f"{self.name}: worker boots, session {ctx.worker_session}, incarnation {ctx.incarnation}")
        return worker

    def geometry(self, layout: Layout) -> Geometry:
        """Sizes and stripes of a layout on this cluster."""
        return Geometry(
            layout=layout,
            placement=self.placement,
            parity_count=self.config.parity,
            chunk_bytes=self.config.chunk_bytes,
        )

    @property
    def clock_ns(self) -> int:
        """This machine's monotonic clock."""
        return self.world.now_ns + self.clock_offset_ns

    def crash_worker(self) -> None:
        """The worker dies; the keeper keeps the memory and the ledger."""
        if self.host is not None:
            self.host.crash_worker()
            return
        worker = self._end_worker()
        if worker is None:
            return
        if self.passenger is not None:
            self.passenger._end_worker()  # the same process
        for client in list(worker.clients.values()):
            worker.drop_client(client)

    def _end_worker(self) -> "Worker | None":
        worker, self.worker = self.worker, None
        if worker is None:
            return None
        self.world.note(f"{self.name}: worker dies")
        worker.dead = True
        # What was already sent may still arrive; what was on its way here is lost.
        if self.world.chance(0.5):
            self.network.cut_node(self.node)
        else:
            self.network.cut([key[:2] for key in self.network.connections if key[1] == self.node])
        return worker

    def leave(self) -> None:
        """The epoch of this machine is over on its host: what it held is free."""
        self.world.note(f"{self.name}: epoch {self.config.epoch} is over")
        assert not self.held, f"{self.name} keeps {list(self.held)} of an epoch that is over"
        self._end_worker()
        self.ledger, self.is_over = None, True

    @property
    def held_bytes(self) -> int:
        """All that the host's keeper holds."""
        front = self.front
        pieces = [*front.held.values(), *(front.passenger.held.values() if front.passenger is not None else ())]
        return sum(held.held_bytes for held in pieces)

    def lose(self) -> None:
        """The machine is gone with all its memory."""
        if self.host is not None:
            self.host.lose()
            return
        self.crash_worker()
        for machine in (self, self.passenger):
            if machine is not None:
                self.world.note(f"{machine.name}: LOST")
                machine.network.cut_node(machine.node)
                machine.held.clear()
                machine.ledger = None


class Worker:
    """One life of a worker process: a core and its hands."""

    def __init__(self, machine: Machine, node: Node) -> None:
        self.machine, self.world, self.node = machine, machine.world, node
        self.dead = False
        self.frozen_until_ns = self.received_ns = 0
        self.crash_after_actions: int | None = None
        self.household: Household | None = None
        self.clients: dict[int, Client] = {}
        self.next_client = 1
        self.frames: dict[ChunkKey, bytes] = {}
        self.ports: dict[int, int] = {}
        members = len(machine.placement.groups[machine.placement.group_of(machine.node)])
        self.params = CodeParams(members - machine.config.parity, machine.config.parity)
        self.coder = Coder(self, self.params)

    # --- events ---

    def put(self, event: events.Event, delay_s: float = 0.0001) -> None:
        """An event of another thread: the loop takes it a little later."""
        self.world.after(self.world.between(0, delay_s), lambda: self.handle(event))

    def received(self, event: events.ChunkArrived) -> None:
        """What the one thread that receives chunks reports: in order, since the first frame of a key is the one kept."""
        self.received_ns = max(self.received_ns + 1, self.world.now_ns + int(self.world.between(0, 0.001) * 1e9))
        self.world.at(self.received_ns, lambda: self.handle(event))

    def handle(self, event: events.Event) -> None:
        """The loop's turn."""
        if self.dead:
            return
        if self.world.now_ns < self.frozen_until_ns:
            self.world.at(self.frozen_until_ns, lambda: self.handle(event))
            return
        if self.household is not None:
            self.household.handle(event, self.node)
        else:
            self.perform(self.node.handle(event, self.machine.clock_ns), event)

    def start(self) -> None:
        """The first actions."""
        if self.household is not None:
            self.household.perform(self.household.epochs.start(), None)
        else:
            self.perform(self.node.start(), None)

    def tick(self) -> None:
        """Time passes."""
        if not self.dead:
            self.handle(events.TimePassed(self.machine.free_bytes))
            self.world.after(TICK_S, self.tick)

    def perform(self, decided: list[actions.Action], event: events.Event | None) -> None:
        """Carry out what the core decided, in order; the process may die between two actions."""
        if self.world.event_count % CHECK_EVERY_EVENTS == 0:
            self.node.check()
        observed = False
        for action in decided:
            if self.crash_after_actions is not None:
                self.crash_after_actions -= 1
                if self.crash_after_actions < 0:
                    self.machine.crash_worker()
                    return
            self._do(action)
            if not observed and not isinstance(action, actions.StoreDigests):
                observed = True  # from the ledger on, what was decided has happened, whatever dies next
                self.machine.after_event(self, event, decided)
        if not observed:
            self.machine.after_event(self, event, decided)

    def _do(self, action: actions.Action) -> None:
        machine = self.machine
        match action:
            case actions.Allocate():
                self.world.after(self.world.between(0.001, 0.05), lambda: self._allocate(action))
            case actions.Free(memory):
                machine.held.pop(memory, None)
            case _ if isinstance(action, CODING_ORDERS):
                self.coder.order(action)
            case actions.SendPeer(node, message):
                self._send_peer(node, message)
            case actions.SendChunk(node, memory, header):
                held = machine.held.get(memory)
                if held is not None:
                    self.send_chunk(node, header, self.coder.chunk(held.data, header.chunk))
            case actions.StoreDigests(memory, first, digests):
                held = machine.held.get(memory)
                if held is not None:
                    assert first + len(digests) <= len(held.digests), "digests beyond the table"
                    held.digests[first : first + len(digests)] = digests
            case actions.DropFrames(keys):
                for key in keys:
                    self.frames.pop(key, None)
            case actions.CopyDurably(job):
                self.world.after(self.world.between(0.1, 5.0), lambda: self._copied(job))
            case actions.WriteRecord(name, told):
                machine.records[name] = told
            case actions.WriteLedger(record):
                machine.ledger = encode_ledger(record)
            case actions.ReplyClient(client, message):
                self._reply(client, message)
            case actions.GiveMemory(client, memory, data_bytes):
                self._give(client, memory, data_bytes)
            case actions.DropClient(client, _):
                if client in self.clients:
                    self.drop_client(self.clients[client])
            case actions.Log(_, text):
                self.world.note(f"{machine.name}: {text}")
            case actions.DialPeer():
                pass  # connections come and go by themselves
            case _:
                raise AssertionError(f"no hand for {type(action).__name__}")

    def _copied(self, job: str) -> None:
        """A copy fails now and then, and ends with what is committed by then."""
        parts = self.node.jobs.get(job)
        if parts is None or parts.job.committed is None or self.world.chance(0.2):
            self.put(events.CopyFailed(job, "the disk is full"))
        else:
            self.put(events.DurablyCopied(job, parts.job.committed, size_bytes=1, seconds=1.0))

    # --- peers ---

    def _send_peer(self, node: int, message: messages.PeerMessage) -> None:
        config = self.machine.config
        if not isinstance(message, messages.Heartbeat):
            self.world.note(self.machine.name, " -> n", node, ": ", message)
        frame = frames.encode_peer(
            message,
            cluster=config.cluster_name,
            epoch=config.epoch,
            node=self.machine.node,
            incarnation=self.node.ctx.incarnation,
            config=self.node.ctx.config_digest,
        )

        target = self.machine.machines[node]
        if target.is_over or target.is_behind:
            self.put(events.PeerRefused(node, "epoch", "expected another epoch", by_us=False), 0.01)
            return

        def deliver() -> None:
            worker = target.worker
            assert worker is not None
            ctx = worker.node.ctx
            try:
                envelope, heard = frames.decode_peer(
                    frame, cluster=ctx.config.cluster_name, epoch=ctx.config.epoch, config=ctx.config_digest
                )
            except frames.FrameRefusedError as refusal:
                worker.handle(events.PeerRefused(None, refusal.code, str(refusal), by_us=True))
                self.put(events.PeerRefused(node, refusal.code, refusal.text, by_us=False), 0.01)
                return
            if isinstance(heard, messages.Heartbeat) and worker.node.peers.takes(envelope.node, envelope.incarnation):
                worker.ports[envelope.node] = heard.bulk_port
            worker.handle(events.PeerSaid(envelope.node, envelope.incarnation, heard))

        self.machine.network.send(self.machine.node, node, "control", deliver)

    def send_chunk(self, node: int, header: messages.ChunkHeader, view: memoryview) -> None:
        """A chunk leaves when there is a connection; its bytes are read then."""
        receiver = self.machine.machines[node]

        def leave() -> None:
            if self.dead:
                return
            if receiver.worker is None or self.ports.get(node) != receiver.next_port or not self.connected(node):
                self.world.after(0.05, leave)
                return
            payload = bytes(view)  # read now: the arena may have changed since the order
            if not self.machine.network.calm and self.world.chance(self.machine.network.faults.corrupted):
                payload = bytes([payload[0] ^ 0xFF]) + payload[1:]
                self.world.note(f"corrupted {self.machine.name}->n{node} {header.kind} {header.chunk}")
            frame = frames.encode(header)
            self.machine.network.send(self.machine.node, node, "bulk", lambda: accept(frame, payload))

        def accept(frame: bytes, payload: bytes) -> None:
            worker = receiver.worker
            assert worker is not None
            config = receiver.config
            read = frames.decode_header(frame, cluster=config.cluster_name, epoch=config.epoch)
            worker.frames.setdefault(key_of(read), payload)
            worker.received(events.ChunkArrived(read, chunk_digest(payload)))

        self.world.after(self.world.between(0, 0.003), leave)

    def connected(self, node: int) -> bool:
        """Whether bytes could flow to a node now."""
        return self.machine.network.open(self.machine.node, node)

    # --- trainers ---

    def attach(self, hear: Callable[[messages.DaemonMessage], None], gone: Callable[[], None]) -> Client:
        """A trainer connects."""
        client = Client(self.next_client, hear, gone)
        self.next_client += 1
        self.clients[client.number] = client
        self.handle(events.ClientArrived(client.number, 1))
        return client

    def said(self, client: Client, message: messages.ClientMessage) -> None:
        """A trainer says something; it arrives a little later, in order."""
        self.world.note("client ", client.number, " of ", self.machine.name, ": ", message)
        heard = frames.decode_client(frames.encode(message))
        client.last_ns = max(client.last_ns + 1, self.world.now_ns + int(self.world.between(0, 0.002) * 1e9))

        def arrive() -> None:
            if client.number in self.clients:
                self.handle(events.ClientSaid(client.number, heard))

        self.world.at(client.last_ns, arrive)

    def detach(self, client: Client) -> None:
        """A trainer's process ended."""
        client.closed = True
        self.world.after(self.world.between(0, 0.05), lambda: self._notice_gone(client))

    def _notice_gone(self, client: Client) -> None:
        if self.world.now_ns < self.frozen_until_ns:
            self.world.at(self.frozen_until_ns, lambda: self._notice_gone(client))
        elif self.clients.pop(client.number, None) is not None:
            self.handle(events.ClientGone(client.number))

    def drop_client(self, client: Client) -> None:
        """The connection ends from this side."""
        self.clients.pop(client.number, None)
        if not client.closed:
            client.closed = True
            client.gone()
        if not self.dead:
            self.handle(events.ClientGone(client.number))

    def _to_client(self, number: int, deliver: Callable[[Client], None]) -> None:
        client = self.clients.get(number)
        if client is None:
            return
        client.last_reply_ns = max(client.last_reply_ns + 1, self.world.now_ns + int(self.world.between(0, 2e6)))
        self.world.at(client.last_reply_ns, lambda: None if client.closed else deliver(client))

    def _reply(self, number: int, message: messages.DaemonMessage) -> None:
        if not isinstance(message, messages.ShardPending):
            self.world.note(self.machine.name, " -> client ", number, ": ", message)
        heard = frames.decode_daemon(frames.encode(message))
        self._to_client(number, lambda client: client.hear(heard))

    def _give(self, number: int, memory: Memory, data_bytes: int) -> None:
        held = self.machine.held.get(memory)
        if held is None or not held.data:
            return
        assert data_bytes == len(held.data), "a trainer is told the size that the memory has"
        self._to_client(
            number, lambda client: client.maps.update({(memory.job, memory.slot): (memory.generation, held.data)})
        )

    # --- work on bytes ---

    def _allocate(self, action: actions.Allocate) -> None:
        if self.dead:
            return
        if self.machine.refuse_memory:
            self.handle(events.MemoryFailed(action.memory, "Cannot allocate memory"))
            return
        sizes: Sizes = action.sizes
        self.machine.held[action.memory] = Held(
            bytearray(sizes.data_bytes), bytearray(sizes.parity_bytes), [0] * sizes.digest_count
        )
        self.handle(events.MemoryReady(action.memory))
