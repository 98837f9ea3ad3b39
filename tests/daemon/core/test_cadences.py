"""Snapshots become rarer while protection is slower than training, and as frequent as planned when it keeps up."""

import pytest
from daemon.core.test_job import Alone
from holdfast.daemon.core.cadences import Cadences
from holdfast.daemon.core.job import Job
from holdfast.protocol.cadence import Cadence, PaceReport
from holdfast.protocol.ids import SnapshotId
from sim.cluster import Cluster, ClusterShape
from sim.network import NetworkFaults
from sim.ranks import JobShape

STEP_S = 0.05


def slow_cluster() -> Cluster:
    """Three nodes with one coding thread each, which is much slower than a training step."""
    job = JobShape("a", ((0, 400), (1, 400), (2, 300)), every=2, step_s=STEP_S)
    network = NetworkFaults(delay_s=0.001, delay_s_max=0.001)
    shape = ClusterShape(node_count=3, parity=1, group_size=3, jobs=(job,), network=network, coding_s_max=0.1)
    cluster = Cluster(1, shape)
    cluster.start()
    return cluster


def job_on(cluster: Cluster, node: int) -> Job:
    worker = cluster.machines[node].worker
    assert worker is not None
    return worker.node.jobs["a"].job


def committed(cluster: Cluster) -> int:
    known = cluster.jobs[0].committed
    return 0 if known is None else known.step


def passes(cluster: Cluster, seconds: float) -> None:
    cluster.world.run_until(lambda: False, deadline_s=cluster.world.now_s + seconds)


def test_a_job_that_outruns_its_protection_stages_more_rarely_and_waits_no_more() -> None:
    cluster = slow_cluster()
    assert cluster.world.run_until(lambda: committed(cluster) > 0, deadline_s=60.0)
    assert cluster.world.run_until(lambda: job_on(cluster, 2).every > 2, deadline_s=cluster.world.now_s + 60.0)
    passes(cluster, 20.0)
    every = {job_on(cluster, node).every for node in range(3)}
    assert len(every) == 1, "all nodes have heard the same"
    assert every.pop() % 2 == 0, "the planned cadence is the narrowest, and the others are its multiples"
    before, begun = cluster.world.now_s, cluster.jobs[0].begun
    passes(cluster, 10.0)
    assert begun is not None
    assert cluster.jobs[0].begun is not None
    steps_per_s = (cluster.jobs[0].begun.step - begun.step) / (cluster.world.now_s - before)
    assert steps_per_s > 0.7 / STEP_S, "training runs at nearly its own speed; three ranks wait for each other, too"
    for machine in cluster.machines:
        machine.coding_s_max = 0.001
    assert cluster.world.run_until(lambda: job_on(cluster, 1).every == 2, deadline_s=cluster.world.now_s + 120.0)


def cadences_on(cluster: Cluster, node: int) -> tuple[Cadence, ...]:
    worker = cluster.machines[node].worker
    return worker.node.jobs["a"].job.cadences if worker is not None and "a" in worker.node.jobs else ()


def test_a_worker_that_begins_anew_hears_of_the_cadence_in_force_and_of_the_one_to_come() -> None:
    cluster = slow_cluster()
    world = cluster.world
    assert world.run_until(lambda: len(cadences_on(cluster, 2)) == 2, deadline_s=120.0)
    cluster.crash_worker(1)
    assert not cadences_on(cluster, 1)
    assert world.run_until(lambda: len(cadences_on(cluster, 1)) == 2, deadline_s=world.now_s + 10.0)
    assert cadences_on(cluster, 1)[0] in {*cadences_on(cluster, 2), *cadences_on(cluster, 0)}


def report(step: int, *, cycle_s: float, waited_s: float) -> PaceReport:
    return PaceReport(begun=SnapshotId(1, step), step_s=0.1, cycle_s=cycle_s, waited_s=waited_s)


class Watched:
    """The collector's view of one job that commits step after step."""

    def __init__(self) -> None:
        self.job = Alone().node.jobs["gpt"].job
        self.cadences, self.step = Cadences(), 0

    def commits(self, *, cycle_s: float, waited_s: float) -> Cadence | None:
        self.step += 1
        self.job.committed = SnapshotId(1, self.step)
        assert self.cadences.is_news(self.job)
        found = self.cadences.consider(self.job, [report(self.step, cycle_s=cycle_s, waited_s=waited_s)])
        assert not self.cadences.is_news(self.job)
        if found is not None:
            self.job.adopt_cadence(1, found)
        return found


def test_one_slow_snapshot_changes_nothing() -> None:
    watched = Watched()
    assert [watched.commits(cycle_s=1.0, waited_s=w) for w in (0.5, 0.5, 0.0, 0.5, 0.5)] == [None] * 5


def test_a_slow_snapshot_that_nobody_waits_for_changes_nothing() -> None:
    watched = Watched()
    assert [watched.commits(cycle_s=1.0, waited_s=0.005) for _ in range(20)] == [None] * 20


def test_it_widens_stepwise_from_a_step_that_all_can_hear_of_in_time() -> None:
    watched = Watched()
    found = [(watched.commits(cycle_s=1.0, waited_s=0.5), watched.step) for _ in range(21)]
    assert {step: told for told, step in found if told is not None} == {
        3: Cadence(1, 3 + 16, 4),  # at most four times as rare at once
        19 + 2: Cadence(1, 21 + 16, 11),  # once that has begun: a snapshot of ten steps, and a tenth more
    }
    assert watched.job.every == 11


def test_it_narrows_with_patience_and_never_below_the_plan() -> None:
    watched = Watched()
    while watched.job.every < 11:
        watched.commits(cycle_s=1.0, waited_s=0.5)
    begins = watched.job.cadences[-1].from_step
    while watched.job.every == 11:
        watched.commits(cycle_s=0.01, waited_s=0.0)
    assert (watched.job.every, watched.step) == (1, begins + 7)


def test_none_is_announced_before_the_last_one_has_begun_for_each_would_put_it_off() -> None:
    watched = Watched()
    announced = [watched.commits(cycle_s=cycle_s, waited_s=0.5) for cycle_s in (0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1)]
    (one,) = [told for told in announced if told is not None]
    assert watched.job.cadences == (one,)
    assert watched.step < one.from_step


@pytest.mark.parametrize("attempt", [0, 2])
def test_a_cadence_of_another_attempt_is_ignored(attempt: int) -> None:
    job = Watched().job
    job.adopt_cadence(attempt, Cadence(1, 100, 5))
    assert job.every == 1
