"""Snapshots are ordered by attempt first; job names are safe in messages, files and metrics."""

import pytest
from holdfast.protocol.ids import JOB_NAME, SnapshotId
from hypothesis import given
from hypothesis import strategies as st

NUMBERS = st.integers(0, 1 << 62)


@given(left=st.tuples(NUMBERS, NUMBERS), right=st.tuples(NUMBERS, NUMBERS))
def test_a_later_attempt_is_newer_whatever_its_step(left: tuple[int, int], right: tuple[int, int]) -> None:
    assert (SnapshotId(*left) < SnapshotId(*right)) == (left < right)
    assert (SnapshotId(*left) == SnapshotId(*right)) == (left == right)


def test_a_snapshot_says_its_step_and_attempt() -> None:
    assert str(SnapshotId(attempt=3, step=41)) == "step 41 (attempt 3)"


@pytest.mark.parametrize("name", ["a", "tiny-gpt", "A.b_c-9", "x" * 64])
def test_a_job_may_be_called(name: str) -> None:
    assert JOB_NAME.fullmatch(name)


@pytest.mark.parametrize("name", ["", "-a", ".a", "a/b", "a b", "ä", "a\n", "x" * 65])
def test_a_job_may_not_be_called(name: str) -> None:
    assert JOB_NAME.fullmatch(name) is None
