"""The worker: the loop that turns what happens into events, and the core's decisions into deeds.

Run by the keeper as ``python -m holdfast.daemon.shell.worker``. Covers start-up (config, lock, memory, ledger), the
loop, and a clean stop. Decides nothing: every `if` about snapshots, peers or budgets is in the core.
"""

import argparse
import logging
import os
import signal
import sys
import time
from importlib.metadata import version
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

import msgspec
from holdfast.coding import CodeParams, Engine, select_engine, why_not_native
from holdfast.coding.errors import CodingError
from holdfast.daemon.core import actions, events
from holdfast.daemon.core.context import Context
from holdfast.daemon.core.ledger import LedgerRecord, decode_ledger, encode_ledger
from holdfast.daemon.core.memory import Memory
from holdfast.daemon.core.node import Node
from holdfast.daemon.core.resume import held_pieces
from holdfast.daemon.keeper import RESTART_EXIT
from holdfast.daemon.shell import network
from holdfast.daemon.shell.arena import ArenaMemory
from holdfast.daemon.shell.bulk import BulkPlane, Outgoing
from holdfast.daemon.shell.coder import Coder, coding_threads
from holdfast.daemon.shell.control import ControlPlane
from holdfast.daemon.shell.copying import Copier
from holdfast.daemon.shell.door import Door
from holdfast.daemon.shell.gates import Gates, ask_for_descriptors
from holdfast.daemon.shell.inbox import Inbox
from holdfast.daemon.shell.keeping import KeeperLink, LedgerMemory
from holdfast.daemon.shell.keys import Keys, load_keys
from holdfast.daemon.shell.machine import MachineMemory
from holdfast.daemon.shell.metrics import Meters
from holdfast.daemon.shell.network import READABLE, Poller, public_key_of
from holdfast.daemon.shell.numa import Near, Placer, Topology
from holdfast.daemon.shell.pages import Pages, StatusRequests
from holdfast.daemon.shell.records import RecordFiles
from holdfast.daemon.shell.remote import RemoteGate
from holdfast.daemon.shell.scrubber import Scrubber
from holdfast.protocol import limits, messages
from holdfast.protocol.config import ClusterConfig, config_digest, parse_config
from holdfast.protocol.exit_codes import ExitCode, OperatorError
from holdfast.protocol.layout import Geometry, Layout
from holdfast.protocol.placement import place
from holdfast.protocol.settings import split_address
from holdfast.protocol.trust import refuse_exposure

if TYPE_CHECKING:
    from holdfast.daemon.shell.sealing import Sealing

log = logging.getLogger("holdfast")

_TICK_MS = 100  # deadlines are seconds; ten looks per second keep an idle daemon below a percent of a core
_DRAIN_S = 3.0  # asked to stop, what is sealed here may still commit; others can then restore it without this node
_WHOLE = frozenset({"protected", "committed", "rebuilding"})  # phases of slots whose loss would be one
_ALIVE_NS = 1_000_000_000  # between two life signs to the keeper


class Worker:
    """One node's daemon while this process lives.

    Chunks have a ZeroMQ context of their own: one I/O thread carries 3 GB/s, in and out together, and a heartbeat must
    wait for none.
    """

    def __init__(self, config: ClusterConfig, node: int, keys: Keys | None, door: Door, link: KeeperLink) -> None:
        self.config, self.node_index, self.door, self.link = config, node, door, link
        self.stop_signals: list[int] = []  # as they came; the first one says what for, a second one that it hurries
        self.alive_ns = self.drain_ns = 0  # the latter: when draining ends; 0 before it began
        self.inbox = Inbox()
        self.machine = MachineMemory()
        self.zmq_context = network.Context(io_threads=1)
        self.bulk_context = network.Context(io_threads=coding_threads())
        sealing = sealing_of(config, node)
        self.control = ControlPlane(config, node, keys, self.zmq_context, sealing)
        self.bulk = BulkPlane(config, node, self.bulk_context, self.inbox.put, sealing)
        self.remote = RemoteGate.of(config, keys, door.path, threads=coding_threads())
        self.gates = Gates(self._ports(), len(config.nodes))
        self.placer = Placer(Topology(), self._writers, self._order_memory)
        self.arena = ArenaMemory(link, threads=coding_threads())
        engine = _engine_of(config)
        self.meters = Meters(chunk_bytes=config.chunk_bytes, version=version("holdfast"), engine_detail=engine.detail)
        self.ledger = LedgerMemory(link)
        placement = place([n.domain for n in config.nodes], group_size=config.group_size, parity=config.parity)
        params = CodeParams(len(placement.groups[placement.group_of(node)]) - config.parity, config.parity)
        self.coder = Coder(
            engine=engine,
            chunk_bytes=config.chunk_bytes,
            params=params,
            arena=self.arena,
            bulk=self.bulk,
            report=self.inbox.put,
            threads=coding_threads(),
        )
        self.coder.worked = self.meters.worked
        self.scrubber = Scrubber(
            config, engine=engine, params=params, arena=self.arena, bulk=self.bulk, report=self.inbox.put
        )
        self.copier = Copier(door.path, config.nodes[node].name, self.inbox.put)
        self.records = RecordFiles(Path(config.state_dir or door.path.parent), config.nodes[node].name)
        record = self._read_ledger()
        now_ns = time.monotonic_ns()
        self.context = Context(
            config=config,
            config_digest=config_digest(config),
            placement=placement,
            node=node,
            incarnation=record.incarnation if record else time.time_ns() // 1_000_000,
            worker_session=record.worker_session + 1 if record else 1,
            wall_ms_at_zero=(time.time_ns() - now_ns) // 1_000_000,
            budget_bytes=config.budget_bytes or self.machine.total_bytes // 2,
            engine=engine.name,
            bulk_port=self.bulk.port,
            free_bytes=self.machine.free_bytes(),
            state_dir=str(self.records.directory),
        )
        self.node = Node(self.context, started_ns=now_ns)
        self.control.takes = self.node.peers.takes
        if record is not None:
            self._resume(record)
        self.arena.drop_strays()
        self.status_requests = StatusRequests(lambda: os.eventfd_write(self.inbox.wake, 1))
        self.pages = self._open_pages(config.http_address)
        self.poller = Poller()
        self.welcome = _welcome(config, node, door)

    def _ports(self) -> dict[int, str]:
        """Those that others reach, and what they are called."""
        found = {self.config.nodes[self.node_index].port: "control", self.bulk.port: "bulk"}
        return found if self.remote is None else {**found, self.remote.port: "trainers"}

    def _open_pages(self, address: str | None) -> Pages | None:
        if address is None:
            return None
        host, port = split_address(address)
        return Pages(host, port, self.status_requests, self.meters)

    def _read_ledger(self) -> LedgerRecord | None:
        payload = self.ledger.read()
        if payload is None:
            return None
        try:
            record = decode_ledger(payload)
        except msgspec.DecodeError as error:
            log.error("the ledger in held memory can't be read (%s); starting with empty memory", error)
            return None
        expected = (self.config.cluster_name, self.config.epoch, self.node_index)
        found = (record.cluster, record.epoch, record.node)
        if found == expected:
            return record
        if any(slot.phase in _WHOLE for job in record.jobs for slot in job.slots):
            raise OperatorError(ExitCode.WRONG_CLUSTER, _other_memory(expected, found))
        log.warning("the held memory belongs to %s, this daemon is %s; no snapshot is in it", found, expected)
        return None

    def _resume(self, record: LedgerRecord) -> None:
        tables: dict[Memory, list[int]] = {}
        for memory, sizes in held_pieces(record, self._geometry).items():
            if self.arena.is_held(memory, sizes):
                self.arena.map(memory, sizes)
                mapped = self.arena.get(memory)
                assert mapped is not None
                tables[memory] = [int(digest) for digest in mapped.digests]
        self.node.resume(record, tables)
        log.info(
            "worker session %d takes up %d pieces of memory",
            self.context.worker_session,
            len(tables),
        )

    def _geometry(self, layout: Layout) -> Geometry:
        return Geometry(
            layout=layout,
            placement=self.context.placement,
            parity_count=self.config.parity,
            chunk_bytes=self.config.chunk_bytes,
        )

    # --- the loop ---

    def run(self) -> None:
        """Serve until told to stop."""
        self.control.incarnation = self.context.incarnation
        self.control.bind_clients(self.door.endpoint)
        self.door.share(Path(self.door.endpoint.removeprefix("ipc://")))
        self.control.register(self.poller)
        self.bulk.start()
        if self.remote is not None:
            self.remote.start()
        for descriptor in (self.door.fileno(), self.inbox.wake, self.link.fileno()):
            if descriptor >= 0:
                self.poller.register(descriptor, READABLE)
        self._perform(self.node.start())
        log.info("node %s ready on %s, control %s, bulk port %d, bulk mode %s, engine %s, incarnation %d",
                 self.config.nodes[self.node_index].name, self.door.path, self.config.nodes[self.node_index].address,
                 self.bulk.port, self.config.bulk_mode, self.context.engine, self.context.incarnation)  # fmt: skip
        self.link.say_ready(grace_s=self.config.durable_grace_s if self.config.durable_dir else 0)
        next_tick_ns = 0
        while self._goes_on():
            # One millisecond more than is left: rounded down, the last one would be spent spinning.
            wait_ms = max(0, min(_TICK_MS, (next_tick_ns - time.monotonic_ns()) // 1_000_000 + 1))
            self._turn({found for found, _ in self.poller.poll(wait_ms)})
            if time.monotonic_ns() >= next_tick_ns:
                next_tick_ns = time.monotonic_ns() + _TICK_MS * 1_000_000
                self._handle(events.TimePassed(self.machine.free_bytes()))
                self.control.redial()
                self.gates.look()
                if time.monotonic_ns() >= self.alive_ns:
                    self.alive_ns = time.monotonic_ns() + _ALIVE_NS
                    self.link.say_alive()

    def _goes_on(self) -> bool:
        """Whether to take another turn: until asked to stop, and then while something may still commit."""
        if not self.stop_signals:
            return True
        if self.drain_ns == 0:
            self.drain_ns = time.monotonic_ns() + int(_DRAIN_S * 1e9)
            if self.stop_signals[0] != signal.SIGHUP:
                self.node.stop()
        if len(self.stop_signals) > 1:
            return False
        return (self.node.may_commit() and time.monotonic_ns() < self.drain_ns) or self.node.is_copying()

    def _turn(self, ready: set[object]) -> None:
        if self.door.fileno() in ready:
            self._welcome_clients()
        self.status_requests.serve(self.node.status)
        for event in self.inbox.take():
            self._handle(event)
        for event in self.control.receive(self.door.tokens, ready):
            if isinstance(event, events.PeerSaid) and isinstance(event.message, messages.Heartbeat):
                self._tell_bulk(event, event.message.bulk_port)
            self._handle(event)
        for client, arrived in list(self.door.clients.items()):
            if arrived.connection.fileno() in ready and self.door.ended(client):
                self._end_client(client)
        if self.link.fileno() in ready:
            self.poller.unregister(self.link.fileno())
            self.link.revive()
            self.poller.register(self.link.fileno(), READABLE)
        self.placer.look()

    def _writers(self, action: actions.Allocate) -> list[tuple[int | None, int, int]]:
        parts = self.node.jobs.get(action.memory.job)
        if parts is None or action.layout is None:
            return []
        known: dict[int | None, int] = {client: arrived.pid for client, arrived in self.door.clients.items()}
        return [(known.get(client), start, size) for client, start, size in parts.job.writers_of(action.layout)]

    def _order_memory(self, action: actions.Allocate, wishes: tuple[Near, ...]) -> None:
        self.arena.wishes[action.memory] = wishes
        self.coder.order(action)

    def _tell_bulk(self, said: events.PeerSaid, port: int) -> None:
        address = self.control.names.of(said.node)
        if address is not None and self.node.peers.takes(said.node, said.incarnation):
            self.bulk.peer_port(said.node, port, address)

    def _welcome_clients(self) -> None:
        for _ in range(limits.CLIENT_COUNT_MAX):
            arrived = self.door.accept(self.welcome)
            if arrived is None:
                return
            self.poller.register(arrived.connection.fileno(), READABLE)
            self._handle(events.ClientArrived(arrived.number, arrived.pid))

    def _end_client(self, client: int) -> None:
        arrived = self.door.clients.get(client)
        if arrived is not None:
            self.poller.unregister(arrived.connection.fileno())
            self.door.close_client(client)
        self._handle(events.ClientGone(client))

    def _handle(self, event: events.Event) -> None:
        self.meters.saw(event)
        self._perform(self.node.handle(event, time.monotonic_ns()))

    def _perform(self, decided: list[actions.Action]) -> None:
        for action in decided:
            self.meters.did(action)
            if isinstance(action, actions.Allocate):
                self.placer.take(action)
            elif not self.coder.order(action) and not self.scrubber.order(action):
                self._do(action)

    def _do(self, action: actions.Action) -> None:
        match action:
            case actions.SendPeer(node, message):
                self.control.incarnation = self.context.incarnation
                self.control.send_peer(node, message)
            case actions.ReplyClient(client, message):
                arrived = self.door.clients.get(client)
                if arrived is not None:
                    self.control.send_client(arrived.token, message)
            case actions.SendChunk(node, memory, header):
                slot = self.arena.get(memory)
                if slot is not None:
                    start = header.chunk * self.config.chunk_bytes
                    chunk = slot.data[start : start + self.config.chunk_bytes]
                    self.bulk.send(Outgoing(node, header, chunk))
            case actions.StoreDigests(memory, first, digests):
                slot = self.arena.get(memory)
                if slot is not None:
                    slot.digests[first : first + len(digests)] = digests
            case actions.DropFrames(keys):
                self.bulk.drop(keys)
            case actions.CopyDurably():
                self.copier.order(action)
            case actions.WriteRecord():
                self.records.write(action)
            case actions.WriteLedger(record):
                self.ledger.write(encode_ledger(record))
                self.meters.wrote(record, {name: parts.job.protect_s for name, parts in self.node.jobs.items()})
            case actions.Log(level, text):
                log.log(logging.getLevelNamesMapping()[level.upper()], "%s", text)
            case actions.DialPeer(node):
                self.control.dial(node, self.poller)
            case actions.GiveMemory(client, memory, data_bytes):
                self._give(client, memory, data_bytes)
            case actions.Free(memory):
                self._free(memory)
            case actions.DropClient(client, reason):
                log.warning("client %d dropped: %s", client, reason)
                self._end_client(client)
            case _:
                raise AssertionError(f"no hand for {type(action).__name__}")

    def _give(self, client: int, memory: Memory, data_bytes: int) -> None:
        slot = self.arena.get(memory)
        if slot is None or slot.data_fd < 0:
            return
        given = messages.MemoryGiven(memory.job, memory.slot, memory.generation, data_bytes)
        if not self.door.give(client, given, slot.data_fd):
            self.inbox.put(events.ClientGone(client))

    def _free(self, memory: Memory) -> None:
        self.arena.free(memory)
        if self.remote is not None:
            self.remote.free(memory)

    def stop(self, number: int, _frame: FrameType | None) -> None:
        """Signal handler: leave the loop once nothing can commit any more; at a second signal, at once."""
        log.info("signal %d: %s", number, "making way for another worker" if number == signal.SIGHUP else "stopping")
        self.stop_signals.append(number)

    def close(self) -> None:
        """Give everything back but what the keeper holds."""
        if self.pages is not None:
            self.pages.stop()
        if self.remote is not None:
            self.remote.stop()
        self.coder.stop()
        self.scrubber.stop()
        self.copier.stop()
        self.records.stop()
        self.bulk.stop()
        self.control.close()
        self.door.close()
        self.bulk_context.destroy(linger=0)
        self.zmq_context.destroy(linger=0)


def _welcome(config: ClusterConfig, node: int, door: Door) -> messages.Welcome:
    """What a trainer or command is told first; its token is filled in for each."""
    return messages.Welcome(
        protocol=limits.PROTOCOL_VERSION,
        cluster=config.cluster_name,
        epoch=config.epoch,
        node=node,
        node_name=config.nodes[node].name,
        token="",
        endpoint=door.endpoint,
    )


def sealing_of(config: ClusterConfig, node: int) -> "Sealing | None":
    """What seals chunks, None in bulk mode `digest`.

    Raises:
        OperatorError: what it needs is not installed (exit code 2).
    """
    if config.bulk_mode == "digest":
        return None
    try:
        from holdfast.daemon.shell.sealing import Sealing  # noqa: PLC0415  # not everybody installs what it needs
    except ImportError as error:
        raise OperatorError(
            ExitCode.USAGE,
            f"security.bulk: expected the package cryptography for mode {config.bulk_mode!r}, found none ({error}). "
            "Install it with 'pip install holdfast[sealed]', or set bulk = \"digest\" on all nodes",
        ) from error
    return Sealing(config, node)


def _other_memory(expected: tuple[str, int, int], found: tuple[str, int, int]) -> str:
    """Why a worker leaves alone what its keeper holds."""
    names = ("cluster", "epoch", "node index")
    differ = [
        f"{name} {theirs!r} (this config: {ours!r})"
        for name, ours, theirs in zip(names, expected, found, strict=True)
        if ours != theirs
    ]
    return (
        f"the memory held here has snapshots of {', '.join(differ)}: with this config they would be given up. Give the "
        "old config back to keep them; to give them up, stop the daemon and start it again"
    )


def _engine_of(config: ClusterConfig) -> Engine:
    """The engine that the config asks for; which one it is, and why not the fastest, is said."""
    engine = select_engine(None if config.engine == "auto" else config.engine)
    log.info("coding engine %s (%s)", engine.name, engine.detail)
    if config.engine == "auto" and engine.name != "native":
        log.warning("coding runs on %s, slower than our own kernel: %s", engine.name, why_not_native())
    return engine


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="holdfast.daemon.shell.worker")
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--node", required=True)
    parser.add_argument("--socket", type=Path, required=True)
    parser.add_argument("--keeper-fd", type=int)
    parser.add_argument("--check", action="store_true", help="only say whether a worker would start")
    return parser.parse_args()


def _start(arguments: argparse.Namespace) -> int:
    try:
        text = arguments.config.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise OperatorError(
            ExitCode.USAGE, f"the config {arguments.config} can't be read: {error}; name another with --config"
        ) from error
    config = parse_config(text, origin=str(arguments.config), environment=dict(os.environ)).config
    names = [node.name for node in config.nodes]
    if arguments.node not in names:
        raise OperatorError(
            ExitCode.USAGE,
            f"no node is named {arguments.node!r} in {arguments.config}; it names {names}",
        )
    node = names.index(arguments.node)
    refuse_exposure(config)
    keys = load_keys(config, node, public_of=public_key_of)
    sealing_of(config, node)
    if arguments.check:
        return ExitCode.DONE
    door = Door(arguments.socket, group=config.socket_group)
    own_arguments = [
        "--config",
        str(arguments.config),
        "--node",
        arguments.node,
        "--socket",
        str(arguments.socket),
    ]
    ask_for_descriptors()
    worker = Worker(config, node, keys, door, KeeperLink(arguments.keeper_fd, own_arguments))
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, worker.stop)
    try:
        worker.run()
        ending = RESTART_EXIT if worker.stop_signals[:1] == [signal.SIGHUP] else ExitCode.DONE
        worker.link.say_ended(ending)
    finally:
        worker.close()
    return ending


def main() -> int:
    """Entry point."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname).1s %(message)s", stream=sys.stderr)
    try:
        return _start(_arguments())
    except OperatorError as error:
        log.error("%s", error)
        return error.exit_code
    except CodingError as error:
        log.error("coding engine: %s", error)
        return ExitCode.USAGE


if __name__ == "__main__":
    sys.exit(main())
