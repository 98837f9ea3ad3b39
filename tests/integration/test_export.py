"""`holdfast export` against real daemons: torch alone reads what it wrote, also with a node missing."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from holdfast.client import Snapshotter
from holdfast.client.export import NOTE
from local_cluster import LocalCluster

MakeCluster = Callable[..., LocalCluster]
TORCH_S = 90.0  # a process that imports torch on a busy machine

pytestmark = pytest.mark.timeout(400)

# Reads the directory as somebody would who never heard of Holdfast, and says what came.
READER = """
import sys
sys.modules["holdfast"] = None
import torch, torch.distributed.checkpoint as dcp
model = torch.nn.Linear(300, 200)
moments = {"state": {0: {"exp_avg": torch.zeros(200, 300)}}}
state = {"model": model.state_dict(), "optimizer": moments, "counter": {"value": 0}}
dcp.load(state, checkpoint_id=sys.argv[1], no_dist=True)
exp_avg = state["optimizer"]["state"][0]["exp_avg"]
whole = {"model": state["model"], "exp_avg": exp_avg, "count": state["counter"]["value"]}
torch.save(whole, sys.argv[2])
"""


class Counter:
    """Something with a state that is no tensor."""

    def __init__(self) -> None:
        self.value = 41

    def state_dict(self) -> dict[str, int]:
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.value = state["value"]


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_torch_alone_reads_what_was_exported_also_with_a_node_missing(
    make_cluster: MakeCluster, tmp_path: Path
) -> None:
    cluster = make_cluster(nodes=3, parity=1)
    cluster.start()
    assert cluster.command("export", "--to", str(tmp_path / "early")).returncode == 3
    torch.manual_seed(5)
    model = torch.nn.Linear(300, 200)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(300)).sum().backward()  # type: ignore[no-untyped-call]  # torch's own
    optimizer.step()
    state = {"model": model, "optimizer": optimizer, "counter": Counter()}
    with Snapshotter(state, job="job", socket=cluster.socket(0), on_error="raise") as job:
        job.step(3)
        job.wait(timeout_s=20)
    expected = {name: value.clone() for name, value in model.state_dict().items()}
    moment = optimizer.state_dict()["state"][0]["exp_avg"]
    cluster.kill(0)  # the node that held it all
    cluster.wait_status(lambda s: s["nodes"][0]["state"] != "up", "the loss is seen", node=1)
    target = tmp_path / "out" / "step3"
    wrong = cluster.command("export", "--to", str(target), "--step", "9", node=1, seconds=TORCH_S)
    assert (wrong.returncode, target.exists()) == (3, False), wrong.stderr
    assert "expected step 9, found step 3" in wrong.stderr
    found = cluster.command("export", "--to", str(target), "--json", node=1, seconds=TORCH_S)
    assert found.returncode == 0, found.stderr
    assert json.loads(found.stdout)["step"] == 3
    assert json.loads((target / NOTE).read_text())["job"] == "job"
    assert [path.name for path in target.parent.iterdir()] == ["step3"]  # nothing is left aside
    again = cluster.command("export", "--to", str(target), node=1, seconds=TORCH_S)
    assert again.returncode == 2
    assert "is taken" in again.stderr
    read = tmp_path / "read.pt"
    subprocess.run([sys.executable, "-c", READER, str(target), str(read)], check=True, timeout=TORCH_S)
    whole = torch.load(read)
    assert all(torch.equal(whole["model"][name], value) for name, value in expected.items())
    assert torch.equal(whole["exp_avg"], moment)
    assert whole["count"] == 41


def test_a_directory_that_can_not_be_written_is_said_and_nothing_is_left(
    make_cluster: MakeCluster, tmp_path: Path
) -> None:
    cluster = make_cluster(nodes=1, parity=0)
    cluster.start()
    with Snapshotter({"s": torch.arange(1000)}, job="job", socket=cluster.socket(0), on_error="raise") as job:
        job.step(0)
        job.wait(timeout_s=20)
    (tmp_path / "file").write_text("in the way")
    found = cluster.command("export", "--to", str(tmp_path / "file" / "inside"), seconds=TORCH_S)
    assert found.returncode == 2
    assert "can't be written" in found.stderr or "is taken" in found.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
