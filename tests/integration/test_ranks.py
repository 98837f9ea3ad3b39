"""Many ranks on a node, and many nodes: 64 processes on 8 daemons lose two nodes, and each finds its own state again.

The large one is heavy for two cores: `make ranks-test`. The small one runs with all other tests.
"""

from collections.abc import Callable
from pathlib import Path

import pytest
from local_cluster import LocalCluster
from many_ranks import train
from worlds import run_world

MakeCluster = Callable[..., LocalCluster]
STEPS = 4


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("nodes", "ranks_per_node", "parity"), [(2, 8, 1), pytest.param(8, 8, 2, marks=pytest.mark.ranks)]
)
def test_each_rank_finds_its_own_state_after_as_many_losses_as_parity(
    make_cluster: MakeCluster,
    tmp_path: Path,
    request: pytest.FixtureRequest,
    nodes: int,
    ranks_per_node: int,
    parity: int,
) -> None:
    if nodes > 2 and "ranks" not in (request.config.option.markexpr or ""):
        pytest.skip("64 processes, a minute or two: make ranks-test")
    cluster = make_cluster(nodes=nodes, parity=parity, chunk_bytes="64KiB")
    cluster.start()
    sockets = [str(cluster.socket(node)) for node in range(nodes)]
    world = nodes * ranks_per_node
    told = run_world(train, world, tmp_path / "meet1", sockets, STEPS, seconds=300.0)
    assert len({one["pid"] for one in told}) == world
    assert {one["restored"] for one in told} == {None}

    for node in range(parity):
        cluster.kill(node)
    gone = {"down"}
    cluster.wait_status(
        lambda s: {row["state"] for row in s["nodes"][:parity]} == gone, "they are gone", node=nodes - 1
    )
    cluster.start(range(parity))
    for node in range(nodes):
        cluster.wait_status(lambda status: status["verdict"] == "HEALTHY", "all is rebuilt", node=node)
    told = run_world(train, world, tmp_path / "meet2", sockets, STEPS + 2, seconds=300.0)
    assert {one["restored"] for one in told} == {STEPS - 1}
    assert all(one["right"] for one in told)
    last = {"committed_step": STEPS + 1, "ranks": 0}
    cluster.wait_status(lambda s: last.items() <= s["jobs"][0].items(), "the last is committed, and all have left")
    print(f"{world} ranks, the slowest:", {name: max(one[name] for one in told) for name in ("restore_s", "steps_s")})
