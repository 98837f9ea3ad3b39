"""Two epochs in one worker: how a job moves, what memory that takes, what status tells, and when the old one ends."""

from collections.abc import Callable

from holdfast.protocol import messages
from sim.cluster import Cluster, ClusterShape
from sim.growth import Change, next_epoch
from sim.network import NetworkFaults
from sim.ranks import JobShape


def until(cluster: Cluster, done: Callable[[], bool], *, seconds: float = 60.0) -> None:
    assert cluster.world.run_until(done, deadline_s=cluster.world.now_s + seconds), cluster.world.transcript[-30:]


def trained(*, budget_bytes: int = 1 << 20) -> Cluster:
    """Three nodes with a rank each, and a step that is committed."""
    job = JobShape("a", ((0, 1024), (1, 1024), (2, 1024)), every=1, step_s=1.0)
    network = NetworkFaults(delay_s=0.001, delay_s_max=0.001)
    shape = ClusterShape(
        node_count=3, parity=1, group_size=3, jobs=(job,), budget_bytes=budget_bytes, network=network,
        coding_s_max=0.001,
    )  # fmt: skip
    cluster = Cluster(1, shape)
    cluster.start()
    until(cluster, lambda: cluster.jobs[0].committed is not None)
    return cluster


def taken_up(cluster: Cluster, names: list[str], *, but: tuple[str, ...] = ()) -> Change:
    change = next_epoch(cluster, names)
    for node, name in enumerate(names):
        if name not in but:
            change.take_up(node)
    until(cluster, lambda: settled(change))
    return change


def settled(change: Change) -> bool:
    workers = [machine.worker for machine in change.new.machines if machine.worker is not None]
    return all(worker.node.peers.settled for worker in workers)


def is_over(change: Change) -> bool:
    return all(machine.passenger is None or machine.passenger.is_over for machine in change.new.machines)


def commits_anew(change: Change) -> None:
    job = change.old.jobs[0]
    key = lambda: ("a", job.committed)  # noqa: E731  # looked at again and again
    until(change.old, lambda: key() in change.new.truth.layouts)
    until(change.old, lambda: is_over(change))


def test_a_running_job_stays_where_it_is_and_a_restarted_one_moves() -> None:
    cluster = trained()
    job = cluster.jobs[0]
    change = taken_up(cluster, ["m0", "n2", "n0", "n1"])  # another order: indices tell nothing across epochs
    before = job.committed
    assert before is not None
    life = job.life
    until(cluster, lambda: job.committed is not None and job.committed > before)
    assert (job.life, is_over(change)) == (life, False)
    job.kill("it starts again")
    until(cluster, lambda: job.life > life and job.restored_all)
    assert job.restored is not None
    assert job.restored in [snapshot for _, snapshot in change.old.truth.layouts], "from the epoch before"
    commits_anew(change)


def test_a_job_moves_within_the_budget_that_it_had() -> None:
    two_slots = trained().machines[0].held_bytes
    cluster = trained(budget_bytes=two_slots)
    job = cluster.jobs[0]
    machine = cluster.machines[0]
    assert machine.held_bytes == two_slots, "all of the budget"
    change = taken_up(cluster, ["n0", "n1", "n2"])
    job.kill("it starts again")
    commits_anew(change)
    until(cluster, lambda: machine.held_bytes == two_slots)
    until(cluster, lambda: job.committed is not None and job.committed.step > 5)


def test_a_job_goes_on_in_the_epoch_before_while_a_node_of_the_new_list_was_never_heard() -> None:
    cluster = trained()
    job = cluster.jobs[0]
    change = taken_up(cluster, ["n0", "n1", "n2", "m0"], but=("m0",))
    before = job.committed
    assert before is not None
    job.kill("it starts again")
    until(cluster, lambda: job.restored_all and job.committed is not None and job.committed > before)
    assert ("a", job.committed) in change.old.truth.layouts
    change.take_up(3)
    until(cluster, lambda: settled(change))
    worker = change.new.machines[0].worker
    assert worker is not None
    until(cluster, worker.node.collector.complete)
    job.kill("it starts again")
    commits_anew(change)


def test_status_and_heartbeats_tell_what_is_left_of_the_epoch_before() -> None:
    cluster = trained()
    change = taken_up(cluster, ["n0", "n1"])
    worker = change.new.machines[1].worker
    assert worker is not None
    assert worker.household is not None
    status = worker.household.epochs.status()
    row = status["earlier"]
    assert isinstance(row, dict)
    assert (row["epoch"], row["waits_for"], row["leaving"]) == (2, ["a"], ["n2"])
    assert [job["name"] for job in row["jobs"]] == ["a"]
    first = change.new.machines[0].worker
    assert first is not None
    until(cluster, lambda: first.node.collector.earlier_at("a") == 0)
    job = cluster.jobs[0]
    job.places[2] = change.new.machines[0]  # the node that leaves has no rank any more
    job.kill("it starts again")
    commits_anew(change)
    until(cluster, lambda: worker.household.epochs.status()["earlier"] is None)


def test_a_plan_that_names_no_epoch_of_ours_is_refused() -> None:
    cluster = trained()
    change = taken_up(cluster, ["n0", "n1", "n2"])
    plan = cluster.jobs[0].ranks[0].plan
    assert plan is not None
    for epoch, hint in ((0, "install this version"), (7, "start the job again")):
        heard = change.new.command(0, messages.Plan("a", 1, 0, plan, epoch))
        until(cluster, lambda heard=heard: bool(heard))  # type: ignore[misc]  # the loop's own list
        denied = heard[0]
        assert isinstance(denied, messages.Denied)
        assert "expected epoch 2 and 3" in denied.text
        assert hint in denied.text


def test_a_node_that_joined_alone_does_not_say_that_there_is_nothing() -> None:
    cluster = trained()
    change = next_epoch(cluster, ["n0", "n1", "n2", "m0"])
    change.take_up(3)
    until(cluster, lambda: settled(change))
    heard = change.new.command(3, messages.AskRestore("a"))
    until(cluster, lambda: bool(heard))
    answer = heard[0]
    assert isinstance(answer, messages.RestoreAnswer)
    assert "of another epoch than 3" in answer.problem
