"""What `holdfast drill` says of a proof, and which exit code it has."""

from typing import Any

import pytest
from holdfast.cli import drill
from holdfast.cli.drill import _code, _settled, describe
from holdfast.protocol.exit_codes import ExitCode

PROOF: dict[str, Any] = {
    "proven_step": 7, "survives": 2, "age_s": 41.6, "rebuild_bytes_per_s": 3 << 29, "stripes": 8, "patterns": 30,
    "columns": 480, "failures": 0, "problem": "", "drilled_step": 7, "drills": 3, "running": False,
}  # fmt: skip


def job(verdict: str = "HEALTHY", **changes: object) -> dict[str, Any]:
    return {"name": "gpt", "verdict": verdict, "reason": "", "committed_step": 7, "drill": {**PROOF, **changes}}


def test_a_proof_is_told_in_a_line() -> None:
    assert describe(job()) == (
        "job gpt: step 7 survives any 2 losses, proven 42 s ago, rebuild 1.50 GiB/s "
        "(8 stripes, 30 patterns, 480 columns by reedsolo)"
    )
    assert "any 1 loss, proven" in describe(job(survives=1))
    assert "no further loss, proven" in describe(job(survives=0))
    assert "rebuild 1.0 MiB/s" in describe(job(rebuild_bytes_per_s=1 << 20))
    assert describe(job(proven_step=None, problem="bits rot")) == "job gpt: NOT proven: bits rot"
    assert describe(job() | {"drill": None}) == "job gpt: NOT proven: no drill has ended yet"
    assert describe(job(failures=1, problem="bits rot")).endswith("; then a drill failed: bits rot")


@pytest.mark.parametrize(
    ("row", "code"),
    [
        (job(), ExitCode.DONE),
        (job(failures=1), ExitCode.BAD_DIGEST),
        (job(proven_step=None), ExitCode.NOT_RECOVERABLE),
        (job("LOST"), ExitCode.NOT_RECOVERABLE),
        (job() | {"drill": None}, ExitCode.NOT_RECOVERABLE),
    ],
)
def test_the_exit_code_tells_what_was_found(row: dict[str, Any], code: ExitCode) -> None:
    assert _code(row) is code


class Answers:
    """A daemon that answers one status after the other, the last one for ever."""

    def __init__(self, *statuses: dict[str, Any]) -> None:
        self.left = list(statuses)

    def status(self) -> dict[str, Any]:
        return self.left.pop(0) if len(self.left) > 1 else self.left[0]


def seen(*holders: str, participants: list[str] | None, committed: int | None = 7) -> dict[str, Any]:
    held = {"gpt": {"committed_step": 7, "whole": True, "drill": {"drills": 0}}}
    names = {"n0": "up", "n1": "up", "n2": "down"}
    return {
        "nodes": [{"name": n, "state": s, "jobs": held if n in holders else {}} for n, s in names.items()],
        "jobs": [{"name": "gpt", "committed_step": committed, "participants": participants}],
    }


def test_a_drill_begins_once_all_who_live_were_heard_to_hold_the_snapshot() -> None:
    everybody = ["n0", "n1", "n2"]
    whole = seen("n0", "n1", participants=everybody)
    daemon = Answers(seen("n0", participants=None), seen("n0", participants=everybody), whole)
    assert _settled(daemon) is whole  # type: ignore[arg-type]
    nothing = seen(participants=None, committed=None)
    assert _settled(Answers(nothing, whole)) is nothing  # type: ignore[arg-type]


def test_who_holds_nothing_is_not_waited_for_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drill, "SETTLE_S", 0.0)
    without = seen("n0", participants=["n0", "n1"])
    assert _settled(Answers(without)) is without  # type: ignore[arg-type]
