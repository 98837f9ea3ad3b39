"""Run in namespaces of its own (network, mounts): a cluster whose nodes are DNS names; a name server moves one.

    unshare --mount --net python names_driver.py FOLDER

Stands in for a Kubernetes headless service: the names stay, a replaced pod has another address. Prints "ok" at the end.
"""

import subprocess
import sys
from pathlib import Path

import torch
from holdfast.cli.keys import write_keys
from holdfast.client import Snapshotter

sys.path.insert(0, str(Path(__file__).parents[1] / "integration"))
from local_cluster import DEADLINE_S, LocalCluster, until
from name_server import use_own_name_server

SERVICE = "holdfast.ns.svc.test"


def commit(cluster: LocalCluster, step: int) -> None:
    snapshotter = Snapshotter({"s": torch.full((1000,), step)}, job="gpt", socket=cluster.socket(0), on_error="raise")
    with snapshotter:
        snapshotter.step(step)
        snapshotter.wait(timeout_s=DEADLINE_S)


def main() -> None:
    folder = Path(sys.argv[1])
    names = use_own_name_server(folder)
    write_keys(folder / "keys", ["n0", "n1", "n2"])
    with LocalCluster(nodes=3, parity=1, keys_dir=folder / "keys", ports=[7400, 7401, 7402]) as cluster:
        text = cluster.config.read_text()
        for node in range(3):
            names.table[f"holdfast-{node}.{SERVICE}"] = f"127.0.0.1{node}"
            text = text.replace(f"127.0.0.1:{7400 + node}", f"holdfast-{node}.{SERVICE}:7400")
        cluster.config.write_text(text)
        cluster.start()
        commit(cluster, 1)
        names.silent = True
        asked_count = len(names.asked)
        cluster.kill(1)
        cluster.wait_status(lambda s: s["nodes"][1]["state"] == "down", "the loss is seen")
        until(lambda: names.asked[asked_count:].count(f"holdfast-1.{SERVICE}") >= 4, "it is looked for, in vain")
        for node in (0, 2):
            assert cluster.status(node)["nodes"][2 - node]["state"] == "up"
            assert f"node n{2 - node} is down" not in cluster.log(node)
        names.silent = False
        del names.table[f"holdfast-1.{SERVICE}"]
        asked_count = len(names.asked)
        until(lambda: f"holdfast-1.{SERVICE}" in names.asked[asked_count:], "it is looked for, and nowhere")
        names.table[f"holdfast-1.{SERVICE}"] = "127.0.0.99"  # the replacement is elsewhere
        workers = [cluster.worker(node) for node in (0, 2)]
        cluster.start([1])
        cluster.wait_status(lambda s: s["verdict"] == "HEALTHY", "it is rebuilt where it is now")
        commit(cluster, 2)
        assert [cluster.worker(node) for node in (0, 2)] == workers
        listens = subprocess.run(["ss", "-Hltn"], capture_output=True, text=True, check=True).stdout
        assert "127.0.0.99]:7400" in listens or "127.0.0.99:7400" in listens, listens
    print("ok")


if __name__ == "__main__":
    main()
