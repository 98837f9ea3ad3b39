"""Reading bytes of a committed snapshot through any node's daemon, with no rank, no attempt and nobody in a lost slot.

Covers one reader's conversation: what is committed, and any range of any role's shard, lent as memory. The daemon
fetches, or computes from what the others hold, and verifies; a lost node costs time, not bytes. One thread.
"""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from holdfast.client.addresses import connect, daemon_address
from holdfast.client.errors import DaemonUnreachableError, NotRecoverableError, RefusedError, SupersededError
from holdfast.client.link import Link
from holdfast.protocol import limits, messages
from holdfast.protocol.exit_codes import ExitCode
from holdfast.protocol.ids import SnapshotId
from holdfast.protocol.layout import Layout

RETRY_S = 0.1  # between two tries of what may work in a moment
DEFAULT_TIMEOUT_S = 60.0


@dataclass(frozen=True, slots=True)
class Committed:
    """What can be read of a job: its newest committed snapshot, and who staged how much."""

    attempt: int
    snapshot: SnapshotId
    layout: Layout


class RangeReader:
    """Reads a job's committed snapshot by ranges of bytes. Use as a context manager."""

    def __init__(
        self,
        *,
        job: str,
        socket: str | os.PathLike[str] | None = None,
        timeout_s: float = DEFAULT_TIMEOUT_S,
    ) -> None:
        """Connect to a daemon.

        Args:
            job: the job's name.
            socket: the daemon's, of any node; found like a Snapshotter's if not given.
            timeout_s: how long one call may take in all, retries included.

        Raises:
            DaemonUnreachableError: nobody answers there.
        """
        self.job, self.timeout_s = job, timeout_s
        self._path = daemon_address(socket, local_rank=0)
        self._wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._requests = 0
        self._found: Committed | None = None
        self._link: Link | None = None
        try:
            self._attached()
        except DaemonUnreachableError:
            os.close(self._wake_fd)
            raise

    def __enter__(self) -> "RangeReader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the conversation. Views that were lent are not to be used any more."""
        self._detach()
        if self._wake_fd >= 0:
            os.close(self._wake_fd)
            self._wake_fd = -1

    @property
    def layout(self) -> Layout:
        """The layout of the snapshot that `committed` found."""
        return self._known().layout

    def committed(self) -> Committed | None:
        """Ask for the newest committed snapshot that can be read, and read that one from now on.

        Returns:
            None if nothing is committed. Begins no attempt and pins nothing.

        Raises:
            NotRecoverableError: something is committed, and too much of it is lost.
            DaemonUnreachableError: no answer within the timeout.
        """
        deadline_s = time.monotonic() + self.timeout_s
        while True:
            try:
                answer = self._ask_committed(deadline_s)
                break
            except (DaemonUnreachableError, RefusedError) as error:
                self._pause(error, deadline_s)
        if answer.problem:
            raise NotRecoverableError(f"job {self.job}: {answer.problem}")
        if answer.snapshot is None or answer.layout is None:
            self._found = None
        else:
            self._found = Committed(answer.attempt, answer.snapshot, answer.layout)
        return self._found

    def _ask_committed(self, deadline_s: float) -> messages.CommittedAnswer:
        link = self._attached()
        session = link.session
        session.ask("AskCommitted")
        link.send(messages.AskCommitted(self.job))
        link.until(
            lambda: session.committed_answer is not None or "AskCommitted" in session.denied, deadline_s=deadline_s
        )
        if session.committed_answer is not None:
            return session.committed_answer
        denied = session.denied.get("AskCommitted")
        if denied is not None:
            raise RefusedError(denied.text, exit_code=denied.exit_code, retry=denied.retry)
        raise DaemonUnreachableError(f"the daemon on {self._path} did not say what is committed")

    @contextmanager
    def read(self, role: int, offset_bytes: int, length_bytes: int) -> Iterator[memoryview]:
        """Borrow bytes of a role's shard of the snapshot that `committed` found.

        Args:
            role: whose shard.
            offset_bytes: from the start of the shard.
            length_bytes: 1 to READ_RANGE_BYTES_MAX (64 MiB); `read_into` takes more.

        Yields:
            A read-only view of exactly these bytes; the daemon owns the memory and lends it until the block ends.

        Raises:
            SupersededError: the snapshot was released; call `committed` again and start over.
            NotRecoverableError: too much is lost, with the nodes' names.
            RefusedError: outside the shard, or over the memory budget.
            DaemonUnreachableError: not there within the timeout.
        """
        if not 0 < length_bytes <= limits.READ_RANGE_BYTES_MAX:
            raise ValueError(
                f"expected 1 to {limits.READ_RANGE_BYTES_MAX} bytes at once, found {length_bytes}; use read_into"
            )
        deadline_s = time.monotonic() + self.timeout_s
        while True:
            try:
                ready, link = self._open(role, offset_bytes, length_bytes, deadline_s)
                break
            except (DaemonUnreachableError, RefusedError) as error:
                self._pause(error, deadline_s)
        memory = link.memory(self.job, ready.slot, ready.generation)
        assert memory is not None, "_open has waited for it"
        try:
            yield memory[ready.offset_bytes : ready.offset_bytes + ready.length_bytes].toreadonly()
        finally:
            link.session.forget_range(ready.request)
            if link is self._link:
                link.send(messages.CloseRange(ready.request))

    def read_into(self, role: int, offset_bytes: int, target: memoryview | bytearray) -> None:
        """Fill `target` with bytes of a role's shard, however many. Raises what `read` raises."""
        view = memoryview(target).cast("B")
        for start in range(0, len(view), limits.READ_RANGE_BYTES_MAX):
            piece = view[start : start + limits.READ_RANGE_BYTES_MAX]
            with self.read(role, offset_bytes + start, len(piece)) as found:
                piece[:] = found

    def _open(
        self, role: int, offset_bytes: int, length_bytes: int, deadline_s: float
    ) -> tuple[messages.RangeReady, Link]:
        link = self._attached()
        session = link.session
        self._requests += 1
        request = self._requests
        wish = messages.ReadRange(self.job, self._known().snapshot, role, offset_bytes, length_bytes, request)
        link.send(wish)

        def done() -> bool:
            ready = session.ranges_ready.get(request)
            here = ready is not None and link.memory(self.job, ready.slot, ready.generation) is not None
            return here or request in session.ranges_denied

        link.until(done, deadline_s=deadline_s)
        ready, denied = session.ranges_ready.get(request), session.ranges_denied.get(request)
        if denied is not None:
            session.forget_range(request)
            raise self._refusal(denied)
        if ready is None or not done():
            session.forget_range(request)
            link.send(messages.CloseRange(request))
            raise DaemonUnreachableError(f"the daemon on {self._path} did not read role {role} within the timeout")
        end = ready.offset_bytes + ready.length_bytes
        link.bring((self.job, ready.slot, ready.generation), ready.offset_bytes, end)
        return ready, link

    def _refusal(self, denied: messages.RangeDenied) -> Exception:
        if denied.superseded_by is not None:
            return SupersededError(denied.text, newest=denied.superseded_by)
        if denied.exit_code == ExitCode.NOT_RECOVERABLE and not denied.retry:
            return NotRecoverableError(denied.text)
        return RefusedError(denied.text, exit_code=denied.exit_code, retry=denied.retry)

    def _known(self) -> Committed:
        if self._found is None:
            raise ValueError("nothing is known to be committed; call committed() first")
        return self._found

    def _pause(self, error: Exception, deadline_s: float) -> None:
        """Wait a little before the next try; raise if there is none."""
        if isinstance(error, RefusedError) and not error.retry:
            raise error
        if time.monotonic() + RETRY_S >= deadline_s:
            raise error
        if isinstance(error, DaemonUnreachableError):
            self._detach()  # a worker that died comes back under the same path
        time.sleep(RETRY_S)

    def _attached(self) -> Link:
        if self._link is None:
            self._link = connect(self._path, wake_fd=self._wake_fd)
        return self._link

    def _detach(self) -> None:
        link, self._link = self._link, None
        if link is not None:
            link.close()
