"""A damaged chunk is brought back from whoever is left; one that can't be is shown, kept as it is, and tried again."""

import pytest
from holdfast.daemon.core.health import Resting
from sim.rot import PERIOD_S, RestingCluster


def test_a_chunk_is_repaired_while_another_node_is_lost() -> None:
    rot = RestingCluster(parity=2)
    rot.cluster.machines[3].lose()
    for wanted in rot.chunks(0):
        rot.flip(0, wanted)
    rot.wait(rot.is_right, 4 * PERIOD_S)


def test_what_can_not_be_repaired_is_shown_and_repaired_when_it_can_be() -> None:
    rot = RestingCluster(parity=1)
    machine = rot.cluster.machines[3]
    machine.crash_worker()  # its memory stays
    rot.pass_time(4.0)
    rot.flip(0, Resting("data", 0))
    rot.flip(0, Resting("parity", 0))
    rot.wait(lambda: rot.health(0).damaged == {Resting("data", 0), Resting("parity", 0)}, 3 * PERIOD_S)
    rot.pass_time(25.0)
    assert rot.health(0).repaired_chunks == 0
    assert not rot.is_right()
    status = rot.cluster.machines[0].worker.node.status()  # type: ignore[union-attr]  # it lives
    assert isinstance(status["jobs"], list)
    assert status["jobs"][0]["damaged_chunks"] == 2
    machine.boot()
    rot.wait(lambda: rot.is_right() and not rot.health(0).damaged, 20.0)


def test_without_parity_the_damage_is_shown_and_the_bytes_stay_as_they_are() -> None:
    rot = RestingCluster(nodes=2, parity=0)
    rot.flip(1, Resting("data", 1))
    before = bytes(rot.held(1).data)
    rot.wait(lambda: rot.health(1).damaged == {Resting("data", 1)}, 2 * PERIOD_S)
    rot.pass_time(20.0)
    assert bytes(rot.held(1).data) == before


def test_members_that_can_not_repair_their_chunks_of_one_stripe_leave_each_other_in_peace() -> None:
    rot = RestingCluster(parity=1)
    for node in (1, 2):
        rot.flip(node, Resting("data", 0))  # both of stripe 0: beyond what one parity chunk covers
    rot.pass_time(3 * PERIOD_S)
    first = len(rot.cluster.world.transcript)
    rot.pass_time(20.0)
    reads = [line for line in rot.cluster.world.transcript[first:] if "ReadChunk" in line]
    assert 0 < len(reads) < 100
    assert all(rot.health(node).damaged for node in (1, 2))


@pytest.mark.parametrize("rotten", [1, 2])
def test_several_chunks_of_one_stripe_are_repaired_as_far_as_parity_reaches(rotten: int) -> None:
    rot = RestingCluster(parity=2)
    # Data chunk 0 of each node but the first two lies in stripe 0; their holders must not serve what has rotted.
    for node in range(2, 2 + rotten):
        rot.flip(node, Resting("data", 0))
    rot.wait(rot.is_right, 3 * PERIOD_S)
    assert sum(rot.health(node).repaired_chunks for node in range(4)) == rotten
