"""How often the jobs stage: rarer while protection is slower than training, as often as planned when it keeps up.

The collector's part. From what the nodes report of each job it decides after each commit whether another cadence would
suit better, and announces it from a step that all ranks can hear of in time. A wrong cadence costs snapshots, never
correctness; so it follows with patience, and two collectors at once do no harm.
"""

import math
from dataclasses import dataclass, field

from holdfast.daemon.core.job import Job
from holdfast.protocol import limits
from holdfast.protocol.cadence import Cadence, PaceReport
from holdfast.protocol.ids import SnapshotId

_WAIT_SHARE = 0.1  # of a step: a shorter wait for a slot is not worth a rarer snapshot
_HEADROOM = 1.1  # a snapshot gets so much more time than it took, so that the next one finds its slot free
_WIDEN_AFTER = 3  # commits in a row that were waited for
_NARROW_AFTER = 8  # commits in a row that would have left time for more
_WIDEN_FACTOR_MAX = 4  # at once; measurements under congestion exaggerate


@dataclass(slots=True)
class _Watch:
    """One job as the collector has seen it since its last announcement."""

    committed: SnapshotId | None = None
    slow_count: int = 0
    fast_count: int = 0


@dataclass(slots=True)
class Cadences:
    """What the collector remembers between two commits, by job."""

    watches: dict[str, _Watch] = field(default_factory=dict)

    def forget(self, job: str) -> None:
        """Nothing of this job matters any more."""
        self.watches.pop(job, None)

    def is_news(self, job: Job) -> bool:
        """Whether a commit happened since the last look."""
        return job.committed is not None and job.committed != self._watch(job).committed

    def _watch(self, job: Job) -> _Watch:
        return self.watches.setdefault(job.name, _Watch())

    def consider(self, job: Job, reports: list[PaceReport]) -> Cadence | None:
        """Look at a job whose commit is news. Returns what is to be announced, if anything.

        Args:
            job: the job as this node knows it.
            reports: what all live nodes say of its pace, this one included.
        """
        plan, watch = job.layout, self._watch(job)
        watch.committed = job.committed
        if plan is None or not job.planned:
            return None
        step_s = max(report.step_s for report in reports)
        cycle_s = max(report.cycle_s for report in reports)
        begun = [report.begun.step for report in reports if report.begun and report.begun.attempt == job.attempt]
        if step_s < limits.STEP_S_MIN or not cycle_s or not begun:
            return None
        if job.cadences and job.cadences[-1].from_step > max(begun):
            return None  # it has yet to begin: another one now would be from a later step, and so on for ever
        every = job.every
        needed = _needed(cycle_s / step_s, every_planned=plan.every, slots=len(job.slots))
        waited = max(report.waited_s for report in reports) > _WAIT_SHARE * step_s
        watch.slow_count = watch.slow_count + 1 if waited and needed > every else 0
        watch.fast_count = watch.fast_count + 1 if needed < every else 0
        if watch.slow_count >= _WIDEN_AFTER:
            wanted = min(needed, every * _WIDEN_FACTOR_MAX, limits.STEP_MAX)
        elif watch.fast_count >= _NARROW_AFTER:
            wanted = needed
        else:
            return None
        watch.slow_count = watch.fast_count = 0
        ahead = math.ceil(limits.CADENCE_AHEAD_S / step_s) + 1
        return Cadence(plan.version, min(max(begun) + ahead, limits.STEP_MAX), wanted)


def _needed(cycle_steps: float, *, every_planned: int, slots: int) -> int:
    """The narrowest multiple of the planned cadence at which a snapshot has its time.

    One slot holds what is committed; the others take turns.
    """
    in_flight = max(slots - 1, 1)
    return max(math.ceil(_HEADROOM * cycle_steps / in_flight / every_planned), 1) * every_planned
