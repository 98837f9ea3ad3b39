"""A job that comes back for the same step again and again is told so."""

from holdfast.protocol import limits, messages
from sim.cluster import Cluster, ClusterShape
from sim.network import NetworkFaults
from sim.ranks import JobShape


def test_the_third_life_from_one_step_is_told_so_and_a_commit_ends_that() -> None:
    shape = ClusterShape(
        node_count=2,
        parity=1,
        group_size=2,
        jobs=(JobShape("a", ((0, 100), (1, 65)), step_s=1.0),),
        network=NetworkFaults(delay_s=0.001, delay_s_max=0.001),
    )
    cluster = Cluster(1, shape)
    cluster.start()
    job, world = cluster.jobs[0], cluster.world
    assert world.run_until(lambda: job.committed is not None, deadline_s=60.0)
    job.stopped = True
    job.kill("it ends")
    world.run_until(lambda: False, deadline_s=world.now_s + 3.0)
    warnings, older = [], []
    object.__setattr__(cluster.config, "durable_dir", "/copies")
    object.__setattr__(cluster.config, "durable_after_lives", limits.RESTORES_TOLD_COUNT - 1)
    for _ in range(limits.RESTORES_TOLD_COUNT):
        heard = cluster.command(0, messages.AskRestore("a"))
        assert world.run_until(lambda heard=heard: bool(heard), deadline_s=world.now_s + 20.0)
        assert isinstance(heard[0], messages.RestoreAnswer)
        assert heard[0].snapshot == job.committed
        assert heard[0].durable_dir == "/copies"
        warnings.append(heard[0].warning)
        older.append(heard[0].use_older)
    assert warnings[:-1] == [""] * (limits.RESTORES_TOLD_COUNT - 1)
    assert "holdfast forget a" in warnings[-1]
    assert older == [*[False] * (limits.RESTORES_TOLD_COUNT - 1), True]


def test_who_begins_anew_is_not_held_up_by_what_can_not_be_recovered() -> None:
    shape = ClusterShape(
        node_count=3,
        parity=1,
        group_size=3,
        jobs=(JobShape("a", ((0, 100), (1, 65), (2, 65)), step_s=1.0),),
        network=NetworkFaults(delay_s=0.001, delay_s_max=0.001),
    )
    cluster = Cluster(1, shape)
    cluster.start()
    job, world = cluster.jobs[0], cluster.world
    assert world.run_until(lambda: job.committed is not None, deadline_s=60.0)
    job.stopped = True
    job.kill("it ends")
    for node in (1, 2):
        cluster.machines[node].lose()
    world.run_until(lambda: False, deadline_s=world.now_s + 10.0)
    heard = cluster.command(0, messages.AskRestore("a"))
    assert world.run_until(lambda: bool(heard), deadline_s=world.now_s + 20.0)
    assert isinstance(heard[0], messages.RestoreAnswer)
    assert "not recoverable" in heard[0].problem
    fresh = cluster.command(0, messages.AskRestore("a", begin_fresh=True))
    assert world.run_until(lambda: bool(fresh), deadline_s=world.now_s + 20.0)
    assert isinstance(fresh[0], messages.RestoreAnswer)
    assert (fresh[0].problem, fresh[0].snapshot) == ("", None)
    assert fresh[0].attempt > 0


def test_who_begins_anew_while_nodes_are_not_heard_leaves_what_they_hold_to_the_next_life() -> None:
    shape = ClusterShape(
        node_count=3,
        parity=1,
        group_size=3,
        jobs=(JobShape("a", ((0, 100), (1, 65), (2, 65)), step_s=1.0),),
        network=NetworkFaults(delay_s=0.001, delay_s_max=0.001),
    )
    cluster = Cluster(1, shape)
    cluster.start()
    job, world = cluster.jobs[0], cluster.world
    assert world.run_until(lambda: job.committed is not None, deadline_s=60.0)
    job.stopped = True
    job.kill("it ends")
    world.run_until(lambda: False, deadline_s=world.now_s + 3.0)  # what was under way is committed or given up
    cluster.partition({1, 2}, seconds=12.0, one_way=False)
    fresh = cluster.command(0, messages.AskRestore("a", begin_fresh=True))
    assert world.run_until(lambda: bool(fresh), deadline_s=world.now_s + 11.0)
    assert isinstance(fresh[0], messages.RestoreAnswer)
    assert (fresh[0].problem, fresh[0].snapshot) == ("", None)
    world.run_until(lambda: False, deadline_s=world.now_s + 15.0)
    heard = cluster.command(1, messages.AskRestore("a"))
    assert world.run_until(lambda: bool(heard), deadline_s=world.now_s + 20.0)
    assert isinstance(heard[0], messages.RestoreAnswer)
    assert (heard[0].problem, heard[0].snapshot) == ("", job.committed)
