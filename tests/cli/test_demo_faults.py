"""The waits of the demonstration: each ends in time and says what it waited for. The faults themselves are real, and
run in test_demo.
"""

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from holdfast.cli.cluster import Cluster
from holdfast.cli.demo_faults import Stage
from holdfast.cli.demo_log import RunLog
from holdfast.cli.demo_training import Training
from holdfast.cli.demo_view import LineView
from holdfast.protocol.exit_codes import ExitCode, OperatorError


class Answers:
    """A cluster whose daemons answer with what the test sets, or not at all."""

    def __init__(self) -> None:
        self.nodes = dict.fromkeys(["n0", "n1", "n2"])
        self.answer: dict[str, Any] | None = None
        self.asked: list[str | None] = []

    def status(self, name: str | None) -> dict[str, Any]:
        self.asked.append(name)
        if self.answer is None:
            raise OperatorError(ExitCode.UNREACHABLE, "away")
        return self.answer

    def log_hint(self, name: str) -> str:
        return f"the log of {name}"


def stage(folder: Path, *, ended: bool = False) -> tuple[Stage, Answers]:
    answers = Answers()
    training = SimpleNamespace(
        log=RunLog(folder / "events", 3), living_count=0, output=folder / "output", has_ended=lambda: ended
    )
    return Stage(cast("Cluster", answers), cast("Training", training), LineView()), answers


def test_a_wait_that_takes_too_long_says_for_what_and_shows_the_logs(tmp_path: Path) -> None:
    waiting, answers = stage(tmp_path)
    answers.answer = {"verdict": "LOST", "reason": "n1 lost", "jobs": [], "nodes": []}
    (tmp_path / "output").write_text("the last words")
    with pytest.raises(OperatorError, match=r"waited 0\.05 s for a miracle") as raised:
        waiting.until(lambda: False, "a miracle", seconds=0.05)
    for part in ("verdict LOST, n1 lost", "the last words", "the log of n0"):
        assert part in str(raised.value)


def test_a_training_that_ends_first_is_said(tmp_path: Path) -> None:
    waiting, _ = stage(tmp_path, ended=True)
    with pytest.raises(OperatorError, match="the training ended before a fault; give more --steps") as raised:
        waiting.until(lambda: False, "a fault")
    assert raised.value.exit_code == ExitCode.USAGE
    assert waiting.until(lambda: True, "what has been so before the end") > 0


def test_a_daemon_that_is_away_keeps_what_was_known(tmp_path: Path) -> None:
    waiting, answers = stage(tmp_path)
    assert waiting.committed_step == -1
    answers.answer = {"jobs": [{"committed_step": 3}], "nodes": [{"name": "n1", "state": "up"}]}
    waiting.look()
    answers.answer, waiting.next_status_s = None, 0.0
    waiting.look()
    assert waiting.committed_step == 3
    assert waiting.node("n1")["state"] == "up"


def test_who_is_about_to_be_killed_is_not_asked(tmp_path: Path) -> None:
    waiting, answers = stage(tmp_path)
    waiting.spare(["n0", "n2"])
    waiting.look()
    assert answers.asked == ["n1"]
