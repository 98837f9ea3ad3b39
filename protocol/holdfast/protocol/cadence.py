"""Which steps are staged: the plan's cadence, and the wider ones that the collector announces while training goes on.

A cadence that some ranks follow and others don't costs snapshots, never correctness: what not all ranks stage can't
commit. So it is announced from a step far enough ahead, and who hears of it too late follows from then on.
"""

from collections.abc import Sequence
from typing import Annotated

from holdfast.protocol.fields import Count, Every, JobName, Message, Seconds
from holdfast.protocol.ids import SnapshotId
from holdfast.protocol.layout import Layout
from msgspec import Meta, Struct


class Cadence(Struct, frozen=True, array_like=True):
    """From `from_step` on every `every`-th step is staged, counted from `from_step`, until a newer one begins.

    `version` is the version of the plan that it belongs to: another plan begins with its own cadence.
    """

    version: Count
    from_step: Count
    every: Every


class PaceReport(Struct, frozen=True):
    """How fast a node's ranks train and its snapshots commit; part of every heartbeat. 0.0: not measured yet."""

    begun: SnapshotId | None = None  # the newest that a rank here wanted to stage
    step_s: Seconds = 0.0  # of a training step here, without waiting for a slot
    cycle_s: Seconds = 0.0  # of a snapshot here, from its first grant to its commit
    waited_s: Seconds = 0.0  # for the slot of the newest snapshot granted here
    cadences: Annotated[tuple[Cadence, ...], Meta(max_length=2)] = ()  # in force, and announced, for the newest plan


class CadenceAnnounced(Message, frozen=True):
    """The job stages more rarely, or more often again, from a step on. Nodes hear of it by heartbeats."""

    job: JobName
    attempt: Count
    cadence: Cadence


def is_due(step: int, plan: Layout, announced: Sequence[Cadence]) -> bool:
    """Whether `step` is staged.

    Args:
        step: the step that is done.
        plan: the plan in force.
        announced: what was announced for it, in any order; those of other plans are ignored.
    """
    begun = [cadence for cadence in announced if cadence.version == plan.version and cadence.from_step <= step]
    if not begun:
        return plan.is_due(step)
    newest = max(begun, key=lambda cadence: cadence.from_step)
    return (step - newest.from_step) % newest.every == 0


def remembered(announced: Sequence[Cadence], cadence: Cadence) -> tuple[Cadence, ...]:
    """What to remember after one more announcement: the newest, and the one that is in force until it begins."""
    others = {known for known in announced if known.version == cadence.version and known != cadence}
    return tuple(sorted([*others, cadence], key=lambda known: known.from_step)[-2:])
