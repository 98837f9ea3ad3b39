"""What `holdfast drill` says of a proof, and which exit code it has."""

from typing import Any

import pytest
from holdfast.cli.drill import _code, describe
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
