"""A simulated cluster whose memory rests, and whose bits flip."""

from collections.abc import Callable

from holdfast.coding import chunk_digest
from holdfast.daemon.core.health import Health, Resting
from holdfast.daemon.core.slot import Slot

from sim.cluster import Cluster, ClusterShape
from sim.coder import Held
from sim.network import NetworkFaults
from sim.ranks import JobShape
from sim.resting import resting

PERIOD_S = 4
DEADLINE_S = 60.0
LOOK_S = 0.1  # between two looks at all bytes, which are dear
CHUNK_BYTES = 64


class RestingCluster:
    """One group that has committed step 0 and then does nothing for long."""

    def __init__(
        self,
        *,
        nodes: int = 4,
        parity: int = 2,
        period_s: int = PERIOD_S,
        drill_period_s: int = 0,
        network: NetworkFaults | None = None,
    ) -> None:
        job = JobShape("a", tuple((node, 150 + 64 * node) for node in range(nodes)), every=1_000_000, step_s=1.0)
        shape = ClusterShape(
            node_count=nodes,
            parity=parity,
            group_size=nodes,
            jobs=(job,),
            chunk_bytes=CHUNK_BYTES,
            network=network or NetworkFaults(),
            scrub_period_s=period_s,
            drill_period_s=drill_period_s,
        )
        self.cluster = Cluster(1, shape)
        self.cluster.start()
        self.wait(lambda: all(self.slot(node) is not None for node in range(nodes)), DEADLINE_S)
        self.pass_time(1.0)  # until all have heard what all hold

    def wait(self, done: Callable[[], bool], seconds: float) -> None:
        """Let time pass until something is true, which it must be within so many seconds; then a moment more."""
        world = self.cluster.world
        deadline_s = world.now_s + seconds
        while not done():
            assert world.now_s < deadline_s, "\n".join(line[:200] for line in world.transcript[-30:])
            self.pass_time(LOOK_S)
        self.pass_time(LOOK_S)

    def pass_time(self, seconds: float) -> None:
        """Let time pass."""
        world = self.cluster.world
        world.run_until(lambda: False, deadline_s=world.now_s + seconds)

    def slot(self, node: int) -> Slot | None:
        """Where a node holds the committed snapshot."""
        worker = self.cluster.machines[node].worker
        parts = worker.node.jobs.get("a") if worker is not None else None
        return parts.healing.repair.slot() if parts is not None else None

    def health(self, node: int) -> Health:
        """What a node says of its memory."""
        worker = self.cluster.machines[node].worker
        assert worker is not None
        return worker.node.jobs["a"].job.health

    def held(self, node: int) -> Held:
        """The node's memory."""
        slot = self.slot(node)
        assert slot is not None
        return self.cluster.machines[node].held[slot.memory("a")]

    def chunks(self, node: int) -> list[Resting]:
        """All that a node holds."""
        held = self.held(node)
        return [Resting("data", chunk) for chunk in range(len(held.data) // CHUNK_BYTES)] + [
            Resting("parity", chunk) for chunk in range(len(held.parity) // CHUNK_BYTES)
        ]

    def flip(self, node: int, wanted: Resting, *, with_digest: bool = False) -> None:
        """A bit flips. `with_digest`: the node takes the wrong bytes for right, as if it had always been so."""
        held, slot = self.held(node), self.slot(node)
        assert slot is not None
        chunk = resting(held.data, held.parity, wanted, CHUNK_BYTES)
        chunk[17] ^= 0x20
        if with_digest:
            index = slot.resting_index(wanted.kind, wanted.chunk)
            slot.digests[index] = held.digests[index] = chunk_digest(chunk)

    def is_right(self) -> bool:
        """Whether every node holds what it should, bit for bit, its digests included."""
        try:
            self.cluster.truth.check_at_rest()
        except AssertionError:
            return False
        return True
