"""What the collector keeps is bounded, whom it asks and what it chooses.

It looks at each node about once however many of them answer. It restores what is known to be committed, and only where
none of that can be had, what enough nodes have protected.
"""

from collections.abc import Callable
from typing import Any

import pytest
from holdfast.daemon.core import events, report
from holdfast.daemon.core.collector import Collector, Query
from holdfast.daemon.core.node import Node
from holdfast.daemon.core.slot import Phase
from holdfast.protocol import limits, messages
from holdfast.protocol.ids import SnapshotId
from msgspec import structs
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


@pytest.mark.parametrize(
    ("committed_on", "newer_on", "expected"),
    [
        ({2}, {1, 2}, "newer"),
        ({0, 2}, {0, 1, 2}, "committed"),  # it can be had: nothing else is needed
        ({2}, {2}, None),  # two of three are lost, and parity is 1
        (set(), set(), None),
    ],
)
def test_what_enough_nodes_have_protected_is_restored_where_nothing_committed_can_be(
    committed_on: set[int], newer_on: set[int], expected: str | None
) -> None:
    core, committed, newer = core_where(committed_on, newer_on)
    decided = decision(core)
    assert decided.snapshot == {"newer": newer, "committed": committed, None: None}[expected]
    assert (decided.attempt > newer.attempt) == (expected is not None)
    assert bool(decided.problem) == (expected is None)
    assert str(newer) not in decided.problem


def test_what_is_not_known_to_be_committed_is_restored_only_while_nobody_can_let_it_go() -> None:
    core, _, newer = core_where({2}, {1, 2})
    assert decision(core).snapshot == newer
    assert decision(core, paused=False).problem
    peer = core.peers.table[2]
    assert peer.heartbeat is not None
    told = peer.heartbeat.jobs[0]
    peer.heartbeat = structs.replace(peer.heartbeat, jobs=(structs.replace(told, given_up=(newer,)),))
    assert decision(core).problem, "one has denied it: who held it may have let it go"
    later = structs.replace(told, attempt=newer.attempt + 1)
    peer.heartbeat = structs.replace(peer.heartbeat, jobs=(later,))
    assert decision(core).problem, "another attempt has begun without it"


def core_where(committed_on: set[int], newer_on: set[int]) -> tuple[Node, SnapshotId, SnapshotId]:
    """Node 0 of three, with word of who holds the committed snapshot, and a newer one that all but some protected."""
    core, _ = core_of(committed_cluster())
    job = core.jobs["a"].job
    committed = job.committed
    assert committed is not None
    newer = SnapshotId(committed.attempt, committed.step + 1)
    for node, peer in core.peers.table.items():
        assert peer.heartbeat is not None
        held = [s for s, nodes in ((committed, committed_on), (newer, newer_on)) if node in nodes]
        told = structs.replace(peer.heartbeat.jobs[0], committed=committed, held=tuple(held))
        peer.heartbeat = structs.replace(peer.heartbeat, jobs=(told,))
    for slot in job.slots:
        slot.snapshot = None
        slot.phase = Phase.EMPTY
    for slot, (snapshot, nodes) in zip(job.slots, ((committed, committed_on), (newer, newer_on)), strict=True):
        if 0 in nodes:
            slot.snapshot, slot.phase = snapshot, Phase.PROTECTED
    return core, committed, newer


def decision(core: Node, *, paused: bool = True) -> messages.RestoreDecided:
    """What node 0 chooses, as the collector that has heard all."""
    parts = core.jobs["a"]
    own = report.job_report(parts.job, parts.rebuild, parts.healing.drill.shown())
    now_ns = core.ctx.now_ns
    decided = core.collector.decide(Query("a", 1, 0, now_ns, now_ns), parts.job, own, paused=paused)
    assert decided is not None
    return decided


def test_a_node_that_was_asked_what_to_restore_lets_nothing_go_until_it_hears_the_answer() -> None:
    cluster = committed_cluster()
    core, tell = core_of(cluster)
    job = core.jobs["a"].job

    def protected() -> SnapshotId | None:
        return next((slot.snapshot for slot in job.slots if slot.phase is Phase.PROTECTED), None)

    assert cluster.world.run_until(lambda: protected() is not None, deadline_s=cluster.world.now_s + 20.0)
    snapshot = protected()
    assert snapshot is not None
    denial = messages.NodeGaveUp("a", snapshot, 1, "a test")
    tell(messages.ReportWanted(1, "a"))
    tell(denial)
    assert protected() == snapshot
    tell(messages.RestoreDecided("a", 1, 0, None, None, problem="nothing can be had", number=1))
    tell(denial)
    assert protected() is None


def test_what_to_restore_is_not_decided_before_a_live_node_that_is_silent_was_heard() -> None:
    cluster = committed_cluster()
    job = cluster.jobs[0]
    job.stopped = True
    job.kill("it ends")
    cluster.world.run_until(lambda: False, deadline_s=cluster.world.now_s + 3.0)
    thaws_s = cluster.world.now_s + 1.0
    cluster.freeze(2, 1.0)
    heard = cluster.command(0, messages.AskRestore("a"))
    assert cluster.world.run_until(lambda: bool(heard), deadline_s=cluster.world.now_s + 20.0)
    assert cluster.world.now_s >= thaws_s, "it may have committed something newer meanwhile, and freed what it held"
