"""Events from other threads, and a descriptor that wakes the worker's loop for them."""

import contextlib
import os
import queue

from holdfast.daemon.core import events

_EVENTS_PER_TURN_MAX = 512  # so that sockets are read in between


class Inbox:
    """Events from other threads, with a descriptor that wakes the loop."""

    def __init__(self) -> None:
        self._events: queue.SimpleQueue[tuple[int, events.Event]] = queue.SimpleQueue()
        self.wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)

    def put(self, epoch: int, event: events.Event) -> None:
        """Add an event of an epoch; callable from any thread."""
        self._events.put((epoch, event))
        os.eventfd_write(self.wake, 1)

    def take(self) -> list[tuple[int, events.Event]]:
        """What has come, bounded; the descriptor stays readable while something is left."""
        found: list[tuple[int, events.Event]] = []
        while len(found) < _EVENTS_PER_TURN_MAX and not self._events.empty():
            found.append(self._events.get())
        if self._events.empty():
            with contextlib.suppress(BlockingIOError):
                os.eventfd_read(self.wake)
            if not self._events.empty():
                os.eventfd_write(self.wake, 1)
        return found
