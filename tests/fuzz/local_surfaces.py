"""What comes from this machine: replies to a trainer, HTTP requests, the ledger, and what keeper and worker say.

Sockets and held memory are real ones; the code that reads them is the product's own.
"""

import contextlib
import os
import random
import socket
import time
from collections.abc import Iterator

import msgspec
from fuzz.mutation import TEXTS, Maker, Mutator
from fuzz.prey import Prey
from fuzz.surface import Surface
from holdfast.client.session import ProtocolMismatchError, Session
from holdfast.coding import chunk_digest
from holdfast.daemon.core import events
from holdfast.daemon.core.context import Context
from holdfast.daemon.core.ledger import LedgerRecord, decode_ledger
from holdfast.daemon.core.memory import Memory, sizes_of
from holdfast.daemon.core.node import Node
from holdfast.daemon.keeper import HELD_COUNT_MAX, Keeper
from holdfast.daemon.service_manager import ServiceManager
from holdfast.daemon.shell import keeping
from holdfast.daemon.shell.keeping import KeeperLink, LedgerMemory
from holdfast.daemon.shell.metrics import Meters
from holdfast.daemon.shell.pages import _Handler
from holdfast.protocol import frames, limits, messages
from holdfast.protocol.exit_codes import OperatorError
from sim.machine import Machine

RENEW_INPUTS = 500  # then a fresh object: nonsense must not pile up into a state that nobody could cause


@contextlib.contextmanager
def timed(surface: Surface) -> Iterator[None]:
    """Measure the CPU of what is inside."""
    started_s = time.thread_time()
    try:
        yield
    finally:
        surface.spent_s = time.thread_time() - started_s


class Replies(Surface):
    """What a daemon says to a trainer or command: on the Unix socket and over ZeroMQ."""

    def __init__(self, draw: random.Random, prey: Prey) -> None:
        super().__init__("replies to clients", draw)
        self.spoil, self.maker = Mutator(draw), Maker(draw, {})
        self.kinds = (*messages.DaemonMessage.__args__, *messages.DoorMessage.__args__, messages.Refused)
        names = {kind.__name__ for kind in self.kinds}
        self.recorded = [frame for kind, found in prey.samples.items() if kind in names for frame in found]
        self.count = 0
        self._renew()

    def _renew(self) -> None:
        welcome = messages.Welcome(limits.PROTOCOL_VERSION, "sim", 2, 0, "n0", "t", "ipc://x")
        self.session = Session(welcome)

    def make(self) -> bytes:
        if self.draw.random() < 0.5:
            return self.spoil.frame(self.draw.choice(self.recorded), self.recorded)
        made = self.maker.make(self.draw.choice(self.kinds))
        with contextlib.suppress(OverflowError, UnicodeError):
            return msgspec.msgpack.encode(self.spoil.rewrite(made) if self.draw.random() < 0.3 else made)
        return b""

    def _ear(self, made: bytes) -> str:
        """Where it comes in: mostly where it belongs."""
        if self.draw.random() < 0.1:
            return self.draw.choice(("door", "refusal", "daemon"))
        if b"Refused" in made:
            return "refusal"
        return "door" if b"Welcome" in made or b"MemoryGiven" in made else "daemon"

    def feed(self, made: bytes) -> str:
        self.count += 1
        if self.count % RENEW_INPUTS == 0:
            self._renew()
        with timed(self):
            try:
                match self._ear(made):
                    case "door":
                        found = frames.decode_door(made)
                        if isinstance(found, messages.Welcome):
                            Session(found)
                    case "refusal":
                        frames.decode_refusal(made)
                    case _:
                        self.session.receive(frames.decode_daemon(made))
            except frames.FrameRefusedError as refusal:
                return refusal.code
            except ProtocolMismatchError:
                return "version"
        assert len(self.session.refused) <= limits.GIVEN_UP_KEPT
        return ""


class Http(Surface):
    """Requests to the page: the real handler, over a pair of sockets."""

    SEEDS = (
        b"GET /metrics HTTP/1.1\r\nHost: 127.0.0.1:9470\r\nUser-Agent: Prometheus/2.53\r\nAccept: text/plain\r\n\r\n",
        b"GET /status.json HTTP/1.0\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: [::1]\r\nConnection: keep-alive\r\n\r\nGET /page.js HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET /livez?x=%00&y=../.. HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\n\r\n",
        b"HEAD /readyz HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n",
        b"POST /metrics HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999999999999999\r\n\r\nabc",
        b"GET http://elsewhere/../page.html HTTP/9.9\r\n" + b"X: " + b"y" * 500 + b"\r\n\r\n",
        b"GET /page.css HTTP/1.1\r\n" + b"".join(b"H%d: v\r\n" % i for i in range(120)) + b"\r\n",
    )

    def __init__(self, draw: random.Random, prey: Prey) -> None:
        super().__init__("http requests", draw)
        self.spoil = Mutator(draw)
        status = prey.node.status()

        class Asked:
            @staticmethod
            def ask() -> dict[str, object]:
                return status

        class Handler(_Handler):
            status_requests = Asked()  # type: ignore[assignment]  # the loop is not there
            counted = Meters(chunk_bytes=64, version="0")

        self.handler = Handler

    def make(self) -> bytes:
        seed = self.draw.choice(self.SEEDS)
        return seed if self.draw.random() < 0.02 else self.spoil.cut(seed, self.SEEDS)

    def feed(self, made: bytes) -> str:
        ours, theirs = socket.socketpair()
        with ours, theirs:
            ours.setblocking(False)
            for end in (ours, theirs):
                end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 << 20)
            with contextlib.suppress(BlockingIOError):
                ours.sendall(made)
            ours.shutdown(socket.SHUT_WR)
            with timed(self), contextlib.suppress(ConnectionError):
                self.handler(theirs, ("127.0.0.1", 1), None)  # type: ignore[arg-type]  # no server is asked
            theirs.close()
            answer = b""
            with contextlib.suppress(BlockingIOError):
                answer = ours.recv(4096)
        if not answer:
            return "closed"
        words = answer.split(None, 2)
        if words[0].startswith(b"HTTP/"):
            return "" if words[1].startswith(b"2") else words[1].decode()
        return "" if b"Error code" not in answer else "HTTP/0.9 error"


class Ledger(Surface):
    """Both copies of the ledger in held memory, and a worker that takes up what they say."""

    def __init__(self, draw: random.Random, prey: Prey) -> None:
        super().__init__("ledger", draw)
        self.spoil, self.prey = Mutator(draw), prey
        self.link = KeeperLink(None, [])
        self.memory = LedgerMemory(self.link)

    def make(self) -> bytes:
        payload = self.spoil.frame(self.draw.choice(self.prey.ledgers), self.prey.ledgers)
        return payload[: limits.LEDGER_BYTES]

    def feed(self, made: bytes) -> str:
        self._write(made)
        with timed(self):
            payload = LedgerMemory(self.link).read()
            if payload is None:
                return "no whole copy"
            try:
                record = decode_ledger(payload)
            except msgspec.DecodeError:
                return "malformed"
            machines = self.prey.cluster.machines
            machine = machines[record.node if 0 <= record.node < len(machines) else 0]
            if (record.cluster, record.epoch, record.node) != ("sim", machine.config.epoch, machine.node):
                return "another node's"
            return self._boot(machine, record)

    def _write(self, made: bytes) -> None:
        """Most often with a good checksum, so that what is behind it is heard."""
        header, start = keeping._COPY_HEADER, 0
        for start in (0, keeping._COPY_BYTES):
            header.pack_into(self.memory._map, start, 0, 0, 0)
        where = self.draw.choice((0, keeping._COPY_BYTES))
        self.memory._map[where + header.size : where + header.size + len(made)] = made
        header.pack_into(self.memory._map, where, self.draw.randrange(1 << 64), len(made), chunk_digest(made))
        if self.draw.random() < 0.1:
            self.memory._map[where + self.draw.randrange(header.size + len(made) + 1)] ^= 1 << self.draw.randrange(8)
        if self.draw.random() < 0.1:
            other = keeping._COPY_BYTES - where
            self.memory._map[other : other + header.size] = self.draw.randbytes(header.size)

    def _boot(self, machine: Machine, record: LedgerRecord) -> str:
        """A worker of the same machine starts with it, hears time pass, and is whole."""
        config = machine.config
        ctx = Context(
            config=config,
            config_digest="0",
            placement=machine.placement,
            node=machine.node,
            incarnation=record.incarnation,
            worker_session=record.worker_session + 1,
            budget_bytes=machine.budget_bytes,
            free_bytes=1 << 40,
        )
        tables: dict[Memory, list[int]] = {}
        for job in record.jobs:
            layouts = {layout.layout_id: layout for layout in job.layouts}
            for index, slot in enumerate(job.slots):
                held = machine.held.get(memory := Memory(job.name, index, slot.generation))
                if slot.layout_id in layouts and slot.phase not in {"absent", "allocating"} and held is not None:
                    sizes = sizes_of(machine.geometry(layouts[slot.layout_id]), machine.node)
                    if (sizes.data_bytes, sizes.digest_count) == (len(held.data), len(held.digests)):
                        tables[memory] = list(held.digests)
        node = Node(ctx, started_ns=1)
        node.resume(record, tables)
        node.start()
        for tick in range(1, 4):
            node.check()
            node.handle(events.TimePassed(1 << 40), tick * 250_000_000)
        node.check()
        return ""

    def close(self) -> None:
        for descriptor in self.link.held.values():
            os.close(descriptor)


class Keepers(Surface):
    """What a worker says to its keeper, and what a keeper hands to a worker that starts."""

    WORDS = (
        b"hold ledger", b"hold a/0/1/data", b"drop ledger", b"drop nobody", b"ready", b"alive", b"grace 20", b"ended 0",
        b"ended 75", b"have ledger", b"have a/0/1/guard", b"start", b"hold ", b"grace " + b"9" * 400, b"ended \xc2\xb2",
    )  # fmt: skip

    def __init__(self, draw: random.Random) -> None:
        super().__init__("keeper and worker", draw)
        self.spoil = Mutator(draw)
        self.descriptor = os.memfd_create("fuzz", os.MFD_CLOEXEC)
        self.count = 0
        self.keeper = Keeper([], ServiceManager({}))

    def make(self) -> bytes:
        word = self.draw.choice(self.WORDS)
        made = word if self.draw.random() < 0.2 else self.spoil.cut(word, self.WORDS)
        return made[:4096]

    def feed(self, made: bytes) -> str:
        self.count += 1
        if self.count % RENEW_INPUTS == 0:
            self._renew()
        given = [self.descriptor] if self.draw.random() < 0.6 else []
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with ours:
            socket.send_fds(ours, [made or b"x"], given)
            if self.draw.random() < 0.5:
                return self._keeper_hears(theirs)
            ours.send(b"start")
            return self._worker_hears(theirs)

    def _keeper_hears(self, theirs: socket.socket) -> str:
        with theirs, timed(self):
            self.keeper.serve(theirs)
            # What the watch makes of it: a deadline, an exit code, a status line.
            assert time.monotonic() + self.keeper.grace_s >= 0.0
        assert len(self.keeper.held) <= HELD_COUNT_MAX
        return ""

    def _worker_hears(self, theirs: socket.socket) -> str:
        with timed(self):
            try:
                link = KeeperLink(theirs.detach(), [])
            except OperatorError:
                return "no handover"
        with contextlib.suppress(OSError):
            for descriptor in link.held.values():
                os.close(descriptor)
        link.close()
        return ""

    def _renew(self) -> None:
        for name in list(self.keeper.held):
            self.keeper.let_go(name)
        self.keeper = Keeper([], ServiceManager({}))

    def close(self) -> None:
        self._renew()
        os.close(self.descriptor)


class Environment(Surface):
    """What a service manager says in the environment of a process that it starts."""

    def __init__(self, draw: random.Random) -> None:
        super().__init__("service manager", draw)
        self.spoil = Mutator(draw)

    def make(self) -> bytes:
        draw = self.draw
        words = [draw.choice(("0", "1", "20000000", str(os.getpid()), *TEXTS[:6], *TEXTS[9:])) for _ in range(4)]
        return "\n".join(words).encode("utf-8", "surrogatepass")

    def feed(self, made: bytes) -> str:
        pid, usec, count, names = made.decode("utf-8", "surrogatepass").split("\n")[:4]
        count = count if not count.isdecimal() or int(count[:3]) == 0 else "0"  # descriptors of ours would be closed
        said = {"WATCHDOG_PID": pid, "WATCHDOG_USEC": usec, "LISTEN_PID": str(os.getpid()), "LISTEN_FDS": count}
        with timed(self):
            manager = ServiceManager({**said, "LISTEN_FDNAMES": names})
            manager.given()
        return "" if manager.watchdog_s is not None else "no watchdog"
