"""Being told to stop: every signal that asks for an end becomes one exception, and cleaning up is not disturbed.

Covers this process's signal handlers, which only the main thread may change.
"""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

ENDING_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class StopAskedError(KeyboardInterrupt):
    """SIGINT, SIGTERM or SIGHUP has come. A KeyboardInterrupt, so that nothing takes it for a fault."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


@contextmanager
def ending_signals_raise() -> Iterator[None]:
    """Inside, a signal that asks for an end raises StopAskedError in the main thread."""
    before = [signal.signal(number, _stop) for number in ENDING_SIGNALS]
    try:
        yield
    finally:
        for number, handler in zip(ENDING_SIGNALS, before, strict=True):
            signal.signal(number, handler)


@contextmanager
def ending_signals_wait() -> Iterator[None]:
    """Inside, these signals are put off: what is under way (cleaning up, which is bounded) is finished first."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ENDING_SIGNALS)
    try:
        yield
    finally:
        for _ in ENDING_SIGNALS:  # whoever sent another one wanted just what has been done
            signal.sigtimedwait(ENDING_SIGNALS, 0)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _stop(number: int, _frame: FrameType | None) -> NoReturn:
    raise StopAskedError(number)
