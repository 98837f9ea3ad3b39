"""Every bit that flips in what a node holds is found within one period, and brought back."""

import pytest
from holdfast.daemon.core.health import Resting
from holdfast.daemon.core.scrub import Pacing
from sim.network import NetworkFaults
from sim.rot import PERIOD_S, RestingCluster


@pytest.mark.parametrize("parity", [1, 2])
def test_a_flip_in_any_held_chunk_is_repaired_within_a_period(parity: int) -> None:
    rot = RestingCluster(parity=parity)
    assert rot.is_right()
    for node in range(4):
        for count, wanted in enumerate(rot.chunks(node), start=1):
            rot.flip(node, wanted)
            assert not rot.is_right()
            rot.wait(rot.is_right, PERIOD_S)
            assert rot.health(node).repaired_chunks == count
            assert not rot.health(node).damaged
    assert all(rot.health(node).disagreeing_stripes == 0 for node in range(4))


def test_flips_on_a_network_that_loses_and_corrupts_are_repaired() -> None:
    rot = RestingCluster(network=NetworkFaults(lost=0.05, doubled=0.05, corrupted=0.05))
    for _ in range(3):
        for node in range(4):
            rot.flip(node, rot.chunks(node)[0])
            rot.flip(node, rot.chunks(node)[-1])
        rot.wait(rot.is_right, 60.0)


def test_a_pass_reads_everything_and_says_when() -> None:
    rot = RestingCluster()
    rot.wait(lambda: all(rot.health(node).scrub_passes >= 2 for node in range(4)), 3 * PERIOD_S)
    worker = rot.cluster.machines[0].worker
    assert worker is not None
    report = rot.health(0).report(worker.node.ctx.now_ns)
    assert 0 < report.scrub_s <= PERIOD_S
    assert 0 <= report.scrub_age_s <= PERIOD_S
    assert report.repaired_chunks == report.damaged_chunks == 0


def test_a_period_of_zero_reads_nothing() -> None:
    rot = RestingCluster(period_s=0)
    rot.flip(0, Resting("data", 0))
    rot.pass_time(30.0)
    assert not rot.is_right()
    assert rot.health(0).scrub_passes == 0


def test_the_digest_table_in_memory_is_written_anew() -> None:
    rot = RestingCluster()
    rot.held(1).digests[0] ^= 1
    assert not rot.is_right()
    rot.wait(rot.is_right, PERIOD_S)


def test_work_is_spread_over_the_interval() -> None:
    pacing = Pacing(started_ns=100)
    assert pacing.due(10, interval_ns=1000, now_ns=100) == 1
    assert pacing.due(10, interval_ns=1000, now_ns=600) == 6
    pacing.done = 6
    assert pacing.due(10, interval_ns=1000, now_ns=600) == 0
    assert pacing.due(10, interval_ns=1000, now_ns=9999) == 4
