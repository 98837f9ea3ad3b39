"""What monitors get: a code and one line."""

import json
from pathlib import Path

import pytest
from holdfast.cli.check import judge
from holdfast.cli.main import main


@pytest.mark.parametrize(
    ("verdict", "code", "state"),
    [
        ("HEALTHY", 0, "OK"),
        ("DEGRADED", 1, "WARNING"),
        ("UNPROTECTED", 2, "CRITICAL"),
        ("LOST", 2, "CRITICAL"),
        ("?", 3, "UNKNOWN"),
    ],
)
def test_each_verdict_has_its_code(verdict: str, code: int, state: str) -> None:
    found, fields = judge({"verdict": verdict, "reason": "n1\n lost", "more_losses": 1, "complete": True})
    assert (found, fields["state"]) == (code, state)
    assert fields["text"] == f"{verdict} 1 more node can be lost in every group n1 lost"


def test_a_view_of_some_nodes_only_is_unknown() -> None:
    code, fields = judge(
        {"verdict": "UNPROTECTED", "reason": "n1 (not heard yet)", "more_losses": 0, "complete": False}
    )
    assert (code, fields["state"]) == (3, "UNKNOWN")


def test_no_daemon_is_unknown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "--socket", str(tmp_path / "none")]) == 3
    assert capsys.readouterr().out.startswith("HOLDFAST UNKNOWN - no daemon answers on")


def test_json_has_a_schema(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "--json", "--socket", str(tmp_path / "none")]) == 3
    told = json.loads(capsys.readouterr().out)
    assert (told["schema"], told["exit_code"], told["state"]) == ("holdfast.check/1", 3, "UNKNOWN")


def test_other_verbs_end_with_unreachable(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for verb in (["status"], ["recover"], ["forget", "gpt"]):
        assert main([*verb, "--socket", str(tmp_path / "none")]) == 4
        assert "start one with 'holdfast daemon'" in capsys.readouterr().err


def test_a_durable_copy_that_fails_is_a_warning_and_hides_nothing_worse() -> None:
    job = {"name": "gpt", "durable": {"failures": 2, "problem": "the disk is full"}}
    status = {"verdict": "HEALTHY", "reason": "", "more_losses": 1, "complete": True, "jobs": [job]}
    code, told = judge(status)
    assert (code, told["state"]) == (1, "WARNING")
    assert told["text"].endswith("no durable copy of job gpt: the disk is full")
    assert judge(status | {"verdict": "LOST"})[0] == 2
