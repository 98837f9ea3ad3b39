"""Snapshots and saves of one layout come back in others, through real daemons, also with a node lost in between."""

from pathlib import Path

import pytest
from dcp_ranks import FIRST_SAVE, STEPS, restore_elsewhere, sockets_of, train_and_save
from local_cluster import LocalCluster
from worlds import run_world


def sockets(cluster: LocalCluster, *nodes: int) -> str:
    return sockets_of([cluster.socket(node) for node in nodes])


@pytest.mark.timeout(300)
def test_what_one_layout_staged_comes_back_in_others(tmp_path: Path) -> None:
    """FSDP x tensor parallel on four ranks; then FSDP on three, a node lost; then DDP on two, with a new node."""
    with LocalCluster(nodes=3, parity=1) as cluster:
        cluster.start()
        saved = run_world(train_and_save, 4, tmp_path / "first", "tp", "job", sockets(cluster, 0, 1, 2))
        digest = saved[0]["digest"]
        assert {one["digest"] for one in saved} == {digest}
        assert [one["position"] for one in saved] == [STEPS + rank for rank in range(4)]

        cluster.kill(2)
        found = run_world(restore_elsewhere, 3, tmp_path / "second", "fsdp", "job", sockets(cluster, 0, 1), False)
        for rank, one in enumerate(found):
            assert one["fresh"] != digest
            assert one["job"] == (STEPS - 1, digest, None)
            assert one["job-dcp"] == (FIRST_SAVE + 1, digest, {"step": STEPS})
            assert one["restored"] == (STEPS - 1, digest, STEPS, STEPS)  # rank 0's position
            assert any("data: what is no tensor differed between the 4 ranks" in text for text in one["said"]), rank

        cluster.start([2])
        found = run_world(restore_elsewhere, 2, tmp_path / "third", "ddp", "job", sockets(cluster, 0, 1, 2), True)
        assert [one["restored"][:2] for one in found] == [(STEPS - 1, digest)] * 2
        assert [one["job"][:2] for one in found] == [(STEPS - 1, digest)] * 2
        assert [one["went on to"] for one in found] == [STEPS] * 2
