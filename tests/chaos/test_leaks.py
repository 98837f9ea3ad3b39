"""A process that grows or that is left is named with its kind and its number."""

import os
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "integration"))
sys.path.insert(0, str(Path(__file__).parent))

from leaks import OWN_SLACK_BYTES, THREADS_SLACK, Held, growth, held_by, strangers

BEFORE = Held(pid=10, files=Counter({"/memfd:holdfast-data": 2}), sockets=3, threads=6, own_bytes=50 << 20)


def test_what_holds_no_more_has_not_grown() -> None:
    assert growth("worker of n1", BEFORE, replace(BEFORE, pid=11, threads=6 + THREADS_SLACK)) == []


@pytest.mark.parametrize(
    ("after", "word"),
    [
        (
            replace(BEFORE, files=BEFORE.files + Counter({"/dev/null": 3})),
            "descriptors from 2 to 5, new: 3 x /dev/null",
        ),
        (replace(BEFORE, sockets=99), "sockets from 3 to 99"),
        (replace(BEFORE, threads=8), "threads from 6 to 8"),
        (replace(BEFORE, own_bytes=BEFORE.own_bytes + OWN_SLACK_BYTES + 1), "own memory from 52428800 to"),
    ],
)
def test_what_grew_is_named(after: Held, word: str) -> None:
    [text] = growth("worker of n1", BEFORE, after)
    assert text.startswith(f"worker of n1 (process 10) grew: {word}")


def test_descriptors_of_a_real_process_are_counted() -> None:
    before = held_by(os.getpid())
    files = [os.open("/dev/null", os.O_RDONLY) for _ in range(4)]
    try:
        [text] = growth("rank 0 of solo", before, held_by(os.getpid()))
        assert "new: 4 x /dev/null" in text
    finally:
        for file in files:
            os.close(file)


@pytest.mark.parametrize(
    ("word", "kind"),
    [("holdfast.daemon.keeper", "keeper"), ("holdfast.daemon.shell.worker", "worker"), ("x", "process")],
)
def test_a_process_that_is_left_is_named_with_its_kind(tmp_path: Path, word: str, kind: str) -> None:
    script = "import sys; print(flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", script, word, str(tmp_path / "socket")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as left:
        assert left.stdout is not None
        left.stdout.readline()
        try:
            [text] = strangers(set(), folder=tmp_path, everywhere=False)
            assert text.startswith(f"{kind} (process {left.pid}) is left:")
            assert strangers({left.pid}, folder=tmp_path, everywhere=False) == []
        finally:
            left.kill()
