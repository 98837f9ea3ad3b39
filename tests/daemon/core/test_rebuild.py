"""A replacement gets back what the lost node held: a byte per byte, from all alike, whatever happens meanwhile."""

from collections import Counter
from collections.abc import Callable, Iterable

import msgspec
import pytest
from holdfast.coding import chunk_digest
from holdfast.daemon.core import actions, events
from holdfast.daemon.core.rebuild import Rebuild
from holdfast.daemon.core.slot import COMPLETE
from holdfast.protocol import messages
from sim.cluster import Cluster, ClusterShape
from sim.machine import Worker
from sim.network import NetworkFaults
from sim.ranks import JobShape

CHUNK_BYTES = 64
DEADLINE_S = 90.0


class Scene:
    """A cluster of one group that has committed; its job has ended, so that nothing else is on the network."""

    def __init__(
        self, *, nodes: int = 6, parity: int = 2, chunks: int = 20, coding_s: float = 0.001, seed: int = 3
    ) -> None:
        shards = tuple((node, chunks * CHUNK_BYTES - node) for node in range(nodes))
        shape = ClusterShape(
            node_count=nodes,
            parity=parity,
            group_size=nodes,
            jobs=(JobShape("a", shards, step_s=1.0),),
            network=NetworkFaults(delay_s=0.001, delay_s_max=0.002),
            coding_s_max=coding_s,
        )
        self.cluster = Cluster(seed, shape)
        self.stored: Counter[int] = Counter()  # node -> chunks put in place
        self.sent: Counter[int] = Counter()  # node -> sums sent on
        for machine in self.cluster.machines:
            observe = machine.after_event
            machine.after_event = lambda worker, event, decided, observe=observe: self._count(  # type: ignore[misc]
                worker, event, list(decided), observe
            )
        self.cluster.start()
        self.until(lambda: self.cluster.jobs[0].committed is not None)
        self.cluster.jobs[0].stopped = True
        self.cluster.jobs[0].kill("it ends")
        self.wait(3.0)

    def _count(
        self,
        worker: Worker,
        event: events.Event | None,
        decided: list[actions.Action],
        observe: Callable[[Worker, events.Event | None, list[actions.Action]], None],
    ) -> None:
        node = worker.machine.node
        self.stored[node] += sum(isinstance(action, actions.StoreSum) for action in decided)
        self.sent[node] += sum(isinstance(action, actions.AddToSum) for action in decided)
        observe(worker, event, decided)

    def wait(self, seconds: float) -> None:
        self.cluster.world.run_until(lambda: False, deadline_s=self.cluster.world.now_s + seconds)

    def until(self, done: Callable[[], object]) -> None:
        world = self.cluster.world
        assert world.run_until(lambda: bool(done()), deadline_s=world.now_s + DEADLINE_S), world.transcript[-30:]

    def lose(self, *nodes: int) -> None:
        for node in nodes:
            self.cluster.lose_node(node, back_after_s=3.0)

    def rebuild(self, node: int) -> Rebuild | None:
        worker = self.cluster.machines[node].worker
        parts = worker.node.jobs.get("a") if worker is not None else None
        return parts.rebuild if parts is not None else None

    def done(self, node: int) -> int:
        found = self.rebuild(node)
        return found.done_chunks if found is not None else 0

    def is_whole(self, node: int) -> bool:
        worker = self.cluster.machines[node].worker
        parts = worker.node.jobs.get("a") if worker is not None else None
        committed = self.cluster.jobs[0].committed
        return parts is not None and any(s.snapshot == committed and s.phase in COMPLETE for s in parts.job.slots)

    def whole(self, nodes: Iterable[int]) -> None:
        self.until(lambda: all(self.is_whole(node) for node in nodes))
        self.cluster.truth.check_at_rest()

    def lost_bytes(self, node: int) -> int:
        committed = self.cluster.jobs[0].committed
        assert committed is not None
        geometry = self.cluster.truth.geometry(("a", committed))
        return geometry.data_bytes(node) + geometry.parity_bytes(node)


@pytest.mark.parametrize("lost", [(2,), (2, 5), (0, 1)])
def test_it_starts_by_itself_and_receives_a_byte_per_lost_byte(lost: tuple[int, ...]) -> None:
    scene = Scene()
    scene.lose(*lost)
    scene.whole(lost)
    for node in lost:
        found = scene.rebuild(node)
        assert found is not None
        assert found.received_bytes == scene.lost_bytes(node)


def test_all_survivors_send_about_as_much() -> None:
    scene = Scene(chunks=48)
    scene.lose(3)
    scene.whole([3])
    sent = [scene.sent[node] for node in range(6) if node != 3]
    mean = sum(sent) / len(sent)
    assert max(sent) < 1.15 * mean
    assert min(sent) > 0.85 * mean


def test_a_new_worker_goes_on_with_what_is_missing() -> None:
    scene = Scene(coding_s=0.02)
    scene.lose(2)
    total = scene.lost_bytes(2) // CHUNK_BYTES
    scene.until(lambda: scene.done(2) > total // 2)
    scene.cluster.crash_worker(2)
    scene.stored.clear()
    scene.whole([2])
    assert 0 < scene.stored[2] < total // 2


def test_a_survivor_that_dies_in_the_middle_is_done_without() -> None:
    scene = Scene(coding_s=0.02)
    scene.lose(2)
    scene.until(lambda: scene.done(2) > 5)
    scene.cluster.lose_node(4, back_after_s=5.0)
    scene.whole([2, 4])


def test_a_survivor_that_stalls_in_the_middle_is_done_without() -> None:
    scene = Scene(coding_s=0.02)
    scene.lose(2)
    scene.until(lambda: scene.done(2) > 5)
    worker = scene.cluster.machines[4].worker
    assert worker is not None
    worker.coder.orders.clear()
    worker.coder.order = lambda action: None  # type: ignore[method-assign]  # it lives and says so, and does no work
    scene.whole([2])


def test_what_a_rank_waits_for_comes_first() -> None:
    scene = Scene(chunks=300, coding_s=0.01)
    scene.lose(2)
    scene.until(lambda: scene.done(2) > 0)
    snapshot = scene.cluster.jobs[0].committed
    assert snapshot is not None
    worker = scene.cluster.machines[2].worker
    assert worker is not None
    heard: list[messages.DaemonMessage] = []
    client = worker.attach(heard.append, lambda: None)
    worker.said(client, messages.OpenShard("a", snapshot.attempt, snapshot, 2))
    scene.until(lambda: any(isinstance(message, messages.ShardOpened) for message in heard))
    assert not scene.is_whole(2), "the parity is still on its way"
    scene.whole([2])


def test_with_too_few_survivors_it_waits_for_one_that_comes_back() -> None:
    scene = Scene(nodes=4, parity=1, coding_s=0.02)
    scene.lose(2)
    scene.until(lambda: scene.done(2) > 1)
    scene.cluster.freeze(1, 12.0)
    scene.until(lambda: (found := scene.rebuild(2)) is not None and found.word == "failed")
    done = scene.done(2)
    assert done > 1
    scene.whole([2])
    assert scene.stored[2] < scene.lost_bytes(2) // CHUNK_BYTES + 40, "it did not start over"


def test_a_survivor_that_computes_wrongly_is_found_and_done_without() -> None:
    scene = Scene()
    worker = scene.cluster.machines[4].worker
    assert worker is not None
    send = worker.send_chunk

    def wrong(node: int, header: messages.ChunkHeader, view: memoryview) -> None:
        if header.kind == "sum":
            view = memoryview(bytes([view[0] ^ 1]) + bytes(view[1:]))
            header = msgspec.structs.replace(header, digest=chunk_digest(view))
        send(node, header, view)

    worker.send_chunk = wrong  # type: ignore[method-assign]
    scene.lose(2)
    scene.whole([2])
