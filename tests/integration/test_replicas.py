"""What DDP and HSDP keep equal is staged once, cut over the replicas, and comes back bit for bit: real daemons."""

from pathlib import Path
from typing import Any

import pytest
import torch.distributed.checkpoint as dcp
from holdfast.client.export import export
from local_cluster import LocalCluster
from replica_ranks import STEPS, Net, come_back, train_and_stage
from worlds import run_world

pytestmark = [pytest.mark.timeout(400), pytest.mark.filterwarnings("ignore::UserWarning")]


def sockets(cluster: LocalCluster, *nodes: int) -> str:
    return ",".join(str(cluster.socket(node)) for node in nodes)


def stage(cluster: LocalCluster, meet: Path, mode: str, nodes: tuple[int, ...], *jobs: dict[str, Any]) -> Any:
    """What became of each job, by job and rank."""
    by_rank = run_world(train_and_stage, len(nodes), meet, mode, sockets(cluster, *nodes), list(jobs))
    return list(zip(*by_rank, strict=True))


def back(cluster: LocalCluster, meet: Path, mode: str, nodes: tuple[int, ...], *tries: dict[str, Any]) -> Any:
    """What became of each try, by try and rank."""
    by_rank = run_world(come_back, len(nodes), meet, mode, sockets(cluster, *nodes), list(tries))
    return list(zip(*by_rank, strict=True))


def test_four_ddp_ranks_stage_a_quarter_each_and_come_back_also_after_a_node_was_lost(tmp_path: Path) -> None:
    """The same node set, a node lost and replaced; then ranks on other nodes; then a world of three; then torch."""
    with LocalCluster(nodes=4, parity=1) as cluster:
        cluster.start()
        whole, cut, saved = stage(
            cluster, tmp_path / "first", "ddp", (0, 1, 2, 3),
            {"job": "whole", "width": 2000, "replicated": "none"}, {"job": "cut", "width": 2000}, {},
        )  # fmt: skip
        for rank in range(4):
            assert whole[rank]["said"] == cut[rank]["said"] == saved[rank]["said"] == []
            assert cut[rank]["hash"] == whole[rank]["hash"]  # what is staged by whom changes nothing
            assert cut[rank]["staged_bytes"] < 0.28 * whole[rank]["staged_bytes"]

        cluster.kill(2)
        cluster.start([2])
        (found,) = back(cluster, tmp_path / "second", "ddp", (0, 1, 2, 3), {})
        for rank, one in enumerate(found):
            assert (one["error"], one["step"], one["said"]) == ("", STEPS - 1, [])
            assert one["fresh"] != one["hash"] == saved[rank]["hash"]
            assert "gather" in one["phases"]
            assert "ranges" not in one["phases"]
            assert one["next"] == found[0]["next"]

        cluster.kill(3)
        (moved,) = back(cluster, tmp_path / "third", "ddp", (1, 0, 2), {})
        for one in moved:
            assert (one["error"], one["step"], one["whole"]) == ("", STEPS - 1, found[0]["whole"])

        export(job="replicas", to=tmp_path / "out", socket=cluster.socket(0))
        model = Net(211)
        tree = {"model": {f"module.{name}": value for name, value in model.state_dict().items()}}
        dcp.load(tree, checkpoint_id=tmp_path / "out", no_dist=True)
        assert model.first.weight.flatten().tolist() == found[0]["whole"]["first.weight"]


def test_hsdp_stages_each_shard_once_and_comes_back_in_its_own_and_in_another_layout(tmp_path: Path) -> None:
    with LocalCluster(nodes=2, parity=1) as cluster:
        cluster.start()
        whole, cut, saved = stage(
            cluster, tmp_path / "first", "hsdp", (0, 0, 1, 1),
            {"job": "whole", "width": 4000, "replicated": "none"}, {"job": "cut", "width": 4000}, {},
        )  # fmt: skip
        for rank in range(4):
            assert whole[rank]["said"] == cut[rank]["said"] == saved[rank]["said"] == []
            assert cut[rank]["hash"] == whole[rank]["hash"]
            assert cut[rank]["staged_bytes"] < 0.55 * whole[rank]["staged_bytes"]
        (found,) = back(cluster, tmp_path / "second", "hsdp", (0, 0, 1, 1), {})
        for rank, one in enumerate(found):
            assert (one["error"], one["step"], one["said"]) == ("", STEPS - 1, [])
            assert one["fresh"] != one["hash"] == saved[rank]["hash"]
            assert "gather" in one["phases"]
            assert one["next"] == found[0]["next"]
        (other,) = back(cluster, tmp_path / "third", "ddp", (1, 0), {})
        for one in other:
            assert (one["error"], one["step"], one["whole"]) == ("", STEPS - 1, found[0]["whole"])


def test_what_is_no_replica_is_staged_whole_and_what_ceased_to_be_one_is_refused_in_words(tmp_path: Path) -> None:
    """Ranks that differ at the plan, and ranks that begin to differ after it."""
    with LocalCluster(nodes=2, parity=1) as cluster:
        cluster.start()
        whole, cut, inner, early, _ = stage(
            cluster, tmp_path / "first", "ddp", (0, 1),
            {"job": "whole", "width": 2000, "replicated": "none"}, {"job": "cut", "width": 2000},
            {"job": "inner", "width": 2000, "replicated": "inner"},
            {"job": "early", "width": 2000, "drift_at": 0}, {"drift_at": 1},
        )  # fmt: skip
        for rank in range(2):
            assert cut[rank]["staged_bytes"] < 0.53 * whole[rank]["staged_bytes"]
            assert inner[rank]["staged_bytes"] < 0.53 * whole[rank]["staged_bytes"]
            assert early[rank]["staged_bytes"] == whole[rank]["staged_bytes"]
            assert any("model: not equal on all replicas" in text for text in early[rank]["said"])
        refused, accepted = back(cluster, tmp_path / "second", "ddp", (0, 1), {}, {"replicated": "none"})
        for one in refused:
            assert "NotRecoverableError" in one["error"]
            assert "not equal on all replicas" in one["error"]
            assert 'replicated="none"' in one["error"]
        assert any("was not equal on all replicas" in text for one in accepted for text in one["said"])
        for one in accepted:
            assert one["error"] == ""
            assert one["whole"] == accepted[0]["whole"]  # and so all ranks have the same again
