"""Simulated readers: clients of any node that read ranges of what is committed, with no rank and no attempt.

A reader is a generator that yields what it waits for, like a rank; what it reads is held against the books.
"""

import random
from collections.abc import Callable, Generator
from dataclasses import dataclass, field

from holdfast.client.session import Session
from holdfast.protocol import limits, messages
from holdfast.protocol.exit_codes import ExitCode
from holdfast.protocol.ids import SnapshotId
from holdfast.protocol.layout import Layout

from sim.machine import Client, Machine
from sim.truth import Truth, promise
from sim.world import World

Waiting = tuple[Callable[[], bool], float]
Program = Generator[Waiting, bool, None]
ANSWER_S = 15.0
READ_S = 70.0


@dataclass(slots=True)
class Reader:
    """One client that reads a job's newest committed snapshot, piece by piece, until it is stopped."""

    world: World
    machines: list[Machine]
    truth: Truth
    job: str
    node: int
    pause_s: float = 0.5
    whole: bool = False  # reads every byte of every role once, then ends
    chance: random.Random = field(init=False)
    stopped: bool = False
    done: bool = False
    bytes_read: int = 0
    denials: list[messages.RangeDenied] = field(default_factory=list)
    client: Client | None = None
    session: Session | None = None
    requests: int = 0
    _condition: Callable[[], bool] = field(default=lambda: False)
    _number: int = 0
    _program: Program = field(init=False)

    def __post_init__(self) -> None:
        self.chance = random.Random(f"reader/{self.world.seed}/{self.node}")
        self._program = self._run()
        self._go(first=True)

    # --- being a process ---

    def _go(self, *, first: bool = False, done: bool = True) -> None:
        self._number += 1
        try:
            self._condition, seconds = next(self._program) if first else self._program.send(done)
        except StopIteration:
            self.done = True
            return
        number = self._number
        self.world.after(seconds, lambda: self._go(done=self._condition()) if number == self._number else None)
        if self._condition():
            self.world.after(0, self._wake)

    def _wake(self) -> None:
        if not self.done and self._condition():
            self._condition = lambda: False
            self._go()

    def _hear(self, message: messages.DaemonMessage) -> None:
        if self.session is not None:
            self.session.receive(message)
            self._wake()

    def _gone(self) -> None:
        self.client = None
        self.world.after(0, self._wake)

    def _attach(self) -> bool:
        machine = self.machines[self.node]
        worker = machine.worker
        if self.client is None and worker is not None and self.world.now_ns >= worker.frozen_until_ns:
            self.client = worker.attach(self._hear, self._gone)
            config = machine.config
            self.session = Session(
                messages.Welcome(limits.PROTOCOL_VERSION, config.cluster_name, config.epoch, self.node, "n", "", "")
            )
        return self.client is not None

    def _say(self, message: messages.ClientMessage) -> bool:
        worker = self.machines[self.node].worker
        if self.client is None or worker is None or self.client.number not in worker.clients:
            return False
        worker.said(self.client, message)
        return True

    # --- the program ---

    def _run(self) -> Program:
        while not self.stopped:
            yield (lambda: False), self.pause_s
            if not self._attach():
                continue
            client, session = self.client, self.session
            assert session is not None
            session.ask("AskCommitted")
            if not self._say(messages.AskCommitted(self.job)):
                continue
            yield (lambda: self.client is not client or session.committed_answer is not None), ANSWER_S
            answer = session.committed_answer
            if self.client is not client or answer is None or answer.snapshot is None or answer.layout is None:
                continue
            self.truth.check_offer(self.job, answer.snapshot)
            for role, start, length in self._pieces(answer.layout):
                if not (yield from self._read(answer.snapshot, role, start, length)):
                    break
            else:
                if self.whole:
                    return

    def _pieces(self, layout: Layout) -> list[tuple[int, int, int]]:
        pieces = []
        for role, place in enumerate(layout.shards):
            if self.whole and place.shard_bytes:
                pieces.append((role, 0, place.shard_bytes))
            elif place.shard_bytes:
                start = self.chance.randrange(place.shard_bytes)
                pieces.append((role, start, self.chance.randint(1, place.shard_bytes - start)))
        return pieces if self.whole else self.chance.sample(pieces, min(2, len(pieces)))

    def _read(self, snapshot: SnapshotId, role: int, start: int, length: int) -> Generator[Waiting, bool, bool]:
        client, session = self.client, self.session
        assert session is not None
        self.requests += 1
        request = self.requests
        if not self._say(messages.ReadRange(self.job, snapshot, role, start, length, request)):
            return False

        def ended() -> bool:
            return self.client is not client or request in session.ranges_ready or request in session.ranges_denied

        yield ended, READ_S
        if self.client is not client or client is None:
            return False
        promise(ended(), f"a read of role {role} of {snapshot} on node {self.node} never ended")
        if (denied := session.ranges_denied.get(request)) is not None:
            self.denials.append(denied)
            promise(denied.exit_code != ExitCode.USAGE, f"a read is refused as wrong: {denied.text}")
            return False
        ready = session.ranges_ready[request]
        key = (ready.job, ready.slot)
        yield (lambda: self.client is not client or client.maps.get(key, (0, b""))[0] == ready.generation), 5.0
        if self.client is not client:
            return False
        memory = client.maps[key][1]
        found = bytes(memory[ready.offset_bytes : ready.offset_bytes + ready.length_bytes])
        staged = self.truth.staged[self.job, snapshot].get(role, b"")[start : start + length]
        promise(found == staged, f"a reader on node {self.node} got bytes of {snapshot}, role {role}, never staged")
        self.bytes_read += length
        self._say(messages.CloseRange(request))
        return True
