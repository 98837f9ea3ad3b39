"""The snapshots that a rank has under way, and how the training thread waits for them.

Covers how long an update, or the next snapshot, is held up by copies that go on. What copies is `Capture`, on the
thread of `Stager`; what is done about a snapshot that comes to nothing is the Snapshotter's.
"""

import contextlib
from collections import deque
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import dataclass

from holdfast.client.capture import Capture
from holdfast.client.errors import SnapshotSkippedError
from holdfast.client.stager import Marks
from holdfast.client.stalls import Stalls
from holdfast.protocol.ids import SnapshotId

STAGED_AT_ONCE = 2  # one that a GPU is copying, and the next: the host runs ahead of the device by a step at most
SLACK_S = 1.0  # beyond the bound that the staging thread keeps: for a copy that is under way when it passes


@dataclass(frozen=True, slots=True)
class Staging:
    """A snapshot that this rank is staging."""

    snapshot: SnapshotId
    capture: Capture
    marks: Marks
    ended: "Future[None]"  # sealed or skipped


class Underway:
    """What is being staged, the oldest first. Training thread only.

    Each method returns why snapshots that ended meanwhile were skipped: to be told.
    """

    def __init__(self, stalls: Stalls, *, max_stall_s: float) -> None:
        self._stalls, self._max_stall_s = stalls, max_stall_s
        self._staging: deque[Staging] = deque()

    def add(self, staging: Staging) -> None:
        """One more is on its way."""
        self._staging.append(staging)

    def let_change(self) -> list[SnapshotSkippedError]:
        """Make the state free to change: the host waits for what it copies itself, devices for their own copies."""
        skipped: list[SnapshotSkippedError] = []
        for staging in list(self._staging):
            if staging.capture.on_host:
                skipped += self._let_host_change(staging)
                continue
            with contextlib.suppress(FutureTimeoutError):
                self._await(staging, staging.marks.started)
            staging.capture.hold_updates()
            if staging.ended.done():
                self._staging.remove(staging)
                skipped += self._end(staging, staging.ended)
        return skipped

    def _let_host_change(self, staging: Staging) -> list[SnapshotSkippedError]:
        skipped = self._end(staging, staging.marks.copied)
        if not skipped and staging.marks.copied.result() and not staging.ended.done():
            return []  # its bytes are on their way to a daemon that can't see this memory
        self._staging.remove(staging)
        return skipped or self._end(staging, staging.ended)

    def make_room(self) -> list[SnapshotSkippedError]:
        """Wait until one more may be staged."""
        return self._end_until(STAGED_AT_ONCE - 1)

    def end_all(self) -> list[SnapshotSkippedError]:
        """Wait until every one is sealed or skipped."""
        return self._end_until(0)

    def _end_until(self, left_count: int) -> list[SnapshotSkippedError]:
        skipped: list[SnapshotSkippedError] = []
        while len(self._staging) > left_count:
            staging = self._staging.popleft()
            skipped += self._end(staging, staging.ended)
        return skipped

    def _end(self, staging: Staging, future: "Future[None] | Future[bool]") -> list[SnapshotSkippedError]:
        try:
            self._await(staging, future)
        except FutureTimeoutError:
            if staging.marks.copied.done() and staging.marks.copied.result():
                return []  # it is whole, and its bytes are still on their way: it may commit, and holds up no longer
            # The copy goes on into a slot that nobody will seal: its version check finds the update that happens now.
            text = f"{staging.snapshot} is skipped: not staged within {self._max_stall_s} s"
            return [SnapshotSkippedError(text)]
        except SnapshotSkippedError as error:
            return [error]
        return []

    def _await(self, staging: Staging, future: "Future[None] | Future[bool]") -> None:
        granted = staging.marks.granted
        try:
            future.result(timeout=self._max_stall_s + SLACK_S)
        finally:
            self._stalls.waited(granted.result() if granted.done() else None)
