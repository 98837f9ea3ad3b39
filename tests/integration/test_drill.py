"""`holdfast drill` against real daemons: proof, damage, a missing node, nothing to prove."""

import json
from collections.abc import Callable

import torch
from holdfast.client import Snapshotter
from local_cluster import LocalCluster

MakeCluster = Callable[..., LocalCluster]


def test_the_drill_proves_says_what_it_can_not_and_its_exit_code_tells(make_cluster: MakeCluster) -> None:
    cluster = make_cluster(nodes=3, parity=1)
    cluster.start()
    nothing = cluster.command("drill")
    assert nothing.returncode == 3
    assert "nothing to drill" in nothing.stderr
    with Snapshotter({"s": torch.arange(200_000)}, job="job", socket=cluster.socket(0), on_error="raise") as job:
        job.step(7)
        job.wait(timeout_s=20)
    found = cluster.command("drill", "--json", node=2)
    assert found.returncode == 0, (found.stdout, found.stderr)
    told = json.loads(found.stdout)
    assert told["schema"] == "holdfast.drill/1"
    assert (told["jobs"][0]["proven_step"], told["jobs"][0]["survives"]) == (7, 1)
    assert told["jobs"][0]["columns"] > 0
    cluster.wait_status(lambda s: s["jobs"][0]["drill"]["proven_step"] == 7, "the other nodes hear of the proof")
    shown = cluster.command("status")
    assert "step 7 survives any 1 loss, proven" in shown.stdout
    cluster.kill(2)
    cluster.wait_status(lambda s: s["verdict"] == "UNPROTECTED", "the loss shows")
    left = cluster.command("drill")
    assert left.returncode == 0, (left.stdout, left.stderr)
    assert "survives no further loss" in left.stdout
