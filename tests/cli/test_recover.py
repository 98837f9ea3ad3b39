"""What counts as lost, and when watching a rebuild ends; the daemon here is a script of statuses."""

import json
from typing import Any, cast

import pytest
from holdfast.cli import recover
from holdfast.cli.link import Daemon
from holdfast.protocol.exit_codes import ExitCode, OperatorError


def status(lost_bytes: int, *, rebuilt_bytes: int = 0, rebuild: str = "", verdict: str = "DEGRADED") -> dict[str, Any]:
    held = {
        "committed_step": 5,
        "whole": not lost_bytes,
        "lost_bytes": lost_bytes,
        "rebuilt_bytes": rebuilt_bytes,
        "rebuild": rebuild,
    }
    whole = {"committed_step": 5, "whole": True, "lost_bytes": 0, "rebuilt_bytes": 0, "rebuild": ""}
    return {
        "complete": True,
        "unheard": [],
        "jobs": [{"name": "gpt", "verdict": verdict, "committed_step": 5, "reason": "n1, n2 lost"}],
        "nodes": [
            {"name": "n0", "state": "up", "jobs": {"gpt": whole}},
            {"name": "n1", "state": "up", "jobs": {"gpt": held}},
        ],
    }


class Script:
    """Gives one status after the other, and counts how often a rebuild was asked for."""

    def __init__(self, *statuses: dict[str, Any]) -> None:
        self.statuses, self.asked = list(statuses), 0

    def status(self) -> dict[str, Any]:
        return self.statuses.pop(0) if len(self.statuses) > 1 else self.statuses[0]

    def recover(self, node: str | None = None) -> None:
        self.asked += 1


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recover, "LOOK_S", 0.0)
    monkeypatch.setattr(recover, "ASK_AGAIN_S", 0.0)
    monkeypatch.setattr(recover, "STALLED_S", 0.05)


def test_only_nodes_that_lost_something_count() -> None:
    assert recover.losses(status(10, rebuilt_bytes=4, rebuild="running")) == {
        "n1": {"lost_bytes": 10, "rebuilt_bytes": 4, "received_bytes": 0, "rebuild_s": 0.0, "rebuild": "running"}
    }
    assert recover.losses(status(0)) == {}


def test_watching_ends_when_nothing_is_lost() -> None:
    seen: list[dict[str, dict[str, Any]]] = []
    script = Script(status(10), status(10, rebuilt_bytes=5, rebuild="running"), status(0))
    recover.watch(cast("Daemon", script), {"n1"}, seen.append)
    assert [sum(entry["rebuilt_bytes"] for entry in lost.values()) for lost in seen] == [0, 5, 0]
    assert script.asked == 1, "a wish that may have been lost is said again, a running rebuild is left alone"


def test_a_replacement_that_does_not_know_the_layout_yet_counts_as_lost() -> None:
    fresh = status(0)
    fresh["nodes"][1]["jobs"]["gpt"]["whole"] = False
    assert set(recover.losses(fresh)) == {"n1"}


def test_watching_does_not_end_before_every_node_was_heard() -> None:
    unheard = status(0) | {"complete": False, "unheard": ["n0"]}
    looks: list[int] = []
    recover.watch(cast("Daemon", Script(unheard, unheard, status(0))), {"n1"}, lambda lost: looks.append(len(lost)))
    assert looks == [0, 0, 0]


@pytest.mark.parametrize(("verdict", "asked"), [("LOST", 0), ("DEGRADED", recover.FAILURES_MAX)])
def test_a_failed_rebuild_is_tried_again_while_enough_is_left(verdict: str, asked: int) -> None:
    script = Script(status(10, rebuild="failed", verdict=verdict))
    with pytest.raises(OperatorError, match="rebuild of n1 failed") as error:
        recover.watch(cast("Daemon", script), {"n1"}, lambda _: None)
    assert error.value.exit_code is ExitCode.NOT_RECOVERABLE
    assert script.asked == asked


def test_no_progress_is_said() -> None:
    with pytest.raises(OperatorError, match="no progress for"):
        recover.watch(cast("Daemon", Script(status(10, rebuild="running"))), {"n1"}, lambda _: None)


def entry(**changes: Any) -> dict[str, Any]:
    plain = {"lost_bytes": 4000, "rebuilt_bytes": 0, "received_bytes": 0, "rebuild_s": 0.0, "rebuild": ""}
    return plain | changes


def test_how_long_it_should_take_follows_from_the_rate_so_far() -> None:
    assert recover.expected_s(entry(rebuild="running", rebuilt_bytes=1000, rebuild_s=0.5)) == pytest.approx(1.5)
    assert recover.expected_s(entry(rebuild="running")) is None
    assert recover.expected_s(entry(rebuild="failed", rebuilt_bytes=1000, rebuild_s=0.5)) is None


def test_a_plan_names_who_gives() -> None:
    seen = status(10)
    seen["groups"] = [["n0", "n1", "n2"]]
    seen["nodes"].append({"name": "n2", "state": "down", "jobs": {}})
    assert recover.givers(seen, {"n1": entry()}) == {"n1": ["n0"]}


def test_progress_is_a_json_line_for_each_change(capsys: pytest.CaptureFixture[str]) -> None:
    show = recover.Progress()
    for rebuilt_bytes in (1000, 1000, 2000):
        show({"n1": entry(rebuild="running", rebuilt_bytes=rebuilt_bytes, rebuild_s=1.0)})
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert [(line["node"], line["rebuilt_bytes"], line["expected_s"]) for line in lines] == [
        ("n1", 1000, 3.0),
        ("n1", 2000, 1.0),
    ]
