"""Traces of node losses: their text, and their replay against a brute-force one."""

import pytest
from holdfast.protocol.failure_trace import Loss, read_trace, replay
from hypothesis import given
from hypothesis import strategies as st

PAIRS = ((0, 1), (2, 3))


def test_a_trace_is_read_line_by_line() -> None:
    text = "# hours,node\n\n0,3\n1.5 0\n1.5,\t2\n"
    assert read_trace(text, node_count=4) == [Loss(0.0, 3), Loss(1.5, 0), Loss(1.5, 2)]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "found none"),
        ("1,0\nx,1", "line 2: expected HOURS,NODE"),
        ("1", "line 1: expected HOURS,NODE"),
        ("1,0,0", "line 1: expected HOURS,NODE"),
        ("nan,0", "line 1: expected HOURS,NODE"),
        ("-1,0", "line 1: expected HOURS,NODE"),
        ("1,4", "line 1: expected a node from 0 to 3, found 4"),
        ("2,0\n1,1", "line 2: expected a time of at least 2 h, found 1 h"),
    ],
)
def test_what_is_no_trace_is_refused(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        read_trace(text, node_count=4)


def test_losses_that_overlap_in_a_group_lose_state() -> None:
    trace = [Loss(0.0, 0), Loss(0.5, 2), Loss(1.0, 1), Loss(10.0, 0), Loss(12.0, 1)]
    found = replay(trace, groups=PAIRS, parity=1, repair_h=2.0)
    assert (found.node_losses, found.hours, found.worst) == (5, 12.0, 2)
    assert found.state_losses == (1.0,)  # at 12.0 node 0 is back already
    assert replay(trace, groups=PAIRS, parity=1, repair_h=2.1).state_losses == (1.0, 12.0)
    assert replay(trace, groups=((0, 1, 2, 3),), parity=2, repair_h=2.0).state_losses == (1.0,)


def test_a_node_that_is_lost_again_is_one_node() -> None:
    found = replay([Loss(0.0, 0), Loss(1.0, 0)], groups=PAIRS, parity=1, repair_h=2.0)
    assert (found.worst, found.state_losses) == (1, ())
    assert replay([Loss(0.0, 0), Loss(1.0, 0), Loss(2.5, 1)], groups=PAIRS, parity=1, repair_h=2.0).worst == 2


@given(
    st.lists(st.tuples(st.integers(0, 40), st.integers(0, 5)), min_size=1, max_size=30),
    st.integers(0, 2),
    st.integers(1, 10),
)
def test_replay_counts_what_is_away_at_each_loss(events: list[tuple[int, int]], parity: int, repair_h: int) -> None:
    trace = [Loss(float(time_h), node) for time_h, node in sorted(events)]
    groups = ((0, 1, 2), (3, 4, 5))
    worst, lost = 0, []
    for index, loss in enumerate(trace):
        group = groups[loss.node // 3]
        ends = {one.node: one.time_h + repair_h for one in trace[:index] if one.node in group}
        before = {node for node, end_h in ends.items() if end_h > loss.time_h}
        after = before | {loss.node}
        worst = max(worst, len(after))
        if len(after) > parity and after != before:
            lost.append(loss.time_h)
    found = replay(trace, groups=groups, parity=parity, repair_h=repair_h)
    assert (found.worst, list(found.state_losses)) == (worst, lost)
