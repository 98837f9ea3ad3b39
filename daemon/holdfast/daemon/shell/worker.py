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

from holdfast.coding import Engine, select_engine, why_not_native
from holdfast.coding.errors import CodingError
from holdfast.daemon.core import actions, events
from holdfast.daemon.core.arena import Arena
from holdfast.daemon.core.epochs import Decided, Epochs
from holdfast.daemon.core.memory import Memory
from holdfast.daemon.keeper import RESTART_EXIT
from holdfast.daemon.shell import network
from holdfast.daemon.shell.arena import ArenaMemory
from holdfast.daemon.shell.bulk import sealing_of
from holdfast.daemon.shell.coder import coding_threads
from holdfast.daemon.shell.control import ControlPlane
from holdfast.daemon.shell.door import Door
from holdfast.daemon.shell.gates import Gates, ask_for_descriptors
from holdfast.daemon.shell.hands import Hands, Shared, nodes_of
from holdfast.daemon.shell.inbox import Inbox
from holdfast.daemon.shell.keeping import KeeperLink, LedgerMemory
from holdfast.daemon.shell.keys import load_keys
from holdfast.daemon.shell.machine import MachineMemory
from holdfast.daemon.shell.metrics import Meters
from holdfast.daemon.shell.network import READABLE, Poller, public_key_of
from holdfast.daemon.shell.numa import Near, Placer, Topology
from holdfast.daemon.shell.pages import Pages, StatusRequests
from holdfast.daemon.shell.records import RecordFiles
from holdfast.daemon.shell.remote import RemoteGate
from holdfast.daemon.shell.taking_up import config_for, config_name, hold_config, places
from holdfast.protocol import limits, messages
from holdfast.protocol.config import ClusterConfig, parse_config
from holdfast.protocol.exit_codes import ExitCode, OperatorError
from holdfast.protocol.settings import split_address
from holdfast.protocol.trust import refuse_exposure
from msgspec import structs

log = logging.getLogger("holdfast")

_TICK_MS = 100  # deadlines are seconds; ten looks per second keep an idle daemon below a percent of a core
_DRAIN_S = 3.0  # asked to stop, what is sealed here may still commit; others can then restore it without this node
_ALIVE_NS = 1_000_000_000  # between two life signs to the keeper


class Worker:
    """One node's daemon while this process lives.

    Chunks have a ZeroMQ context of their own: one I/O thread carries 3 GB/s, in and out together, and a heartbeat must
    wait for none.
    """

    def __init__(self, config: ClusterConfig, name: str, door: Door, link: KeeperLink) -> None:
        self.config, self.name, self.door, self.link = config, name, door, link
        self.stop_signals: list[int] = []  # as they came; the first one says what for, a second one that it hurries
        self.alive_ns = self.drain_ns = 0  # the latter: when draining ends; 0 before it began
        self.inbox = Inbox()
        self.machine = MachineMemory()
        self.zmq_context = network.Context(io_threads=1)
        self.bulk_context = network.Context(io_threads=coding_threads())
        self.placer = Placer(Topology(), self._writers, self._order_memory)
        self.arena = ArenaMemory(link, threads=coding_threads())
        engine = _engine_of(config)
        self.meters = Meters(chunk_bytes=config.chunk_bytes, version=version("holdfast"), engine_detail=engine.detail)
        self.records = RecordFiles(Path(config.state_dir or door.path.parent), name)
        found = places(link, config, name)
        sessions = [place.record.worker_session for place in found if place.record is not None]
        shared = Shared(
            link=link,
            arena=self.arena,
            zmq_context=self.zmq_context,
            bulk_context=self.bulk_context,
            meters=self.meters,
            engine=engine,
            socket=door.path,
            state_dir=self.records.directory,
            put=self.inbox.put,
            session=max(sessions, default=0) + 1,
            budget=Arena(config.budget_bytes or self.machine.total_bytes // 2),
            free_bytes=self.machine.free_bytes(),
        )
        self.hands = [Hands(place, shared) for place in found]
        self.current = self.hands[0]
        self.control = ControlPlane(self.current.circle, self.zmq_context)
        self.control.circles = [one.circle for one in self.hands]
        self.remote = RemoteGate.of(config, found[0].keys, door.path, threads=coding_threads())
        hold_config(link, config)
        self.arena.drop_strays()
        self.epochs = Epochs(self.current.node, self.hands[1].node if len(self.hands) > 1 else None)
        self.gates = self._gates()
        self.status_requests = StatusRequests(lambda: os.eventfd_write(self.inbox.wake, 1))
        self.pages = self._open_pages(config.http_address)
        self.poller = Poller()

    def _gates(self) -> Gates:
        ports = {self.config.nodes[self.current.context.node].port: "control"}
        ports |= {one.bulk.port: "bulk" for one in self.hands}
        if self.remote is not None:
            ports[self.remote.port] = "trainers"
        return Gates(ports, nodes_of(self.hands))

    def _open_pages(self, address: str | None) -> Pages | None:
        if address is None:
            return None
        host, port = split_address(address)
        return Pages(host, port, self.status_requests, self.meters)

    # --- the loop ---

    def run(self) -> None:
        """Serve until told to stop."""
        self.control.bind_clients(self.door.endpoint)
        self.door.share(Path(self.door.endpoint.removeprefix("ipc://")))
        self.control.register(self.poller)
        for one in self.hands:
            one.start()
        if self.remote is not None:
            self.remote.start()
        for descriptor in (self.door.fileno(), self.inbox.wake, self.link.fileno()):
            if descriptor >= 0:
                self.poller.register(descriptor, READABLE)
        self._perform(self.epochs.start())
        for one in self.hands:
            log.info("node %s ready on %s, epoch %d, control %s, bulk port %d, bulk mode %s, engine %s, incarnation %d",
                     self.name, self.door.path, one.epoch, one.config.nodes[one.context.node].address, one.bulk.port,
                     one.config.bulk_mode, one.context.engine, one.context.incarnation)  # fmt: skip
        self.link.say_ready(grace_s=self.config.durable_grace_s if self.config.durable_dir else 0)
        next_tick_ns = 0
        while self._goes_on():
            # One millisecond more than is left: rounded down, the last one would be spent spinning.
            wait_ms = max(0, min(_TICK_MS, (next_tick_ns - time.monotonic_ns()) // 1_000_000 + 1))
            self._turn({found for found, _ in self.poller.poll(wait_ms)})
            if time.monotonic_ns() >= next_tick_ns:
                next_tick_ns = time.monotonic_ns() + _TICK_MS * 1_000_000
                self._handle(events.TimePassed(self.machine.free_bytes()))
                for one in self.hands:
                    one.circle.redial()
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
                self.epochs.stop()
        if len(self.stop_signals) > 1:
            return False
        return (self.epochs.may_commit() and time.monotonic_ns() < self.drain_ns) or self.epochs.is_copying()

    def _turn(self, ready: set[object]) -> None:
        if self.door.fileno() in ready:
            self._welcome_clients()
        self.status_requests.serve(self.epochs.status)
        for epoch, event in self.inbox.take():
            one = next((one for one in self.hands if one.epoch == epoch), None)
            if one is not None:
                self._handle(event, one)
        for circle, event in self.control.receive(self.door.tokens, ready):
            one = next((one for one in self.hands if one.circle is circle), self.current)
            one.heard(event)
            self._handle(event, one)
        for client, arrived in list(self.door.clients.items()):
            if arrived.connection.fileno() in ready and self.door.ended(client):
                self._end_client(client)
        if self.link.fileno() in ready:
            self.poller.unregister(self.link.fileno())
            self.link.revive()
            self.poller.register(self.link.fileno(), READABLE)
        self.placer.look()

    def _writers(self, action: actions.Allocate) -> list[tuple[int | None, int, int]]:
        parts = self._hands_of(action.memory).node.jobs.get(action.memory.job)
        if parts is None or action.layout is None:
            return []
        known: dict[int | None, int] = {client: arrived.pid for client, arrived in self.door.clients.items()}
        return [(known.get(client), start, size) for client, start, size in parts.job.writers_of(action.layout)]

    def _order_memory(self, action: actions.Allocate, wishes: tuple[Near, ...]) -> None:
        if action.memory in self.current.node.arena.reserved:  # else it was given back while it waited
            self.arena.wishes[action.memory] = wishes
            self._hands_of(action.memory).coder.order(action)

    def _hands_of(self, memory: Memory) -> Hands:
        """Whose memory it is: generations tell epochs apart."""
        return next((one for one in self.hands if memory.generation > one.context.generations_from), self.hands[-1])

    def _welcome_clients(self) -> None:
        for _ in range(limits.CLIENT_COUNT_MAX):
            arrived = self.door.accept(_welcome(self.hands, self.door))
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

    def _handle(self, event: events.Event, one: Hands | None = None) -> None:
        self.meters.saw(event)
        self._perform(self.epochs.handle(event, time.monotonic_ns(), one.node if one is not None else None))
        if self.epochs.is_over:
            self._end_earlier()

    def _perform(self, decided: Decided) -> None:
        for core, action in decided:
            self.meters.did(action)
            one = next((one for one in self.hands if one.node is core), None)
            if one is None:
                continue
            if isinstance(action, actions.Allocate):
                self.placer.take(action)
            elif not one.do(action, self.poller):
                self._do(action)

    def _end_earlier(self) -> None:
        """The epoch before is not needed here any more: its memory, ledger, config and threads go."""
        old = self.hands.pop()
        left = self.epochs.end_earlier()
        self.control.leave(old.circle)
        old.close()
        for _, action in left:
            self._do(action)
        self.link.drop(old.ledger.name)
        self.link.drop(config_name(old.epoch))
        if self.current.ledger.name != LedgerMemory.NAME:
            self.current.ledger.rename(self.link, LedgerMemory.NAME)
        self.arena.drop_up_to(self.current.context.generations_from)
        self.gates = self._gates()
        log.info("epoch %d is over here, its memory is free; in force is epoch %d", old.epoch, self.current.epoch)

    def _do(self, action: actions.Action) -> None:
        match action:
            case actions.ReplyClient(client, message):
                arrived = self.door.clients.get(client)
                if arrived is not None:
                    self.control.send_client(arrived.token, message)
            case actions.WriteRecord():
                self.records.write(action)
            case actions.Log(level, text):
                log.log(logging.getLevelNamesMapping()[level.upper()], "%s", text)
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
            self.inbox.put(self.current.epoch, events.ClientGone(client))

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
        for one in self.hands:
            one.close()
        self.records.stop()
        self.control.close()
        self.door.close()
        self.bulk_context.destroy(linger=0)
        self.zmq_context.destroy(linger=0)


def _welcome(hands: list[Hands], door: Door) -> messages.Welcome:
    """What a trainer or command is told first; its token is filled in for each."""
    config, node = hands[0].config, hands[0].context.node
    told = messages.Welcome(
        protocol=limits.PROTOCOL_VERSION,
        cluster=config.cluster_name,
        epoch=config.epoch,
        node=node,
        node_name=config.nodes[node].name,
        token="",
        endpoint=door.endpoint,
    )
    if len(hands) > 1:
        return structs.replace(told, earlier_epoch=hands[1].epoch, earlier_node=hands[1].context.node)
    return told


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
    refuse_exposure(config)
    if arguments.check:
        node = config.index_of(arguments.node)
        load_keys(config, node, public_of=public_key_of)
        sealing_of(config, node)
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
    link = KeeperLink(arguments.keeper_fd, own_arguments)
    worker = Worker(config_for(link, config, arguments.node), arguments.node, door, link)
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
