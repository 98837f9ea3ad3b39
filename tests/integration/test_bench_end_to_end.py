"""The bench runs and prints every figure. Not a judge of speed."""

import json
import subprocess
import sys
from pathlib import Path

BENCH = Path(__file__).parents[2] / "bench" / "end_to_end.py"
WHATS = [
    "machine",
    "idle daemon",
    "client import and attach",
    "stall, nothing to hide behind",
    "stall, nothing to hide behind, worst",
    "stall, first snapshot",
    "stall, steps of 3 copies",
    "step() to COMMITTED",
    "memory held",
    "restore from the own node, attach and agreement included",
    "rebuild of a lost node",
]


def test_quick_bench_prints_every_figure() -> None:
    done = subprocess.run(
        [sys.executable, str(BENCH), "--quick"], capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row["what"] for row in rows] == WHATS
    assert all({"goal", "met"} <= set(row) for row in rows[1:])
    figures = {row["what"]: row for row in rows}
    assert figures["memory held"]["ratio"] < 1.2  # small images: the last chunk of each is rounded up
    assert figures["client import and attach"]["foreign_modules"] == 0
    assert figures["rebuild of a lost node"]["rebuilt_bytes"] > 2 * 12 << 20
