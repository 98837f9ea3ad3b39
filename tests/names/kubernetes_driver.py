"""Run in namespaces of its own (network, mounts): three pods of a StatefulSet, as far as a daemon sees of one.

    unshare --mount --net python kubernetes_driver.py FOLDER

Each daemon is given POD_NAME and the number of replicas; DNS tells where the pods are. One is published late, and one
comes back elsewhere under its name. Prints "ok" at the end.
"""

import os
import subprocess
import sys
from pathlib import Path

import torch
from holdfast.cli.link import Daemon
from holdfast.cli.main import main as holdfast
from holdfast.client import Snapshotter
from holdfast.protocol.exit_codes import OperatorError

sys.path.insert(0, str(Path(__file__).parents[1] / "integration"))
from local_cluster import DEADLINE_S, LocalCluster, until
from name_server import use_own_name_server

SERVICE = "holdfast.ns.svc.cluster.test"
REPLICAS = 3
OPTIONS = [f"--slots={REPLICAS}", "--parity=1"]


class Pods(LocalCluster):
    """The daemons of a StatefulSet's pods: nothing is written down for them."""

    def __init__(self, folder: Path) -> None:
        super().__init__(nodes=REPLICAS, ports=[7400] * REPLICAS)
        self.names = [f"holdfast-{ordinal}" for ordinal in range(REPLICAS)]
        self.keys = folder / "keys"

    def spawn(self, node: int) -> None:
        command = [sys.executable, "-m", "holdfast.cli.main", "daemon", "--from-kubernetes", *OPTIONS]
        command += [f"--keys-dir={self.keys}", f"--dir={self.folder}", f"--socket={self.socket(node)}"]
        environment = {**os.environ, "POD_NAME": self.names[node], "HOLDFAST_MEMORY_BUDGET": "256MiB"}
        environment["HOLDFAST_MEMORY_CHUNK_BYTES"] = "64KiB"
        with self.log_path(node).open("ab") as log:
            self.keepers[node] = subprocess.Popen(
                command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )


def answers(pods: Pods, node: int) -> bool:
    try:
        with Daemon(pods.socket(node)) as daemon:
            return bool(daemon.status())
    except OperatorError:
        return False


def main() -> None:
    folder = Path(sys.argv[1])
    names = use_own_name_server(folder, search=SERVICE.partition(".")[2])
    config = folder / "cluster.toml"  # as on the workstation from which keys are made
    made = subprocess.run(
        [sys.executable, "-m", "holdfast.cli.main", "config", "kubernetes", *OPTIONS],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    config.write_text(made.stdout)
    assert holdfast(["keys", "init", "--config", str(config), "--dir", str(folder / "keys")]) == 0
    with Pods(folder) as pods:
        for node in (0, 1):
            names.table[f"holdfast-{node}.{SERVICE}"] = f"127.0.0.1{node}"
        pods.start(wait=False)
        until(lambda: answers(pods, 0) and answers(pods, 1), "those that have a name are there")
        until(lambda: f"holdfast-2.{SERVICE}" in names.asked, "the third looks for its own")
        assert pods.keepers[2].poll() is None
        assert not answers(pods, 2)
        names.table[f"holdfast-2.{SERVICE}"] = "127.0.0.12"
        pods.wait_up()
        with Snapshotter({"s": torch.ones(1000)}, job="gpt", socket=pods.socket(0), on_error="raise") as snapshotter:
            snapshotter.step(1)
            snapshotter.wait(timeout_s=DEADLINE_S)
        pods.kill(1)
        names.table[f"holdfast-1.{SERVICE}"] = "127.0.0.99"
        pods.start([1])
        pods.wait_status(lambda s: s["verdict"] == "HEALTHY", "it is rebuilt where it is now")
        rows = pods.status()["nodes"]
        assert [row["name"] for row in rows] == pods.names
    print("ok")


if __name__ == "__main__":
    main()
