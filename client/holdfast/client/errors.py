"""Errors of the conversation with the daemon and of restoring. Errors about the state itself are in `state_errors`."""

from holdfast.protocol.ids import SnapshotId


class HoldfastError(Exception):
    """Base of everything that a Snapshotter raises about protection."""


class SupersededError(HoldfastError):
    """The snapshot that was being read was released, since `newest` is committed: ask again and start over."""

    def __init__(self, text: str, *, newest: SnapshotId) -> None:
        super().__init__(text)
        self.newest = newest


class DaemonUnreachableError(HoldfastError):
    """No daemon answers on the socket."""


class RefusedError(HoldfastError):
    """The daemon refused a request; the text is the daemon's. `retry` says that asking again may help."""

    def __init__(self, text: str, *, exit_code: int, retry: bool = False) -> None:
        super().__init__(text)
        self.exit_code = exit_code
        self.retry = retry


class NotRecoverableError(HoldfastError):
    """Something is committed, and it can't be restored. Raised whatever `on_error` says."""


class CommitTimeoutError(HoldfastError):
    """A snapshot was not committed within the time given."""


class SnapshotSkippedError(HoldfastError):
    """A snapshot was skipped or given up; the text says why. Raised only with on_error="raise"."""


class RanksDisagreeError(HoldfastError):
    """The ranks of one job don't agree on what to protect; the text names them."""
