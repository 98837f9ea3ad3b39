"""Asking every node: first for its clock, then for what it remembers; who does not answer is named once."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import pytest
from holdfast.cli import trace
from holdfast.cli.main import main
from holdfast.protocol.exit_codes import ExitCode
from holdfast.protocol.ids import SnapshotId
from holdfast.protocol.trace import NodeTrace, Span, TraceAnswer


class FakeDaemon:
    """Nodes a and c answer, b does not."""

    asked: list[tuple[list[int], int]]

    def __init__(self, path: Path) -> None:
        FakeDaemon.asked = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def status(self) -> dict[str, Any]:
        return {"cluster": "lab", "nodes": [{"name": name} for name in "abc"]}

    def traces(self, nodes: Sequence[int], newest: int) -> list[TraceAnswer]:
        self.asked.append((list(nodes), newest))
        return [self.answer(node, newest) for node in nodes]

    def answer(self, node: int, newest: int) -> TraceAnswer:
        if node == 1:
            return TraceAnswer(1, node, None, 100, 200, "nothing is heard from it")
        spans = (Span("protect", "gpt", SnapshotId(1, 7), -1, 1000, 2000),) if newest else ()
        return TraceAnswer(1, node, NodeTrace(150 + node * 10_000, 0, spans), 100, 200)


@pytest.fixture(autouse=True)
def fake(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trace, "Daemon", FakeDaemon)


@pytest.mark.parametrize("words", [["trace", "--last", "3"], ["trace", "--last", "3", "--json"]])
def test_the_trace_goes_to_stdout_and_what_there_is_to_say_to_stderr(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == ExitCode.DONE
    told = capsys.readouterr()
    shown = json.loads(told.out)
    assert (shown["schema"], shown["otherData"]["missing"]) == ("holdfast.trace/1", {"b": "nothing is heard from it"})
    assert {event["pid"] for event in shown["traceEvents"]} == {1, 3}
    assert "2 of 3 nodes" in told.err
    assert "missing: b: nothing is heard from it" in told.err
    assert FakeDaemon.asked == [
        ([0, 1, 2], 0),
        *[([0, 2], 0)] * (trace.CLOCK_QUESTIONS - 1),
        ([0, 2], 3),
    ]


def test_it_goes_to_a_file_or_says_why_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trace", "--out", str(tmp_path / "t.json")]) == ExitCode.DONE
    assert json.loads((tmp_path / "t.json").read_text())["traceEvents"]
    assert capsys.readouterr().out == ""
    assert main(["trace", "--out", str(tmp_path / "none" / "t.json")]) == ExitCode.USAGE
    assert "name another" in capsys.readouterr().err
