"""Local clusters: their files and addresses, and how their processes live and die."""

import ipaddress
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from holdfast.cli import cluster as clusters
from holdfast.cli import processes
from holdfast.cli.cluster import Cluster
from holdfast.protocol.exit_codes import ExitCode, OperatorError

DEADLINE_S = 30.0


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder with a short path, since Unix sockets go there."""
    made = Path(tempfile.mkdtemp(prefix="hf-", dir="/tmp"))
    yield made
    assert processes.using(made) == []
    shutil.rmtree(made)


def create(folder: Path, *, nodes: int = 2, parity: int = 1) -> Cluster:
    return clusters.create(
        folder, node_count=nodes, parity=parity, group_size=8, memory_share=0.01, chunk_bytes=64 << 10
    )


def until(is_so: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + DEADLINE_S
    while not is_so():
        assert time.monotonic() < deadline_s
        time.sleep(0.02)


def test_a_cluster_is_read_back_as_it_was_written(folder: Path) -> None:
    made = create(folder, nodes=3)
    again = clusters.reopen(folder)
    assert again.config == made.config
    assert again.nodes == made.nodes
    assert (len(made.nodes), made.config.parity, made.config.chunk_bytes) == (3, 1, 64 << 10)
    assert made.sockets.split(",") == [f"{folder}/n{index}/holdfast.sock" for index in range(3)]
    assert sorted(path.name for path in (folder / "keys").glob("*.key_secret")) == [
        f"n{i}.key_secret" for i in range(3)
    ]
    share_bytes = (made.config.budget_bytes or 0) * 3
    assert share_bytes == pytest.approx(clusters.available_bytes() * 0.01, rel=0.3)


def test_a_folder_without_a_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OperatorError, match="give --dir another folder") as raised:
        clusters.reopen(tmp_path)
    assert raised.value.exit_code == ExitCode.USAGE


def test_addresses_are_of_this_machine_alone_and_differ() -> None:
    found = clusters.free_addresses(5)
    hosts = {address.rpartition(":")[0] for address in found}
    assert all(ipaddress.ip_address(host).is_loopback for host in hosts)
    assert len(set(found)) == 5
    assert len(hosts) == 1


def test_a_users_variables_do_not_reach_the_daemons(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOLDFAST_CLUSTER_PARITY", "7")
    monkeypatch.setenv("UNRELATED", "stays")
    found = clusters.clean_environment({"HOLDFAST_SOCKET": "ours"})
    assert found["UNRELATED"] == "stays"
    assert [name for name in found if name.startswith("HOLDFAST_")] == ["HOLDFAST_SOCKET"]


def test_a_log_is_quoted_by_its_end(tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert "can't be read" in clusters.tail(log)
    log.write_text("\n".join(f"line {number}" for number in range(100)))
    text = clusters.tail(log)
    assert "line 99" in text
    assert len(text.splitlines()) == clusters.LOG_LINES_SHOWN + 1


@pytest.mark.integration
def test_a_node_is_killed_with_all_its_processes_and_replaced(folder: Path) -> None:
    with create(folder) as cluster:
        cluster.start(cluster.nodes)
        cluster.wait_up()
        before = {row["name"]: row["incarnation"] for row in cluster.status()["nodes"]}
        cluster.kill(["n1"])
        assert processes.using(cluster.nodes["n1"].socket) == []
        assert cluster.ended() == {}  # killed on purpose
        cluster.start(["n1"])
        cluster.wait_up()

        def after() -> dict[str, int]:
            return {row["name"]: row["incarnation"] for row in cluster.status("n0")["nodes"]}

        until(lambda: after()["n1"] > before["n1"])  # it takes the slot once the one before it is silent
        assert after()["n0"] == before["n0"]
        # A worker that dies is brought back, and is the keeper's only child.
        (worker,) = cluster.worker_pids("n0")
        processes.kill([worker])
        until(lambda: cluster.worker_pids("n0") not in ([], [worker]))
        # A keeper that dies is brought back by its worker, in a session of its own: the node has not ended.
        keeper = cluster.keeper_pid("n1")
        processes.kill([keeper])
        until(lambda: not processes.alive(keeper) and len(processes.using(cluster.nodes["n1"].socket)) == 2)
        assert cluster.ended() == {}
        assert cluster.stop() == []


@pytest.mark.integration
def test_a_daemon_that_cannot_start_is_named_with_its_exit_code_and_log(folder: Path) -> None:
    with create(folder) as cluster:
        (folder / "keys" / "n1.key_secret").unlink()  # a key that the operator forgot to copy
        cluster.start(cluster.nodes)
        with pytest.raises(OperatorError, match=r"the daemon of node n1 ended with status \d") as raised:
            cluster.wait_up()
        assert raised.value.exit_code in {ExitCode.USAGE, ExitCode.WRONG_CLUSTER}
        assert "n1.key_secret" in str(raised.value)
