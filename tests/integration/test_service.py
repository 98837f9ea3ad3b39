"""A daemon as a service: a stand-in plays systemd, restarts it, and every snapshot is still there."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from holdfast.cli.keys import rotate_keys, write_keys
from holdfast.client import Snapshotter
from local_cluster import DEADLINE_S, LocalCluster, alive, job_row, until

MakeCluster = Callable[..., LocalCluster]
SIZE = 100_000

START = """
import os, sys
stored = [int(word) for word in sys.argv[1].split(",") if word]
for index, descriptor in enumerate(stored):
    os.dup2(descriptor, 200 + index)
for index in range(len(stored)):
    os.dup2(200 + index, 3 + index)  # inheritable, as a service manager's are
if stored:
    os.environ |= {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": str(len(stored)), "LISTEN_FDNAMES": sys.argv[2]}
os.environ |= {"WATCHDOG_PID": str(os.getpid()), "WATCHDOG_USEC": "600000"}
os.execv(sys.executable, [sys.executable, "-m", "holdfast.daemon.keeper", *sys.argv[3:]])
"""


class ServiceManager:
    """systemd's part: hears notifications, keeps descriptors, starts the service with what it kept."""

    def __init__(self, folder: Path) -> None:
        self.address = folder / "notify"
        self._ear = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._ear.bind(str(self.address))
        self._ear.settimeout(DEADLINE_S)
        self.stored: dict[str, int] = {}
        self.heard: list[str] = []
        self.process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        self._ear.close()
        for descriptor in self.stored.values():
            os.close(descriptor)

    def start(self, cluster: LocalCluster) -> None:
        worker = ["--config", str(cluster.config), "--node", "n0", "--socket", str(cluster.socket(0))]
        numbers, names = ",".join(map(str, self.stored.values())), ":".join(self.stored)
        with cluster.log_path(0).open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-c", START, numbers, names, "--", *worker],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
                pass_fds=list(self.stored.values()), env={**os.environ, "NOTIFY_SOCKET": str(self.address)},
            )  # fmt: skip
        cluster.keepers[0] = self.process
        self.wait("READY=1")

    def hear(self) -> str:
        text, descriptors, _, _ = socket.recv_fds(self._ear, 4096, 4)
        words = text.decode()
        fields = dict(line.split("=", 1) for line in words.split("\n"))
        if "FDSTORE" in fields:
            self.stored[fields["FDNAME"]] = descriptors[0]
        elif "FDSTOREREMOVE" in fields:
            os.close(self.stored.pop(fields["FDNAME"]))
        self.heard.append(words)
        return words

    def wait(self, word: str) -> None:
        deadline_s = time.monotonic() + DEADLINE_S
        while word not in self.hear():
            assert time.monotonic() < deadline_s, (word, self.heard[-10:])

    def catch_up(self) -> None:
        """Hear what was said so far."""
        self._ear.setblocking(False)
        try:
            while True:
                self.hear()
        except BlockingIOError:
            self._ear.settimeout(DEADLINE_S)

    def end(self, number: int) -> int:
        """Stop the service and hear it out."""
        assert self.process is not None
        os.kill(self.process.pid, number)
        while (code := self.process.poll()) is None:
            self.catch_up()
            time.sleep(0.01)
        self.catch_up()
        return code


def stage(cluster: LocalCluster, step: int) -> None:
    state = {"s": torch.full((SIZE,), step)}
    with Snapshotter(state, job="gpt", socket=cluster.socket(0), on_error="raise") as snapshotter:
        snapshotter.step(step)
        snapshotter.wait(timeout_s=DEADLINE_S)


def restored(cluster: LocalCluster) -> int | None:
    state = {"s": torch.zeros(SIZE, dtype=torch.int64)}
    with Snapshotter(state, job="gpt", socket=cluster.socket(0), on_error="raise") as snapshotter:
        step = snapshotter.restore()
    assert step is None or bool((state["s"] == step).all())
    return step


def test_a_restarted_service_gets_its_memory_back(make_cluster: MakeCluster) -> None:
    """One node without parity: what comes back after both processes are gone was held by the manager alone."""
    cluster = make_cluster(nodes=1, parity=0)
    with ServiceManager(cluster.folder) as manager:
        manager.start(cluster)
        manager.wait("WATCHDOG=1")
        stage(cluster, 7)
        manager.catch_up()
        assert {"ledger", "gpt/0/1/data"} <= set(manager.stored)
        assert manager.end(signal.SIGTERM) == 0
        assert any("STOPPING=1" in words for words in manager.heard)
        assert not cluster.processes(0)

        manager.start(cluster)
        assert restored(cluster) == 7
        stage(cluster, 8)
        cluster.kill(0)  # both at once, as a node's supervisor does to a hung service
        assert manager.process is not None
        manager.process.wait(DEADLINE_S)
        manager.catch_up()
        manager.start(cluster)
        assert restored(cluster) == 8


def test_forgotten_memory_leaves_the_store_as_well(make_cluster: MakeCluster) -> None:
    cluster = make_cluster(nodes=1, parity=0)
    with ServiceManager(cluster.folder) as manager:
        manager.start(cluster)
        stage(cluster, 1)
        cluster.forget("gpt")

        def only_the_ledger() -> bool:
            manager.catch_up()
            return set(manager.stored) == {"ledger", "config-1"}

        until(only_the_ledger, "nothing but the ledger and the config is stored")
        assert manager.end(signal.SIGTERM) == 0


def test_a_reload_replaces_the_worker_and_loses_nothing(make_cluster: MakeCluster) -> None:
    cluster = make_cluster(nodes=1, parity=0)
    with ServiceManager(cluster.folder) as manager:
        manager.start(cluster)
        stage(cluster, 3)
        worker = cluster.worker(0)
        assert manager.process is not None
        os.kill(manager.process.pid, signal.SIGHUP)
        manager.wait("RELOADING=1")
        manager.wait("READY=1")
        assert cluster.worker(0) != worker
        assert restored(cluster) == 3
        assert manager.end(signal.SIGTERM) == 0


def upgrade(cluster: LocalCluster, node: int = 0) -> dict[str, Any]:
    done = cluster.command("upgrade", "--json", node=node)
    assert done.returncode == 0, done.stderr
    shown: dict[str, Any] = json.loads(done.stdout)
    return shown


def test_an_upgrade_keeps_every_snapshot_and_refuses_what_would_not_start(make_cluster: MakeCluster) -> None:
    cluster = make_cluster(nodes=1, parity=0)
    cluster.start()
    stage(cluster, 5)
    shown = upgrade(cluster)
    assert (shown["held"], shown["missing"], shown["session"]) == ({"gpt": 5}, [], 2)
    good, worker = cluster.config.read_text(), cluster.worker(0)
    cluster.config.write_text(good.replace("parity = 0", 'parity = "none"'))
    refused = cluster.command("upgrade")
    assert refused.returncode == 2
    assert "the running one stays" in refused.stderr
    assert "cluster.parity" in refused.stderr
    assert cluster.worker(0) == worker
    os.kill(worker, signal.SIGKILL)  # now it must be read: refused, and the memory stays held until it is right again
    cluster.wait_log(0, "refuses to start (2")
    cluster.config.write_text(good)
    cluster.wait_status(lambda status: job_row(status, "gpt")["committed_step"] == 5, "it is back with its memory")
    assert restored(cluster) == 5


def test_a_config_of_a_lower_epoch_gives_no_snapshot_up(make_cluster: MakeCluster) -> None:
    """Neither `upgrade` nor a worker that has to start with it: the memory waits for the config that it belongs to."""
    cluster = make_cluster(nodes=1, parity=0, epoch=2)
    cluster.start()
    stage(cluster, 5)
    good, worker = cluster.config.read_text(), cluster.worker(0)
    cluster.config.write_text(good.replace("epoch = 2", "epoch = 1"))
    refused = cluster.command("upgrade")
    assert refused.returncode == 5, refused.stderr
    assert "epoch: 2, in the file 1" in refused.stderr
    assert cluster.worker(0) == worker
    os.kill(worker, signal.SIGKILL)
    cluster.wait_log(0, "refuses to start (5")
    assert "snapshots of epoch 2 (this config: 1)" in cluster.log(0)
    cluster.config.write_text(good)
    cluster.wait_status(lambda status: job_row(status, "gpt")["committed_step"] == 5, "it is back with its memory")
    assert restored(cluster) == 5


def test_a_keeper_ends_where_the_node_was_taken_down(make_cluster: MakeCluster) -> None:
    """Its folder is gone and its worker dies: nothing is left that tries again for ever."""
    cluster = make_cluster(nodes=1, parity=0)
    cluster.start()
    keeper, worker = cluster.keeper(0), cluster.worker(0)
    shutil.rmtree(cluster.folder)
    os.kill(worker, signal.SIGKILL)
    until(lambda: not alive(keeper), "the keeper ends")


def test_a_key_is_rotated_while_the_cluster_runs(make_cluster: MakeCluster, tmp_path: Path) -> None:
    """n0 changes over first: the others find its new key by themselves, and still know the old one of a reconnect."""
    write_keys(tmp_path / "keys", ["n0", "n1", "n2"])
    cluster = make_cluster(nodes=3, parity=1, keys_dir=tmp_path / "keys")
    cluster.start()
    stage(cluster, 1)
    workers = [cluster.worker(node) for node in (1, 2)]
    rotate_keys(tmp_path / "keys", ["n0"])
    upgrade(cluster, 0)
    cluster.wait_up()
    assert [cluster.worker(node) for node in (1, 2)] == workers
    (tmp_path / "keys" / "n0.key_retired").unlink()
    upgrade(cluster, 1)
    cluster.wait_up()
    assert cluster.status()["verdict"] == "HEALTHY"
    assert restored(cluster) == 1
