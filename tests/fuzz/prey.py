"""A small cluster at work, whose first node hears nonsense from peers and clients: a real core with real hands.

What it decides is carried out by the simulator, and time passes between the inputs, so that nonsense meets every state
that a node can be in. The simulator's own checks are off: a peer that holds the cluster's key may lie.
"""

import random
import time
import traceback
from dataclasses import dataclass, field

import msgspec
from holdfast.daemon.core import actions, events
from holdfast.daemon.core.ledger import encode_ledger
from holdfast.daemon.core.node import Node
from holdfast.daemon.shell.metrics import Meters
from holdfast.protocol import frames, limits, messages
from sim.cluster import Cluster, ClusterShape
from sim.machine import Worker
from sim.ranks import JobShape
from sim.scale import trust_everybody

SAMPLES_PER_KIND = 24
VICTIM = 0  # the lowest node collects: it hears more than the others
STATUS_SHARE = 0.01  # of inputs after which the status is asked for, which tells what others said
PACE_S = 0.004  # of the cluster's time, between two inputs
NODES = 4


@dataclass
class Prey:
    """The cluster, the frames that it has sent, and the ear of its first node."""

    seed: int
    cluster: Cluster = field(init=False)
    samples: dict[str, list[bytes]] = field(default_factory=dict)
    spent_s: float = 0.0  # CPU of the core for the last input, decoding included

    def __post_init__(self) -> None:
        jobs = (
            JobShape("a", ((0, 300), (1, 500), (1, 65), (2, 64)), step_s=0.3),
            JobShape("b", ((2, 130), (0, 64)), step_s=0.5),
        )
        shape = ClusterShape(node_count=NODES, parity=2, group_size=4, jobs=jobs, drill_period_s=2, scrub_period_s=2)
        self.cluster = Cluster(self.seed, shape)
        for name, value in (("durable_dir", "/copies"), ("durable_every_steps", 5), ("durable_after_lives", 2)):
            object.__setattr__(self.cluster.config, name, value)
        self.draw = random.Random(self.seed)
        self.meters = Meters(chunk_bytes=64, version="0")
        encode = frames.encode

        def recording(message: msgspec.Struct) -> bytes:
            frame = encode(message)
            kind = type(message).__name__
            if isinstance(message, frames.Envelope):
                kind = "peer " + str(msgspec.msgpack.decode(message.body)["type"])
            kept = self.samples.setdefault(kind, [])
            if len(kept) < SAMPLES_PER_KIND:
                kept.append(frame)
            return frame

        frames.encode = recording
        try:
            self._live()
        finally:
            frames.encode = encode
        match self.seed % 3:  # what it is about when the nonsense begins
            case 1:
                self.cluster.lose_node(VICTIM, back_after_s=0.1)  # bringing back what it lost
                self.cluster.world.run_until(lambda: False, deadline_s=self.cluster.world.now_s + 1.0)
            case 2:
                self.cluster.lose_node(1, back_after_s=3.0)  # reading what another one lost
        self.ledgers = [machine.ledger for machine in self.cluster.machines if machine.ledger is not None]
        trust_everybody(self.cluster)
        self.clients = [self.worker.attach(lambda _: None, lambda: None).number for _ in range(3)]

    def _live(self) -> None:
        """A crash, a restart of a job, and a loss: so that most kinds of messages have been said."""
        cluster = self.cluster
        cluster.start()
        cluster.crash_worker(2)
        cluster.world.run_until(lambda: False, deadline_s=6.0)
        cluster.jobs[0].kill("to hear how it restores")
        cluster.world.run_until(lambda: False, deadline_s=12.0)
        cluster.lose_node(3, back_after_s=0.5)
        cluster.world.run_until(lambda: False, deadline_s=20.0)

    @property
    def worker(self) -> Worker:
        """The worker that hears."""
        worker = self.cluster.machines[VICTIM].worker
        assert worker is not None
        return worker

    @property
    def node(self) -> Node:
        """Its core."""
        return self.worker.node

    def frames_of(self, *, peer: bool) -> dict[str, list[bytes]]:
        """The recorded frames of daemons, or of clients and daemons to clients, by kind."""
        return {kind: found for kind, found in self.samples.items() if kind.startswith("peer ") is peer}

    def happens(self, event: events.Event, *, started_s: float) -> None:
        """Let the core hear it, check that it is whole and can be heard by others, and carry out what it decides."""
        worker = self.worker
        decided = worker.node.handle(event, worker.machine.clock_ns)
        self.spent_s = time.thread_time() - started_s
        worker.node.check()
        for action in decided:
            self._say(action)
        worker.perform(decided, event)
        if self.draw.random() < STATUS_SHARE:
            self._tell_status()

    def passes(self) -> None:
        """A moment passes for the whole cluster."""
        world = self.cluster.world
        try:
            world.run_until(lambda: False, deadline_s=world.now_s + self.draw.uniform(0, 2 * PACE_S))
        except ValueError as error:
            if traceback.extract_tb(error.__traceback__)[-1].name != "_stage":
                raise
            for job in self.cluster.jobs:  # a peer lied about a layout: a rank's shard does not fit its memory
                job.kill("its memory is of another layout")

    def _say(self, action: actions.Action) -> None:
        """What the shell does with an action: an exception there would end the worker."""
        ctx = self.node.ctx
        match action:
            case actions.SendPeer(_, message):
                frames.encode_peer(message, cluster="sim", epoch=1, node=ctx.node, incarnation=ctx.incarnation)
            case actions.ReplyClient(_, message):
                frames.encode(message)
            case actions.SendChunk(_, _, header):
                assert len(frames.encode(header)) <= limits.BULK_HEADER_BYTES_MAX
            case actions.WriteLedger(record):
                assert len(encode_ledger(record)) <= limits.LEDGER_BYTES
            case actions.WriteRecord(_, record):
                msgspec.json.encode(record)
            case actions.Allocate(_, sizes):
                assert sizes.total_bytes <= ctx.budget_bytes, "memory is booked within the budget"
            case _:
                pass

    def _tell_status(self) -> None:
        status = self.node.status()
        msgspec.json.encode(status)
        self.meters.text(status)
        frames.encode(messages.StatusAnswer(status))
