"""What is made up for of absent nodes, as the status shows it for a job.

Covers telling. What an estate is, is in `holdfast.protocol.estates`; when one is computed in `reprotect`.
"""

from collections.abc import Callable, Mapping
from typing import Any

from holdfast.protocol.estate_messages import EstateReport
from holdfast.protocol.ids import SnapshotId
from holdfast.protocol.messages import JobReport


def estate_row(
    reports: Mapping[int, JobReport], committed: SnapshotId | None, name_of: Callable[[int], str]
) -> dict[str, Any] | None:
    """The estates of a job's newest commit; None if no live node speaks of one.

    Args:
        reports: of the live nodes.
        committed: the newest commit.
        name_of: a node's name, for people.
    """
    told = {
        node: report.estate
        for node, report in reports.items()
        if isinstance(report.estate, EstateReport) and report.estate.snapshot == committed
    }
    if not told:
        return None
    held = {absent for report in told.values() for absent in report.held}
    running = [report for report in told.values() if report.building]
    absent = {node for nodes in held for node in nodes} | {node for report in running for node in report.building}
    problem = next((f"{name_of(node)}: {r.problem}" for node, r in sorted(told.items()) if r.problem), "")
    return {
        "nodes": [name_of(node) for node in sorted(absent)],
        "kept_by": [name_of(node) for node, report in sorted(told.items()) if report.held],
        "state": "failed" if problem else "running" if running else "done",
        "done_chunks": sum(report.done_chunks for report in running),
        "total_chunks": sum(report.total_chunks for report in running),
        "problem": problem,
    }


def with_estate(reason: str, row: dict[str, Any] | None, *, helps: bool) -> str:
    """The reason of a verdict, and how far absent nodes are made up for."""
    if row is None:
        return reason
    names = ", ".join(row["nodes"]) or "absent nodes"
    if row["problem"]:
        return f"{reason}; {names} not made up for: {row['problem']}"
    if row["state"] == "running":
        return f"{reason}; the others make up for {names}: {row['done_chunks']} of {row['total_chunks']} chunks"
    return f"{reason}; the others made up for {names}" if helps else reason
