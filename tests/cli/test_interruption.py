"""Signals that ask for an end: raised while working, put off while cleaning up."""

import signal

import pytest
from holdfast.cli.interruption import ENDING_SIGNALS, StopAskedError, ending_signals_raise, ending_signals_wait


@pytest.mark.parametrize("number", ENDING_SIGNALS)
def test_a_signal_is_raised_and_the_handlers_come_back(number: signal.Signals) -> None:
    before = [signal.getsignal(one) for one in ENDING_SIGNALS]
    with pytest.raises(StopAskedError, match=number.name) as raised, ending_signals_raise():
        signal.raise_signal(number)
    assert raised.value.number == number
    assert [signal.getsignal(one) for one in ENDING_SIGNALS] == before


def test_cleaning_up_is_not_disturbed() -> None:
    done = []
    with ending_signals_raise():
        with ending_signals_wait():
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGINT)
            done.append("cleaned up")
        done.append("went on")
    assert done == ["cleaned up", "went on"]
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, []) & set(ENDING_SIGNALS)
