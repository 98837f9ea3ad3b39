"""A Lightning training that is killed in mid-epoch goes on as if nothing had been. Run by `make loops-test`."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest
from holdfast.cli.cluster import clean_environment

pytestmark = pytest.mark.loops
LOOP = Path(__file__).parents[2] / "examples" / "lightning_loop.py"
RUN_S = 100.0  # a tenth of it on idle cores


def run(sockets: str, job: str, kill_at: int = -1) -> list[str]:
    """The lines that it printed: each step with its loss to the last bit, and at the end a digest of its state."""
    added = {"HOLDFAST_SOCKET": sockets, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, str(LOOP), "--epochs", "3", "--job", job, "--kill-at", str(kill_at)],
        env=clean_environment(added),
        capture_output=True,
        text=True,
        timeout=RUN_S,
        check=False,
    )
    assert done.returncode == (-signal.SIGKILL if kill_at >= 0 else 0), done.stderr[-3000:]
    return done.stdout.splitlines()


@pytest.fixture(scope="module")
def whole(sockets: str) -> list[str]:
    lines = run(sockets, "whole")
    assert [line.split()[1] for line in lines[:-1]] == [str(step) for step in range(36)]
    assert lines[-1].startswith("done at step 36")
    return lines


# In the first epoch, on the first batch of the second, after it, and in its middle, where validation has just run.
@pytest.mark.parametrize("kill_at", [4, 12, 13, 18])
def test_a_killed_training_goes_on_bit_for_bit(sockets: str, whole: list[str], kill_at: int) -> None:
    before = run(sockets, f"killed-{kill_at}", kill_at)
    assert before == whole[:kill_at]
    after = run(sockets, f"killed-{kill_at}")
    assert after == whole[-len(after) :]
    assert len(after) < len(whole)  # it did not begin anew
    assert len(after) >= len(whole) - kill_at  # nothing is left out
