"""Which coding engine a daemon runs: reported, forced by the environment, and never another one in silence."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from holdfast.coding import select_engine
from local_cluster import DEADLINE_S, LocalCluster

MakeCluster = Callable[..., LocalCluster]

# As on a machine without a C compiler, where the extension was left out of the installation.
NOT_BUILT = 'import sys\nsys.modules["holdfast.coding._native"] = None\n'


@pytest.fixture
def not_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sitecustomize.py").write_text(NOT_BUILT)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}")


def test_a_forced_engine_runs_and_is_reported(make_cluster: MakeCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOLDFAST_DAEMON_ENGINE", "numpy")
    cluster = make_cluster(nodes=1, parity=0)
    cluster.start()
    assert cluster.status()["nodes"][0]["engine"] == "numpy"
    cluster.wait_log(0, f"coding engine numpy ({select_engine('numpy').detail})")
    shown = cluster.command("config", "show", str(cluster.config))
    assert "engine  numpy on this machine" in shown.stdout


@pytest.mark.usefixtures("not_built")
def test_a_forced_engine_that_is_not_there_is_refused_with_those_that_are(
    make_cluster: MakeCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOLDFAST_DAEMON_ENGINE", "native")
    cluster = make_cluster(nodes=1, parity=0)
    found = subprocess.run(
        [sys.executable, "-m", "holdfast.daemon.keeper", "--", "--config", str(cluster.config), "--node", "n0",
         "--socket", str(cluster.socket(0))],
        capture_output=True, text=True, timeout=DEADLINE_S, check=False,
    )  # fmt: skip
    assert found.returncode == 2, found.stderr
    assert "the native engine is not built here" in found.stderr
    assert f"usable here: {'isal, ' if has_isal() else ''}numpy, naive" in found.stderr
    assert "Traceback" not in found.stderr


@pytest.mark.usefixtures("not_built")
def test_without_the_extension_the_next_best_runs_and_one_line_says_so(make_cluster: MakeCluster) -> None:
    cluster = make_cluster(nodes=1, parity=0)
    cluster.start()
    name = "isal" if has_isal() else "numpy"
    assert cluster.status()["nodes"][0]["engine"] == name
    cluster.wait_log(0, f"coding runs on {name}, slower than our own kernel: the native engine is not built here")


def has_isal() -> bool:
    found = subprocess.run(
        [sys.executable, "-c", "from holdfast.coding import engine_names; print('isal' in engine_names())"],
        capture_output=True, text=True, timeout=DEADLINE_S, check=True,
    )  # fmt: skip
    return found.stdout.strip() == "True"
