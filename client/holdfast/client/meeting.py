"""Meeting a daemon again on a thread of its own: a try may last seconds, and training waits for whoever tries."""

import contextlib
import threading
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError

from holdfast.client.link import Link

_LOOK_S = 0.05  # a daemon of this host has answered by then


class Meeting:
    """One try. `outcome` and `drop` by whoever made it; what it connects is that one's from the outcome on."""

    def __init__(self, connect: Callable[[], Link]) -> None:
        """Begin with it. `connect` touches nothing that others use meanwhile."""
        self._found: Future[Link] = Future()
        threading.Thread(target=self._meet, args=(connect,), name="holdfast-meeting", daemon=True).start()

    def _meet(self, connect: Callable[[], Link]) -> None:
        try:
            link = connect()
        except Exception as error:  # noqa: BLE001  # raised where the outcome is asked for
            self._found.set_exception(error)
        else:
            self._found.set_result(link)

    def outcome(self) -> Link | None:
        """The link; None while the try goes on, after a moment. Raises what connecting raised."""
        with contextlib.suppress(FutureTimeoutError):
            return self._found.result(timeout=_LOOK_S)
        return None

    def drop(self) -> None:
        """Nobody wants it any more: close the link, now or as soon as it is there."""
        self._found.add_done_callback(_close)


def _close(found: "Future[Link]") -> None:
    if found.exception() is None:
        found.result().close()
