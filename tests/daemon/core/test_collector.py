"""What the collector keeps is bounded, and it looks at each node about once however many of them answer."""

from collections.abc import Callable
from typing import Any

import pytest
from holdfast.daemon.core import events
from holdfast.daemon.core.collector import Collector
from holdfast.daemon.core.node import Node
from holdfast.protocol import limits, messages
from holdfast.protocol.ids import SnapshotId
from sim.cluster import Cluster, ClusterShape
from sim.network import NetworkFaults
from sim.ranks import JobShape


def committed_cluster(node_count: int = 3) -> Cluster:
    shape = ClusterShape(
        node_count=node_count,
        parity=1,
        group_size=3,
        jobs=(JobShape("a", tuple((node, 100) for node in range(node_count)), step_s=1.0),),
        network=NetworkFaults(delay_s=0.001, delay_s_max=0.001),
    )
    cluster = Cluster(1, shape)
    cluster.start()
    assert cluster.world.run_until(lambda: cluster.jobs[0].committed is not None, deadline_s=60.0)
    return cluster


def core_of(cluster: Cluster, node: int = 0) -> tuple[Node, Callable[[messages.PeerMessage], None]]:
    """A core, and how another node tells it something."""
    worker = cluster.machines[node].worker
    assert worker is not None
    core = worker.node

    def tell(message: messages.PeerMessage) -> None:
        core.handle(events.PeerSaid(1, core.peers.incarnation_of(1), message), cluster.machines[node].clock_ns)

    return core, tell


def test_facts_of_snapshots_that_nobody_can_hold_are_not_kept() -> None:
    core, tell = core_of(committed_cluster())
    attempt = core.jobs["a"].job.attempt
    for step in range(1000, 1000 + 2 * limits.SLOTS_COUNT_MAX):
        tell(messages.NodeProtected("a", SnapshotId(attempt, step), 1))
        tell(messages.SnapshotOpened("a", SnapshotId(attempt, step)))
    assert len(core.collector.facts["a"]) == limits.SLOTS_COUNT_MAX
    assert min(core.collector.facts["a"]) == SnapshotId(attempt, 1000)
    assert len(core.jobs["a"].job.openings.wanted) <= limits.SLOTS_COUNT_MAX


def test_a_question_that_is_open_when_its_job_is_forgotten_counts_once() -> None:
    core, tell = core_of(committed_cluster())
    question = messages.RestoreAsked("a", 10**15, False)
    tell(question)
    core.collector.forget("a")
    core.check()
    started_ns = [query.started_ns for query in core.collector.queries]
    tell(question)
    assert started_ns == [query.started_ns for query in core.collector.queries] != []


def test_an_attempt_after_which_none_can_be_numbered_is_told_as_a_problem() -> None:
    cluster = committed_cluster()
    job = cluster.jobs[0]
    job.stopped = True
    job.kill("it ends")
    _, tell = core_of(cluster)
    tell(messages.RestoreDecided("a", 1, limits.STEP_MAX, None, None))
    heard = cluster.command(0, messages.AskRestore("a"))
    assert cluster.world.run_until(lambda: bool(heard), deadline_s=cluster.world.now_s + 20.0)
    assert isinstance(heard[0], messages.RestoreAnswer)
    assert "give the job another name" in heard[0].problem


def test_a_question_is_ready_after_about_one_look_at_each_node(monkeypatch: pytest.MonkeyPatch) -> None:
    node_count = 24
    cluster = committed_cluster(node_count)
    job = cluster.jobs[0]
    job.stopped = True
    job.kill("it ends")
    cluster.world.run_until(lambda: False, deadline_s=cluster.world.now_s + 3.0)
    looks = 0
    original = Collector._is_unheard

    def counted(self: Collector, *arguments: Any) -> bool:
        nonlocal looks
        looks += self.ctx.node == 0
        return original(self, *arguments)

    monkeypatch.setattr(Collector, "_is_unheard", counted)
    heard = cluster.command(0, messages.AskRestore("a"))
    assert cluster.world.run_until(lambda: bool(heard), deadline_s=cluster.world.now_s + 20.0)
    assert looks < 6 * node_count, "each of N answers looked at all N nodes"
