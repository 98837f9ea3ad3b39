"""A few faults on real daemons, in namespaces where they are allowed; `make chaos MINUTES=30` is half an hour of it."""

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.integration, pytest.mark.chaos]

PROGRAM = Path(__file__).parent / "chaos.py"
RUN_S = 110.0  # takes a tenth of it on idle cores


def chaos(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(PROGRAM), *words], capture_output=True, text=True, timeout=RUN_S, check=False
    )


def test_everything_is_restored_after_each_of_a_few_faults() -> None:
    done = chaos("--seed", "23", "--turns", "2", "--only", "nodes_lost", "link_cut_one_way")
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
    assert "in namespaces" in done.stdout or "on loopback" in done.stdout
    assert "clean: seed 23" in done.stdout
