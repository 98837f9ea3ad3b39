"""The demonstration itself, with small numbers: real daemons, real ranks, real kills."""

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from holdfast.cli import processes
from holdfast.cli.demo import fault_steps, spread
from holdfast.cli.main import main
from holdfast.protocol.exit_codes import ExitCode

DEMO_S = 220.0  # a third of it on two idle cores


@pytest.fixture
def place() -> Iterator[Path]:
    """A short folder that the demonstration makes its own in; it must be empty in the end."""
    with tempfile.TemporaryDirectory(prefix="hf-", dir="/tmp") as name:
        yield Path(name)
        assert processes.using(Path(name)) == []
        assert list(Path(name).iterdir()) == []


def start(place: Path, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "holdfast.cli.main", "demo", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "TMPDIR": str(place), "HOLDFAST_CLUSTER_PARITY": "0"},
    )


def demo(place: Path, *arguments: str) -> tuple[int, dict[str, Any], str]:
    """Exit status, the object on stdout, and stderr."""
    with start(place, "--json", *arguments) as process:
        try:
            out, err = process.communicate(timeout=DEMO_S)
        finally:
            process.terminate()
    assert out, f"exit status {process.returncode} without a report; the last that was said: {err[-4000:]}"
    return process.returncode, json.loads(out), err


@pytest.mark.integration
@pytest.mark.timeout(240)
def test_a_lost_node_is_rebuilt_and_training_goes_on_bit_for_bit(place: Path) -> None:
    status, found, said = demo(place, "--nodes", "4", "--parity", "1", "--kill", "1", "--steps", "12")
    assert status == ExitCode.DONE, said
    assert found["schema"] == "holdfast.demo/1"
    assert (found["bit_exact"], found["losses_equal"], found["survived"]) == (True, True, True)
    assert found["final_sha256"] == found["reference_sha256"] != ""
    assert [fault["kind"] for fault in found["faults"]] == ["ranks", "worker", "nodes"]
    assert found["killed_nodes"] == ["n0"]
    assert 0 <= found["restored_step"] <= found["killed_at_step"]
    assert found["rebuilt_bytes"] > 0
    assert found["arena_bytes"] >= 2 * found["snapshot_bytes"] > 2 << 20  # millions of parameters, two slots
    assert found["stall_s_median"] > 0


@pytest.mark.integration
@pytest.mark.timeout(240)
def test_more_losses_than_parity_end_with_what_was_lost_and_what_was_needed(place: Path) -> None:
    status, found, said = demo(place, "--nodes", "3", "--parity", "1", "--kill", "2", "--steps", "12")
    assert status == ExitCode.NOT_RECOVERABLE, said
    assert (found["survived"], found["bit_exact"], found["killed_nodes"]) == (False, False, ["n0", "n1"])
    last = said.splitlines()[-1]
    for part in ("not recoverable: n0, n1", "the snapshot of step", "at least 1 of these nodes", "--parity 2"):
        assert part in last


@pytest.mark.integration
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_everything(place: Path, number: signal.Signals) -> None:
    with start(place, "--nodes", "2", "--parity", "1", "--kill", "1") as process:
        assert process.stderr is not None
        for line in process.stderr:
            if "training ranks" in line:
                break
        process.send_signal(number)
        _, said = process.communicate(timeout=30)
    assert process.returncode == 128 + signal.SIGINT
    assert f"stopped by {number.name}" in said


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--nodes", "4", "--kill", "4"], "--kill: expected less than the 4 nodes"),
        (["--nodes", "2"], "--parity: expected less than the 2 nodes, found 2; --kill"),
        (["--kill", "0"], "argument --kill"),
        (["--steps", "3"], "argument --steps: expected a whole number from 8"),
    ],
)
def test_what_cannot_be_shown_is_refused(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", *arguments]) == ExitCode.USAGE
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("steps", [8, 9, 24, 1000])
def test_faults_come_neither_at_the_start_nor_at_the_end(steps: int) -> None:
    first, second, third = fault_steps(steps)
    assert 2 <= first < second < third < steps - 1


def test_killed_nodes_are_spread_and_the_collector_is_among_them() -> None:
    names = [f"n{index}" for index in range(6)]
    assert spread(names, 1) == ("n0",)
    assert spread(names, 2) == ("n0", "n3")
    assert spread(names, 5) == ("n0", "n1", "n2", "n3", "n4")
