"""How the process that makes a copy ends, and what the core hears of it."""

import queue
from pathlib import Path

import pytest
from holdfast.daemon.core import events
from holdfast.daemon.core.actions import CopyDurably
from holdfast.daemon.shell.copying import Copier
from holdfast.protocol.ids import SnapshotId

WAIT_S = 20.0


def end_of(program: str, folder: Path, monkeypatch: pytest.MonkeyPatch, *, deadline_s: float = WAIT_S) -> events.Event:
    (folder / "stand_in.py").write_text(program)
    monkeypatch.setenv("PYTHONPATH", str(folder))
    heard: queue.SimpleQueue[events.Event] = queue.SimpleQueue()
    copier = Copier(folder / "socket", "n0", heard.put)
    copier.order(CopyDurably("gpt", "/copies", 2), program="stand_in", deadline_s=deadline_s)
    try:
        return heard.get(timeout=WAIT_S)
    finally:
        copier.stop()


def test_what_was_copied_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = "import json, os, sys; assert os.nice(0) > 0 and '--keep' in sys.argv\n"
    program += "print(json.dumps({'attempt': 2, 'step': 7, 'size_bytes': 9, 'seconds': 1.5}))"
    assert end_of(program, tmp_path, monkeypatch) == events.DurablyCopied("gpt", SnapshotId(2, 7), 9, 1.5)


@pytest.mark.parametrize(
    ("program", "said"),
    [
        ("import sys; sys.exit('holdfast: the disk is full')", "the disk is full"),
        ("import os; os.kill(os.getpid(), 9)", "ended with"),
        ("print('nonsense')", "something else than expected"),
        ("import time; time.sleep(60)", "not done within"),
    ],
)
def test_each_other_end_is_a_failure_with_its_reason(
    program: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended = end_of(program, tmp_path, monkeypatch, deadline_s=2.0)
    assert isinstance(ended, events.CopyFailed)
    assert said in ended.reason
