"""Which snapshots training waits for, and for how many at once."""

from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import pytest
from holdfast.client.errors import SnapshotSkippedError
from holdfast.client.stager import Marks
from holdfast.client.stalls import Stalls
from holdfast.client.underway import SLACK_S, STAGED_AT_ONCE, Staging, Underway
from holdfast.protocol.ids import SnapshotId


def done(error: Exception | None = None) -> "Future[None]":
    future: Future[None] = Future()
    if error is None:
        future.set_result(None)
    else:
        future.set_exception(error)
    return future


def staging(
    step: int, *, on_host: bool, started: "Future[None]", ended: "Future[None]", goes_on: bool = False
) -> tuple[Staging, list[str]]:
    """`goes_on`: its copy has ended, and its bytes have yet to be sent; else the copy ends with all of it."""
    called: list[str] = []
    capture: Any = SimpleNamespace(on_host=on_host, hold_updates=lambda: called.append("hold"))
    copied: Future[bool] = Future()
    if goes_on or ended.done():
        copied.set_result(goes_on)
    return Staging(SnapshotId(1, step), capture, Marks(started=started, copied=copied), ended), called


def test_what_the_host_copies_is_waited_for_and_then_forgotten() -> None:
    underway = Underway(Stalls(), max_stall_s=5.0)
    one, called = staging(1, on_host=True, started=done(), ended=done(SnapshotSkippedError("torn")))
    underway.add(one)
    assert [str(problem) for problem in underway.let_change()] == ["torn"]
    assert underway.let_change() == []
    assert called == []


def test_what_a_device_copies_holds_the_update_on_the_device_and_goes_on() -> None:
    underway = Underway(Stalls(), max_stall_s=5.0)
    ended: Future[None] = Future()
    one, called = staging(1, on_host=False, started=done(), ended=ended)
    underway.add(one)
    assert underway.let_change() == []
    assert called == ["hold"]
    ended.set_exception(SnapshotSkippedError("late"))
    assert [str(problem) for problem in underway.let_change()] == ["late"]
    assert underway.end_all() == []


def test_what_was_copied_and_is_still_being_sent_holds_up_no_update_but_the_next_snapshots() -> None:
    underway = Underway(Stalls(), max_stall_s=5.0)
    ended: Future[None] = Future()
    one, _ = staging(1, on_host=True, started=done(), ended=ended, goes_on=True)
    underway.add(one)
    assert underway.let_change() == []
    assert underway.make_room() == []
    ended.set_exception(SnapshotSkippedError("the link broke"))
    assert [str(problem) for problem in underway.let_change()] == ["the link broke"]
    assert underway.end_all() == []


def test_room_is_made_by_the_oldest_and_all_end_in_order() -> None:
    underway = Underway(Stalls(), max_stall_s=5.0)
    for step in range(STAGED_AT_ONCE + 1):
        one, _ = staging(step, on_host=False, started=done(), ended=done(SnapshotSkippedError(f"step {step}")))
        underway.add(one)
    assert [str(problem) for problem in underway.make_room()] == ["step 0", "step 1"]
    assert [str(problem) for problem in underway.end_all()] == ["step 2"]


def test_nobody_is_waited_for_beyond_the_bound() -> None:
    underway = Underway(Stalls(), max_stall_s=-SLACK_S)  # the bound has passed
    one, _ = staging(3, on_host=True, started=done(), ended=Future())
    underway.add(one)
    (problem,) = underway.let_change()
    assert "is skipped: not staged within" in str(problem)


def test_what_takes_long_on_its_way_is_not_skipped_for_that() -> None:
    underway = Underway(Stalls(), max_stall_s=-SLACK_S)
    one, _ = staging(3, on_host=True, started=done(), ended=Future(), goes_on=True)
    underway.add(one)
    assert underway.let_change() == []
    assert underway.end_all() == []


def test_what_else_goes_wrong_is_raised() -> None:
    underway = Underway(Stalls(), max_stall_s=5.0)
    one, _ = staging(1, on_host=True, started=done(), ended=done(MemoryError("none left")))
    underway.add(one)
    with pytest.raises(MemoryError, match="none left"):
        underway.let_change()
