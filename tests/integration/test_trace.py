"""One snapshot over three real nodes, and the recovery from the loss of one, as `holdfast trace` shows them."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from holdfast.cli.link import Daemon
from holdfast.cli.trace import collect
from local_cluster import LocalCluster, job_row
from trace_format import check_trace
from trace_ranks import train
from worlds import run_world

MakeCluster = Callable[..., LocalCluster]
OF_A_SNAPSHOT = ("begin", "stage", "seal", "digest", "send", "encode", "protect", "facts", "commit")


def traced(cluster: LocalCluster, *words: str) -> dict[str, Any]:
    done = cluster.command("trace", *words)
    assert done.returncode == 0, done.stderr
    shown: dict[str, Any] = json.loads(done.stdout)
    check_trace(shown)
    for name in shown["otherData"]["missing"]:
        assert f"missing: {name}" in done.stderr
    return shown


@dataclass(frozen=True)
class Seen:
    """A span as it is shown."""

    start_ns: int
    end_ns: int
    about: dict[str, Any]


def spans(shown: dict[str, Any], *, step: int) -> dict[tuple[int, str], Seen]:
    """The last span of each stage of a step, by node."""
    found = {}
    for event in shown["traceEvents"]:
        if event["ph"] == "X" and event["args"].get("step") == step:
            start_us, end_us = event["ts"], event["ts"] + event["dur"]
            found[event["pid"] - 1, event["cat"]] = Seen(round(start_us * 1000), round(end_us * 1000), event["args"])
    return found


def test_a_snapshot_and_a_recovery_are_seen_on_all_nodes(make_cluster: MakeCluster, tmp_path: Path) -> None:
    cluster = make_cluster(nodes=3, parity=1)
    cluster.start()
    sockets = [str(cluster.socket(node)) for node in range(3)]
    assert run_world(train, 3, tmp_path / "meet1", sockets, 0, 2) == [None] * 3

    shown = traced(cluster)
    seen = spans(shown, step=1)
    assert shown["otherData"]["missing"] == {}
    error_ns = 2000 * max(shown["otherData"]["clock_error_us"].values())
    for node in range(3):
        own = {stage: seen[node, stage] for stage in OF_A_SNAPSHOT}  # all of them are there
        ordered = [own[stage] for stage in ("begin", "stage", "protect", "commit")]
        assert all(before.end_ns <= after.start_ns for before, after in pairwise(ordered))
        for stage in ("digest", "send", "encode"):
            assert own[stage].start_ns <= own[stage].end_ns
            assert stage == "encode" or own["protect"].start_ns <= own[stage].start_ns  # the others may be earlier
            assert stage == "send" or own[stage].end_ns <= own["protect"].end_ns  # the last answers may come later
        assert own["begin"].about["rank"] == own["stage"].about["rank"] == node
        for other in range(3):  # no node commits before all have stated their facts, on whatever clock
            assert seen[other, "protect"].end_ns <= own["commit"].end_ns + error_ns
    assert seen[0, "facts"].about["count"] == 3

    with Daemon(cluster.socket(1)) as daemon:
        found, _ = collect(daemon, cluster.names, 1)
    for one in found:  # all on this machine: their clocks are one
        assert abs(one.offset.ahead_ns) <= one.offset.error_ns

    cluster.kill(2)
    cluster.wait_status(lambda status: status["nodes"][2]["state"] == "down", "n2 is gone")
    shown = traced(cluster, "--last", "1")
    assert shown["otherData"]["missing"] == {"n2": "nothing is heard from it"}
    assert {node for node, _ in spans(shown, step=1)} == {0, 1}

    cluster.start([2])
    whole = "gpt is whole again"
    cluster.wait_status(lambda status: job_row(status, "gpt").get("lost_nodes") == [], whole)
    cluster.wait_status(lambda status: status["nodes"][2]["jobs"].get("gpt", {}).get("whole"), whole)
    assert run_world(train, 3, tmp_path / "meet2", sockets, 2, 0) == [1] * 3
    shown = traced(cluster)
    seen = spans(shown, step=1)
    error_ns = 2000 * max(shown["otherData"]["clock_error_us"].values())
    assert {(2, "digests"), (2, "rebuild"), (0, "decide")} <= set(seen)
    assert {node for node, stage in seen if stage == "sums"} == {0, 1}
    assert seen[2, "digests"].start_ns <= seen[2, "rebuild"].start_ns
    for node in range(3):
        ordered = [seen[2, "rebuild"], seen[0, "decide"], seen[node, "verify"], seen[node, "restore"]]
        assert all(before.end_ns <= after.end_ns + error_ns for before, after in pairwise(ordered))
        assert seen[0, "decide"].end_ns <= seen[node, "verify"].start_ns + error_ns
