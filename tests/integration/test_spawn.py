"""Ranks that `torch.multiprocessing` spawns are protected like any others, and leave nothing however they end."""

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import spawned_ranks
import torch.multiprocessing
from local_cluster import LocalCluster, descriptors, until

STEPS, FAIL_AT = 5, 2
TIMEOUT_S = 110  # two worlds; a tenth of it on idle cores


def spawn(cluster: LocalCluster, folder: Path, *, fail_at: int) -> None:
    sockets = [str(cluster.socket(rank)) for rank in range(spawned_ranks.WORLD_SIZE)]
    arguments = (str(folder), sockets, STEPS, fail_at)
    torch.multiprocessing.spawn(spawned_ranks.train, args=arguments, nprocs=spawned_ranks.WORLD_SIZE)


def told(folder: Path, *, fail_at: int) -> list[dict[str, Any]]:
    files = [folder / f"told-{STEPS}-{fail_at}-{rank}" for rank in range(spawned_ranks.WORLD_SIZE)]
    return [json.loads(file.read_text()) for file in files]


def held(cluster: LocalCluster) -> list[int]:
    """Bytes of snapshots in each daemon."""
    return [row["arena_bytes"] for row in cluster.status()["nodes"]]


@pytest.mark.timeout(TIMEOUT_S)
def test_spawned_ranks_go_on_after_an_exception_and_leave_nothing(cluster: LocalCluster, tmp_path: Path) -> None:
    before, own = held(cluster), Counter(descriptors(os.getpid()))
    with pytest.raises(torch.multiprocessing.ProcessRaisedException, match="as a loss that is no number"):
        spawn(cluster, tmp_path, fail_at=FAIL_AT)
    spawn(cluster, tmp_path, fail_at=-1)
    for failed, resumed in zip(told(tmp_path, fail_at=FAIL_AT), told(tmp_path, fail_at=-1), strict=True):
        assert failed["restored"] is None
        assert resumed["restored"] == FAIL_AT
        assert resumed["restored_hash"] == failed["failed_hash"]
        for each in (failed, resumed):
            assert each["threads"] == []
            assert each["maps"] == 0
    cluster.forget("spawned")
    until(lambda: all(map(int.__le__, held(cluster), before)), f"memory as before: {before}")
    added = Counter(descriptors(os.getpid())) - own
    assert not [name for name in added if "memfd" in name or "holdfast" in name]
