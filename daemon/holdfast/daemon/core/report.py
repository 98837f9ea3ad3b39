"""What a node says of itself in heartbeats, and the cluster's status made from everybody's heartbeats.

Covers telling, not deciding. The status is a tree of plain values with the schema name "holdfast.status/1"; its
verdict is the worst over all jobs and nodes.
"""

from typing import Any

import msgspec
from holdfast.daemon.core.arena import Arena
from holdfast.daemon.core.collector import lost_by_group, more_losses
from holdfast.daemon.core.context import Context
from holdfast.daemon.core.estate_rows import estate_row, with_estate
from holdfast.daemon.core.health import damage_verdict, drill_row, durable_row, resting_row
from holdfast.daemon.core.job import Job
from holdfast.daemon.core.peers import Peers
from holdfast.daemon.core.rebuild import Rebuild
from holdfast.daemon.core.slot import COMPLETE, Phase
from holdfast.daemon.core.views import old_views, told_views
from holdfast.protocol import limits
from holdfast.protocol.earlier import EarlierReport
from holdfast.protocol.health import DrillReport
from holdfast.protocol.ids import SnapshotId
from holdfast.protocol.messages import Heartbeat, JobReport

VERDICTS = ("HEALTHY", "DEGRADED", "UNPROTECTED", "LOST")  # from good to bad


def job_report(job: Job, rebuild: Rebuild, drill: DrillReport) -> JobReport:
    """What this node knows and holds of one job."""
    chunk_bytes = job.ctx.config.chunk_bytes
    return JobReport(
        job=job.name,
        attempt=job.attempt,
        layout_id=job.current if job.planned else None,
        layout_version=job.layout.version if job.layout is not None and job.planned else 0,
        committed=job.committed,
        committed_layout_id=job.committed_layout_id,
        held=tuple(sorted(s.snapshot for s in job.slots if s.snapshot is not None and s.phase in COMPLETE)),
        open=tuple(sorted(s.snapshot for s in job.slots if s.snapshot is not None and s.transfer is not None)),
        staged=job.newest(frozenset({Phase.SEALED}) | COMPLETE),
        given_up=tuple(job.given_up),
        lost_bytes=job.lost_bytes,
        rebuilt_bytes=min(rebuild.done_chunks * chunk_bytes, job.lost_bytes) if rebuild.running else 0,
        rebuild_state=rebuild.word,
        received_bytes=rebuild.received_bytes,
        rebuild_s=rebuild.seconds,
        roles=tuple(sorted(job.roles)),
        closed=job.closed,
        paused=job.ctx.now_ns < job.pause_ns,
        paused_for=tuple(job.paused_for),
        protect_s=job.protect_s,
        digest_failures=job.digest_failures,
        health=job.health.report(job.ctx.now_ns),
        pace=job.pace_report(),
        drill=drill,
        estate=job.estate_report,
    )


def heartbeat(ctx: Context, arena: Arena, peers: Peers, reports: list[JobReport]) -> Heartbeat:
    """This node's heartbeat."""
    return Heartbeat(
        config_digest=ctx.config_digest,
        bulk_port=ctx.bulk_port,
        worker_session=ctx.worker_session,
        arena_bytes=arena.reserved_bytes,
        budget_bytes=arena.budget_bytes,
        jobs=tuple(reports),
        engine=ctx.engine,
        recovery_record=ctx.recovery_record,
        address=ctx.config.nodes[ctx.node].address,
        views=told_views(ctx, peers),
        earlier=ctx.earlier,
    )


def status(ctx: Context, peers: Peers, own: Heartbeat, jobs: dict[str, Job]) -> dict[str, Any]:
    """The cluster as this node sees it."""
    names = sorted(
        {report.job for report in own.jobs} | {r.job for p in peers.table.values() for r in _jobs(peers, p.node)}
    )
    job_rows = [_job_row(ctx, peers, own, jobs.get(name), name) for name in names]
    old = old_views(ctx, peers, own)
    node_rows = [
        _node_row(ctx, peers, own, node) | {"old_views": old.get(node, [])} for node in range(len(ctx.config.nodes))
    ]
    verdict, reason, more_losses = _verdict(ctx, job_rows, node_rows)
    unheard = peers.unheard()
    return {
        "schema": "holdfast.status/1",
        "cluster": ctx.config.cluster_name,
        "epoch": ctx.config.epoch,
        "parity": ctx.config.parity,
        "groups": [[ctx.name_of(node) for node in group] for group in ctx.placement.groups],
        "seen_by": ctx.name_of(ctx.node),
        "collector": ctx.name_of(peers.collector),
        "complete": not unheard,  # false: what is said of the nodes named as unheard may be better than it looks
        "unheard": [ctx.name_of(other) for other in sorted(unheard)],
        "earlier": _earlier_row(ctx, peers, own),
        "verdict": verdict,
        "reason": reason,
        "more_losses": more_losses,
        "jobs": job_rows,
        "nodes": node_rows,
    }


def _earlier_row(ctx: Context, peers: Peers, own: Heartbeat) -> dict[str, Any] | None:
    """Who still serves the epoch before, and for which jobs; None if nobody does."""
    told = {ctx.node: own.earlier}
    told |= {node: p.heartbeat.earlier for node, p in peers.table.items() if peers.alive(node) and p.heartbeat}
    kept = {node: one for node, one in told.items() if isinstance(one, EarlierReport)}
    if not kept:
        return None
    return {
        "epoch": max(one.epoch for one in kept.values()),
        "waits_for": sorted({job for one in kept.values() for job in one.jobs}),
        "served_by": [ctx.name_of(node) for node in sorted(kept)],
        "reserved_bytes": sum(one.reserved_bytes for one in kept.values()),
    }


def fitting(status: dict[str, Any]) -> dict[str, Any]:
    """The same, or with fewer rows of nodes where it would not fit a frame: those that are well are left out first."""
    rows = sorted(
        status["nodes"], key=lambda row: row["state"] == "up" and all(j["whole"] for j in row["jobs"].values())
    )
    kept = len(rows)
    while kept and len(msgspec.msgpack.encode(status)) > limits.STATUS_BYTES_MAX:
        kept //= 2
        shown = sorted(rows[:kept], key=lambda row: row["index"])
        status = {**status, "nodes": shown, "nodes_left_out": len(rows) - kept}
    return status


def _jobs(peers: Peers, node: int) -> tuple[JobReport, ...]:
    beat = peers.table[node].heartbeat
    return beat.jobs if beat is not None and peers.alive(node) else ()


def _node_row(ctx: Context, peers: Peers, own: Heartbeat, node: int) -> dict[str, Any]:
    config = ctx.config.nodes[node]
    row: dict[str, Any] = {
        "name": config.name,
        "index": node,
        "address": config.address,
        "domain": config.domain,
        "group": ctx.placement.group_of(node),
    }
    if node == ctx.node:
        beat: Heartbeat | None = own
        row |= {
            "state": "up",
            "reason": "",
            "incarnation": ctx.incarnation,
            "worker_session": ctx.worker_session,
        }
    else:
        peer = peers.table[node]
        beat = peer.heartbeat if peers.alive(node) else None
        state, reason = _peer_state(peers, node)
        row |= {
            "state": state,
            "reason": reason,
            "incarnation": peer.incarnation,
            "worker_session": peer.worker_session,
        }
    row["arena_bytes"] = beat.arena_bytes if beat else 0
    row["budget_bytes"] = beat.budget_bytes if beat else 0
    row["engine"] = beat.engine if beat else ""
    row["recovery_record"] = beat.recovery_record if beat else ""
    row["jobs"] = {
        report.job: {
            "committed_step": report.committed.step if report.committed else None,
            "staged_step": report.staged.step if report.staged else None,
            # Without its layout a node that was replaced doesn't know yet what it should hold.
            "whole": report.committed_layout_id is not None and report.lost_bytes == 0,
            "lost_bytes": report.lost_bytes,
            "rebuilt_bytes": report.rebuilt_bytes,
            "rebuild": report.rebuild_state,
            "received_bytes": report.received_bytes,
            "rebuild_s": report.rebuild_s,
            "ranks": list(report.roles),
            "digest_failures": report.digest_failures,
            **resting_row([report]),
            "drill": drill_row([[report]]),
        }
        for report in (beat.jobs if beat else ())
    }
    return row


def _peer_state(peers: Peers, node: int) -> tuple[str, str]:
    peer = peers.table[node]
    if peers.alive(node):
        return "up", peer.refused
    if peer.refused:
        return "refused", peer.refused
    if node in peers.unheard():
        return "unheard", "not heard yet"
    return "down", "nothing heard from it"


def _job_row(ctx: Context, peers: Peers, own: Heartbeat, job: Job | None, name: str) -> dict[str, Any]:
    reports = peers.reports(name)
    mine = next((report for report in own.jobs if report.job == name), None)
    if mine is not None:
        reports[ctx.node] = mine
    committed = max((report.committed for report in reports.values() if report.committed), default=None)
    row = _bare_job_row(name, reports, committed) | {"every": job.every if job is not None else 0}
    row["reprotection"] = estate_row(reports, committed, ctx.name_of)
    layout_id = job.committed_layout_id if job is not None and job.committed == committed else None
    if committed is None or job is None or layout_id not in job.layouts.known:
        if committed is not None:
            row["reason"] = "this node does not know the snapshot's layout yet"
        return row
    assert layout_id is not None
    geometry = job.geometry(layout_id)
    by_group = lost_by_group(committed, geometry, reports)
    missing = by_group.values()
    unheard = peers.unheard()
    lost = [node for nodes in missing for node in nodes if node not in unheard]

    def count(group: tuple[int, ...], nodes: set[int]) -> int:
        """How many losses so many are as good as, with what others keep of them."""
        return geometry.parity_count - more_losses(committed, geometry, reports, group, nodes)

    worst_known = max((count(group, set(nodes) - unheard) for group, nodes in by_group.items()), default=0)
    worst = max((count(group, set(nodes)) for group, nodes in by_group.items()), default=0)
    if worst_known <= geometry.parity_count:
        worst = min(worst, geometry.parity_count)  # who was not heard yet is not lost: fear it, but don't say it
    damaged = {
        node for node, report in reports.items() if report.health.damaged_chunks and report.committed == committed
    }
    row["participants"] = [ctx.name_of(node) for node in sorted(geometry.participants)]
    row["lost_nodes"] = [ctx.name_of(node) for node in lost]
    row["snapshot_bytes"] = sum(place.shard_bytes for place in geometry.layout.shards)
    names = [ctx.name_of(node) + (" (not heard yet)" if node in unheard else "") for n in missing for node in n]
    row["verdict"], row["reason"] = _job_verdict(geometry.parity_count, worst, names)
    helps = worst < max((len(nodes) for nodes in missing), default=0)
    row["reason"] = with_estate(row["reason"], row["reprotection"], helps=helps)
    if damaged:
        worst_damaged = max(count(group, set(nodes) | damaged & set(group)) for group, nodes in by_group.items())
        worst = max(worst, min(worst_damaged, max(geometry.parity_count, 1)))
        _worsen(row, *damage_verdict(geometry.parity_count, worst, [ctx.name_of(node) for node in sorted(damaged)]))
    row["more_losses"] = max(geometry.parity_count - worst, 0)
    row["drill"] = drill_row(
        [
            [reports[node] for node in group if node in reports]
            for group in geometry.placement.groups
            if set(group) & geometry.participants
        ]
    )
    if row["drill"]["failures"] and row["drill"]["drilled_step"] == committed.step:
        _worsen(row, "DEGRADED", f"the drill failed: {row['drill']['problem']}")
    return row


def _bare_job_row(name: str, reports: dict[int, JobReport], committed: SnapshotId | None) -> dict[str, Any]:
    """What can be said of a job without knowing its layout."""
    attempt = max(report.attempt for report in reports.values())
    return {
        "name": name,
        "attempt": attempt,
        "committed_step": committed.step if committed else None,
        "committed_attempt": committed.attempt if committed else None,
        "ranks": sum(len(report.roles) for report in reports.values()),
        "closed": all(report.closed for report in reports.values() if report.roles or report.closed)
        and any(report.closed for report in reports.values()),
        "protect_s": max(report.protect_s for report in reports.values()),
        "digest_failures": sum(report.digest_failures for report in reports.values()),
        **resting_row(list(reports.values())),
        "drill": None,
        "durable": durable_row(list(reports.values())),
        "participants": None,  # nodes that hold data or parity of it; None: this node doesn't know its layout
        "lost_nodes": [],
        "snapshot_bytes": None,
        "more_losses": None,
        "verdict": "UNPROTECTED",
        "reason": "nothing is committed yet",
    }


def _worsen(row: dict[str, Any], verdict: str, reason: str) -> None:
    """Take the worse of two verdicts, and both reasons."""
    row["verdict"] = max(row["verdict"], verdict, key=VERDICTS.index)
    row["reason"] = "; ".join(text for text in (row["reason"], reason) if text)


def _job_verdict(parity_count: int, worst: int, lost: list[str]) -> tuple[str, str]:
    names = ", ".join(lost)
    if worst > parity_count:
        return "LOST", f"{names} lost, parity covers {parity_count} per group"
    if parity_count == 0:
        return "UNPROTECTED", "parity is 0: process crashes are survived, the loss of a node is not"
    if worst == parity_count:
        return (
            "UNPROTECTED",
            f"{names} lost: no further loss is survived in that group until it is rebuilt",
        )
    if names:
        return "DEGRADED", f"{names} lost: {parity_count - worst} more can be lost"
    return "HEALTHY", ""


def _verdict(
    ctx: Context, job_rows: list[dict[str, Any]], node_rows: list[dict[str, Any]]
) -> tuple[str, str, int | None]:
    away = [row["name"] for row in node_rows if row["state"] != "up"]
    active = [row for row in job_rows if row["committed_step"] is not None or row["ranks"]]
    worst = max((VERDICTS.index(row["verdict"]) for row in active), default=0)
    reasons = [f"job {row['name']}: {row['reason']}" for row in active if row["reason"]]
    if away:
        worst = max(worst, VERDICTS.index("DEGRADED"))
        reasons.append(f"not up: {', '.join(away)}")
    losses = [row["more_losses"] for row in active if row["more_losses"] is not None]
    if losses:
        more = min(losses)
    else:
        by_group = [
            sum(row["group"] == g for row in node_rows if row["state"] != "up")
            for g in range(len(ctx.placement.groups))
        ]
        more = max(ctx.config.parity - max(by_group), 0)
    return VERDICTS[worst], "; ".join(reasons), more
