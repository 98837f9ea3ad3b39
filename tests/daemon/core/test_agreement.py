"""Parity that is wrong although all digests are right is found by comparing fingerprints, and encoded anew."""

import pytest
from holdfast.daemon.core.health import Resting
from holdfast.protocol.health import WantFingerprints
from sim.rot import PERIOD_S, RestingCluster


@pytest.mark.parametrize("parity", [1, 2])
def test_wrong_parity_with_a_right_digest_is_found_and_encoded_anew(parity: int) -> None:
    rot = RestingCluster(parity=parity)
    rot.pass_time(PERIOD_S)
    for node in range(4):
        for wanted in rot.chunks(node):
            if wanted.kind == "parity":
                rot.flip(node, wanted, with_digest=True)
                rot.wait(rot.is_right, 3 * PERIOD_S)
    assert sum(rot.health(node).disagreeing_stripes for node in range(4)) >= sum(
        wanted.kind == "parity" for node in range(4) for wanted in rot.chunks(node)
    )
    assert not any(rot.health(node).damaged for node in range(4))


def test_both_parity_chunks_of_a_stripe_are_encoded_anew() -> None:
    rot = RestingCluster(parity=2)
    rot.flip(0, Resting("parity", 0), with_digest=True)  # stripe 0
    rot.flip(1, Resting("parity", 0), with_digest=True)
    rot.wait(rot.is_right, 3 * PERIOD_S)


def test_data_whose_holder_takes_it_for_right_is_named_by_the_syndrome_and_repaired() -> None:
    rot = RestingCluster(parity=2)
    rot.pass_time(PERIOD_S)
    for node in range(4):
        rot.flip(node, Resting("data", 1), with_digest=True)
        rot.wait(rot.is_right, 3 * PERIOD_S)


def test_a_group_that_is_not_whole_compares_nothing_and_goes_on_later() -> None:
    rot = RestingCluster(parity=2)
    rot.cluster.machines[2].crash_worker()
    rot.pass_time(3 * PERIOD_S)
    rot.flip(0, Resting("parity", 0), with_digest=True)
    rot.pass_time(2 * PERIOD_S)
    assert not rot.is_right()
    rot.cluster.machines[2].boot()
    rot.wait(rot.is_right, 4 * PERIOD_S)


def test_an_answer_to_a_question_that_was_replaced_is_dropped() -> None:
    rot = RestingCluster(parity=1)
    rot.pass_time(PERIOD_S)  # the running comparison is over, and the next one far
    slot, worker = rot.slot(0), rot.cluster.machines[0].worker
    assert slot is not None
    assert slot.snapshot is not None
    assert worker is not None
    agreement = worker.node.jobs["a"].healing.agreement
    wanted = WantFingerprints("a", slot.snapshot, (0, 1))
    agreement.wanted(1, wanted)
    (first,) = [ticket for ticket, (asker, _, _) in agreement.asked.items() if asker == 1]
    agreement.wanted(1, wanted)  # before the first has been read
    (second,) = [ticket for ticket, (asker, _, _) in agreement.asked.items() if asker == 1]
    assert second != first
    agreement.read(first, (), (b"x" * 256, b"x" * 256))
    assert second in agreement.asked, "the newer question is still to be answered"
