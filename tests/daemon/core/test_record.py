"""Each recovery leaves a record on every node: what was lost, what was chosen, what it took, and digests that agree."""

from collections.abc import Callable

from holdfast.protocol.recovery import RecoveryRecord, StepRecord
from sim.cluster import Cluster, ClusterShape
from sim.ranks import JobShape


def small_cluster() -> Cluster:
    """Three nodes, parity 1, a rank on two of them; step 1 is committed."""
    job = JobShape("a", ((0, 100), (1, 65)), every=1, step_s=1.0)
    cluster = Cluster(1, ClusterShape(node_count=3, parity=1, group_size=3, jobs=(job,)))
    cluster.start()
    until(cluster, lambda: [known.step for known in cluster.truth.known_commits("a").values()] == [1, 1, 1])
    return cluster


def until(cluster: Cluster, done: Callable[[], bool]) -> None:
    assert cluster.world.run_until(done, deadline_s=cluster.world.now_s + 60.0)


def newest(cluster: Cluster, node: int) -> RecoveryRecord:
    return list(cluster.machines[node].records.values())[-1]


def test_a_lost_node_is_told_with_its_rebuild() -> None:
    cluster = small_cluster()
    assert not cluster.machines[0].records
    cluster.lose_node(1, back_after_s=3.0)
    until(cluster, lambda: cluster.jobs[0].life == 2 and cluster.jobs[0].restored_all)
    until(cluster, lambda: any(phase.name == "rebuild" for phase in newest(cluster, 1).phases))
    told, rebuilt = newest(cluster, 0), newest(cluster, 1)
    assert (told.attempt, told.chosen, told.lost_nodes) == (2, StepRecord(1, 1), ("n1",))
    assert [phase.name for phase in told.phases] == ["decide"]
    assert told.digest_before == told.digest_after is not None
    assert rebuilt.lost_nodes == ("n1",)
    phase = rebuilt.phases[-1]
    assert (phase.name, phase.outcome, phase.lost_bytes) == ("rebuild", "done", 192)
    assert phase.received_bytes > 0
    assert phase.seconds > 0
    assert rebuilt.digest_before is None
    assert rebuilt.digest_after is not None
    beats = [row["recovery_record"] for row in cluster.machines[0].worker.node.status()["nodes"]]  # type: ignore[union-attr,index]  # it lives
    assert beats[0] == "recovery-n0-a-2-1.json"


def test_a_restart_without_losses_leaves_a_record_too_and_only_one() -> None:
    cluster = small_cluster()
    cluster.jobs[0].kill("a rank crashed")
    until(cluster, lambda: cluster.jobs[0].life == 2 and cluster.jobs[0].restored_all)
    for node in range(3):
        assert len(cluster.machines[node].records) == 1
        assert newest(cluster, node).lost_nodes == ()
        assert len(newest(cluster, node).phases) == 1
