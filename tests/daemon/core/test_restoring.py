"""A job that comes back for the same step again and again is told so."""

from holdfast.protocol import limits, messages
from sim.calm import calm


def test_the_third_life_from_one_step_is_told_so_and_a_commit_ends_that() -> None:
    cluster = calm(100, 65)
    job, world = cluster.jobs[0], cluster.world
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
    cluster = calm(100, 65, 65)
    job, world = cluster.jobs[0], cluster.world
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
    cluster = calm(100, 65, 65)
    job, world = cluster.jobs[0], cluster.world
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


def test_a_job_that_only_one_node_remembers_to_have_been_forgotten_lives_there_again() -> None:
    cluster = calm(100, 65, 65)
    job, world = cluster.jobs[0], cluster.world
    job.stopped = True
    job.kill("it ends")
    cluster.truth.forget("a")
    cluster.command(0, messages.AskForget("a"))
    workers = [machine.worker for machine in cluster.machines]
    assert world.run_until(lambda: all(w and "a" not in w.node.jobs for w in workers), deadline_s=world.now_s + 20.0)
    for node in (0, 1):  # what was forgotten is in no ledger
        cluster.machines[node].crash_worker()
        cluster.machines[node].boot()
    world.run_until(lambda: False, deadline_s=world.now_s + 5.0)
    heard = cluster.command(0, messages.AskRestore("a"))
    assert world.run_until(lambda: bool(heard), deadline_s=world.now_s + 20.0)
    assert isinstance(heard[0], messages.RestoreAnswer)
    remembering = cluster.machines[2].worker
    assert remembering is not None
    assert world.run_until(lambda: "a" in remembering.node.jobs, deadline_s=world.now_s + 5.0)
