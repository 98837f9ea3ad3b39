"""Lives in the training process: the step hook, staging and restore. The only room that imports torch."""

from holdfast.client.errors import (
    CommitTimeoutError,
    DaemonUnreachableError,
    HoldfastError,
    NotRecoverableError,
    RanksDisagreeError,
    RefusedError,
    SnapshotSkippedError,
    SupersededError,
)
from holdfast.client.snapshotter import Snapshotter

__all__ = [
    "CommitTimeoutError",
    "DaemonUnreachableError",
    "HoldfastError",
    "NotRecoverableError",
    "RanksDisagreeError",
    "RefusedError",
    "SnapshotSkippedError",
    "Snapshotter",
    "SupersededError",
]
