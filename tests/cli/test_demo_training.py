"""The demonstration's launcher: its command line, its environment, and ends that are not the planned one."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from holdfast.cli import demo_training, processes
from holdfast.cli.demo_training import Launch, Training, refuse_missing_torch
from holdfast.protocol.exit_codes import ExitCode, OperatorError

DEADLINE_S = 20.0
Stand = Callable[[str], None]


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Stand:
    """Has Python code run in place of the launcher; it sees the run's events file as its argument."""

    def install(code: str) -> None:
        monkeypatch.setattr(demo_training, "_command", lambda launch, events: [sys.executable, "-c", code, str(events)])

    return install


def training(folder: Path) -> Training:
    return Training(Launch(name="run", folder=folder, ranks=2, steps=8, sockets="a,b", hash_steps=(1, 4)))


def ended(run: Training) -> bool:
    deadline_s = time.monotonic() + DEADLINE_S
    while not run.has_ended():
        assert time.monotonic() < deadline_s
        time.sleep(0.01)
    return True


def test_the_ranks_get_the_sockets_and_nothing_of_the_users(
    stand_in: Stand, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOLDFAST_CLUSTER_PARITY", "7")
    stand_in(
        "import os, json; print(json.dumps({k: v for k, v in os.environ.items() if k[:4] in {'HOLD', 'TMPD', 'CUDA'}}))"
    )
    run = training(tmp_path)
    assert ended(run)
    expected = {"HOLDFAST_SOCKET": "a,b", "CUDA_VISIBLE_DEVICES": "", "TMPDIR": str(tmp_path / "scratch")}
    assert json.loads(run.output.read_text()) == expected


def test_the_command_line_names_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []
    monkeypatch.setattr(subprocess, "Popen", lambda command, **_: seen.append(command))
    Training(Launch(name="run", folder=tmp_path, ranks=3, steps=8, hash_steps=(1, 4)))
    (command,) = seen
    assert "--nproc-per-node=3" in command
    assert command[command.index("--hash-steps") + 1] == "1,4"
    assert "--no-snapshots" in command  # no sockets were given
    assert command[command.index("--events") + 1] == str(tmp_path / "run.events")


def test_a_launcher_that_fails_is_said_with_the_end_of_its_output(stand_in: Stand, tmp_path: Path) -> None:
    stand_in("raise SystemExit('the reason why')")
    with pytest.raises(OperatorError, match="ended with status 1") as raised:
        ended(training(tmp_path))
    assert "the reason why" in str(raised.value)


def test_killing_reaches_launcher_and_ranks(stand_in: Stand, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(
        "import subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)', sys.argv[1]])\n"
        "print(child.pid, flush=True)\n"
        "child.wait(); time.sleep(600)"
    )
    run = training(tmp_path)
    deadline_s = time.monotonic() + DEADLINE_S
    while len(processes.using(run.log.path)) < 2 or not run.output.read_text().strip():
        assert time.monotonic() < deadline_s
        time.sleep(0.01)
    (child,) = run.rank_pids
    stranger = os.getppid()  # the second rank's number has become somebody else's
    run.log.pids = {0: child, 1: stranger}
    killed: list[int] = []
    with monkeypatch.context() as patch:
        patch.setattr(processes, "kill", killed.extend)
        run.kill_ranks([0, 1])
    assert killed == [child]
    run.kill_ranks([0])
    while processes.alive(child):
        assert time.monotonic() < deadline_s
        time.sleep(0.01)
    run.kill()
    assert processes.using(tmp_path) == []


def test_without_torch_nothing_is_started(monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_missing_torch()
    monkeypatch.setattr(demo_training, "find_spec", lambda name: None)
    with pytest.raises(OperatorError, match=r"pip install 'holdfast\[torch\]'") as raised:
        refuse_missing_torch()
    assert raised.value.exit_code == ExitCode.USAGE
