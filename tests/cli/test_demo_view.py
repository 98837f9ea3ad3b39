"""What is shown while the demonstration runs: plain lines where nobody watches, a picture on a terminal."""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from holdfast.cli import demo_view
from holdfast.cli.demo_log import RunLog
from holdfast.cli.demo_training import Training
from holdfast.cli.demo_view import LineView, LiveView, choose_view, node_cells, progress_text


def node(name: str, *, state: str = "up", lost_bytes: int = 0, rebuild: str = "") -> dict[str, Any]:
    held = {"lost_bytes": lost_bytes, "rebuilt_bytes": lost_bytes // 4, "rebuild": rebuild, "ranks": [0]}
    return {"name": name, "state": state, "jobs": {"job": held} if state == "up" else {}}


STATUS: dict[str, Any] = {
    "jobs": [{"committed_step": 4}],
    "nodes": [
        node("n0"),
        node("n1", state="down"),
        node("n2", lost_bytes=4 << 20),
        node("n3", lost_bytes=4 << 20, rebuild="running"),
    ],
}


def training() -> Training:
    """A run whose two ranks have reached step 5; one of them lives."""
    log = RunLog(Path("unused"), 2, restart=0, pids={0: 10, 1: 11}, step_of={0: 5, 1: 4}, loss=2.5)
    return cast("Training", SimpleNamespace(log=log, living_count=1))


def test_every_state_of_a_node_has_its_words() -> None:
    assert node_cells(STATUS) == [
        ("n0", "up", "up, 1 rank attached"),
        ("n1", "down", "down"),
        ("n2", "lost", "lost 4.0 MiB"),
        ("n3", "rebuilding", "rebuilding  25% of 4.0 MiB"),
    ]
    assert node_cells(None) == []


def test_progress_says_who_lives_and_how_far_it_is() -> None:
    assert progress_text(STATUS, training()) == "1 of 2 ranks running, step 5, committed step 4, loss 2.5000"
    assert progress_text(None, None) == ""


def test_lines_go_to_stderr_and_never_twice(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo_view, "LINE_S", 0.0)
    with LineView() as view:
        view.say("a phase")
        view.show(STATUS, training())
        view.show(STATUS, training())
    out, err = capsys.readouterr()
    assert out == ""
    phase, progress = err.splitlines()
    assert phase.endswith("s] a phase")
    assert progress.endswith("loss 2.5000; n1 down, n2 lost 4.0 MiB, n3 rebuilding  25% of 4.0 MiB")


def test_the_picture_shows_nodes_progress_and_phase(capsys: pytest.CaptureFixture[str]) -> None:
    with LiveView() as view:
        view.say("a [bold]phase")  # not markup: shown as it is
        view.show(STATUS, training())
    out, err = capsys.readouterr()
    assert out == ""
    assert "a [bold]phase" in err


def test_a_picture_is_for_terminals_that_want_colour(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert isinstance(choose_view(), LineView)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert isinstance(choose_view(), LiveView)
    monkeypatch.setenv("NO_COLOR", "")
    assert isinstance(choose_view(), LineView)
