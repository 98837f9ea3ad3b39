"""Any client of any node reads any bytes of what is committed, also those of nodes that are missing."""

import pytest
from holdfast.daemon.core.memory import READ_SLOTS_FROM
from holdfast.protocol import messages
from holdfast.protocol.exit_codes import ExitCode
from holdfast.protocol.ids import SnapshotId
from holdfast.protocol.layout import Layout, ShardPlace
from sim.cluster import Cluster, ClusterShape
from sim.network import NetworkFaults
from sim.ranks import JobShape
from sim.readers import Reader

DEADLINE_S = 60.0
NETWORK = NetworkFaults(delay_s=0.001, delay_s_max=0.002)


def committed_cluster(
    *, nodes: int = 4, parity: int = 2, group_size: int = 4, budget_bytes: int = 1 << 20, seed: int = 1
) -> Cluster:
    """A cluster whose job has committed a step and stopped."""
    shards = (*((node, 100 + 130 * node) for node in range(nodes)), (0, 333))
    job = JobShape("a", shards, step_s=1.0)
    shape = ClusterShape(
        node_count=nodes,
        parity=parity,
        group_size=group_size,
        jobs=(job,),
        budget_bytes=budget_bytes,
        network=NETWORK,
        coding_s_max=0.001,
    )
    cluster = Cluster(seed, shape)
    cluster.start()
    until(cluster, lambda: cluster.jobs[0].committed is not None)
    cluster.jobs[0].stopped = True
    cluster.jobs[0].kill("it ends")
    cluster.world.run_until(lambda: False, deadline_s=cluster.world.now_s + 3.0)
    return cluster


def until(cluster: Cluster, done: object) -> None:
    assert callable(done)
    assert cluster.world.run_until(done, deadline_s=cluster.world.now_s + DEADLINE_S), cluster.world.transcript[-30:]


def lose(cluster: Cluster, *nodes: int) -> None:
    for node in nodes:
        cluster.lose_node(node, back_after_s=10_000.0)
    cluster.world.run_until(lambda: False, deadline_s=cluster.world.now_s + 4.0)


def read_all(cluster: Cluster, node: int) -> Reader:
    reader = Reader(cluster.world, cluster.machines, cluster.truth, "a", node, whole=True)
    until(cluster, lambda: reader.done)
    return reader


@pytest.mark.parametrize("node", [0, 3])
def test_everything_can_be_read_through_any_node(node: int) -> None:
    cluster = committed_cluster()
    assert read_all(cluster, node).bytes_read == sum(size for _, size in cluster.jobs[0].shape.shards)


@pytest.mark.parametrize("lost", [(1,), (0, 2), (2, 3), (0, 1)])
def test_what_missing_nodes_held_is_computed_from_the_others(lost: tuple[int, ...]) -> None:
    cluster = committed_cluster()
    lose(cluster, *lost)
    reader = read_all(cluster, next(node for node in range(4) if node not in lost))
    assert reader.bytes_read == sum(size for _, size in cluster.jobs[0].shape.shards)


def test_a_node_of_another_group_reads_as_well() -> None:
    cluster = committed_cluster(nodes=6, parity=1, group_size=3)
    lose(cluster, next(iter(cluster.placement.groups[1])))
    reader = read_all(cluster, cluster.placement.groups[0][1])
    assert reader.bytes_read == sum(size for _, size in cluster.jobs[0].shape.shards)


def test_a_bad_chunk_at_rest_is_computed_from_the_others() -> None:
    cluster = committed_cluster()
    held = next(held for memory, held in cluster.machines[1].held.items() if any(held.data))
    held.data[70] ^= 1
    before = [bytes(part.data) for part in cluster.machines[1].held.values()]
    reader = read_all(cluster, 1)
    assert reader.bytes_read == sum(size for _, size in cluster.jobs[0].shape.shards)
    assert [bytes(part.data) for part in list(cluster.machines[1].held.values())[: len(before)]] == before


def test_more_losses_than_parity_are_named() -> None:
    cluster = committed_cluster(parity=1)
    snapshot = cluster.jobs[0].committed
    assert snapshot is not None
    worker = cluster.machines[0].worker
    assert worker is not None
    lose(cluster, 1, 2)
    heard: list[messages.DaemonMessage] = []
    client = worker.attach(heard.append, lambda: None)
    worker.said(client, messages.ReadRange("a", snapshot, 1, 0, 10, 1))
    until(cluster, lambda: heard)
    assert isinstance(heard[0], messages.RangeDenied)
    assert heard[0].exit_code == ExitCode.NOT_RECOVERABLE
    assert not heard[0].retry
    assert "n1, n2" in heard[0].text


def test_a_released_snapshot_is_superseded() -> None:
    cluster = committed_cluster()
    newest = cluster.jobs[0].committed
    assert newest is not None
    old = SnapshotId(newest.attempt - 1, newest.step)
    heard = cluster.command(2, messages.ReadRange("a", old, 1, 0, 10, 1))
    until(cluster, lambda: heard)
    assert isinstance(heard[0], messages.RangeDenied)
    assert heard[0].superseded_by == newest


def test_wishes_outside_the_shard_are_refused() -> None:
    cluster = committed_cluster()
    snapshot = cluster.jobs[0].committed
    assert snapshot is not None
    for role, offset_bytes, length_bytes in ((99, 0, 1), (0, 0, 101), (0, 100, 1)):
        heard = cluster.command(2, messages.ReadRange("a", snapshot, role, offset_bytes, length_bytes, 1))
        until(cluster, lambda heard=heard: heard)
        assert isinstance(heard[0], messages.RangeDenied)
        assert heard[0].exit_code == ExitCode.USAGE


def test_reads_stay_within_the_budget_and_give_their_memory_back() -> None:
    cluster = committed_cluster()
    worker = cluster.machines[0].worker
    assert worker is not None
    before = worker.node.arena.reserved_bytes
    worker.node.arena.budget_bytes = before + 64 * 4
    snapshot = cluster.jobs[0].committed
    assert snapshot is not None
    heard: list[messages.DaemonMessage] = []
    client = worker.attach(heard.append, lambda: None)
    worker.said(client, messages.ReadRange("a", snapshot, 3, 0, 490, 1))
    until(cluster, lambda: heard)
    assert isinstance(heard[0], messages.RangeDenied)
    assert heard[0].exit_code == ExitCode.OVER_BUDGET
    worker.said(client, messages.ReadRange("a", snapshot, 1, 0, 100, 2))
    until(cluster, lambda: len(heard) > 1)
    assert isinstance(heard[1], messages.RangeReady)
    assert heard[1].slot >= READ_SLOTS_FROM
    assert worker.node.arena.reserved_bytes > before
    worker.detach(client)
    until(cluster, lambda: worker.node.arena.reserved_bytes == before)


def test_a_reader_has_few_reads_open_at_once() -> None:
    cluster = committed_cluster()
    snapshot = cluster.jobs[0].committed
    worker = cluster.machines[0].worker
    assert snapshot is not None
    assert worker is not None
    heard: list[messages.DaemonMessage] = []
    client = worker.attach(heard.append, lambda: None)
    for request in (1, 2, 3):
        worker.said(client, messages.ReadRange("a", snapshot, 1, 0, 10, request))
    until(cluster, lambda: len(heard) == 3)
    denied = [message for message in heard if isinstance(message, messages.RangeDenied)]
    assert [message.exit_code for message in denied] == [ExitCode.USAGE]
    worker.said(client, messages.CloseRange(1))
    worker.said(client, messages.ReadRange("a", snapshot, 1, 0, 10, 4))
    until(cluster, lambda: len(heard) == 4)
    assert isinstance(heard[3], messages.RangeReady)


@pytest.mark.parametrize(
    ("place", "words"),
    [(ShardPlace(4095, 100), "names node 4095"), (ShardPlace(1, 1 << 60), "chunks, 4194304 are the limit")],
)
def test_a_layout_that_can_not_be_this_clusters_is_refused(place: ShardPlace, words: str) -> None:
    cluster = committed_cluster()
    snapshot = SnapshotId(7, 7)
    worker = cluster.machines[2].worker
    assert worker is not None
    worker.node.ranges.learn(messages.CommittedGiven("b", 1, 7, snapshot, Layout((place,), 0, 1)))
    heard = cluster.command(2, messages.ReadRange("b", snapshot, 0, 0, 10, 1))
    until(cluster, lambda: heard)
    assert isinstance(heard[0], messages.RangeDenied)
    assert words in heard[0].text
