"""Each moment of a stall belongs to one part, and is told once."""

import pytest
from holdfast.client import stalls as file
from holdfast.client.stalls import PARTS, Stalls


class Clock:
    """Time that moves when it is told to."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(file, "monotonic", made)
    return made


def nonzero(parts: dict[str, float]) -> dict[str, float]:
    return {name: seconds for name, seconds in parts.items() if seconds}


def test_parts_add_up_within_a_step_and_over_all(clock: Clock) -> None:
    stalls = Stalls()
    for _ in range(2):
        stalls.begin(step=True)
        clock.now_s += 2  # waits: the slot came after half a second
        stalls.waited(clock.now_s - 1.5)
        with stalls.part("capture"):
            clock.now_s += 4
            with stalls.part("plan"):
                clock.now_s += 8
            clock.now_s += 16
        clock.now_s += 32
        stalls.end()
        clock.now_s += 1000  # training
        stalls.begin(step=False)
        clock.now_s += 64
        stalls.waited(clock.now_s - 999)  # the slot was there long before
        stalls.end()
        clock.now_s += 1000
    last = {"slot": 0.5, "copy": 65.5, "capture": 20.0, "plan": 8.0, "other": 32.0}
    assert nonzero(stalls.parts()["last"]) == last
    assert nonzero(stalls.parts()["total"]) == {name: 2 * seconds for name, seconds in last.items()}
    assert stalls.last_s == sum(last.values())
    assert stalls.total_s == 2 * stalls.last_s
    assert tuple(stalls.parts()["last"]) == PARTS


def test_a_slot_that_has_not_come_is_all_that_was_waited_for(clock: Clock) -> None:
    stalls = Stalls()
    stalls.begin(step=True)
    clock.now_s += 3
    stalls.waited(None)
    stalls.end()
    assert nonzero(stalls.parts()["last"]) == {"slot": 3.0}


def test_what_no_training_waits_for_counts_nowhere(clock: Clock) -> None:
    stalls = Stalls()
    with stalls.part("plan"):  # a restore plans early
        clock.now_s += 5
    stalls.waited(None)  # close() waits for what is under way
    assert nonzero(stalls.parts()["total"]) == {}
    assert stalls.total_s == 0


def test_each_moment_is_told_once_the_present_stall_included(clock: Clock) -> None:
    stalls = Stalls()
    stalls.begin(step=True)
    clock.now_s += 1
    assert stalls.take_untold_s() == 1
    clock.now_s += 2
    stalls.end()
    clock.now_s += 50
    stalls.begin(step=True)
    clock.now_s += 4
    assert stalls.take_untold_s() == 6
    stalls.end()
    assert stalls.take_untold_s() == 0
