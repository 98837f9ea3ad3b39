"""A run in namespaces leaves nothing, however it ends; runs side by side do not see each other."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "integration"))
sys.path.insert(0, str(Path(__file__).parent))

import isolation
from local_cluster import alive, until

pytestmark = pytest.mark.integration
in_namespaces = pytest.mark.skipif(bool(isolation.obstacle()), reason="needs namespaces")

# Inside: a namespace and a link of fixed names, and a process that has lost its parent. The mark is in its arguments.
_MAKE = "ip netns add same && ip link add name same type veth peer name eth0 netns same"
_PROGRAM = f"{_MAKE} && (setsid sleep 1000.{{mark}} &) && echo made && sleep 1000.{{mark}}"
_OUTSIDE = "import sys, isolation; sys.exit(isolation.run(['sh', '-c', sys.argv[1]]))"


def start(mark: int) -> subprocess.Popen[bytes]:
    outside = subprocess.Popen(
        [sys.executable, "-c", _OUTSIDE, _PROGRAM.format(mark=mark)],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent)},
    )
    assert outside.stdout is not None
    assert outside.stdout.readline() == b"made\n"
    return outside


def sleepers(mark: int) -> list[int]:
    word = f"1000.{mark}".encode()
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if (
                entry.name.isdigit()
                and word in (entry / "cmdline").read_bytes().split(b"\0")
                and alive(int(entry.name))
            ):
                found.append(int(entry.name))
        except OSError:
            continue
    return found


@in_namespaces
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_run_that_is_killed_leaves_nothing_and_another_goes_on(number: signal.Signals) -> None:
    marks = [os.getpid() * 10, os.getpid() * 10 + 1]
    with start(marks[0]) as killed, start(marks[1]) as other:
        try:
            until(lambda: all(len(sleepers(mark)) == 2 for mark in marks), "both processes of both runs")
            killed.send_signal(number)
            killed.wait(20)
            until(lambda: not sleepers(marks[0]), "every process inside ends")
            assert len(sleepers(marks[1])) == 2, "another run is not touched"
        finally:
            killed.kill()
            other.kill()
    until(lambda: not sleepers(marks[1]), "every process inside ends")
    assert not Path("/run/netns/same").exists()
    assert not Path("/sys/class/net/same").exists()


@in_namespaces
def test_the_status_of_the_program_is_that_of_the_run() -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    done = subprocess.run([sys.executable, "-c", _OUTSIDE, "exit 7"], env=environment, check=False)
    assert done.returncode == 7


def test_without_namespaces_a_guard_ends_what_a_killed_run_left(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    script = (
        "import sys, subprocess, time, pathlib, isolation; folder = pathlib.Path(sys.argv[1]);"
        "words = [sys.executable, '-c', 'import time; time.sleep(1000)', str(folder / 'socket')];"
        "left = subprocess.Popen(words, start_new_session=True);"
        "guard = isolation.guard(folder); print(left.pid, flush=True); time.sleep(1000)"
    )
    words = [sys.executable, "-c", script, str(folder)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    with subprocess.Popen(words, stdout=subprocess.PIPE, env=environment) as killed:
        assert killed.stdout is not None
        left = int(killed.stdout.readline())
        assert alive(left)
        killed.kill()
    until(lambda: not alive(left) and not folder.exists(), "the guard ends what is left")
