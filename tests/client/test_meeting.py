"""A try to meet a daemon holds up nobody; what it finds is had once, and closed where nobody wants it any more."""

import threading
from types import SimpleNamespace
from typing import Any

import pytest
from holdfast.client.errors import DaemonUnreachableError
from holdfast.client.meeting import Meeting

DEADLINE_S = 20.0


class Slow:
    """Connects once it is told to."""

    def __init__(self, error: Exception | None = None) -> None:
        self.go_on, self.closed, self.error = threading.Event(), threading.Event(), error
        self.link: Any = SimpleNamespace(close=self.closed.set)

    def connect(self) -> Any:
        self.go_on.wait(DEADLINE_S)
        if self.error is not None:
            raise self.error
        return self.link


def outcome(meeting: Meeting) -> Any:
    for _ in range(1000):
        if (found := meeting.outcome()) is not None:
            return found
    raise AssertionError("no outcome")


def test_nothing_is_known_while_it_is_tried_and_then_the_link() -> None:
    slow = Slow()
    meeting = Meeting(slow.connect)
    assert meeting.outcome() is None
    slow.go_on.set()
    assert outcome(meeting) is slow.link
    assert not slow.closed.is_set()


def test_what_connecting_raised_is_raised() -> None:
    slow = Slow(DaemonUnreachableError("nobody there"))
    slow.go_on.set()
    with pytest.raises(DaemonUnreachableError, match="nobody there"):
        outcome(Meeting(slow.connect))


def test_a_link_that_nobody_wants_any_more_is_closed_when_it_comes() -> None:
    slow = Slow()
    meeting = Meeting(slow.connect)
    meeting.drop()
    assert not slow.closed.is_set()
    slow.go_on.set()
    assert slow.closed.wait(DEADLINE_S)
    failed = Slow(DaemonUnreachableError("nobody there"))
    Meeting(failed.connect).drop()
    failed.go_on.set()
