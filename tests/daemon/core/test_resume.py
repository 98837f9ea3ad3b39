"""What a restarted worker takes up, and how a change of it is noticed."""

import pytest
from holdfast.daemon.core import resume
from holdfast.daemon.core.ledger import JobRecord, decode_ledger
from sim.calm import calm


def test_all_that_a_record_tells_is_looked_at_for_changes() -> None:
    cluster = calm(100, 65, seed=2)
    worker = cluster.machines[0].worker
    assert worker is not None
    registry, peers = worker.node.registry, worker.node.peers
    _, _, (job,) = resume.state(registry, peers)  # type: ignore[misc]  # as `state` builds it
    assert len(job) == len(JobRecord.__struct_fields__)
    told = resume.record(registry, peers).jobs[0]
    assert [job[0], job[1], job[4], job[6]] == [told.name, told.attempt, told.committed, told.given_up]


def test_a_restarted_worker_still_refuses_who_was_superseded_before_it_restarted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cluster = calm(100, 65, seed=2)
    survivor, lost = cluster.machines
    job, world = cluster.jobs[0], cluster.world
    job.stopped = True
    assert survivor.worker is not None
    known = survivor.worker.node.peers.table[1].incarnation
    assert known > 0
    monkeypatch.setattr(world.random, "choice", max)  # the replacement's wall clock lags
    cluster.lose_node(1, back_after_s=5.0)
    survivor.crash_worker()
    survivor.boot()
    assert survivor.ledger is not None
    assert decode_ledger(survivor.ledger).incarnations == (0, known)
    peers = survivor.worker.node.peers
    assert world.run_until(lambda: peers.alive(1), deadline_s=world.now_s + 30.0)
    assert lost.incarnation < known
    assert peers.table[1].incarnation > known, "the replacement went on under a number that supersedes the lost one's"
