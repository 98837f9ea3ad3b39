"""Identifiers that must not be swapped for one another. Covers names only; rules live with their owners."""

import re
from typing import Annotated, NewType

import msgspec
from holdfast.protocol import limits
from msgspec import Meta

NodeIndex = NewType("NodeIndex", int)  # 0..N-1: a logical slot of the cluster, in the order of the config file
Role = NewType("Role", int)  # 0..world_size-1: a rank's position in the parallel layout
MemberIndex = NewType("MemberIndex", int)  # 0..n-1: a node's position inside its group

JOB_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


class SnapshotId(msgspec.Struct, frozen=True, order=True, array_like=True):
    """One snapshot of one job. Ordered: a later attempt is newer whatever its step.

    A job that restarts without restoring begins again at step 0, so the step alone does not say which is newer.
    """

    attempt: Annotated[int, Meta(ge=0, le=limits.STEP_MAX)]
    step: Annotated[int, Meta(ge=0, le=limits.STEP_MAX)]

    def __str__(self) -> str:
        return f"step {self.step} (attempt {self.attempt})"
