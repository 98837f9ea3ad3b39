"""What is measured of steps and snapshots: waiting for a slot is no training."""

import pytest
from holdfast.daemon.core.pace import Pace
from holdfast.protocol.ids import SnapshotId


def ns(seconds: float) -> int:
    return int(seconds * 1e9)


def test_a_step_is_measured_from_a_grant_to_the_next_wish() -> None:
    pace = Pace()
    pace.begun(0, 5, ns(1.0))
    pace.granted(0, SnapshotId(1, 5), ns(1.5))
    assert pace.waited_s == pytest.approx(0.5)
    pace.begun(0, 7, ns(3.5))
    assert pace.step_s == pytest.approx(1.0), "two steps in two seconds; the half second before was waiting"


def test_a_wish_that_had_to_wait_for_the_way_counts_from_when_it_was_one() -> None:
    """A rank over a slow network: its wish reaches the node when the bytes of the one before are through."""
    pace = Pace()
    pace.begun(0, 0, ns(0.0))
    pace.granted(0, SnapshotId(1, 0), ns(0.0))
    pace.begun(0, 1, ns(1.0))
    pace.granted(0, SnapshotId(1, 1), ns(6.0))
    assert pace.step_s == pytest.approx(1.0)
    assert pace.waited_s == pytest.approx(5.0), "so the job is told to stage more rarely"
    pace.begun(0, 2, ns(5.5))  # training went on meanwhile: nothing is measured
    assert pace.step_s == pytest.approx(1.0)


def test_a_wish_that_was_never_granted_ends_no_measurement() -> None:
    pace = Pace()
    pace.begun(0, 0, ns(0.0))
    pace.granted(0, SnapshotId(1, 0), ns(0.0))
    pace.begun(0, 1, ns(1.0))
    pace.begun(0, 2, ns(11.0))  # skipped after ten seconds without a slot
    assert pace.step_s == pytest.approx(1.0)


def test_a_snapshot_takes_from_its_first_grant_to_its_commit() -> None:
    pace = Pace()
    for role, seconds in ((0, 1.0), (1, 1.2)):
        pace.begun(role, 5, ns(seconds))
        pace.granted(role, SnapshotId(1, 5), ns(seconds))
    pace.committed(SnapshotId(1, 5), ns(3.0))
    assert pace.cycle_s == pytest.approx(2.0)
    assert not pace.opened_ns
    pace.committed(SnapshotId(1, 6), ns(9.0))  # a node without ranks hears of commits that it never granted
    assert pace.cycle_s == pytest.approx(2.0)


def test_the_longest_wait_for_one_snapshot_counts() -> None:
    pace = Pace()
    pace.begun(0, 5, ns(1.0))
    pace.begun(1, 5, ns(1.0))
    pace.granted(0, SnapshotId(1, 5), ns(1.4))
    pace.granted(1, SnapshotId(1, 5), ns(1.1))
    assert pace.waited_s == pytest.approx(0.4)
    pace.begun(0, 6, ns(2.0))
    pace.granted(0, SnapshotId(1, 6), ns(2.0))
    assert pace.waited_s == 0.0
