"""Finding and killing our own processes by what stands on their command line."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from holdfast.cli import processes

Sleeper = subprocess.Popen[bytes]


@pytest.fixture
def sleeper(tmp_path: Path) -> Iterator[Sleeper]:
    """A process that waits for its input to end and has a path of this test among its arguments."""
    command = [sys.executable, "-c", "import sys; print(flush=True); sys.stdin.read()", str(tmp_path / "own" / "file")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()  # it runs
        yield process
        process.kill()


def test_a_process_is_found_by_a_path_of_its_arguments(sleeper: Sleeper, tmp_path: Path) -> None:
    assert processes.using(tmp_path / "own" / "file") == [sleeper.pid]
    assert processes.using(tmp_path / "own") == [sleeper.pid]
    assert processes.using(tmp_path / "ow") == []  # a name that only begins alike
    assert sleeper.pid in processes.children(os.getpid())


def test_killing_all_leaves_none(sleeper: Sleeper, tmp_path: Path) -> None:
    assert processes.kill_all_using(tmp_path) == []
    assert not processes.alive(sleeper.pid)  # a zombie does not count
    assert sleeper.wait(10) == -9


def test_who_does_not_end_is_named(monkeypatch: pytest.MonkeyPatch, sleeper: Sleeper, tmp_path: Path) -> None:
    monkeypatch.setattr(processes, "END_S", 0.0)
    monkeypatch.setattr(processes, "kill", lambda pids: None)
    assert processes.kill_all_using(tmp_path) == [sleeper.pid]


def test_a_process_that_is_gone_is_no_error(sleeper: Sleeper) -> None:
    sleeper.kill()
    sleeper.wait(10)
    processes.kill([sleeper.pid])
    assert not processes.alive(sleeper.pid)
    assert processes.arguments(sleeper.pid) == []
    assert processes.children(sleeper.pid) == []


def test_an_environment_is_what_a_process_was_started_with() -> None:
    with subprocess.Popen(["sleep", "60"], env={"HOLDFAST_X": "a=b", "PATH": "/bin:/usr/bin"}) as running:
        deadline_s = time.monotonic() + 10
        while (seen := processes.environment(running.pid)).get("HOLDFAST_X") != "a=b":
            assert time.monotonic() < deadline_s, seen
        running.kill()
    assert processes.environment(running.pid) == {}
