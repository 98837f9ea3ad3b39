"""What is said of the epoch before, while a cluster grows or shrinks and some nodes still keep its snapshots.

Covers the records; who says what when is in the daemon's core (`epochs`).
"""

from typing import Annotated

from holdfast.protocol import limits
from holdfast.protocol.fields import Count, JobName, Message, Text
from holdfast.protocol.ids import SnapshotId
from holdfast.protocol.layout import Layout
from msgspec import Meta, Struct


class EarlierReport(Struct, frozen=True, forbid_unknown_fields=True):
    """A node still serves the epoch before for these jobs; part of its heartbeat."""

    epoch: Count
    jobs: Annotated[tuple[JobName, ...], Meta(max_length=limits.JOB_COUNT_MAX)] = ()
    reserved_bytes: Count = 0


class EarlierWanted(Message, frozen=True):
    """To a node that serves the epoch before: ask there what the job restores, as if one of your ranks did."""

    job: JobName
    request: Count
    after: Count  # the attempt that begins there gets a number above this one


class EarlierGiven(Message, frozen=True):
    """The answer to EarlierWanted. `snapshot` and `layout` are of `epoch`, whose list the layout counts."""

    job: JobName
    request: Count
    epoch: Count
    attempt: Count
    snapshot: SnapshotId | None
    layout: Layout | None
    problem: Text = ""
