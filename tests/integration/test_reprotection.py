"""Nodes lost for good, one after the other, and nobody in their places: the others make up for each of them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from holdfast.client.ranges import RangeReader
from holdfast.client.restore import restore_into
from local_cluster import DEADLINE_S, LocalCluster, job_row, until
from stage_ranks import content, stage_step
from worlds import run_world

MakeCluster = Callable[..., LocalCluster]
NODES = 4
MADE_UP_S = 3 * DEADLINE_S


def read_all(cluster: LocalCluster, node: int) -> None:
    """Every rank's tensor, bit for bit, through one node."""
    with RangeReader(job="long", socket=cluster.socket(node), timeout_s=2 * DEADLINE_S) as reader:
        found = reader.committed()
        assert found is not None
        assert found.snapshot.step == 0
        for rank, place in enumerate(reader.layout.shards):
            shard = bytearray(place.shard_bytes)
            reader.read_into(rank, 0, shard)
            restored = torch.zeros_like(content(rank))
            restore_into({"state": restored}, memoryview(shard))
            assert torch.equal(restored, content(rank))


def made_up_for(cluster: LocalCluster, node: int, absent: list[str]) -> dict[str, Any] | None:
    """The job's row once a node says that all absent ones are made up for and one more can be lost."""
    row = job_row(cluster.status(node), "long")
    told = row["reprotection"]
    done = told is not None and told["state"] == "done" and told["nodes"] == absent and row["more_losses"] == 1
    return row if done else None


def test_three_of_four_nodes_with_parity_1_are_lost_one_after_the_other(
    make_cluster: MakeCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOLDFAST_CLUSTER_REPROTECT_AFTER_S", "1")
    cluster = make_cluster(nodes=NODES, parity=1)
    cluster.start()
    sockets = [str(cluster.socket(node)) for node in range(NODES)]
    assert run_world(stage_step, NODES, tmp_path / "meet", sockets) == [None] * NODES

    cluster.kill(3)
    row = until(lambda: made_up_for(cluster, 1, ["n3"]), "n3 is made up for", seconds=MADE_UP_S)
    assert row["verdict"] == "DEGRADED"
    assert row["lost_nodes"] == ["n3"]
    assert row["reprotection"]["kept_by"] == ["n0", "n1", "n2"]

    cluster.kill(0)  # the collector
    read_all(cluster, 1)
    until(lambda: made_up_for(cluster, 1, ["n0", "n3"]), "n0 and n3 are made up for", seconds=MADE_UP_S)

    cluster.kill_worker(1)  # what it keeps outlives it
    cluster.kill(2)
    until(lambda: cluster.try_status(1), "the new worker of n1 answers", seconds=MADE_UP_S)
    read_all(cluster, 1)

    cluster.start([0, 2, 3])  # replacements come at last: all is as it was
    until(lambda: job_row(cluster.status(1), "long")["verdict"] == "HEALTHY", "all nodes are whole", seconds=MADE_UP_S)
    until(lambda: job_row(cluster.status(1), "long")["reprotection"] is None, "nothing is kept for absent nodes")
    for node in range(NODES):
        read_all(cluster, node)
