"""`holdfast local` end to end: real daemons, a user's own script on them, and nothing left behind."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from holdfast.cli import processes
from holdfast.cli.cluster import clean_environment
from holdfast.cli.link import Daemon
from holdfast.cli.main import main
from holdfast.protocol.exit_codes import ExitCode

pytestmark = pytest.mark.integration

UP_S, STOP_S, TRAIN_S = 60.0, 30.0, 100.0  # each takes a tenth of it on idle cores
SCRIPT = Path(__file__).with_name("user_script.py")
Started = tuple[subprocess.Popen[str], dict[str, Any]]


@contextmanager
def local(*arguments: str, **environment: str) -> Iterator[Started]:
    """A running `holdfast local --json` and what it printed; stopped in the end if the test hasn't."""
    command = [sys.executable, "-m", "holdfast.cli.main", "local", "--json", *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, **environment}) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()  # the test's own timeout bounds this; daemons have theirs
            yield process, json.loads(line)
        finally:
            process.terminate()
            process.wait(STOP_S)


@pytest.fixture(scope="module")
def pair() -> Iterator[dict[str, Any]]:
    """Two nodes that protect each other."""
    with local("--nodes", "2", "--parity", "1") as (_, told):
        yield told


def test_daemons_come_up_answer_and_stop_without_a_trace(tmp_path: Path) -> None:
    # Short, since the sockets go there; and variables of the user's shell must not reach these daemons.
    with local("--nodes", "3", TMPDIR="/tmp", HOLDFAST_CLUSTER_PARITY="0") as (process, told):
        assert told["schema"] == "holdfast.local/1"
        assert [node["name"] for node in told["nodes"]] == ["n0", "n1", "n2"]
        folder = Path(told["dir"])
        assert Path(told["config"]).parent == folder
        with Daemon(Path(told["nodes"][1]["socket"])) as daemon:
            status = daemon.status()
        assert (status["verdict"], status["parity"]) == ("HEALTHY", 2)
        assert [node["address"] for node in status["nodes"]] == [node["address"] for node in told["nodes"]]
        assert all(processes.alive(node["pid"]) for node in told["nodes"])
        process.send_signal(signal.SIGINT)
        assert process.wait(STOP_S) == ExitCode.DONE
        assert processes.using(folder) == []
        assert not folder.exists()


def test_a_folder_is_used_again_and_only_for_the_same_cluster(
    tmp_path_factory: pytest.TempPathFactory, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path_factory.mktemp("d")
    arguments = ("--nodes", "2", "--parity", "1", "--dir", str(folder))
    with local(*arguments) as (_, first):
        files = {path: path.read_bytes() for path in [folder / "cluster.toml", *(folder / "keys").iterdir()]}
    assert processes.using(folder) == []
    with local(*arguments) as (_, second):
        assert [node["socket"] for node in second["nodes"]] == [node["socket"] for node in first["nodes"]]
    assert files == {path: path.read_bytes() for path in files}
    assert main(["local", "--nodes", "3", "--dir", str(folder)]) == ExitCode.USAGE
    assert "is of 2 nodes with parity 1, asked for 3" in capsys.readouterr().err


def test_a_daemon_that_ends_for_good_is_said() -> None:
    command = [sys.executable, "-m", "holdfast.cli.main", "local", "--json", "--nodes", "1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        os.kill(json.loads(process.stdout.readline())["nodes"][0]["pid"], signal.SIGTERM)
        _, said = process.communicate(timeout=STOP_S)
    assert process.returncode == ExitCode.UNREACHABLE
    assert "node n0 ended for good with status 0" in said
    assert "signal 15: stopping" in said  # the end of its log


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--nodes", "2", "--parity", "2"], "--parity: expected less than the 2 nodes, found 2"),
        (["--nodes", "2", "--dir", "/tmp/" + 100 * "x"], "choose a shorter folder"),
        (["--nodes", "2", "--dir", "/proc/nowhere"], "give --dir another"),
    ],
)
def test_what_cannot_be_is_refused(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["local", *arguments]) == ExitCode.USAGE
    assert words in capsys.readouterr().err
    assert not Path("/tmp/" + 100 * "x").exists()


@pytest.mark.timeout(150)
@pytest.mark.parametrize("world_size", [2, 4], ids=["one rank per node", "two ranks per node"])
def test_a_users_script_goes_on_bit_for_bit_after_all_its_ranks_were_killed(
    pair: dict[str, Any], world_size: int, tmp_path: Path
) -> None:
    sockets = ",".join(node["socket"] for node in pair["nodes"])
    job, steps, die_after = f"script-{world_size}", 6, 3
    added = {"HOLDFAST_SOCKET": sockets, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "TMPDIR": str(tmp_path)}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world_size}"]
    done = subprocess.run(
        [*launcher, "--max-restarts=2", str(SCRIPT), str(tmp_path), job, str(steps), str(die_after)],
        env=clean_environment({**added, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "GLOO_SOCKET_IFNAME": "lo"}),
        capture_output=True,
        text=True,
        timeout=TRAIN_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for rank in range(world_size):
        events = [json.loads(line) for line in (tmp_path / f"{job}-{rank}.jsonl").read_text().splitlines()]
        first, second = (event for event in events if event["event"] == "start")
        assert first["restored"] is None
        assert second["restored"] == die_after
        hashes = {event["step"]: event["sha256"] for event in events if event["event"] == "step"}
        assert second["sha256"] == hashes[die_after]
        assert sorted(hashes) == list(range(steps))
        assert events[-1]["stats"]["committed_step"] == steps - 1
    assert processes.using(tmp_path) == []
