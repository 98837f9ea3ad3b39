"""What a node's brain does per second and per snapshot, by the size of the cluster: ``python -m sim.scale 8 64 512``.

Every node is a real core; network and bytes are the simulator's, without faults. Groups of 8, parity 2, one rank with
twelve chunks per node. Prints one JSON line per size; CPU is that of `Node.handle` alone, in this process.
"""

import gc
import json
import sys
import time
from collections import Counter
from collections.abc import Callable
from statistics import median

from holdfast.daemon.core import actions, events
from holdfast.daemon.core.layouts import Layouts
from holdfast.daemon.core.node import Node
from holdfast.protocol.ids import SnapshotId
from holdfast.protocol.layout import Geometry, Layout

from sim.cluster import Cluster, ClusterShape
from sim.network import NetworkFaults
from sim.ranks import JobShape
from sim.truth import Truth

STEP_S = 4.0
CHUNKS, CHUNK_BYTES = 12, 64


class Meter:
    """Counts what every node says and how long it thinks."""

    def __init__(self, node_count: int) -> None:
        self.cpu_s = [0.0] * node_count
        self.said: list[Counter[str]] = [Counter() for _ in range(node_count)]
        self.heard = [0] * node_count
        self.original = Node.handle

    def handle(self, node: Node, event: events.Event, now_ns: int) -> list[actions.Action]:
        """`Node.handle`, measured."""
        index = node.ctx.node
        self.heard[index] += isinstance(event, events.PeerSaid)
        started_s = time.thread_time()
        decided = self.original(node, event, now_ns)
        self.cpu_s[index] += time.thread_time() - started_s
        for action in decided:
            if isinstance(action, actions.SendPeer):
                self.said[index][type(action.message).__name__] += 1
            elif isinstance(action, actions.SendChunk):
                self.said[index]["chunks"] += 1
        return decided

    def reset(self) -> None:
        """Begin to count."""
        for index in range(len(self.cpu_s)):
            self.cpu_s[index], self.heard[index] = 0.0, 0
            self.said[index].clear()


def measure(node_count: int, *, snapshots: int = 2) -> dict[str, object]:
    """One size: what the collector does, and what the median of all other nodes does."""
    shards = tuple((node, CHUNKS * CHUNK_BYTES) for node in range(node_count))
    job = JobShape("a", shards, step_s=STEP_S)
    network = NetworkFaults(delay_s=0.0005, delay_s_max=0.001)
    shape = ClusterShape(
        node_count=node_count, parity=2, group_size=8, jobs=(job,), network=network, coding_s_max=0.0005
    )
    cluster, meter = Cluster(1, shape), Meter(node_count)
    trust_everybody(cluster)

    def measured(node: Node, event: events.Event, now_ns: int) -> list[actions.Action]:
        return meter.handle(node, event, now_ns)

    own_layouts = Layouts.learn, Layouts.renew, Layouts.geometry
    Layouts.learn, Layouts.renew, Layouts.geometry = _shared_layouts()  # type: ignore[method-assign]
    gc.disable()  # it would look at the objects of all nodes in the time of the one that happens to be measured
    Node.handle = measured  # type: ignore[method-assign]  # a meter in between
    try:
        cluster.start()
        assert cluster.world.run_until(lambda: _step(cluster) >= 0, deadline_s=120.0), "nothing commits"
        first, started_s = _step(cluster), cluster.world.now_s
        meter.reset()
        assert cluster.world.run_until(lambda: _step(cluster) >= first + snapshots, deadline_s=300.0)
        seconds = cluster.world.now_s - started_s
    finally:
        Node.handle = meter.original  # type: ignore[method-assign]  # as it was
        Layouts.learn, Layouts.renew, Layouts.geometry = own_layouts  # type: ignore[method-assign]
        gc.enable()

    def row(nodes: list[int]) -> dict[str, float]:
        kinds = sorted({kind for node in nodes for kind in meter.said[node]})
        found = {kind: median(meter.said[node][kind] for node in nodes) / snapshots for kind in kinds}
        beats = found.pop("Heartbeat", 0.0) * snapshots / seconds
        return {
            "heartbeats_sent_per_s": round(beats, 1),
            "messages_heard_per_s": round(median(meter.heard[n] for n in nodes) / seconds, 1),
            "cpu_ms_per_s": round(median(meter.cpu_s[n] for n in nodes) / seconds * 1e3, 2),
            "sent_per_snapshot": round(sum(found.values()), 1),
            **{f"{kind}_per_snapshot": round(count, 1) for kind, count in found.items() if count},
        }

    return {
        "nodes": node_count,
        "snapshots": snapshots,
        "seconds": round(seconds, 1),
        "collector": row([0]),
        "others_median": row(list(range(1, node_count))),
    }


def _shared_layouts() -> tuple[Callable[..., int], Callable[..., None], Callable[..., Geometry]]:
    """`learn`, `renew` and `geometry` of `Layouts`, with one copy for all nodes: else it is 2 MB of each of thousands."""
    layouts: dict[tuple[int, int, int, int], Layout] = {}
    geometries: dict[int, Geometry] = {}
    learn, renew, geometry = Layouts.learn, Layouts.renew, Layouts.geometry

    def the_one(layout: Layout) -> Layout:
        return layouts.setdefault((layout.layout_id, layout.first_step, layout.every, layout.version), layout)

    def learned(self: Layouts, layout: Layout, *, needed: set[int | None]) -> int:
        return learn(self, the_one(layout), needed=needed)

    def renewed(self: Layouts, layout: Layout) -> None:
        renew(self, the_one(layout))

    def known(self: Layouts, layout_id: int) -> Geometry:
        if layout_id not in geometries:
            geometries[layout_id] = geometry(self, layout_id)
        return geometries[layout_id]

    return learned, renewed, known


class Trusting(Truth):
    """Books without checks: each looks at all nodes after each event, which here would take most of the time.

    The same rules are checked in clusters of up to 64 nodes by every other simulation.
    """

    def check_offer(self, job: str, snapshot: SnapshotId) -> None:
        """Taken as it is."""

    def check_forward(self, job: str, snapshot: SnapshotId | None) -> None:
        """Taken as it is."""

    def check_recoverable(self, job: str, snapshot: SnapshotId) -> None:
        """Taken as it is."""

    def check_restored(self, job: str, snapshot: SnapshotId, role: int, shard: bytes) -> None:
        """Taken as it is."""

    def known_commits(self, job: str) -> dict[int, SnapshotId]:
        """Nobody asks, so nothing is held against an answer."""
        return {}


def trust_everybody(cluster: Cluster) -> None:
    """Leave the simulator's checks out: they are too slow for thousands of nodes, and a peer may be made to lie."""
    truth = Trusting(cluster.machines)
    for machine in cluster.machines:
        machine.after_event = lambda *_: None
    for job in cluster.jobs:
        job.truths = dict.fromkeys(job.truths, truth)
        job.clear = job.quiet = lambda: False  # nor is an answer to what was asked before this held against anybody


def _step(cluster: Cluster) -> int:
    committed = cluster.jobs[0].committed
    return -1 if committed is None else committed.step


if __name__ == "__main__":
    for word in sys.argv[1:]:
        print(json.dumps(measure(int(word))), flush=True)
