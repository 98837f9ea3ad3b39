"""The demonstration's verdict: what counts as survived, and what one wrong bit does to it."""

from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any, get_args

import pytest
from holdfast.cli import demo_report
from holdfast.cli.demo_log import RunLog
from holdfast.cli.demo_report import Fault, Figures, Kind, Shape

SHAPE = Shape(nodes=2, parity=1, kill=1, steps=3)
FIGURES = Figures(snapshot_bytes=3 << 20, arena_bytes=12 << 20, phases_s={"fault 1": 2.5})


def log(*, restored: int | None = None) -> RunLog:
    """A run of three steps on two ranks; every state's hash tells its step and rank."""
    run = RunLog(Path("unused"), 2)
    for step in range(3):
        run.losses[step] = {float(step).hex()}
    for rank in range(2):
        for hashed in {2, 2 if restored is None else restored}:
            run.hashes[hashed, rank] = {f"{hashed}{rank}" * 32}
    run.stalls_s = [0.001, 0.003, 0.5]
    return run


def fault(kind: Kind) -> Fault:
    lost: dict[str, Any] = {"rebuilt_s": 1.5, "rebuilt_bytes": 5 << 20, "rebuild_s": 0.5} if kind == "nodes" else {}
    return Fault(
        kind=kind, at_step=1, restored_step=1, killed=("n0",), detected_s=0.5, restored_s=2, resumed_s=3, **lost
    )


ALL = [fault(kind) for kind in get_args(Kind)]


def test_equal_runs_are_equal() -> None:
    found = demo_report.compare(log(restored=1), log(restored=1), steps=3)
    assert (found.bit_exact, found.losses_equal, found.differences) == (True, True, ())
    assert found.final_sha256 == sha256(bytes.fromhex("20" * 32) + bytes.fromhex("21" * 32)).hexdigest()
    assert found.reference_sha256 == found.final_sha256
    assert demo_report.survived(ALL, found)


@pytest.mark.parametrize(
    ("key", "words"),
    [((1, 0), "step 1, rank 0: SHA-256"), ((2, 1), "step 2, rank 1: SHA-256")],
    ids=["a restored state", "the final state"],
)
def test_another_hash_of_one_rank_is_not_bit_exact(key: tuple[int, int], words: str) -> None:
    run = log(restored=1)
    run.hashes[key] = {"ff" * 32}
    found = demo_report.compare(run, log(restored=1), steps=3)
    assert (found.bit_exact, found.losses_equal) == (False, True)
    assert words in found.differences[0]
    assert not demo_report.survived(ALL, found)
    assert "NOT bit-exact" in demo_report.verdict(SHAPE, ALL, found)


def test_a_hash_that_nobody_reported_is_not_bit_exact() -> None:
    assert not demo_report.compare(log(restored=1), log(), steps=3).bit_exact
    run = log(restored=1)
    del run.hashes[2, 0], run.hashes[2, 1]
    found = demo_report.compare(run, log(restored=1), steps=3)
    assert not found.bit_exact
    assert found.final_sha256 == ""
    assert "no hash of the last step, 2" in found.differences[0]


def test_a_step_trained_twice_must_have_one_loss() -> None:
    run = log()
    run.losses[1].add((9.0).hex())
    found = demo_report.compare(run, log(), steps=3)
    assert (found.bit_exact, found.losses_equal) == (True, False)
    assert "losses are NOT equal" in demo_report.verdict(SHAPE, ALL, found)
    del run.losses[1]
    assert not demo_report.compare(run, log(), steps=3).losses_equal


def test_fewer_faults_are_not_survived() -> None:
    found = demo_report.compare(log(), log(), steps=3)
    assert not demo_report.survived(ALL[:2], found)
    assert "2 of 3 faults" in demo_report.verdict(SHAPE, ALL[:2], found)


def test_the_report_has_the_promised_fields() -> None:
    found = demo_report.compare(log(), log(), steps=3)
    fields = demo_report.report(SHAPE, log(), ALL, comparison=found, figures=FIGURES)
    promised = {"nodes", "parity", "killed_nodes", "killed_at_step", "restored_step", "faults", "bit_exact"}
    promised |= {"losses_equal", "final_sha256", "reference_sha256", "stall_s_median", "snapshot_bytes", "arena_bytes"}
    assert promised <= set(fields)
    assert (fields["killed_nodes"], fields["killed_at_step"], fields["restored_step"]) == (["n0"], 1, 1)
    assert (fields["stall_s_median"], fields["rebuilt_bytes"], fields["survived"]) == (0.003, 5 << 20, True)
    faults = fields["faults"]
    assert isinstance(faults, list)
    assert [one["kind"] for one in faults] == ["ranks", "worker", "nodes"]
    assert all({"kind", "at_step", "restored_step", "seconds"} <= set(one) for one in faults)


def test_the_table_ends_with_the_verdict() -> None:
    found = demo_report.compare(log(), log(), steps=3)
    text = demo_report.render(SHAPE, log(), ALL, comparison=found, figures=FIGURES)
    assert text.splitlines()[-1].startswith("SURVIVED")
    assert "3.0 ms per step" in text
    assert "5.0 MiB in 0.50 s" in text
    broken = replace(found, bit_exact=False, differences=("step 1 differs",))
    text = demo_report.render(SHAPE, log(), ALL, comparison=broken, figures=FIGURES)
    assert "step 1 differs" in text
    assert text.splitlines()[-1].startswith("FAILED")


def test_times_that_go_backwards_are_no_fault() -> None:
    with pytest.raises(AssertionError):
        replace(ALL[0], restored_s=0.1)
    with pytest.raises(AssertionError):
        replace(ALL[0], restored_step=2)
