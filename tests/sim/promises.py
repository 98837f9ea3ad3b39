"""What a simulation raises when a promise is broken, and the name of a snapshot in its books."""

from holdfast.protocol.ids import SnapshotId

JobSnapshot = tuple[str, SnapshotId]


class BrokenPromiseError(AssertionError):
    """A simulated cluster did what it must never do."""


def promise(kept: object, text: str) -> None:
    """Raise if a promise is not kept."""
    if not kept:
        raise BrokenPromiseError(text)
