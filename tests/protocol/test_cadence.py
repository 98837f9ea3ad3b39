"""All ranks that remember the same announcements stage the same steps."""

from holdfast.protocol.cadence import Cadence, is_due, remembered
from holdfast.protocol.layout import Layout
from hypothesis import given
from hypothesis import strategies as st

PLAN = Layout((), first_step=3, every=2, version=1)


def due(announced: tuple[Cadence, ...], steps: range) -> list[int]:
    return [step for step in steps if is_due(step, PLAN, announced)]


def test_without_an_announcement_the_plan_holds() -> None:
    assert due((), range(10)) == [3, 5, 7, 9]


def test_an_announced_cadence_begins_at_its_step_and_counts_from_there() -> None:
    wider = Cadence(1, 10, 4)
    assert due((wider,), range(5, 20)) == [5, 7, 9, 10, 14, 18]
    narrower = Cadence(1, 19, 2)
    assert due((narrower, wider), range(10, 24)) == [10, 14, 18, 19, 21, 23]


def test_another_plan_begins_with_its_own_cadence() -> None:
    assert due((Cadence(2, 4, 10),), range(10)) == [3, 5, 7, 9]
    assert remembered((Cadence(1, 4, 10),), Cadence(2, 50, 3)) == (Cadence(2, 50, 3),)


@given(st.lists(st.tuples(st.integers(1, 20), st.integers(1, 8)), max_size=6), st.integers(0, 200))
def test_what_is_forgotten_was_over(pieces: list[tuple[int, int]], step: int) -> None:
    announced: list[Cadence] = []
    kept: tuple[Cadence, ...] = ()
    from_step = 4
    for ahead, every in pieces:
        from_step += ahead
        announced.append(Cadence(1, from_step, every))
        kept = remembered(kept, announced[-1])
        assert len(kept) <= 2
    newest_but_one = announced[-2].from_step if len(announced) > 1 else 0
    if step >= newest_but_one:
        assert is_due(step, PLAN, kept) == is_due(step, PLAN, announced)
