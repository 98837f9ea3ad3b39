"""Daemons, configs and budgets that don't fit are refused by name, on both sides, and the good cluster goes on."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from holdfast.client import Snapshotter
from holdfast.client.errors import HoldfastError
from local_cluster import DEADLINE_S, LocalCluster, job_row

MakeCluster = Callable[..., LocalCluster]


def commits(cluster: LocalCluster, job: str) -> None:
    with Snapshotter({"s": torch.arange(1000)}, job=job, socket=cluster.socket(0), on_error="raise") as snapshotter:
        snapshotter.step(0)
        snapshotter.wait(timeout_s=DEADLINE_S)
    cluster.forget(job)


def steps(snapshotter: Snapshotter, count: int) -> None:
    for step in range(count):
        snapshotter.step(step)


@pytest.mark.parametrize(
    ("difference", "code", "said"),
    [
        ({"name": "other"}, "cluster", "expected cluster 'test', found 'other'"),
        ({"epoch": 7}, "epoch", "expected epoch 1, found 7"),
        ({"parity": 2}, "config", "expected config digest"),
    ],
    ids=["cluster", "epoch", "config"],
)
def test_a_daemon_that_does_not_belong_is_refused_by_name(
    cluster: LocalCluster, make_cluster: MakeCluster, difference: dict[str, object], code: str, said: str
) -> None:
    """Its node 0 has an address of its own; its file names the good cluster's nodes as its others."""
    ports = [port_of(make_cluster), *cluster.ports[1:]]
    stranger = make_cluster(**{"nodes": 3, "parity": 1, "ports": ports, **difference})
    stranger.start([0], wait=False)
    seen = stranger.wait_status(lambda s: s["nodes"][1]["state"] == "refused", "it hears that it is refused")
    assert said in seen["nodes"][1]["reason"], (code, seen["nodes"][1])
    assert "refuses us" in seen["nodes"][1]["reason"]
    cluster.wait_log(1, said)
    commits(cluster, f"beside-{code}")
    assert cluster.status()["verdict"] == "HEALTHY"


def port_of(make_cluster: MakeCluster) -> int:
    return make_cluster(nodes=1, parity=0).ports[0]


def make_keys(folder: Path, cluster: LocalCluster) -> None:
    made = cluster.command("keys", "init", "--config", str(cluster.config), "--dir", str(folder))
    assert made.returncode == 0, made.stderr


def test_keys(make_cluster: MakeCluster, tmp_path: Path) -> None:
    """An unlisted key, no key at all, and a listed key under another node's name: none is let in; the good go on."""
    good = make_cluster(nodes=3, parity=1, keys_dir=tmp_path / "good")
    make_keys(tmp_path / "good", good)
    good.start()
    ports = [port_of(make_cluster), *good.ports[1:]]
    unlisted = make_cluster(nodes=3, parity=1, ports=ports, keys_dir=tmp_path / "unlisted")
    make_keys(tmp_path / "unlisted", unlisted)
    keyless = make_cluster(nodes=3, parity=1, ports=[port_of(make_cluster), *good.ports[1:]])
    for stranger in (unlisted, keyless):
        stranger.start([0], wait=False)
    for stranger in (unlisted, keyless):
        seen = stranger.wait_status(
            lambda s: s["nodes"][1]["state"] == "refused" and s["nodes"][2]["state"] == "refused", "it is refused"
        )
        assert "key" in seen["nodes"][1]["reason"]
        assert "compare the keys folders" in seen["nodes"][1]["reason"]
    good.wait_log(1, "failed its handshake")
    commits(good, "with-keys")
    assert good.status()["verdict"] == "HEALTHY"


def test_a_listed_key_does_not_speak_for_another_node(make_cluster: MakeCluster, tmp_path: Path) -> None:
    good = make_cluster(nodes=3, parity=1, keys_dir=tmp_path / "keys")
    make_keys(tmp_path / "keys", good)
    good.start()
    # The impostor's folder is the good one, but that "n0" in it has n2's pair.
    swapped = tmp_path / "swapped"
    swapped.mkdir()
    for file in (tmp_path / "keys").iterdir():
        (swapped / file.name).write_bytes(file.read_bytes())
    for suffix in ("key", "key_secret"):
        (swapped / f"n0.{suffix}").write_bytes((tmp_path / "keys" / f"n2.{suffix}").read_bytes())
        (swapped / f"n2.{suffix}").write_bytes((tmp_path / "keys" / f"n0.{suffix}").read_bytes())
    for file in swapped.iterdir():
        file.chmod(0o600)
    impostor = make_cluster(nodes=3, parity=1, ports=[port_of(make_cluster), *good.ports[1:]], keys_dir=swapped)
    incarnation = good.status(1)["nodes"][0]["incarnation"]
    impostor.start([0], wait=False)
    seen = impostor.wait_status(lambda s: s["nodes"][1]["state"] == "refused", "the impostor is refused")
    assert "expected the key of node n0, found that of node n2" in seen["nodes"][1]["reason"]
    assert good.status(1)["nodes"][0]["incarnation"] == incarnation
    commits(good, "beside-impostor")


def test_a_config_with_five_mistakes_reports_five(tmp_path: Path) -> None:
    config = tmp_path / "five.toml"
    config.write_text(
        '[cluster]\nname = "x"\nparity = "two"\nepoch = 0\n[memory]\nslots = 1\nbugdet = "1GiB"\n'
        '[[node]]\nname = "a"\naddress = "nowhere"\n'
    )
    for module in (["holdfast.cli.main", "daemon"], ["holdfast.daemon.keeper", "--"]):
        extra = [] if module[1] == "daemon" else ["--node", "a", "--socket", str(tmp_path / "s")]
        found = subprocess.run(
            [sys.executable, "-m", *module, "--config", str(config), *extra],
            capture_output=True, text=True, timeout=DEADLINE_S, check=False,
        )  # fmt: skip
        assert found.returncode == 2, found.stderr
        for field in ("cluster.parity", "cluster.epoch", "memory.slots", "memory.bugdet", "node[0].address"):
            assert len([line for line in found.stderr.splitlines() if field in line]) == 1, (field, found.stderr)


def test_a_missing_or_unreadable_config_is_the_operators_business(tmp_path: Path) -> None:
    for name in ("absent.toml", "folder"):
        (tmp_path / "folder").mkdir(exist_ok=True)
        found = subprocess.run(
            [sys.executable, "-m", "holdfast.daemon.keeper", "--", "--config", str(tmp_path / name), "--node", "a",
             "--socket", str(tmp_path / "s")],
            capture_output=True, text=True, timeout=DEADLINE_S, check=False,
        )  # fmt: skip
        assert found.returncode == 2, found.stderr
        assert name in found.stderr
        assert "Traceback" not in found.stderr


def test_a_second_start_of_a_node_is_refused(cluster: LocalCluster) -> None:
    workers = [cluster.worker(node) for node in range(3)]
    for socket in (cluster.socket(0), cluster.folder / "elsewhere.sock"):  # the same socket, and only the same address
        found = subprocess.run(
            [sys.executable, "-m", "holdfast.daemon.keeper", "--", "--config", str(cluster.config), "--node", "n0",
             "--socket", str(socket)],
            capture_output=True, text=True, timeout=DEADLINE_S, check=False,
        )  # fmt: skip
        assert found.returncode == 2, found.stderr
        assert "Traceback" not in found.stderr
        assert "already running" in found.stderr or "can't listen on 127.0.0.1" in found.stderr
    commits(cluster, "after-second-start")
    assert [cluster.worker(node) for node in range(3)] == workers


def test_a_socket_where_none_can_be_is_the_operators_business(cluster: LocalCluster, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for socket in (tmp_path / "file" / "s.sock", tmp_path / ("long" * 40) / "s.sock"):
        found = subprocess.run(
            [sys.executable, "-m", "holdfast.daemon.keeper", "--", "--config", str(cluster.config), "--node", "n0",
             "--socket", str(socket)],
            capture_output=True, text=True, timeout=DEADLINE_S, check=False,
        )  # fmt: skip
        assert found.returncode == 2, found.stderr
        assert "Traceback" not in found.stderr


def test_a_budget_too_small_is_refused_with_the_numbers(make_cluster: MakeCluster) -> None:
    cluster = make_cluster(nodes=2, parity=1, budget="4MiB")
    cluster.start()
    state = {"s": torch.zeros(4 << 20, dtype=torch.uint8)}
    strict = Snapshotter(state, job="big", socket=cluster.socket(0), on_error="raise")
    with pytest.raises(HoldfastError) as refusal:
        strict.step(0)
    for word in ("needed", "allowed", "free on this machine", "memory.budget"):
        assert word in str(refusal.value)
    strict.close()
    patient = Snapshotter(state, job="big", socket=cluster.socket(0))
    with pytest.warns(RuntimeWarning, match="training runs on, unprotected.*needed") as said:
        steps(patient, 20)
    assert len(said) == 1
    patient.close()
    cluster.forget("big")
    assert cluster.status()["nodes"][0]["arena_bytes"] == 0
    commits(cluster, "small")


def test_the_budget_of_a_peer_counts_as_well(make_cluster: MakeCluster) -> None:
    """Node 1 has no room for the parity: nothing commits, the rank learns why, nothing breaks."""
    cluster = make_cluster(nodes=2, parity=1, budget="64MiB")
    cluster.start([0], wait=False)
    cluster.wait_status(lambda s: s["nodes"][0]["state"] == "up", "node 0 has read its config")
    cluster.config.write_text(cluster.config.read_text().replace("64MiB", "2MiB"))
    cluster.start([1], wait=False)
    cluster.wait_up()
    state = {"s": torch.zeros(4 << 20, dtype=torch.uint8)}
    snapshotter = Snapshotter(state, job="big", socket=cluster.socket(0), on_error="raise", max_stall_s=2.0)
    snapshotter.step(0)
    with pytest.raises(HoldfastError, match="memory"):
        snapshotter.wait(timeout_s=10)
    assert job_row(cluster.status(), "big")["committed_step"] is None
    with pytest.raises(HoldfastError, match="memory budget of node n1"):
        snapshotter.close()
