"""`holdfast upgrade`: what counts as lost, and when nothing is touched. Exchanges: integration/test_service."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from holdfast.cli import processes
from holdfast.cli.main import main
from holdfast.cli.upgrade import WORKER, lost, refuse_worse
from holdfast.protocol.exit_codes import ExitCode, OperatorError


def row(**whole: bool) -> dict[str, object]:
    return {"jobs": {name: {"whole": is_whole, "committed_step": 1} for name, is_whole in whole.items()}}


def test_lost_is_what_was_whole_and_is_not_any_more() -> None:
    assert lost(row(a=True, b=True, c=False), row(a=True, b=False, c=False)) == ["b"]
    assert lost(row(a=True), row()) == ["a"]
    assert lost(row(), row(a=True)) == []


def test_a_process_that_is_no_worker_is_left_alone() -> None:
    with pytest.raises(OperatorError, match="is no worker that this command can see") as caught:
        refuse_worse(os.getpid())
    assert caught.value.exit_code is ExitCode.UNREACHABLE


def test_a_worker_that_would_not_start_again_is_not_stopped(tmp_path: Path) -> None:
    """A process with a worker's arguments and a config that is wrong now: refused in the config's own words."""
    config = tmp_path / "c.toml"
    config.write_text('[cluster]\nname = "x"\nparity = 7\n[[node]]\nname = "a"\naddress = "127.0.0.1:1"\n')
    arguments = ["-m", "holdfast.daemon.shell.worker", "--config", str(config), "--node", "a", "--socket", "/x"]
    sleeper = "import sys; sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", sleeper, *arguments], stdin=subprocess.PIPE) as running:
        deadline_s = time.monotonic() + 10
        while WORKER not in processes.arguments(running.pid):  # its command line appears a moment after the process
            assert time.monotonic() < deadline_s
        with pytest.raises(OperatorError, match=r"the running one stays: (.|\n)*cluster\.parity") as caught:
            refuse_worse(running.pid)
        assert caught.value.exit_code is ExitCode.USAGE
        assert running.poll() is None
        running.terminate()


def test_without_a_daemon_there_is_nothing_to_upgrade(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["upgrade", "--socket", str(tmp_path / "none.sock")]) == ExitCode.UNREACHABLE
    assert "no daemon answers" in capsys.readouterr().err
