"""Simulated trainers: a job whose ranks restore, plan, stage step after step, die and are started again.

A rank is a generator that yields what it waits for; its conversation with the daemon goes through the real `Session`.
A job is its launcher: one rank's death ends all, and all are started again.
"""

import random
from collections.abc import Callable, Generator
from dataclasses import dataclass

import msgspec
from holdfast.client.session import Session
from holdfast.coding import chunk_digest
from holdfast.protocol import limits, messages
from holdfast.protocol.cadence import Cadence, is_due
from holdfast.protocol.frames import unpack_digests
from holdfast.protocol.ids import SnapshotId
from holdfast.protocol.layout import Layout, ShardPlace

from sim.answers import check_answer, known_commits
from sim.machine import Client, Machine, Worker
from sim.truth import Truth, promise
from sim.world import World

Waiting = tuple[Callable[[], bool], float]  # what for, and how many seconds at most
Program = Generator[Waiting, bool, None]


class LinkLostError(Exception):
    """The daemon went away."""


class RankDiedError(Exception):
    """The rank ends with an error; the launcher restarts the job."""


@dataclass(frozen=True, slots=True)
class JobShape:
    """What a job is, for a scenario.

    `shards` by role: (node, bytes).
    """

    name: str
    shards: tuple[tuple[int, int], ...]
    every: int = 1
    step_s: float = 0.05
    stall_s: float = 10.0
    copy_s_max: float = 0.03  # half of a shard may take so long
    checks: bool = False  # its ranks compare digests themselves when they restore


class Job:
    """One job and its launcher."""

    def __init__(self, world: World, machines: list[Machine], truth: Truth, shape: JobShape) -> None:
        self.world, self.shape = world, shape
        self.truths = {machines[0].config.epoch: truth}  # by epoch, the newest last
        self.places = [machines[node] for node, _ in shape.shards]  # by role, for the next life
        self.life = 0
        self.ranks: list[Rank] = []
        self.board: dict[tuple[str, int], dict[int, object]] = {}
        self.sizes = [size for _, size in shape.shards]
        self.version = 0
        self.agreed: tuple[tuple[int, int, int, int, list[int]], Layout] | None = None
        self.new_sizes: list[int] | None = None
        self.running = False
        self.restored: SnapshotId | None = None  # of this life
        self.answered = False
        self.restored_all = False
        self.problems: list[str] = []
        self.committed: SnapshotId | None = None  # newest that a rank was told
        self.begun: SnapshotId | None = None  # newest that was begun
        self.begun_ns: dict[SnapshotId, int] = {}  # when its first rank began it
        self.stopped = False
        self.ask_fresh = False
        self.next_attempt_fresh = False
        self.quiet: Callable[[], bool] = lambda: False
        self.clear: Callable[[], bool] = lambda: False

    # --- epochs ---

    @property
    def truth(self) -> Truth:
        """The books of the newest epoch."""
        return next(reversed(self.truths.values()))

    def truth_of(self, snapshot: SnapshotId) -> Truth:
        """The books of the epoch in which a snapshot was staged."""
        return next((one for one in self.truths.values() if (self.shape.name, snapshot) in one.layouts), self.truth)

    def node_in(self, epoch: int, machine: Machine) -> int | None:
        """The index of a machine in the list of an epoch."""
        names = [one.name for one in self.truths[epoch].machines]
        return names.index(machine.name) if machine.name in names else None

    # --- the launcher ---

    def start(self) -> None:
        """Start all ranks as soon as their machines are there."""
        if self.running or self.stopped:
            return
        if any(machine.front.worker is None for machine in self.places):
            self.world.after(0.3, self.start)
            return
        self.life += 1
        self.running, self.answered, self.restored_all, self.restored = True, False, False, None
        self.board.clear()
        self.version = 0
        self.world.note(f"job {self.shape.name}: life {self.life} starts")
        self.ask_fresh, self.next_attempt_fresh = self.next_attempt_fresh, False
        self.ranks = [Rank(self, role) for role in range(len(self.shape.shards))]
        for rank in self.ranks:
            rank.begin()

    def kill(self, reason: str) -> None:
        """All ranks end now; the launcher starts them again a little later."""
        if not self.running:
            return
        self.world.note(f"job {self.shape.name}: killed: {reason}")
        self.running = False
        for rank in self.ranks:
            rank.die()
        self.world.after(self.world.between(0.2, 1.5), self.start)

    def node_lost(self, name: str) -> None:
        """A machine died with its ranks."""
        names = {rank.machine.name for rank in self.ranks} | {machine.name for machine in self.places}
        if name in names:
            self.kill(f"{name} was lost")

    def layout(self, step: int, epoch: int) -> Layout:
        """The layout that the ranks agree on: one object for all of them, however many they are."""
        key = (step, self.version, self.life, epoch, list(self.sizes))
        if self.agreed is not None and self.agreed[0] == key:
            return self.agreed[1]
        nodes = [self.node_in(epoch, rank.machine) for rank in self.ranks]
        if None in nodes:
            raise RankDiedError(f"not every rank's node is in epoch {epoch}")
        shards = tuple(ShardPlace(node or 0, size) for node, size in zip(nodes, self.sizes, strict=True))
        layout = Layout(shards=shards, first_step=step, every=self.shape.every, version=self.version)
        self.agreed = key, layout
        return layout

    def exchange(self, kind: str, number: int, role: int, value: object) -> dict[int, object]:
        """A collective: put a value, and get everybody's once all are there (look at its length)."""
        found = self.board.setdefault((kind, number), {})
        if role not in found:
            found[role] = value
            for rank in self.ranks if len(found) == len(self.ranks) else ():
                self.world.after(0, rank.wake)
        return found


class Rank:
    """One training process."""

    def __init__(self, job: Job, role: int) -> None:
        self.job, self.role, self.world = job, role, job.world
        self.machine = job.places[role]
        self.epoch = 0  # in which its attempt began
        self.client: Client | None = None
        self.session: Session | None = None
        self.cadences: dict[int, tuple[Cadence, ...]] = {}  # told over any connection, by attempt
        self.attempt = 0
        self.plan_count = 0
        self.known_before: list[tuple[Machine, SnapshotId]] = []
        self.plan: Layout | None = None
        self.accepted_over: Client | None = None  # the connection over which the plan was accepted
        self.dead = False
        self.hangs_until_ns = 0
        self._program: Program = self._run()
        self._condition: Callable[[], bool] = lambda: False
        self._wait_number = 0

    # --- being a process ---

    def begin(self) -> None:
        """Start."""
        self.world.after(self.world.between(0, 0.05), lambda: self._resume(done=True, first=True))

    def die(self) -> None:
        """SIGKILL."""
        self.dead = True
        client, self.client = self.client, None
        worker = self.machine.front.worker
        if client is not None and worker is not None and worker.clients.get(client.number) is client:
            worker.detach(client)

    def wake(self) -> None:
        """Something may have changed: go on if what is waited for is there."""
        if self.world.now_ns < self.hangs_until_ns:
            self.world.at(self.hangs_until_ns, self.wake)
        elif not self.dead and self._condition():
            self._resume(done=True)

    def _resume(self, *, done: bool, first: bool = False) -> None:
        if self.dead:
            return
        self._wait_number += 1
        self._condition = lambda: False
        try:
            condition, seconds = next(self._program) if first else self._program.send(done)
        except StopIteration:
            return
        except (RankDiedError, LinkLostError) as error:
            self.job.kill(f"rank {self.role}: {error or type(error).__name__}")
            return
        number = self._wait_number
        self._condition = condition
        self.world.after(seconds, lambda: self._expire(number))
        if condition():
            self.world.after(0, lambda: self.wake() if number == self._wait_number else None)

    def _expire(self, number: int) -> None:
        if self.world.now_ns < self.hangs_until_ns:
            self.world.at(self.hangs_until_ns, lambda: self._expire(number))
        elif number == self._wait_number and not self.dead:
            self._resume(done=self._condition())

    # --- the conversation ---

    def _hear(self, message: messages.DaemonMessage) -> None:
        if self.dead or self.session is None:
            return
        self.session.receive(message)
        if isinstance(message, messages.Progress) and message.committed is not None:
            self.job.truth_of(message.committed).check_offer(self.job.shape.name, message.committed)
            self.job.committed = max(message.committed, self.job.committed or message.committed)
        self.wake()

    def _gone(self) -> None:
        self.client = None
        self.world.after(0, self.wake)

    def _attach(self, seconds: float) -> Generator[Waiting, bool, bool]:
        deadline_ns = self.world.now_ns + int(seconds * 1e9)
        while self.client is None:
            machine = self.machine.front
            worker = machine.worker
            if worker is not None and self.world.now_ns >= worker.frozen_until_ns:
                self.client = worker.attach(self._hear, self._gone)
                welcome = messages.Welcome(
                    protocol=limits.PROTOCOL_VERSION,
                    cluster=machine.config.cluster_name,
                    epoch=machine.config.epoch,
                    node=machine.node,
                    node_name=machine.name,
                    token="",
                    endpoint="",
                    **_earlier_of(worker),
                )
                self.session = Session(welcome, cadences=self.cadences)
                return True
            if self.world.now_ns >= deadline_ns:
                return False
            yield (lambda: False), 0.1
        return True

    def _send(self, message: messages.ClientMessage) -> None:
        worker = self.machine.front.worker
        if self.client is None or worker is None or self.client.number not in worker.clients:
            raise LinkLostError
        worker.said(self.client, message)

    def _until(self, condition: Callable[[], bool], seconds: float) -> Generator[Waiting, bool, bool]:
        client = self.client
        if client is None:
            raise LinkLostError
        done = yield (lambda: self.client is not client or condition()), seconds
        if self.client is not client:
            raise LinkLostError
        return done and condition()

    def _exchange(self, kind: str, number: int, value: object) -> Generator[Waiting, bool, dict[int, object]]:
        found = self.job.exchange(kind, number, self.role, value)
        everybody = len(self.job.ranks)
        while len(found) < everybody:
            yield (lambda: len(found) == everybody), 1000.0
        return found

    # --- the program ---

    def _run(self) -> Program:
        if not (yield from self._attach(20.0)):
            raise RankDiedError("no daemon")
        answer: messages.RestoreAnswer | None = None
        if self.role == 0:
            answer = yield from self._ask()
            check_answer(self.job, answer, self.known_before)
        lead = (yield from self._exchange("restore", 0, answer))[0]
        assert isinstance(lead, messages.RestoreAnswer)
        if lead.problem:
            raise RankDiedError("not recoverable")
        self.attempt, self.epoch = lead.attempt, lead.epoch
        self.job.truths[self.epoch].begin_attempt(self.job.shape.name, self.attempt, self.job.life)
        if lead.snapshot is not None:
            yield from self._restore(lead)
        yield from self._exchange("restored", 0, None)
        self.job.restored, self.job.restored_all = lead.snapshot, True
        first = 0 if lead.snapshot is None else lead.snapshot.step + 1
        if not (yield from self._replan(first)):
            raise RankDiedError("no plan")
        step = first
        while True:
            yield from self._step(step)
            step += 1

    def _ask(self) -> Generator[Waiting, bool, messages.RestoreAnswer]:
        name = self.job.shape.name
        for _ in range(6):
            assert self.session is not None
            session = self.session
            session.ask("AskRestore")
            self.known_before = known_commits(self.job) if self.job.clear() else []
            self._send(messages.AskRestore(name, self.job.ask_fresh))
            patience_s = 2 * limits.HEAR_ALL_S + limits.JOIN_S
            if (yield from self._until(lambda: session.restore_answer is not None, patience_s)):
                assert session.restore_answer is not None
                return session.restore_answer
        raise RankDiedError("the daemon did not learn what to restore")

    def _restore(self, lead: messages.RestoreAnswer) -> Generator[Waiting, bool, None]:
        name, snapshot, epoch = self.job.shape.name, lead.snapshot, lead.held_epoch or lead.epoch
        assert snapshot is not None
        assert lead.layout is not None
        if self.job.node_in(epoch, self.machine) != lead.layout.shards[self.role].node:
            yield from self._restore_from_afar(snapshot, lead.layout.shards[self.role].shard_bytes)
            return
        attempt = lead.held_attempt or self.attempt
        request = messages.OpenShard(name, attempt, snapshot, self.role, verify=not self.job.shape.checks, epoch=epoch)
        deadline_ns = self.world.now_ns + 60 * 10**9
        while self.world.now_ns < deadline_ns:
            assert self.session is not None
            session = self.session
            session.ask("OpenShard")
            self._send(request)
            yield from self._until(lambda: session.opened is not None or "OpenShard" in session.denied, 60.0)
            opened, denied = session.opened, session.denied.get("OpenShard")
            if denied is not None:
                if not denied.retry:
                    raise RankDiedError(f"OpenShard denied: {denied.text}")
                yield (lambda: False), 0.2
                continue
            promise(opened is not None, f"role {self.role} of {name} waits for its shard for ever")
            assert opened is not None
            shard = b""
            if opened.shard_bytes:
                view = yield from self._memory(opened.slot, opened.generation)
                shard = bytes(view[opened.offset_bytes : opened.offset_bytes + opened.shard_bytes])
                if not _is_good(view, opened):
                    request = msgspec.structs.replace(request, verify=True)
                    continue
            self.job.truth_of(snapshot).check_restored(name, snapshot, self.role, shard)
            self._send(messages.CloseShard(name, snapshot, self.role))
            return
        raise RankDiedError("OpenShard was denied for too long")

    def _restore_from_afar(self, snapshot: SnapshotId, shard_bytes: int) -> Generator[Waiting, bool, None]:
        """The shard lies on another node: read it as a range of bytes."""
        name, number = self.job.shape.name, 0
        deadline_ns = self.world.now_ns + 60 * 10**9
        while shard_bytes and self.world.now_ns < deadline_ns:
            assert self.session is not None
            session, number = self.session, number + 1
            self._send(messages.ReadRange(name, snapshot, self.role, 0, shard_bytes, number))
            asked = number
            yield from self._until(lambda: asked in session.ranges_ready or asked in session.ranges_denied, 70.0)
            if (ready := session.ranges_ready.get(number)) is not None:
                view = yield from self._memory(ready.slot, ready.generation)
                shard = bytes(view[ready.offset_bytes : ready.offset_bytes + ready.length_bytes])
                self.job.truth_of(snapshot).check_restored(name, snapshot, self.role, shard)
                self._send(messages.CloseRange(number))
                return
            denied = session.ranges_denied.get(number)
            promise(denied is not None, f"role {self.role} of {name} waits for its bytes for ever")
            if denied is not None and not denied.retry:
                raise RankDiedError(f"ReadRange denied: {denied.text}")
            yield (lambda: False), 0.2
        if shard_bytes:
            raise RankDiedError("ReadRange was denied for too long")

    def _memory(self, slot: int, generation: int) -> Generator[Waiting, bool, bytearray]:
        client, key = self.client, (self.job.shape.name, slot)
        assert client is not None
        if not (yield from self._until(lambda: client.maps.get(key, (0, b""))[0] == generation, 5.0)):
            raise LinkLostError(f"no memory for slot {slot} generation {generation}")
        return client.maps[key][1]

    def _replan(self, step: int) -> Generator[Waiting, bool, bool]:
        """All ranks agree on a new layout."""
        job = self.job
        self.plan_count += 1
        if self.role == 0:
            job.version += 1
            if job.new_sizes is not None:
                job.sizes, job.new_sizes = job.new_sizes, None
        yield from self._exchange("plan", self.plan_count, None)
        problem = ""
        try:
            self.plan = job.layout(step, self.epoch)
            problem = yield from self._say_plan(30.0)
        except LinkLostError:
            problem = "the daemon went away"
        problems = yield from self._exchange("planned", self.plan_count, problem)
        return not any(problems.values())

    def _say_plan(self, seconds: float) -> Generator[Waiting, bool, str]:
        assert self.session is not None
        assert self.plan is not None
        session, deadline_ns = self.session, self.world.now_ns + int(seconds * 1e9)
        while True:
            session.ask("Plan")
            self._send(messages.Plan(self.job.shape.name, self.attempt, self.role, self.plan, self.epoch))
            yield from self._until(lambda: session.accepted is not None or "Plan" in session.denied, seconds)
            if session.accepted is not None:
                self.accepted_over = self.client
                return ""
            denied = session.denied.get("Plan")
            if denied is None or not denied.retry or self.world.now_ns >= deadline_ns:
                return denied.text if denied is not None else "no answer"
            yield (lambda: False), 0.2

    def _step(self, step: int) -> Generator[Waiting, bool, None]:
        job = self.job
        yield (lambda: False), job.shape.step_s * self.world.between(0.5, 1.5)
        change = (yield from self._exchange("step", step, job.new_sizes is not None))[0]
        if change and not (yield from self._replan(step)):
            raise RankDiedError("no plan after a change of layout")
        assert self.plan is not None
        if self.session is not None:
            self.cadences = self.session.cadences
        announced = self.cadences.get(self.attempt, ())
        if not is_due(step, self.plan, announced):
            return
        try:
            if self.accepted_over is None or self.accepted_over is not self.client:
                if not (yield from self._attach(0.3)) or (yield from self._say_plan(3.0)):
                    return
            yield from self._stage(SnapshotId(self.attempt, step))
        except LinkLostError:
            pass  # skipped; met again at a later step

    def _stage(self, snapshot: SnapshotId) -> Generator[Waiting, bool, None]:
        job, session, plan = self.job, self.session, self.plan
        assert session is not None
        assert plan is not None
        name = job.shape.name
        job.begun = max(snapshot, job.begun or snapshot)
        job.begun_ns.setdefault(snapshot, job.world.now_ns)
        self._send(messages.Begin(name, snapshot, self.role))
        answered = yield from self._until(
            lambda: snapshot in session.granted or snapshot in session.refused, job.shape.stall_s
        )
        if not answered:
            self._send(messages.Skip(name, snapshot, self.role, f"no slot was free within {job.shape.stall_s} s"))
            return
        if snapshot not in session.granted:
            return
        granted, accepted = session.granted[snapshot], session.accepted
        assert accepted is not None
        shard = random.Random(f"{name}/{job.life}/{snapshot}/{self.role}").randbytes(accepted.shard_bytes)
        if shard:
            view = memoryview((yield from self._memory(granted.slot, granted.generation)))
            place = view[accepted.offset_bytes : accepted.offset_bytes + len(shard)]
            half = len(shard) // 2
            place[:half] = shard[:half]
            yield (
                (lambda: False),
                self.world.between(0, job.shape.copy_s_max),
            )  # a copy takes a while, and goes on whatever happens
            place[half:] = shard[half:]
        if self.client is None:
            raise LinkLostError
        job.truths[self.epoch].stage(name, snapshot, self.role, layout=plan, shard=shard)
        self._send(messages.Seal(name, snapshot, self.role))


def _earlier_of(worker: Worker) -> dict[str, int]:
    """What a daemon's welcome says of the epoch before."""
    earlier = worker.household.epochs.earlier if worker.household is not None else None
    if earlier is None:
        return {}
    return {"earlier_epoch": earlier.ctx.config.epoch, "earlier_node": earlier.ctx.node}


def _is_good(image: bytearray, opened: messages.ShardOpened) -> bool:
    """What a rank compares that reads its shard itself."""
    chunks = enumerate(unpack_digests(opened.digests), start=opened.first_chunk)
    size = opened.chunk_bytes
    return all(chunk_digest(bytes(image[chunk * size : (chunk + 1) * size])) == digest for chunk, digest in chunks)
