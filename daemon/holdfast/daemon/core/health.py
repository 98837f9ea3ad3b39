"""How well what this node holds of one job's committed snapshot rests: what the scrub found, what was repaired.

Covers the record. Who changes it: `scrub`, `agreement` and `repair`; heartbeats and the status show it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from holdfast.protocol.health import DurableReport, HealthReport
from holdfast.protocol.ids import SnapshotId
from holdfast.protocol.messages import JobReport

Kind = Literal["data", "parity"]


class Resting(NamedTuple):
    """One chunk that this node holds: of its own image, or of its parity."""

    kind: Kind
    chunk: int


@dataclass(slots=True)
class Health:
    """Counts since the worker started, and what is known to be wrong now."""

    repaired_chunks: int = 0
    disagreeing_stripes: int = 0
    scrub_passes: int = 0
    scrub_ended_ns: int = 0
    scrub_s: float = 0.0
    damaged: set[Resting] = field(default_factory=set)  # of the committed snapshot, found and not repaired yet

    def report(self, now_ns: int) -> HealthReport:
        """What heartbeats say of it."""
        return HealthReport(
            repaired_chunks=self.repaired_chunks,
            damaged_chunks=len(self.damaged),
            disagreeing_stripes=self.disagreeing_stripes,
            scrub_passes=self.scrub_passes,
            scrub_age_s=(now_ns - self.scrub_ended_ns) / 1e9 if self.scrub_passes else 0.0,
            scrub_s=self.scrub_s,
        )


def resting_row(reports: Sequence[JobReport]) -> dict[str, Any]:
    """How well memory rests, as the status shows it for a node or, from several reports, for a job."""
    healths = [report.health for report in reports]
    return {
        "repaired_chunks": sum(health.repaired_chunks for health in healths),
        "damaged_chunks": sum(health.damaged_chunks for health in healths),
        "disagreeing_stripes": sum(health.disagreeing_stripes for health in healths),
        "scrub_passes": min((health.scrub_passes for health in healths), default=0),
        "scrub_age_s": max((health.scrub_age_s for health in healths), default=0.0),
        "scrub_s": max((health.scrub_s for health in healths), default=0.0),
    }


def damage_verdict(parity_count: int, worst: int, names: Sequence[str]) -> tuple[str, str]:
    """Verdict and reason for a job of whose committed snapshot chunks are damaged on the nodes of these names.

    Args:
        parity_count: m.
        worst: chunks that a stripe may lack, lost and damaged ones together.
        names: of the nodes that hold damaged chunks.
    """
    where = f"chunks on {', '.join(names)} fail their digest and are not repaired yet"
    if parity_count == 0:
        return "LOST", f"{where}; without parity they can't be"
    if worst >= parity_count:
        return "UNPROTECTED", f"{where}: a further loss may cost their stripes"
    return "DEGRADED", f"{where}: {parity_count - worst} more nodes can be lost"


def drill_row(groups: Sequence[Sequence[JobReport]]) -> dict[str, Any]:
    """What the last drills proved, as the status shows it: of each group the best proof, and of these the weakest.

    Args:
        groups: the reports of each group that takes part in the job.
    """
    last = [report.drill for group in groups for report in group]
    failed = [drill for drill in last if drill.failures or drill.problem]
    proofs = [[report.drill for report in group if report.drill.proven is not None] for group in groups]
    best = [max(found, key=lambda drill: (drill.proven or SnapshotId(0, 0), -drill.age_s)) for found in proofs if found]
    weakest = min(best, key=lambda d: (d.proven or SnapshotId(0, 0), d.survives), default=None)
    if len(best) < len(groups):  # a group of which nothing is proven: nothing is proven of the job
        weakest = None
    drilled = max((drill.drilled for drill in last if drill.drilled is not None), default=None)
    return {
        "proven_step": weakest.proven.step if weakest is not None and weakest.proven is not None else None,
        "survives": weakest.survives if weakest is not None else 0,
        "age_s": max(drill.age_s for drill in best) if weakest is not None else None,
        "rebuild_bytes_per_s": min(drill.rebuild_bytes_per_s for drill in best) if weakest is not None else 0,
        "stripes": sum(drill.stripes for drill in last),
        "patterns": sum(drill.patterns for drill in last),
        "columns": sum(drill.columns for drill in last),
        "failures": sum(drill.failures for drill in last),
        "problem": next((drill.problem for drill in failed), ""),
        "drilled_step": drilled.step if drilled is not None else None,
        "drills": min((drill.drills for drill in last), default=0),
        "running": any(drill.running for drill in last),
    }


def durable_row(reports: Sequence[JobReport]) -> dict[str, Any]:
    """A job's durable copies, as the status shows them: the newest that anybody knows of, and what is wrong now."""
    told = [report.durable for report in reports]
    newest = max(told, key=lambda d: (d.copied or SnapshotId(0, 0), -d.age_s), default=DurableReport())
    failing = max(told, key=lambda d: d.failures, default=DurableReport())
    return {
        "step": newest.copied.step if newest.copied is not None else None,
        "age_s": newest.age_s if newest.copied is not None else None,
        "seconds": newest.seconds,
        "size_bytes": newest.size_bytes,
        "failures": failing.failures,
        "problem": failing.problem,
        "running": any(d.running for d in told),
    }
