"""The ranks' events: read as they come, kept over restarts."""

import json
from pathlib import Path

import pytest
from holdfast.cli.demo_log import RunLog


def start(rank: int, *, restart: int = 0) -> dict[str, object]:
    return {"event": "start", "rank": rank, "pid": 100 * restart + rank, "restart_count": restart}


def step(rank: int, step: int, loss: float = 1.0) -> dict[str, object]:
    return {"event": "step", "rank": rank, "step": step, "loss": loss, "loss_hex": loss.hex(), "stall_s": 0.25}


def filled(*events: dict[str, object], world_size: int = 2) -> RunLog:
    log = RunLog(Path("unused"), world_size)
    for event in events:
        log.take(event)
    return log


def test_a_file_is_read_as_it_grows_and_a_half_line_waits(tmp_path: Path) -> None:
    log = RunLog(tmp_path / "events", 2)
    log.read()  # not there yet
    assert log.restart == -1
    line = json.dumps(step(0, 4)) + "\n"
    log.path.write_text(json.dumps(start(0)) + "\n" + line[:20])
    log.read()
    assert (log.pids, log.newest_step) == ({0: 0}, -1)
    with log.path.open("a") as stream:
        stream.write(line[20:])
    log.read()
    log.read()  # nothing new: nothing counted twice
    assert log.newest_step == 4
    assert log.stalls_s == [0.25]


def test_the_step_of_all_is_the_slowest_ranks() -> None:
    log = filled(start(0), start(1), step(0, 3), step(0, 4))
    assert (log.newest_step, log.step_of_all, log.all_started) == (4, -1, True)
    log.take(step(1, 3))
    assert log.step_of_all == 3


def test_a_restart_forgets_the_life_before_but_not_its_losses() -> None:
    log = filled(start(0), start(1), step(0, 3), step(1, 3), start(0, restart=1))
    assert (log.restart, log.pids, log.newest_step) == (1, {0: 100}, -1)
    log.take({"event": "restored", "rank": 0, "step": 2, "sha256": "aa"})
    assert log.restored_by_all is None
    log.take(start(1, restart=1))
    log.take({"event": "restored", "rank": 1, "step": 2, "sha256": "bb"})
    assert log.restored_by_all == 2
    log.take(step(0, 3, loss=7.0))
    assert log.losses[3] == {(1.0).hex(), (7.0).hex()}
    assert log.hashes == {(2, 0): {"aa"}, (2, 1): {"bb"}}
    assert log.restored_steps == [2]


def test_a_mix_of_restored_steps_is_never_passed_over() -> None:
    log = filled(start(0), start(1))
    for rank in (0, 1):
        log.take({"event": "restored", "rank": rank, "step": rank, "sha256": "aa"})
    with pytest.raises(AssertionError, match="a mix of steps"):
        _ = log.restored_by_all


def test_the_end_and_what_is_not_known() -> None:
    log = filled(start(0), {"event": "end", "rank": 0, "stats": None}, {"event": "of a later version", "rank": 0})
    assert log.ended == {0}
